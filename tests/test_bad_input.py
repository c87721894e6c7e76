"""Bad input: refused with exit 2 and one message that says what to do, before anything is sent or written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_jobs import prompts, remote, write_job

from bidbeam.connectors.doubles import EndpointDouble
from bidbeam.pipelines.cli import invoke

pytestmark = pytest.mark.timeout(60)


def _missing(home: Path) -> dict[str, Any]:
    return {"input": str(home / "nowhere.parquet")}


def _truncated(home: Path) -> dict[str, Any]:
    whole = (home / "in" / "a.parquet").read_bytes()
    (home / "in" / "a.parquet").write_bytes(whole[: len(whole) // 2])
    return {}


def _not_parquet(home: Path) -> dict[str, Any]:
    (home / "in" / "b.parquet").write_text("id,prompt\n1,hello\n")
    return {}


def _empty_file(home: Path) -> dict[str, Any]:
    (home / "in" / "b.parquet").touch()
    return {}


def _disagreeing(home: Path) -> dict[str, Any]:
    pq.write_table(pa.table({"id": ["z"], "prompt": [b"bytes"]}), home / "in" / "b.parquet")
    return {}


def _file_in_the_way(name: str) -> Callable[[Path], dict[str, Any]]:
    def make(home: Path) -> dict[str, Any]:
        (home / "file").write_text("in the way")
        return {name: str(home / "file" / "below")}

    return make


def _keys(**keys: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda home: keys


def _pool(**keys: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda home: {"pool": keys}


CASES: dict[str, tuple[Callable[[Path], dict[str, Any]], list[str]]] = {
    "missing input": (_missing, ["nowhere.parquet"]),
    "empty glob": (lambda home: {"input": str(home / "none" / "*.parquet")}, ["none/*.parquet"]),
    "truncated file": (_truncated, ["a.parquet", "write it again"]),
    "no Parquet at all": (_not_parquet, ["b.parquet", "write it again"]),
    "empty file": (_empty_file, ["b.parquet"]),
    "files that disagree": (_disagreeing, ["b.parquet", "'prompt'"]),
    "wrong prompt column": (_keys(prompt={"id": "id", "column": "prumpt"}), ["prumpt", "did you mean 'prompt'"]),
    "wrong id column": (_keys(prompt={"id": "idd", "column": "prompt"}), ["idd", "did you mean 'id'"]),
    "template with a wrong column": (_keys(prompt={"template": "Say {{ promt }}"}), ["promt", "'prompt'"]),
    "template that does not compile": (_keys(prompt={"template": "Say {{ prompt"}), ["template"]),
    "unknown model": (_keys(model="tinny"), ["tinny", "'tiny'"]),
    "unknown model of a pool": (_pool(models=["tinny"]), ["pools.yaml:1", "tinny", "'tiny'"]),
    "unknown kind of pool": (_pool(kind="opneai"), ["pools.yaml:1", "opneai", "'openai'"]),
    "unknown key of a pool": (_pool(capcity={}), ["pools.yaml:1", "capcity", "'capacity'"]),
    "negative price": (_pool(price={"input": "-0.10", "output": "1"}), ["pools.yaml:1", "-0.10"]),
    "unset key variable": (_pool(api_key_env="NOT_SET_ANYWHERE"), ["pools.yaml:1", "NOT_SET_ANYWHERE"]),
    "sampling out of range": (_keys(sampling={"max_tokens": 0}), ["max_tokens"]),
    "negative budget": (_keys(budget={"max_cost": "-1"}), ["max_cost"]),
    "output below a file": (_file_in_the_way("output"), ["file/below"]),
    "ledger below a file": (_file_in_the_way("ledger"), ["file/below"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_before_anything_is_spent(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 2, one message that names what is wrong, no request, and neither output nor ledger."""
    prepare, expected = CASES[case]
    with EndpointDouble(["tiny"]) as double:
        write_job(tmp_path, prompts(3), [])
        keys = prepare(tmp_path)
        pool = remote("near", double.base_url, **keys.pop("pool", {}))
        job = write_job(tmp_path, None, [pool], **keys)
        code = invoke(["run", str(job), "--quiet"])
        out, err = capsys.readouterr()
        assert (code, double.requests) == (2, []), err
    for words in expected:
        assert words in err, err
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("error: ")
    assert out == ""
    assert "Traceback" not in err
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".parquet" and path.parent.name != "in"]
    assert not list(tmp_path.rglob("manifest-*"))


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/self").exists(), reason="needs a place nobody may write to")
@pytest.mark.parametrize("what", ["output", "ledger"])
def test_an_unwritable_place_is_refused(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A directory that cannot be made or written, by root neither, ends the run with exit 2 and its name."""
    with EndpointDouble(["tiny"]) as double:
        job = write_job(tmp_path, prompts(3), [remote("near", double.base_url)], **{what: "/proc/self/bidbeam"})
        assert invoke(["run", str(job), "--quiet"]) == 2
        assert not double.requests
    assert "/proc/self/bidbeam" in capsys.readouterr().err


def test_an_input_that_changes_under_the_run_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is damaged where only its data shows it ends the run by name, with nothing sent."""
    with EndpointDouble(["tiny"]) as double:
        job = write_job(tmp_path, prompts(2000), [remote("near", double.base_url)])
        path = tmp_path / "in" / "a.parquet"
        data = bytearray(path.read_bytes())
        data[60:400] = bytes(340)
        path.write_bytes(data)
        code = invoke(["run", str(job), "--quiet"])
        _, err = capsys.readouterr()
        assert (code, double.requests) == (2, []), err
    assert "a.parquet" in err
    assert "write it again" in err


def test_a_fresh_process_says_it_in_one_line_too(tmp_path: Path) -> None:
    """The installed command refuses in one line on stderr, without a warning of any library's."""
    job = write_job(tmp_path, prompts(3), [remote("near")], input=str(tmp_path / "none" / "*.parquet"))
    done = subprocess.run(
        [sys.executable, "-m", "bidbeam.pipelines.cli", "run", str(job)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")


def test_a_column_that_means_two_things_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A column in the template that is named like a sampling key sets that key too: many answers a row, perhaps."""
    rows = prompts(3).append_column("n", pa.array([1, 2, 3]))
    keys = {"prompt": {"template": "Item {{ n }}"}}
    job = write_job(tmp_path, rows, [remote("near")], **keys)
    said = "column 'n' is in the template, and also sets the sampling key n of its row"
    assert invoke(["run", str(job), "--rehearse"]) == 0
    assert said in capsys.readouterr().err
    assert invoke(["quote", str(job)]) == 0
    assert said in capsys.readouterr().err
    plain = write_job(tmp_path / "plain", rows.rename_columns(["id", "prompt", "number"]), [remote("near")], **keys)
    plain.write_text(plain.read_text().replace("{{ n }}", "{{ number }}"))
    assert invoke(["run", str(plain), "--rehearse"]) == 0
    assert said not in capsys.readouterr().err
