"""Quantizing more and more items: seconds and peak memory of rq.rqkmeans, for the codes alone and for an index.

    python tests/benchmarks/bench_scale.py --items 100000,1000000 --folder bench_scale

The embeddings are 64 random numbers an item around 4096 centres. Each run is a process of its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
DIMS, CENTRES, AT_ONCE = 64, 4096, 100_000


def write_embeddings(path: Path, n_items: int) -> None:
    rng = np.random.default_rng(0)
    centres_KD = rng.standard_normal((CENTRES, DIMS), np.float32)
    rows_ND = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n_items, DIMS))
    for start in range(0, n_items, AT_ONCE):
        part = rows_ND[start : start + AT_ONCE]
        part[:] = centres_KD[rng.integers(CENTRES, size=len(part))] + 0.3 * rng.standard_normal(part.shape, np.float32)
    rows_ND.flush()


def run(*arguments: object) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak memory in GB of a command of rq."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *map(str, arguments)], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{arguments}: ended with {status}")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", default="100000,1000000")
    parser.add_argument("--fit_sample", default="16384")
    parser.add_argument("--folder", type=Path, default=Path("bench_scale"), help="for the files; then removed")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True)
    print("| items | run | wall, s | CPU, s | peak memory, GB |\n| ---: | --- | ---: | ---: | ---: |")
    for n_items in map(int, arguments.items.split(",")):
        write_embeddings(folder / "E.npy", n_items)
        fit = ("rq.rqkmeans", "--data_path", folder / "E.npy", "--ckpt_path", folder / "q", "--overwrite")
        fit += ("--fit_sample", arguments.fit_sample)
        indexing = ("rq.generate_indices", "--codes_path", folder / "C.npy", "--levels", "256,256,256", "--overwrite")
        for name, command in {
            "codebooks of a sample, codes of all": (*fit, "--codes_output", folder / "C.npy"),
            "codes -> index": (*indexing, "--output", folder / "X.index.json"),
        }.items():
            wall, cpu, peak = run(*command)
            print(f"| {n_items:,} | {name} | {wall:.1f} | {cpu:.1f} | {peak:.2f} |", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
