"""Starting again: a run that was cut short, ended with dead letters or got other terms pays for nothing twice."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_jobs import DAY, Written, check_conserved, make_job, prompts, remote, total, write_job, written
from small_plans import make_context, write_input

from bidbeam.connectors.doubles import EndpointDouble, Reply, Seen
from bidbeam.connectors.errors import Interrupted, RunHeld, StoreError, UsageError
from bidbeam.connectors.schemas import LEDGER_VERSION, TABLES
from bidbeam.connectors.store import Store
from bidbeam.pipelines.begin import begin
from bidbeam.pipelines.job import Job
from bidbeam.pipelines.run import run
from bidbeam.pipelines.verify import verify_ledger
from bidbeam.transforms import booking, decisions, finishing, shift, stopping, write_outputs
from bidbeam.transforms.journal import SegmentRef, write_segment
from bidbeam.transforms.retrying import TRIES

pytestmark = pytest.mark.timeout(60)


class CrashError(Exception):
    """A worker that dies: nothing of ours, so nothing of ours may catch it."""


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment whenever something has finished, so that a crash falls between two."""
    monkeypatch.setattr(shift, "_SEGMENT_S", 0.0)


def fail_at(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, number: int) -> Callable[[], None]:
    """Makes the ``number``-th call of a function raise; gives what undoes it."""
    real, calls = getattr(module, name), [0]

    def failing(*args: Any, **keys: Any) -> Any:
        calls[0] += 1
        if calls[0] >= number:
            raise CrashError(name)
        return real(*args, **keys)

    monkeypatch.setattr(module, name, failing)
    return lambda: monkeypatch.setattr(module, name, real)


def asked(double: EndpointDouble) -> Counter[str]:
    """How often each prompt came in."""
    return Counter(seen.body["messages"][0]["content"] for seen in double.requests)


def texts_of(count: int) -> dict[str, str]:
    """Prompt by id."""
    rows = prompts(count)
    return dict(zip(rows.column("id").to_pylist(), rows.column("prompt").to_pylist(), strict=True))


def journalled(job: Job) -> set[str]:
    """The ids of requests with an answer in the journal."""
    from bidbeam.connectors.store import Store
    from bidbeam.transforms.journal import list_segments, read_segment

    journal = Store.at(f"{job.output}/run_date={job.run_date}/run_id={job.run_id}/_journal")
    rows = [row for name in list_segments(journal) for row in read_segment(journal, name)[0].to_pylist()]
    return {row["request_id"] for row in rows if row["status"] == "ok"}


def journalled_cost(job: Job) -> Decimal:
    """USD that all attempts in the journal cost."""
    from bidbeam.connectors.store import Store
    from bidbeam.transforms.journal import sound_segments, spent_on

    return spent_on(sound_segments(Store.at(f"{job.output}/run_date={job.run_date}/run_id={job.run_id}/_journal")))


def check(job: Job, rows: int) -> Written:
    found = written(job)
    check_conserved(found, rows)
    return found


