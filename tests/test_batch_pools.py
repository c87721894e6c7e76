"""Pools of ``kind: batch``: rows go to a provider's batch API, come back in hours, and are paid for once."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from small_jobs import Written, check_conserved, make_job, prompts, remote, total, written

from bidbeam.connectors.doubles import EndpointDouble
from bidbeam.connectors.front_batch import BatchFront
from bidbeam.pipelines.job import Job
from bidbeam.pipelines.run import run

pytestmark = pytest.mark.timeout(60)

HALF = {"input": "0.05", "cached_input": "0.005", "output": "0.20"}


@pytest.fixture
def upstream() -> Iterator[EndpointDouble]:
    with EndpointDouble(["tiny"]) as double:
        yield double


def batch(front: BatchFront, name: str = "slow", **keys: Any) -> dict[str, Any]:
    """A batch pool at half the price of an endpoint."""
    options = {"poll": "10ms", "window": "1h", **keys.pop("options", {})}
    return remote(name, front.base_url, **{"kind": "batch", "price": HALF, "options": options, **keys})


def check(job: Job, rows: int) -> Written:
    found = written(job)
    check_conserved(found, rows)
    return found


def bill(front: BatchFront) -> Decimal:
    """What the front's books come to at ``HALF``, in USD."""
    rates = {name: Decimal(price) / 1_000_000 for name, price in HALF.items()}
    return sum(
        (
            (ran.prompt_tokens - (ran.cached_tokens or 0)) * rates["input"]
            + (ran.cached_tokens or 0) * rates["cached_input"]
            + (ran.completion_tokens or 0) * rates["output"]
            for ran in front.served
            if ran.prompt_tokens is not None
        ),
        Decimal(0),
    )


def test_a_run_on_a_batch_pool_is_one_file_and_its_ledger_is_the_provider_s_bill(
    tmp_path: Path, upstream: EndpointDouble
) -> None:
    """All prompts go into one batch, named by nothing that says what they ask; tokens and cost agree to the last."""
    with BatchFront(upstream.base_url) as front:
        job = make_job(tmp_path, prompts(300), [batch(front)])
        summary = run(job)
        assert (summary.status, summary.served) == ("complete", 300)
        assert len(front.batches) == 1
    found = check(job, 300)
    assert total(found.rows("charges")) == bill(front)
    assert len(front.served) == len(found.attempts) == 300
    sent = front.files[front.batches[0].input_file]
    assert all(set(row) == {"custom_id", "method", "url", "body"} for row in front.batches[0].rows)
    assert b"item 17 of the list" in sent
    assert front.batches[0].metadata["bidbeam_run"] == job.run_id
    assert not list((found.run_dir / "_journal").rglob("*.intent.arrow"))
