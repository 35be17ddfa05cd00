"""Files -> rows -> examples (text) -> ids: everything the model reads passes through here.

    catalogue = read_catalogue("X.index.json", "X.item.json")    # item id -> SID, title
    rows      = read_rows("X.train.csv", catalogue)              # user, history, next item
    prompt, answer = render(TASKS["sid_sid"], row, catalogue, prompts)
    dataset   = build_dataset(..., tokenizer=tokenizer)          # tokenized, on disk, memory-mapped

Left of `render` nothing needs a tokenizer; right of it nothing needs a file. A prompt's ids are the tokenizer's ids of
its text, so a server that is given the text sees what training saw. In the tasks over a history the constant text
comes first and the history last, one item a line, so that the next line is the answer:

    Purchases of one customer ..., one per line:
    <a_1><b_2><c_3>
    <a_4><b_5><c_6>
                      <- the model writes <a_7><b_8><c_9> and the end token

and a customer's shorter example is a token prefix of the longer one.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import functools
import hashlib
import html
import json
import logging
import os
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, Features
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("sft.data")

CSV_COLUMNS = (
    "user_id",
    "history_item_title",
    "item_title",
    "history_item_id",
    "item_id",
    "history_item_sid",
    "item_sid",
)
SEPARATOR = "\n"  # ends each item of a history; titles are single lines, so it never stands inside one
MAX_LEFT_OUT = 0.2  # the share of a file's rows that may be left out before a run stops
CACHE_FORMAT = 3  # raise it when the ids of the same text and files change


class InputError(ValueError):
    """What a user gave cannot be used; the message is one line: where, what came, what was expected, what to do."""


# ---------------------------------------------------------------------------------------------- the catalogue


class Item(NamedTuple):
    """One item: its id in the files, its SID as tokens from the first level down, its title ("" if it has none)."""

    id: str
    sid: tuple[str, ...]
    title: str


class Catalogue(NamedTuple):
    """All items, in the order of the index; `place` maps an item id to its position in `items`."""

    items: list[Item]
    place: dict[str, int]


def read_json(path: Path, expected: str) -> Any:
    """The content of a JSON file; InputError names the file and the line when it is missing, empty or broken."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error_text(error)}); expected {expected}") from None
    if not text.strip():
        raise InputError(f"{path}: is empty; expected {expected}")
    try:
        content = json.loads(text, object_pairs_hook=distinct_keys)
        if "\\ud" in text.lower():  # an emoji is two of these; one alone is no character, and nothing can write it
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        near = error.object[max(error.start - 30, 0) : error.start + 1].encode("ascii", "backslashreplace").decode()
        raise InputError(f"{path}: holds half a character at the end of {near!r}; mend or remove it") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON ({error_text(error)}); expected {expected}") from None
    return content


def distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where a key stands twice, of which Python would silently keep the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return content


def error_text(error: Exception) -> str:
    """An exception as one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return " ".join(text.split())


def read_index(path: Path) -> dict[str, tuple[str, ...]]:
    """Item id -> SID tokens, first level first, of any depth: {"0": ("<a_236>", "<b_231>", "<c_226>"), ...}."""
    expected = 'an index like {"0": ["<a_236>", "<b_231>", "<c_226>"]}'
    index = read_json(path, expected)
    if not isinstance(index, dict) or not index:
        raise InputError(f"{path}: holds no items; expected {expected}")
    for item, tokens in index.items():
        if not isinstance(tokens, list) or not tokens:
            raise InputError(f"{path}: item {item!r} has {str(tokens)[:60]!r} for a SID; expected {expected}")
        for token in tokens:
            if not isinstance(token, str) or not re.fullmatch(r"<[^<>\s]+>", token):
                raise InputError(f"{path}: item {item!r} has the token {token!r}; expected {expected}")
    return {item: tuple(tokens) for item, tokens in index.items()}


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
            raise InputError(f"{path}: item {item!r} has {str(fields)[:60]!r} for its fields; expected {expected}")
        if type(fields.get("title")) not in TITLE_TYPES:
            raise InputError(f"{path}: item {item!r} has {str(fields['title'])[:60]!r} for a title; expected {expected}")
    if not any("title" in fields for fields in items.values()):
        raise InputError(f"{path}: no item has a title; expected {expected}")
    return {item: title_text(fields.get("title")) for item, fields in items.items()}


def title_text(value: str | float | None) -> str:
    """A title on one line: 5 -> "5"; "" where there is none (None, or NaN, which pandas writes for None)."""
    return "" if value is None or value != value else one_line(str(value))


def same_title(title: str, other: str) -> bool:
    """Whether two titles are the same text but for white space and for how characters are escaped in them."""
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


def one_line(text: str) -> str:
    """Text with every run of white space made one space: a title must not end its line."""
    return " ".join(text.split())


def read_catalogue(index_path: Path, item_path: Path | None) -> Catalogue:
    """The items of the index, with their titles where an item file is given. Logs what a user should know once."""
    index = read_index(index_path)
    titles = read_titles(item_path) if item_path else {}
    if titles and not index.keys() & titles.keys():
        raise InputError(f"{item_path}: has no item of {index_path}; the two must be of one dataset")
    items = [Item(item, sid, titles.get(item, "")) for item, sid in index.items()]
    log_catalogue(items, len(titles.keys() - index.keys()), with_titles=bool(titles))
    return Catalogue(items, {item.id: place for place, item in enumerate(items)})


def log_catalogue(items: list[Item], unindexed: int, *, with_titles: bool) -> None:
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


def join_or(values: Iterable) -> str:
    return " or ".join(str(value) for value in values)


# ---------------------------------------------------------------------------------------------- rows


class Row(NamedTuple):
    """One example before any wording: places in `Catalogue.items`, the history oldest first.

    `preference` is free text about the user and only set for rows of a preference file.
    """

    user: str
    history: tuple[int, ...]
    item: int
    preference: str = ""


# How an entry of a list cell is written. Two texts side by side are not in it: Python reads ['Mug' 'Jug'], which is what
# a numpy array of two writes, as the one text 'MugJug'.
STRING = r"""[rRuU]?(?:'(?:[^'\\\n]|\\.)*+'|"(?:[^"\\\n]|\\.)*+")"""
NUMBER = r"-?(?:0|[1-9]\d*+)(?:\.\d*+)?(?:[eE][+-]?\d+)?(?![\w.])"
ENTRY = rf"(?:{STRING}|{NUMBER}|None\b)"
LIST = re.compile(rf"\s*\[\s*(?:{ENTRY}(?:\s*,\s*{ENTRY})*+\s*,?\s*)?\]\s*")
LIST_BEGUN = re.compile(rf"\s*\[\s*(?:{ENTRY}\s*,\s*)*({ENTRY})\s*({ENTRY})")
NUMPY_SCALAR = rf"(?:np|numpy)\.(?:u?int|float|str_)\d*\(\s*({STRING}|{NUMBER})\s*\)"
OTHERWISE_WRITTEN = re.compile(rf"({STRING})|{NUMPY_SCALAR}|\b(?:nan|NaN|null)\b|<NA>")