@pytest.mark.usefixtures("small_segments")
def test_a_crash_between_segments_costs_only_what_was_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next start asks for nothing that was settled, and its ledger holds the attempts of both starts."""
    with EndpointDouble(["tiny"], Reply.slow(0.01)) as double:
        job = make_job(tmp_path, prompts(40), [remote("near", double.base_url, capacity={"concurrency": 2})])
        undo = fail_at(monkeypatch, shift, "write_segment", 4)
        with pytest.raises(Exception, match="write_segment"):
            run(job)
        undo()
        settled, before = journalled(job), asked(double)
        assert 0 < len(settled) < 40
        assert not (Path(job.output) / "run_date=2026-01-02" / f"run_id={job.run_id}" / "outputs").exists()
        summary = run(job)
        assert (summary.status, summary.served) == ("complete", 40)
        again = asked(double) - before
    assert again == Counter(text for name, text in texts_of(40).items() if name not in settled)
    found = check(job, 40)
    assert {row["attempt_no"] for row in found.attempts} == {1}
    assert found.manifest["starts"] == 2
    # A third start has nothing to do.
    with EndpointDouble(["tiny"]) as double:
        assert run(job).status == "nothing_to_do"
        assert not double.requests


@pytest.mark.parametrize(
    ("module", "name"),
    [(booking, "write_part"), (finishing, "_write_output_manifest")],
    ids=["ledger", "manifest"],
)
def test_a_crash_while_publishing_sends_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    """Whatever stood half-published makes way: the next start publishes anew from the journal, and sends nothing."""
    with EndpointDouble(["tiny"]) as double:
        job = make_job(tmp_path, prompts(12), [remote("near", double.base_url)], tags={"a": "1"})
        undo = fail_at(monkeypatch, module, name, 1)
        with pytest.raises(Exception, match=name):
            run(job)
        undo()
        assert not list((tmp_path / "out").rglob("_SUCCESS"))
        # Other tags meanwhile: charges that stood already are not in the way.
        job = make_job(tmp_path, prompts(12), [remote("near", double.base_url)], tags={"a": "2"})
        summary = run(job)
        assert (summary.status, summary.served, len(double.requests)) == ("complete", 12, 12)
    found = check(job, 12)
    assert {row["tags"] for row in found.rows("charges")} == {'{"a": "2"}'}


def test_a_killed_process_is_resumed(tmp_path: Path) -> None:
    """A run that got SIGKILL leaves its lease, its scratch and its segments; the same command takes over."""
    reached = threading.Event()

    def slowly(seen: Seen) -> Reply:
        if seen.number >= 45:
            reached.set()
        return Reply(delay_s=0.1)

    with EndpointDouble(["tiny"], slowly) as double:
        path = write_job(tmp_path, prompts(120), [remote("near", double.base_url, capacity={"concurrency": 2})])
        process = subprocess.Popen(
            [sys.executable, "-m", "bidbeam.pipelines.cli", "run", str(path), "--run-date", str(DAY), "--quiet"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert reached.wait(30)
        finally:
            process.kill()
        # Not yet waited for: a zombie holds nothing.
        job = Job.from_yaml(path, run_date=DAY)
        while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT):
            pass
        settled = journalled(job)
        before = asked(double)
        double._behaviour = Reply()
        summary = run(job)
        assert (summary.status, summary.served) == ("complete", 120)
        again = asked(double) - before
        process.wait()
    assert settled, "nothing was journalled before the kill"
    assert not set(again) & {text for name, text in texts_of(120).items() if name in settled}
    check(job, 120)


def test_ctrl_c_keeps_what_is_settled_and_exits_with_4(tmp_path: Path) -> None:
    """After SIGINT nothing more is sent, what was in flight is journalled, and the same command finishes the run."""
    reached = threading.Event()

    def slowly(seen: Seen) -> Reply:
        if seen.number >= 20:
            reached.set()
        return Reply(delay_s=0.1)

    with EndpointDouble(["tiny"], slowly) as double:
        path = write_job(tmp_path, prompts(80), [remote("near", double.base_url, capacity={"concurrency": 2})])
        process = subprocess.Popen(
            [sys.executable, "-m", "bidbeam.pipelines.cli", "run", str(path), "--run-date", str(DAY)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert reached.wait(30)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 4, said
        assert "resumes" in said
        assert not {"Traceback", "error", "ParDo"} & set(re.findall(r"\w+", said))
        job = Job.from_yaml(path, run_date=DAY)
        sent = len(double.requests)
        assert sent < 80
        assert len(journalled(job)) == len(double.served) == sent
        double._behaviour = Reply()
        assert run(job).served == 80
        assert len(double.requests) == 80
        check(job, 80)


def test_a_stop_takes_no_try_from_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left to a later start is tried as often as it would have been: the pool is known by all that it answered
    before, and what the stop gave up in flight counts neither against the pool nor as a try."""
    second_try, tries = threading.Event(), [0]

    def flaky(seen: Seen) -> Reply:
        if " 3 of" not in seen.prompt:
            return Reply()
        tries[0] += 1
        if tries[0] != 2:
            return Reply.error(500, "no")
        second_try.set()
        return Reply.slow(30.0)

    monkeypatch.setattr(shift, "_GRACE_S", 0.1)
    with EndpointDouble(["tiny"], flaky) as double:
        job = make_job(tmp_path, prompts(5), [remote("near", double.base_url)])
        waiting = threading.Thread(target=lambda: second_try.wait(30) and stopping.request())
        waiting.start()
        with pytest.raises(Interrupted):
            run(job)
        waiting.join()
        summary = run(job)
        assert (summary.served, dict(summary.dead)) == (4, {"failed": 1})
    mine = [row for row in check(job, 5).attempts if row["request_id"] == "q3"]
    before = [row["status"] for row in mine if row["lot_id"].startswith("s1")]
    assert sorted(before) == ["failed", "lost"]
    assert sum(row["round"] == 1 for row in mine) - len(before) == TRIES


