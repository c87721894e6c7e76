"""How a job file becomes a job: overrides applied, secrets refused, every key checked, paths made absolute."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any, cast
from zoneinfo import ZoneInfo, available_timezones

from bidbeam.connectors.errors import ConfigError
from bidbeam.pipelines import pools_file
from bidbeam.pipelines.baselines import baselines_of
from bidbeam.pipelines.config_check import (
    Fields,
    choice_of,
    decimal_of,
    duration_from,
    duration_of,
    fault,
    flag_of,
    is_kind,
    lines_of,
    money_of,
    nearest,
    plain_map_of,
    plain_of,
    refuse_secrets,
    shown,
    slug_of,
    text_map_of,
    text_of,
    texts_of,
    whole_of,
)
from bidbeam.pipelines.job import Job
from bidbeam.pipelines.overrides import apply, read_override
from bidbeam.pipelines.terms import PAYMENTS, AuctionSpec, Deadline, Payment, Tolerance
from bidbeam.pipelines.yaml_text import Node, load
from bidbeam.transforms.rendering import PromptSpec

KEYS = (
    "name", "input", "output", "ledger", "model", "prompt", "sampling", "budget", "deadline", "timezone", "placement",
    "auction", "baseline", "tolerate", "pools", "models", "fx", "tags", "storage",
)  # fmt: skip
_CLOCK = re.compile(r"([01]\d|2[0-3]):([0-5]\d)(?::([0-5]\d))?", re.ASCII)
_PLACEHOLDER = re.compile(r"\{([A-Za-z_ -]+)\}")


def read_job(path: Path, *, run_date: date | None, overrides: Sequence[str], now: datetime) -> Job:
    """The job in a file (see ``Job.from_yaml``)."""
    root, pools, pools_directory = _trees(path, overrides)
    directory = str(path.resolve().parent)
    fields = Fields(root, KEYS)
    name = slug_of(fields.need("name", "a name for the run"))
    timezone = fields.read("timezone", _timezone, "UTC")
    day = run_date or now.astimezone(ZoneInfo(timezone)).date()
    bought = pools_file.read_pools(pools["pools"], pools.get("models"), pools.get("fx"), pools_directory)
    model = _model(fields, bought)
    job = Job(
        name=name,
        run_date=day,
        input=_inputs(fields.need("input", "a path, a glob, a URL or a list of them"), day, directory),
        output=_directory(fields.need("output", "a directory"), directory),
        ledger=_directory(fields.need("ledger", "a directory"), directory),
        model=model,
        prompt=fields.read("prompt", _prompt, PromptSpec()),
        sampling=fields.read("sampling", _sampling, {}),
        max_cost=fields.maybe("budget", _budget),
        deadline=fields.maybe("deadline", _deadline),
        timezone=timezone,
        placement=fields.read("placement", _placement, {}),
        auction=fields.read("auction", _auction, AuctionSpec()),
        baseline=fields.read("baseline", lambda node: baselines_of(node, _names(bought), day, model), ()),
        tolerate_dead=fields.read("tolerate", _tolerate, Tolerance()),
        tags=fields.read("tags", text_map_of, {}),
        storage=fields.read("storage", storage_of, {}),
        pools=bought.pools,
        models=bought.models,
        fx=bought.fx,
        fx_sources=bought.fx_sources,
        price_sources=bought.price_sources,
        source_dir=directory,
        lines={**lines_of(root), **{key: at for node in pools.values() for key, at in lines_of(node).items()}},
    )
    _check_raw(job)
    return job


def _check_raw(job: Job) -> None:
    """Whether every pool takes prompts as they are, where the job sends them so."""
    from bidbeam.connectors.profiles import profile

    for place, pool in enumerate(job.pools if job.prompt.format == "raw" else ()):
        if pool.kind != "vllm" and not profile(pool.profile).takes_raw:
            problem = f"profile {pool.profile} takes chats only, and this job sends raw prompts"
            raise job.fault(f"pools[{place}].profile", problem, expected="prompt.format: chat, or another pool")


def _trees(path: Path, overrides: Sequence[str]) -> tuple[Node, dict[str, Node], str]:
    """The job's tree, the nodes of pools, models and fx, and where the paths in those start."""
    root = load(path)
    if root.kind != "map":
        raise fault(root, f"is {shown(root)}", "a mapping: a job file")
    refuse_secrets(root)
    read = [read_override(text) for text in overrides]
    for override in read:
        if override.parts[0] not in pools_file.SECTIONS or len(override.parts) == 1:
            root = apply(root, override)
    named = Fields(root, KEYS).need("pools", "the path of a pools file, or a list of pools")
    if named.kind != "scalar":
        sections = {name: root.entries[name] for name in pools_file.SECTIONS if name in root.entries}
        tree, directory = Node("map", root.file, root.line, "", entries=sections), path.resolve().parent
    else:
        file = path.parent / Path(text_of(named)).expanduser()
        if not is_kind(file, Path.is_file):
            raise fault(named, f"there is no file {str(file)!r}", "the path of a pools file, or a list of pools")
        tree, directory = load(file), file.resolve().parent
        refuse_secrets(tree)
        for name in ("models", "fx"):
            if name in root.entries:
                raise fault(root.entries[name], "belongs into the pools file that this job names", f"it in {file}")
    for override in read:
        if override.parts[0] in pools_file.SECTIONS and len(override.parts) > 1:
            tree = apply(tree, override)
    fields = Fields(tree, pools_file.SECTIONS)
    fields.need("pools", "a list of pools")
    return root, {name: entry for name, entry in tree.entries.items() if not entry.is_null}, str(directory)


