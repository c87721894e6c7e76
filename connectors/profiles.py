"""Provider profiles: what is particular about an endpoint, as data.

A profile says how to authenticate, where the usage stands in an answer, and what an error means. The client that reads
it (``http_engine``) knows no provider by name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from bidbeam.connectors import cloud_regions, profile_errors
from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.profile_record import (
    Auth,
    ErrorClass,
    ErrorRule,
    PriceUnit,
    Profile,
    Residency,
    ToldRegion,
    UsagePointers,
    Variant,
)
from bidbeam.connectors.secrets import looks_like_secret

__all__ = ["DEFAULT_PROFILE", "PROFILES", "ErrorClass", "ErrorRule", "PriceUnit", "Profile", "profile", "resolved"]

_SEND_AGAIN = ("try again in", "retry after")
_CLOUD = {"operator": "cloud", "operator_jurisdiction": "US"}
_OUTPUT_LIMIT = "the body field that limits the answer, where the model behind it wants the other one"
_LIMITS = ("max_tokens", "max_completion_tokens")
_OTHER_LIMIT = tuple(Variant({"max_tokens_field": (name,)}, max_tokens_field=name) for name in _LIMITS)

_AZURE_GLOBAL = ("GlobalStandard", "GlobalProvisionedManaged", "GlobalBatch")
_AZURE_ZONE = ("DataZoneStandard", "DataZoneProvisionedManaged", "DataZoneBatch")
_AZURE_REGION = ("Standard", "ProvisionedManaged")

_BUILT_IN: tuple[Profile, ...] = (
    Profile(
        "openai-compatible",
        error_map=profile_errors.OPENAI,
        retry_after_phrases=_SEND_AGAIN,
        options={"max_tokens_field": _OUTPUT_LIMIT},
        choices={"max_tokens_field": _LIMITS},
        variants=_OTHER_LIMIT,
    ),
    Profile(
        "vllm",
        # What it writes to its cache costs nothing by itself: a meter only where the pool's price has one.
        usage=UsagePointers(cache_write="/usage/prompt_tokens_details/created_cache_tokens"),
        error_map=profile_errors.OPENAI,
        takes_cache_salt=True,
    ),
    Profile(
        "openai",
        base_url="https://api.openai.com/v1",
        auth=Auth(env="OPENAI_API_KEY", required=True),
        usage=UsagePointers(cost=None),
        error_map=profile_errors.OPENAI,
        retry_after_phrases=_SEND_AGAIN,
        sends_request_id="X-Client-Request-Id",
        max_tokens_field="max_completion_tokens",
        labels=_CLOUD,
    ),
    Profile(
        "openrouter",
        base_url="https://openrouter.ai/api/v1",
        auth=Auth(env="OPENROUTER_API_KEY", required=True),
        error_map=profile_errors.OPENROUTER,
        retry_after_phrases=_SEND_AGAIN,
        request_id_headers=("x-generation-id", "x-request-id"),
        sends_request_id=None,
        options={
            "region": "the region that prompts do not leave; its gateway is another host",
            "privacy": "what the providers behind it may do: no-training, or zdr for no retention at all",
            "provider": "the one provider behind it that may serve, as it is named in requests, such as deepinfra/fp8",
        },
        choices={"region": ("eu", "us"), "privacy": ("no-training", "zdr")},
        variants=(
            Variant(
                {"region": ("eu",)},
                base_url="https://eu.openrouter.ai/api/v1",
                labels={"jurisdiction": "EU", "data_zone": "EU"},
            ),
            Variant(
                {"region": ("us",)},
                base_url="https://us.openrouter.ai/api/v1",
                labels={"jurisdiction": "US", "data_zone": "US"},
            ),
            Variant(
                {"privacy": ("no-training",)},
                labels={"training": False},
                body={"provider": {"data_collection": "deny"}},
            ),
            Variant(
                {"privacy": ("zdr",)},
                labels={"training": False, "zdr": True},
                body={"provider": {"data_collection": "deny", "zdr": True}},
            ),
            Variant({"provider": ()}, body={"provider": {"only": ["{provider}"], "allow_fallbacks": False}}),
        ),
        price_unit="usd/token",
    ),
    Profile(
        "chutes",
        base_url="https://llm.chutes.ai/v1",
        auth=Auth(env="CHUTES_API_KEY", required=True),
        # Its gateway bills by counters of its own and names no cost.
        usage=UsagePointers(cost=None),
        error_map=profile_errors.CHUTES,
        request_id_headers=("x-chutes-invocationid",),
        labels={"operator": "community"},
        price_unit="usd/mtok",
    ),
    Profile(
        "prime",
        base_url="https://api.pinference.ai/api/v1",
        auth=Auth(env="PRIME_API_KEY", required=True),
        error_map=profile_errors.PRIME,
        retry_after_phrases=_SEND_AGAIN,
        headers={"X-Prime-Team-ID": "{team_id}"},
        options={"team_id": "the team whose wallet pays; without it the key's own does"},
        price_unit="usd/mtok",
    ),
    Profile(
        # The address is that of an operator's node, and so is all that could be declared about it.
        "pai3",
        auth=Auth(),
        error_map=profile_errors.OPENAI,
        retry_after_phrases=_SEND_AGAIN,
    ),
    Profile(
        "azure",
        base_url="https://{resource}.services.ai.azure.com/openai/v1",
        auth=Auth(
            header="api-key",
            scheme="",
            required=True,
            tokens="entra",
            scope="https://cognitiveservices.azure.com/.default",
        ),
        usage=UsagePointers(cost=None),
        error_map=profile_errors.AZURE,
        retry_after_phrases=_SEND_AGAIN,
        request_id_headers=("apim-request-id", "x-ms-request-id", "x-request-id"),
        sends_request_id="x-ms-client-request-id",
        # A deployment is asked for, under whatever name it has; the answer names the model in it.
        echoes_model=False,
        labels=_CLOUD,
        residency=(
            Residency("region", cloud_regions.AZURE_ZONES, {"deployment": _AZURE_ZONE}),
            Residency("region", cloud_regions.AZURE, {"deployment": _AZURE_REGION}),
        ),
        told_region=ToldRegion("x-ms-region", cloud_regions.AZURE),
        options={
            "resource": "the name of the Foundry or Azure OpenAI resource",
            "deployment": "the deployment's type, which decides where prompts are processed",
            "region": "the resource's region, such as swedencentral",
            "max_tokens_field": _OUTPUT_LIMIT,
        },
        choices={"deployment": (*_AZURE_GLOBAL, *_AZURE_ZONE, *_AZURE_REGION), "max_tokens_field": _LIMITS},
        variants=_OTHER_LIMIT,
    ),
    Profile(
        "vertex",
        base_url="https://{location}-aiplatform.googleapis.com/v1/projects/{project}/locations/{location}"
        "/endpoints/openapi",
        auth=Auth(required=True, tokens="google", scope="https://www.googleapis.com/auth/cloud-platform"),
        usage=UsagePointers(cost=None),
        error_map=profile_errors.VERTEX,
        sends_request_id=None,
        takes_raw=False,
        labels=_CLOUD,
        residency=(Residency("location", cloud_regions.GOOGLE),),
        options={
            "project": "the project that pays",
            "location": "a region such as europe-west4, or global, which may process anywhere",
        },
        variants=(
            Variant(
                {"location": ("global",)},
                base_url="https://aiplatform.googleapis.com/v1/projects/{project}/locations/global/endpoints/openapi",
            ),
        ),
    ),
    Profile(
        "sagemaker",
        base_url="https://runtime.sagemaker.{region}.amazonaws.com/endpoints/{endpoint}/openai/v1",
        auth=Auth(required=True, tokens="sagemaker"),
        usage=UsagePointers(cost=None),
        error_map=profile_errors.SAGEMAKER,
        inner_status="/OriginalStatusCode",
        request_id_headers=("x-amzn-requestid",),
        sends_request_id=None,
        # The container behind the endpoint is asked, and vLLM there refuses the endpoint's name as a model's.
        sends_model=False,
        echoes_model=False,
        takes_raw=False,
        labels=_CLOUD,
        residency=(Residency("region", cloud_regions.AWS),),
        options={
            "region": "the endpoint's region, such as eu-central-1",
            "endpoint": "the endpoint's name",
            "aws_profile": "the profile of the AWS configuration whose credentials sign",
        },
        needs=("region",),
    ),
    Profile(
        # The container behind the endpoint is asked through InvokeEndpoint, which boto3 signs. What it calls its model
        # is its own business: not every container is told a name.
        "sagemaker-invoke",
        echoes_model=False,
        base_url="https://runtime.sagemaker.{region}.amazonaws.com",
        usage=UsagePointers(cost=None),
        error_map=profile_errors.SAGEMAKER,
        inner_status="/OriginalStatusCode",
        request_id_headers=("x-amzn-requestid",),
        sends_request_id=None,
        labels=_CLOUD,
        residency=(Residency("region", cloud_regions.AWS),),
        transport="sagemaker",
        options={
            "region": "the endpoint's region, such as eu-central-1",
            "endpoint": "the endpoint's name",
            "inference_component": "the model's component, where several share the endpoint",
            "aws_profile": "the profile of the AWS configuration whose credentials sign",
        },
        needs=("region", "endpoint"),
    ),
    Profile(
        # Experimental: known from a client of others alone, never tried against the network itself.
        "render",
        base_url="https://api.rendernetwork.com/v1/dispersed",
        auth=Auth(env="RENDER_API_KEY", required=True),
        usage=UsagePointers(cost=None),
        error_map=profile_errors.OPENAI,
        labels={"operator": "community"},
        options={
            "gpu_tier": "the tier of node to rent",
            "image": "a container image that serves vLLM as soon as it starts",
            "region": "where the node is to stand, such as na-east",
            "ssh_key_id": "an SSH key of the account, if the node shall know one",
            "port": "the port that vLLM listens on; 8000 unless said",
            "address": "where the node is reached, {public_ip}, {port} and {node_id} standing for its own",
            "node_key_env": "the environment variable with the key that vLLM on the node asks for",
            "turnaround": "seconds until a node is expected to serve; 300 unless said",
            "ready_within": "seconds after which a node that does not serve is given back; 900 unless said",
            "idle_after": "seconds without work after which a node is given back; 60 unless said",
        },
        needs=("gpu_tier", "image"),
    ),
)
PROFILES: Mapping[str, Profile] = MappingProxyType({each.name: each for each in _BUILT_IN})
DEFAULT_PROFILE = "openai-compatible"

_NAMED = re.compile(r"\{([a-z_]+)\}")
_IN_ADDRESS = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9])?", re.ASCII)
_IN_HEADER = re.compile(r"[!-~]{1,256}")
_IN_BODY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}", re.ASCII)


def profile(name: str | None) -> Profile:
    """The built-in profile ``name``; None is the default. Raises ConfigError with the nearest name."""
    wanted = DEFAULT_PROFILE if name is None else name
    found = PROFILES.get(wanted)
    if found is None:
        nearest = difflib.get_close_matches(wanted, PROFILES, n=1, cutoff=0.4)
        raise ConfigError(
            f"unknown profile {wanted!r}",
            key="profile",
            expected=" or ".join(PROFILES),
            nearest=nearest[0] if nearest else None,
        )
    return found


def needed_options(chosen: Profile, base_url: str | None) -> tuple[str, ...]:
    """The options that must be there: what the profile asks for, and what its address takes unless the pool has one."""
    address = (chosen.base_url or "") if base_url is None else ""
    return tuple(dict.fromkeys((*chosen.needs, *_NAMED.findall(address))))


def option_problem(chosen: Profile, name: str, value: object) -> tuple[str, str] | None:
    """What is wrong with an option's value, and what would be right; None where it will do. Quotes no secret."""
    if looks_like_secret(str(value), name):
        return "looks like a secret", "secrets in the environment or a file of their own"
    if name in chosen.choices and value not in chosen.choices[name]:
        return f"{value!r} is none of its values", "one of " + ", ".join(chosen.choices[name])
    if name in _named_in(chosen.base_url or "", *(each.base_url or "" for each in chosen.variants)):
        if not isinstance(value, str | int) or isinstance(value, bool) or not _IN_ADDRESS.fullmatch(str(value)):
            return "does not fit into an address", "letters, digits, dots, - and _"
    elif name in _named_in(*chosen.headers.values()) and not _IN_HEADER.fullmatch(str(value)):
        return "does not fit into a header", "printable ASCII without spaces"
    elif name in _named_in(*(str(each.body) for each in chosen.variants)) and not _IN_BODY.fullmatch(str(value)):
        return "is no name", "letters, digits, dots, slashes, - and _"
    return None


