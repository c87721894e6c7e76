"""Reputation: what the ledger's earlier runs teach, what counts against a pool and what does not, how fast it fades."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markets import NOW, pool
from small_jobs import make_job, prompts, remote
from small_ledger import attempt, charge, run_row, write_run

from bidbeam.connectors import ledger_history
from bidbeam.connectors.ledger_history import Deeds, read_deeds
from bidbeam.connectors.pools import Capacity
from bidbeam.connectors.store import Store
from bidbeam.pipelines.known import known_pools
from bidbeam.pipelines.run import run
from bidbeam.transforms.reputation import (
    HALF_LIFE_DAYS,
    PRIOR_FAILURES,
    PRIOR_SPREAD,
    PRIOR_SUCCESSES,
    Reputation,
    reputations,
)

CHEAP = {"input": "1", "output": "2"}
PRIOR = PRIOR_FAILURES / (PRIOR_FAILURES + PRIOR_SUCCESSES)
DAY = date(2026, 11, 21)
RUN = f"copy-{DAY}-aaaaaaaa"
LOT = "s1-r00000-l00000"


def deeds(pool: str = "p", **more: Any) -> Deeds:
    """A hundred good answers of half their length, half of the ideal from the cache, today, by the asking job."""
    usual: dict[str, Any] = {
        "run_id": RUN, "model": "m", "same_job": True, "last_at": NOW, "ok": 100, "answers": 100,
        "input_tokens": 10_000, "cached_tokens": 4_000, "output_tokens": 5_000, "planned_tokens": 10_000.0,
        "reusable_tokens": 8_000.0, "most_output_tokens": 10_000.0, "busy_us": 50_000_000, "window_us": 20_000_000,
    }  # fmt: skip
    return Deeds(pool=pool, **(usual | more))


def known(*found: Deeds, **spec: Any) -> Reputation:
    """What is believed of pool ``p`` with model ``m``."""
    state = pool("p", **{**CHEAP, **spec})
    return reputations(found, [state.spec], now=NOW)["p", "m"]


def test_of_a_pool_without_history_the_prior_is_believed() -> None:
    """One attempt in fifty fails, and everything else is unknown: never 0."""
    nothing = known()
    assert nothing.failure_rate == PRIOR == 0.02
    assert (nothing.cache_share, nothing.output_share, nothing.input_ratio) == (None, None, None)
    assert (nothing.tokens_per_second, nothing.uptime, nothing.excess) == (None, None, None)
    assert (nothing.spread, nothing.newcomer, nothing.seen_failure_rate) == (PRIOR_SPREAD, False, 0)


def test_answers_are_counted_against_what_was_planned() -> None:
    """Shares are sums over sums: of the ideal cache, of the longest answers, of the tokens that we planned with."""
    seen = known(deeds(), deeds(run_id="copy-2", input_tokens=30_000, planned_tokens=10_000.0))
    assert (seen.cache_share, seen.output_share, seen.input_ratio) == (0.5, 0.5, 2.0)
    assert (seen.answers, seen.latency_s) == (200, 0.5)


def test_what_happened_fades_by_half_with_each_half_life() -> None:
    """A run that is one half-life old weighs half as much as one of today, in the counts and in the means."""
    old = deeds(run_id="copy-0", last_at=NOW - timedelta(days=HALF_LIFE_DAYS), ok=0, failed=100, output_tokens=10_000)
    seen = known(deeds(), old)
    assert (seen.successes, seen.failures) == pytest.approx((100, 50))
    assert seen.failure_rate == pytest.approx((50 + PRIOR_FAILURES) / (150 + PRIOR_FAILURES + PRIOR_SUCCESSES))
    assert seen.output_share == pytest.approx((5_000 + 0.5 * 10_000) / (10_000 + 0.5 * 10_000))
    forgotten = known(deeds(ok=0, failed=1000, last_at=NOW - timedelta(days=20 * HALF_LIFE_DAYS)))
    assert forgotten.failure_rate == pytest.approx(PRIOR, abs=1e-4)


def test_the_narrowest_evidence_counts() -> None:
    """The job's own answers from the pool, then the job's from any pool, then the pool's from any job."""
    own, elsewhere = deeds(output_tokens=1_000), deeds("q", output_tokens=2_000)
    other_job = deeds(run_id="other", same_job=False, output_tokens=9_000)
    assert known(own, elsewhere, other_job).output_share == pytest.approx(0.1)
    assert known(elsewhere, other_job).output_share == pytest.approx(0.2)
    assert known(other_job).output_share == pytest.approx(0.9)
    assert known(replace(elsewhere, same_job=False)).output_share == pytest.approx(0.2)
    # How a cache behaves is nobody's but the pool's own.
    assert known(elsewhere).cache_share is None
    few = replace(own, answers=3)
    assert known(few, elsewhere).output_share == pytest.approx(3_000 / 20_000)
    assert known(few).output_share is None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 1000), st.integers(0, 1000))
