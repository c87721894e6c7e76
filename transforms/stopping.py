"""Whether this process was asked to stop. The driver's signal handlers set it; shifts look at it between polls."""

from __future__ import annotations

import threading

FILE = "stop"
"""Stands in a start's scratch once the driver was asked to stop: how workers in other processes hear of it."""

_stop = threading.Event()


def request() -> None:
    """From now on nothing new is sent; safe to call from a signal handler."""
    _stop.set()


def requested() -> bool:
    return _stop.is_set()


def clear() -> None:
    """For the next run in the same process."""
    _stop.clear()
