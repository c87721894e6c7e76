"""The sections of a report: the ledger's answers as tables of cells, ready to be shown and still free of markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from bidbeam.pipelines import report_queries as ask
from bidbeam.pipelines.progress import usd
from bidbeam.pipelines.report_cells import (
    TONES,
    Cell,
    Column,
    Row,
    Table,
    bar_of,
    barred_cell,
    cost_column,
    count_cell,
    each_text,
    ideal_text,
    minus,
    native_cell,
    off_cell,
    percent_cell,
    price_cell,
    rate_cell,
    saved_cell,
    seconds_cell,
    share_text,
    short_text,
    table_of,
    text_cell,
    time_cell,
    tokens_of,
    took_cell,
    usd_cell,
)
from bidbeam.pipelines.report_charts import COLOURS, spread, stacked
from bidbeam.pipelines.show import duration_text

if TYPE_CHECKING:
    import duckdb

_BUCKETS = 60


@dataclass(frozen=True, slots=True)
class Chart:
    """A plot over time with its legend and the ends of its axes."""

    caption: str
    plot: Markup
    legend: tuple[tuple[str, int], ...]
    left: str
    right: str
    top: str


@dataclass(frozen=True, slots=True)
class Section:
    """A chapter of the report. ``note`` says what its numbers mean, or why there are none."""

    id: str
    title: str
    note: str
    tables: tuple[Table, ...] = ()
    chart: Chart | None = None


@dataclass(frozen=True, slots=True)
class Figure:
    """A number that the page begins with."""

    name: str
    value: str
    note: str = ""
    share: Markup | None = None


def figures_of(ledger: duckdb.DuckDBPyConnection) -> list[Figure]:
    """What most readers look for, and many look no further."""
    (total,) = _rows(ledger, ask.TOTALS)
    figures = [
        Figure("cost", usd_cell(total["cost"]).text, each_text(total["cost"], total["served"])),
        Figure(
            "answered",
            share_text(total["served"], total["requests"]),
            f"{count_cell(total['served']).text} of {count_cell(total['requests']).text} requests",
            bar_of(total["served"], total["requests"], 2),
        ),
    ]
    for row in _rows(ledger, ask.SAVINGS)[:1]:
        if row["baseline_cost"]:
            saved = row["baseline_cost"] - row["cost"]
            text = f"{usd(row['baseline_cost'])} at {row['baseline']}"
            figures.append(
                Figure("saved", share_text(saved, row["baseline_cost"]), text, bar_of(saved, row["baseline_cost"], 1))
            )
    if total["ideal_cached_tokens"]:
        figures.append(
            Figure(
                "cache, of the ideal",
                ideal_text(total["cached_tokens"], total["ideal_cached_tokens"]),
                f"{count_cell(total['cached_tokens']).text} of {count_cell(total['ideal_cached_tokens']).text} tokens",
                bar_of(total["cached_tokens"], total["ideal_cached_tokens"], 4),
            )
        )
    figures += [
        Figure("tokens", short_text(total["input_tokens"]), f"in, {short_text(total['output_tokens'])} out"),
        Figure(
            "dead letters", count_cell(total["dead"]).text, f"{count_cell(total['attempts']).text} attempts were made"
        ),
        Figure(
            "waste",
            usd_cell(total["waste"] or Decimal(0)).text,
            f"{share_text(total['waste'] or 0, total['cost'])} of the bill: failures, idling, probes",
        ),
    ]
    return figures


def sections_of(ledger: duckdb.DuckDBPyConnection) -> list[Section]:
    """All chapters, in the order in which they are read."""
    runs = _rows(ledger, ask.RUNS)
    return [
        _runs(runs),
        _bill(ledger),
        _savings(ledger),
        _cache(ledger, runs),
        _speed(ledger, runs),
        _market(ledger),
        _failures(ledger),
        _reconciliation(ledger),
        _provenance(ledger),
    ]


def _runs(runs: Sequence[Row]) -> Section:
    columns: list[Column] = [
        ("run", False, lambda r: text_cell(r["run_id"])),
        ("status", False, lambda r: Cell(r["status"], tone=TONES.get(r["status"]))),
        ("started", False, lambda r: time_cell(r["started_at"])),
        ("took", True, lambda r: took_cell(r["started_at"], r["finished_at"])),
        ("requests", True, lambda r: count_cell(r["requests"])),
        ("dead", True, lambda r: count_cell(r["dead"])),
        ("starts", True, lambda r: count_cell(r["starts"])),
        ("cost", True, lambda r: usd_cell(r["cost"])),
    ]
    note = "The latest first. A run that was started again took from its last start to its end."
    return Section("runs", "Runs", note, (table_of("Runs", runs, columns),))


def _bill(ledger: duckdb.DuckDBPyConnection) -> Section:
    pools, meters = _rows(ledger, ask.BY_POOL), _rows(ledger, ask.BY_METER)
    days, tags, models = _rows(ledger, ask.BY_DAY), _rows(ledger, ask.BY_TAG), _rows(ledger, ask.BY_MODEL)
    of_pool: list[Column] = [
        ("pool", False, lambda r: text_cell(r["pool"])),
        ("attempts", True, lambda r: count_cell(r["attempts"])),
        ("idle and other overhead", True, lambda r: usd_cell(r["overhead_cost"])),
    ]
    if any(row["currency"] != "USD" for row in pools):
        of_pool.append(("in its currency", True, lambda r: native_cell(r["cost_native"], r["currency"])))
    tables = [
        table_of("By pool", pools, [*of_pool, cost_column(pools, 0)]),
        table_of(
            "By meter",
            meters,
            [
                ("meter", False, lambda r: text_cell(r["meter"])),
                ("quantity", True, lambda r: Cell(f"{r['quantity']:,.0f}", f"{r['quantity']:f}")),
                cost_column(meters, 1),
            ],
        ),
        table_of(
            "By day (UTC)",
            days,
            [
                ("day", False, lambda r: text_cell(r["day"].isoformat())),
                ("pools", True, lambda r: count_cell(r["pools"])),
                cost_column(days, 2),
            ],
        ),
    ]
    if len(models) > 1:
        columns: list[Column] = [
            ("model", False, lambda r: text_cell(r["model"])),
            ("attempts", True, lambda r: count_cell(r["attempts"])),
            cost_column(models, 3),
        ]
        tables.append(table_of("By model", models, columns))
    if tags:
        columns = [
            ("tag", False, lambda r: text_cell(r["tag"])),
            ("value", False, lambda r: text_cell(r["value"])),
            cost_column(tags, 4),
        ]
        tables.append(table_of("By tag", tags, columns))
    note = "Every charge of every attempt, waste included; exact amounts show where you point. A charge with two tags counts under both."  # noqa: E501
    return Section("bill", "The bill", note, tuple(tables))


def _savings(ledger: duckdb.DuckDBPyConnection) -> Section:
    found = _rows(ledger, ask.SAVINGS)
    if not found:
        return Section("savings", "Savings", "No run names a baseline to compare with.")
    columns: list[Column] = [
        ("baseline", False, lambda r: text_cell(r["baseline"])),
        ("compared", True, lambda r: Cell(f"{r['compared']:,} of {r['requests']:,}")),
        ("paid", True, lambda r: usd_cell(r["cost"])),
        ("at the baseline", True, lambda r: usd_cell(r["baseline_cost"])),
        ("saved", True, lambda r: usd_cell(minus(r["baseline_cost"], r["cost"]))),
        ("share", True, lambda r: saved_cell(minus(r["baseline_cost"], r["cost"]), r["baseline_cost"])),
    ]
    note = (
        "What the tokens of the answers would have cost at a dated list price, shared answers as often as they are used"
        ", against all that their runs paid, waste included; answers that cannot be compared are left out of both."
    )
    return Section("savings", "Savings", note, (table_of("Against each baseline", found, columns),))


def _of_ideal(run: Row) -> Cell:
    cached, ideal = run["cached_tokens"], run["ideal_cached_tokens"]
    return barred_cell(cached, ideal, 4, ideal_text(cached, ideal))


def _cache(ledger: duckdb.DuckDBPyConnection, runs: Sequence[Row]) -> Section:
    pools, planned = _rows(ledger, ask.CACHE), [run for run in runs if run["ideal_cached_tokens"]]
    tables = [
        table_of(
            "Cached tokens by pool",
            pools,
            [
                ("pool", False, lambda r: text_cell(r["pool"])),
                ("input tokens", True, lambda r: count_cell(r["input_tokens"])),
                ("from cache", True, lambda r: count_cell(r["cached_tokens"])),
                ("unreported", True, lambda r: count_cell(r["unreported"])),
                ("saved", True, lambda r: usd_cell(r["saving"])),
                ("share of input", True, lambda r: barred_cell(r["cached_tokens"], r["input_tokens"], 4)),
            ],
        )
    ]
    if planned:
        columns: list[Column] = [
            ("run", False, lambda r: text_cell(r["run_id"])),
            ("ideal", True, lambda r: count_cell(r["ideal_cached_tokens"])),
            ("achieved", True, lambda r: count_cell(r["cached_tokens"])),
            ("share of the ideal", True, _of_ideal),
        ]
        tables.append(table_of("Cached tokens by run, against the ideal", planned, columns))
    note = "The ideal is what one cache without limits would re-use of the plan's order, in whole blocks. Savings are by the token; a pool paid by time shows them in its seconds."  # noqa: E501
    return Section("cache", "Prefix cache", note, tuple(tables))


def _speed(ledger: duckdb.DuckDBPyConnection, runs: Sequence[Row]) -> Section:
    for run in runs:
        found = _rows(ledger, ask.SPEED, run["run_id"])
        if found:
            break
    else:
        return Section("speed", "Speed", "No attempt has answered yet.")
    whole = max(float(row["latency_us"][2]) for row in found)
    colours = {name: at for at, name in enumerate(dict.fromkeys(str(row["pool"]) for row in found))}
    columns: list[Column] = [
        ("pool", False, lambda r: text_cell(r["pool"])),
        ("model", False, lambda r: text_cell(r["model"])),
        ("answers", True, lambda r: count_cell(r["answers"])),
        ("tokens per second", True, lambda r: rate_cell(tokens_of(r), r["span_us"])),
        ("output per second", True, lambda r: rate_cell(r["output_tokens"], r["span_us"])),
        ("median", True, lambda r: seconds_cell(r["latency_us"][0])),
        ("95th", True, lambda r: seconds_cell(r["latency_us"][1])),
        (
            "slowest",
            True,
            lambda r: Cell(
                seconds_cell(r["latency_us"][2]).text,
                plot=_latencies(r, whole, colours[str(r["pool"])]),
            ),
        ),
    ]
    note = f"Of run {run['run_id']}: from handing a request to the engine to its last token. The bar reaches from the median to the 95th percentile, the line to the slowest."  # noqa: E501
    table = table_of("Latency and throughput by pool", found, columns)
    return Section("speed", "Speed", note, (table,), _timeline(ledger, run, colours))


def _latencies(row: Row, whole: float, colour: int) -> Markup:
    median, high, most = row["latency_us"]
    return spread(float(median), float(high), float(most), whole, colour)


def _timeline(ledger: duckdb.DuckDBPyConnection, run: Row, colours: Mapping[str, int]) -> Chart | None:
    # No step is shorter than a second: of a few answers in a moment no speed can be told.
    (span,) = _rows(ledger, ask.SPAN, run["run_id"])
    steps = min(_BUCKETS, max(1, int((span["last_us"] - span["first_us"]) // 1_000_000))) if span["last_us"] else 1
    found = _rows(ledger, ask.TIMELINE, run["run_id"], steps)
    if not found:
        return None
    series = {name: [0.0] * steps for name in colours}
    for row in found:
        series[str(row["pool"])][int(row["bucket"])] += float(row["tokens"] or 0)
    first, last = int(found[0]["first_us"]), int(found[0]["last_us"])
    step_s = max((last - first) / 1e6 / steps, 1.0)
    top = max(map(sum, zip(*series.values(), strict=True))) / step_s
    return Chart(
        f"Tokens per second of the answers as they came, in steps of {duration_text(step_s)}",
        stacked(list(series.values())),
        tuple((name, at % COLOURS) for name, at in colours.items()),
        f"{datetime.fromtimestamp(first / 1e6, UTC):%H:%M:%S} UTC",
        f"{datetime.fromtimestamp(last / 1e6, UTC):%H:%M:%S} UTC",
        f"at most {top:,.0f} tokens/s",
    )


def _market(ledger: duckdb.DuckDBPyConnection) -> Section:
    auctions, market, refusals = (_rows(ledger, query) for query in (ask.AUCTIONS, ask.MARKET, ask.REFUSALS))
    tables = [
        table_of(
            "Clearings",
            auctions,
            [
                ("run", False, lambda r: text_cell(r["run_id"])),
                ("round", True, lambda r: count_cell(r["round"])),
                ("cleared", False, lambda r: time_cell(r["cleared_at"])),
                ("pools", True, lambda r: count_cell(r["pools"])),
                (
                    "lots awarded",
                    True,
                    lambda r: Cell(f"{count_cell(r['awarded']).text} of {count_cell(r['lots']).text}"),
                ),
                ("score", True, lambda r: usd_cell(r["objective"])),
                ("lower bound", True, lambda r: usd_cell(r["lp_bound"])),
                ("gap", True, lambda r: usd_cell(r["gap"])),
                ("regret", True, lambda r: percent_cell(r["regret"])),
            ],
        ),
        table_of(
            "What each pool bid and won",
            market,
            [
                ("pool", False, lambda r: text_cell(r["pool"])),
                ("bids", True, lambda r: count_cell(r["bids"])),
                ("eligible", True, lambda r: count_cell(r["eligible"])),
                ("expected bill", True, lambda r: usd_cell(r["expected_cost"])),
                ("reserved", True, lambda r: usd_cell(r["reserved"])),
                ("charged", True, lambda r: usd_cell(r["cost"])),
                ("lots won", True, lambda r: barred_cell(r["lots"], sum(m["lots"] for m in market), 0, str(r["lots"]))),
            ],
        ),
    ]
    if refusals:
        columns: list[Column] = [
            ("pool", False, lambda r: text_cell(r["pool"])),
            ("why it could not serve", False, lambda r: text_cell(r["reject_reason"])),
            ("lots", True, lambda r: count_cell(r["bids"])),
        ]
        tables.append(table_of("Who could not serve, and why", refusals, columns))
    note = "Regret is how far a clearing was from a lower bound that no allocation can beat. The expected bill is that of the winning bids; what was charged includes retries and failures."  # noqa: E501
    return Section("market", "The market", note, tuple(tables))


def _failures(ledger: duckdb.DuckDBPyConnection) -> Section:
    dead, attempts = _rows(ledger, ask.DEAD), _rows(ledger, ask.ATTEMPTS)
    tables = []
    if dead:
        columns: list[Column] = [
            ("reason", False, lambda r: text_cell(r["reason"])),
            ("cost", True, lambda r: usd_cell(r["cost"])),
            (
                "requests",
                True,
                lambda r: barred_cell(r["requests"], sum(d["requests"] for d in dead), 3, f"{r['requests']:,}"),
            ),
        ]
        tables.append(table_of("Dead letters by reason", dead, columns))
    columns = [
        ("pool", False, lambda r: text_cell(r["pool"])),
        ("kind", False, lambda r: text_cell(r["kind"])),
        ("status", False, lambda r: Cell(str(r["status"]), tone=TONES.get(str(r["status"])))),
        ("error", False, lambda r: Cell(str(r["error_class"] or ""), r["example"])),
        ("cost", True, lambda r: usd_cell(r["cost"])),
        ("attempts", True, lambda r: count_cell(r["attempts"])),
    ]
    tables.append(table_of("Attempts by outcome", attempts, columns))
    note = "Everything that costs money is an attempt. An example of an error's message shows where you point."
    return Section("failures", "Failures" if dead else "Outcomes", note, tuple(tables))


def _reconciliation(ledger: duckdb.DuckDBPyConnection) -> Section:
    columns: list[Column] = [
        ("pool", False, lambda r: text_cell(r["pool"])),
        ("model", False, lambda r: text_cell(r["model"])),
        ("attempts", True, lambda r: count_cell(r["attempts"])),
        ("input compared", True, lambda r: count_cell(r["compared_input"])),
        ("input off", True, lambda r: off_cell(r["input_off"])),
        ("output compared", True, lambda r: count_cell(r["compared_output"])),
        ("output off", True, lambda r: off_cell(r["output_off"])),
        ("bills compared", True, lambda r: count_cell(r["compared_cost"])),
        ("bill off", True, lambda r: usd_cell(r["cost_off"])),
        ("other model", True, lambda r: count_cell(r["other_model"])),
    ]
    note = "What pools reported, minus what we counted and computed ourselves, over the attempts where both are known."
    table = table_of("Reported against recounted", _rows(ledger, ask.RECONCILIATION), columns)
    return Section("reconciliation", "Reconciliation", note, (table,))


def _provenance(ledger: duckdb.DuckDBPyConnection) -> Section:
    prices, rates, places = (_rows(ledger, query) for query in (ask.PRICES, ask.RATES, ask.PLACES))
    tables = [
        table_of(
            "Prices paid",
            prices,
            [
                ("pool", False, lambda r: text_cell(r["pool"])),
                ("meter", False, lambda r: text_cell(r["meter"])),
                ("price", True, price_cell),
                ("valid from", False, lambda r: time_cell(r["valid_from"])),
                ("source", False, lambda r: text_cell(r["source"])),
            ],
        ),
        table_of(
            "Where it was computed",
            places,
            [
                ("pool", False, lambda r: text_cell(r["pool"])),
                ("jurisdiction", False, lambda r: text_cell(r["jurisdiction"])),
                ("operator", False, lambda r: text_cell(r["operator"])),
                ("host", False, lambda r: text_cell(r["endpoint_host"])),
                ("attempts", True, lambda r: count_cell(r["attempts"])),
            ],
        ),
    ]
    if rates:
        columns: list[Column] = [
            ("currency", False, lambda r: text_cell(r["currency"])),
            ("dollars for one", True, lambda r: Cell(f"{r['fx_rate'].normalize():f}")),
            ("as of", False, lambda r: time_cell(r["fx_at"])),
            ("source", False, lambda r: text_cell(r["fx_source"])),
        ]
        tables.insert(1, table_of("Exchange rates", rates, columns))
    note = "Every price and rate that was charged by, and where each pool declares that it works."
    return Section("provenance", "Prices and places", note, tuple(tables))


def _rows(ledger: duckdb.DuckDBPyConnection, sql: str, *parameters: Any) -> list[dict[str, Any]]:
    result = ledger.execute(sql, parameters)
    names = [column[0] for column in result.description or ()]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]
