"""The journal: segments that are written once, read range by range, and survive what else lies about."""

from __future__ import annotations

import logging
import random
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bidbeam.connectors.checksums import check_bytes
from bidbeam.connectors.money import sum_decimal
from bidbeam.connectors.pools import Meter, PriceSchedule
from bidbeam.connectors.schemas import SEGMENT
from bidbeam.connectors.store import Store
from bidbeam.transforms.journal import (
    OVERHEAD,
    list_segments,
    read_rows,
    read_segment,
    segment_ref,
    sound_segments,
    terms_from_json,
    terms_to_json,
    write_segment,
)
from bidbeam.transforms.settling import Terms

AT = datetime(2026, 1, 2, tzinfo=UTC)
PREFIX = "start-001/segments/r1-s000"


def terms(pool: str = "near", price: str = "0.000000100000000", **keys: object) -> Terms:
    prices: dict[Meter, Decimal] = {"uncached_input": Decimal(price), "output": Decimal("4E-7")}
    return Terms(pool, "tiny", PriceSchedule(f"price-{pool}", pool, prices), **keys)  # type: ignore[arg-type]


def segment(tags: list[int | None], pool: str = "near") -> pa.Table:
    rows = [
        {
            "tag": tag,
            "key": (tag or 0).to_bytes(16, "big"),
            "pool": pool,
            "status": "ok",
            "output": f"answer {tag}",
            "price_id": f"price-{pool}",
            "cost": Decimal("0.000000000000000001"),
            "kind": "overhead" if tag is None else "primary",
        }
        for tag in tags
    ]
    return pa.Table.from_pylist(rows, SEGMENT)


@pytest.fixture
def journal(tmp_path: Path) -> Store:
    return Store.at(str(tmp_path / "journal"))


@given(st.lists(st.one_of(st.none(), st.tuples(st.integers(0, 4), st.integers(0, 2**31))), min_size=1, max_size=20))
def test_a_segment_gives_each_range_its_own_rows(places: list[tuple[int, int] | None]) -> None:
    """Rows of any ranges in any order, overhead among them, come back range by range, whole and in their order."""
    tags = [None if place is None else place[0] << 32 | place[1] for place in places]
    store = Store.at(f"memory://journal-{abs(hash(tuple(tags)))}")
    store.delete_tree()
    ref = write_segment(store, PREFIX, 0, segment(tags), [terms()])
    assert ref == segment_ref(store, ref.name)
    assert ref.rows == len(tags)
    assert list(ref.ranges) == sorted({OVERHEAD if tag is None else tag >> 32 for tag in tags})
    for range_ in (OVERHEAD, 0, 1, 2, 3, 4):
        here, of_these = read_rows(store, [ref], range_)
        assert of_these == ({"price-near": terms()} if range_ in ref.ranges else {})
        assert here.column("tag").to_pylist() == [
            tag for tag in tags if (OVERHEAD if tag is None else tag >> 32) == range_
        ]
    rows, agreed = read_segment(store, ref.name)
    assert sum_decimal(rows.column("cost")) == ref.cost == len(tags) * Decimal("1E-18")
    assert agreed == {"price-near": terms()}


def test_terms_survive_the_journal_exactly() -> None:
    """Prices to the last place, exchange rate, dates and labels come back as they were agreed."""
    agreed = Terms(
        "near",
        "tiny",
        PriceSchedule("p", "near", {"uncached_input": Decimal("0.000000100000000")}, "EUR", AT, "a list"),
        Decimal("1.083512345678901234"),
        "the bank",
        AT,
        "DE",
        "own",
    )
    back = terms_from_json(terms_to_json(agreed))
    assert back == agreed
    assert str(back.fx_rate) == str(agreed.fx_rate)


def test_a_taken_number_is_passed_over(journal: Store) -> None:
    """Two tries of one bundle never overwrite each other: the second takes the next free number."""
    first = write_segment(journal, PREFIX, 0, segment([1]), [terms()])
    same = write_segment(journal, PREFIX, 0, segment([1]), [terms()])
    other = write_segment(journal, PREFIX, 0, segment([2]), [terms()])
    assert first.name == same.name == f"{PREFIX}-000000.arrow"
    assert other.name == f"{PREFIX}-000001.arrow"


