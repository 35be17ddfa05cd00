"""A user's own tables: CSV, Parquet and JSON lines, the columns found by the names that such files have.

    orders.csv  reviewerID,asin,unixReviewTime
                A53,B00X,1465862400
    read_table(Path("orders.csv"), ("user", "item", "time"), names={})
        -> Table(rows: columns user, item, time; names: {"user": "reviewerID", "item": "asin", "time": "unixReviewTime"})

A file that cannot be read is refused by its name, and by its line where one line is at fault.
"""

import ast
import csv
import gzip
import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rq.files import InputError

if TYPE_CHECKING:
    import pandas as pd

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
        raw = _read_csv(path)
    elif kind == "parquet":
        raw = _read_parquet(path)
    else:
        wanted = {_plain_name(name) for some in candidates.values() for name in some}
        raw = pd.DataFrame.from_records(list(_read_json_lines(path, wanted)))
    found: dict[str, str] = {}
    columns: dict[str, Any] = {}
    for field in fields:
        at = _find(raw.columns, candidates[field], path=path)
        if at is None and field not in optional:
            raise InputError(_no_column(path, raw.columns, field, candidates[field]))
        columns[field] = "" if at is None else raw.iloc[:, at]
        if at is not None:
            found[field] = str(raw.columns[at]).strip()
    if raw.empty:
        raise InputError(f"{path}: no row under the header; expected one row for each record")
    found_as = ", ".join(f"{field} from {name}" for field, name in found.items())
    log.info("%s: %s rows, %s", path, f"{len(raw):,}", found_as)
    return Table(path, pd.DataFrame(columns, index=raw.index), found)


def _kind(path: Path) -> str:
    """'orders.CSV.gz' -> 'csv'; a file that cannot be read is refused before anything is read."""
    name = path.name.lower()
    kind = name.removesuffix(".gz").rpartition(".")[2]
    expected = "expected .csv, .tsv, .json or .jsonl (one object a line), each also as .gz, or .parquet"
    if path.is_dir() and kind != "parquet":
        raise InputError(f"{path}: a folder; {expected}")
    if kind not in KINDS or name.endswith(".parquet.gz"):
        raise InputError(f"{path}: a file of kind .{name.rpartition('.')[2]}; {expected}; unpack or convert it first")
    return kind


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    return gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, text) of a UTF-8 file, unpacked; what cannot be unpacked or decoded is named by its line."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{number}: not UTF-8 text ({_explained(path, error)}); save the file as UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"{path}: broken gzip data after line {number} ({_explained(path, error)}); fetch it anew"
        ) from error


def _explained(path: Path, error: Exception) -> str:
    """The error, and the kind of file that its first bytes show: "invalid start byte; its first bytes are those of gzip"."""
    with open(path, "rb") as file:
        start = file.read(4)
    really = next((kind for magic, kind in FIRST_BYTES.items() if start.startswith(magic)), None)
    named_gzip = path.name.lower().endswith(".gz")
    return f"{error}" + (
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


def _read_csv(path: Path) -> "pd.DataFrame":
    """All cells as text; a row with more cells than the header is refused, for its columns may be shifted."""
    import warnings

    import pandas as pd

    try:
        _, header = next(_csv_rows(path))
    except StopIteration:
        raise InputError(f"{path}: the file is empty; expected a header and rows") from None
    except csv.Error as error:
        raise InputError(f"{path}: {error} in the header; expected names of columns") from error
    compression = "gzip" if path.name.lower().endswith(".gz") else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a first row that is too long is only warned of
            raw = pd.read_csv(
                path,
                sep="\t" if _kind(path) == "tsv" else ",",
                header=0,
                names=range(len(header)),
                index_col=False,
                dtype=str,
                keep_default_na=False,
                skipinitialspace=True,
                encoding="utf-8-sig",
                compression=compression,
            )
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        fault = str(error).removeprefix("Error tokenizing data. C error: ").strip()
        if isinstance(error, pd.errors.ParserWarning):
            fault = "the first row has more cells than the header"
        raise InputError(
            f"{path}: {fault}; expected {len(header)} cells in each row; put a cell that holds the separator in quotes"
        ) from error
    except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile):
        for _ in _lines(path):  # names the line
            pass
        raise
    raw.columns = header
    return raw


def _read_parquet(path: Path) -> "pd.DataFrame":
    import pyarrow
    import pyarrow.parquet

    try:
        # The columns as they are in the file: an index that pandas wrote is a column, and whole numbers stay whole.
        return pyarrow.parquet.read_table(path).to_pandas(ignore_metadata=True, integer_object_nulls=True)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise
        raise InputError(f"{path}: not a Parquet file that can be read ({error}); write or fetch it anew") from error


def _read_json_lines(path: Path, wanted: set[str]) -> Iterator[dict]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = _python_literal(line)  # the 2014 metadata are Python dicts
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: expected one JSON object a line, came {line.strip()[:60]!r}")
        kept = {name: value for name, value in record.items() if _plain_name(name) in wanted}
        if "\\u" in line:
            try:
                json.dumps(kept, ensure_ascii=False, default=str).encode()
            except UnicodeEncodeError as error:
                raise InputError(f"{path}:{number}: half a character ({error.reason}); mend or remove that text") from error
        yield kept


def _python_literal(line: str) -> object:
    try:
        return ast.literal_eval(line.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _plain_name(name: object) -> str:
    return str(name).strip().casefold()


def _find(columns: "pd.Index", candidates: Sequence[str], *, path: Path) -> int | None:
    """The position of the column that one of the candidates names; the exact spelling before any other."""
    for spelled in (lambda name: str(name).strip(), _plain_name):
        for candidate in candidates:
            at = [position for position, name in enumerate(columns) if spelled(name) == spelled(candidate)]
            if len(at) > 1:
                raise InputError(f"{path}: {len(at)} columns are called {candidate!r}; rename or remove all but one")
            if at:
                return at[0]
    return None


def _no_column(path: Path, columns: "pd.Index", field: str, candidates: Sequence[str]) -> str:
    names = [str(name) for name in columns]
    hint = ""
    if len(names) == 1 and any(separator in names[0] for separator in ";\t|"):
        hint = " (a .csv is separated by commas, a .tsv by tabs)"
    elif not names:
        return f"{path}: no record, or none with a column for the {field}; expected {' or '.join(candidates)}"
    return (
        f"{path}: no column for the {field} among {', '.join(names[:12])}{hint}; "
        f"expected {' or '.join(candidates)}, or name it by --{field}_column"
    )
