"""The rows that rq.prepare writes, as CSV and as Parquet, and what sft.py reads of them."""

import csv
import io
import json
import random
from pathlib import Path

import pandas as pd
import pyarrow.parquet
import pytest
import refusals

from rq import prepare, training_files
from rq.index_file import read_sids, sid_tokens, write_sids
from rq.interaction_log import texts_of
from rq.training_files import CSV_COLUMNS
from sid_sft.catalogue import read_catalogue
from sid_sft.files import InputError
from sid_sft.interactions import read_rows

PARTS = ("train", "valid", "test")
TITLES = ["Pan", 'Saw, 10" "fine"', "It's", "a, b", '"Q"', "Tab", "5' x 3\"", "漢字", "[x]", "plain title", "x\\y", "€"]
Log = list[tuple[str, str, int]]


def shop_log() -> Log:
    """40 users; some moments and items are the same, some users have one row, one has many."""
    chance = random.Random(0)
    lengths = [1, 2, 3, 60, *(chance.randint(1, 15) for _ in range(36))]
    rows = [
        (f"u{user}", f"p{chance.randrange(12)}", chance.randrange(300)) for user, n in enumerate(lengths) for _ in range(n)
    ]
    chance.shuffle(rows)
    return rows


LOGS: dict[str, Log] = {
    "a shop": shop_log(),
    "one moment": [(user, f"p{item}", 7) for item in range(5) for user in ("b", "a", "c")],
    "one item again and again": [("b", "p1", 2 * at) for at in range(12)] + [("a", "p1", 2 * at + 1) for at in range(12)],
    "users with quotes, commas and line ends": [
        (user, f"p{item}", at) for user in ('a"b', "c,d", "e\nf", " g ") for at, item in enumerate((2, 1, 3, 1, 0))
    ],
    "users of one row but one": [("a", "p0", 0), ("b", "p1", 1), ("b", "p2", 2), ("c", "p3", 3)],
}