def _inputs(node: Node, day: date, directory: str) -> tuple[str, ...]:
    places = node.items if node.kind == "list" else (node,)
    found: list[str] = []
    for text, place in zip(texts_of(node), places, strict=True):
        for name in _PLACEHOLDER.findall(text):
            if name != "run_date":
                raise fault(place, f"unknown placeholder {{{name}}}", "{run_date}", nearest(name, ("run_date",)))
        found.append(absolute(text.replace("{run_date}", day.isoformat()), directory))
    return tuple(found)


def _directory(node: Node, directory: str) -> str:
    text = text_of(node)
    if "{run_date}" in text:
        raise fault(node, "holds {run_date}, which is only for input", "a directory; run_date=… is made beneath it")
    if any(char in text for char in "*?["):
        raise fault(node, "holds a wildcard", "one directory")
    return absolute(text, directory).rstrip("/") or "/"


def absolute(text: str, directory: str) -> str:
    """A path made absolute from where the job file stands; a URL as it is."""
    if "://" in text:
        return text
    return os.path.normpath(Path(directory) / Path(text).expanduser())


def _model(fields: Fields, bought: pools_file.Pools) -> str | None:
    node = fields.get("model")
    if node is None:
        return None
    name = text_of(node)
    served = sorted({model for pool in bought.pools for model in pool.models})
    if name not in served:
        problem = f"no pool serves the model {name!r}" if name in bought.models else f"unknown model {name!r}"
        raise fault(node, problem, "one of " + ", ".join(served), nearest(name, served))
    return name


def _names(bought: pools_file.Pools) -> dict[str, tuple[str, ...]]:
    """The models that are served, with what pools call them and where they come from: price lists know some name."""
    served: dict[str, tuple[str, ...]] = {}
    for pool in bought.pools:
        for name, theirs in pool.models.items():
            served[name] = (*served.get(name, ()), theirs)
    sources = {name: bought.models[name].source for name in served}
    return {name: (*names, *filter(None, (sources[name],))) for name, names in served.items()}


def _prompt(node: Node) -> PromptSpec:
    fields = Fields(node, ("id", "column", "template", "system", "format", "tenant"))
    template = fields.maybe("template", text_of)
    column = fields.maybe("column", text_of)
    if template is not None and column is not None:
        raise fault(fields.need("template", ""), "stands beside column", "one of the two")
    format_ = fields.read("format", lambda entry: choice_of(entry, ("chat", "raw")), "chat")
    system = fields.get("system")
    if system is not None and format_ == "raw":
        raise fault(system, "has no place in a raw prompt", "format: chat, or the text in the prompt itself")
    if template is not None:
        _check_template(fields.need("template", "a template"), template)
    return PromptSpec(
        id=fields.maybe("id", text_of),
        column=None if template is not None else column or "prompt",
        template=template,
        system=None if system is None else text_of(system),
        format="raw" if format_ == "raw" else "chat",
        tenant=fields.maybe("tenant", text_of),
    )