def test_refusals_for_want_of_room_never_count_against_a_pool(refused: int, ok: int, failed: int) -> None:
    """However often a pool said that it is full, its failure rate stays; what it then served is its limit."""
    calm, full = (known(deeds(ok=ok, failed=failed, refused=n)) for n in (0, refused))
    assert full.failure_rate == calm.failure_rate
    assert calm.limit_tokens_per_second is None
    assert (full.limit_tokens_per_second is not None) == (refused > 0.01 * (ok + failed + refused))


def test_speed_is_that_of_all_the_concurrency_a_pool_declares() -> None:
    """Seconds per token of one request, times the requests at once; a pool that refused does no more than it did."""
    spec = pool("p", **CHEAP).spec
    served = deeds()  # 11,000 tokens; 50 s of requests within 20 s
    for concurrency, speed in ((10, 2_200.0), (1, 550.0)):
        wide = replace(spec, capacity=Capacity(concurrency=concurrency))
        assert reputations([served], [wide], now=NOW)["p", "m"].tokens_per_second == pytest.approx(speed)
    full = reputations([replace(served, refused=50)], [wide], now=NOW)["p", "m"]
    assert (full.tokens_per_second, full.limit_tokens_per_second) == pytest.approx((550.0, 550.0))
    assert known(replace(served, busy_us=900)).tokens_per_second is None


def test_an_engine_of_ours_is_as_fast_as_its_own_seconds_say() -> None:
    """Tokens over accelerator seconds, for all its engines; what it loads and idles is expected again."""
    found = deeds(accelerator_ms=22_000, overhead_ms=90_000, setup_ms=60_000, setups=4)
    spec = replace(pool("p", hour="3.60").spec, capacity=Capacity(workers=2))
    seen = reputations([found], [spec], now=NOW)["p", "m"]
    assert (seen.tokens_per_second, seen.overhead_s, seen.setup_s) == (1_000.0, 90.0, 15.0)
    assert known(deeds()).setup_s is None


def test_varying_runs_widen_the_spread_and_steady_ones_narrow_it() -> None:
    """The spread of the time per token starts from the prior and follows what the runs show."""
    steady = [deeds(run_id=f"r{n}") for n in range(20)]
    wild = [deeds(run_id=f"r{n}", busy_us=50_000_000 * (1 + 9 * (n % 2))) for n in range(20)]
    assert known(*steady).spread < PRIOR_SPREAD / 2
    assert known(*wild).spread > 2 * PRIOR_SPREAD


def test_reports_beyond_the_recount_are_remembered() -> None:
    """The worst of input, output and the provider's own bill, beyond what templates and rounding explain."""
    assert known(deeds(compared_input=10_100, recount_input=10_000)).excess == 0
    assert known(deeds(compared_output=5_600, recount_output=5_000)).excess == pytest.approx(0.10)
    billed = deeds(provider_cost=Decimal("1.21"), compared_cost=Decimal(1))
    assert known(billed).excess == pytest.approx(0.20)
    assert known(deeds(compared_input=9_000, recount_input=10_000)).excess == 0
    assert known(deeds()).excess is None


def test_a_pool_of_few_attempts_is_new_where_others_are_known() -> None:
    """A newcomer is one among the proven; where nobody is proven, nobody is new."""
    pools = [pool(name, **CHEAP).spec for name in ("p", "q")]
    found = reputations([deeds(), deeds("q", ok=3)], pools, now=NOW)
    assert (found["p", "m"].newcomer, found["q", "m"].newcomer) == (False, True)
    assert not any(each.newcomer for each in reputations([deeds("q", ok=3)], pools, now=NOW).values())


def test_answers_that_name_another_model_are_doubted() -> None:
    """As a share of those that could be compared, beside what is reported too much: the worse counts."""
    assert known(deeds(named=80, misnamed=20)).misnamed == pytest.approx(0.25)
    assert (known(deeds()).misnamed, known(deeds()).doubt) == (None, 0)
    assert known(deeds(named=80)).doubt == 0
    both = deeds(named=100, misnamed=5, compared_output=5_600, recount_output=5_000)
    assert known(both).doubt == pytest.approx(0.10)
    assert known(replace(both, misnamed=50)).doubt == pytest.approx(0.50)


