"""The items of a table of metadata as `.item.json` holds them.

    item_id,title,description,features
    p,Nuts &amp; Bolts,Steel.,100 <b>pieces</b>
        -> {"p": {"title": "Nuts & Bolts", "description": "['Steel.', '100 pieces']", "brand": "", "categories": ""}}

Cells may be lists, and texts the repr of lists.
"""

import math
from collections.abc import Iterable

from rq.catalogue import parts
from rq.files import InputError, shown
from rq.markup import without_markup
from rq.tables import Table

# Characters. Titles and ids are repeated in every history, so a file would grow out of all bounds with long ones.
LONGEST_NAME, LONGEST_TEXT = 10_000, 1_000_000
ITEM_FIELDS = ("item", "title", "description", "brand", "categories", "features")
OPTIONAL_FIELDS = ITEM_FIELDS[2:]
GENRES = ("genres", "genre")  # MovieLens writes Adventure|Comedy
NO_GENRE = "(no genres listed)"


def catalogue(metadata: Table) -> dict[str, dict[str, str]]:
    """{raw item id: title, description, brand, categories} of
    the items with a title; the first row of an item counts.
    """
    items: dict[str, dict[str, str]] = {}
    has_genres = metadata.names.get("categories", "").partition(":")[0].strip().casefold() in GENRES
    cells = (row for rows in metadata.chunks for row in zip(*(rows[field] for field in ITEM_FIELDS), strict=True))
    for number, (raw_id, title, description, brand, categories, features) in enumerate(cells):
        raw_id, title = cell_text(raw_id), cleaned(cell_text(title))
        if raw_id and title and raw_id not in items:
            if has_genres and isinstance(categories, str):
                categories = [genre for genre in categories.split("|") if genre != NO_GENRE]
            item = {
                "title": title,
                "description": described(description, features),
                "brand": cleaned(cell_text(brand)),
                "categories": ", ".join(_flat(categories)),
            }
            for field, text in (("item", raw_id), *item.items()):
                if fault := unusable(text, most=LONGEST_TEXT if field == "description" else LONGEST_NAME):
                    raise InputError(f"{metadata.where(number)}: {field} {shown(text)} {fault}; mend or remove it")
            items[raw_id] = item
    return items


def unusable(text: str, *, most: int) -> str:
    """Why a text can be in no file that is written, in words; '' where it can."""
    if "\0" in text:
        return "holds a NUL"
    return f"has {len(text):,} characters, more than {most:,}" if len(text) > most else ""


def cell_text(value: object) -> str:
    """A cell as text without blanks around it; 12.0 is what became of 12 where another cell of the column is empty."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def cleaned(value: object) -> str:
    """One field as running text without mark-up; the repr of a list is read as the list."""
    return " ".join(filter(None, (" ".join(without_markup(str(part)).split()) for part in parts(value))))


def described(description: object, features: object) -> str:
    """The description as it stands where there is nothing to clean and to add, else the repr of a list of its parts, as
    public `.item.json` files hold descriptions; '' for nothing.
    """
    more = _flat(features)
    if isinstance(description, str) and not more and without_markup(description) == description:
        return description
    texts = _flat(list(parts(description)) if isinstance(description, str) else description) + more
    return repr(texts) if texts else ""


def _flat(value: object) -> list[str]:
    """The texts of a field, lists in lists unfolded: ["a", ["b"], None] -> ["a", "b"]."""
    texts, waiting = [], [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Iterable) and not isinstance(part, str):
            waiting += reversed(list(part))
        elif text := cleaned(cell_text(part)):
            texts.append(text)
    return texts
