"""The items of a shop by number: raw id -> number, number -> title and SID.

    X.item_ids.csv  raw_id,item_id      what the first run of rq.prepare gave the items
                    B00X,0

A number stays what it is for good. LC-Rec's items have their numbers already: those of X.inter.json and X.index.json.
"""

import argparse
import csv
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rq.catalogue import plain, read_items
from rq.files import InputError, told
from rq.index_file import Sid, read_sids, sid_tokens
from rq.sequences import are_numbers

log = logging.getLogger("rq.numbering")


class Published(NamedTuple):
    """All items: raw id -> number, number -> title, number -> SID, such as '<a_12><b_3>'."""

    numbers: dict[str, int]
    titles: dict[int, str]
    sids: dict[int, str]


def read_numbers(ids_file: Path) -> dict[str, int]:
    """{raw id: number} of an earlier run, numbers 0..N-1 in this order."""
    try:
        with open(ids_file, encoding="utf-8", newline="") as file:
            numbers = {row["raw_id"].strip(): int(row["item_id"]) for row in csv.DictReader(file)}
    except (csv.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{ids_file}: not the table of ids that this command writes ({told(error)}); --overwrite numbers anew"
        ) from error
    if list(numbers.values()) != list(range(len(numbers))):
        raise InputError(f"{ids_file}: the numbers are not 0, 1, .. in order, each raw id once; --overwrite numbers anew")
    return numbers


def check_same_items(items: Sequence[object], item_file: Path, numbers: dict[str, int], ids_file: Path) -> None:
    """InputError unless the item file and the table of ids have equally many items, as those of one run have."""
    if len(items) != len(numbers):
        raise InputError(
            f"{item_file} has {len(items):,} items, {ids_file} {len(numbers):,}: the two are not of one run; "
            "bring back the missing one, or number anew with --overwrite"
        )


def number_items(raw_ids: Iterable[str], ids_file: Path, *, renumber: bool, may_grow: bool) -> dict[str, int]:
    """{raw id: number} of all items; numbers given in an earlier run stay, new items follow in the order they come in."""
    numbers: dict[str, int] = {}
    if ids_file.exists() and not renumber:
        numbers = read_numbers(ids_file)
    known = len(numbers)
    for raw_id in raw_ids:
        numbers.setdefault(raw_id, len(numbers))
    if known and len(numbers) > known and not may_grow:
        raise InputError(
            f"{ids_file}: {len(numbers) - known:,} items are not among its {known:,}; "
            "run once with --append to add them (published ids stay), then rq.text2emb and "
            "rq.generate_indices --append; or --overwrite to number anew"
        )
    return numbers


def items_to_number(bought: Iterable[str], items: Iterable[str], *, in_order: bool) -> list[str]:
    """The raw ids in the order of their numbers: the items of the rows kept as they first stand, then all others with a
    title. Ids that are numbers already, as in LC-Rec's files (`in_order`), stay in their order.
    """
    raw_ids = list(dict.fromkeys([*bought, *items]))
    return sorted(raw_ids, key=int) if in_order and are_numbers(raw_ids) else raw_ids


def published_items(flags: argparse.Namespace, bought: Iterable[str]) -> Published:
    """The items that the first run numbered, with the SIDs of --index."""
    item_file, ids_file = flags.output_dir / f"{flags.name}.item.json", flags.output_dir / f"{flags.name}.item_ids.csv"
    if not item_file.exists() or not ids_file.exists():
        raise InputError(f"{item_file} or {ids_file} is missing; run this command without --index first")
    titles = [plain(item.get("title")) for item in read_items(item_file)]
    index = read_sids(flags.index)
    if list(index) != list(range(len(titles))):
        missing = next((item for item in range(len(titles)) if item not in index), None)
        fault = f"item {missing} has no SID" if missing is not None else f"it has {len(index):,} items"
        raise InputError(
            f"{flags.index}: {fault}, {item_file} has {len(titles):,} items; bring the index up with "
            f"rq.generate_indices --append"
        )
    numbers = number_items(bought, ids_file, renumber=False, may_grow=False)
    check_same_items(titles, item_file, numbers, ids_file)
    return Published(numbers, dict(enumerate(titles)), joined(index))


def numbered_items(flags: argparse.Namespace, items: Mapping[str, dict[str, str]], index: Mapping[int, Sid]) -> Published:
    """The items of an index whose numbers are those of the interactions; one line says what sft.py has of their titles."""
    titles = {number: items.get(str(number), {}).get("title", "") for number in index}
    if count := sum(map(bool, titles.values())):
        log.info("%s: titles of %s of %s items", flags.items, f"{count:,}", f"{len(index):,}")
    else:
        log.warning(
            "no titles, SIDs only: train with --tasks sid_sid and without --item_meta_path; "
            "the tasks item, sid_title, title_title and title_sid need titles"
        )
    return Published({str(number): number for number in index}, titles, joined(index))


def joined(index: Mapping[int, Sid]) -> dict[int, str]:
    """{0: (12, 3)} -> {0: '<a_12><b_3>'}."""
    return {number: "".join(sid_tokens(codes)) for number, codes in index.items()}
