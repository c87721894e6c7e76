"""How Arrow values cross Beam: as IPC streams, so that a slice carries its own rows and nothing of its parent."""

from __future__ import annotations

from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.coders import typecoders


class TableCoder(beam.coders.Coder):
    """Encodes ``pa.Table`` as an Arrow IPC stream."""

    def encode(self, value: pa.Table) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, value.schema) as writer:
            writer.write_table(value)
        encoded: bytes = sink.getvalue().to_pybytes()
        return encoded

    def decode(self, encoded: bytes) -> pa.Table:
        return pa.ipc.open_stream(encoded).read_all()

    def estimate_size(self, value: pa.Table) -> int:
        # Without an estimate of its own Beam encodes every element twice.
        return int(value.get_total_buffer_size()) + 1024

    def is_deterministic(self) -> bool:
        return False

    def to_type_hint(self) -> Any:
        return pa.Table

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TableCoder)

    def __hash__(self) -> int:
        return hash(TableCoder)


def register() -> None:
    """Makes Beam use these coders; safe to call again. Importing this module does it."""
    typecoders.registry.register_coder(pa.Table, TableCoder)


register()