def test_a_raised_budget_answers_what_the_smaller_one_could_not(tmp_path: Path) -> None:
    """Other terms resume the same run: budget dead letters are answered, nothing else is asked again, costs add up."""
    rows = prompts(60, shared="one two three four five six seven eight nine ten eleven twelve " * 20)

    def job_with(max_cost: str, double: EndpointDouble, **keys: Any) -> Job:
        pools = [remote("near", double.base_url)]
        return make_job(tmp_path, rows, pools, budget={"max_cost": max_cost}, auction={"rounds": 1}, **keys)

    with EndpointDouble(["tiny"]) as double:
        small = job_with("0.00025", double)
        first = run(small)
        assert set(first.dead) == {"budget"}
        assert 0 < first.served < 60
        files = {path.name for path in Path(first.output_url).rglob("*.parquet")}
        check(small, 60)

        large = job_with(
            "1.00",
            double,
            tags={"team": "other"},
            baseline={"name": "b", "input": "1", "output": "1", "per": "1M tokens"},
        )
        assert large.run_id == small.run_id
        second = run(large)
        assert (second.status, second.served, len(double.requests)) == ("complete", 60, 60)
        assert max(asked(double).values()) == 1
    assert second.cost > first.cost
    found = check(large, 60)
    assert {row["status"] for row in found.rows("runs")} == {"complete"}
    # What an ended start has charged stays as it was booked.
    assert {row["tags"] for row in found.rows("charges")} == {None, '{"team": "other"}'}
    assert {row["tags"] for row in found.rows("requests")} == {'{"team": "other"}'}
    assert not (found.run_dir / "_INCOMPLETE").exists()
    assert not files & {path.name for path in found.run_dir.rglob("*.parquet")}, (
        "the first start's files are still there"
    )
    assert found.ledger["lots"].schema.names == TABLES["lots"].names


