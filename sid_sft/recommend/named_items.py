"""Which item of a catalogue a text means: an item id, a SID, a title, or a part of one title alone.

split_history("Wood glue | 278", catalogue)              -> ["Wood glue", "278"]
find_in_catalogue("<a_12><b_3><c_77>", catalogue)        -> the place of the first item with this SID
"""

from __future__ import annotations

import difflib

from sid_sft.catalogue import Catalogue
from sid_sft.files import InputError, cut, one_line, shown
from sid_sft.recommend.results import short


def places_of_sids(catalogue: Catalogue) -> dict[str, int]:
    """SID as text -> the place of the first item that has it: {"<a_0><b_0>": 0, "<a_0><b_1>": 1}."""
    return {"".join(item.sid): place for place, item in reversed(list(enumerate(catalogue.items)))}


def split_history(text: str, catalogue: Catalogue) -> list[str]:
    """'Wood glue | 278' -> ['Wood glue', '278']; ids and SIDs alone may be separated by commas or spaces."""
    pieces = text.replace(",", " ").split()
    if "|" not in text and len(pieces) > 1:
        sids = places_of_sids(catalogue)
        if all(piece in catalogue.position or piece in sids for piece in pieces):
            return pieces
    pieces = [one_line(piece) for piece in text.split("|") if piece.strip()]
    if not pieces:
        raise InputError(f"--recommend {shown(text)}: names no item; expected titles, item ids or SIDs, separated by |")
    return pieces


def find_in_catalogue(text: str, catalogue: Catalogue) -> int:
    """The place of the item that is meant by an id, a SID, a title, or a part of one title alone; case does not matter."""
    if text in catalogue.position:
        return catalogue.position[text]
    if (place := places_of_sids(catalogue).get(text.replace(" ", ""))) is not None:
        return place
    wanted = text.casefold()
    titles = [item.title.casefold() for item in catalogue.items]
    matches = [place for place, title in enumerate(titles) if title == wanted]
    matches = matches or [place for place, title in enumerate(titles) if wanted in title]
    if len(matches) == 1:
        return matches[0]
    named = [f"{cut(catalogue.items[place].id)} ({short(catalogue.items[place].title, 60)})" for place in matches[:3]]
    if matches:
        raise InputError(
            f"--recommend {shown(text)}: is in the titles of {len(matches)} items, among them {', '.join(named)}; "
            "give an id or more of the title"
        )
    if not any(titles):
        raise InputError(
            f"--recommend {shown(text)}: is no item id and no SID, and without --item_meta_path items have no titles"
        )
    close = difflib.get_close_matches(wanted, titles, n=1, cutoff=0.4)
    hint = f"; the closest is {shown(catalogue.items[titles.index(close[0])].title)}" if close else ""
    raise InputError(f"--recommend {shown(text)}: is no item id, no SID and in no title{hint}")
