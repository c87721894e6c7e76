"""The OpenAI-compatible wire as pure functions: a request to its body, an answer to its outcome.

Nothing here does I/O, and nothing here raises on what a provider sends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import ROUND_HALF_EVEN, Context, Decimal
from functools import lru_cache
from typing import Any, Literal

from bidbeam.connectors.http_errors import (
    by_rules,
    classify,
    error_of,
    inner_status,
    retry_after_s,
    status_of,
    told_wait_s,
)
from bidbeam.connectors.model_echo import NO_ECHO, Echo
from bidbeam.connectors.profile_record import ErrorClass, Profile
from bidbeam.connectors.provider_text import MESSAGE_CHARS, provider_message
from bidbeam.connectors.secrets import mask
from bidbeam.connectors.wire_json import GARBAGE, pointer, read_json, whole

_OURS = frozenset({"model", "messages", "prompt", "stream", "stream_options", "cache_salt"})
"""Body fields that are never taken from sampling: they would change what is asked, or how it is answered."""
_COST_PLACES = Decimal(1).scaleb(-18)
_COST_CONTEXT = Context(prec=60, rounding=ROUND_HALF_EVEN)
_ID = re.compile(r"[!-~]{1,128}")
_WORD = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request ended, in the terms of RESULT_SCHEMA. Counts are tokens; None is unknown or not reported."""

    status: Literal["ok", "failed", "cancelled"]
    error_class: ErrorClass | None = None
    error_message: str | None = None
    http_status: int | None = None
    output: str | None = None
    samples: list[str] | None = None
    finish_reason: str | None = None
    model_returned: str | None = None
    other_model: bool | None = None
    input_tokens: int | None = None
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None
    output_tokens: int | None = None
    usage_source: str | None = None
    provider_request_id: str | None = None
    provider_cost: Decimal | None = None
    jurisdiction: str | None = None
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """A canonical sampling object taken apart: ``fields`` is its members as JSON text, numbers as they were written."""

    fields: str
    n: int


class SamplingError(ValueError):
    """Sampling that no request can carry."""


@lru_cache(maxsize=4096)
def read_sampling(text: str | None, max_tokens_field: str, kept: frozenset[str] = frozenset()) -> Sampling:
    """Takes ``text`` apart, without ``max_tokens``, which the request's own column decides. Raises SamplingError,
    also where it sets one of the fields ``kept`` for the pool.
    """
    fields: list[str] = []
    n = 1
    for name, value in _members(text or "{}"):
        if name in _OURS or name in kept:
            raise SamplingError(f"sampling may not set {name!r}")
        if name in ("max_tokens", max_tokens_field):
            continue
        if name == "n":
            if not value.isdecimal() or int(value) < 1:
                raise SamplingError("sampling: n is not a positive whole number")
            n = int(value)
        fields.append(f"{json.dumps(name)}:{value}")
    return Sampling(",".join(fields), n)


def _members(text: str) -> list[tuple[str, str]]:
    """The members of a JSON object with each value's own text, so that 0.10 stays 0.10."""
    decoder = json.JSONDecoder()
    space = re.compile(r"[ \t\r\n]*")

    def skip(at: int) -> int:
        return space.match(text, at).end()  # type: ignore[union-attr]  # the pattern matches the empty text too

    members: list[tuple[str, str]] = []
    try:
        at = skip(0)
        if text[at] != "{":
            raise SamplingError("sampling is not a JSON object")
        at = skip(at + 1)
        while text[at] != "}":
            name, at = decoder.raw_decode(text, at)
            at = skip(at)
            if not isinstance(name, str) or text[at] != ":":
                raise SamplingError("sampling is not a JSON object")
            start = skip(at + 1)
            _, at = decoder.raw_decode(text, start)
            members.append((name, text[start:at]))
            at = skip(at)
            if text[at] == ",":
                at = skip(at + 1)
            elif text[at] != "}":
                raise SamplingError("sampling is not a JSON object")
        if skip(at + 1) != len(text):
            raise SamplingError("sampling is not a JSON object")
    except (json.JSONDecodeError, IndexError, RecursionError):
        raise SamplingError("sampling is not a JSON object") from None
    return members


