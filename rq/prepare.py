"""`python -m rq.prepare`: interactions and item metadata ->
`.item.json`, and once there is an index, the training CSVs.

The same command is run twice: first without --index, for the items that rq.text2emb and a quantizer make an
index of; then with --index added, for the train / valid / test CSVs and the info file, whose SIDs come from it.
"""

import argparse
import contextlib
import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rq import command_line, settings
from rq.catalogue import plain, read_items
from rq.command_line import log
from rq.files import InputError, check_output, shown, told, whole_file
from rq.formats import check_in_index, is_numbered, read_interactions, read_titles
from rq.index_file import Sid, read_sids, sid_tokens
from rq.tables import FIELD_NAMES, Table, read_table
from rq.timestamps import Column, read_times

if TYPE_CHECKING:
    import pandas as pd

CSV_COLUMNS = (
    "user_id",
    "history_item_title",
    "item_title",
    "history_item_id",
    "item_id",
    "history_item_sid",
    "item_sid",
)
# Characters. Titles and ids are repeated in every history, so a file would grow out of all bounds with long ones.
LONGEST_NAME, LONGEST_TEXT = 10_000, 1_000_000
VALID_SHARE, TEST_SHARE = 0.1, 0.1
ITEM_FIELDS = ("item", "title", "description", "brand", "categories")


@dataclass(frozen=True)
class Window:
    """One row of a training CSV: up to --max_history items, oldest first, and the item that followed."""

    user: str
    history: tuple[int, ...]
    target: int
    time: float  # grows with time, in whatever unit the column has


class Catalogue(NamedTuple):
    """All items: raw id -> number, number -> title, number -> SID, such as '<a_12><b_3>'."""

    numbers: dict[str, int]
    titles: dict[int, str]
    sids: dict[int, str]


def catalogue(metadata: Table) -> dict[str, dict[str, str]]:
    """{raw item id: title, description, brand, categories} of
    the items with a title; the first row of an item counts.
    """
    items: dict[str, dict[str, str]] = {}
    rows = metadata.rows
    cells = zip(rows.item, rows.title, rows.description, rows.brand, rows.categories, strict=True)
    for number, (raw_id, title, description, brand, categories) in enumerate(cells):
        raw_id, title = _text(raw_id), plain(_text(title))
        if raw_id and title and raw_id not in items:
            item = {
                "title": title,
                "description": description if isinstance(description, str) else _list_text(description),
                "brand": plain(_text(brand)),
                "categories": ", ".join(_flat(categories)),
            }
            for field, text in (("item", raw_id), *item.items()):
                if fault := _unusable(text, most=LONGEST_TEXT if field == "description" else LONGEST_NAME):
                    raise InputError(f"{metadata.where(number)}: {field} {shown(text)} {fault}; mend or remove it")
            items[raw_id] = item
    return items


def _unusable(text: str, *, most: int) -> str:
    """Why a text can be in no file that is written, in words; '' where it can."""
    if "\0" in text:
        return "holds a NUL"
    return f"has {len(text):,} characters, more than {most:,}" if len(text) > most else ""


