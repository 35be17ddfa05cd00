"""Interactions in one file or in several: a folder of parts, as Spark writes them, a glob, or names with commas between.

    parts_of(Path("X.train.csv"))          -> [X.train.csv]
    parts_of(Path("data/part-*.parquet"))  -> [data/part-0.parquet, data/part-1.parquet]    by name
    parts_of(Path("X.train.parquet"))      -> where that is a folder, its .csv and .parquet files, by name
    parts_of(Path("new.csv,old.csv"))      -> [new.csv, old.csv]    in the order given

What begins with "_" or "." is no part: _SUCCESS, .part-0.parquet.crc.
"""

from __future__ import annotations

import glob
from pathlib import Path

from sid_sft.files import LONGEST_PATH, InputError, content_hash, cut, file_hash

KINDS = (".csv", ".parquet")


def parts_of(source: Path) -> list[Path]:
    """The files of a source; InputError where there is none, or where one is named twice."""
    found = found_at(str(source))
    if len(set(found)) < len(found):
        twice = next(path for number, path in enumerate(found) if path in found[:number])
        raise InputError(f"{named(source)}: has {named(twice)} twice")
    return found


def found_at(text: str) -> list[Path]:
    path = Path(text)
    if path.is_file():
        return [path]
    if path.is_dir():
        parts = [part for part in path.rglob("*") if part.suffix.lower() in KINDS and is_part(part.relative_to(path))]
        if not (parts := sorted(part for part in parts if part.is_file())):
            raise InputError(f"{named(path)}: the folder has no file that ends in {' or '.join(KINDS)}")
        return parts
    if "," in text:
        return [part for name in text.split(",") if name.strip() for part in found_at(name.strip())]
    if not glob.has_magic(text):
        raise InputError(f"{named(path)}: there is no such file")
    matching = sorted(name for name in glob.glob(text, recursive=True) if is_part(Path(name)))
    if not matching:
        raise InputError(f"{named(path)}: no file matches")
    return [part for name in matching for part in found_at(name)]


def is_part(path: Path) -> bool:
    """Whether no folder of a path, nor the file itself, is one that a job keeps for itself."""
    return not any(name.startswith(("_", ".")) and name not in (".", "..") for name in path.parts)


def named(path: Path) -> str:
    return cut(str(path), LONGEST_PATH)


def source_name(source: Path) -> str:
    """'X.train.csv', or of several files 'part-0.parquet and 11 more'."""
    first, *others = parts_of(source)
    return f"{first.name} and {len(others)} more" if others else first.name


def source_size(source: Path) -> int:
    """The bytes of all files."""
    return sum(part.stat().st_size for part in parts_of(source))


def source_hash(source: Path) -> str:
    """A hash that differs where the content of any file does, or their order."""
    hashes = [file_hash(part) for part in parts_of(source)]
    return content_hash(hashes) if len(hashes) > 1 else hashes[0]
