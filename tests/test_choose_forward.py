"""What trains is the model's own loss: the way to it is chosen by trial, and what cannot be right is refused by name."""

import logging

import families
import numpy as np
import pytest
import torch
from architectures import ROUNDING, Notes, chosen, compare, examine, extended, toy_examples
from conftest import run_command, small_model
from families import small_family
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import sft
from sid_sft.checkpoint import check_saved
from sid_sft.files import InputError
from sid_sft.forward.architecture import tables_of
from sid_sft.forward.choose import attempt, disagreement, make_trial
from sid_sft.forward.frozen_prefix import FrozenPrefix
from sid_sft.forward.plain import OwnForward, PlainForward
from sid_sft.sid_rows import SidRowAdamW, SidRows

WAYS = {  # family -> way in freeze mode, way in full mode
    "qwen3": ("frozen prefix", "plain"),
    "hyperclovax": ("frozen prefix", "plain"),  # multiplies by the setting that granite divides by
    "granite": ("frozen prefix", "plain"),
    "deepseek_v3": ("frozen prefix", "plain"),  # keys and values of different sizes
    "minicpm3": ("frozen prefix", "plain"),
    "mimo_v2_flash": ("frozen prefix", "plain"),  # heads that differ between layers
    "falcon-alibi": ("plain", "plain"),  # its positions are not told but counted
    "gemma4_text": ("plain", "plain"),  # a further row per token and layer
    "mamba2": ("plain", "plain"),
    "bert": ("own forward", "own forward"),  # a layer between the last hidden state and the head
    "modernbert-decoder": ("own forward", "own forward"),
    "falcon_h1": ("own forward", "own forward"),  # a multiplier of another name
    "recurrent_gemma": ("own forward", "own forward"),
    "llama4_text": ("own forward", "own forward"),
}
REFUSED = {
    "bert-bidirectional": "reads ahead",
    "xlnet": "reads ahead",
    "prophetnet": "reads ahead",
    "xlstm": "takes no new tokens",
    "blt": "fails on an example",
    "inkling_text": "fails on an example",  # its head writes a fixed number of words: no SID
}


@pytest.fixture(scope="module")
def examples():
    return toy_examples()


@pytest.fixture
def notes():
    """What is logged while a way is chosen."""
    handler, logger = Notes(), logging.getLogger("sft")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.mark.parametrize("kind", WAYS)
def test_a_family_trains_on_its_own_loss_and_saves_what_it_trained(kind, examples, notes):
    line = examine(kind, examples, notes)
    assert (line.frozen, line.full) == WAYS[kind]
    assert line.difference <= ROUNDING
    assert line.saved == "yes"


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_learn_to_write_what_comes_next_is_refused_by_name(kind, examples):
    with pytest.raises(InputError, match=REFUSED[kind]):
        chosen(*extended(kind, freeze=True), examples)


def test_a_forward_that_fails_is_left_with_one_line(examples, notes, monkeypatch):
    def unfit(*args, **kwargs):
        raise TypeError("unexpected keyword\nargument")

    monkeypatch.setattr(FrozenPrefix, "call", unfit)
    model, rows = extended("qwen3", freeze=True)
    forward = chosen(model, rows, examples)
    assert isinstance(forward, PlainForward)
    assert "Frozen prefix: not for this model (TypeError: unexpected keyword argument)" in notes
    assert compare(forward, model, rows, examples) <= ROUNDING


def test_a_loss_that_is_no_number_equals_nothing(examples):
    model, rows = extended("qwen3", freeze=True)
    trial, frozen = make_trial(model, examples), FrozenPrefix(model, rows, examples, 4)
    frozen.head = frozen.head._replace(weight=frozen.head.weight.clone().fill_(torch.nan))
    assert np.isnan(disagreement(frozen, trial))
    assert attempt(lambda: frozen, rows, trial)[0] is None


def test_a_right_loss_with_a_wrong_gradient_is_not_enough(examples, monkeypatch):
    """Rows that are read but not followed: the loss is right, and nothing of it would train."""
    model, rows = extended("qwen3", freeze=True)
    trial, frozen = make_trial(model, examples), FrozenPrefix(model, rows, examples, 4)
    embed = frozen.embed
    monkeypatch.setattr(frozen, "embed", lambda tokens, values: embed(tokens, None if values is None else values.detach()))
    assert disagreement(frozen, trial) < ROUNDING
    forward, why_not, _ = attempt(lambda: frozen, rows, trial)
    assert forward is None
    assert "gradient of its SID rows differs" in why_not


def test_a_base_with_a_value_that_is_no_number_is_refused_before_it_trains(examples):
    model, rows = extended("qwen3", freeze=True)
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = torch.nan  # a word's row, in every softmax of the tied head
        model.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(InputError, match="no number before anything was trained"):
        chosen(model, rows, examples)


@pytest.mark.parametrize(("kind", "way"), [("qwen3", "Users as trees"), ("mamba2", "Plain forward")])
def test_users_are_trees_where_that_is_exact(kind, way, examples, notes):
    model, _ = extended(kind, freeze=False)
    forward = chosen(model, None, examples, group_users=True)
    assert notes[-1].startswith(way)
    assert compare(forward, model, None, examples) <= ROUNDING


def test_the_own_forward_pads_nothing_and_takes_every_example_once(examples):
    model, _ = extended("bert", freeze=False)
    parts = [part.indices for part in OwnForward(model, examples, 3).cut(np.arange(len(examples)))]
    assert sorted(np.concatenate(parts)) == list(range(len(examples)))
    assert all(len(part) <= 3 and len(set(examples.length[part])) == 1 for part in parts)
    assert any(len(part) == 3 for part in parts)


