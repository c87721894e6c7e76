"""A store's files for DuckDB: a read-only fsspec filesystem that knows no path outside the store."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
from fsspec.spec import AbstractFileSystem

from bidbeam.connectors.store import NotThere, Store

PROTOCOL = "bidbeam-ledger"


class StoreFiles(AbstractFileSystem):  # type: ignore[misc]
    """``bidbeam-ledger://NAME`` is the file NAME of the store."""

    protocol = PROTOCOL
    cachable = False

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        name = self._strip_protocol(path)
        found = self._store.info(name)
        if found is None:
            raise NotThere(f"{self._store.url_of(name)} does not exist")
        return {"name": name, "size": found.size, "type": "file"}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        # DuckDB resolves a name by listing it; names are never patterns here.
        found = self.info(path)
        return [found] if detail else [found["name"]]

    def glob(self, path: str, **_: Any) -> list[str]:
        name = self._strip_protocol(path)
        return [name] if self._store.exists(name) else []

    def modified(self, path: str) -> datetime:  # noqa: ARG002 - its signature is given
        # DuckDB asks whether what it cached is stale; the ledger's files never change.
        return datetime(2000, 1, 1, tzinfo=UTC)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> pa.NativeFile:
        if mode != "rb":
            raise PermissionError(f"the ledger is read-only: {path}")
        return self._store.open_input(self._strip_protocol(path))
