"""A user's own tables to `.item.json`, CSVs and info file."""

import ast
import csv
import gzip
import json
from pathlib import Path

import pandas as pd
import pytest

from rq import prepare
from rq.generate_indices import write_index

ITEMS = [("p", "Pan", "['Steel.', 'Big.']"), ("q", "Tab\there", ""), ("r", 'It\'s "R"', ""), ("s", "", "untitled")]
# user, item, time: u buys p q r, v buys q p r; w buys p only; s has no title
ROWS = [
    ("u", "p", 1),
    ("u", "q", 2),
    ("u", "r", 3),
    ("v", "q", 4),
    ("v", "p", 5),
    ("v", "r", 6),
    ("w", "p", 7),
    ("u", "s", 8),
    ("u", "p", 1),
    ("", "p", 9),
    ("v", "q", "yesterday-ish"),
]


@pytest.fixture
def tables(tmp_path: Path) -> dict[str, Path]:
    paths = {"interactions": tmp_path / "i.csv", "items": tmp_path / "m.csv"}
    write_csv(paths["interactions"], ("user_id", "item_id", "timestamp"), ROWS)
    write_csv(paths["items"], ("item_id", "title", "description"), ITEMS)
    return paths


def write_csv(path: Path, header: tuple, rows: list[tuple]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def run(tables: dict[str, Path], folder: Path, *extra: object) -> None:
    prepare.main(
        [f"--interactions={tables['interactions']}", f"--items={tables['items']}", f"--output_dir={folder}", "--name=X"]
        + ["--k_core=2", *map(str, extra)]
    )


def refusal(*arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert "\n" not in str(stopped.value.code)
    return str(stopped.value.code)


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def with_index(tables: dict[str, Path], folder: Path, *extra: object) -> None:
    run(tables, folder)
    count = len(json.loads((folder / "X.item.json").read_text()))
    write_index(folder / "X.index.json", [(item, 0) for item in range(count)])
    run(tables, folder, "--index", folder / "X.index.json", *extra)


def test_the_first_run_numbers_items_in_the_order_they_first_appear(tables, tmp_path, capsys):
    run(tables, tmp_path / "out")
    items = json.loads((tmp_path / "out/X.item.json").read_text())
    assert list(items) == ["0", "1", "2"]
    assert [item["title"] for item in items.values()] == ["Pan", "Tab here", 'It\'s "R"']
    assert items["0"] == {"title": "Pan", "description": "['Steel.', 'Big.']", "brand": "", "categories": ""}
    assert (tmp_path / "out/X.item_ids.csv").read_text() == "raw_id,item_id\np,0\nq,1\nr,2\n"
    assert not list((tmp_path / "out").glob("X.*.index*"))


def test_dropped_rows_are_counted_by_reason(tables, tmp_path, capsys):
    run(tables, tmp_path / "out")
    told = capsys.readouterr().out
    assert "interactions: 11 read, 6 kept" in told
    for reason in ("no user or item id: 1", "unreadable timestamp: 1", "repeats user, item and time: 1"):
        assert f"dropped, {reason}" in told
    assert "dropped, item has no title: 1" in told
    assert "dropped, user with fewer than 2 rows: 1" in told


def test_the_k_core_is_iterated_to_its_fixed_point(tmp_path, tables):
    # a chain: dropping w1 leaves item b with one row, which leaves w2 with one, which leaves c with one, and so on
    chain = [("w1", "b", 1), ("w2", "b", 2), ("w2", "c", 3), ("w3", "c", 4), ("w3", "d", 5)]
    core = [(user, item, 9) for user in ("x", "y") for item in ("p", "q")]
    write_csv(tables["interactions"], ("user_id", "item_id", "timestamp"), chain + core)
    write_csv(tables["items"], ("item_id", "title"), [(item, item.upper()) for item in "bcdpq"])
    run(tables, tmp_path / "out")
    items = json.loads((tmp_path / "out/X.item.json").read_text())
    assert [item["title"] for item in items.values()] == ["P", "Q"]


def test_the_csvs_hold_aligned_lists_of_the_history(tables, tmp_path):
    with_index(tables, tmp_path / "out", "--split", "leave_one_out")
    rows = [row for part in ("train", "valid", "test") for row in read_rows(tmp_path / f"out/X.{part}.csv")]
    assert tuple(rows[0]) == prepare.CSV_COLUMNS
    titles, sids = ["Pan", "Tab here", 'It\'s "R"'], ["<a_0><b_0>", "<a_1><b_0>", "<a_2><b_0>"]
    for row in rows:
        history = ast.literal_eval(row["history_item_id"])
        assert ast.literal_eval(row["history_item_title"]) == [titles[item] for item in history]
        assert ast.literal_eval(row["history_item_sid"]) == [sids[item] for item in history]
        assert (row["item_title"], row["item_sid"]) == (titles[int(row["item_id"])], sids[int(row["item_id"])])
    assert {(row["user_id"], row["history_item_id"], row["item_id"]) for row in rows} == {
        ("u", "[0]", "1"),
        ("u", "[0, 1]", "2"),
        ("v", "[1]", "0"),
        ("v", "[1, 0]", "2"),
    }


def test_the_info_file_lists_the_catalogue(tables, tmp_path):
    with_index(tables, tmp_path / "out")
    assert (tmp_path / "out/X.info.txt").read_text() == (
        '<a_0><b_0>\tPan\t0\n<a_1><b_0>\tTab here\t1\n<a_2><b_0>\tIt\'s "R"\t2\n'
    )


def test_leave_one_out_gives_each_user_one_test_and_one_valid_row(tables, tmp_path):
    with_index(tables, tmp_path / "out", "--split", "leave_one_out")
    parts = {part: read_rows(tmp_path / f"out/X.{part}.csv") for part in ("train", "valid", "test")}
    assert [row["user_id"] for row in parts["valid"]] == ["u", "v"]
    assert [(row["user_id"], row["item_id"]) for row in parts["test"]] == [("u", "2"), ("v", "2")]
    assert parts["train"] == []


def test_the_global_split_is_by_time_of_the_target():
    by_user = [
        [prepare.Window(user, (0,), 1, time=10 * at + user_at) for at in range(5)] for user_at, user in enumerate("abcd")
    ]
    parts = prepare.split_windows(by_user, split="global")
    assert [len(part) for part in parts.values()] == [16, 2, 2]
    times = [window.time for part in parts.values() for window in part]
    assert times == sorted(times)


def test_histories_are_cut_to_the_latest_items():
    rows = pd.DataFrame({"user": ["u"] * 14, "item": [f"i{n}" for n in range(14)], "time": range(14)})
    made = prepare.windows(rows, {f"i{n}": n for n in range(14)}, max_history=10)[0]
    assert made[0].history == (0,)
    assert made[-1].history == tuple(range(3, 13))
    assert made[-1].target == 13


def test_new_items_are_appended_and_old_ones_keep_number_and_text(tables, tmp_path):
    folder = tmp_path / "out"
    run(tables, folder)
    before = (folder / "X.item.json").read_text().splitlines()[:-1]
    write_csv(
        tables["interactions"],
        ("user_id", "item_id", "timestamp"),
        [("n", "t", 0), ("m", "t", 0), ("n", "p", 1), ("m", "p", 1), *ROWS],
    )
    write_csv(tables["items"], ("item_id", "title", "description"), [("t", "New", ""), *ITEMS])
    assert "add --index for the CSVs, --append for new items" in refusal(tables, folder)
    run(tables, folder, "--append")
    after = (folder / "X.item.json").read_text().splitlines()
    assert after[:3] == before
    assert json.loads((folder / "X.item.json").read_text())["3"]["title"] == "New"


def test_an_index_that_lacks_an_item_is_refused_and_nothing_is_written(tables, tmp_path):
    folder = tmp_path / "out"
    run(tables, folder)
    write_index(folder / "X.index.json", [(0, 0), (1, 0)])
    assert "item 2 has no SID" in refusal(tables, folder, "--index", folder / "X.index.json")
    assert not list(folder.glob("X.*.csv"))[1:]


def test_csvs_are_replaced_only_with_overwrite(tables, tmp_path):
    folder = tmp_path / "out"
    with_index(tables, folder)
    before = (folder / "X.train.csv").read_bytes()
    assert "give --overwrite" in refusal(tables, folder, "--index", folder / "X.index.json")
    run(tables, folder, "--index", folder / "X.index.json", "--overwrite", "--split", "leave_one_out")
    assert (folder / "X.train.csv").read_bytes() != before


@pytest.mark.parametrize("kind", ["parquet", "json", "json.gz"])
def test_parquet_and_amazon_json_lines_give_what_csv_gives(tables, tmp_path, kind):
    run(tables, tmp_path / "csv")
    reviews = [{"reviewerID": user, "asin": item, "unixReviewTime": time, "overall": 5.0} for user, item, time in ROWS[:-1]]
    metadata = [
        {"asin": item, "title": title, "description": ["Steel.", "Big."] if item == "p" else []} for item, title, _ in ITEMS
    ]
    other = {name: tmp_path / f"{name}.{kind}" for name in ("interactions", "items")}
    for name, records in (("interactions", reviews), ("items", metadata)):
        if kind == "parquet":
            pd.DataFrame(records).to_parquet(other[name])
        else:
            with gzip.open(other[name], "wt") if kind.endswith("gz") else open(other[name], "w") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
    run(other, tmp_path / "other")
    assert (tmp_path / "other/X.item.json").read_text() == (tmp_path / "csv/X.item.json").read_text()


def test_dates_are_read_as_well_as_seconds():
    times = prepare.seconds(pd.Series(["1970-01-02", "86401", "1970-01-02T00:00:02Z", "soon"]))
    assert times[:3].tolist() == [86400.0, 86401.0, 86402.0]
    assert times.isna().tolist() == [False, False, False, True]


def test_a_column_that_cannot_be_found_is_named(tables, tmp_path):
    write_csv(tables["interactions"], ("who", "item_id", "timestamp"), ROWS)
    told = refusal(tables, tmp_path / "out")
    assert "no column for the user among who, item_id, timestamp" in told
    assert "name it by --user_column" in told
    run(tables, tmp_path / "out", "--user_column", "who")
    assert (tmp_path / "out/X.item.json").exists()


def test_a_line_that_is_no_json_is_named(tables, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"asin": "p", "title": "Pan"}\n{"asin": \n')
    assert "broken.jsonl:2: expected one JSON object a line" in refusal({**tables, "items": broken}, tmp_path / "out")
