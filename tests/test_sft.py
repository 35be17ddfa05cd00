"""The command line, run as a user runs it: what it trains, what it leaves, what it refuses."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_command, small_model
from safetensors.torch import load_file
from test_frozen_prefix import plain_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import data
import sft
from sid_sft.forward.examples import Examples, MicroBatch
from sid_sft.steps import StepSampler, deal


def run(arguments, caplog) -> str:
    """sft.py in this process; returns its log."""
    caplog.clear()
    caplog.set_level("INFO", logger="sft")
    code = sft.main(arguments)
    assert code == 0, caplog.text
    return caplog.text


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in history(folder) if "loss" in entry]


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def assert_only_sid_rows_moved(base: Path, final: Path, sid_tokens: list[str]) -> None:
    """Every SID row of the final checkpoint differs from what the base holds there; everything else is bit-equal."""
    ids = AutoTokenizer.from_pretrained(final).convert_tokens_to_ids(sid_tokens)
    before, after = weights(base), weights(final)
    assert before.keys() == after.keys()
    for name, old in before.items():
        new = after[name]
        assert new.dtype == old.dtype
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            frozen = [i for i in range(len(old)) if i not in ids]
            assert torch.equal(new[frozen], old[frozen]), name
            known = [i for i in ids if i < len(old)]
            assert (new[known] != old[known]).any(dim=1).all()
            assert torch.unique(new[ids], dim=0).shape[0] == len(ids)
        else:
            assert torch.equal(new, old), name


def test_a_freeze_run_from_the_command_line_moves_only_the_sid_rows(flags, base, sid_tokens, tmp_path):
    result = run_command(*flags())
    assert result.returncode == 0, result.stderr
    log = result.stderr
    for line in (
        "Adding 20 new tokens to tokenizer",
        "Freezing LLM parameters, only training new token embeddings",
        "Unfrozen 20 new token embeddings (indices ",
        "Trainable parameters (with grad-mask): 640 / ",
        "That is 20 rows x 32 wide x 1 table; the optimizer holds 0.0 MB",
        "Weight decay 1: a step shrinks what trains by learning rate x 1 of itself",
        "Learning rate 0.075: 2.4 over the model's width (32)",
        "frozen values changed: 0",
    ):
        assert line in log
    assert re.search(r"[\d,]+ tokens at [\d,]+ tokens/s; peak memory \d+\.\d\d GiB", log)
    final = tmp_path / "run" / "final_checkpoint"
    assert_only_sid_rows_moved(base, final, sid_tokens)
    assert len(losses(tmp_path / "run")) == 6
    assert all(key in history(tmp_path / "run")[0] for key in ("loss_sid_sid", "loss_title_title", "learning_rate"))
    prompts = json.loads((final / "prompts.json").read_text())
    assert prompts["category"] == "kitchen"
    assert prompts["prompts"] == data.read_prompts(None, "kitchen")
    checkpoint = {path.name for path in (tmp_path / "run" / "checkpoint-6").iterdir()}
    assert "sid_rows.safetensors" in checkpoint
    assert not {name for name in checkpoint if name.startswith("model")}
    assert not list(tmp_path.glob("run/*.tmp"))


def test_freeze_mode_trains_on_sid_histories_alone_unless_tasks_are_named(flags, caplog):
    log = run(flags(tasks=None, max_steps=None, check=True), caplog)
    assert "Training on 30 examples of sid_sid\n" in log
    assert "Freeze mode trains on SID histories alone unless --tasks names more" in log
    assert "5 epochs unless --num_epochs says otherwise" in log
    named = run(flags(max_steps=None, num_epochs=3, weight_decay=0, check=True), caplog)
    assert not re.search("Freeze mode trains on|epochs unless|Weight decay", named)
    assert " of sid_sid, item, sid_title" in run(flags(tasks=None, freeze_LLM=False, check=True), caplog)


def as_the_run_began(base, sid_tokens, tmp_path):
    """The model before the first step of the run that has just ended, the ids of its SID tokens, and the run's examples."""
    tokenizer = sft.load_tokenizer(str(base), trust_remote_code=False)
    known = len(tokenizer)
    ids = sft.add_sid_tokens(tokenizer, sid_tokens)
    model = sft.load_model(str(base), from_scratch=False, trust_remote_code=False).eval()
    sft.grow_embeddings(model, len(tokenizer))
    sft.init_rows(model, ids, known, seed=42)
    (cached,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    examples = Examples(data.open_dataset(cached, 512))
    return model, ids, examples


@pytest.mark.parametrize(("given", "decay"), [(0.1, 0.1), (0, 0.0), (None, 1.0)])
def test_the_losses_are_those_of_a_plain_training_loop(given, decay, flags, base, catalogue, sid_tokens, tmp_path, caplog):
    """Against HF's forward with all logits, torch's AdamW and clipping, written out here; a decay not given is 1."""
    run(flags(lr_scheduler_type="constant", learning_rate=0.02, weight_decay=given, eval_file=None), caplog)
    model, ids, examples = as_the_run_began(base, sid_tokens, tmp_path)
    weight = model.get_input_embeddings().weight
    master = torch.nn.Parameter(weight.detach()[ids].clone())
    optimizer = torch.optim.AdamW([master], lr=0.02, weight_decay=decay)
    expected = []
    for step in list(StepSampler(examples, 16, seed=42))[:6]:
        loss = plain_recipe(model, examples, np.array(step)) / examples.labels[step].sum()
        loss.backward()
        master.grad, weight.grad = weight.grad[ids].clone(), None
        torch.nn.utils.clip_grad_norm_([master], 1.0)
        optimizer.step()
        weight.data[ids] = master.detach()
        expected.append(loss.item())
    np.testing.assert_allclose(losses(tmp_path / "run"), expected, rtol=2e-6)


def test_two_processes_give_the_loss_of_one_at_every_step(flags, tmp_path):
    """16 examples a step, so also the epoch's last, smaller step is met."""
    changes = {"max_steps": None, "num_epochs": 1, "sample": 11, "eval_steps": 2, "save_steps": 2}
    for processes in (1, 2):
        result = run_command(*flags(output_dir=tmp_path / str(processes), **changes), processes=processes)
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("frozen values changed: 0") == 1  # only rank 0 speaks
    one, two = history(tmp_path / "1"), history(tmp_path / "2")
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        for key in left.keys() & right.keys() - {"eval_runtime_s"}:
            if key.startswith(("loss", "eval_loss", "grad_norm")):
                # Rounding adds up from step to step; the first step has none to add to.
                tolerance = 1e-4
                if left["step"] == 1 and not key.startswith("eval"):
                    tolerance = 1e-5 if key == "grad_norm" else 1e-6
                assert left[key] == pytest.approx(right[key], rel=tolerance), key
    first, second = (load_file(tmp_path / name / "final_checkpoint" / "sid_rows.safetensors") for name in "12")
    torch.testing.assert_close(first["embedding"], second["embedding"], rtol=1e-3, atol=1e-4)


def test_two_processes_give_the_loss_of_one_when_the_whole_model_trains(flags, tmp_path):
    changes = {"freeze_LLM": False, "max_steps": 4, "eval_steps": 4, "save_steps": 4}
    for processes in (1, 2):
        result = run_command(*flags(output_dir=tmp_path / str(processes), **changes), processes=processes)
        assert result.returncode == 0, result.stderr
    np.testing.assert_allclose(losses(tmp_path / "1"), losses(tmp_path / "2"), rtol=1e-4)


@pytest.mark.parametrize("freeze", [True, False])
def test_a_resumed_run_continues_as_if_nothing_had_happened(freeze, flags, tmp_path, caplog):
    changes = {"freeze_LLM": freeze, "max_steps": 20, "eval_steps": 8, "save_steps": 8, "early_stopping_patience": 0}
    run(flags(**changes), caplog)
    straight = tmp_path / "run"
    resumed = tmp_path / "resumed"
    run(flags(output_dir=resumed, resume_from_checkpoint=straight / "checkpoint-16", **changes), caplog)
    assert losses(resumed) == losses(straight)
    left, right = weights(straight / "final_checkpoint"), weights(resumed / "final_checkpoint")
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_plain_way_gives_the_same_losses(flags, tmp_path, caplog):
    run(flags(output_dir=tmp_path / "frozen"), caplog)
    text = run(flags(output_dir=tmp_path / "plain", frozen_prefix=False), caplog)
    assert "Frozen prefix" not in text
    np.testing.assert_allclose(losses(tmp_path / "frozen"), losses(tmp_path / "plain"), rtol=1e-4)
    run(flags(output_dir=tmp_path / "users", group_users=True, prefix_cache_gb=0), caplog)
    assert len(losses(tmp_path / "users")) == 6


def test_an_untied_head_trains_under_weight_decay_and_bf16(flags, base, sid_tokens, tmp_path, caplog):
    untied = tmp_path / "untied"
    tokenizer = AutoTokenizer.from_pretrained(base)
    small_model("qwen2", len(tokenizer) + 30, tie_word_embeddings=False).to(torch.bfloat16).save_pretrained(untied)
    tokenizer.save_pretrained(untied)
    text = run(flags(base_model=untied, weight_decay=0.1, bf16=True, learning_rate=0.05), caplog)
    assert "Unfrozen 20 output-head rows" in text
    assert "Trainable parameters (with grad-mask): 1,280 / " in text
    assert_only_sid_rows_moved(untied, tmp_path / "run" / "final_checkpoint", sid_tokens)


def test_a_model_without_spare_rows_grows(flags, base, sid_tokens, tmp_path, caplog):
    tight = tmp_path / "tight"
    tokenizer = AutoTokenizer.from_pretrained(base)
    small_model("qwen2", len(tokenizer), tie_word_embeddings=True).save_pretrained(tight)
    tokenizer.save_pretrained(tight)
    run(flags(base_model=tight), caplog)
    old, new = weights(tight), weights(tmp_path / "run" / "final_checkpoint")
    name = "model.embed_tokens.weight"
    assert new[name].shape[0] == len(old[name]) + len(sid_tokens)
    assert torch.equal(new[name][: len(old[name])], old[name])


def test_sids_of_mixed_depth_train(flags, shop, tmp_path, caplog):
    index = json.loads((shop / "shop.index.json").read_text())
    index["7"].append("<d_0>")
    index["8"] = [*index["7"][:3], "<d_1>"]
    (tmp_path / "mixed.index.json").write_text(json.dumps(index))
    for split in ("train", "valid"):
        with (shop / f"shop.{split}.csv").open() as source, (tmp_path / f"{split}.csv").open("w") as target:
            # The CSV was written before the collision tokens were: item 8 has another SID there.
            target.write(source.read().replace("<a_0><b_1><c_3>", "<a_0><b_1><c_2><d_1>"))
    text = run(
        flags(
            sid_index_path=tmp_path / "mixed.index.json",
            train_file=tmp_path / "train.csv",
            eval_file=tmp_path / "valid.csv",
        ),
        caplog,
    )
    assert "distinct SIDs of 3 or 4 tokens" in text
    assert "SIDs lack the last token that the index has" in text
    assert "Adding 22 new tokens" in text


def test_a_checkpoint_is_the_base_of_the_next_run_in_freeze_mode_and_whole(flags, base, shop, sid_tokens, tmp_path, caplog):
    run(flags(), caplog)
    first = tmp_path / "first"
    shutil.move(tmp_path / "run", first)
    index = json.loads((shop / "shop.index.json").read_text())
    index["9999"] = ["<a_0>", "<b_0>", "<c_99>"]
    (tmp_path / "grown.index.json").write_text(json.dumps(index))
    text = run(flags(base_model=first / "final_checkpoint", sid_index_path=tmp_path / "grown.index.json"), caplog)
    assert "Adding 1 new tokens" in text
    assert "20 of 21 SID tokens were there already and keep their rows" in text
    assert "frozen values changed: 0" in text
    ids = [
        AutoTokenizer.from_pretrained(folder / "final_checkpoint").convert_tokens_to_ids(sid_tokens)
        for folder in (first, tmp_path / "run")
    ]
    assert ids[0] == ids[1]
    assert_only_sid_rows_moved(first / "final_checkpoint", tmp_path / "run" / "final_checkpoint", sid_tokens)
    text = run(flags(base_model=first / "final_checkpoint", freeze_LLM=False, output_dir=tmp_path / "whole"), caplog)
    assert "Adding 0 new tokens" in text
    before, after = weights(first / "final_checkpoint"), weights(tmp_path / "whole" / "final_checkpoint")
    assert all((before[name] != after[name]).any() for name in before)


@pytest.mark.parametrize("freeze", [True, False])
def test_of_a_base_that_samples_and_penalises_the_checkpoint_keeps_the_tokens_alone(flags, base, tmp_path, caplog, freeze):
    """As Qwen2.5's chat models do: what they add to scores would change every server's answers."""
    shutil.copytree(base, sampling := tmp_path / "base")
    chat = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
    chat |= {"no_repeat_ngram_size": 3, "bad_words_ids": [[7]], "max_new_tokens": 9, "num_beams": 2}
    GenerationConfig(bos_token_id=2, eos_token_id=[5, 3], pad_token_id=4, **chat).save_pretrained(sampling)
    run(flags(base_model=sampling, freeze_LLM=freeze, max_steps=2, eval_steps=2, save_steps=2), caplog)
    final = tmp_path / "run" / "final_checkpoint"
    found = json.loads((final / "generation_config.json").read_text())
    found = {name: value for name, value in found.items() if name != "transformers_version" and not name.startswith("_")}
    own = AutoTokenizer.from_pretrained(final).eos_token_id
    assert found == {"bos_token_id": 2, "eos_token_id": [5, 3, own], "pad_token_id": own}
    model, ids = AutoModelForCausalLM.from_pretrained(final), torch.tensor([[8, 9, 7]])
    written = model.generate(ids, max_new_tokens=3, do_sample=False, num_beams=1, eos_token_id=[])[0, 3:].tolist()
    for place, token in enumerate(model.generate(ids, max_new_tokens=3)[0, 3:].tolist()):
        assert token == written[place], "greedily"


def test_training_from_scratch_starts_from_random_weights(flags, base, tmp_path, caplog):
    run(flags(freeze_LLM=False, train_from_scratch=True, max_steps=2, eval_steps=2, save_steps=2), caplog)
    before, after = weights(base), weights(tmp_path / "run" / "final_checkpoint")
    name = "model.layers.0.mlp.up_proj.weight"
    assert abs(torch.corrcoef(torch.stack([before[name].flatten(), after[name].flatten()]))[0, 1]) < 0.2


def test_check_reads_everything_and_writes_nothing(flags, tmp_path, caplog):
    text = run(flags(check=True), caplog)
    assert "sid_sid: 'Semantic IDs of the kitchen products" in text
    assert "Trainable parameters (with grad-mask): 640" in text
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------- bad input


def rewrite(path: Path, target: Path, change) -> Path:
    """A copy of a CSV with one cell or column changed by `change(header, rows)`."""
    with path.open(newline="") as file:
        header, *rows = list(csv.reader(file))
    header, rows = change(header, rows)
    with target.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return target


def without_column(header, rows):
    return header[:-1], [row[:-1] for row in rows]


def code_in_cell(header, rows):
    rows[0][1] = "__import__('os').system('touch hacked')"
    return header, rows


def no_list_in_cell(header, rows):
    rows[0][3] = "17"
    return header, rows


def unaligned(header, rows):
    rows[0][3] = "[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]"
    return header, rows


def no_rows(header, rows):
    return header, []


def other_sids(header, rows):
    return header, [[*row[:-1], "<a_77><b_77><c_77>"] for row in rows]


BAD = {
    "an unknown flag": (lambda p, s: {"freeze_LM": True}, "did you mean freeze_LLM"),
    "a flag of the wrong type": (lambda p, s: {"freeze_LLM": "maybe"}, "neither True nor False"),
    "a number that is none": (lambda p, s: {"num_epochs": "ten"}, "is no number"),
    "negative epochs": (lambda p, s: {"num_epochs": -1}, "must be above 0"),
    "a batch of nothing": (lambda p, s: {"batch_size": 0}, "must be at least 1"),
    "a batch that does not divide": (
        lambda p, s: {"batch_size": 18},
        "no multiple of micro_batch_size x processes = 4 x 1",
    ),
    "a task that is none": (lambda p, s: {"tasks": "sid_sid,titel_sid"}, "did you mean title_sid"),
    "no index": (lambda p, s: {"sid_index_path": None}, "--sid_index_path is missing"),
    "a wrong path to the index": (lambda p, s: {"sid_index_path": p / "x.index.json"}, "there is no such file"),
    "an index that is not JSON": (lambda p, s: {"sid_index_path": write(p / "i.json", "{")}, "is not JSON"),
    "an empty index": (lambda p, s: {"sid_index_path": write(p / "i.json", "{}")}, "holds no items"),
    "an index of another dataset": (
        lambda p, s: {"sid_index_path": write(p / "i.json", '{"90000": ["<a_1>"]}')},
        "must be of one dataset",
    ),
    "a CSV of another index": (
        lambda p, s: {"train_file": rewrite(s / "shop.train.csv", p / "t.csv", other_sids)},
        "in the index",
    ),
    "a CSV without a column": (
        lambda p, s: {"train_file": rewrite(s / "shop.train.csv", p / "t.csv", without_column)},
        "has no column 'item_sid'",
    ),
    "code in a cell": (
        lambda p, s: {"train_file": rewrite(s / "shop.train.csv", p / "t.csv", code_in_cell)},
        "t.csv:2: column 'history_item_title' is not a list literal",
    ),
    "a cell that is no list": (
        lambda p, s: {"eval_file": rewrite(s / "shop.valid.csv", p / "t.csv", no_list_in_cell)},
        "t.csv:2: column 'history_item_id' is not a list literal",
    ),
    "lists that are not aligned": (
        lambda p, s: {"train_file": rewrite(s / "shop.train.csv", p / "t.csv", unaligned)},
        "they must be aligned",
    ),
    "a CSV without rows": (
        lambda p, s: {"train_file": rewrite(s / "shop.train.csv", p / "t.csv", no_rows)},
        "has no rows",
    ),
    "an empty CSV": (lambda p, s: {"train_file": write(p / "t.csv", "")}, "is empty"),
    "an item file that is none": (lambda p, s: {"item_meta_path": write(p / "x.json", "[]")}, "holds no items"),
    "a missing base model": (lambda p, s: {"base_model": p / "nothing"}, "there is no such folder"),
    "a base model that is none": (lambda p, s: {"base_model": p}, "has no config.json"),
    "random weights, frozen": (lambda p, s: {"train_from_scratch": True}, "would freeze random weights"),
    "FSDP version 1": (lambda p, s: {"ENV": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}}, "version '1' is not"),
    "FSDP of no version": (
        lambda p, s: {"ENV": {"ACCELERATE_USE_FSDP": "true"}},
        "start with torchrun (as sft.sh does) and",
    ),
    "DeepSpeed": (
        lambda p, s: {"ENV": {"ACCELERATE_USE_DEEPSPEED": "true"}},
        "DeepSpeed is not supported; start with torch",
    ),
    "adapters in shards": (lambda p, s: {"fsdp": True, "lora_rank": 2}, "--lora_rank cannot go with --fsdp True"),
    "4 bits in shards": (lambda p, s: {"fsdp": True, "load_in_4bit": True}, "--load_in_4bit cannot go with --fsdp True"),
    "shards of one process": (lambda p, s: {"fsdp": True}, "over processes, and this is one; start several with torchrun"),
    "shards of one process with accelerate": (
        lambda p, s: {"ENV": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}},
        "over processes, and this is one",
    ),
    "prompts with the history in front": (
        lambda p, s: {"prompts": write(p / "p.json", '{"sid_sid": "{history} and so on"}')},
        "must end with {history}",
    ),
    "a resume point that is none": (lambda p, s: {"resume_from_checkpoint": p}, "is no checkpoint folder"),
    "a folder for kept prefixes that is none": (lambda p, s: {"prefix_cache_in": p / "x"}, "is neither device nor host"),
    "a save between evaluations": (lambda p, s: {"save_steps": 2}, "no multiple of --eval_steps"),
}


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_one_line_that_names_the_cure(name, flags, shop, tmp_path):
    change, message = BAD[name]
    changes = change(tmp_path, shop)
    env = changes.pop("ENV", None)
    result = run_command(*flags(**changes), env=env)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("Catalogue:")]
    assert message in line
    assert line.startswith("sft.py: ")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()
    assert not (ROOT / "hacked").exists()


