"""Report: one page on what was bought, from whom, for how much and how well, made from the ledger alone.

The page is a single file without scripts and without anything fetched: it opens from a disk, a mail or a bucket. All
text from the ledger is escaped by the template; the plots are made of numbers only.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidbeam.connectors.errors import UsageError
from bidbeam.connectors.ledger_manifest import latest_manifests, listed_files
from bidbeam.connectors.ledger_reader import ledger_store, no_ledger, no_run, open_files
from bidbeam.pipelines.report_sections import Figure, Section, figures_of, sections_of

if TYPE_CHECKING:
    import duckdb

TEMPLATE = "report.html.jinja"


@dataclass(frozen=True, slots=True)
class Report:
    """A report that was written: where, how large, and the runs that it is about."""

    output: str
    size_bytes: int
    runs: tuple[str, ...]


def write_report(
    url: str,
    output: str,
    *,
    run_id: str | None = None,
    rehearsals: bool = False,
    storage: Mapping[str, Mapping[str, Any]] | None = None,
    now: datetime | None = None,
) -> Report:
    """Writes the report of a ledger, or of one of its runs, to a local file; one that is there is replaced.

    Raises UsageError where there is no ledger, no such run, or no directory to write to.
    """
    target = Path(output).expanduser()
    if "://" in output or not target.parent.is_dir() or target.is_dir():
        raise UsageError(f"{output} cannot be written; give a file in a directory that exists, such as report.html")
    store = ledger_store(url, rehearsals=rehearsals, storage=storage)
    manifests = latest_manifests(store)
    if not manifests:
        raise UsageError(no_ledger(store, rehearsals=rehearsals))
    chosen = [manifest for manifest in manifests if run_id in (None, manifest.run_id)]
    if not chosen:
        raise UsageError(no_run(str(run_id), [manifest.run_id for manifest in reversed(manifests)]))
    with open_files(store, listed_files(chosen)) as ledger:
        page = render_report(ledger, title=run_id or "Every run of the ledger", ledger_url=store.url, now=now)
    _replace(target, page.encode())
    return Report(str(target.resolve()), len(page.encode()), tuple(manifest.run_id for manifest in chosen))


def render_report(
    ledger: duckdb.DuckDBPyConnection, *, title: str, ledger_url: str, now: datetime | None = None
) -> str:
    """The page about everything that the connection's views hold."""
    import jinja2

    import bidbeam

    figures: Sequence[Figure] = figures_of(ledger)
    sections: Sequence[Section] = sections_of(ledger)
    # Escapes whatever is not Markup, and only our own charts are; a name that the template misspells is an error.
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = page.from_string((resources.files(__package__) / "templates" / TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        title=title,
        ledger=ledger_url,
        figures=figures,
        sections=sections,
        version=bidbeam.__version__,
        made_at=f"{now or datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )


def _replace(target: Path, page: bytes) -> None:
    """Whoever opens the file meanwhile sees the old page or the new one, whole."""
    try:
        handle, scratch = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(page)
            Path(scratch).chmod(0o644)
            Path(scratch).replace(target)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror or error}") from None
