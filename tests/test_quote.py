"""Quotes: what a run would cost, to the last digit, without sending or writing anything."""

from __future__ import annotations

import tempfile
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from small_jobs import DAY, LATIN, by_the_hour, make_job, prompts, remote, write_job, written
from tiny_model import tiny_model

from bidbeam.connectors.doubles import OK, EndpointDouble, Reply, Seen
from bidbeam.connectors.errors import ConfigError, InputError
from bidbeam.connectors.pools import PoolSpec
from bidbeam.connectors.stand_in import StandIn
from bidbeam.pipelines.cli import invoke
from bidbeam.pipelines.job import Job
from bidbeam.pipelines.progress import usd
from bidbeam.pipelines.quote import quote_job
from bidbeam.pipelines.run import run
from bidbeam.pipelines.show import quote_text, refusal_text
from bidbeam.transforms import engines
from bidbeam.transforms.engines import Slot
from bidbeam.transforms.retrying import CHARGED_TRIES
from bidbeam.transforms.run_context import RunContext

pytestmark = pytest.mark.timeout(60)


def test_a_quote_is_what_the_prices_say(tmp_path: Path) -> None:
    """Expected cost is that of the lots' tokens, half of the ideal hits at the cached price, answers at full length."""
    # A token per four bytes, of raw prompts alone: 10 of 40 bytes; 36 bytes, 9 tokens, are shared.
    rows = pa.table({"id": [f"q{n}" for n in range(10)], "prompt": [f"{'word ' * 7}the {n} 4" for n in range(10)]})
    assert {len(text) for text in rows.column("prompt").to_pylist()} == {42}
    job = make_job(
        tmp_path,
        rows,
        [remote("near"), remote("far", price={"input": "1", "output": "2"})],
        prompt={"id": "id", "column": "prompt", "format": "raw"},
        baseline={"name": "list", "input": "1", "cached_input": "0.5", "output": "2", "per": "1M tokens"},
        budget={"max_cost": "1.00"},
    )
    quote = quote_job(job)
    # 11 tokens each. Shared are 39 bytes, 9 tokens: not one whole block of 16.
    assert (quote.requests, quote.input_tokens, quote.ideal_cached_tokens) == (10, 110, 0)
    per_token = Decimal("1E-6")
    assert quote.expected_cost == (110 * Decimal("0.10") + 80 * Decimal("0.40")) * per_token
    # At worst every byte is a token, and the template adds 64 to each request.
    assert quote.reserved_cost == ((110 * 4 + 640) * Decimal("0.10") + 80 * Decimal("0.40")) * per_token
    # All of that may fail, at that price, on both pools and in both rounds: three times more, on the dearer one; and
    # each pool may charge twice in a round for what is of no use.
    again = ((110 * 4 + 640) * 1 + 80 * 2) * per_token
    assert quote.worst_case_cost == min(CHARGED_TRIES * (quote.reserved_cost + 3 * again), Decimal("1.00"))
    assert quote.baseline_cost == (110 * 1 + 80 * 2) * per_token
    assert [(pool.pool, pool.lots, pool.requests) for pool in quote.pools] == [("near", 1, 10), ("far", 0, 0)]
    assert quote.pools[1].why_not == "others bid less"
    assert quote.estimated
    assert quote.budget == Decimal("1.00")


def test_cached_tokens_are_quoted_at_their_share(tmp_path: Path) -> None:
    """Of whole blocks that requests share a remote pool is expected to hit half, at its cached price."""
    rows = pa.table({"id": [f"q{n}" for n in range(5)], "prompt": [f"{'a' * 128}{n}" for n in range(5)]})
    job = make_job(tmp_path, rows, [remote("near")], prompt={"id": "id", "column": "prompt", "format": "raw"})
    quote = quote_job(job)
    # 33 tokens each, of which four requests share 32, two blocks.
    assert (quote.input_tokens, quote.ideal_cached_tokens) == (165, 128)
    expected = (165 - 64) * Decimal("0.10") + 64 * Decimal("0.01") + 40 * Decimal("0.40")
    assert quote.expected_cost == expected / 1_000_000


