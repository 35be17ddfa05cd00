"""A user's own tables: CSV, Parquet and JSON lines, the columns found by the names that such files have.

    orders.csv  reviewerID,asin,unixReviewTime
                A53,B00X,1465862400
    read_table(Path("orders.csv"), ("user", "item", "time"), names={})
        -> Table(rows: columns user, item, time; names: {"user": "reviewerID", "item": "asin", "time": "unixReviewTime"})

A file that cannot be read is refused by its name, and by its line where one line is at fault.
"""

import contextlib
import csv
import gzip
import io
import json
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rq.catalogue import python_literal
from rq.files import InputError, distinct_keys, named, one_line, parse_json, shown, told

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow

log = logging.getLogger("rq.tables")

# What a field may be called in a user's own table, in Amazon Reviews 2014/2018 and in 2023; the first one present is
# read. Case and blanks around a name do not matter.
FIELD_NAMES = {
    "user": ("user_id", "user", "reviewerID", "userId"),
    "item": ("item_id", "item", "parent_asin", "asin", "itemId"),
    "time": ("timestamp", "time", "unixReviewTime", "date"),
    "title": ("title", "item_title", "name"),
    "description": ("description",),
    "brand": ("brand", "store"),
    "categories": ("categories", "category", "main_category"),
}
KINDS = ("csv", "tsv", "parquet", "json", "jsonl")
# The first bytes of files that often bear a name which promises something else.
FIRST_BYTES = {b"\x1f\x8b": "gzip", b"PK": "zip", b"BZh": "bzip2", b"PAR1": "Parquet", b"\xff\xfe": "UTF-16 text"}


# What a table may ask for at most. A few megabytes can unpack to as many gigabytes, or make a row of as many columns.
MOST_COLUMNS = 2_000
LONGEST_LINE = 2**24  # bytes
CELLS_AT_ONCE = 2**22
MOST_SPELLINGS = 100  # of the names of columns in JSON lines
MOST_NAMED = 200  # characters of the names of columns in a message
MOST_UNPACKED, ALWAYS_UNPACKED = 40, 2**26  # bytes for each byte packed; text packs 3 to 20 times, and 64 MiB are no harm


@dataclass(frozen=True)
class Table:
    """The columns of a file that are read, one a field, rows counted from 0; absent optional ones are ''."""

    path: Path
    rows: "pd.DataFrame"
    names: dict[str, str]  # field -> what the file calls it

    def where(self, row: int) -> str:
        """Where a row stands in the file: 7 -> 'orders.csv:9'. Reads the file again: for messages only."""
        try:
            return f"{self.path}:{_line_of_row(self.path, row)}"
        except (csv.Error, StopIteration):
            return f"{self.path}: row {row + 1}"


def read_table(path: Path, fields: Sequence[str], *, names: dict[str, str | None], optional: Sequence[str] = ()) -> Table:
    """The columns `fields` of a CSV, Parquet or JSON-lines file (.gz too); `names` has the columns given by flags."""
    import pandas as pd

    candidates = {field: (given,) if (given := names.get(field)) else FIELD_NAMES[field] for field in fields}
    kind = _kind(path)
    if kind in ("csv", "tsv"):
        header = _csv_header(path)
    elif kind == "parquet":
        header = _parquet_names(path)
    else:
        wanted = {_plain_name(name) for some in candidates.values() for name in some}
        records = pd.DataFrame.from_records(_read_json_lines(path, wanted))
        header = list(records.columns)
    positions: dict[str, int] = {}
    for field in fields:
        at = _find(header, candidates[field], path=path)
        if at is None and field not in optional:
            raise InputError(_no_column(path, header, field, candidates[field]))
        if at is not None:
            positions[field] = at
    if kind in ("csv", "tsv"):
        raw = _read_csv(path, header, sorted(set(positions.values())))
    elif kind == "parquet":
        raw = _read_parquet(path, header, sorted(set(positions.values())))
    else:
        raw = records.set_axis(range(len(header)), axis=1)
    if raw.empty:
        raise InputError(f"{path}: no row under the header; expected one row for each record")
    found = {field: header[at].strip() for field, at in positions.items()}
    log.info(
        "%s: %s rows, %s",
        path,
        f"{len(raw):,}",
        ", ".join(f"{field} from {named(name)}" for field, name in found.items()),
    )
    columns = {field: raw[positions[field]] if field in positions else "" for field in fields}
    return Table(path, pd.DataFrame(columns, index=raw.index), found)


def _kind(path: Path) -> str:
    """'orders.CSV.gz' -> 'csv'; a file that cannot be read is refused before anything is read."""
    name = path.name.lower()
    kind = name.removesuffix(".gz").rpartition(".")[2]
    ending = named(name.rpartition(".")[2])
    expected = "expected .csv, .tsv, .json or .jsonl (one object a line), each also as .gz, or .parquet"
    if path.is_dir() and kind != "parquet":
        raise InputError(f"{path}: a folder; {expected}")
    if kind not in KINDS or name.endswith(".parquet.gz"):
        raise InputError(f"{path}: a file of kind .{ending}; {expected}; unpack or convert it first")
    return kind


