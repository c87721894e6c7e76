"""The lines of a file in blocks of whole lines, a few MiB each, found by vectorised scans."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bidbeam.connectors.input_parts import Unit

MAX_LINE_BYTES = 16 << 20
CHUNK_BYTES = 8 << 20
_BOM = b"\xef\xbb\xbf"

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Block:
    """Whole lines of a file; ``data`` is None for a single line longer than the limit, which is never held."""

    offset: int
    length: int
    data: bytes | None


@dataclass(frozen=True, slots=True)
class Lines:
    """The lines of a block that are not blank: byte spans without line ends, numbers within the block; count of all."""

    starts: Ints
    ends: Ints
    numbers: Ints
    total: int


def first_byte(file: pa.NativeFile) -> int:
    file.seek(0)
    return len(_BOM) if file.read(len(_BOM)) == _BOM else 0


def blocks(file: pa.NativeFile, start: int, end: int) -> Iterator[Block]:
    """The bytes from ``start`` up to ``end`` in blocks of whole lines, a few MiB each, holding no over-long line."""
    held = b""
    position = start
    while position + len(held) < end:
        file.seek(position + len(held))
        more = file.read(min(CHUNK_BYTES, end - position - len(held)))
        if not more:
            break
        cut = more.rfind(b"\n") + 1
        if cut:
            data = held + more[:cut]
            yield Block(position, len(data), data)
            position += len(data)
            held = more[cut:]
            continue
        held += more
        if len(held) > MAX_LINE_BYTES:
            length = _skip_line(file, position + len(held), end) - position
            yield Block(position, length, None)
            position += length
            held = b""
    if held:
        yield Block(position, len(held), held)


def _skip_line(file: pa.NativeFile, position: int, end: int) -> int:
    """Where the line that goes on at ``position`` ends, its line end included."""
    while position < end:
        file.seek(position)
        more = file.read(min(CHUNK_BYTES, end - position))
        if not more:
            break
        at = more.find(b"\n")
        if at >= 0:
            return position + int(at) + 1
        position += len(more)
    return position


def find_lines(data: bytes) -> Lines:
    buffer = np.frombuffer(data, np.uint8)
    breaks = np.flatnonzero(buffer == 10)
    starts = np.concatenate(([0], breaks + 1))
    ends = np.concatenate((breaks, [len(data)]))
    if data.endswith(b"\n"):
        starts, ends = starts[:-1], ends[:-1]
    ends = ends - ((ends > starts) & (buffer[np.maximum(ends - 1, 0)] == 13))
    filled = ends > starts
    led = np.flatnonzero(filled & np.isin(buffer[np.minimum(starts, len(data) - 1)], (32, 9, 13)))
    for index in led:
        filled[index] = bool(data[starts[index] : ends[index]].strip())
    return Lines(starts[filled], ends[filled], np.flatnonzero(filled), len(starts))


def cut_units(block: Block, lines: Lines, unit_bytes: int, line: int) -> Iterator[Unit]:
    """Units of about ``unit_bytes`` that together are the block, each starting at a line that is a row."""
    groups = lines.starts // max(1, unit_bytes)
    firsts = np.flatnonzero(np.diff(groups, prepend=groups[:1] - 1)) if len(groups) else np.array([0])
    for order, first in enumerate(firsts):
        last = order == len(firsts) - 1
        following = len(lines.starts) if last else int(firsts[order + 1])
        begin = 0 if order == 0 else int(lines.starts[first])
        end = block.length if last else int(lines.starts[following])
        before = 0 if order == 0 else int(lines.numbers[first])
        yield Unit(block.offset + begin, block.offset + end, following - int(first), end - begin, line + before)
