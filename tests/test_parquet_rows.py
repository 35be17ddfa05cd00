"""Parquet wherever a CSV of interactions goes: typed rows and user sequences give the very rows of the CSV."""

import ast
import csv
import datetime
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import toy

import evaluate
import sft
from data import CSV_COLUMNS, read_catalogue, read_rows
from sid_sft.files import InputError
from sid_sft.parquet_rows import LONGEST_HISTORY

LISTS = ("history_item_id", "history_item_sid", "history_item_title")


@pytest.fixture
def catalogue(tmp_path):
    return read_catalogue(toy.write_index(tmp_path), toy.write_items(tmp_path))


def parquet(path: Path, rows: list[dict], **settings) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **settings)
    return path


def typed(csv_path: Path, columns=CSV_COLUMNS) -> list[dict]:
    """The rows of a CSV with lists as lists and ids as numbers."""
    with csv_path.open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for column in LISTS:
            row[column] = ast.literal_eval(row[column])
        row["history_item_id"] = [int(item) for item in row["history_item_id"]]
        row["item_id"] = int(row["item_id"])
    return [{column: row[column] for column in columns} for row in rows]


def one_error(path: Path, catalogue) -> str:
    with pytest.raises(InputError) as caught:
        list(read_rows(path, catalogue, max_left_out=1))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("columns", [CSV_COLUMNS, ("user_id", "history_item_id", "item_id")], ids=["all", "ids alone"])
def test_typed_rows_are_the_rows_of_the_csv(tmp_path, shop, columns):
    catalogue = read_catalogue(shop / "shop.index.json", shop / "shop.item.json")
    path = parquet(tmp_path / "x.parquet", typed(shop / "shop.train.csv", columns), row_group_size=100)
    rows = list(read_rows(path, catalogue))
    assert rows == list(read_rows(shop / "shop.train.csv", catalogue))
    assert len(rows) > 1000


def test_a_sequence_asks_for_every_item_but_the_first_once(tmp_path, catalogue):
    path = parquet(tmp_path / "x.parquet", [{"user_id": 7, "item_ids": [0, 2, 4]}, {"user_id": 8, "item_ids": [1]}])
    rows = [(row.user, row.history, row.item) for row in read_rows(path, catalogue)]
    place = catalogue.position
    assert rows == [("7", (place["0"],), place["2"]), ("7", (place["0"], place["2"]), place["4"])]


@pytest.mark.parametrize(
    ("times", "wanted"),
    [
        ([3, 1, 2], ["2", "4", "0"]),
        ([1.5, 1.5, 0.5], ["4", "0", "2"]),
        ([datetime.datetime(2026, 1, day) for day in (2, 3, 1)], ["4", "0", "2"]),
    ],
)
def test_a_sequence_with_timestamps_is_put_in_their_order(tmp_path, catalogue, times, wanted):
    path = parquet(tmp_path / "x.parquet", [{"user_id": "a", "item_ids": ["0", "2", "4"], "timestamps": times}])
    *_, last = read_rows(path, catalogue)
    assert [catalogue.items[place].id for place in (*last.history, last.item)] == wanted


def test_targets_says_how_many_of_the_last_items_are_asked_for(tmp_path, catalogue):
    rows = [{"user_id": "a", "item_ids": [0, 1, 2, 3], "targets": count} for count in (0, 1, 2, 9)]
    path = parquet(tmp_path / "x.parquet", [*rows, {"user_id": "a", "item_ids": [0, 1], "targets": None}])
    assert [len(row.history) for row in read_rows(path, catalogue)] == [3, 2, 3, 1, 2, 3, 1]


def test_unknown_items_of_a_sequence_are_left_out_and_counted(tmp_path, catalogue):
    told: list[str] = []
    path = parquet(tmp_path / "x.parquet", [{"user_id": "a", "item_ids": [0, 99, 2]}])
    (row,) = read_rows(path, catalogue, told.append, max_left_out=1)
    assert (row.history, row.item) == ((catalogue.position["0"],), catalogue.position["2"])
    assert told == [
        "x.parquet: 1 rows left out: their item is not in the index (2 rows)",
        "x.parquet: 1 history items left out: they are not in the index (2 rows)",
    ]
    assert "row 1, item 2: '99'" in str(pytest.raises(InputError, list, read_rows(path, catalogue)).value)


