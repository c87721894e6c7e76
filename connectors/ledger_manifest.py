"""What of a run counts: the ledger's manifests, one JSON file for each state that a run has been in.

    LEDGER/runs/run_date=YYYY-MM-DD/run_id=<id>/manifest-<sequence>.json

A manifest is created once and never changed. The one with the highest sequence lists every file of the run that
counts, in all tables; a file that it does not name is as good as absent. So a run appears in the ledger whole and at
one instant, and a killed writer leaves nothing that a reader could see.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from bidbeam.connectors.errors import StoreError
from bidbeam.connectors.schemas import LEDGER_VERSION
from bidbeam.connectors.store import Store

_MANIFEST_NAME = re.compile(r"runs/run_date=[^/]+/run_id=[^/]+/manifest-(\d+)\.json")
_READERS = 16  # small files on an object store: the wait is for the network


@dataclass(frozen=True, slots=True)
class PartFile:
    """One Parquet file of the ledger. ``path`` is relative to the ledger; ``sha256`` is of the file's bytes, in hex."""

    table: str
    path: str
    rows: int
    size_bytes: int
    sha256: str
    ledger_version: int = LEDGER_VERSION


@dataclass(frozen=True, slots=True)
class RunRow:
    """The run as the table ``runs`` shows it; the fields are that table's columns.

    ``status`` is running, complete, incomplete or interrupted. ``cost`` is USD. ``job`` is the resolved job as JSON,
    secrets masked; ``tags`` is a JSON object. None is unknown (yet), never 0.
    """

    run_id: str
    name: str
    run_date: date
    started_at: datetime
    status: str
    job: str
    version: str
    parent_run_id: str | None = None
    finished_at: datetime | None = None
    requests: int | None = None
    served: int | None = None
    dead: int | None = None
    cost: Decimal | None = None
    tags: str | None = None
    starts: int | None = None
    input_tokens: int | None = None
    cached_tokens: int | None = None
    ideal_cached_tokens: int | None = None
    output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """One state of one run: all files that count, the ``runs`` row's included."""

    run_id: str
    run_date: date
    status: str
    sequence: int
    parts: tuple[PartFile, ...]

    @property
    def name(self) -> str:
        """Where it stands, relative to the ledger."""
        return f"{run_directory('runs', self.run_date, self.run_id)}/manifest-{self.sequence:04d}.json"

    def to_json(self) -> bytes:
        """Deterministic: the same state gives the same bytes, so that a repeated write is no conflict."""
        parts = sorted((asdict(part) for part in self.parts), key=lambda part: str(part["path"]))
        document = {
            "ledger_version": LEDGER_VERSION,
            "run_id": self.run_id,
            "run_date": self.run_date.isoformat(),
            "status": self.status,
            "sequence": self.sequence,
            "parts": parts,
        }
        return json.dumps(document, indent=1, ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Manifest:
        """Raises StoreError, naming ``where``, for anything that no Bidbeam wrote."""
        try:
            document = json.loads(data)
            parts = tuple(PartFile(**_known(part)) for part in document["parts"])
            found = cls(
                document["run_id"],
                date.fromisoformat(document["run_date"]),
                document["status"],
                int(document["sequence"]),
                parts,
            )
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise StoreError(f"{where} is not a ledger manifest ({error}); move it away to read the rest") from error
        if not all(_inside(part.path) for part in parts):
            raise StoreError(f"{where} lists a file outside the ledger; move it away to read the rest")
        return found


def _known(part: dict[str, Any]) -> dict[str, Any]:
    # A later version may say more of a part than this one reads.
    return {key: value for key, value in part.items() if key in PartFile.__slots__}


def _inside(path: object) -> bool:
    return isinstance(path, str) and not path.startswith("/") and ".." not in path.split("/")


def run_directory(table: str, run_date: date, run_id: str) -> str:
    """The directory of a run's files of one table, relative to the ledger."""
    return f"{table}/run_date={run_date.isoformat()}/run_id={run_id}"


def latest_manifest(ledger: Store, run_date: date, run_id: str) -> Manifest | None:
    """The manifest that counts for one run, or None before its first. The next one's sequence is this one's plus 1."""
    names = [entry.name for entry in ledger.list(f"{run_directory('runs', run_date, run_id)}/manifest-")]
    latest = _latest_names(names)
    return _read(ledger, latest[0]) if latest else None


def latest_manifests(ledger: Store) -> list[Manifest]:
    """The manifest that counts for each run of the ledger, ordered by run date and run id."""
    names = _latest_names(entry.name for entry in ledger.list("runs/"))
    if ledger.is_local or len(names) < 2:
        return [_read(ledger, name) for name in names]
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(lambda name: _read(ledger, name), names))


def manifests_of_dates(ledger: Store, dates: Sequence[date], most: int) -> list[Manifest]:
    """The manifests that count of the runs of these run dates, at most ``most``: those of the first dates named.

    Looks into the directories of these dates alone, however old and large the ledger is.
    """

    def names_of(day: date) -> list[str]:
        return _latest_names(entry.name for entry in ledger.list(f"runs/run_date={day.isoformat()}/"))

    if ledger.is_local:
        names = [name for day in dates for name in names_of(day)][:most]
        return [_read(ledger, name) for name in names]
    with ThreadPoolExecutor(_READERS) as pool:
        names = [name for of_day in pool.map(names_of, dates) for name in of_day][:most]
        return list(pool.map(lambda name: _read(ledger, name), names))


def listed_files(manifests: Sequence[Manifest]) -> dict[str, list[PartFile]]:
    """Table -> the files that count, in the manifests' order."""
    found: dict[str, list[PartFile]] = {}
    for manifest in manifests:
        for part in manifest.parts:
            found.setdefault(part.table, []).append(part)
    return found


def _latest_names(names: Iterable[str]) -> list[str]:
    latest: dict[str, tuple[int, str]] = {}
    for name in names:
        if matched := _MANIFEST_NAME.fullmatch(name):
            directory = name.rpartition("/")[0]
            # By number: the tenth thousandth sequence has a digit more than its neighbours.
            latest[directory] = max(latest.get(directory, (-1, "")), (int(matched[1]), name))
    return [name for _, (_, name) in sorted(latest.items())]


def _read(ledger: Store, name: str) -> Manifest:
    return Manifest.from_json(ledger.read(name), ledger.url_of(name))
