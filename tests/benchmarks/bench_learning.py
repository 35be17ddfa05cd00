"""Ways of training side by side: each is trained as a user would, with several seeds, and measured on the same rows.

    python tests/benchmarks/bench_learning.py --base_model ../shared/base-lm --seeds 42,43,44 --ways rows,everything

prints a Markdown table, with the baselines of the rows below the models. `--way NAME FLAGS` adds a way or replaces one:

    python tests/benchmarks/bench_learning.py --base_model ../shared/base-lm --ways rows,longer \\
      --way longer "--freeze_LLM True --num_epochs 20"

What --folder holds already is neither trained nor measured again, and a run that was stopped goes on: the script may be
stopped and started anew. Its wall time then counts from where it went on.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from circumstances import circumstances

ROOT = Path(__file__).parent.parent.parent
AMAZON = ROOT.parent / "shared" / "data" / "amazon" / "Industrial_and_Scientific"
QUICK = "--group_users True --bf16 True --micro_batch_size 32 --eval_sample 1000 --eval_steps 0.1"
FIVE_TASKS = "--tasks sid_sid,item,sid_title,title_title,title_sid"


class Way(NamedTuple):
    """The flags of sft.py that make a way of training, and the way whose checkpoint it goes on from, if any."""

    flags: str
    after: str = ""


WAYS = {
    "untrained": Way("--freeze_LLM True --max_steps 1 --learning_rate 1e-12"),
    "published": Way(f"--freeze_LLM True {FIVE_TASKS} --learning_rate 3e-4 --lr_scheduler_type linear --weight_decay 0"),
    "five tasks": Way(f"--freeze_LLM True {FIVE_TASKS} --num_epochs 2 --weight_decay 0"),
    "rows": Way("--freeze_LLM True"),
    "rows in 8 bits": Way("--freeze_LLM True --load_in_8bit True"),
    "rows in 4 bits": Way("--freeze_LLM True --load_in_4bit True"),
    "lora": Way("--freeze_LLM True --lora_rank 8"),
    "everything": Way("--freeze_LLM False --tasks sid_sid --learning_rate 1e-3 --num_epochs 4"),
    "rows then everything": Way("--freeze_LLM False --tasks sid_sid --learning_rate 1e-4 --num_epochs 2", after="rows"),
}
NUMBERS = r"Trainable parameters[^:]*: ([\d,]+)"
SECONDS = r"([\d,]+) s in all"
MEMORY = r"peak memory ([\d.]+) GiB"
HEADER = [
    *("way", "flags", "seeds", "HR@10", "of each seed, or its 95 %", "NDCG@10", "HR@10 by levels shared: 0, 1, ..., all"),
    *("eval_loss", "numbers", "wall time, s", "peak GiB"),
]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True)
    parser.add_argument("--data", default=str(AMAZON), help="the files' path without .train.csv and so on")
    parser.add_argument("--ways", default="untrained,rows,everything", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--way", nargs=2, action="append", default=[], metavar=("NAME", "FLAGS"))
    parser.add_argument("--every", default=QUICK, help="flags of every run; '' for the defaults and nothing else")
    parser.add_argument("--seeds", default="42")
    parser.add_argument("--split", default="test", help="the rows that are measured: valid or test")
    parser.add_argument("--num_beams", default="20")
    parser.add_argument("--folder", default="output/bench_learning")
    parser.add_argument("--output", default="", help="a Markdown file, beside what is printed")
    return parser.parse_args()


class Trial:
    """One way with one seed: its folder, its two commands, and what they left."""

    def __init__(self, name: str, seed: str, ways: dict[str, Way], flags: argparse.Namespace) -> None:
        self.way, self.flags = ways[name], flags
        self.seed = seed
        self.folder = Path(flags.folder).resolve() / f"{name.replace(' ', '_')}_{seed}"
        self.before = Trial(self.way.after, seed, ways, flags) if self.way.after else None
        self.final = self.folder / "final_checkpoint"
        self.measured = self.folder / f"evaluation_{flags.split}"

    def train(self) -> None:
        """Trains, unless a final checkpoint is there; the way before, if any, first."""
        if self.before:
            self.before.train()
        if (self.folder / "report.md").is_file():
            return
        data = self.flags.data
        run(
            self.folder.with_suffix(".log"),
            *("sft.py", "--base_model", str(self.before.final) if self.before else self.flags.base_model),
            *("--train_file", f"{data}.train.csv", "--eval_file", f"{data}.valid.csv", *files(data)),
            *("--category", Path(data).name, *shlex.split(self.flags.every)),
            *("--seed", self.seed, "--output_dir", str(self.folder), "--resume_from_checkpoint", "auto"),
            *shlex.split(self.way.flags),
        )

    def measure(self) -> dict[str, Any]:
        """metrics.json of the final checkpoint, measured now unless it is there."""
        found = self.measured / "metrics.json"
        if not found.is_file():
            data = self.flags.data
            run(
                self.folder.with_suffix(f".{self.flags.split}.log"),
                *("evaluate.py", "--base_model", str(self.final), "--test_file", f"{data}.{self.flags.split}.csv"),
                *("--train_file", f"{data}.train.csv", *files(data), "--num_beams", self.flags.num_beams),
                *("--output_dir", str(self.measured)),
            )
        metrics: dict[str, Any] = json.loads(found.read_text())
        return metrics

    def logged(self, pattern: str) -> float:
        """The number that a pattern finds last in the log of training."""
        return float(re.findall(pattern, self.folder.with_suffix(".log").read_text())[-1].replace(",", ""))

    def loss(self) -> float:
        """The lowest evaluation loss, that of the checkpoint that is kept."""
        history = json.loads((self.folder / "trainer_state.json").read_text())["log_history"]
        return min(entry["eval_loss"] for entry in history if "eval_loss" in entry)


def files(data: str) -> list[str]:
    return ["--sid_index_path", f"{data}.index.json", "--item_meta_path", f"{data}.item.json"]


def run(log: Path, *command: str) -> None:
    """Runs a command in the checkout and adds its log to a file. CalledProcessError where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        subprocess.run([sys.executable, *command], cwd=ROOT, stdout=file, stderr=file, check=True)


