from __future__ import annotations

import os
import pickle
import string
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from s3_server import S3Server, s3

from bidbeam.connectors import store_backends
from bidbeam.connectors.errors import AlreadyExists, ConfigError, StoreError, UsageError
from bidbeam.connectors.store import Entry, NotThere, Store

__all__ = ["s3"]


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """An empty store of each kind, in a directory that does not exist yet."""
    if request.param == "local":
        yield Store.at(str(tmp_path / "new" / "store"))
    elif request.param == "memory":
        made = Store.at(f"memory://{uuid.uuid4().hex}/store")
        yield made
        made.delete_tree()
    else:
        server: S3Server = request.getfixturevalue("s3")
        yield Store.at(f"s3://{server.bucket()}/new/store", server.options)


def names(store: Store, prefix: str = "") -> list[str]:
    return [entry.name for entry in store.list(prefix)]


# Create-only


def test_create_writes_once_and_accepts_the_same_content_again(store: Store) -> None:
    """The first create writes, a second with the same content is no error and says that nothing was written."""
    assert store.create("a/part.parquet", b"content") is True
    assert store.create("a/part.parquet", pa.py_buffer(b"content")) is False
    assert store.read("a/part.parquet") == b"content"


@pytest.mark.parametrize("other", [b"Content", b"longer content", b""])
def test_create_refuses_other_content(store: Store, other: bytes) -> None:
    """Other content under a taken name is AlreadyExists, and the first content stays."""
    store.create("part", b"content")
    with pytest.raises(AlreadyExists, match="part already exists with other content"):
        store.create("part", other)
    assert store.read("part") == b"content"


def test_exactly_one_of_concurrent_writers_wins(store: Store) -> None:
    """Of writers that create one name with different content at once, one wins and its content is what is read."""
    barrier = threading.Barrier(8)

    def write(number: int) -> bool:
        barrier.wait()
        try:
            return store.create("contended", b"%d" % number * 1000)
        except AlreadyExists:
            return False

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert sum(won) == 1
    assert store.read("contended") == b"%d" % won.index(True) * 1000


def test_concurrent_writers_of_the_same_content_all_succeed(store: Store) -> None:
    """Writers of one content under one name never see an error, and only one of them is told that it wrote."""
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda _: store.create("same", b"x" * 10_000), range(8)))
    assert sum(won) == 1


def test_create_from_takes_the_local_file(store: Store) -> None:
    """A local file goes into the store under its name and is gone afterwards, again where it was there already."""
    for expected in (True, False):
        with store.scratch_file(".parquet") as path:
            pq.write_table(pa.table({"x": [1, 2, 3]}), path)
            assert store.create_from("sub/t.parquet", path) is expected
            assert not Path(path).exists()
    with store.open_input("sub/t.parquet") as file:
        assert pq.read_table(file).column("x").to_pylist() == [1, 2, 3]


def test_create_from_refuses_other_content_and_keeps_the_local_file(store: Store) -> None:
    """A local file that lost to other content is still there when the error arrives, and is cleaned up after."""
    store.create("name", b"first")
    with store.scratch_file() as path:
        Path(path).write_bytes(b"other")
        with pytest.raises(AlreadyExists):
            store.create_from("name", path)
        assert Path(path).exists()
    assert not Path(path).exists()
    assert store.read("name") == b"first"


def test_a_create_is_one_conditional_put(s3: S3Server) -> None:
    """On an object store create sends a single request, a put with If-None-Match, for small and for large content."""
    store = Store.at(f"s3://{s3.bucket()}/d", s3.options)
    store.create("warm", b"")
    for size in (1, 120 << 20):
        s3.requests.clear()
        store.create(f"part-{size}", bytes(size))
        assert [(method, conditional) for method, _, conditional in s3.requests] == [("PUT", True)]
    assert store.size(f"part-{120 << 20}") == 120 << 20


