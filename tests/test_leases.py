"""Leased nodes: Targon's inventory, Render's nodes, and a lease that is given back however a run ends."""

from __future__ import annotations

import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from small_jobs import DAY, Written, check_conserved, make_job, prompts, remote, total, write_job, written

from bidbeam.connectors import leases
from bidbeam.connectors.doubles import OK, RESET, EndpointDouble, Reply, Seen
from bidbeam.connectors.errors import ConfigError, PoolDown
from bidbeam.connectors.front_render import KEY, RenderFront
from bidbeam.connectors.front_server import Call
from bidbeam.connectors.front_targon import TargonFront, machine
from bidbeam.connectors.lease_engine import LeaseEngine
from bidbeam.connectors.leases import LeaseBook, LeaseRecord
from bidbeam.connectors.machines import Offer
from bidbeam.connectors.store import Store
from bidbeam.connectors.targon import targon_offers
from bidbeam.pipelines.job import Job
from bidbeam.pipelines.progress import NullProgress
from bidbeam.pipelines.run import run_job
from bidbeam.transforms.journal import list_segments, read_segment

SLACK = timedelta(milliseconds=50)
"""A node's own clock and the wall's may differ by so much."""

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
    options = {
        "gpu_tier": "premium", "image": "ghcr.io/example/vllm", "region": "eu-west", "address": node.base_url,
        "turnaround": "1",
    }  # fmt: skip
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


def journal_dir(job: Job) -> Path:
    return Path(job.output) / f"run_date={job.run_date}" / f"run_id={job.run_id}" / "_journal"


def open_leases(job: Job) -> list[LeaseRecord]:
    return LeaseBook(Store.at(str(journal_dir(job)))).open()


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


