"""Verify: a sound ledger passes, and whatever is changed in it, cell by cell and file by file, is found and named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_jobs import DAY, by_the_hour, prompts, remote, write_job
from tiny_model import tiny_model

from bidbeam.connectors.doubles import EndpointDouble, Reply
from bidbeam.connectors.errors import UsageError
from bidbeam.connectors.ledger_manifest import latest_manifests
from bidbeam.connectors.ledger_reader import open_ledger, run_query
from bidbeam.connectors.store import Store
from bidbeam.pipelines.cli import invoke
from bidbeam.pipelines.job import Job
from bidbeam.pipelines.progress import NullProgress
from bidbeam.pipelines.run import run_job
from bidbeam.pipelines.verify import Verification, verification_text, verify_ledger
from bidbeam.pipelines.verify_rules import RULES

TAO = {"rate": "401.123456789", "at": "2026-01-01T00:00:00Z", "source": "by hand"}


def rows() -> pa.Table:
    """60 requests of two tenants, a third of them for one pool alone, a duplicate, a poison row and a repeated id."""
    table = prompts(60)
    asked = ['{"operators":["community"]}', '{"operators":["cloud"]}', '{"operators":["cloud"]}']
    for name, values in (("customer", ["acme", "bolt"]), ("placement", asked)):
        table = table.append_column(name, pa.array([values[n % len(values)] for n in range(60)]))
    more = {"id": ["twin", "poison", "q0"], "prompt": [table["prompt"][0].as_py(), "", "again"]}
    return pa.concat_tables([table, pa.table(more | {"customer": ["acme"] * 3, "placement": [asked[0]] * 3})])


def home_of(home: Path, table: pa.Table, pools: Sequence[Any], **keys: Any) -> Path:
    """A job whose pools file has an exchange rate."""
    path = write_job(home, table, pools, **keys)
    document = json.loads((home / "pools.yaml").read_text())
    (home / "pools.yaml").write_text(json.dumps({**document, "fx": {"TAO": TAO}}))
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that bought for dollars and for TAO, with failures, retries, a duplicate and dead letters."""
    home = tmp_path_factory.mktemp("sound")
    calls = iter(range(1000))
    with EndpointDouble(["tiny"], lambda _: Reply.error(500) if next(calls) % 7 == 0 else Reply()) as double:
        pools = [
            remote("near", double.base_url, placement={"jurisdiction": "DE", "operator": "cloud"}),
            remote(
                "subnet",
                double.base_url,
                price={"input": "0.0003", "output": "0.000997", "currency": "TAO"},
                placement={"jurisdiction": "FR", "operator": "community"},
            ),
        ]
        keys = {
            "prompt": {"id": "id", "column": "prompt", "tenant": "customer"},
            "budget": {"max_cost": "5"},
            "placement": {"jurisdictions": ["EEA"]},
            "tags": {"team": "growth"},
            "baseline": {"name": "list", "input": "0.50", "cached_input": "0.05", "output": "1.50", "per": "1M tokens"},
        }
        path = home_of(home, rows(), pools, **keys)
        summary = run_job(Job.from_yaml(path, run_date=DAY), rehearse=False, beam_options=[], progress=NullProgress())
    assert summary.served >= 55
    return home


