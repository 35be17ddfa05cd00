"""Interactions in several files: a folder of parts, a glob, names with commas; the same rows as in one file."""

import json
import logging
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import toy

import evaluate
import sft
from data import build_dataset
from sid_sft.catalogue import read_catalogue
from sid_sft.dataset_cache import Source
from sid_sft.files import InputError, file_hash
from sid_sft.interactions import read_rows
from sid_sft.parts import parts_of, source_hash, source_name
from sid_sft.tasks import read_prompts


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Parts as a job leaves them, with what it keeps for itself."""
    names = ["out/part-1.csv", "out/part-0.csv", "out/day=2/b.parquet", "out/_SUCCESS", "out/.part-0.csv.crc"]
    touch(*(tmp_path / name for name in (*names, "out/_temporary/part-9.csv", "out/notes.txt", "a,b.csv", "a", "x[1].csv")))
    return tmp_path


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("out", ["out/day=2/b.parquet", "out/part-0.csv", "out/part-1.csv"]),
        ("out/part-*.csv", ["out/part-0.csv", "out/part-1.csv"]),
        ("out/*", ["out/day=2/b.parquet", "out/notes.txt", "out/part-0.csv", "out/part-1.csv"]),
        ("out/day=*", ["out/day=2/b.parquet"]),
        ("out/**/*.parquet", ["out/day=2/b.parquet"]),
        ("out/part-1.csv,out/part-0.csv", ["out/part-1.csv", "out/part-0.csv"]),
        ("out/part-1.csv, out/day=2", ["out/part-1.csv", "out/day=2/b.parquet"]),
        ("out/part-1.csv", ["out/part-1.csv"]),
        ("a,b.csv", ["a,b.csv"]),  # a name that a file has is no list
        ("x[1].csv", ["x[1].csv"]),
        ("out/_SUCCESS", ["out/_SUCCESS"]),
    ],
)
def test_a_source_is_its_files_by_name(folder, monkeypatch, source, expected):
    monkeypatch.chdir(folder)
    assert [path.as_posix() for path in parts_of(Path(source))] == expected


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("out/part-*.parquet", "out/part-*.parquet: no file matches"),
        ("out/_*", "out/_*: no file matches"),
        ("out/none.csv", "out/none.csv: there is no such file"),
        ("out/part-0.csv,none.csv", "none.csv: there is no such file"),
        ("empty", "empty: the folder has no file that ends in .csv or .parquet"),
        ("out/part-0.csv,out/part-*.csv", "out/part-0.csv,out/part-*.csv: has out/part-0.csv twice"),
    ],
)
def test_a_source_without_a_file_is_refused_in_one_line(folder, monkeypatch, source, fault):
    (folder / "empty").mkdir()
    monkeypatch.chdir(folder)
    assert str(pytest.raises(InputError, parts_of, Path(source)).value) == fault


# ---------------------------------------------------------------------------------------------- the rows of parts


@pytest.fixture
def shop_of_parts(tmp_path) -> Path:
    """toy.csv, and its rows again in two CSVs and a Parquet file."""
    toy.write_index(tmp_path)
    toy.write_items(tmp_path)
    toy.write_csv(tmp_path / "toy.csv")
    rows = [toy.csv_row(*history) for history in toy.HISTORIES]
    (tmp_path / "parts").mkdir()
    toy.write_csv(tmp_path / "parts" / "part-0.csv", rows[:2])
    toy.write_csv(tmp_path / "parts" / "part-1.csv", rows[2:3])
    typed = [
        {"user_id": user, "history_item_id": [int(i) for i in history], "item_id": int(item)}
        for user, history, item in toy.HISTORIES[3:]
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(typed), tmp_path / "parts" / "part-2.parquet")
    return tmp_path


def toy_catalogue(folder: Path):
    return read_catalogue(folder / "toy.index.json", folder / "toy.item.json")


def test_parts_have_the_rows_of_one_file(shop_of_parts):
    catalogue = toy_catalogue(shop_of_parts)
    expected = list(read_rows(shop_of_parts / "toy.csv", catalogue))
    assert len(expected) == 5
    assert list(read_rows(shop_of_parts / "parts", catalogue)) == expected
    assert list(read_rows(shop_of_parts / "parts" / "part-*", catalogue)) == expected


def test_a_part_without_rows_is_read_and_parts_without_any_are_refused(shop_of_parts):
    catalogue = toy_catalogue(shop_of_parts)
    expected = list(read_rows(shop_of_parts / "parts", catalogue))
    toy.write_csv(shop_of_parts / "parts" / "part-00.csv", [])
    assert list(read_rows(shop_of_parts / "parts", catalogue)) == expected
    with pytest.raises(InputError, match=r"part-00\*: has no rows"):
        list(read_rows(shop_of_parts / "parts" / "part-00*", catalogue))


def test_faults_and_rows_left_out_name_the_part(shop_of_parts):
    catalogue, notes = toy_catalogue(shop_of_parts), []
    toy.write_csv(shop_of_parts / "parts" / "part-1.csv", [toy.csv_row("bob", "4", "99")])
    rows = list(read_rows(shop_of_parts / "parts", catalogue, notes.append))
    assert len(rows) == 4
    assert notes == ["part-0.csv and 2 more: 1 rows left out: their item is not in the index (5 rows)"]
    with pytest.raises(InputError, match=r"parts: 1 of 5 rows .*\(part-1\.csv, line 2: '99'"):
        list(read_rows(shop_of_parts / "parts", catalogue, max_left_out=0.1))
    (shop_of_parts / "parts" / "part-1.csv").write_text("user,item\n")
    with pytest.raises(InputError, match=r"parts/part-1\.csv: has no column 'user_id'"):
        list(read_rows(shop_of_parts / "parts", catalogue))


def test_the_hash_of_a_source_sees_the_content_and_the_order_of_every_part(shop_of_parts):
    one, parts = shop_of_parts / "toy.csv", shop_of_parts / "parts"
    assert source_hash(one) == file_hash(one)  # as checkpoints of one file have it
    assert source_name(parts) == "part-0.csv and 2 more"
    hashes = [source_hash(parts), source_hash(Path(f"{parts}/part-1.csv,{parts}/part-0.csv,{parts}/part-2.parquet"))]
    content = (parts / "part-1.csv").read_bytes()
    (parts / "part-1.csv").write_bytes(content.replace(b"bob", b"rob"))
    hashes.append(source_hash(parts))
    (parts / "part-1.csv").write_bytes(content)
    assert source_hash(parts) == hashes[0]
    (parts / "part-3.csv").write_bytes(content)
    hashes.append(source_hash(parts))
    assert len(set(hashes)) == 4


def test_a_dataset_of_parts_has_the_examples_of_one_file_and_is_built_anew_when_a_part_changes(shop_of_parts):
    def build(source: Path) -> list:
        dataset = build_dataset(
            Source(source),
            ["sid_sid"],
            catalogue=toy_catalogue(shop_of_parts),
            prompts=read_prompts(None, "Toys"),
            tokenizer=toy.byte_level(),
            cutoff_len=512,
            cache_dir=shop_of_parts / "cache",
        )
        return dataset["input_ids"][:]

    expected = build(shop_of_parts / "toy.csv")
    assert build(shop_of_parts / "parts") == expected
    toy.write_csv(shop_of_parts / "parts" / "part-1.csv", [toy.csv_row("bob", "4", "1")])
    assert build(shop_of_parts / "parts") != expected


# ---------------------------------------------------------------------------------------------- the commands


def cut_in_two(path: Path, folder: Path) -> Path:
    """A glob for the rows of a CSV in two files."""
    header, *lines = path.read_text().splitlines(keepends=True)
    folder.mkdir()
    for number, some in enumerate((lines[: len(lines) // 2], lines[len(lines) // 2 :])):
        (folder / f"part-{number}.csv").write_text(header + "".join(some))
    return folder / "part-*.csv"


def test_a_run_on_parts_is_the_run_on_one_file_and_a_changed_part_stops_its_resuming(flags, shop, tmp_path, caplog):
    caplog.set_level(logging.INFO, "sft")
    assert sft.main(flags(max_steps=2)) == 0, caplog.text
    losses = [entry for entry in state(tmp_path)["log_history"] if "loss" in entry]
    train, valid = (cut_in_two(shop / f"shop.{part}.csv", tmp_path / part) for part in ("train", "valid"))
    parts = {"train_file": train, "eval_file": valid}
    assert sft.main(flags(max_steps=2, **parts)) == 0, caplog.text
    again = [entry for entry in state(tmp_path)["log_history"] if "loss" in entry]
    assert [entry["loss"] for entry in again] == [entry["loss"] for entry in losses]
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| --train_file | part-0.csv and 1 more |" in report
    (tmp_path / "train" / "part-1.csv").write_text((tmp_path / "train" / "part-0.csv").read_text())
    caplog.clear()
    assert sft.main(flags(max_steps=4, resume_from_checkpoint=True, **parts)) == 2
    assert "train_file has other content" in caplog.records[-1].message


def state(folder: Path) -> dict:
    return json.loads((folder / "run" / "trainer_state.json").read_text())


@pytest.mark.parametrize("flag", ["train_file", "eval_file"])
def test_a_glob_that_matches_nothing_is_one_line(flags, tmp_path, caplog, flag):
    caplog.set_level(logging.ERROR, "sft")
    assert sft.main(flags(**{flag: tmp_path / "part-*.csv"})) == 2
    (record,) = caplog.records
    assert record.message == f"sft.py: --{flag} {tmp_path}/part-*.csv: no file matches"


def test_a_test_file_that_matches_nothing_is_one_line(base, shop, tmp_path, caplog):
    caplog.set_level(logging.ERROR, "sft")
    index = shop / "shop.index.json"
    asked = ["--base_model", str(base), "--sid_index_path", str(index), "--test_file", str(tmp_path / "*.parquet")]
    assert evaluate.main(asked) == 2
    (record,) = caplog.records
    assert record.message == f"evaluate.py: --test_file {tmp_path}/*.parquet: no file matches"
