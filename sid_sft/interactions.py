"""Rows: who bought what after what, from a CSV or Parquet file of interactions or a preference file, checked against the
catalogue.

    user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid
    ann,"['Screws', 'Tape']",Filter,"[0, 1]",2,"['<a_0><b_0>', '<a_0><b_1>']",<a_1><b_0>
        -> Row(user="ann", history=(0, 1), item=2)

Rows that cannot be used are left out and counted; a file that would lose more than --max_left_out of its rows is refused.
"""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from sid_sft.catalogue import Catalogue, same_title, title_text
from sid_sft.cells import LIST_COLUMNS, ItemIds, Written, list_cell
from sid_sft.files import InputError, cut, error_text, one_line, read_json, read_lines, shown
from sid_sft.parquet_rows import parquet_rows
from sid_sft.parts import parts_of, source_name

logger = logging.getLogger("sft.interactions")

CSV_COLUMNS = (
    "user_id",
    "history_item_title",
    "item_title",
    "history_item_id",
    "item_id",
    "history_item_sid",
    "item_sid",
)
LONGEST_CELL = 2**20  # characters: ten thousand titles; to read a cell may take several hundred times its length of memory
MAX_LEFT_OUT = 0.2  # the share of a file's rows that may be left out before a run stops


class Row(NamedTuple):
    """A user, the user's history, oldest item first, and the item that followed, as positions in `Catalogue.items`.

    Row("ann", (0, 1), 2): ann bought items 0 and 1, then item 2. A row for each item of a catalogue has no user and no
    history: Row("", (), 2). `preference` is text about the user, in the rows of a preference file alone.
    """

    user: str
    history: tuple[int, ...]
    item: int
    preference: str = ""


class LeftOut:
    """The rows of a file that are left out: reason -> how many, and reason -> an example."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, reason: str, example: str) -> None:
        self.counts[reason] += 1
        self.examples.setdefault(reason, example)

    def check(self, path: Path, rows: int, max_left_out: float) -> None:
        """InputError where all of a file's rows are left out, or a larger share than `max_left_out`."""
        left = self.counts.total()
        why = ", ".join(f"{count:,} because {reason} ({self.examples[reason]})" for reason, count in self.counts.items())
        if left == rows:
            raise InputError(
                f"{path}: no row has a known item and history ({why}); the CSV and the index must be of one dataset"
            )
        check_share(f"{path}: ", left, rows, max_left_out, why)


def check_share(what: str, left: int, rows: int, max_left_out: float, why: str) -> None:
    """InputError where `left` of `rows` rows is a larger share than `max_left_out`: 3 of 10 with 0.2."""
    if left / rows > max_left_out:
        raise InputError(
            f"{what}{left:,} of {rows:,} rows would be left out, more than --max_left_out {max_left_out:g} allows: {why}; "
            "mend that or allow it with --max_left_out 1"
        )


def check_first_row(path: Path, catalogue: Catalogue, *, max_left_out: float) -> None:
    """Reads one row, so that a wrong file is told before anything heavy is loaded."""
    next(read_rows(path, catalogue, max_left_out=max_left_out), None)


def read_rows(
    path: Path,
    catalogue: Catalogue,
    note: Callable[[str], None] = logger.info,
    *,
    max_left_out: float = MAX_LEFT_OUT,
) -> Iterator[Row]:
    """The rows of interactions, one at a time, checked against the catalogue; parts.py tells of several files, which are
    read one after the other, and parquet_rows.py of Parquet.

    SIDs and titles are taken from the catalogue. A CSV whose SIDs contradict the index is refused, as it belongs to
    another index; a SID that lacks only the last, collision-breaking token is counted and read as the index has it.
    After the last row, `note` gets a line for each reason why rows or history items were left out:

        note("X.train.csv: 12 rows left out: their history is empty (36,201 rows)")

    InputError after the last row where a larger share of the rows than `max_left_out` was left out.
    """
    path = Path(path)
    counts: Counter[str] = Counter()
    ids, left_out = ItemIds(catalogue), LeftOut()
    for written in written_rows(parts_of(path), catalogue):
        counts["rows"] += 1
        row = parse_row(written, ids, counts, left_out)
        if row is not None:
            yield row
    if not counts["rows"]:
        raise InputError(f"{path}: has no rows; expected rows of {','.join(CSV_COLUMNS)}")
    left_out.check(path, counts["rows"], max_left_out)
    name = source_name(path)
    for reason, count in left_out.counts.items():
        note(f"{name}: {count:,} rows left out: {reason} ({counts['rows']:,} rows)")
    if spelling := ids.note_on_spelling():
        note(f"{name}: {spelling} ({counts['rows']:,} rows)")
    for key, text in {
        "history": "history items left out: they are not in the index",
        "short": "SIDs lack the last token that the index has; the index is used",
        "title": "titles differ from the item file's; the item file is used",
    }.items():
        if counts[key]:
            note(f"{name}: {counts[key]:,} {text} ({counts['rows']:,} rows)")