def read_list(cell: str) -> list[str | int | float | None]:
    """The list that a cell holds, as Python or JSON writes it: "['a', \"it's\"]" -> ["a", "it's"].

    Its entries are texts and numbers, also as np.int64(5), and None, nan or null where one is missing. Nothing is
    evaluated; ValueError tells why a cell is no such list. Texts and whole numbers that JSON can read are read by JSON:
    ten times as fast, and the only right way where JSON wrote them (an emoji as two halves, a slash as \\/).
    """
    try:
        value = json.loads(cell if '"' in cell or "\\" in cell else cell.replace("'", '"'))
        if type(value) is list and all(type(entry) in (str, int) for entry in value):
            return value
    except (ValueError, RecursionError):
        pass  # whatever else it is: the grammar above decides
    plain = OTHERWISE_WRITTEN.sub(lambda found: found[1] or found[2] or "None", cell).strip()
    if LIST.fullmatch(plain):
        with contextlib.suppress(SyntaxError, ValueError, MemoryError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # '\/' in a title is nothing to warn of
            return ast.literal_eval(plain)
    if begun := LIST_BEGUN.match(plain):
        raise ValueError(f"is not a list literal (no comma between {begun[1][:30]} and {begun[2][:30]})")
    if "..." in re.sub(STRING, "", plain):
        raise ValueError("is not a list literal (numpy left entries out of it at the three dots)")
    raise ValueError("is not a list literal of texts and numbers")


class ItemIds:
    """Finds the item that an id of a file means: ItemIds(catalogue).find("5.0") -> the place of "5".

    The text of an id decides. Where no item has it, the id may be written otherwise than in the index: as "5.0", " 5",
    "05", "'5'" or "np.int64(5)" for "5". Such an id is read if exactly one item can be meant, and is counted.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.like = f"the index has ids like {catalogue.items[0].id!r}"
        self.respelled: Counter[tuple[str, str]] = Counter()

    @functools.cached_property
    def places(self) -> dict[str, list[int]]:
        """The places of the items whose ids are the same but for how they are written."""
        places: dict[str, list[int]] = {}
        for place, item in enumerate(self.catalogue.items):
            places.setdefault(plain_id(item.id), []).append(place)
        return places

    def find(self, value: Any) -> int | None:
        """The place of an item, None where the index has no such item; ValueError where the id could mean anything."""
        place = self.catalogue.place.get(text := str(value))
        if place is not None:
            return place
        if type(value) is float and not (value.is_integer() and abs(value) < 2**53):
            raise ValueError(f"has {text} for an item id; {self.like}; write it as there")
        found = self.places.get(plain_id(text), [])
        if len(found) > 1:
            either = join_or(repr(self.catalogue.items[place].id) for place in found)
            raise ValueError(f"has {text!r} for an item id, which may be {either} of the index; write it as there")
        if not found:
            return None
        self.respelled[text, self.catalogue.items[found[0]].id] += 1
        return found[0]

    def note(self) -> str:
        """What to tell of ids that are written otherwise than in the index; nothing where none is."""
        if not self.respelled:
            return ""
        text, known = next(iter(self.respelled))
        count = f"{self.respelled.total():,} item ids"
        return f"{count} are written otherwise than in the index and read as there ({text!r} as {known!r})"


def plain_id(text: str) -> str:
    """The same text for all ways to write an id: "5.0", " 5", "05", "'5'" and "np.int64(5)" -> "5"."""
    text = re.sub(rf"\A\s*{NUMPY_SCALAR}\s*\Z", r"\1", text).strip()
    text = text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
    number = re.fullmatch(r"(-?)0*([0-9]+)(?:\.0*)?", text)
    return number[1] + number[2] if number else text


class LeftOut:
    """The rows of a file that cannot be used, by reason, with an example of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, reason: str, example: str) -> None:
        self.counts[reason] += 1
        self.examples.setdefault(reason, example)

    def check(self, path: Path, rows: int, max_left_out: float) -> None:
        """InputError where all rows are left out, or a larger share than is allowed."""
        left = self.counts.total()
        why = ", ".join(f"{count:,} because {reason} ({self.examples[reason]})" for reason, count in self.counts.items())
        if left == rows:
            raise InputError(
                f"{path}: no row has a known item and history ({why}); the CSV and the index must be of one dataset"
            )
        check_share(f"{path}: ", left, rows, max_left_out, why)


def check_share(what: str, left: int, rows: int, max_left_out: float, why: str) -> None:
    """InputError where more than a share of the rows would be left out."""
    if left / rows > max_left_out:
        raise InputError(
            f"{what}{left:,} of {rows:,} rows would be left out, more than --max_left_out {max_left_out:g} allows: {why}; "
            "mend that or allow it with --max_left_out 1"
        )


