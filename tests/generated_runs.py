"""Runs drawn from a seed: lots of one small plan, with pools, prices, walls, and engines that behave in all sorts of
ways and look at every wall when they are sent something, by rules written here anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from small_plans import Planned, make_context, make_plan, write_input

from bidbeam.connectors.engine import RESULT_SCHEMA
from bidbeam.connectors.errors import PoolDown
from bidbeam.connectors.pools import Capacity, Meter, PoolSpec, PriceSchedule
from bidbeam.transforms.door import Door
from bidbeam.transforms.engines import Slot
from bidbeam.transforms.estimates import WORST_ESTIMATE, WORST_TEMPLATE_TOKENS
from bidbeam.transforms.prompts import PromptSpec
from bidbeam.transforms.rendering import RenderSpec
from bidbeam.transforms.reputation import Reputation
from bidbeam.transforms.run_context import FxQuote, RunContext
from bidbeam.transforms.shift_task import ShiftTask

AT = datetime(2026, 1, 2, tzinfo=UTC)
ROWS = 60
LOADING_S, IDLING_S = 2.0, 1.0
"""What a budget holds back for each engine, in place of the product's minutes: here time passes by the millisecond."""
RATES = {"EUR": Decimal("1.0837"), "TAO": Decimal("412.123456789012")}

EEA = frozenset({"DE", "FR", "EU", "EEA"})
Allows = Callable[[Mapping[str, Any]], bool]
ASKED: list[tuple[dict[str, Any] | None, Allows]] = [
    (None, lambda labels: True),
    ({"jurisdictions": ["EEA"]}, lambda labels: labels.get("jurisdiction") in EEA),
    ({"jurisdictions": ["DE", "US"]}, lambda labels: labels.get("jurisdiction") in {"DE", "US"}),
    ({"jurisdictions_deny": ["CN"]}, lambda labels: labels.get("jurisdiction") in EEA | {"US"}),
    ({"zdr": True}, lambda labels: labels.get("zdr") is True),
    ({"training": False, "max_retention_days": 30}, lambda labels: labels.get("training") is False
        and labels.get("max_retention_days") in {0, 30}),
    ({"operators": ["own", "cloud"]}, lambda labels: labels.get("operator") in {"own", "cloud"}),
    ({"tee": "gpu"}, lambda labels: labels.get("tee") in {"gpu", "cpu+gpu"}),
]  # fmt: skip
"""What a job or a row may ask for, and which labels pass it."""
LABELS: dict[str, list[Any]] = {
    "jurisdiction": ["DE", "FR", "EU", "US", "CN", "GLOBAL", None],
    "zdr": [True, False, None],
    "training": [False, True, None],
    "max_retention_days": [0, 30, 90, None],
    "operator": ["own", "cloud", "community", None],
    "tee": ["none", "gpu", "cpu+gpu", None],
}


@dataclass(frozen=True)
class Ground:
    """A plan, and what each of its rows asks of a pool's labels beside the job."""

    plan: Planned
    job: Allows
    rows: dict[str, Allows]
    request_of: dict[int, str]
    """The row of each tag."""