def written_rows(parts: list[Path], catalogue: Catalogue) -> Iterator[Written]:
    """The rows of each file in turn; where there are several, the spot of a row has the name of its file."""
    for path in parts:
        for written in parquet_rows(path) if path.suffix.lower() == ".parquet" else csv_rows(path, catalogue):
            yield written._replace(spot=f"{path.name}, {written.spot}") if len(parts) > 1 else written


def check_columns(path: Path, header: list[str]) -> None:
    """InputError unless a header has each of CSV_COLUMNS once."""
    for column in CSV_COLUMNS:
        if header.count(column) != 1:
            fault = f"has the column {column!r} twice" if column in header else f"has no column {column!r}"
            raise InputError(f"{path}: {fault}; its columns are {shown(','.join(header), 200)}")


def read_csv(
    path: Path,
    check_header: Callable[[Path, list[str]], None] = check_columns,
    expected: str = ",".join(CSV_COLUMNS),
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, {column: cell}) of each row of an interaction CSV: the row's last line, since a cell may hold line ends."""
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(read_lines(path), strict=True)
    try:
        header = next(reader, None)
        if header is None:
            raise InputError(f"{path}: is empty; expected a header line {expected}")
        check_header(path, header)
        for cells in reader:
            if len(cells) == len(header):
                yield reader.line_num, dict(zip(header, cells, strict=True))
            elif cells:
                raise InputError(
                    f"{path}:{reader.line_num}: has {len(cells)} cells, expected {len(header)} as in the header"
                )
    except csv.Error as error:
        if "field limit" in str(error):
            raise InputError(
                f"{path}:{reader.line_num}: has a cell of more than {LONGEST_CELL:,} characters; shorten the history to the "
                "items that --cutoff_len leaves of it, or look for a quote that is never closed"
            ) from None
        raise InputError(f"{path}:{reader.line_num}: is not CSV ({error_text(error)})") from None


def csv_rows(path: Path, catalogue: Catalogue) -> Iterator[Written]:
    """The rows of an interaction CSV. catalogue: for an example of a right cell where one is wrong."""
    for line, fields in read_csv(path):
        where = f"{path}:{line}"
        ids, sids, titles = (list_cell(where, fields, column, catalogue) for column in LIST_COLUMNS)
        if not len(ids) == len(sids) == len(titles):
            raise InputError(
                f"{where}: the history has {len(ids)} ids, {len(sids)} SIDs and {len(titles)} titles; they must be aligned"
            )
        columns = [*ids, fields["item_id"]], [*sids, fields["item_sid"]], [*titles, fields["item_title"]]
        yield Written(where, f"line {line}", fields["user_id"], *columns)


