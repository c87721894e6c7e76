"""What became of a batch's rows: its answer files line by line, and by how it ended what no line tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

from bidbeam.connectors.batch_client import Look
from bidbeam.connectors.batch_lines import Asked, overall_class, overall_message, read_line
from bidbeam.connectors.batch_rows import Batch, lines_of
from bidbeam.connectors.http_transport import failure
from bidbeam.connectors.http_wire import Outcome
from bidbeam.connectors.model_echo import Echo
from bidbeam.connectors.profiles import Profile

UNSENT = Outcome("cancelled", error_message="not sent")
"""Never run at the provider, and nothing owed: it was no attempt."""
_MOST_STRANGE = 10_000
"""Lines that answer no row, beside as many as there are rows, after which a file is not worth reading any further."""
UNKNOWN = Outcome("cancelled", error_message="the batch was lost sight of")
"""It may have been served: nothing is known of it."""


def read_answers(
    batch: Batch,
    look: Look,
    files: Sequence[Path],
    profile: Profile,
    echo: Echo,
    secrets: Sequence[str],
    now: Callable[[], datetime],
) -> Iterator[tuple[int, Outcome]]:
    """(row, outcome) for each row of an ended batch, each once, in the order of the files and then of what is left."""
    names = batch.intent.rows.column("custom_id").to_pylist()
    samples = batch.intent.rows.column("n").to_pylist()
    row_of = {name: row for row, name in enumerate(names)}
    seen, strange = np.zeros(len(names), np.bool_), 0

    def find(name: str) -> Asked | None:
        row = row_of.get(name)
        return None if row is None else Asked(samples[row] or 1, lambda: batch.prompt(row))

    for path in files:
        for raw in lines_of(path):
            line = None
            if raw is not None:
                line = read_line(raw, profile, chat=batch.intent.chat, find=find, secrets=secrets, now=now, echo=echo)
            if line is None or seen[row_of[line.custom_id]]:
                strange += 1
                if strange > len(names) + _MOST_STRANGE:
                    break
                continue
            seen[row_of[line.custom_id]] = True
            yield row_of[line.custom_id], UNSENT if line.not_run and batch.cancelling else line.outcome
    missing = np.flatnonzero(~seen).tolist()
    if look.state == "failed" and not seen.any():
        yield from _refused(look, missing, profile, secrets)
        return
    rest = _rest(batch, look, strange)
    yield from ((row, rest) for row in missing)


def _rest(batch: Batch, look: Look, strange: int) -> Outcome:
    """What the rows without a line of their own amount to."""
    if strange:
        return failure("bad_output", f"no line of the batch's files answers it; {strange} lines are not readable")
    if look.state == "expired":
        return failure("timeout", "the batch expired before this request was run")
    if look.state == "cancelled":
        return UNSENT if batch.cancelling else failure("server", "the batch was cancelled at the provider")
    return failure("bad_output", "the batch ended without a line for this request")


def _refused(
    look: Look, rows: Sequence[int], profile: Profile, secrets: Sequence[str]
) -> Iterator[tuple[int, Outcome]]:
    """Rows of a file that the provider would not run: nothing of it was run. Lines that it names are at fault."""
    first = look.errors[0] if look.errors else {}
    code, message = (text if isinstance(text := first.get(name), str) else "" for name in ("code", "message"))
    said = overall_message(first, secrets)
    why = failure(overall_class(profile, code, message), f"the provider refused the batch: {said}")
    named = {each["line"] - 1: each for each in look.errors if type(each.get("line")) is int}
    faulty = named if len(named) < len(rows) else {}
    for row in rows:
        if row in faulty:
            yield row, failure("caller", f"the provider refused the request: {overall_message(faulty[row], secrets)}")
        elif faulty:
            yield row, failure("server", "the batch was refused for other requests in it")
        else:
            yield row, why
