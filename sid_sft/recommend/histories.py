"""Histories of many users, one a row, to recommend for: a CSV, a Parquet file or JSON lines, by the file's ending.

    user_id,history                                {"user_id": 7, "history": [0, "<a_0><b_1>", "Tape"]}
    ann,"['Screws', 'Tape']"
    bob,<a_0><b_0> | 17

    read_histories(Path("users.csv"), catalogue, shows="sid")
        -> Histories(users=["ann", "bob"], rows=[Row("", (0, 1), 1), Row("", (0, 17), 17)])

A history stands in a column of HISTORY_COLUMNS; of several, the first. `history` takes item ids, SIDs and whole titles,
mixed; the others, which interaction CSVs have, take what they are named after. A cell is a list, or text with | between the
items; ids and SIDs may have commas or spaces between them. Every row of the file stays a row, in the file's order.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sid_sft.catalogue import Catalogue, title_text, unescaped
from sid_sft.cells import ItemIds, read_list
from sid_sft.files import InputError, json_value, read_lines, shown
from sid_sft.interactions import LONGEST_CELL, MAX_LEFT_OUT, LeftOut, Row, read_csv
from sid_sft.parquet_rows import parquet_records
from sid_sft.recommend.named_items import places_of_sids

logger = logging.getLogger("sft.histories")

HISTORY_COLUMNS = ("history", "history_item_id", "history_item_sid", "history_item_title")
USER_COLUMN = "user_id"
EXPECTED = f"{USER_COLUMN}, if users have ids, and {' or '.join(HISTORY_COLUMNS)}"
MOST_ENTRIES = 100_000  # of a history
NAMED = 3  # unknown items that a line names


class Histories(NamedTuple):
    """users: the ids as the file has them, or None where it has none; rows: a row for each, None where nothing of its
    history can be shown to the model. A row's item means nothing."""

    users: list[str | int | float | None] | None
    rows: list[Row | None]


def read_histories(
    path: Path,
    catalogue: Catalogue,
    note: Callable[[str], None] = logger.info,
    *,
    shows: str,
    max_left_out: float = MAX_LEFT_OUT,
) -> Histories:
    """The histories of a file. shows: "sid" or "title", what the task shows of an item.

    `note` gets a line for items that are not in the catalogue, which are left out, and for rows of which nothing is left:

        note("users.csv: 2 history items are not in the catalogue and are left out: 'Glue' (line 3), '99' (line 8)")

    InputError where a larger share of the rows than `max_left_out` has nothing left, or all of them.
    """
    items, unknown, empty = NamedItems(catalogue), LeftOut(), LeftOut()
    users: list[Any] = []
    rows: list[Row | None] = []
    for number, fields in READERS[path.suffix.lower()](path):
        spot = f"row {number}" if path.suffix.lower() == ".parquet" else f"line {number}"
        where = f"{path}:{number}" if spot.startswith("line") else f"{path}: {spot}"
        users.append(user_of(where, fields.get(USER_COLUMN)))
        column = next(name for name in HISTORY_COLUMNS if name in fields)
        entries = entries_of(where, column, fields[column], items)
        found = [items.find(where, column, entry) for entry in entries]
        for entry, place in zip(entries, found, strict=True):
            if place is None:
                unknown.add(shown(entry), spot)
        history = tuple(place for place in found if place is not None)
        rows.append(Row("", history, history[-1]) if history else None)
        if not entries:
            empty.add("their history is empty", spot)
        elif not history:
            empty.add("no item of their history is in the catalogue", f"{spot}: {shown(entries[0])}")
        elif shows == "title" and not any(catalogue.items[place].title for place in history):
            empty.add("no item of their history has a title, which the task shows", spot)
            rows[-1] = None
    if not rows:
        raise InputError(f"{path}: has no rows; expected the columns {EXPECTED}")
    if unknown.counts:
        first = ", ".join(f"{entry} ({unknown.examples[entry]})" for entry in list(unknown.counts)[:NAMED])
        more = ", ..." if len(unknown.counts) > NAMED else ""
        note(
            f"{path.name}: {unknown.counts.total():,} history items are not in the catalogue and are left out: {first}{more}"
        )
    check_empty(path, empty, len(rows), max_left_out, items.ids.like)
    for reason, count in empty.counts.items():
        note(f"{path.name}: {count:,} of {len(rows):,} rows get no recommendations: {reason} ({empty.examples[reason]})")
    for line in items.notes():
        note(f"{path.name}: {line}")
    return Histories(users if any(user is not None for user in users) else None, rows)


def check_empty(path: Path, empty: LeftOut, rows: int, max_left_out: float, like: str) -> None:
    """InputError where all rows, or a larger share than `max_left_out`, would get no recommendations."""
    left = empty.counts.total()
    why = ", ".join(f"{count:,} because {reason} ({empty.examples[reason]})" for reason, count in empty.counts.items())
    if left == rows:
        raise InputError(f"{path}: no history has a known item ({why}); {like}")
    if left / rows > max_left_out:
        raise InputError(
            f"{path}: {left:,} of {rows:,} rows would get no recommendations, more than --max_left_out {max_left_out:g} "
            f"allows: {why}; mend that or allow it with --max_left_out 1"
        )


def user_of(where: str, value: Any) -> str | int | float | None:
    """A user's id as the file has it; None where it has none."""
    if type(value) not in (str, int, float, type(None)):
        raise InputError(f"{where}: has {shown(value)} for a {USER_COLUMN}; expected a text or a number")
    return None if value != value else value


# ---------------------------------------------------------------------------------------------- the items of a history


