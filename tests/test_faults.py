"""What a machine lacks or a model's files hold, told in one line: memory, a place for results, numbers that are numbers."""

import errno
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_command, small_model
from machine import one_line, run_as_user, small_disk
from safetensors import SafetensorError
from test_evaluate import arguments_of, store  # noqa: F401 - a fixture
from test_sft import history, losses, weights
from transformers import AutoTokenizer

import evaluate
import sft
from sid_sft.faults import attempt, disk_fault, fitted, memory_in_one_line, out_of_memory
from sid_sft.files import FaultHere
from sid_sft.finite import broken_weights
from sid_sft.forward.examples import Examples
from sid_sft.forward.frozen_prefix import FrozenPrefix
from sid_sft.forward.plain import OwnForward, PlainForward
from sid_sft.forward.prefix_plan import GPU_LIMITS, PrefixPlan
from sid_sft.forward.store import Store
from sid_sft.locks import held
from sid_sft.output_folder import LOCK_FILE

CPU_SAYS = "[enforce fail at alloc_cpu.cpp:125] DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."


# ---------------------------------------------------------------------------------------------- errors of libraries


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(CPU_SAYS),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
    ids=["device", "cpu", "cublas", "python"],
)
def test_want_of_memory_is_known_in_all_its_words(error):
    assert out_of_memory(error)
    with pytest.raises(FaultHere, match=r"^out of memory \(.+\); try less$"), memory_in_one_line("try less"):
        raise error


def test_other_errors_stay_what_they_are():
    for error in (RuntimeError("shapes differ"), ValueError("out of memory"), OSError(errno.ENOENT, "No such file")):
        assert not out_of_memory(error)
        assert disk_fault(error) is None
        with pytest.raises(type(error)), memory_in_one_line("try less"):
            raise error


def test_a_real_want_of_memory_is_known():
    for greedy in (lambda: torch.empty(1 << 60, dtype=torch.int8), lambda: np.empty(1 << 60, np.int8)):
        result, fault = attempt(greedy)
        assert result is None
        assert fault


def test_a_disk_that_fails_is_known_in_all_its_words():
    assert disk_fault(OSError(errno.ENOSPC, "No space left on device", "x")) == "No space left on device"
    assert disk_fault(SafetensorError("Error while serializing: I/O error: ... (os error 28)")) == "No space left on device"
    assert disk_fault(SafetensorError("invalid header")) is None
    assert disk_fault(Exception("No space left on device (os error 28)")) == "No space left on device"  # tokenizers
    assert disk_fault(Exception("No such file or directory (os error 2)")) is None
    assert disk_fault(RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")) is not None


def test_the_largest_size_that_fits_is_found_by_halving():
    tried = []

    def resize(size):
        tried.append(size)

    def compute():
        size = tried[-1] if tried else 12
        if size > 2:
            raise MemoryError
        return f"done with {size}"

    assert fitted(compute, 12, resize, agreed=None) == ("done with 1", 1)
    assert tried == [6, 3, 1]
    tried.clear()
    with pytest.raises(FaultHere, match=r"even with --micro_batch_size 1 \(MemoryError\)"):
        fitted(lambda: [].__class__(bytearray(1 << 62)), 2, resize, agreed=None)


# ---------------------------------------------------------------------------------------------- memory in training


def short_of_memory(monkeypatch, most: int, error: Exception, *, when=lambda: True) -> list[int]:
    """A machine on which no micro-batch of more than `most` examples can be run backward; returns the sizes that ran."""
    ran: list[int] = []
    for kind in (PlainForward, OwnForward, FrozenPrefix):
        nll = kind.nll

        def limited(self, indices, nll=nll):
            found = nll(self, indices)
            if torch.is_grad_enabled() and found.requires_grad and when():
                if len(indices) > most:
                    raise error
                ran.append(len(indices))
            return found

        monkeypatch.setattr(kind, "nll", limited)
    return ran


ERRORS = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), RuntimeError(CPU_SAYS)]