def read_rows(
    path: Path,
    catalogue: Catalogue,
    tell: Callable[[str], None] = logger.info,
    *,
    max_left_out: float = MAX_LEFT_OUT,
) -> Iterator[Row]:
    """The rows of an interaction CSV, one at a time, checked against the catalogue; tells at the end what it left out.

    The SIDs and titles that are trained on are the catalogue's. A CSV that contradicts its SIDs is refused: it belongs
    to another index. (A CSV SID that lacks only the last, collision-breaking token is the same item's and is counted.)
    InputError at the end where a larger share of the rows than `max_left_out` was left out.
    """
    path = Path(path)
    counts: Counter[str] = Counter()
    ids, left_out = ItemIds(catalogue), LeftOut()
    for line, fields in read_csv(path):
        counts["rows"] += 1
        row = parse_row(f"{path}:{line}", fields, ids, counts, left_out)
        if row is not None:
            yield row
    if not counts["rows"]:
        raise InputError(f"{path}: has no rows; expected a header and rows of {','.join(CSV_COLUMNS)}")
    left_out.check(path, counts["rows"], max_left_out)
    for reason, count in left_out.counts.items():
        tell(f"{path.name}: {count:,} rows left out: {reason} ({counts['rows']:,} rows)")
    if note := ids.note():
        tell(f"{path.name}: {note} ({counts['rows']:,} rows)")
    for key, text in {
        "history": "history items left out: they are not in the index",
        "short": "SIDs lack the last token that the index has; the index is used",
        "title": "titles differ from the item file's; the item file is used",
    }.items():
        if counts[key]:
            tell(f"{path.name}: {counts[key]:,} {text} ({counts['rows']:,} rows)")


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(number of its last line, column -> cell) of each row of an interaction CSV."""
    csv.field_size_limit(2**31 - 1)  # a history of titles has no natural limit; csv's own is 128 KiB
    reader = csv.reader(read_lines(path), strict=True)
    try:
        header = next(reader, None)
        if header is None:
            raise InputError(f"{path}: is empty; expected a header line {','.join(CSV_COLUMNS)}")
        for column in CSV_COLUMNS:
            if header.count(column) != 1:
                fault = f"has the column {column!r} twice" if column in header else f"has no column {column!r}"
                raise InputError(f"{path}: {fault}; its columns are {','.join(header)[:200]!r}")
        for cells in reader:
            if len(cells) == len(header):
                yield reader.line_num, dict(zip(header, cells, strict=True))
            elif cells:
                raise InputError(
                    f"{path}:{reader.line_num}: has {len(cells)} cells, expected {len(header)} as in the header"
                )
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: is not CSV ({error_text(error)})") from None


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file; what is none is told with its line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise InputError(f"{path}:{number}: is not UTF-8 ({error_text(error)}); save it as UTF-8") from None
                if "\0" in text:
                    raise InputError(f"{path}:{number}: holds a NUL byte; expected a UTF-8 CSV")
                yield text
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error_text(error)}); expected a UTF-8 CSV") from None


def parse_row(where: str, fields: dict[str, str], ids: ItemIds, counts: Counter, left_out: LeftOut) -> Row | None:
    """One checked row, or None where its item is unknown or nothing that is known stands before it."""
    catalogue = ids.catalogue
    history_ids, sids, titles = (list_cell(where, fields, column, catalogue) for column in LIST_COLUMNS)
    if not len(history_ids) == len(sids) == len(titles):
        raise InputError(
            f"{where}: the history has {len(history_ids)} ids, {len(sids)} SIDs and {len(titles)} titles; "
            "they must be aligned"
        )
    places = []
    cells = zip([*history_ids, fields["item_id"]], [*sids, fields["item_sid"]], [*titles, fields["item_title"]], strict=True)
    for item_id, sid, title in cells:
        try:
            place = ids.find(item_id)
        except ValueError as error:
            given = f"history {fields['history_item_id'][:60]!r}, item {fields['item_id'][:60]!r}"
            raise InputError(f"{where}: {error} ({given})") from None
        places.append(place)
        if place is None:
            continue
        item = catalogue.items[place]
        known = "".join(item.sid)
        if sid != known:
            if sid != "".join(item.sid[:-1]):
                raise InputError(
                    f"{where}: item {item_id} has the SID {sid[:60]!r}, in the index {known!r}; "
                    "the CSV and the index must be of one dataset"
                )
            counts["short"] += 1
        if title and title != item.title and item.title and not same_title(title_text(title), item.title):
            counts["title"] += 1
    *history, target = places
    known_history = tuple(place for place in history if place is not None)
    counts["history"] += len(history) - len(known_history)
    line = f"line {where.rpartition(':')[2]}"
    if target is None:
        left_out.add("their item is not in the index", f"{line}: {fields['item_id'][:60]!r}, {ids.like}")
    elif not history:
        left_out.add("their history is empty", line)
    elif not known_history:
        left_out.add("no item of their history is in the index", f"{line}: {fields['history_item_id'][:60]!r}, {ids.like}")
    else:
        return Row(fields["user_id"], known_history, target)
    return None


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
                raise ValueError(f"has the entry {value!r}")
    except ValueError as error:
        raise InputError(
            f"{where}: column {column!r} {error}: {' '.join(cell[:60].split())!r}; "
            f"expected one like {example_cell(column, catalogue)}, as numpy's tolist() gives it"
        ) from None
    return values


def example_cell(column: str, catalogue: Catalogue) -> str:
    """What a list column of this catalogue may hold."""
    items = catalogue.items[:2]
    if column == "history_item_id":
        return repr([int(item.id) if item.id.isdecimal() and item.id == str(int(item.id)) else item.id for item in items])
    return repr(["".join(item.sid) if column == "history_item_sid" else item.title or "a title" for item in items])[:120]


def read_preferences(
    path: Path,
    catalogue: Catalogue,
    split: str,
    tell: Callable[[str], None] = logger.info,
    *,
    max_left_out: float = MAX_LEFT_OUT,
) -> Iterator[Row]:
    """The rows of one split of a preference file: a JSON list of
    {"user", "split", "user_preference", "context": {"history_items": [...], "target_item": ...}}.

    An item stands there as its id, as its SID, or as an object with "item_id", "id" or "sid". InputError at the end
    where a larger share of the entries than `max_left_out` was left out.
    """
    expected = 'a list of {"user", "split", "user_preference", "context": {"history_items", "target_item"}}'
    entries = read_json(path, expected)
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: holds no entries; expected {expected}")
    by_sid = {"".join(item.sid): place for place, item in reversed(list(enumerate(catalogue.items)))}
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
        if None in found or len(found) < 2 or not isinstance(preference, str) or not preference.strip():
            first = first if unknown else number
            unknown += 1
            continue
        yield Row(user, tuple(found[:-1]), found[-1], one_line(preference))
    if unknown == total:
        raise InputError(f"{path}: no entry of split {split!r} has known items and a preference; expected {expected}")
    reason = "unknown item, no history or no preference"
    if unknown:
        why = f"{reason} (entry {first}); {ids.like}"
        check_share(f"{path}: ", unknown, total, max_left_out, why)
        tell(f"{Path(path).name}: {unknown:,} of {total:,} entries left out: {reason}")
    if note := ids.note():
        tell(f"{Path(path).name}: {note}")


def find_item(value: Any, ids: ItemIds, by_sid: dict[str, int]) -> int | None:
    """The place of an item that a preference file names by id, by SID or by an object that has one of them."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("item_id", "id", "sid") if key in value), None)
    place = by_sid.get(str(value))
    return ids.find(value) if place is None else place


