"""Files and base models as people have them, given to the command line: what it reads, what it refuses, what it tells."""

import ast
import csv
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from conftest import run_command, small_model
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import sft
from sid_sft.catalogue import read_catalogue
from sid_sft.encoding import Encoder
from sid_sft.files import InputError
from sid_sft.interactions import read_rows
from sid_sft.tasks import TASKS, read_prompts, render

LISTS = ("history_item_id", "history_item_sid", "history_item_title")


def rewrite(source: Path, target: Path, *changes) -> Path:
    """A copy of a CSV whose rows, cells by column, went through each `change(row, number)` in turn."""
    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows):
        for change in changes:
            change(row, number)
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return target


def lists(write, column="history_item_id"):
    """Each list of a column as `write` writes it."""

    def change(row, number):
        row[column] = write(ast.literal_eval(row[column]))

    return change


def cell(column, text, at=lambda number: True):
    """The same text in a column of some rows."""

    def change(row, number):
        row[column] = text if at(number) else row[column]

    return change


def item_id(write):
    def change(row, number):
        row["item_id"] = write(row["item_id"])

    return change


def text_ids(row, number):
    """Ids that are words: 17 -> X17."""
    row["item_id"] = f"X{row['item_id']}"
    row["history_item_id"] = repr([f"X{item}" for item in ast.literal_eval(row["history_item_id"])])


def told_by_check(arguments, caplog) -> str:
    """The log of a run that reads everything and stops."""
    caplog.clear()
    caplog.set_level(logging.INFO, "sft")
    code = sft.main([*arguments, "--check", "True"])
    assert code == 0, caplog.text
    return caplog.text


def refused(arguments, caplog) -> str:
    """The one line that ends a run whose input cannot be used."""
    caplog.clear()
    caplog.set_level(logging.ERROR, "sft")
    assert sft.main([*arguments, "--check", "True"]) == 2
    (record,) = caplog.records
    assert "\n" not in record.message
    return record.message


# ---------------------------------------------------------------------------------------------- cells of a CSV


def numpy_text(values) -> str:
    return str(np.array(values))


