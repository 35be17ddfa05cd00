"""LoRA adapters beside the SID rows: what trains, what stays, what is saved, and that peft and transformers load it."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import run_command, small_model
from kill import end_of
from safetensors.torch import load_file, save_file
from test_frozen_prefix import plain_recipe
from test_resuming import SHORT, last_line
from test_sft import as_the_run_began, history, losses, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import sft
from sid_sft import flag_checks
from sid_sft.adapters import ADAPTER_FOLDER, CONFIG_FILE, WEIGHTS_FILE, Adapters, merged
from sid_sft.files import InputError
from sid_sft.forward.choose import gradient_disagreements, make_trial
from sid_sft.forward.examples import Examples
from sid_sft.forward.plain import PlainForward
from sid_sft.settings import TrainFlags, with_defaults
from sid_sft.sid_rows import ROWS_FILE, SidRowAdamW, read_rows_file
from sid_sft.steps import StepSampler

peft = pytest.importorskip("peft")


def run(arguments: list[str], caplog, code: int = 0) -> str:
    """sft.py in this process; its log."""
    caplog.clear()
    caplog.set_level("INFO", logger="sft")
    assert sft.main(arguments) == code, caplog.text
    return caplog.text


def adapted(model, **changes) -> Adapters:
    flags = {"base_model": "base", "output_dir": "out", "sid_index_path": "x", "lora_rank": 2, **changes}
    return Adapters(model, with_defaults(TrainFlags(**flags)))


def turned(adapters: Adapters) -> None:
    """Gives adapters, whose B begins at zero, values that matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


# ---------------------------------------------------------------------------------------------- in a model


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2", "gemma3_text"])
def test_adapters_stand_in_the_linear_layers_alone_and_come_out_again(kind):
    """gpt2's layers are Conv1D; the heads of the others are tied and not tied."""
    model = small_model(kind, 120, tie_word_embeddings=kind == "qwen2").eval()
    ids = torch.arange(7, 19)[None]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    expected = model(input_ids=ids).logits.detach()
    adapters = adapted(model)
    assert torch.equal(model(input_ids=ids).logits, expected)
    places = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert len(places) == adapters.layers > 0
    assert not [name for name in places if "head" in name or "embed" in name or "wte" in name]
    linear = {name for name, module in small_model(kind, 120).named_modules() if hasattr(module, "weight")}
    assert places <= linear
    turned(adapters)
    assert not torch.allclose(model(input_ids=ids).logits, expected, rtol=1e-2)
    adapters.take_out()
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trains


def test_the_first_values_come_from_the_seed_alone():
    drawn = []
    for seed, before in ((42, 1), (42, 2), (43, 1)):
        model = small_model("qwen2", 120)
        torch.manual_seed(before)
        drawn.append([parameter.detach().clone() for parameter in adapted(model, seed=seed).parameters])
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(before)))
    assert all(map(torch.equal, drawn[0], drawn[1]))
    assert not all(map(torch.equal, drawn[0], drawn[2]))


def test_what_is_saved_loads_exactly_and_merges_to_the_same_numbers(tmp_path):
    model = small_model("qwen2", 120).eval()
    ids = torch.arange(7, 19)[None]
    adapters = adapted(model)
    turned(adapters)
    expected = model(input_ids=ids).logits.detach()
    adapters.save(tmp_path / "a")
    other = adapted(small_model("qwen2", 120), seed=5)
    other.load(tmp_path / "a")
    assert all(map(torch.equal, adapters.parameters, other.parameters))
    other.save(tmp_path / "b")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    plain = merged(small_model("qwen2", 120).eval(), tmp_path / "a")
    assert plain.state_dict().keys() == small_model("qwen2", 120).state_dict().keys()
    torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fault", ["another rank", "a layer less", "a layer more", "cut", "gone"])
