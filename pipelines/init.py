"""The files that ``bidbeam init`` writes: a job, its pools and a few prompts, ready to rehearse."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

from bidbeam.connectors.errors import UsageError

_JOB, _POOLS, _PROMPTS = "job.yaml", "pools.yaml", "prompts/sample.parquet"


def write_starter(directory: str) -> list[str]:
    """Writes the files and returns their paths, the job's first. Raises UsageError where one is already there."""
    root = Path(directory)
    paths = [root / name for name in (_JOB, _POOLS, _PROMPTS)]
    there = [str(path) for path in paths if path.exists()]
    if there:
        raise UsageError(f"{', '.join(there)}: already there, and nothing is overwritten; name another directory")
    try:
        (root / _PROMPTS).parent.mkdir(parents=True, exist_ok=True)
        for path, content in zip(paths, (_job(root), _template(_POOLS), _prompts()), strict=True):
            with path.open("xb") as file:
                file.write(content)
    except OSError as error:
        raise UsageError(f"{error.filename or root}: cannot be written: {error.strerror}") from None
    return [str(path) for path in paths]


def _job(root: Path) -> bytes:
    """The job, named after its directory."""
    name = re.sub(r"[^a-z0-9]+", "-", root.resolve().name.lower()).strip("-")[:40].strip("-") or "first-run"
    return _template(_JOB).replace(b"name: first-run", f"name: {json.dumps(name)}".encode(), 1)


def _prompts() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [json.loads(line) for line in _template("prompts.jsonl").splitlines()]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def _template(name: str) -> bytes:
    return (resources.files("bidbeam.pipelines") / "templates" / name).read_bytes()
