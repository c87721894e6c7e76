"""Parquet input: inspected by its footer alone, read by row group."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from bidbeam.connectors.input_parts import Inspected, Unit


def inspect(file: pa.NativeFile) -> Inspected:
    """The schema and row groups, from the footer. A unit's ``size_bytes`` is uncompressed."""
    parquet = pq.ParquetFile(file)
    footer = parquet.metadata
    units = []
    for index in range(footer.num_row_groups):
        group = footer.row_group(index)
        units.append(Unit(index, index + 1, group.num_rows, group.total_byte_size))
    return Inspected(parquet.schema_arrow.remove_metadata(), tuple(units))


def read(file: pa.NativeFile, start: int, end: int, columns: list[str]) -> pa.Table:
    """The rows of the row groups from ``start`` up to ``end``; columns are decoded by all of Arrow's threads."""
    parquet = pq.ParquetFile(file, pre_buffer=True)
    present = [name for name in columns if name in set(parquet.schema_arrow.names)]
    table = parquet.read_row_groups(list(range(start, end)), use_threads=True)
    return table.select(present).replace_schema_metadata(None)