@dataclass
class Damaged:
    """A copy of the sound ledger in which things are changed."""

    home: Path

    @property
    def ledger(self) -> Path:
        return self.home / "ledger"

    def part(self, table: str) -> Path:
        (manifest,) = latest_manifests(Store.at(str(self.ledger)))
        return self.ledger / max((p for p in manifest.parts if p.table == table), key=lambda p: p.rows).path

    def relist(self, path: Path, **changes: Any) -> None:
        """Makes the manifest say what the file now is, or what ``changes`` say."""
        manifest = max(self.ledger.glob("runs/*/*/manifest-*.json"))
        document = json.loads(manifest.read_text())
        for part in document["parts"]:
            if self.ledger / part["path"] == path:
                data = path.read_bytes()
                now = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                part.update(now | {"rows": pq.read_metadata(path).num_rows} | changes)
        manifest.write_text(json.dumps(document))

    def edit(self, table: str, change: Callable[[pa.Table], pa.Table]) -> Path:
        """Changes a part of a table and hides it from the check of files."""
        path = self.part(table)
        pq.write_table(change(pq.ParquetFile(path).read()), path)
        self.relist(path)
        return path

    def set(self, table: str, column: str, value: Any, where: Callable[[dict[str, Any]], bool] | None = None) -> None:
        """Replaces one cell: that of the first row that ``where`` picks."""

        def change(rows: pa.Table) -> pa.Table:
            place = next(n for n, row in enumerate(rows.to_pylist()) if where is None or where(row))
            field = rows.schema.field(column)
            plain = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
            values = rows.column(column).to_pylist()
            values[place] = value(values[place]) if callable(value) else value
            changed = pa.array(values, plain)
            return rows.set_column(rows.schema.get_field_index(column), column, changed.cast(field.type))

        self.edit(table, change)

    def verify(self) -> Verification:
        return verify_ledger(str(self.ledger))

    def failed(self) -> dict[str, int]:
        return {check.name.split(": ")[-1]: check.failed for check in self.verify().checks if check.failed}


@pytest.fixture
def damaged(sound: Path, tmp_path: Path) -> Damaged:
    shutil.copytree(sound / "ledger", tmp_path / "ledger")
    return Damaged(tmp_path)


