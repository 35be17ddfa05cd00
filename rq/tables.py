"""A user's own tables: CSV and other text, Parquet and JSON, the columns found by the names that such files have.

    orders.csv  reviewerID,asin,unixReviewTime
                A53,B00X,1465862400
    read_table(Path("orders.csv"), ("user", "item", "time"), names={})
        -> Table(rows: columns user, item, time; names: {"user": "reviewerID", "item": "asin", "time": "unixReviewTime"})

A table may be several files (parts.py), and is read some rows at a time. A file that cannot be read is refused by its name,
and by its line where one line is at fault.
"""

import bisect
import contextlib
import csv
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rq.catalogue import python_literal
from rq.files import InputError, distinct_keys, named, one_line, parse_json, shown, told
from rq.formats import FIELD_NAMES, LAYOUTS, SEPARATORS, WHOSE, WITHOUT_HEADER, Layout, find, plain_name
from rq.hub import hub_address, open_dataset
from rq.json_objects import is_one_object, read_object
from rq.parquet_files import parquet_names, read_parquet
from rq.parts import parts_of
from rq.text_files import (
    BROKEN_GZIP,
    ONE_CHARACTER,
    encoding_of,
    first_line,
    is_gzip,
    lines,
    most_unpacked,
    not_text,
    open_bytes,
)

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("rq.tables")

KINDS = (*LAYOUTS, "parquet", "json", "jsonl")
EXPECTED = (
    "expected .csv, .tsv, .json or .jsonl (one object a line), .inter, .item, .dat or .txt, each also as .gz, or .parquet"
)

# What a table may ask for at most. A few megabytes can unpack to as many gigabytes, or make a row of as many columns.
MOST_COLUMNS = 2_000
CELLS_AT_ONCE = 2**22
MOST_SPELLINGS = 100  # of the names of columns in JSON lines
MOST_NAMED = 200  # characters of the names of columns in a message


@dataclass(frozen=True)
class Table:
    """The columns that are read, one a field, rows counted from 0 over all files; absent optional ones are ''."""

    path: Path | str  # as messages have it
    chunks: Iterable["pd.DataFrame"]  # some rows after the other; to be gone through once
    names: dict[str, str]  # field -> what the file calls it
    where: Callable[[int], str]  # where a row stands: 7 -> 'orders.csv:9'; may read the file again, so for messages only
    has_times: bool = True  # False: the column time holds each user's positions, 0 for the oldest item


@dataclass(frozen=True)
class Reading:
    """A file that is opened: what it is, the names of its columns, and how to read some of them, by their positions."""

    what: str
    header: Sequence[str]
    read: Callable[[Sequence[int]], Iterable["pd.DataFrame"]]
    where: Callable[[int], str]


@dataclass(frozen=True)
class Wanted:
    """The fields to read, those that must be there, and field -> the names that its column may have."""

    required: tuple[str, ...]
    candidates: Mapping[str, Sequence[str]]

    def lacking(self, header: Sequence[str], *, path: object) -> str | None:
        """The first required field that no column is for."""
        return next((field for field in self.required if find(header, self.candidates[field], path=path) is None), None)


def read_table(
    path: Path,
    fields: Sequence[str],
    *,
    names: dict[str, str | None],
    optional: Sequence[str] = (),
    sep: str | None = None,
    encoding: str | None = None,
) -> Table:
    """The columns `fields` of a file or of several; `names` has the columns given by flags, `sep` and `encoding` are of text
    files. The first lines of all files are read at once, the rest as the chunks are.
    """
    candidates = {field: (given,) if (given := names.get(field)) else FIELD_NAMES[field] for field in fields}
    wanted = Wanted(tuple(field for field in fields if field not in optional), candidates)
    parts = [path] if hub_address(path) else parts_of(path)
    opened = [_open_part(part, wanted, sep=sep, encoding=encoding) for part in parts]
    for part, (_, _, found) in zip(parts, opened, strict=True):
        for field in fields:
            if found.get(field) != opened[0][2].get(field):
                raise InputError(
                    f"{part}: the {field} is in the column {shown(found.get(field))}, in {parts[0]} in "
                    f"{shown(opened[0][2].get(field))}; name the columns of all parts alike"
                )
    starts: list[int] = []  # of each part that has been begun, its first row

    def where(row: int) -> str:
        at = max(0, bisect.bisect_right(starts, row) - 1)
        return opened[at][0].where(row - starts[at] if starts else row)

    def chunks() -> Iterator["pd.DataFrame"]:
        import pandas as pd

        rows = 0
        for reading, positions, _ in opened:
            starts.append(rows)
            for raw in reading.read(sorted(set(positions.values()))):
                columns = {field: raw[positions[field]] if field in positions else "" for field in fields}
                yield pd.DataFrame(columns, index=raw.index).set_axis(range(rows, rows + len(raw)))
                rows += len(raw)
        if not rows:
            raise InputError(f"{shown_path}: no row under the header; expected one row for each record")
        reading, _, found = opened[0]
        log.info(
            "%s: %s, %s rows, %s",
            shown_path if len(opened) == 1 else f"{shown_path}, {len(opened):,} files",
            WHOSE.get(tuple(found.values())[:2], reading.what),
            f"{rows:,}",
            ", ".join(f"{field} from {named(name)}" for field, name in found.items()),
        )

    shown_path = hub_address(path) or path
    return Table(shown_path, chunks(), opened[0][2], where)


