from __future__ import annotations

import io
import json
import pickle
import uuid
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from s3_server import S3Server, s3

from bidbeam.connectors import input_lines
from bidbeam.connectors.errors import ConfigError, InputError
from bidbeam.connectors.inputs import BAD, InputPlan, is_json_text, is_openai_batch, plan_input, read_split
from bidbeam.connectors.store import Store

__all__ = ["s3"]


def parquet_bytes(table: pa.Table, rows: int = 3) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=max(1, rows))
    return sink.getvalue()


def arrow_bytes(table: pa.Table, rows: int = 3, stream: bool = False, **options: Any) -> bytes:
    sink = io.BytesIO()
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=max(1, rows))
    return sink.getvalue()


def stream_bytes(table: pa.Table, rows: int = 3) -> bytes:
    return arrow_bytes(table, rows, stream=True)


def jsonl_bytes(rows: Sequence[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def read_all(plan: InputPlan, storage: dict[str, dict[str, Any]] | None = None) -> pa.Table:
    """All splits' rows, checked on the way to be what the plan says: row counts, row numbers, one chunk a column."""
    expected: dict[str, int] = {file.url: 0 for file in plan.files}
    tables = []
    for index, split in enumerate(plan.splits):
        assert split.index == index
        assert split.row_start == expected[split.file]
        assert split.rows > 0
        expected[split.file] += split.rows
        table = read_split(split, plan.schema, storage)
        assert table.num_rows == split.rows
        assert all(column.num_chunks <= 1 for column in table.columns)
        tables.append(table)
    assert expected == {file.url: file.rows for file in plan.files}
    assert plan.rows == sum(expected.values())
    return pa.concat_tables(tables) if tables else plan.schema.empty_table()


TABLE = pa.table(
    {
        "id": pa.array(range(10), pa.int64()),
        "prompt": pa.array([f"prompt {i}" for i in range(10)], pa.large_string()),
        "label": pa.array(["a", "b", None, "a", "c"] * 2).dictionary_encode(),
        "nothing": pa.nulls(10),
        "messages": pa.array(
            [[{"role": "user", "content": f"é{i}"}] for i in range(9)] + [None],
            pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
        ),
        "price": pa.array([Decimal(i) / 4 for i in range(10)], pa.decimal128(10, 2)),
        "at": pa.array(range(10), pa.timestamp("us", "UTC")),
        "raw": pa.array([b"\xff\x00"] * 10),
    }
)
ENCODERS: dict[str, Callable[[pa.Table], bytes]] = {
    "x.parquet": parquet_bytes,
    "x.arrow": arrow_bytes,
    "x.feather": arrow_bytes,
    "x.ipc": stream_bytes,
}


# What is read


@pytest.mark.parametrize("name", ENCODERS)
def test_columns_survive_unchanged(tmp_path: Path, name: str) -> None:
    """Nested, dictionary, large-string, null, decimal and binary columns come back with their types and values."""
    path = write(tmp_path / name, ENCODERS[name](TABLE))
    plan = plan_input([path], target_rows=4)
    assert len(plan.splits) > 1
    assert plan.schema.equals(TABLE.schema)
    table = read_all(plan)
    assert table.schema.equals(TABLE.schema)
    assert table.to_pylist() == TABLE.to_pylist()


@pytest.mark.parametrize("name", [*ENCODERS, "x.jsonl"])
@pytest.mark.parametrize("where", ["local", "memory", "s3"])
def test_every_store_and_format(request: pytest.FixtureRequest, tmp_path: Path, name: str, where: str) -> None:
    """Every format reads alike from disk, memory and S3, by glob, the options for S3 given by protocol."""
    storage: dict[str, dict[str, Any]] = {}
    if where == "local":
        store = Store.at(str(tmp_path))
    elif where == "memory":
        store = Store.at(f"memory://{uuid.uuid4().hex}")
    else:
        server: S3Server = request.getfixturevalue("s3")
        storage = server.options
        store = Store.at(f"s3://{server.bucket()}/in", storage)
    rows = [{"id": i, "prompt": f"p{i}"} for i in range(10)]
    data = jsonl_bytes(rows) if name == "x.jsonl" else ENCODERS[name](pa.Table.from_pylist(rows))
    store.create(f"day/{name}", data)
    plan = plan_input([f"{store.url}/*/x.*"], storage, target_rows=4, target_bytes=100)
    assert [file.url for file in plan.files] == [f"{store.url}/day/{name}"]
    assert len(plan.splits) > 1
    assert read_all(plan, storage).select(["id", "prompt"]).to_pylist() == rows
    store.delete_tree()


def test_dictionaries_that_change_along_a_file_are_unified(tmp_path: Path) -> None:
    """Batches with other dictionaries read right from the middle of a stream, and as one dictionary per split."""
    batches = [
        pa.record_batch({"d": pa.array(values).dictionary_encode()})
        for values in (["a", "b"], ["c", "a"], ["d", None], ["b", "d"])
    ]
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    plan = plan_input([write(tmp_path / "x.arrow", sink.getvalue())], target_rows=4)
    assert [split.rows for split in plan.splits] == [4, 4]
    assert read_all(plan).column("d").to_pylist() == ["a", "b", "c", "a", "d", None, "b", "d"]
    assert read_split(plan.splits[1], plan.schema).column("d").to_pylist() == ["d", None, "b", "d"]
    assert plan.schema.field("d").type == pa.dictionary(pa.int32(), pa.string())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("options", [{"compression": "zstd"}, {"use_legacy_format": True}])
def test_arrow_variants(tmp_path: Path, stream: bool, options: dict[str, Any]) -> None:
    """Compressed files and streams read the same, and so does the framing from before Arrow 0.15."""
    if "use_legacy_format" in options:
        options = {"metadata_version": pa.ipc.MetadataVersion.V4, **options}
    plan = plan_input([write(tmp_path / "x.arrow", arrow_bytes(TABLE, stream=stream, **options))], target_rows=3)
    assert len(plan.splits) > 2
    assert read_all(plan).to_pylist() == TABLE.to_pylist()


def test_files_without_rows_are_fine(tmp_path: Path) -> None:
    """Files of zero rows, in every format, give no splits and are listed."""
    empty = TABLE.slice(0, 0)
    for name, encode in ENCODERS.items():
        write(tmp_path / name, encode(empty))
    write(tmp_path / "x.jsonl", b"\n  \n")
    write(tmp_path / "y.jsonl", b"")
    plan = plan_input([str(tmp_path)])
    assert plan.splits == ()
    assert plan.rows == 0
    assert len(plan.files) == 6
    assert read_all(plan).schema.equals(TABLE.schema)


# Rows over splits


CELLS = st.one_of(st.none(), st.text(max_size=20).filter(lambda text: text.isprintable()))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cells=st.lists(CELLS, max_size=60),
    form=st.sampled_from(["parquet", "file", "stream", "jsonl"]),
    unit=st.integers(1, 20),
    target_rows=st.integers(1, 40),
    target_bytes=st.integers(1, 4000),
)
def test_splits_are_the_rows_in_order(
    tmp_path: Path, cells: list[str | None], form: str, unit: int, target_rows: int, target_bytes: int
) -> None:
    """For any sizes of units and splits, the splits' rows one after another are the file's rows, numbered from 0."""
    table = pa.table({"n": pa.array(range(len(cells)), pa.int64()), "text": pa.array(cells, pa.string())})
    if form == "parquet":
        path = write(tmp_path / "p.parquet", parquet_bytes(table, unit))
    elif form == "jsonl":
        path = write(tmp_path / "p.jsonl", jsonl_bytes(table.to_pylist()))
    else:
        path = write(tmp_path / "p.arrow", arrow_bytes(table, unit, stream=form == "stream"))
    plan = plan_input([path], target_rows=target_rows, target_bytes=target_bytes)
    assert plan.rows == len(cells)
    got = read_all(plan)
    if cells:
        assert got.select(["n", "text"]).to_pylist() == table.to_pylist()
        assert form != "jsonl" or got.column(BAD).null_count == len(cells)


LINES = st.one_of(
    st.sampled_from(
        ["", "  ", "\r", "\t\r", "{", "}", "[1]", "null", "3", '{"n":1}{"n":2}', '{"n":', "1}", '{"n":"x"}', "{}"]
    ),
    st.integers(-9, 9).map(lambda n: f'{{"n":{n}}}'),
    st.integers(0, 9).map(lambda n: f' {{ "n" : {n} }} \r'),
    st.text(max_size=8).filter(lambda t: "\n" not in t and not t.isascii()),
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINES, max_size=30), last=st.booleans(), chunk=st.integers(1, 64), target=st.integers(1, 200))
def test_every_line_is_one_row_or_one_bad_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], last: bool, chunk: int, target: int
) -> None:
    """Whatever the lines and wherever chunks and splits fall, each non-blank line is one row, good or bad, in order."""
    monkeypatch.setattr(input_lines, "CHUNK_BYTES", chunk)
    path = write(tmp_path / "x.jsonl", "\n".join([*lines, '{"n":0}'] + [""] * last).encode())
    plan = plan_input([path], target_bytes=target)
    got = read_all(plan)
    expected = []
    text = is_json_text(plan.schema.field("n"))
    for number, line in enumerate([*lines, '{"n":0}'], 1):
        if not line.encode().strip():
            continue
        try:
            value = json.loads(line)
            good = isinstance(value, dict)
        except ValueError:
            good = False
        expected.append((value.get("n"), None) if good else (None, number))
    assert got.num_rows == len(expected)
    for row, (value, bad) in zip(got.to_pylist(), expected, strict=True):
        found = json.loads(row["n"]) if text and row["n"] is not None else row["n"]
        assert found == value
        assert (row[BAD] is None) == (bad is None)
        assert bad is None or row[BAD].startswith(f"line {bad}: ")


