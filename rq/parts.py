"""A table in one file or in several: a folder of parts, as Spark writes them, a glob, or names with commas between.

    parts_of(Path("orders.csv"))                -> [orders.csv]
    parts_of(Path("events/part-*.parquet"))     -> [events/part-0.parquet, events/part-1.parquet]    by name
    parts_of(Path("events"))                    -> where that is a folder, the tables in it, by name
    parts_of(Path("new.csv,old.csv"))           -> [new.csv, old.csv]    in the order given

What begins with "_" or "." is no part: _SUCCESS, .part-0.parquet.crc. Folders such as day=2026-01-31 hold a column, day.
"""

import glob
from pathlib import Path

from rq.files import InputError

KINDS = ("csv", "tsv", "txt", "dat", "data", "inter", "item", "json", "jsonl", "parquet")  # endings of tables in a folder


def parts_of(source: Path) -> list[Path]:
    """The files of a source; InputError where there is none, or where one is named twice."""
    found = _found_at(str(source))
    if len(set(found)) < len(found):
        twice = next(path for number, path in enumerate(found) if path in found[:number])
        raise InputError(f"{source}: has {twice} twice")
    return found


def _found_at(text: str) -> list[Path]:
    path = Path(text)
    if path.is_dir():
        inner = [part for part in path.rglob("*") if _is_part(part.relative_to(path)) and _kind(part) in KINDS]
        if not (parts := sorted(part for part in inner if part.is_file())):
            raise InputError(
                f"{path}: a folder without a table; expected files that end in .csv, .parquet, .jsonl and so on"
            )
        return parts
    if path.exists():
        return [path]
    if "," in text:
        return [part for name in text.split(",") if name.strip() for part in _found_at(name.strip())]
    if not text or not glob.has_magic(text):
        raise InputError(f"{path if text else 'nothing'}: no such file")
    matching = sorted(name for name in glob.glob(text, recursive=True) if _is_part(Path(name)))
    if not matching:
        raise InputError(f"{path}: no file matches")
    return [part for name in matching for part in _found_at(name)]


def _kind(path: Path) -> str:
    return path.name.lower().removesuffix(".gz").rpartition(".")[2]


def _is_part(path: Path) -> bool:
    return not any(name.startswith(("_", ".")) and name not in (".", "..") for name in path.parts)


def columns_of_folders(path: Path) -> dict[str, str]:
    """What the folders of a part say of all its rows: events/day=2026-01-31/part-0.parquet -> {"day": "2026-01-31"}."""
    pairs = (name.partition("=") for name in path.parent.parts if "=" in name)
    return {column: value for column, _, value in pairs if column}
