"""A user's own tables to `.item.json`, CSVs and info file."""

import ast
import csv
import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pytest
import refusals

from rq import prepare
from rq.index_file import write_sids
from rq.interaction_log import InteractionLog, Kept, opened_base
from rq.tables import Table
from rq.training_files import CSV_COLUMNS
from rq.windows import Histories, histories, split_windows

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
    prepare.main(arguments_of(tables, folder, *extra))


def arguments_of(tables: dict[str, Path], folder: Path, *extra: object) -> list[str]:
    inputs = [f"--interactions={tables['interactions']}", f"--items={tables['items']}", f"--output_dir={folder}"]
    return [*inputs, "--name=X", "--k_core=2", *map(str, extra)]


def refusal(tables: dict[str, Path], folder: Path, *extra: object) -> str:
    return refusals.refusal(prepare.main, *arguments_of(tables, folder, *extra))


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def with_index(tables: dict[str, Path], folder: Path, *extra: object) -> None:
    run(tables, folder)
    count = len(json.loads((folder / "X.item.json").read_text()))
    write_sids(folder / "X.index.json", [(item, 0) for item in range(count)])
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
    told = capsys.readouterr().err
    assert "interactions: 11 read, 6 kept" in told
    for reason in ("no user or item id: 1", "unreadable timestamp: 1", "repeats user, item and time: 1"):
        assert f"dropped, {reason}" in told
    assert "dropped, item has no title: 1" in told
    assert "dropped, user with fewer than 2 rows: 1" in told


def test_the_k_core_is_iterated_to_its_fixed_point(tmp_path, tables, capsys):
    # a chain: dropping w1 leaves item b with one row, which leaves w2 with one, which leaves c with one, and so on
    chain = [("w1", "b", 1), ("w2", "b", 2), ("w2", "c", 3), ("w3", "c", 4), ("w3", "d", 5)]
    core = [(user, item, 9) for user in ("x", "y") for item in ("p", "q")]
    write_csv(tables["interactions"], ("user_id", "item_id", "timestamp"), chain + core)
    write_csv(tables["items"], ("item_id", "title"), [(item, item.upper()) for item in "bcdpq"])
    run(tables, tmp_path / "out")
    items = json.loads((tmp_path / "out/X.item.json").read_text())
    assert [item["title"] for item in items.values()] == ["P", "Q", "B", "C", "D"]  # those without a row keep a SID
    assert "4 kept" in capsys.readouterr().err
    run(tables, tmp_path / "bought", "--bought_only")
    items = json.loads((tmp_path / "bought/X.item.json").read_text())
    assert [item["title"] for item in items.values()] == ["P", "Q"]


def test_the_csvs_hold_aligned_lists_of_the_history(tables, tmp_path):
    with_index(tables, tmp_path / "out", "--split", "leave_one_out")
    rows = [row for part in ("train", "valid", "test") for row in read_rows(tmp_path / f"out/X.{part}.csv")]
    assert tuple(rows[0]) == CSV_COLUMNS
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


def in_order(*rows: tuple[str, int, int]) -> Histories:
    """Histories of (user, item number, time), which are in order of time."""
    users, items, times = zip(*rows, strict=True)
    user_texts, item_texts = sorted(set(users)), sorted({str(item) for item in items})
    kept = Kept(
        np.array([user_texts.index(user) for user in users], "int32"),
        np.array([item_texts.index(str(item)) for item in items], "int32"),
        np.array(times, "int32"),
        pyarrow.array(user_texts),
        item_texts,
    )
    return histories(kept, {str(item): item for item in items})


def test_the_global_split_is_by_time_of_the_target():
    made = in_order(*((user, 0, 10 * at + user_at) for at in range(6) for user_at, user in enumerate("abcd")))
    parts = split_windows(made, split="global")
    assert [len(part) for part in parts.values()] == [16, 2, 2]
    times = [made.time_N[window] for part in parts.values() for window in part]
    assert times == [10 * at + user_at for at in range(1, 6) for user_at in range(4)]


