"""Conservation: whatever the input, every row ends once, unchanged, and every charge adds up."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from small_jobs import Written, by_the_hour, check_conserved, make_job, remote, total, written
from tiny_model import tiny_model

from bidbeam.connectors.schemas import DEAD_LETTER_COLUMNS, OUTPUT_COLUMNS
from bidbeam.pipelines.job import Job
from bidbeam.pipelines.run import run
from bidbeam.transforms.placement import eligible

SHARED = "Describe the product in two short sentences for a shop's page. "
AT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)

bad_or_good = st.fixed_dictionaries(
    {
        "prompt": st.one_of(
            st.sampled_from([None, "", "The same question?", SHARED * 400]),
            st.text(st.characters(codec="utf-8"), max_size=12).map(lambda text: SHARED + text),
        ),
        "id": st.one_of(st.none(), st.integers(0, 12).map(str)),
        "model": st.sampled_from([None, None, "tiny", "exact", "nobody"]),
        "temperature": st.sampled_from([None, None, 0.0, 1.0, -3.0]),
        "n": st.sampled_from([None, None, 1, 3, 0]),
        "max_tokens": st.sampled_from([None, None, 5, 100_000, -1]),
        "customer": st.sampled_from([None, "acme", "zenith"]),
        "placement": st.sampled_from([None, None, '{"zdr": true}', '{"jurisdictions": ["FR"]}', "nonsense"]),
    }
)
ASKED = pa.schema(
    [
        ("prompt", pa.large_string()), ("id", pa.string()), ("model", pa.dictionary(pa.int8(), pa.string())),
        ("temperature", pa.float64()), ("n", pa.int64()), ("max_tokens", pa.int32()), ("customer", pa.string()),
        ("placement", pa.string()),
    ]
)  # fmt: skip
CARRIED: dict[str, tuple[pa.DataType, list[Any]]] = {
    # Names of ours, and every kind of type that Arrow reads back from Parquet as it was written.
    "request_id": (pa.int64(), [7, None]),
    "output": (pa.string(), ["theirs", None]),
    "cost": (pa.decimal128(9, 2), [Decimal("1.50"), None]),
    "reason": (pa.bool_(), [True, None]),
    "output_in": (pa.string(), ["theirs too", None]),
    "row": (pa.uint8(), [255, None]),
    "bidbeam:row": (pa.string(), ["x", None]),
    "nothing": (pa.null(), [None]),
    "label": (pa.dictionary(pa.int16(), pa.string()), ["a", "b", None]),
    "nested": (
        pa.struct([("list", pa.list_(pa.struct([("x", pa.float32()), ("text", pa.string())])))]),
        [{"list": [{"x": 0.5, "text": None}, None]}, {"list": []}, {"list": None}, None],
    ),
    "words": (pa.large_list(pa.large_string()), [["a", None], [], None]),
    "pairs": (pa.map_(pa.string(), pa.int8()), [[("k", 1), ("l", None)], [], None]),
    "bytes": (pa.binary(), [b"\x00\xff", b"", None]),
    "fixed": (pa.binary(2), [b"ab", None]),
    "at": (pa.timestamp("us", "Europe/Berlin"), [AT, None]),
    "day": (pa.date32(), [date(2026, 1, 2), None]),
    "took": (pa.duration("ms"), [timedelta(milliseconds=5), None]),
}
extras = st.lists(st.sampled_from(sorted(CARRIED)), unique=True, max_size=6)


def as_table(rows: list[dict[str, Any]], marks: int, names: list[str], picks: list[int]) -> pa.Table:
    columns = {field.name: pa.array([row[field.name] for row in rows], field.type) for field in ASKED}
    columns["mark"] = pa.array(range(marks, marks + len(rows)), pa.int64())
    for name in names:
        type_, values = CARRIED[name]
        columns[name] = pa.array([values[(pick + i) % len(values)] for i, pick in enumerate(picks[: len(rows)])], type_)
    return pa.table(columns)


def job_of(home: Path, tables: list[pa.Table], **keys: Any) -> Job:
    (home / "in").mkdir(parents=True)
    for n, table in enumerate(tables):
        if n % 2:
            with pa.ipc.new_file(home / "in" / f"f{n}.arrow", table.schema) as writer:
                writer.write_table(table.unify_dictionaries())
        else:
            pq.write_table(table, home / "in" / f"f{n}.parquet", row_group_size=7)
    placement = {"jurisdiction": "DE", "operator": "cloud", "zdr": True}
    pools = keys.pop("pools", None) or [
        remote("near", models=["tiny"], context=2000, placement=placement),
        remote(
            "far", models=["tiny", "exact"], context=3000, price={"input": "0.3", "output": "0.2", "request": "0.001"}
        ),
        by_the_hour("own", models=["exact"], capacity={"tokens_per_second": 100}, placement=placement),
    ]
    given_: dict[str, Any] = {
        "models": {"tiny": {}, "exact": {"source": tiny_model()}},
        "input": [str(home / "in" / "*.parquet"), *([str(home / "in" / "*.arrow")] if len(tables) > 1 else [])],
        "prompt": {"id": "id", "column": "prompt", "tenant": "customer"},
        "tags": {"team": "growth"},
        "auction": {"rounds": 1},
        "baseline": {"name": "list", "input": "1", "output": "2", "per": "1M tokens"},
    }
    return make_job(home, None, pools, **(given_ | keys))


def check_rows(found: Written, tables: list[pa.Table]) -> None:
    """Each input row stands in exactly one of outputs and dead letters, its columns unchanged in type and value."""
    whole = pa.concat_tables(tables, promote_options="permissive")
    marks = whole.column("mark").to_pylist()
    seen: list[int] = []
    for table, ours in ((found.outputs, OUTPUT_COLUMNS), (found.dead, DEAD_LETTER_COLUMNS)):
        if table.num_rows == 0:
            continue
        taken = {name for name, _ in ours} | ({"samples"} if table is found.outputs else set())
        names = {}
        for name in whole.column_names:
            kept = name
            while kept in taken:
                kept += "_in"
            taken.add(kept)
            names[name] = kept
        for name, type_ in ours:
            assert table.schema.field(name).type == type_
        mine = table.column("mark").to_pylist()
        seen += mine
        expected = whole.take(pa.array([marks.index(mark) for mark in mine]))
        for name, kept in names.items():
            assert table.schema.field(kept).type == whole.schema.field(name).type, name
            assert table.column(kept).to_pylist() == expected.column(name).to_pylist(), name
    assert sorted(seen) == sorted(marks)


@settings(max_examples=6, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(
    st.lists(st.lists(bad_or_good, max_size=12), min_size=1, max_size=3),
    extras,
    st.lists(st.integers(0, 3), min_size=12, max_size=12),
    st.sampled_from([None, "0", "0.000003", "0.0002"]),
)
def test_arbitrary_batches_are_conserved(
    files: list[list[dict[str, Any]]], names: list[str], picks: list[int], max_cost: str | None
) -> None:
    """Whatever rows and columns come, rows, tokens and money are conserved, walls hold, and nothing is changed."""
    tables = []
    for rows in files:
        # The first file lacks what the others bring: the schemas are unified.
        mine = names if tables else names[::2]
        tables.append(as_table(rows, sum(map(len, files[: len(tables)])), mine, picks))
    budget = None if max_cost is None else {"max_cost": max_cost}
    with tempfile.TemporaryDirectory() as scratch:
        job = job_of(Path(scratch), tables, budget=budget)
        summary = run(job, rehearse=True)
        found = written(job, rehearse=True)
    check_conserved(found, sum(map(len, files)))
    check_rows(found, tables)
    check_walls(found, job)
    assert summary.exit_code == (0 if found.dead.num_rows == 0 else 3)
    if max_cost is None:
        assert not found.manifest["dead"].keys() & {"budget", "capacity", "deadline", "failed"}


def check_walls(found: Written, job: Job) -> None:
    """No run costs more than it may, and no attempt goes where its request may not."""
    if job.max_cost is not None:
        assert Decimal(found.manifest["cost"]) <= job.max_cost
    labels = {pool.name: pool.placement for pool in job.pools}
    requests = {row["request_id"]: row for row in found.rows("requests") if row["reason"] != "invalid"}
    leaders = {row["request_id"]: row["shared_with"] for row in requests.values()}
    for attempt in found.attempts:
        text = requests[attempt["request_id"]]["placement"]
        assert eligible(json.loads(text) if text else None, labels[attempt["pool"]])[0]
        assert leaders[attempt["request_id"]] is None, "a duplicate was sent"


def test_identical_greedy_requests_are_paid_once(tmp_path: Path) -> None:
    """The first of identical greedy rows pays, the others cost nothing and name it; other tenants and samples pay."""
    rows: list[dict[str, Any]] = [
        {"prompt": "twin", "customer": customer, "temperature": temperature, "id": str(n)}
        for n, (customer, temperature) in enumerate(
            [("acme", 0.0), ("acme", 0.0), ("zenith", 0.0), ("acme", 0.0), ("acme", 1.0), ("acme", 1.0)]
        )
    ]
    blank = dict.fromkeys(ASKED.names)
    table = as_table([blank | row for row in rows], 0, [], [0] * 6)
    job = job_of(tmp_path, [table])
    run(job, rehearse=True)
    found = written(job, rehearse=True)
    check_conserved(found, 6)
    requests = {row["request_id"]: row for row in found.rows("requests")}
    assert {name: row["shared_with"] for name, row in requests.items()} == {
        "0": None, "1": "0", "2": None, "3": "0", "4": None, "5": None,
    }  # fmt: skip
    assert [requests[name]["cost"] for name in "13"] == [0, 0]
    assert all(requests[name]["cost"] > 0 for name in "0245")
    assert len(found.attempts) == 4
    outputs = {row["request_id"]: row for row in found.outputs.to_pylist()}
    assert outputs["0"]["output"] == outputs["1"]["output"] == outputs["3"]["output"]
    assert {name: row["attempts"] for name, row in outputs.items()} == {"0": 1, "1": 0, "2": 1, "3": 0, "4": 1, "5": 1}


def test_of_rows_with_one_id_the_first_wins(tmp_path: Path) -> None:
    """Later rows of the same id are dead letters as invalid, across files and within one."""
    blank = dict.fromkeys(ASKED.names)
    tables = [
        as_table(
            [blank | {"prompt": f"file {n} row {i}", "id": name} for i, name in enumerate("aab")], 3 * n, [], [0] * 3
        )
        for n in range(2)
    ]
    job = job_of(tmp_path, tables)
    assert run(job, rehearse=True).exit_code == 3
    found = written(job, rehearse=True)
    check_conserved(found, 6)
    check_rows(found, tables)
    assert sorted(found.outputs.column("mark").to_pylist()) == [0, 2]
    assert found.manifest["dead"] == {"invalid": 4}
    assert {"'id'" in row["message"] for row in found.dead.to_pylist()} == {True}


@pytest.mark.parametrize("files", [1, 2])
def test_no_rows_are_a_run_too(tmp_path: Path, files: int) -> None:
    """An input without rows runs to its end, complete, and costs nothing."""
    job = job_of(tmp_path, [as_table([], 0, ["label", "nested"], [])] * files)
    summary = run(job, rehearse=True)
    assert (summary.status, summary.requests, summary.cost, summary.exit_code) == ("complete", 0, 0, 0)
    found = written(job, rehearse=True)
    assert (found.outputs.num_rows, found.dead.num_rows) == (0, 0)


def test_an_openai_batch_is_conserved_line_by_line(tmp_path: Path) -> None:
    """Batch lines, chats and completions, good, bad and no JSON at all, each end once under their custom_id."""
    lines: list[str] = []
    for n in range(12):
        body: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": f"{SHARED}{n}"}]}
        if n % 4 == 1:
            body |= {"max_tokens": 3, "n": 2}
        if n % 4 == 2:
            body = {"model": "tiny", "prompt": f"raw {n}"}
        if n == 7:
            body["messages"] = [{"role": "wizard", "content": "?"}]
        if n == 11:
            body["model"] = "nobody"
        url = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        lines.append(json.dumps({"custom_id": f"c{n}", "method": "POST", "url": url, "body": body}))
    lines.insert(5, '{"custom_id": "torn", "meth')
    lines.insert(8, "[]")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "batch.jsonl").write_text("\n".join(lines) + "\n")
    job = make_job(tmp_path, None, [remote("near")], input=str(tmp_path / "in" / "*.jsonl"), prompt={})
    run(job, rehearse=True)
    found = written(job, rehearse=True)
    check_conserved(found, 14)
    outputs = {row["request_id"]: row for row in found.outputs.to_pylist()}
    assert outputs.keys() == {f"c{n}" for n in range(12)} - {"c7", "c11"}
    assert {name for name, row in outputs.items() if row["samples"] is not None} == {"c1", "c5", "c9"}
    assert all(len(outputs[name]["samples"]) == 2 for name in ("c1", "c5", "c9"))
    assert found.manifest["dead"] == {"invalid": 4}
    assert Counter(row["request_id"] in {"c7", "c11"} for row in found.dead.to_pylist()) == {True: 2, False: 2}


def test_batch_lines_beside_plain_ones_are_conserved(tmp_path: Path) -> None:
    """Where one file has bodies and another a prompt column, the bodies count; a line without one is a dead letter."""
    (tmp_path / "in").mkdir()
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
    line = {"custom_id": "c1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "in" / "batch.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "in" / "plain.jsonl").write_text('{"custom_id": "c2", "prompt": "hello"}\n')
    source = str(tmp_path / "in" / "*.jsonl")
    job = make_job(tmp_path, None, [remote("near")], input=source, prompt={"column": "prompt"})
    run(job, rehearse=True)
    found = written(job, rehearse=True)
    check_conserved(found, 2)
    assert found.outputs.column("request_id").to_pylist() == ["c1"]
    ((reason, message),) = [(row["reason"], row["message"]) for row in found.dead.to_pylist()]
    assert reason == "invalid"
    assert message.startswith("column 'body': there is none in this line; lines of an OpenAI batch file and rows with")


def test_time_is_shared_to_the_last_digit(tmp_path: Path) -> None:
    """On a pool paid by the hour the charges of all attempts, setup and idle time add up to its bill exactly."""
    blank = dict.fromkeys(ASKED.names)
    table = as_table(
        [blank | {"prompt": f"{SHARED}{n}", "model": "exact", "id": str(n)} for n in range(50)], 0, [], [0] * 50
    )
    job = job_of(tmp_path, [table], pools=[by_the_hour("own", models=["exact"])], model="exact")
    run(job, rehearse=True)
    found = written(job, rehearse=True)
    check_conserved(found, 50)
    by_meter = Counter(row["meter"] for row in found.rows("charges"))
    assert by_meter["accelerator_second"] == 50
    seconds = total([row for row in found.rows("charges") if row["meter"] == "accelerator_second"], "quantity")
    assert seconds * 1000 == int(seconds * 1000)
    assert {row["recount_input_tokens"] for row in found.attempts} == {row["input_tokens"] for row in found.attempts}


def test_parquet_and_json_lines_mix_in_one_run(tmp_path: Path) -> None:
    """Rows of both formats, torn lines among them, end once each, and JSON Lines bring the columns that they lack."""
    (tmp_path / "in").mkdir()
    pq.write_table(
        pa.table({"id": ["p1", "p2"], "prompt": ["one", "two"], "note": ["x", None]}), tmp_path / "in" / "a.parquet"
    )
    lines = [
        '{"id": "j1", "prompt": "three"}',
        "{not json",
        '{"id": "j2", "prompt": null}',
        '{"id": "p1", "prompt": "one"}',
    ]
    (tmp_path / "in" / "b.jsonl").write_text("\n".join(lines))
    job = make_job(tmp_path, None, [remote("near")], input=str(tmp_path / "in" / "*"))
    run(job, rehearse=True)
    found = written(job, rehearse=True)
    check_conserved(found, 6)
    assert sorted(found.outputs.column("request_id").to_pylist()) == ["j1", "p1", "p2"]
    assert {row["id"]: row["note"] for row in found.outputs.to_pylist()} == {"p1": "x", "p2": None, "j1": None}
    assert found.manifest["dead"] == {"invalid": 3}
