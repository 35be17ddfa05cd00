"""The items of `.item.json`: their ids, and the text by which an item is embedded.

    {"0": {"title": "Saw", "description": "['Cuts  well.']"}, ...}
    read_items(path)[0]             -> {"title": "Saw", "description": "['Cuts  well.']"}
    item_text(read_items(path)[0])  -> "Saw Cuts well."

Item ids are 0..N-1: row i of the embeddings is item i.
"""

import ast
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from rq.files import InputError, check_plain, read_json, shown

LONGEST_LITERAL = 1_000_000  # characters; reading one takes a few hundred times as many bytes
LONGEST_ID = 18  # digits
TEXT_FIELDS = ("title", "brand", "categories", "description")


def check_ids(ids: Sequence[str], *, where: str) -> None:
    """InputError unless `ids` are the decimal strings 0..N-1 in any order, since row i of the embeddings is item i."""
    for item in ids:
        if not (item.isascii() and item.isdigit() and len(item) <= LONGEST_ID and str(int(item)) == item):
            raise InputError(
                f"{where}: item id {shown(item)} is not a decimal number without leading zeros; number the items 0..N-1"
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


def python_literal(text: str) -> object:
    """The value that a text writes in Python, such as the list of "['a', 'b']"; None for what is no literal or too long."""
    if len(text) > LONGEST_LITERAL:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # '\\d' is read, and not worth a word
            value = ast.literal_eval(text.strip())
        check_plain(value, escaped="\\" in text)
        repr(value)  # an int of too many digits cannot be written again
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return value


def plain(value: object) -> str:
    """One field as running text, whitespace collapsed; the repr of a list is read as the list.

    >>> plain("['A drill.', 'Two  bits.']")
    'A drill. Two bits.'
    >>> plain("[broken")
    '[broken'
    """
    return " ".join(filter(None, (" ".join(str(part).split()) for part in parts(value))))


def parts(value: object) -> Iterator[object]:
    """What a field is made of, lists in lists unfolded: ["a", ["b"], None] -> a, b."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str) and part.lstrip().startswith("["):
            literal = python_literal(part)  # None where it looks like a list and is none: it is text, brackets and all
            part = part if literal is None else literal
        if isinstance(part, list | tuple):
            waiting += reversed(part)
        elif part is not None:
            yield part


def item_text(item: dict, fields: Sequence[str] = TEXT_FIELDS) -> str:
    """The text by which an item is embedded: its fields in order, empty fields left out; '' where all are empty."""
    return " ".join(filter(None, (plain(item.get(field)) for field in fields)))
