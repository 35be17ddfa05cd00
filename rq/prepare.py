"""`python -m rq.prepare`: interactions and item metadata ->
`.item.json`, and once there is an index, the training CSVs.

The same command is run twice: first without --index, for the items that rq.text2emb and a quantizer make an
index of; then with --index added, for the train / valid / test CSVs and the info file, whose SIDs come from it.
Files whose items have the numbers of an index already, X.inter.json and X.index.json, need the second run alone.
"""

import argparse
import contextlib
import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rq import command_line, settings
from rq.catalogue import read_items
from rq.command_line import log
from rq.files import InputError, check_output, shown, whole_file
from rq.formats import FIELD_NAMES
from rq.hub import PREFIX as HUB
from rq.index_file import read_sids
from rq.metadata import ITEM_FIELDS, LONGEST_NAME, OPTIONAL_FIELDS, catalogue, cell_text, unusable
from rq.numbering import (
    Published,
    check_ids_meet,
    check_same_items,
    items_to_number,
    number_items,
    numbered_items,
    published_items,
    read_numbers,
    why_not_numbered,
)
from rq.sequences import check_in_index, read_interactions
from rq.tables import Table, read_table
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
VALID_SHARE, TEST_SHARE = 0.1, 0.1
NO_ITEMS = "--items is missing; only an .inter.json with the --index of its item numbers does without it"


@dataclass(frozen=True)
class Window:
    """One row of a training CSV: up to --max_history items, oldest first, and the item that followed."""

    user: str
    history: tuple[int, ...]
    target: int
    time: float  # grows with time, in whatever unit the column has