def test_what_is_booked_is_the_lease_to_the_millisecond(
    node: EndpointDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[LeaseEngine] = []
    begin = LeaseEngine.__init__

    def noted(self: LeaseEngine, *args: Any, **keys: Any) -> None:
        begin(self, *args, **keys)
        held.append(self)

    monkeypatch.setattr(LeaseEngine, "__init__", noted)
    with RenderFront(looks=2) as front:
        _, found = run(make_job(tmp_path, prompts(12), [lease_pool(front, node)]))
    (engine,) = held
    assert engine.asked_ms is not None
    rented = Decimal(engine.clock_ms() - engine.asked_ms) / 1000
    charged = seconds(found)
    assert set(charged) <= {"setup", "accelerator_second", "accelerator_idle_second"}
    assert charged["setup"] > 0
    assert sum(charged.values()) == rented
    assert Decimal(found.manifest["cost"]) == rented * Decimal(HOUR) / 3600


def test_other_pools_serve_while_a_node_comes_up(node: EndpointDouble, tmp_path: Path) -> None:
    """A node that never serves holds nobody up, and what was meant for it goes to the runner-up."""
    with EndpointDouble(["tiny", "other"]) as other, RenderFront(never=True) as front:
        pools = [
            lease_pool(front, node, options={"ready_within": "1"}),
            remote("other", other.base_url, models=["tiny", "other"], price={"input": "500", "output": "500"}),
        ]
        rows = prompts(12).append_column("model", pa.array(["tiny", "other"] * 6))
        job = make_job(tmp_path, rows, pools, models={"tiny": {}, "other": {}})
        code, found = run(job)
        assert front.alive == []
    assert code == 0
    check_conserved(found, 12)
    assert len(other.served) == 12
    assert node.requests == []
    (setup,) = [row for row in found.rows("attempts") if row["kind"] == "overhead"]
    first = min(row["finished_at"] for row in found.attempts)
    assert first < setup["started_at"] + timedelta(seconds=1) < setup["finished_at"]
    charged = seconds(found)
    assert set(charged) == {"setup"}, "a node that never served is paid for all the same"
    assert charged["setup"] >= 1
    assert open_leases(job) == []


def test_a_node_that_is_not_to_be_had_costs_nothing_and_its_lots_go_elsewhere(
    node: EndpointDouble, tmp_path: Path
) -> None:
    refuse = Reply.error(402, "insufficient credits", "payment_required")
    with EndpointDouble(["tiny"]) as other, RenderFront(refuse=refuse) as front:
        pools = [lease_pool(front, node), remote("other", other.base_url, price={"input": "500", "output": "500"})]
        job = make_job(tmp_path, prompts(6), pools)
        code, found = run(job)
        assert front.nodes == {}
    assert code == 0
    check_conserved(found, 6)
    assert seconds(found) == {}
    assert open_leases(job) == []


def test_without_another_pool_every_row_dies_and_nothing_is_left(node: EndpointDouble, tmp_path: Path) -> None:
    with RenderFront(refuse=Reply.error(409, "no capacity", "no_capacity")) as front:
        job = make_job(tmp_path, prompts(3), [lease_pool(front, node)])
        code, found = run(job)
        asked = [call for call in front.calls if call.method == "POST"]
    assert code == 3
    check_conserved(found, 3)
    assert len(asked) == 2, "once a round"
    assert total(found.rows("charges")) == 0
    assert open_leases(job) == []


@pytest.mark.parametrize("state", ["failed"])
def test_a_node_that_ends_by_itself_while_it_comes_up_is_given_back_too(
    state: str, node: EndpointDouble, tmp_path: Path
) -> None:
    with EndpointDouble(["tiny"]) as other, RenderFront(end_in=state) as front:
        pools = [lease_pool(front, node), remote("other", other.base_url, price={"input": "500", "output": "500"})]
        job = make_job(tmp_path, prompts(3), pools)
        code, found = run(job)
        assert [call.method for call in front.calls].count("DELETE") == 1
    assert code == 0
    check_conserved(found, 3)
    assert open_leases(job) == []


def test_a_node_that_dies_while_it_serves_is_given_back_at_once_and_paid_for(tmp_path: Path) -> None:
    with EndpointDouble(["tiny"]) as other, EndpointDouble(["tiny"], RESET) as dying, RenderFront() as front:
        pools = [
            lease_pool(front, dying),
            remote("other", other.base_url, price={"input": "500", "output": "500"}),
        ]
        job = make_job(tmp_path, prompts(30), pools)
        code, found = run(job)
        assert front.alive == []
    assert code == 0
    check_conserved(found, 30)
    assert sum(seconds(found).values()) > 0
    assert open_leases(job) == []


def test_a_node_is_written_down_before_it_is_asked_for(node: EndpointDouble, tmp_path: Path) -> None:
    """Whoever is killed between the two has left word of it."""
    known: list[list[tuple[str, str | None]]] = []

    class Watched(RenderFront):
        def answer(self, call: Call) -> Reply:
            if call.method == "POST":
                known.append([(record.name, record.node_id) for record in open_leases(job)])
                asked.append(call.body["name"])
            return super().answer(call)

    asked: list[str] = []
    with Watched(refuse=Reply.error(402, "insufficient credits", "payment_required")) as front:
        job = make_job(tmp_path, prompts(2), [lease_pool(front, node)], auction={"rounds": 1})
        run(job)
    assert known == [[(name, None)] for name in asked]
    assert len(asked) == 1


def test_a_lost_answer_to_the_request_for_a_node_leaks_none(node: EndpointDouble, tmp_path: Path) -> None:
    with EndpointDouble(["tiny"]) as other, RenderFront(lose_ask=True) as front:
        pools = [lease_pool(front, node), remote("other", other.base_url, price={"input": "500", "output": "500"})]
        job = make_job(tmp_path, prompts(3), pools)
        code, found = run(job)
        assert len(front.nodes) == 1
        assert front.alive == []
    assert code == 0
    check_conserved(found, 3)
    assert set(seconds(found)) == {"setup"}
    assert open_leases(job) == []


def test_giving_back_is_tried_again(node: EndpointDouble, tmp_path: Path) -> None:
    with RenderFront(fail_ends=2) as front:
        job = make_job(tmp_path, prompts(3), [lease_pool(front, node)])
        code, _ = run(job)
        assert front.alive == []
    assert code == 0
    assert open_leases(job) == []


def test_a_node_that_cannot_be_given_back_is_named_loudly_and_tried_again_by_the_next_start(
    node: EndpointDouble, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RenderFront(fail_ends=3) as front:
        job = make_job(tmp_path, prompts(3), [lease_pool(front, node)])
        code, _ = run(job)
        assert code == 0
        assert front.alive == ["rn-001"]
        assert [record.node_id for record in open_leases(job)] == ["rn-001"]
        (said,) = [each for each in caplog.records if each.levelname == "CRITICAL"]
        assert "rn-001" in said.getMessage()
        assert KEY not in said.getMessage()
        # There is nothing left to do for the run, but for the node there is; what it cost since is not yet booked.
        ended = time.monotonic()
        run(job)
        assert front.alive == []
        assert open_leases(job) == []
    journal = Store.at(str(journal_dir(job)))
    (name,) = list_segments(journal)
    (row,) = read_segment(journal, name)[0].to_pylist()
    assert row["kind"] == "overhead"
    assert 0 < row["q_setup"] < time.monotonic() - ended + 5


def test_a_node_with_nothing_to_do_is_given_back_before_the_shift_ends(node: EndpointDouble, tmp_path: Path) -> None:
    gone = threading.Event()

    def wait(seen: Seen) -> Reply:
        if seen.number == 0:
            deadline = time.monotonic() + 10
            while front.alive or not front.nodes:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            gone.set()
        return OK

    with EndpointDouble(["tiny"], wait) as slow, RenderFront() as front:
        pools = [
            lease_pool(front, node, models=["tiny"], options={"idle_after": "0.2"}),
            remote("slow", slow.base_url, models=["other"], price={"input": "0.1", "output": "0.1"}),
        ]
        slow.models = ("other",)
        rows = prompts(8).append_column("model", pa.array(["tiny", "other"] * 4))
        job = make_job(tmp_path, rows, pools, models={"tiny": {}, "other": {}}, model="tiny")
        code, found = run(job)
    assert code == 0
    assert gone.is_set()
    check_conserved(found, 8)


def test_a_deadline_before_a_node_can_serve_keeps_it_from_bidding(node: EndpointDouble, tmp_path: Path) -> None:
    with EndpointDouble(["tiny"]) as other, RenderFront() as front:
        pools = [
            lease_pool(front, node, options={"turnaround": "7200"}),
            remote("other", other.base_url, price={"input": "500", "output": "500"}),
        ]
        _, found = run(make_job(tmp_path, prompts(3), pools, deadline="1h"))
        assert front.nodes == {}
    reasons = {(bid["pool"], bid["reject_reason"]) for bid in found.rows("bids")}
    assert ("render", "deadline") in reasons
    check_conserved(found, 3)


def test_a_budget_that_does_not_cover_a_nodes_coming_up_rents_none(node: EndpointDouble, tmp_path: Path) -> None:
    with EndpointDouble(["tiny"]) as other, RenderFront() as front:
        pools = [lease_pool(front, node), remote("other", other.base_url)]
        # 900 s to come up, 60 s idle and 30 s to give it back come to 0.99 USD.
        _, found = run(make_job(tmp_path / "low", prompts(3), pools, budget={"max_cost": "0.98"}))
        assert front.nodes == {}
        check_conserved(found, 3)
        pools = [lease_pool(front, node, options={"ready_within": "60"})]
        code, found = run(make_job(tmp_path / "enough", prompts(3), pools, budget={"max_cost": "0.98"}))
        assert len(front.nodes) == 1
    assert code == 0
    assert total(found.rows("charges")) <= Decimal("0.98")


# -- what a killed start left --

KILLED = """
import sys
from datetime import date
from pathlib import Path
from bidbeam.pipelines.job import Job
from bidbeam.pipelines.progress import NullProgress
from bidbeam.pipelines.run import run_job

job = Job.from_yaml(Path(sys.argv[1]), run_date=date.fromisoformat(sys.argv[2]))
run_job(job, rehearse=False, beam_options=[], progress=NullProgress())
"""


def start_child(job_file: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", KILLED, str(job_file), DAY.isoformat()]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("when", ["coming up", "serving"])
def test_the_next_start_gives_back_what_a_killed_one_rented_and_books_its_time(when: str, tmp_path: Path) -> None:
    serving, ended = threading.Event(), threading.Event()

    def hold(seen: Seen) -> Reply:
        if seen.number >= 4 and not ended.is_set():
            serving.set()
            ended.wait(20)
        return OK

    with EndpointDouble(["tiny"], hold) as node, RenderFront(never=when == "coming up") as front:
        path = write_job(tmp_path, prompts(12), [lease_pool(front, node)])
        job = Job.from_yaml(path, run_date=DAY)
        child = start_child(path)
        try:
            patience = time.monotonic() + 60
            while not (front.nodes if when == "coming up" else serving.is_set()):
                assert time.monotonic() < patience
                assert child.poll() is None
                time.sleep(0.02)
            while not [record for record in open_leases(job) if record.node_id]:
                assert time.monotonic() < patience
                time.sleep(0.02)
        finally:
            child.kill()
            child.wait()
            killed_at = datetime.now(UTC)
            ended.set()
        assert front.alive == ["rn-001"], "a killed process gives nothing back"
        (record,) = open_leases(job)
        front.never = False
        code, found = run(job)
        assert front.alive == []
        assert len(front.nodes) == 2
    assert code == 0
    check_conserved(found, 12)
    assert open_leases(job) == []
    overhead = [row for row in found.rows("attempts") if row["kind"] == "overhead"]
    left = [row for row in overhead if row["started_at"] <= datetime.fromisoformat(record.asked_at) + SLACK]
    assert left, "the killed start's node is in the ledger"
    ran_s = (killed_at - datetime.fromisoformat(record.asked_at)).total_seconds()
    assert sum(seconds(found).values()) >= Decimal(ran_s), "all the time that it ran is paid for"


def test_a_signal_gives_nodes_back_and_books_them(tmp_path: Path) -> None:
    """Ctrl-C while a node comes up: it is given back, paid for, and the next start does the rest."""
    with EndpointDouble(["tiny"]) as node, RenderFront(never=True) as front:
        path = write_job(tmp_path, prompts(6), [lease_pool(front, node)])
        job = Job.from_yaml(path, run_date=DAY)
        child = start_child(path)
        patience = time.monotonic() + 60
        while not [each for each in front.nodes.values() if each.looks > 1]:
            assert time.monotonic() < patience
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        assert child.wait(30) != 0
        assert front.alive == []
        assert open_leases(job) == []
        front.never = False
        code, found = run(job)
    assert code == 0
    check_conserved(found, 6)
    setups = [row for row in found.rows("charges") if row["meter"] == "setup"]
    assert len(setups) == 2, "both starts' nodes are in the ledger"


def test_an_exit_without_a_goodbye_gives_nodes_back(node: EndpointDouble, tmp_path: Path) -> None:
    """Interpreter exit closes what nobody closed."""
    script = (
        "import sys\nfrom bidbeam.connectors import registry\n"
        "from bidbeam.connectors.lease_engine import LeaseEngine\nfrom bidbeam.connectors.leases import LeaseBook\n"
        "from bidbeam.connectors.store import Store\nimport pickle\n"
        "spec = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "book = LeaseBook(Store.at(sys.argv[2]))\n"
        "engine = registry.acquire('k', lambda: LeaseEngine(spec, 'tiny', book, run_id='r', start=1))\n"
        "assert engine.serving(10)\n"
    )
    with RenderFront() as front:
        spec = Job.from_yaml(write_job(tmp_path, prompts(1), [lease_pool(front, node)]), run_date=DAY).pools[0]
        where = str(tmp_path / "journal")
        subprocess.run([sys.executable, "-c", script, pickle.dumps(spec).hex(), where], check=True, timeout=60)
        assert len(front.nodes) == 1
        assert front.alive == []


# -- what is said before anything is rented --


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"options": {"address": "http://{public_ip}:8000/v1"}}, "neither https nor on this machine"),
        ({"options": {"address": "https://{node}.example.com/v1"}}, "names {node}"),
        ({"options": {"ready_within": "soon"}}, "is no number that will do"),
        ({"options": {"port": "70000"}}, "is no number that will do"),
        ({"options": {"image": None}}, "image"),
        ({"price": {"input": "1", "output": "1", "per": "1M tokens"}}, "paid by the hour"),
    ],
    ids=["clear", "unknown name", "no number", "no port", "no image", "by the token"],
)
def test_a_lease_pool_that_cannot_work_is_refused_with_its_line(
    keys: dict[str, Any], told: str, node: EndpointDouble, tmp_path: Path
) -> None:
    front = RenderFront()
    front.close()
    path = write_job(tmp_path, prompts(1), [lease_pool(front, node, **keys)])
    with pytest.raises(ConfigError, match=re.escape(told)) as caught:
        Job.from_yaml(path, run_date=DAY)
    assert caught.value.line is not None


def test_a_wrong_key_takes_the_pool_down_and_stands_nowhere(
    node: EndpointDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RENDER_API_KEY", "rndr-not-the-key-at-all")
    with RenderFront() as front:
        job = make_job(tmp_path, prompts(2), [lease_pool(front, node)])
        code, found = run(job)
    assert code == 3
    assert "not-the-key" not in repr(found.manifest) + repr(found.ledger) + caplog.text
    assert front.nodes == {}
