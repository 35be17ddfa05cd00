"""The items of `.item.json`: their ids, and the text by which an item is embedded.

    {"0": {"title": "Saw", "description": "['Cuts  well.']"}, ...}
    read_items(path)[0]             -> {"title": "Saw", "description": "['Cuts  well.']"}
    item_text(read_items(path)[0])  -> "Saw Cuts well."

Item ids are 0..N-1: row i of the embeddings is item i.
"""

import ast
from collections.abc import Sequence
from pathlib import Path

from rq.files import InputError, read_json

TEXT_FIELDS = ("title", "brand", "categories", "description")


def check_ids(ids: Sequence[str], *, where: str) -> None:
    """InputError unless `ids` are the decimal strings 0..N-1 in any order, since row i of the embeddings is item i."""
    for item in ids:
        if not (isinstance(item, str) and item.isascii() and item.isdigit() and str(int(item)) == item):
            raise InputError(
                f"{where}: item id {item!r} is not a decimal number without leading zeros; number the items 0..N-1"
            )
    numbers = set(map(int, ids))
    missing = next((number for number in range(len(numbers)) if number not in numbers), None)
    if missing is not None:
        raise InputError(
            f"{where}: item ids have a gap: {missing} is missing of {len(numbers)} ids up to {max(numbers)}; "
            "number the items 0..N-1"
        )


def read_items(path: Path) -> list[dict]:
    """The items of `.item.json` in the order of their ids: items[i] is item i."""
    expected = "{'0': {'title': ..}, ..}"
    items = read_json(path, expected=expected)
    if not isinstance(items, dict) or not items or not all(isinstance(item, dict) for item in items.values()):
        raise InputError(f"{path}: expected a JSON object of items, like {expected}")
    check_ids(list(items), where=str(path))
    return [items[str(number)] for number in range(len(items))]


def plain(value: object) -> str:
    """One field as running text, whitespace collapsed; the repr of a list is read as the list.

    >>> plain("['A drill.', 'Two  bits.']")
    'A drill. Two bits.'
    >>> plain("[broken")
    '[broken'
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = str(value)  # looks like a list and is none: it is text, brackets and all
    if isinstance(value, list | tuple):
        return " ".join(filter(None, map(plain, value)))
    return "" if value is None else " ".join(str(value).split())


def item_text(item: dict, fields: Sequence[str] = TEXT_FIELDS) -> str:
    """The text by which an item is embedded: its fields in order, empty fields left out; '' where all are empty."""
    return " ".join(filter(None, (plain(item.get(field)) for field in fields)))
