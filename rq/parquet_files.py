"""Parquet files: their columns as they are, and a stop before a small file becomes gigabytes."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rq.files import InputError, told
from rq.text_files import most_unpacked, too_large

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow


def parquet_names(path: Path) -> list[str]:
    """The names of the columns, those in which pandas keeps an index among them."""
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.ParquetDataset(path).schema.names
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _not_parquet(path, error) from error
    return names


def read_parquet(path: Path, header: Sequence[str], wanted: Sequence[int]) -> "pd.DataFrame":
    """The columns at some positions, as they are in the file: whole numbers stay whole where a cell is empty.

    Text is first read as a number per row and a list of the different texts, and only in full when that is known not to be
    too much: one long text in a million rows is a small file.
    """
    import pyarrow
    import pyarrow.parquet

    names = [header[at] for at in wanted]
    try:
        file = pyarrow.parquet.ParquetDataset(path)
        most = most_unpacked(sum(map(os.path.getsize, file.files)))
        if sum(part.count_rows() for part in file.fragments) * 8 * len(names) > most:
            raise InputError(too_large(path))
        packed = pyarrow.parquet.ParquetDataset(path, read_dictionary=_paths_of_columns(file.files)).read(columns=names)
        packed.validate(full=True)
        if sum(_bytes_of_text(part) for column in packed.columns for part in column.chunks) > most:
            raise InputError(too_large(path))
        del packed  # all is read anew, in full
        raw = file.read(columns=names).to_pandas(ignore_metadata=True, integer_object_nulls=True)
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _not_parquet(path, error) from error
    raw = raw.set_axis(wanted, axis=1)
    for at in wanted:
        if raw[at].dtype == "category":
            raw[at] = raw[at].astype(object)
        elif getattr(raw[at].dtype, "tz", None):  # Python has no moment with a time zone after the year 9999, Parquet has
            raw[at] = raw[at].dt.tz_convert("UTC").dt.tz_localize(None)
    return raw


def _paths_of_columns(files: Sequence[str]) -> list[str]:
    """The columns as Parquet has them, lists by what they are lists of: title, categories.list.element."""
    import pyarrow.parquet

    schemas = [pyarrow.parquet.ParquetFile(file).schema for file in files]
    return sorted({schema.column(at).path for schema in schemas for at in range(len(schema))})


def _bytes_of_text(array: "pyarrow.Array") -> int:
    """How much the texts of a column are in full: "ab" in rows 0 and 7 is 4 bytes. Only texts are packed."""
    import pyarrow
    import pyarrow.compute

    if pyarrow.types.is_dictionary(array.type):
        lengths = pyarrow.compute.binary_length(array.dictionary).take(array.indices)
        return pyarrow.compute.sum(lengths).as_py() or 0
    if not pyarrow.types.is_nested(array.type):
        return 0
    inner = array.flatten()
    return sum(map(_bytes_of_text, inner if isinstance(inner, list) else [inner]))


def _not_parquet(path: Path, error: Exception) -> Exception:
    if isinstance(error, PermissionError):
        return error
    return InputError(f"{path}: not a Parquet file that can be read ({told(error)}); write or fetch it anew")