def test_adapters_of_another_run_are_refused(fault, tmp_path):
    adapted(small_model("qwen2", 120), lora_rank=4 if fault == "another rank" else 2).save(tmp_path)
    path = tmp_path / WEIGHTS_FILE
    saved = load_file(path)
    if fault == "a layer less":
        save_file(dict(list(saved.items())[2:]), path)
    elif fault == "a layer more":
        save_file({**saved, "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(2, 32)}, path)
    elif fault == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif fault == "gone":
        path.unlink()
    adapters = adapted(small_model("qwen2", 120))
    with pytest.raises(InputError, match="its adapters are not those of this run"):
        adapters.load(tmp_path)


def test_a_forward_that_starves_the_adapters_fails_the_trial(tokenizer, sid_tokens, dataset):
    model = small_model("qwen2", len(tokenizer) + 7, tie_word_embeddings=True)
    rows = sft.freeze_llm(model, tokenizer.convert_tokens_to_ids(sid_tokens), sid_tokens)
    adapters = adapted(model)
    examples = Examples(dataset)
    trial = make_trial(model.eval(), examples)
    plain = PlainForward(model, examples, 4)
    found = gradient_disagreements(plain, rows, trial, adapters.parameters)
    assert found.keys() == {"SID rows", "adapters"}
    assert max(found.values()) < 1e-4
    assert all(own.grad is None for own in [*adapters.parameters, *rows.masters, *model.parameters()])

    class Starving(PlainForward):
        def nll(self, indices):
            for parameter in adapters.parameters:
                parameter.requires_grad_(False)
            try:
                return super().nll(indices)
            finally:
                for parameter in adapters.parameters:
                    parameter.requires_grad_(True)

    found = gradient_disagreements(Starving(model, examples, 4), rows, trial, adapters.parameters)
    assert found["SID rows"] < 1e-4
    assert found["adapters"] == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------------- a run


def test_a_run_leaves_a_merged_model_and_adapters_that_peft_loads(flags, base, sid_tokens, tmp_path, caplog):
    log = run(flags(lora_rank=2, lora_learning_rate=0.02, tasks="sid_sid,item"), caplog)
    numbers = (
        2 * 2 * sum(size for size in (64, 48, 48, 64, 80, 80, 80))
    )  # rank x layers x (in + out) of q k v o gate up down
    assert f"Of these 640 in SID rows and {numbers:,} in LoRA adapters of 14 layers (rank 2, alpha 4)" in log
    assert f"Trainable parameters (with grad-mask): {640 + numbers:,} / " in log
    assert "Frozen prefix: not for this model (adapters train in its layers, so no prefix is static)" in log
    assert "frozen values changed: 0" in log
    final = tmp_path / "run" / "final_checkpoint"
    rows = read_rows_file(final / ROWS_FILE)
    before, after = weights(base), weights(final)
    assert before.keys() == after.keys()
    for name, old in before.items():
        if name.endswith("embed_tokens.weight") or name == "lm_head.weight":
            assert torch.equal(after[name][rows.ids], rows.rows["embedding"])
            frozen = [i for i in range(len(old)) if i not in rows.ids]
            assert torch.equal(after[name][frozen], old[frozen])
            known = rows.ids[rows.ids < len(old)]
            assert (after[name][known] != old[known]).any(dim=1).all()
        else:
            assert torch.equal(after[name], old) != name.endswith("proj.weight"), name

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    sft.apply_sid_rows(model, tokenizer, final / ROWS_FILE)
    loaded = peft.PeftModel.from_pretrained(model, final / ADAPTER_FOLDER).eval()
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(sid_tokens[:12])])
    plain = AutoModelForCausalLM.from_pretrained(final)(input_ids=ids).logits
    torch.testing.assert_close(loaded(input_ids=ids).logits, plain, rtol=1e-4, atol=1e-4)
    with loaded.disable_adapter():
        assert not torch.allclose(loaded(input_ids=ids).logits, plain, rtol=1e-2)
    config = json.loads((final / ADAPTER_FOLDER / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert "LoRA\nadapters of rank 2 (alpha 4, peak learning rate 0.02)" in (final / "README.md").read_text()
    assert "| LoRA adapters of 14 layers | rank 2 |" in (tmp_path / "run" / "report.md").read_text()


def test_the_losses_are_those_of_a_loop_with_peft(flags, base, sid_tokens, tmp_path, caplog):
    """Against HF's forward with all logits, torch's AdamW with two rates and one norm, written out here."""
    rates = {"learning_rate": 0.02, "lora_learning_rate": 0.005, "weight_decay": 0.1, "lr_scheduler_type": "constant"}
    run(flags(**rates, lora_rank=2, lora_alpha=6, eval_file=None), caplog)
    model, ids, examples = as_the_run_began(base, sid_tokens, tmp_path)
    weight = model.get_input_embeddings().weight
    master = torch.nn.Parameter(weight.detach()[ids].clone())
    torch.manual_seed(42)
    peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"))
    weight.requires_grad_(True)
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    groups = [{"params": [master]}, {"params": adapters, "lr": 0.005}]
    optimizer = torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1)
    expected = []
    for step in list(StepSampler(examples, 16, seed=42))[:6]:
        optimizer.zero_grad()
        loss = plain_recipe(model, examples, np.array(step)) / examples.labels[step].sum()
        loss.backward()
        master.grad, weight.grad = weight.grad[ids].clone(), None
        torch.nn.utils.clip_grad_norm_([master, *adapters], 1.0)
        optimizer.step()
        weight.data[ids] = master.detach()
        expected.append(loss.item())
    np.testing.assert_allclose(losses(tmp_path / "run"), expected, rtol=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_loss_of_one(flags, tmp_path):
    changes = {"lora_rank": 2, "lora_learning_rate": 0.01, "max_steps": 4, "eval_steps": 2, "save_steps": 2, "sample": 11}
    for processes in (1, 2):
        result = run_command(*flags(output_dir=tmp_path / str(processes), **changes), processes=processes)
        assert result.returncode == 0, result.stderr
    one, two = history(tmp_path / "1"), history(tmp_path / "2")
    for key in ("loss", "eval_loss", "grad_norm"):
        left, right = ([entry[key] for entry in log if key in entry] for log in (one, two))
        assert len(left) >= 2
        np.testing.assert_allclose(left, right, rtol=1e-4)


def test_a_resumed_run_ends_with_the_very_bytes_of_one_left_in_peace(flags, tmp_path, caplog):
    changes = {**SHORT, "lora_rank": 2, "lora_learning_rate": 0.02}
    run(flags(**changes), caplog)
    expected = end_of(tmp_path / "run")
    assert "final_checkpoint/adapter/adapter_model.safetensors" in expected
    checkpoint = {path.name for path in (tmp_path / "run" / "checkpoint-6").iterdir()}
    assert {ROWS_FILE, ADAPTER_FOLDER} < checkpoint
    assert not {name for name in checkpoint if name.startswith("model")}
    for step in (6, 4):  # at its end, and in the middle
        if step == 4:
            shutil.rmtree(tmp_path / "run" / "checkpoint-6")
        shutil.rmtree(tmp_path / "run" / "final_checkpoint")
        assert f"checkpoint-{step}\n" in run(flags(**changes, resume_from_checkpoint=True), caplog)
        assert end_of(tmp_path / "run") == expected


def test_rank_and_alpha_are_fixed_and_the_adapters_rate_may_change_by_name(flags, tmp_path, caplog):
    changes = {**SHORT, "lora_rank": 2}
    run(flags(**changes), caplog)
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    again = {**changes, "resume_from_checkpoint": True}
    line = last_line(run(flags(**{**again, "lora_rank": 4}), caplog, code=2))
    assert "lora_rank 2 (now 4), lora_alpha 4 (now 8); with another lora_rank start afresh" in line
    line = last_line(run(flags(**again, lora_alpha=5), caplog, code=2))
    assert "lora_alpha 4 (now 5); with another lora_alpha start afresh" in line
    line = last_line(run(flags(**{**again, "lora_rank": None}), caplog, code=2))
    assert "lora_rank 2 (now 0)" in line
    line = last_line(run(flags(**again, lora_learning_rate=0.5), caplog, code=2))
    assert "lora_learning_rate 0.001 (now 0.5); go on all the same with --allow_changed lora_learning_rate" in line
    run(flags(**again, lora_learning_rate=0.5, allow_changed="lora_learning_rate"), caplog)


def test_an_adapter_that_is_no_number_ends_the_run_and_leaves_no_model(flags, tmp_path, caplog, monkeypatch):
    step = SidRowAdamW.step

    def break_one(self, closure=None):
        result = step(self, closure)
        self.param_groups[1]["params"][0].data[0, 0] = torch.nan
        return result

    monkeypatch.setattr(SidRowAdamW, "step", break_one)
    line = last_line(run(flags(lora_rank=2, max_steps=1, eval_file=None), caplog, code=2))
    assert "some weights after step 1 are not finite" in line
    assert not (tmp_path / "run" / "final_checkpoint").exists()


# ---------------------------------------------------------------------------------------------- what is refused

REFUSED = {
    "without freezing": (
        {"lora_rank": 8, "freeze_LLM": False},
        "--lora_rank 8 is for --freeze_LLM True, which it needs; without it every number of the model trains",
    ),
    "alpha alone": ({"lora_alpha": 8}, "--lora_alpha needs --lora_rank, the rank of the adapters"),
    "a rate alone": ({"lora_learning_rate": 0.1}, "--lora_learning_rate needs --lora_rank, the rank of the adapters"),
    "a rank below none": ({"lora_rank": -1}, "--lora_rank -1 must be from 0 to 1024"),
    "4 bits without freezing": (
        {"load_in_4bit": True, "freeze_LLM": False},
        "--load_in_4bit True is for --freeze_LLM True, which it needs; without it every number of the model trains",
    ),
    "8 and 4 bits": (
        {"load_in_8bit": True, "load_in_4bit": True},
        "--load_in_8bit and --load_in_4bit are two ways to hold one model; choose one",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_flags_that_do_not_go_together_end_in_one_line(name, flags, tmp_path, caplog):
    changes, message = REFUSED[name]
    assert message in last_line(run(flags(**changes), caplog, code=2))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "library"), [("lora_rank", "peft"), ("load_in_8bit", "torchao"), ("load_in_4bit", "bitsandbytes")]
)
def test_a_library_that_is_missing_is_named_with_its_cure(flag, library, flags, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(flag_checks, "find_spec", lambda name: None if name == library else object())
    value = 8 if flag == "lora_rank" else True
    line = last_line(run(flags(**{flag: value}), caplog, code=2))
    assert line.endswith(f"--{flag} {value} needs {library}, which is not installed; pip install {library}")
    assert not (tmp_path / "run").exists()
