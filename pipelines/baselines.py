"""Baselines: the prices that savings are counted against, a published list by name or the job's own figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date
from decimal import Decimal

from bidbeam.connectors.errors import ConfigError
from bidbeam.connectors.list_prices import BY_THE_HOUR, NotListed, list_price
from bidbeam.connectors.pools import Meter
from bidbeam.pipelines.config_check import Fields, decimal_of, fault, flag_of, moment_of, shown, text_of
from bidbeam.pipelines.prices import TOKEN_KEYS, by_throughput, token_prices
from bidbeam.pipelines.terms import BaselineSpec
from bidbeam.pipelines.yaml_text import Node

OWN = '{name: list-price, input: "0.10", output: "0.40", per: 1M tokens}'
_HOURLY = '{name: sagemaker, accelerator_hour: "1.41", tokens_per_second: 2400}'
_KEYS = ("name", *TOKEN_KEYS, "source", "valid_from", "list", "model", "batch", "accelerator_hour", "tokens_per_second")
_LISTED = ("list", "model", "batch")


def baselines_of(
    node: Node, served: Mapping[str, tuple[str, ...]], day: date, model: str | None = None
) -> tuple[BaselineSpec, ...]:
    """The prices of one baseline or of a list of them, the first being what ``charges.baseline_cost`` counts.

    ``served`` are the job's models with the names that pools and stores give them; ``model`` the one for rows that name
    none. A list by name gives a price for each model that it has, as of ``day``. Raises ConfigError.
    """
    blocks = node.items if node.kind == "list" else (node,)
    if not blocks:
        raise fault(node, "is an empty list", OWN)
    found: list[BaselineSpec] = []
    for block in blocks:
        specs = tuple(_baseline(block, served, day, model))
        if any(spec.name == specs[0].name for spec in found):
            raise fault(block, f"the name {specs[0].name!r} is there twice", "a name of its own")
        found += specs
    return tuple(found)


def _baseline(
    node: Node, served: Mapping[str, tuple[str, ...]], day: date, model: str | None
) -> Iterator[BaselineSpec]:
    if node.kind == "scalar":
        name = text_of(node)
        yield from _listed(node, name, name, None, served, day, model, batch=False)
        return
    fields = Fields(node, _KEYS)
    name = text_of(fields.need("name", f"a name for it, as in {OWN}"))
    priced = any(fields.get(key) is not None for key in TOKEN_KEYS)
    hourly = fields.get("accelerator_hour") is not None or fields.get("tokens_per_second") is not None
    for key in _LISTED:
        mixed = fields.get(key)
        if mixed is not None and (priced or hourly):
            raise fault(mixed, "stands beside figures of your own", "either a published list or figures")
    if not priced and not hourly:
        list_, batch = fields.read("list", text_of, name), fields.read("batch", flag_of, False)
        yield from _listed(node, name, list_, fields.maybe("model", text_of), served, day, model, batch=batch)
        return
    valid_from = fields.maybe("valid_from", moment_of)
    source = fields.read("source", text_of, "job file")
    if hourly:
        yield BaselineSpec(name, *_by_the_hour(fields, source), valid_from)
    else:
        yield BaselineSpec(name, token_prices(fields, OWN), source, valid_from)


def _by_the_hour(fields: Fields, source: str) -> tuple[Mapping[Meter, Decimal], str]:
    for key in TOKEN_KEYS:
        mixed = fields.get(key)
        if mixed is not None:
            raise fault(mixed, "stands beside accelerator_hour", "either an hour and its tokens, or prices per token")
    hour = fields.need("accelerator_hour", f"what an instance costs an hour, as in {_HOURLY}")
    speed = fields.need("tokens_per_second", f"what it was measured to serve, as in {_HOURLY}")
    price, rate = decimal_of(hour, "USD an hour"), decimal_of(speed, "tokens a second")
    if not 0 <= price < 100_000:
        raise fault(hour, f"is {shown(hour)}", "USD an hour, 0 or more")
    if not 0 < rate < 10**9:
        raise fault(speed, f"is {shown(speed)}", "tokens a second, above 0")
    return by_throughput(price, rate), f"{source}: {price:f} USD an hour at {rate:f} tokens a second"


def _listed(
    node: Node,
    name: str,
    list_: str,
    named: str | None,
    served: Mapping[str, tuple[str, ...]],
    day: date,
    model: str | None,
    *,
    batch: bool,
) -> Iterator[BaselineSpec]:
    if list_.casefold() in BY_THE_HOUR:
        problem = f"{list_} is paid by the instance hour, and no list says how many tokens your model does in one"
        raise fault(node, problem, f"what you measured: {_HOURLY}")
    wanted: dict[str | None, tuple[str, ...]] = (
        {None: (named,)} if named is not None else {each: (each, *names) for each, names in served.items()}
    )
    problems: list[NotListed] = []
    found = 0
    for ours, names in wanted.items():
        try:
            listed = list_price(list_, names, day, batch=batch)
        except NotListed as problem:
            if ours is None or ours == model:
                raise _refused(node, list_, problem) from None
            problems.append(problem)
            continue
        found += 1
        # A list that is asked for one model, by name, prices every row by it; else each model has its own price.
        only = ours if len(served) > 1 else None
        yield BaselineSpec(name, listed.unit_prices, listed.source, listed.valid_from, only)
    if not found:
        raise _refused(node, list_, problems[0])


def _refused(node: Node, list_: str, problem: NotListed) -> ConfigError:
    example = "{" + f"name: {list_}, model: …" + "}"
    return fault(
        node,
        str(problem),
        f"a model that it has, to compare with: {example}; or your own figures: {OWN}",
        problem.nearest,
    )