def request_body(
    profile: Profile,
    model: str,
    *,
    messages: str | None,
    prompt: str | None,
    sampling: Sampling,
    max_tokens: int,
    cache_salt: str | None,
) -> bytes:
    """The JSON body. ``messages`` is JSON text and goes in as it is; ``prompt`` is the raw text."""
    asked = f'"messages":{messages}' if messages is not None else f'"prompt":{json.dumps(prompt)}'
    named = model if profile.sends_model else ""
    parts = [f'"model":{json.dumps(named)}', asked, f"{json.dumps(profile.max_tokens_field)}:{max_tokens}"]
    if sampling.fields:
        parts.append(sampling.fields)
    parts += [f"{json.dumps(name)}:{json.dumps(value)}" for name, value in profile.body.items()]
    if cache_salt is not None and profile.takes_cache_salt:
        parts.append(f'"cache_salt":{json.dumps(cache_salt)}')
    return ("{" + ",".join(parts) + "}").encode("utf-8", "replace")


def read_answer(
    profile: Profile,
    http_status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    chat: bool,
    n: int,
    prompt_text: str,
    secrets: Sequence[str],
    now: Callable[[], datetime],
    echo: Echo = NO_ECHO,
) -> Outcome:
    """What an answer amounts to: ``ok`` only with ``n`` well-formed samples; usage is kept whenever it is reported,
    for a bad answer is charged too. ``headers`` has lower-case names. ``echo``: what the answer may call its model.
    Never raises.
    """
    return read_document(
        profile,
        http_status,
        headers,
        read_json(body),
        len(body),
        chat=chat,
        n=n,
        prompt_text=prompt_text,
        secrets=secrets,
        now=now,
        echo=echo,
    )


def read_document(
    profile: Profile,
    http_status: int,
    headers: Mapping[str, str],
    document: object,
    size_bytes: int,
    *,
    chat: bool,
    n: int,
    prompt_text: str,
    secrets: Sequence[str],
    now: Callable[[], datetime],
    echo: Echo = NO_ECHO,
) -> Outcome:
    """The same of an answer that is read already, by ``read_json``."""
    if isinstance(document, list) and len(document) == 1 and isinstance(document[0], dict):
        document = document[0]  # as Google sends errors
    returned = _name(pointer(document, profile.model_pointer), secrets)
    base = Outcome(
        "failed",
        http_status=http_status,
        model_returned=returned,
        other_model=echo.other(returned),
        jurisdiction=_country(profile, headers, document),
        provider_request_id=_request_id(profile, headers, document, secrets),
        provider_cost=None if profile.usage.cost is None else _cost(pointer(document, profile.usage.cost)),
        **_usage(profile, document),
    )

    error = error_of(document)
    after = retry_after_s(profile, headers, now)
    if after is None and (error is not None or http_status >= 300):
        after = told_wait_s(profile, error)

    def failed(error_class: ErrorClass, message: str) -> Outcome:
        return replace(base, error_class=error_class, error_message=message[:MESSAGE_CHARS], retry_after_s=after)

    def classed(status: int) -> ErrorClass:
        return classify(profile, status, document, headers, waits=after is not None)

    def theirs(status: int, error: object) -> str:
        said = provider_message(error, prompt_text, secrets)
        return (
            f"{status}: {said}" if said else f"{status}: {_EXPLAINED.get(status, 'the endpoint gave no usable reason')}"
        )

    if not 200 <= http_status < 300:
        status = inner_status(profile, document) or http_status
        return failed(classed(status), theirs(status, error))
    if document is GARBAGE:
        kind = provider_message(headers.get("content-type", "").partition(";")[0], prompt_text, secrets)
        return failed("bad_output", f"the answer is not JSON (content type {kind or 'not given'}, {size_bytes} bytes)")
    if error is not None:
        inner = status_of(error)
        if inner is None:
            return failed(by_rules(profile, None, document, headers, False) or "bad_output", theirs(http_status, error))
        return failed(classed(inner), theirs(inner, error))
    if echo.expected is not None and base.other_model is not False:
        said = "names no model" if returned is None else f"names the model {returned}"
        return failed("bad_output", f"the answer {said}, and the pools file says {echo.expected}")
    return _read_choices(document, base, failed, chat=chat, n=n, secrets=secrets)