def test_a_quote_sends_and_writes_nothing(tmp_path: Path) -> None:
    """No endpoint hears of a quote, and neither output nor ledger nor anything beside the job appears."""
    with EndpointDouble(["tiny"]) as double:
        job = make_job(tmp_path, prompts(5), [remote("near", double.base_url)])
        before = sorted(tmp_path.rglob("*"))
        assert quote_job(job).lots == 1
        assert (double.requests, double.connections) == ([], 0)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_quote_says_what_nobody_would_take(tmp_path: Path) -> None:
    """Bad rows, rows that no pool may serve and rows beyond the budget are counted by what stands in their way."""
    rows = pa.table(
        {
            "id": list("abcd"),
            "prompt": [None, "fine", "nowhere", "fine too"],
            "placement": [None, None, '{"zdr": true}', None],
        }
    )
    quote = quote_job(make_job(tmp_path, rows, [remote("near")]))
    assert (quote.dead_invalid, dict(quote.unserved)) == (1, {"no_eligible_pool": 1})
    poor = quote_job(make_job(tmp_path, rows, [remote("near")], budget={"max_cost": "0"}))
    assert dict(poor.unserved) == {"no_eligible_pool": 1, "budget": 2}
    assert poor.worst_case_cost == 0
    # The two rows with a pool reserve what they cost at full length.
    assert poor.needed == quote.reserved_cost
    assert poor.pools[0].why_not == f"the budget of $0.00 covers no lot: one reserves {usd(poor.needed)} or more"
    assert f"2 budget, 1 no_eligible_pool; the budget of $0.00 must be at least {usd(poor.needed)} for" in quote_text(
        poor
    )
    assert quote.needed is None
    assert quote_job(make_job(tmp_path / "none", rows.slice(0, 1), [remote("near")])).lots == 0


def test_a_quote_fails_as_the_run_would(tmp_path: Path) -> None:
    """What the run would refuse, the quote refuses the same way."""
    job = make_job(tmp_path, prompts(2), [remote("near")], prompt={"column": "prumpt"})
    with pytest.raises(InputError, match="did you mean 'prompt'"):
        quote_job(job)