def test_a_long_sequence_keeps_the_newest_items(tmp_path, catalogue):
    items = [1] * 5 + [0] * LONGEST_HISTORY + [2]
    path = parquet(tmp_path / "x.parquet", [{"user_id": "a", "item_ids": items, "targets": 1}])
    (row,) = read_rows(path, catalogue)
    assert row.history == (catalogue.position["0"],) * LONGEST_HISTORY


def ids_of(catalogue, rows) -> list[tuple]:
    return [(row.user, *(catalogue.items[place].id for place in (*row.history, row.item))) for row in rows]


def test_a_history_has_no_more_items_than_max_history(tmp_path, catalogue):
    rows = [{"user_id": "a", "item_ids": [0, 1, 2, 3], "max_history": most} for most in (1, 2, None)]
    path = parquet(tmp_path / "x.parquet", rows)
    assert [len(row.history) for row in read_rows(path, catalogue)] == [1, 1, 1, 1, 2, 2, 1, 2, 3]


def test_rows_come_in_the_order_of_row_numbers(tmp_path, catalogue):
    rows = [
        {"user_id": "a", "item_ids": [0, 1, 2, 3], "targets": 2, "max_history": 2, "row_numbers": [1, 3]},
        {"user_id": "b", "item_ids": [4, 0, 4], "targets": None, "max_history": None, "row_numbers": [0, 2]},
        {"user_id": "c", "item_ids": [4, 0, 4], "targets": 0, "max_history": 1, "row_numbers": []},
    ]
    path = parquet(tmp_path / "x.parquet", rows)
    assert ids_of(catalogue, read_rows(path, catalogue)) == [
        ("b", "4", "0"),
        ("a", "0", "1", "2"),
        ("b", "4", "0", "4"),
        ("a", "1", "2", "3"),
    ]


def test_a_fault_in_an_ordered_row_is_named_by_its_place_in_the_file(tmp_path, catalogue):
    rows = [
        {"user_id": "a", "item_ids": [0, 1], "row_numbers": [1]},
        {"user_id": "b", "item_ids": [0, 2, 99], "row_numbers": [0, 2]},
    ]
    path = parquet(tmp_path / "x.parquet", rows)
    assert "row 2, item 3: '99'" in str(pytest.raises(InputError, list, read_rows(path, catalogue)).value)


