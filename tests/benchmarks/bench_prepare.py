"""rq.prepare on a synthetic log: seconds and peak memory of each run, with CSV and with Parquet out.

    python tests/benchmarks/bench_prepare.py --rows 2000000 [--old FOLDER] [--output tests/benchmarks/results/prepare.md]

--old is a checkout of an earlier commit, whose rq.prepare makes the CSVs too; theirs and ours must then be the same bytes.
Users have power-law lengths of 5 and more; few items are bought often and most seldom, as in a shop. Each run is a process
of its own; its CPU seconds, those of all threads, say more than its wall time where other work is on the machine.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
from circumstances import circumstances

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from rq.index_file import write_sids

ITEMS, LEVELS = 30_000, (256, 256, 256)
SHORTEST, LONGEST = 5, 2_000  # rows of a user
YEARS_S = 3 * 365 * 86_400
WORDS = ("steel", "drill", "red", "blue", "set", "pack of 100", "industrial", "cordless 18V", "saw,", '10"', "men's", "tape")
PARTS = ("train", "valid", "test")


def make_log(rows: int, seed: int = 0) -> pyarrow.Table:
    """The columns user_id, item_id and timestamp of a shop's log, in the order of its rows: by time."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(SHORTEST * (1 + rng.pareto(1.4, size=rows // SHORTEST)), LONGEST).astype("int64")
    lengths = lengths[: int(np.searchsorted(lengths.cumsum(), rows)) + 1]
    users = np.repeat(np.arange(len(lengths), dtype="int32"), lengths)[:rows]
    shares = 1 / (np.arange(ITEMS) + 50.0)
    items = np.searchsorted(np.cumsum(shares / shares.sum()), rng.random(rows)).astype("int32").clip(max=ITEMS - 1)
    times = np.sort(rng.integers(0, YEARS_S, rows)) + 1_600_000_000
    order = rng.permutation(rows)
    names = pyarrow.array([f"A{number * 7919 + 10**9:X}" for number in range(len(lengths))])
    return pyarrow.table(
        {
            "user_id": names.take(pyarrow.array(users[order])),
            "item_id": pyarrow.array([f"B{number:08d}" for number in range(ITEMS)]).take(pyarrow.array(items)),
            "timestamp": times,
        }
    )


def make_files(folder: Path, rows: int, kind: str) -> None:
    """log.parquet or log.csv, products.csv and X.index.json."""
    rng = np.random.default_rng(1)
    log = make_log(rows)
    if kind == "parquet":
        pyarrow.parquet.write_table(log, folder / "log.parquet")
    else:
        pyarrow.csv.write_csv(log, folder / "log.csv")
    titles = [" ".join(words) for words in rng.choice(WORDS, (ITEMS, 7))]
    products = {"item_id": [f"B{number:08d}" for number in range(ITEMS)], "title": titles}
    pyarrow.csv.write_csv(pyarrow.table(products), folder / "products.csv")
    write_sids(folder / "X.index.json", zip(*np.unravel_index(rng.permutation(256**3)[:ITEMS], LEVELS), strict=True))


def run(tree: Path, folder: Path, kind: str, out: str, *extra: str) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak memory in GB of a run of rq.prepare of a source tree."""
    command = [sys.executable, "-m", "rq.prepare", "--interactions", str(folder / f"log.{kind}"), "--name", "X"]
    command += ["--items", str(folder / "products.csv"), "--output_dir", str(folder / out), *extra]
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=tree)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: ended with {status}")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9


def size_gb(folder: Path, ending: str) -> float:
    """The size of the training files, each of which may be a folder of parts."""
    paths = [folder / f"X.{part}.{ending}" for part in PARTS]
    files = [file for path in paths for file in (path.iterdir() if path.is_dir() else [path])]
    return sum(file.stat().st_size for file in files) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--input", choices=("parquet", "csv"), default="parquet")
    parser.add_argument("--split", choices=("global", "leave_one_out"), default="global")
    parser.add_argument("--formats", default="csv,parquet", help="of the training files")
    parser.add_argument("--memory_gb", default="4")
    parser.add_argument("--old", type=Path, help="a checkout of an earlier commit")
    parser.add_argument("--folder", type=Path, default=Path("bench_prepare"), help="for the files, several GB; then removed")
    parser.add_argument("--output", type=Path, help="a Markdown file for the table")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True)
    make_files(folder, arguments.rows, arguments.input)
    lines = []

    def measure(name: str, tree: Path, out: str, ending: str, *extra: str) -> None:
        bound = () if tree == arguments.old else ("--memory_gb", arguments.memory_gb)
        wall, cpu, peak = run(tree, folder, arguments.input, out, *bound, *extra)
        size = f"{size_gb(folder / out, ending):.2f}" if ending else ""
        line = f"| {name} | {wall:.1f} | {cpu:.1f} | {peak:.2f} | {peak * 1e9 / arguments.rows:.0f} | {size} |"
        print(line, flush=True)
        lines.append(line)

    second = ("--index", str(folder / "X.index.json"), "--split", arguments.split)
    measure("number the items", ROOT, "new", "")
    for ending in arguments.formats.split(","):
        measure(f"training files, {ending}", ROOT, "new", ending, *second, "--overwrite", "--output_format", ending)
    if arguments.old:
        measure("number the items, old", arguments.old, "old", "")
        measure("training files, csv, old", arguments.old, "old", "csv", *second)
        for part in PARTS if "csv" in arguments.formats else ():
            assert filecmp.cmp(folder / f"old/X.{part}.csv", folder / f"new/X.{part}.csv", shallow=False), part
    shutil.rmtree(folder)
    table = [
        circumstances(),
        "",
        f"{arguments.rows:,} interactions from {arguments.input}, split {arguments.split}:",
        "",
        "| run | wall, s | CPU, s | peak memory, GB | bytes per interaction | files, GB |",
    ]
    table += ["| --- | ---: | ---: | ---: | ---: | ---: |", *lines, ""]
    print("\n".join(table))
    if arguments.output:
        with arguments.output.open("a") as file:
            file.write("\n".join([*table, ""]))


if __name__ == "__main__":
    main()
