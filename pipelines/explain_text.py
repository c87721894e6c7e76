"""An explanation as people read it on a terminal: plain text, no colour, at most a few screens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from decimal import Decimal

from bidbeam.pipelines.explanation import Attempt, Bid, Charge, Clearing, Explanation, exact_sum
from bidbeam.pipelines.show import one_line, refusal_text
from bidbeam.transforms.lots import TAKEN_OVER

__all__ = ["render_text"]


def render_text(explanation: Explanation) -> str:
    """The whole story, one section for the request, each round's clearing and each attempt; ends with a newline."""
    lines = [*_head(explanation)]
    for clearing in explanation.clearings:
        lines += ["", *_clearing(clearing)]
    for attempt in explanation.attempts:
        lines += ["", *_attempt(attempt, explanation)]
    if not explanation.attempts:
        lines += ["", "No attempt: nothing was sent for it."]
    return "\n".join(map(one_line, lines)) + "\n"


def _head(it: Explanation) -> Iterator[str]:
    ended = it.status if it.reason is None else f"{it.status} ({it.reason})"
    yield f"Request {it.request_id} in run {it.run_id} ({it.run_status})"
    yield f"  {ended}, {_count(len(it.attempts), 'attempt')}, cost {_money(it.cost)}"
    facts = {
        "why": it.message,
        "row": None if it.source_file is None else f"{it.source_file}, row {it.source_row} (the first is 0)",
        "tenant": it.tenant,
        "placement": it.placement,
        "tags": it.tags if it.tags != "{}" else None,
    }
    yield from (f"  {name}: {value}" for name, value in facts.items() if value is not None)
    if it.shared_with is not None:
        yield f"  answered together with {it.shared_with}, which paid for both: what follows is its story"
    if it.rows_with_this_id > 1:
        yield f"  {it.rows_with_this_id} rows of the input have this id: the first counts, the others are invalid"
    if it.other_runs:
        yield f"  also in {', '.join(it.other_runs)}: add --run to see it there"


def _clearing(it: Clearing) -> Iterator[str]:
    size = [] if it.requests is None else [_count(it.requests, "request")]
    if it.input_tokens is not None:
        cached = f", {it.ideal_cached_tokens} at best from the cache" if it.ideal_cached_tokens is not None else ""
        size.append(f"{it.input_tokens} input tokens{cached}")
    about = f" ({'; '.join(size)})" if size else ""
    # Of a run that was never started again nobody need be told which start it was.
    start = "" if it.start is None or it.start == 1 else f"Start {it.start}, "
    yield f"{start}{'round' if start else 'Round'} {it.round}, lot {it.lot_id}{about}"
    offers = [bid for bid in it.bids if bid.eligible]
    if offers:
        yield from _table(_BID_HEAD, [_bid_cells(bid, it) for bid in offers])
    for bid in it.bids:
        if not bid.eligible:
            yield f"  {bid.pool} could not bid: {refusal_text(bid.reject_reason or 'no reason given')}"
    yield f"  {_why(it)}"
    if it.reserve is not None and it.urgency and it.urgency >= _PRESSING:
        pressing = f"{100 * it.urgency:.1f}% of the time to the deadline gone or needed"
        yield f"  reserve {_money(it.reserve)}, with {pressing}: what the lot was worth rather than see it fail"
    if it.winner is not None:
        yield (
            f"  awarded for {_money(it.price_paid)} by {it.payment_rule or 'no rule'}, which is no charge yet; "
            f"{_money(it.reserved)} reserved for the worst case"
        )
        worst = next((bid.worst_case_cost for bid in offers if bid.pool == it.winner), None)
        if worst is not None and it.reserved is not None and it.reserved < worst:
            yield (
                f"  the budget did not cover the worst case of {_money(worst)}: "
                "requests were sent once others had left money for them"
            )


def _why(it: Clearing) -> str:
    if it.winner is None:
        if not it.bids and it.lot_id.endswith(TAKEN_OVER):
            return "no auction was held: an earlier start had it in a batch, which this one took over"
        if not it.bids:
            return "no bid was recorded"
        return "nobody won it" if any(bid.eligible for bid in it.bids) else "nobody could serve it"
    if it.runner_up is None:
        return f"{it.winner} won: no other pool could serve the lot"
    if it.margin is None:
        return f"{it.winner} won before {it.runner_up}"
    if it.margin < 0:
        return (
            f"{it.winner} won although {it.runner_up} scored {_money(it.margin.copy_negate())} lower: "
            "what that pool can take was worth more to other lots"
        )
    if it.margin == 0:
        return f"{it.winner} won on equal scores with {it.runner_up}"
    return f"{it.winner} won: its score is {_money(it.margin)} lower than that of {it.runner_up}, the runner-up"


_PRESSING = Decimal("0.0005")
"""The least urgency that shows."""
_BID_HEAD = (
    "", "pool", "score", "= expected", "+ risk", "+ lateness", "+ audit", "+ demand", "+ setup", "- exploration",
    "worst case", "cached", "output", "finishes",
)  # fmt: skip


