"""Results as plain text for people: a run's summary, a quote, a table. No colour, no terminal width."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from bidbeam.pipelines.jsonable import jsonable
from bidbeam.pipelines.progress import usd
from bidbeam.pipelines.summary import Quote, RunSummary


def summary_text(summary: RunSummary) -> str:
    """A run's end: what was served, what it cost, where it is, and the run id on the last line."""
    if summary.status == "nothing_to_do":
        head = "nothing to do: every request of this run is settled"
    else:
        head = summary.status + (" (rehearsal: nothing was sent or spent)" if summary.rehearsal else "")
    rows = [("status", head), ("prompts", f"{summary.requests:,}, of which {summary.served:,} were served")]
    dead = sum(summary.dead.values())
    if dead:
        beyond = ", more than tolerated" if summary.exit_code == 3 else ""
        rows.append(("dead letters", f"{dead:,}: {counts(summary.dead)}{beyond}"))
        rows.append(("letters", f"{summary.output_url}/dead_letters"))
        rehearsed = " --rehearse" if summary.rehearsal else ""
        rows.append(("run again", f"bidbeam run JOB --retry-dead {summary.run_id}{rehearsed}"))
    if summary.truncated:
        rows.append(("cut off", f"{_answers(summary.truncated)} cut off at max_tokens"))
    if summary.estimated:
        rows.append(
            ("estimated", f"{_answers(summary.estimated, 'came')} without a count of tokens, booked at the worst case")
        )
    if summary.other_models:
        odd = sum(summary.other_models.values())
        rows.append(("other model", f"{_answers(odd, 'names')} another model: {_asked_of(summary)}"))
    rows += [
        ("down", why if why.startswith(f"pool {name}") else f"pool {name}: {why}") for name, why in summary.down.items()
    ]
    rows.append(("tokens", _tokens(summary)))
    rows.append(("cost", usd(summary.cost) + _saved(summary.cost, summary.baseline_cost)))
    if summary.wasted:
        rows.append(("of it", f"{usd(summary.wasted)} served nobody: failed tries, hedges, engines that load or idle"))
    if summary.status != "nothing_to_do":
        rows.append(("elapsed", duration_text(summary.elapsed_s)))
    if summary.parent_run_id is not None:
        rows.append(("parent", f"{summary.parent_run_id}, whose dead letters these were"))
    rows += [("output", summary.output_url), ("ledger", summary.ledger_url), ("run", summary.run_id)]
    text = aligned(rows)
    if summary.pools:
        heads = ("pool", "requests", "input", "cached", "output", "cost")
        body = [
            (
                each.pool,
                *map(_count, (each.requests, each.input_tokens, each.cached_tokens, each.output_tokens)),
                usd(each.cost),
            )
            for each in summary.pools
        ]
        text = table_text(heads, body, right=range(1, 6)) + "\n\n" + text
    return text


def _answers(number: int, does: str = "was") -> str:
    many = {"was": "were", "names": "name", "came": "came"}
    return f"1 answer {does}" if number == 1 else f"{number:,} answers {many[does]}"


def _asked_of(summary: RunSummary) -> str:
    """The models that answers name, and the pools that gave them; names are the providers' words."""
    pools = {each.pool: each.other_model for each in summary.pools if each.other_model}
    return f"{counts(summary.other_models)}; from {counts(pools)}" if pools else counts(summary.other_models)


def _tokens(summary: RunSummary) -> str:
    text = f"{_count(summary.input_tokens)} in, {_count(summary.output_tokens)} out"
    if summary.cached_tokens is not None:
        text += f"; {summary.cached_tokens:,} from cache"
        if summary.ideal_cached_tokens:
            text += f", {_of_ideal(summary.cached_tokens, summary.ideal_cached_tokens)}"
    return text


def _of_ideal(cached: int, ideal: int) -> str:
    if cached <= ideal:
        return f"{100 * cached / ideal:.1f}% of the ideal {ideal:,}"
    # The ideal is of this run's prompts alone, as we count them.
    return f"more than the {ideal:,} that its prompts share: caches held some before, or count otherwise"


def _saved(cost: Decimal, baseline: Decimal | None) -> str:
    if not baseline:
        return ""
    share = 100 * (baseline - cost) / baseline
    told = f"{share:.1f}% saved" if share >= 0 else f"{-share:.1f}% more"
    return f"; {usd(baseline)} at the baseline, {told}"


