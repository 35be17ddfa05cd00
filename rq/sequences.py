"""Files of each user's items in order, without times.

    X.inter.json         {"0": [17, 4, 9], "1": [4, 9]}     LC-Rec and LETTER
    sequential_data.txt  1 17 4 9                           P5: a user, then items
        -> Table(rows: columns user, item, time: ("0", "17", 0), ("0", "4", 1), ..; has_times False)

Every other file is a table, and read by rq.tables.
"""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from rq.catalogue import LONGEST_ID
from rq.files import InputError, read_json, shown
from rq.formats import SEQUENCE
from rq.json_objects import EXPECTED, is_one_object, read_object
from rq.tables import Table, read_table
from rq.text_files import first_line, lines

log = logging.getLogger("rq.sequences")

P5_FILE, P5_MAPS = "sequential_data.txt", "datamaps.json"


def read_interactions(path: Path, *, names: dict[str, str | None], sep: str | None, encoding: str | None) -> Table:
    """The columns user, item and time of a file in any format; `names` has the columns given by flags."""
    if not path.is_file():
        pass  # an address of the Hub, or several files
    elif is_one_object(path, of=list):
        return _table(path, list(read_object(path, of=list).items()), what="LC-Rec's user -> items in order")
    elif path.name.lower().removesuffix(".gz").endswith(".txt") and SEQUENCE.fullmatch(first_line(path)):
        users = _with_real_ids(path, list(_p5_lines(path)))
        return _table(path, users, what="P5's lines of a user and items in order")
    return read_table(path, ("user", "item", "time"), names=names, sep=sep, encoding=encoding)


def _p5_lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    for number, line in lines(path):
        cells = line.split()
        if cells and not SEQUENCE.fullmatch(line.strip()):
            raise InputError(
                f"{path}:{number}: {shown(line.strip())}; expected numbers, a user and then items, as in line 1"
            )
        if cells:
            yield cells[0], cells[1:]


def _with_real_ids(path: Path, users: list[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """The items by the ids that they have in the metadata, where P5's table of ids stands beside its file."""
    maps = path.with_name(P5_MAPS)
    if path.name != P5_FILE or not maps.exists():
        return users
    expected = 'P5\'s {"id2item": {"1": "B00X", ..}, ..}'
    content = read_json(maps, expected=expected)
    ids = content.get("id2item") if isinstance(content, dict) else None
    if not isinstance(ids, dict) or not all(isinstance(value, str) for value in ids.values()):
        raise InputError(f"{maps}: no table id2item of texts; expected {expected}, or no such file")
    if missing := next((item for _, items in users for item in items if item not in ids), None):
        raise InputError(f"{maps}: id2item has no item {shown(missing)} of {path}; the two must be of one dataset")
    log.info("%s: item numbers stand for the ids of its id2item, such as %s", maps, shown(next(iter(ids.values()))))
    return [(user, [ids[item] for item in items]) for user, items in users]


def _table(path: Path, users: list[tuple[str, list]], *, what: str) -> Table:
    """One row for each item; a user that stands twice goes on where the first line ended."""
    import pandas as pd

    columns: dict[str, list] = {"user": [], "item": [], "time": []}
    lengths: dict[str, int] = {}
    for user, items in users:
        for item in items:
            if type(item) not in (int, str):
                raise InputError(f"{path}: user {shown(user)} has the item {shown(item)}; expected {EXPECTED[list]}")
            columns["user"].append(user)
            columns["item"].append(str(item))
            columns["time"].append(lengths.setdefault(user, 0))
            lengths[user] += 1
    if not lengths:
        raise InputError(f"{path}: no user has an item; expected {EXPECTED[list]}")
    log.info("%s: %s; %s users, %s items in all", path, what, f"{len(lengths):,}", f"{len(columns['user']):,}")

    def where(row: int) -> str:
        return f"{path}: user {shown(columns['user'][row])}, item {columns['time'][row] + 1} of the sequence"

    names = {"user": "user", "item": "item", "time": "position"}
    return Table(path, [pd.DataFrame(columns)], names, where, has_times=False)


def are_numbers(raw_ids: Iterable[str]) -> bool:
    """Whether ids are decimal numbers without leading zeros, as those of an index are."""
    return all(text.isascii() and text.isdigit() and len(text) <= LONGEST_ID and str(int(text)) == text for text in raw_ids)