def _check_template(node: Node, text: str) -> None:
    from bidbeam.transforms.prompt_template import PromptTemplate

    try:
        PromptTemplate(text)
    except ConfigError as error:
        raise fault(node, error.problem, error.expected) from None


def _sampling(node: Node) -> dict[str, Any]:
    from bidbeam.transforms.sampling import BadSampling, resolve

    value = plain_map_of(node)
    try:
        resolve(value, {})
    except BadSampling as error:
        entry = node.entries.get(error.key, node)
        raise fault(entry, f"is {shown(entry)}", error.expected) from None
    return value


def _budget(node: Node) -> Decimal | None:
    return Fields(node, ("max_cost",)).maybe("max_cost", money_of)


def _deadline(node: Node) -> Deadline:
    text = text_of(node).strip()
    clock = _CLOCK.fullmatch(text)
    if clock is not None:
        hour, minute, second = (int(part or 0) for part in clock.groups())
        return Deadline(text, clock=time(hour, minute, second))
    duration = duration_from(text)
    if duration is None:
        raise fault(node, f"is {shown(node)}", "a duration such as 6h or 1h30m, or a clock time such as 06:00")
    return Deadline(text, duration=duration)


def _timezone(node: Node) -> str:
    text = text_of(node)
    zones = available_timezones()
    if text not in zones:
        raise fault(node, f"is {shown(node)}", "a time zone such as UTC or Europe/Berlin", nearest(text, zones))
    return text


def _placement(node: Node) -> dict[str, Any]:
    from bidbeam.transforms.placement import CONSTRAINTS, normalise

    fields = Fields(node, CONSTRAINTS)
    operators = fields.get("operators")
    if operators is not None:
        for item in operators.items if operators.kind == "list" else (operators,):
            choice_of(item, pools_file.OPERATORS)
    try:
        return normalise(plain_of(node))
    except ConfigError as error:
        leaf = (error.key or "").removeprefix("placement.")
        raise fault(node.entries.get(leaf, node), error.problem, error.expected, error.nearest) from None


def _auction(node: Node) -> AuctionSpec:
    fields = Fields(node, ("payment", "rounds", "hedging", "patience"))
    payment = fields.get("payment")
    rule = cast(Payment, "pay_as_bid" if payment is None else choice_of(payment, PAYMENTS))
    rounds = fields.read("rounds", lambda entry: whole_of(entry, 1, 10), 3)
    hedging = fields.read("hedging", flag_of, True)
    return AuctionSpec(rule, rounds, hedging, fields.read("patience", duration_of, AuctionSpec().patience))


def _tolerate(node: Node) -> Tolerance:
    dead = Fields(node, ("dead",)).get("dead")
    if dead is None:
        return Tolerance()
    expected = 'a count such as "10", or a percentage such as "0.5%"'
    text = text_of(dead).strip()
    if not text.endswith("%"):
        if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
            raise fault(dead, f"is {shown(dead)}", expected)
        return Tolerance(count=int(text))
    bare = Node("scalar", dead.file, dead.line, dead.key, text[:-1].strip(), "text")
    percent = decimal_of(bare, expected)
    if not 0 <= percent <= 100:
        raise fault(dead, f"is {shown(dead)}", expected)
    return Tolerance(count=None, percent=percent)


def storage_of(node: Node) -> dict[str, dict[str, Any]]:
    """fsspec options by protocol. Raises ConfigError, for a credential too."""
    from bidbeam.connectors.store_url import refuse_secrets_in_options

    if node.kind != "map":
        raise fault(node, f"is {shown(node)}", "a mapping of protocols to fsspec options")
    options: dict[str, dict[str, Any]] = {}
    for protocol, entry in node.entries.items():
        options[protocol] = plain_map_of(entry, float)
        try:
            refuse_secrets_in_options(protocol, options[protocol])
        except ConfigError as error:
            at = next((each for each in entry.walk() if each.key == error.key), entry)
            raise fault(at, error.problem, error.expected) from None
    return options