def test_a_sound_ledger_passes(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every check looks at something, finds nothing, and the command ends with 0."""
    found = verify_ledger(str(sound / "ledger"))
    assert found.ok, verification_text(found)
    assert found.skipped == {}
    assert all(check.checked for check in found.checks), [check.name for check in found.checks if not check.checked]
    assert {rule.name for rule in RULES} < {check.name for check in found.checks}
    assert invoke(["ledger", "verify", str(sound / "ledger")]) == 0
    assert "everything adds up" in capsys.readouterr().out
    assert invoke(["ledger", "verify", str(sound / "ledger"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert told["runs"] == list(found.runs)


ULP = Decimal("1e-18")


def _more(value: Decimal) -> Decimal:
    return value + ULP


@pytest.mark.parametrize(
    ("table", "column", "value", "where", "names"),
    [
        ("charges", "cost_native", _more, None, {"charges.cost_native", "charges.cost"}),
        ("charges", "quantity", lambda q: q + 1, None, {"charges.cost_native"}),
        ("charges", "unit_price", lambda p: p * 2, None, {"charges.cost_native", "charges.price_id"}),
        ("charges", "cost", _more, lambda r: r["currency"] == "TAO", {"charges.cost", "requests.cost", "runs.cost"}),
        ("charges", "cost", None, None, {"charges.cost", "runs.cost"}),
        ("charges", "fx_rate", Decimal(2), lambda r: r["currency"] == "USD", {"charges.cost"}),
        ("charges", "fx_rate", Decimal("401.1"), lambda r: r["currency"] == "TAO", {"charges.cost"}),
        ("charges", "currency", "EUR", lambda r: r["currency"] == "TAO", {"charges.price_id"}),
        ("charges", "price_id", "nowhere", None, {"charges.price_id"}),
        ("charges", "meter", "request", None, {"charges.charge_id", "charges.price_id", "attempts.charged"}),
        ("charges", "pool", "other", None, {"charges.attempt_id", "charges.price_id"}),
        ("charges", "request_id", "other", None, {"charges.attempt_id"}),
        ("charges", "charge_id", b"0" * 16, None, {"charges.charge_id"}),
        ("charges", "attempt_id", b"0" * 16, None, {"charges.charge_id", "charges.attempt_id", "requests.cost"}),
        ("prices", "unit_price", lambda p: p / 2, None, {"charges.price_id"}),
        ("charges", "baseline_cost", _more, lambda r: r["baseline_cost"] is not None, {"charges.baseline_cost"}),
        ("charges", "baseline_cost", None, lambda r: r["baseline_cost"] is not None, {"charges.baseline_cost"}),
        ("charges", "baseline_cost", ULP, lambda r: r["baseline_cost"] is None, {"charges.baseline_cost"}),
        ("charges", "baseline", "other", lambda r: r["baseline_cost"] is not None, {"charges.baseline_cost"}),
        ("baselines", "unit_price", lambda p: p * 2, None, {"charges.baseline_cost"}),
        ("attempts", "usage_source", "estimate", lambda r: r["status"] == "ok", {"charges.baseline_cost"}),
        ("attempts", "kind", "audit", lambda r: r["status"] == "ok", {"charges.baseline_cost"}),
        ("attempts", "cache_write_tokens", 10**6, lambda r: r["status"] == "ok", {"attempts.tokens"}),
        ("attempts", "cached_tokens", 10**6, lambda r: r["status"] == "ok", {"attempts.tokens"}),
        (
            "attempts",
            "output_tokens",
            lambda n: n + 1,
            lambda r: r["status"] == "ok",
            {"attempts.charged", "runs.tokens"},
        ),
        ("attempts", "input_tokens", -1, lambda r: r["status"] == "ok", {"attempts.tokens", "attempts.charged"}),
        ("attempts", "status", "failed", lambda r: r["status"] == "ok", {"requests.status"}),
        ("attempts", "jurisdiction", "US", None, {"attempts.jurisdiction"}),
        ("attempts", "jurisdiction", None, None, {"attempts.jurisdiction"}),
        ("requests", "cost", _more, lambda r: r["status"] == "served", {"requests.cost"}),
        ("requests", "cost", _more, lambda r: r["shared_with"] is not None, {"requests.shared_with"}),
        ("requests", "shared_with", "nobody", lambda r: r["shared_with"] is not None, {"requests.shared_with"}),
        ("requests", "status", "dead", lambda r: r["status"] == "served", {"requests.status", "runs.requests"}),
        ("requests", "source_row", 0, lambda r: r["source_row"] > 0, {"runs.requests"}),
        ("requests", "attempt_id", None, lambda r: r["status"] == "served", {"requests.status", "runs.tokens"}),
        ("runs", "cost", _more, None, {"runs.cost"}),
        ("runs", "served", lambda n: n + 1, None, {"runs.requests"}),
        ("runs", "cached_tokens", lambda n: n + 1, None, {"runs.tokens"}),
        ("bids", "score", _more, lambda r: r["eligible"], {"bids.score"}),
        ("bids", "worst_case_cost", Decimal(0), lambda r: r["eligible"], {"bids.score"}),
        ("bids", "eligible", False, lambda r: r["eligible"], {"bids.score", "awards.pool"}),
        ("awards", "pool", "far", None, {"awards.pool"}),
        ("awards", "reserved", ULP, None, {"awards.reserved"}),
        ("awards", "start", 2, None, {"awards.pool", "auctions.lp_bound"}),
        ("auctions", "awarded", lambda n: n + 1, None, {"auctions.lp_bound"}),
        ("auctions", "objective", Decimal(0), lambda r: r["lp_bound"] > 0, {"auctions.lp_bound"}),
    ],
)
def test_one_changed_cell_is_found(
    damaged: Damaged, table: str, column: str, value: Any, where: Any, names: set[str]
) -> None:
    """Whichever cell is changed, even with the manifest made to fit, the rules that it breaks name it."""
    damaged.set(table, column, value, where)
    found = damaged.failed()
    assert names <= set(found), found
    assert "files" not in found


def test_a_repeated_charge_is_found(damaged: Damaged) -> None:
    """A part whose rows stand there twice doubles no bill unnoticed."""
    damaged.edit("charges", lambda rows: pa.concat_tables([rows, rows.slice(0, 1)]))
    assert {"charges.attempt_id", "runs.cost"} <= set(damaged.failed())


def test_a_lost_row_is_found(damaged: Damaged) -> None:
    """An answered attempt, a charge or a request that is gone leaves a hole that is seen."""
    damaged.edit("requests", lambda rows: rows.slice(1))
    assert set(damaged.failed()) >= {"runs.requests", "cost"}
    damaged.edit("charges", lambda rows: rows.slice(1))
    assert "attempts.charged" in damaged.failed()
    damaged.edit("attempts", lambda rows: rows.filter(pc.is_valid(rows.column("output_tokens"))).slice(1))
    assert "charges.attempt_id" in damaged.failed()


@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "rows", "text", "money", "column"])
def test_a_damaged_file_is_named(damaged: Damaged, how: str) -> None:
    """Other bytes, fewer bytes, none, another count, no Parquet, money as floats, no column: each named with its file;
    what can still be checked is checked."""
    path = damaged.part("charges")
    if how == "flipped":
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-50])
    elif how == "gone":
        path.unlink()
    elif how == "text":
        path.write_text("not Parquet")
    elif how == "rows":
        damaged.relist(path, rows=1)
    elif how == "money":
        damaged.edit("charges", lambda rows: rows.set_column(14, "cost", rows.column("cost").cast(pa.float64())))
    else:
        damaged.edit("charges", lambda rows: rows.drop_columns(["fx_rate"]))
    found = damaged.verify()
    (files,) = [check for check in found.checks if check.name == "files"]
    assert files.failed == 1
    assert all(fault["file"] in str(path) for fault in files.faults)
    assert {check.name: check for check in found.checks}["attempts.tokens"].checked > 0
    text = verification_text(found)
    assert "AT FAULT files: 1 of" in text
    assert path.name in text


def test_outputs_are_held_to_the_ledger(sound: Path, tmp_path: Path) -> None:
    """An output's cost, its file and its manifest are compared with the ledger; where they are gone, that is said."""
    home = tmp_path / "all"
    shutil.copytree(sound, home)
    manifest = max((home / "ledger").glob("runs/*/*/manifest-*.json"))
    damaged = Damaged(home)
    # The copy's runs row names the directory that it was copied from.
    damaged.set("runs", "job", lambda job: job.replace(str(sound), str(home)))
    assert damaged.failed() == {}
    output = next((home / "out").rglob("outputs/*.parquet"))
    rows = pq.ParquetFile(output).read()
    costs = [row + ULP if n == 0 else row for n, row in enumerate(rows.column("cost").to_pylist())]
    place = rows.schema.get_field_index("cost")
    pq.write_table(rows.set_column(place, "cost", pa.array(costs, rows.schema.field(place).type)), output)
    assert set(damaged.failed()) == {"files", "cost"}
    success = next((home / "out").rglob("_INCOMPLETE"))
    document = json.loads(success.read_text())
    success.write_text(json.dumps({**document, "cost": "0"}))
    assert set(damaged.failed()) == {"files", "cost", "manifest"}
    success.unlink()
    found = damaged.verify()
    assert found.ok
    assert "no manifest" in next(iter(found.skipped.values()))
    assert manifest.exists()


def test_time_on_an_engine_of_ours_is_verified(tmp_path: Path) -> None:
    """Seconds, idle ones and those of setup add up too, in the rehearsals' own ledger."""
    pools = [
        by_the_hour("own", placement={"operator": "cloud"}),
        remote("near", price={"input": "0.3", "output": "2"}, placement={"operator": "community"}),
    ]
    job = Job.from_yaml(write_job(tmp_path, rows(), pools, models={"tiny": {"source": tiny_model()}}), run_date=DAY)
    run_job(job, rehearse=True, beam_options=[], progress=NullProgress())
    found = verify_ledger(str(tmp_path / "ledger"), rehearsals=True)
    assert found.ok, verification_text(found)
    assert found.skipped == {}
    assert {check.name: check.checked for check in found.checks}["charges.cost"] > 60


@pytest.mark.parametrize("budget", [None, {"max_cost": "1.00"}], ids=["no budget", "a budget"])
def test_what_is_asked_of_a_pool_again_that_charged_for_nothing_is_within_its_award(
    tmp_path: Path, budget: dict[str, str] | None
) -> None:
    """An award reserves one try of each request; the second is the round's to pay for."""
    empty = [{"index": 0, "message": {"role": "assistant", "content": " "}, "finish_reason": "stop"}]
    blank = {2, 5, 9}
    with EndpointDouble(
        ["tiny"], lambda seen: Reply(merge={"choices": empty}) if len(double.requests) in blank else Reply()
    ) as double:
        pools = [remote("near", double.base_url, price={"request": "0.01"}, capacity={"concurrency": 1})]
        job = Job.from_yaml(write_job(tmp_path, prompts(12), pools, budget=budget), run_date=DAY)
        summary = run_job(job, rehearse=False, beam_options=[], progress=NullProgress())
    assert (summary.served, summary.cost) == (12, Decimal("0.15"))
    assert verify_ledger(job.ledger).ok


def test_a_run_that_was_started_again_is_verified(tmp_path: Path) -> None:
    """Rows that moved, changed or went away between two starts of a run, or another baseline, leave a ledger that still
    adds up."""
    table = prompts(12)
    calls = iter(range(1000))
    with EndpointDouble(["tiny"], lambda _: Reply.error(500) if next(calls) % 3 == 0 else Reply()) as double:
        pools = [remote("near", double.base_url)]

        def start(rows: pa.Table, output: str | None = None) -> None:
            keys: dict[str, Any] = {"prompt": {"column": "prompt"}, "auction": {"rounds": 1}}
            if output is not None:
                keys["baseline"] = {"name": "list", "input": "0.50", "output": output, "per": "1M tokens"}
            path = write_job(tmp_path, rows, pools, **keys)
            run_job(Job.from_yaml(path, run_date=DAY), rehearse=False, beam_options=[], progress=NullProgress())
            found = verify_ledger(str(tmp_path / "ledger"))
            assert found.ok, verification_text(found)

        start(table)
        start(pa.concat_tables([prompts(3, start=50), table.slice(2)]), "1.50")
        start(pa.concat_tables([prompts(3, start=90), table.slice(0, 5)]), "1.70")

    with open_ledger(str(tmp_path / "ledger")) as ledger:
        prices = {row["output_price"] for row in run_query(ledger, _SAVED).to_pylist()}
        assert prices == {Decimal("0.0000017")}
        assert run_query(ledger, "SELECT DISTINCT start, round FROM regret").num_rows == 3


_SAVED = """
SELECT CAST((baseline_cost - 0.0000005 * input_tokens) / output_tokens AS DECIMAL(20, 10)) AS output_price
FROM savings JOIN cost_per_request USING (run_id, request_id)
WHERE baseline_cost IS NOT NULL"""
"""What an output token costs at the baseline that savings are counted against."""


def test_a_run_is_verified_alone(damaged: Damaged, capsys: pytest.CaptureFixture[str]) -> None:
    """--run looks at one run; an unknown one is refused with the nearest; a fault makes the exit code 1."""
    run_id = damaged.verify().runs[0]
    assert verify_ledger(str(damaged.ledger), run_id=run_id).runs == (run_id,)
    with pytest.raises(UsageError, match=run_id):
        verify_ledger(str(damaged.ledger), run_id=run_id[:-1])
    with pytest.raises(UsageError, match="is not a ledger"):
        verify_ledger(str(damaged.home / "nowhere"))
    damaged.set("runs", "cost", _more)
    assert invoke(["ledger", "verify", str(damaged.ledger), "--run", run_id]) == 1
    assert "AT FAULT runs.cost: 1 of 1" in capsys.readouterr().out


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    column=st.sampled_from(["quantity", "unit_price", "cost_native", "cost"]),
    place=st.integers(0, 10**6),
    by=st.integers(1, 10**6),
)
def test_no_charge_can_be_changed_by_any_amount(
    sound: Path, tmp_path_factory: pytest.TempPathFactory, column: str, place: int, by: int
) -> None:
    """Any money column of any charge, changed by any number of its last places, is found."""
    home = tmp_path_factory.mktemp("changed")
    shutil.copytree(sound / "ledger", home / "ledger")
    damaged = Damaged(home)
    path = damaged.part("charges")
    count = pq.read_metadata(path).num_rows
    seen = iter(range(count))
    scale = {"quantity": 3, "unit_price": 15}.get(column, 18)
    damaged.set(
        "charges", column, lambda value: value + Decimal(by).scaleb(-scale), lambda _: next(seen) == place % count
    )
    assert any(name.startswith("charges.cost") for name in damaged.failed())
    shutil.rmtree(home)
