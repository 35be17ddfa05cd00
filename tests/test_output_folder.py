"""The folder that a run writes to: one run at a time, looked at before the work starts, and whole when the disk fails."""

import fcntl
import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, run_command
from machine import one_line, read_only, run_as_user, small_disk

import sft
from sid_sft.files import InputError
from sid_sft.locks import held, waiting_for
from sid_sft.output_folder import LOCK_FILE, OutputFolder


def started(arguments: list[str]) -> subprocess.Popen:
    """sft.py in the background, once it holds its output folder."""
    process = subprocess.Popen(
        [sys.executable, "sft.py", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    lock = Path(arguments[arguments.index("--output_dir") + 1]) / LOCK_FILE
    while not (lock.exists() and lock.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    return process


# ---------------------------------------------------------------------------------------------- one run at a time


def test_a_second_run_in_a_folder_ends_in_one_line_and_the_first_goes_on(flags, tmp_path):
    first = started(flags())
    line = one_line(run_command(*flags()))
    assert line.startswith(
        f"sft.py: --output_dir {tmp_path / 'run'}: another run writes there (sft.py, process {first.pid} on "
    )
    assert ", since 20" in line
    assert "choose another folder" in line
    _, log = first.communicate(timeout=300)
    assert first.returncode == 0, log
    assert (tmp_path / "run" / "final_checkpoint" / "config.json").exists()
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_a_killed_run_holds_nobody_up(flags, tmp_path):
    first = started(flags())
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert (tmp_path / "run" / LOCK_FILE).exists()
    assert run_command(*flags(max_steps=1)).returncode == 0
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_every_process_of_a_second_run_ends(flags, tmp_path):
    (tmp_path / "run").mkdir()
    with held(tmp_path / "run" / LOCK_FILE, "a test"):
        done = run_command(*flags(), processes=2)  # ends by itself, or this raises after some minutes
        assert done.returncode != 0
        assert done.stderr.count("another run writes there (a test, process ") == 1
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_FILE]


def test_a_check_holds_and_writes_nothing(flags, tmp_path):
    (tmp_path / "run").mkdir()
    with held(tmp_path / "run" / LOCK_FILE, "a test"):
        assert sft.main(flags(check=True)) == 0


def test_a_run_that_writes_nothing_leaves_no_folder(tmp_path):
    outputs = OutputFolder(tmp_path / "a" / "b", ())
    with outputs.held("a test"):
        assert (tmp_path / "a" / "b" / LOCK_FILE).exists()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, caplog):
    def none(handle, operation):
        raise OSError(95, "Operation not supported")

    caplog.set_level(logging.INFO, "sft")
    monkeypatch.setattr(fcntl, "flock", none)
    with OutputFolder(tmp_path, ()).held("a test"), waiting_for(tmp_path / "x.lock"):
        pass
    assert len(caplog.messages) == 2
    assert all("has no locks" in message for message in caplog.messages)


def test_a_child_that_outlives_its_run_does_not_hold_the_folder(tmp_path):
    path = tmp_path / LOCK_FILE
    with held(path, "a test"):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        with held(path, "another") as other:
            assert other.startswith(f"a test, process {os.getpid()} on ")
    with held(path, "another") as other:
        assert other == ""
    assert child.is_alive()
    child.kill()
    child.join()


def take_turns(path, log, times):
    for _ in range(times):
        with waiting_for(path):
            with log.open("a") as file:
                file.write("in ")
            time.sleep(0)
            with log.open("a") as file:
                file.write("out ")


def test_whoever_waits_for_a_lock_gets_it_alone_though_its_file_is_removed_each_time(tmp_path):
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=take_turns, args=(tmp_path / "x.lock", log, 200)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert log.read_text() == "in out " * 600
    assert not (tmp_path / "x.lock").exists()


# ---------------------------------------------------------------------------------------------- before the work starts


def in_the_way(kind: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if kind == "folder" else path.write_text("mine")


WAYS = {
    "a file for the folder": ("file", "run", "run is a file; expected a folder"),
    "a file above the folder": ("file", ".", None),
    "a folder for the report": ("folder", "run/report.md", "report.md is no file, and a file will be written there"),
    "a folder for the curves": ("folder", "run/curves.png", "curves.png is no file"),
    "a folder for the state": ("folder", "run/trainer_state.json", "trainer_state.json is no file"),
    "a file for the model": ("file", "run/final_checkpoint", "final_checkpoint is no folder, and a folder will be written"),
    "a file for a checkpoint": ("file", "run/checkpoint-3", "checkpoint-3 is no folder"),
}


@pytest.mark.parametrize("name", WAYS)
def test_what_stands_in_the_way_is_told_before_anything_is_loaded_and_stays(name, flags, tmp_path):
    kind, path, message = WAYS[name]
    changes = {}
    if message is None:
        path, message, changes = "mine", "mine is a file; expected a folder", {"output_dir": tmp_path / "mine" / "a" / "run"}
    in_the_way(kind, tmp_path / path)
    line = one_line(run_command(*flags(**changes)))
    assert line.startswith("sft.py: --output_dir ")
    assert message in line
    assert (tmp_path / path).is_dir() == (kind == "folder")
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_may_not_be_written_is_told_before_anything_is_loaded(flags, tmp_path):
    (tmp_path / "run").mkdir()
    for folder in (tmp_path / "run", tmp_path / "run" / "below"):
        with read_only(tmp_path / "run"):
            line = one_line(run_as_user("sft.py", *flags(output_dir=folder)))
        assert line.startswith(f"sft.py: --output_dir {folder}: cannot be written (Permission denied); make room or make it")
    assert list((tmp_path / "run").iterdir()) == []
    assert not (tmp_path / "cache").exists()


def test_a_report_that_may_not_be_written_is_told_before_anything_is_loaded(flags, tmp_path):
    in_the_way("file", tmp_path / "run" / "report.md")
    (tmp_path / "run" / "report.md").chmod(0o444)
    assert "report.md may not be written" in one_line(run_as_user("sft.py", *flags()))


def test_a_read_only_disk_is_told_before_anything_is_loaded(flags, tmp_path):
    with small_disk(tmp_path / "disk", 1 << 20, "ro") as disk:
        line = one_line(run_command(*flags(output_dir=disk / "run")))
    assert "cannot be written (Read-only file system)" in line
    assert not (tmp_path / "cache").exists()


def test_a_disk_too_small_for_what_will_be_written_is_refused_before_training(flags, tmp_path):
    with small_disk(tmp_path / "disk", 100_000) as disk:
        line = one_line(run_command(*flags(output_dir=disk / "run")))
        assert re.search(
            r"its disk has \d+\.\d kB free, and checkpoint and final model need at least 126\.7 kB; free \d", line
        )
        assert not (disk / "run" / "final_checkpoint").exists()


def test_a_disk_that_may_fill_up_is_told_and_used(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "sft")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5_000_000))
    OutputFolder(tmp_path, ()).check_room(2_000_000, 3_000_000)
    assert caplog.messages == [f"--output_dir {tmp_path}: its disk has 5.0 MB free; up to 9.0 MB will be written"]
    with pytest.raises(InputError, match=r"need at least 5\.1 MB; free 100\.0 kB more"):
        OutputFolder(tmp_path, ()).check_room(2_100_000, 3_000_000)
    (tmp_path / "checkpoint-7").mkdir()  # of an earlier run: it makes room
    OutputFolder(tmp_path, ()).check_room(2_100_000, 3_000_000)


