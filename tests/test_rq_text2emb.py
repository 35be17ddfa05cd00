"""Texts to rows: what is read, how it is pooled, and that new items are embedded like the old ones."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refusal
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, PreTrainedTokenizerFast

from rq import shards, text2emb
from rq.catalogue import item_text, read_items

ROOT = Path(__file__).parent.parent
WORDS = ["steel", "drill", "bit", "glue", "red", "blue", "small", "large", "tape", "saw"]


@pytest.fixture
def item_file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    items = {str(i): {"title": " ".join(rng.choice(WORDS, 1 + i % 5)), "description": "", "brand": ""} for i in range(30)}
    items["3"]["title"] = ""
    items["7"]["description"] = "['steel saw.', 'red']"
    path = tmp_path / "X.item.json"
    path.write_text(json.dumps(items))
    return path


def encoder_folder(tmp_path: Path, *, causal: bool) -> Path:
    """A tiny random encoder with a word-level tokenizer, saved like a real one."""
    folder = tmp_path / ("causal" if causal else "masked")
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]").save_pretrained(folder)
    torch.manual_seed(0)
    size = len(vocabulary)
    if causal:
        GPT2Model(GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2, n_positions=32)).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    else:
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        BertModel(BertConfig(vocab_size=size, max_position_embeddings=32, **shape)).save_pretrained(folder)
    return folder


def embed(item_file: Path, output: Path, *extra: object) -> np.ndarray:
    text2emb.main(["--item_file", str(item_file), "--output", str(output), "--device", "cpu", *map(str, extra)])
    return np.load(output, allow_pickle=False)


def test_descriptions_that_are_lists_are_read_as_lists():
    assert item_text({"title": "Saw", "description": "['Cuts  well.', \"It's sharp.\"]"}) == "Saw Cuts well. It's sharp."
    assert item_text({"title": "Saw", "description": "[50-Pack] of saws"}) == "Saw [50-Pack] of saws"
    assert item_text({"title": "", "description": "[]", "brand": None}) == ""
    assert item_text({"title": "A", "brand": "B", "categories": "C"}, ("brand", "title")) == "B A"


def test_items_are_ordered_by_number_and_not_by_text(tmp_path):
    path = tmp_path / "X.item.json"
    path.write_text(json.dumps({str(i): {"title": str(i)} for i in reversed(range(12))}))
    assert [item["title"] for item in read_items(path)] == [str(i) for i in range(12)]


def test_tfidf_needs_no_download_and_gives_one_float32_row_an_item(item_file, tmp_path, capsys):
    rows = embed(item_file, tmp_path / "E.npy", "--dim", 6)
    assert rows.shape == (30, 6)
    assert rows.dtype == np.float32
    assert "30 items, 1 with no text" in capsys.readouterr().err
    assert not rows[3].any()
    assert rows[2].any()


def test_equal_texts_get_equal_rows_and_normalised_ones_length_one(item_file, tmp_path):
    items = json.loads(item_file.read_text())
    items["5"] = items["9"]
    item_file.write_text(json.dumps(items))
    rows = embed(item_file, tmp_path / "E.npy", "--dim", 6, "--normalize")
    np.testing.assert_array_equal(rows[5], rows[9])
    lengths = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(np.delete(lengths, 3), 1, rtol=1e-5)
    assert lengths[3] == 0


def test_new_items_are_embedded_like_the_old_ones(item_file, tmp_path):
    before = embed(item_file, tmp_path / "old.npy", "--dim", 6)
    items = json.loads(item_file.read_text())
    item_file.write_text(json.dumps({**items, "30": {"title": "large blue drill"}}))
    after = embed(item_file, tmp_path / "new.npy", "--encoder", tmp_path / "old.tfidf")
    np.testing.assert_allclose(after[:30], before, atol=1e-6)
    refitted = embed(item_file, tmp_path / "refitted.npy", "--dim", 6)
    assert np.abs(refitted[:30] - before).max() > 1e-3


@pytest.mark.parametrize(("causal", "pooling"), [(True, "last"), (False, "mean")])
def test_the_pooling_that_fits_the_encoder_is_chosen(item_file, tmp_path, causal, pooling, capsys):
    folder = encoder_folder(tmp_path, causal=causal)
    rows = embed(item_file, tmp_path / "E.npy", "--encoder", folder)
    assert f"{pooling} pooling" in capsys.readouterr().err
    given = embed(item_file, tmp_path / "F.npy", "--encoder", folder, "--pooling", pooling)
    other = embed(item_file, tmp_path / "G.npy", "--encoder", folder, "--pooling", "first")
    np.testing.assert_array_equal(rows, given)
    assert np.abs(rows - other).max() > 1e-3
    assert not rows[3].any()


@pytest.mark.parametrize("causal", [True, False])
def test_padding_and_batches_change_no_row(item_file, tmp_path, causal):
    folder = encoder_folder(tmp_path, causal=causal)
    alone = embed(item_file, tmp_path / "E.npy", "--encoder", folder, "--batch_size", 1)
    together = embed(item_file, tmp_path / "F.npy", "--encoder", folder, "--batch_size", 30)
    np.testing.assert_allclose(alone, together, atol=1e-5)


def test_long_texts_are_cut_by_tokens_and_counted(item_file, tmp_path, capsys):
    folder = encoder_folder(tmp_path, causal=True)
    cut = embed(item_file, tmp_path / "E.npy", "--encoder", folder, "--max_len", 2)
    assert "17 of 30 texts were longer than 2 tokens and cut there" in capsys.readouterr().err
    items = {
        i: {**item, "title": " ".join(item["title"].split()[:2]), "description": ""}
        for i, item in json.loads(item_file.read_text()).items()
    }
    item_file.write_text(json.dumps(items))
    np.testing.assert_allclose(embed(item_file, tmp_path / "F.npy", "--encoder", folder), cut, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_by_hand(side):
    hidden = torch.arange(8.0).view(1, 4, 2)
    mask = torch.tensor([[0, 1, 1, 1]] if side == "left" else [[1, 1, 1, 0]])
    kept = hidden[0, 1:] if side == "left" else hidden[0, :3]
    assert torch.equal(text2emb.pool(hidden, mask, "last")[0], kept[-1])
    assert torch.equal(text2emb.pool(hidden, mask, "first")[0], kept[0])
    assert torch.equal(text2emb.pool(hidden, mask, "mean")[0], kept.mean(0))


def test_an_encoder_that_is_not_there_is_one_line(item_file, tmp_path):
    output = tmp_path / "E.npy"
    told = refusal(text2emb.main, "--item_file", item_file, "--output", output, "--encoder", tmp_path / "none")
    assert re.match(r"rq\.text2emb: --encoder .*none", told)
    assert not (tmp_path / "E.npy").exists()


def test_the_default_name_is_the_one_users_know(tmp_path):
    assert text2emb.default_output(tmp_path / "X.item.json", "org/Qwen3-4B") == tmp_path / "X.emb-Qwen3-4B-td.npy"
    assert text2emb.default_output(tmp_path / "X.item.json", "tfidf") == tmp_path / "X.emb-tfidf-td.npy"


def test_two_processes_write_the_rows_one_would(item_file, tmp_path):
    """As with several GPUs, here on the CPU, started by another launcher."""
    folder = encoder_folder(tmp_path, causal=True)
    alone = embed(item_file, tmp_path / "E.npy", "--encoder", folder, "--normalize")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "rq.text2emb"]
    command += ["--device", "cpu", "--item_file", str(item_file), "--encoder", str(folder), "--normalize"]
    result = subprocess.run(
        [*command, "--output", str(tmp_path / "F.npy")],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert np.array_equal(np.load(tmp_path / "F.npy"), alone)
    assert sorted(path.name for path in tmp_path.glob("*.npy*")) == ["E.npy", "F.npy"]
    assert result.stdout == ""
    assert result.stderr.count("last pooling") == 1


def many_items(path: Path, count: int) -> Path:
    rng = np.random.default_rng(5)
    titles = [" ".join(rng.choice(WORDS, 1 + number % 6)) for number in range(count)]
    path.write_text(json.dumps({str(number): {"title": title} for number, title in enumerate(titles)}))
    return path


def test_processes_of_its_own_write_the_rows_of_one_to_the_bit(tmp_path):
    """Three shards, the last one short, for two processes."""
    item_file = many_items(tmp_path / "X.item.json", 2 * shards.ROWS_OF_A_SHARD + 700)
    options = ("--encoder", encoder_folder(tmp_path, causal=False), "--batch_size", 256, "--normalize", "--max_len", 4)
    command = [sys.executable, "-m", "rq.text2emb", "--item_file", str(item_file), "--device", "cpu", *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    told = {}
    for count in (1, 2):
        output = ["--output", str(tmp_path / f"{count}.npy"), "--num_processes", str(count)]
        done = subprocess.run([*command, *output], cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        told[count] = done.stderr
    assert (tmp_path / "2.npy").read_bytes() == (tmp_path / "1.npy").read_bytes()
    assert (tmp_path / "2.encoder.json").read_text() == (tmp_path / "1.encoder.json").read_text()
    (cut,) = re.findall(r".* texts were longer than 4 tokens and cut there", told[1])
    assert cut in told[2]
    assert not list(tmp_path.glob(".*"))


def test_a_refusal_in_processes_is_one_line(tmp_path):
    item_file = many_items(tmp_path / "X.item.json", 5)
    command = [sys.executable, "-m", "rq.text2emb", "--item_file", str(item_file), "--encoder", str(tmp_path / "none")]
    done = subprocess.run([*command, "--num_processes", "2"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("rq.text2emb: ")]
    assert "Expected tfidf, a folder, or a Hugging Face name" in line
    assert "Traceback" not in done.stderr
    told = refusal(text2emb.main, "--item_file", str(item_file), "--num_processes", "2")
    assert told == "rq.text2emb: --num_processes 2: TF-IDF runs in one process; leave the flag out"


def test_a_run_that_was_stopped_goes_on_with_the_shards_that_are_missing(item_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shards, "ROWS_OF_A_SHARD", 8)  # 30 items: four shards
    options = ("--encoder", encoder_folder(tmp_path, causal=True))
    expected = embed(item_file, tmp_path / "whole.npy", *options)
    embed_shard, done = text2emb.embed_shard, []

    def stopped_at_the_third(*arguments: object) -> object:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(arguments)
        return embed_shard(*arguments)

    def counted(*arguments: object) -> object:
        done.append(arguments)
        return embed_shard(*arguments)

    def stop() -> Path:
        done.clear()
        monkeypatch.setattr(text2emb, "embed_shard", stopped_at_the_third)
        with pytest.raises(SystemExit):
            embed(item_file, tmp_path / "E.npy", *options)
        assert not (tmp_path / "E.npy").exists()
        done.clear()
        monkeypatch.setattr(text2emb, "embed_shard", counted)
        return tmp_path / ".E.npy.shards"

    folder = stop()
    assert sorted(path.name for path in folder.iterdir()) == ["00000.safetensors", "00001.safetensors", "of.json"]
    (folder / "00001.safetensors").write_bytes((folder / "00001.safetensors").read_bytes()[:-9])
    capsys.readouterr()
    assert np.array_equal(embed(item_file, tmp_path / "E.npy", *options), expected)
    assert len(done) == 3  # the one that was damaged, and the two that were never made
    assert "1 of 4 shards are kept of a run that was stopped" in capsys.readouterr().err
    assert not folder.exists()
    (tmp_path / "E.npy").unlink()
    stop()
    items = json.loads(item_file.read_text())
    item_file.write_text(json.dumps({**items, "29": {"title": "glue glue"}}))  # other texts: nothing is reused
    rows_ND = embed(item_file, tmp_path / "E.npy", *options)
    assert len(done) == 4
    assert np.array_equal(rows_ND[:24], expected[:24])
    assert not np.array_equal(rows_ND[29], expected[29])


def test_the_record_of_a_model_has_its_pooling_length_and_weights(item_file, tmp_path):
    folder = encoder_folder(tmp_path, causal=True)
    records = []
    for name, extra in (("E", ()), ("F", ("--pooling", "mean")), ("G", ("--max_len", 2))):
        embed(item_file, tmp_path / f"{name}.npy", "--encoder", folder, *extra)
        records.append(json.loads((tmp_path / f"{name}.encoder.json").read_text())["origin"])
    assert [(record["encoder"], record["pooling"], record["max_len"]) for record in records] == [
        ("causal", "last", 32),
        ("causal", "mean", 32),
        ("causal", "last", 2),
    ]
    assert len({record["encoder_sha256"] for record in records}) == 1
    other = encoder_folder(tmp_path, causal=False)
    embed(item_file, tmp_path / "H.npy", "--encoder", other)
    record = json.loads((tmp_path / "H.encoder.json").read_text())["origin"]
    assert record["encoder_sha256"] != records[0]["encoder_sha256"]


def test_an_encoder_with_broken_weights_is_one_line(item_file, tmp_path):
    folder = encoder_folder(tmp_path, causal=True)
    (folder / "model.safetensors").write_bytes(b"no weights")
    told = refusal(text2emb.main, "--item_file", item_file, "--output", tmp_path / "E.npy", "--encoder", folder)
    assert re.match(r"rq\.text2emb: --encoder .*causal: ", told)
    assert not (tmp_path / "E.npy").exists()


# ---------------------------------------------------------------------------------------------- sentence encoders


def as_sentence_encoder(folder: Path, *, pooling: str = "cls_token", length: int = 3, last: str = "Normalize") -> Path:
    """The files that sentence-transformers keeps, added to an encoder."""
    kinds = ("Transformer", "Pooling", last)
    modules = [
        {"idx": i, "path": "1_Pooling" if kind == "Pooling" else "", "type": f"st.{kind}"} for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": length}))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(
        json.dumps({"pooling_mode_max_tokens": False, f"pooling_mode_{pooling}": True})
    )
    return folder


def origin_of(npy: Path) -> dict:
    return json.loads(npy.with_suffix(".encoder.json").read_text())["origin"]


def test_a_sentence_encoder_is_used_as_its_own_files_say(item_file, tmp_path):
    folder = as_sentence_encoder(encoder_folder(tmp_path, causal=False))
    own = embed(item_file, tmp_path / "own.npy", "--encoder", folder)
    same = embed(item_file, tmp_path / "same.npy", "--encoder", folder, "--pooling", "first", "--max_len", 3, "--normalize")
    np.testing.assert_array_equal(own, same)
    np.testing.assert_allclose(np.linalg.norm(own[own.any(axis=1)], axis=1), 1, rtol=1e-5)
    said = origin_of(tmp_path / "own.npy")
    assert (said["pooling"], said["max_len"], said["normalize"]) == ("first", 3, True)


def test_flags_win_over_what_a_sentence_encoder_says(item_file, tmp_path):
    folder = as_sentence_encoder(encoder_folder(tmp_path, causal=False))
    plain = ("--pooling", "mean", "--max_len", 32, "--normalize", "False")
    embed(item_file, tmp_path / "flags.npy", "--encoder", folder, *plain)
    said = origin_of(tmp_path / "flags.npy")
    assert (said["pooling"], said["max_len"], said["normalize"]) == ("mean", 32, False)


def test_an_encoder_that_says_nothing_keeps_the_lengths_of_its_rows(item_file, tmp_path):
    rows = embed(item_file, tmp_path / "E.npy", "--encoder", encoder_folder(tmp_path, causal=False))
    assert np.abs(np.linalg.norm(rows[0]) - 1) > 0.1
    assert origin_of(tmp_path / "E.npy")["max_len"] == 32  # the positions that the model has


def test_a_pooling_that_is_not_known_is_one_line(item_file, tmp_path):
    folder = as_sentence_encoder(encoder_folder(tmp_path, causal=False), pooling="max_tokens")
    told = refusal(text2emb.main, "--item_file", item_file, "--output", tmp_path / "E.npy", "--encoder", folder)
    assert "1_Pooling/config.json asks for the pooling 'max_tokens'" in told
    assert told.endswith("give --pooling")
    assert not (tmp_path / "E.npy").exists()
    embed(item_file, tmp_path / "E.npy", "--encoder", folder, "--pooling", "mean")


def test_the_newer_form_of_a_pooling_is_read(item_file, tmp_path):
    folder = as_sentence_encoder(encoder_folder(tmp_path, causal=False))
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": "lasttoken", "include_prompt": True}))
    embed(item_file, tmp_path / "E.npy", "--encoder", folder)
    assert origin_of(tmp_path / "E.npy")["pooling"] == "last"


def test_a_module_that_is_left_out_is_named(item_file, tmp_path, capsys):
    folder = as_sentence_encoder(encoder_folder(tmp_path, causal=False), last="Dense")
    embed(item_file, tmp_path / "E.npy", "--encoder", folder)
    assert "its Dense is not applied" in capsys.readouterr().err