def mean_of(values: list[float]) -> float:
    return sum(values) / len(values)


def line(name: str, trials: list[Trial]) -> list[str]:
    """What the runs of a way and their evaluations left, as a row of the table; means over the seeds."""
    metrics = [trial.measure() for trial in trials]

    def mean(value: Callable[[Trial], float]) -> float:
        return mean_of([value(trial) for trial in trials])

    hits = [found["sid"]["hr@10"] for found in metrics]
    spread = hits if len(hits) > 1 else metrics[0]["interval_95"]["sid"]["hr@10"]
    return [
        name,
        f"`{trials[0].way.flags}`" + (f" after {trials[0].way.after}" if trials[0].way.after else ""),
        ", ".join(trial.seed for trial in trials),
        f"{mean_of(hits):.4f}",
        (", " if len(hits) > 1 else " to ").join(f"{value:.4f}" for value in spread),
        f"{mean_of([found['sid']['ndcg@10'] for found in metrics]):.4f}",
        by_levels([found["by_shared_levels"] for found in metrics]),
        f"{mean(Trial.loss):.3f}",
        f"{mean(lambda trial: trial.logged(NUMBERS)):,.0f}",
        f"{mean(lambda trial: trial.logged(SECONDS)):,.0f}",
        f"{mean(lambda trial: trial.logged(MEMORY)):.2f}",
    ]


def by_levels(groups: list[dict[str, Any]]) -> str:
    return ", ".join(f"{mean_of([group[level]['hr@10'] for group in groups]):.3f}" for level in groups[0])


def baseline_lines(metrics: dict[str, Any]) -> list[list[str]]:
    """The baselines of the rows, in the columns of the table."""
    return [
        [
            *(name, "", "", f"{found['hr@10']:.4f}", "", f"{found['ndcg@10']:.4f}", by_levels([found["by_shared_levels"]])),
            *("", "", "", ""),
        ]
        for name, found in metrics["baselines"].items()
    ]


def main() -> None:
    flags = arguments()
    ways = WAYS | {name: Way(given) for name, given in flags.way}
    names = flags.ways.split(",")
    found = {name: [Trial(name, seed, ways, flags) for seed in flags.seeds.split(",")] for name in names}
    for trials in found.values():
        for trial in trials:
            trial.train()
            trial.measure()
    rows = [line(name, trials) for name, trials in found.items()] + baseline_lines(found[names[0]][0].measure())
    text = "\n".join(
        [
            circumstances(),
            "",
            *("| " + " | ".join(cells) + " |" for cells in (HEADER, ["---"] * len(HEADER), *rows)),
        ]
    )
    print(text)
    if flags.output:
        Path(flags.output).write_text(text + "\n")


if __name__ == "__main__":
    main()