def test_users_come_in_the_order_of_their_first_item_and_equal_times_in_that_of_the_rows():
    made = in_order(("b", 3, 1), ("a", 5, 1), ("b", 4, 1), ("a", 6, 1))
    assert (made.users.to_pylist(), made.start_U.tolist(), made.item_N.tolist()) == (["b", "a"], [0, 2, 4], [3, 4, 5, 6])
    assert [part.tolist() for part in split_windows(made, split="global").values()] == [[1, 3], [], []]


def test_the_last_two_of_each_user_are_kept_back_but_an_only_window_is_for_training():
    made = in_order(*((user, at, at) for user, count in (("a", 4), ("b", 1), ("c", 2), ("d", 3)) for at in range(count)))
    parts = split_windows(made, split="leave_one_out")
    # positions: a has 0 1 2 3, b 4, c 5 6, d 7 8 9
    assert {name: part.tolist() for name, part in parts.items()} == {"train": [1, 6], "valid": [2, 8], "test": [3, 9]}


def test_histories_are_cut_to_the_latest_items():
    made = in_order(("a", 99, 0), *(("u", number, number) for number in range(14)))
    assert made.first_of(np.array([2, 11, 12, 14]), max_history=10).tolist() == [1, 1, 2, 4]


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
    write_sids(folder / "X.index.json", [(0, 0), (1, 0)])
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


def order(*cells: object, dayfirst: bool | None = None) -> list[int]:
    """The cells of one column in order of time, by number: [1, 0] when the second cell is the earlier one."""
    frame = pd.DataFrame({"user": "u", "item": [str(number) for number in range(len(cells))], "time": pd.Series(cells)})
    table = Table("o.csv", [frame], {"time": "timestamp"}, lambda row: f"o.csv:{row + 2}")
    with opened_base(Path(tempfile.gettempdir()), "o", memory_gb=1) as base:
        kept = InteractionLog(table, base).filtered(known_items=None, k_core=1, dayfirst=dayfirst)
    return [int(kept.items[item]) for item in kept.item_N]


def orders_of(tables: dict[str, Path], *times: object) -> None:
    """A table in which users u and v buy p, q and r at these times."""
    rows = [(user, item, time) for user in "uv" for item, time in zip("pqr", times, strict=True)]
    write_csv(tables["interactions"], ("user_id", "item_id", "timestamp"), rows)


READ_IN_ORDER = [
    ["13/01/2016", "02/02/2016", "01/03/2016"],  # day first
    ["01/13/2016", "02/02/2016", "03/01/2016"],  # month first
    ["13.01.2016 09:05", "13.01.2016 19:05", "01.03.2016 00:00"],
    ["1/13/2016 9:05 AM", "1/13/2016 12:05 PM", "1/13/2016 1:05 PM"],
    ["01 13, 2016", "02 2, 2016", "03 1, 2016"],  # reviewTime of Amazon
    ["2016-01-13", "2016-01-13T10:00", "2016-01-14 09:00:00.5"],
    ["20160113T090000Z", "2016-01-13T13:00:00+02:00", "2016-01-13T12:00:00Z"],
    ["2016-W02-3", "2016-014", "2016-01-14T24:00"],
    ["31 Jan 2016", "Feb 1, 2016", "2 March 2016"],
    ["Wed Jan 13 23:00:00 +0000 2016", "Wed, 13 Jan 2016 23:00:00 -0100", "Thu Jan 14 02:00:00 +0100 2016"],
    [1452643200, 1452643201, 1452729600],
    [1452643200000, 1452643200001, 1452729600000],
    [1452643200000000000, 1452643200000000001, 1452643200000000002],
    ["1452643200.25", "1452643200.5", "1452643201"],
    [20160113, 20160202, 20160301],
    [42382, 42402.5, 42430],  # days as Excel counts them
    [0, 1, 300],  # positions
]


@pytest.mark.parametrize("times", READ_IN_ORDER)
def test_a_column_of_one_kind_is_read_in_its_order(tables, tmp_path, times):
    assert order(*reversed(times)) == [2, 1, 0]
    orders_of(tables, *reversed(times))
    run(tables, tmp_path / "out")
    assert (tmp_path / "out/X.item_ids.csv").read_text() == "raw_id,item_id\nr,0\nq,1\np,2\n"


