"""Embeddings and codebooks say which encoder they are of, and what does not belong together is refused."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from refusals import refusal

from rq import generate_indices, report, rqkmeans, rqvae, text2emb
from rq.checkpoints import load_checkpoint

WORDS = ["steel", "drill", "bit", "glue", "red", "blue", "small", "large", "tape", "saw"]
QUICK = ["--epochs", "1", "--hidden", "8", "--latent", "4"]


def embed(folder: Path, name: str, *extra: object) -> Path:
    text2emb.main([f"--item_file={folder / 'X.item.json'}", f"--output={folder / name}", "--dim=6", *map(str, extra)])
    return folder / name


def write_catalogue(folder: Path, count: int) -> None:
    """Items whose titles are three words, and whose brand is one: the first 60 are the same for any count."""
    rng = np.random.default_rng(0)
    items = {str(i): {"title": " ".join(rng.choice(WORDS, 3)), "brand": str(rng.choice(WORDS))} for i in range(count)}
    (folder / "X.item.json").write_text(json.dumps(items))


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with 60 items, their embeddings E.npy, the checkpoint c and the index of it."""
    write_catalogue(tmp_path, 60)
    embed(tmp_path, "E.npy")
    rqkmeans.main([*paths(tmp_path, "E.npy", "X.index.json"), "--levels=8,8"])
    return tmp_path


def paths(folder: Path, embeddings: str, index: str, *, checkpoint: str = "c") -> list[str]:
    return [
        f"--item_file={folder / 'X.item.json'}",
        f"--data_path={folder / embeddings}",
        f"--ckpt_path={folder / checkpoint}",
        f"--output={folder / index}",
        "--device=cpu",
    ]


def test_a_record_says_how_the_embeddings_were_made_and_the_checkpoint_repeats_it(shop):
    record = json.loads((shop / "E.encoder.json").read_text())
    assert record["origin"]["encoder"] == "E.tfidf"
    assert record["origin"]["fields"] == "title,brand,categories,description"
    assert re.fullmatch("[0-9a-f]{64}", record["origin"]["encoder_sha256"])
    assert json.loads((shop / "c/config.json").read_text())["origin"] == record["origin"]
    assert str(shop) not in (shop / "E.encoder.json").read_text() + (shop / "c/config.json").read_text()
    assert np.load(shop / "E.npy").dtype == np.float32


def test_embeddings_of_another_encoder_of_the_same_width_are_refused(shop):
    embed(shop, "F.npy", "--fields", "brand")
    told = refusal(generate_indices.main, *paths(shop, "F.npy", "Y.index.json"))
    assert re.search(r"c is of E.tfidf \(\w{8}\), title,brand,categories,description; ", told)
    assert re.search(r"F.npy is of F.tfidf \(\w{8}\), brand; embed with the encoder and the flags of the checkpoint", told)
    assert not (shop / "Y.index.json").exists()


def test_appending_rows_of_another_encoder_is_refused_and_of_the_same_one_is_not(shop):
    before = (shop / "X.index.json").read_text().splitlines()[:60]
    write_catalogue(shop, 70)
    embed(shop, "refitted.npy")
    told = refusal(generate_indices.main, *paths(shop, "refitted.npy", "X.index.json"), "--append")
    assert "is of refitted.tfidf" in told
    shutil.move(shop / "E.tfidf", shop / "moved.tfidf")
    embed(shop, "more.npy", "--encoder", shop / "moved.tfidf")
    generate_indices.main([*paths(shop, "more.npy", "X.index.json"), "--append"])
    assert (shop / "X.index.json").read_text().splitlines()[:60] == before


def test_rows_scaled_to_length_one_are_of_another_space(shop):
    embed(shop, "F.npy", "--encoder", shop / "E.tfidf", "--normalize")
    assert "F.npy is of E.tfidf (" in refusal(generate_indices.main, *paths(shop, "F.npy", "Y.index.json"))


def test_report_and_resumed_training_refuse_another_encoder_too(shop):
    embed(shop, "F.npy", "--fields", "brand")
    told = refusal(report.main, shop / "X.index.json", f"--data_path={shop / 'F.npy'}", "--ckpt_path", shop / "c")
    assert "F.npy is of F.tfidf" in told
    rqvae.main([*paths(shop, "E.npy", "V.index.json", checkpoint="v"), "--levels=4,4", *QUICK])
    other = [*paths(shop, "F.npy", "W.index.json"), "--levels=4,4", f"--resume_from_checkpoint={shop / 'v'}", *QUICK]
    assert "F.npy is of F.tfidf" in refusal(rqvae.main, *other, "--overwrite")
    assert not (shop / "W.index.json").exists()