def quote_text(quote: Quote) -> str:
    """A quote: the market, a row per pool, what earlier runs showed of them, then the totals against the terms."""
    about = " (estimates: a model's tokenizer is not known)" if quote.estimated else ""
    rows = [("prompts", _prompts(quote))]
    if quote.dead_invalid:
        rows.append(("invalid", "its dead letters will say why; --rehearse writes them too, for nothing"))
    share = (
        f", {100 * quote.ideal_cached_tokens / quote.input_tokens:.1f}% from cache at best"
        if quote.input_tokens
        else ""
    )
    rows.append(("input tokens", f"{quote.input_tokens:,}{about}{share}"))
    if quote.unserved:
        rows.append(("unserved", counts(quote.unserved) + _needed_text(quote)))
    rows.append(("expected cost", usd(quote.expected_cost) + _saved(quote.expected_cost, quote.baseline_cost)))
    if quote.overhead_unknown:
        rows.append(
            ("not in it", f"how long {', '.join(quote.overhead_unknown)} will load and idle: no run has shown it")
        )
    if quote.reserved_cost is not None:
        part = "for full answers and nothing cached" + (", as far as the budget goes" if quote.uncovered else "")
        rows.append(("reserved", f"{usd(quote.reserved_cost)}, {part}"))
    if quote.uncovered:
        rows.append(("budget", _short_text(quote)))
    rows.append(("worst case", _worst_text(quote)))
    if quote.lp_bound is not None:
        regret = "" if quote.regret is None else f", regret {100 * quote.regret:.2f}%"
        rows.append(("lower bound", f"{usd(quote.lp_bound)}{regret} (of cost and risk together)"))
    if quote.payment != "pay_as_bid":
        rows.append(("payment", f"{quote.payment}: {_rent_text(quote)}"))
    if quote.finish_at is not None:
        rows.append(("finish", f"{quote.finish_at:%Y-%m-%d %H:%M:%S %Z}" + _against_deadline(quote)))
    elif any(each.lots for each in quote.pools):
        rows.append(
            ("finish", "not known: nobody declares or has shown the speed (tokens_per_second) of a pool that won")
        )
    if quote.finish_at is None and quote.deadline_at is not None:
        rows.append(("deadline", f"{quote.deadline_at:%Y-%m-%d %H:%M:%S %Z}"))
    rows.append(("run", quote.run_id))
    heads = ("pool", "price", "capacity", "bid for all", "lots won", "requests", "expected cost", "reserved", "finish",
             "why not")  # fmt: skip
    body = [
        (
            each.pool,
            each.price,
            each.capacity,
            "" if each.asks is None else usd(each.asks) + _of_lots(each.asks_lots, quote.lots),
            f"{each.lots:,}",
            f"{each.requests:,}",
            usd(each.expected_cost),
            usd(each.worst_case_cost),
            "" if each.finish_s is None else duration_text(each.finish_s),
            refusal_text(each.why_not or ""),
        )
        for each in quote.pools
    ]
    parts = [table_text(heads, body, right=range(3, 9)), aligned(rows)]
    if any(each.answers for each in quote.pools):
        parts.insert(1, _seen_text(quote))
    return "\n\n".join(parts)


def _needed_text(quote: Quote) -> str:
    if quote.needed is None or quote.budget is None:
        return ""
    return f"; the budget of {usd(quote.budget)} must be at least {usd(quote.needed)} for every lot to be reserved"


def _prompts(quote: Quote) -> str:
    """The rows by what becomes of them."""
    if quote.settled and not quote.to_ask:
        return f"{quote.requests:,}; nothing to do: every request of this run is settled"
    parts = [
        f"{number:,} {what}"
        for number, what in (
            (quote.settled, f"settled by earlier starts for {usd(quote.spent)}, and not asked again"),
            (quote.shared, "that share another's answer"),
            (quote.dead_invalid, "invalid"),
        )
        if number
    ]
    return ", ".join([f"{quote.requests:,}", *parts])


def _short_text(quote: Quote) -> str:
    asked = quote.to_ask - sum(quote.unserved.values())
    may_end = f"worst case above the budget: may end with {quote.uncovered:,} budget dead letters"
    return f"{may_end}; {quote.expected_served or 0:,} of {asked:,} expected to be served"


def _rent_text(quote: Quote) -> str:
    if quote.rent is None:
        return "no pool has settlement: internal, so every pool is paid as it bids"
    return f"{usd(quote.rent)} information rent to internal pools, no part of the cost"


def _of_lots(some: int, all_: int) -> str:
    return "" if some == all_ else f" for {some:,} of {all_:,} lots"


