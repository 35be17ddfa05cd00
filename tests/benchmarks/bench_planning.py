"""Measures what a run needs before its first step, in time and memory, as the training rows grow: 10^4 to 10^7.

    python tests/benchmarks/bench_planning.py
    python tests/benchmarks/bench_planning.py --rows 10000 100000 --processes 1 --code ../before   # another checkout's code

A row is one example. Each dataset is made as arrays, without a tokenizer, in the format of the cache: examples of the five
default tasks, as many of each of their six kinds; users with five rows each, whose histories grow; 53 tokens a row. A run
is of freeze mode with a tiny model (2 layers of 32, 2,000 tokens), steps of 64, the default of 2 GB for what is kept, and
one thread per process. The columns:

    made         seconds to find and write plan.safetensors, once per dataset
    check        seconds to read the folder's files and compare their checksums
    planning     seconds from there to the first step: open the dataset, read its numbers, plan, try the forward on a few
                 examples, shuffle, cut the first step
    of a CPU     seconds of processor time in that, as other programs may run beside it
    own MiB      the process's own memory at its peak up to there, above what it had with the model loaded
    steps MiB    the same over all steps, with their activations and what is kept
    mapped MiB   pages of files that it has mapped at the end, which processes share and the system may drop
    tokens/s     of the steps that follow, on all processes
    cut ms       of such a step, to cut it into micro-batches

Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
STEP, STEPS = 64, 30
VOCABULARY, SIDS = 2000, 300  # the last 300 token ids are SID tokens
END, LINE_END, WORDS = 0, 1, 10  # token ids; words begin at 10
USER_ROWS, TITLE, SID = 5, 7, 3  # rows of a user; tokens of a title and of a SID
KINDS = {  # by the place of a task in TASKS: what it shows, what it answers, tokens of its template
    0: ("sid", "sid", 30),
    1: ("sid", "title", 20),
    2: ("title", "sid", 22),
    3: ("sid", "title", 32),
    4: ("title", "title", 34),
    5: ("title", "sid", 36),
}
OF_ITEMS = (1, 2)
COLUMNS = ("check", "planning", "of a CPU", "own MiB", "steps MiB", "mapped MiB", "tokens/s", "cut ms")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


# ---------------------------------------------------------------------------------------------- the datasets


def columns_of(kind: int, first: int, count: int) -> dict:
    """Examples first to first + count - 1 of a kind as columns; the ids as (values, offsets)."""
    import numpy as np

    shows, answers, template = KINDS[kind]
    place = first + np.arange(count)
    user = np.full(count, -1) if kind in OF_ITEMS else place // USER_ROWS
    items = np.ones(count, dtype=np.int64) if kind in OF_ITEMS else 1 + place % USER_ROWS
    width = 1 + (TITLE if shows == "title" else SID)
    prompt = template + items * width
    length = prompt + 1 + (TITLE if answers == "title" else SID)
    offsets = np.concatenate([[0], np.cumsum(length)])
    row = np.repeat(np.arange(count), length)
    at = np.arange(offsets[-1]) - offsets[row]
    answer = at >= prompt[row]
    owner = np.where(answer | (user[row] < 0), place[row], user[row])  # a user's histories begin alike
    mixed = (owner * 2_654_435_761 + at * 40_503) // 128 % (2**31)
    sid = np.where(answer, answers == "sid", shows == "sid")
    values = np.where(sid, VOCABULARY - SIDS + mixed % SIDS, WORDS + mixed % (VOCABULARY - SIDS - WORDS))
    values[~answer & ((at - template) % width == width - 1)] = LINE_END
    values = np.where(at < template, WORDS + kind * 50 + at, values)
    values[offsets[1:] - 1] = END
    static = {"sid": template, "title": prompt if answers == "sid" else length}[shows]
    return {
        "input_ids": (values, offsets),
        "length": length,
        "prompt_len": prompt,
        "static_len": np.broadcast_to(static, count),
        "dropped": np.zeros(count),
        "user": user,
        "task": np.full(count, kind),
    }


def make_dataset(folder: Path, rows: int) -> None:
    """A dataset as `build_dataset` leaves it, but for its plan and its record of contents."""
    import numpy as np
    import pyarrow as pa

    from sid_sft.dataset_cache import ROWS_AT_ONCE, example_features
    from sid_sft.tasks import TASKS

    schema = example_features().arrow_schema
    counts = np.diff(np.linspace(0, rows, len(KINDS) + 1).astype(int)).tolist()
    with pa.OSFile(str(folder / "examples.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for kind, count in enumerate(counts):
            for first in range(0, count, ROWS_AT_ONCE):
                columns = columns_of(kind, first, min(ROWS_AT_ONCE, count - first))
                values, offsets = columns.pop("input_ids")
                ids = pa.ListArray.from_arrays(offsets.astype(np.int32), values.astype(np.int32))
                arrays = [
                    ids if field.name == "input_ids" else pa.array(columns[field.name].astype(field.type.to_pandas_dtype()))
                    for field in schema
                ]
                writer.write_batch(pa.record_batch(arrays, schema=schema))
    tasks = {
        name: {"rows": count, "untitled": 0, "examples": count, "cut": 0} for name, count in zip(TASKS, counts, strict=False)
    }
    (folder / "summary.json").write_text(json.dumps({"files": ["examples.arrow"], "notes": [], "tasks": tasks}))


def finish_dataset(folder: Path) -> float:
    """Finds and writes the plan, then the record of contents; seconds for the plan."""
    from datasets import Dataset

    from sid_sft.dataset_cache import write_contents
    from sid_sft.forward.examples import PLAN_FILE, Examples
    from sid_sft.forward.mapped import write_arrays
    from sid_sft.forward.prefix_parts import plan_arrays

    started = time.monotonic()
    write_arrays(folder / PLAN_FILE, plan_arrays(Examples(Dataset.from_file(str(folder / "examples.arrow")))))
    seconds = time.monotonic() - started
    write_contents(folder)
    return seconds


# ---------------------------------------------------------------------------------------------- a run


def memory() -> dict[str, int]:
    """Bytes of this process's own memory and of files that it has mapped: {"RssAnon": ..., "RssFile": ...}."""
    found = re.findall(r"^(RssAnon|RssFile|RssShmem):\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return {name: int(kilobytes) * 1024 for name, kilobytes in found}


class Peak(threading.Thread):
    """Looks at the process's own memory a hundred times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before, self.most, self.over = memory(), 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.01):
            self.most = max(self.most, memory()["RssAnon"])


def one_run(folder: Path) -> dict[str, float]:
    """Opens, plans and takes some steps, as one process of a run; what COLUMNS name."""
    import torch
    import torch.distributed as dist
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import sft
    from sid_sft.dataset_cache import fault_of, open_dataset
    from sid_sft.forward.choose import choose_forward
    from sid_sft.forward.examples import Examples
    from sid_sft.steps import StepSampler, deal

    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, **shape, **heads)).eval()
    ids = list(range(VOCABULARY - SIDS, VOCABULARY))
    rows = sft.freeze_llm(model, ids, [f"<a_{i}>" for i in ids])

    def take_step(step: list[int]) -> tuple[int, float]:
        """Tokens of the step on all processes, and the seconds to cut it."""
        inputs = torch.tensor(step).numpy()
        begin = time.monotonic()
        hand = deal(forward.cut(inputs, processes), processes)[rank]
        cut = time.monotonic() - begin
        for part in hand:
            forward.nll(part).sum().backward()
        rows.collect_gradients()
        for master in rows.masters:
            if processes > 1:
                dist.all_reduce(master.grad)
            master.grad = None
        return int(examples.length[inputs].sum()), cut

    peak = Peak()
    peak.start()
    begin = time.monotonic()
    assert fault_of(folder) is None
    checked, processor = time.monotonic(), time.process_time()
    examples = Examples(open_dataset(folder, 512))
    forward = choose_forward(
        model, rows, examples, 4, frozen_prefix=True, cache_bytes=2 * 10**9, cache_place="device", group_users=False
    )
    steps = iter(StepSampler(examples, STEP, seed=0))
    forward.cut(torch.tensor(first := next(steps)).numpy(), processes)
    planned, processor, own = time.monotonic(), time.process_time() - processor, peak.most
    taken = [take_step(step) for step in [first, *(next(steps) for _ in range(STEPS - 1))]]
    seconds = time.monotonic() - planned
    peak.over.set()
    peak.join()
    return {
        "check": checked - begin,
        "planning": planned - checked,
        "of a CPU": processor,
        "own MiB": (own - peak.before["RssAnon"]) / 2**20,
        "steps MiB": (peak.most - peak.before["RssAnon"]) / 2**20,
        "mapped MiB": (memory()["RssFile"] - peak.before["RssFile"]) / 2**20,
        "tokens/s": sum(tokens for tokens, _ in taken) / seconds,
        "cut ms": 1000 * sum(cut for _, cut in taken) / len(taken),
    }


def measure(folder: Path, processes: int, code: Path) -> dict[str, float]:
    """The columns of a run on so many processes, each the largest of any process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(port), "WORLD_SIZE": str(processes), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--code", str(code), "--run", str(folder)]
    started = [
        subprocess.Popen(command, env={**env, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(processes)
    ]
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]
    return {name: (min if name == "tokens/s" else max)(run[name] for run in found) for name in COLUMNS}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--code", type=Path, default=ROOT, help="checkout whose code opens, plans and trains")
    parser.add_argument("--keep", type=Path, help="folder for the datasets, which are then not deleted and used again")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    sys.path.insert(0, str(flags.code if flags.run else ROOT))
    if flags.run:
        say(json.dumps(one_run(flags.run)))
        return
    results = []
    say("| rows | made | processes | " + " | ".join(COLUMNS) + " |\n" + "| --- " * (3 + len(COLUMNS)) + "|")
    with tempfile.TemporaryDirectory() as scratch:
        for rows in flags.rows:
            folder = (flags.keep or Path(scratch)) / str(rows)
            made = 0.0
            if not folder.is_dir():
                folder.mkdir(parents=True)
                make_dataset(folder, rows)
                made = finish_dataset(folder)
            for processes in flags.processes:
                found = measure(folder, processes, flags.code.resolve())
                results.append({"rows": rows, "made": made, "processes": processes, **found})
                cells = [f"{rows:,}", f"{made:.1f}", str(processes), *(f"{found[name]:,.1f}" for name in COLUMNS)]
                say("| " + " | ".join(cells) + " |")
    say(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
