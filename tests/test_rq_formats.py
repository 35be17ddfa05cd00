"""Files of other programs enter rq.prepare as they are: a small file of each, the command, rows counted by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import refusals

from rq import prepare


def rows_of(path: Path) -> list[tuple[str, str, str]]:
    """(user, history, item) of each row of a CSV."""
    with open(path, newline="") as file:
        return [(row["user_id"], row["history_item_id"], row["item_id"]) for row in csv.DictReader(file)]


def parts_of(folder: Path) -> dict[str, list[tuple[str, str, str]]]:
    return {part: rows_of(folder / f"X.{part}.csv") for part in ("train", "valid", "test")}


# ---------------------------------------------------------------------------------------------- LC-Rec, LETTER

INTER = {"0": [0, 1, 2, 3], "1": [3, 0], "2": [1], "3": [2, 2, 0]}
INDEX = {str(item): [f"<a_{item}>", "<b_0>", f"<c_{9 - item}>"] for item in range(5)}
LC_REC_ITEMS = {str(item): {"title": f"Drum {item}", "description": "", "brand": ""} for item in range(5)}
LEAVE_ONE_OUT = ("--split", "leave_one_out", "--k_core", "1")


@pytest.fixture
def triple(tmp_path: Path) -> Path:
    """The folder of a triple X.inter.json, X.index.json, X.item.json, indented as LC-Rec writes them."""
    for name, content in {"inter": INTER, "index": INDEX, "item": LC_REC_ITEMS}.items():
        (tmp_path / f"X.{name}.json").write_text(json.dumps(content, indent=4))
    return tmp_path


def triple_line(folder: Path, *extra: str, items: bool = True) -> list[str]:
    line = [
        f"--interactions={folder}/X.inter.json",
        f"--index={folder}/X.index.json",
        f"--output_dir={folder}/out",
        "--name=X",
    ]
    return [*line, *([f"--items={folder}/X.item.json"] if items else []), *extra]


def test_a_triple_becomes_csvs_in_one_run_and_keeps_its_numbers(triple, capsys):
    prepare.main(triple_line(triple, *LEAVE_ONE_OUT, "--max_history", "2"))
    # the last item of a user is test, the last but one valid, an earlier one train; a user's first item is only history
    assert parts_of(triple / "out") == {
        "train": [("0", "[0]", "1"), ("1", "[3]", "0")],
        "valid": [("0", "[0, 1]", "2"), ("3", "[2]", "2")],
        "test": [("0", "[1, 2]", "3"), ("3", "[2, 2]", "0")],
    }
    told = capsys.readouterr().err
    assert "X.inter.json: LC-Rec's user -> items in order; 4 users, 10 items in all" in told
    assert "titles of 5 of 5 items" in told
    assert "1 of 5 items are in no row that is kept" in told
    with open(triple / "out/X.test.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert row["history_item_title"] == "['Drum 1', 'Drum 2']"
    assert row["history_item_sid"] == "['<a_1><b_0><c_8>', '<a_2><b_0><c_7>']"
    assert (row["item_title"], row["item_sid"]) == ("Drum 3", "<a_3><b_0><c_6>")
    assert (triple / "out/X.info.txt").read_text().splitlines()[4] == "<a_4><b_0><c_5>\tDrum 4\t4"


def test_a_triple_without_titles_says_which_tasks_are_not_to_be_had(triple, capsys):
    prepare.main(triple_line(triple, *LEAVE_ONE_OUT, items=False))
    told = capsys.readouterr().err
    assert "no titles, SIDs only: train with --tasks sid_sid and without --item_meta_path; the tasks item, sid_title" in told
    assert parts_of(triple / "out")["test"] == [("0", "[0, 1, 2]", "3"), ("3", "[2, 2]", "0")]
    assert (triple / "out/X.info.txt").read_text().splitlines()[0] == "<a_0><b_0><c_9>\t\t0"


@pytest.mark.parametrize("indent", [None, 1])
def test_a_triple_is_known_by_its_content_whatever_its_name(triple, indent):
    path = triple / "purchases.json"
    path.write_text(json.dumps(INTER, indent=indent))
    prepare.main([*triple_line(triple, *LEAVE_ONE_OUT, items=False), f"--interactions={path}"])
    assert [len(rows) for rows in parts_of(triple / "out").values()] == [2, 2, 2]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("inter", {"0": [0, 7, 1]}, "user '0', item 2 of the sequence: item 7 is not in "),
        ("inter", {"0": [0, 1.5]}, "user '0' has the item 1.5; expected "),
        ("inter", {"0": 5}, "'0' has 5; expected "),
        ("inter", {"0": []}, "no user has an item; expected "),
        ("inter", [], "[]; expected "),
        ("item", {"17": {"title": "Drum"}}, "its first item is '17', the index's '0'; give the items of the same dataset"),
        ("item", {"0": "Drum"}, "'0' has 'Drum'; expected "),
    ],
)
def test_a_triple_that_does_not_fit_is_refused(triple, name, content, told):
    (triple / f"X.{name}.json").write_text(json.dumps(content))
    line = refusals.refusal(prepare.main, *triple_line(triple, *LEAVE_ONE_OUT))
    assert line.startswith(f"rq.prepare: {triple}/X.{name}.json")
    assert told in line
    assert not (triple / "out").exists()


def test_sequences_without_times_cannot_be_split_by_time(triple):
    told = refusals.refusal(prepare.main, *triple_line(triple, "--k_core", "1"))
    assert "X.inter.json has no times; give --split leave_one_out" in told
    assert not (triple / "out").exists()
