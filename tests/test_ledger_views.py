"""The ledger's views over a ledger that is checked by hand, in our own reader and in any DuckDB."""

from __future__ import annotations

import json
import re
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_ledger import DAY_A, LATE, A, B, charge, run_row, write_run, write_small_ledger

from bidbeam.connectors.ledger_reader import open_ledger, query_ledger, run_query
from bidbeam.connectors.ledger_views import VIEWS, derived_views_sql
from bidbeam.connectors.ledger_writer import write_part
from bidbeam.connectors.store import Store

GOLDEN = Path(__file__).parent / "golden" / "ledger_views.json"


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store.at(str(tmp_path_factory.mktemp("ledger")))
    write_small_ledger(store)
    # Left by a writer that died: no manifest lists it.
    lost = charge(A, DAY_A, "r1", "lost", "p-chutes", "output", "1000000")
    write_part(store, "charges", DAY_A, A, "s009", pa.Table.from_pylist([lost]))
    return store


@pytest.fixture(scope="module")
def plain(ledger: Store) -> duckdb.DuckDBPyConnection:
    """A DuckDB that was only given views.sql."""
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'America/New_York'")
    connection.execute(ledger.read("views.sql").decode())
    return connection


def rows(ledger: Store, sql: str) -> list[dict[str, Any]]:
    return query_ledger(ledger.url, sql).to_pylist()


def test_cost_per_request_counts_every_attempt_of_the_row_that_was_tried(ledger: Store) -> None:
    """Failed attempts cost their request; shared, refused and duplicate rows cost 0 and are all there."""
    found = rows(ledger, "FROM cost_per_request WHERE run_date = '2026-11-21'")
    assert {(row["request_id"], row["source_row"]): (row["cost"], row["attempts"]) for row in found} == {
        # 24 x 0.0000001 + 96 x 0.00000001 + 32 x 0.0000004
        ("r1", 0): (Decimal("0.00001616"), 1),
        # 100 x 0.0000001 for the attempt that failed + 1.25 s x 0.000197222222222
        ("r2", 1): (Decimal("0.0002565277777775"), 2),
        ("r3", 2): (Decimal(0), 0),
        ("r4", 3): (Decimal(0), 0),
        ("r1", 4): (Decimal(0), 0),
        # 50 x 0.0000001 + 10 x 0.0000004
        ("r6", 5): (Decimal("0.000009"), 1),
    }


def test_cost_per_request_agrees_with_the_requests_themselves(ledger: Store) -> None:
    """The charges give what the writer put on each request."""
    differing = """
        FROM cost_per_request JOIN requests USING (run_id, request_id, source_file, source_row)
        WHERE cost_per_request.cost <> requests.cost"""
    assert rows(ledger, differing) == []


def test_cost_by_pool_is_the_whole_bill(ledger: Store) -> None:
    """Idle time is in it, in the pool's own currency and in USD, and all pools sum to all charges."""
    found = {row["pool"]: row for row in rows(ledger, "FROM cost_by_pool")}
    assert found["chutes"]["cost"] == Decimal("0.00003516")
    # 1.25 s served and 0.5 s idle at 0.000197222222222
    assert found["own"]["cost"] == Decimal("0.0003451388888885")
    assert found["own"]["overhead_cost"] == Decimal("0.000098611111111")
    # (1000 x 8 + 64 x 2 + 200 x 32) x 10^-12 TAO, at 401.5
    assert (found["subnet"]["cost_native"], found["subnet"]["currency"]) == (Decimal("0.000000014528"), "TAO")
    assert found["subnet"]["cost"] == Decimal("0.000005832992")
    assert rows(ledger, "SELECT sum(cost) AS s FROM charges") == rows(ledger, "SELECT sum(cost) AS s FROM cost_by_pool")


def test_cost_by_kind_says_what_served_nobody(ledger: Store) -> None:
    """Failed tries and idle time stand apart from answers, every attempt is in one row, and nothing is missing."""
    found = rows(ledger, "FROM cost_by_kind")
    by = {(row["pool"], row["kind"], row["status"]): (row["attempts"], row["cost"]) for row in found}
    # 100 x 0.0000001 for what failed
    assert by["chutes", "primary", "failed"] == (1, Decimal("0.00001"))
    # 0.5 s idle at 0.000197222222222
    assert by["own", "overhead", "ok"] == (1, Decimal("0.000098611111111"))
    assert rows(ledger, "SELECT sum(cost) AS s FROM charges") == rows(ledger, "SELECT sum(cost) AS s FROM cost_by_kind")
    assert rows(ledger, "SELECT count(*) AS n FROM attempts") == [{"n": sum(row["attempts"] for row in found)}]