SEQUENCE = {"user_id": "a", "item_ids": [0, 1]}
ROW = {"user_id": "a", "history_item_id": [0], "item_id": 1}
BAD = {
    "no table": (b"PAR1 and nothing", "cannot be read as Parquet"),
    "empty": (b"", "cannot be read as Parquet"),
    "no rows": ([], "no column 'user_id'"),
    "other columns": (
        [{"user": 1, "items": [0]}],
        "has no column 'user_id'; its columns are 'user,items', expected user_id",
    ),
    "no item": ([{"user_id": 1, "history_item_id": [0]}], "has no column 'item_id'"),
    "a number for a list": ([{"user_id": 1, "item_ids": 5}], "row 1: column 'item_ids' has 5; expected a list"),
    "lists of lists": ([{"user_id": 1, "item_ids": [[0], [1]]}], "row 1: column 'item_ids' has the entry [0]"),
    "no user": ([SEQUENCE, {**SEQUENCE, "user_id": None}], "row 2: column 'user_id' has None; expected a text or a number"),
    "no id": ([{**SEQUENCE, "item_ids": [0, None]}], "row 1: column 'item_ids' has the entry None"),
    "fewer times": (
        [{**SEQUENCE, "timestamps": [1]}],
        "row 1: has 2 item_ids and the timestamps [1]; expected",
    ),
    "no time": ([{**SEQUENCE, "timestamps": [1, None]}], "expected one for each item"),
    "half a target": ([{**SEQUENCE, "targets": 0.5}], "row 1: has 0.5 for targets; expected how many"),
    "less than no target": ([{**SEQUENCE, "targets": -1}], "row 1: has -1 for targets"),
    "a history of no item": ([{**SEQUENCE, "max_history": 0}], "row 1: has 0 for max_history; expected how many items"),
    "half an item of history": ([{**SEQUENCE, "max_history": 1.5}], "row 1: has 1.5 for max_history"),
    "too many row numbers": (
        [{**SEQUENCE, "row_numbers": [0, 1]}],
        "row 1: asks for 1 items and has the row_numbers [0, 1]; expected a whole number for each",
    ),
    "no row numbers": (
        [{**SEQUENCE, "row_numbers": [0]}, {**SEQUENCE, "row_numbers": None}],
        "row 2: asks for 1 items and has",
    ),
    "a row number below 0": ([{**SEQUENCE, "row_numbers": [-1]}], "has the row_numbers [-1]"),
    "a row number twice": (
        [{**SEQUENCE, "row_numbers": [0]}, {**SEQUENCE, "row_numbers": [0]}],
        "row_numbers has 0 where 1 is expected; they must be 0 to 1, each once, for that many items asked for",
    ),
    "a row number left out": ([{**SEQUENCE, "row_numbers": [7]}], "row_numbers has 7 where 0 is expected"),
    "SIDs of another length": (
        [{**ROW, "history_item_sid": ["<a_0><b_0><c_0>"] * 2, "item_sid": "<a_0><b_1><c_1>"}],
        "row 1: the history has 1 ids and 2 entries of history_item_sid; they must be aligned",
    ),
    "another SID": (
        [{**ROW, "history_item_sid": ["<a_9><b_0><c_0>"], "item_sid": "<a_0><b_1><c_1>"}],
        "row 1: item 0 has the SID '<a_9><b_0><c_0>', in the index '<a_0><b_0><c_0>'",
    ),
    "a number for a SID": (
        [{**ROW, "history_item_sid": [5], "item_sid": "x"}],
        "row 1: column 'history_item_sid' has the",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, catalogue, name):
    content, message = BAD[name]
    path = tmp_path / "x.parquet"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        parquet(path, content)
    error = one_error(path, catalogue)
    assert error.startswith(f"{path}: ")
    assert message in error


def test_a_small_file_that_unpacks_to_gigabytes_is_refused_before_it_is_read(tmp_path, catalogue):
    rows = [{"user_id": "a", "item_ids": ["x" * 100_000]}] * 2000
    path = parquet(tmp_path / "x.parquet", rows, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 5_000_000
    assert "unpacks to" in one_error(path, catalogue)


def test_training_and_evaluation_on_sequences_are_those_on_the_csvs(base, flags, shop, tmp_path):
    by_user: dict[str, list[int]] = {}
    for row in typed(shop / "shop.train.csv"):
        by_user[row["user_id"]] = [*row["history_item_id"], row["item_id"]]
    sequences = [{"user_id": user, "item_ids": items} for user, items in by_user.items()]
    valid = typed(shop / "shop.valid.csv")
    last = [{"user_id": r["user_id"], "item_ids": [*r["history_item_id"], r["item_id"]], "targets": 1} for r in valid]
    changes = {"sample": -1, "tasks": "sid_sid", "max_steps": 3, "eval_steps": 3, "save_steps": 3}
    losses = {}
    for name, files in {
        "csv": {},
        "parquet": {
            "train_file": parquet(tmp_path / "train.parquet", sequences),
            "eval_file": parquet(tmp_path / "valid.parquet", last),
        },
    }.items():
        assert sft.main(flags(**changes, **files, output_dir=tmp_path / name)) == 0
        log = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses[name] = [(line.get("loss"), line.get("eval_loss")) for line in log]
    assert losses["csv"] == losses["parquet"]
    metrics = []
    for test_file in (shop / "shop.valid.csv", tmp_path / "valid.parquet"):
        out = tmp_path / f"{test_file.name}.out"
        arguments = {
            "base_model": tmp_path / "csv" / "final_checkpoint",
            "test_file": test_file,
            "sid_index_path": shop / "shop.index.json",
            "output_dir": out,
            "num_beams": 5,
            "sample": 20,
        }
        assert evaluate.main([part for name, value in arguments.items() for part in (f"--{name}", str(value))]) == 0
        metrics.append(json.loads((out / "metrics.json").read_text())["sid"])
    assert metrics[0] == metrics[1]
