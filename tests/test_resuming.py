"""Runs that are stopped, killed and resumed: nothing is lost, nothing else is resumed, and nobody can tell from the end."""

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import ROOT, run_command, short_run, small_model
from kill import end_of
from transformers import AutoTokenizer

import sft
from sid_sft.interruption import Interrupted, StopSignals
from sid_sft.output_folder import RECORD_FILE
from sid_sft.resuming import ASIDE, read_record, what_decides
from sid_sft.run_keeper import RunKeeper
from sid_sft.settings import CHANGEABLE, TrainFlags
from sid_sft.trainer import SidTrainer

# What may differ without a word, since it decides no number but rounding.
WITHOUT_EFFECT = """
    output_dir max_left_out frozen_prefix micro_batch_size auto_micro_batch prefix_cache_gb prefix_cache_in logging_steps
    resume_from_checkpoint allow_changed report_to wandb_project wandb_run_name push_to_hub hub_private
    trust_remote_code cache_dir num_proc check gradient_checkpointing
"""
SHORT = {"max_steps": 6, "eval_steps": 2, "save_steps": 2, "sample": 12, "tasks": "sid_sid", "early_stopping_patience": 0}


def run(arguments: list[str], caplog, code: int = 0) -> str:
    """sft.py in this process; its log."""
    caplog.clear()
    caplog.set_level("INFO", logger="sft")
    assert sft.main(arguments) == code, caplog.text
    return caplog.text


def last_line(log: str) -> str:
    return log.strip().splitlines()[-1]


# ---------------------------------------------------------------------------------------------- whole checkpoints


DAMAGES = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "gone": lambda path: path.unlink(),
    "one bit other": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("freeze", [True, False])
def test_a_damaged_checkpoint_is_named_and_the_whole_one_before_it_resumed(freeze, flags, tmp_path, caplog):
    run(flags(freeze_LLM=freeze, **SHORT), caplog)
    whole, damaged = tmp_path / "whole", tmp_path / "run"
    shutil.copytree(damaged, whole)
    names = sorted(path.name for path in (whole / "checkpoint-6").iterdir())
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", RECORD_FILE} < set(names)
    for name in names:
        for what, damage in DAMAGES.items():
            shutil.rmtree(damaged)
            shutil.copytree(whole, damaged)
            damage(damaged / "checkpoint-6" / name)
            with pytest.raises(sft.InputError) as refused:
                read_record(damaged / "checkpoint-6")
            assert name in str(refused.value), what
    shutil.rmtree(damaged)
    shutil.copytree(whole, damaged)
    DAMAGES["cut"](damaged / "checkpoint-6" / "optimizer.pt")
    log = run(flags(freeze_LLM=freeze, resume_from_checkpoint=True, **SHORT), caplog)
    assert "checkpoint-6 is not whole: optimizer.pt is not as it was written; it is not resumed" in log
    assert re.search(r"Resuming from \S+/checkpoint-[24]\n", log)
    assert (damaged / ASIDE / "checkpoint-6").is_dir()
    assert "checkpoint-6: in the way of this run, moved to " in log
    assert end_of(damaged) == end_of(whole)


def test_a_damaged_checkpoint_that_is_asked_for_by_name_is_refused(flags, tmp_path, caplog):
    run(flags(**SHORT), caplog)
    newest = tmp_path / "run" / "checkpoint-6"
    (newest / RECORD_FILE).unlink()
    line = last_line(run(flags(resume_from_checkpoint=newest, **SHORT), caplog, code=2))
    assert line.endswith("checkpoint-6 is not whole: it has no checkpoint.json, which is written last")
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        (folder / RECORD_FILE).write_text("[]")
    line = last_line(run(flags(resume_from_checkpoint=True, **SHORT), caplog, code=2))
    assert "has no whole checkpoint; leave the flag out to start afresh" in line
    assert "the run starts afresh" in run(flags(resume_from_checkpoint="auto", **SHORT), caplog)


def test_auto_starts_afresh_and_true_does_not(flags, tmp_path, caplog):
    line = last_line(run(flags(resume_from_checkpoint=True, **SHORT), caplog, code=2))
    assert line.endswith("has no checkpoint; with auto the run starts afresh")
    run(flags(resume_from_checkpoint="auto", **SHORT), caplog)
    assert "nothing is left to train" in run(flags(resume_from_checkpoint="auto", **SHORT), caplog)


