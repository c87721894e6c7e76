"""Dispatch: what was about to be sent is in the books, whatever cut its shift short."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bidbeam.connectors import store_backends
from bidbeam.connectors.engine import RESULT_SCHEMA
from bidbeam.connectors.pools import Meter, PriceSchedule
from bidbeam.connectors.store import Store
from bidbeam.pipelines.earlier import look_at, take_over
from bidbeam.pipelines.progress import NullProgress
from bidbeam.pipelines.watch import Watch
from bidbeam.transforms import dispatch
from bidbeam.transforms.booking import _settled_once
from bidbeam.transforms.heartbeat import SoFar, name_of, so_far, why_down
from bidbeam.transforms.journal import list_segments, read_segment, write_segment
from bidbeam.transforms.run_context import RunContext
from bidbeam.transforms.settling import Terms, settle

AT = datetime(2026, 1, 2, 3, tzinfo=UTC)
START, SHIFT = "start-001", "r001-s000"


def terms(pool: str = "near", **prices: str) -> Terms:
    meters: dict[Meter, Decimal] = {
        name: Decimal(price)  # type: ignore[misc]  # names of meters
        for name, price in (prices or {"uncached_input": "1E-7", "output": "4E-7"}).items()
    }
    return Terms(pool, "tiny", PriceSchedule(f"price-{pool}", pool, meters))


def requests(*tags: int) -> pa.RecordBatch:
    """What a shift hands to an engine, as settling takes it: 10 tokens in, at most 2 x 8 out."""
    n = len(tags)
    return pa.RecordBatch.from_pydict(
        {
            "tag": pa.array(tags, pa.int64()),
            "key": pa.array([tag.to_bytes(16, "little") for tag in tags], pa.binary(16)),
            "attempt_id": pa.array([(tag + 1).to_bytes(16, "big") for tag in tags], pa.binary(16)),
            "request_id": pa.array([f"q{tag}" for tag in tags]),
            "lot_id": pa.array(["s1-r00000-l00000"] * n).dictionary_encode(),
            "round": pa.array([1] * n, pa.int16()),
            "attempt_no": pa.array([1] * n, pa.int16()),
            "kind": pa.array(["primary"] * n).dictionary_encode(),
            "input_tokens": pa.array([10] * n, pa.int32()),
            "tokens_exact": pa.array([True] * n),
            "max_tokens": pa.array([8] * n, pa.int32()),
            "n": pa.array([2] * n, pa.int16()),
        }
    )


def answers(*tags: int) -> pa.RecordBatch:
    rows = [
        {
            "tag": tag, "status": "ok", "output": "yes", "input_tokens": 9, "output_tokens": 3,
            "usage_source": "reported", "started_at": AT, "finished_at": AT,
        }
        for tag in tags
    ]  # fmt: skip
    return pa.RecordBatch.from_pylist(rows, RESULT_SCHEMA)


def write(
    journal: Store, number: int, *tags: int, of: Terms | None = None, shift: str = SHIFT, try_: int = 0, ms: int = 0
) -> None:
    name = f"{dispatch.directory(START)}/{shift}-t{try_:02d}-{number:06d}.arrow"
    dispatch.write_dispatch(journal, name, requests(*tags), of or terms(), ms)


def journal_answers(journal: Store, number: int, *tags: int) -> None:
    rows = settle(requests(*tags), answers(*tags), terms(), accelerator_ms=None)
    write_segment(journal, f"{START}/segments/{SHIFT}", number, pa.Table.from_batches([rows]), [terms()])


def lost(journal: Store) -> pa.Table:
    tables = [read_segment(journal, name)[0] for name in list_segments(journal)]
    rows = pa.concat_tables(tables)
    return rows.filter(pc.equal(rows.column("status").cast(pa.string()), "lost"))


def test_a_record_tells_what_went_out_under_which_terms(tmp_path: Path) -> None:
    """Requests, terms, time and unpaid loading come back as they were written."""
    journal = Store.at(str(tmp_path))
    write(journal, 1, 3, 4, of=terms("own", accelerator_second="0.0002"), ms=1234)
    record = dispatch.read_dispatch(journal, f"{dispatch.directory(START)}/{SHIFT}-t00-000001.arrow")
    assert record.requests.equals(requests(3, 4))
    assert (record.terms, record.setup_ms) == (terms("own", accelerator_second="0.0002"), 1234)
    assert abs(datetime.now(UTC) - record.at) < timedelta(minutes=1)


@pytest.mark.parametrize("ended", [None, 1])
def test_who_only_looks_finds_what_the_next_start_would(tmp_path: Path, ended: int | None) -> None:
    """A quote counts what was in flight as spent, leaves out what an ended start has booked, and writes nothing."""
    journal = Store.at(str(tmp_path))
    write(journal, 1, 3, 4, 5)
    journal_answers(journal, 0, 3)
    journal.create("seed", b"0123456789abcdef")
    manifest = None if ended is None else {"starts": ended, "cost": "0.25"}
    before = journal.list()
    seen = look_at(journal, manifest)
    assert journal.list() == before
    assert seen == take_over(journal, manifest, "run-1")
    # 9 in and 3 out; twice 10 in and 16 out.
    spent = (9 + 4 * 3 + 2 * (10 + 4 * 16)) * Decimal("1e-7")
    assert (seen.start, seen.spent, seen.seed) == (2, spent if ended is None else Decimal("0.25"), 0x0123456789ABCDEF)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 40), unique=True, min_size=1), st.data())
def test_what_was_dispatched_and_not_settled_is_lost_once(
    tmp_path_factory: pytest.TempPathFactory, tags: list[int], data: st.DataObject
) -> None:
    """Each of these, and nothing else, is booked at its worst case, however often one asks."""
    journal = Store.at(str(tmp_path_factory.mktemp("journal")))
    cut = data.draw(st.integers(0, len(tags)))
    for number, part in enumerate((tags[:cut], tags[cut:])):
        if part:
            write(journal, number, *part)
    settled = data.draw(st.lists(st.sampled_from(tags), unique=True))
    if settled:
        journal_answers(journal, 0, *settled)
    booked = list(dispatch.book_open(journal, START))
    open_ = sorted(set(tags) - set(settled))
    assert len(booked) == (1 if open_ else 0)
    if open_:
        rows = lost(journal)
        assert sorted(rows.column("tag").to_pylist()) == open_
        assert set(rows.column("cost").to_pylist()) == {Decimal(10) * Decimal("1E-7") + 16 * Decimal("4E-7")}
        assert set(rows.column("usage_source").to_pylist()) == {"estimate"}
        assert booked[0].cost == len(open_) * rows.column("cost")[0].as_py()
    assert list(dispatch.book_open(journal, START)) == []


def test_what_was_written_down_for_two_pools_is_lost_at_the_last(tmp_path: Path) -> None:
    """A lot that was led around a pool before it was sent there is booked once, under the terms it went out under."""
    journal = Store.at(str(tmp_path))
    write(journal, 1, 1, 2, 3)
    write(journal, 2, 2, 3, of=terms("far", uncached_input="2E-7", output="4E-7"))
    (booked,) = dispatch.book_open(journal, START)
    rows = lost(journal).to_pylist()
    assert sorted((row["tag"], row["pool"]) for row in rows) == [(1, "near"), (2, "far"), (3, "far")]
    assert booked.cost == sum(row["cost"] for row in rows) == Decimal("50E-7") + 48 * Decimal("4E-7")


def test_what_is_lost_of_an_estimated_prompt_is_booked_at_what_it_may_have_been(tmp_path: Path) -> None:
    """A token for every byte, and a chat template: as much as its award reserved for it."""
    journal = Store.at(str(tmp_path))
    estimated = requests(1).set_column(
        requests(1).schema.get_field_index("tokens_exact"), "tokens_exact", pa.array([False])
    )
    dispatch.write_dispatch(journal, f"{START}/dispatched/{SHIFT}-t00-000001.arrow", estimated, terms())
    (booked,) = dispatch.book_open(journal, START)
    assert booked.cost == (4 * 10 + 64) * Decimal("1E-7") + 16 * Decimal("4E-7")


def test_a_shift_that_ended_has_nothing_open(tmp_path: Path) -> None:
    """Its marker says so, and saying it twice does no harm; another shift's records are that shift's."""
    journal = Store.at(str(tmp_path))
    write(journal, 1, 1, 2)
    write(journal, 1, 7, shift="r001-s001")
    for _ in range(2):
        dispatch.close(journal, START, SHIFT)
    assert list(dispatch.book_open(journal, START, [SHIFT])) == []
    assert [segment.rows for segment in dispatch.book_open(journal, START)] == [1]
    assert lost(journal).column("tag").to_pylist() == [7]


def test_what_is_about_to_be_sent_and_what_was_answered_outlive_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dispatch records and segments are synced to the disk before anybody goes on, whatever scratch is not."""
    kept: dict[str, bool] = {}
    real = store_backends.LocalBackend.create

    def create(self: store_backends.LocalBackend, path: str, data: bytes, *, durable: bool) -> None:
        kept[Path(path).name] = durable
        real(self, path, data, durable=durable)

    monkeypatch.setattr(store_backends.LocalBackend, "create", create)
    journal = Store.at(str(tmp_path))
    write(journal, 1, 3, 4)
    journal_answers(journal, 0, 3)
    assert kept == {f"{SHIFT}-t00-000001.arrow": True, f"{SHIFT}-000000.arrow": True}