def test_the_budget_counts_all_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a crashed start has spent is taken off the budget of the next, which would be enough without."""
    rows = prompts(40, shared="one two three four five six seven eight nine ten eleven twelve " * 20)
    with EndpointDouble(["tiny"]) as double:
        job = make_job(tmp_path, rows, [remote("near", double.base_url)])
        undo = fail_at(monkeypatch, write_outputs, "publish_range", 1)
        with pytest.raises(Exception, match="publish_range"):
            run(job)
        undo()
        spent = journalled_cost(job)
        extra = pa.concat_tables([rows, prompts(2, start=100, shared="zwei")])
        job = make_job(tmp_path, extra, [remote("near", double.base_url)], budget={"max_cost": str(spent)})
        summary = run(job)
        assert (summary.served, dict(summary.dead), len(double.requests)) == (40, {"budget": 2}, 40)
        assert summary.cost == spent
        check(job, 42)
        alone = make_job(
            tmp_path / "alone", prompts(2, start=100, shared="zwei"), [remote("near", double.base_url)],
            budget={"max_cost": str(spent)},
        )  # fmt: skip
        assert run(alone).served == 2


def test_what_a_crash_took_is_off_the_budget_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was in flight is booked at its worst case before the next start buys anything, and counts as spent."""
    with EndpointDouble(["tiny"]) as double:
        job = make_job(tmp_path, prompts(6), [remote("near", double.base_url)])
        undo = fail_at(monkeypatch, shift, "write_segment", 1)
        with pytest.raises(Exception, match="write_segment"):
            run(job)
        undo()
        assert not journalled(job)
        with begin(job, warm=False) as begun:
            assert begun.context.spent == journalled_cost(job) > 0
        budget = {"max_cost": str(begun.context.spent)}
        job = make_job(tmp_path, prompts(6), [remote("near", double.base_url)], budget=budget)
        sent = len(double.requests)
        summary = run(job)
        assert (dict(summary.dead), summary.cost, len(double.requests)) == ({"budget": 6}, begun.context.spent, sent)
    found = check(job, 6)
    assert {row["status"] for row in found.attempts} == {"lost"}


