"""The pools file: models, exchange rates and pools, checked and turned into values that pickle and hold no secret."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from bidbeam.connectors.batch_options import BATCH_OPTIONS, check_profile, read_options
from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.pools import SETTLEMENTS, Capacity, ModelSpec, PoolKind, PoolSpec, Settlement
from bidbeam.pipelines.config_check import (
    Fields,
    choice_of,
    decimal_of,
    duration_of,
    fault,
    flag_of,
    is_kind,
    nearest,
    plain_map_of,
    shown,
    slug_of,
    text_map_of,
    text_of,
    whole_of,
)
from bidbeam.pipelines.fx import known, read_fx
from bidbeam.pipelines.price_sources import read_price
from bidbeam.pipelines.terms import FxRate, FxSource, PriceSource
from bidbeam.pipelines.yaml_text import Node
from bidbeam.transforms.placement import OPERATORS as OPERATORS

KINDS: tuple[PoolKind, ...] = ("vllm", "openai", "batch", "lease")
SECTIONS = ("models", "fx", "pools")

_COMMON = ("name", "kind", "models", "price", "capacity", "placement", "settlement")
_REMOTE = (*_COMMON, "profile", "base_url", "api_key_env", "api_key_file", "context", "headers", "timeout", "options")
_KEYS: Mapping[str, tuple[str, ...]] = {
    "vllm": (*_COMMON, "accelerator", "engine"),
    "openai": _REMOTE,
    "batch": _REMOTE,
    "lease": (*_REMOTE, "engine"),
}
_NEEDED = {
    "name": "a name for the pool",
    "kind": " or ".join(KINDS),
    "models": "the models that it serves: a list of names, or a mapping to its own names",
    "price": "what it costs",
}
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_ANY_KEY = tuple(dict.fromkeys(key for keys in _KEYS.values() for key in keys))


@dataclass(frozen=True, slots=True)
class Pools:
    """What a pools file says."""

    pools: tuple[PoolSpec, ...]
    models: Mapping[str, ModelSpec]
    fx: Mapping[str, FxRate]
    fx_sources: Mapping[str, FxSource] = field(default_factory=dict)
    """By currency, where the rates are fetched that are not written down."""
    price_sources: Mapping[str, PriceSource] = field(default_factory=dict)
    """By pool, where the prices are looked up that do not simply stand in the file."""


def read_pools(pools: Node, models: Node | None, fx: Node | None, directory: str) -> Pools:
    """The pools, with the models and exchange rates that they refer to.

    ``directory`` is where relative paths in the file start. Without a ``models`` section the pools' own model names are
    all there is. Raises ConfigError.
    """
    rates, fx_sources = ({}, {}) if fx is None else read_fx(fx, directory)
    declared = None if models is None else _models(models, directory)
    if pools.kind != "list" or not pools.items:
        raise fault(pools, f"is {shown(pools)}", "a list of at least one pool")
    found: list[PoolSpec] = []
    sources: dict[str, PriceSource] = {}
    for item in pools.items:
        spec, source = _pool(item, declared, known(rates, fx_sources), directory)
        if any(spec.name == other.name for other in found):
            raise fault(item.entries["name"], f"the name {spec.name!r} is there twice", "a name of its own")
        found.append(spec)
        if source is not None:
            sources[spec.name] = source
    models_known = declared or {}
    served = {name: models_known.get(name, ModelSpec(name)) for spec in found for name in spec.models}
    return Pools(tuple(found), {**models_known, **served}, rates, fx_sources, sources)


def check_keys(pools: tuple[PoolSpec, ...]) -> None:
    """Whether what lets requests in is to be had for every remote pool: keys are read, tokens fetched once.

    Raises ConfigError that names the variable, file or package, never the key.
    """
    from bidbeam.connectors.credentials import check_credentials

    for spec in pools:
        if spec.kind != "vllm":
            check_credentials(spec)


def _models(node: Node, directory: str) -> dict[str, ModelSpec]:
    if node.kind != "map":
        raise fault(node, f"is {shown(node)}", "a mapping of model names to {source: …}")
    found: dict[str, ModelSpec] = {}
    for name, entry in node.entries.items():
        if entry.is_null:
            found[name] = ModelSpec(name)
            continue
        fields = Fields(entry, ("source", "trust_remote_code"))
        source = fields.maybe("source", text_of)
        found[name] = ModelSpec(
            name,
            None if source is None else located_source(source, directory),
            fields.read("trust_remote_code", flag_of, False),
        )
    return found


def located_source(source: str, directory: str) -> str:
    """A model's source, with a directory made absolute; a package, a hub id and a URL stay as they are."""
    if "://" in source or source.startswith("package:"):
        return source
    path = Path(source).expanduser()
    if source.startswith((".", "/", "~")) or is_kind(Path(directory) / path, Path.is_dir):
        return str((Path(directory) / path).resolve())
    return source


