"""What adapters are worth: the same epochs on Industrial with rows alone, with adapters beside them, and with everything.

    python tests/benchmarks/bench_lora.py --base_model ../shared/base-lm --epochs 4 --modes rows,lora,everything

Trains each mode as a user does, one after the other, measures each on all valid rows, and prints a Markdown table. What
--folder holds already is not trained again, so that the script may be stopped and started anew.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
AMAZON = ROOT.parent / "shared" / "data" / "amazon" / "Industrial_and_Scientific"
MODES = {
    "rows": ["--freeze_LLM", "True"],
    "rows in 8 bits": ["--freeze_LLM", "True", "--load_in_8bit", "True"],
    "rows in 4 bits": ["--freeze_LLM", "True", "--load_in_4bit", "True"],
    "lora": ["--freeze_LLM", "True", "--lora_rank", "8"],
    "everything": ["--freeze_LLM", "False", "--tasks", "sid_sid", "--learning_rate", "1e-3"],
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True)
    parser.add_argument("--data", default=str(AMAZON), help="the files' path without .train.csv and so on")
    parser.add_argument("--modes", default="rows,lora,everything", help=f"of {', '.join(MODES)}")
    parser.add_argument("--epochs", default="4")
    parser.add_argument("--num_beams", default="20")
    parser.add_argument("--folder", default="output/bench_lora")
    parser.add_argument("--output", default="")
    return parser.parse_args()


def training(mode: str, flags: argparse.Namespace) -> list[str]:
    """The command line of a mode's run."""
    fixed = ["--group_users", "True", "--bf16", "True", "--micro_batch_size", "32", "--early_stopping_patience", "0"]
    return [
        *("sft.py", "--base_model", flags.base_model, *MODES[mode], *fixed),
        *("--train_file", f"{flags.data}.train.csv", "--eval_file", f"{flags.data}.valid.csv"),
        *("--sid_index_path", f"{flags.data}.index.json", "--item_meta_path", f"{flags.data}.item.json"),
        *("--category", Path(flags.data).name, "--num_epochs", flags.epochs, "--output_dir", str(folder_of(mode, flags))),
    ]


def folder_of(mode: str, flags: argparse.Namespace) -> Path:
    return Path(flags.folder).resolve() / mode.replace(" ", "_")


def measuring(mode: str, flags: argparse.Namespace) -> list[str]:
    """The command line that measures a mode's final checkpoint on all valid rows."""
    final = folder_of(mode, flags) / "final_checkpoint"
    return [
        *("evaluate.py", "--base_model", str(final), "--test_file", f"{flags.data}.valid.csv"),
        *("--sid_index_path", f"{flags.data}.index.json", "--item_meta_path", f"{flags.data}.item.json"),
        *("--num_beams", flags.num_beams),
    ]


def run(command: list[str], log: Path) -> None:
    """Runs a command in the checkout, with its log in a file. CalledProcessError where it fails."""
    with log.open("w") as file:
        subprocess.run([sys.executable, *command], cwd=ROOT, stderr=file, check=True)


def line(mode: str, flags: argparse.Namespace) -> list[str]:
    """What a mode's run and its evaluation left, as a row of the table."""
    folder = folder_of(mode, flags)
    log = folder.with_suffix(".log").read_text()
    state = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    metrics = json.loads((folder / "final_checkpoint" / "evaluation" / "metrics.json").read_text())
    low, high = metrics["interval_95"]["sid"]["hr@10"]
    numbers = re.search(r"Trainable parameters[^:]*: ([\d,]+)", log)
    memory = re.search(r"tokens at ([\d,]+) tokens/s; peak memory ([\d.]+) GiB", log)
    assert numbers is not None
    assert memory is not None
    return [
        mode,
        shlex.join(MODES[mode]),
        numbers[1],
        f"{min(entry['eval_loss'] for entry in state if 'eval_loss' in entry):.3f}",
        f"{metrics['sid']['hr@10']:.4f} ({low:.3f} to {high:.3f})",
        f"{metrics['sid']['ndcg@10']:.4f}",
        memory[1],
        memory[2],
    ]


def main() -> None:
    flags = arguments()
    rows = []
    for mode in flags.modes.split(","):
        folder = folder_of(mode, flags)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not (folder / "final_checkpoint").is_dir():
            run(training(mode, flags), folder.with_suffix(".log"))
        if not (folder / "final_checkpoint" / "evaluation" / "metrics.json").is_file():
            run(measuring(mode, flags), folder.with_suffix(".evaluation.log"))
        rows.append(line(mode, flags))
    header = ["what trains", "flags", "numbers", "best eval_loss", "valid HR@10 (95 %)", "NDCG@10", "tokens/s", "peak GiB"]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    text = "\n".join(
        [
            f"Hardware: {platform.processor() or platform.machine()}, {os.cpu_count()} cores. "
            f"Commit {commit.stdout.strip() or 'unknown'}, {datetime.date.today()}.",
            "",
            f"    {shlex.join(['python', *sys.argv])}",
            "",
            *("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)),
        ]
    )
    print(text)
    if flags.output:
        Path(flags.output).write_text(text + "\n")


if __name__ == "__main__":
    main()
