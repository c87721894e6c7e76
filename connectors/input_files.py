"""Which files a job's input patterns name: paths, globs and directories on any store, each file once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import has_magic
from typing import Any, Literal

from bidbeam.connectors.errors import InputError, StoreError
from bidbeam.connectors.near import near
from bidbeam.connectors.store import Entry, Store
from bidbeam.connectors.store_url import split_url

Format = Literal["parquet", "arrow", "jsonl"]
Storage = Mapping[str, Mapping[str, Any]]

FORMATS: dict[str, Format] = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".jsonl": "jsonl",
}


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file to read: its store, its entry there, its absolute URL and its format."""

    store: Store
    entry: Entry
    url: str
    format: Format


def find_files(patterns: Sequence[str], storage: Storage | None = None) -> tuple[InputFile, ...]:
    """The files in the order of the patterns, sorted within each; one that several patterns name comes once.

    A directory stands for all files of known formats below it. Names that begin with ``_`` or ``.`` are passed over
    unless they are named in full. ``InputError`` where a pattern names nothing or a file of no known format.
    """
    found: dict[str, InputFile] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            for file in _match(pattern, storage):
                found.setdefault(file.url, file)
        except StoreError as error:
            raise InputError(f"input {pattern!r} cannot be looked up: {error}") from error
    if not found:
        raise InputError("the job names no input; give a path, a glob or a list of them")
    return tuple(found.values())


def _match(pattern: str, storage: Storage | None) -> list[InputFile]:
    _, url = split_url(pattern)
    if has_magic(url):
        return _match_glob(pattern, url, storage)
    if url.count("/") > 2 or Store.at(url, storage).is_local:
        store, name = Store.of_file(url, storage)
        entry = store.info(name)
        if entry is not None:
            return [_file(store, entry)]
    directory = Store.at(url, storage)
    if not directory.is_directory():
        raise InputError(f"input {url} does not exist{_nearest(url, storage)}")
    files = [entry for entry in directory.list() if not _hidden(entry.name) and _format(entry.name) is not None]
    if not files:
        raise InputError(f"input directory {url} holds no file of a known format ({', '.join(FORMATS)})")
    return [_file(directory, entry) for entry in files]


def _match_glob(pattern: str, url: str, storage: Storage | None) -> list[InputFile]:
    parts = url.split("/")
    first = next(index for index, part in enumerate(parts) if has_magic(part))
    base = "/".join(parts[:first]) or "/"
    store = Store.at(f"{base}/" if base.endswith(":/") else base, storage)
    below = "/".join(parts[first:])
    if "/" not in below or not has_magic(url):  # a file may have magic characters in its name
        entry = store.info(below)
        if entry is not None:
            return [_file(store, entry)]
    entries = [entry for entry in store.glob(below) if not _hidden(entry.name)]
    if not entries:
        hint = "" if store.children() else f"; {store.url} is empty or missing{_nearest(store.url, storage)}"
        raise InputError(f"input {pattern!r} matches no file{hint}")
    return [_file(store, entry) for entry in entries]


def _file(store: Store, entry: Entry) -> InputFile:
    format_ = _format(entry.name)
    url = store.url_of(entry.name)
    if format_ is None:
        raise InputError(f"{url} has no known format; its name must end in one of {', '.join(FORMATS)}")
    return InputFile(store, entry, url, format_)


def _format(name: str) -> Format | None:
    return FORMATS.get("." + name.rpartition(".")[2].lower()) if "." in name.rpartition("/")[2] else None


def _hidden(name: str) -> bool:
    return any(part.startswith(("_", ".")) for part in name.split("/"))


def _nearest(url: str, storage: Storage | None) -> str:
    """``; did you mean ...?`` with the nearest name that exists where the path first leaves what exists."""
    try:
        missing = url
        while "/" in missing:
            store, name = Store.of_file(missing, storage)
            siblings = store.children()
            if siblings:
                meant = near(name, siblings, least=0.5)
                return f"; did you mean {store.url_of(meant)}?" if meant else ""
            missing = store.url
    except StoreError:
        pass
    return ""