def ground(home: Path, job: int) -> Ground:
    """Plans ``ROWS`` rows of three tenants, two models and many lengths under the job's placement ``ASKED[job]``."""
    r = np.random.default_rng(7)
    asked = [ASKED[0 if r.random() < 0.4 else int(r.integers(1, len(ASKED)))] for _ in range(ROWS)]
    table = pa.table(
        {
            "id": [f"row-{n}" for n in range(ROWS)],
            "prompt": [f"shared {n % 4} " * int(r.integers(1, 12)) + f"{n:03d}" for n in range(ROWS)],
            "model": r.choice(["m", "k"], ROWS, p=[0.7, 0.3]).tolist(),
            "tenant": r.choice(["acme", "bolt", "core"], ROWS).tolist(),
            "max_tokens": r.integers(1, 30, ROWS).tolist(),
            "n": r.choice([1, 1, 1, 3], ROWS).tolist(),
            "placement": [None if one is None else json.dumps(one) for one, _ in asked],
        }
    )
    files = write_input(home, {"rows.parquet": table}, ROWS // 2)
    placement = ASKED[job][0] or {}
    spec = RenderSpec(
        prompt=PromptSpec(id="id", column="prompt", format="raw", tenant="tenant"),
        model="m",
        sampling={"temperature": 0.5},
        placement=placement,
        longest_context={"m": None, "k": None},
    )
    context = make_context(home, files, ranges=2, lot_tokens=250, render=spec, placement=placement, rehearse=True)
    plan = make_plan(context, files)
    assert sum(plan.lots.column("requests").to_pylist()) == ROWS
    allowed = {f"row-{n}": allows for n, (_, allows) in enumerate(asked)}
    return Ground(plan, ASKED[job][1], allowed, _request_ids(plan))


def _request_ids(plan: Planned) -> dict[int, str]:
    """The row of each tag, read back from what was spilled."""
    door, found = Door(plan.context, plan.spills), dict[int, str]()
    for lot in plan.lots.to_pylist():
        info = door.open(lot, frozenset()).info
        found |= dict(zip(*(info.column(name).to_pylist() for name in ("tag", "request_id")), strict=True))
    return found


class Clock:
    """Milliseconds that pass only when an engine says so."""

    def __init__(self) -> None:
        self.ms = 0

    def __call__(self) -> int:
        return self.ms

    def now(self) -> datetime:
        return AT + timedelta(milliseconds=self.ms)

    def seconds(self) -> float:
        return self.ms / 1000


@dataclass(frozen=True)
class Ways:
    """How a pool's engine behaves."""

    window: int = 8
    usage: str = "honest"
    """``honest``, ``most`` (all that the worst case allows), ``none`` (unreported), ``odd`` or ``lies`` (beyond it)."""
    fails: float = 0.0
    charged: bool = False
    dies_after: int | None = None
    falls: bool = False
    tick_ms: int = 0
    delay: int = 0
    """Polls before its first answer."""
    setup_ms: int = 0


@dataclass
class Run:
    """One generated run: what it was given, and what is watched while it goes."""

    ground: Ground
    context: RunContext
    lots: pa.Table
    """Those of the plan's lots that the run is about."""
    ways: dict[str, Ways]
    prompt: bool
    """Whether what comes back is settled at once, so that a lie is seen before anything else is sent."""
    random: np.random.Generator
    clock: Clock = field(default_factory=Clock)
    slots: dict[tuple[str, str, int], Slot] = field(default_factory=dict)
    answered: set[int] = field(default_factory=set)
    asked: set[bytes] = field(default_factory=set)
    task: ShiftTask | None = None
    seen: Decimal = Decimal(0)
    """USD that has come back in this shift from pools paid by the token."""

    @property
    def lies(self) -> bool:
        return any(ways.usage == "lies" for ways in self.ways.values())

    def spec(self, pool: str) -> PoolSpec:
        return next(spec for spec in self.context.pools if spec.name == pool)

    def rate(self, spec: PoolSpec) -> Decimal:
        return RATES.get(spec.price.currency, Decimal(1))

    def may(self, pool: str, request: str) -> bool:
        labels = self.spec(pool).placement
        return self.ground.job(labels) and self.ground.rows[request](labels)

    def slot(self, pool: str, model: str, replica: int) -> Slot:
        key = pool, model, replica
        if key not in self.slots or (self.slots[key].dead and self.random.random() < 0.5):
            ways = self.ways[pool]
            loads = self.spec(pool).price.by_time
            engine = Behaving(self, self.spec(pool), ways)
            self.slots[key] = Slot(engine, (lambda timeout_s: ways.setup_ms) if loads else None)
        return self.slots[key]


class Behaving:
    """An engine with ways of its own, which looks at every wall when it is sent something."""

    wants: frozenset[str] = frozenset()

    def __init__(self, run: Run, spec: PoolSpec, ways: Ways) -> None:
        self.run, self.spec, self.ways = run, spec, ways
        self.waiting: list[dict[str, Any]] = []
        self.back: list[dict[str, Any]] = []
        self.taken = self.polls = 0
        self.dead = False

    @property
    def room(self) -> int:
        return 0 if self.dead else self.ways.window - self.in_flight

    @property
    def in_flight(self) -> int:
        return len(self.waiting) + len(self.back)

    def listen(self, wake: Callable[[], None]) -> None:
        self.wake = wake

    def submit(self, requests: pa.RecordBatch) -> None:
        run, name = self.run, self.spec.name
        if self.dead and not self.in_flight:
            raise PoolDown("gone for good")
        rows = requests.select(["tag", "attempt_id", "input_tokens", "max_tokens", "sampling"]).to_pylist()
        assert len(rows) <= max(self.room, 0), f"{name} is sent more than it has room for"
        deadline = run.context.deadline_at
        assert deadline is None or run.clock.now() < deadline, f"{name} is sent something after the deadline"
        task = run.task
        if run.prompt and task is not None and task.reserved is not None and not self.spec.price.by_time:
            assert run.seen <= task.reserved, f"{name} is bought from although {run.seen} > {task.reserved} is spent"
        for row in rows:
            assert run.may(name, run.ground.request_of[row["tag"]]), (
                f"{run.ground.request_of[row['tag']]} reached {name}"
            )
            assert row["tag"] not in run.answered, f"{row['tag']} is asked again although it is answered"
            assert row["attempt_id"] not in run.asked, "an attempt is sent twice"
            run.asked.add(row["attempt_id"])
        self.waiting += rows
        self.wake()

    def poll(self) -> list[pa.RecordBatch]:
        results, self.back = self.back, []
        if self.in_flight:
            self.run.clock.ms += self.ways.tick_ms
            self.polls += 1
            self.wake()
        if self.dead and not results:
            raise PoolDown("the line went dead")
        if self.ways.dies_after is not None and self.taken >= self.ways.dies_after and not self.dead:
            self.dead = True
            begun, rest = self.waiting[:2], self.waiting[2:]
            if self.ways.falls:
                # What was never sent is no attempt yet: another pool may be sent it under the same id.
                self.run.asked.difference_update(row["attempt_id"] for row in rest)
            self.waiting = []
            if not self.ways.falls:
                raise PoolDown("the line went dead")
            self.back = [_result(row, status="cancelled", error_message="given up in flight") for row in begun]
            results += [_result(row, status="cancelled", error_message="not sent") for row in rest]
            self.wake()
        if self.polls > self.ways.delay:
            count = int(self.run.random.integers(1, self.ways.window + 1))
            done, self.waiting = self.waiting[:count], self.waiting[count:]
            self.taken += len(done)
            results += [self._answer(row) for row in done]
        if not results:
            return []
        if not self.spec.price.by_time:
            self.run.seen += sum((self._cost(result) for result in results), Decimal(0))
        return [pa.RecordBatch.from_pylist(results, RESULT_SCHEMA)]

    def cancel(self, tags: Any = None) -> None:
        mine = [row for row in self.waiting if tags is None or row["tag"] in tags]
        self.back += [_result(row, status="cancelled", error_message="given up in flight") for row in mine]
        self.waiting = [row for row in self.waiting if row not in mine]
        self.wake()

    def close(self) -> None:
        self.waiting, self.back = [], []

    def _answer(self, row: dict[str, Any]) -> dict[str, Any]:
        r, most = self.run.random, row["max_tokens"] * json.loads(row["sampling"]).get("n", 1)
        ours = row["input_tokens"]
        used: dict[str, Any] = {
            "honest": {"input_tokens": ours, "output_tokens": int(r.integers(1, most + 1)), "cached_tokens": ours // 2},
            "most": {"input_tokens": WORST_ESTIMATE * ours + WORST_TEMPLATE_TOKENS, "output_tokens": most},
            "none": {},
            "odd": {"input_tokens": -1, "output_tokens": most, "cached_tokens": 10**6},
            "lies": {"input_tokens": 50 * ours + 5_000, "output_tokens": 3 * most},
        }[self.ways.usage]
        if r.random() >= self.ways.fails:
            self.run.answered.add(row["tag"])
            return _result(row, status="ok", output="so it is", **used)
        why = r.choice(
            ["server", "timeout", "rate", "capacity", "auth_funds", "caller", "policy", "bad_output", "empty"]
        )
        if why == "empty":
            return _result(row, status="ok", output=" ", **used)
        paid = used if self.ways.charged else {}
        return _result(row, status="failed", error_class=str(why), error_message="as drawn", **paid)

    def _cost(self, result: dict[str, Any]) -> Decimal:
        """At least what the shift will settle it at, were its cached tokens all cached."""
        prices, input_, output = self.spec.price.unit_prices, result.get("input_tokens"), result.get("output_tokens")
        if input_ is None or output is None or input_ < 0:
            return Decimal(0)
        each = prices.get("uncached_input", Decimal(0))
        if result.get("cached_tokens") and "cached_input" in prices:
            each = min(each, prices["cached_input"])
        cost = input_ * each + output * prices.get("output", Decimal(0)) + prices.get("request", Decimal(0))
        return cost * self.run.rate(self.spec) * Decimal("0.999999")


def _result(row: dict[str, Any], **given: Any) -> dict[str, Any]:
    return {"tag": row["tag"], "usage_source": "reported", "started_at": AT, "finished_at": AT, **given}


def draw(ground: Ground, seed: int) -> Run:
    """The run of a seed."""
    r = np.random.default_rng(seed)
    prompt, specs, ways = bool(r.random() < 0.6), [], {}
    deadline_ms = None if r.random() < 0.5 else int(r.choice([1, 500, 3_000, 60_000]))
    budget = None if r.random() < 0.15 else Decimal(round(10 ** r.uniform(-4, 0.5), 9)).quantize(Decimal("1e-9"))
    if r.random() < 0.04:
        budget = Decimal(0)
    usages = ["honest", "most", "none", "odd"]
    lying = prompt and r.random() < 0.3
    timed = [bool(r.random() < 0.25) for _ in range(int(r.integers(2, 7)))]
    # Where lies are to be seen at once the wall of time has no margin; then no time passes for engines paid by it.
    still = prompt and any(timed)
    for at, by_time in enumerate(timed):
        name = f"p{at}"
        labels = {label: r.choice(np.array(values, object)) for label, values in LABELS.items()}
        if r.random() < 0.6:
            labels |= {
                "jurisdiction": "DE", "zdr": True, "training": False, "max_retention_days": 0, "operator": "own",
                "tee": "gpu",
            }  # fmt: skip
        currency = str(r.choice(["USD", "USD", "EUR", "TAO", "GBP"], p=[0.5, 0.2, 0.15, 0.1, 0.05]))
        specs.append(
            PoolSpec(
                name,
                "vllm" if by_time else "openai",
                {model: model for model in (("m", "k") if r.random() < 0.7 else ("m",))},
                PriceSchedule(f"price-{name}", name, _prices(r, by_time, currency), currency),
                Capacity(
                    tokens_per_second=None if r.random() < 0.4 else float(10 ** r.uniform(1, 5)),
                    workers=int(r.integers(1, 4)) if by_time else 1,
                ),
                {label: value for label, value in labels.items() if value is not None or r.random() < 0.5},
                context=int(r.integers(40, 300)) if r.random() < 0.3 else None,
                settlement="internal" if r.random() < 0.3 else "external",
            )
        )
        ways[name] = Ways(
            window=int(r.choice([1, 4, 16, 64])),
            usage="lies" if lying and not by_time and r.random() < 0.5 else str(r.choice(usages)),
            fails=float(r.choice([0, 0, 0.1, 0.3, 1.0], p=[0.3, 0.3, 0.2, 0.15, 0.05])),
            charged=bool(r.random() < 0.3),
            dies_after=int(r.integers(0, 12)) if r.random() < 0.2 else None,
            falls=bool(r.random() < 0.5),
            tick_ms=0 if still else int(r.choice([0, 1, 20, 60])),
            delay=int(r.choice([0, 0, 3, 40])),
            setup_ms=int(r.choice([0, 7, 900, 5_000])) if by_time else 0,
        )
    known = {
        (spec.name, model): Reputation(
            successes=float(r.integers(0, 100)), failures=float(r.integers(0, 5)), answers=100,
            cache_share=float(r.uniform(0, 1)), output_share=float(r.uniform(0.05, 1)),
            setup_s=float(r.choice([0.0, 0.01, 4.0])) if spec.price.by_time else None,
        )
        for spec in specs for model in spec.models if r.random() < 0.2
    }  # fmt: skip
    context = replace(
        ground.plan.context,
        pools=tuple(specs),
        max_cost=budget,
        # Whatever loads has been at it since then.
        started_at=AT - timedelta(seconds=4),
        deadline_at=None if deadline_ms is None else AT + timedelta(milliseconds=deadline_ms),
        rounds=int(r.integers(1, 4)),
        fx={currency: FxQuote(rate, "drawn", AT) for currency, rate in RATES.items()},
        payment=str(r.choice(["pay_as_bid", "second_score", "uniform", "vcg"], p=[0.7, 0.1, 0.1, 0.1])),
        known=known,
    )
    some = np.sort(r.permutation(ground.plan.lots.num_rows)[: int(r.integers(1, 13))])
    return Run(ground, context, ground.plan.lots.take(pa.array(some)), ways, prompt, r)


def _prices(r: np.random.Generator, by_time: bool, currency: str) -> dict[Meter, Decimal]:
    def price(low: float, high: float) -> Decimal:
        return Decimal(10 ** r.uniform(low, high) / float(RATES.get(currency, 1))).quantize(Decimal("1e-15"))

    if by_time:
        second = price(-6, -2)
        return {"accelerator_second": second, "accelerator_idle_second": second, "setup": second}
    if r.random() < 0.05:
        return {"uncached_input": Decimal(0), "output": Decimal(0)}
    prices: dict[Meter, Decimal] = {"uncached_input": price(-7, -4), "output": price(-7, -3)}
    if r.random() < 0.5:
        prices["cached_input"] = (prices["uncached_input"] / 10).quantize(Decimal("1e-15"))
    if r.random() < 0.2:
        prices["cache_write"] = (prices["uncached_input"] * Decimal("1.25")).quantize(Decimal("1e-15"))
    if r.random() < 0.2:
        prices["request"] = price(-6, -3)
    return prices