def _seen_text(quote: Quote) -> str:
    """What the ledger's earlier runs showed of the pools; what they did not is empty."""
    heads = ("earlier runs", "answers", "failed", "up", "cached", "output", "longest", "latency p95", "over-reported",
             "other model")  # fmt: skip
    body = [
        (
            each.pool + (" (newcomer)" if each.newcomer else ""),
            f"{each.answers:,}",
            *map(_percent, (each.failure_rate, each.uptime, each.cache_share, each.output_share)),
            _percent(each.output_share_p95),
            "" if each.latency_p95_s is None else duration_text(each.latency_p95_s),
            _percent(each.excess),
            _percent(each.misnamed),
        )
        for each in quote.pools
    ]
    return table_text(heads, body, right=range(1, 10))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def _worst_text(quote: Quote) -> str:
    if quote.worst_case_cost is None:
        return "no bound: engines are paid by time, and no budget is set"
    if quote.budget is None:
        return f"{usd(quote.worst_case_cost)}; no budget is set"
    left = max(quote.budget - quote.spent, Decimal(0))
    rest = f", of which {usd(quote.spent)} is spent" if quote.spent else ""
    if quote.worst_case_cost == left:
        named = f"what is left of the budget of {usd(quote.budget)}" if quote.spent else "the budget"
        return f"{usd(left)}, {named}: what it does not cover is not sent"
    fits = "within" if quote.worst_case_cost < left else "more than"
    return f"{usd(quote.worst_case_cost)}, {fits} the budget of {usd(quote.budget)}{rest}"


def _against_deadline(quote: Quote) -> str:
    if quote.deadline_at is None or quote.finish_at is None:
        return ""
    kept = "before" if quote.finish_at <= quote.deadline_at else "after"
    return f", {kept} the deadline {quote.deadline_at:%Y-%m-%d %H:%M:%S %Z}"


def counts(numbers: Mapping[str, int]) -> str:
    """Counts by name, the largest first."""
    return ", ".join(f"{n:,} {name}" for name, n in sorted(numbers.items(), key=lambda pair: (-pair[1], pair[0])))


_REFUSED = {
    "deadline": "it would be done after the deadline",
    "too_long": "a request is longer than its context",
    "capacity": "it has no capacity",
    "price": "its currency has no exchange rate",
    "model": "it does not serve the model",
    "down": "it was down",
    "failed": "it had failed these requests",
}
_PLACEMENT = re.compile(r"placement:(\w+)( \(undeclared\))?")
_OF_LOTS = re.compile(r" \([\d,]+ of [\d,]+ lots\)$")


def refusal_text(reason: str) -> str:
    """Why a pool could not bid, in words; what is no reason of the ledger's stays as it is."""
    lots = found[0] if (found := _OF_LOTS.search(reason)) else ""
    bare = reason.removesuffix(lots)
    if (label := _PLACEMENT.fullmatch(bare)) is not None:
        told = "declares no" if label[2] else "declares a"
        asked = "and the job asks for one" if label[2] else "that the job does not allow"
        return f"its placement {told} {label[1]}{',' if label[2] else ''} {asked}{lots}"
    return f"{_REFUSED.get(bare, bare)}{lots}"


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def duration_text(seconds: float) -> str:
    """A length of time for people: 850 ms, 12.3 s, 4 min 05 s, 2 h 03 min."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def aligned(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values in two columns."""
    pairs = list(rows)
    width = max((len(name) for name, _ in pairs), default=0)
    return "\n".join(f"{name:<{width}}  {one_line(value)}" for name, value in pairs)


def table_text(heads: Sequence[str], body: Sequence[Sequence[str]], *, right: Iterable[int] = ()) -> str:
    """Rows in columns as wide as they need, the columns in ``right`` flush right."""
    flush = frozenset(right)
    cells = [tuple(map(one_line, row)) for row in (heads, *body)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(heads))]
    lines = [
        "  ".join(
            f"{cell:>{width}}" if place in flush else f"{cell:<{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def one_line(cell: str) -> str:
    """A line without breaks and controls, whatever the data holds: a terminal would obey them."""
    return "".join(char if char.isprintable() else " " for char in cell)


def cell_text(value: Any, empty: str = "") -> str:
    """A value of a result as text: decimals plain, NULL as ``empty``, nested values as JSON."""
    import json

    plain = jsonable(value)
    if plain is None:
        return empty
    if isinstance(plain, bool):
        return "true" if plain else "false"
    return json.dumps(plain, ensure_ascii=False) if isinstance(plain, dict | list) else str(plain)