@pytest.mark.parametrize("error", ERRORS, ids=["device", "cpu"])
@pytest.mark.parametrize("freeze", [True, False])
def test_a_micro_batch_that_does_not_fit_is_halved_and_the_run_is_that_of_the_smaller_size(
    freeze, error, flags, tmp_path, monkeypatch, caplog
):
    changes = {"freeze_LLM": freeze, "frozen_prefix": False, "eval_file": None}
    assert sft.main(flags(output_dir=tmp_path / "small", micro_batch_size=2, **changes)) == 0
    ran = short_of_memory(monkeypatch, 2, error)
    caplog.set_level(logging.INFO, "sft")
    arguments = flags(output_dir=tmp_path / "halved", micro_batch_size=8, auto_micro_batch=True, **changes)
    assert sft.main(arguments) == 0, caplog.text
    (line,) = [message for message in caplog.messages if "out of memory" in message]
    where = "when a forward was tried" if freeze else "in step 1"
    assert line == f"out of memory {where} with --micro_batch_size 8: that was computed again, and the run goes on, with 2"
    assert max(ran) == 2
    assert losses(tmp_path / "halved") == losses(tmp_path / "small")
    one, two = (weights(tmp_path / name / "final_checkpoint") for name in ("small", "halved"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_memory_that_runs_out_later_changes_no_step_before_or_after(flags, tmp_path, monkeypatch, caplog):
    """From the middle of step 3 on: what that step had already added up is dropped."""
    changes = {"frozen_prefix": False, "eval_file": None}
    assert sft.main(flags(output_dir=tmp_path / "straight", **changes)) == 0
    calls = iter(range(10**6))
    short_of_memory(monkeypatch, 1, ERRORS[0], when=lambda: next(calls) > 13)
    caplog.set_level(logging.INFO, "sft")
    assert sft.main(flags(output_dir=tmp_path / "halved", auto_micro_batch=True, **changes)) == 0, caplog.text
    (line,) = [message for message in caplog.messages if "out of memory" in message]
    assert re.fullmatch(r"out of memory in step [2-4] with --micro_batch_size 4: .* with 1", line)
    np.testing.assert_allclose(losses(tmp_path / "halved"), losses(tmp_path / "straight"), rtol=1e-5)
    for left, right in zip(history(tmp_path / "halved"), history(tmp_path / "straight"), strict=True):
        for name in left.keys() & right.keys():
            if name.startswith(("loss", "grad_norm")):
                assert left[name] == pytest.approx(right[name], rel=1e-4), name


@pytest.mark.parametrize("error", ERRORS, ids=["device", "cpu"])
def test_without_the_flag_the_run_ends_with_a_size_that_fits(error, flags, tmp_path, monkeypatch, caplog):
    short_of_memory(monkeypatch, 2, error)
    assert sft.main(flags(frozen_prefix=False, micro_batch_size=8)) == 2
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    expected = "8; 2 fits there (--auto_micro_batch True finds it by itself)"
    assert line == f"sft.py: out of memory when a forward was tried with --micro_batch_size {expected}"
    assert not (tmp_path / "run").exists()


def test_a_machine_for_which_one_example_is_too_much_is_told(flags, monkeypatch, caplog):
    short_of_memory(monkeypatch, 0, ERRORS[0], when=lambda: "training_step" in {f.name for f in frames()})
    assert sft.main(flags(frozen_prefix=False, auto_micro_batch=True)) == 2
    assert "sft.py: out of memory even with --micro_batch_size 1 (CUDA out of memory." in caplog.text


def frames():
    import traceback

    return traceback.extract_stack()


SCRIPT = """
import os, sys, traceback
sys.path.insert(0, {root!r})
import torch
import sft
from sid_sft.forward.plain import PlainForward

nll = PlainForward.nll

def limited(self, indices):
    found = nll(self, indices)
    training = any(frame.name == "training_step" for frame in traceback.extract_stack())
    if os.environ["RANK"] == "1" and found.requires_grad and len(indices) > {most} and (training or {always}):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return found

PlainForward.nll = limited
sys.exit(sft.main(sys.argv[1:]))
"""


def on_two_processes(
    tmp_path: Path, arguments: list[str], most: int, *, always: bool = False
) -> subprocess.CompletedProcess:
    """sft.py on two processes of which the second has memory for so many examples."""
    script = tmp_path / "limited.py"
    script.write_text(SCRIPT.format(root=str(ROOT), most=most, always=always))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), *arguments]
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("always", [pytest.param(False, marks=pytest.mark.slow), True])
def test_all_processes_agree_on_the_size_that_fits_the_smallest(always, flags, tmp_path):
    changes = {"frozen_prefix": False, "eval_file": None}
    assert run_command(*flags(output_dir=tmp_path / "small", micro_batch_size=2, **changes), processes=2).returncode == 0
    done = on_two_processes(tmp_path, flags(micro_batch_size=8, auto_micro_batch=True, **changes), 2, always=always)
    assert done.returncode == 0, done.stderr
    where = "when a forward was tried" if always else "in step 1"
    assert done.stderr.count(f"out of memory {where} with --micro_batch_size 8: that was computed again") == 1
    assert losses(tmp_path / "run") == losses(tmp_path / "small")