def test_a_hub_model_that_cannot_be_had_is_one_line(flags, tmp_path):
    result = run_command(*flags(base_model="Qwen/no-such-model"))
    assert result.returncode == 2
    assert "--base_model Qwen/no-such-model" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_a_bad_cell_far_down_the_file_leaves_no_cache(flags, shop, tmp_path, caplog):
    def spoil(header, rows):
        rows[-1][1] = "['unclosed"
        return header, rows

    path = rewrite(shop / "shop.train.csv", tmp_path / "t.csv", spoil)
    assert sft.main(flags(train_file=path)) == 2
    assert "column 'history_item_title' is not a list literal" in caplog.text
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]
    assert not (tmp_path / "run").exists()


def test_recommendation_is_measured_logged_and_may_choose_the_best_checkpoint(flags, tmp_path):
    assert sft.main(flags(eval_recommendation=10, metric_for_best_model="eval_ndcg@10")) == 0
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    measured = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert len(measured) == 2
    assert all(0 <= entry["eval_ndcg@10"] <= entry["eval_hr@10"] <= 1 for entry in measured)
    assert state["best_metric"] == max(entry["eval_ndcg@10"] for entry in measured)
    assert "NDCG@10" in (tmp_path / "run" / "report.md").read_text()
    assert (tmp_path / "run" / "final_checkpoint" / "README.md").is_file()


