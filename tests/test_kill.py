"""The kill test in short (see ``kill``), and workers that end with their driver."""

from __future__ import annotations

from pathlib import Path

import pytest
from kill import TWO_WORKERS, Run, endpoint, kill_test, left_behind, workers_of

pytestmark = pytest.mark.timeout(120)


def test_a_run_that_is_killed_again_and_again_loses_nothing(tmp_path: Path) -> None:
    """Four kills: every prompt has one output, the one of an undisturbed run; what was served is in the ledger; and
    what was served twice was in flight at a kill."""
    report = kill_test(tmp_path, 200, 4, seed=3, workers=False)
    assert len(report.kills) >= 3, report
    assert report.attempts["ok"] == 200, report


@pytest.mark.parametrize("victim", ["driver", "worker"])
def test_nobody_outlives_a_killed_run_of_two_workers(tmp_path: Path, victim: str) -> None:
    """Workers end with a driver that is killed as soon as they are there; the driver ends when a worker is killed."""
    with endpoint("near", 0.01) as near, endpoint("far", 0.01) as far:
        run = Run(tmp_path, 40, [near, far], 4)
        with run.start(TWO_WORKERS) as process:
            while not (workers := workers_of(process.pid)):
                assert process.poll() is None, run.log.read_text()
            (process if victim == "driver" else workers[0]).kill()
            assert process.wait(30) != 0
            assert not left_behind(run)
