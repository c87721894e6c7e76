"""Settling: what is believed of usage, what is charged for it, and what a crash costs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bidbeam.connectors.engine import RESULT_SCHEMA
from bidbeam.connectors.money import sum_decimal
from bidbeam.connectors.pools import Meter, PriceSchedule
from bidbeam.connectors.schemas import LABEL, METER_COLUMNS, SEGMENT
from bidbeam.transforms.estimates import worst_input
from bidbeam.transforms.recount import recount_outputs
from bidbeam.transforms.settling import Terms, book_lost, over_worst_case, overhead_row, settle, worst_case_cost

AT = datetime(2026, 3, 1, 6, tzinfo=UTC)
TOKEN_PRICES: dict[Meter, Decimal] = {
    "uncached_input": Decimal("1E-7"),
    "cached_input": Decimal("1E-8"),
    "output": Decimal("4E-7"),
}


def terms(prices: dict[Meter, Decimal] | None = None, fx_rate: Decimal = Decimal(1)) -> Terms:
    price = PriceSchedule("price-1", "pool-a", TOKEN_PRICES if prices is None else prices)
    return Terms("pool-a", "tiny", price, fx_rate, jurisdiction="DE", operator="own")


def requests(rows: list[dict[str, Any]]) -> pa.RecordBatch:
    """One request a row; ``ours``, ``exact``, ``max_tokens`` and ``n`` may be given."""
    count = len(rows)
    return pa.record_batch(
        {
            "tag": pa.array(range(count), pa.int64()),
            "key": pa.array([bytes([i % 256]) * 16 for i in range(count)], pa.binary(16)),
            "attempt_id": pa.array([i.to_bytes(16, "big") for i in range(count)], pa.binary(16)),
            "request_id": [f"r{i}" for i in range(count)],
            "lot_id": pa.array(["lot-0"] * count).cast(LABEL),
            "round": pa.array([1] * count, pa.int16()),
            "attempt_no": pa.array([1] * count, pa.int16()),
            "kind": pa.array(["primary"] * count).cast(LABEL),
            "input_tokens": pa.array([row.get("ours", 100) for row in rows], pa.int32()),
            "tokens_exact": pa.array([row.get("exact", True) for row in rows], pa.bool_()),
            "max_tokens": pa.array([row.get("max_tokens", 16) for row in rows], pa.int32()),
            "n": pa.array([row.get("n", 1) for row in rows], pa.int16()),
        }
    )


def results(rows: list[dict[str, Any]]) -> pa.RecordBatch:
    """One result a row: any column of RESULT_SCHEMA, ``ok`` without any usage where nothing is given."""
    given_ = {"status": "ok", "started_at": AT, "finished_at": AT + timedelta(seconds=1)}
    return pa.RecordBatch.from_pylist(
        [
            {**given_, "tag": tag, **{name: row[name] for name in row.keys() & set(RESULT_SCHEMA.names)}}
            for tag, row in enumerate(rows)
        ],
        schema=RESULT_SCHEMA,
    )


def settled(
    rows: list[dict[str, Any]],
    agreed: Terms | None = None,
    accelerator_ms: int | None = None,
    recount: list[int | None] | None = None,
) -> list[dict[str, Any]]:
    segment = settle(
        requests(rows),
        results(rows),
        agreed or terms(),
        accelerator_ms=accelerator_ms,
        recount_output_tokens=None if recount is None else pa.array(recount, pa.int64()),
    )
    segment.validate(full=True)
    assert segment.schema.equals(SEGMENT)
    out: list[dict[str, Any]] = segment.to_pylist()
    return out


reported = st.one_of(st.none(), st.integers(-3, 400), st.sampled_from([2**31 - 1, 2**31, 2**62, -(2**62)]))
attempts = st.fixed_dictionaries(
    {
        "status": st.sampled_from(["ok", "failed", "cancelled"]),
        "ours": st.integers(1, 300),
        "exact": st.booleans(),
        "max_tokens": st.integers(1, 100),
        "n": st.integers(1, 4),
        "input_tokens": reported,
        "cached_tokens": reported,
        "cache_write_tokens": reported,
        "output_tokens": reported,
        "usage_source": st.sampled_from([None, "reported", "recount", "estimate"]),
    }
)
price_units = st.integers(0, 10**12).map(lambda digits: Decimal(f"{digits}E-15"))
meters: tuple[Meter, ...] = ("uncached_input", "cached_input", "cache_write", "output", "request")
price_maps = st.lists(st.sampled_from(meters), unique=True).flatmap(
    lambda chosen: st.fixed_dictionaries(dict.fromkeys(chosen, price_units))
)
fx_rates = st.one_of(st.just(Decimal(1)), st.integers(1, 10**9).map(lambda digits: Decimal(f"{digits}E-6")))


def test_reported_usage_is_charged_by_meter() -> None:
    """Input splits into uncached and cached, each is charged at its own price, and constants come from the terms."""
    [row] = settled(
        [{"input_tokens": 90, "cached_tokens": 64, "output_tokens": 10, "output": "hi", "finish_reason": "stop"}]
    )
    assert (row["q_uncached_input"], row["q_cached_input"], row["q_output"]) == (26, 64, 10)
    assert row["cost"] == 26 * Decimal("1E-7") + 64 * Decimal("1E-8") + 10 * Decimal("4E-7")
    assert (row["input_tokens"], row["cached_tokens"], row["output_tokens"]) == (90, 64, 10)
    assert (row["usage_source"], row["recount_input_tokens"]) == ("reported", 100)
    assert (row["pool"], row["model"], row["jurisdiction"], row["operator"]) == ("pool-a", "tiny", "DE", "own")
    assert (row["price_id"], row["output"], row["finish_reason"]) == ("price-1", "hi", "stop")
    assert (row["request_id"], row["lot_id"], row["kind"]) == ("r0", "lot-0", "primary")
    assert (row["started_at"], row["finished_at"]) == (AT, AT + timedelta(seconds=1))


def test_unreported_cached_tokens_stay_null() -> None:
    """Cached tokens that the provider does not report are NULL, and all input is charged as uncached."""
    [row] = settled([{"input_tokens": 90, "output_tokens": 10}])
    assert (row["cached_tokens"], row["q_cached_input"], row["q_uncached_input"]) == (None, None, 90)


def test_more_cached_than_input_is_not_believed() -> None:
    """Cached tokens are a subset of input tokens: a report of more is as good as none."""
    [row] = settled([{"input_tokens": 90, "cached_tokens": 91, "output_tokens": 10}])
    assert (row["cached_tokens"], row["q_uncached_input"]) == (None, 90)


@pytest.mark.parametrize(
    ("told", "kept", "charged"),
    [
        ({"cached_tokens": 60, "cache_write_tokens": 30}, 30, (10, 60, 30)),
        ({"cached_tokens": 60, "cache_write_tokens": 41}, None, (40, 60, None)),
        ({"cache_write_tokens": 100}, 100, (0, None, 100)),
        ({"cached_tokens": 60}, None, (40, 60, None)),
    ],
)
def test_tokens_written_to_a_cache_have_a_meter_of_their_own(
    told: dict[str, Any], kept: int | None, charged: tuple[int | None, ...]
) -> None:
    """Where the schedule prices them they are charged by it and no second time; a report that cannot be is not
    believed; a schedule without the price takes them for uncached input, and still records them."""
    row = {"input_tokens": 100, "output_tokens": 1, **told}
    prices: dict[Meter, Decimal] = {**TOKEN_PRICES, "cache_write": Decimal("1.25E-7")}
    [apart] = settled([row], terms(prices))
    assert apart["cache_write_tokens"] == kept
    assert (apart["q_uncached_input"], apart["q_cached_input"], apart["q_cache_write"]) == charged
    [together] = settled([row])
    assert (together["cache_write_tokens"], together["q_cache_write"]) == (kept, None)
    assert together["q_uncached_input"] + (together["q_cached_input"] or 0) == 100


def test_without_a_cached_price_all_input_is_uncached() -> None:
    """A schedule without a cached price charges cached tokens as uncached ones, and still records them."""
    prices: dict[Meter, Decimal] = {"uncached_input": Decimal("1E-7"), "output": Decimal("4E-7")}
    [row] = settled([{"input_tokens": 90, "cached_tokens": 64, "output_tokens": 10}], terms(prices))
    assert (row["cached_tokens"], row["q_uncached_input"], row["q_cached_input"]) == (64, 90, None)


@pytest.mark.parametrize(
    ("exact", "recount", "output", "source"),
    [(True, 7, 7, "recount"), (True, None, 32, "estimate"), (False, 7, 7, "estimate"), (False, None, 32, "estimate")],
)
def test_missing_usage_is_recounted_or_estimated(exact: bool, recount: int | None, output: int, source: str) -> None:
    """An answer without usage is charged by our own count, or where there is none by n full answers, and says so."""
    [row] = settled([{"exact": exact, "max_tokens": 16, "n": 2}], recount=[recount])
    assert (row["input_tokens"], row["cached_tokens"], row["output_tokens"]) == (100, None, output)
    assert (row["usage_source"], row["recount_output_tokens"]) == (source, recount)
    assert row["recount_input_tokens"] == (100 if exact else None)


def test_a_recount_stands_beside_reported_usage() -> None:
    """Where the provider reports, its figure is charged and ours is recorded."""
    [row] = settled([{"input_tokens": 90, "output_tokens": 10}], recount=[7])
    assert (row["output_tokens"], row["recount_output_tokens"], row["usage_source"]) == (10, 7, "reported")


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_unanswered_attempts_cost_what_is_known(status: str) -> None:
    """An attempt without an answer is charged for the usage that was reported, and for nothing where none was."""
    prices = {**TOKEN_PRICES, "request": Decimal("0.001")}
    known, unknown = settled([{"status": status, "input_tokens": 90}, {"status": status}], terms(prices))
    assert (known["q_uncached_input"], known["q_output"], known["q_request"]) == (90, None, 1)
    assert (known["output_tokens"], known["usage_source"]) == (None, "reported")
    assert known["cost"] == Decimal("0.001009")
    for name in ("input_tokens", "cached_tokens", "output_tokens", "usage_source", *METER_COLUMNS.values()):
        assert unknown[name] is None
    assert unknown["cost"] == 0


def test_errors_are_kept() -> None:
    """Error class, message, HTTP status, host and provider id of a failed attempt reach the journal."""
    error = {
        "error_class": "rate", "error_message": "slow down", "http_status": 429, "endpoint_host": "api.example",
        "provider_request_id": "x1",
    }  # fmt: skip
    [row] = settled([{"status": "failed", **error}])
    assert {name: row[name] for name in error} == error


def test_accelerator_time_is_shared_by_computed_tokens() -> None:
    """Every attempt on a pool paid by time bears its part, failed ones too, and cached tokens cost no time."""
    prices: dict[Meter, Decimal] = {"accelerator_second": Decimal("0.0002")}
    rows = settled(
        [
            {"input_tokens": 100, "cached_tokens": 100, "output_tokens": 10},
            {"input_tokens": 30, "cached_tokens": 0, "output_tokens": 0, "status": "cancelled"},
            {"status": "failed"},
        ],
        terms(prices),
        accelerator_ms=8000,
    )
    assert [row["q_accelerator_second"] for row in rows] == [2, 6, 0]
    assert rows[0]["q_uncached_input"] is None
    assert rows[1]["cost"] == Decimal("0.0012")


def test_time_is_never_forgotten() -> None:
    """A pool paid by time does not settle without its time, nor book lost attempts without what was reserved."""
    by_time = terms({"accelerator_second": Decimal("0.0002")})
    with pytest.raises(ValueError, match="accelerator_ms"):
        settle(requests([{}]), results([{}]), by_time, accelerator_ms=None)
    with pytest.raises(ValueError, match="accelerator_ms"):
        book_lost(requests([{}]), by_time, AT)
    lost = book_lost(requests([{}, {}]), by_time, AT, accelerator_ms=3001)
    assert sum_decimal(lost.column("q_accelerator_second")) == Decimal("3.001")


def test_batches_must_stand_side_by_side() -> None:
    """Requests and results in different order are refused, not mixed up."""
    with pytest.raises(ValueError, match="same tags"):
        settle(requests([{}, {}]).take([1, 0]), results([{}, {}]), terms(), accelerator_ms=None)


def test_an_empty_batch_settles_to_nothing() -> None:
    """No results make a segment of no rows."""
    assert settled([]) == []


@given(st.lists(attempts, min_size=1, max_size=12), price_maps, fx_rates, st.integers(0, 10**6))
def test_unknown_stays_null_and_cached_is_a_subset(
    rows: list[dict[str, Any]], prices: dict[Meter, Decimal], fx_rate: Decimal, busy_ms: int
) -> None:
    """Whatever is reported, cached <= input, quantities are known exactly where tokens are, and add up to them."""
    for source, row in zip(rows, settled(rows, terms(prices, fx_rate), accelerator_ms=busy_ms), strict=True):
        if row["cached_tokens"] is not None:
            assert 0 <= row["cached_tokens"] <= row["input_tokens"]
        for name in ("input_tokens", "output_tokens"):
            believable = source[name] is not None and 0 <= source[name] < 2**31
            assert row[name] == source[name] if believable else (row[name] is None) == (source["status"] != "ok")
        if "uncached_input" in prices:
            assert (row["q_uncached_input"] is None) == (row["input_tokens"] is None)
        if row["cache_write_tokens"] is not None:
            assert 0 <= row["cache_write_tokens"] <= row["input_tokens"] - (row["cached_tokens"] or 0)
        if "uncached_input" in prices and row["input_tokens"] is not None:
            apart = (row["q_cached_input"] or 0) + (row["q_cache_write"] or 0)
            assert row["q_uncached_input"] + apart == row["input_tokens"]
            assert row["q_uncached_input"] >= 0
        for meter in ("cached_input", "cache_write"):
            known = row["cached_tokens" if meter == "cached_input" else "cache_write_tokens"]
            assert row[METER_COLUMNS[meter]] == (known if meter in prices else None)
        assert (row["usage_source"] is None) == (row["input_tokens"] is None and row["output_tokens"] is None)
        assert {m for m, column in METER_COLUMNS.items() if row[column] is not None} <= set(prices)


@given(st.lists(attempts, min_size=1, max_size=12), price_maps, fx_rates)
def test_no_usage_within_bounds_exceeds_the_worst_case(
    rows: list[dict[str, Any]], prices: dict[Meter, Decimal], fx_rate: Decimal
) -> None:
    """Usage of at most our input and n full answers never costs more than the worst case, whatever is cached; what is
    lost costs no more than that of its input at worst."""
    for row in rows:
        row["input_tokens"] = None if row["input_tokens"] is None else min(row["input_tokens"], row["ours"])
        most = row["n"] * row["max_tokens"]
        row["output_tokens"] = None if row["output_tokens"] is None else min(row["output_tokens"], most)
    agreed = terms(prices, fx_rate)
    asked = requests(rows)
    worst = worst_case_cost(asked, agreed)
    segment = settle(asked, results(rows), agreed, accelerator_ms=None)
    lost = book_lost(asked, agreed, AT)
    estimates = worst_input(asked["input_tokens"], asked["tokens_exact"])
    at = asked.schema.get_field_index("input_tokens")
    reserved = worst_case_cost(asked.set_column(at, "input_tokens", estimates), agreed)
    for one, bound in ((segment, worst), (lost, reserved)):
        assert all(spent <= most for spent, most in zip(one["cost"].to_pylist(), bound.to_pylist(), strict=True))
    assert over_worst_case(asked, segment, agreed).to_pylist() == [False] * len(rows)


def test_inflated_usage_is_booked_and_flagged() -> None:
    """A provider that reports more than can have been used is booked as it reports, and shown to the caller."""
    rows = [{"input_tokens": 100, "output_tokens": 16}, {"input_tokens": 100, "output_tokens": 17}]
    segment = settle(requests(rows), results(rows), terms(), accelerator_ms=None)
    assert segment["q_output"].to_pylist() == [16, 17]
    assert over_worst_case(requests(rows), segment, terms()).to_pylist() == [False, True]
    by_time = terms({"accelerator_second": Decimal("0.0002")})
    timed = settle(requests(rows), results(rows), by_time, accelerator_ms=10)
    assert over_worst_case(requests(rows), timed, by_time).to_pylist() == [False, False]


def test_lost_attempts_are_booked_at_the_worst_case() -> None:
    """An attempt whose outcome a crash took is booked as lost, with all its input uncached and n full answers."""
    segment = book_lost(requests([{"max_tokens": 16, "n": 2}]), terms(), AT)
    segment.validate(full=True)
    assert segment.schema.equals(SEGMENT)
    [row] = segment.to_pylist()
    assert (row["status"], row["usage_source"], row["finished_at"]) == ("lost", "estimate", AT)
    assert (row["input_tokens"], row["cached_tokens"], row["output_tokens"]) == (100, None, 32)
    assert (row["q_uncached_input"], row["q_cached_input"], row["q_output"]) == (100, None, 32)
    assert row["cost"] == Decimal("0.0000228")


def test_overhead_bears_no_request() -> None:
    """Idle time is one row without a request, charged by its own meter over the time that it took."""
    idle = terms({"accelerator_second": Decimal("0.0002"), "accelerator_idle_second": Decimal("0.0002")})
    segment = overhead_row(idle, meter="accelerator_idle_second", millis=2500, at=AT, attempt_id=bytes(16))
    segment.validate(full=True)
    assert segment.schema.equals(SEGMENT)
    [row] = segment.to_pylist()
    assert (row["tag"], row["key"], row["request_id"], row["input_tokens"]) == (None, None, None, None)
    assert (row["kind"], row["status"], row["started_at"]) == ("overhead", "ok", AT - timedelta(seconds=2.5))
    assert (row["q_accelerator_idle_second"], row["cost"]) == (Decimal("2.5"), Decimal("0.0005"))
    with pytest.raises(ValueError, match="no price for setup"):
        overhead_row(idle, meter="setup", millis=1, at=AT, attempt_id=bytes(16))


def test_recounts_follow_the_tokenizer() -> None:
    """Answers are counted by the tokenizer, samples are added up, and no answer is NULL."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = pa.array(["a a b", None, "", "a"], pa.large_string())
    assert recount_outputs(texts, tokenizer).to_pylist() == [3, None, 0, 1]
    assert recount_outputs(texts.slice(2), tokenizer).to_pylist() == [0, 1]
    samples = pa.array([["x"], ["a a", "b"], None, [], ["a", None]], pa.list_(pa.large_string()))
    assert recount_outputs(samples.slice(1), tokenizer).to_pylist() == [3, None, 0, 1]
    assert recount_outputs(samples.slice(5), tokenizer).type == pa.int64()
    assert np.all(recount_outputs(pa.array(["a b"] * 5000), tokenizer).to_numpy() == 2)
