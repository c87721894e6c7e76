"""Progress: plain lines where nobody watches, a live panel on a terminal, and never a control character in a log."""

from __future__ import annotations

import io
import logging
import re
from dataclasses import replace
from decimal import Decimal

import pytest

from bidbeam.connectors.errors import Interrupted
from bidbeam.pipelines.progress import (
    LogProgress,
    NullProgress,
    PoolProgress,
    ProgressSnapshot,
    RichProgress,
    for_stream,
    line_of,
    logs_noted,
    usd,
)
from bidbeam.pipelines.report_cells import UNKNOWN, ideal_text
from bidbeam.pipelines.show import summary_text
from bidbeam.pipelines.summary import RunSummary

HALF = ProgressSnapshot(
    phase="generate",
    total=2000,
    settled=1000,
    dead=3,
    spend=Decimal("0.0126"),
    budget=Decimal(25),
    input_tokens=40_000,
    cached_tokens=30_000,
    ideal_cached_tokens=32_000,
    output_tokens=9_000,
    pools=(
        PoolProgress("near", in_flight=64, settled=800, tokens_per_s=900.4, spend=Decimal("0.01")),
        PoolProgress("far", in_flight=8, settled=200, failed=2, tokens_per_s=99.6, spend=Decimal("0.0025")),
    ),
)


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_line_says_what_a_run_is_watched_for() -> None:
    """Prompts, dead letters, speed, spend against budget, cache hits against the ideal, and each pool."""
    assert line_of(HALF) == (
        "generate | 1,000/2,000 prompts (50%) | 3 dead | 1,000 tokens/s | spent $0.013 of $25.00 | "
        "cache 75.0%, ideal 80.0% | near: 800 done, 64 in flight | far: 200 done, 8 in flight, 2 failed"
    )


def test_a_cache_that_was_warm_before_is_above_the_ideal_and_no_share_of_it() -> None:
    """The ideal is of the run's own prompts, as we count them: more than all of it is said in words."""
    assert "cache 85.0%, above the ideal 80.0% | " in line_of(replace(HALF, cached_tokens=34_000))
    warm = RunSummary(
        "r", "complete", 9, 9, {}, Decimal(1), "out", "ledger", input_tokens=100, cached_tokens=80, output_tokens=9,
        ideal_cached_tokens=60,
    )  # fmt: skip
    told = "80 from cache, more than the 60 that its prompts share: caches held some before, or count otherwise"
    assert told in summary_text(warm)
    assert "80 from cache, 100.0% of the ideal 80" in summary_text(replace(warm, ideal_cached_tokens=80))
    assert [ideal_text(80, ideal) for ideal in (60, 80, 100, 0)] == ["all and more", "100.0%", "80.0%", UNKNOWN]


def test_what_is_unknown_is_left_out() -> None:
    """Before anything is counted there is only the phase."""
    assert line_of(ProgressSnapshot("plan")) == "plan"
    assert line_of(ProgressSnapshot("plan", total=0)) == "plan | 0/0 prompts"


def test_a_log_gets_a_line_when_the_phase_changes_and_every_ten_seconds() -> None:
    """In between, and when nothing moved, it stays silent."""
    out, clock = io.StringIO(), Clock()
    log = LogProgress(out, clock=clock)
    for seconds, snapshot in [
        (0, ProgressSnapshot("plan")),
        (1, ProgressSnapshot("plan", settled=1)),
        (2, ProgressSnapshot("generate")),
        (11, ProgressSnapshot("generate", settled=5)),
        (12, ProgressSnapshot("generate", settled=6)),
        (30, ProgressSnapshot("generate", settled=6)),
    ]:
        clock.now = 100 + seconds
        log.update(snapshot)
    assert out.getvalue().splitlines() == ["plan", "generate", "generate | 6 prompts"]


def test_the_last_state_is_logged_once() -> None:
    """Closing shows what was not yet shown, and closing again shows nothing."""
    out = io.StringIO()
    with LogProgress(out, clock=Clock()) as log:
        log.update(ProgressSnapshot("generate"))
        log.update(ProgressSnapshot("generate", settled=7))
        log.note("pool far is down")
    log.close()
    assert out.getvalue().splitlines() == ["generate", "pool far is down", "generate | 7 prompts"]


def test_a_log_holds_no_control_character() -> None:
    """A file or a pipe gets plain text."""
    out = io.StringIO()
    progress = for_stream(out)
    with progress:
        progress.update(HALF)
    assert isinstance(progress, LogProgress)
    assert all(char.isprintable() or char == "\n" for char in out.getvalue())


def test_a_terminal_gets_a_panel_with_every_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """The panel is redrawn in place and stands when the run is over."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    out = Terminal()
    progress = for_stream(out)
    with progress:
        progress.update(HALF)
        progress.note("pool far is down [again]")
        progress.update(HALF)
    text = out.getvalue()
    assert isinstance(progress, RichProgress)
    for shown in ("1,000/2,000 prompts", "pool far is down [again]"):
        assert shown in text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    panel = [line.split() for line in plain.splitlines()]
    assert ["pool", "done", "in", "flight", "failed", "tokens/s", "spent"] in panel
    assert ["near", "800", "64", "0", "900", "$0.010"] in panel


def test_null_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Quiet is quiet."""
    with NullProgress() as progress:
        progress.update(HALF)
        progress.note("anything")
    assert capsys.readouterr() == ("", "")


def test_library_warnings_become_notes_without_keys() -> None:
    """They appear among the lines, keys masked; known noise, mere information, and Beam's words for an error of ours,
    which the command tells itself, are left out."""
    out = io.StringIO()
    with LogProgress(out) as progress, logs_noted(progress):
        logging.getLogger("library").warning("key %s is old", "sk-plantedplantedplanted")
        logging.getLogger("library").info("hello")
        logging.warning("apitools not found, and so on")
        beam = logging.getLogger("apache_beam.runners.worker")
        wrapped = RuntimeError("stopped [while running 'Generate 1/ParDo(X)']")
        wrapped.__cause__ = Interrupted("stopped")
        beam.error("stopped [while running 'Generate 1/ParDo(X)']", exc_info=wrapped)
        beam.error("Worker: Traceback ... bidbeam.connectors.errors.Interrupted: stopped")
        beam.error("a worker is gone")
    logging.getLogger("library").warning("after the run")
    assert out.getvalue() == "warning: key *** is old\nerror: a worker is gone\n"


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        ("0", "$0.00"),
        ("25", "$25.00"),
        ("1234.5", "$1,234.50"),
        ("0.1", "$0.10"),
        ("0.0000123", "$0.000012"),
        ("-3.5", "-$3.50"),
    ],
)
def test_dollars_show_cents_or_two_digits(amount: str, text: str) -> None:
    """A tiny amount is not shown as nothing."""
    assert usd(Decimal(amount)) == text