# JSON Lines


def test_openai_batch_bodies_keep_their_exact_text(tmp_path: Path) -> None:
    """Batch requests come out as three text columns and the body's JSON text as it stands, whatever its shape."""
    bodies = [
        '{"model": "m",  "messages":[{"role":"user","content":"h\\u00e9 } \\" {"}], "temperature": 1.50}',
        '{"messages":[{"role":"user","content":[{"type":"text","text":"parts"}]}],"n":2,"big":123456789012345678901}',
        "{}",
    ]
    lines = [f'{{"custom_id":"r{i}", "method":"POST","url":"/v1/x","body":{body}}}' for i, body in enumerate(bodies)]
    plan = plan_input([write(tmp_path / "b.jsonl", "\n".join(lines).encode())])
    assert is_openai_batch(plan.schema)
    assert is_json_text(plan.schema.field("body"))
    table = read_all(plan)
    assert plan.schema.names == ["custom_id", "method", "url", "body"]
    assert table.column("body").to_pylist() == bodies
    assert table.column("custom_id").to_pylist() == ["r0", "r1", "r2"]


def test_openai_batch_lines_may_be_bad_incomplete_or_carry_more(tmp_path: Path) -> None:
    """In a batch file a broken line is a bad row, an absent key is null, and a key beyond the four is kept."""
    data = b"\n".join(
        [
            b'{"custom_id":"a","method":"POST","url":"/","body":{"n":1}}',
            b'{"custom_id":7,"body":{}}',
            b'{"custom_id":"b","body":null,"team":"growth"}',
            b'{"custom_id":"c","body":{"n":2}',
        ]
    )
    plan = plan_input([write(tmp_path / "b.jsonl", data)])
    table = read_all(plan)
    assert table.column("custom_id").to_pylist() == ["a", None, "b", None]
    assert table.column("body").to_pylist() == ['{"n":1}', None, None, None]
    assert table.column("team").to_pylist() == [None, None, "growth", None]
    assert [bad and bad.split(":")[0] for bad in table.column(BAD).to_pylist()] == [None, "line 2", None, "line 4"]