class _Unpacked(io.RawIOBase):
    """The bytes of a .gz, and a stop where they become more than any table would: its size may say nothing of them."""

    def __init__(self, path: Path) -> None:
        self.path, self.file, self.total = path, gzip.GzipFile(path), 0
        self.most = _most_unpacked(os.path.getsize(path))

    def readable(self) -> bool:
        """True: that is all it is for."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, as io.BufferedReader asks."""
        part = self.file.read(len(buffer))
        self.total += len(part)
        if self.total > self.most:
            raise InputError(_too_large(self.path))
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        """Close the .gz, too."""
        self.file.close()
        super().close()


def _most_unpacked(packed: int) -> int:
    return max(ALWAYS_UNPACKED, MOST_UNPACKED * packed)


def _too_large(path: Path) -> str:
    return f"{path}: unpacks to more than {MOST_UNPACKED} times its size; if that is meant, unpack it and give it as .csv"


def _open(path: Path) -> IO[bytes]:
    return io.BufferedReader(_Unpacked(path), 2**20) if path.name.lower().endswith(".gz") else open(path, "rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, text) of a UTF-8 file, unpacked; what cannot be unpacked or decoded is named by its line."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
                if len(line) == LONGEST_LINE:
                    raise InputError(f"{path}:{number}: a line of more than {LONGEST_LINE:,} bytes; is this a table?")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{number}: not UTF-8 text ({_explained(path, error)}); save the file as UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"{path}: broken gzip data after line {number} ({_explained(path, error)}); fetch it anew"
        ) from error


def first_line(path: Path) -> str:
    """The first line of a text file that is not blank, up to LONGEST_LINE bytes of it; '' where there is none."""
    with contextlib.suppress(gzip.BadGzipFile, EOFError, zlib.error), _open(path) as file:
        for line in iter(lambda: file.readline(LONGEST_LINE), b""):
            if text := line.decode("utf-8-sig", "replace").strip():
                return text
    return ""


def whole_text(path: Path) -> str:
    """All of a UTF-8 text file, unpacked, however long its lines are."""
    try:
        with _open(path) as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({_explained(path, error)}); save the file as UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: broken gzip data ({_explained(path, error)}); fetch it anew") from error