def test_checkpoints_of_an_earlier_run_are_out_of_the_way_of_a_fresh_one(flags, tmp_path, caplog):
    run(flags(**SHORT), caplog)
    half = tmp_path / "run" / "checkpoint-8"
    half.mkdir()
    (half / "optimizer.pt").write_bytes(b"half of it")
    run(flags(**{**SHORT, "max_steps": 2}), caplog)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert (tmp_path / "run" / ASIDE / "checkpoint-6").is_dir()
    assert not list((tmp_path / "run").rglob("checkpoint-8"))


def test_two_runs_write_the_same_bytes(flags, tmp_path, caplog):
    for name in ("one", "two"):
        run(flags(output_dir=tmp_path / name, **SHORT), caplog)
    assert end_of(tmp_path / "one") == end_of(tmp_path / "two")


def test_a_folder_that_was_moved_still_has_its_best_checkpoint(flags, tmp_path, caplog):
    changes = {**SHORT, "learning_rate": 5.0, "warmup_steps": 0, "lr_scheduler_type": "constant"}  # soon worse than at first
    run(flags(**changes), caplog)
    expected = end_of(tmp_path / "run")
    assert expected["best"][1] < 6
    (tmp_path / "run").rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "checkpoint-6")
    shutil.rmtree(tmp_path / "moved" / "final_checkpoint")
    run(flags(output_dir=tmp_path / "moved", resume_from_checkpoint=True, **changes), caplog)
    assert end_of(tmp_path / "moved") == expected


# ---------------------------------------------------------------------------------------------- what decides a run


def fewer_rows(shop: Path, tmp_path: Path) -> dict:
    lines = (shop / "shop.train.csv").read_text().splitlines(keepends=True)
    (tmp_path / "fewer.csv").write_text("".join(lines[:-50]))
    return {"train_file": tmp_path / "fewer.csv"}


def shuffled_sids(shop: Path, tmp_path: Path) -> dict:
    """The same SIDs, each of another item, in the index and in the CSVs."""
    index = json.loads((shop / "shop.index.json").read_text())
    other = dict(zip(index, [*list(index.values())[1:], next(iter(index.values()))], strict=True))
    (tmp_path / "other.index.json").write_text(json.dumps(other))
    changes = {"sid_index_path": tmp_path / "other.index.json"}
    for flag, split in (("train_file", "train"), ("eval_file", "valid")):
        with (shop / f"shop.{split}.csv").open() as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            row["history_item_sid"] = repr(["".join(other[str(item)]) for item in json.loads(row["history_item_id"])])
            row["item_sid"] = "".join(other[row["item_id"]])
        changes[flag] = tmp_path / f"other.{split}.csv"
        with changes[flag].open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    return changes


def other_titles(shop: Path, tmp_path: Path) -> dict:
    items = json.loads((shop / "shop.item.json").read_text())
    items["0"]["title"] += " and more"
    (tmp_path / "other.item.json").write_text(json.dumps(items))
    return {"item_meta_path": tmp_path / "other.item.json"}


DIFFERENCES = {
    "fewer rows": (fewer_rows, "train_file has other content"),
    "shuffled SIDs": (shuffled_sids, "train_file has other content, eval_file has other content, sid_index_path has other"),
    "other titles": (other_titles, "item_meta_path has other content"),
    "another seed": ({"seed": 7}, "seed 42 (now 7)"),
    "another batch size": ({"batch_size": 8}, "batch_size 16 (now 8)"),
    "other tasks": ({"tasks": "sid_sid,item"}, "tasks sid_sid (now sid_sid,item)"),
    "another category": ({"category": "Toys"}, "category kitchen (now Toys)"),
    "a sample": ({"sample": 11}, "sample 12 (now 11)"),
    "a learning rate": ({"learning_rate": 0.5}, "learning_rate 0.075 (now 0.5)"),
    "weight decay": ({"weight_decay": 0.1}, "weight_decay 1.0 (now 0.1)"),
    "a schedule": ({"lr_scheduler_type": "linear"}, "lr_scheduler_type cosine (now linear)"),
    "a longer run": ({"max_steps": 8}, "max_steps 6 (now 8)"),
    "a shorter cutoff": ({"cutoff_len": 200}, "cutoff_len 512 (now 200)"),
    "users together": ({"group_users": True}, "group_users False (now True)"),
    "another precision": ({"bf16": True}, "bf16 False (now True)"),
    "other evaluation rows": ({"eval_sample": 10}, "eval_sample 20 (now 10)"),
    "patience": ({"early_stopping_patience": 5}, "early_stopping_patience 0 (now 5)"),
    "other intervals": ({"eval_steps": 1, "save_steps": 1}, "eval_steps 2.0 (now 1.0), save_steps 2.0 (now 1.0)"),
    "own words": (
        lambda shop, tmp_path: {"prompts": write(tmp_path / "p.json", '{"sid_sid": "Bought:\\n{history}"}')},
        "prompts has other content",
    ),
}


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