# ---------------------------------------------------------------------------------------------- tasks and wording


class Task(NamedTuple):
    """What one example shows and asks. `group` is the name that --tasks takes; `shows` and `answers` say in which form
    items stand in the prompt and in the answer."""

    name: str
    group: str
    rows: str  # "interactions", "items" or "preferences"
    shows: str  # "sid" or "title"
    answers: str  # "sid", "title" or "preference" (the user's preference, then the SID)


TASKS = {
    task.name: task
    for task in (
        Task("sid_sid", "sid_sid", "interactions", "sid", "sid"),
        Task("item_sid_title", "item", "items", "sid", "title"),
        Task("item_title_sid", "item", "items", "title", "sid"),
        Task("sid_title", "sid_title", "interactions", "sid", "title"),
        Task("title_title", "title_title", "interactions", "title", "title"),
        Task("title_sid", "title_sid", "interactions", "title", "sid"),
        Task("preference", "preference", "preferences", "sid", "preference"),
        Task("preference_sid", "preference_sid", "preferences", "sid", "sid"),
    )
}
TASK_GROUPS = tuple(dict.fromkeys(task.group for task in TASKS.values()))
DEFAULT_TASKS = ("sid_sid", "item", "sid_title", "title_title", "title_sid")

PROMPTS = {
    "sid_sid": "Semantic IDs of the {category} products that one customer bought, oldest first, one per line:\n{history}",
    "item_sid_title": "A product from a catalogue of {category} products.\nSemantic ID: {item}\nTitle:\n",
    "item_title_sid": "A product from a catalogue of {category} products.\nTitle: {item}\nSemantic ID:\n",
    "sid_title": "A customer bought the {category} products with these semantic IDs, oldest first, one per line. "
    "The title of the next product follows them.\n{history}",
    "title_title": "Titles of the {category} products that one customer bought, oldest first, one per line:\n{history}",
    "title_sid": "A customer bought the {category} products with these titles, oldest first, one per line. "
    "The semantic ID of the next product follows them.\n{history}",
    "preference": "A customer bought the {category} products with these semantic IDs, oldest first, one per line. "
    "What the customer is looking for follows them, then the semantic ID of the next product.\n{history}",
    "preference_sid": "A customer looks for {category} products: {preference}\n"
    "Semantic IDs of the products that this customer bought, oldest first, one per line:\n{history}",
}

CATEGORY_NAMES = {
    "Industrial_and_Scientific": "industrial and scientific",
    "Office_Products": "office",
    "Toys_and_Games": "toy and game",
    "Sports_and_Outdoors": "sports and outdoor",
    "Video_Games": "video game",
    "Musical_Instruments": "musical instrument",
    "Arts_Crafts_and_Sewing": "arts, crafts and sewing",
    "Books": "book",
    "Beauty": "beauty",
    "Yelp": "local business",
}


def category_name(category: str) -> str:
    """The words for a category in a prompt: a readable name for a known one, free text as it stands otherwise."""
    return CATEGORY_NAMES.get(category, category.replace("_", " ").strip()) or "shop"


def read_prompts(path: Path | None, category: str) -> dict[str, str]:
    """Task name -> template with the category filled in: the shipped wording, overridden by a JSON file's entries."""
    templates = dict(PROMPTS)
    if path is not None:
        own = read_json(path, 'prompts like {"sid_sid": "Bought so far:\\n{history}"}')
        if not isinstance(own, dict) or not all(isinstance(text, str) for text in own.values()):
            raise InputError(f"{path}: must map task names to templates, all strings")
        if unknown := own.keys() - templates.keys():
            raise InputError(f"{path}: unknown task {min(unknown)!r}; the tasks are {', '.join(TASKS)}")
        templates.update(own)
    templates = {name: text.replace("{category}", category_name(category)) for name, text in templates.items()}
    for name, template in templates.items():
        check_template(f"{path or 'prompts'}: {name!r}", template, TASKS[name])
    return templates


def check_template(where: str, template: str, task: Task) -> None:
    """A template names each of its fields once, and a history stands last so that the next line is the answer."""
    fields = ["{item}"] if task.rows == "items" else ["{history}"]
    fields += ["{preference}"] if task.name == "preference_sid" else []
    for field in fields:
        if template.count(field) != 1:
            raise InputError(f"{where} has {template.count(field)} {field}; expected one")
    if task.rows != "items" and not template.endswith("{history}"):
        raise InputError(f"{where} must end with {{history}}: what is constant comes first, the history last")
    if unknown := set(re.findall(r"\{\w+\}", template)) - set(fields):
        raise InputError(f"{where} has {min(unknown)}; expected only {', '.join(fields)} and {{category}}")


