"""What rq writes, sft reads: from a user's tables through an index to the rows that are trained on."""

import csv
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from rq import prepare, rqkmeans, text2emb, training_files
from rq.index_file import read_sids, sid_tokens, write_sids
from sid_sft.interactions import CSV_COLUMNS, read_rows
from sid_sft.parquet_rows import LONGEST_HISTORY

data = pytest.importorskip("data", reason="rq/ stands alone here")
sft = pytest.importorskip("sft", reason="rq/ stands alone here")


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with all that rq makes of 24 products, 3 of them alike to the letter, and 8 users with 6 orders each."""
    rng = np.random.default_rng(0)
    words = ["steel", "drill", "red", "blue", "saw", "tape", '"6\'" bit', "glue"]
    titles = [" ".join(rng.choice(words, 3)) for _ in range(21)] + ["twin steel saw"] * 3
    orders = [(f"u{user}", f"p{(5 * user + step) % 24}", 100 * user + step) for user in range(8) for step in range(6)]
    for name, header, rows in (
        ("orders", ("user_id", "item_id", "timestamp"), orders),
        ("products", ("item_id", "title"), [(f"p{number}", title) for number, title in enumerate(titles)]),
    ):
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    prepared = [
        "--interactions",
        str(tmp_path / "orders.csv"),
        "--items",
        str(tmp_path / "products.csv"),
        "--k_core",
        "1",
    ]
    prepared += ["--output_dir", str(tmp_path), "--name", "Shop"]
    embeddings, index = str(tmp_path / "E.npy"), str(tmp_path / "Shop.index.json")
    prepare.main(prepared)
    text2emb.main(["--item_file", str(tmp_path / "Shop.item.json"), "--output", embeddings])
    rqkmeans.main(["--data_path", embeddings, "--levels", "4,4,4", "--output", index, "--device", "cpu"])
    prepare.main([*prepared, "--index", index])
    return tmp_path


def test_both_sides_name_the_columns_of_the_csvs_alike_and_the_longest_history():
    assert training_files.CSV_COLUMNS == CSV_COLUMNS
    assert training_files.LONGEST_HISTORY == LONGEST_HISTORY


def test_sft_reads_the_tokens_of_an_index_of_mixed_depth(shop):
    index = read_sids(shop / "Shop.index.json")
    assert {len(codes) for codes in index.values()} == {3, 4}
    tokens = sft.TokenExtender(str(shop), "Shop", ".index.json").get_new_tokens()
    assert tokens == sorted({token for codes in index.values() for token in sid_tokens(codes)})


def test_sft_reads_every_row_that_prepare_wrote_and_finds_nothing_amiss(shop, caplog):
    caplog.set_level(logging.INFO)
    catalogue = data.read_catalogue(shop / "Shop.index.json", shop / "Shop.item.json")
    assert [item.id for item in catalogue.items] == [str(number) for number in range(len(catalogue.items))]
    rows = [row for part in ("train", "valid", "test") for row in read_rows(shop / f"Shop.{part}.csv", catalogue)]
    assert len(rows) == 8 * 5
    assert "left out" not in caplog.text
    assert "differ from the item file" not in caplog.text
    assert "share their SID" not in caplog.text


def test_sft_reads_the_rows_of_a_triple_without_titles(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "X.inter.json").write_text('{"0": [0, 1, 2, 3], "1": [3, 0, 2]}')
    write_sids(tmp_path / "X.index.json", [(item, 0) for item in range(4)])
    line = [f"--interactions={tmp_path}/X.inter.json", f"--index={tmp_path}/X.index.json", f"--output_dir={tmp_path}"]
    prepare.main([*line, "--name=X", "--split=leave_one_out", "--k_core=1"])
    catalogue = data.read_catalogue(tmp_path / "X.index.json", None)
    rows = {part: list(read_rows(tmp_path / f"X.{part}.csv", catalogue)) for part in ("train", "valid", "test")}
    assert [(row.user, row.history, row.item) for row in rows["train"]] == [("0", (0,), 1)]
    assert [(row.user, row.history, row.item) for row in rows["valid"]] == [("0", (0, 1), 2), ("1", (3,), 0)]
    assert [(row.user, row.history, row.item) for row in rows["test"]] == [("0", (0, 1, 2), 3), ("1", (3, 0), 2)]
    assert "left out" not in caplog.text
    assert "title" not in caplog.text


REAL = Path(__file__).parent.parent.parent / "shared/data/letter"


@pytest.mark.skipif(not REAL.exists(), reason="the Instruments triple is not beside this checkout")
def test_the_real_instruments_triple_is_split_as_its_authors_split_it(tmp_path):
    line = [
        f"--interactions={REAL}/Instruments.inter.json",
        f"--index={REAL}/Instruments.index.json",
        f"--output_dir={tmp_path}",
    ]
    prepare.main([*line, "--name=X", "--split=leave_one_out", "--max_history=20", "--k_core=1"])
    users = json.loads((REAL / "Instruments.inter.json").read_text())
    expected = {"train": [], "valid": [], "test": []}
    for user, items in users.items():
        for at in range(1, len(items)):
            part = {len(items) - 1: "test", len(items) - 2: "valid"}.get(at, "train")
            expected[part].append((user, items[max(0, at - 20) : at], items[at]))
    assert [len(rows) for rows in expected.values()] == [131_837, 24_772, 24_772]
    for part, rows in expected.items():
        with open(tmp_path / f"X.{part}.csv", newline="") as file:
            written = [
                (row["user_id"], json.loads(row["history_item_id"]), int(row["item_id"])) for row in csv.DictReader(file)
            ]
        assert sorted(written) == sorted(rows)