@pytest.mark.slow
def test_the_process_that_lacks_memory_tells_it_and_all_end(flags, tmp_path):
    done = on_two_processes(tmp_path, flags(micro_batch_size=8, frozen_prefix=False), 2)
    assert done.returncode != 0
    assert done.stderr.count("sft.py: out of memory in step 1 with --micro_batch_size 8; 2 fits there") == 1


def test_a_resized_forward_cuts_as_one_that_was_made_with_that_size(dataset, tokenizer):
    examples, step = Examples(dataset), np.arange(80)
    model = small_model("qwen2", len(tokenizer), tie_word_embeddings=True)
    makers = (
        lambda size: PrefixPlan(examples, size, GPU_LIMITS, group_users=False),
        lambda size: PlainForward(model, examples, size),
        lambda size: PlainForward(model, examples, size, group_users=True),
        lambda size: OwnForward(model, examples, size),
    )
    for make in makers:
        large, small = make(32), make(2)
        cuts = [[part.indices.tolist() for part in forward.cut(step, 1)] for forward in (large, small)]
        assert cuts[0] != cuts[1]
        large.resize(2)
        assert [part.indices.tolist() for part in large.cut(step, 1)] == cuts[1]
    alone = OwnForward(model, examples, 8, alone=True)
    alone.resize(4)
    assert alone.micro_batch_size == 1


def test_a_cache_for_which_memory_does_not_suffice_names_its_flag():
    kept = Store(1 << 62, torch.device("cpu"), "device")
    with pytest.raises(
        FaultHere, match=r"out of memory .*are to be kept from step to step; try a smaller --prefix_cache_gb"
    ):
        kept.allocate((1 << 58,), torch.float32)


def test_an_evaluation_for_which_memory_does_not_suffice_names_its_flags(store, monkeypatch, caplog):  # noqa: F811
    def greedy(*arguments, **settings):
        raise ERRORS[0]

    monkeypatch.setattr(evaluate.Evaluator, "recommend", greedy)
    assert evaluate.main(arguments_of(store)) == 2
    assert "evaluate.py: out of memory (CUDA out of memory." in caplog.text
    assert "; try --batch_size 2 or fewer --num_beams" in caplog.text


# ---------------------------------------------------------------------------------------------- results of an evaluation


def test_a_second_evaluation_into_a_folder_is_refused_and_words_are_not(store, tmp_path, caplog):  # noqa: F811
    with held(tmp_path / LOCK_FILE, "a test"):
        assert evaluate.main(arguments_of(store, output_dir=tmp_path)) == 2
        assert (
            f"evaluate.py: --output_dir {tmp_path}: another run writes there (a test, process {os.getpid()}" in caplog.text
        )
        assert evaluate.main(arguments_of(store, output_dir=tmp_path, recommend="103")) == 0
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