def test_a_torn_record_let_nothing_through(tmp_path: Path) -> None:
    """One that was not written whole is passed over, the others count."""
    journal = Store.at(str(tmp_path))
    write(journal, 1, 1)
    write(journal, 2, 2)
    path = tmp_path / dispatch.directory(START) / f"{SHIFT}-t00-000002.arrow"
    content = path.read_bytes()
    for torn in (content[: len(content) // 2], b"", b"ARROW1"):
        path.unlink()
        path.write_bytes(torn)
        for segment in list_segments(journal):
            journal.delete(segment)
        assert [segment.rows for segment in dispatch.book_open(journal, START)] == [1]


def test_tries_are_counted_by_shift(tmp_path: Path) -> None:
    """The next try of a bundle takes the next number, whatever other shifts did."""
    journal = Store.at(str(tmp_path))
    assert dispatch.tries(journal, START, SHIFT) == 0
    write(journal, 1, 1)
    write(journal, 1, 1, try_=2)
    write(journal, 1, 9, shift="r001-s0001", try_=7)
    assert dispatch.tries(journal, START, SHIFT) == 3
    assert dispatch.tries(journal, "start-002", SHIFT) == 0


def test_pools_are_booked_each_under_its_own_terms(tmp_path: Path) -> None:
    """One shift drives several pools: what each lost costs what each asks."""
    journal = Store.at(str(tmp_path))
    write(journal, 1, 1, of=terms("near"))
    write(journal, 2, 2, of=terms("far", uncached_input="2E-7", output="8E-7"))
    (segment,) = dispatch.book_open(journal, START)
    _, by_price = read_segment(journal, segment.name)
    costs = {row["pool"]: row["cost"] for row in lost(journal).to_pylist()}
    assert set(by_price) == {"price-near", "price-far"}
    assert costs["far"] == 2 * costs["near"]


def test_time_is_booked_to_the_last_sign_of_life(tmp_path: Path) -> None:
    """A pool paid by time lost its seconds: from the first dispatch to the last heartbeat, and what loading took."""
    journal = Store.at(str(tmp_path))
    write(journal, 1, 1, 2, of=terms("own", accelerator_second="0.001"), ms=5000)
    began = dispatch.read_dispatch(journal, f"{dispatch.directory(START)}/{SHIFT}-t00-000001.arrow").at
    beat = {"at": (began + timedelta(seconds=7)).isoformat(), "pools": []}
    journal.create(f"{START}/{name_of(SHIFT)}", json.dumps(beat).encode())
    (segment,) = dispatch.book_open(journal, START)
    assert segment.cost == Decimal("0.012")
    assert pc.sum(lost(journal).column("q_accelerator_second")).as_py() == Decimal("12.000")


def test_what_came_back_after_all_is_booked_as_settled(tmp_path: Path) -> None:
    """An attempt that was given up for lost while its worker went on is one attempt in the ledger, with its answer."""
    journal = Store.at(str(tmp_path))
    write(journal, 1, 1, 2)
    list(dispatch.book_open(journal, START))
    journal_answers(journal, 5, 2)
    rows = pa.concat_tables([read_segment(journal, name)[0] for name in list_segments(journal)])
    once = _settled_once(rows)
    assert {row["tag"]: row["status"] for row in once.to_pylist()} == {1: "lost", 2: "ok"}


def test_pools_are_known_by_how_they_fared_in_the_rounds_before(tmp_path: Path) -> None:
    """Counts add up over rounds and workers; down is who was down at the last, on all workers; a torn beat is none."""
    scratch = Store.at(str(tmp_path))

    def beat(prefix: str, **pools: tuple[int, int, str | None]) -> None:
        rows = [{"pool": name, "settled": ok, "failed": bad, "down": why} for name, (ok, bad, why) in pools.items()]
        scratch.create(name_of(prefix), json.dumps({"at": AT.isoformat(), "pools": rows}).encode())

    beat("r001-s000", near=(5, 1, None), far=(0, 9, "gone"))
    beat("r001-s001", near=(4, 0, "gone"))
    beat("r002-s000", near=(1, 1, "gone"), late=(2, 0, None))
    beat("r003-s000", near=(7, 7, None))
    scratch.create(name_of("r002-s001"), b"{")
    assert so_far(scratch, 2) == {"near": SoFar(9, 1, False, 1), "far": SoFar(0, 9, True, 1)}
    assert {name: pool.down for name, pool in so_far(scratch, 3).items()} == {"near": True, "far": True, "late": False}
    assert so_far(scratch, 4)["near"] == SoFar(17, 9, False, 3)
    assert so_far(scratch, 1) == {}
    rows = [{"pool": "near", "settled": 0, "failed": 1, "down": "from elsewhere"}]
    scratch.create(name_of("r004-s000"), json.dumps({"at": AT.isoformat(), "pools": rows}).encode())
    assert so_far(scratch, 5)["near"] == SoFar(17, 10, True, 4)


class Heard(NullProgress):
    """Keeps what people are told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_why_a_pool_was_down_is_told_once_and_kept_for_the_end(tmp_path: Path) -> None:
    """An engine names its pool itself; one that is up elsewhere or again, or that ended after its work, is not told."""
    scratch = Store.at(str(tmp_path))

    def beat(prefix: str, **pools: tuple[int, int, str | None]) -> None:
        counts = ("in_flight", "input_tokens", "cached_tokens", "output_tokens", "ideal_cached_tokens")
        rows = [
            {"pool": name, "settled": ok, "failed": bad, "down": why, "cost": "0", **dict.fromkeys(counts, 0)}
            for name, (ok, bad, why) in pools.items()
        ]
        scratch.create(name_of(prefix), json.dumps({"at": AT.isoformat(), "pools": rows}).encode())

    beat("r001-s000", far=(0, 2, "pool far at host is down: 401"), half=(3, 1, "gone"), node=(9, 0, "given back"))
    beat("r001-s001", half=(4, 0, None), back=(0, 1, "gone"), never=(0, 0, "no node to be had"))
    beat("r002-s000", back=(5, 0, None))
    assert why_down(scratch) == {"far": "pool far at host is down: 401", "never": "no node to be had"}
    context = SimpleNamespace(scratch=scratch, rows=1, spent=Decimal(0), max_cost=None)
    watch = Watch(cast(RunContext, context), heard := Heard())
    watch.snapshot()
    watch.snapshot()
    assert sorted(heard.notes) == [
        "pool back is down: gone",
        "pool far at host is down: 401",
        "pool half is down: gone",
        "pool never is down: no node to be had",
        "pool node is down: given back",
    ]