def render(task: Task, row: Row, catalogue: Catalogue, prompts: dict[str, str]) -> tuple[str, str]:
    """The prompt and the answer of an example as text; the answer's end token is added when it is encoded."""
    target = catalogue.items[row.item]
    sid = "".join(target.sid)
    if task.rows == "items":
        prompt = prompts[task.name].replace("{item}", target.title if task.shows == "title" else sid)
    else:
        lines = (history_line(catalogue.items[place], task.shows) for place in row.history)
        prompt = prompt_head(task, row, prompts) + "".join(lines)
    answer = {"sid": sid, "title": target.title, "preference": row.preference + SEPARATOR + sid}[task.answers]
    return prompt, answer


def prompt_head(task: Task, row: Row, prompts: dict[str, str]) -> str:
    """The text before the history."""
    return prompts[task.name].removesuffix("{history}").replace("{preference}", row.preference)


def history_line(item: Item, shows: str) -> str:
    """The line of a history that shows an item; none for an item that has no title to show."""
    text = item.title if shows == "title" else "".join(item.sid)
    return text + SEPARATOR if text else ""


# ---------------------------------------------------------------------------------------------- ids


class Example(NamedTuple):
    """The ids of prompt and answer in one list, the answer's end token last.

    prompt_len: tokens of the prompt; all behind it is supervised.
    static_len: tokens before the first SID token, the part that is constant while only SID rows train.
    dropped: oldest history items left out to keep within the cutoff.
    """

    input_ids: list[int]
    prompt_len: int
    static_len: int
    dropped: int


# The pre-tokenizer patterns of GPT-2, of Qwen2 and of Llama-3: see `splits_at_lines`.
LINE_PATTERNS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
)


class Encoder:
    """Turns rows of one task into ids: those of the rendered text.

    Where it follows from the tokenizer's rules that the ids of a history are those of its lines one after another, each
    distinct line is encoded once: `sids_stand_alone` for SIDs, `splits_at_lines` for titles. Whole texts are encoded
    otherwise, in batches.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        catalogue: Catalogue,
        prompts: dict[str, str],
        *,
        cutoff_len: int,
    ) -> None:
        self.tokenizer, self.catalogue, self.prompts, self.cutoff_len = tokenizer, catalogue, prompts, cutoff_len
        tokens = sorted({token for item in catalogue.items for token in item.sid})
        ids = dict(zip(tokens, tokenizer.convert_tokens_to_ids(tokens), strict=True))
        self.sid_token_ids = frozenset(ids.values())
        self.sids = [[ids[token] for token in item.sid] for item in catalogue.items]
        self.prefix, self.suffix = added_around(tokenizer)

    def encode(self, task: Task, rows: list[Row]) -> list[Example | None]:
        """One example per row, or None where a text is missing or even the newest item alone is over the cutoff."""
        items = self.catalogue.items
        kept = [[place for place in row.history if task.shows == "sid" or items[place].title] for row in rows]
        answers = self.answer_ids(task, rows)
        prompts: list[list[int] | None] = [None] * len(rows)
        dropped, least, most = [0] * len(rows), [0] * len(rows), [max(len(history) - 1, 0) for history in kept]
        trial = {i: 0 for i, row in enumerate(rows) if (kept[i] or task.rows == "items") and self.has_texts(task, row)}
        while trial:  # bisects for the fewest items to drop, from none at all
            shorter = [rows[i]._replace(history=tuple(kept[i][count:])) for i, count in trial.items()]
            for (i, count), prompt in zip(trial.items(), self.prompt_ids(task, shorter), strict=True):
                if len(prompt) + len(answers[i]) <= self.cutoff_len:
                    prompts[i], dropped[i], most[i] = prompt, count, count - 1
                else:
                    least[i] = count + 1
            trial = {i: (least[i] + most[i]) // 2 for i in trial if least[i] <= most[i]}
        return [
            None if prompt is None else self.example(prompt, answer, count)
            for prompt, answer, count in zip(prompts, answers, dropped, strict=True)
        ]

    def example(self, prompt: list[int], answer: list[int], dropped: int) -> Example:
        ids = prompt + answer
        begin = len(prompt) if self.sid_token_ids.isdisjoint(prompt) else 0  # a title history is long and has none
        static_len = next((place for place in range(begin, len(ids)) if ids[place] in self.sid_token_ids), len(ids))
        return Example(ids, len(prompt), static_len, dropped)

    def has_texts(self, task: Task, row: Row) -> bool:
        """Whether the item has a title where the task asks for it, or shows it alone."""
        needed = task.answers == "title" or (task.rows == "items" and task.shows == "title")
        return bool(self.catalogue.items[row.item].title) or not needed

    def answer_ids(self, task: Task, rows: list[Row]) -> list[list[int]]:
        end = [self.tokenizer.eos_token_id]
        if task.answers == "title":
            return [self.titles[row.item] + end for row in rows]
        if task.answers == "preference":
            texts = self.text_ids([row.preference + SEPARATOR for row in rows])
            return [text + self.sids[row.item] + end for text, row in zip(texts, rows, strict=True)]
        return [self.sids[row.item] + end for row in rows]

    def prompt_ids(self, task: Task, rows: list[Row]) -> list[list[int]]:
        """The ids of whole prompts, with the special tokens that the tokenizer begins a text with."""
        lines = None if task.rows == "items" else self.lines(task.shows)
        heads = [prompt_head(task, row, self.prompts) for row in rows]
        if lines is None or (task.shows == "title" and not all(map(ends_its_line, heads))):
            texts = [render(task, row, self.catalogue, self.prompts)[0] for row in rows]
            return [self.prefix + ids for ids in self.text_ids(texts)]
        distinct = list(dict.fromkeys(heads))
        head_ids = dict(zip(distinct, self.text_ids(distinct), strict=True))
        return [
            [*self.prefix, *head_ids[head], *chain.from_iterable(lines[place] for place in row.history)]
            for head, row in zip(heads, rows, strict=True)
        ]

    def text_ids(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts without any special token around them."""
        if not texts:
            return []
        encoded = self.tokenizer(texts, return_attention_mask=False, return_token_type_ids=False)["input_ids"]
        return [ids[len(self.prefix) : len(ids) - len(self.suffix)] for ids in encoded]

    def prepare(self, tasks: list[Task]) -> None:
        """Encodes what the examples of the tasks share, so that it is done once and not in each process."""
        for task in tasks:
            if task.rows != "items":
                self.lines(task.shows)
            if task.answers == "title":
                self.answer_ids(task, [Row("", (), 0)])

    def needs_whole_texts(self, names: list[str]) -> bool:
        return any(TASKS[name].rows != "items" and self.lines(TASKS[name].shows) is None for name in names)

    def lines(self, shows: str) -> list[list[int]] | None:
        """The ids of each item's line in a history, or None where the ids of a history are not those of its lines."""
        return self.sid_lines if shows == "sid" else self.title_lines

    @functools.cached_property
    def titles(self) -> list[list[int]]:
        """Ids of each item's title as an answer."""
        return self.text_ids([item.title for item in self.catalogue.items])

    @functools.cached_property
    def sid_lines(self) -> list[list[int]] | None:
        if not sids_stand_alone(self.tokenizer, self.catalogue):
            return None
        line = "".join(self.catalogue.items[0].sid) + SEPARATOR
        separator = self.text_ids([line])[0][len(self.sids[0]) :]
        return [[*sid, *separator] for sid in self.sids]

    @functools.cached_property
    def title_lines(self) -> list[list[int]] | None:
        if not splits_at_lines(self.tokenizer):
            return None
        return self.text_ids([history_line(item, "title") for item in self.catalogue.items])


