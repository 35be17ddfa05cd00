"""A model shared out over processes trains, is saved and goes on as the whole model does."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from architectures import SIDS, TOKENS, toy_examples
from conftest import run_command, small_model
from families import small_family
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import sft
from sid_sft.files import InputError
from sid_sft.finite import broken_weights
from sid_sft.forward.architecture import blocks_of, tables_of
from sid_sft.forward.frozen_prefix import Calls, FrozenPrefix
from sid_sft.forward.plain import PlainForward
from sid_sft.sharding import Shards, even, gathered, local, own_places, save_shard, shard, shard_file, whole
from sid_sft.sid_rows import base_hash, differing_values
from sid_sft.tasks import DEFAULT_TASKS

RUN = {
    "freeze_LLM": False,
    "tasks": "sid_sid,item",
    "max_steps": 20,
    "eval_steps": 10,
    "save_steps": 10,
    "batch_size": 12,
    "micro_batch_size": 2,
    "sample": 30,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
}


# ---------------------------------------------------------------------------------------------- one process


@pytest.fixture(scope="module", autouse=True)
def a_process_alone(tmp_path_factory):
    """The group of one process in which a model can be sharded."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model, *, keep_tables: bool = False):
    shard(model, torch.device("cpu"), torch.float32, keep_tables=keep_tables)
    return model


def test_every_process_gets_as_many_micro_batches():
    a, b, c = np.array([7, 3]), np.array([5]), np.array([4])
    assert even([[a, b], [c]], 0) == [(a, True), (b, True)]
    assert even([[a, b], [c]], 1) == [(c, True), (c, False)]
    assert even([[], [a, b]], 0) == [(b, False), (b, False)]
    assert even([[], []], 0) == []


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "opt", "gemma2", "mixtral", "gpt_neox"])
def test_loss_and_gradient_of_a_sharded_model_are_those_of_the_whole_one(family):
    examples = toy_examples()
    loss, gradients = {}, {}
    for how in ("whole", "sharded"):
        model = small_family(family, TOKENS + SIDS)
        if how == "sharded":
            sharded(model)
        assert isinstance(model.get_input_embeddings().weight, DTensor) == (how == "sharded")
        forward = PlainForward(model, examples, 4)
        parts = [part.indices for part in forward.cut(np.arange(8))]
        for part in parts:
            forward.nll(part).sum().backward()
        loss[how] = [forward.nll(part).detach() for part in parts]
        gradients[how] = {name: whole(weight.grad) for name, weight in model.named_parameters() if weight.grad is not None}
    assert all(map(torch.equal, loss["whole"], loss["sharded"]))
    assert gradients["whole"].keys() <= gradients["sharded"].keys()
    for name, gradient in gradients["sharded"].items():
        torch.testing.assert_close(gradient, gradients["whole"].get(name, torch.zeros_like(gradient)))


def test_kept_tables_stay_whole_and_blocks_do_not():
    model = sharded(small_model("llama", 50, tie_word_embeddings=False), keep_tables=True)
    tables = {id(table) for table in tables_of(model).values()}
    assert len(tables) == 2
    for weight in model.parameters():
        assert isinstance(weight, DTensor) == (id(weight) not in tables)


def test_what_fails_inside_leaves_the_outermost_weights_sharded():
    model = sharded(small_model("llama", 50))

    @gathered
    def fail(model):
        assert not isinstance(model.get_input_embeddings().weight, DTensor)
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        fail(model)
    assert isinstance(model.get_input_embeddings().weight, DTensor)


def test_hash_and_differences_are_those_of_the_whole_model():
    model, other = (small_model("llama", 50) for _ in range(2))
    before = base_hash(model, 40)
    sharded(model)
    assert base_hash(model, 40) == before
    assert differing_values(model, other) == {}
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, :5] += 1
    assert differing_values(model, other) == {"model.layers.1.mlp.up_proj.weight": 5}
    with torch.no_grad():
        local(model.model.layers[0].mlp.up_proj.weight)[2, 1] = torch.nan
    assert broken_weights(model) == {"model.layers.0.mlp.up_proj.weight": 1}