def test_cost_by_day_is_by_utc_days_in_any_time_zone(ledger: Store, plain: duckdb.DuckDBPyConnection) -> None:
    """A charge one second before midnight UTC is on that day, also for a session in New York."""
    expected = [(str(LATE.date()), "subnet", Decimal("0.000005832992"))]
    sql = "SELECT day::VARCHAR, pool, cost FROM cost_by_day WHERE pool = 'subnet'"
    assert plain.execute(sql).fetchall() == expected
    assert [tuple(row.values()) for row in rows(ledger, sql)] == expected


def test_cost_by_tag_shows_each_tag_and_what_has_none(ledger: Store) -> None:
    """A charge with two tags is under both, an untagged one under NULL, so that nothing is missing."""
    found = rows(ledger, "FROM cost_by_tag WHERE run_date = '2026-11-21'")
    assert {(row["tag"], row["value"]): row["cost"] for row in found} == {
        ("team", "growth"): Decimal("0.0002816877777775"),
        ("tier", "gold"): Decimal("0.000009"),
        (None, None): Decimal("0.000098611111111"),
    }


def test_savings_are_against_each_baseline_of_the_attempt_that_served(ledger: Store) -> None:
    """Cached tokens cost a baseline's cached price, or its input price; shared answers save their whole price."""
    found = rows(
        ledger, "SELECT request_id, source.* EXCLUDE (request_id) FROM savings AS source WHERE status = 'served'"
    )
    by = {(row["request_id"], row["baseline"]): (row["baseline_cost"], row["saving"]) for row in found}
    # 24 x 0.0000003 + 96 x 0.00000003 + 32 x 0.0000012
    assert by["r1", "vertex"] == (Decimal("0.00004848"), Decimal("0.00003232"))
    # 120 x 0.0000002 + 32 x 0.000001: no cached price
    assert by["r1", "plain"] == (Decimal("0.000056"), Decimal("0.00003984"))
    assert by["r3", "vertex"] == (Decimal("0.00004848"), Decimal("0.00004848"))
    # 36 x 0.0000003 + 64 x 0.00000003 + 20 x 0.0000012, less what both attempts cost
    assert by["r2", "vertex"] == (Decimal("0.00003672"), Decimal("-0.0002198077777775"))
    # Cached tokens were not reported: all count as uncached.
    assert by["r6", "vertex"] == (Decimal("0.000027"), Decimal("0.000018"))
    assert {row["baseline_cost"] for row in rows(ledger, "FROM savings WHERE status = 'dead'")} == {None}
    assert rows(ledger, f"FROM savings WHERE run_id = '{B}'") == []


def test_savings_agree_with_the_charges(ledger: Store) -> None:
    """Against the first baseline, the requests that paid have what stands on their charges."""
    charged = rows(ledger, "SELECT sum(baseline_cost) AS s FROM charges")
    saved = "SELECT sum(baseline_cost) AS s FROM savings WHERE baseline = 'vertex' AND shared_with IS NULL"
    assert rows(ledger, saved) == charged == [{"s": Decimal("0.0001122")}]


def test_cache_savings_are_by_the_token_and_unknown_where_paid_by_time(ledger: Store) -> None:
    """The discount on cached tokens, converted where it is in another currency; NULL for accelerator time."""
    found = {row["pool"]: row for row in rows(ledger, "FROM cache_savings")}
    # 96 x (0.0000001 - 0.00000001)
    assert found["chutes"]["saving"] == Decimal("0.00000864")
    assert (found["chutes"]["cached_tokens"], found["chutes"]["unreported_attempts"]) == (96, 2)
    assert (found["own"]["saving"], found["own"]["cached_tokens"]) == (None, 64)
    # 64 x (8 - 2) x 10^-12 TAO at 401.5
    assert found["subnet"]["saving_native"] == Decimal("0.000000000384")
    assert found["subnet"]["saving"] == Decimal("0.000000154176")


def test_regret_is_in_money_and_relative(ledger: Store) -> None:
    """The gap to the bound is exact, its ratio is the one that was recorded."""
    assert rows(ledger, "SELECT gap, regret FROM regret") == [{"gap": Decimal("0.00001"), "regret": Decimal("0.1")}]


