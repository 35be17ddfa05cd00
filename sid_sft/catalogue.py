"""The catalogue: item id -> SID and title, from the index and the item file.

    X.index.json  {"0": ["<a_236>", "<b_231>", "<c_226>"], ...}
    X.item.json   {"0": {"title": "Wood screws", ...}, ...}
    catalogue = read_catalogue(Path("X.index.json"), Path("X.item.json"))
    catalogue.items[0]      -> Item(id="0", sid=("<a_236>", "<b_231>", "<c_226>"), title="Wood screws")
    catalogue.position["0"] -> 0

All later modules name an item by its position in `items`.
"""

from __future__ import annotations

import html
import logging
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from sid_sft.files import InputError, join_or, one_line, read_json, shown, without_garbage_collection

logger = logging.getLogger("sft.catalogue")


class Item(NamedTuple):
    """One item: its id in the files, its SID as tokens from the first level down, its title ("" if it has none)."""

    id: str
    sid: tuple[str, ...]
    title: str


class Catalogue(NamedTuple):
    """All items in the order of the index, and item id -> position in `items`."""

    items: list[Item]
    position: dict[str, int]


def read_index(path: Path) -> dict[str, tuple[str, ...]]:
    """Item id -> SID tokens, first level first, of any depth, from an index file.

    {"0": ["<a_236>", "<b_231>", "<c_226>"], ...} -> {"0": ("<a_236>", "<b_231>", "<c_226>"), ...}
    """
    expected = 'an index like {"0": ["<a_236>", "<b_231>", "<c_226>"]}'
    index = read_json(path, expected)
    if not isinstance(index, dict) or not index:
        raise InputError(f"{path}: holds no items; expected {expected}")
    known: dict[str, str] = {}  # the tokens met so far: each is checked once, and stands in memory once
    for item, tokens in index.items():
        if not isinstance(tokens, list) or not tokens:
            raise InputError(f"{path}: item {shown(item)} has {shown(tokens)} for a SID; expected {expected}")
        for token in tokens:
            if not isinstance(token, str) or (token not in known and not re.fullmatch(r"<[^<>\s]+>", token)):
                raise InputError(f"{path}: item {shown(item)} has the token {shown(token)}; expected {expected}")
            known.setdefault(token, token)
        index[item] = tuple([known[token] for token in tokens])
    return index


TITLE_TYPES = (str, int, float, type(None))


def read_titles(path: Path) -> dict[str, str]:
    """Item id -> title on one line, from an item file {"0": {"title": ..., "description": ...}}.

    A number is a title by its text; an item whose title is missing, null or NaN has none ("").
    """
    expected = 'an item file like {"0": {"title": "Wood screws", "description": ""}}'
    items = read_json(path, expected)
    if not isinstance(items, dict) or not items:
        raise InputError(f"{path}: holds no items; expected {expected}")
    for item, fields in items.items():
        if not isinstance(fields, dict):
            raise InputError(f"{path}: item {shown(item)} has {shown(fields)} for its fields; expected {expected}")
        if type(fields.get("title")) not in TITLE_TYPES:
            raise InputError(f"{path}: item {shown(item)} has {shown(fields['title'])} for a title; expected {expected}")
    if not any("title" in fields for fields in items.values()):
        item, fields = next(iter(items.items()))
        raise InputError(
            f"{path}: no item has a title, the first, {shown(item)}, has {shown(fields)}; expected {expected}, or "
            "--tasks sid_sid and no --item_meta_path"
        )
    return {item: title_text(fields.get("title")) for item, fields in items.items()}


def title_text(value: str | float | None) -> str:
    """A title on one line: 5 -> "5"; "" where there is none (None, or NaN, which pandas writes for None)."""
    return "" if value is None or value != value else one_line(str(value))


def same_title(title: str, other: str) -> bool:
    """Whether two titles are the same text but for white space and escapes: "Nuts &amp; Bolts" and "Nuts & Bolts"."""
    return title == other or unescaped(title) == unescaped(other)


# \u00e9, \xe9, or a backslash before the character that is meant
ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))", re.DOTALL)


def unescaped(text: str) -> str:
    """A title without escapes of JSON, Python and HTML, however often it was escaped: 'Caf\\u00e9 &amp;' -> 'Café &'."""

    def meant(found: re.Match) -> str:
        code = found[1] or found[2]
        return chr(int(code, 16)) if code else " " if found[3] in "nrt" else found[3]

    before = None
    while text != before:
        before = text
        text = text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text
        text = ESCAPE.sub(meant, text).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")  # emoji: two \u
        text = one_line(html.unescape(text))
    return text


@without_garbage_collection()
def read_catalogue(index_path: Path, item_path: Path | None) -> Catalogue:
    """The items of the index, with their titles where an item file is given; logs depths, shared SIDs and missing titles."""
    index = read_index(index_path)
    titles = read_titles(item_path) if item_path else {}
    if titles and not index.keys() & titles.keys():
        raise InputError(
            f"{item_path}: has no item of {index_path}: ids here are like {shown(next(iter(titles)))}, there like "
            f"{shown(next(iter(index)))}; the two must be of one dataset"
        )
    items = [Item(item, sid, titles.get(item, "")) for item, sid in index.items()]
    log_catalogue(items, len(titles.keys() - index.keys()), with_titles=bool(titles))
    return Catalogue(items, dict(zip(index, range(len(items)), strict=True)))


def log_catalogue(items: list[Item], unindexed: int, *, with_titles: bool) -> None:
    """The lines of the log on a catalogue; `unindexed` items of the item file are not in the index."""
    sids = Counter(item.sid for item in items)
    depths = sorted({len(sid) for sid in sids})
    logger.info(f"Catalogue: {len(items):,} items, {len(sids):,} distinct SIDs of {join_or(depths)} tokens")
    if shared := sum(count for count in sids.values() if count > 1):
        logger.info(f"{shared:,} of {len(items):,} items share their SID with another item (a hit on one is a hit on all)")
    if with_titles:
        titles = Counter(item.title for item in items if item.title)
        if untitled := sum(not item.title for item in items):
            logger.info(f"{untitled:,} of {len(items):,} items have no title; the tasks with titles leave them out")
        if twins := sum(count for count in titles.values() if count > 1):
            logger.info(f"{twins:,} of {len(items):,} items share their title with another item")
        if unindexed:
            logger.info(f"{unindexed:,} items of the item file are not in the index and are not used")
