"""How an error that ends a stage reaches the driver whole: runners pass on its text at best."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

from bidbeam.connectors.errors import BidbeamError, StoreError, error_from_json, error_to_json
from bidbeam.connectors.store import Store
from bidbeam.transforms.run_context import RunContext

_NAME = "failure.json"


@contextlib.contextmanager
def reported(context: RunContext) -> Iterator[None]:
    """Leaves a Bidbeam error that passes through for the driver to find, and lets it pass."""
    try:
        yield
    except BidbeamError as error:
        with contextlib.suppress(StoreError, OSError):
            context.scratch.replace(_NAME, json.dumps(error_to_json(error)).encode())
        raise


def failure_of(scratch: Store) -> BidbeamError | None:
    """The error that ended a stage of the start with this scratch, if one did."""
    try:
        return error_from_json(json.loads(scratch.read(_NAME)))
    except (StoreError, OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