def test_other_tables_are_no_openai_batch() -> None:
    """Neither other columns nor a body that is not text make a batch file."""
    names = ["custom_id", "method", "url"]
    assert not is_openai_batch(pa.schema([(name, pa.string()) for name in names]))
    assert not is_openai_batch(
        pa.schema([(name, pa.string()) for name in names] + [("body", pa.struct([("n", pa.int8())]))])
    )


def test_json_types_are_unified_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers and floats, missing and null keys and growing objects share a type; times in text stay text."""
    rows = [
        {"v": 1},
        {"v": 2.5, "o": {"a": 1}},
        {"v": None, "o": {"b": "x"}, "t": "2026-01-01 00:00:00"},
        {"l": [None]},
    ]
    monkeypatch.setattr(input_lines, "CHUNK_BYTES", 40)
    plan = plan_input([write(tmp_path / "x.jsonl", jsonl_bytes(rows))], target_bytes=30)
    assert plan.schema.field("v").type == pa.float64()
    assert plan.schema.field("t").type == pa.string()
    assert plan.schema.field("o").type == pa.struct([("a", pa.int64()), ("b", pa.string())])
    table = read_all(plan)
    assert table.column("v").to_pylist() == [1.0, 2.5, None, None]
    assert table.column("o").to_pylist() == [None, {"a": 1, "b": None}, {"a": None, "b": "x"}, None]
    assert table.column("t").to_pylist() == [None, None, "2026-01-01 00:00:00", None]


def test_values_without_a_common_type_are_json_text(tmp_path: Path) -> None:
    """A column that is text in one line and a list in another holds each value's JSON text, in one file or over two."""
    mixed = [{"id": 1, "content": "plain"}, {"id": 2, "content": [{"type": "text"}]}]
    whole = plan_input([write(tmp_path / "both.jsonl", jsonl_bytes(mixed))])
    for order, row in enumerate(mixed):
        write(tmp_path / f"part-{order}.jsonl", jsonl_bytes([row]))
    apart = plan_input([str(tmp_path / "part-*.jsonl")])
    for plan in (whole, apart):
        assert is_json_text(plan.schema.field("content"))
        assert plan.schema.field("id").type == pa.int64()
        assert read_all(plan).column("content").to_pylist() == ['"plain"', '[{"type": "text"}]']


