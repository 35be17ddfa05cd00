"""`python -m rq.prepare`: interactions and item metadata ->
`.item.json`, and once there is an index, the training CSVs.

The same command is run twice: first without --index, for the items that rq.text2emb and a quantizer make an
index of; then with --index added, for the train / valid / test CSVs and the info file, whose SIDs come from it.
"""

import argparse
import ast
import contextlib
import csv
import gzip
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rq import command_line
from rq.catalogue import plain, read_items
from rq.command_line import BadInput, log
from rq.generate_indices import read_index, sid_tokens
from rq.whole_files import whole_file

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
# What a field may be called in a user's own table, in Amazon Reviews 2014/2018 and in 2023; the first one present is
# read.
FIELD_NAMES = {
    "user": ("user_id", "user", "reviewerID", "userId"),
    "item": ("item_id", "item", "parent_asin", "asin", "itemId"),
    "time": ("timestamp", "time", "unixReviewTime", "date"),
    "title": ("title", "item_title", "name"),
    "description": ("description",),
    "brand": ("brand", "store"),
    "categories": ("categories", "category", "main_category"),
}
VALID_SHARE, TEST_SHARE = 0.1, 0.1


@dataclass(frozen=True)
class Window:
    """One row of a training CSV: up to --max_history items, oldest first, and the item that followed."""

    user: str
    history: tuple[int, ...]
    target: int
    time: float


def read_table(
    path: Path, fields: Sequence[str], *, names: dict[str, str | None], optional: Sequence[str] = ()
) -> "pd.DataFrame":
    """The columns `fields` of a CSV, Parquet or JSON-lines file
    (.gz too), renamed to the field; absent optional ones are ''.
    """
    import pandas as pd

    kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1].lower()
    try:
        if kind in ("csv", "tsv"):
            separator = "," if kind == "csv" else "\t"
            raw = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        elif kind == "parquet":
            raw = pd.read_parquet(path)
        elif kind in ("json", "jsonl"):
            raw = pd.DataFrame.from_records(list(_json_lines(path, _wanted(fields, names))))
        else:
            raise BadInput(f"{path}: a .{kind} file; expected .csv, .tsv, .parquet, .json or .jsonl (one object a line)")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: {error}") from error
    columns = {}
    for field in fields:
        candidates = (names[field],) if names.get(field) else FIELD_NAMES[field]
        found = next((name for name in candidates if name in raw.columns), None)
        if found is None and field not in optional:
            shown = ", ".join(map(str, raw.columns[:12])) or "no column"
            raise BadInput(
                f"{path}: no column for the {field} among {shown}; "
                f"expected {' or '.join(candidates)}, or name it by --{field}_column"
            )
        columns[field] = raw[found] if found else ""
    told = ", ".join(f"{field} from {column.name}" for field, column in columns.items() if isinstance(column, pd.Series))
    log.info("%s: %s rows, %s", path, f"{len(raw):,}", told)
    return pd.DataFrame(columns, index=raw.index)


def _wanted(fields: Sequence[str], names: dict[str, str | None]) -> set[str]:
    return {name for field in fields for name in ((names[field],) if names.get(field) else FIELD_NAMES[field])}


def _json_lines(path: Path, wanted: set[str]) -> Iterator[dict]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = _python_literal(line)  # the 2014 metadata are Python dicts
            if not isinstance(record, dict):
                raise BadInput(f"{path}:{number}: expected one JSON object a line, came {line.strip()[:60]!r}")
            yield {name: value for name, value in record.items() if name in wanted}