def parse_row(written: Written, ids: ItemIds, counts: Counter, left_out: LeftOut) -> Row | None:
    """One checked row, or None, counted in `left_out`, where its item or its whole history is not in the index."""
    catalogue, where = ids.catalogue, written.where
    positions = []
    for item_id, sid, title in zip_longest(written.ids, written.sids, written.titles):
        try:
            position = ids.find(item_id)
        except ValueError as error:
            given = f"history {shown(str(written.ids[:-1]))}, item {shown(str(written.ids[-1]))}"
            raise InputError(f"{where}: {error} ({given})") from None
        positions.append(position)
        if position is None:
            continue
        item = catalogue.items[position]
        known = "".join(item.sid)
        if sid is not None and sid != known:
            if sid != "".join(item.sid[:-1]):
                raise InputError(
                    f"{where}: item {cut(str(item_id))} has the SID {shown(sid)}, in the index {shown(known)}; "
                    "the CSV and the index must be of one dataset"
                )
            counts["short"] += 1
        if title and title != item.title and item.title and not same_title(title_text(title), item.title):
            counts["title"] += 1
    *history, target = positions
    known_history = tuple(position for position in history if position is not None)
    counts["history"] += len(history) - len(known_history)
    if target is None:
        left_out.add("their item is not in the index", f"{written.spot}: {shown(str(written.ids[-1]))}, {ids.like}")
    elif not history:
        left_out.add("their history is empty", written.spot)
    elif not known_history:
        unknown = f"{written.spot}: {shown(str(written.ids[:-1]))}, {ids.like}"
        left_out.add("no item of their history is in the index", unknown)
    else:
        return Row(written.user, known_history, target)
    return None


def read_preferences(
    path: Path,
    catalogue: Catalogue,
    split: str,
    note: Callable[[str], None] = logger.info,
    *,
    max_left_out: float = MAX_LEFT_OUT,
) -> Iterator[Row]:
    """The rows of one split of a preference file: a JSON list of
    {"user", "split", "user_preference", "context": {"history_items": [...], "target_item": ...}}.

    An item is written as its id (17), as its SID ("<a_1><b_0>"), or as an object with "item_id", "id" or "sid". `note` and
    `max_left_out` are those of `read_rows`.
    """
    expected = 'a list of {"user", "split", "user_preference", "context": {"history_items", "target_item"}}'
    entries = read_json(path, expected)
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: holds no entries; expected {expected}")
    by_sid = {"".join(item.sid): position for position, item in reversed(list(enumerate(catalogue.items)))}
    ids = ItemIds(catalogue)
    unknown = total = first = 0
    for number, entry in enumerate(entries):
        try:
            history, target = entry["context"]["history_items"], entry["context"]["target_item"]
            preference, user, its_split = entry["user_preference"], str(entry["user"]), entry.get("split", split)
        except KeyError as error:
            raise InputError(f"{path}: entry {number} lacks {error_text(error)}; expected {expected}") from None
        except (TypeError, AttributeError):
            raise InputError(f"{path}: entry {number} is no such object; expected {expected}") from None
        if not isinstance(history, list):
            raise InputError(f"{path}: entry {number} has history_items that are no list; expected {expected}")
        if its_split != split:
            continue
        try:
            found = [find_item(value, ids, by_sid) for value in [*history, target]]
        except ValueError as error:
            raise InputError(f"{path}: entry {number} {error}") from None
        total += 1
        known = [position for position in found if position is not None]
        if len(known) < max(len(found), 2) or not isinstance(preference, str) or not preference.strip():
            first = first if unknown else number
            unknown += 1
            continue
        yield Row(user, tuple(known[:-1]), known[-1], one_line(preference))
    if unknown == total:
        raise InputError(f"{path}: no entry of split {shown(split)} has known items and a preference; expected {expected}")
    reason = "unknown item, no history or no preference"
    if unknown:
        why = f"{reason} (entry {first}); {ids.like}"
        check_share(f"{path}: ", unknown, total, max_left_out, why)
        note(f"{Path(path).name}: {unknown:,} of {total:,} entries left out: {reason}")
    if spelling := ids.note_on_spelling():
        note(f"{Path(path).name}: {spelling}")


def find_item(value: Any, ids: ItemIds, by_sid: dict[str, int]) -> int | None:
    """The position of an item that a preference file names by id, SID or object; None where the index has no such item."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("item_id", "id", "sid") if key in value), None)
    if not isinstance(value, str | int | float):
        return None
    position = by_sid.get(str(value))
    return ids.find(value) if position is None else position