def test_objects_without_keys_are_json_text(tmp_path: Path) -> None:
    """An object that is always empty, which Parquet cannot hold, is delivered as its text."""
    plan = plan_input([write(tmp_path / "x.jsonl", b'{"a":{},"b":1}\n')])
    assert read_all(plan).to_pylist() == [{"a": "{}", "b": 1, BAD: None}]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"p": "secret prompt"', "not valid JSON"),
        (b'{"p": "secret prompt" "q"}', "not valid JSON"),
        (b'["secret prompt"]', "not a JSON object"),
        (b'{"p": "secret prompt \xff"}', "not valid UTF-8"),
        (b'{"p": "secret prompt", "p": "x"}', "a key appears twice"),
        (b'{"p": "secret prompt \\ud800"}', "half a surrogate pair"),
        (b'{"p": "secret prompt"} {"p": "x"}', "not valid JSON"),
        (b'{"p": ' + b"[" * 200_000 + b'"secret prompt"', "nested too deep"),
    ],
)
def test_a_bad_line_is_a_row_with_its_reason(tmp_path: Path, line: bytes, why: str) -> None:
    """A line that is no row leaves its neighbours whole and says its number and why, never what is in it."""
    path = write(tmp_path / "x.jsonl", b'{"p":"one"}\n\n' + line + b'\n{"p":"two"}\n')
    plan = plan_input([path])
    table = read_all(plan)
    assert plan.schema.field("p").type == pa.string()
    assert table.column("p").to_pylist() == ["one", None, "two"]
    good, bad, also_good = table.column(BAD).to_pylist()
    assert good is None
    assert also_good is None
    assert bad.startswith("line 3: ")
    assert why in bad
    assert "secret" not in bad