def test_rows_that_a_family_keeps_beside_its_tables_train_too_and_nothing_else(examples):
    model, rows = extended("gemma4_text", freeze=True)
    assert [table.name for table in rows.tables] == ["embedding", "layer_inputs"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forward, optimizer = chosen(model, rows, examples), SidRowAdamW(rows, lr=0.1)
    for part in forward.cut(np.arange(20)):
        forward.nll(part.indices).sum().backward()
    optimizer.step()
    tables = {weight.data_ptr() for weight in tables_of(model).values()}
    for name, value in model.state_dict().items():
        changed = (value != before[name]).flatten(1).any(1) if value.dim() > 1 else value != before[name]
        if value.data_ptr() in tables:
            assert changed[rows.ids].all()
            changed[rows.ids] = False
        assert not changed.any(), name


def test_the_rows_of_all_three_tables_are_saved_and_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(families.VARIANTS, "untied", ("gemma4_text", {"tie_word_embeddings": False}))
    _, rows = extended("untied", freeze=True)
    assert [table.name for table in rows.tables] == ["embedding", "layer_inputs", "head"]
    rows.save(tmp_path / "rows", "base")
    _, others = extended("untied", freeze=True)
    for master in others.masters:
        master.data.zero_()
    others.load(tmp_path / "rows")
    assert all(torch.equal(one, other) for one, other in zip(rows.masters, others.masters, strict=True))


# ---------------------------------------------------------------------------------------------- files of a base


def saved_model(folder, vocabulary=100, **settings):
    model = small_model("qwen2", vocabulary, **{"tie_word_embeddings": False, **settings})
    model.save_pretrained(folder)
    return folder / "model.safetensors"


def drop_head(weights):
    del weights["lm_head.weight"]


def drop_norm(weights):
    del weights["model.layers.1.input_layernorm.weight"]


def reshape(weights):
    weights["model.norm.weight"] = torch.zeros(5)


def add(weights):
    weights["value_head.weight"] = torch.zeros(5)


FAULTS = {
    "no head": (drop_head, "lack 1 weight, which would be random: lm_head.weight"),
    "no norm": (drop_norm, "lack 1 weight, which would be random: model.layers.1.input_layernorm.weight"),
    "another shape": (reshape, "hold 1 weight of another shape than its config.json says: model.norm.weight"),
    "one more": (add, "hold 1 weight that the model has no place for: value_head.weight"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_base_whose_files_are_not_the_whole_model_is_refused_by_name(name, tmp_path):
    fault, message = FAULTS[name]
    path = saved_model(tmp_path)
    weights = load_file(path)
    fault(weights)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=message):
        sft.load_model(str(tmp_path), trust_remote_code=False)


def test_a_tied_head_needs_no_weights_of_its_own(tmp_path):
    saved_model(tmp_path, tie_word_embeddings=True)
    model = sft.load_model(str(tmp_path), trust_remote_code=False)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("tie", [True, False])
def test_a_saved_folder_that_is_not_the_trained_model_is_seen(tie, tmp_path):
    saved_model(tmp_path, tie_word_embeddings=tie)
    model = sft.load_model(str(tmp_path), trust_remote_code=False)
    check_saved(tmp_path, model, None, trust_remote_code=False)
    rows = SidRows(model, [97, 98, 99], ["<a_0>", "<a_1>", "<b_0>"])
    check_saved(tmp_path, model, rows, trust_remote_code=False)
    with torch.no_grad():
        rows.masters[-1][1, 2] += 1
    rows.write()
    with pytest.raises(InputError, match="the saved model is not the trained one"):
        check_saved(tmp_path, model, rows, trust_remote_code=False)
    with torch.no_grad():
        rows.masters[-1][1, 2] -= 1
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    rows.write()
    with pytest.raises(InputError, match=r"1 values of model.layers.0.mlp.up_proj.weight differ"):
        check_saved(tmp_path, model, rows, trust_remote_code=False)


# ---------------------------------------------------------------------------------------------- the command line


def test_a_base_without_its_head_ends_in_one_line(flags, base, tmp_path):
    folder = tmp_path / "headless"
    tokenizer = sft.load_tokenizer(str(base), trust_remote_code=False)
    weights = saved_model(folder, len(tokenizer) + 20)
    tokenizer.save_pretrained(folder)
    content = load_file(weights)
    drop_head(content)
    save_file(content, weights, metadata={"format": "pt"})
    done = run_command(*flags(base_model=folder, freeze_LLM=False))
    assert done.returncode == 2
    assert "lack 1 weight, which would be random: lm_head.weight" in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "run" / "final_checkpoint").exists()


@pytest.mark.parametrize(("kind", "freeze"), [("gemma4_text", True), ("gemma4_text", False), ("bert", True)])
def test_families_with_peculiar_tables_and_heads_train_from_the_command_line(kind, freeze, flags, base, tmp_path):
    folder = tmp_path / kind
    tokenizer = sft.load_tokenizer(str(base), trust_remote_code=False)
    small_family(kind, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    done = run_command(*flags(base_model=folder, freeze_LLM=freeze, max_steps=2, eval_steps=1, save_steps=1))
    assert done.returncode == 0, done.stderr[-2000:]
    assert ("frozen values changed: 0" in done.stderr) == freeze
    assert "loss equal to the model's own" in done.stderr
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final_checkpoint")
