"""Arrays as Parquet columns: one row of bytes for each entry of the first axis, which is read without a copy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def as_column(values: np.ndarray) -> pa.Array:
    """(N, ...) as N binary values of one size; lists of numbers would take several times the time and memory."""
    rows = np.ascontiguousarray(values)
    width = rows.itemsize * int(np.prod(rows.shape[1:]))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(rows)])


def describe_column(values: np.ndarray) -> dict[str, Any]:
    """What `from_column` must be told beside the bytes; plain JSON."""
    return {"shape": list(values.shape[1:]), "dtype": str(values.dtype)}


def from_column(table: pa.Table, name: str, about: Mapping[str, Any]) -> np.ndarray:
    """The inverse of `as_column`: a read-only array (N, *shape).

    Raises:
        ValueError: the column's rows are missing or of another size than `about` says.
    """
    column, dtype, shape = table[name], np.dtype(about["dtype"]), tuple(about["shape"])
    expected = pa.binary(dtype.itemsize * int(np.prod(shape)))
    if column.type != expected:
        raise ValueError(f"{name} must be a column of {expected}, for {shape} of {dtype}, got {column.type}")
    if column.null_count:
        row = next(row for row, value in enumerate(column.is_null().to_pylist()) if value)
        raise ValueError(f"{name} must have a value in every row, got none in row {row}")
    rows = column.combine_chunks()
    flat = np.frombuffer(rows.buffers()[1], dtype, len(rows) * int(np.prod(shape)), rows.offset * expected.byte_width)
    return flat.reshape(len(rows), *shape)


def write_table(columns: Mapping[str, pa.Array], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes one row group, whose bytes depend on its content alone."""
    table = pa.table(dict(columns)).replace_schema_metadata(dict(metadata))
    # Whole images neither repeat nor have a useful minimum.
    pq.write_table(table, path, row_group_size=max(1, len(table)), use_dictionary=False, write_statistics=False)