def test_without_a_record_one_line_warns_and_the_right_embeddings_pass(shop, capsys):
    (shop / "E.encoder.json").unlink()
    capsys.readouterr()
    generate_indices.main(paths(shop, "E.npy", "Y.index.json"))
    assert capsys.readouterr().err.count("E.npy does not say which encoder it is of") == 1
    assert (shop / "Y.index.json").read_bytes() == (shop / "X.index.json").read_bytes()


def test_without_a_record_embeddings_that_the_codebooks_do_not_fit_are_refused(shop):
    rows = np.load(shop / "E.npy")
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    np.save(shop / "G.npy", (rows @ turn).astype(np.float32))
    told = refusal(generate_indices.main, *paths(shop, "G.npy", "Y.index.json"))
    assert "explains hardly anything of" in told
    assert not (shop / "Y.index.json").exists()


def test_checkpoints_and_codebooks_made_before_there_were_records_still_load(shop, capsys):
    quantizer = load_checkpoint(shop / "c")
    books = {f"codebook_{level}": book.numpy() for level, book in enumerate(quantizer.residual.codebooks)}
    np.savez(shop / "X.codebooks.npz", **books)
    config = json.loads((shop / "c/config.json").read_text())
    del config["origin"]
    (shop / "c/config.json").write_text(json.dumps(config))
    for number, checkpoint in enumerate(("c", "X.codebooks.npz")):
        generate_indices.main(paths(shop, "E.npy", f"{number}.index.json", checkpoint=checkpoint))
        assert f"{checkpoint} does not say which encoder it is of" in capsys.readouterr().err
        assert (shop / f"{number}.index.json").read_bytes() == (shop / "X.index.json").read_bytes()


def test_a_record_whose_rows_were_replaced_is_refused(shop):
    np.save(shop / "E.npy", np.load(shop / "E.npy") + 1)
    told = refusal(generate_indices.main, *paths(shop, "E.npy", "Y.index.json"))
    assert "E.encoder.json is the record of other rows than" in told


def test_embeddings_of_other_texts_than_the_item_file_holds_are_refused(shop):
    items = json.loads((shop / "X.item.json").read_text())
    (shop / "X.item.json").write_text(json.dumps({**items, "0": items["1"], "1": items["0"]}))
    told = refusal(rqkmeans.main, *paths(shop, "E.npy", "Y.index.json"), "--levels=8,8", "--overwrite")
    assert "E.npy was made of other texts than" in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not JSON"),
        ("[]", "not a record of rq.text2emb"),
        ("{}", "not a record of rq.text2emb, which has origin"),
        (None, "encoder.json: max_len is 'long', expected a value of type int"),
    ],
)
def test_a_broken_record_is_refused_in_one_line(shop, text, told):
    path = shop / "E.encoder.json"
    record = json.loads(path.read_text())
    record["origin"]["max_len"] = "long"
    path.write_text(json.dumps(record) if text is None else text)
    assert told in refusal(generate_indices.main, *paths(shop, "E.npy", "Y.index.json"))


@pytest.mark.parametrize("config", ["[]", '{"method": "rqkmeans", "origin": 3}', '{"origin": {"encoder": "x"}}'])
def test_a_broken_config_of_a_checkpoint_is_refused_in_one_line(shop, config):
    (shop / "c/config.json").write_text(config)
    assert "config.json: " in refusal(generate_indices.main, *paths(shop, "E.npy", "Y.index.json"))


def test_broken_arrays_checkpoints_and_encoders_are_one_line_each(shop):
    (shop / "broken.npz").write_bytes(b"PK\3\4 no archive")
    shutil.copy(shop / "E.npy", shop / "array.npz")
    shutil.copy(shop / "broken.npz", shop / "broken.npy")
    with open(shop / "codes.npy", "wb") as file:
        np.savez(file, codes=np.zeros((60, 2), np.int32))
    index = f"--output={shop / 'Y.index.json'}"
    for checkpoint in ("broken.npz", "array.npz"):
        told = refusal(generate_indices.main, *paths(shop, "E.npy", "Y.index.json", checkpoint=checkpoint))
        assert f"{checkpoint}: " in told
        assert "expected arrays codebook_0" in told
    assert "broken.npy: not a plain .npy array" in refusal(generate_indices.main, *paths(shop, "broken.npy", "Y.index.json"))
    told = refusal(generate_indices.main, f"--codes_path={shop / 'codes.npy'}", "--levels=8,8", index)
    assert "codes.npy: not a plain .npy array (it is an archive, .npz)" in told
    (shop / "c/config.json").write_text('{"method": "rqkmeans", "n_dims": "x", "levels": [8, 8]}')
    told = refusal(generate_indices.main, *paths(shop, "E.npy", "Y.index.json"))
    assert "config.json: " in told
    assert "n_dims is 'x'; expected a number of dimensions, as rq writes it" in told
    assert not (shop / "Y.index.json").exists()