def test_what_a_try_answered_after_another_took_its_place_is_in_the_books(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle that was given up and works on settles attempts that nobody tells of: they are paid for, so the ledger
    has them, as no request's; what its successor booked as lost is not booked again."""
    zombie: list[SegmentRef] = []

    def write_two(journal: Store, prefix: str, number: int, rows: pa.Table, terms: Any) -> SegmentRef:
        told = write_segment(journal, prefix, number, rows, terms)
        at, ids = rows.schema.get_field_index("attempt_id"), rows.column("attempt_id").combine_chunks().storage
        # The first of them is an attempt that is booked already.
        others = pa.array([bytes(ids[0].as_py()), *(n.to_bytes(16, "big") for n in range(1, len(ids)))], pa.binary(16))
        others = pa.ExtensionArray.from_storage(rows.schema.field(at).type, others)
        zombie.append(write_segment(journal, prefix, 50, rows.set_column(at, rows.schema.field(at), others), terms))
        return told

    monkeypatch.setattr(shift, "write_segment", write_two)
    monkeypatch.setattr(shift, "_SEGMENT_S", 5.0)
    with EndpointDouble(["tiny"]) as double:
        job = make_job(tmp_path, prompts(4), [remote("near", double.base_url)])
        summary = run(job)
    found = written(job)
    check_conserved(found, 4)
    strays = [row for row in found.rows("attempts") if row["kind"] == "overhead"]
    assert len(strays) == zombie[0].rows - 1 == 3
    assert {row["request_id"] for row in strays} == {None}
    assert summary.cost == total(found.rows("charges")) > total(found.rows("requests")) > 0
    assert summary.wasted == summary.cost - total(found.rows("requests"))
    assert verify_ledger(job.ledger).ok


def test_inserted_files_and_reordered_rows_pay_nothing_again(tmp_path: Path) -> None:
    """Answers are kept by content: only rows that are new are sent, whatever file or row the others stand in now."""
    with EndpointDouble(["tiny"]) as double:
        job = make_job(tmp_path, prompts(20), [remote("near", double.base_url)])
        first = run(job)
        rows = prompts(20)
        pq.write_table(rows.slice(0, 7), tmp_path / "in" / "z.parquet")
        pq.write_table(rows.slice(7).take(pa.array(range(12, -1, -1))), tmp_path / "in" / "a.parquet")
        pq.write_table(prompts(5, start=100), tmp_path / "in" / "m.parquet")
        second = run(job)
        assert (second.status, second.served, len(double.requests)) == ("complete", 25, 25)
        assert max(asked(double).values()) == 1
    found = check(job, 25)
    assert second.cost > first.cost
    by_id = {row["request_id"]: row for row in found.rows("requests")}
    assert by_id["q3"]["source_file"].endswith("z.parquet")
    assert by_id["q102"]["source_file"].endswith("m.parquet")


def test_sampled_rows_keep_their_own_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal prompts that are drawn at random are requests of their own, and each finds its answer again."""
    rows = pa.table({"id": [f"q{n}" for n in range(9)], "prompt": [f"draw {n % 3}" for n in range(9)]})
    with EndpointDouble(["tiny"]) as double:
        job = make_job(tmp_path, rows, [remote("near", double.base_url)], sampling={"max_tokens": 8, "temperature": 1})
        undo = fail_at(monkeypatch, write_outputs, "publish_range", 1)
        with pytest.raises(Exception, match="publish_range"):
            run(job)
        undo()
        assert run(job).served == 9
        assert len(double.requests) == 9
    found = check(job, 9)
    assert len({row["attempt_id"] for row in found.rows("requests")}) == 9


def test_twins_are_told_apart_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that died for its id stays dead though its twin was answered, and twins of two placements pay once each."""
    rows = pa.table(
        {
            "id": ["a", "a", "b", "c", "d"],
            "prompt": ["same words"] * 4 + ["others"],
            "placement": [None, None, None, '{"zdr": true}', '{"zdr": true}'],
        }
    )
    with EndpointDouble(["tiny"]) as double:
        pools = [remote("near", double.base_url, placement={"zdr": True})]
        job = make_job(tmp_path, rows, pools)
        undo = fail_at(monkeypatch, write_outputs, "publish_range", 1)
        with pytest.raises(Exception, match="publish_range"):
            run(job)
        undo()
        summary = run(job)
        assert (summary.served, dict(summary.dead), len(double.requests)) == (4, {"invalid": 1}, 3)
    found = check(job, 5)
    assert len(found.attempts) == 3
    assert total(found.rows("requests")) == total(found.rows("charges"))


@pytest.mark.usefixtures("small_segments")
def test_a_damaged_journal_is_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torn segment and a stranger's file cost what was in the torn one, and the run goes on."""
    with EndpointDouble(["tiny"], Reply.slow(0.01)) as double:
        job = make_job(tmp_path, prompts(30), [remote("near", double.base_url, capacity={"concurrency": 2})])
        undo = fail_at(monkeypatch, write_outputs, "publish_range", 1)
        with pytest.raises(Exception, match="publish_range"):
            run(job)
        undo()
        segments = sorted((tmp_path / "out").rglob("segments/*.arrow"))
        assert len(segments) > 1
        content = segments[0].read_bytes()
        segments[0].unlink()
        segments[0].write_bytes(content[:100])
        (segments[0].parent / "notes.txt").write_text("not a segment")
        (segments[0].parent / "r1-s000-notes.arrow").write_bytes(b"neither")
        settled = journalled_names(segments[1:])
        before = asked(double)
        assert run(job).served == 30
        again = asked(double) - before
    assert sum(again.values()) == 30 - len(settled)
    check(job, 30)


def test_a_hedge_whose_servant_is_lost_with_a_damaged_segment_settles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answered second, and serves nobody: the request is asked again instead of ending without an answer."""
    with EndpointDouble(["tiny"]) as double:
        job = make_job(tmp_path, prompts(3), [remote("near", double.base_url)])
        undo = fail_at(monkeypatch, write_outputs, "publish_range", 1)
        with pytest.raises(Exception, match="publish_range"):
            run(job)
        undo()
        path = next((tmp_path / "out").rglob("segments/*.arrow"))
        reader = pa.ipc.open_file(path.read_bytes())
        rows = reader.read_all()
        kinds = ["hedge" if name == "q1" else "primary" for name in rows.column("request_id").to_pylist()]
        at = rows.schema.get_field_index("kind")
        rows = rows.set_column(at, rows.schema.field(at), pa.array(kinds).dictionary_encode())
        path.unlink()
        with pa.ipc.new_file(str(path), reader.schema) as writer:
            writer.write_table(rows)
        assert run(job).served == 3
        assert len(double.requests) == 4
    assert verify_ledger(job.ledger).ok


def journalled_names(segments: list[Path]) -> set[str]:
    tables = [pa.ipc.open_file(str(path)).read_all() for path in segments]
    return {name for table in tables for name in table.column("request_id").to_pylist()}


def test_a_key_that_is_put_right_lets_the_same_run_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key is a term: what was refused for it, and what was never sent because of it, is asked by the next start."""
    monkeypatch.setenv("NEAR_KEY", "wrong-key-0123456789")
    with EndpointDouble(["tiny"], api_key="right-key-0123456789") as double:
        job = make_job(tmp_path, prompts(40), [remote("near", double.base_url, api_key_env="NEAR_KEY")])
        summary = run(job)
        assert (summary.served, summary.exit_code) == (0, 3)
        assert set(summary.dead) == {"no_eligible_pool", "capacity"}
        monkeypatch.setenv("NEAR_KEY", "right-key-0123456789")
        assert (again := run(job)).served == 40, again
    check(job, 40)


def test_a_final_failure_is_not_asked_again_but_a_new_row_is(tmp_path: Path) -> None:
    """A start after one that ended leaves failed requests as they are, and still takes in what came since."""
    with EndpointDouble(["tiny"], Reply.error(400, "no")) as double:
        job = make_job(tmp_path, prompts(4), [remote("near", double.base_url)])
        assert dict(run(job).dead) == {"refused": 4}
        assert run(job).status == "nothing_to_do"
        double._behaviour = Reply()
        pq.write_table(prompts(2, start=50), tmp_path / "in" / "b.parquet")
        summary = run(job)
        assert (summary.served, dict(summary.dead), len(double.requests)) == (2, {"refused": 4}, 6)
    found = check(job, 6)
    assert {row["attempts"] for row in found.dead.to_pylist()} == {1}
    assert "400" in json.dumps([row["http_status"] for row in found.rows("attempts")])


def test_a_rehearsal_feeds_no_real_run(tmp_path: Path) -> None:
    """A real run after a rehearsal of the same job asks for everything, and the two have ledgers of their own."""
    with EndpointDouble(["tiny"]) as double:
        job = make_job(tmp_path, prompts(5), [remote("near", double.base_url)])
        assert run(job, rehearse=True).rehearsal
        assert not double.requests
        assert run(job).served == 5
        assert len(double.requests) == 5
    check(job, 5)
    check_conserved(written(job, rehearse=True), 5)


def test_a_crash_at_the_very_end_of_a_later_start_books_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start whose ledger manifest stood, but not its output's, is published anew, under other tags too."""
    with EndpointDouble(["tiny"]) as double:

        def job_with(tag: str) -> Job:
            return make_job(tmp_path, None, [remote("near", double.base_url)], tags={"tag": tag})

        write_job(tmp_path, prompts(4), [])
        assert run(job_with("one")).served == 4
        pq.write_table(prompts(3, start=50), tmp_path / "in" / "b.parquet")
        undo = fail_at(monkeypatch, finishing, "_write_output_manifest", 1)
        with pytest.raises(Exception, match="_write_output_manifest"):
            run(job_with("two"))
        undo()
        summary = run(job_with("three"))
        assert (summary.status, summary.served, len(double.requests)) == ("complete", 7, 7)
    found = check(job_with("three"), 7)
    assert {row["tags"] for row in found.rows("charges")} == {'{"tag": "one"}', '{"tag": "three"}'}


def test_parts_that_an_earlier_version_wrote_are_in_nobody_s_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger parts that an earlier version wrote before it was cut short have fewer columns: the run ends."""
    with EndpointDouble(["tiny"]) as double:
        job = make_job(tmp_path, prompts(6), [remote("near", double.base_url)])
        undo = fail_at(monkeypatch, finishing, "_write_ledger_manifest", 1)
        with monkeypatch.context() as then:
            then.setattr(decisions, "LEDGER_VERSION", LEDGER_VERSION - 1)
            then.setattr(booking, "LEDGER_VERSION", LEDGER_VERSION - 1)
            with pytest.raises(Exception, match="_write_ledger_manifest"):
                run(job)
        undo()
        for table in ("lots", "attempts"):
            part = next((tmp_path / "ledger" / table).rglob("part-*.parquet"))
            pq.write_table(pq.read_table(part).drop_columns(TABLES[table].names[-1]), part)
        assert run(job).served == 6
        assert len(double.requests) == 6
    check(job, 6)


def test_a_run_that_another_start_ended_meanwhile_is_not_ended_again(tmp_path: Path) -> None:
    """Two starts of a run cannot both end it: what the first to end has booked would be counted twice, or not."""
    plan = write_input(tmp_path / "in", {"a.parquet": prompts(2)}, 2)
    context = make_context(tmp_path, plan, start=2)
    context.run_dir.create("_SUCCESS", b'{"starts": 1}')
    record = finishing.RunRecord("small", "{}", "0", 0, "f")
    with pytest.raises(RunHeld, match="ended by another start while this one worked"):
        finishing.finish(context, record, [], 0)


def test_a_journal_without_its_seed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could tell whose its answers are: better said than all of them paid for again."""
    with EndpointDouble(["tiny"]) as double:
        job = make_job(tmp_path, prompts(3), [remote("near", double.base_url)])
        undo = fail_at(monkeypatch, write_outputs, "publish_range", 1)
        with pytest.raises(Exception, match="publish_range"):
            run(job)
        undo()
        seed = next((tmp_path / "out").rglob("seed"))
        content = seed.read_bytes()
        seed.unlink()
        for what in ("gone", "damaged"):
            with pytest.raises(StoreError, match=f"seed is {what}: .* paid for again"):
                run(job)
            seed.write_bytes(b"")
        seed.unlink()
        seed.write_bytes(content)
        assert (run(job).served, len(double.requests)) == (3, 3)


def test_a_torn_manifest_is_named(tmp_path: Path) -> None:
    """A run whose manifest was cut off has ended, nobody knows with what: said with the file, and nothing is sent."""
    with EndpointDouble(["tiny"]) as double:
        job = make_job(tmp_path, prompts(2), [remote("near", double.base_url)])
        run(job)
        manifest = next((tmp_path / "out").rglob("_SUCCESS"))
        content = manifest.read_bytes()
        manifest.unlink()
        for torn in (content[:40], b"[]"):
            manifest.write_bytes(torn)
            with pytest.raises(StoreError, match=r"_SUCCESS is damaged .* restore it"):
                run(job)
        assert len(double.requests) == 2


class Trap:
    """Runs code where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._mark,)


def test_no_pickle_that_stands_in_a_journal_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever can write to the output runs no code: what an earlier version pickled is refused before anything is sent,
    the message says what to do, and what is damaged or made up in its place costs no answer."""
    mark = tmp_path / "unpickled"
    trap = pickle.dumps(Trap(mark))
    with EndpointDouble(["tiny"]) as double:
        job = make_job(tmp_path, prompts(6), [remote("near", double.base_url)])
        undo = fail_at(monkeypatch, write_outputs, "publish_range", 1)
        with pytest.raises(Exception, match="publish_range"):
            run(job)
        kept = next((tmp_path / "out").rglob("market/round-001.arrow"))
        undo()
        pickled = kept.with_suffix(".pickle")
        pickled.write_bytes(trap)
        with pytest.raises(UsageError, match=r"round-001\.pickle.*opens none.*delete these files and start again"):
            run(job)
        pickled.unlink()
        kept.write_bytes(trap)
        assert run(job).served == 6
        assert len(double.requests) == 6
    assert not mark.exists()
    check(job, 6)
    assert verify_ledger(job.ledger).ok