@pytest.mark.parametrize("name", ["metrics.json", "predictions.jsonl", "recommendations.png"])
def test_a_folder_in_place_of_a_result_is_told_before_the_model_is_loaded(name, store, tmp_path, caplog, monkeypatch):  # noqa: F811
    (tmp_path / name).mkdir()
    monkeypatch.setattr(evaluate, "load_model", None)
    assert evaluate.main(arguments_of(store, output_dir=tmp_path)) == 2
    assert f"evaluate.py: --output_dir {tmp_path}: {name} is no file, and a file will be written there" in caplog.text


def test_results_that_cannot_be_written_are_told_all_the_same(store, tmp_path):  # noqa: F811
    with small_disk(tmp_path / "disk", 4096 * 3) as disk:
        done = run_as_user("evaluate.py", *arguments_of(store, output_dir=disk / "results"))
        line = one_line(done)
        assert line.startswith(f"evaluate.py: --output_dir {disk / 'results'}: the results cannot be written (No space left")
        metrics = json.loads(done.stdout[done.stdout.index("{") :])
        assert 0 <= metrics["sid"]["hr@10"] <= 1
        assert "HR@10 of this model" in done.stderr
        assert {path.name for path in disk.rglob("*.tmp")} == set()


# ---------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize(("freeze", "mask"), [(True, 0o002), pytest.param(False, 0o027, marks=pytest.mark.slow)])
def test_all_that_a_run_and_an_evaluation_leave_follows_the_umask(freeze, mask, flags, shop, tmp_path):
    done = run_as_user("sft.py", *flags(freeze_LLM=freeze), umask=mask)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    files = {name: shop / f"shop.{kind}" for name, kind in (("test_file", "test.csv"), ("sid_index_path", "index.json"))}
    words = [f"--{name}={path}" for name, path in {**files, "base_model": run / "final_checkpoint"}.items()]
    done = run_as_user("evaluate.py", *words, "--sample=5", "--num_beams=5", f"--output_dir={run / 'eval'}", umask=mask)
    assert done.returncode == 0, done.stderr
    found = {str(path.relative_to(run)): path for path in run.rglob("*")}
    weights_file = "sid_rows.safetensors" if freeze else "model.safetensors"
    wanted = {"report.md", "curves.png", "trainer_state.json", "eval/metrics.json", "checkpoint-6/optimizer.pt"}
    assert wanted | {f"checkpoint-6/{weights_file}", f"final_checkpoint/{weights_file}"} <= found.keys()
    for name, path in found.items():
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, name


# ---------------------------------------------------------------------------------------------- values that are none


@pytest.mark.parametrize("command", ["sft.py", "evaluate.py"])
def test_a_base_with_one_value_that_is_none_in_a_row_that_nobody_reads_is_refused_by_name(command, flags, store, tmp_path):  # noqa: F811
    """An untied embedding: the row of a rare word reaches no loss of a trial and no score."""
    folder = tmp_path / "broken"
    tokenizer = AutoTokenizer.from_pretrained(store / "model")
    model = small_model("qwen2", len(tokenizer), tie_word_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[5, 7] = torch.nan
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    arguments = flags(base_model=folder) if command == "sft.py" else arguments_of(store, base_model=folder)
    line = one_line(run_as_user(command, *arguments))
    assert line.startswith(
        f"{command}: --base_model {folder}: model.embed_tokens.weight holds 1 values that are NaN or infinite"
    )
    assert not (tmp_path / "run").exists()


def test_values_that_are_none_are_counted_and_large_ones_are_not():
    model = small_model("qwen2", 50, tie_word_embeddings=False).half()
    with torch.no_grad():
        model.model.norm.weight.fill_(60_000)  # their sum is infinite in float16
        assert broken_weights(model) == {}
        model.model.norm.weight[:2] = torch.inf
        model.lm_head.weight[3] = torch.nan
    assert broken_weights(model) == {"model.norm.weight": 2, "lm_head.weight": 32}