def _pool(
    node: Node, declared: Mapping[str, ModelSpec] | None, fx: Mapping[str, Decimal | None], directory: str
) -> tuple[PoolSpec, PriceSource | None]:
    fields = Fields(node, _ANY_KEY)
    fields.need_all(_NEEDED)
    name = slug_of(fields.need("name", _NEEDED["name"]))
    kind = _kind(fields)
    for key in fields.node.entries:
        if key not in _KEYS[kind]:
            raise fault(fields.node.entries[key], f"does not belong to a pool of kind {kind}", ", ".join(_KEYS[kind]))
    models, answers_as = _served(fields.need("models", _NEEDED["models"]), declared)
    if kind == "vllm":
        _check_sources(fields, models, declared)
        if answers_as:
            raise fault(fields.node.entries["models"], "says answers_as of an engine that loads the model itself")
    profile = _profile(fields)
    capacity = fields.read("capacity", _capacity, Capacity())
    price, source = read_price(
        fields.need("price", _NEEDED["price"]),
        name,
        fx,
        by_hour=kind in ("vllm", "lease"),
        tokens_per_second=None if capacity.tokens_per_second is None else Decimal(str(capacity.tokens_per_second)),
        profile=profile,
        directory=directory,
    )
    remote = kind != "vllm"
    base_url = _base_url(fields) if remote else None
    options = _options(fields, kind, profile, base_url) if remote else {}
    labels = _labels(profile, options, base_url) if remote else {}
    spec = PoolSpec(
        name=name,
        kind=kind,
        models=models,
        price=price,
        capacity=capacity,
        placement={**labels, **fields.read("placement", placement_labels, {})},
        accelerator=fields.maybe("accelerator", text_of),
        engine=fields.read("engine", lambda entry: plain_map_of(entry, float), {}),
        profile=profile,
        base_url=base_url,
        api_key_env=fields.maybe("api_key_env", _variable),
        api_key_file=_key_file(fields, directory),
        context=fields.maybe("context", lambda entry: whole_of(entry, 1, 2**31 - 1)),
        headers=fields.read("headers", _headers, {}),
        timeout_s=fields.read("timeout", lambda entry: duration_of(entry).total_seconds(), 600.0),
        options=options,
        answers_as=answers_as,
        settlement=cast(Settlement, fields.read("settlement", lambda entry: choice_of(entry, SETTLEMENTS), "external")),
    )
    if kind == "lease":
        _check_lease(fields, spec)
    return spec, source


def _check_lease(fields: Fields, spec: PoolSpec) -> None:
    from bidbeam.connectors.lease_terms import LeaseTerms

    try:
        LeaseTerms.of(spec)
    except ConfigError as error:
        leaf = (error.key or "").rpartition(".")[2]
        options = fields.get("options")
        at = options.entries.get(leaf) if options is not None else None
        raise fault(at or fields.get(leaf) or options or fields.node, error.problem, error.expected) from None


