"""The cells of an interaction CSV: list literals of texts and numbers, and item ids however they are written.

    read_list("['Mug', nan, 7]")   -> ["Mug", None, 7]
    read_list("['Mug' 'Jug']")     -> ValueError: is not a list literal (no comma between 'Mug' and 'Jug')
    ItemIds(catalogue).find("05")  -> the position of item "5"

Nothing is evaluated: what a cell may hold is a grammar of regular expressions.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import re
import warnings
from collections import Counter
from typing import Any, NamedTuple

from sid_sft.catalogue import TITLE_TYPES, Catalogue
from sid_sft.files import QUOTED, InputError, cut, join_or, one_line, shown

# How an entry of a list cell is written. The grammar leaves out two texts side by side: a numpy array of two texts is
# written ['Mug' 'Jug'], which Python reads as the one text 'MugJug'.
STRING = r"""[rRuU]?(?:'(?:[^'\\\n]|\\.)*+'|"(?:[^"\\\n]|\\.)*+")"""
NUMBER = r"-?(?:0|[1-9]\d*+)(?:\.\d*+)?(?:[eE][+-]?\d+)?(?![\w.])"
ENTRY = rf"(?:{STRING}|{NUMBER}|None\b)"
LIST = re.compile(rf"\s*\[\s*(?:{ENTRY}(?:\s*,\s*{ENTRY})*+\s*,?\s*)?\]\s*")
LIST_BEGUN = re.compile(rf"\s*\[\s*(?:{ENTRY}\s*,\s*)*({ENTRY})\s*({ENTRY})")
NUMPY_SCALAR = rf"(?:np|numpy)\.(?:u?int|float|str_)\d*\(\s*({STRING}|{NUMBER})\s*\)"
OTHERWISE_WRITTEN = re.compile(rf"({STRING})|{NUMPY_SCALAR}|\b(?:nan|NaN|null)\b|<NA>")


def read_list(cell: str) -> list[str | int | float | None]:
    """The list that a cell holds, as Python or JSON writes it: "['a', \"it's\"]" -> ["a", "it's"].

    Entries are texts and numbers, np.int64(5) among them, and None, nan or null for a missing entry. ValueError says why
    a cell is no such list. JSON reads lists of texts and whole numbers where it can: ten times as fast, and the only
    right way for cells that JSON wrote (an emoji as two halves, a slash as \\/).
    """
    try:
        value = json.loads(cell if '"' in cell or "\\" in cell else cell.replace("'", '"'))
        if type(value) is list and all(type(entry) in (str, int) for entry in value):
            return value
    except (ValueError, RecursionError):
        pass  # no JSON: the grammar above decides
    plain = OTHERWISE_WRITTEN.sub(lambda found: found[1] or found[2] or "None", cell).strip()
    if LIST.fullmatch(plain):
        with contextlib.suppress(SyntaxError, ValueError, MemoryError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # '\/' in a title is nothing to warn of
            return ast.literal_eval(plain)
    if begun := LIST_BEGUN.match(plain):
        raise ValueError(f"is not a list literal (no comma between {cut(begun[1], 30)} and {cut(begun[2], 30)})")
    if "..." in re.sub(STRING, "", plain):
        raise ValueError("is not a list literal (numpy left entries out of it at the three dots)")
    raise ValueError("is not a list literal of texts and numbers")


class Written(NamedTuple):
    """A row as its file writes it: the items of the history, oldest first, and last the item that followed.

    where: "X.csv:5", for a message; spot: "line 5". sids, titles: as long as ids, or empty where the file has none.
    """

    where: str
    spot: str
    user: str
    ids: list
    sids: list = []  # noqa: RUF012 - never changed
    titles: list = []  # noqa: RUF012


class ItemIds:
    """Finds the item that an id of a file means: ItemIds(catalogue).find("5.0") -> the position of item "5".

    An id of the index is found by its text. Any other id may be written otherwise than in the index: "5.0", " 5", "05",
    "'5'" or "np.int64(5)" for "5". Such an id is found if exactly one item can be meant, and counted in `respelled`.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.like = f"the index has ids like {shown(catalogue.items[0].id)}"
        self.respelled: Counter[tuple[str, str]] = Counter()

    @functools.cached_property
    def positions_of_plain_id(self) -> dict[str, list[int]]:
        """Plain id -> positions of all items whose ids differ only in how they are written: {"5": [0, 7]} for "5", "05"."""
        positions: dict[str, list[int]] = {}
        for position, item in enumerate(self.catalogue.items):
            positions.setdefault(plain_id(item.id), []).append(position)
        return positions

    def find(self, value: Any) -> int | None:
        """The position of an item, None where the index has no such item; ValueError where an id has two readings."""
        position = self.catalogue.position.get(text := str(value))
        if position is not None:
            return position
        if type(value) is float and not (value.is_integer() and abs(value) < 2**53):
            raise ValueError(f"has {text} for an item id; {self.like}; write it as there")
        found = self.positions_of_plain_id.get(plain_id(text), [])
        if len(found) > 1:
            either = join_or(shown(self.catalogue.items[position].id) for position in found[:3])
            raise ValueError(f"has {shown(text)} for an item id, which may be {either} of the index; write it as there")
        if not found:
            return None
        self.respelled[text, self.catalogue.items[found[0]].id] += 1
        return found[0]

    def note_on_spelling(self) -> str:
        """A line on the ids found that are written otherwise than in the index; "" where all are written as there."""
        if not self.respelled:
            return ""
        text, known = next(iter(self.respelled))
        count = f"{self.respelled.total():,} item ids"
        return f"{count} are written otherwise than in the index and read as there ({shown(text)} as {shown(known)})"


def plain_id(text: str) -> str:
    """The same text for all ways to write an id: "5.0", " 5", "05", "'5'" and "np.int64(5)" -> "5"."""
    text = re.sub(rf"\A\s*{NUMPY_SCALAR}\s*\Z", r"\1", text).strip()
    text = text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
    number = re.fullmatch(r"(-?)0*([0-9]+)(?:\.0*)?", text)
    return number[1] + number[2] if number else text


# The list columns, and what an entry of each may be. Ids and titles that are numbers are read by their text.
LIST_COLUMNS = {
    "history_item_id": (str, int, float),
    "history_item_sid": (str,),
    "history_item_title": TITLE_TYPES,
}


def list_cell(where: str, fields: dict[str, str], column: str, catalogue: Catalogue) -> list:
    """The list in a cell, its entries of the types that its column has; InputError shows the cell and a right one."""
    cell = fields[column]
    try:
        values = read_list(cell)
        for value in values:
            if type(value) not in LIST_COLUMNS[column]:
                raise ValueError(f"has the entry {shown(value)}")
    except ValueError as error:
        raise InputError(
            f"{where}: column {column!r} {error}: {shown(one_line(cell[:1000]))}; "
            f"expected one like {example_cell(column, catalogue)}, as numpy's tolist() gives it"
        ) from None
    return values


def example_cell(column: str, catalogue: Catalogue) -> str:
    """A right cell of a list column, of the catalogue's first two items: "history_item_id" -> "[0, 1]"."""
    items = catalogue.items[:2]
    if column == "history_item_id":
        entries = [item.id if re.fullmatch(r"0|[1-9][0-9]{0,17}", item.id) else shown(item.id) for item in items]
    else:
        entries = [shown("".join(item.sid) if column == "history_item_sid" else item.title or "a title") for item in items]
    return f"[{cut(', '.join(entries), 2 * QUOTED)}]"
