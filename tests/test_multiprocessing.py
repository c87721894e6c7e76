"""Workers in processes of their own: the same job, the same answers, and nobody left behind."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from small_jobs import check_conserved, make_job, prompts, remote, written

from bidbeam.connectors.doubles import EndpointDouble
from bidbeam.connectors.errors import InputError
from bidbeam.pipelines.run import run

TWO_WORKERS = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]

pytestmark = pytest.mark.timeout(120)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def nobody_left(before: set[int]) -> bool:
    for _ in range(50):
        if not children() - before:
            return True
        time.sleep(0.1)
    return False


def test_two_processes_give_the_answers_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same job on two worker processes, over real endpoints with a key, gives the same outputs by request id."""
    monkeypatch.setenv("NEAR_KEY", "planted-key-of-the-near-pool")
    rows = prompts(40).append_column("tag", pa.array([n % 3 for n in range(40)], pa.int8()))
    found: list[dict[str, Any]] = []
    before = children()
    with (
        EndpointDouble(["tiny"], api_key="planted-key-of-the-near-pool") as near,
        EndpointDouble(["tiny"]) as far,
    ):
        pools = [
            remote(
                "near", near.base_url, api_key_env="NEAR_KEY", capacity={"concurrency": 4, "tokens_per_second": 500}
            ),
            remote("far", far.base_url, price={"input": "0.2", "output": "0.8"}),
        ]
        for name, options in (("one", []), ("two", TWO_WORKERS)):
            job = make_job(tmp_path / name, rows, pools)
            assert run(job, options).status == "complete"
            read = written(job)
            check_conserved(read, 40)
            found.append({row["request_id"]: row for row in read.outputs.to_pylist()})
        assert len(near.served) + len(far.served) == 80
    assert nobody_left(before)
    one, two = found
    # Neither what a shared cache had by the second time nor, with it, the cost.
    same = ("output", "finish_reason", "model", "input_tokens", "output_tokens", "attempts", "tag", "prompt")
    assert {key: [row[name] for name in same] for key, row in one.items()} == {
        key: [row[name] for name in same] for key, row in two.items()
    }


def test_an_error_in_a_worker_reaches_the_user_as_it_is(tmp_path: Path) -> None:
    """What a worker process raises ends the run as the very error, and no process outlives it."""
    job = make_job(tmp_path, prompts(2000), [remote("near")])
    path = tmp_path / "in" / "a.parquet"
    data = bytearray(path.read_bytes())
    data[60:400] = bytes(340)
    path.write_bytes(data)
    before = children()
    with pytest.raises(InputError, match=r"a\.parquet cannot be read"):
        run(job, TWO_WORKERS)
    assert nobody_left(before)