# ---------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("options", [{}, {"group_by_length": True}, {"group_users": True}])
def test_an_epoch_holds_every_example_once_in_steps_of_the_batch_size(options, dataset):
    examples = Examples(dataset)
    sampler = StepSampler(examples, 64, seed=3, **options)
    first = list(sampler)
    assert sorted(i for step in first for i in step) == list(range(len(examples)))
    assert [len(step) for step in first] == [64, 64, 64, 48]
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_grouping_by_user_puts_a_user_s_examples_side_by_side(dataset):
    examples = Examples(dataset)
    order = np.concatenate(list(StepSampler(examples, 64, seed=3, group_users=True)))
    users = examples.user[order]
    for user in np.unique(users[users >= 0]):
        places = np.nonzero(users == user)[0]
        between = users[places[0] : places[-1] + 1]
        assert set(between[between >= 0]) == {user}


def test_micro_batches_are_dealt_evenly():
    parts = [MicroBatch(np.array([i]), float(cost), None) for i, cost in enumerate([9, 1, 5, 4, 3, 2])]
    hands = deal(parts, 2)
    loads = [sum(parts[int(part[0])].cost for part in hand) for hand in hands]
    assert loads == [12, 12]
    owned = deal([part._replace(process=1) for part in parts[:2]] + parts[2:], 2)
    assert {int(part[0]) for part in owned[1]} >= {0, 1}
    assert sorted(int(part[0]) for hand in hands for part in hand) == list(range(6))
