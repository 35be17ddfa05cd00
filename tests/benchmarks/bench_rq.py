"""Numbers of rq/ that the README quotes: a million items beside faiss alone, and every method on one catalogue.

    python tests/benchmarks/bench_rq.py million --folder SCRATCH --output tests/benchmarks/results/rq_million.md
    python tests/benchmarks/bench_rq.py catalogue --item_file X.item.json --index X.index.json --folder SCRATCH
    --output R.md

N items, R rows of a chunk, D dimensions.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from circumstances import circumstances

ROOT = Path(__file__).parent.parent.parent
METHODS = ("rqkmeans", "rqkmeans_constrained", "rqfaiss", "rqkmeans_plus", "rqvae")
CHUNK_ROWS = 20_000

# The same sample, codebooks and codes as rq.rqkmeans, by faiss with the whole array in memory, as its users write it.
FAISS_ALONE = """
import sys, numpy as np, faiss
x = np.load(sys.argv[1])
drawn = np.sort(np.random.default_rng(42).choice(len(x), min(len(x), 65_536), replace=False))
quantizer = faiss.ResidualQuantizer(x.shape[1], 3, 8)
quantizer.max_beam_size, quantizer.cp.seed = 1, 42
quantizer.train(x[drawn])
codes = quantizer.compute_codes(x)
rows = np.unique(np.linspace(0, len(x) - 1, min(65_536, len(x))).astype(np.int64))
print(f"{float(np.square(x[rows] - quantizer.decode(codes[rows])).mean()):.4e}")
"""


def make_embeddings(path: Path, *, n_items: int, n_dims: int, seed: int = 0) -> None:
    """Clustered rows in a .npy, chunk by chunk: 2,000 centres around 50 themes, spread falling over the dimensions."""
    rng = np.random.default_rng(seed)
    spread_D = np.geomspace(1, 0.05, n_dims).astype(np.float32)
    themes = rng.standard_normal((50, n_dims), np.float32)
    centres = (themes[rng.integers(50, size=2000)] + 0.7 * rng.standard_normal((2000, n_dims), np.float32)) * spread_D
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (n_items, n_dims)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, n_items, CHUNK_ROWS):
            rows = min(CHUNK_ROWS, n_items - start)
            chunk_RD = centres[rng.integers(2000, size=rows)]
            chunk_RD += 0.5 * rng.standard_normal((rows, n_dims), np.float32) * spread_D
            chunk_RD.tofile(file)


def measured(command: list[str]) -> tuple[str, float, float]:
    """Output, wall seconds and peak resident GB (10^9 bytes, mapped pages included) of a command."""
    start_s = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    return output, time.monotonic() - start_s, usage.ru_maxrss * 1024 / 1e9


def heading(title: str) -> str:
    return f"# {title}\n\n{circumstances()}\n"


def million(flags: argparse.Namespace) -> str:
    """rq.rqkmeans and faiss alone on the same array."""
    data, index = flags.folder / "E.npy", flags.folder / "X.index.json"
    make_embeddings(data, n_items=flags.items, n_dims=flags.dims)
    try:
        command = [sys.executable, "-m", "rq.rqkmeans", "--data_path", str(data), "--output", str(index), "--overwrite"]
        lines, rows = [], []
        for label, extra in (
            ("rq.rqkmeans, 25 rounds (default)", []),
            ("rq.rqkmeans, 10 rounds as faiss", ["--rounds", "10"]),
        ):
            output, wall_s, peak_gb = measured([*command, *extra])
            error = next(line for line in output.splitlines() if "reconstruction error" in line)
            mse = error.split("each level: ")[1].split(";")[0].split(", ")[-1]
            rows.append(f"| {label}: embeddings file to index file | {wall_s:.0f} | {peak_gb:.2f} | {mse} |")
            lines += [f"    {line}" for line in output.splitlines()] + [""]
        output, wall_s, peak_gb = measured([sys.executable, "-c", FAISS_ALONE, str(data)])
        rows.append(
            f"| faiss alone, beam 1: load, train, codes; no index | {wall_s:.0f} | {peak_gb:.2f} | {output.strip()} |"
        )
    finally:
        data.unlink(missing_ok=True)
        index.unlink(missing_ok=True)
    return (
        heading(f"{flags.items:,} items x {flags.dims} dimensions, 256,256,256")
        + "\nBoth train on 65,536 sampled rows; MSE over 65,536 spread rows; peak memory counts mapped pages.\n\n"
        + "| | wall time, s | peak memory, GB | MSE |\n| --- | ---: | ---: | ---: |\n"
        + "\n".join(rows)
        + "\n\nOutput of rq.rqkmeans:\n\n"
        + "\n".join(lines)
    )


def catalogue(flags: argparse.Namespace) -> str:
    """Every method from `.item.json` alone, the reports side by side, the shipped index beside them."""
    folder, data = flags.folder, flags.folder / "E.npy"
    run = [sys.executable, "-m"]
    normalize = ["--normalize"] if flags.normalize else []
    measured([*run, "rq.text2emb", "--item_file", str(flags.item_file), "--output", str(data), "--overwrite", *normalize])
    times = []
    for method in METHODS:
        output, checkpoint = folder / f"{method}.index.json", folder / method
        command = [*run, f"rq.{method}", "--item_file", str(flags.item_file), "--data_path", str(data), "--overwrite"]
        log, wall_s, peak_gb = measured([*command, "--output", str(output), "--ckpt_path", str(checkpoint)])
        collisions = next(line for line in log.splitlines() if line.startswith("collisions"))
        times.append(f"| {method} | {wall_s:.0f} | {peak_gb:.2f} | {collisions} |")
    indexes = [str(flags.index)] if flags.index else []
    indexes += [str(folder / f"{method}.index.json") for method in METHODS]
    checkpoints = ["-"] * bool(flags.index) + [str(folder / method) for method in METHODS]
    table, picture = folder / "report.md", folder / "report.png"
    command = [*run, "rq.report", *indexes, "--data_path", str(data), "--ckpt_path", *checkpoints]
    measured([*command, "--table", str(table), "--output", str(picture), "--overwrite"])
    if flags.output:
        shutil.copyfile(picture, flags.output.with_suffix(".png"))
    return (
        heading("Every method on one catalogue, TF-IDF embeddings" + (", rows of length 1" if flags.normalize else ""))
        + "\n| method | wall time, s | peak memory, GB | |\n| --- | ---: | ---: | --- |\n"
        + "\n".join(times)
        + "\n\nThe first column is the index shipped with the data, made from other embeddings; its refitted error\n"
        + "on these embeddings says how far its codes tell these texts apart, not how well it was made.\n\n"
        + table.read_text()
    )


def main() -> None:
    """Run one benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=("million", "catalogue"))
    parser.add_argument("--folder", type=Path, required=True, help="scratch space: 4 GB for the million")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dims", type=int, default=768)
    parser.add_argument("--item_file", type=Path)
    parser.add_argument("--index", type=Path)
    parser.add_argument("--normalize", action="store_true")
    flags = parser.parse_args()
    flags.folder = flags.folder.resolve()
    flags.folder.mkdir(parents=True, exist_ok=True)
    result = {"million": million, "catalogue": catalogue}[flags.benchmark](flags)
    print(result)
    if flags.output:
        flags.output.write_text(result)


if __name__ == "__main__":
    main()
