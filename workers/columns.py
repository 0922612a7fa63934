"""Arrays as Parquet columns: one row of bytes for each entry of the first axis, which is read without a copy."""

from __future__ import annotations

import json
import math
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


def read_about(table: pa.Table) -> dict[str, Any]:
    """What a file of this project says of itself, beside its columns.

    Raises:
        ValueError: it says nothing, or no map of settings.
    """
    try:
        about = json.loads((table.schema.metadata or {})[b"mixflow"])
    except KeyError as error:
        raise ValueError("its metadata must have the key mixflow") from error
    except RecursionError as error:
        raise ValueError("its metadata are nested too deeply") from error
    if not isinstance(about, dict):
        raise ValueError(f"its metadata must be a map of settings, got a {type(about).__name__}")
    return about


def from_column(table: pa.Table, name: str, about: Mapping[str, Any]) -> np.ndarray:
    """The inverse of `as_column`: a read-only array (N, *shape).

    Raises:
        ValueError: `about` is no shape and type of numbers, or the column's rows are missing or of another size.
    """
    column, dtype, shape = table[name], np.dtype(str(about["dtype"])), tuple(about["shape"])
    if dtype.kind not in "uif" or dtype.itemsize > 8 or not dtype.isnative:
        raise ValueError(f"{name} must be of native integers or floating point numbers of at most 8 bytes, got {dtype}")
    if not all(type(side) is int and side >= 1 for side in shape):
        raise ValueError(f"{name} must have sides of 1 or more, got {shape}")
    width, kind = dtype.itemsize * math.prod(shape), column.type
    if not pa.types.is_fixed_size_binary(kind) or kind.byte_width != width:
        raise ValueError(f"{name} must be a column of {width} bytes a row, for {shape} of {dtype}, got {kind}")
    if column.null_count:
        row = next(row for row, value in enumerate(column.is_null().to_pylist()) if value)
        raise ValueError(f"{name} must have a value in every row, got none in row {row}")
    rows = column.combine_chunks()
    flat = np.frombuffer(rows.buffers()[1], dtype, len(rows) * math.prod(shape), rows.offset * width)
    return flat.reshape(len(rows), *shape)


def write_table(columns: Mapping[str, pa.Array], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes one row group, whose bytes depend on its content alone."""
    table = pa.table(dict(columns)).replace_schema_metadata(dict(metadata))
    # Whole images neither repeat nor have a useful minimum.
    pq.write_table(table, path, row_group_size=max(1, len(table)), use_dictionary=False, write_statistics=False)
