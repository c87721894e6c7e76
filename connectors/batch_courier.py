"""A batch's way through a provider: sent, found again, watched until it ends, and its answer files brought back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

from bidbeam.connectors.batch_client import ENDED, BatchCallError, BatchClient, Look
from bidbeam.connectors.batch_journal import BatchJournal
from bidbeam.connectors.batch_options import BACKOFF, BatchOptions
from bidbeam.connectors.batch_rows import Batch

SETTLED_S = 15.0
"""How long a call whose outcome is not known may take to show its effect at the provider."""
_T = TypeVar("_T")
_TRIES = 4
_MISSING = 3
"""Times in a row that a provider must deny a batch before it counts as gone."""
_PASSING = frozenset({"rate", "capacity", "server", "timeout"})
"""Classes of error that another try may mend."""


class LostError(Exception):
    """What became of a batch cannot be found out: it may have been served."""


class RefusedError(Exception):
    """No batch came of it, and nothing is owed. ``call`` says why."""

    def __init__(self, call: BatchCallError) -> None:
        super().__init__(str(call))
        self.call = call


class GivenUpError(Exception):
    """It was cancelled before it was sent."""


class Courier:
    """What one engine does with its batches at the provider, on the loop. ``busy`` says whether other batches of ours
    are there, for whose end a full queue may be waiting."""

    def __init__(
        self,
        client: BatchClient,
        journal: BatchJournal,
        options: BatchOptions,
        now: Callable[[], datetime],
        busy: Callable[[Batch], bool],
    ) -> None:
        self._client, self._journal, self._options, self._now, self._busy = client, journal, options, now, busy

    async def send(self, batch: Batch) -> str:
        """Writes the intent, uploads, creates; gives the batch's id, which is then noted.

        Raises RefusedError, GivenUpError; LostError where it may or may not have come to be.
        """
        name = batch.intent.name
        await asyncio.to_thread(self._journal.intend, batch.intent)
        try:
            file = await self._upload(batch)
        except (BatchCallError, GivenUpError) as error:
            await asyncio.to_thread(self._journal.drop, name)
            if isinstance(error, BatchCallError):
                raise RefusedError(error) from None
            raise
        batch.creating = True
        try:
            await asyncio.to_thread(self._journal.note_creating, name, self._now())
            try:
                found = await self._create(batch, file)
            except (BatchCallError, GivenUpError) as error:
                await asyncio.to_thread(self._journal.drop, name)
                await self.forget(file)
                if isinstance(error, BatchCallError):
                    raise RefusedError(error) from None
                raise
            await asyncio.to_thread(self._journal.note_batch, name, found)
        finally:
            batch.creating = False
        return found

    async def recover(self, batch: Batch) -> str | None:
        """The id of a batch whose creation an earlier try did not live to see; None where it never came to be."""
        found = await self._find(batch)
        if found is not None:
            await asyncio.to_thread(self._journal.note_batch, batch.intent.name, found)
        return found

    async def until_ended(self, batch: Batch, batch_id: str) -> Look:
        """Looks now and then until the batch has ended, and cancels it once that is wanted. Raises LostError."""
        pause, told, missing = self._options.poll_s, False, 0
        silent_since: float | None = None
        while True:
            try:
                if batch.cancelling and not told:
                    told, pause = True, self._options.poll_s
                    try:
                        await self._client.cancel(batch_id)
                    except BatchCallError as error:
                        # One that has just ended refuses; the next look tells.
                        told = error.error_class not in _PASSING
                look = await self._client.look(batch_id)
            except BatchCallError as error:
                missing = missing + 1 if error.missing else 0
                silent_since = self._still(silent_since)
                if missing >= _MISSING:
                    raise LostError(f"the provider knows no such batch ({error})") from None
                pause = max(pause, error.after_s or 0.0)
            else:
                if look.state in ENDED:
                    return look
                missing, silent_since = 0, None
            await self._nap(batch, pause)
            pause = min(pause * 1.5, self._options.poll_s * BACKOFF)

    async def fetch(self, look: Look, path: Callable[[], Path]) -> list[Path]:
        """Brings the answer files. Raises LostError where the provider does not hand them out."""
        found: list[Path] = []
        for file in look.files:
            found.append(path())
            await self._patiently(partial(self._client.fetch, file, found[-1]))
        return found

    async def forget(self, file: str) -> None:
        """Deletes a file at the provider; one that stays after all is no harm."""
        with contextlib.suppress(BatchCallError):
            await self._client.forget(file)

    async def _upload(self, batch: Batch) -> str:
        for tried in range(1, _TRIES + 1):
            if batch.cancelling:
                raise GivenUpError
            try:
                return await self._client.upload(batch.asked.path, batch.intent.name)
            except BatchCallError as error:
                # A file that is there twice costs nothing: this may be tried again, whatever happened.
                if tried == _TRIES or error.error_class not in _PASSING:
                    raise
                await self._nap(batch, max(error.after_s or 0.0, self._options.poll_s * tried))
        raise AssertionError("unreachable")

    async def _create(self, batch: Batch, file: str) -> str:
        tried = 0
        while True:
            if batch.cancelling:
                raise GivenUpError
            try:
                return await self._client.create(file, batch.intent.name, chat=batch.intent.chat)
            except BatchCallError as error:
                if not error.sure and (found := await self._find(batch)) is not None:
                    return found
                full = error.error_class in ("rate", "capacity") and self._busy(batch)
                tried += not full
                if tried == _TRIES or error.error_class not in _PASSING:
                    raise
                pause = self._options.poll_s * (BACKOFF if full else tried)
                await self._nap(batch, max(error.after_s or 0.0, pause))

    async def _find(self, batch: Batch) -> str | None:
        """The batch by what we wrote on it. It counts as not there only once whatever was on its way has arrived."""
        until = _clock() + SETTLED_S
        while True:
            asked_at = _clock()
            found = await self._patiently(lambda: self._client.find(batch.intent.name, batch.intent.at))
            if found is not None or asked_at >= until:
                return found
            await asyncio.sleep(min(self._options.poll_s, max(until - _clock(), 0.0)))

    async def _patiently(self, call: Callable[[], Awaitable[_T]]) -> _T:
        pause = self._options.poll_s
        silent_since: float | None = None
        while True:
            try:
                return await call()
            except BatchCallError as error:
                silent_since = self._still(silent_since)
                if error.error_class not in _PASSING and error.error_class != "auth_funds":
                    raise LostError(str(error)) from None
                await asyncio.sleep(max(error.after_s or 0.0, pause))
            pause = min(pause * 1.5, self._options.poll_s * BACKOFF)

    def _still(self, since: float | None) -> float:
        """Since when the provider is of no help. Raises LostError once that is too long."""
        since = _clock() if since is None else since
        if _clock() - since >= self._options.patience_s:
            raise LostError("the provider gave no word of it for too long")
        return since

    async def _nap(self, batch: Batch, seconds: float) -> None:
        """Waits, less where the batch is to be cancelled meanwhile."""
        if batch.cancelling:
            await asyncio.sleep(seconds)
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(batch.cancel.wait(), seconds)


def _clock() -> float:
    return asyncio.get_running_loop().time()
