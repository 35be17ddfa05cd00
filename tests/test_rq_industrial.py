"""The real Industrial items, where they lie beside the checkout:
from `.item.json` alone to an index, and the shipped index.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from rq import generate_indices, report, rqkmeans, text2emb
from rq.index_file import read_sids, sid_tokens

SHARED = Path(__file__).parent.parent.parent / "shared"
ITEMS = SHARED / "data/amazon/Industrial_and_Scientific.item.json"
INDEX = SHARED / "data/amazon/Industrial_and_Scientific.index.json"
ENCODER = SHARED / "base-lm"
pytestmark = pytest.mark.skipif(not ITEMS.exists(), reason="the Industrial items are not beside this checkout")


def first_items(tmp_path: Path, count: int) -> Path:
    items = json.loads(ITEMS.read_text())
    path = tmp_path / "some.item.json"
    path.write_text(json.dumps({str(item): items[str(item)] for item in range(count)}))
    return path


def test_from_items_alone_to_an_index_and_five_hundred_more_appended(tmp_path):
    some, rows, more, output = (tmp_path / name for name in ("some.item.json", "E.npy", "more.npy", "X.index.json"))
    first_items(tmp_path, 3_186)
    text2emb.main(["--item_file", str(some), "--output", str(rows), "--dim", "32"])
    common = ["--output", str(output), "--ckpt_path", str(tmp_path / "c"), "--device", "cpu"]
    rqkmeans.main(["--item_file", str(some), "--data_path", str(rows), "--levels", "64,64,64", "--rounds", "3", *common])
    before = output.read_text().splitlines()[:-1]
    assert len(set(read_sids(output).values())) == len(before) == 3_186

    text2emb.main(["--item_file", str(ITEMS), "--output", str(more), "--encoder", str(tmp_path / "E.tfidf")])
    generate_indices.main(["--item_file", str(ITEMS), "--data_path", str(more), "--append", *common])
    assert output.read_text().splitlines()[:3_186] == before
    assert len(set(read_sids(output).values())) == 3_686


def test_the_shipped_index_is_reported_as_the_facts_say():
    made = report.describe("shipped", read_sids(INDEX), sizes=None)
    assert (made.n_items, made.n_distinct, made.shared) == (3_686, 3_670, 31)
    assert [level.used for level in made.levels] == [48, 256, 256]


def test_a_real_causal_encoder_embeds_by_its_last_token(tmp_path, capsys):
    if not ENCODER.exists():
        pytest.skip("no encoder beside this checkout")
    arguments = [
        "--item_file",
        str(first_items(tmp_path, 12)),
        "--encoder",
        str(ENCODER),
        "--device",
        "cpu",
        "--max_len",
        "16",
    ]
    text2emb.main([*arguments, "--output", str(tmp_path / "E.npy")])
    assert "last pooling, up to 16 tokens" in capsys.readouterr().err
    text2emb.main([*arguments, "--output", str(tmp_path / "F.npy"), "--batch_size", "1", "--normalize"])
    rows, alone = np.load(tmp_path / "E.npy"), np.load(tmp_path / "F.npy")
    assert rows.shape == (12, 256)
    np.testing.assert_allclose(rows / np.linalg.norm(rows, axis=1, keepdims=True), alone, atol=1e-4)


def test_the_item_ids_of_the_index_are_those_of_the_items():
    assert set(json.loads(INDEX.read_text())) == set(json.loads(ITEMS.read_text()))
    assert sid_tokens((236, 231, 226)) == json.loads(INDEX.read_text())["0"]
