"""Parquet files: their columns as they are, some rows at a time, and a stop before a small file becomes gigabytes."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rq.files import InputError, told
from rq.parts import columns_of_folders
from rq.text_files import most_unpacked, too_large

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow
    import pyarrow.parquet

ROWS_AT_ONCE = 2**18


def parquet_names(path: Path) -> list[str]:
    """The names of the columns, those in which pandas keeps an index and those of the folders among them."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _not_parquet(path, error) from error
    return names + [name for name in columns_of_folders(path) if name not in names]


def read_parquet(path: Path, header: Sequence[str], wanted: Sequence[int]) -> Iterator["pd.DataFrame"]:
    """The columns at some positions, as they are in the file, some rows at a time; none of a file without rows.

    Text is first read as a number per row and a list of the different texts, and only in full when that is known not to be
    too much: one long text in a million rows is a small file.
    """
    import pandas as pd
    import pyarrow
    import pyarrow.parquet

    of_folders = columns_of_folders(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            inner = [header[at] for at in wanted if header[at] in file.schema_arrow.names]
            _check_unpacked(path, file, inner)
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=inner, use_threads=False):
                batch.validate(full=True)
                part = batch.to_pandas(ignore_metadata=True, integer_object_nulls=True)
                columns = [part[header[at]] if header[at] in inner else of_folders[header[at]] for at in wanted]
                yield pd.DataFrame(
                    {at: _plain(column) for at, column in zip(wanted, columns, strict=True)}, index=range(len(batch))
                )
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _not_parquet(path, error) from error


def _plain(column: "pd.Series | str") -> "pd.Series | str":
    """A column without categories and time zones."""
    if isinstance(column, str):
        return column
    if column.dtype == "category":
        return column.astype(object)
    if getattr(column.dtype, "tz", None):  # Python has no moment with a time zone after the year 9999, Parquet has
        return column.dt.tz_convert("UTC").dt.tz_localize(None)
    return column


def _check_unpacked(path: Path, file: "pyarrow.parquet.ParquetFile", names: Sequence[str]) -> None:
    """InputError where some columns are more in full than any would be."""
    import pyarrow
    import pyarrow.parquet

    most = most_unpacked(os.path.getsize(path))
    if file.metadata.num_rows * 8 * len(names) > most:
        raise InputError(too_large(path))
    found = 0
    columns = [
        file.schema.column(at).path for at in range(len(file.schema))
    ]  # lists by what is in them: genres.list.element
    with pyarrow.parquet.ParquetFile(path, read_dictionary=columns) as packed:
        for batch in packed.iter_batches(ROWS_AT_ONCE, columns=names, use_threads=False):
            batch.validate(full=True)
            found += sum(map(_bytes_of_text, batch.columns))
            if found > most:
                raise InputError(too_large(path))


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