def test_a_store_that_ignores_conditions_is_refused(s3: S3Server) -> None:
    """The probe finds out that a store overwrites regardless of the condition, and leaves nothing there."""
    store = Store.at(f"s3://{s3.bucket()}/d", s3.options)
    s3.ignore_conditions = True
    try:
        with pytest.raises(StoreError, match="conditional puts"):
            store.probe_create_only()
    finally:
        s3.ignore_conditions = False
    assert not store._backend.info(store._path(".tmp-probe"))
    assert list(store._backend.walk(store._root)) == []


def test_a_protocol_without_conditional_put_is_refused(tmp_path: Path) -> None:
    """A filesystem whose create mode only looks before it overwrites is refused, with what to use instead."""
    with pytest.raises(StoreError, match="s3://"):
        Store.at("http://127.0.0.1:9/d").probe_create_only()


# The probe


def test_the_probe_leaves_nothing_behind(store: Store, tmp_path: Path) -> None:
    """A store that passes is as it was before, down to the directories."""
    store.probe_create_only()
    assert list(store._backend.walk(store._root)) == []
    assert list(tmp_path.iterdir()) == []


def test_the_probe_keeps_what_was_there(store: Store) -> None:
    """Files that stand in the store before the probe stand there after it."""
    store.create("keep", b"1")
    store.probe_create_only()
    assert names(store) == ["keep"]


def test_the_probe_says_what_to_do_about_an_unwritable_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory without write permission is a usage error that asks for the permission."""

    def refuse(*args: object, **kwargs: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store_backends.os, "open", refuse)
    with pytest.raises(UsageError, match="write permission") as caught:
        Store.at(str(tmp_path)).probe_create_only()
    assert str(tmp_path) in str(caught.value)


def test_the_probe_says_what_to_do_about_a_file_in_the_way(tmp_path: Path) -> None:
    """A path whose parent is a file is a usage error that says so."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="a file is in the way"):
        Store.at(str(tmp_path / "file" / "out")).probe_create_only()


def test_the_probe_says_what_to_do_about_a_missing_bucket(s3: S3Server) -> None:
    """A bucket that does not exist is a usage error that asks to create it."""
    with pytest.raises(UsageError, match="create the bucket"):
        Store.at("s3://no-such-bucket-here/out", s3.options).probe_create_only()


# Local durability


def test_a_torn_write_is_never_seen(tmp_path: Path) -> None:
    """What a killed writer leaves is a temporary file: no listing shows it and the name is still free."""
    store = Store.at(str(tmp_path))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / ".tmp-0123").write_bytes(b"half of a se")
    assert store.list() == []
    assert store.create("d/segment", b"whole segment") is True
    assert names(store) == ["d/segment"]


