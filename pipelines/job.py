"""The job: everything that one run asks for, and the terms it is run on, read from a job file and its pools file."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidbeam.connectors.errors import ConfigError, InputError
from bidbeam.connectors.pools import ModelSpec, PoolSpec
from bidbeam.pipelines.jsonable import jsonable
from bidbeam.pipelines.terms import AuctionSpec, BaselineSpec, Deadline, FxRate, FxSource, PriceSource, Tolerance
from bidbeam.transforms.rendering import PromptSpec, RenderSpec

if TYPE_CHECKING:
    import pyarrow as pa

_log = logging.getLogger("bidbeam.job")
_AUCTION = AuctionSpec()
_NO_DEAD = Tolerance()


_UNTOLD = frozenset({"lines", "origins"})
"""Fields that say nothing of what a job asks or under which terms."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run. Paths are absolute or URLs; money is USD; ``sampling`` keeps its numbers' text as Decimal."""

    name: str
    run_date: date
    input: tuple[str, ...]
    output: str
    ledger: str
    model: str | None
    """For rows that name none."""
    prompt: PromptSpec
    sampling: Mapping[str, Any]
    pools: tuple[PoolSpec, ...]
    models: Mapping[str, ModelSpec]
    max_cost: Decimal | None = None
    deadline: Deadline | None = None
    timezone: str = "UTC"
    placement: Mapping[str, Any] = field(default_factory=dict)
    """Canonical (see ``transforms.placement.normalise``)."""
    auction: AuctionSpec = _AUCTION
    baseline: tuple[BaselineSpec, ...] = ()
    tolerate_dead: Tolerance = _NO_DEAD
    tags: Mapping[str, str] = field(default_factory=dict)
    storage: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """fsspec options by protocol."""
    fx: Mapping[str, FxRate] = field(default_factory=dict)
    fx_sources: Mapping[str, FxSource] = field(default_factory=dict)
    """Where the rates are fetched that are not in ``fx`` (see ``pipelines.resolving``)."""
    price_sources: Mapping[str, PriceSource] = field(default_factory=dict)
    """Where the prices of some pools are looked up when a run starts, by pool."""
    parent_run_id: str | None = None
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """The run whose dead letters these are."""
    source_dir: str = "."
    """Where the job file stands."""
    lines: Mapping[str, tuple[str, int | None]] = field(default_factory=dict, compare=False, repr=False)
    """File and line of each dotted key, for errors that are found later (see ``fault``)."""

    @classmethod
    def from_yaml(
        cls,
        path: str | Path,
        *,
        run_date: date | None = None,
        set: Sequence[str] = (),  # noqa: A002 - as on the command line
        now: datetime | None = None,
    ) -> Job:
        """Reads a job file and the pools file that it names. Raises ConfigError with file, line, key and nearest name.

        ``set`` holds ``key.path=value`` overrides, their values YAML. Without ``run_date`` it is the day that ``now``
        (aware; None is the clock) falls on in the job's time zone.
        """
        from bidbeam.pipelines.job_file import read_job

        return read_job(Path(path), run_date=run_date, overrides=set, now=now or datetime.now(UTC))

    def asked(self) -> dict[str, Any]:
        """What makes this run this run, JSON-able and canonical: terms are not in it."""
        from bidbeam.transforms.sampling import DEFAULT_MAX_TOKENS

        spec = None if self.model is None else self.models.get(self.model)
        return {
            "name": self.name,
            "run_date": self.run_date.isoformat(),
            "input": list(self.input),
            "output": self.output,
            "model": self.model,
            "model_source": spec.source if spec else None,
            "prompt": {each.name: getattr(self.prompt, each.name) for each in fields(self.prompt)},
            "sampling": _canonical({"max_tokens": DEFAULT_MAX_TOKENS, **self.sampling}),
        }

    @property
    def run_id(self) -> str:
        """``<name>-<run_date>-<8 hex of what is asked>``."""
        text = json.dumps(self.asked(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{self.name}-{self.run_date.isoformat()}-{digest}"

    def resolved_json(self) -> str:
        """The job as JSON for the ledger: secrets masked, and of prompt texts the length alone."""
        from bidbeam.connectors.secrets import mask

        resolved = {each.name: jsonable(getattr(self, each.name)) for each in fields(self) if each.name not in _UNTOLD}
        for name in ("template", "system"):
            text = getattr(self.prompt, name)
            resolved["prompt"][name] = None if text is None else f"({len(text)} characters)"
        for pool in resolved["pools"]:
            pool["headers"] = dict.fromkeys(pool["headers"], "***")
        return mask(json.dumps(resolved, sort_keys=True, ensure_ascii=False))

    def deadline_at(self, started_at: datetime) -> datetime | None:
        """When a start at this moment (aware) must be done; None: there is no deadline."""
        return None if self.deadline is None else self.deadline.at(started_at, self.timezone)

    def fault(self, key: str, problem: str, *, expected: str | None = None, nearest: str | None = None) -> ConfigError:
        """A ConfigError at a dotted key of the job or pools file, with the line of it or of what holds it."""
        at = key
        while at and at not in self.lines:
            at = at.rpartition(".")[0]
        file, line = self.lines.get(at, (None, None))
        return ConfigError(problem, file=file, line=line, key=key, expected=expected, nearest=nearest)


def check_input(job: Job, spec: RenderSpec, schema: pa.Schema) -> None:
    """Whether the input has the columns that the job names. Raises InputError or ConfigError at the job's line.

    A column that means two things may mean both; that is told, once.
    """
    from bidbeam.transforms.rendering import check_columns, columns_in_both

    try:
        check_columns(spec, schema)
    except InputError as error:
        if error.key is None:
            raise
        at = job.fault(error.key, error.problem)
        raise InputError(error.problem, key=at.key, file=at.file, line=at.line) from None
    except ConfigError as error:
        raise job.fault(error.key or "", error.problem, expected=error.expected, nearest=error.nearest) from None
    for name in columns_in_both(spec, schema):
        _log.warning("column %r is in the template, and also sets the sampling key %s of its row", name, name)


def check_keys(job: Job) -> None:
    """Whether the keys of all pools are to be had, before anything is spent. Raises ConfigError at the pool's line."""
    from bidbeam.pipelines import pools_file

    for place, pool in enumerate(job.pools):
        try:
            pools_file.check_keys((pool,))
        except ConfigError as error:
            leaf = "api_key_env" if pool.api_key_env else "api_key_file"
            raise job.fault(f"pools[{place}].{leaf}", error.problem, expected=error.expected) from None


def check_fx(job: Job, now: datetime) -> None:
    """Whether every exchange rate that a pool needs is fresh. Raises ConfigError for one that is stale."""
    for currency in sorted({pool.price.currency for pool in job.pools} - {"USD"}):
        rate = job.fx[currency]
        if rate.stale(now):
            raise job.fault(
                f"fx.{currency}.at",
                f"the rate of {rate.at:%Y-%m-%d %H:%M} UTC is stale",
                expected=f"one within {rate.max_age}",
            )


def _canonical(value: Any) -> Any:
    """The value with equal numbers made the same: 0.70 is 0.7, and 1.0 is 1."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, Decimal | float):
        return int(value) if value == int(value) else float(value)
    return value