def test_over_long_lines_are_bad_rows_and_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line beyond the limit, within a chunk or far longer than one, is a bad row; its neighbours are whole."""
    monkeypatch.setattr(input_lines, "MAX_LINE_BYTES", 1000)
    for chunk in (64, 5000, 1 << 20):
        monkeypatch.setattr(input_lines, "CHUNK_BYTES", chunk)
        for size in (900, 1100, 20_000):
            row = {"p": "x" * size}
            path = write(tmp_path / "x.jsonl", jsonl_bytes([{"p": "a"}, row, {"p": "b"}, row]))
            for target in (100, 1 << 20):
                table = read_all(plan_input([path], target_bytes=target))
                long = "x" * size if size < 1000 else None
                assert table.column("p").to_pylist() == ["a", long, "b", long]
                bad = [text is not None and "longer than" in text for text in table.column(BAD).to_pylist()]
                assert bad == [False, size > 1000, False, size > 1000]


def test_a_file_with_no_object_at_all_is_refused(tmp_path: Path) -> None:
    """A file such as one pretty-printed JSON document is an input error rather than all bad rows."""
    path = write(tmp_path / "x.jsonl", json.dumps([{"p": 1}], indent=1).encode())
    with pytest.raises(InputError, match=r"x\.jsonl .*one object on each line"):
        plan_input([path])


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    """A file from a Windows editor reads like any other."""
    plan = plan_input([write(tmp_path / "x.jsonl", b'\xef\xbb\xbf{"p":"a"}\r\n\r\n{"p":"b"}\r\n')])
    table = read_all(plan)
    assert table.column("p").to_pylist() == ["a", "b"]
    assert table.column(BAD).null_count == 2


# Schemas of several files


def test_files_may_differ_in_order_and_width(tmp_path: Path) -> None:
    """Columns in another order, absent ones and narrower types come together; formats mix."""
    write(tmp_path / "a.parquet", parquet_bytes(pa.table({"id": pa.array([1], pa.int32()), "p": ["x"]})))
    write(
        tmp_path / "b.parquet", parquet_bytes(pa.table({"p": pa.array(["y"], pa.large_string()), "id": pa.array([2])}))
    )
    write(
        tmp_path / "c.arrow", arrow_bytes(pa.table({"id": pa.nulls(1), "extra": pa.array(["e"]).dictionary_encode()}))
    )
    write(tmp_path / "d.jsonl", b'{"id": 4, "p": "z"}\n')
    plan = plan_input([str(tmp_path / "*")])
    types = {field.name: field.type for field in plan.schema}
    assert types == {"id": pa.int64(), "p": pa.large_string(), "extra": pa.dictionary(pa.int32(), pa.string())}
    tables = [read_split(split, plan.schema) for split in plan.splits]
    assert [table.column("id").to_pylist()[0] for table in tables] == [1, 2, None, 4]
    assert [table.column("p").to_pylist()[0] for table in tables] == ["x", "y", None, "z"]
    assert all(table.select(plan.schema.names).schema.equals(plan.schema) for table in tables)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (pa.array(["x"]), pa.array([1])),
        (pa.array(["x"]), pa.array([b"x"])),
        (pa.array([[1]]), pa.array([1])),
        (pa.array([True]), pa.array([1])),
    ],
)
def test_conflicting_types_name_both_files_and_the_column(tmp_path: Path, left: pa.Array, right: pa.Array) -> None:
    """Types that do not meet are an input error that names both files and the column."""
    first = write(tmp_path / "a.parquet", parquet_bytes(pa.table({"same": ["s"], "p": left})))
    second = write(tmp_path / "b.parquet", parquet_bytes(pa.table({"p": right, "same": ["s"]})))
    with pytest.raises(InputError) as caught:
        plan_input([str(tmp_path)])
    for part in (first, second, "'p'"):
        assert part in str(caught.value)


def test_dictionaries_meet_plain_values(tmp_path: Path) -> None:
    """A column that is dictionary-encoded in one file and plain in another is plain; index widths meet in the wider."""
    narrow = pa.array(["a"]).cast(pa.dictionary(pa.int8(), pa.string()))
    write(tmp_path / "1.arrow", arrow_bytes(pa.table({"x": narrow, "y": narrow})))
    write(tmp_path / "2.arrow", arrow_bytes(pa.table({"x": ["b"], "y": pa.array(["b"]).dictionary_encode()})))
    plan = plan_input([str(tmp_path)])
    assert plan.schema.field("x").type == pa.string()
    assert plan.schema.field("y").type == pa.dictionary(pa.int32(), pa.string())
    assert read_all(plan).to_pylist() == [{"x": "a", "y": "a"}, {"x": "b", "y": "b"}]


def test_integers_that_a_float_cannot_hold_are_refused(tmp_path: Path) -> None:
    """Where files make a column float, an integer that would change by it is an input error, not another number."""
    write(tmp_path / "a.parquet", parquet_bytes(pa.table({"id": [2**53 + 1]})))
    write(tmp_path / "b.parquet", parquet_bytes(pa.table({"id": [0.5]})))
    plan = plan_input([str(tmp_path)])
    with pytest.raises(InputError, match=r"'id' of .*a\.parquet"):
        read_split(plan.splits[0], plan.schema)


def test_a_column_that_parquet_cannot_hold_is_refused(tmp_path: Path) -> None:
    """A type that outputs could not carry is found while planning, with file and column."""
    path = write(tmp_path / "a.arrow", arrow_bytes(pa.table({"e": pa.array([{}], pa.struct([]))})))
    with pytest.raises(InputError, match=r"'e' of .*a\.arrow"):
        plan_input([path])


# Which files


def test_a_file_named_twice_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns that overlap, relative or absolute, name each file once, in the order of the patterns."""
    monkeypatch.chdir(tmp_path)
    for name in ("b", "a"):
        write(tmp_path / f"{name}.parquet", parquet_bytes(pa.table({"x": [name]})))
    plan = plan_input(["b.parquet", "*.parquet", str(tmp_path / "a.parquet"), "./", f"file://{tmp_path}/a.parquet"])
    assert [file.url for file in plan.files] == [str(tmp_path / "b.parquet"), str(tmp_path / "a.parquet")]
    assert read_all(plan).column("x").to_pylist() == ["b", "a"]


