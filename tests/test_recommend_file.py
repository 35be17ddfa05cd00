"""Histories of many users from a file, and the file of answers, as a user types it."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT
from fuzzing import check_line
from stores import FIXED, arguments_of, catalogue_of, shop_rows, write_store

import evaluate
from sid_sft.catalogue import Catalogue, Item
from sid_sft.files import InputError
from sid_sft.recommend.histories import read_histories

CATALOGUE = catalogue_of(FIXED)
SIDS = ["".join(sid) for sid in FIXED]
HISTORIES = [list(row.history) for row in shop_rows(12, len(FIXED))]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("store"))


def write_histories(path: Path, rows: list[dict]) -> Path:
    """Rows of plain values as a CSV (lists as Python writes them), Parquet or JSON lines."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def read_answers(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return [{k: v if k == "user_id" else json.loads(v) for k, v in row.items()} for row in csv.DictReader(file)]


def run(store: Path, histories: Path, answers: Path, **flags) -> list[dict]:
    """The answers to a file of histories."""
    given = {"recommend_file": histories, "recommendations_file": answers, "test_file": "", **flags}
    assert evaluate.main(arguments_of(store, **given)) == 0
    return read_answers(answers)


def refused(caplog, *arguments: str) -> str:
    """The one line that a command ends with."""
    caplog.clear()
    assert evaluate.main(list(arguments)) == 2
    (error,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    check_line(error)
    return error


def told(lines: list[str]):
    return lambda line: lines.append(line)


# ---------------------------------------------------------------------------------------------- the answers


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize(("read", "write"), [("csv", "parquet"), ("parquet", "jsonl"), ("jsonl", "csv")])
def test_every_row_gets_what_it_would_get_alone_in_the_order_of_the_file(store, tmp_path, capsys, read, write, exclude):
    rows = [{"user_id": f"u{n}", "history": [CATALOGUE.items[i].id for i in h]} for n, h in enumerate(HISTORIES)]
    histories = write_histories(tmp_path / f"users.{read}", rows)
    found = run(store, histories, tmp_path / f"answers.{write}", exclude_history=exclude)
    assert [row["user_id"] for row in found] == [row["user_id"] for row in rows]
    for row, answer in list(zip(rows, found, strict=True))[::2]:
        capsys.readouterr()
        alone = arguments_of(store, recommend=" | ".join(row["history"]), exclude_history=exclude)
        assert evaluate.main(alone) == 0
        lines = re.findall(r"(Product number \d+) \[(\S+), p (\S+)\]", capsys.readouterr().out)
        assert [title for title, _, _ in lines] == answer["title"]
        assert [sid for _, sid, _ in lines] == answer["sid"]
        for (_, _, p), log_p in zip(lines, answer["log_p"], strict=True):
            assert float(p) == pytest.approx(2.718281828**log_p, rel=0.06)  # it is told with two digits
        assert answer["item_id"] == [str(100 + SIDS.index(sid)) for sid in answer["sid"]]
        assert answer["log_p"] == sorted(answer["log_p"], reverse=True)
        assert len(answer["sid"]) == 10
        assert not exclude or not set(answer["item_id"]) & set(row["history"])


def test_without_history_the_list_is_the_whole_ranking_less_the_history_and_never_short_of_it(store, tmp_path):
    """Ten beams for users who bought 0 to 20 of the 20 items: ten others each, as long as there are ten."""
    rows = [{"user_id": n, "history": list(range(100, 100 + n)) or [None]} for n in (1, 3, 9, 10, 15, 19, 20)]
    histories = write_histories(tmp_path / "users.jsonl", rows)
    ranking = run(store, histories, tmp_path / "all.jsonl", num_beams=20)
    found = run(store, histories, tmp_path / "some.jsonl", num_beams=10, exclude_history=True)
    for row, whole, some in zip(rows, ranking, found, strict=True):
        assert len(whole["sid"]) == 20
        left = [item for item in whole["item_id"] if int(item) not in row["history"]]
        assert len(some["item_id"]) == min(10, 20 - len(row["history"]))
        if len(row["history"]) >= 10:  # as many beams as there are SIDs
            assert some["item_id"] == left
        assert not {int(item) for item in some["item_id"]} & set(row["history"])


def test_ids_sids_and_titles_name_the_same_items_in_every_way_to_write_them(tmp_path):
    history = (3, 17, 3)
    ids, sids, titles = [103, 117, 103], [SIDS[3], SIDS[17], SIDS[3]], [f"product NUMBER {i}" for i in history]
    ways = [
        ("history", [str(ids), str(sids), str(titles), f"[103, '{SIDS[17]}', 'Product number 3']"]),
        ("history", ["103 | 117 | 103", "103, 117 103", " ".join(sids), "|".join(titles), f"103|{SIDS[17]}|103"]),
        ("history_item_id", [str(ids), "103 117 103", "103,117,103", "['103', '117', '103']", "[103.0, 117, 103]"]),
        ("history_item_sid", [str(sids), ",".join(sids)]),
        ("history_item_title", [str(titles), json.dumps(titles), " | ".join(titles)]),
    ]
    for column, cells in ways:
        rows = [{column: cell} for cell in cells]
        for ending in ("csv", "parquet", "jsonl"):
            found = read_histories(write_histories(tmp_path / f"users.{ending}", rows), CATALOGUE, shows="sid")
            assert found.users is None
            assert [row.history for row in found.rows] == [history] * len(cells), (column, ending)
    for ending in ("parquet", "jsonl"):
        for column, value in (("history", ids), ("history", sids), ("history_item_title", titles), ("history_item_id", ids)):
            path = write_histories(tmp_path / f"users.{ending}", [{"user_id": 7, column: value}])
            assert read_histories(path, CATALOGUE, shows="sid").rows[0].history == history


def test_an_interaction_csv_is_a_file_of_histories_whose_ids_decide(store):
    found = read_histories(store / "X.test.csv", CATALOGUE, shows="sid")
    expected = shop_rows(30, len(FIXED))
    assert found.users == [row.user for row in expected]
    assert [row.history for row in found.rows] == [row.history for row in expected]


def test_unknown_items_are_named_and_rows_with_nothing_left_stay_as_empty_rows(store, tmp_path, caplog):
    caplog.set_level("INFO")
    rows = [
        {"user_id": "a", "history": ["103", "Glue", "999"]},
        {"user_id": "b", "history": ["No such item"]},
        {"user_id": None, "history": []},
        {"user_id": "d", "history": ["Product number 4"]},
    ]
    path = write_histories(tmp_path / "users.jsonl", rows)
    found = run(store, path, tmp_path / "answers.jsonl", max_left_out=0.5)
    assert [(row["user_id"], len(row["sid"])) for row in found] == [("a", 10), ("b", 0), (None, 0), ("d", 10)]
    assert found[1] == {"user_id": "b", "sid": [], "item_id": [], "title": [], "log_p": []}
    assert (
        "users.jsonl: 3 history items are not in the catalogue and are left out: 'Glue' (line 1), '999' (line 1), "
        "'No such item' (line 2)"
    ) in caplog.text
    reasons = "no item of their history is in the catalogue (line 2: 'No such item')", "their history is empty (line 3)"
    for reason in reasons:
        assert f"users.jsonl: 1 of 4 rows get no recommendations: {reason}" in caplog.text
    flags = {"recommend_file": path, "recommendations_file": tmp_path / "other.jsonl"}
    error = refused(caplog, *arguments_of(store, **flags))
    assert "2 of 4 rows would get no recommendations, more than --max_left_out 0.2 allows" in error
    assert not (tmp_path / "other.jsonl").exists()


USER_IDS = [  # as given, and in a Parquet file, whose columns have one type
    ([7, 2**40], [7, 2**40]),
    (["7", "07"], ["7", "07"]),
    ([7, "x"], ["7", "x"]),
    ([None, 1.5], [None, "1.5"]),
    ([2**70, None], [str(2**70), None]),
]


@pytest.mark.parametrize(("given", "in_parquet"), USER_IDS)
def test_user_ids_keep_their_type_where_the_file_can_hold_it(store, tmp_path, given, in_parquet):
    path = write_histories(tmp_path / "users.jsonl", [{"user_id": user, "history": 103} for user in given])
    assert [row["user_id"] for row in run(store, path, tmp_path / "answers.jsonl")] == given
    assert [row["user_id"] for row in run(store, path, tmp_path / "answers.parquet")] == in_parquet


def test_items_that_share_a_sid_follow_one_another_and_titles_of_several_items_are_told(store, tmp_path):
    catalogue = [Item("7", FIXED[0], "Mug"), Item("8", FIXED[0], "Jug"), Item("9", FIXED[1], "mug")]
    (tmp_path / "X.index.json").write_text(json.dumps({item.id: item.sid for item in catalogue}))
    (tmp_path / "X.item.json").write_text(json.dumps({item.id: {"title": item.title} for item in catalogue}))
    path = write_histories(tmp_path / "users.jsonl", [{"history": ["Mug"]}])
    flags = {"sid_index_path": tmp_path / "X.index.json", "item_meta_path": tmp_path / "X.item.json", "train_file": ""}
    (row,) = run(store, path, tmp_path / "answers.csv", **flags)
    assert list(row) == ["sid", "item_id", "title", "log_p"]
    at = row["item_id"].index("7")
    assert row["item_id"][at : at + 2] == ["7", "8"]
    assert row["sid"][at] == row["sid"][at + 1] == SIDS[0]
    assert row["log_p"][at] == row["log_p"][at + 1]
    (rest,) = run(store, path, tmp_path / "answers.csv", exclude_history=True, **flags)
    assert rest["item_id"] == ["9"], "the model cannot tell items of one SID apart"
    lines: list[str] = []
    items = Catalogue(catalogue, {item.id: place for place, item in enumerate(catalogue)})
    read_histories(path, items, told(lines), shows="sid")
    assert lines == ["users.jsonl: 1 titles are of several items each, and the first in the index is taken ('Mug': '7')"]


def test_an_item_without_a_title_is_nothing_to_a_task_of_titles(tmp_path):
    items = [Item("7", FIXED[0], ""), Item("8", FIXED[1], "Jug")]
    catalogue = Catalogue(items, {"7": 0, "8": 1})
    path = write_histories(tmp_path / "users.jsonl", [{"history": [7]}, {"history": [7, 8]}])
    for shows, expected in (("title", [None, (0, 1)]), ("sid", [(0,), (0, 1)])):
        rows = read_histories(path, catalogue, shows=shows, max_left_out=1).rows
        assert [row and row.history for row in rows] == expected


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(store, tmp_path):
    path = write_histories(tmp_path / "users.jsonl", [{"history": [CATALOGUE.items[i].id for i in h]} for h in HISTORIES])
    one = run(store, path, tmp_path / "one.jsonl", exclude_history=True)
    flags = {"recommend_file": path, "recommendations_file": tmp_path / "two.jsonl", "exclude_history": True}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "evaluate.py")]
    done = subprocess.run(
        [sys.executable, *command, *arguments_of(store, **flags)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert read_answers(tmp_path / "two.jsonl") == one


def test_one_history_may_be_sids_too(store, capsys):
    answers = []
    for text in ("112 | 103", f"{SIDS[12]} | {SIDS[3]}", f"{SIDS[12]} {SIDS[3]}", f"{SIDS[12]}|product number 3"):
        assert evaluate.main(arguments_of(store, recommend=text)) == 0
        answers.append(capsys.readouterr().out)
    assert "Product number 12\n" in answers[0]
    assert len(set(answers)) == 1


# ---------------------------------------------------------------------------------------------- what is refused


WRONG_FILES = {
    "users.csv": [
        ("user_id,bought\na,103\n", "has no history; its columns are 'user_id,bought', expected user_id, if"),
        ("", "is empty; expected a header line"),
        ("history\n", "has no rows"),
        ("history,history\n103,104\n", "has the column 'history' twice"),
        ("history_item_id\n\"[103, 'a' 'b']\"\n", "users.csv:2: column 'history_item_id' is not a list literal"),
        ("history\nGlue\n", "no history has a known item (1 because no item of their history is in the catalogue (line 2"),
        ("history\n" + "x" * 2**20 + "x\n", "users.csv:2: has a cell of more than 1,048,576 characters"),
    ],
    "users.jsonl": [
        ("[103]\n", "users.jsonl:1: holds [103]; expected one JSON object a line"),
        ('{"history": [103]}\n{"history": [103}\n', "users.jsonl:2: is not JSON"),
        ('{"user_id": 7}\n', "users.jsonl:1: has no history but 'user_id'"),
        ('{"history": [[103]]}\n', "users.jsonl:1: column 'history' has the entry [103]"),
        ('{"history": {"a": 1}}\n', "users.jsonl:1: column 'history' has the entry {'a': 1}"),
        ('{"history": [true]}\n', "users.jsonl:1: column 'history' has the entry True"),
        ('{"history": [1.5]}\n', "users.jsonl:1: column 'history' has 1.5 for an item id"),
        ('{"user_id": [7], "history": [103]}\n', "users.jsonl:1: has [7] for a user_id; expected a text or a number"),
        ('{"user_id": "\\ud800", "history": [103]}\n', "users.jsonl:1: holds half a character"),
        ('{"history": [103], "history": [104]}\n', "users.jsonl:1: is not JSON (the key 'history' stands twice"),
        ('{"history": "x' + "x" * 2**20 + '"}\n', "users.jsonl:1: column 'history' has a text of more than 1,048,576"),
        (f'{{"history": [{"0," * 100_000}0]}}\n', "has 100,001 items; expected 100,000 at most"),
    ],
    "users.parquet": [("history\n103\n", "users.parquet: cannot be read as Parquet")],
}


@pytest.mark.parametrize(("name", "content", "fault"), [(n, *case) for n, cases in WRONG_FILES.items() for case in cases])
def test_a_file_that_is_no_histories_ends_in_one_line_and_leaves_nothing(store, tmp_path, caplog, name, content, fault):
    (tmp_path / name).write_text(content)
    output = tmp_path / "new" / "answers.csv"
    error = refused(caplog, *arguments_of(store, recommend_file=tmp_path / name, recommendations_file=output))
    assert fault in error
    assert not output.parent.exists()


def test_parquet_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path):
    path = tmp_path / "users.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"history": ["x" * 2**20] * 128}), path, use_dictionary=False, compression="zstd"
    )
    with pytest.raises(InputError, match="unpacks to .* bytes, more than 40 times its size"):
        read_histories(path, CATALOGUE, shows="sid")


