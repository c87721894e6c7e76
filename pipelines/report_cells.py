"""What stands in a report's tables: values as people read them, the exact ones behind them, and bars beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from markupsafe import Markup

from bidbeam.pipelines.progress import usd
from bidbeam.pipelines.report_charts import bar
from bidbeam.pipelines.show import duration_text

ROWS_SHOWN = 40
UNKNOWN = "–"  # noqa: RUF001 - the dash that stands for a value nobody knows
_LEAST_SHOWN = Decimal("1E-12")
"""USD; what is less than this, and not nothing, is shown as about nothing."""
_PER_MILLION = frozenset({"uncached_input", "cached_input", "cache_write", "output"})

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """What stands in a table: ``text``, the exact value behind it where that is longer, and a plot beside it."""

    text: str
    exact: str | None = None
    plot: Markup | None = None
    tone: str | None = None
    """good, bad, whole (never broken into lines) or None."""


@dataclass(frozen=True, slots=True)
class Table:
    """``heads`` are (name, whether it holds numbers). ``more`` rows were left out."""

    caption: str
    heads: tuple[tuple[str, bool], ...]
    rows: tuple[tuple[Cell, ...], ...]
    more: int = 0


Column = tuple[str, bool, Callable[[Row], Cell]]
TONES: Mapping[str, str] = {
    "complete": "good", "ok": "good", "incomplete": "bad", "interrupted": "bad", "failed": "bad", "lost": "bad",
}  # fmt: skip


def table_of(caption: str, rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    """A table of the first rows."""
    return Table(
        caption,
        tuple((name, numeric) for name, numeric, _ in columns),
        tuple(tuple(cell(row) for _, _, cell in columns) for row in rows[:ROWS_SHOWN]),
        max(len(rows) - ROWS_SHOWN, 0),
    )


def cost_column(rows: Sequence[Row], colour: int) -> Column:
    """Costs, each with its bar against the largest."""
    most = max((row["cost"] for row in rows if row["cost"] is not None), default=Decimal(0))

    def cell(row: Row) -> Cell:
        shown = usd_cell(row["cost"])
        return Cell(shown.text, shown.exact, bar_of(row["cost"], most, colour))

    return "cost", True, cell


def text_cell(value: Any) -> Cell:
    """Text as it is; a dash for what is unknown."""
    return Cell(UNKNOWN if value is None else str(value))


def count_cell(value: int | None) -> Cell:
    """A whole number."""
    return Cell(UNKNOWN if value is None else f"{value:,}")


def usd_cell(value: Decimal | None) -> Cell:
    """Dollars for people, with the exact amount behind them."""
    if value is None:
        return Cell(UNKNOWN)
    told = usd(value) if value == 0 or abs(value) >= _LEAST_SHOWN else "≈ $0.00"
    return Cell(told, f"{value:f} USD")


def native_cell(value: Decimal | None, currency: str) -> Cell:
    """An amount in a pool's own currency; empty where that is the dollar."""
    if value is None or currency == "USD":
        return Cell("" if value is not None else UNKNOWN)
    return Cell(f"{usd(value).replace('$', '')} {currency}", f"{value:f} {currency}")


def price_cell(row: Row) -> Cell:
    """A unit price as price lists quote it."""
    meter, price = str(row["meter"]), row["unit_price"]
    exact = f"{price.normalize():f} {row['currency']} for one"
    if meter in _PER_MILLION:
        return Cell(f"{(price * 1_000_000).normalize():f} {row['currency']} per million", exact)
    if meter == "request":
        return Cell(exact)
    return Cell(f"{(price * 3600).quantize(Decimal('0.000001')).normalize():f} {row['currency']} per hour", exact)


def time_cell(value: datetime | None) -> Cell:
    """A moment in UTC, to the minute."""
    if value is None:
        return Cell(UNKNOWN)
    return Cell(f"{value.astimezone(UTC):%Y-%m-%d %H:%M}", f"{value.astimezone(UTC).isoformat()}", tone="whole")


def took_cell(start: datetime | None, end: datetime | None) -> Cell:
    """The time between two moments."""
    return Cell(UNKNOWN if start is None or end is None else duration_text((end - start).total_seconds()))


def seconds_cell(micros: float | None) -> Cell:
    """A length of time given in microseconds."""
    return Cell(UNKNOWN if micros is None else duration_text(float(micros) / 1e6))


def tokens_of(row: Row) -> int | None:
    """Input and output together; None where one is unknown."""
    known = [row[name] for name in ("input_tokens", "output_tokens")]
    return None if None in known else sum(known)


def rate_cell(tokens: int | None, span_us: int | None) -> Cell:
    """Tokens per second over a span."""
    return Cell(UNKNOWN if tokens is None or not span_us else f"{tokens * 1e6 / span_us:,.0f}")


def share_text(part: Any, whole: Any) -> str:
    """A part as a percentage of the whole."""
    return UNKNOWN if part is None or not whole else f"{100 * Decimal(part) / Decimal(whole):.1f}%"


def ideal_text(cached: Any, ideal: Any) -> str:
    """Cached tokens as a share of the ideal, which is of a run's own prompts: a cache that was warm may have more."""
    return "all and more" if cached is not None and ideal and cached > ideal else share_text(cached, ideal)


def saved_cell(part: Decimal | None, whole: Decimal | None) -> Cell:
    """A percentage that is good news above zero and bad below."""
    return Cell(share_text(part, whole), tone=None if part is None else "good" if part >= 0 else "bad")


def percent_cell(value: Decimal | None) -> Cell:
    """A ratio as a percentage."""
    return Cell(UNKNOWN if value is None else f"{100 * value:.3f}%")


def off_cell(value: int | None) -> Cell:
    """A difference with its sign; more than we counted is bad news."""
    return Cell(UNKNOWN) if value is None else Cell(f"{value:+,}" if value else "0", tone="bad" if value > 0 else None)


def barred_cell(part: Any, whole: Any, colour: int, text: str | None = None) -> Cell:
    """A share, or ``text``, over its bar."""
    return Cell(share_text(part, whole) if text is None else text, plot=bar_of(part, whole, colour))


def bar_of(part: Any, whole: Any, colour: int) -> Markup | None:
    """The bar of a share, where both are known."""
    return None if part is None or not whole else bar(float(Decimal(part) / Decimal(whole)), colour)


def minus(one: Decimal | None, other: Decimal | None) -> Decimal | None:
    """The difference, where both are known."""
    return None if one is None or other is None else one - other


def each_text(cost: Decimal | None, served: int) -> str:
    """The cost of a thousand answers."""
    if cost is None or not served:
        return ""
    return f"{usd((cost / served * 1000).quantize(Decimal('1e-9')).normalize())} for 1,000 answers"


def short_text(value: int | None) -> str:
    """A count to be read at a glance: 12.3M."""
    if value is None:
        return UNKNOWN
    for limit, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return str(value)
