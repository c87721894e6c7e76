# Paths are plain strings here, as the stores have them.
# ruff: noqa: PTH207, PTH208, PTH103, PTH105, PTH108, PTH112, PTH116, PTH118, PTH120, PTH123
"""How each kind of store keeps the promises of ``Store``: the local filesystem, and everything fsspec reaches.

Both raise ``FileExistsError`` where a create-only write lost, ``FileNotFoundError`` where a name is missing, and
whatever their library raises otherwise; ``Store`` turns that into messages.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from glob import escape, glob, has_magic
from typing import Any, Protocol

import pyarrow as pa

from bidbeam.connectors.store_url import open_filesystem

TEMPORARY = ".tmp-"
_READ_AHEAD = 8 << 20
_SINGLE_PUT = 5 << 30  # S3 takes no larger object in one put


@dataclass(frozen=True, slots=True)
class Entry:
    """A file: ``name`` relative to its store, ``size`` in bytes, ``version`` changes whenever the content may have."""

    name: str
    size: int
    version: str


class Backend(Protocol):
    """What ``Store`` asks of a kind of store; every path is absolute in it."""

    def create(self, path: str, data: bytes, *, durable: bool) -> None: ...
    def create_from(self, path: str, local_path: str, *, durable: bool) -> None: ...
    def replace(self, path: str, data: bytes, *, durable: bool) -> None: ...
    def read(self, path: str, start: int | None, end: int | None) -> bytes: ...
    def open_input(self, path: str) -> pa.NativeFile: ...
    def info(self, path: str) -> Entry | None: ...
    def is_directory(self, path: str) -> bool: ...
    def walk(self, directory: str) -> Iterator[Entry]: ...
    def glob(self, directory: str, pattern: str) -> Iterator[Entry]: ...
    def children(self, directory: str) -> list[str]: ...
    def delete(self, path: str) -> None: ...
    def delete_tree(self, directory: str) -> None: ...
    def scratch_directory(self, directory: str) -> str: ...


class LocalBackend:
    """The local filesystem, create-only by a temporary file, fsync and a hard link: no name ever holds half a file."""

    def create(self, path: str, data: bytes, *, durable: bool) -> None:
        temporary = self._write_temporary(path, data, durable=durable)
        try:
            os.link(temporary, path)
        finally:
            os.unlink(temporary)
        if durable:
            _sync_directory(os.path.dirname(path))

    def create_from(self, path: str, local_path: str, *, durable: bool) -> None:
        directory = os.path.dirname(path)
        self._make_directory(directory, durable=durable)
        source = local_path
        if os.stat(local_path).st_dev != os.stat(directory).st_dev:
            source = os.path.join(directory, TEMPORARY + uuid.uuid4().hex)
        try:
            if source != local_path:
                shutil.copyfile(local_path, source)
            if durable:
                _sync_file(source)
            os.link(source, path)
        finally:
            if source != local_path:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(source)
        if durable:
            _sync_directory(directory)

    def replace(self, path: str, data: bytes, *, durable: bool) -> None:
        temporary = self._write_temporary(path, data, durable=durable)
        try:
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        if durable:
            _sync_directory(os.path.dirname(path))

    def read(self, path: str, start: int | None, end: int | None) -> bytes:
        with open(path, "rb") as file:
            if start:
                file.seek(start)
            return file.read() if end is None else file.read(max(0, end - (start or 0)))

    def open_input(self, path: str) -> pa.NativeFile:
        # Reads by position, not a memory map: a file cut short under a map kills the process.
        return pa.OSFile(path, "rb")

    def info(self, path: str) -> Entry | None:
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return None if stat.S_ISDIR(found.st_mode) else _local_entry(path, found)

    def is_directory(self, path: str) -> bool:
        return os.path.isdir(path)

    def walk(self, directory: str) -> Iterator[Entry]:
        pending = [directory]
        while pending:
            try:
                with os.scandir(pending.pop()) as entries:
                    for entry in entries:
                        if entry.is_dir():
                            pending.append(entry.path)
                        else:
                            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                                yield _local_entry(entry.path, entry.stat())
            except (FileNotFoundError, NotADirectoryError):
                continue

    def glob(self, directory: str, pattern: str) -> Iterator[Entry]:
        for name in glob(pattern, root_dir=directory, recursive=True):
            found = self.info(os.path.join(directory, name))
            if found is not None:
                yield found

    def children(self, directory: str) -> list[str]:
        try:
            return os.listdir(directory)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(path)

    def delete_tree(self, directory: str) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            shutil.rmtree(directory)

    def scratch_directory(self, directory: str) -> str:
        self._make_directory(directory, durable=False)
        return directory

    def _write_temporary(self, path: str, data: bytes, *, durable: bool) -> str:
        directory = os.path.dirname(path)
        temporary = os.path.join(directory, TEMPORARY + uuid.uuid4().hex)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        try:
            handle = os.open(temporary, flags, 0o666)
        except FileNotFoundError:
            self._make_directory(directory, durable=durable)
            handle = os.open(temporary, flags, 0o666)
        try:
            with os.fdopen(handle, "wb", buffering=0) as file:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
                if durable:
                    os.fsync(file.fileno())
        except BaseException:
            os.unlink(temporary)
            raise
        return temporary

    def _make_directory(self, directory: str, *, durable: bool) -> None:
        missing = []
        above = directory
        while not os.path.isdir(above):
            missing.append(above)
            above = os.path.dirname(above)
        os.makedirs(directory, exist_ok=True)
        if durable:
            for made in missing:
                _sync_directory(os.path.dirname(made))


class RemoteBackend:
    """Any fsspec filesystem. Create-only is the store's own conditional put: one request, no look-up before it.

    fsspec's generic create mode looks first and overwrites then, so that only stores known to have a conditional put
    are asked for it, and the process's own memory, which is guarded by a lock.
    """

    _conditional = frozenset({"s3", "gs", "abfs"})
    _memory_lock = threading.Lock()

    def __init__(self, protocol: str, options: Mapping[str, Any]) -> None:
        self._protocol = protocol
        self._fs = open_filesystem(protocol, options)

    def create(self, path: str, data: bytes, *, durable: bool) -> None:  # noqa: ARG002 - an answered put is durable
        if self._protocol == "memory":
            with self._memory_lock:
                if self._fs.isfile(path):
                    raise FileExistsError(path)
                self._fs.pipe_file(path, data)
            return
        if self._protocol not in self._conditional:
            raise NotImplementedError(f"{self._protocol}:// has no conditional put")
        # The chunk size keeps s3fs from turning a large object into several requests.
        whole = {"chunksize": _SINGLE_PUT} if self._protocol == "s3" else {}
        for attempt in range(6):
            try:
                self._fs.pipe_file(path, data, mode="create", **whole)
            except Exception as error:
                outcome = _conditional_outcome(error)
                if outcome == "exists":
                    raise FileExistsError(path) from error
                if outcome != "conflict" or attempt == 5:  # another writer is at it: its end decides
                    raise
                time.sleep(0.05 * 2**attempt)
            else:
                return

    def create_from(self, path: str, local_path: str, *, durable: bool) -> None:
        with open(local_path, "rb") as file:
            self.create(path, file.read(), durable=durable)

    def replace(self, path: str, data: bytes, *, durable: bool) -> None:  # noqa: ARG002
        guard: Any = self._memory_lock if self._protocol == "memory" else contextlib.nullcontext()
        with guard:
            self._fs.pipe_file(path, data)

    def read(self, path: str, start: int | None, end: int | None) -> bytes:
        data: bytes = self._fs.cat_file(path, start=start, end=end)
        return data

    def open_input(self, path: str) -> pa.NativeFile:
        if self._protocol == "memory":  # its files share one position between all readers
            return pa.BufferReader(self._fs.cat_file(path))
        handle = self._fs.open(path, "rb", block_size=_READ_AHEAD, cache_type="readahead")
        return pa.PythonFile(handle, mode="r")

    def info(self, path: str) -> Entry | None:
        try:
            found = self._fs.info(path)
        except FileNotFoundError:
            return None
        return None if found["type"] == "directory" else _remote_entry(path, found)

    def is_directory(self, path: str) -> bool:
        return bool(self._fs.isdir(path))

    def walk(self, directory: str) -> Iterator[Entry]:
        self._fs.invalidate_cache()
        try:
            found = self._fs.find(directory, detail=True)
        except FileNotFoundError:
            return
        for path, info in found.items():
            if info["type"] != "directory" and not path.endswith("/"):
                yield _remote_entry(path, info)

    def glob(self, directory: str, pattern: str) -> Iterator[Entry]:
        self._fs.invalidate_cache()
        found = self._fs.glob(f"{escape(directory)}/{pattern}", detail=True)
        for path, info in found.items():
            if info["type"] != "directory" and not path.endswith("/"):
                yield _remote_entry(path, info)

    def children(self, directory: str) -> list[str]:
        self._fs.invalidate_cache()
        try:
            return [path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(directory, detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(path)

    def delete_tree(self, directory: str) -> None:
        # Files by name, never the directory: a store at the root of a bucket must not take the bucket with it.
        paths = [entry.name for entry in self.walk(directory)]
        plain = [path for path in paths if not has_magic(path)]
        if plain:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(plain)
        for path in paths:
            if has_magic(path):
                self.delete(path)
        if self._protocol == "memory":
            with contextlib.suppress(FileNotFoundError, OSError):
                self._fs.rm(directory, recursive=True)

    def scratch_directory(self, directory: str) -> str:  # noqa: ARG002
        return tempfile.gettempdir()


_backends: dict[tuple[int, str, str], Backend] = {}
_backends_lock = threading.Lock()


def backend_for(protocol: str, options_key: str, options: Callable[[], Mapping[str, Any]]) -> Backend:
    """The process's backend for these options: made once, again after a fork, shared by all threads."""
    key = (os.getpid(), protocol, options_key)
    backend = _backends.get(key)
    if backend is None:
        with _backends_lock:
            backend = _backends.get(key)
            if backend is None:
                backend = LocalBackend() if protocol == "file" else RemoteBackend(protocol, options())
                _backends[key] = backend
    return backend


def _conditional_outcome(error: BaseException) -> str:
    """``exists`` where the condition failed, ``conflict`` where another writer is under way, else ``other``."""
    if isinstance(error, FileExistsError):
        return "exists"
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    if isinstance(response, Mapping):
        code = str(response.get("Error", {}).get("Code", ""))
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if code in {"PreconditionFailed", "412"} or status == 412:
            return "exists"
        if code in {"ConditionalRequestConflict", "OperationAborted", "409"} or status == 409:
            return "conflict"
    return "other"


def _local_entry(path: str, found: os.stat_result) -> Entry:
    return Entry(path, found.st_size, f"{found.st_mtime_ns}-{found.st_size}")


def _remote_entry(path: str, info: Mapping[str, Any]) -> Entry:
    size = int(info.get("size") or 0)
    for key in ("ETag", "etag", "generation", "md5Hash", "LastModified", "last_modified", "mtime", "created"):
        value = info.get(key)
        if value:
            token = value.timestamp() if isinstance(value, datetime) else str(value).strip('"')
            return Entry(path, size, f"{token}-{size}")
    return Entry(path, size, str(size))


def _sync_file(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_directory(path: str) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network filesystems sync no directories
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(handle)
