"""Kills runs of sft.py where it hurts, lets each be resumed, and compares its end with that of a run left in peace.

    PYTHONPATH=. python tests/kill.py --kills 50 > tests/benchmarks/results/kills.md

A run is killed at an event: a training step, a piece of an evaluation, or a file that is opened, written, renamed or
removed below its output folder or its dataset cache; a file just written may be cut short. Half of the stops at steps and in
evaluations are signals (SIGTERM, SIGINT, SIGHUP), after which the run saves; all others are SIGKILL. A run is stopped up to
three times before it may end. Then its weights, its log and everything else that it keeps must be those of the peaceful run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import conftest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM  # noqa: F401 - here, so that it need not be loaded after each fork

import sft
from sid_sft import demo
from sid_sft.tasks import PROMPTS
from sid_sft.trainer import SidTrainer

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TIMES = re.compile(r"runtime|per_s|_per_second")  # of the log: what no two runs share
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Stop(NamedTuple):
    """The `number`-th event of a kind ends the run. cut: the file of the event loses its second half first."""

    kind: str
    number: int
    signum: int = signal.SIGKILL
    cut: bool = False

    def __str__(self) -> str:
        return f"{signal.Signals(self.signum).name} at {self.kind} {self.number}{', file cut' if self.cut else ''}"


# ---------------------------------------------------------------------------------------------- one run, in a fork


class Watch:
    """Counts the events of this process, and ends it at the one it was told."""

    def __init__(self, roots: list[Path], stop: Stop | None) -> None:
        self.roots, self.stop = [str(root) for root in roots], stop
        self.events: Counter[str] = Counter()

    def start(self) -> None:
        sys.addaudithook(self.audit)
        SidTrainer.training_step = self.before("step", SidTrainer.training_step)
        SidTrainer.put_off_if_asked = self.before("evaluation", SidTrainer.put_off_if_asked)
        torch.save = self.around_write(torch.save)
        safetensors.torch.save_file = self.around_write(safetensors.torch.save_file)

    def audit(self, event: str, args: tuple) -> None:
        if event == "open":
            path, mode, flags = args
            if (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & WRITES:
                self.met("open", path)
        elif event in ("os.rename", "os.remove", "os.mkdir", "shutil.rmtree"):
            self.met(event, args[0])

    def before(self, kind: str, method: Callable) -> Callable:
        def called(*args: Any, **settings: Any) -> Any:
            self.happened(kind)
            return method(*args, **settings)

        return called

    def around_write(self, write: Callable) -> Callable:
        def called(content: Any, path: Any, *args: Any, **settings: Any) -> Any:
            found = write(content, path, *args, **settings)
            self.met("written", path)
            return found

        return called

    def met(self, event: str, path: Any) -> None:
        path = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
        if any(str(path).startswith(root) for root in self.roots):
            name = re.sub(r"\d+|tmp\w+|[0-9a-f]{16,}", "N", Path(path).name)
            self.happened(f"{event} of {name}", Path(path))

    def happened(self, kind: str, path: Path | None = None) -> None:
        self.events[kind] += 1
        if self.stop is None or (kind, self.events[kind]) != (self.stop.kind, self.stop.number):
            return
        if self.stop.cut and path is not None and path.is_file():
            os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), self.stop.signum)


def run(arguments: list[str], watch: Watch, log: Path) -> int:
    """sft.py in a fork of this process, which has loaded the libraries; the exit code, or minus the signal it died of."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    code = 70
    try:
        with log.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        for signum in (signal.SIGHUP, signal.SIGTERM):  # nohup, or a job in the background, has some of them ignored
            signal.signal(signum, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        watch.start()
        code = sft.main(arguments)
        if watch.stop is None:
            log.with_suffix(".events").write_text(json.dumps(watch.events))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


# ---------------------------------------------------------------------------------------------- many runs


def end_of(folder: Path) -> dict[str, Any]:
    """All that a run keeps but for times and the places of files."""
    state = json.loads((folder / "trainer_state.json").read_text())
    log = [{key: value for key, value in entry.items() if not TIMES.search(key)} for entry in state["log_history"]]
    kept = {"log": log, "best": (state["best_metric"], state["best_global_step"]), "step": state["global_step"]}
    for path in sorted((folder / "final_checkpoint").rglob("*")):
        if path.is_file():
            kept[str(path.relative_to(folder))] = path.read_bytes()
    return kept


def command(shop: Path, base: Path, folder: Path, *, freeze: bool) -> list[str]:
    """A run of some 24 steps that stops early, with evaluations that also measure recommendations."""
    return conftest.short_run(
        base,
        shop,
        folder,
        tasks="sid_sid,item",
        freeze_LLM=freeze,
        sample=60,
        eval_recommendation=8,
        metric_for_best_model="eval_hr@10",
        batch_size=8,
        max_steps=None,
        num_epochs=4,
        logging_steps=5,
        eval_steps=None,
        save_steps=4,
        early_stopping_patience=4,
        resume_from_checkpoint="auto",
    )


def draw_stop(events: dict[str, int], rng: random.Random) -> Stop:
    """A stop at a step, in an evaluation, at a file of a checkpoint, of the dataset cache or of the end: each as likely."""
    part = rng.choice(sorted({part_of(kind) for kind in events}))
    kind = rng.choice(sorted(kind for kind in events if part_of(kind) == part))
    gentle = kind in ("step", "evaluation") and rng.random() < 0.5
    cut = kind.startswith("written") and rng.random() < 0.7
    return Stop(kind, rng.randint(1, events[kind]), rng.choice(SIGNALS) if gentle else signal.SIGKILL, cut)


def part_of(kind: str) -> str:
    """The part of a run that a kind of event belongs to."""
    if kind in ("step", "evaluation"):
        return kind
    name = kind.rpartition(" of ")[2]
    if re.fullmatch(r"N.*|cache|rows-.*|summary.json|contents.json|examples.*", name):
        return "dataset cache"
    checkpoint = ("checkpoint-N", "checkpoint.json.tmp", "checkpoint.json", "rng_state.pth", "trainer_state.json")
    written = ("optimizer.pt", "scheduler.pt", "training_args.bin")
    return "checkpoint" if name in checkpoint + written else "end"


def trial(arguments: list[str], folder: Path, events: dict[str, int], rng: random.Random) -> tuple[list[Stop], str]:
    """One run that is stopped up to three times, then left to end; what stopped it, and what was wrong ("" if nothing)."""
    stops, watched = [], [folder / "run", folder / "cache"]
    log = folder / "log"
    for _ in range(rng.randint(1, 3)):
        stop = draw_stop(events, rng)
        code = run(arguments, Watch(watched, stop), log)
        if code == 0:
            break  # the event did not come again
        stops.append(stop)
        if code not in (-signal.SIGKILL, 128 + stop.signum):
            return stops, f"exit code {code} instead of a stop"
    code = run(arguments, Watch(watched, None), log)
    if code:
        return stops, f"exit code {code} when resumed"
    if "Traceback" in log.read_text():
        return stops, "a traceback"
    return stops, ""


def kill_many(kills: int, *, freeze: bool, seed: int, folder: Path) -> list[tuple[list[Stop], str]]:
    """Trials until so many stops have struck. folder: an empty one; it keeps the logs of trials that went wrong."""
    shop, base = folder / "shop", folder / "base"
    shop.mkdir(parents=True)
    demo.write_files(shop, seed=1)
    tokenizer = conftest.byte_bpe([*demo.pretraining_texts(1), *PROMPTS.values()])
    conftest.small_model("qwen2", len(tokenizer) + 20, tie_word_embeddings=True).save_pretrained(base)
    tokenizer.save_pretrained(base)

    peaceful = folder / "peaceful"
    peaceful.mkdir()
    code = run(
        command(shop, base, peaceful, freeze=freeze),
        Watch([peaceful / "run", peaceful / "cache"], None),
        peaceful / "log",
    )
    if code:
        raise RuntimeError((peaceful / "log").read_text()[-2000:])
    events = json.loads((peaceful / "log.events").read_text())
    expected = end_of(peaceful / "run")

    rng, found, struck = random.Random(seed), [], 0
    while struck < kills:
        place = folder / "trial"  # the same for all: paths are among the things that a run keeps
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        stops, fault = trial(command(shop, base, place, freeze=freeze), place, events, rng)
        if not fault:
            ended = end_of(place / "run")
            differing = [name for name in expected if ended.get(name) != expected[name]]
            fault = f"another end: {', '.join(differing)}" if differing or ended.keys() != expected.keys() else ""
        if fault:
            shutil.copytree(place, folder / f"wrong-{len(found)}")
        found.append((stops, fault))
        struck += len(stops)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in each mode")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where runs are kept, and trials that went wrong stay")
    options = parser.parse_args()
    print("# Runs killed and resumed\n")
    wrong = 0
    for freeze in (True, False):
        started = time.monotonic()
        folder = Path(options.folder or tempfile.mkdtemp()) / ("freeze" if freeze else "full")
        found = kill_many(options.kills, freeze=freeze, seed=options.seed, folder=folder)
        kinds = Counter(str(stop.kind) for stops, _ in found for stop in stops)
        faults = [(stops, fault) for stops, fault in found if fault]
        wrong += len(faults)
        print(
            f"`--freeze_LLM {freeze}`: {sum(kinds.values())} stops in {len(found)} runs; {len(found) - len(faults)} runs "
            f"ended as the peaceful one did, {len(faults)} did not ({time.monotonic() - started:.0f} s)\n"
        )
        for stops, fault in faults:
            print(f"- {'; '.join(map(str, stops))}: {fault}")
        print("| part of the run | stopped at | times |\n| --- | --- | --- |")
        lines = sorted((part_of(kind), kind, count) for kind, count in kinds.items())
        print("\n".join(f"| {part} | {kind} | {count} |" for part, kind, count in lines), "\n")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
