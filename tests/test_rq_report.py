"""The numbers of a report, checked by eye and by hand."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from refusals import refusal

from rq import quantizers, report, rqkmeans
from rq.index_file import read_sids, write_sids
from rq.measures import gini
from rq.reading import telling_words, tree, words_of
from rq.suitability import Bought, FirstCodes, expected_hit, first_codes, next_item, read_rows


@pytest.fixture
def index_file(tmp_path: Path) -> Path:
    path = tmp_path / "X.index.json"
    write_sids(path, [(0, 0), (0, 0), (1, 0), (1, 2), (1, 2), (1, 2)])
    return path


def test_collisions_by_hand(index_file):
    made = report.describe("X", read_sids(index_file), sizes=(4, 4))
    assert (made.n_items, made.n_distinct, made.shared, made.largest_group) == (6, 3, 5, 3)
    assert made.collision_rate == pytest.approx(0.5)


def test_use_of_codes_by_hand(index_file):
    first, second = report.describe("X", read_sids(index_file), sizes=(4, 4)).levels
    assert first.uses_K.tolist() == [4, 2]
    assert (first.used, first.size) == (2, 4)
    assert first.gini == pytest.approx(gini(np.array([4, 2, 0, 0])))
    assert first.perplexity == pytest.approx((3 / 2) ** (2 / 3) * 3 ** (1 / 3))
    assert second.uses_K.tolist() == [3, 3]
    assert second.perplexity == pytest.approx(2)


def test_gini_is_zero_for_even_use_and_near_one_for_a_single_code():
    assert gini(np.array([5, 5, 5, 5])) == pytest.approx(0)
    assert gini(np.array([0, 0, 0, 8])) == pytest.approx(3 / 4)


def test_an_extra_token_counts_its_own_items_only(tmp_path):
    path = tmp_path / "X.index.json"
    write_sids(path, [(0, 0, 0), (0, 0, 1), (1, 0)])
    made = report.describe("X", read_sids(path), sizes=None)
    assert (made.shared, made.shared_before) == (0, 2)
    assert [level.items for level in made.levels] == [3, 3, 2]


def test_refitted_error_is_that_of_the_best_codewords():
    rows = np.array([[0.0], [2.0], [10.0], [12.0]], np.float32)
    codes = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    variance = rows.var()
    assert report.refitted_errors(rows, codes) == pytest.approx([1 / variance, 0.0])


def test_own_and_refitted_error_agree_for_kmeans(tmp_path):
    rows = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
    quantizer = rqkmeans.fit(rows, (8, 8), seed=0, rounds=100)
    codes = quantizer.codes(rows)
    own = np.array(quantizers.squared_error(quantizer, rows, codes)) / rows.var(axis=0).mean()
    np.testing.assert_allclose(report.refitted_errors(rows, codes), own, rtol=0.02)


def test_the_command_reports_indexes_side_by_side_with_one_picture(index_file, tmp_path, capsys):
    rows = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    np.save(tmp_path / "E.npy", rows)
    rqkmeans.main(
        ["--data_path", str(tmp_path / "E.npy"), "--levels", "2,2", "--output", str(tmp_path / "Y.index.json")]
        + ["--ckpt_path", str(tmp_path / "c"), "--seed", "0"]
    )
    capsys.readouterr()
    picture, table = tmp_path / "report.png", tmp_path / "report.md"
    report.main(
        [
            str(index_file),
            str(tmp_path / "Y.index.json"),
            "--data_path",
            str(tmp_path / "E.npy"),
            "--ckpt_path",
            "-",
            str(tmp_path / "c"),
        ]
        + ["--output", str(picture), "--table", str(table)]
    )
    told = capsys.readouterr().out
    lines = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in table.read_text().splitlines()
    }
    assert lines[""] == ["X", "Y"]
    assert lines["collision rate"][0] == "50.00%"
    assert lines["MSE after level 2"][0] == ""
    assert float(lines["variance left after level 2"][1]) < float(lines["variance left after level 1"][1])
    assert told == table.read_text()  # standard output holds the table alone
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_picture_writes_numbers_and_no_markup(index_file, tmp_path, monkeypatch):
    """Names may hold a $, so markup is off; the logarithmic axis would otherwise show its own: $10^{3}$."""
    from matplotlib import pyplot as plt

    write_sids(tmp_path / "L.index.json", [(0, i) for i in range(900)] + [(1, i) for i in range(90)] + [(2, 0)])
    drawn: list[str] = []

    def kept(figure: object) -> None:
        drawn.extend(label.get_text() for axes in figure.get_axes() for label in axes.get_yticklabels(which="both"))

    monkeypatch.setattr(plt, "close", kept)
    report.main([str(tmp_path / "L.index.json"), "--output", str(tmp_path / "r.png")])
    assert "100" in drawn
    assert not any("$" in text or "\\" in text for text in drawn)


def test_an_index_made_elsewhere_needs_nothing_else(tmp_path, capsys):
    path = tmp_path / "theirs.index.json"
    path.write_text(json.dumps({str(i): [f"<a_{i % 3 + 1}>", "<b_256>"] for i in range(9)}, indent=1))
    report.main([str(path), "--output", str(tmp_path / "r.png")])
    told = capsys.readouterr().out
    assert "3 / 4" in told
    assert "66.67%" in told
    assert (tmp_path / "r.png").exists()


def test_a_code_beyond_the_given_levels_is_one_line(index_file):
    assert "code 2 at level 2, whose codebook holds 0..1" in refusal(report.main, index_file, "--levels", "2,2")


def test_each_index_needs_its_own_checkpoint_entry(index_file, tmp_path):
    np.save(tmp_path / "E.npy", np.zeros((6, 3), np.float32))
    told = refusal(report.main, index_file, "--data_path", tmp_path / "E.npy", "--ckpt_path", "-", "-")
    assert "2 entries for 1 indexes" in told


# ---------------------------------------------------------------------------------------------- what is bought next

INDEX = {0: (0, 0), 1: (0, 1), 2: (1, 0), 3: (1, 1)}


def test_lift_is_the_share_over_that_of_items_as_popular():
    rows = [Bought((0,), 1), Bought((1,), 0), Bought((2,), 3), Bought((3,), 2)]
    first, second = next_item(INDEX, rows, 2)
    assert (first.shared, first.chance, first.lift) == (1.0, 0.5, 2.0)  # half of all next items have the same first code
    assert (second.shared, second.chance, second.lift) == (0.0, 0.25, 0.0)
    popular = [Bought((0,), 1), Bought((1,), 0), Bought((2,), 1)]  # first code 0 is bought always, whatever the history
    assert next_item(INDEX, popular, 1)[0].lift == pytest.approx(1.0)


def test_what_is_bought_again_counts_in_no_lift():
    assert next_item(INDEX, [Bought((0,), 0), Bought((0,), 2)], 1)[0].shared == 0


def test_a_hit_on_a_sid_counts_by_its_items():
    sizes = np.array([1, 4, 20, 3])
    scores = np.array([0.5, 0.3, 0.2, 0.0])
    assert [expected_hit(scores, target, sizes) for target in range(4)] == [1, 1, 5 / 20, 0]
    assert expected_hit(np.array([0.0, 0.0, 1.0, 0.0]), 2, sizes) == 10 / 20


def test_one_sid_for_all_items_wins_nothing():
    """An index that collides would be right always, if a hit on a SID were a hit on the item."""
    rows = [Bought((item,), (item + 1) % 40) for item in range(40)]
    assert first_codes(dict.fromkeys(range(40), (0,)), rows, rows) == pytest.approx(10 / 40)
    assert first_codes({item: (item,) for item in range(40)}, rows, rows) == 1


def test_codes_that_follow_what_is_bought_lead_further_than_shuffled_ones():
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(2_000):  # 50 groups of 8 items; what is bought next is of the same group
        group, *two = rng.integers(50), *rng.choice(8, 2, replace=False)
        rows.append(Bought((int(group * 8 + two[0]),), int(group * 8 + two[1])))
    good = {item: (item // 8, item % 8) for item in range(400)}
    shuffled = dict(zip(range(400), (good[item] for item in rng.permutation(400).tolist()), strict=True))
    assert first_codes(good, rows[:1800], rows[1800:]) > 5 * first_codes(shuffled, rows[:1800], rows[1800:])
    assert next_item(good, rows, 1)[0].lift > 20
    assert next_item(shuffled, rows, 1)[0].lift < 2


def test_scores_are_probabilities():
    rows = [Bought((0,), 1), Bought((0, 2), 3), Bought((3,), 0)]
    for item in range(4):
        assert FirstCodes(INDEX, rows).scores((item,)).sum() == pytest.approx(1)


def test_the_newest_item_of_a_history_weighs_most():
    rows = [Bought((0,), 1)] * 5 + [Bought((2,), 3)] * 5
    scores = FirstCodes(INDEX, rows).scores((0, 2))
    assert scores[3] > scores[1] > 0


def write_rows(path: Path, rows: list[tuple[list[int], int]]) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("user_id", "history_item_id", "item_id"), *(("u", *row) for row in rows)])
    return path


def test_the_command_says_which_index_to_train_and_what_to_do(tmp_path, capsys):
    """Eight groups of five, each bought together. One index knows the groups, one mixes them, one merges items."""
    rows = [([group * 5 + a], group * 5 + b) for group in range(8) for a in range(5) for b in range(5) if a != b] * 3
    train = write_rows(tmp_path / "X.train.csv", rows)
    sids = {"groups": [(i // 5, i % 5) for i in range(40)], "mixed": [(i % 8, i // 8) for i in range(40)]}
    sids["merged"] = [(i // 20,) for i in range(40)]
    for name, index in sids.items():
        write_sids(tmp_path / f"{name}.index.json", index)
    paths = [str(tmp_path / f"{name}.index.json") for name in sids]
    report.main([*paths, "--train_file", str(train), "--eval_file", str(train), "--table", str(tmp_path / "t.md")])
    told = capsys.readouterr().out
    assert told == (tmp_path / "t.md").read_text()
    said = told.split("\n\n")[1].splitlines()
    assert said[0].startswith("Train groups: ")
    assert "100.0% of the rows held out" in said[0]
    assert "8.0 times as often as by chance" in said[0]
    assert any(line.startswith("mixed: ") and "as if shuffled" in line for line in said)
    assert any(line.startswith("merged: 100% of the items share their SID, up to 20 of them one") for line in said)
    lift = next(line for line in told.splitlines() if line.startswith("| next item shares a: lift"))
    assert [cell.strip() for cell in lift.split("|")[2:-1]] == ["8.0", "0.0", "2.0"]


@pytest.mark.parametrize(
    ("cells", "fault"),
    [
        (("[0, 9]", "1"), "X.train.csv:2: history_item_id '[0, 9]', item_id '1'; expected a list of ids and an id"),
        (("[0]", "x"), "item_id 'x'"),
        (("__import__('os')", "1"), "history_item_id \"__import__('os')\""),
        (("[]", "1"), "no row has a history"),
    ],
)
def test_rows_that_do_not_fit_the_index_are_one_line(index_file, tmp_path, cells, fault):
    train = write_rows(tmp_path / "X.train.csv", [cells])
    assert fault in refusal(report.main, index_file, "--train_file", train)


def test_a_table_that_is_none_of_prepare_is_one_line(index_file, tmp_path):
    (tmp_path / "o.csv").write_text("user,item\na,1\n")
    assert "has no columns history_item_id and item_id" in refusal(
        report.main, index_file, "--train_file", tmp_path / "o.csv"
    )
    rows = read_rows(write_rows(tmp_path / "X.csv", [([0, 1], 2)]), n_items=3)
    assert rows == [Bought((0, 1), 2)]


# ---------------------------------------------------------------------------------------------- SIDs to be read


def test_words_that_set_a_code_apart():
    titles = [f"red pan {i} for home" for i in range(30)] + [f"blue screw {i} for home" for i in range(70)]
    everywhere = Counter(word for title in titles for word in words_of(title))
    group = Counter(word for title in titles[:30] for word in words_of(title))
    assert telling_words(group, everywhere, 30, 100) == ["pan", "red"]  # not "for" and "home", which all have
    assert words_of("Tape, 3 rolls of TAPE") == {"tape", "rolls"}


def test_the_tree_shows_sizes_words_and_titles(index_file, tmp_path):
    titles = ["Red \x1b[2Jpan", "Red pot", "Blue saw", "Blue file", "", "Blue drill"]
    shown = tree(read_sids(index_file), titles, most_codes=1)
    assert shown.splitlines()[0].startswith("<a_1>  4 items")
    assert "  <a_1><b_2>  3 items" in shown
    assert "(no title)" in shown
    assert shown.endswith(".. and 1 more first codes")
    assert "\x1b" not in tree(read_sids(index_file), titles, most_codes=9)


def test_the_command_writes_the_trees_of_all_indexes(index_file, tmp_path):
    items = tmp_path / "X.item.json"
    items.write_text(json.dumps({str(i): {"title": f"Pan {i}"} for i in range(6)}))
    report.main([str(index_file), str(index_file), "--item_file", str(items), "--tree", str(tmp_path / "t.txt")])
    assert (tmp_path / "t.txt").read_text().count("<a_1>  4 items") == 2
    assert "give --item_file too" in refusal(report.main, index_file, "--tree", tmp_path / "u.txt")
    items.write_text(json.dumps({"0": {"title": "Pan"}}))
    told = refusal(report.main, index_file, "--item_file", items, "--tree", tmp_path / "u.txt")
    assert "its items are not the 1 of" in told
    assert not (tmp_path / "u.txt").exists()
