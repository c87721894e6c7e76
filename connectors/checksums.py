"""A checksum in the footer of an Arrow file, so that what was cut off, or changed where it lies, is not read as sound.

The file stays one that any Arrow reads. The checksum is over all of its bytes, its own digits taken as dashes.
"""

from __future__ import annotations

import zlib

import pyarrow as pa

_KEY, _PREFIX, _DIGITS = b"bidbeam.checksum", b"crc32:", 8
_BLANK = _PREFIX + b"-" * _DIGITS

FOOTER = {_KEY: _BLANK}
"""What ``pa.ipc.new_file`` takes as ``metadata``, for ``with_checksum`` to fill in."""


def with_checksum(file: pa.Buffer) -> bytes:
    """An Arrow file that was written with ``FOOTER``, with the checksum of its bytes in it."""
    data = memoryview(file)
    at = _place(data, _BLANK)
    return b"".join((data[:at], b"%08x" % zlib.crc32(data), data[at + _DIGITS :]))


def check_bytes(data: bytes) -> None:
    """Raises ValueError where an Arrow file is not what was written. One of an earlier version has none."""
    with pa.ipc.open_file(data) as reader:
        told = (reader.metadata or {}).get(_KEY)
    if told is None:
        return
    view = memoryview(data)
    at = _place(view, told)
    crc = zlib.crc32(view[at + _DIGITS :], zlib.crc32(b"-" * _DIGITS, zlib.crc32(view[:at])))
    if told != _PREFIX + b"%08x" % crc:
        raise ValueError("its content is not what was written")


def _place(data: memoryview, value: bytes) -> int:
    """Where the digits of a checksum stand. The footer is the end of a file."""
    size = len(data)
    length = int.from_bytes(data[size - 10 : size - 6], "little")
    start = max(size - 10 - length, 0)
    at = bytes(data[start:]).rfind(value)
    if at < 0:
        raise ValueError("it has no checksum")
    return start + at + len(_PREFIX)
