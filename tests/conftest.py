"""How the suite shares two cores: a file's tests stay in one process, and all that run the real engine in the same one.

Engines use every core they are given, so two at once would only be in each other's way. They begin first: all else fits
beside them.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

# How long an example takes says something of the machine, nothing of the code.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

_ENGINE = re.compile(r"pytest\.mark\.engine\b")


@cache
def runs_engines(path: Path) -> bool:
    """Whether a test file has tests of the real engine."""
    return path.is_file() and _ENGINE.search(path.read_text(encoding="utf-8")) is not None


class ByFile(LoadScopeScheduling):
    """Hands out whole files, those with engines as one."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return "engines" if runs_engines(self.config.rootpath / path) else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """What ``-n`` distributes by, whatever ``--dist`` says: groups named by marks (``loadgroup``) do not get from
    pytest 9.2 to xdist 3.8."""
    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines first; what is longest must not begin last."""
    items.sort(key=lambda item: not runs_engines(item.path))