def _python_literal(line: str) -> object:
    try:
        return ast.literal_eval(line.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def seconds(times: "pd.Series") -> "pd.Series":
    """Timestamps as float seconds: numbers as they are, dates in UTC, NaN for what is neither."""
    import pandas as pd

    numeric = pd.to_numeric(times, errors="coerce").astype("float64")
    if numeric.notna().all():
        return numeric
    dates = pd.to_datetime(times.where(numeric.isna()), errors="coerce", utc=True, format="mixed")
    from_dates = (dates - pd.Timestamp(0, tz="UTC")).dt.total_seconds()
    return numeric.where(numeric.notna(), from_dates)


def catalogue(metadata: "pd.DataFrame") -> dict[str, dict[str, str]]:
    """{raw item id: title, description, brand, categories} of
    the items with a title; the first row of an item counts.
    """
    items: dict[str, dict[str, str]] = {}
    for row in metadata.itertuples(index=False):
        raw_id, title = _text(row.item), plain(_text(row.title))
        if raw_id and title and raw_id not in items:
            description = row.description if isinstance(row.description, str) else _list_text(row.description)
            items[raw_id] = {
                "title": title,
                "description": description,
                "brand": plain(_text(row.brand)),
                "categories": ", ".join(_flat(row.categories)),
            }
    return items


def _text(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value)


def _flat(value: object) -> list[str]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        return [text] if (text := plain(_text(value))) else []
    return [text for part in value for text in _flat(part)]


def _list_text(value: object) -> str:
    """The repr of a list of strings, as public `.item.json` files hold descriptions; '' for nothing."""
    return repr(parts) if (parts := _flat(value)) else ""


def filter_interactions(rows: "pd.DataFrame", *, known_items: Iterable[str], k_core: int) -> "pd.DataFrame":
    """Rows that can be used, ordered by time; what is dropped is
    logged by reason. The k-core is iterated to its fixed point.
    """
    import pandas as pd

    dropped: dict[str, int] = {}

    def keep(reason: str, good: "pd.Series") -> None:
        nonlocal rows
        dropped[reason] = dropped.get(reason, 0) + int((~good).sum())
        rows = rows[good]

    read = len(rows)
    rows = rows.assign(user=rows.user.map(_text), item=rows.item.map(_text), time=seconds(rows.time))
    keep("no user or item id", (rows.user != "") & (rows.item != ""))
    keep("unreadable timestamp", rows.time.notna())
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
    if rows.empty:
        raise BadInput("no interaction is left; check the columns read, or give a smaller --k_core")
    return rows.sort_values("time", kind="stable")


def windows(rows: "pd.DataFrame", number_of: dict[str, int], *, max_history: int) -> list[list[Window]]:
    """For each user, in order of time, one window for every row but the first."""
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


def csv_row(window: Window, titles: Sequence[str], sids: Sequence[str]) -> list[object]:
    """The cells of a window in the order of CSV_COLUMNS; the three history lists come from one list of ids."""
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


def number_items(rows: "pd.DataFrame", ids_file: Path, *, renumber: bool, may_grow: bool) -> dict[str, int]:
    """{raw id: number} of all items; numbers given in an earlier
    run stay, new items follow in the order they first appear.
    """
    numbers: dict[str, int] = {}
    if ids_file.exists() and not renumber:
        with open(ids_file, encoding="utf-8", newline="") as file:
            numbers = {row["raw_id"]: int(row["item_id"]) for row in csv.DictReader(file)}
    known = len(numbers)
    for raw_id in rows.item.drop_duplicates():
        numbers.setdefault(raw_id, len(numbers))
    if known and len(numbers) > known and not may_grow:
        raise BadInput(
            f"{ids_file}: {len(numbers) - known:,} items are not among its {known:,}; "
            "run once with --append to add them (published ids stay), then rq.text2emb and "
            "rq.generate_indices --append; or --overwrite to number anew"
        )
    return numbers


def write_items(flags: argparse.Namespace, rows: "pd.DataFrame", items: dict[str, dict[str, str]]) -> None:
    """First run: `.item.json` and the table of ids. An item already there keeps its number and its text."""
    item_file, ids_file = flags.output_dir / f"{flags.name}.item.json", flags.output_dir / f"{flags.name}.item_ids.csv"
    if item_file.exists() and not (flags.append or flags.overwrite):
        raise BadInput(
            f"{item_file} exists; add --index for the CSVs, --append for new items, or --overwrite to number items anew"
        )
    numbers = number_items(rows, ids_file, renumber=not (flags.append and item_file.exists()), may_grow=True)
    published = read_items(item_file) if flags.append and item_file.exists() else []
    with whole_file(item_file) as file, whole_file(ids_file) as ids:
        writer = csv.writer(ids, lineterminator="\n")
        writer.writerow(("raw_id", "item_id"))
        for raw_id, number in numbers.items():
            item = published[number] if number < len(published) else items[raw_id]
            file.write(f'{"," if number else "{"}"{number}": {json.dumps(item, ensure_ascii=False)}\n')
            writer.writerow((raw_id, number))
        file.write("}\n")
    log.info("wrote %s: %s items, %s of them new", item_file, f"{len(numbers):,}", f"{len(numbers) - len(published):,}")
    log.info("next: rq.text2emb, a quantizer, then this command again with --index")


def write_csvs(flags: argparse.Namespace, rows: "pd.DataFrame") -> None:
    """Second run: the CSVs and the info file, with the SIDs of --index."""
    item_file, ids_file = flags.output_dir / f"{flags.name}.item.json", flags.output_dir / f"{flags.name}.item_ids.csv"
    if not item_file.exists() or not ids_file.exists():
        raise BadInput(f"{item_file} or {ids_file} is missing; run this command without --index first")
    titles = [plain(item.get("title")) for item in read_items(item_file)]
    index = read_index(flags.index)
    if list(index) != list(range(len(titles))):
        missing = next((item for item in range(len(titles)) if item not in index), None)
        told = f"item {missing} has no SID" if missing is not None else f"it has {len(index):,} items"
        raise BadInput(
            f"{flags.index}: {told}, {item_file} has {len(titles):,} items; bring the index up with "
            f"rq.generate_indices --append"
        )
    sids = ["".join(sid_tokens(codes)) for codes in index.values()]
    numbers = number_items(rows, ids_file, renumber=False, may_grow=False)
    by_user = windows(rows, numbers, max_history=flags.max_history)
    parts = split_windows(by_user, split=flags.split)
    targets = {part: flags.output_dir / f"{flags.name}.{part}.csv" for part in parts}
    info_file = flags.output_dir / f"{flags.name}.info.txt"
    for path in (*targets.values(), info_file):
        if path.exists() and not flags.overwrite:
            raise BadInput(f"{path} exists; give --overwrite to replace it, or another --output_dir")
    with contextlib.ExitStack() as stack:
        for part, part_windows in parts.items():
            writer = csv.writer(stack.enter_context(whole_file(targets[part])), lineterminator="\n")
            writer.writerow(CSV_COLUMNS)
            writer.writerows(csv_row(window, titles, sids) for window in part_windows)
        info = stack.enter_context(whole_file(info_file))
        info.writelines(f"{sid}\t{title}\t{item}\n" for item, (sid, title) in enumerate(zip(sids, titles, strict=True)))
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
        required=True,
        metavar="FILE",
        help="item, title and, where known, description, brand, categories",
    )
    add("--output_dir", type=Path, required=True, metavar="FOLDER", help="where the files go")
    add("--name", required=True, help="what their names begin with: NAME.item.json, NAME.train.csv, ..")
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
    add(
        "--k_core",
        type=command_line.at_least(1),
        default=5,
        help="drop users and items with fewer rows, until none has (5)",
    )
    add(
        "--split",
        choices=("global", "leave_one_out"),
        default="global",
        help="80/10/10 by time of the target, or by user (global)",
    )
    add("--max_history", type=command_line.at_least(1), default=10, help="items of a history at most (10)")
    for field in FIELD_NAMES:
        add(f"--{field}_column", metavar="NAME", help=f"column of the {field} ({', '.join(FIELD_NAMES[field])})")
    flags = parser.parse_args(argv)
    names = {field: getattr(flags, f"{field}_column") for field in FIELD_NAMES}
    if flags.append and flags.index:
        raise BadInput("--append adds items, which have no SID yet; run it without --index first")

    metadata = read_table(
        flags.items,
        ("item", "title", "description", "brand", "categories"),
        names=names,
        optional=("description", "brand", "categories"),
    )
    items = catalogue(metadata)
    interactions = read_table(flags.interactions, ("user", "item", "time"), names=names)
    rows = filter_interactions(interactions, known_items=items, k_core=flags.k_core)
    if flags.index:
        write_csvs(flags, rows)
    else:
        write_items(flags, rows, items)


if __name__ == "__main__":
    main()
