"""``make bench``: files named bench_*.py, which print a figure beside its limit and assert nothing about time.

``BENCH_SCALE`` below 1 shrinks them, to see that they run; the figures then mean little.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

SCALE = float(os.environ.get("BENCH_SCALE", "1"))
_LONGEST_S = 3600


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Collects bench_*.py where benchmarks are asked for; the test suite passes them by."""
    if not file_path.match("bench_*.py") or parent.session.isinitpath(file_path):
        return None
    if not parent.config.getoption("benchmark_only", default=False):
        return None
    return pytest.Module.from_parent(parent, path=file_path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.path).match("bench_*.py"):
            item.add_marker(pytest.mark.timeout(_LONGEST_S))


@pytest.fixture
def scaled() -> Callable[[int], int]:
    """A number of rows, shrunk by BENCH_SCALE."""
    return lambda rows: max(int(rows * SCALE), 64)


@pytest.fixture
def figure(benchmark: Any) -> Callable[..., None]:
    """Prints a figure with what it comes from, says whether it is within its limit, and keeps it with the benchmark."""

    def show(name: str, value: float, detail: str, *, most: float | None = None, least: float | None = None) -> None:
        limit, verdict = "", ""
        if most is not None:
            limit, verdict = f"; limit {most:g}", ("  PASS" if value <= most else "  FAIL")
        if least is not None:
            limit, verdict = f"; at least {least:g}", ("  PASS" if value >= least else "  FAIL")
        load = os.getloadavg()[0]
        print(f"\n{name}: {value:.3g} ({detail}{limit}; load {load:.1f}){verdict}", flush=True)
        benchmark.extra_info[name] = {"value": value, "detail": detail, "most": most, "least": least, "load": load}

    return show
