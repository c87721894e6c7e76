"""Leased nodes: Targon's inventory, Render's nodes, and a lease that is given back however a run ends."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from small_jobs import Written, check_conserved, make_job, prompts, written

from bidbeam.connectors import leases
from bidbeam.connectors.doubles import EndpointDouble, Reply
from bidbeam.connectors.errors import PoolDown
from bidbeam.connectors.front_render import KEY, RenderFront
from bidbeam.connectors.front_targon import TargonFront, machine
from bidbeam.connectors.leases import LeaseBook, LeaseRecord
from bidbeam.connectors.store import Store
from bidbeam.connectors.targon import Offer, targon_offers
from bidbeam.pipelines.job import Job
from bidbeam.pipelines.progress import NullProgress
from bidbeam.pipelines.run import run_job

# -- Targon's inventory --


def test_targons_inventory_becomes_offers_with_exact_prices() -> None:
    machines = [
        machine("h200-small", "NVIDIA-H200", 1, 2.4, 3),
        machine("cpu-large", "", 0, 0.2, 9),
        machine("h200-large", "NVIDIA-H200", 8, 19.2, 0, "vm"),
    ]
    with TargonFront(machines) as front:
        offers = targon_offers(front.url, "tgn-key")
    assert offers == [
        Offer("h200-small", "NVIDIA-H200", 1, Decimal("2.4"), 3, "rental"),
        Offer("h200-large", "NVIDIA-H200", 8, Decimal("19.2"), 0, "vm"),
    ]
    assert front.calls[0].headers["authorization"] == "Bearer tgn-key"


def test_an_entry_that_is_not_whole_is_no_offer() -> None:
    whole = machine("a", "H100", 1, 1.5, 2)
    broken = [
        {**whole, "name": "b", "cost_per_hour": 0},
        {**whole, "name": "c", "cost_per_hour": -1},
        {**whole, "name": "d", "cost_per_hour": "nan"},
        {**whole, "name": "e", "spec": None},
        {**whole, "name": "f", "cost_per_hour": "1.75", "available": "many"},
    ]
    with TargonFront([whole, *broken]) as front:
        offers = targon_offers(front.url, None)
    assert [(offer.name, offer.price_per_hour, offer.available) for offer in offers] == [
        ("a", Decimal("1.5"), 2),
        ("f", Decimal("1.75"), None),
    ]


@pytest.mark.parametrize(
    "failing",
    [
        Reply(410, b""),
        Reply.garbage(),
        Reply(200, b"{}"),
        Reply.error(401, "bad key tgn-secret-key-123"),
        Reply(302, b"", {"Location": "http://127.0.0.1:9/elsewhere"}),
        Reply(cut="reset"),
    ],
    ids=["gone", "garbage", "no list", "key refused", "moved", "reset"],
)
def test_a_feed_that_does_not_answer_as_it_should_is_down_and_leaks_no_key(failing: Reply) -> None:
    with TargonFront([], failing) as front, pytest.raises(PoolDown) as caught:
        targon_offers(front.url, "tgn-secret-key-123")
    assert "secret" not in str(caught.value)


# -- a run on a rented node --

HOUR = "3.60"  # a tenth of a cent a second


def lease_pool(front: RenderFront, node: EndpointDouble, **keys: Any) -> dict[str, Any]:
    options = {"gpu_tier": "premium", "image": "ghcr.io/example/vllm", "region": "eu-west", "address": node.base_url}
    pool: dict[str, Any] = {
        "name": "render",
        "kind": "lease",
        "profile": "render",
        "base_url": front.base_url,
        "models": ["tiny"],
        "price": {"accelerator_hour": HOUR},
        "capacity": {"concurrency": 4, "tokens_per_second": 2000},
        "context": 4096,
        "options": options | keys.pop("options", {}),
    }
    return pool | keys


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RENDER_API_KEY", KEY)
    monkeypatch.setattr(leases, "RELEASE_WAITS_S", (0.01, 0.01))


@pytest.fixture
def node() -> Iterator[EndpointDouble]:
    with EndpointDouble(["tiny"]) as double:
        yield double


def open_leases(job: Job) -> list[LeaseRecord]:
    run_dir = Path(job.output) / f"run_date={job.run_date}" / f"run_id={job.run_id}"
    return LeaseBook(Store.at(str(run_dir / "_journal"))).open()


def run(job: Job) -> tuple[int, Written]:
    summary = run_job(job, rehearse=False, beam_options=[], progress=NullProgress())
    return summary.exit_code, written(job)


def seconds(found: Written, pool: str = "render") -> dict[str, Decimal]:
    """What was charged on each meter."""
    sums: dict[str, Decimal] = {}
    for charge in found.rows("charges"):
        if charge["pool"] == pool:
            sums[charge["meter"]] = sums.get(charge["meter"], Decimal(0)) + charge["quantity"]
    return sums


def test_a_node_is_rented_served_through_and_given_back(node: EndpointDouble, tmp_path: Path) -> None:
    with RenderFront(looks=2) as front:
        job = make_job(tmp_path, prompts(12), [lease_pool(front, node)])
        code, found = run(job)
        assert front.alive == []
        (rented,) = front.nodes.values()
        asked = next(call for call in front.calls if call.method == "POST")
    assert code == 0
    check_conserved(found, 12)
    assert (rented.state, rented.gpu_tier, rented.region) == ("terminated", "premium", "eu-west")
    assert asked.body["container_image"] == "ghcr.io/example/vllm"
    assert len(node.served) == 12
    assert open_leases(job) == []
    assert "authorization" not in node.requests[0].headers, "the account's key stays with the account"
