"""Logs in several files and logs that are larger than the memory given: the outputs are those of one file in memory."""

import csv
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
import refusals

from rq import interaction_log, prepare
from rq.files import InputError
from rq.index_file import write_sids
from rq.interaction_log import InteractionLog, opened_base
from rq.parts import columns_of_folders, parts_of
from rq.tables import Table

ENDINGS = ("item.json", "item_ids.csv", "info.txt", "train.csv", "valid.csv", "test.csv")


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """log.csv of 400 rows by 20 users, and items.csv."""
    chance, start = random.Random(3), 1_465_862_400
    rows = [(f"u{chance.randrange(20)}", f"p{chance.randrange(9)}", start + chance.randrange(300)) for _ in range(400)]
    write_csv(tmp_path / "log.csv", ("user_id", "item_id", "timestamp"), rows)
    write_csv(tmp_path / "items.csv", ("item_id", "title"), [(f"p{number}", f"Pan {number}") for number in range(9)])
    return tmp_path


def write_csv(path: Path, header: tuple, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def arguments(shop: Path, source: object, out: str) -> list[str]:
    line = [f"--interactions={source}", f"--items={shop}/items.csv", f"--output_dir={shop / out}", "--name=X", "--k_core=2"]
    return [*line, "--overwrite"]


def outputs(shop: Path, source: object, out: str, *extra: str) -> dict[str, bytes]:
    """Both runs of rq.prepare on a source, and what they wrote."""
    line = [*arguments(shop, source, out), *extra]
    prepare.main(line)
    write_sids(shop / out / "X.index.json", [(number, 0) for number in range(9)])
    prepare.main([*line, f"--index={shop / out}/X.index.json"])
    assert not [path.name for path in (shop / out).iterdir() if path.name.startswith(".")]
    return {ending: (shop / out / f"X.{ending}").read_bytes() for ending in ENDINGS}


def cut(shop: Path, folder: Path, kinds: tuple[str, ...], wanted: tuple[str, ...] = ()) -> None:
    """The rows of log.csv, in order, in one part of each kind."""
    table = pyarrow.csv.read_csv(shop / "log.csv")
    table = table.select(wanted) if wanted else table
    size = -(-len(table) // len(kinds))
    folder.mkdir(parents=True)
    for number, kind in enumerate(kinds):
        part = table.slice(number * size, size)
        write = pyarrow.parquet.write_table if kind == "parquet" else pyarrow.csv.write_csv
        write(part, folder / f"part-{number}.{kind}")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_parts_give_what_one_file_gives(shop, kind):
    expected = outputs(shop, shop / "log.csv", "one")
    cut(shop, shop / "parts", (kind,) * 3)
    (shop / "parts" / "_SUCCESS").touch()
    assert outputs(shop, shop / "parts", "folder") == expected
    assert outputs(shop, shop / "parts" / "part-*", "glob") == expected
    names = ",".join(f"{shop}/parts/part-{number}.{kind}" for number in range(3))
    assert outputs(shop, names, "names") == expected


def test_a_part_without_rows_is_read_and_parts_without_any_are_refused(shop):
    expected = outputs(shop, shop / "log.csv", "one")
    cut(shop, shop / "parts", ("parquet",) * 2)
    empty = pyarrow.parquet.read_table(shop / "parts" / "part-0.parquet").slice(0, 0)
    pyarrow.parquet.write_table(empty, shop / "parts" / "part-00.parquet")
    assert outputs(shop, shop / "parts", "other") == expected
    told = refusals.refusal(prepare.main, *arguments(shop, shop / "parts" / "part-00*", "none"))
    assert told == f"rq.prepare: {shop}/parts/part-00*: no row under the header; expected one row for each record"


def test_a_column_may_be_in_the_names_of_the_folders(shop):
    """As Spark's partitionBy writes it, one folder a day."""
    days = ("2016-06-14", "2016-06-15")
    for number, day in enumerate(days):
        rows = [(f"u{user}", f"p{(user + number) % 3}") for user in range(4)]
        table = pyarrow.table(dict(zip(("user_id", "item_id"), zip(*rows, strict=True), strict=True)))
        (shop / "days" / f"date={day}").mkdir(parents=True)
        pyarrow.parquet.write_table(table, shop / "days" / f"date={day}" / "part-0.parquet")
    assert columns_of_folders(shop / "days" / "date=2016-06-15" / "part-0.parquet")["date"] == "2016-06-15"
    prepare.main(arguments(shop, shop / "days", "out"))
    lines = (shop / "out" / "X.item_ids.csv").read_text().splitlines()
    assert lines[:4] == ["raw_id,item_id", "p0,0", "p1,1", "p2,2"]


REFUSED = {
    "nothing matches": (lambda folder: None, "none-*.csv", "argument --interactions: {}/none-*.csv: no file matches"),
    "a broken part": (
        lambda folder: (folder / "part-1.csv").write_bytes(b"PAR1\xff"),
        "",
        "{}/part-1.csv:1: not UTF-8 text",
    ),
    "a row of too many cells": (
        lambda folder: (folder / "part-1.csv").write_text("user_id,item_id,timestamp\nu,p1,5\nu,p1,5,6\n"),
        "",
        "{}/part-1.csv: Expected 3 fields in line 3, saw 4",
    ),
    "another column": (
        lambda folder: write_csv(folder / "part-1.csv", ("user_id", "item_id", "time"), [("u", "p1", 5)]),
        "",
        "{}/part-1.csv: the time is in the column 'time', in {}/part-0.csv in 'timestamp'; name the columns of all parts",
    ),
    "no column": (
        lambda folder: write_csv(folder / "part-1.csv", ("user_id", "item_id"), [("u", "p1")]),
        "",
        "{}/part-1.csv: no column for the time among user_id, item_id",
    ),
    "another kind of time": (
        lambda folder: pyarrow.parquet.write_table(
            pyarrow.table({"user_id": ["u"], "item_id": ["p1"], "timestamp": [1_465_862_400]}), folder / "part-1.parquet"
        ),
        "",
        "{}/part-1.parquet: row 1: the column 'timestamp' holds whole numbers here, and text above; write it in all parts",
    ),
    "an unreadable time": (
        lambda folder: write_csv(folder / "part-1.csv", ("user_id", "item_id", "timestamp"), [("u", "p1", "2016-01-31")]),
        "",
        "holds two kinds of timestamps: {}/part-0.csv:2: '14658",
    ),
    "an id that is too long": (
        lambda folder: write_csv(folder / "part-1.csv", ("user_id", "item_id", "timestamp"), [("u" * 10_001, "p1", 5)]),
        "",
        "{}/part-1.csv:2: user 'uuu",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_fault_names_the_part(shop, name):
    spoil, source, told = REFUSED[name]
    cut(shop, shop / "parts", ("csv",))
    spoil(shop / "parts")
    line = refusals.refusal(prepare.main, *arguments(shop, shop / "parts" / source, "out"))
    assert told.replace("{}", str(shop / "parts")) in line
    assert not (shop / "out").exists()
    assert not list(shop.glob(".*"))


def test_a_source_is_refused_that_has_no_table_or_one_twice(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").touch()
    for source, told in (
        ("empty", "empty: a folder without a table"),
        ("none.csv", "none.csv: no such file"),
        ("a.csv,a.csv", "a.csv twice"),
    ):
        source = ",".join(str(tmp_path / name) for name in source.split(","))
        assert told in str(pytest.raises(InputError, parts_of, Path(source)).value)


# ---------------------------------------------------------------------------------------------- larger than memory


def wide_table(rows: int) -> Table:
    """Rows of which each has a user of its own, with a name of 200 characters."""
    import pandas as pd

    def chunks():
        for at in range(0, rows, 10_000):
            numbers = range(at, at + 10_000)
            names = [f"{number * 7919 % rows:0200}" for number in numbers]
            yield pd.DataFrame({"user": names, "item": "p", "time": [rows - number for number in numbers]}, index=numbers)

    return Table("log", chunks(), {"time": "t"}, str)


def test_what_does_not_fit_into_memory_goes_to_a_folder_that_is_removed(tmp_path):
    rows = 400_000
    with opened_base(tmp_path / "out", "X", memory_gb=0.1) as base:
        (folder,) = [*tmp_path.glob(".X.*.spill")] or [None]
        assert folder is None  # there is none until it is needed
        log = InteractionLog(wide_table(rows), base)
        (folder,) = tmp_path.glob(".X.*.spill")
        assert sum(path.stat().st_size for path in folder.iterdir()) > 10_000_000
        kept = log.filtered(known_items=None, k_core=1, dayfirst=None)
    assert not list(tmp_path.iterdir())
    assert len(kept) == rows
    assert kept.users[int(kept.user_N[0])].as_py() == f"{(rows - 1) * 7919 % rows:0200}"  # the last row is the oldest
    assert kept.time_N.tolist() == list(range(rows))


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_while_the_base_computes_ends_in_one_line(shop, monkeypatch, capsys, stop):
    class Endless:
        def __init__(self, table: object, base: Any) -> None:
            threading.Timer(0.2, os.kill, (os.getpid(), stop)).start()
            base.execute("SELECT sum(hash(range)) FROM range(1000000000000000)")

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(prepare, "InteractionLog", Endless)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
    try:
        with pytest.raises(SystemExit) as ended:
            prepare.main(arguments(shop, shop / "log.csv", "out"))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended.value.code == "rq.prepare: interrupted; unfinished outputs were removed"
    assert not (shop / "out").exists()
    assert not list(shop.glob(".*"))


def test_the_folder_of_a_run_that_was_killed_is_removed_and_that_of_a_running_one_is_not(tmp_path, monkeypatch):
    for process in ("4711", "4712", "no number"):
        (tmp_path / f".X.{process}.spill").mkdir()
    (tmp_path / ".Y.4711.spill").mkdir()
    monkeypatch.setattr(interaction_log, "_is_running", lambda process: process == "4712")
    with opened_base(tmp_path, "X", memory_gb=1):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".X.4712.spill", ".Y.4711.spill"]


def test_a_memory_that_does_not_suffice_is_one_line_and_nothing_is_left(shop, monkeypatch):
    class Full:
        def __init__(self, *_: object) -> None:
            import duckdb

            raise duckdb.OutOfMemoryException("failed to offload data block:\nno space left")

    monkeypatch.setattr(prepare, "InteractionLog", Full)
    told = refusals.refusal(prepare.main, *arguments(shop, shop / "log.csv", "out"), "--memory_gb=0.5")
    assert "failed to offload data block: no space left; free space there, or give more --memory_gb than 0.5" in told
    assert not (shop / "out").exists()