def _bid_cells(bid: Bid, clearing: Clearing) -> tuple[str, ...]:
    # An older ledger has no such terms: their columns are then left out. Few pools have anything to set up.
    later = (bid.audit_cost, bid.demand_cost, bid.setup_cost or None, bid.exploration_credit)
    return (
        {clearing.winner: "*", clearing.runner_up: "2"}.get(bid.pool, ""),
        bid.pool,
        *(_amount(value) for value in (bid.score, bid.expected_cost, bid.risk_cost, bid.lateness_cost)),
        *("" if value is None else _amount(value) for value in later),
        _amount(bid.worst_case_cost),
        _amount(bid.expected_cached_tokens),
        _amount(bid.expected_output_tokens),
        _time(bid.finish_at),
    )


def _attempt(it: Attempt, of: Explanation) -> Iterator[str]:
    number = "" if it.attempt_no is None else f" {it.attempt_no}"
    took = ""
    if it.started_at is not None and it.finished_at is not None:
        took = f", {(it.finished_at - it.started_at).total_seconds():.3f} s from {_time(it.started_at)}"
    kind = "booked as a hedge: another answered first" if it.kind == "hedge" else it.kind
    yield f"Attempt{number} ({kind}) on {it.pool}: {it.status}{took}"
    asked = _asked_because(it, of)
    if asked is not None:
        yield f"  {asked}"
    shared = it.request_id != of.request_id
    if shared:
        yield f"  made for {it.request_id}, which bears its cost"
    said = it.error_message
    if said is not None and it.http_status is not None:
        said = said.removeprefix(f"{it.http_status}: ")
    error = [it.error_class, None if it.http_status is None else f"HTTP {it.http_status}", said]
    if it.status != "ok" and any(part is not None for part in error):
        yield f"  error: {', '.join(part for part in error if part is not None)}"
    written = "" if it.cache_write_tokens is None else f"{it.cache_write_tokens} written to the cache, "
    cut = ", cut off at max_tokens" if it.finish_reason == "length" else ""
    if (it.input_tokens, it.cached_tokens, it.output_tokens) == (None, None, None):
        yield f"  tokens: none reported{cut}"
    else:
        yield (
            f"  tokens: {_amount(it.input_tokens)} input, {_amount(it.cached_tokens)} of them cached, {written}"
            f"{_amount(it.output_tokens)} output ({it.usage_source or 'source unknown'}){cut}"
        )
    if it.other_model:
        yield f"  the answer names another model: {it.model_returned}"
    facts = {
        "model": it.model,
        "endpoint": it.endpoint_host,
        "jurisdiction": it.jurisdiction,
        "operator": it.operator,
        "provider's request id": it.provider_request_id,
        "provider's own figure": None if it.provider_cost is None else _money(it.provider_cost),
        "attempt id": it.attempt_id,
    }
    yield f"  {'; '.join(f'{name} {value}' for name, value in facts.items() if value is not None)}"
    yield from _charges(it.charges, f" to {it.request_id}" if shared else "")


def _asked_because(it: Attempt, of: Explanation) -> str | None:
    """Why another pool than the one that won was asked; None where the winner was, or who won is not known."""
    won = next((each.winner for each in of.clearings if (each.round, each.lot_id) == (it.round, it.lot_id)), None)
    if won is None or won == it.pool:
        return None
    before = [
        each for each in of.attempts
        if (each.round, each.lot_id, each.pool) == (it.round, it.lot_id, won) and _number(each) < _number(it)
    ]  # fmt: skip
    if not before:
        return f"asked because {won}, which had won the lot, gave it up before this request was sent to it"
    last = before[-1]
    if last.status == "lost" or last.finished_at is None or it.started_at is None or last.finished_at <= it.started_at:
        return f"asked because {won}, which had won the lot, had not answered it: {last.status}"
    return f"asked as well because {won}, which had won the lot, took longer than it mostly does"


def _number(it: Attempt) -> int:
    return it.attempt_no or 0


def _charges(charges: Sequence[Charge], whose: str) -> Iterator[str]:
    if not charges:
        yield "  no charge"
        return
    rows = [
        (
            "",
            charge.meter,
            _amount(charge.quantity),
            _amount(charge.unit_price),
            f"{_amount(charge.cost_native)} {charge.currency}",
            "" if charge.currency == "USD" else f"{_amount(charge.fx_rate)} ({charge.fx_source or 'source unknown'})",
            _amount(charge.cost),
        )
        for charge in charges
    ]
    yield from _table(("", "meter", "quantity", "x unit price", "= cost", "x rate", "= USD"), rows)
    yield f"  together {_money(exact_sum(charge.cost for charge in charges))}{whose and f', charged{whose}'}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Aligned columns; one that is empty in all rows is left out."""
    keep = [at for at, name in enumerate(head) if any(row[at] for row in rows) or (name and at < 2)]
    lines = [[line[at] for at in keep] for line in (head, *rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(keep))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        yield f"  {'  '.join(cells)}".rstrip()


def _money(value: Decimal | None) -> str:
    return "unknown" if value is None else f"{_amount(value)} USD"


def _amount(value: Decimal | int | None) -> str:
    """All digits, without the zeros at the end; ``?`` where unknown."""
    if value is None:
        return "?"
    text = f"{value:f}" if isinstance(value, Decimal) else str(value)
    return text.rstrip("0").rstrip(".") if "." in text else text


def _time(value: datetime | None) -> str:
    return "?" if value is None else value.strftime("%Y-%m-%d %H:%M:%S UTC")


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