def filter_interactions(
    table: Table, *, known_items: Iterable[str] | None, k_core: int, dayfirst: bool | None
) -> "pd.DataFrame":
    """Rows that can be used, ordered by time, equal times as in the file; what is dropped is logged by reason. The k-core is
    iterated to its fixed point. All items are known where `known_items` is None.
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
    rows = rows.assign(user=rows.user.map(cell_text), item=rows.item.map(cell_text), time=times.order)
    for field in ("user", "item"):
        bad = rows[field].map(lambda text: bool(unusable(text, most=LONGEST_NAME)))
        if bad.any():
            text = rows[field][bad.idxmax()]
            raise InputError(
                f"{table.where(bad.idxmax())}: {field} {shown(text)} {unusable(text, most=LONGEST_NAME)}; mend or remove it"
            )
    keep("no user or item id", (rows.user != "") & (rows.item != ""))
    keep("no timestamp", ~times.empty[rows.index])
    unreadable = rows.time.isna()
    keep("unreadable timestamp", ~unreadable)
    keep("repeats user, item and time", ~rows.duplicated(["user", "item", "time"]))
    if known_items is not None:
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


def check_no_input(flags: argparse.Namespace, outputs: Iterable[Path]) -> None:
    """InputError where a file to write is one that was read."""
    inputs = [path.resolve() for path in (flags.interactions, flags.items) if path]
    for path in outputs:
        if path.resolve() in inputs:
            raise InputError(f"{path} is also an input of this run; give another --name or --output_dir")


def item_json(numbers_and_items: Iterable[tuple[int, dict]]) -> Iterator[str]:
    """The lines of `.item.json`, one item a line: '{"0": {"title": "Pan"}', ',"1": {"title": "Tab"}', '}'."""
    comma = "{"
    for number, item in numbers_and_items:
        yield f'{comma}"{number}": {json.dumps(item, ensure_ascii=False)}\n'
        comma = ","
    yield "}\n"


def write_items(
    flags: argparse.Namespace,
    raw_ids: Sequence[str],
    items: dict[str, dict[str, str]],
    *,
    bought: int,
    kept_settings: str,
) -> None:
    """First run: `.item.json`, the table of ids and the settings. An item already there keeps its number and its text."""
    item_file, ids_file = flags.output_dir / f"{flags.name}.item.json", flags.output_dir / f"{flags.name}.item_ids.csv"
    check_no_input(flags, (item_file, ids_file))
    if item_file.exists() and not (flags.append or flags.overwrite):
        raise InputError(
            f"{item_file} exists; add --index for the CSVs, --append for new items, or --overwrite to number items anew"
        )
    published = read_items(item_file) if flags.append and item_file.exists() else []
    if published:
        check_same_items(published, item_file, read_numbers(ids_file), ids_file)
    numbers = number_items(raw_ids, ids_file, renumber=not published, may_grow=True)
    settings_path = settings.settings_file(flags.output_dir, flags.name)
    with whole_file(item_file) as file, whole_file(ids_file) as ids, whole_file(settings_path) as kept:
        kept.write(kept_settings)
        writer = csv.writer(ids, lineterminator="\n")
        writer.writerow(("raw_id", "item_id"))
        writer.writerows(numbers.items())
        texts = (published[number] if number < len(published) else items[raw_id] for raw_id, number in numbers.items())
        file.writelines(item_json(enumerate(texts)))
    cold = len(numbers) - bought
    log.info(
        "wrote %s: %s items, %s of them new%s",
        item_file,
        f"{len(numbers):,}",
        f"{len(numbers) - len(published):,}",
        f"; {cold:,} are in no row that is kept (--bought_only leaves such items out)" if cold else "",
    )
    log.info("next: rq.text2emb, a quantizer, then this command again with --index")


def write_csvs(
    flags: argparse.Namespace, rows: "pd.DataFrame", published: Published, *, items: Mapping[str, dict], kept_settings: str
) -> None:
    """The CSVs and the info file, and `.item.json` where `items` are given."""
    numbers, titles, sids = published
    if unused := len(titles) - rows.item.nunique():
        log.info("%s of %s items are in no row that is kept", f"{unused:,}", f"{len(titles):,}")
    by_user = windows(rows, numbers, max_history=flags.max_history)
    parts = split_windows(by_user, split=flags.split)
    targets = {part: flags.output_dir / f"{flags.name}.{part}.csv" for part in parts}
    info_file, item_file = (flags.output_dir / f"{flags.name}.{ending}" for ending in ("info.txt", "item.json"))
    outputs = (*targets.values(), info_file, *([item_file] if items else []))
    check_no_input(flags, outputs)
    for path in outputs:
        if path.exists() and not flags.overwrite:
            raise InputError(f"{path} exists; give --overwrite to replace it, or another --output_dir")
    with contextlib.ExitStack() as stack:
        for part, part_windows in parts.items():
            writer = csv.writer(stack.enter_context(whole_file(targets[part])), lineterminator="\n")
            writer.writerow(CSV_COLUMNS)
            writer.writerows(csv_row(window, titles, sids) for window in part_windows)
        kept = stack.enter_context(whole_file(settings.settings_file(flags.output_dir, flags.name)))
        kept.write(kept_settings)
        if items:
            stack.enter_context(whole_file(item_file)).writelines(
                item_json((number, items.get(str(number), {"title": ""})) for number in titles)
            )
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


def a_table(text: str) -> Path:
    """A flag type: a file or folder to read, or an address of the Hub."""
    return Path(text) if text.startswith(HUB) else command_line.existing(text)


@command_line.command("prepare")
def main(argv: list[str] | None = None) -> None:
    """Interactions and items -> `.item.json`; with --index, the CSVs and the info file."""
    parser = command_line.parser("prepare", __doc__, shared=("overwrite",))
    add = parser.add_argument
    for flag, text in {
        "interactions": "user, item, timestamp: CSV, Parquet, JSON, RecBole .inter, MovieLens .dat, P5 .txt, hf://datasets/..",
        "items": "item, title and, where known, description, features, brand, categories; not needed with LC-Rec's numbers "
        "(X.inter.json) and --index",
    }.items():
        add(f"--{flag}", type=a_table, required=flag == "interactions", metavar="FILE", help=text)
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
    add(
        "--bought_only",
        type=command_line.switch,
        nargs="?",
        const=True,
        help="first run: number no item but those in the rows kept (every item with a title)",
    )
    add(
        "--sep", type=command_line.separator, help="what stands between the cells of text files, such as ';' (by the header)"
    )
    add(
        "--encoding",
        type=command_line.text_encoding,
        help="of text files that are not UTF-8, such as latin-1 or gb18030 (none)",
    )
    for field in FIELD_NAMES:
        add(f"--{field}_column", metavar="NAME", help=f"column of the {field} ({', '.join(FIELD_NAMES[field])})")
    flags = parser.parse_args(argv)
    if flags.append and flags.index:
        raise InputError("--append adds items, which have no SID yet; run it without --index first")
    if not flags.items and not flags.index:
        raise InputError(NO_ITEMS)
    settings_path = settings.settings_file(flags.output_dir, flags.name)
    remembered = settings.read_settings(settings_path)
    settings.fill_in(flags, remembered, path=settings_path)
    for ending in settings.ENDINGS:
        check_output(flags.output_dir / f"{flags.name}.{ending}")
    ids_file = flags.output_dir / f"{flags.name}.item_ids.csv"
    reading = {
        "names": {field: getattr(flags, f"{field}_column") for field in FIELD_NAMES},
        "sep": flags.sep,
        "encoding": flags.encoding,
    }
    interactions = read_interactions(flags.interactions, **reading)
    why_not = why_not_numbered(interactions, ids_file)
    numbered = bool(flags.index) and not why_not
    if not flags.items and not numbered:
        raise InputError(f"{NO_ITEMS}: {why_not}")
    if not interactions.has_times and flags.index and flags.split == "global":
        raise InputError(f"{flags.interactions} has each user's order, but no times; give --split leave_one_out")
    items: dict[str, dict[str, str]] = {}
    if flags.items:
        items = catalogue(read_table(flags.items, ITEM_FIELDS, optional=OPTIONAL_FIELDS, **reading))
    if numbered:
        index = read_sids(flags.index)
        check_in_index(interactions, index, index_file=flags.index)
    if items or not numbered:
        raw_ids = interactions.rows.item.map(cell_text).drop_duplicates().tolist()
        check_ids_meet(interactions, raw_ids, items, items_file=flags.items)
    rows = filter_interactions(
        interactions, known_items=None if numbered else items, k_core=flags.k_core, dayfirst=flags.dayfirst
    )
    kept_settings = settings.to_keep(flags, remembered, rows_kept=len(rows))
    if not flags.index:
        to_number = items_to_number(interactions, rows, items, bought_only=flags.bought_only)
        write_items(flags, to_number, items, bought=rows.item.nunique(), kept_settings=kept_settings)
        return
    settings.log_other_rows(flags, remembered, rows_kept=len(rows))
    published = numbered_items(flags, items, index) if numbered else published_items(flags, rows)
    write_csvs(flags, rows, published, items=items if numbered else {}, kept_settings=kept_settings)


if __name__ == "__main__":
    main()