@settings(max_examples=2, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(
    st.lists(
        st.tuples(st.text("abc ", min_size=1, max_size=300), st.integers(1, 40), st.integers(1, 2)),
        min_size=1,
        max_size=30,
    ),
    st.booleans(),
)
def test_no_run_costs_more_than_its_quotes_worst_case(rows: list[tuple[str, int, int]], hourly: bool) -> None:
    """A rehearsal's bill stays within the worst case that was quoted, on pools paid by the token."""
    table = pa.table(
        {
            "id": [str(n) for n in range(len(rows))],
            "prompt": [row[0] + "x" for row in rows],
            "max_tokens": [row[1] for row in rows],
            "n": [row[2] for row in rows],
        }
    )
    models: dict[str, Any] = {"tiny": {"source": tiny_model()}}
    pools = [remote("near"), remote("far", price={"input": "0.05", "output": "0.9", "request": "0.0001"})]
    if hourly:
        pools.append(by_the_hour("own", capacity={"tokens_per_second": 1}))
    with tempfile.TemporaryDirectory() as scratch:
        terms: dict[str, Any] = {"models": models, "auction": {"rounds": 1}}
        if hourly:
            # Nothing but a budget bounds the time of an engine that may serve.
            assert quote_job(make_job(Path(scratch), table, pools, **terms)).worst_case_cost is None
            terms["budget"] = {"max_cost": "1000"}
        job = make_job(Path(scratch), table, pools, **terms)
        quote = quote_job(job)
        summary = run(job, rehearse=True)
    assert quote.worst_case_cost is not None
    assert summary.cost <= quote.worst_case_cost
    assert quote.expected_cost <= quote.worst_case_cost
    assert (summary.input_tokens, quote.estimated) == (quote.input_tokens, False)
    assert summary.ideal_cached_tokens == quote.ideal_cached_tokens


def _half_shared(count: int, start: int) -> pa.Table:
    """Prompts of four products, each with instructions of its own."""
    return pa.concat_tables(
        prompts(
            count // 4, start=start, shared=f"{LATIN} The product is number {product} of four, be brief with it"
        ).set_column(0, "id", pa.array([f"p{product}-{start + n}" for n in range(count // 4)]))
        for product in range(4)
    )


@pytest.mark.parametrize("flaky", [False, True])
def test_after_one_run_a_quote_is_within_a_tenth_of_the_bill(tmp_path: Path, flaky: bool) -> None:
    """Real runs of one job on two days: the first shows how short answers are, what caches do, and who fails.

    Answers are an eighth of what they may be, tokens are counted otherwise than we estimate, and one in four tries on
    the cheap pool fails where it is flaky, to be bought again for three times the money.
    """

    def behave(seen: Seen) -> Reply:
        return Reply.error(500) if flaky and seen.number % 4 == 0 else OK

    dear = {"input": "0.30", "cached_input": "0.03", "output": "1.20"}
    with EndpointDouble(["tiny"], behave) as cheap, EndpointDouble(["tiny"]) as sure:
        pools = [remote("cheap", cheap.base_url), remote("sure", sure.base_url, price=dear)]
        terms: dict[str, Any] = {"sampling": {"max_tokens": 64, "temperature": 0}, "auction": {"rounds": 3}}
        blind = quote_job(make_job(tmp_path, _half_shared(120, 0), pools, **terms))
        first = run(make_job(tmp_path, _half_shared(120, 0), pools, **terms))
        path = write_job(tmp_path, _half_shared(160, 500), pools, **terms)
        job = Job.from_yaml(path, run_date=DAY + timedelta(days=1))
        quote = quote_job(job)
        bill = run(job)
    assert (first.served, bill.served) == (120, 160)
    assert blind.expected_cost > 2 * first.cost
    assert abs(quote.expected_cost - bill.cost) <= bill.cost / 10
    assert bill.cost <= quote.worst_case_cost
    assert first.cost <= blind.worst_case_cost
    by_name = {pool.pool: pool for pool in quote.pools}
    assert by_name["cheap"].answers == next(pool.requests for pool in first.pools if pool.pool == "cheap")
    assert by_name["cheap"].failure_rate == pytest.approx(0.25 if flaky else 0, abs=0.05)
    assert by_name["cheap"].finish_s is not None


def test_after_one_rehearsal_a_quote_of_the_next_is_within_a_tenth(tmp_path: Path) -> None:
    """With ``--rehearse`` a quote prices the rehearsal by earlier ones; a real run is quoted without them."""
    pools = [remote("near"), remote("far", price={"input": "0.20", "output": "0.90"})]
    terms: dict[str, Any] = {"sampling": {"max_tokens": 200, "temperature": 0}}
    job = make_job(tmp_path, _half_shared(400, 0), pools, **terms)
    real = quote_job(job)
    run(job, rehearse=True)
    path = write_job(tmp_path, _half_shared(600, 500), pools, **terms)
    job = Job.from_yaml(path, run_date=DAY + timedelta(days=1))
    quote, bill = quote_job(job, rehearse=True), run(job, rehearse=True)
    assert abs(quote.expected_cost - bill.cost) <= bill.cost / 10
    assert bill.cost <= quote.worst_case_cost
    assert quote_job(job).pools[0].answers == 0
    assert real.expected_cost * 3 / 2 == pytest.approx(quote_job(job).expected_cost, rel=Decimal("0.1"))


class Timed(StandIn):
    """An engine whose seconds follow its tokens, two hundred of them a second, on a clock of its own."""

    clock_ms = 0

    def poll(self) -> list[pa.RecordBatch]:
        batches = []
        for batch in super().poll():
            cached = pc.divide(batch.column("input_tokens"), 2)
            computed = pc.subtract(pc.add(batch.column("input_tokens"), batch.column("output_tokens")), cached)
            Timed.clock_ms += 5 * pc.sum(computed).as_py()
            batches.append(batch.set_column(batch.schema.get_field_index("cached_tokens"), "cached_tokens", cached))
        return batches


def test_after_one_run_a_quote_of_an_engine_by_the_hour_is_within_a_tenth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole runs on an engine paid by time, whose seconds are those of its tokens and of loading: the first run shows
    how fast it is, how short answers are, what its cache finds and how long it loads.

    Seconds of a real processor also hang on what else it does meanwhile, which no quote can know.
    """
    loads = iter((15_000, 16_500))
    monkeypatch.setattr(engines, "clock_ms", lambda: Timed.clock_ms)

    def start(context: RunContext, spec: PoolSpec, model: str) -> Slot:
        took = next(loads)
        return Slot(Timed(spec.name), lambda timeout_s: took)

    monkeypatch.setattr(engines, "_start", start)
    terms: dict[str, Any] = {
        "models": {"tiny": {"source": tiny_model()}},
        "sampling": {"max_tokens": 64, "temperature": 0},
        "budget": {"max_cost": "1"},
    }
    pools = [by_the_hour("own", engine={"block_size": 32}, capacity={"concurrency": 8})]
    first = run(make_job(tmp_path, _half_shared(120, 0), pools, **terms))
    path = write_job(tmp_path, _half_shared(160, 500), pools, **terms)
    job = Job.from_yaml(path, run_date=DAY + timedelta(days=1))
    quote = quote_job(job)
    bill = run(job)
    assert (first.served, bill.served) == (120, 160)
    assert abs(quote.expected_cost - bill.cost) <= bill.cost / 10
    assert quote.worst_case_cost is not None
    assert bill.cost <= quote.worst_case_cost <= 1
    setups = [row["quantity"] for row in written(job).rows("charges") if row["meter"] == "setup"]
    assert setups == [Decimal("16.5")]
    (own,) = quote.pools
    assert own.tokens_per_second == pytest.approx(200, rel=0.01)
    # It says when it is done, loading included.
    assert own.finish_s == pytest.approx(15 + float(bill.cost) * 3600 / 0.71 - 16.5, rel=0.1)


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        ("placement:zdr (undeclared)", "its placement declares no zdr, and the job asks for one"),
        (
            "placement:jurisdiction (1 of 2 lots)",
            "its placement declares a jurisdiction that the job does not allow (1 of 2 lots)",
        ),
        ("too_long", "a request is longer than its context"),
        ("others bid less", "others bid less"),
        ("jurisdiction US is not in [DE, EEA]", "jurisdiction US is not in [DE, EEA]"),
        ("", ""),
    ],
)  # fmt: skip
def test_a_refusal_is_told_in_words(reason: str, says: str) -> None:
    """The ledger's reasons become sentences; what is one stays."""
    assert refusal_text(reason) == says


def test_a_quote_prints_the_market(tmp_path: Path) -> None:
    """A row per pool: price, capacity, what it asks for all it may serve, its part of the plan, or why it has none."""
    pools = [
        remote("near"),
        remote("far", price={"input": "1", "output": "2"}, capacity={"concurrency": 7, "tokens_per_second": 1000}),
        remote("out", placement={"jurisdiction": "US"}),
    ]
    job = make_job(tmp_path, prompts(30), pools, placement={"jurisdictions": ["EEA"]})
    assert {pool.why_not for pool in quote_job(job).pools if pool.pool != "out"} == {
        "placement:jurisdiction (undeclared)"
    }
    quote = quote_job(make_job(tmp_path, prompts(30), pools, budget={"max_cost": "0.01"}))
    near, far, _ = quote.pools
    assert (near.capacity, far.capacity) == ("4 at once", "7 at once, 1,000 tokens/s")
    assert near.asks == near.expected_cost == quote.expected_cost
    assert far.asks is not None
    assert far.asks > near.asks
    assert (far.asks_lots, far.lots, far.why_not) == (quote.lots, 0, "others bid less")
    assert quote.lp_bound is not None
    assert quote.lp_bound <= quote.expected_cost * Decimal("1.03")
    assert quote.reserved_cost is not None
    assert quote.expected_cost <= quote.reserved_cost <= quote.worst_case_cost <= Decimal("0.01")
    text = quote_text(quote)
    for shown in ("7 at once, 1,000 tokens/s", "others bid less", "reserved", "worst case", "lower bound"):
        assert shown in text
    assert "earlier runs" not in text


def test_a_quote_says_what_a_budget_below_the_worst_case_will_serve(tmp_path: Path) -> None:
    """How many requests it does not cover at their worst, how many it is expected to serve, and no more than all of it
    is spent."""
    plenty = quote_job(make_job(tmp_path, prompts(40), [remote("near")], budget={"max_cost": "1"}))
    assert (plenty.uncovered, plenty.expected_served, plenty.reserved_cost) == (0, 40, plenty.pools[0].worst_case_cost)
    assert "budget dead letters" not in quote_text(plenty)
    assert plenty.reserved_cost is not None
    for share, served in ((Decimal("0.6"), 40), (plenty.expected_cost / plenty.reserved_cost / 2, 20)):
        budget = (plenty.reserved_cost * share).quantize(Decimal("1e-12"))
        poor = quote_job(make_job(tmp_path, prompts(40), [remote("near")], budget={"max_cost": str(budget)}))
        assert poor.reserved_cost == poor.worst_case_cost == budget
        assert poor.uncovered == pytest.approx(40 * (1 - share), abs=2)
        assert poor.expected_served == pytest.approx(served, abs=2)
        assert poor.expected_cost == min(plenty.expected_cost, budget)
        assert f"may end with {poor.uncovered} budget dead letters; {poor.expected_served} of 40" in quote_text(poor)


def test_an_engine_that_bids_by_demand_is_quoted_at_its_price(tmp_path: Path) -> None:
    """``demand`` moves what an engine bids, not what it charges; a curve without bounds is refused, and so is one of a
    remote pool."""
    models = {"tiny": {"source": tiny_model()}}

    def quoted(price: dict[str, Any], **keys: Any) -> Decimal:
        own = by_the_hour("own", price={"accelerator_hour": "0.71", **price}, capacity={"tokens_per_second": 900})
        return quote_job(make_job(tmp_path, prompts(6), [own], models=models, deadline="1h", **keys)).expected_cost

    assert quoted({"demand": {"least": "0.8", "most": "2.0"}}) == quoted({}) > 0
    with pytest.raises(ConfigError, match=r"price.demand: asks for 0.1 to 1 times the price"):
        quoted({"demand": {"least": "0.1"}})
    with pytest.raises(ConfigError, match="only engines of ours bid by supply and demand"):
        make_job(tmp_path, prompts(6), [remote("near", price={"input": "1", "output": "1", "demand": {"most": "2"}})])


def test_the_quote_command_prints_and_exits_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``bidbeam quote`` ends well and names the costs."""
    make_job(tmp_path, prompts(3), [remote("near")])
    assert invoke(["quote", str(tmp_path / "job.yaml")]) == 0
    assert "near" in capsys.readouterr().out