ALLOWED = ("fewer rows", "shuffled SIDs", "other tasks", "a longer run", "own words")  # tried to the end


@pytest.fixture(scope="module")
def begun(base, shop, tmp_path_factory) -> Path:
    """A run that was killed after step 4 of 6."""
    folder = tmp_path_factory.mktemp("begun")
    assert sft.main(short_run(base, shop, folder, **SHORT)) == 0
    shutil.rmtree(folder / "run" / "checkpoint-6")
    return folder


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_run_goes_on_as_another_one_only_where_that_is_allowed_by_name(name, begun, flags, shop, tmp_path, caplog):
    change, message = DIFFERENCES[name]
    changes = change(shop, tmp_path) if callable(change) else change
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    settings = {**SHORT, **changes, "resume_from_checkpoint": True}
    before = contents(tmp_path / "run")
    line = last_line(run(flags(**settings), caplog, code=2))
    assert f"is of another run: {message}" in line
    assert contents(tmp_path / "run") == before
    named = re.search(r"--allow_changed (\S+),", line)[1]
    assert set(named.split(",")) <= set(changes)
    if name in ALLOWED:
        log = run(flags(**settings, allow_changed=named), caplog)
        assert re.search(r"Resuming from \S+/checkpoint-4\n", log)
        history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
        assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, settings["max_steps"] + 1))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("freeze", [True, False])
def test_another_base_model_of_the_same_shape_is_not_trained_on(freeze, flags, base, tmp_path, caplog):
    run(flags(freeze_LLM=freeze, **SHORT), caplog)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = small_model("qwen2", len(tokenizer) + 20, tie_word_embeddings=True)
    model.model.norm.weight.data *= 1.5
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "other")
    settings = {**SHORT, "freeze_LLM": freeze, "base_model": tmp_path / "other", "resume_from_checkpoint": True}
    line = last_line(run(flags(**settings), caplog, code=2))
    assert "is of another run: base_model has other content; with another base_model start afresh" in line
    line = last_line(run(flags(**settings, allow_changed="base_model"), caplog, code=2))
    assert "--allow_changed has 'base_model'" in line


def test_the_other_mode_and_other_sid_tokens_are_not_resumed(flags, shop, tmp_path, caplog):
    run(flags(freeze_LLM=False, **SHORT), caplog)
    line = last_line(run(flags(**SHORT, resume_from_checkpoint=True), caplog, code=2))
    assert "freeze_LLM False (now True)" in line
    text = (shop / "shop.index.json").read_text().replace("<a_0>", "<a_9>")
    changes = {"freeze_LLM": False, "sid_index_path": write(tmp_path / "x.index.json", text)}
    for flag, split in (("train_file", "train"), ("eval_file", "valid")):
        rows = (shop / f"shop.{split}.csv").read_text().replace("<a_0>", "<a_9>")
        changes[flag] = write(tmp_path / f"x.{split}.csv", rows)
    allowed = "train_file,eval_file,sid_index_path"
    line = last_line(run(flags(**SHORT, **changes, resume_from_checkpoint=True, allow_changed=allowed), caplog, code=2))
    assert "is of another run: SID tokens has other content; with another SID tokens start afresh" in line


@pytest.mark.parametrize("freeze", [True, False])
def test_an_allowed_rate_and_weight_decay_are_those_that_train(freeze, flags, tmp_path, caplog, monkeypatch):
    changes = {**SHORT, "freeze_LLM": freeze, "lr_scheduler_type": "constant", "learning_rate": 0.001, "warmup_steps": 0}
    run(flags(**changes), caplog)
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    seen = []
    take = RunKeeper.take_new_rates

    def note(self) -> None:
        take(self)
        seen.extend((group["lr"], group["weight_decay"]) for group in self.trainer.optimizer.param_groups)

    monkeypatch.setattr(RunKeeper, "take_new_rates", note)
    changes |= {"learning_rate": 0.004, "weight_decay": 0.25, "resume_from_checkpoint": True}
    run(flags(**changes, allow_changed="learning_rate,weight_decay"), caplog)
    assert [rate for rate, _ in seen] == pytest.approx([0.004] * len(seen))
    assert seen[0][1] == 0.25
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    assert rates == pytest.approx([0.001] * 4 + [0.004] * 2)
    assert "peak learning rate 0.004" in (tmp_path / "run" / "final_checkpoint" / "README.md").read_text()