# ---------------------------------------------------------------------------------------------- in the middle


def whole(folder: Path) -> list[str]:
    """The checkpoints of a folder, in order; each can be resumed from."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    for checkpoint in found:
        json.loads((checkpoint / "trainer_state.json").read_text())
    return [path.name for path in found]


FILLS_UP = {
    "a checkpoint": (False, 700_000, ["checkpoint-3"]),
    "the final tokenizer": (True, 240_000, ["checkpoint-3", "checkpoint-6"]),
    "the final model": (True, 200_000, ["checkpoint-3", "checkpoint-6"]),
}


@pytest.mark.parametrize(
    "name", ["a checkpoint", pytest.param("the final tokenizer", marks=pytest.mark.slow), "the final model"]
)
def test_a_disk_that_fills_up_is_one_line_and_the_run_goes_on_where_there_is_room(name, flags, tmp_path):
    freeze, room, kept = FILLS_UP[name]
    changes = {"freeze_LLM": freeze, "eval_file": None}
    with small_disk(tmp_path / "disk", room) as disk:
        output = disk / "run"
        line = one_line(run_command(*flags(output_dir=output, **changes)))
        assert f"--output_dir {output}: cannot be written (" in line
        assert re.search(r"; \d+\.\d kB free", line)
        assert f"{kept[-1]} is whole: make room and go on from there with --resume_from_checkpoint True" in line
        assert whole(output) == kept
        assert {path.name.partition("-")[0] for path in output.iterdir()} <= {
            "checkpoint",
            "trainer_state.json",
            "report.md",
            "curves.png",
        }
        subprocess.run(["mount", "-o", "remount,size=9000000", disk], check=True)
        done = run_command(*flags(output_dir=output, resume_from_checkpoint=True, **changes))
        assert done.returncode == 0, done.stderr
        assert (output / "final_checkpoint" / "model.safetensors").exists()


def test_a_file_that_cannot_grow_is_one_line_and_nothing_half_written_stays(flags, tmp_path):
    """As a quota or a limit has it: a checkpoint's file is cut off in the middle."""
    done = run_as_user("sft.py", *flags(freeze_LLM=False, eval_file=None), most_bytes=90_000)
    line = one_line(done)
    assert f"--output_dir {tmp_path / 'run'}: cannot be written (File too large; " in line
    assert "no checkpoint was written yet: make room and start anew" in line
    assert not (tmp_path / "run").exists() or list((tmp_path / "run").iterdir()) == []