# -- what DuckDB reads of a ledger


def _attempts(*outcomes: tuple[str, str | None], pool_: str = "p", **more: Any) -> list[dict[str, Any]]:
    return [
        attempt(RUN, f"q{at}", f"{pool_}{at}", pool_, status=status, error_class=error, model="m",
                **({"lot_id": LOT, "input_tokens": 30, "cached_tokens": 8, "output_tokens": 5} | more))
        for at, (status, error) in enumerate(outcomes)
    ]  # fmt: skip


def _write(store: Store, attempts: list[dict[str, Any]], run_id: str = RUN, day: date = DAY, **tables: Any) -> None:
    lot = {"run_id": run_id, "lot_id": LOT, "round": 1, "model": "m", "requests": 10, "input_tokens": 200,
           "ideal_cached_tokens": 100, "warm_tokens": 0, "max_output_tokens": 100}  # fmt: skip
    mine = [{**row, "run_id": run_id} for row in attempts]
    write_run(store, run_row(run_id, day, "complete"), {"attempts": mine, "lots": [lot], **tables})


def _read(store: Store, **more: Any) -> list[Deeds]:
    found: dict[str, Any] = {"job": "copy", "models": ["m"], "around": [DAY], "days": 90}
    return read_deeds(store, **(found | more))


def test_each_outcome_counts_as_what_it_is(tmp_path: Path) -> None:
    """Servers' faults, time-outs and bad answers are failures; limits are refusals; callers' faults are nothing."""
    store = Store.at(str(tmp_path))
    failures = [("failed", error) for error in ("server", "timeout", "bad_output", None)]
    nothing = [
        ("failed", "caller"),
        ("failed", "policy"),
        ("failed", "auth_funds"),
        ("cancelled", None),
        ("lost", None),
    ]
    _write(store, _attempts(*[("ok", None)] * 5, *failures, ("failed", "rate"), ("failed", "capacity"), *nothing))
    (found,) = _read(store)
    assert (found.ok, found.failed, found.refused, found.answers) == (5, 4, 2, 5)
    assert (found.same_job, found.pool, found.model) == (True, "p", "m")
    # Five answers of ten requests: half of what the lot planned.
    assert (found.input_tokens, found.planned_tokens) == (150, 100)
    assert (found.cached_tokens, found.reusable_tokens) == (40, 50)
    assert (found.output_tokens, found.most_output_tokens) == (25, 50)
    assert (found.busy_us, found.window_us) == (5 * 1_250_000, 1_250_000)
    assert (found.lengths, sum(found.latencies.values())) == ({50: 5}, 5)
    assert (found.minutes, found.minutes_up) == (0, 0)
    assert (found.named, found.misnamed) == (0, 0)


def test_models_that_answers_name_are_counted(tmp_path: Path) -> None:
    """Only answers that were compared, and of these the ones that named plainly another model."""
    store = Store.at(str(tmp_path))
    rows = _attempts(*[("ok", None)] * 4)
    for row, other in zip(rows, (True, False, None, True), strict=True):
        row["other_model"] = other
    _write(store, rows)
    (found,) = _read(store)
    assert (found.named, found.misnamed) == (3, 2)


def test_a_minute_is_up_when_four_of_five_attempts_succeed(tmp_path: Path) -> None:
    """Only minutes with ten attempts tell, and refusals are not among them."""
    store = Store.at(str(tmp_path))
    good = _attempts(*[("ok", None)] * 8, ("failed", "server"), ("failed", "server"), *[("failed", "rate")] * 50)
    later = {"started_at": NOW, "finished_at": NOW}
    bad = _attempts(*[("ok", None)] * 7, *[("failed", "server")] * 3, **later)
    for row in bad:
        row["attempt_id"] = row["attempt_id"][::-1]
    _write(store, good + bad)
    (found,) = _read(store)
    assert (found.minutes, found.minutes_up) == (2, 1)


def test_what_is_unreported_was_not_cached_and_probes_teach_only_success(tmp_path: Path) -> None:
    """NULL cached tokens are charged as none; a probe's short answer says nothing of a job's."""
    store = Store.at(str(tmp_path))
    rows = _attempts(("ok", None), cached_tokens=None) + _attempts(("ok", None), pool_="q", kind="probe", lot_id=None)
    guess = _attempts(("ok", None), pool_="r", usage_source="estimate")
    _write(store, rows + guess)
    by_pool = {each.pool: each for each in _read(store)}
    assert (by_pool["p"].cached_tokens, by_pool["p"].answers) == (0, 1)
    assert [(by_pool[name].ok, by_pool[name].answers) for name in "qr"] == [(1, 0), (1, 0)]