def test_a_resumed_run_evaluates_saves_and_logs_when_its_own_flags_say(flags, tmp_path, caplog):
    run(flags(**{**SHORT, "max_steps": 8, "eval_steps": 4, "save_steps": 4}), caplog)
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    other = {"max_steps": 8, "eval_steps": 1, "save_steps": 2, "logging_steps": 2}
    run(flags(**{**SHORT, **other}, resume_from_checkpoint=True, allow_changed="eval_steps,save_steps"), caplog)
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [4, 5, 6, 7, 8]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4, 6, 8]
    assert {"checkpoint-6", "checkpoint-8"} & {path.name for path in (tmp_path / "run").iterdir()}


def test_every_flag_decides_a_run_or_is_known_not_to(flags, tmp_path):
    names = {field.name for field in dataclasses.fields(TrainFlags)}
    decides = set(what_decides(TrainFlags(base_model="x", output_dir="y", sid_index_path=__file__), "base", ["<a_0>"]))
    assert decides - {"SID tokens"} | set(WITHOUT_EFFECT.split()) == names
    assert not decides & set(WITHOUT_EFFECT.split())
    fixed = {"SID tokens", "base_model", "freeze_LLM", "train_from_scratch", "fsdp"}
    fixed |= {"lora_rank", "lora_alpha", "load_in_8bit", "load_in_4bit"}
    assert set(CHANGEABLE) == decides - fixed


# ---------------------------------------------------------------------------------------------- the end of a run