def entries_of(where: str, column: str, cell: Any, items: NamedItems) -> list[str | int | float | None]:
    """The entries of a cell: "['Screws', 'Tape']" -> ["Screws", "Tape"], "Screws | 17" -> ["Screws", "17"], 5 -> [5]."""
    if isinstance(cell, str):
        if len(cell) > LONGEST_CELL:
            raise InputError(f"{where}: column {column!r} has a text of more than {LONGEST_CELL:,} characters; shorten it")
        cell = split_cell(where, column, cell, items)
    entries = cell if isinstance(cell, list) else [] if cell is None or cell != cell else [cell]
    if len(entries) > MOST_ENTRIES:
        raise InputError(f"{where}: column {column!r} has {len(entries):,} items; expected {MOST_ENTRIES:,} at most")
    for entry in entries:
        if type(entry) not in (str, int, float, type(None)):
            raise InputError(f"{where}: column {column!r} has the entry {shown(entry)}; expected item ids, SIDs or titles")
    return entries


def split_cell(where: str, column: str, text: str, items: NamedItems) -> list:
    """The entries of a cell of text, which is a list literal, or has | between the items."""
    if text.lstrip().startswith("["):
        try:
            return read_list(text)
        except ValueError as error:
            if column != "history":  # there it may be a title: [2 pieces] Tape
                raise InputError(f"{where}: column {column!r} {error}: {shown(text)}; expected one like [0, 1]") from None
    if items.has_id_or_sid(text) or title_key(text) in items.titles:
        return [text]
    if "|" not in text and column != "history_item_title":
        pieces = re.split(r"[\s,]+", text.strip())
        if column != "history" or all(map(items.has_id_or_sid, pieces)):
            return [piece for piece in pieces if piece]
    return [piece.strip() for piece in text.split("|") if piece.strip()]


def title_key(title: str | int | float) -> str:
    """The same text for a title in any case and however it is escaped: "Nuts &amp; Bolts" -> "nuts & bolts"."""
    return unescaped(title_text(title)).casefold()


class NamedItems:
    """Finds the items of a catalogue by id, SID or whole title, as the column of an entry says."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue, self.ids, self.sids = catalogue, ItemIds(catalogue), places_of_sids(catalogue)
        self.titles: dict[str, list[int]] = defaultdict(list)
        for place, item in enumerate(catalogue.items):
            if item.title:
                self.titles[title_key(item.title)].append(place)
        self.shared: Counter[str] = Counter()  # titles given that are of several items

    def find(self, where: str, column: str, entry: str | int | float | None) -> int | None:
        """The place of an item, None where the catalogue has no such item; InputError where an id has two readings."""
        ways = {"history_item_id": (self.by_id,), "history_item_sid": (self.by_sid,), "history_item_title": (self.by_title,)}
        if entry is None or entry != entry:
            return None
        try:
            found = (way(entry) for way in ways.get(column, (self.by_id, self.by_sid, self.by_title)))
            return next((place for place in found if place is not None), None)
        except ValueError as error:
            raise InputError(f"{where}: column {column!r} {error}") from None

    def has_id_or_sid(self, text: str) -> bool:
        """Whether a text is an id or a SID as the index has it."""
        return text in self.catalogue.position or text in self.sids

    def by_id(self, entry: str | int | float) -> int | None:
        return self.ids.find(entry)

    def by_sid(self, entry: str | int | float) -> int | None:
        return self.sids.get("".join(str(entry).split()))

    def by_title(self, entry: str | int | float) -> int | None:
        places = self.titles.get(title_key(entry), [])
        if len(places) > 1:
            self.shared[str(entry)] += 1
        return places[0] if places else None

    def notes(self) -> Iterator[str]:
        """What to tell of how items were found."""
        if spelling := self.ids.note_on_spelling():
            yield spelling
        if self.shared:
            title = next(iter(self.shared))
            first = self.catalogue.items[self.titles[title_key(title)][0]].id
            yield (
                f"{self.shared.total():,} titles are of several items each, and the first in the index is taken "
                f"({shown(title)}: {shown(first)})"
            )


# ---------------------------------------------------------------------------------------------- the rows of a file


def check_header(path: Path, header: list[str]) -> None:
    """InputError unless a header has a history column, and none of the columns that are read twice."""
    for column in (USER_COLUMN, *HISTORY_COLUMNS):
        if header.count(column) > 1:
            raise InputError(f"{path}: has the column {column!r} twice; its columns are {shown(','.join(header), 200)}")
    if not set(header) & set(HISTORY_COLUMNS):
        columns = shown(",".join(header), 200)
        raise InputError(f"{path}: has no history; its columns are {columns}, expected {EXPECTED}")


def csv_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, {column: value}) of each row, each with at least one column of HISTORY_COLUMNS; so do the other readers."""
    return read_csv(path, check_header, EXPECTED)


def json_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    expected = 'one JSON object a line, like {"user_id": 7, "history": [0, 17]}'
    for number, line in enumerate(read_lines(path, expected), 1):
        if not line.strip():
            continue
        fields = json_value(line, f"{path}:{number}", expected)
        if not isinstance(fields, dict):
            raise InputError(f"{path}:{number}: holds {shown(fields)}; expected {expected}")
        if not fields.keys() & set(HISTORY_COLUMNS):
            raise InputError(f"{path}:{number}: has no history but {shown(','.join(fields))}; expected {EXPECTED}")
        yield number, fields


def parquet_histories(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    def choose(path: Path, header: list[str]) -> list[str]:
        check_header(path, header)
        first = next(name for name in HISTORY_COLUMNS if name in header)
        return [name for name in (USER_COLUMN, first) if name in header]

    return parquet_records(path, choose)


READERS = {
    ".csv": csv_records,
    ".parquet": parquet_histories,
    ".jsonl": json_records,
    ".json": json_records,
}
