# Paths are plain strings here, as the stores have them.
# ruff: noqa: PTH106, PTH108, PTH110, PTH116, PTH118, PTH120, PTH123
"""One store type for every path: a directory on a local disk or below an object store's bucket.

Names are relative, ``/``-separated, without ``..``. A name that starts with ``.tmp-`` in its last part is a temporary
file and appears in no listing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from bidbeam.connectors.errors import AlreadyExists, BidbeamError, StoreError, UsageError
from bidbeam.connectors.store_backends import TEMPORARY, Backend, Entry, backend_for
from bidbeam.connectors.store_url import check_parts, refuse_secrets_in_options, split_url

__all__ = ["Entry", "NotThere", "Store"]


class NotThere(StoreError, FileNotFoundError):  # noqa: N818 - named for what it says, like its siblings
    """The name that was to be read is not in the store."""


@dataclass(frozen=True, slots=True, repr=False)
class Store:
    """A directory that need not exist yet. Equal by ``url``; pickles to its URL and options, with no live connection.

    ``url`` is absolute and fit for messages; a local one is a plain path. Every method raises ``StoreError`` where the
    store fails, ``NotThere`` where a name to be read is missing.
    """

    url: str
    _protocol: str = field(compare=False)
    _options: str = field(compare=False)  # JSON, so that it hashes and pickles

    @classmethod
    def at(cls, url: str, options: Mapping[str, Mapping[str, Any]] | None = None) -> Store:
        """The store at ``url``; ``options`` are fsspec's by protocol, ``{"s3": {"endpoint_url": ...}}``.

        ``ConfigError`` for a URL or options that hold a credential, and for an unknown protocol. Opens no connection.
        """
        protocol, absolute = split_url(os.fspath(url))
        mine = dict((options or {}).get(protocol) or {})
        refuse_secrets_in_options(protocol, mine)
        return cls(absolute, protocol, json.dumps(mine, sort_keys=True))

    @classmethod
    def of_file(cls, url: str, options: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[Store, str]:
        """The store of the directory that holds the file at ``url``, and the file's name in it."""
        store = cls.at(url, options)
        directory, _, name = store.url.rpartition("/")
        if directory.endswith(":/") and store._protocol == "memory":
            directory += "/"
        if not name or directory.endswith(":/"):
            raise StoreError(f"{store.url} names no file")
        return cls(directory or "/", store._protocol, store._options), name

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    @property
    def is_local(self) -> bool:
        return self._protocol == "file"

    def child(self, *parts: str) -> Store:
        """The store of a directory below. ``StoreError`` for an empty or absolute part, or one with ``..``."""
        return Store(self.url_of(check_parts(*parts)) if parts else self.url, self._protocol, self._options)

    def url_of(self, name: str) -> str:
        """The absolute URL of a name; for a local store, its path."""
        return f"{self.url}{'' if self.url.endswith('/') else '/'}{check_parts(name)}"

    # Writing

    def create(self, name: str, data: bytes | pa.Buffer, *, durable: bool = True) -> bool:
        """Write ``name`` unless it is there: True if written, False if it held this content already.

        Of concurrent writers exactly one gets True. ``AlreadyExists`` where other content is there. ``durable=False``
        spares a local file its fsync: for scratch that is made anew after a crash.
        """
        content = memoryview(data).tobytes() if isinstance(data, pa.Buffer) else data
        with self._reporting("write", name):
            for _ in range(5):
                try:
                    self._backend.create(self._path(name), content, durable=durable)
                except FileExistsError:
                    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile: try again
                        return self._same_or_raise(name, len(content), hashlib.sha256(content).digest())
                else:
                    return True
            raise StoreError(f"{self.url_of(name)} appears and vanishes while it is written")

    def create_from(self, name: str, local_path: str, *, durable: bool = True) -> bool:
        """``create`` with the content of a local file, which is gone when this returns and left when it raises.

        Moved by a link where the store is on the same filesystem, else copied or put in one request.
        """
        with self._reporting("write", name):
            for _ in range(5):
                written = True
                try:
                    self._backend.create_from(self._path(name), local_path, durable=durable)
                except FileExistsError:
                    with open(local_path, "rb") as file:
                        digest = hashlib.file_digest(file, "sha256").digest()
                    try:
                        written = self._same_or_raise(name, os.stat(local_path).st_size, digest)
                    except FileNotFoundError:
                        continue
                os.unlink(local_path)
                return written
            raise StoreError(f"{self.url_of(name)} appears and vanishes while it is written")

    @contextlib.contextmanager
    def scratch_file(self, suffix: str = "") -> Iterator[str]:
        """A local path to write what ``create_from`` then takes, on this store's filesystem where that is local.

        Nothing is there yet; whatever still is when the context ends is deleted.
        """
        with self._reporting("write", TEMPORARY):
            directory = self._backend.scratch_directory(self._root)
        path = os.path.join(directory, f"{TEMPORARY}{uuid.uuid4().hex}{suffix}")
        try:
            yield path
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def replace(self, name: str, data: bytes, *, durable: bool = False) -> None:
        """Write ``name`` whether it is there or not; a reader sees the old content or the new, never a mixture."""
        with self._reporting("write", name):
            self._backend.replace(self._path(name), data, durable=durable)

    def delete(self, name: str) -> None:
        """Delete one file; a missing one is no error."""
        with self._reporting("delete", name):
            self._backend.delete(self._path(name))

    def delete_tree(self, prefix: str = "") -> None:
        """Delete everything below the directory ``prefix``, temporary files included; a missing one is no error."""
        with self._reporting("delete", prefix):
            self._backend.delete_tree(self._path(prefix) if prefix else self._root)

    # Reading

    def read(self, name: str) -> bytes:
        """A file's whole content."""
        with self._reporting("read", name):
            return self._backend.read(self._path(name), None, None)

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Bytes ``start`` up to, not including, ``end``; fewer where the file ends before."""
        with self._reporting("read", name):
            return self._backend.read(self._path(name), start, end) if end > start else b""

    def open_input(self, name: str) -> pa.NativeFile:
        """A seekable file for pyarrow. Close it, or use it as a context."""
        with self._reporting("read", name):
            return self._backend.open_input(self._path(name))

    def info(self, name: str) -> Entry | None:
        """The entry of one file, or None where there is none."""
        with self._reporting("look up", name):
            found = self._backend.info(self._path(name))
        return None if found is None else Entry(name, found.size, found.version)

    def exists(self, name: str) -> bool:
        return self.info(name) is not None

    def size(self, name: str) -> int:
        """Bytes of a file; ``NotThere`` where it is missing."""
        found = self.info(name)
        if found is None:
            raise NotThere(f"{self.url_of(name)} does not exist")
        return found.size

    def is_directory(self) -> bool:
        """Whether a directory is here: on an object store, whether anything is below it."""
        with self._reporting("look up", ""):
            return self._backend.is_directory(self._root)

    def children(self) -> Sequence[str]:
        """The names directly in this directory, files and directories, sorted; a missing directory has none."""
        with self._reporting("list", ""):
            return sorted(self._backend.children(self._root))

    def glob(self, pattern: str) -> Sequence[Entry]:
        """The files that match a glob below this directory, sorted by name; ``**`` spans directories."""
        cut = len(self._root.rstrip("/")) + 1
        with self._reporting("list", pattern):
            found = [Entry(e.name[cut:], e.size, e.version) for e in self._backend.glob(self._root, pattern)]
        return sorted(found, key=lambda entry: entry.name)

    def list(self, prefix: str = "") -> list[Entry]:
        """All files whose name starts with ``prefix``, at any depth, sorted by name; a missing directory has none."""
        below, _, _ = prefix.rpartition("/")
        start = self._path(below) if below else self._root
        cut = len(self._root.rstrip("/")) + 1
        found = []
        with self._reporting("list", prefix):
            for entry in self._backend.walk(start):
                name = entry.name[cut:]
                if name.startswith(prefix) and not name.rpartition("/")[2].startswith(TEMPORARY):
                    found.append(Entry(name, entry.size, entry.version))
        return sorted(found, key=lambda entry: entry.name)

    # Promises

    def probe_create_only(self) -> None:
        """Prove that this store can be written and keeps create-only; leaves nothing behind.

        ``UsageError`` where it cannot be written, with what to do; ``StoreError`` where it overwrites regardless.
        """
        existed = self._existing_ancestor()
        name = f"{TEMPORARY}probe-{uuid.uuid4().hex}"
        try:
            try:
                self._backend.create(self._path(name), b"first", durable=False)
            except NotImplementedError as error:
                raise StoreError(f"{self.url}: {error}; use a local path, s3://, gs:// or abfs://") from None
            except Exception as error:
                if isinstance(error, BidbeamError):
                    raise
                raise UsageError(f"cannot write to {self.url}: {_brief(error)}; {self._remedy(error)}") from error
            with contextlib.suppress(FileExistsError):
                self._backend.create(self._path(name), b"second", durable=False)
                raise StoreError(
                    f"{self.url} overwrites a file that was to be created only once, so that work could be lost or "
                    "paid twice; use a store with conditional puts (If-None-Match)"
                )
            if self.read(name) != b"first":
                raise StoreError(f"{self.url} does not return what was written to it")
        finally:
            with contextlib.suppress(Exception):
                self.delete(name)
            self._remove_empty_directories(existed)

    def _existing_ancestor(self) -> str:
        above = self._root
        while self.is_local and not os.path.exists(above):
            above = os.path.dirname(above)
        return above

    def _remove_empty_directories(self, keep: str) -> None:
        here = self._root
        with contextlib.suppress(OSError):
            while self.is_local and here != keep:
                os.rmdir(here)
                here = os.path.dirname(here)

    def _remedy(self, error: BaseException) -> str:
        if self.is_local:
            if isinstance(error, PermissionError):
                return "give this user write permission there, or choose another directory"
            if isinstance(error, (NotADirectoryError, FileExistsError)):
                return "a file is in the way; choose another directory"
            return "choose a directory on a writable filesystem with hard links"
        if isinstance(error, FileNotFoundError):
            return "create the bucket, or choose another one"
        if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
            return "set credentials for it in the environment that may write there"
        return f"check the URL and the job's storage.{self._protocol} options"

    # Inside

    @property
    def _root(self) -> str:
        if self.is_local:
            return self.url
        path = self.url.partition("://")[2]
        if self._protocol == "memory":
            return f"/{path}" if path else ""
        # Azure and HTTP keep more than a scheme in front of the path.
        return path if self._protocol in {"s3", "gs"} else str(self._fs_path(self.url))

    def _fs_path(self, url: str) -> str:
        from fsspec import get_filesystem_class

        return str(get_filesystem_class(self._protocol)._strip_protocol(url))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{check_parts(name)}"

    @property
    def _backend(self) -> Backend:
        return backend_for(self._protocol, self._options, lambda: json.loads(self._options))

    def _same_or_raise(self, name: str, size: int, digest: bytes) -> bool:
        found = self._backend.info(self._path(name))
        if found is None and not self._backend.is_directory(self._path(name)):
            raise FileNotFoundError(name)
        if found is not None and found.size == size:
            content = self._backend.read(self._path(name), None, None)
            if hashlib.sha256(content).digest() == digest:
                return False
        raise AlreadyExists(f"{self.url_of(name)} already exists with other content")

    @contextlib.contextmanager
    def _reporting(self, verb: str, name: str) -> Iterator[None]:
        try:
            yield
        except BidbeamError:
            raise
        except FileNotFoundError as error:
            raise NotThere(f"{self._shown(name)} does not exist") from error
        except Exception as error:
            raise StoreError(f"cannot {verb} {self._shown(name)}: {_brief(error)}") from error

    def _shown(self, name: str) -> str:
        return f"{self.url}{'' if self.url.endswith('/') else '/'}{name}" if name else self.url


_QUERY = re.compile(r"\?[^\s'\"]*")


def _brief(error: BaseException) -> str:
    """What went wrong in a few words, without any query string: signed URLs hold secrets."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = _QUERY.sub("", text.strip().splitlines()[0] if text.strip() else "")[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