def test_globs_and_directories(tmp_path: Path) -> None:
    """Stars span names, two stars span directories, a directory stands for all below; hidden names are passed over."""
    for name in ("a/1.parquet", "a/b/2.parquet", "a/_3.parquet", "a/.4.parquet", "a/_log/5.parquet"):
        write(tmp_path / name, parquet_bytes(pa.table({"x": [name]})))
    write(tmp_path / "a/notes.txt", b"x")

    def found(*patterns: str) -> list[str]:
        plan = plan_input([str(tmp_path / pattern) for pattern in patterns])
        return [Path(file.url).relative_to(tmp_path).as_posix() for file in plan.files]

    assert found("a/*.parquet") == ["a/1.parquet"]
    assert found("*/**/?.parquet") == ["a/1.parquet", "a/b/2.parquet"]
    assert found("a") == ["a/1.parquet", "a/b/2.parquet"]
    assert found("a/_3.parquet") == ["a/_3.parquet"]


def test_a_name_with_glob_characters_is_found_as_it_is(tmp_path: Path) -> None:
    """A file whose name looks like a pattern can be named."""
    path = write(tmp_path / "x[1].parquet", parquet_bytes(pa.table({"x": [1]})))
    assert [file.url for file in plan_input([path]).files] == [path]


def test_the_fingerprint_is_of_the_files_not_their_order(tmp_path: Path) -> None:
    """The fingerprint stays with another order of patterns and changes with a file's content or another file."""
    first = write(tmp_path / "a.parquet", parquet_bytes(pa.table({"x": [1]})))
    second = write(tmp_path / "b.parquet", parquet_bytes(pa.table({"x": [2]})))
    fingerprint = plan_input([first, second]).fingerprint
    assert plan_input([second, first]).fingerprint == fingerprint
    assert plan_input([first]).fingerprint != fingerprint
    write(tmp_path / "b.parquet", parquet_bytes(pa.table({"x": [2, 3]})))
    assert plan_input([first, second]).fingerprint != fingerprint


def test_plans_pickle(tmp_path: Path) -> None:
    """A plan and its splits travel to workers."""
    plan = plan_input([write(tmp_path / "a.parquet", parquet_bytes(TABLE))])
    assert pickle.loads(pickle.dumps(plan)) == plan  # noqa: S301


# What is refused