def _explained(path: Path, error: Exception) -> str:
    """The error, and the kind of file that its first bytes show: "invalid start byte; its first bytes are those of gzip"."""
    with open(path, "rb") as file:
        start = file.read(4)
    really = next((kind for magic, kind in FIRST_BYTES.items() if start.startswith(magic)), None)
    named_gzip = path.name.lower().endswith(".gz")
    return told(error) + (
        f"; its first bytes are those of {really}" if really and not (named_gzip and really == "gzip") else ""
    )


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(last line, cells) of each row of a CSV or TSV that is not blank, the header first."""
    reader = csv.reader(
        (line for _, line in _lines(path)), delimiter="\t" if _kind(path) == "tsv" else ",", skipinitialspace=True
    )
    for cells in reader:
        if len(cells) > 1 or "".join(cells).strip():
            yield reader.line_num, cells


def _line_of_row(path: Path, row: int) -> int:
    """The line of the file at which row `row` ends, blank lines counted."""
    kind = _kind(path)
    if kind == "parquet":
        raise StopIteration
    lines = (number for number, line in _lines(path) if line.strip())
    if kind in ("csv", "tsv"):
        lines = (number for number, _ in _csv_rows(path))
        next(lines)
    for _ in range(row):
        next(lines)
    return next(lines)


def _csv_header(path: Path) -> list[str]:
    """The names of the columns. The first row is held against them, too, since pandas makes room for all of its cells."""
    rows = _csv_rows(path)
    try:
        _, header = next(rows)
    except StopIteration:
        raise InputError(f"{path}: the file is empty; expected a header and rows") from None
    except csv.Error as error:
        raise InputError(f"{path}: {told(error)} in the header; expected names of columns") from error
    if len(header) > MOST_COLUMNS:
        raise InputError(f"{path}: {len(header):,} columns; expected a table of at most {MOST_COLUMNS:,}")
    with contextlib.suppress(StopIteration, csv.Error):
        if len(next(rows)[1]) > len(header):
            raise InputError(_not_as_the_header(path, "the first row has more cells than the header", header))
    return header


def _not_as_the_header(path: Path, fault: str, header: Sequence[str]) -> str:
    return f"{path}: {fault}; expected {len(header)} cells in each row; put a cell that holds the separator in quotes"


def _read_csv(path: Path, header: Sequence[str], wanted: Sequence[int]) -> "pd.DataFrame":
    """The columns at some positions, all cells as text. A row with more cells than the header is refused, for its columns
    may be shifted. Rows are read some at a time, since a short one takes the memory of a whole one until it is read.
    """
    import warnings

    import pandas as pd

    size = os.path.getsize(path)
    if path.name.lower().endswith(".gz"):
        size = _most_unpacked(size)
    parts: list[pd.DataFrame] = []
    rows = 0
    try:
        with warnings.catch_warnings(), _open(path) as file:
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a first row that is too long is only warned of
            reader = pd.read_csv(
                file,
                sep="\t" if _kind(path) == "tsv" else ",",
                header=0,
                names=range(len(header)),
                index_col=False,
                dtype=str,
                keep_default_na=False,
                skipinitialspace=True,
                encoding="utf-8-sig",
                chunksize=max(1, CELLS_AT_ONCE // len(header)),
            )
            for part in reader:
                rows += len(part)
                if rows * len(header) > size + 2 * CELLS_AT_ONCE:  # a cell has at least its separator
                    raise InputError(_not_as_the_header(path, "most rows have fewer cells than the header", header))
                parts.append(part[list(wanted)])
            return pd.concat(parts)
    except pd.errors.ParserError as error:
        fault = told(error).removeprefix("Error tokenizing data. C error: ").strip()
        raise InputError(_not_as_the_header(path, fault, header)) from error
    except pd.errors.ParserWarning as error:
        raise InputError(_not_as_the_header(path, "the first row has more cells than the header", header)) from error
    except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile):
        for _ in _lines(path):  # names the line
            pass
        raise


def _parquet_names(path: Path) -> list[str]:
    """The names of the columns, those in which pandas keeps an index among them."""
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.ParquetDataset(path).schema.names
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _not_parquet(path, error) from error
    if len(names) > MOST_COLUMNS:
        raise InputError(f"{path}: {len(names):,} columns; expected a table of at most {MOST_COLUMNS:,}")
    return names


def _read_parquet(path: Path, header: Sequence[str], wanted: Sequence[int]) -> "pd.DataFrame":
    """The columns at some positions, as they are in the file: whole numbers stay whole where a cell is empty.

    Text is first read as a number per row and a list of the different texts, and only in full when that is known not to be
    too much: one long text in a million rows is a small file.
    """
    import pyarrow
    import pyarrow.parquet

    names = [header[at] for at in wanted]
    try:
        file = pyarrow.parquet.ParquetDataset(path)
        most = _most_unpacked(sum(map(os.path.getsize, file.files)))
        if sum(part.count_rows() for part in file.fragments) * 8 * len(names) > most:
            raise InputError(_too_large(path))
        packed = pyarrow.parquet.ParquetDataset(path, read_dictionary=_paths_of_columns(file.files)).read(columns=names)
        packed.validate(full=True)
        if sum(_bytes_of_text(part) for column in packed.columns for part in column.chunks) > most:
            raise InputError(_too_large(path))
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


def _read_json_lines(path: Path, wanted: set[str]) -> list[dict]:
    """The fields that are wanted of each record."""
    decoder = json.JSONDecoder(object_pairs_hook=distinct_keys)
    records: list[dict] = []
    spellings: set[str] = set()
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = parse_json(line, decoder)
        except ValueError as error:
            record = python_literal(line)  # the 2014 metadata are Python dicts
            if record is None and "half a character" in str(error):
                raise InputError(f"{path}:{number}: {error}; mend or remove that text") from error
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: expected one JSON object a line, came {shown(line.strip())}")
        records.append({name: value for name, value in record.items() if _plain_name(name) in wanted})
        spellings.update(records[-1])
        if len(spellings) > MOST_SPELLINGS:
            raise InputError(f"{path}:{number}: the names of columns are written in more than {MOST_SPELLINGS} ways")
    return records


def _plain_name(name: object) -> str:
    return str(name).strip().casefold()


def _find(columns: Sequence[str], candidates: Sequence[str], *, path: Path) -> int | None:
    """The position of the column that one of the candidates names; the exact spelling before any other."""
    for spelled in (lambda name: str(name).strip(), _plain_name):
        for candidate in candidates:
            at = [position for position, name in enumerate(columns) if spelled(name) == spelled(candidate)]
            if len(at) > 1:
                raise InputError(f"{path}: {len(at)} columns are called {shown(candidate)}; rename or remove all but one")
            if at:
                return at[0]
    return None


def _no_column(path: Path, columns: Sequence[str], field: str, candidates: Sequence[str]) -> str:
    names = [str(name) for name in columns]
    candidates = [named(name) for name in candidates]
    hint = ""
    if len(names) == 1 and any(separator in names[0] for separator in ";\t|"):
        hint = " (a .csv is separated by commas, a .tsv by tabs)"
    elif not names:
        return f"{path}: no record, or none with a column for the {field}; expected {' or '.join(candidates)}"
    return (
        f"{path}: no column for the {field} among {one_line(', '.join(names[:12]))[:MOST_NAMED]}{hint}; "
        f"expected {' or '.join(candidates)}, or name it by --{field}_column"
    )
