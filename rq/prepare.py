"""`python -m rq.prepare`: interactions and item metadata ->
`.item.json`, and once there is an index, the training files.

The same command is run twice: first without --index, for the items that rq.text2emb and a quantizer make an
index of; then with --index added, for the train / valid / test files and the info file, whose SIDs come from it.
Files whose items have the numbers of an index already, X.inter.json and X.index.json, need the second run alone.
"""

import argparse
import contextlib
import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from rq import command_line, settings
from rq.catalogue import read_items
from rq.command_line import log
from rq.files import InputError, check_output, whole_file, whole_path
from rq.formats import FIELD_NAMES
from rq.hub import PREFIX as HUB
from rq.hub import hub_address
from rq.index_file import read_sids
from rq.interaction_log import InteractionLog, Kept, opened_base
from rq.metadata import ITEM_FIELDS, OPTIONAL_FIELDS, catalogue
from rq.numbering import (
    Published,
    check_same_items,
    items_to_number,
    number_items,
    numbered_items,
    published_items,
    read_numbers,
)
from rq.parts import parts_of
from rq.sequences import read_interactions
from rq.tables import read_table
from rq.training_files import LONGEST_HISTORY, PARTS, csv_cells, csv_lines, write_parts
from rq.windows import histories, split_windows

MEMORY_GB = 4.0
NO_ITEMS = "--items is missing; only an .inter.json with the --index of its item numbers does without it"


def check_no_input(flags: argparse.Namespace, outputs: Iterable[Path]) -> None:
    """InputError where a file to write is one that was read."""
    tables = [path for path in (flags.interactions, flags.items) if path and not hub_address(path)]
    inputs = [part.resolve() for path in tables for part in parts_of(path)]
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
    flags: argparse.Namespace, kept: Kept, published: Published, *, items: Mapping[str, dict], kept_settings: str
) -> None:
    """The rows of each part and the info file, and `.item.json` where `items` are given."""
    numbers, titles, sids = published
    if unused := len(titles) - len(kept.bought()):
        log.info("%s of %s items are in no row that is kept", f"{unused:,}", f"{len(titles):,}")
    made = histories(kept, numbers)
    del kept
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
                write_parts(stack.enter_context(whole_path(paths[part])), made, targets, max_history=flags.max_history)
        stack.enter_context(whole_file(settings.settings_file(flags.output_dir, flags.name))).write(kept_settings)
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
    """A flag type: a file to read, several (parts.py), or an address of the Hub."""
    return Path(text) if text.startswith(HUB) else command_line.existing_files(text)


@command_line.command("prepare")
def main(argv: list[str] | None = None) -> None:
    """Interactions and items -> `.item.json`; with --index, the training files and the info file."""
    parser = command_line.parser("prepare", __doc__, shared=("overwrite",))
    add = parser.add_argument
    for flag, text in {
        "interactions": "user, item, timestamp: CSV, Parquet, JSON, RecBole .inter, MovieLens .dat, P5 .txt, "
        "hf://datasets/..; several files as a folder, a glob such as 'events/*.parquet', or names with commas between",
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
        help="of train, valid and test: csv, or parquet: the same rows as user sequences, under a fiftieth of the size, "
        "and a folder of parts where there are many (csv)",
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
    add(
        "--memory_gb",
        type=command_line.at_least(0.05, kind=float),
        default=MEMORY_GB,
        help="what joining and sorting the interactions may take of memory; the rest goes to a folder beside the outputs, "
        f"which is removed at the end ({MEMORY_GB:g})",
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
        path = flags.output_dir / f"{flags.name}.{ending}"
        check_output(path, folder_of=[part.name for part in path.glob(PARTS)] if ending.endswith(".parquet") else ())
    ids_file = flags.output_dir / f"{flags.name}.item_ids.csv"
    reading = {
        "names": {field: getattr(flags, f"{field}_column") for field in FIELD_NAMES},
        "sep": flags.sep,
        "encoding": flags.encoding,
    }
    table = read_interactions(flags.interactions, **reading)
    items: dict[str, dict[str, str]] = {}
    with opened_base(flags.output_dir, flags.name, memory_gb=flags.memory_gb) as base:
        interactions = InteractionLog(table, base)
        why_not = interactions.why_not_numbered(ids_file)
        numbered = bool(flags.index) and not why_not
        if not flags.items and not numbered:
            raise InputError(f"{NO_ITEMS}: {why_not}")
        if not table.has_times and flags.index and flags.split == "global":
            raise InputError(f"{flags.interactions} has each user's order, but no times; give --split leave_one_out")
        if flags.items:
            items = catalogue(read_table(flags.items, ITEM_FIELDS, optional=OPTIONAL_FIELDS, **reading))
        if numbered:
            index = read_sids(flags.index)
            interactions.check_in_index(index, index_file=flags.index)
        if items or not numbered:
            interactions.check_ids_meet(items, items_file=flags.items)
        kept = interactions.filtered(known_items=None if numbered else items, k_core=flags.k_core, dayfirst=flags.dayfirst)
    kept_settings = settings.to_keep(flags, remembered, rows_kept=len(kept))
    if not flags.index:
        bought = kept.bought()
        to_number = items_to_number(bought, [] if flags.bought_only else items, in_order=not table.has_times)
        write_items(flags, to_number, items, bought=len(bought), kept_settings=kept_settings)
        return
    settings.log_other_rows(flags, remembered, rows_kept=len(kept))
    published = numbered_items(flags, items, index) if numbered else published_items(flags, kept.bought())
    write_training_files(flags, kept, published, items=items if numbered else {}, kept_settings=kept_settings)


if __name__ == "__main__":
    main()