def _open_part(
    path: Path, wanted: Wanted, *, sep: str | None, encoding: str | None
) -> tuple[Reading, dict[str, int], dict[str, str]]:
    """One file, {field: position of its column} and {field: what the file calls it}."""
    opened = _open_table(path, wanted, sep=sep, encoding=encoding)
    header, shown_path = opened.header, hub_address(path) or path
    if len(header) > MOST_COLUMNS:
        raise InputError(f"{shown_path}: {len(header):,} columns; expected a table of at most {MOST_COLUMNS:,}")
    positions: dict[str, int] = {}
    for field, candidates in wanted.candidates.items():
        at = find(header, candidates, path=shown_path)
        if at is None and field in wanted.required:
            raise InputError(_no_column(shown_path, header, field, candidates))
        if at is not None:
            positions[field] = at
    return opened, positions, {field: str(header[at]).strip() for field, at in positions.items()}


def _open_table(path: Path, wanted: Wanted, *, sep: str | None, encoding: str | None) -> Reading:
    if address := hub_address(path):
        return Reading("a dataset of the Hub", *open_dataset(address), lambda row: f"{address}: row {row + 1}")
    kind = _kind(path)
    if kind == "parquet":
        header = parquet_names(path)
        return Reading("Parquet", header, lambda at: read_parquet(path, header, at), lambda row: f"{path}: row {row + 1}")
    if kind in LAYOUTS:
        return _open_text(path, wanted, _layout(path, kind, wanted, sep=sep, encoding=encoding))
    return _open_json(path, wanted)


def _kind(path: Path) -> str:
    """'orders.CSV.gz' -> 'csv'; a file that cannot be read is refused before anything is read."""
    name = path.name.lower()
    kind = name.removesuffix(".gz").rpartition(".")[2]
    ending = named(name.rpartition(".")[2])
    if kind not in KINDS or name.endswith(".parquet.gz"):
        raise InputError(f"{path}: a file of kind .{ending}; {EXPECTED}; unpack or convert it first")
    return kind


# ---------------------------------------------------------------------------------------------- text


def _layout(path: Path, kind: str, wanted: Wanted, *, sep: str | None, encoding: str | None) -> Layout:
    """The layout that the first line shows: one without a header, or the first separator that gives the columns needed."""
    line = first_line(path)
    usual = LAYOUTS[kind]
    known = next(
        (layout for pattern, layout in WITHOUT_HEADER if sep in (None, layout.separator) and pattern.fullmatch(line)), None
    )
    layout = known or dataclasses.replace(usual, separator=sep or usual.separator)
    layout = dataclasses.replace(layout, encoding=encoding_of(path, encoding or layout.other_encoding))
    if known:
        return layout
    for separator in dict.fromkeys((layout.separator, usual.separator, *SEPARATORS)):
        other = dataclasses.replace(layout, separator=separator)
        with contextlib.suppress(StopIteration, csv.Error, InputError):
            if not wanted.lacking(next(_csv_rows(path, other))[1], path=path):
                return other
    return layout


def _open_text(path: Path, wanted: Wanted, layout: Layout) -> Reading:
    header = _csv_header(path, layout)
    what = layout.what
    if layout.separator != LAYOUTS.get(_kind(path), layout).separator and not layout.columns:
        what += f" with {layout.separator!r} between cells"
    if layout.encoding != "utf-8":
        what += f" in {layout.encoding}"
    return Reading(
        what,
        header,
        lambda wanted_at: _read_csv(path, layout, header, wanted_at),
        lambda row: _where_in_text(path, layout, row),
    )


def _where_in_text(path: Path, layout: Layout, row: int) -> str:
    try:
        rows = (number for number, _ in _csv_rows(path, layout))
        for _ in range(row + (not layout.columns)):
            next(rows)
        return f"{path}:{next(rows)}"
    except (csv.Error, StopIteration):
        return f"{path}: row {row + 1}"


def _mark(layout: Layout) -> str:
    """The one character between cells."""
    return layout.separator if len(layout.separator) == 1 else ONE_CHARACTER


def _csv_rows(path: Path, layout: Layout) -> Iterator[tuple[int, list[str]]]:
    """(last line, cells) of each row of a text file that is not blank, the header first."""
    reader = csv.reader(
        (line for _, line in lines(path, encoding=layout.encoding, separator=layout.separator)),
        delimiter=_mark(layout),
        quoting=csv.QUOTE_MINIMAL if layout.quoted else csv.QUOTE_NONE,
        skipinitialspace=layout.separator != " ",
    )
    for cells in reader:
        if len(cells) > 1 or "".join(cells).strip():
            yield reader.line_num, cells