def test_reconciliation_compares_only_what_both_sides_know(ledger: Store) -> None:
    """Differences are theirs minus ours, over the attempts that have both figures."""
    found = {row["pool"]: row for row in rows(ledger, "FROM reconciliation")}
    chutes = found["chutes"]
    assert (chutes["attempts"], chutes["compared_input"], chutes["input_tokens_off"]) == (3, 1, 2)
    assert (chutes["compared_cost"], chutes["cost_off"]) == (1, Decimal("0.00000001"))
    assert (found["subnet"]["output_tokens_off"], found["subnet"]["cost_off"]) == (-5, None)
    # A little more, as other templates count, is not flagged, and less is not.
    assert {row["flagged"] for row in found.values()} == {False}
    assert found["own"]["attempts"] == 1  # idle time is no attempt at a request


def test_focus_keeps_the_rules_of_the_specification(ledger: Store) -> None:
    """Mandatory columns are never NULL, quantity x price is the list price, periods hold the charge, bills sum."""
    found = rows(ledger, "FROM focus")
    mandatory = [
        "BilledCost", "BillingAccountId", "BillingAccountName", "BillingCurrency", "BillingPeriodStart",
        "BillingPeriodEnd", "ChargeCategory", "ChargeDescription", "ChargePeriodStart", "ChargePeriodEnd",
        "ContractedCost", "EffectiveCost", "InvoiceIssuerName", "ListCost", "PricingQuantity", "PricingUnit",
        "ProviderName", "PublisherName", "ServiceCategory", "ServiceName",
    ]  # fmt: skip
    for row in found:
        assert all(row[name] is not None for name in mandatory)
        assert row["ChargeClass"] is None
        with localcontext(prec=60):
            assert row["PricingQuantity"] * row["ListUnitPrice"] == row["ListCost"]
            native = row["PricingQuantity"] * row["PricingCurrencyListUnitPrice"]
            assert native == row["PricingCurrencyEffectiveCost"]
        assert row["BillingPeriodStart"] <= row["ChargePeriodStart"] < row["ChargePeriodEnd"] <= row["BillingPeriodEnd"]
        assert row["PricingUnit"] in {"Tokens", "Requests", "Seconds"}
    assert sum(row["BilledCost"] for row in found) == Decimal("0.0003861318808885")
    directions = {(row["SkuMeter"], row["x_TokenDirection"], row["x_TokenCacheAction"]) for row in found}
    assert ("cached_input", "Input", "Read") in directions
    assert ("output", "Output", None) in directions


def test_an_unknown_cost_makes_its_sum_unknown(tmp_path: Path) -> None:
    """A charge whose cost is NULL is not taken for 0: the sums it belongs to are NULL, the others are not."""
    ledger = Store.at(str(tmp_path))
    charges = [
        charge(A, DAY_A, "r1", "a1", "p-chutes", "output", "1", cost=None),
        charge(A, DAY_A, "r1", "a1", "p-chutes", "uncached_input", "1"),
        charge(A, DAY_A, "r2", "a2", "p-own", "accelerator_second", "1"),
    ]
    write_run(ledger, run_row(A, DAY_A, "complete"), {"charges": charges})
    found = {row["pool"]: row["cost"] for row in rows(ledger, "FROM cost_by_pool")}
    assert found == {"chutes": None, "own": Decimal("0.000197222222222")}


def test_prices_of_many_parts_stand_once(ledger: Store) -> None:
    """Two runs that bought by one schedule list it twice; the view has one row for each schedule and meter."""
    found = rows(ledger, "SELECT price_id, count(*) AS n FROM prices GROUP BY ALL ORDER BY 1")
    assert [tuple(row.values()) for row in found] == [("p-chutes", 3), ("p-own", 2), ("p-subnet", 3)]


@pytest.mark.parametrize("view", VIEWS)
def test_any_duckdb_shows_what_we_show(ledger: Store, plain: duckdb.DuckDBPyConnection, view: str) -> None:
    """views.sql gives the same columns, types and rows as the command line, and never reads an unlisted file."""
    with open_ledger(ledger.url) as ours:
        mine = run_query(ours, f"FROM {view} ORDER BY ALL")
        types = ours.execute(f"DESCRIBE {view}").fetchall()
    assert plain.execute(f"DESCRIBE {view}").fetchall() == types
    plain.execute("SET TimeZone = 'UTC'")
    assert plain.sql(f"FROM {view} ORDER BY ALL").to_arrow_table().to_pylist() == mine.to_pylist()