def test_pools_of_one_segment_keep_their_own_terms(journal: Store) -> None:
    """Rows of several pools in one segment find the terms that each was charged under."""
    both = pa.concat_tables([segment([1], "near"), segment([2], "far")])
    ref = write_segment(journal, PREFIX, 0, both, [terms("near"), terms("far", "0.000000200000000")])
    rows, agreed = read_segment(journal, ref.name)
    assert [agreed[price].pool for price in rows.column("price_id").to_pylist()] == rows.column("pool").to_pylist()


def test_a_segment_of_before_a_column_was_added_is_read(journal: Store) -> None:
    """A run that was begun by an earlier version goes on: what its segments lack is NULL."""
    sound = write_segment(journal, PREFIX, 0, segment([1, 2]), [terms()])
    with journal.open_input(sound.name) as source:
        reader = pa.ipc.open_file(source)
        older = reader.read_all().drop_columns(["model_returned", "other_model", "cache_write_tokens"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, older.schema) as writer:
        writer.write_table(older)
    journal.create(f"{PREFIX}-000001.arrow", sink.getvalue())
    found = sound_segments(journal)
    assert len(found) == 2
    for ref in found:
        rows, agreed = read_segment(journal, ref.name)
        assert rows.schema.equals(SEGMENT)
        assert (rows.column("tag").to_pylist(), list(agreed)) == ([1, 2], [terms().price.price_id])
    both, _ = read_rows(journal, found, 0)
    assert both.column("model_returned").to_pylist() == [None] * 4


def test_damaged_and_foreign_files_are_no_segments(journal: Store, caplog: pytest.LogCaptureFixture) -> None:
    """A torn segment is set aside with a warning, another program's file is not looked at; the sound ones count."""
    sound = write_segment(journal, PREFIX, 0, segment([1, 2]), [terms()])
    whole = journal.read(sound.name)
    torn = f"{PREFIX}-000001.arrow"
    journal.create(torn, whole[: len(whole) // 2])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, pa.schema([("x", pa.int8())])) as writer:
        writer.write_table(pa.table({"x": pa.array([1], pa.int8())}))
    journal.create(f"{PREFIX}-000002.arrow", sink.getvalue())
    journal.create("start-001/segments/notes.txt", b"remember the milk")
    journal.create("start-001/segments/mine.arrow", b"ARROW1")
    with caplog.at_level(logging.WARNING):
        assert sound_segments(journal) == [sound]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert list_segments(journal) == [sound.name]
    assert journal.read(f"{torn}.damaged") == whole[: len(whole) // 2]
    assert journal.exists("start-001/segments/notes.txt")
    assert sound_segments(journal) == [sound]


def test_a_changed_segment_is_set_aside(journal: Store, caplog: pytest.LogCaptureFixture) -> None:
    """A bit that turned where it lies, in an answer, a price or the footer, is not taken for what was written."""
    ref = write_segment(journal, PREFIX, 0, segment([1, 2, 2**33]), [terms()])
    whole, chance = journal.read(ref.name), random.Random(1)
    check_bytes(whole)
    for at in [*chance.sample(range(len(whole)), 60), *range(len(whole) - 120, len(whole))]:
        changed = bytearray(whole)
        changed[at] ^= 1 << chance.randrange(8)
        with pytest.raises((ValueError, KeyError, pa.ArrowException, OSError)):
            check_bytes(bytes(changed))
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        with pytest.raises((ValueError, pa.ArrowException)):
            check_bytes(whole[:cut])
    journal.replace(ref.name, bytes(changed))
    with caplog.at_level(logging.WARNING):
        assert sound_segments(journal) == []
    assert "is damaged" in caplog.text
    assert journal.read(f"{ref.name}.damaged") == bytes(changed)
    # Under the same name once more, now an empty file.
    assert write_segment(journal, PREFIX, 0, segment([1]), [terms()]).name == ref.name
    journal.replace(ref.name, b"")
    assert sound_segments(journal) == []


def test_an_answer_is_never_dictionary_encoded(journal: Store) -> None:
    """Dictionaries of one file are one a column, however the pieces came, and answers stay plain text."""
    pieces = pa.concat_tables([segment([n], f"pool-{n}") for n in range(5)])
    ref = write_segment(journal, PREFIX, 0, pieces, [terms(f"pool-{n}") for n in range(5)])
    rows, agreed = read_segment(journal, ref.name)
    assert rows.schema.equals(SEGMENT)
    assert pc.unique(rows.column("pool").cast(pa.string())).to_pylist() == [f"pool-{n}" for n in range(5)]
    assert len(agreed) == 5