def test_money_is_summed_by_outcome(tmp_path: Path) -> None:
    """What answered and failed attempts were charged, what the provider says it billed, and what engines idled."""
    store = Store.at(str(tmp_path))
    rows = _attempts(("ok", None), ("ok", None), ("failed", "server"))
    rows[0]["provider_cost"] = Decimal("0.5")
    charges = [
        charge(RUN, DAY, "q", name, "p-chutes", "output", quantity)
        for name, quantity in (("p0", "10"), ("p1", "20"), ("p2", "5"))
    ]
    idle = charge(RUN, DAY, None, "idle", "p-own", "accelerator_idle_second", "2.500")
    loads = [
        {**charge(RUN, DAY, None, name, "p-own", "accelerator_idle_second", took), "meter": "setup"}
        for name, took in (("s1", "14.000"), ("s2", "16.250"))
    ]
    busy = charge(RUN, DAY, "q0", "p0", "p-own", "accelerator_second", "1.250")
    _write(store, rows, charges=[*charges, busy, *({**each, "pool": "p"} for each in (idle, *loads))])
    (found,) = _read(store)
    unit = Decimal("0.0000004")
    assert found.failed_cost == 5 * unit
    assert found.ok_cost - busy["cost"] == 30 * unit
    assert (found.provider_cost, found.compared_cost) == (Decimal("0.5"), 10 * unit + busy["cost"])
    assert (found.accelerator_ms, found.overhead_ms) == (1250, 2500 + 30_250)
    assert (found.setup_ms, found.setups) == (30_250, 2)


def test_only_runs_of_near_dates_are_read(tmp_path: Path) -> None:
    """A run long before, or of a far date, is not even opened; a past run date learns from its neighbours."""
    store = Store.at(str(tmp_path))
    for day, name in ((DAY, "new"), (DAY - timedelta(days=400), "old")):
        _write(store, _attempts(("ok", None)), run_id=f"{name}-{day}-aaaaaaaa", day=day)
    assert [each.run_id[:3] for each in _read(store)] == ["new"]
    assert [each.run_id[:3] for each in _read(store, around=[DAY - timedelta(days=390)])] == ["old"]
    assert len(_read(store, around=[DAY, DAY - timedelta(days=390)])) == 2
    assert [each.same_job for each in _read(store, job="new")] == [True]
    assert _read(store, models=["another"]) == []
    assert _read(Store.at(str(tmp_path / "nothing"))) == []


def test_at_most_so_many_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large runs only some parts are opened, of all runs together no more than the bound; the newest come first."""
    store = Store.at(str(tmp_path))
    for back in range(3):
        day = DAY - timedelta(days=back)
        _write(store, _attempts(*[("ok", None)] * 6), run_id=f"copy-{day}-aaaaaaaa", day=day)
    monkeypatch.setattr(ledger_history, "MOST_ROWS", 24)
    assert len(_read(store)) == 3
    monkeypatch.setattr(ledger_history, "MOST_ROWS", 12)
    assert {each.run_id for each in _read(store)} == {RUN, f"copy-{DAY - timedelta(days=1)}-aaaaaaaa"}


def test_a_ledger_that_cannot_be_read_is_no_reason_not_to_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A listed file that is gone, or a manifest that is none, leaves the prior, and a warning."""
    store = Store.at(str(tmp_path))
    _write(store, _attempts(("ok", None)))
    next(tmp_path.glob("attempts/**/part-*.parquet")).unlink()
    with caplog.at_level(logging.WARNING):
        assert _read(store) == []
    assert "history is not used" in caplog.text
    next(tmp_path.glob("runs/**/manifest-*.json")).write_bytes(b"{")
    assert _read(store) == []


def test_a_rehearsal_learns_from_rehearsals_and_a_run_does_not(tmp_path: Path) -> None:
    """A rehearsal's answers show in the next rehearsal's knowledge, and nowhere in the real ledger's."""
    job = make_job(tmp_path, prompts(40), [remote("near"), remote("far")], auction={"rounds": 1})
    run(job, rehearse=True)
    ledger = Store.at(job.ledger)
    rehearsed = known_pools(job, ledger.child("_rehearsals"), NOW)
    assert sum(each.answers for each in rehearsed.values()) == 40
    assert all(each.answers == 0 for each in known_pools(job, ledger, NOW).values())