def run(folder: Path, log: Log, *extra: str, titles: list[str] = TITLES) -> None:
    """The files of a log in `folder`, items numbered in the order of the titles."""
    folder.mkdir(exist_ok=True)
    tables = {"o": (("user_id", "item_id", "timestamp"), log)}
    tables["p"] = (("item_id", "title"), [(f"p{number}", title) for number, title in enumerate(titles)])
    for name, (header, rows) in tables.items():
        with open(folder / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    prepare.main([*(line := arguments(folder)), "--overwrite"])
    write_sids(folder / "X.index.json", [(number, number % 3) for number in range(len(titles))])
    prepare.main([*line, "--index", str(folder / "X.index.json"), *extra])


def arguments(folder: Path) -> list[str]:
    return f"--interactions={folder}/o.csv --items={folder}/p.csv --output_dir={folder} --name=X --k_core=1".split()


def written_out(folder: Path, log: Log, *, split: str, max_history: int) -> dict[str, str]:
    """The CSVs by their definition, one window after the other, with csv.writer."""
    seen = dict.fromkeys(log)
    by_time = sorted(((user.strip(), item, time) for user, item, time in seen), key=lambda row: row[2])
    with open(folder / "X.item_ids.csv", newline="") as file:
        number = {row["raw_id"]: int(row["item_id"]) for row in csv.DictReader(file)}
    titles = [item["title"] for item in json.loads((folder / "X.item.json").read_text()).values()]
    sids = ["".join(sid_tokens(codes)) for codes in read_sids(folder / "X.index.json").values()]
    users: dict[str, list[tuple[int, int]]] = {}
    for user, item, time in by_time:
        users.setdefault(user, []).append((number[item], time))
    windows = {
        user: [(user, [i for i, _ in items[:at]][-max_history:], *items[at]) for at in range(1, len(items))]
        for user, items in users.items()
    }
    parts: dict[str, list] = {part: [] for part in PARTS}
    if split == "global":
        ordered = sorted((window for some in windows.values() for window in some), key=lambda window: window[3])
        tenth = round(len(ordered) / 10)
        first_valid, first_test = len(ordered) - 2 * tenth, len(ordered) - tenth
        parts = {"train": ordered[:first_valid], "valid": ordered[first_valid:first_test], "test": ordered[first_test:]}
    else:
        for some in windows.values():
            kept_back = len(some) > 1
            parts["train"] += some[:-2] if kept_back else some
            parts["valid"] += some[-2:-1] if kept_back else []
            parts["test"] += some[-1:] if kept_back else []
    texts = {}
    for part, some in parts.items():
        writer = csv.writer(file := io.StringIO(), lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for user, history, item, _ in some:
            names, codes = [titles[i] for i in history], [sids[i] for i in history]
            writer.writerow([user, names, titles[item], history, item, codes, sids[item]])
        texts[part] = file.getvalue()
    return texts


def rows_of(folder: Path, ending: str) -> dict[str, object]:
    """The rows of each part as sft.py reads them, or what it says where there are none."""
    catalogue = read_catalogue(folder / "X.index.json", folder / "X.item.json")
    rows: dict[str, object] = {}
    for part in PARTS:
        path = folder / f"X.{part}.{ending}"
        try:
            rows[part] = [(row.user, row.history, row.item) for row in read_rows(path, catalogue, max_left_out=0)]
        except InputError as error:
            rows[part] = str(error).removeprefix(str(path))
    return rows


@pytest.mark.parametrize("max_history", [1, 3, 10])
@pytest.mark.parametrize("split", ["global", "leave_one_out"])
@pytest.mark.parametrize("name", LOGS)
def test_parquet_has_the_rows_of_the_csvs_in_their_order_and_these_are_those_of_the_log(tmp_path, name, split, max_history):
    flags = (f"--split={split}", f"--max_history={max_history}")
    run(tmp_path / "csv", LOGS[name], *flags)
    expected = written_out(tmp_path / "csv", LOGS[name], split=split, max_history=max_history)
    assert {part: (tmp_path / f"csv/X.{part}.csv").read_bytes().decode() for part in PARTS} == expected
    run(tmp_path / "parquet", LOGS[name], *flags, "--output_format=parquet")
    assert not list((tmp_path / "parquet").glob("X.t*.csv"))
    rows = rows_of(tmp_path / "csv", "csv")
    assert rows_of(tmp_path / "parquet", "parquet") == rows
    assert isinstance(rows["train"], list)


def test_a_sequence_holds_every_item_once_and_row_numbers_only_where_they_say_something(tmp_path):
    log = [("a", "p0", 0), ("b", "p1", 1), ("a", "p2", 2), ("b", "p3", 3), ("a", "p4", 4), ("a", "p5", 5)]
    run(tmp_path, log, "--output_format=parquet", "--max_history=2")
    table = pyarrow.parquet.read_table(tmp_path / "X.train.parquet")
    assert {field.name: str(field.type).replace("item:", "element:") for field in table.schema} == {
        "user_id": "string",
        "item_ids": "list<element: int32>",
        "targets": "int32",
        "max_history": "int32",
        "row_numbers": "list<element: int64>",
    }
    assert table.to_pylist() == [
        {"user_id": "a", "item_ids": [0, 2, 4, 5], "targets": 3, "max_history": 2, "row_numbers": [0, 2, 3]},
        {"user_id": "b", "item_ids": [1, 3], "targets": 1, "max_history": 2, "row_numbers": [1]},
    ]
    run(tmp_path, log, "--output_format=parquet", "--max_history=2", "--split=leave_one_out", "--overwrite")
    tables = {part: pyarrow.parquet.read_table(tmp_path / f"X.{part}.parquet").to_pylist() for part in PARTS}
    assert tables == {
        "train": [
            {"user_id": "a", "item_ids": [0, 2], "targets": 1, "max_history": 2},
            {"user_id": "b", "item_ids": [1, 3], "targets": 1, "max_history": 2},
        ],
        "valid": [{"user_id": "a", "item_ids": [0, 2, 4], "targets": 1, "max_history": 2}],
        "test": [{"user_id": "a", "item_ids": [2, 4, 5], "targets": 1, "max_history": 2}],
    }


def test_many_rows_are_a_folder_of_parts_with_the_rows_of_one_file(tmp_path, monkeypatch):
    for split in ("global", "leave_one_out"):
        run(tmp_path / split, LOGS["a shop"], f"--split={split}", "--output_format=parquet")
        expected = rows_of(tmp_path / split, "parquet")
        one_file = (tmp_path / split / "X.train.parquet").read_bytes()
        again = [*arguments(tmp_path / split), f"--index={tmp_path}/{split}/X.index.json", "--overwrite"]
        monkeypatch.setattr(training_files, "ROWS_A_FILE", 37)
        for _ in range(2):  # the folder replaces a file, and then a folder
            prepare.main(again)
            parts = sorted(path.name for path in (tmp_path / split / "X.train.parquet").iterdir())
            assert parts[:2] == ["part-00000.parquet", "part-00001.parquet"]
            assert rows_of(tmp_path / split, "parquet") == expected
        (tmp_path / split / "X.train.parquet" / "notes").touch()
        assert "X.train.parquet holds 'notes', which would be lost" in refusals.refusal(prepare.main, *again)
        (tmp_path / split / "X.train.parquet" / "notes").unlink()
        monkeypatch.undo()
        prepare.main(again)
        assert (tmp_path / split / "X.train.parquet").read_bytes() == one_file
        assert not [path.name for path in (tmp_path / split).iterdir() if path.name.startswith(".")]


def test_numbers_of_an_index_beyond_32_bits_stay_what_they_are(tmp_path):
    items = [5, 2**31, 10**17]
    (tmp_path / "X.inter.json").write_text(json.dumps({"0": items, "1": items[::-1]}))
    (tmp_path / "I.index.json").write_text(json.dumps({str(item): [f"<a_{at}>"] for at, item in enumerate(items)}))
    line = (
        f"--interactions={tmp_path}/X.inter.json --index={tmp_path}/I.index.json --output_dir={tmp_path} --name=X --k_core=1"
    )
    prepare.main([*line.split(), "--split=leave_one_out", "--output_format=parquet"])
    (first, second) = pyarrow.parquet.read_table(tmp_path / "X.test.parquet").to_pylist()
    assert (first["item_ids"], second["item_ids"]) == (items, items[::-1])


def test_the_format_is_remembered_and_refused_where_it_cannot_hold_the_histories(tmp_path):
    run(tmp_path, LOGS["a shop"], "--output_format=parquet")
    again = [*arguments(tmp_path), f"--index={tmp_path}/X.index.json"]
    before = (tmp_path / "X.train.parquet").read_bytes()
    assert f"{tmp_path}/X.train.parquet exists; give --overwrite" in refusals.refusal(prepare.main, *again)
    told = refusals.refusal(prepare.main, *again, "--overwrite", "--max_history=8193")
    assert "--max_history 8193: sft.py reads at most 8,192 items of a history from Parquet; give that or less" in told
    assert (tmp_path / "X.train.parquet").read_bytes() == before
    prepare.main([*again, "--overwrite", "--max_history=8192"])
    assert (tmp_path / "X.train.parquet").read_bytes() != before
    assert not (tmp_path / "X.train.csv").exists()
    (tmp_path / "X.prepare.json").write_text((tmp_path / "X.prepare.json").read_text().replace('"parquet"', '"xml"'))
    assert "X.prepare.json: output_format is 'xml'; mend it" in refusals.refusal(prepare.main, *again, "--overwrite")


def test_cells_that_are_equal_but_not_the_same_text_stay_two():
    cells = pd.Series([1, True, "1", None, " 1", 2.0, float("nan")], dtype=object)
    assert texts_of(cells).to_pylist() == ["1", "True", "1", "", "1", "2", ""]
    cells = pd.Series([12.0, 12.5, float("nan"), -0.0, 0.0, 7, 12])
    assert texts_of(cells).to_pylist() == ["12", "12.5", "", "0", "0", "7", "12"]