@pytest.mark.parametrize(
    ("pattern", "say"),
    [
        ("in/promts.parquet", "did you mean {}/in/prompts.parquet"),
        ("on/prompts.parquet", "did you mean {}/in"),
        ("in/zzzzzzzzz.jsonl", "zzzzzzzzz.jsonl does not exist"),
        ("in/*.feather", "matches no file"),
        ("im/*.parquet", "did you mean {}/in"),
        ("in/table.csv", "must end in one of .parquet"),
        ("in/*", "table.csv has no known format"),
        ("empty", "holds no file of a known format"),
    ],
)
def test_a_wrong_pattern_says_what_to_do(tmp_path: Path, pattern: str, say: str) -> None:
    """A missing path names its nearest sibling; an empty glob and an unknown format name what is wrong."""
    write(tmp_path / "in/prompts.parquet", parquet_bytes(TABLE))
    write(tmp_path / "in/table.csv", b"a,b\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as caught:
        plan_input([str(tmp_path / pattern)])
    assert say.format(tmp_path) in str(caught.value)
    assert caught.value.exit_code == 2


def test_no_pattern_at_all_is_refused() -> None:
    """An empty list of inputs is an input error."""
    with pytest.raises(InputError, match="names no input"):
        plan_input([])


def test_a_missing_object_or_bucket_is_refused(s3: S3Server) -> None:
    """On S3 too a missing file names its nearest sibling, and a missing bucket is an input error."""
    store = Store.at(f"s3://{s3.bucket()}/in", s3.options)
    store.create("prompts.parquet", parquet_bytes(TABLE))
    with pytest.raises(InputError, match=f"did you mean {store.url}/prompts.parquet"):
        plan_input([f"{store.url}/promts.parquet"], s3.options)
    with pytest.raises(InputError):
        plan_input(["s3://no-such-bucket-here/x.parquet"], s3.options)
    with pytest.raises(InputError):
        plan_input(["s3://no-such-bucket-here/*.parquet"], s3.options)


def test_a_secret_in_a_pattern_is_refused_unprinted() -> None:
    """A signed URL is a configuration error that does not repeat the signature."""
    with pytest.raises(ConfigError) as caught:
        plan_input(["https://h/x.parquet?X-Amz-Signature=hunter2"])
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.ipc"])
@pytest.mark.parametrize("cut", [0, 3, 9, 200, -200, -60, -7])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, name: str, cut: int) -> None:
    """A file that was cut short anywhere is an input error that names it, when planned."""
    whole = ENCODERS[name](TABLE)
    if name == "x.ipc" and cut == -7:
        cut = -30  # the last bytes of a stream only say that it ends
    path = write(tmp_path / name, whole[:cut])
    write(tmp_path / "good.parquet", parquet_bytes(TABLE))
    with pytest.raises(InputError, match="is not a readable") as caught:
        plan_input([str(tmp_path / "*")])
    assert path in str(caught.value)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(["x.parquet", "x.arrow", "x.ipc"]))
def test_a_corrupt_file_is_an_input_error_or_reads(tmp_path: Path, data: st.DataObject, name: str) -> None:
    """Whatever bytes are damaged, planning and reading give rows or an InputError that names the file."""
    content = bytearray(ENCODERS[name](TABLE))
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    path = write(tmp_path / name, bytes(content))
    message = path
    try:
        plan = plan_input([path])
        for split in plan.splits:
            read_split(split, plan.schema)
    except InputError as error:
        message = str(error)
    assert path in message


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_other_content_under_a_known_ending_is_refused(tmp_path: Path, name: str) -> None:
    """Text under the name of a binary format is an input error that names the file."""
    path = write(tmp_path / name, b'{"prompt": "what is the capital"}\n' * 100)
    with pytest.raises(InputError, match="is not a readable") as caught:
        plan_input([path])
    assert path in str(caught.value)
    assert "capital" not in str(caught.value)


def test_duplicate_columns_are_refused(tmp_path: Path) -> None:
    """Two columns of one name are an input error that names the file and the column."""
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"])
    for name in ("x.arrow", "x.parquet"):
        path = write(tmp_path / name, ENCODERS[name](table))
        with pytest.raises(InputError, match="two columns named 'x'"):
            plan_input([path])


def test_a_file_that_changed_since_it_was_planned_is_refused(tmp_path: Path) -> None:
    """A split of a file that has fewer rows by now, or is gone, is an input error that names it."""
    path = write(tmp_path / "x.parquet", parquet_bytes(TABLE, 10))
    plan = plan_input([path])
    write(tmp_path / "x.parquet", parquet_bytes(TABLE.slice(0, 4), 10))
    with pytest.raises(InputError, match=r"x\.parquet has changed"):
        read_split(plan.splits[0], plan.schema)
    Path(path).unlink()
    with pytest.raises(InputError, match=r"x\.parquet"):
        read_split(plan.splits[0], plan.schema)


def test_a_reserved_column_is_refused(tmp_path: Path) -> None:
    """A JSON Lines column of the name that marks bad rows is an input error."""
    with pytest.raises(InputError, match=BAD):
        plan_input([write(tmp_path / "x.jsonl", json.dumps({BAD: "x"}).encode())])
