"""The numbers of a report, checked by eye and by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from refusals import refusal

from rq import quantizers, report, rqkmeans
from rq.index_file import read_sids, write_sids


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
    assert first.gini == pytest.approx(report.gini(np.array([4, 2, 0, 0])))
    assert first.perplexity == pytest.approx((3 / 2) ** (2 / 3) * 3 ** (1 / 3))
    assert second.uses_K.tolist() == [3, 3]
    assert second.perplexity == pytest.approx(2)


def test_gini_is_zero_for_even_use_and_near_one_for_a_single_code():
    assert report.gini(np.array([5, 5, 5, 5])) == pytest.approx(0)
    assert report.gini(np.array([0, 0, 0, 8])) == pytest.approx(3 / 4)


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
