"""Building the five tasks' tokenized data from the Industrial files, against encoding row by row.

    python tests/benchmarks/bench_data.py [--rows 500000] [--output tests/benchmarks/results/data.md]

Row by row means: read the history cells of a row with ast.literal_eval, encode instruction, prompt and answer of each
example with a tokenizer call of its own, join them. Both sides start from the same files, in the same process.
The memory is that of a process of its own that builds from a CSV, and of its children: anonymous pages, which a run
cannot give back, apart from mapped files, which it can.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from circumstances import circumstances

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
csv.field_size_limit(sys.maxsize)

from data import build_dataset
from sid_sft.catalogue import Catalogue, read_catalogue
from sid_sft.dataset_cache import Source
from sid_sft.interactions import Row
from sid_sft.tasks import DEFAULT_TASKS, SEPARATOR, TASKS, around_history, read_prompts, render


def load(files: str, base_model: str):
    """Catalogue, prompts and the tokenizer that knows the SID tokens."""
    from transformers import AutoTokenizer

    from sid_sft.vocabulary import add_sid_tokens

    catalogue = read_catalogue(Path(f"{files}.index.json"), Path(f"{files}.item.json"))
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    add_sid_tokens(tokenizer, sorted({token for item in catalogue.items for token in item.sid}))
    return catalogue, read_prompts(None, "Industrial_and_Scientific"), tokenizer


def build(train_csv: Path, cache: Path, catalogue: Catalogue, prompts: dict[str, str], tokenizer):
    return build_dataset(
        Source(train_csv),
        list(DEFAULT_TASKS),
        catalogue=catalogue,
        prompts=prompts,
        tokenizer=tokenizer,
        cutoff_len=512,
        cache_dir=cache,
    )


def row_by_row(train_csv: Path, catalogue: Catalogue, prompts: dict[str, str], tokenizer) -> list[dict[str, list[int]]]:
    examples = []
    for task in TASKS.values():
        if task.group not in DEFAULT_TASKS:
            continue
        for row in item_rows(catalogue) if task.rows == "items" else csv_rows(train_csv, catalogue):
            text, answer = render(task, row, catalogue, prompts)
            head = text.index("\n") + 1 if task.rows == "items" else len(around_history(task, row, prompts)[0])
            instruction, prompt = text[:head], text[head:]
            if not answer or not prompt.strip(SEPARATOR):
                continue
            begin = tokenizer(instruction)["input_ids"] + tokenizer(prompt, add_special_tokens=False)["input_ids"]
            end = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            examples.append(
                {
                    "input_ids": begin + end,
                    "attention_mask": [1] * len(begin + end),
                    "labels": [-100] * len(begin) + end,
                }
            )
    return examples


def item_rows(catalogue: Catalogue):
    return (Row("", (), place) for place in range(len(catalogue.items)))


def csv_rows(train_csv: Path, catalogue: Catalogue):
    with train_csv.open(newline="", encoding="utf-8") as file:
        for fields in csv.DictReader(file):
            ids, _, _ = (ast.literal_eval(fields[f"history_item_{name}"]) for name in ("id", "sid", "title"))
            history = tuple(catalogue.position[str(item)] for item in ids)
            yield Row(fields["user_id"], history, catalogue.position[fields["item_id"]])


def repeat_csv(source: Path, target: Path, rows: int) -> None:
    """The rows of a CSV again and again, up to a number of rows, each round with users of its own."""
    with source.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        content = list(reader)
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, reader.fieldnames)
        writer.writeheader()
        for number in range(rows):
            row = content[number % len(content)]
            writer.writerow({**row, "user_id": f"{row['user_id']}-{number // len(content)}"})


def memory(process: int) -> dict[str, int]:
    """Bytes of a process and of all below it, a page that several share counted once: anonymous pages, and the rest."""
    total = {"anonymous": 0, "mapped": 0}
    with contextlib.suppress(OSError):  # a process may end between two lines
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("Pss_Anon", "Pss_File", "Pss_Shmem"):
                total["anonymous" if name == "Pss_Anon" else "mapped"] += int(value.split()[0]) * 1024
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            for name, value in memory(int(child)).items():
                total[name] += value
    return total


def measure_memory(train_csv: Path, cache: Path, files: str, base_model: str) -> dict[str, float]:
    """Peaks, in MB, of a process that builds the dataset and of its children; seconds, disk use."""
    command = [sys.executable, __file__, "--files", files, "--base_model", base_model, "--build", train_csv, cache]
    peak = {"anonymous": 0, "mapped": 0}
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        now = memory(process.pid)
        peak = {name: max(peak[name], now[name]) for name in peak}
        time.sleep(0.2)  # reading the maps of large processes costs time itself
    if process.returncode:
        raise RuntimeError(f"the build of {train_csv.name} ended with exit code {process.returncode}")
    told = json.loads(process.stdout.read())
    disk = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    return {**told, **{f"{name}_mb": value / 1e6 for name, value in peak.items()}, "disk_mb": disk / 1e6}


def clocks() -> tuple[float, float]:
    """Seconds of the wall clock, and processor seconds of this process and its ended children."""
    return time.perf_counter(), sum(os.times()[:4])


def compare(train_csv: Path, scratch: Path, loaded: tuple, runs: int) -> dict[str, float]:
    """Seconds of both sides, the middle of some runs in turn, and of opening the finished dataset."""
    spent: dict[str, list[tuple[float, float]]] = {"ours": [], "cached": [], "row_by_row": []}
    for number in range(runs):
        cache = scratch / f"cache-{number}"
        for name, times in spent.items():
            start = clocks()
            if name == "row_by_row":
                examples = row_by_row(train_csv, *loaded)
            else:
                dataset = build(train_csv, cache, *loaded)
            times.append(tuple(end - begin for begin, end in zip(start, clocks(), strict=True)))
        if len(examples) != len(dataset):
            raise RuntimeError(f"{len(examples)} examples row by row, {len(dataset)} built")
        print(f"run {number + 1}:", {name: times[-1] for name, times in spent.items()})
    result: dict[str, float] = {"examples": len(dataset)}
    for name, times in spent.items():
        result[f"{name}_s"], result[f"{name}_cpu_s"] = (statistics.median(column) for column in zip(*times, strict=True))
    result["ratio"] = result["row_by_row_s"] / result["ours_s"]
    result["same_ids"] = sum(a == b["input_ids"] for a, b in zip(dataset["input_ids"], examples, strict=True))
    return result


def report(result: dict) -> str:
    count = result["examples"]
    lines = [
        "| building the five tasks' data | seconds | processor seconds | examples / s |",
        "| --- | --- | --- | --- |",
    ]
    for name, key in (("row by row", "row_by_row"), ("data.py", "ours"), ("data.py, cached", "cached")):
        seconds = result[f"{key}_s"]
        lines.append(f"| {name} | {seconds:.2f} | {result[f'{key}_cpu_s']:.2f} | {count / seconds:,.0f} |")
    lines += [
        "",
        f"{result['ratio']:.1f} times the rows per second; {count:,} examples, "
        f"{result['same_ids']:,} of them with the same ids both ways.",
    ]
    if result["builds"]:
        lines += [
            "",
            "| CSV rows | examples | seconds | peak anonymous MB | peak mapped MB | disk MB |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
    for rows, build_ in result["builds"].items():
        lines.append(
            f"| {int(rows):,} | {build_['examples']:,} | {build_['build_s']:.1f} | {build_['anonymous_mb']:.0f} "
            f"| {build_['mapped_mb']:.0f} | {build_['disk_mb']:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    shared = Path(os.path.relpath(ROOT.parent / "shared"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", default=str(shared / "data/amazon/Industrial_and_Scientific"))
    parser.add_argument("--base_model", default=str(shared / "base-lm"))
    parser.add_argument("--rows", type=int, default=500_000, help="rows of the repeated CSV; 0 leaves memory out")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", help="markdown file for the result")
    parser.add_argument("--build", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()

    loaded = load(options.files, options.base_model)
    if options.build:
        start = time.perf_counter()
        dataset = build(Path(options.build[0]), Path(options.build[1]), *loaded)
        print(json.dumps({"examples": len(dataset), "build_s": time.perf_counter() - start}))
        return
    train_csv = Path(f"{options.files}.train.csv")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        result = compare(train_csv, scratch, loaded, options.runs)
        result["builds"] = {}
        for rows in sorted({len(list(csv_rows(train_csv, loaded[0]))), options.rows} - {0}) if options.rows else []:
            repeat_csv(train_csv, scratch / "rows.csv", rows)
            cache = scratch / "cache-rows"
            result["builds"][rows] = measure_memory(scratch / "rows.csv", cache, options.files, options.base_model)
            shutil.rmtree(cache)
    table = report(result)
    print(table)
    print(json.dumps(result))
    if options.output:
        Path(options.output).write_text(f"# Building the tokenized data\n\n{circumstances()}\n\n{table}\n")


if __name__ == "__main__":
    main()