def test_the_order_is_that_of_the_moments_meant():
    assert order("13/01/2016", "02/01/2016") == [1, 0]
    assert order("02/01/2016", "01/02/2016", dayfirst=True) == [0, 1]
    assert order("02/01/2016", "01/02/2016", dayfirst=False) == [1, 0]
    assert order("2016-01-01T23:30:00-01:00", "2016-01-02T00:15:00Z") == [1, 0]
    assert order("12:00 AM".join(["1/13/2016 ", ""]), "1/13/2016 1:00 AM") == [0, 1]


CONTRADICTIONS = [
    (["13/01/2016", "02/01/2016", "01/13/2016"], "'13/01/2016' (day first) and ", "'01/13/2016' (month first)", (2, 4)),
    (
        [1452643200, 1452643201, 1452729600000],
        "(seconds since 1970: 2016-01-13) and",
        "(milliseconds since 1970: 2016-01-1",
        (),
    ),
    ([1452643200000, 1452643200001, 1452643200000000], "milliseconds since 1970", "microseconds since 1970", ()),
    ([20160113, 20160114, 1452729600], "YYYYMMDD", "seconds since 1970", ()),
    ([1, 2, 1452729600], "'2' (a small number)", "seconds since 1970", ()),
    ([100_000, 100_001, 50_000_000], "'100001' (a small number)", "'50000000' (a small number)", ()),
    (["1452643200", "2016-01-13", "2016-01-14"], "'1452643200' (a number)", "'2016-01-13' (year first)", (2, 3)),
    (["20160113", "2016-01-14", "2016-01-15"], "a number", "year first", (2, 3)),
    (["2016-01-13", "14/01/2016", "2016-01-15"], "year first", "numbers with '/'", (2, 3)),
    (["13/01/2016", "14.01.2016", "15.01.2016"], "numbers with '/'", "numbers with '.'", (2, 3)),
    (["13 Jan 2016", "2016-01-14", "2016-01-15"], "year first", "month by name", (2, 3)),
    (["2016-01-13T09:00:00Z", "2016-01-13T09:00:00", "2016-01-14"], "with a time zone", "without a time zone", (2, 3)),
]


