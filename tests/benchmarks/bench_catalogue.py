"""Start-up, memory and time per user of an evaluation, by the number of SIDs in the catalogue.

    python tests/benchmarks/bench_catalogue.py --base_model ../shared/base-lm --sizes 10000 1000000 10000000 > table.md

Each size runs in a process of its own, on a made index of three levels of 256 codes, written to --folder once. Times are
of one CPU: the index is read; prompts, SID table and trie are made; users of 8 items are served with 50 beams, the second
of two rounds.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from sid_sft.catalogue import read_catalogue
from sid_sft.checkpoint import load_model, load_tokenizer
from sid_sft.interactions import Row
from sid_sft.recommend.evaluator import Evaluator
from sid_sft.tasks import read_prompts
from sid_sft.vocabulary import add_sid_tokens, grow_embeddings, vocabulary_size

CODES, LEVELS, HISTORY = 256, 3, 8


def write_index(path: Path, size: int) -> None:
    """An index of `size` distinct random SIDs."""
    rng = np.random.default_rng(0)
    numbers = rng.permutation(CODES**LEVELS)[:size]
    with path.open("w") as file:
        for place, number in enumerate(numbers.tolist()):
            codes = [number // CODES ** (LEVELS - 1 - level) % CODES for level in range(LEVELS)]
            tokens = ", ".join(f'"<{"abc"[level]}_{code}>"' for level, code in enumerate(codes))
            file.write(f'{"," if place else "{"}\n"{place}": [{tokens}]')
        file.write("\n}\n")


def measure(base_model: str, index: Path, users: int, num_beams: int, batch_size: int) -> dict[str, float]:
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(base_model, trust_remote_code=False)
    model = load_model(base_model, trust_remote_code=False)
    add_sid_tokens(tokenizer, [f"<{level}_{code}>" for level in "abc" for code in range(CODES)])
    grow_embeddings(model, vocabulary_size(tokenizer))
    model.float().eval()
    before = memory()
    started = time.process_time()
    catalogue = read_catalogue(index, None)
    read = time.process_time()
    rng = np.random.default_rng(1)
    size = len(catalogue.items)
    rows = [Row(str(user), tuple(rng.integers(size, size=HISTORY).tolist()), 0) for user in range(users)]
    prompts = read_prompts(None, "")
    evaluator = Evaluator(tokenizer, catalogue, prompts, rows, num_beams=num_beams, batch_size=batch_size)
    evaluator.trie_on(model.device)
    made = time.process_time()
    evaluator.recommend(model)
    first = time.process_time()
    evaluator.recommend(model)
    return {
        "read": read - started,
        "made": made - read,
        "user": (time.process_time() - first) / users,
        "memory": memory() - before,
        "trie": sum(array.nbytes for array in (evaluator.trie.start, evaluator.trie.token, evaluator.trie.leaf)) * 4 / 3,
    }


def memory() -> int:
    """Peak memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", default="../shared/base-lm")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, default=Path("output/bench_catalogue"))
    parser.add_argument("--users", type=int, default=96)
    parser.add_argument("--num_beams", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--one", type=Path, help="measure this index alone, in this process")
    flags = parser.parse_args()
    if flags.one:
        print(json.dumps(measure(flags.base_model, flags.one, flags.users, flags.num_beams, flags.batch_size)))
        return
    flags.folder.mkdir(parents=True, exist_ok=True)
    print("| SIDs | index read, s | SID table and trie, s | peak memory above the model, MB | trie, MB | s per user |")
    print("| --- | --- | --- | --- | --- | --- |")
    for size in flags.sizes:
        index = flags.folder / f"{size}.index.json"
        if not index.exists():
            write_index(index, size)
        out = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--one", index], capture_output=True, text=True, check=True
        )
        found = json.loads(out.stdout.splitlines()[-1])
        megabytes = f"{found['memory'] / 1e6:,.0f} | {found['trie'] / 1e6:,.1f}"
        print(f"| {size:,} | {found['read']:.1f} | {found['made']:.1f} | {megabytes} | {found['user']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