def added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer begins and ends a text with."""
    plain, full = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
    for begin in range(len(full) - len(plain), -1, -1):
        if full[begin : begin + len(plain)] == plain:
            return full[:begin], full[begin + len(plain) :]
    raise InputError("the tokenizer reads a text differently with special tokens; no prompt could be told from an answer")


def tokenizer_rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """The rules of a `tokenizers` tokenizer but for the last call's truncation and padding; None for any other kind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    return {**json.loads(backend.to_str()), "truncation": None, "padding": None}


def sids_stand_alone(tokenizer: PreTrainedTokenizerBase, catalogue: Catalogue) -> bool:
    """Whether SID tokens are cut out of a text before anything else, so that each part between them is read alone.

    So it is in a `tokenizers` tokenizer whose SID tokens are added, unnormalized tokens without conditions on what
    stands beside them, if no other added token can begin inside a SID token, end inside one or contain one. (One that
    takes white space from beside it stops at a SID token, which has none.)
    """
    rules = tokenizer_rules(tokenizer)
    if rules is None:
        return False
    wanted = {token for item in catalogue.items for token in item.sid}
    conditions = ("normalized", "lstrip", "rstrip", "single_word")
    for token in rules["added_tokens"]:
        if token["content"] in wanted:
            wanted.discard(token["content"])
            if any(token[condition] for condition in conditions):
                return False
        elif re.search(r"(?s:.)<|>(?s:.)", token["content"]):
            return False
    return not wanted