@pytest.mark.parametrize(("times", "one", "other", "lines"), CONTRADICTIONS)
def test_rows_that_contradict_each_other_are_both_shown(tables, tmp_path, times, one, other, lines):
    orders_of(tables, *times)
    told = refusal(tables, tmp_path / "out")
    assert "column 'timestamp' holds two kinds of timestamps" in told
    for words in (one, other, "write all rows in one way", *(f"i.csv:{line}: " for line in lines)):
        assert words in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("times", "told"),
    [
        (["02/01/2016", "03/01/2016", "04/01/2016"], "i.csv:2: '02/01/2016' in column 'timestamp': day or month first?"),
        (["13/01/16", "14/01/16", "15/01/16"], "i.csv:2: '13/01/16' in column 'timestamp' has a year of two digits"),
        (["1.45264E+12", "1.45264E+12", "1.45273E+12"], "i.csv:2: '1.45264E+12' in column 'timestamp' was rounded"),
        (["", "", "NaN"], "column 'timestamp': every cell is empty"),
        (["soon", "later", "1452643200"], "i.csv:2: 'soon' in column 'timestamp' cannot be read as a time"),
        (["2016-13-01", "2016-14-01", "2016-02-01"], "i.csv:2: '2016-13-01' in column 'timestamp' cannot be read"),
        (["-5", "1452643200", "1452643201"], "i.csv:2: '-5' in column 'timestamp' cannot be read as a time"),
        (["9" * 30, "1452643200", "1452643201"], "cannot be read as a time"),
        (["2150-01-01", "2016-01-01", "2016-01-02"], "i.csv:2: '2150-01-01' in column 'timestamp' cannot be read"),
    ],
)
def test_a_column_that_cannot_be_read_is_refused_by_its_first_such_row(tables, tmp_path, times, told):
    orders_of(tables, *times)
    assert told in refusal(tables, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dayfirst_decides_what_no_row_decides_and_cannot_overrule_a_row(tables, tmp_path):
    orders_of(tables, "02/01/2016", "01/02/2016", "03/03/2016")
    assert "give --dayfirst True or --dayfirst False" in refusal(tables, tmp_path / "out")
    run(tables, tmp_path / "day", "--dayfirst")
    run(tables, tmp_path / "month", "--dayfirst", "False")
    assert (tmp_path / "day/X.item_ids.csv").read_text().splitlines()[1:] == ["p,0", "q,1", "r,2"]
    assert (tmp_path / "month/X.item_ids.csv").read_text().splitlines()[1:] == ["q,0", "p,1", "r,2"]
    orders_of(tables, "13/01/2016", "01/02/2016", "03/03/2016")
    told = refusal(tables, tmp_path / "out", "--dayfirst", "False")
    assert "--dayfirst False, but" in told
    assert "i.csv:2: '13/01/2016' in column 'timestamp' has the day first" in told


def test_a_few_impossible_times_are_dropped_counted_and_the_first_is_shown(tables, tmp_path, capsys):
    rows = [(user, item, f"2016-01-{day:02}") for day, (user, item) in enumerate([(u, i) for u in "uvwx" for i in "pqr"], 1)]
    bad = [("u", "p", "2016-02-30"), ("u", "q", "")]
    write_csv(tables["interactions"], ("user_id", "item_id", "timestamp"), rows + bad)
    run(tables, tmp_path / "out")
    told = capsys.readouterr().err
    assert "14 read, 12 kept" in told
    assert "dropped, no timestamp: 1" in told
    assert "dropped, unreadable timestamp: 1" in told
    assert "the first unreadable timestamp: " in told
    assert "i.csv:14: '2016-02-30'" in told


def test_the_line_named_counts_blank_lines_and_lines_inside_quotes(tables, tmp_path):
    tables["interactions"].write_text('user_id,item_id,note,timestamp\n"u",p,"two\nlines",5\n\nu,q,,soon\n')
    assert "i.csv:5: 'soon'" in refusal(tables, tmp_path / "out")


def test_rows_of_one_user_and_time_stay_in_the_order_of_the_file(tables, tmp_path):
    write_csv(
        tables["interactions"],
        ("user_id", "item_id", "timestamp"),
        [(user, item, 7) for user in "uv" for item in ("r", "p", "q")],
    )
    with_index(tables, tmp_path / "out")
    rows = [row for part in ("train", "valid", "test") for row in read_rows(tmp_path / f"out/X.{part}.csv")]
    assert {(row["history_item_id"], row["item_id"]) for row in rows} == {("[0]", "1"), ("[0, 1]", "2")}


@pytest.mark.parametrize("zone", [None, "UTC"])
def test_parquet_moments_and_nanoseconds_keep_their_order(tables, tmp_path, zone):
    nanoseconds = [1452643200000000002, 1452643200000000001, 1452643200000000000]
    moments = pd.to_datetime([*nanoseconds, *nanoseconds, None], unit="ns", utc=bool(zone))
    frame = pd.DataFrame({"user_id": list("uuuvvvu"), "item_id": list("pqrpqrp"), "timestamp": moments})
    path = tmp_path / "i.parquet"
    frame.set_index("user_id").to_parquet(path)  # a column that pandas keeps as its index is a column all the same
    run({**tables, "interactions": path}, tmp_path / "out")
    assert (tmp_path / "out/X.item_ids.csv").read_text() == "raw_id,item_id\nr,0\nq,1\np,2\n"


HEADERS = [
    "user_id, item_id , timestamp",
    "\ufeffuser_id,item_id,timestamp",
    '"user_id", "item_id", "timestamp"',
    "User_ID,ITEM_ID,Timestamp",
]


@pytest.mark.parametrize("header", HEADERS)
def test_blanks_quotes_case_and_a_byte_order_mark_hide_no_column(tables, tmp_path, header):
    rows = "".join(f"{user}, {item} ,{time}\n" for user in "uv" for time, item in enumerate("pqr"))
    tables["interactions"].write_text(f"{header}\n{rows}", encoding="utf-8")
    run(tables, tmp_path / "out")
    assert (tmp_path / "out/X.item_ids.csv").read_text() == "raw_id,item_id\np,0\nq,1\nr,2\n"


def broken(tmp_path: Path, name: str) -> Path:
    """A file of that name that cannot be read, each broken in the way its name says."""
    path = tmp_path / name
    text = "user_id,item_id,timestamp\n" + "".join(f"u{n},p,{n}\n" for n in range(2000))
    lines = "".join(json.dumps({"user_id": "u", "item_id": "p", "timestamp": n}) + "\n" for n in range(2000))
    if name == "folder.csv":
        path.mkdir()
        return path
    pd.DataFrame({"user_id": ["u"], "item_id": ["p"]}).to_parquet(tmp_path / "whole.parquet")
    content = {
        "corrupt.parquet": b"PAR1" + b"nonsense" * 40 + b"PAR1",
        "cut.parquet": (tmp_path / "whole.parquet").read_bytes()[:-20],
        "lacks_time.parquet": (tmp_path / "whole.parquet").read_bytes(),
        "plain.csv.gz": text.encode(),
        "plain.json.gz": lines.encode(),
        "cut.csv.gz": gzip.compress(text.encode())[:-500],
        "cut.json.gz": gzip.compress(lines.encode())[:-500],
        "packed.csv": gzip.compress(text.encode()),
        "orders.zip": b"PK",
        "orders.csv.bz2": b"BZh",
        "orders.xlsx": b"PK",
        "latin.csv": b"user_id,item_id,timestamp\nu,p,1\nJos\xe9,p,2\n",
        "line.json": lines.encode() + b'{"user_id": \n',
        "deep.json": lines.encode() + b"[" * 100_000 + b"\n",
        "half.json": b'{"user_id": "\\ud83d", "item_id": "p", "timestamp": 1}\n',
        "array.json": b'[{"user_id": "u"}]\n',
        "empty.csv": b"",
        "empty.json": b"",
        "header.csv": b"user_id,item_id,timestamp\n",
        "twice.csv": b"user_id,item_id,item_id,timestamp\nu,p,q,1\n",
        "twice_but_for_a_blank.csv": b"user_id,item_id, item_id,timestamp\nu,p,q,1\n",
        "blanks.csv": b"user_id item_id timestamp\nu p 1\n",
        "long_first_row.csv": b"user_id,item_id,timestamp\nu,p,1,9\nv,p,1,9\n",
        "long_row.csv": b"user_id,item_id,timestamp\nu,p,1\nu,p,q,1\n",
        "open_quote.csv": b'user_id,item_id,timestamp\nu,"p,1\nu,p,1\n',
    }[name]
    path.write_bytes(content)
    return path


BROKEN = {
    "corrupt.parquet": "not a Parquet file that can be read",
    "cut.parquet": "not a Parquet file that can be read",
    "lacks_time.parquet": "no column for the time among user_id, item_id",
    "plain.csv.gz": "broken gzip data after line 0 (Not a gzipped file",
    "plain.json.gz": "broken gzip data after line 0 (Not a gzipped file",
    "cut.csv.gz": "broken gzip data after line ",
    "cut.json.gz": "broken gzip data after line ",
    "packed.csv": ":1: not UTF-8 text",
    "orders.zip": "a file of kind .zip; expected .csv, .tsv, .json or .jsonl",
    "orders.csv.bz2": "a file of kind .bz2; expected .csv",
    "orders.xlsx": "a file of kind .xlsx; expected .csv",
    "latin.csv": "latin.csv:3: not UTF-8 text",
    "line.json": "line.json:2001: expected one JSON object a line",
    "deep.json": "deep.json:2001: expected one JSON object a line",
    "half.json": "half.json:1: half a character",
    "array.json": "array.json:1: expected one JSON object a line",
    "empty.csv": "the file is empty",
    "empty.json": "no record",
    "header.csv": "no row under the header",
    "twice.csv": "2 columns are called 'item_id'",
    "twice_but_for_a_blank.csv": "2 columns are called 'item_id'",
    "blanks.csv": "no column for the user among user_id item_id timestamp (what stands between the cells? name it by --sep)",
    "long_first_row.csv": "the first row has more cells than the header; expected 3 cells",
    "long_row.csv": "Expected 3 fields in line 3, saw 4",
    "open_quote.csv": "EOF inside string starting at row 1",
    "folder.csv": "a folder without a table; expected files that end in .csv",
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("flag", ["interactions", "items"])
def test_a_broken_file_is_named_in_one_line_and_nothing_is_written(tables, tmp_path, name, flag):
    told = refusal({**tables, flag: broken(tmp_path, name)}, tmp_path / "out")
    assert told.startswith(f"rq.prepare: {tmp_path / name}")
    if flag == "interactions":
        assert BROKEN[name] in told
    assert not (tmp_path / "out").exists()


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


def test_a_column_of_categories_is_read_as_any_other(tables, tmp_path):
    frame = pd.DataFrame(ROWS[:6], columns=["user_id", "item_id", "timestamp"]).astype({"user_id": "category"})
    frame.astype({"item_id": "category"}).to_parquet(tmp_path / "i.parquet")
    run({**tables, "interactions": tmp_path / "i.parquet"}, tmp_path / "out")
    assert (tmp_path / "out/X.item_ids.csv").read_text() == "raw_id,item_id\np,0\nq,1\nr,2\n"


def saved_settings(folder: Path) -> dict:
    return json.loads((folder / "X.prepare.json").read_text())


def without_k_core(tables: dict[str, Path], folder: Path, *extra: object) -> None:
    """The command with no flag but those it asks for."""
    inputs = [f"--interactions={tables['interactions']}", f"--items={tables['items']}", f"--output_dir={folder}"]
    prepare.main([*inputs, "--name=X", *map(str, extra)])


def training_rows(folder: Path) -> int:
    return sum(len(read_rows(folder / f"X.{part}.csv")) for part in ("train", "valid", "test"))


def test_the_run_with_the_index_takes_over_the_settings_of_the_first(tables, tmp_path, capsys):
    folder = tmp_path / "out"
    write_csv(tables["interactions"], ("who", "item_id", "timestamp"), ROWS)
    run(tables, folder, "--k_core", 1, "--user_column", "who")
    write_sids(folder / "X.index.json", [(item, 0) for item in range(3)])
    capsys.readouterr()
    without_k_core(tables, folder, "--index", folder / "X.index.json", "--split", "leave_one_out")
    told = capsys.readouterr().err
    assert f"as in the run before ({folder / 'X.prepare.json'}): --user_column who, --k_core 1\n" in told
    assert "--split is" not in told  # no run before has split anything
    assert "in no row that is kept" not in told
    assert training_rows(folder) == 4
    assert (saved_settings(folder)["k_core"], saved_settings(folder)["split"]) == (1, "leave_one_out")
    without_k_core(tables, folder, "--index", folder / "X.index.json", "--overwrite")
    assert "--user_column who, --k_core 1, --split leave_one_out\n" in capsys.readouterr().err
    without_k_core(tables, folder, "--index", folder / "X.index.json", "--overwrite", "--split", "global")
    told = capsys.readouterr().err
    assert "--split is global, in the run before it was leave_one_out: rows go to other files" in told


def test_a_setting_given_that_differs_is_named_with_what_it_does(tables, tmp_path, capsys):
    folder = tmp_path / "out"
    run(tables, folder, "--k_core", 1)
    write_sids(folder / "X.index.json", [(item, 0) for item in range(3)])
    capsys.readouterr()
    run(tables, folder, "--k_core", 2, "--index", folder / "X.index.json")
    told = capsys.readouterr().err
    assert "--k_core is 2, in the run before it was 1: other rows are kept: the CSVs have more or fewer rows" in told
    assert "6 rows of i.csv are kept, in the run that numbered the items it was 7 of i.csv" in told
    assert saved_settings(folder)["k_core"] == 1  # what the items were numbered with


def test_a_run_that_numbers_anew_starts_from_the_defaults_and_says_so(tables, tmp_path, capsys):
    folder = tmp_path / "out"
    run(tables, folder, "--k_core", 1)
    write_csv(tables["interactions"], ("user_id", "item_id", "timestamp"), [(u, i, 1) for u in "abcde" for i in "pqrst"])
    write_csv(tables["items"], ("item_id", "title"), [(i, i.upper()) for i in "pqrst"])
    without_k_core(tables, folder, "--overwrite")
    assert "--k_core is 5, in the run before it was 1" in capsys.readouterr().err
    assert saved_settings(folder)["k_core"] == 5


def test_appending_takes_over_the_settings_too(tables, tmp_path, capsys):
    folder = tmp_path / "out"
    run(tables, folder, "--k_core", 1)
    write_csv(tables["interactions"], ("user_id", "item_id", "timestamp"), [*ROWS, ("w", "t", 20)])
    write_csv(tables["items"], ("item_id", "title", "description"), [*ITEMS, ("t", "New", "")])
    capsys.readouterr()
    without_k_core(tables, folder, "--append")
    assert "as in the run before" in capsys.readouterr().err
    assert len(json.loads((folder / "X.item.json").read_text())) == 4


def test_outputs_without_settings_are_told_of_and_so_are_items_in_no_row(tables, tmp_path, capsys):
    folder = tmp_path / "out"
    write_csv(tables["interactions"], ("user_id", "item_id", "timestamp"), [*ROWS, ("w", "t", 20)])
    write_csv(tables["items"], ("item_id", "title", "description"), [*ITEMS, ("t", "Once", "")])
    run(tables, folder, "--k_core", 1)
    write_sids(folder / "X.index.json", [(item, 0) for item in range(4)])
    (folder / "X.prepare.json").unlink()
    run(tables, folder, "--index", folder / "X.index.json")
    told = capsys.readouterr().err
    assert "X.prepare.json is not there" in told
    assert "1 of 4 items are in no row that is kept" in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not JSON"),
        ("[1]", "not settings of rq.prepare"),
        ('{"k_core": 1}', "user_column is missing"),
        (None, "k_core is 'x'"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(tables, tmp_path, text, told):
    folder = tmp_path / "out"
    run(tables, folder)
    kept = json.dumps({**saved_settings(folder), "k_core": "x"}) if text is None else text
    (folder / "X.prepare.json").write_text(kept)
    before = (folder / "X.item.json").read_bytes()
    assert told in refusal(tables, folder, "--overwrite")
    assert (folder / "X.item.json").read_bytes() == before


@pytest.mark.parametrize(
    "content", ["raw_id,item_id\np,0\nq,2\n", "raw_id,item_id\np,x\n", "a,b\n1,2\n", "raw_id,item_id\np,0\n"]
)
def test_a_table_of_ids_that_does_not_fit_is_refused(tables, tmp_path, content):
    folder = tmp_path / "out"
    run(tables, folder)
    (folder / "X.item_ids.csv").write_text(content)
    assert "X.item_ids.csv" in refusal(tables, folder, "--append")


def test_a_table_that_would_be_written_over_is_refused(tables, tmp_path):
    folder = tmp_path / "out"
    with_index(tables, folder)
    (folder / "X.train.csv").write_bytes(tables["interactions"].read_bytes())
    own = {**tables, "interactions": folder / "X.train.csv"}
    assert "also an input of this run" in refusal(own, folder, "--index", folder / "X.index.json", "--overwrite")


def test_ids_that_only_blanks_or_a_missing_neighbour_tell_apart_are_the_same(tables, tmp_path):
    records = [
        {"user_id": user, "item_id": item, "timestamp": time} for user in (1, 2) for time, item in enumerate((10, 11))
    ]
    pd.DataFrame([*records, {"user_id": None, "item_id": None, "timestamp": 5}]).to_parquet(tmp_path / "i.parquet")
    write_csv(tables["items"], ("item_id", "title"), [(" 10 ", "Ten"), ("11", "Eleven")])
    run({**tables, "interactions": tmp_path / "i.parquet"}, tmp_path / "out")
    assert (tmp_path / "out/X.item_ids.csv").read_text() == "raw_id,item_id\n10,0\n11,1\n"


def test_refusals_typed_at_the_shell_are_one_line_and_exit_with_an_error(tables, tmp_path):
    orders_of(tables, "13/01/2016", "02/01/2016", "01/13/2016")
    command = [sys.executable, "-m", "rq.prepare", "--interactions", str(tables["interactions"])]
    command += ["--items", str(tables["items"]), "--output_dir", str(tmp_path / "out"), "--name", "X"]
    result = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "two kinds of timestamps" in result.stderr.splitlines()[-1]
