"""`python -m rq.prepare`: interactions and item metadata ->
`.item.json`, and once there is an index, the training files.

The same command is run twice: first without --index, for the items that rq.text2emb and a quantizer make an
index of; then with --index added, for the train / valid / test files and the info file, whose SIDs come from it.
Files whose items have the numbers of an index already, X.inter.json and X.index.json, need the second run alone.
"""

import argparse
import contextlib
import csv
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rq import command_line, settings
from rq.catalogue import read_items
from rq.command_line import log
from rq.files import InputError, check_output, shown, whole_file, whole_path
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
from rq.training_files import LONGEST_HISTORY, csv_cells, csv_lines, write_sequences
from rq.windows import histories, split_windows

if TYPE_CHECKING:
    import pandas as pd

NO_ITEMS = "--items is missing; only an .inter.json with the --index of its item numbers does without it"


def filter_interactions(
    table: Table, *, known_items: Iterable[str] | None, k_core: int, dayfirst: bool | None
) -> "pd.DataFrame":
    """Rows that can be used, ordered by time, equal times as in the file; what is dropped is logged by reason. The k-core is
    iterated to its fixed point. All items are known where `known_items` is None. Users and items are categories.
    """
    import numpy as np
    import pyarrow

    pyarrow.default_memory_pool().release_unused()  # where the texts of all rows were: as much as all that follows takes
    rows = table.rows
    column = Column(table.names["time"], rows.time, table.where)
    times = read_times(column, dayfirst=dayfirst)
    log.info("%s: %s read as %s", table.path, column.name, times.in_words)

    dropped: dict[str, int] = {}

    def keep(reason: str, good: "np.ndarray | pd.Series") -> None:
        nonlocal rows
        dropped[reason] = dropped.get(reason, 0) + int((~good).sum())
        rows = rows if good.all() else rows[good]

    read = len(rows)
    for field in ("user", "item"):
        bad = [code for code, text in enumerate(rows[field].cat.categories) if unusable(text, most=LONGEST_NAME)]
        if bad:
            at = rows[field].cat.codes.isin(bad).idxmax()
            text = rows[field][at]
            raise InputError(
                f"{table.where(at)}: {field} {shown(text)} {unusable(text, most=LONGEST_NAME)}; mend or remove it"
            )
    rows = rows.assign(time=times.order)
    keep("no user or item id", (rows.user != "") & (rows.item != ""))
    keep("no timestamp", ~times.empty[rows.index])
    unreadable = rows.time.isna()
    keep("unreadable timestamp", ~unreadable)
    rows = rows.astype({"time": rows.time.dtype.numpy_dtype})
    keep("repeats user, item and time", ~rows.duplicated(["user", "item", "time"]))
    if known_items is not None:
        known = rows.item.cat.categories.isin(list(known_items))
        keep("item has no title", known[rows.item.cat.codes])
    before = -1
    while len(rows) != before:
        before = len(rows)
        for field, reason in (
            ("item", f"item in fewer than {k_core} rows"),
            ("user", f"user with fewer than {k_core} rows"),
        ):
            codes = rows[field].cat.codes
            keep(reason, (np.bincount(codes, minlength=1) >= k_core)[codes])
    log.info("interactions: %s read, %s kept", f"{read:,}", f"{len(rows):,}")
    for reason, count in dropped.items():
        log.info("  dropped, %s: %s", reason, f"{count:,}")
    if unreadable.any():
        log.info("  the first unreadable timestamp: %s", column.shown(unreadable.idxmax()))
    if rows.empty:
        raise InputError("no interaction is left; check the columns read, or give a smaller --k_core")
    return rows.iloc[np.argsort(rows.time.to_numpy(), kind="stable")]


def with_texts(table: Table) -> Table:
    """The interactions with users and items as categories: their different texts, in the order in which they first stand."""
    import pandas as pd

    columns = {}
    for field in ("user", "item"):
        cells = table.rows[field]
        if cells.dtype == object:  # may hold True and 1, which are equal and have other texts
            cells = cells.map(cell_text)
        codes, different = pd.factorize(cells, use_na_sentinel=False)
        text_of, texts = pd.factorize(pd.Series(different).map(cell_text))
        columns[field] = pd.Categorical.from_codes(text_of[codes], categories=texts)
    return dataclasses.replace(table, rows=table.rows.assign(**columns))


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


def write_training_files(
    flags: argparse.Namespace, rows: "pd.DataFrame", published: Published, *, items: Mapping[str, dict], kept_settings: str
) -> None:
    """The rows of each part and the info file, and `.item.json` where `items` are given."""
    numbers, titles, sids = published
    if unused := len(titles) - rows.item.nunique():
        log.info("%s of %s items are in no row that is kept", f"{unused:,}", f"{len(titles):,}")
    made = histories(rows, numbers)
    parts = split_windows(made, split=flags.split)
    paths = {part: flags.output_dir / f"{flags.name}.{part}.{flags.output_format}" for part in parts}
    info_file, item_file = (flags.output_dir / f"{flags.name}.{ending}" for ending in ("info.txt", "item.json"))
    outputs = (*paths.values(), info_file, *([item_file] if items else []))
    check_no_input(flags, outputs)
    for path in outputs:
        if path.exists() and not flags.overwrite:
            raise InputError(f"{path} exists; give --overwrite to replace it, or another --output_dir")
    with contextlib.ExitStack() as stack:
        cells = csv_cells(made, titles, sids) if flags.output_format == "csv" else None
        for part, targets in parts.items():
            if cells:
                lines = csv_lines(made, targets, cells, max_history=flags.max_history)
                stack.enter_context(whole_file(paths[part])).writelines(lines)
            else:
                write_sequences(stack.enter_context(whole_path(paths[part])), made, targets, max_history=flags.max_history)
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
        f"{len(made.users):,}",
        f"{len(made.users):,}",
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
    """Interactions and items -> `.item.json`; with --index, the training files and the info file."""
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
        help="second run: write the training files with the SIDs of this index",
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
        "--output_format",
        choices=settings.FORMATS,
        help="of train, valid and test: csv, or parquet: the same rows as user sequences, a hundredth of the size (csv)",
    )
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
    if flags.output_format == "parquet" and flags.max_history > LONGEST_HISTORY:
        raise InputError(
            f"--max_history {flags.max_history}: sft.py reads at most {LONGEST_HISTORY:,} items of a history from Parquet; "
            "give that or less, or --output_format csv"
        )
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
    interactions = with_texts(interactions)
    if items or not numbered:
        check_ids_meet(interactions, interactions.rows.item.cat.categories, items, items_file=flags.items)
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
    write_training_files(flags, rows, published, items=items if numbered else {}, kept_settings=kept_settings)


if __name__ == "__main__":
    main()