def splits_at_lines(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the ids of lines of text, none blank or with white space at an end, are the ids of each line alone.

    So it is in a byte-level BPE with one of LINE_PATTERNS: matching goes from left to right and never looks back; no
    match runs from a newline on into a line that begins with no white space, so one ends at each newline; and what is
    looked at behind a match is one character, which changes nothing for a newline that is alone. NFC composes nothing
    with a newline, and no added token may hold one or take white space from beside it.
    """
    rules = tokenizer_rules(tokenizer)
    if rules is None or rules["model"]["type"] != "BPE" or rules["model"].get("dropout"):
        return False
    if any(t["lstrip"] or t["rstrip"] or t["single_word"] or SEPARATOR in t["content"] for t in rules["added_tokens"]):
        return False
    splitter = rules["pre_tokenizer"] or {}
    steps = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    *splits, last = steps
    if (
        last.get("type") != "ByteLevel"
        or last["add_prefix_space"]
        or (rules["normalizer"] or {"type": "NFC"}) != {"type": "NFC"}
    ):
        return False
    if not splits:
        return last["use_regex"]  # the pattern of GPT-2
    known = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in LINE_PATTERNS]
    return len(splits) == 1 and splits[0] in known and not last["use_regex"]


def ends_its_line(head: str) -> bool:
    """Whether a line that follows the head is read alone: it is empty or ends in one newline behind a character."""
    return not head or re.search(r"\S\n\Z", head) is not None


def has_reserved_text(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> int:
    """How many texts contain a SID token or special token as text, which the tokenizer would read as that token."""
    reserved = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    if not reserved:
        return 0
    pattern = re.compile("|".join(map(re.escape, reserved)))
    return sum(bool(pattern.search(text)) for text in texts)


# ---------------------------------------------------------------------------------------------- datasets on disk


class Source(NamedTuple):
    """Where the rows of a dataset come from: an interaction CSV or none, and a preference file (one split) or none."""

    interactions: Path | None = None
    preferences: Path | None = None
    split: str = "train"


def build_dataset(
    source: Source,
    tasks: list[str],
    *,
    catalogue: Catalogue,
    prompts: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    cutoff_len: int,
    sample: int = -1,
    seed: int = 42,
    max_left_out: float = MAX_LEFT_OUT,
    cache_dir: Path,
    num_proc: int | None = None,
) -> Dataset:
    """The tokenized examples of the tasks, on disk and memory-mapped, built once per node and content.

    Columns: input_ids (list of int32), length, prompt_len, static_len, dropped, task (position in TASKS), user (a
    number per user; -1 for item tasks). `sample` > 0 takes that many random rows for each task. InputError
    where a larger share of the rows than `max_left_out` gives no example. The folder is named after a hash of all that
    decides its content; other processes of the node wait for the first and then open the same files.
    """
    from filelock import FileLock

    names = [task.name for task in TASKS.values() if task.group in tasks]
    key = content_hash(
        CACHE_FORMAT,
        names,
        [prompts[name] for name in names],
        catalogue.items,
        source.split,
        *(file_hash(path) if path else None for path in source[:2]),
        tokenizer_hash(tokenizer),
        cutoff_len,
        sample,
        seed,
        max_left_out,  # decides nothing in the folder, but whether there is one
    )
    folder = Path(cache_dir) / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{cache_dir}: cannot be made ({error_text(error)}); choose another --cache_dir") from None
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            scratch = Path(f"{folder}.tmp")
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            try:
                encoder = Encoder(tokenizer, catalogue, prompts, cutoff_len=cutoff_len)
                write_dataset(
                    scratch,
                    source,
                    names,
                    encoder,
                    sample=sample,
                    seed=seed,
                    max_left_out=max_left_out,
                    num_proc=num_proc,
                )
                os.replace(scratch, folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return open_dataset(folder, cutoff_len, max_left_out)


def write_dataset(
    folder: Path,
    source: Source,
    names: list[str],
    encoder: Encoder,
    *,
    sample: int,
    seed: int,
    max_left_out: float,
    num_proc: int | None,
) -> None:
    """Writes the examples of all tasks as Arrow files, and summary.json: the files in order, and what to tell."""
    import numpy as np
    from datasets import concatenate_datasets

    notes: list[str] = []
    users: dict[str, int] = {"": -1}
    tables: dict[str, Dataset] = {}
    parts, untitled = [], {}
    without_title = {place for place, item in enumerate(encoder.catalogue.items) if not item.title}
    for name in names:
        task = TASKS[name]
        if task.rows not in tables:
            rows = source_rows(task.rows, source, encoder.catalogue, notes.append, max_left_out)
            tables[task.rows] = write_rows(folder / f"rows-{task.rows}.arrow", rows, users)
        table = tables[task.rows]
        part = table.add_column("task", np.full(len(table), list(TASKS).index(name), np.int8))
        parts.append(part.select(sample_of(len(part), sample, seed, task)))
        untitled[name] = sum(place in without_title for place in parts[-1]["item"]) if task.rows == "items" else 0
    rows = concatenate_datasets(parts)
    encoder.prepare([TASKS[name] for name in names])
    encoded = rows.map(
        functools.partial(encode_batch, encoder=encoder),
        batched=True,
        batch_size=1000,
        num_proc=processes(len(rows), num_proc, whole_texts=encoder.needs_whole_texts(names)),
        remove_columns=rows.column_names,
        features=example_features(),
        cache_file_name=str(folder / "examples.arrow"),
        new_fingerprint=folder.stem,
        desc="Encoding",
    )
    texts = chain((item.title for item in encoder.catalogue.items), preferences_of(tables.get("preferences")))
    if reserved := has_reserved_text(encoder.tokenizer, texts):
        notes.append(f"{reserved:,} titles or preferences hold a SID or special token as text, which is read as that token")
    examples, cut = count_examples(encoded)
    counts = zip(names, map(len, parts), (list(TASKS).index(name) for name in names), strict=True)
    summary = {
        "files": [Path(file["filename"]).name for file in encoded.cache_files],
        "notes": notes,
        "tasks": {
            name: {"rows": count, "untitled": untitled[name], "examples": int(examples[number]), "cut": int(cut[number])}
            for name, count, number in counts
        },
    }
    for table in tables.values():
        for file in table.cache_files:
            Path(file["filename"]).unlink()
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))


def sample_of(count: int, sample: int, seed: int, task: Task) -> Sequence[int]:
    """Which of a task's rows are used: all, or `sample` random ones in their order, whatever other tasks there are."""
    if not 0 < sample < count:
        return range(count)
    import numpy as np

    return np.sort(np.random.default_rng([seed, list(TASKS).index(task.name)]).choice(count, sample, replace=False))


def count_examples(encoded: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """How many examples each task of TASKS has, and how many of them lost items to the cutoff."""
    import numpy as np

    counts = np.zeros((2, len(TASKS)), np.int64)
    for batch in encoded.select_columns(["task", "dropped"]).with_format("numpy").iter(100_000):
        for row, tasks in zip(counts, (batch["task"], batch["task"][batch["dropped"] > 0]), strict=True):
            row += np.bincount(tasks, minlength=len(TASKS))
    return counts[0], counts[1]


def preferences_of(table: Dataset | None) -> Iterable[str]:
    return () if table is None else table["preference"]


def processes(rows: int, num_proc: int | None, *, whole_texts: bool) -> int | None:
    """How many processes encode: none beside this one where starting them takes longer than they would save."""
    wanted = num_proc or min(os.cpu_count() or 1, 8)
    return wanted if rows >= (15_000 if whole_texts else 100_000) and wanted > 1 else None


def source_rows(
    kind: str, source: Source, catalogue: Catalogue, tell: Callable[[str], None], max_left_out: float
) -> Iterable[Row]:
    if kind == "items":
        return (Row("", (), place) for place in range(len(catalogue.items)))
    if kind == "interactions":
        return read_rows(source.interactions, catalogue, tell, max_left_out=max_left_out)
    return read_preferences(source.preferences, catalogue, source.split, tell, max_left_out=max_left_out)


def write_rows(path: Path, rows: Iterable[Row], users: dict[str, int]) -> Dataset:
    """Rows as an Arrow table on disk: user (its number in `users`, which grows), history (places), item, preference."""
    from datasets import Dataset, Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    number = Value("int32")
    features = Features({"user": number, "history": List(number), "item": number, "preference": Value("string")})
    with ArrowWriter(features=features, path=str(path), writer_batch_size=1000) as writer:
        for row in rows:
            user = users.setdefault(row.user, len(users))
            writer.write({"user": user, "history": row.history, "item": row.item, "preference": row.preference})
        writer.finalize()
    return Dataset.from_file(str(path))


def example_features() -> Features:
    from datasets import Features, List, Value

    numbers = dict.fromkeys(("length", "prompt_len", "static_len", "dropped", "user"), Value("int32"))
    return Features({"input_ids": List(Value("int32")), "task": Value("int8"), **numbers})


def encode_batch(batch: dict[str, list], *, encoder: Encoder) -> dict[str, list]:
    """Columns of rows -> columns of examples; rows that give no example are left out."""
    examples: list[tuple] = []
    columns = zip(*(batch[name] for name in ("task", "user", "history", "item", "preference")), strict=True)
    for number, group in groupby(columns, key=itemgetter(0)):
        _, users, *fields = zip(*group, strict=True)
        rows = [Row("", tuple(history), *rest) for history, *rest in zip(*fields, strict=True)]
        for example, user in zip(encoder.encode(list(TASKS.values())[number], rows), users, strict=True):
            if example:
                examples.append((*example, len(example.input_ids), number, user))
    names = (*Example._fields, "length", "task", "user")
    return {name: [example[place] for example in examples] for place, name in enumerate(names)}


def open_dataset(folder: Path, cutoff_len: int, max_left_out: float = MAX_LEFT_OUT) -> Dataset:
    """The memory-mapped dataset of a finished folder; logs what was cut or left out.

    InputError where a task has no example or a larger share of its rows than `max_left_out` was left out. Items without
    a title do not count in the item tasks: a catalogue may have them, and no row of the user's is lost.
    """
    from datasets import Dataset, concatenate_datasets

    summary = json.loads((folder / "summary.json").read_text())
    for note in summary["notes"]:
        logger.info(note)
    for name, task in summary["tasks"].items():
        if task["cut"]:
            logger.info(
                f"{name}: {task['cut']:,} of {task['examples']:,} examples lost old items to --cutoff_len {cutoff_len}"
            )
        why = f"no title, or template, newest item and answer are longer than --cutoff_len {cutoff_len}"
        if not task["examples"]:
            raise InputError(
                f"task {name!r} has no example: its items have no titles (--item_meta_path) "
                f"or --cutoff_len {cutoff_len} is shorter than template, newest item and answer"
            )
        if missing := task["rows"] - task["examples"]:
            check_share(f"task {name!r}: ", missing - task["untitled"], task["rows"], max_left_out, why)
            logger.info(f"{name}: {missing:,} of {task['rows']:,} rows left out: {why}")
    return concatenate_datasets([Dataset.from_file(str(folder / file)) for file in summary["files"]])


def file_hash(path: Path) -> str:
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error_text(error)})") from None


