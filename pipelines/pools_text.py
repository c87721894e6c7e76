"""The probes of a job's pools as plain text: a row per pool and model, then what is wrong with whom."""

from __future__ import annotations

from bidbeam.pipelines.pools import ModelProbe, PoolProbe, PoolsReport
from bidbeam.pipelines.progress import usd
from bidbeam.pipelines.show import aligned, duration_text, table_text

_HEADS = ("pool", "kind", "model", "reachable", "served", "price", "latency", "tokens/s", "placement")


def pools_text(report: PoolsReport) -> str:
    """The table, the problems in full, and where the ledger has what the probes cost."""
    body = [_row(pool, model) for pool in report.pools for model in pool.models]
    lines = [table_text(_HEADS, body, right=(6, 7))]
    for pool in report.pools:
        said = [("problem", text) for text in pool.problems]
        if pool.price_source is not None:
            said.append(("price from", pool.price_source))
        if pool.undeclared:
            said.append(("undeclared", ", ".join(pool.undeclared)))
        said += [("note", text) for text in pool.notes]
        if said:
            lines.append(f"{pool.pool}\n" + _indented(aligned(said)))
    rows = [("pools", f"{len(report.pools)}, {_verdict(report)}")]
    if report.run_id is not None:
        rows += [("probes cost", usd(report.cost)), ("ledger", report.ledger_url or ""), ("run", report.run_id)]
    return "\n\n".join([*lines, aligned(rows)])


def _verdict(report: PoolsReport) -> str:
    """What is wrong with whom; where nothing is, of whom that is not known: a list of models may ask for no key."""
    bad = [pool.pool for pool in report.pools if not pool.ok]
    if bad:
        return f"to mend: {', '.join(bad)}"
    unasked = [pool.pool for pool in report.pools if not pool.measured]
    if unasked:
        return f"nothing wrong found; no request was sent to {', '.join(unasked)}"
    return "nothing wrong found" if any(pool.notes for pool in report.pools) else "all fine"


def _row(pool: PoolProbe, model: ModelProbe) -> tuple[str, ...]:
    return (
        pool.pool,
        pool.kind,
        model.model if model.model == model.theirs else f"{model.model} as {model.theirs}",
        "in our workers" if pool.kind == "vllm" else _flag(pool.reachable),
        _flag(model.served),
        pool.price or "unknown",
        duration_text(model.latency_s) if model.latency_s is not None else "failed" if model.error is not None else "",
        "" if model.tokens_per_second is None else f"{model.tokens_per_second:,.1f}",
        "fits the job" if pool.eligible else f"not for this job: {pool.why_not}",
    )


def _flag(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