def _csv_header(path: Path, layout: Layout) -> Sequence[str]:
    """The names of the columns. The first row is held against them, too, since pandas makes room for all of its cells."""
    rows = _csv_rows(path, layout)
    header: Sequence[str] = layout.columns
    if not header:
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
            raise InputError(_not_as_the_header(path, layout, "the first row has more cells than the header", header))
    return header


def _not_as_the_header(path: Path, layout: Layout, fault: str, header: Sequence[str]) -> str:
    cure = "put a cell that holds the separator in quotes" if layout.quoted else f"no cell may hold {layout.separator!r}"
    return f"{path}: {fault}; expected {len(header)} cells in each row; {cure}"


def _read_csv(path: Path, layout: Layout, header: Sequence[str], wanted: Sequence[int]) -> Iterator["pd.DataFrame"]:
    """The columns at some positions, all cells as text. A row with more cells than the header is refused, for its columns
    may be shifted. Rows are read some at a time, since a short one takes the memory of a whole one until it is read.
    """
    import warnings

    import pandas as pd

    size = os.path.getsize(path)
    if is_gzip(path):
        size = most_unpacked(size)
    rows = 0
    try:
        with warnings.catch_warnings(), open_bytes(path, separator=layout.separator) as file:
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a first row that is too long is only warned of
            reader = pd.read_csv(
                file,
                sep=_mark(layout),
                quoting=csv.QUOTE_MINIMAL if layout.quoted else csv.QUOTE_NONE,
                header=None if layout.columns else 0,
                names=range(len(header)),
                index_col=False,
                dtype=str,
                keep_default_na=False,
                skipinitialspace=layout.separator != " ",
                encoding="utf-8-sig" if layout.encoding == "utf-8" else layout.encoding,
                chunksize=max(1, CELLS_AT_ONCE // len(header)),
            )
            for part in reader:
                rows += len(part)
                if rows * len(header) > size + 2 * CELLS_AT_ONCE:  # a cell has at least its separator
                    raise InputError(_not_as_the_header(path, layout, "most rows have fewer cells than the header", header))
                yield part[list(wanted)]
    except pd.errors.ParserError as error:
        fault = told(error).removeprefix("Error tokenizing data. C error: ").strip()
        raise InputError(_not_as_the_header(path, layout, fault, header)) from error
    except pd.errors.ParserWarning as error:
        raise InputError(_not_as_the_header(path, layout, "the first row has more cells than the header", header)) from error
    except (UnicodeDecodeError, *BROKEN_GZIP) as error:
        for _ in lines(path, encoding=layout.encoding):  # names the line
            pass
        raise not_text(str(path), path, error, encoding=layout.encoding) from error


# ---------------------------------------------------------------------------------------------- JSON


def _open_json(path: Path, wanted: Wanted) -> Reading:
    import pandas as pd

    known = {plain_name(name) for some in wanted.candidates.values() for name in some}
    key = wanted.candidates["item"][0]
    if is_one_object(path, of=dict):
        what, content = "items by their ids", read_object(path, of=dict)
        records = [{key: item, **_fields(fields, known)} for item, fields in content.items()]
        places = list(content)
    else:
        what, records, places = "JSON lines", _read_json_lines(path, known), []
    frame = pd.DataFrame.from_records(records)
    header = list(frame.columns)

    def where(row: int) -> str:
        return f"{path}: item {shown(places[row])}" if places else _where_in_lines(path, row)

    return Reading(what, header, lambda _: [frame.set_axis(range(len(header)), axis=1)], where)


def _fields(record: dict, known: set[str]) -> dict:
    return {name: value for name, value in record.items() if plain_name(name) in known}


def _where_in_lines(path: Path, row: int) -> str:
    numbers = (number for number, line in lines(path) if line.strip())
    for _ in range(row):
        next(numbers)
    return f"{path}:{next(numbers)}"


def _read_json_lines(path: Path, wanted: set[str]) -> list[dict]:
    """The fields that are wanted of each record."""
    decoder = json.JSONDecoder(object_pairs_hook=distinct_keys)
    records: list[dict] = []
    spellings: set[str] = set()
    for number, line in lines(path):
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
        records.append(_fields(record, wanted))
        spellings.update(records[-1])
        if len(spellings) > MOST_SPELLINGS:
            raise InputError(f"{path}:{number}: the names of columns are written in more than {MOST_SPELLINGS} ways")
    return records


def _no_column(path: object, columns: Sequence[str], field: str, candidates: Sequence[str]) -> str:
    names = [str(name) for name in columns]
    candidates = [named(name) for name in candidates]
    hint = ""
    if len(names) == 1:
        hint = " (what stands between the cells? name it by --sep)"
    elif not names:
        return f"{path}: no record, or none with a column for the {field}; expected {' or '.join(candidates)}"
    return (
        f"{path}: no column for the {field} among {one_line(', '.join(names[:12]))[:MOST_NAMED]}{hint}; "
        f"expected {' or '.join(candidates)}, or name it by --{field}_column"
    )