def _text(value: object) -> str:
    """A cell as text without blanks around it; 12.0 is what became of 12 where another cell of the column is empty."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def _flat(value: object) -> list[str]:
    """The texts of a field, lists in lists unfolded: ["a", ["b"], None] -> ["a", "b"]."""
    texts, waiting = [], [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Iterable) and not isinstance(part, str):
            waiting += reversed(list(part))
        elif text := plain(_text(part)):
            texts.append(text)
    return texts


def _list_text(value: object) -> str:
    """The repr of a list of strings, as public `.item.json` files hold descriptions; '' for nothing."""
    return repr(parts) if (parts := _flat(value)) else ""


def filter_interactions(table: Table, *, known_items: Iterable[str], k_core: int, dayfirst: bool | None) -> "pd.DataFrame":
    """Rows that can be used, ordered by time, equal times as in the
    file; what is dropped is logged by reason. The k-core is iterated to its fixed point.
    """
    import pandas as pd

    rows = table.rows
    column = Column(table.names["time"], rows.time, table.where)
    times = read_times(column, dayfirst=dayfirst)
    log.info("%s: %s read as %s", table.path, column.name, times.in_words)

    dropped: dict[str, int] = {}

    def keep(reason: str, good: "pd.Series") -> None:
        nonlocal rows
        dropped[reason] = dropped.get(reason, 0) + int((~good).sum())
        rows = rows[good]

    read = len(rows)
    rows = rows.assign(user=rows.user.map(_text), item=rows.item.map(_text), time=times.order)
    for field in ("user", "item"):
        bad = rows[field].map(lambda text: bool(_unusable(text, most=LONGEST_NAME)))
        if bad.any():
            text = rows[field][bad.idxmax()]
            raise InputError(
                f"{table.where(bad.idxmax())}: {field} {shown(text)} {_unusable(text, most=LONGEST_NAME)}; mend or remove it"
            )
    keep("no user or item id", (rows.user != "") & (rows.item != ""))
    keep("no timestamp", ~times.empty[rows.index])
    unreadable = rows.time.isna()
    keep("unreadable timestamp", ~unreadable)
    keep("repeats user, item and time", ~rows.duplicated(["user", "item", "time"]))
    keep("item has no title", rows.item.isin(pd.Index(list(known_items))))
    before = -1
    while len(rows) != before:
        before = len(rows)
        keep(f"item in fewer than {k_core} rows", rows.groupby("item").user.transform("size") >= k_core)
        keep(f"user with fewer than {k_core} rows", rows.groupby("user").item.transform("size") >= k_core)
    log.info("interactions: %s read, %s kept", f"{read:,}", f"{len(rows):,}")
    for reason, count in dropped.items():
        log.info("  dropped, %s: %s", reason, f"{count:,}")
    if unreadable.any():
        log.info("  the first unreadable timestamp: %s", column.shown(unreadable.idxmax()))
    if rows.empty:
        raise InputError("no interaction is left; check the columns read, or give a smaller --k_core")
    return rows.astype({"time": rows.time.dtype.numpy_dtype}).sort_values("time", kind="stable")


def windows(rows: "pd.DataFrame", number_of: dict[str, int], *, max_history: int) -> list[list[Window]]:
    """For each user, in order of time, one window for every row but the first.

    u bought items 0, 1 and 2 -> [[Window("u", (0,), 1, time), Window("u", (0, 1), 2, time)]]
    """
    users: dict[str, list[tuple[int, float]]] = {}
    for user, item, time in zip(rows.user, rows.item, rows.time, strict=True):
        users.setdefault(user, []).append((number_of[item], time))
    return [
        [
            Window(user, tuple(item for item, _ in sequence[max(0, at - max_history) : at]), *sequence[at])
            for at in range(1, len(sequence))
        ]
        for user, sequence in users.items()
    ]


def split_windows(by_user: list[list[Window]], *, split: str) -> dict[str, list[Window]]:
    """{'train', 'valid', 'test'}: 80/10/10 by the time of the
    target, or each user's last to test and last but one to valid.
    """
    if split == "global":
        ordered = sorted((window for sequence in by_user for window in sequence), key=lambda window: window.time)
        first_test = len(ordered) - round(len(ordered) * TEST_SHARE)
        first_valid = first_test - round(len(ordered) * VALID_SHARE)
        return {"train": ordered[:first_valid], "valid": ordered[first_valid:first_test], "test": ordered[first_test:]}
    parts: dict[str, list[Window]] = {"train": [], "valid": [], "test": []}
    for sequence in by_user:
        if len(sequence) < 2:
            parts["train"] += sequence
            continue
        parts["train"] += sequence[:-2]
        parts["valid"].append(sequence[-2])
        parts["test"].append(sequence[-1])
    return parts


def csv_row(window: Window, titles: Mapping[int, str], sids: Mapping[int, str]) -> list[object]:
    """The cells of a window in the order of CSV_COLUMNS; the three history lists come from one list of ids.

    Window("u", (0, 1), 2, time) -> ["u", "['Pan', 'Tab']", "Bin", "[0, 1]", 2, "['<a_0><b_0>', '<a_1><b_0>']", "<a_2><b_0>"]
    """
    history = list(window.history)
    return [
        window.user,
        repr([titles[item] for item in history]),
        titles[window.target],
        repr(history),
        window.target,
        repr([sids[item] for item in history]),
        sids[window.target],
    ]


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


def number_items(rows: "pd.DataFrame", ids_file: Path, *, renumber: bool, may_grow: bool) -> dict[str, int]:
    """{raw id: number} of all items; numbers given in an earlier
    run stay, new items follow in the order they first appear.
    """
    numbers: dict[str, int] = {}
    if ids_file.exists() and not renumber:
        numbers = read_numbers(ids_file)
    known = len(numbers)
    for raw_id in rows.item.drop_duplicates():
        numbers.setdefault(raw_id, len(numbers))
    if known and len(numbers) > known and not may_grow:
        raise InputError(
            f"{ids_file}: {len(numbers) - known:,} items are not among its {known:,}; "
            "run once with --append to add them (published ids stay), then rq.text2emb and "
            "rq.generate_indices --append; or --overwrite to number anew"
        )
    return numbers


def write_items(
    flags: argparse.Namespace, rows: "pd.DataFrame", items: dict[str, dict[str, str]], *, kept_settings: str
) -> None:
    """First run: `.item.json`, the table of ids and the settings. An item already there keeps its number and its text."""
    item_file, ids_file = flags.output_dir / f"{flags.name}.item.json", flags.output_dir / f"{flags.name}.item_ids.csv"
    if item_file.exists() and not (flags.append or flags.overwrite):
        raise InputError(
            f"{item_file} exists; add --index for the CSVs, --append for new items, or --overwrite to number items anew"
        )
    published = read_items(item_file) if flags.append and item_file.exists() else []
    if published:
        check_same_items(published, item_file, read_numbers(ids_file), ids_file)
    numbers = number_items(rows, ids_file, renumber=not published, may_grow=True)
    settings_path = settings.settings_file(flags.output_dir, flags.name)
    with whole_file(item_file) as file, whole_file(ids_file) as ids, whole_file(settings_path) as kept:
        kept.write(kept_settings)
        writer = csv.writer(ids, lineterminator="\n")
        writer.writerow(("raw_id", "item_id"))
        for raw_id, number in numbers.items():
            item = published[number] if number < len(published) else items[raw_id]
            file.write(f'{"," if number else "{"}"{number}": {json.dumps(item, ensure_ascii=False)}\n')
            writer.writerow((raw_id, number))
        file.write("}\n")
    log.info("wrote %s: %s items, %s of them new", item_file, f"{len(numbers):,}", f"{len(numbers) - len(published):,}")
    log.info("next: rq.text2emb, a quantizer, then this command again with --index")


def published_catalogue(flags: argparse.Namespace, rows: "pd.DataFrame") -> Catalogue:
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
    numbers = number_items(rows, ids_file, renumber=False, may_grow=False)
    check_same_items(titles, item_file, numbers, ids_file)
    return Catalogue(numbers, dict(enumerate(titles)), joined(index))


def joined(index: Mapping[int, Sid]) -> dict[int, str]:
    """{0: (12, 3)} -> {0: '<a_12><b_3>'}."""
    return {number: "".join(sid_tokens(codes)) for number, codes in index.items()}


def write_csvs(flags: argparse.Namespace, rows: "pd.DataFrame", catalogue: Catalogue, *, kept_settings: str) -> None:
    """The CSVs and the info file."""
    numbers, titles, sids = catalogue.numbers, catalogue.titles, catalogue.sids
    if unused := len(titles) - rows.item.nunique():
        log.info("%s of %s items are in no row that is kept", f"{unused:,}", f"{len(titles):,}")
    by_user = windows(rows, numbers, max_history=flags.max_history)
    parts = split_windows(by_user, split=flags.split)
    targets = {part: flags.output_dir / f"{flags.name}.{part}.csv" for part in parts}
    info_file = flags.output_dir / f"{flags.name}.info.txt"
    inputs = [path.resolve() for path in (flags.interactions, flags.items) if path]
    for path in (*targets.values(), info_file):
        if path.resolve() in inputs:
            raise InputError(f"{path} is also an input of this run; give another --name or --output_dir")
        if path.exists() and not flags.overwrite:
            raise InputError(f"{path} exists; give --overwrite to replace it, or another --output_dir")
    with contextlib.ExitStack() as stack:
        for part, part_windows in parts.items():
            writer = csv.writer(stack.enter_context(whole_file(targets[part])), lineterminator="\n")
            writer.writerow(CSV_COLUMNS)
            writer.writerows(csv_row(window, titles, sids) for window in part_windows)
        kept = stack.enter_context(whole_file(settings.settings_file(flags.output_dir, flags.name)))
        kept.write(kept_settings)
        info = stack.enter_context(whole_file(info_file))
        info.writelines(f"{sid}\t{titles[item]}\t{item}\n" for item, sid in sids.items())
    log.info(
        "%s users; each user's first row starts a history and is no target: %s rows",
        f"{len(by_user):,}",
        f"{len(by_user):,}",
    )
    log.info(
        "wrote %s: %s",
        info_file.with_name(f"{flags.name}.*"),
        ", ".join(f"{part} {len(p):,}" for part, p in parts.items()),
    )


@command_line.command("prepare")
def main(argv: list[str] | None = None) -> None:
    """Interactions and items -> `.item.json`; with --index, the CSVs and the info file."""
    parser = command_line.parser("prepare", __doc__, shared=("overwrite",))
    add = parser.add_argument
    add(
        "--interactions",
        type=command_line.existing,
        required=True,
        metavar="FILE",
        help="user, item, timestamp: CSV, Parquet or Amazon review JSON lines",
    )
    add(
        "--items",
        type=command_line.existing,
        metavar="FILE",
        help="item, title and, where known, description, brand, categories",
    )
    add("--output_dir", type=Path, required=True, metavar="FOLDER", help="where the files go")
    add(
        "--name",
        type=command_line.plain_name,
        required=True,
        help="what their names begin with: NAME.item.json, NAME.train.csv, ..",
    )
    add(
        "--index",
        type=command_line.existing,
        metavar="X.index.json",
        help="second run: write the CSVs with the SIDs of this index",
    )
    add(
        "--append",
        type=command_line.switch,
        nargs="?",
        const=True,
        default=False,
        help="first run: keep the numbers of known items, add new ones",
    )
    add("--k_core", type=command_line.at_least(1), help="drop users and items with fewer rows, until none has (5)")
    add("--split", choices=settings.SPLITS, help="80/10/10 by time of the target, or by user (global)")
    add("--max_history", type=command_line.at_least(1), help="items of a history at most (10)")
    add(
        "--dayfirst",
        type=command_line.switch,
        nargs="?",
        const=True,
        help="read 02/01/2016 as 2 January, or as 1 February with False (by the rows that decide it)",
    )
    for field in FIELD_NAMES:
        add(f"--{field}_column", metavar="NAME", help=f"column of the {field} ({', '.join(FIELD_NAMES[field])})")
    flags = parser.parse_args(argv)
    if flags.append and flags.index:
        raise InputError("--append adds items, which have no SID yet; run it without --index first")
    settings_path = settings.settings_file(flags.output_dir, flags.name)
    remembered = settings.read_settings(settings_path)
    settings.fill_in(flags, remembered, path=settings_path)
    for ending in settings.ENDINGS:
        check_output(flags.output_dir / f"{flags.name}.{ending}")
    item_file = flags.output_dir / f"{flags.name}.item.json"
    names = {field: getattr(flags, f"{field}_column") for field in FIELD_NAMES}

    interactions = read_interactions(flags.interactions, names=names)
    if interactions.names["time"] == "position" and flags.index and flags.split == "global":
        raise InputError(f"{flags.interactions} has no times; give --split leave_one_out")
    if numbered := bool(flags.index) and is_numbered(interactions) and not item_file.exists():
        index = read_sids(flags.index)
        check_in_index(interactions, index, index_file=flags.index)
        titles = read_titles(flags.items, index, index_file=flags.index)
        known_items: Iterable[str] = map(str, index)
    else:
        if not flags.items:
            raise InputError("--items is missing; only an .inter.json with an --index for its item numbers does without")
        items = catalogue(read_table(flags.items, ITEM_FIELDS, names=names, optional=ITEM_FIELDS[2:]))
        known_items = items
    rows = filter_interactions(interactions, known_items=known_items, k_core=flags.k_core, dayfirst=flags.dayfirst)
    kept_settings = settings.to_keep(flags, remembered, rows_kept=len(rows))
    if flags.index:
        settings.log_other_rows(flags, remembered, rows_kept=len(rows))
        if numbered:
            published = Catalogue({str(number): number for number in index}, titles, joined(index))
        else:
            published = published_catalogue(flags, rows)
        write_csvs(flags, rows, published, kept_settings=kept_settings)
    else:
        write_items(flags, rows, items, kept_settings=kept_settings)


if __name__ == "__main__":
    main()