def _read_choices(
    document: object,
    base: Outcome,
    failed: Callable[[ErrorClass, str], Outcome],
    *,
    chat: bool,
    n: int,
    secrets: Sequence[str],
) -> Outcome:
    choices = pointer(document, "/choices")
    if not isinstance(choices, list) or not all(isinstance(each, dict) for each in choices):
        return failed("bad_output", "the answer holds no list of choices")
    if len(choices) < n:
        return failed("bad_output", f"the answer holds {len(choices)} choices of {n}")
    ordered = sorted(choices, key=lambda choice: whole(choice.get("index")) or 0)[:n]
    texts: list[str] = []
    for choice in ordered:
        text = pointer(choice, "/message/content") if chat else choice.get("text")
        if not isinstance(text, str):
            reason = choice.get("finish_reason")
            if reason == "content_filter" or isinstance(pointer(choice, "/message/refusal"), str):
                return failed("policy", "the endpoint refused to answer this content")
            return failed("bad_output", "a choice of the answer holds no text")
        texts.append(whole_text(text))
    reasons = [choice.get("finish_reason") for choice in ordered]
    reason = "length" if "length" in reasons else reasons[0]
    # A word, and none that could be a key.
    told = isinstance(reason, str) and _WORD.fullmatch(reason) and mask(reason, secrets) == reason
    return replace(
        base,
        status="ok",
        output=texts[0],
        samples=texts if n > 1 else None,
        finish_reason=reason if told else None,
    )


_EXPLAINED = {
    301: "the endpoint redirects; set base_url to its present address",
    302: "the endpoint redirects; set base_url to its present address",
    307: "the endpoint redirects; set base_url to its present address",
    308: "the endpoint redirects; set base_url to its present address",
    401: "the endpoint refuses the key",
    402: "the endpoint's account has no funds",
    403: "the endpoint forbids this",
    404: "the endpoint knows no such model or path; check base_url and models",
    408: "the endpoint timed out",
    429: "the endpoint asks to slow down",
    503: "the endpoint has no capacity",
}


def _usage(profile: Profile, document: object) -> dict[str, Any]:
    """The reported counts. What is missing, negative or not whole counts as not reported, as do cached tokens that
    exceed the input they are a part of, and tokens written to a cache that exceed the rest of it.
    """
    counted = whole(pointer(document, profile.usage.input))
    cached = whole(pointer(document, profile.usage.cached))
    output = whole(pointer(document, profile.usage.output))
    if cached is not None and (counted is None or cached > counted):
        cached = None
    written = whole(pointer(document, profile.usage.cache_write))
    if written is not None and (counted is None or (cached or 0) + written > counted):
        written = None
    reported = counted is not None or output is not None
    return {
        "input_tokens": counted,
        "cached_tokens": cached,
        "cache_write_tokens": written,
        "output_tokens": output,
        "usage_source": "reported" if reported else None,
    }


def _cost(value: object) -> Decimal | None:
    """A cost in the provider's currency at 18 places, half-even; None where it is none or does not fit."""
    if isinstance(value, bool) or not isinstance(value, int | str | Decimal):
        return None
    try:
        cost = Decimal(value)
        if not cost.is_finite() or cost < 0 or cost.adjusted() >= 19:
            return None
        return cost.quantize(_COST_PLACES, context=_COST_CONTEXT)
    except ArithmeticError:
        return None


def _request_id(profile: Profile, headers: Mapping[str, str], document: object, secrets: Sequence[str]) -> str | None:
    told = (pointer(document, "/id"), *(headers.get(name) for name in profile.request_id_headers))
    return next((name for each in told if (name := _name(each, secrets)) is not None), None)


def _country(profile: Profile, headers: Mapping[str, str], document: object) -> str | None:
    """The country in which the answer says that it was processed; None where it says none that is known."""
    if profile.told_region is None:
        return None
    at = profile.told_region.at
    told = pointer(document, at) if at.startswith("/") else headers.get(at)
    if not isinstance(told, str):
        return None
    return profile.told_region.places.get("".join(filter(str.isalnum, told.casefold())))


def _name(value: object, secrets: Sequence[str]) -> str | None:
    """A provider's name for something, printable and short, nothing of a secret in it; None where it is none."""
    return mask(value, secrets) if isinstance(value, str) and _ID.fullmatch(value) else None


def whole_text(text: str) -> str:
    """``text`` with lone surrogates, which no UTF-8 can hold, replaced."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
