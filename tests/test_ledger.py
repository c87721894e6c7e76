"""The ledger's files: parts that are written once, manifests that make them count, and the SQL that may be asked."""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from s3_server import S3Server, s3
from small_ledger import DAY_A, DAY_B, A, B, C, charge, prices, run_row, table_of, write_run, write_small_ledger

from bidbeam.connectors import ledger_writer
from bidbeam.connectors.errors import AlreadyExists, StoreError, UsageError
from bidbeam.connectors.ledger_manifest import Manifest, PartFile, latest_manifest, latest_manifests
from bidbeam.connectors.ledger_reader import open_ledger, query_ledger
from bidbeam.connectors.ledger_writer import ensure_ledger, write_manifest, write_part
from bidbeam.connectors.schemas import CHARGES, LABEL, LEDGER_VERSION, TABLES
from bidbeam.connectors.store import Store

__all__ = ["s3"]


@pytest.fixture(params=["local", "memory"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A ledger on a local disk and on a store that DuckDB cannot open itself."""
    if request.param == "memory":
        return Store.at(f"memory://ledger-{uuid.uuid4().hex}")
    return Store.at(str(tmp_path / "ledger"))


@pytest.fixture(scope="module", params=["local", "memory"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The small ledger, for tests that only read it."""
    if request.param == "memory":
        ledger = Store.at(f"memory://ledger-{uuid.uuid4().hex}")
    else:
        ledger = Store.at(str(tmp_path_factory.mktemp("ledger")))
    write_small_ledger(ledger)
    return ledger


def _charges(n: int, run_id: str = A) -> pa.Table:
    day = DAY_A if run_id == A else DAY_B
    return table_of(
        "charges",
        [charge(run_id, day, f"r{at}", f"{run_id}-{at}", "p-chutes", "output", str(at + 1)) for at in range(n)],
    )


def test_every_table_is_written_and_read_back_unchanged(ledger: Store) -> None:
    """All columns of all tables survive with their types, dictionaries and ids included."""
    for table, schema in TABLES.items():
        if table == "runs":
            continue
        row = {field.name: _some(field.type) for field in schema}
        written = pa.Table.from_pylist([row, dict.fromkeys(row)], schema)
        part = write_part(ledger, table, DAY_A, A, "s001", written)
        with ledger.open_input(part.path) as file:
            read = pq.ParquetFile(file).read()
        assert read.cast(schema).equals(written), table
        assert read.schema.metadata[b"bidbeam.ledger_version"] == b"%d" % LEDGER_VERSION
        assert (part.rows, part.size_bytes) == (2, ledger.size(part.path))


def _some(type_: pa.DataType) -> object:
    if pa.types.is_decimal(type_):
        return Decimal("1.5")
    if pa.types.is_timestamp(type_):
        return datetime(2026, 11, 21, 1, 2, 3, 4, tzinfo=UTC)
    if pa.types.is_date(type_):
        return DAY_A
    if pa.types.is_integer(type_):
        return 7
    if type_ == pa.uuid():
        return uuid.uuid5(uuid.NAMESPACE_OID, "x").bytes
    return True if pa.types.is_boolean(type_) else "text"


def test_columns_are_cast_ordered_and_filled_by_name(ledger: Store) -> None:
    """Plain text, bytes and missing columns become what the schema says; a column it has not is refused."""
    batch = pa.table(
        {
            "pool": pa.array(["p", "q"]).dictionary_encode(),
            "meter": pa.array(["output", None]),
            "charge_id": pa.array([b"0" * 16, b"1" * 16], pa.binary(16)),
            "quantity": pa.array([Decimal(1), Decimal(2)], pa.decimal128(10, 0)),
        }
    )
    part = write_part(ledger, "charges", DAY_A, A, "s001", batch.to_batches())
    with ledger.open_input(part.path) as file:
        read = pq.ParquetFile(file).read()
    assert read.schema.names == CHARGES.names
    assert read.column("meter").to_pylist() == ["output", None]
    assert read.column("meter").type == LABEL
    assert read.column("quantity").to_pylist() == [Decimal("1.000"), Decimal("2.000")]
    assert read.column("cost").null_count == 2
    with pytest.raises(ValueError, match="no column qantity"):
        write_part(ledger, "charges", DAY_A, A, "s002", pa.table({"qantity": [1]}))


def test_the_same_part_twice_is_one_part_and_other_content_is_refused(ledger: Store) -> None:
    """A repeated bundle meets its own file; two that disagree under one name cannot both stand."""
    first = write_part(ledger, "charges", DAY_A, A, "s001", _charges(5))
    again = write_part(ledger, "charges", DAY_A, A, "s001", _charges(5).to_batches())
    assert first == again
    with pytest.raises(AlreadyExists):
        write_part(ledger, "charges", DAY_A, A, "s001", _charges(6))
    assert [entry.name for entry in ledger.list("charges/")] == [first.path]


def test_row_groups_are_cut_by_rows_whatever_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of any size, with a dictionary each, give row groups of one size that keep their dictionary encoding."""
    monkeypatch.setattr(ledger_writer, "ROW_GROUP_ROWS", 10)
    ledger = Store.at(str(tmp_path))
    whole = _charges(35)
    batch = whole.to_batches()[0]
    pieces = [batch.slice(at, size) for at, size in ((0, 3), (3, 25), (28, 0), (28, 7))]
    pieces[1] = pieces[1].set_column(
        pieces[1].schema.get_field_index("pool"), "pool", pa.array(["chutes"] * 25).dictionary_encode()
    )
    part = write_part(ledger, "charges", DAY_A, A, "s001", pieces)
    file = pq.ParquetFile(ledger.url_of(part.path))
    assert [file.metadata.row_group(at).num_rows for at in range(file.metadata.num_row_groups)] == [10, 10, 10, 5]
    assert file.read().cast(CHARGES).equals(whole)
    pool = file.metadata.row_group(1).column(CHARGES.get_field_index("pool"))
    assert "RLE_DICTIONARY" in pool.encodings


def test_an_empty_part_has_the_table_s_columns(ledger: Store) -> None:
    """No batches at all still give a readable file."""
    part = write_part(ledger, "bids", DAY_A, A, "s001", [])
    with ledger.open_input(part.path) as file:
        assert pq.read_schema(file).names == TABLES["bids"].names
    assert part.rows == 0


def test_only_listed_files_are_seen(ledger: Store) -> None:
    """A part that no manifest lists is invisible until one does."""
    ensure_ledger(ledger)
    listed = write_part(ledger, "charges", DAY_A, A, "s001", _charges(2))
    write_part(ledger, "charges", DAY_A, A, "s002", _charges(40))
    ledger.create(f"charges/run_date={DAY_A}/run_id={A}/part-torn.parquet", b"PAR1 and no more")
    write_manifest(ledger, run_row(A, DAY_A, "complete"), [listed], 0)
    assert _count(ledger, "charges") == 2


def test_the_highest_sequence_counts(ledger: Store) -> None:
    """A run's later manifest replaces its earlier one, its row of the table runs included, also past 9,999."""
    ensure_ledger(ledger)
    first = write_part(ledger, "charges", DAY_A, A, "s001", _charges(2))
    second = write_part(ledger, "charges", DAY_A, A, "s002", _charges(3))
    write_manifest(ledger, run_row(A, DAY_A, "running"), [], 0)
    assert latest_manifest(ledger, DAY_A, A).status == "running"  # type: ignore[union-attr]
    assert _count(ledger, "charges") == 0
    write_manifest(ledger, run_row(A, DAY_A, "incomplete"), [first], 9_999)
    write_manifest(ledger, run_row(A, DAY_A, "complete"), [second], 10_000)
    assert query_ledger(ledger.url, "SELECT status FROM runs").to_pylist() == [{"status": "complete"}]
    assert _count(ledger, "charges") == 3
    assert latest_manifest(ledger, DAY_B, B) is None


def test_two_starts_cannot_take_one_sequence(ledger: Store) -> None:
    """The second of two different manifests of one number is refused; the same one again is no error."""
    row = run_row(A, DAY_A, "running")
    write_manifest(ledger, row, [], 0)
    write_manifest(ledger, row, [], 0)
    with pytest.raises(AlreadyExists):
        write_manifest(ledger, run_row(A, DAY_A, "complete"), [], 0)


def test_a_start_that_died_before_its_manifest_is_not_in_the_way(ledger: Store) -> None:
    """The row file of a manifest that never came does not stop the next start from taking the same number."""
    ensure_ledger(ledger)
    row = run_row(A, DAY_A, "running")
    write_manifest(ledger, row, [], 0)
    manifest = latest_manifest(ledger, DAY_A, A)
    assert manifest is not None
    ledger.delete(manifest.name)
    write_manifest(ledger, run_row(A, DAY_A, "complete"), [], 0)
    assert query_ledger(ledger.url, "SELECT status FROM runs").column(0).to_pylist() == ["complete"]


def test_many_jobs_write_one_ledger_at_the_same_time(ledger: Store) -> None:
    """Runs that are written by eight threads at once are all there, each whole, and readers never see a part of one."""
    ensure_ledger(ledger)
    barrier = threading.Barrier(8)

    def job(number: int) -> None:
        run_id = f"job-{number}"
        barrier.wait()
        ensure_ledger(ledger)
        write_manifest(ledger, run_row(run_id, DAY_A, "running"), [], 0)
        rows = [charge(run_id, DAY_A, f"r{at}", f"{run_id}{at}", "p-chutes", "output", "1") for at in range(10)]
        write_run(ledger, run_row(run_id, DAY_A, "complete"), {"charges": rows, "prices": prices("p-chutes")}, 1)

    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(job, number) for number in range(8)]
        while not all(future.done() for future in done):
            if latest_manifests(ledger):
                seen = query_ledger(ledger.url, "SELECT run_id, count(*) AS n FROM charges GROUP BY ALL").to_pylist()
                assert all(row["n"] == 10 for row in seen)
        for future in done:
            future.result()
    runs = query_ledger(ledger.url, "SELECT status, count(*) AS n FROM runs GROUP BY status").to_pylist()
    assert runs == [{"status": "complete", "n": 8}]
    assert _count(ledger, "charges") == 80
    assert _count(ledger, "prices") == 3


def test_a_file_of_an_older_version_reads_with_nulls(ledger: Store) -> None:
    """Columns that were added since are NULL, in the order and types of today."""
    ensure_ledger(ledger)
    old = _charges(2).drop_columns(["baseline_cost", "tags"])
    with ledger.scratch_file() as scratch:
        pq.write_table(old, scratch)
        ledger.create_from("charges/old.parquet", scratch)
    new = write_part(ledger, "charges", DAY_A, A, "s002", _charges(3))
    write_manifest(
        ledger, run_row(A, DAY_A, "complete"), [PartFile("charges", "charges/old.parquet", 2, 0, "", 0), new], 0
    )
    read = query_ledger(ledger.url, "FROM charges")
    assert read.schema.names == CHARGES.names
    assert read.column("tags").null_count == 2
    assert read.column("baseline_cost").type == pa.decimal128(38, 18)


def test_a_manifest_round_trips_and_a_foreign_file_is_named() -> None:
    """What is written is read back equal; broken JSON, and a part outside the ledger, raise with the file's name."""
    part = PartFile("charges", "charges/x.parquet", 3, 100, "ab")
    manifest = Manifest(A, DAY_A, "complete", 3, (part,))
    assert Manifest.from_json(manifest.to_json(), "x") == manifest
    assert manifest.name == f"runs/run_date=2026-11-21/run_id={A}/manifest-0003.json"
    later = manifest.to_json().replace(b'"rows": 3', b'"rows": 3, "codec": "new"')
    assert Manifest.from_json(later, "x") == manifest
    for data in (b"{", b"[]", b"{}", manifest.to_json().replace(b"charges/x.parquet", b"../secret.parquet")):
        with pytest.raises(StoreError, match="s3://b/manifest"):
            Manifest.from_json(data, "s3://b/manifest")


def test_views_sql_is_renewed_by_newer_versions_only(ledger: Store) -> None:
    """An older or foreign views.sql is replaced, that of a newer Bidbeam is left alone."""
    ensure_ledger(ledger)
    current = ledger.read("views.sql")
    for stale in (b"-- bidbeam ledger version 0\n", b"", b"-- mine\n"):
        ledger.replace("views.sql", stale)
        ensure_ledger(ledger)
        assert ledger.read("views.sql") == current
    newer = current.replace(b"version %d" % LEDGER_VERSION, b"version %d" % (LEDGER_VERSION + 1), 1)
    ledger.replace("views.sql", newer)
    ensure_ledger(ledger)
    assert ledger.read("views.sql") == newer


HOSTILE = (
    "COPY charges TO '{path}'",
    "COPY (SELECT 1) TO '{path}'",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{path}'",
    "EXPORT DATABASE '{path}'",
    "ATTACH '{path}'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET threads = 1",
    "SET VARIABLE x = 1",
    "RESET lock_configuration",
    "PRAGMA version",
    "CALL pragma_version()",
    "CREATE TABLE mine (x INT)",
    "CREATE OR REPLACE VIEW charges AS SELECT 1",
    "DROP VIEW charges",
    "INSERT INTO charges SELECT * FROM charges",
    "DELETE FROM charges",
    "BEGIN",
    "PREPARE p AS SELECT 1",
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP VIEW charges",
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM read_text('{views}')",
    "SELECT * FROM read_blob('{views}')",
    "FROM '/etc/passwd'",
    "FROM '{views}'",
    "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM sniff_csv('/etc/passwd')",
    "SELECT * FROM read_parquet('s3://bucket/x.parquet')",
    "SELECT * FROM read_parquet('https://localhost/x.parquet')",
    "SELECT * FROM query('COPY (SELECT 1) TO ''{path}''')",
    "SELECT * FROM python_table",
    "",
    "-- nothing",
    "SELEC 1",
)


@pytest.mark.parametrize("sql", HOSTILE)
def test_hostile_sql_is_refused(finished: Store, tmp_path: Path, sql: str) -> None:
    """Nothing but one SELECT passes, and a SELECT reaches no file, no network and no object of this process."""
    python_table = pa.table({"secret": [1]})
    target = tmp_path / "stolen"
    before = [entry.name for entry in finished.list()]
    with pytest.raises(UsageError) as caught:
        query_ledger(finished.url, sql.format(path=target, views=finished.url_of("views.sql")))
    assert str(caught.value)
    assert not target.exists()
    assert [entry.name for entry in finished.list()] == before
    assert python_table.num_rows == 1


def test_the_connection_s_settings_are_locked(finished: Store) -> None:
    """Even a caller that bypasses the check of statements cannot open the connection again."""
    with open_ledger(finished.url) as connection:
        for statement in ("SET enable_external_access = true", "SET lock_configuration = false", "ATTACH 'x.db'"):
            with pytest.raises(duckdb.Error):
                connection.execute(statement)


@pytest.mark.parametrize(
    "sql",
    ["SELECT 1", "WITH x AS (SELECT 1) FROM x", "FROM runs", "VALUES (1)", "DESCRIBE charges", "SHOW TABLES",
     "SUMMARIZE bids", "TABLE lots", "SELECT 1;", "PIVOT charges ON meter IN ('output') USING sum(quantity)"],
)  # fmt: skip
def test_every_form_of_a_select_is_answered(finished: Store, sql: str) -> None:
    """The ways in which DuckDB writes a query all count as one."""
    assert query_ledger(finished.url, sql).num_columns > 0


def test_an_unknown_name_brings_the_nearest(finished: Store) -> None:
    """A misspelt view or column is answered with the one that was probably meant."""
    for sql, meant in (
        ("FROM charge", "did you mean charges?"),
        ("FROM cost_by_pools", "did you mean cost_by_pool?"),
        ("FROM nothing_like_it_at_all", "there are: runs, requests"),
        ("SELECT costs FROM charges", "did you mean cost?"),
        ("SELECT c.unit_prise FROM charges AS c", "did you mean unit_price?"),
        ("SELECT billedcots FROM focus", "did you mean BilledCost?"),
    ):
        with pytest.raises(UsageError, match=meant.replace("?", r"\?")):
            query_ledger(finished.url, sql)


def test_a_ledger_that_is_not_there_says_what_to_do(ledger: Store) -> None:
    """A missing directory, a ledger without a run, and rehearsals only: each has its own next step."""
    with pytest.raises(UsageError, match="is not a ledger"):
        query_ledger(ledger.url, "FROM runs")
    ensure_ledger(ledger)
    with pytest.raises(UsageError, match="bidbeam run JOB"):
        query_ledger(ledger.url, "FROM runs")
    with pytest.raises(UsageError, match="bidbeam run JOB --rehearse"):
        query_ledger(ledger.url, "FROM runs", rehearsals=True)
    write_small_ledger(ledger.child("_rehearsals"))
    with pytest.raises(UsageError, match="--rehearsals"):
        query_ledger(ledger.url, "FROM runs")


def test_rehearsals_are_another_ledger(ledger: Store) -> None:
    """What was rehearsed is seen with rehearsals=True and nowhere else."""
    write_small_ledger(ledger.child("_rehearsals"))
    ensure_ledger(ledger)
    write_manifest(ledger, run_row("real", DAY_A, "running"), [], 0)
    assert query_ledger(ledger.url, "SELECT run_id FROM runs").column(0).to_pylist() == ["real"]
    rehearsed = query_ledger(ledger.url, "SELECT run_id FROM runs ORDER BY 1", rehearsals=True)
    assert rehearsed.column(0).to_pylist() == [A, B, C]


def test_a_ledger_on_s3_is_written_and_read(s3: S3Server) -> None:
    """With the job's storage options and nothing else, what was written to S3 is answered in SQL."""
    url = f"s3://{s3.bucket()}/team/ledger"
    write_small_ledger(Store.at(url, s3.options))
    answer = query_ledger(url, "SELECT sum(cost) AS cost FROM cost_per_request", storage=s3.options)
    # Two runs' requests; the idle half second is no request's.
    assert answer.to_pylist() == [{"cost": Decimal("0.0002875207697775")}]
    assert query_ledger(url, "SELECT count(*) AS n FROM runs", storage=s3.options).to_pylist() == [{"n": 3}]


def test_a_path_with_pattern_characters_and_quotes_is_read(tmp_path: Path) -> None:
    """Brackets, stars, question marks and quotes in the ledger's path are no patterns and no SQL."""
    ledger = Store.at(str(tmp_path / "it's [a] *led?ger*"))
    write_small_ledger(ledger)
    assert _count(ledger, "charges") == 11
    with duckdb.connect() as plain:
        plain.execute(ledger.read("views.sql").decode())
        assert plain.sql("SELECT count(*) FROM charges").fetchall() == [(11,)]


# Ten of the largest still fit 38 digits.
costs = st.integers(0, 10**37 - 1).map(lambda units: Decimal(f"{units}E-18"))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(amounts=st.lists(st.tuples(st.sampled_from(["a", "b", "ü"]), costs), min_size=1, max_size=9))
def test_sums_by_pool_are_exact(tmp_path_factory: pytest.TempPathFactory, amounts: list[tuple[str, Decimal]]) -> None:
    """Whatever the amounts, the views' sums equal Python's own to the last of 38 digits."""
    ledger = Store.at(str(tmp_path_factory.mktemp("ledger")))
    rows = [
        {"charge_id": uuid.uuid4().bytes, "run_id": A, "run_date": DAY_A, "pool": pool, "currency": "USD", "cost": cost,
         "cost_native": cost}
        for pool, cost in amounts
    ]  # fmt: skip
    write_run(ledger, run_row(A, DAY_A, "complete"), {"charges": rows})
    expected: dict[str, int] = {}
    for pool, cost in amounts:
        expected[pool] = expected.get(pool, 0) + _units(cost)
    for sql in ("SELECT pool, sum(cost) AS cost FROM charges GROUP BY pool", "SELECT pool, cost FROM cost_by_pool"):
        found = query_ledger(ledger.url, sql).to_pylist()
        assert {row["pool"]: _units(row["cost"]) for row in found} == expected


def _units(cost: Decimal) -> int:
    sign, digits, exponent = cost.as_tuple()
    assert isinstance(exponent, int)
    units = int("".join(map(str, digits))) * 10 ** (exponent + 18)
    return -units if sign else units


def _count(ledger: Store, view: str) -> int:
    count: int = query_ledger(ledger.url, f"SELECT count(*) FROM {view}").column(0)[0].as_py()  # noqa: S608
    return count