def _options(fields: Fields, kind: PoolKind, name: str | None, base_url: str | None) -> dict[str, Any]:
    """The pool's ``options``: those that its profile knows, with values that fit, and all that it needs."""
    from bidbeam.connectors.profiles import needed_options, option_problem, profile

    chosen = profile(name)
    node = fields.get("options")
    of_kind = BATCH_OPTIONS if kind == "batch" else {}
    options = {**chosen.options, **of_kind}
    known = ", ".join(options) or "none: leave options out"
    given = {} if node is None else plain_map_of(node, str)
    for key, entry in (node.entries if node is not None else {}).items():
        if key not in options:
            raise fault(entry, f"is no option of profile {chosen.name}", known, nearest(key, options))
        if key in of_kind and not entry.is_null:
            try:
                read_options({key: given[key]})
            except ConfigError as error:
                raise fault(entry, error.problem, error.expected) from None
        wrong = None if entry.is_null else option_problem(chosen, key, given[key])
        if wrong is not None:
            raise fault(entry, *wrong, nearest(str(given[key]), chosen.choices.get(key, ())))
    if kind == "batch":
        try:
            check_profile(chosen.name, given)
        except ConfigError as error:
            raise fault(node or fields.node, error.problem, error.expected) from None
    for key in needed_options(chosen, base_url):
        if given.get(key) in (None, ""):
            problem = f"profile {chosen.name} needs options.{key}"
            raise fault(node or fields.node, problem, f"{key}: {chosen.options[key]}")
    return {key: value for key, value in given.items() if value is not None}


def _labels(name: str | None, options: Mapping[str, Any], base_url: str | None) -> Mapping[str, Any]:
    """What the profile declares of where prompts go."""
    from bidbeam.connectors.profiles import resolved

    return resolved(name, options, base_url).labels


def _kind(fields: Fields) -> PoolKind:
    node = fields.need("kind", _NEEDED["kind"])
    text = node.text if node.kind == "scalar" else ""
    for kind in KINDS:
        if text == kind:
            return kind
    raise fault(
        node, f"pools of kind {shown(node)} are not available in this version", " or ".join(KINDS), nearest(text, KINDS)
    )


def _served(node: Node, declared: Mapping[str, ModelSpec] | None) -> tuple[dict[str, str], dict[str, str]]:
    """Model name in the job -> name at the pool; and -> what its answers must call it, where that is said."""
    answers_as: dict[str, str] = {}
    if node.kind == "map":
        pairs = []
        for name, entry in node.entries.items():
            named: Node | None = None if entry.is_null else entry
            if entry.kind == "map":
                fields = Fields(entry, ("name", "answers_as"))
                named, told = fields.get("name"), fields.maybe("answers_as", text_of)
                answers_as |= {} if told is None else {name: told}
            pairs.append((name, name if named is None else text_of(named), entry))
    elif node.kind == "list":
        pairs = [(text_of(item), text_of(item), item) for item in node.items]
    else:
        raise fault(node, f"is {shown(node)}", "a list of model names, or a mapping to the pool's own names")
    if not pairs:
        raise fault(node, "names no model", "at least one model")
    served: dict[str, str] = {}
    for name, theirs, place in pairs:
        if declared is not None and name not in declared:
            expected = "a model of the models section: " + ", ".join(declared)
            raise fault(place, f"unknown model {name!r}", expected, nearest(name, declared))
        if name in served:
            raise fault(place, f"the model {name!r} is there twice")
        served[name] = theirs
    return served, answers_as


def _check_sources(fields: Fields, models: Mapping[str, str], declared: Mapping[str, ModelSpec] | None) -> None:
    for name in models:
        if declared is None or declared[name].source is None:
            raise fault(
                fields.node.entries["models"],
                f"the model {name!r} has no source, and an engine in our workers has to load it",
                f"models: {{{name}: {{source: …}}}} with a package, a hub id, a directory or a URL",
            )