def test_a_failed_write_leaves_neither_name_nor_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails at fsync leaves no file under the name, and no temporary one."""

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_backends.os, "fsync", fail)
    with pytest.raises(StoreError, match="No space left"):
        Store.at(str(tmp_path)).create("name", b"content")
    assert list(tmp_path.iterdir()) == []


def test_durable_writes_sync_the_file_and_every_directory_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A durable create syncs the content before its name is made, and the directories after; scratch syncs nothing."""
    synced: list[str] = []
    real = os.fsync

    def record(handle: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{handle}").readlink()).removeprefix(str(tmp_path)))
        real(handle)

    monkeypatch.setattr(store_backends.os, "fsync", record)
    store = Store.at(str(tmp_path))
    store.create("scratch/spill", b"x", durable=False)
    assert synced == []
    store.create("a/b/segment", b"x")
    assert {"", "/a", "/a/b"} <= set(synced)
    assert synced[-1] == "/a/b"
    assert synced[-2].startswith("/a/b/.tmp-")


def test_replace_swaps_whole_content(store: Store) -> None:
    """A replaced file holds the new content, whether it was there or not, and no temporary file remains."""
    store.replace("heartbeat", b"1")
    before = store.list()
    store.replace("heartbeat", b"22")
    assert store.read("heartbeat") == b"22"
    assert names(store) == ["heartbeat"]
    assert store.list() != before


# Reading and listing


def test_reads(store: Store) -> None:
    """Whole, by range, past the end, by pyarrow file, and the size."""
    store.create("f", b"0123456789")
    assert store.read_range("f", 2, 5) == b"234"
    assert store.read_range("f", 8, 20) == b"89"
    assert store.read_range("f", 5, 5) == b""
    assert store.size("f") == 10
    assert store.exists("f")
    with store.open_input("f") as file:
        file.seek(4)
        assert file.read(3) == b"456"


@pytest.mark.parametrize("how", ["read", "size", "open_input"])
def test_a_missing_file_is_not_there(store: Store, how: str) -> None:
    """Reading a missing name raises NotThere, a StoreError and FileNotFoundError that pickles, and names the URL."""
    with pytest.raises(NotThere, match="missing does not exist") as caught:
        getattr(store, how)("missing")
    assert isinstance(caught.value, StoreError)
    assert isinstance(caught.value, FileNotFoundError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301
    assert not store.exists("missing")


def test_listing_is_recursive_sorted_and_relative(store: Store) -> None:
    """Names come sorted, relative to the store asked, with a prefix as plain text; a missing directory has none."""
    for name in ("b/2", "b/10", "a", "b-side/1", "c/d/e"):
        store.create(name, name.encode())
    assert names(store) == ["a", "b-side/1", "b/10", "b/2", "c/d/e"]
    assert names(store, "b/") == ["b/10", "b/2"]
    assert names(store, "b") == ["b-side/1", "b/10", "b/2"]
    assert names(store, "b/1") == ["b/10"]
    assert names(store.child("c", "d")) == ["e"]
    assert store.child("nothing").list() == []
    assert store.list("nothing/at/all") == []
    assert [entry.size for entry in store.list("c/")] == [5]


def test_versions_tell_changes(store: Store) -> None:
    """An entry's version is the same in a listing and a look-up, and changes with the content."""
    store.replace("f", b"one")
    first = store.info("f")
    assert isinstance(first, Entry)
    assert store.list() == [first]
    store.replace("f", b"two")
    second = store.info("f")
    assert second is not None
    assert second.version != first.version


def test_listings_see_other_writers(s3: S3Server) -> None:
    """A listing is never from a cache: what another process put since is in it."""
    import boto3

    bucket = s3.bucket()
    store = Store.at(f"s3://{bucket}/d", s3.options)
    assert store.list() == []
    boto3.client("s3", endpoint_url=s3.endpoint_url).put_object(Bucket=bucket, Key="d/x", Body=b"1")
    assert names(store) == ["x"]
    assert store.exists("x")


def test_deleting(store: Store) -> None:
    """Files and trees go, missing ones are no error, neighbours stay."""
    for name in ("a/1", "a/b/2", "ab/3", "c[1]/4"):
        store.create(name, b"x")
    store.delete("a/1")
    store.delete("a/1")
    assert names(store) == ["a/b/2", "ab/3", "c[1]/4"]
    store.delete_tree("a")
    store.delete_tree("a")
    assert names(store) == ["ab/3", "c[1]/4"]
    store.delete_tree()
    store.delete_tree()
    assert store.list() == []


def test_deleting_a_whole_bucket_keeps_the_bucket(s3: S3Server) -> None:
    """A store at the root of a bucket deletes what is in it, not the bucket."""
    store = Store.at(f"s3://{s3.bucket()}", s3.options)
    store.create("x", b"1")
    store.delete_tree()
    assert store.create("x", b"2") is True


# Names, URLs, secrets


@pytest.mark.parametrize("part", ["", "..", "a/../b", "/etc", "a//b", ".", "a/./b", "nul\0"])
def test_names_cannot_leave_the_store(store: Store, part: str) -> None:
    """A part that is empty, absolute or climbs is refused by child and by every name."""
    with pytest.raises(StoreError, match="relative name"):
        store.child(part)
    with pytest.raises(StoreError, match="relative name"):
        store.create(part, b"x")


@given(st.lists(st.text(string.ascii_letters + string.digits + "=_-. ", min_size=1), min_size=1, max_size=4))
def test_children_are_paths_below(parts: list[str]) -> None:
    """Whatever parts are accepted, the child's URL is the parent's with the parts behind it."""
    store = Store.at("/data/out")
    try:
        child = store.child(*parts)
    except StoreError:
        assert any(part in {".", ".."} for part in parts)
    else:
        assert child.url == "/data/out/" + "/".join(parts)
        assert os.path.abspath(child.url) == child.url  # noqa: PTH100


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path, a file URL and an absolute path to one place are one store, with a plain path for URL."""
    monkeypatch.chdir(tmp_path)
    stores = {Store.at("out/"), Store.at("./x/../out"), Store.at(f"file://{tmp_path}/out"), Store.at(f"{tmp_path}/out")}
    assert [store.url for store in stores] == [f"{tmp_path}/out"]
    assert all(store.is_local for store in stores)


def test_of_file_splits_directory_and_name(tmp_path: Path) -> None:
    """A file's URL gives the store of its directory and its name there."""
    store, name = Store.of_file(str(tmp_path / "a.parquet"))
    assert (store.url, name) == (str(tmp_path), "a.parquet")
    store, name = Store.of_file("memory://a.parquet")
    store.replace(name, b"x")
    assert Store.at("memory://").read("a.parquet") == b"x"
    store.delete(name)
    with pytest.raises(StoreError, match="names no file"):
        Store.of_file("s3://bucket")


def test_a_store_pickles_without_connection_or_credential(store: Store, s3: S3Server) -> None:
    """A store comes back equal from a pickle that holds neither a filesystem nor a key, and works."""
    store.create("x", b"1")
    pickled = pickle.dumps(store)
    assert b"testing" not in pickled
    assert b"FileSystem" not in pickled
    again = pickle.loads(pickled)  # noqa: S301
    assert again == store
    assert hash(again) == hash(store)
    assert again.read("x") == b"1"


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:hunter2@bucket/x",
        "https://user:hunter2@host/x",
        "https://host/x.parquet?X-Amz-Signature=hunter2",
        "https://host/x?sv=1&sig=hunter2",
        "abfs://c@account/x?sas_token=hunter2",
    ],
)
def test_a_secret_in_a_url_is_refused_unprinted(url: str) -> None:
    """A password or a signed query in a URL is a configuration error that does not repeat it."""
    with pytest.raises(ConfigError, match="environment") as caught:
        Store.at(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"key": "hunter2"},
        {"secret": "hunter2"},
        {"token": "hunter2"},
        {"client_kwargs": {"aws_secret_access_key": "hunter2"}},
        {"account_key": "hunter2"},
        {"endpoint_url": "http://user:hunter2@127.0.0.1"},
    ],
)
def test_a_secret_in_the_options_is_refused_unprinted(options: dict[str, object]) -> None:
    """A credential among the storage options is a configuration error that names its key alone."""
    with pytest.raises(ConfigError, match=r"storage\.s3\.") as caught:
        Store.at("s3://bucket/x", {"s3": options})
    assert "hunter2" not in str(caught.value)