def test_layers_are_found_wherever_they_stand():
    gpt, llama = small_family("gpt2", 50), small_family("mixtral", 50)
    assert blocks_of(gpt) == list(gpt.transformer.h)
    assert blocks_of(llama) == list(llama.model.layers)  # not its experts, which stand inside


def test_a_model_whose_layers_share_weights_is_refused():
    model = small_model("llama", 50)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(InputError, match="layers of LlamaForCausalLM have weights in common; start without --fsdp"):
        sharded(model)


def test_shards_that_are_not_all_there_are_refused(tmp_path):
    model = sharded(small_model("llama", 50))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(InputError, match="has no shards of a run with --fsdp True"):
        Shards(tmp_path)
    save_shard(tmp_path, model, optimizer)
    (file,) = tmp_path.iterdir()
    with pytest.raises(InputError, match="lack weight/lm_head.bias; they are of another model"):
        Shards(tmp_path).fill("weight/lm_head.bias", torch.zeros(50))
    file.rename(tmp_path / "shard-00000-of-00002.safetensors")
    with pytest.raises(InputError, match="has no shards of a run with --fsdp True"):
        Shards(tmp_path)


@pytest.mark.parametrize("cache_bytes", [0, 40_000, 10**7])  # nothing, labels and some keys, all
def test_the_calls_of_a_frozen_prefix_are_known_before_they_are_made(cache_bytes):
    model = small_family("qwen3", TOKENS + SIDS)
    ids = list(range(TOKENS, TOKENS + SIDS))
    rows = sft.freeze_llm(model, ids, [f"<{i}>" for i in ids])
    forward = FrozenPrefix(model, rows, toy_examples(), 4, cache_bytes=cache_bytes)
    parts = [part.indices for part in forward.cut(np.arange(0, 96, 5))]
    made = []
    expected = forward.count_calls(parts)
    for part in parts:
        before = forward.calls
        forward.nll(part)
        made.append(forward.calls - before)
    assert made == [sum(calls) for calls in expected]
    assert {calls.tail for calls in expected} == {0, 1}
    again = [calls.static for calls in forward.count_calls(parts)]
    assert (sum(again) == 0) == (cache_bytes == 10**7)


def test_idle_calls_change_no_loss_and_no_gradient():
    def loss_and_gradient(expected: list[Calls]) -> tuple[list[float], torch.Tensor, float]:
        model = small_family("qwen3", TOKENS + SIDS)
        ids = list(range(TOKENS, TOKENS + SIDS))
        rows = sft.freeze_llm(model, ids, [f"<{i}>" for i in ids])
        forward = FrozenPrefix(model, rows, toy_examples(), 4)
        parts = [part.indices for part in forward.cut(np.arange(0, 96, 5))]
        forward.expected = expected * len(parts)
        before, found = forward.calls, []
        for part in parts:
            loss = forward.nll(part).sum()
            loss.backward()
            found.append(float(loss.detach()))
        assert not forward.expected
        return found, rows.masters[0].grad, (forward.calls - before) / len(parts)

    alone, alone_gradient, _ = loss_and_gradient([])
    among, among_gradient, calls = loss_and_gradient([Calls(static=7, tail=1)])
    assert among == alone
    assert torch.equal(among_gradient, alone_gradient)
    assert calls == 8