def test_flags_that_do_not_fit_together_are_refused(store, tmp_path, caplog):
    users = write_histories(tmp_path / "users.jsonl", [{"history": 103}])
    (tmp_path / "users.txt").write_text("103")
    (tmp_path / "folder.csv").mkdir()
    cases = [
        ({"recommend_file": users, "recommend": "103"}, "--recommend and --recommend_file are two things to do"),
        ({"recommend_file": tmp_path / "none.csv"}, "there is no such file"),
        ({"recommend_file": tmp_path / "users.txt"}, "is of an unknown kind; expected .csv, .parquet, .jsonl, .json"),
        ({"recommend_file": users, "recommendations_file": tmp_path / "x.xlsx"}, "is of an unknown kind"),
        ({"recommend_file": users, "recommendations_file": users}, "is the file of --recommend_file, too"),
        ({"recommend_file": users, "recommendations_file": tmp_path / "folder.csv"}, "folder.csv is no file"),
        ({"recommend_file": users, "recommendations_file": users / "x.csv"}, f"--recommendations_file {users}: "),
        ({"recommendations_file": tmp_path / "x.csv"}, "--recommendations_file needs --recommend_file"),
        ({"exclude_history": True}, "--exclude_history is for --recommend and --recommend_file"),
        ({"recommend": "<a_0><b_9><c_9>"}, "is no item id, no SID and in no title"),
    ]
    for flags, fault in cases:
        assert fault in refused(caplog, *arguments_of(store, **flags))
    assert users.read_text() == '{"history": 103}\n'


def test_a_disk_that_fills_up_leaves_the_answers_of_before(store, tmp_path, caplog, monkeypatch):
    users = write_histories(tmp_path / "users.jsonl", [{"history": 103}])
    for ending in ("csv", "jsonl", "parquet"):
        output = tmp_path / f"answers.{ending}"
        output.write_text("of before")

        def answers_of(*given):
            yield {"sid": ["<a_0>"], "item_id": ["7"], "title": ["Mug"], "log_p": [-1.0]}
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(evaluate, "answers_of", answers_of)
        error = refused(caplog, *arguments_of(store, recommend_file=users, recommendations_file=output))
        assert f"--recommendations_file {output}: cannot be written (No space left on device); make room" in error
        assert output.read_text() == "of before"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("answers.csv", "answers.jsonl", "answers.parquet", "users.jsonl")
    ]


def test_the_answers_stand_beside_other_results_where_no_place_is_given(store, tmp_path):
    users = write_histories(tmp_path / "users.jsonl", [{"history": 103}])
    assert evaluate.main(arguments_of(store, recommend_file=users, output_dir=tmp_path / "out")) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["recommendations.jsonl"]