REFUSED = {
    "a numpy column of text ids": ([text_ids, lists(numpy_text)], "no comma between 'X", "['X0', 'X1']"),
    "a numpy column of numbers": ([lists(numpy_text)], "no comma between ", "expected one like [0, 1]"),
    "a numpy column of SIDs": ([lists(numpy_text, "history_item_sid")], "no comma between '<a_", "['<a_0><b_0><c_0>'"),
    "a numpy column of titles": ([lists(numpy_text, "history_item_title")], "no comma between '", "'Red copper kettle'"),
    "a numpy column that wraps": (
        [text_ids, lists(lambda ids: np.array2string(np.array(ids), max_line_width=12))],
        "no comma between 'X",
        "tolist()",
    ),
    "a shortened numpy column": ([lists(lambda ids: "[0, 1, ..., 2]")], "numpy left entries out", "[0, 1]"),
    "arrays by name": ([lists(lambda ids: f"array({ids}, dtype=object)")], "is not a list literal", "[0, 1]"),
    "a truth value": ([lists(lambda ids: repr([True] * len(ids)))], "is not a list literal", "[0, 1]"),
    "a missing id": ([lists(lambda ids: repr([None, *ids[1:]]))], "has the entry None", "[0, 1]"),
    "half an id": ([lists(lambda ids: repr([5.5, *ids[1:]]))], "has 5.5 for an item id", "ids like '0'"),
    "SIDs as numbers": ([lists(lambda ids: repr([7] * len(ids)), "history_item_sid")], "has the entry 7", "<a_0><b_0><c_0>"),
    "SIDs as lists": (
        [lists(lambda sids: repr([[sid] for sid in sids]), "history_item_sid")],
        "is not a list literal",
        "<a_0><b_0><c_0>",
    ),
    "tuples": ([lists(lambda ids: repr(tuple(ids)))], "is not a list literal", "[0, 1]"),
    "nested lists": ([lists(lambda ids: repr([ids]))], "is not a list literal", "[0, 1]"),
    "ids of another catalogue": (
        [lambda row, number: text_ids(row, number) if number % 4 == 0 else None],
        "because their item is not in the index (line 2: 'X",
        "--max_left_out 1",
    ),
    "histories of another catalogue": (
        [lambda row, number: row.update(history_item_id=repr(["?"] * len(ast.literal_eval(row["history_item_id"]))))],
        "because no item of their history is in the index (line 2: \"['?'",
        "ids like '0'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_csv_that_could_be_read_as_something_else_is_refused_with_its_cell_and_the_cure(
    name, flags, shop, tmp_path, caplog
):
    changes, fault, cure = REFUSED[name]
    index = json.loads((shop / "shop.index.json").read_text())
    if text_ids in changes:
        index = {f"X{item}": sid for item, sid in index.items()}
    (tmp_path / "i.json").write_text(json.dumps(index))
    path = rewrite(shop / "shop.train.csv", tmp_path / "t.csv", *changes)
    eval_file = rewrite(shop / "shop.valid.csv", tmp_path / "v.csv", *([text_ids] if text_ids in changes else []))
    run_flags = flags(
        train_file=path, eval_file=eval_file, sid_index_path=tmp_path / "i.json", item_meta_path=None, tasks="sid_sid"
    )
    if "title" in name:
        run_flags = flags(train_file=path)
    message = refused(run_flags, caplog)
    assert message.startswith(f"sft.py: {path}:")
    assert fault in message
    assert cure in message


READ = {  # what is written how, and whether ids are then written otherwise than in the index
    "floats": ([lists(lambda ids: repr([float(item) for item in ids])), item_id(lambda item: f"{item}.0")], True),
    "numpy numbers": ([lists(lambda ids: repr(list(np.array(ids))))], False),
    "a numpy number for an item": ([item_id(lambda item: f"np.int64({item})")], True),
    "numpy floats": ([lists(lambda ids: repr(list(np.array(ids, float))))], True),
    "texts": ([lists(lambda ids: repr([str(item) for item in ids]))], False),
    "numpy texts": ([lists(lambda ids: repr(list(np.array([str(item) for item in ids]))))], False),
    "texts with blanks": ([lists(lambda ids: repr([f" {item} " for item in ids])), item_id(lambda item: f"{item} ")], True),
    "leading zeros": ([lists(lambda ids: repr([f"{item:05}" for item in ids])), item_id(lambda item: item.zfill(5))], True),
    "JSON lists": ([lists(json.dumps, column) for column in LISTS], False),
    "lists over lines": ([lists(lambda values: repr(values).replace(", ", ",\n "), column) for column in LISTS], False),
}


@pytest.mark.parametrize("name", READ)
def test_a_csv_whose_ids_have_one_reading_gives_the_same_examples(name, flags, shop, tmp_path, caplog):
    def examples(text):
        return [line[line.index(": ") :] for line in text.splitlines() if " -> " in line]

    changes, otherwise = READ[name]
    plain = told_by_check(flags(), caplog)
    path = rewrite(shop / "shop.train.csv", tmp_path / "t.csv", *changes)
    text = told_by_check(flags(train_file=path), caplog)
    assert len(examples(plain)) == 6
    assert examples(text) == examples(plain)
    assert "left out" not in text
    assert ("item ids are written otherwise than in the index and read as there" in text) == otherwise


@pytest.mark.parametrize(("share", "code"), [("0.2", 2), ("0.3", 0), ("1", 0)])
def test_a_quarter_of_the_rows_left_out_stops_the_run_unless_it_is_allowed(share, code, flags, shop, tmp_path):
    foreign = cell("item_id", "?", lambda number: number % 4 == 0)
    path = rewrite(shop / "shop.valid.csv", tmp_path / "v.csv", foreign)
    result = run_command(*flags(eval_file=path, max_left_out=share, check=True))
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    if code:
        assert last.startswith(f"sft.py: {path}: 175 of 700 rows would be left out, more than --max_left_out 0.2 allows: ")
        assert "(line 2: '?', the index has ids like '0')" in last
        assert last.endswith("or allow it with --max_left_out 1")
    else:
        assert "v.csv: 175 rows left out: their item is not in the index (700 rows)" in result.stderr
        assert "nothing was trained" in last


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_is_none_is_refused(share, flags, caplog):
    assert f"--max_left_out {share}" in refused(flags(max_left_out=share), caplog)


def test_titles_that_cannot_be_had_are_counted_and_stop_the_tasks_that_need_them(flags, shop, tmp_path, caplog):
    items = json.loads((shop / "shop.item.json").read_text())
    for number, fields in enumerate(items.values()):
        fields["title"] = {0: None, 1: number, 2: ""}.get(number % 20, fields["title"])
    path = tmp_path / "items.json"
    path.write_text(json.dumps(items))
    text = told_by_check(flags(item_meta_path=path), caplog)
    assert "26 of 250 items have no title" in text
    assert "rows left out" in text
    for fields in list(items.values())[::2]:
        fields["title"] = None
    path.write_text(json.dumps(items))
    message = refused(flags(item_meta_path=path, tasks="item,sid_title"), caplog)
    assert "task 'sid_title': " in message
    assert "no title" in message
    text = told_by_check(flags(item_meta_path=path, tasks="item,sid_sid"), caplog)
    assert "item_sid_title: " in text
    items["3"]["title"] = ["Kettle"]
    path.write_text(json.dumps(items))
    assert "item '3' has ['Kettle'] for a title" in refused(flags(item_meta_path=path), caplog)


# ---------------------------------------------------------------------------------------------- the model's limits


def folder_of(base: Path, folder: Path, kind: str, **settings) -> Path:
    """The base's tokenizer with a model of another kind."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder)
    small_model(kind, len(tokenizer), tie_word_embeddings=True, **settings).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["gpt2", "opt", "qwen2"])
def test_a_model_of_few_positions_trains_and_is_measured_within_them(kind, flags, base, shop, tmp_path, caplog):
    settings = (
        {"max_position_embeddings": 40}
        if kind != "opt"
        else {"max_position_embeddings": 40, "ffn_dim": 48, "word_embed_proj_dim": 32}
    )
    few = folder_of(base, tmp_path / "few", kind, **settings)
    caplog.set_level(logging.INFO, "sft")
    index = json.loads((shop / "shop.index.json").read_text())
    index["249"] += [
        "<d_0>",
        "<e_0>",
        "<f_0>",
        "<g_0>",
    ]  # a beam may write more tokens than the cutoff counted for the truth
    (tmp_path / "i.json").write_text(json.dumps(index))

    def deeper(row, number):
        for column in ("history_item_sid", "item_sid"):
            row[column] = row[column].replace("<a_9><b_4><c_4>", "<a_9><b_4><c_4><d_0><e_0><f_0><g_0>")

    files = {
        f"{split}_file": rewrite(shop / f"shop.{name}.csv", tmp_path / f"{name}.csv", deeper)
        for split, name in (("train", "train"), ("eval", "valid"))
    }
    arguments = flags(
        base_model=few, tasks="sid_sid", eval_recommendation=100, sid_index_path=tmp_path / "i.json", max_left_out=1, **files
    )
    assert sft.main(arguments) == 0, caplog.text
    assert "--cutoff_len 512: the model has 40 positions, so examples have at most 40 tokens" in caplog.text
    assert "lost old items to --cutoff_len 40" in caplog.text
    assert "frozen values changed: 0" in caplog.text


def test_a_cutoff_within_the_models_positions_is_left_alone(flags, base, tmp_path, caplog):
    assert "positions" not in told_by_check(flags(cutoff_len=512), caplog)
    assert "--cutoff_len 600: the model has 512 positions" in told_by_check(flags(cutoff_len=600), caplog)


@pytest.mark.parametrize(
    ("kind", "settings", "positions"),
    [
        ("gpt2", {"n_positions": 100}, 100),
        ("opt", {"max_position_embeddings": 100}, 100),
        ("gpt_neox", {"max_position_embeddings": 100}, 100),
        ("codegen", {"n_positions": 100, "n_ctx": 90}, 90),
        ("mpt", {"max_seq_len": 100}, 100),
        ("roberta", {"max_position_embeddings": 100, "pad_token_id": 1}, 98),
        ("gemma3", {"text_config": {"max_position_embeddings": 100}}, 100),
        ("xlnet", {}, None),
        ("mamba", {}, None),
        ("bloom", {}, None),
    ],
)
def test_the_positions_of_a_model_are_known_from_its_config(kind, settings, positions, tmp_path):
    from transformers import AutoConfig

    from sid_sft.checkpoint import model_positions

    AutoConfig.for_model(kind, **settings).save_pretrained(tmp_path)
    assert model_positions(str(tmp_path), trust_remote_code=False) == positions


# ---------------------------------------------------------------------------------------------- SID tokens of a base


def prepared(base: Path, folder: Path, tokens: list, rows: int) -> Path:
    """The base with tokens that somebody else has added, and a model of so many rows beyond the base's tokens."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    known = len(tokenizer)
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.save_pretrained(folder)
    small_model("qwen2", known + rows, tie_word_embeddings=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rows", [20, 5, 0])
def test_sid_tokens_that_the_base_marks_special_train_as_they_are(rows, flags, base, sid_tokens, tmp_path, caplog):
    folder = prepared(base, tmp_path / "prepared", sid_tokens[:8], rows)
    caplog.set_level(logging.INFO, "sft")
    assert sft.main(flags(base_model=folder, weight_decay=0)) == 0, caplog.text
    assert "Adding 12 new tokens to tokenizer" in caplog.text
    assert f"8 SID tokens are special tokens of the base model, like {sid_tokens[0]}, and train as they are" in caplog.text
    kept = min(rows, 8)
    assert (f"{kept} of 20 SID tokens were there already and keep their rows" in caplog.text) == (kept > 0)
    assert (f"{8 - kept} of 20 SID tokens were in the tokenizer, but had no row" in caplog.text) == (kept < 8)
    assert "Unfrozen 20 new token embeddings" in caplog.text
    assert "frozen values changed: 0" in caplog.text
    final = tmp_path / "run" / "final_checkpoint"
    before, after = (AutoTokenizer.from_pretrained(path) for path in (folder, final))
    assert after.convert_tokens_to_ids(sid_tokens[:8]) == before.convert_tokens_to_ids(sid_tokens[:8])
    special = {str(token) for token in after.added_tokens_decoder.values() if token.special}
    assert special & set(sid_tokens) == set(sid_tokens[:8])
    old, new = (AutoModelForCausalLM.from_pretrained(path).get_input_embeddings().weight for path in (folder, final))
    ids = after.convert_tokens_to_ids(sid_tokens)
    trained = [i for i in ids if i < len(old)]
    frozen = [i for i in range(len(old)) if i not in ids]
    assert (new[trained] != old[trained]).any(dim=1).all()
    assert torch.equal(new[frozen], old[frozen])
    assert new[ids].std() > 0.1  # a row that the model lacked begins with values like the other rows'


def test_a_sid_token_with_a_role_or_of_the_ordinary_vocabulary_stays_refused(flags, base, shop, tmp_path, caplog):
    index = json.loads((shop / "shop.index.json").read_text())
    for token in ("<|end|>", "<|begin|>"):
        folder = tmp_path / token.strip("<|>")
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
        tokenizer.save_pretrained(folder)
        small_model("qwen2", len(tokenizer), tie_word_embeddings=True).save_pretrained(folder)
        (tmp_path / "i.json").write_text(json.dumps({**index, "9999": ["<a_0>", token]}))
        message = refused(flags(base_model=folder, sid_index_path=tmp_path / "i.json"), caplog)
        assert f"SID token '{token}' already means something else to the tokenizer; rename it in the index" in message


def test_sid_tokens_that_take_the_white_space_beside_them_are_told(flags, base, sid_tokens, tmp_path, caplog):
    tokens = [AddedToken(token, lstrip=True, rstrip=True, special=True) for token in sid_tokens[:3]]
    text = told_by_check(flags(base_model=prepared(base, tmp_path / "prepared", tokens, 20)), caplog)
    assert f"3 SID tokens of the base model, like {sid_tokens[0]}, take the white space beside them" in text
    assert "lstrip" not in told_by_check(flags(), caplog)


# ---------------------------------------------------------------------------------------------- kinds of tokenizers


@pytest.mark.parametrize("known", ["none", "special"])
@pytest.mark.parametrize("name", [*toy.BASES, *toy.TOKENIZERS])
def test_sids_survive_the_tokenizer_whatever_its_kind_and_whoever_added_them(name, known, tmp_path):
    tokenizer = {**toy.BASES, **toy.TOKENIZERS}[name]()
    tokens = sorted({token for sid in toy.SIDS.values() for token in sid})
    before = tokenizer("Wood screws, 5%")["input_ids"]
    if known == "special":
        tokenizer.add_tokens(tokens[:4], special_tokens=True)
    catalogue = read_catalogue(toy.write_index(tmp_path), toy.write_items(tmp_path))
    rows = list(read_rows(toy.write_csv(tmp_path / "toy.csv"), catalogue))
    sft.add_sid_tokens(tokenizer, tokens)
    sft.assert_sids_round_trip(tokenizer, catalogue)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    prompts = read_prompts(None, "Toys")
    for kind in (tokenizer, again):
        assert kind("Wood screws, 5%")["input_ids"] == before
        for item in catalogue.items:
            ids = kind("".join(item.sid), add_special_tokens=False)["input_ids"]
            assert kind.convert_ids_to_tokens(ids) == list(item.sid)
            assert kind.decode(ids).replace(" ", "") == "".join(item.sid)
        for row, example in zip(
            rows, Encoder(kind, catalogue, prompts, cutoff_len=512).encode(TASKS["sid_sid"], rows), strict=True
        ):
            prompt, answer = render(TASKS["sid_sid"], row, catalogue, prompts)
            whole = kind(prompt)["input_ids"]
            assert example.input_ids[: example.prompt_len] == whole[: len(whole) - (whole[-1] == kind.eos_token_id)]
            assert kind.convert_ids_to_tokens(example.input_ids[example.prompt_len : -1]) == list(
                catalogue.items[row.item].sid
            )


def test_a_tokenizer_that_would_change_a_sid_is_refused(tmp_path):
    tokenizer = toy.BASES["bpe-digits"]()
    tokenizer.add_tokens([AddedToken("<A_0>", normalized=True)])
    catalogue = read_catalogue(toy.write_index(tmp_path, {"0": ["<A_0>", "<b_0>"], "1": ["<b_0>"]}), None)
    sft.add_sid_tokens(tokenizer, ["<A_0>", "<b_0>"])
    with pytest.raises(InputError, match="SID '<A_0><b_0>' does not survive the tokenizer"):
        sft.assert_sids_round_trip(tokenizer, catalogue)


# ---------------------------------------------------------------------------------------------- evaluating and saving


@pytest.mark.parametrize(
    "given", [{"eval_steps": 6, "save_steps": 4}, {"eval_steps": 6, "save_steps": 0.5}, {"eval_steps": 0.1, "save_steps": 5}]
)
def test_intervals_that_contradict_each_other_are_refused(given, flags, caplog):
    message = refused(flags(**given), caplog)
    assert "is no multiple of --eval_steps" in message
    assert "leave one of the two out" in message


def test_a_run_with_eval_steps_alone_saves_when_it_evaluates(flags, tmp_path):
    assert sft.main(flags(eval_steps=2, save_steps=None)) == 0
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [2, 4, 6]
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} <= {
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    }
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 2
