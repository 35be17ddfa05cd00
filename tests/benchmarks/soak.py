"""Trains for a long time and watches the memory of the process: it must be flat.

    PYTHONPATH=. python tests/benchmarks/soak.py --minutes 120 > tests/benchmarks/results/soak.md

A small model on the demo's shop, five tasks, with evaluations, recommendations and checkpoints every 100 steps.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import conftest

from sid_sft import demo
from sid_sft.tasks import PROMPTS


def measured(pid: int) -> tuple[float, int, int]:
    """Memory in MiB, open files, threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = {name: int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "Threads")}
    return found["VmRSS"] / 1024, len(os.listdir(f"/proc/{pid}/fd")), found["Threads"]


def last_step(log: Path) -> int:
    steps = re.findall(r"step (\d+) of", log.read_text(errors="replace")[-4000:])
    return int(steps[-1]) if steps else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--lines", type=int, default=24)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    demo.write_files(folder, seed=1)
    tokenizer = conftest.byte_bpe([*demo.pretraining_texts(1), *PROMPTS.values()])
    conftest.small_model("qwen2", len(tokenizer) + 20, tie_word_embeddings=True).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    changes = {
        "max_steps": 10_000_000,
        "sample": -1,
        "eval_steps": 100,
        "save_steps": 100,
        "logging_steps": 20,
        "eval_recommendation": 8,
        "early_stopping_patience": 0,
    }
    arguments = conftest.short_run(folder / "base", folder, folder, **changes)
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "sft.py", *arguments], cwd=ROOT, stderr=file)
    print(
        "# Memory of a long run\n\n| minutes | step | memory, MiB | open files | threads |\n| --- | --- | --- | --- | --- |"
    )
    started = time.monotonic()
    for line in range(options.lines + 1):
        time.sleep(max(0.0, started + line * 60 * options.minutes / options.lines - time.monotonic()))
        if process.poll() is not None:
            raise SystemExit(log.read_text()[-2000:])
        memory, files, threads = measured(process.pid)
        minutes = (time.monotonic() - started) / 60
        print(f"| {minutes:.0f} | {last_step(log):,} | {memory:.0f} | {files} | {threads} |", flush=True)
    process.terminate()
    print(f"\nStopped with SIGTERM: exit code {process.wait()}")


if __name__ == "__main__":
    main()
