"""Interactions in Parquet: typed rows, or whole user sequences of which the rows are made while reading.

    user_id  history_item_id  item_id                     one row each, with the columns of a CSV; SIDs and titles may be
    ann      [0, 17]          4                           there and are then checked

    user_id  item_ids                                     every item but the first is a target once:
    ann      [0, 17, 4]                                   [0] -> 17 and [0, 17] -> 4

A sequence may have `timestamps`, one for each item, by which it is put in order; `targets`: how many of the last items
are asked for, 1 for a file of test rows; `max_history`: how many items a history has at most; and `row_numbers`, one for
each item that is asked for: the place of its row in the file, from 0, where rows are not in the order of the sequences:

    ann      [0, 17, 4]    row_numbers [0, 2]             [0] -> 17, then bob's [4] -> 0, then [0, 17] -> 4
    bob      [4, 0]        row_numbers [1]

10 million interactions take some 50 MB this way, and no history is written twice.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sid_sft.cells import LIST_COLUMNS, Written
from sid_sft.files import InputError, cut, error_text, shown

if TYPE_CHECKING:
    import pyarrow.parquet

ROW_COLUMNS = ("user_id", "history_item_id", "item_id")
OPTIONAL_COLUMNS = {"history_item_sid": "item_sid", "history_item_title": "item_title"}  # of the history, of the item
SEQUENCE_COLUMNS = ("user_id", "item_ids")
OPTIONAL_OF_SEQUENCES = ("timestamps", "targets", "max_history", "row_numbers")
EXPECTED = f"{', '.join(ROW_COLUMNS)} (SIDs and titles where you have them), or {' and '.join(SEQUENCE_COLUMNS)}"
ROWS_AT_ONCE = 256  # a column whose rows are all one long list takes little room until it is read
LONGEST_HISTORY = 8192  # of the rows made of a sequence: the newest items, more than any prompt shows
MOST_UNPACKED, ALWAYS_UNPACKED = 40, 2**26  # bytes of a Parquet column for each byte of its file; 64 MiB are no harm


def parquet_rows(path: Path) -> Iterator[Written]:
    """The rows of a Parquet file of interactions; InputError names the file, and the row where one is at fault."""
    waiting = Waiting(path)
    for number, fields in parquet_records(path, choose_columns):
        where, spot = f"{path}: row {number}", f"row {number}"
        user = str(entry(where, "user_id", fields["user_id"]))
        if "item_ids" not in fields:
            yield typed_row(where, spot, user, fields)
            continue
        items = sequence(where, fields)
        meaning = "how many items a history has at most"
        longest = up_to(LONGEST_HISTORY, where, "max_history", fields, least=1, meaning=meaning)
        meaning = "how many of the last items are asked for"  # the first item has no history
        first = len(items) - up_to(max(0, len(items) - 1), where, "targets", fields, least=0, meaning=meaning)
        if "row_numbers" in fields:
            waiting.add(number, user, items, longest, row_numbers(where, fields, len(items) - first))
            continue
        for at in range(first, len(items)):
            yield Written(where, f"{spot}, item {at + 1}", user, items[max(0, at - longest) : at + 1])
    yield from waiting.rows()


class Waiting:
    """Sequences whose rows have an order of their own. They wait until all are read, in some 80 bytes for each item."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sequences: list[tuple[int, str, int, int]] = []  # row in Parquet, user, where its items begin, longest history
        self.code_of: dict[str | int | float, int] = {}  # item -> its place here
        self.items = array("i")  # codes, of one sequence after the other
        self.row_numbers, self.places, self.owners = array("q"), array("q"), array("i")  # of each item that is asked for

    def add(self, number: int, user: str, items: list, longest: int, row_numbers: list[int]) -> None:
        """One more sequence, whose last items are asked for, in the rows `row_numbers`."""
        self.owners.extend([len(self.sequences)] * len(row_numbers))
        self.sequences.append((number, user, len(self.items), longest))
        self.items.extend(self.code_of.setdefault(item, len(self.code_of)) for item in items)
        self.row_numbers.extend(row_numbers)
        self.places.extend(range(len(self.items) - len(row_numbers), len(self.items)))

    def rows(self) -> Iterator[Written]:
        """The rows in order; InputError unless the numbers are 0, 1, 2 and so on, each once."""
        import numpy as np

        numbers = np.asarray(self.row_numbers)
        order = np.argsort(numbers, kind="stable")
        wrong = np.flatnonzero(numbers[order] != np.arange(len(numbers)))
        if len(wrong):
            raise InputError(
                f"{self.path}: row_numbers has {numbers[order[wrong[0]]]:,} where {wrong[0]:,} is expected; they must be "
                f"0 to {len(numbers) - 1:,}, each once, for that many items asked for"
            )
        item_of = list(self.code_of)
        for i in order:
            at = self.places[i]
            number, user, start, longest = self.sequences[self.owners[i]]
            ids = [item_of[code] for code in self.items[max(start, at - longest) : at + 1]]
            yield Written(f"{self.path}: row {number}", f"row {number}, item {at - start + 1}", user, ids)