def test_harmless_options_pass() -> None:
    """Endpoints, anonymous access and named credential sources are no secrets; other protocols' options are unread."""
    Store.at("s3://b/x", {"s3": {"endpoint_url": "http://127.0.0.1:9000", "anon": True}, "gs": {"key": "elsewhere"}})
    Store.at("gs://b/x", {"gs": {"token": "google_default", "project": "p"}})
    assert Store.at("s3a://b/x") == Store.at("s3://b/x/")


@pytest.mark.parametrize(
    ("url", "say"), [("s4://b/x", "did you mean 's3'"), ("zip://a::s3://b", "plain URL"), ("", "empty")]
)
def test_a_wrong_url_is_explained(url: str, say: str) -> None:
    """An unknown protocol, a chained URL and an empty one are configuration errors that say what would be right."""
    with pytest.raises(ConfigError, match=say):
        Store.at(url)


def test_a_failing_store_is_a_store_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a library raises arrives as one StoreError with the URL, its query strings cut off."""
    store = Store.at("memory://m")
    monkeypatch.setattr(
        store_backends.RemoteBackend, "read", lambda *_: (_ for _ in ()).throw(RuntimeError("u?sig=1 x"))
    )
    with pytest.raises(StoreError, match="cannot read memory://m/x: RuntimeError: u x"):
        store.read("x")