def test_views_sql_follows_the_ledger(tmp_path: Path) -> None:
    """A stored view shows runs that came later, from another connection, and a ledger that was moved once told so."""
    ledger = Store.at(str(tmp_path / "here"))
    write_small_ledger(ledger)
    text = ledger.read("views.sql").decode()
    database = tmp_path / "dashboard.duckdb"
    with duckdb.connect(str(database)) as connection:
        connection.execute(text)
    write_run(ledger, run_row("later", DAY_A, "complete"), {})
    with duckdb.connect(str(database)) as connection:
        assert connection.execute("SELECT count(*) FROM runs").fetchall() == [(4,)]
    assert ledger.read("views.sql").decode() == text
    (tmp_path / "here").rename(tmp_path / "there")
    with duckdb.connect(str(database)) as connection:
        connection.execute(f"SET VARIABLE bidbeam_ledger = '{tmp_path / 'there'}/'")
        assert connection.execute("SELECT count(*) FROM runs").fetchall() == [(4,)]
        assert connection.execute("SELECT count(*) FROM charges").fetchall() == [(11,)]


def test_money_is_never_divided() -> None:
    """DuckDB's division and averages are floating point: neither is in the views, nor any float type."""
    text = re.sub(r"--[^\n]*|'[^']*'", "", derived_views_sql())
    assert not re.search(r"(?<!/)/(?!/)|\bavg\(|\bmean\(|DOUBLE|FLOAT|\bREAL\b", text)
    assert "//" in text  # whole numbers only, where a currency is converted


def test_money_has_decimal_types(ledger: Store) -> None:
    """Every column of money in every view is DECIMAL(38,18), unit prices and ratios aside."""
    sql = """
        SELECT table_name, column_name, data_type FROM duckdb_columns()
        WHERE NOT internal AND regexp_matches(column_name, '(?i)cost|saving|price_paid|reserved|objective|bound|gap')
          AND NOT regexp_matches(column_name, 'compared')"""
    found = rows(ledger, sql)
    assert len(found) > 30
    assert {row["data_type"] for row in found} == {"DECIMAL(38,18)"}


amounts = st.integers(-(10**24), 10**24).map(lambda units: Decimal(f"{units}E-18"))
rates = st.one_of(st.integers(1, 10**20), st.sampled_from([5 * 10**17, 10**18, 1])).map(lambda u: Decimal(f"{u}E-18"))


@settings(max_examples=25, deadline=None)
@given(pairs=st.lists(st.tuples(amounts, rates), min_size=1, max_size=20))
def test_conversion_rounds_half_even_at_18_places(plain: duckdb.DuckDBPyConnection, pairs: list[Any]) -> None:
    """bidbeam_convert equals Python's decimal arithmetic for every amount and rate, ties and negatives included."""
    table = pa.table(
        {
            "amount": pa.array([amount for amount, _ in pairs], pa.decimal128(38, 18)),
            "rate": pa.array([rate for _, rate in pairs], pa.decimal128(38, 18)),
        }
    )
    plain.register("pairs", table)
    found = plain.execute("SELECT bidbeam_convert(amount, rate) FROM pairs").fetchall()
    with localcontext(prec=90):
        expected = [(amount * rate).quantize(Decimal("1E-18"), ROUND_HALF_EVEN) for amount, rate in pairs]
    assert [value for (value,) in found] == expected


QUERIES = {
    "cost of each run": "SELECT run_id, sum(cost) AS cost FROM cost_by_pool GROUP BY run_id ORDER BY run_id",
    **{view: f"FROM {view} ORDER BY ALL" for view in VIEWS},
}


def test_answers_are_those_on_record(ledger: Store) -> None:
    """Every view's whole answer equals the golden file; where there is none, it is written to be read and committed."""
    with open_ledger(ledger.url) as connection:
        answers = {
            name: {"sql": sql, "rows": _as_json(run_query(connection, sql).to_pylist())}
            for name, sql in QUERIES.items()
        }
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(answers, indent=1, ensure_ascii=False) + "\n")
        pytest.fail(f"wrote {GOLDEN}: read it, commit it")
    assert answers == json.loads(GOLDEN.read_text())


def _as_json(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what is NULL; decimals with all their digits."""
    return [{name: _plain(value) for name, value in row.items() if value is not None} for row in found]


def _plain(value: Any) -> bool | int | str:
    if isinstance(value, (bool, int)):
        return value
    return f"{value:f}" if isinstance(value, Decimal) else str(value)