def choose_columns(path: Path, header: list[str]) -> list[str]:
    """The columns to read of a file of interactions."""
    columns = list(ROW_COLUMNS)
    for pair in OPTIONAL_COLUMNS.items():
        columns += pair if set(pair) <= set(header) else ()
    if "item_ids" in header:
        columns = [*SEQUENCE_COLUMNS, *(name for name in OPTIONAL_OF_SEQUENCES if name in header)]
    for column in columns:
        if header.count(column) != 1:
            fault = f"has the column {column!r} twice" if column in header else f"has no column {column!r}"
            raise InputError(f"{path}: {fault}; its columns are {shown(','.join(header), 200)}, expected {EXPECTED}")
    return columns


def typed_row(where: str, spot: str, user: str, fields: dict[str, Any]) -> Written:
    """A row of the columns that a CSV has, with or without SIDs and titles."""
    ids = [*checked(where, "history_item_id", fields["history_item_id"]), entry(where, "item_id", fields["item_id"])]
    sids_and_titles = []
    for of_history, of_item in OPTIONAL_COLUMNS.items():
        values: list = []
        if of_history in fields:
            values = checked(where, of_history, fields[of_history]) + checked(where, of_history, [fields[of_item]])
            if len(values) != len(ids):
                raise InputError(
                    f"{where}: the history has {len(ids) - 1} ids and {len(values) - 1} entries of {of_history}; "
                    "they must be aligned"
                )
        sids_and_titles.append(values)
    return Written(where, spot, user, ids, *sids_and_titles)


def sequence(where: str, fields: dict[str, Any]) -> list:
    """The items of a user, oldest first; those of one moment stay in the file's order."""
    items = checked(where, "item_ids", fields["item_ids"], like="history_item_id")
    times = fields.get("timestamps")
    if times is None:
        return items
    if not isinstance(times, list) or len(times) != len(items) or any(time is None for time in times):
        raise InputError(f"{where}: has {len(items)} item_ids and the timestamps {shown(times)}; expected one for each item")
    try:
        return [items[i] for i in sorted(range(len(items)), key=times.__getitem__)]
    except TypeError as error:
        raise InputError(f"{where}: has timestamps that have no order ({cut(error_text(error))})") from None


def up_to(most: int, where: str, column: str, fields: dict[str, Any], *, least: int, meaning: str) -> int:
    """The whole number in a column of a sequence, `most` where it is larger or missing: 9 of at most 2 -> 2."""
    value = fields.get(column)
    if value is None:
        return most
    if type(value) is not int or value < least:
        raise InputError(f"{where}: has {shown(value)} for {column}; expected {meaning}")
    return min(value, most)


def is_row_number(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def row_numbers(where: str, fields: dict[str, Any], count: int) -> list[int]:
    """The places of the rows of a sequence among all rows, one for each item that is asked for."""
    numbers = fields["row_numbers"]
    if not isinstance(numbers, list) or len(numbers) != count or not all(map(is_row_number, numbers)):
        raise InputError(
            f"{where}: asks for {count} items and has the row_numbers {shown(numbers)}; expected a whole number for each"
        )
    return numbers


def checked(where: str, column: str, values: Any, like: str = "") -> list:
    """A list whose entries have the types that such a column of a CSV has, or that of the column `like`."""
    if not isinstance(values, list):
        raise InputError(f"{where}: column {column!r} has {shown(values)}; expected a list")
    for value in values:
        if type(value) not in LIST_COLUMNS[like or column]:
            raise InputError(f"{where}: column {column!r} has the entry {shown(value)}; expected ids, SIDs or titles")
    return values


def entry(where: str, column: str, value: Any) -> str | int | float:
    if type(value) not in (str, int, float):
        raise InputError(f"{where}: column {column!r} has {shown(value)}; expected a text or a number")
    return value


# ---------------------------------------------------------------------------------------------- any Parquet file


def parquet_records(path: Path, choose: Callable[[Path, list[str]], list[str]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, {column: value}) of each row, from 1, of the columns that `choose` takes of a header."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = choose(path, [str(name) for name in file.schema_arrow.names])
            check_unpacked(path, file.metadata, columns)
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False):
                for fields in batch.to_pylist():
                    number += 1
                    yield number, fields
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read as Parquet ({cut(error_text(error), 100)})") from None


def check_unpacked(path: Path, metadata: pyarrow.parquet.FileMetaData, columns: list[str]) -> None:
    """InputError where columns unpack to more than any rows would: a few megabytes may hold as many gigabytes."""
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    parts = [group.column(i) for group in groups for i in range(group.num_columns)]
    size = sum(part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] in columns)
    if size > max(MOST_UNPACKED * path.stat().st_size, ALWAYS_UNPACKED):
        raise InputError(f"{path}: unpacks to {size:,} bytes, more than {MOST_UNPACKED} times its size; write it anew")