def _named_in(*templates: str) -> set[str]:
    return {name for template in templates for name in _NAMED.findall(template)}


def resolved(name: str | None, options: Mapping[str, Any], base_url: str | None = None) -> Profile:
    """The profile ``name`` with a pool's options in it: address, headers, body and labels as they will be sent.

    A pool with an address of its own declares nothing by its profile: whose address that is, only the pools file
    knows. Raises ConfigError for an unknown profile, and for an option that is missing, unknown or does not fit.
    """
    chosen = profile(name)
    for key in needed_options(chosen, base_url):
        if options.get(key) in (None, ""):
            raise ConfigError(
                f"profile {chosen.name} needs options.{key}", key="options", expected=chosen.options.get(key)
            )
    for key, value in options.items():
        problem = option_problem(chosen, key, value)
        if problem is not None:
            raise ConfigError(problem[0], key=f"options.{key}", expected=problem[1])
    address, labels, body = base_url or chosen.base_url, dict(chosen.labels), dict(chosen.body)
    limit = chosen.max_tokens_field
    for each in chosen.variants:
        if _holds(each.when, options):
            address = base_url or each.base_url or address
            labels |= each.labels
            body = _merged(body, _in_body(each.body, options))
            limit = each.max_tokens_field or limit
    for rule in chosen.residency:
        place = rule.places.get(str(options.get(rule.option)))
        if place is not None and _holds(rule.when, options):
            labels |= {"jurisdiction": place, "data_zone": place}
    headers = {key: text for key, text in chosen.headers.items() if _named_in(text) <= options.keys()}
    return replace(
        chosen,
        base_url=base_url or (_filled(address, options) if address else None),
        headers={key: _filled(text, options) for key, text in headers.items()},
        body=body,
        max_tokens_field=limit,
        labels={} if base_url else labels,
    )


def _holds(when: Mapping[str, tuple[str, ...]], options: Mapping[str, Any]) -> bool:
    return all(
        str(options.get(name)) in values if values else options.get(name) not in (None, "")
        for name, values in when.items()
    )


def _in_body(part: Any, options: Mapping[str, Any]) -> Any:
    if isinstance(part, Mapping):
        return {name: _in_body(value, options) for name, value in part.items()}
    if isinstance(part, list):
        return [_in_body(value, options) for value in part]
    return _filled(part, options) if isinstance(part, str) else part


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of both, those of objects that both have too; else the other's count."""
    return {
        **one,
        **{
            name: _merged(one[name], value)
            if isinstance(value, Mapping) and isinstance(one.get(name), Mapping)
            else value
            for name, value in other.items()
        },
    }


def _filled(template: str, options: Mapping[str, Any]) -> str:
    return _NAMED.sub(lambda match: str(options[match[1]]), template)
