"""Files of other programs, turned into the one table that rq.prepare takes; what a file is, is told by its content.

    X.inter.json  {"0": [17, 4, 9], "1": [4, 9]}      LC-Rec and LETTER: user -> item numbers, oldest first
        -> Table(rows: columns user, item, time: ("0", "17", 0), ("0", "4", 1), ..)

All other files are read by rq.tables.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rq.catalogue import LONGEST_ID, plain
from rq.files import InputError, distinct_keys, parse_json, shown, told
from rq.index_file import Sid
from rq.tables import LONGEST_LINE, Table, first_line, read_table, whole_text

log = logging.getLogger("rq.formats")

USERS = '{"0": [17, 4, 9], ..}: user -> item numbers, oldest first'
ITEMS = '{"0": {"title": "Pan", ..}, ..}: item number -> its fields'


@dataclass(frozen=True)
class Sequences(Table):
    """Each user's items in order, without times: the column `time` holds positions, 0 for the oldest item."""

    def where(self, row: int) -> str:
        """Where an item stands: 'X.inter.json: user '7', item 3 of the sequence'."""
        user, position = self.rows.user[row], self.rows.time[row]
        return f"{self.path}: user {shown(user)}, item {position + 1} of the sequence"


def read_interactions(path: Path, *, names: dict[str, str | None]) -> Table:
    """The columns user, item and time of a file in any format; `names` has the columns given by flags."""
    if is_one_object(path, of=list):
        return _sequences(path, read_object(path, of=list, expected=USERS), what="LC-Rec's user -> items in order")
    return read_table(path, ("user", "item", "time"), names=names)


def is_one_object(path: Path, *, of: type) -> bool:
    """Whether a .json file is one object of lists or of objects, rather than a record a line.

    '{"0": [17, 4]}' of list -> True, '{"asin": "p", "title": "Pan"}' of either -> False
    """
    name = path.name.lower().removesuffix(".gz")
    if not name.endswith(".json") or path.is_dir():
        return False
    if name.endswith(".inter.json" if of is list else ".item.json"):
        return True
    line = first_line(path)
    if line == "{" or len(line.encode()) >= LONGEST_LINE - 1:
        return True
    try:
        record = parse_json(line, json.JSONDecoder())
    except ValueError:
        return False
    return isinstance(record, dict) and bool(record) and all(isinstance(value, of) for value in record.values())


def read_object(path: Path, *, of: type, expected: str) -> dict[str, Any]:
    """The content of a .json file that is one object of lists or of objects."""
    try:
        content = parse_json(whole_text(path), json.JSONDecoder(object_pairs_hook=distinct_keys))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({told(error)}); expected {expected}") from error
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: {shown(content)}; expected {expected}")
    for key, value in content.items():
        if not isinstance(value, of):
            raise InputError(f"{path}: {shown(key)} has {shown(value)}; expected {expected}")
    return content


def _sequences(path: Path, users: Mapping[str, list], *, what: str) -> Sequences:
    import pandas as pd

    columns: dict[str, list] = {"user": [], "item": [], "time": []}
    for user, items in users.items():
        for position, item in enumerate(items):
            if type(item) not in (int, str):
                raise InputError(f"{path}: user {shown(user)} has the item {shown(item)}; expected {USERS}")
            columns["user"].append(user)
            columns["item"].append(str(item))
            columns["time"].append(position)
    if not columns["user"]:
        raise InputError(f"{path}: no user has an item; expected {USERS}")
    log.info("%s: %s; %s users, %s items in all", path, what, f"{len(users):,}", f"{len(columns['user']):,}")
    return Sequences(path, pd.DataFrame(columns), {"user": "user", "item": "item", "time": "position"})


def is_numbered(table: Table) -> bool:
    """Whether the ids of the items are decimal numbers, as those of an index are."""
    return isinstance(table, Sequences) and all(
        text.isascii() and text.isdigit() and len(text) <= LONGEST_ID and str(int(text)) == text
        for text in table.rows.item.drop_duplicates()
    )


def check_in_index(table: Table, index: Mapping[int, Sid], *, index_file: Path) -> None:
    """InputError where an item of the interactions has no SID, which says that the two files are not of one dataset."""
    unknown = table.rows.item[~table.rows.item.astype("int64").isin(list(index))]
    if len(unknown):
        raise InputError(
            f"{table.where(unknown.index[0])}: item {unknown.iloc[0]} is not in {index_file} ({len(index):,} items, like "
            f"{next(iter(index))}); give the index of the same dataset, or leave --index out to make one"
        )


def read_titles(path: Path | None, index: Mapping[int, Sid], *, index_file: Path) -> dict[int, str]:
    """Item -> title of the items of an index, '' where `X.item.json` has none; one line says what that means for sft.py."""
    items = read_object(path, of=dict, expected=ITEMS) if path else {}
    if path and not any(str(number) in items for number in index):
        raise InputError(
            f"{path} has no item of {index_file}: its first item is {shown(next(iter(items)))}, the index's "
            f"{shown(str(next(iter(index))))}; give the items of the same dataset"
        )
    titles = {number: plain(items.get(str(number), {}).get("title")) for number in index}
    count = sum(map(bool, titles.values()))
    if count:
        log.info("%s: titles of %s of %s items", path, f"{count:,}", f"{len(index):,}")
    else:
        log.warning(
            "no titles, SIDs only: train with --tasks sid_sid and without --item_meta_path; "
            "the tasks item, sid_title, title_title and title_sid need titles"
        )
    return titles
