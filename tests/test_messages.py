"""What a wrong job is told: where it is wrong, all that is missing at once, and what would be right."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pyarrow as pa
import pytest
from small_jobs import make_job, remote, write_job

from bidbeam.connectors.errors import ConfigError, InputError
from bidbeam.connectors.near import near, nears
from bidbeam.pipelines.begin import begin
from bidbeam.pipelines.cli import invoke
from bidbeam.pipelines.init import write_starter
from bidbeam.pipelines.job import Job

ROWS = pa.table({"id": ["a"], "prompt": ["x"]})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "job.yaml:1: is empty (expected a job file with name, input, output, ledger, pools; bidbeam init DIR"),
        ("- a\n", "job.yaml:1: is a list (expected a job file with name, input"),
        ("name: x\noutput: o\nledger: l\npools: []\n", "job.yaml:1: input: is missing (expected a path"),
        ("name: x\noutput: o\nledger:\n", "input: is missing, and so are ledger, pools (expected input: a path, a"),
        (
            "name: x\ninput: [a\noutput: b\n",
            "job.yaml:3: not YAML: while parsing a flow sequence that begins on line 2,",
        ),
        ("name: x\n\tinput: y\n", "job.yaml:2: not YAML"),
        ("name: x\n\tinput: y\n", "; indent with spaces"),
        ('{"name": "x",\n "input" "y"}', "job.yaml:2: not YAML"),
    ],
)
def test_a_job_file_that_is_none_says_what_one_is(tmp_path: Path, text: str, says: str) -> None:
    """Empty, of another shape, without several keys, or no YAML: one message with the line, and all that is missing."""
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        Job.from_yaml(tmp_path / "job.yaml")
    assert says in str(caught.value)


def test_a_pool_tells_all_that_it_lacks(tmp_path: Path) -> None:
    """As a pools file tells that it is empty."""
    path = write_job(tmp_path, ROWS, [{"name": "far"}])
    with pytest.raises(
        ConfigError, match=r"pools\[0\]\.kind: is missing, and so are models, price \(expected kind: vllm"
    ):
        Job.from_yaml(path)
    (tmp_path / "pools.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"pools\.yaml:1: is empty \(expected a pools file with models, fx, pools"):
        Job.from_yaml(path)


@pytest.mark.parametrize(
    ("prompt", "line", "says"),
    [
        ("{id: id, column: promt}", 6, "prompt.column: the input has no column 'promt'; did you mean 'prompt'?"),
        ("{id: id, column: text}", 6, "prompt.column: the input has no column 'text'; its columns are 'id', 'prompt'"),
        ("\n  id: key", 7, "prompt.id: the input has no column 'key'"),
        ("\n  id: id\n  template: 'Do {{ promt }}'", 8, "prompt.template: the input has no column 'promt'; did you"),
        ("\n  id: id\n  tenant: customer", 8, "prompt.tenant: the input has no column 'customer'"),
    ],
)
def test_a_column_that_is_not_there_is_told_at_the_line_that_names_it(
    tmp_path: Path, prompt: str, line: int, says: str
) -> None:
    """File and line of the job, the key, and the column that was probably meant."""
    path = write_job(tmp_path, ROWS, [remote("far")])
    keys = {name: value for name, value in json.loads(path.read_text()).items() if name not in ("prompt", "sampling")}
    head = [f"{name}: {json.dumps(keys.pop(name))}" for name in ("name", "input", "output", "ledger", "model")]
    path.write_text("\n".join([*head, f"prompt: {prompt}", *(f"{name}: {json.dumps(keys[name])}" for name in keys)]))
    with pytest.raises(InputError) as caught:
        begin(Job.from_yaml(path))
    assert str(caught.value).startswith(f"{path}:{line}: {says}")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301


def test_input_without_any_row_says_so(tmp_path: Path) -> None:
    """An empty file of lines has no column to name."""
    (tmp_path / "empty.jsonl").write_text("")
    job = make_job(tmp_path, None, [remote("far")], input=str(tmp_path / "empty.jsonl"))
    with pytest.raises(
        InputError, match=r"prompt\.id: the input has no column 'id', nor any other: its files are empty"
    ):
        begin(job)


def test_a_column_that_is_not_there_is_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the place that it was named at, as other mistakes in a job have it."""
    job = write_starter(str(tmp_path))[0]
    assert invoke(["quote", job, "--set", "prompt.column=promt", "--json"]) == 2
    told = json.loads(capsys.readouterr().out)["error"]
    assert (told["type"], told["file"], told["line"], told["key"]) == ("InputError", "--set", None, "prompt.column")


@pytest.mark.parametrize(
    ("wrong", "names", "meant"),
    [
        ("promt", ["prompt", "id"], ["prompt"]),
        ("OUTPUT", ["output"], ["output"]),
        ("Berlin", ["Europe/Paris", "Europe/Berlin"], ["Europe/Berlin"]),
        ("vgc", ["vcg", "uniform"], ["vcg"]),
        ("cost", ["max_cost", "costs"], ["costs", "max_cost"]),
        ("zebra", ["teapot", "lamp", "clock"], []),
        ("x", ["y", "a_x"], []),
        ("", ["y"], []),
    ],
)
def test_only_names_like_the_wrong_one_are_suggested(wrong: str, names: list[str], meant: list[str]) -> None:
    """The nearest first, then those of which it is a part; nothing where nothing is like it."""
    assert nears(wrong, names) == meant
    assert near(wrong, names) == (meant[0] if meant else None)