def test_shards_of_any_number_of_processes_are_read_by_any_other(tmp_path):
    for count in (1, 2, 5, 7):
        values = torch.arange(3 * count).view(count, 3)
        for wrote in (1, 2, 3, 4):
            folder = tmp_path / f"{count} {wrote}"
            folder.mkdir()
            chunks = [*values.chunk(wrote), *[values[:0]] * wrote][:wrote]
            for process, chunk in enumerate(chunks):
                assert [*range(*own_places(count, process, wrote))] == (chunk[:, 0] // 3).tolist()
                save_file({"weight/x": chunk.contiguous()}, shard_file(folder, process, wrote))
            for read in (1, 2, 3, 6):
                places = [own_places(count, process, read) for process in range(read)]
                assert torch.equal(torch.cat([Shards(folder).rows("weight/x", *place) for place in places]), values)


# ---------------------------------------------------------------------------------------------- several processes


def losses(folder: Path) -> list[float]:
    """What a run measured: the loss of each step, and the loss and the numbers of each evaluation."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    measured = ("loss", "eval_loss", "eval_hr@10", "eval_ndcg@10")
    return [entry[name] for entry in history for name in measured if name in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final_checkpoint" / "model.safetensors")


def done(result) -> str:
    assert result.returncode == 0, result.stderr
    return result.stderr


def test_a_sharded_run_is_that_of_one_process_and_is_resumed_exactly(flags, tmp_path):
    changes = {**RUN, "eval_recommendation": 20}
    done(run_command(*flags(**changes, output_dir=tmp_path / "one")))
    done(run_command(*flags(**changes, output_dir=tmp_path / "two", fsdp=True), processes=2))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(two) == 20 + 2 * 3
    assert two == pytest.approx(one, rel=1e-5)
    for name, weight in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], weight, rtol=1e-3, atol=1e-4)
    files = {path.name for path in (tmp_path / "two" / "checkpoint-10").iterdir()}
    assert {"shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors", "checkpoint.json"} <= files
    assert "model.safetensors" not in files

    final = tmp_path / "two" / "final_checkpoint"  # loads with transformers alone
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    ids = tokenizer("<a_0>", return_tensors="pt").input_ids
    assert ids.shape == (1, 1)
    assert model(ids).logits.isfinite().all()
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in weights(tmp_path / "two").items())

    folder = tmp_path / "resumed"
    shutil.copytree(tmp_path / "two", folder)
    shutil.rmtree(folder / "checkpoint-20")
    shutil.rmtree(folder / "final_checkpoint")
    log = done(run_command(*flags(**changes, output_dir=folder, fsdp=True, resume_from_checkpoint=True), processes=2))
    assert f"Resuming from {folder / 'checkpoint-10'}" in log
    assert losses(folder) == two
    assert all(torch.equal(weight, weights(tmp_path / "two")[name]) for name, weight in weights(folder).items())


def test_a_frozen_model_is_sharded_and_its_rows_train_as_in_a_whole_one(flags, tmp_path):
    changes = {**RUN, "freeze_LLM": True, "learning_rate": None, "tasks": ",".join(DEFAULT_TASKS), "sample": 12}
    done(run_command(*flags(**changes, output_dir=tmp_path / "whole"), processes=2))
    accelerate = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # means --fsdp True
    log = done(run_command(*flags(**changes, output_dir=tmp_path / "sharded"), processes=2, env=accelerate))
    assert "frozen values changed: 0" in log
    assert re.search("Frozen prefix: .* loss equal to the model's own", log)
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)
    rows, expected = (
        load_file(tmp_path / name / "final_checkpoint" / "sid_rows.safetensors") for name in ("sharded", "whole")
    )
    assert float((rows["embedding"] - expected["embedding"]).norm() / expected["embedding"].norm()) < 1e-6
    before, after = weights(tmp_path / "whole"), weights(tmp_path / "sharded")
    for name in before:
        if name != "model.embed_tokens.weight":
            assert torch.equal(before[name], after[name]), name


def test_a_step_cannot_be_computed_again_where_all_processes_compute_it(flags, tmp_path):
    result = run_command(*flags(fsdp=True, auto_micro_batch=True), processes=2)
    assert result.returncode
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("sft.py: ")]
    assert "--auto_micro_batch True cannot compute a step again with --fsdp True" in line
    assert not (tmp_path / "run").exists()