def _profile(fields: Fields) -> str | None:
    node = fields.get("profile")
    if node is None:
        return None
    from bidbeam.connectors.profiles import profile

    try:
        found = profile(text_of(node))
    except ConfigError as error:
        raise fault(node, error.problem, error.expected, error.nearest) from None
    return found.name


def _base_url(fields: Fields) -> str | None:
    node = fields.get("base_url")
    if node is None:
        from bidbeam.connectors.profiles import profile

        if profile(fields.maybe("profile", text_of)).base_url is None:
            fields.need("base_url", "the endpoint's address, such as https://host/v1")
        return None
    text = text_of(node)
    expected = "https://host/path; http:// only to this machine"
    try:
        url = urlsplit(text)
        host, _port = url.hostname, url.port
    except ValueError:
        raise fault(node, "is not a URL", expected) from None
    if url.scheme not in {"http", "https"} or not host:
        raise fault(node, f"is {shown(node)}", expected)
    if "@" in url.netloc or url.query or url.fragment:
        raise fault(node, "holds more than an address", expected)
    if url.scheme == "http" and not _loopback(host):
        raise fault(node, f"sends prompts in the clear to {host!r}", expected)
    return text.rstrip("/")


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _variable(node: Node) -> str:
    text = text_of(node)
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text):
        # The text itself is not repeated: it may be the key, in the wrong place.
        raise fault(node, "is not the name of an environment variable", "a name such as ENDPOINT_API_KEY")
    return text


def _headers(node: Node) -> dict[str, str]:
    headers = text_map_of(node)
    for name, value in headers.items():
        if not _HEADER.fullmatch(name):
            raise fault(node.entries[name], "is no name of a header", "such as x-team")
        if not (value.isascii() and value.isprintable()):
            raise fault(node.entries[name], "holds characters that no header can carry", "printable ASCII")
    return headers


def _key_file(fields: Fields, directory: str) -> str | None:
    node = fields.get("api_key_file")
    if node is None:
        return None
    if fields.get("api_key_env") is not None:
        raise fault(node, "stands beside api_key_env", "one of the two")
    return str((Path(directory) / Path(text_of(node)).expanduser()).resolve())


def _capacity(node: Node) -> Capacity:
    fields = Fields(node, ("concurrency", "tokens_per_second", "workers"))
    rate = fields.get("tokens_per_second")
    if rate is not None and decimal_of(rate, "tokens per second") <= 0:
        raise fault(rate, f"is {shown(rate)}", "tokens per second, above 0")
    return Capacity(
        concurrency=fields.maybe("concurrency", lambda entry: whole_of(entry, 1, 1_000_000)),
        tokens_per_second=None if rate is None else float(decimal_of(rate)),
        workers=fields.read("workers", lambda entry: whole_of(entry, 1, 10_000), 1),
    )


def placement_labels(node: Node) -> dict[str, Any]:
    """What a pool declares: a value per label, None for one that is written down as undeclared."""
    from bidbeam.transforms.placement import ANYWHERE, COUNTRIES, LABELS, TEES, ZONES

    fields = Fields(node, LABELS)
    labels: dict[str, Any] = {}
    for name, entry in fields.node.entries.items():
        if entry.is_null:
            labels[name] = None
        elif name in {"jurisdiction", "operator_jurisdiction", "data_zone"}:
            labels[name] = _place(entry, frozenset((*COUNTRIES, *ZONES, ANYWHERE)))
        elif name == "operator":
            labels[name] = choice_of(entry, OPERATORS)
        elif name == "max_retention_days":
            labels[name] = whole_of(entry, 0, 100_000)
        elif name == "tee" and entry.type != "bool":
            labels[name] = choice_of(entry, TEES)
        else:
            labels[name] = flag_of(entry)
    return labels


def _place(node: Node, places: frozenset[str]) -> str:
    text = text_of(node).upper()
    if text not in places:
        near = "GB" if text == "UK" else nearest(text, places)
        raise fault(node, f"is {shown(node)}", "an ISO 3166-1 alpha-2 code, EEA, EU or global", near)
    return text