@pytest.mark.parametrize("freeze", [True, False])
def test_a_finished_run_trains_no_further_step(freeze, flags, tmp_path, caplog):
    changes = {**SHORT, "freeze_LLM": freeze, "max_steps": None, "num_epochs": 5, "batch_size": 8}
    run(flags(**changes), caplog)
    expected = end_of(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final_checkpoint")
    log = run(flags(**changes, resume_from_checkpoint=True), caplog)
    assert "Its run had ended after step 10: nothing is left to train" in log
    assert end_of(tmp_path / "run") == expected


@pytest.mark.parametrize("freeze", [True, False])
def test_early_stopping_remembers(freeze, flags, tmp_path, caplog):
    changes = {"freeze_LLM": freeze, "learning_rate": 5.0, "lr_scheduler_type": "constant", "warmup_steps": 0}
    changes = {**SHORT, **changes, "max_steps": 30, "early_stopping_patience": 3}
    run(flags(**changes), caplog)
    expected = end_of(tmp_path / "run")
    assert expected["step"] < 30
    assert expected["best"][1] == expected["step"] - 6
    log = run(flags(**changes, resume_from_checkpoint=True), caplog)
    assert "nothing is left to train" in log
    assert end_of(tmp_path / "run") == expected
    shutil.rmtree(tmp_path / "run" / f"checkpoint-{expected['step']}")  # what is left is the best, three evaluations before
    run(flags(**changes, resume_from_checkpoint=True), caplog)
    assert end_of(tmp_path / "run") == expected
    longer = run(flags(**{**changes, "early_stopping_patience": 4}, resume_from_checkpoint=True), caplog, code=2)
    assert "early_stopping_patience 3 (now 4)" in longer


# ---------------------------------------------------------------------------------------------- signals


def start(arguments: list[str], *, processes: int = 1, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    return subprocess.Popen(
        [*prefix, sys.executable, *torchrun, "sft.py", *arguments],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen, text: str) -> str:
    """Reads the log up to a text."""
    log = ""
    while text not in log:
        piece = process.stderr.read(1)
        assert piece, log
        log += piece
    return log


def test_a_signal_saves_and_the_resumed_run_ends_as_if_there_had_been_none(flags, tmp_path, caplog):
    changes = {**SHORT, "max_steps": 150, "eval_steps": 150, "save_steps": 150, "logging_steps": 7}
    process = start(flags(**changes))
    wait_for(process, "step 14 of 150")
    process.send_signal(signal.SIGTERM)
    log = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in log
    found = re.search(r"sft.py: stopped by SIGTERM after step (\d+); --resume_from_checkpoint True goes on from ", log)
    assert found, log
    assert not (tmp_path / "run" / "final_checkpoint").exists()
    log = run(flags(**changes, resume_from_checkpoint=True), caplog)
    assert f"Resuming from {tmp_path}/run/checkpoint-{found[1]}\n" in log
    run(flags(**changes, output_dir=tmp_path / "peace"), caplog)
    assert end_of(tmp_path / "run") == end_of(tmp_path / "peace")


@pytest.fixture
def not_ignored():
    """Signals as a terminal's shell leaves them: nohup, or a job in the background, would have some of them ignored."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    former = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    yield
    for signum, handler in former.items():
        signal.signal(signum, handler)


@pytest.mark.usefixtures("not_ignored")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("place", ["training_step", "put_off_if_asked"])
def test_every_signal_is_heard_at_a_step_and_in_an_evaluation(name, place, flags, tmp_path, caplog, monkeypatch):
    method, times = getattr(SidTrainer, place), []

    def interrupted(self, *args, **settings):
        times.append(self.state.global_step)
        if len(times) == 3:
            signal.raise_signal(getattr(signal, name))
        return method(self, *args, **settings)

    monkeypatch.setattr(SidTrainer, place, interrupted)
    line = last_line(run(flags(**SHORT), caplog, code=128 + getattr(signal, name)))
    step = 3 if place == "training_step" else 2
    saved = f"--resume_from_checkpoint True goes on from {tmp_path}/run/checkpoint-{step}"
    assert line.endswith(f"stopped by {name} after step {step}; {saved}")
    run(flags(**SHORT, resume_from_checkpoint=True), caplog)
    run(flags(**SHORT, output_dir=tmp_path / "peace"), caplog)
    assert end_of(tmp_path / "run") == end_of(tmp_path / "peace")


def test_a_signal_to_one_of_two_processes_stops_and_saves_both(flags, tmp_path):
    changes = {**SHORT, "max_steps": 200, "eval_steps": 200, "save_steps": 200, "micro_batch_size": 2}
    process = start(flags(**changes), processes=2)
    wait_for(process, "step 10 of 200")
    rank_1 = next(pid for pid in children(process.pid) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(rank_1, signal.SIGTERM)
    log = process.communicate(timeout=90)[1]
    found = re.search(r"sft.py: stopped by SIGTERM after step (\d+)", log)
    assert found, log
    read_record(tmp_path / "run" / f"checkpoint-{found[1]}")
    changes["max_steps"] = int(found[1]) + 2
    changes["allow_changed"] = "max_steps"
    result = run_command(*flags(**changes, resume_from_checkpoint=True), processes=2)
    assert result.returncode == 0, result.stderr
    assert f"checkpoint-{found[1]}\n" in result.stderr


def test_a_signal_that_comes_while_the_processes_agree_is_not_forgotten(monkeypatch):
    def meanwhile(*_, **__) -> None:
        if not signals.received:
            signal.raise_signal(signal.SIGTERM)

    for name, value in {"is_initialized": True, "get_world_size": 2, "new_group": None}.items():
        monkeypatch.setattr(dist, name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(dist, "all_reduce", meanwhile)
    with StopSignals() as signals:
        signals.wait = True
        assert [signals.agreed(), signals.agreed()] == [False, True]  # at this step it came too late, at the next it counts


def children(pid: int) -> list[int]:
    """The processes below one, at every depth."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found += [int(path.name), *children(int(path.name))]
    return found


def test_a_run_under_nohup_does_not_stop_when_the_terminal_is_gone(flags, tmp_path):
    process = start(flags(**SHORT, logging_steps=1), prefix=("nohup",))
    wait_for(process, "step 1 of 6")
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=60)[1].count("Saved the model") == 1
    assert process.returncode == 0


def test_a_signal_before_the_first_step_ends_the_run_in_one_line(flags, tmp_path):
    process = start(flags(**SHORT))
    wait_for(process, "Adding 20 new tokens")
    process.send_signal(signal.SIGTERM)
    log = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert last_line(log) == "sft.py: stopped by SIGTERM"
    assert not list(tmp_path.glob("run/checkpoint-*"))


@pytest.mark.usefixtures("not_ignored")
def test_a_second_ctrl_c_does_not_wait(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with StopSignals() as signals:
        signals.wait = True
        signal.raise_signal(signal.SIGINT)
        assert signals.agreed()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted, match="second Ctrl-C"):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---------------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize("freeze", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_by_itself_and_ends_as_if_it_had_not_been(freeze, tmp_path):
    """The short form of kill.py, in a process of its own: it forks, which a process with threads should not."""
    code = f"import kill, pathlib; print(kill.kill_many(4, freeze={freeze}, seed=3, folder=pathlib.Path({str(tmp_path)!r})))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ["PYTHONPATH"]])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "SIG" not in re.sub(r"Stop\([^)]*\)+", "", result.stdout)
