"""How the suite shares two cores: a file's tests stay in one process, and all that run the real engine in the same one.

Engines use every core they are given, so two at once would only be in each other's way.
"""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks each test with the group that runs in one process (see ``--dist loadgroup``)."""
    for item in items:
        group = "engine" if item.get_closest_marker("engine") else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))