def content_hash(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:24]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides a tokenizer's ids."""
    rules = tokenizer_rules(tokenizer) or [tokenizer.get_vocab(), repr(tokenizer)]
    return content_hash(type(tokenizer).__name__, rules, tokenizer.eos_token_id)


# ---------------------------------------------------------------------------------------------- the public names


class SFTDataset:
    """A map-style dataset of one task: {"input_ids", "attention_mask", "labels"}, the prompt's labels -100.

    With test=True an example is its prompt alone and its labels are the answer's ids.
    """

    task_group: str
    source_kind = "interactions"

    def __init__(
        self,
        file: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        index_file: str,
        item_file: str | None = None,
        max_len: int = 512,
        sample: int = -1,
        seed: int = 42,
        max_left_out: float = MAX_LEFT_OUT,
        category: str = "",
        test: bool = False,
    ) -> None:
        if tokenizer is None:
            raise InputError(f"{type(self).__name__}: needs a tokenizer that knows the SID tokens")
        catalogue = read_catalogue(Path(index_file), Path(item_file) if item_file else None)
        prompts = read_prompts(None, category)
        encoder = Encoder(tokenizer, catalogue, prompts, cutoff_len=max_len)
        self.test = test
        self.examples: list[Example] = []
        self.texts: list[tuple[str, str]] = []
        for task in (task for task in TASKS.values() if task.group == self.task_group):
            rows = self.rows(file, catalogue, max_left_out)
            rows = [rows[place] for place in sample_of(len(rows), sample, seed, task)]
            for row, example in zip(rows, encoder.encode(task, rows), strict=True):
                if example is not None:
                    self.examples.append(example)
                    self.texts.append(render(task, row, catalogue, prompts))

    def rows(self, file: str | None, catalogue: Catalogue, max_left_out: float) -> list[Row]:
        if file is None and self.source_kind != "items":
            raise InputError(f"{type(self).__name__}: needs the file of its {self.source_kind}")
        path = Path(file) if file else None
        return list(source_rows(self.source_kind, Source(path, path), catalogue, logger.info, max_left_out))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place: int) -> dict[str, list[int]]:
        ids, prompt_len = self.examples[place][:2]
        if self.test:
            return {"input_ids": ids[:prompt_len], "attention_mask": [1] * prompt_len, "labels": ids[prompt_len:]}
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": [-100] * prompt_len + ids[prompt_len:],
        }


class SidSFTDataset(SFTDataset):
    """SID history -> next SID."""

    task_group = "sid_sid"


class SidItemFeatDataset(SFTDataset):
    """SID -> title and title -> SID of each item; takes no interaction file."""

    task_group, source_kind = "item", "items"


class FusionSeqRecDataset(SFTDataset):
    """SID history -> next title."""

    task_group = "sid_title"


class SFTData(SFTDataset):
    """Title history -> next title."""

    task_group = "title_title"


class TitleHistory2SidSFTDataset(SFTDataset):
    """Title history -> next SID."""

    task_group = "title_sid"


class PreferenceSFTDataset(SFTDataset):
    """SID history -> the user's preference in words, then the next SID."""

    task_group, source_kind = "preference", "preferences"


class UserPreference2sidSFTDataset(SFTDataset):
    """SID history and the user's preference -> next SID."""

    task_group, source_kind = "preference_sid", "preferences"


class EvalSidDataset(SidSFTDataset):
    """The prompts of SidSFTDataset, word for word, with the answers as labels."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "test": True})
