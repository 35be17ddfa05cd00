"""What a training run leaves for its reader: report.md with its curves, and the model card of its checkpoint.

    write_run_report(flags, trainer.state, trainer.model, rows)      # output_dir/report.md, output_dir/curves.png
    card = model_card(flags, trainer.state, wording)                 # final_checkpoint/README.md

Everything comes from the run itself: its flags, its Trainer state (log_history), its model, its input files.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sid_sft.files import whole_file
from sid_sft.parts import source_hash, source_name, source_size
from sid_sft.settings import TrainFlags, examples_per_step
from sid_sft.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerState

    from sid_sft.adapters import Adapters
    from sid_sft.sid_rows import SidRows

REPORT_FILE, CURVES_FILE = "report.md", "curves.png"
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "numpy")
EVALUATED = {"eval_loss": "loss", "eval_hr@10": "HR@10", "eval_ndcg@10": "NDCG@10"}

Log = list[dict[str, Any]]


def write_run_report(
    flags: TrainFlags, state: TrainerState, model: PreTrainedModel, rows: SidRows | None, adapters: Adapters | None = None
) -> None:
    """Writes report.md and curves.png to output_dir. flags: those of sft.py; rows, adapters: what freeze mode trained."""
    folder = Path(flags.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw_curves(folder / CURVES_FILE, state.log_history)
    beside = " and LoRA adapters" if adapters else ""
    what = f"SID rows{beside} of a frozen" if flags.freeze_LLM else "all of"
    sections = [
        f"# Training run: {what} {Path(flags.base_model).name}",
        result_text(state, flags.metric_for_best_model),
        f"![Curves of the run]({CURVES_FILE})" if drawn else "Nothing was logged that could be drawn.",
        evaluations_table(state),
        "## What trained\n\n" + trained_table(model, rows, adapters),
        f"## Command\n\n```\n{command_line()}\n```",
        "## Inputs\n\n" + inputs_table(flags),
        "## Made with\n\n" + versions_table(),
    ]
    with whole_file(folder / REPORT_FILE) as scratch:
        scratch.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")


def series(log: Log, key: str) -> tuple[list[int], list[float]]:
    """The steps at which a number was logged, and the number: [(10, 5.7), (20, 4.9)] as two lists."""
    found = [(entry["step"], float(entry[key])) for entry in log if key in entry]
    return [step for step, _ in found], [value for _, value in found]


# ---------------------------------------------------------------------------------------------- the text


def kept_step(state: TrainerState) -> int:
    """The step of the model in final_checkpoint/: the best checkpoint's where one was chosen, otherwise the last."""
    best = state.best_model_checkpoint
    return int(Path(best).name.rpartition("-")[2]) if best else state.global_step


def result_text(state: TrainerState, metric: str) -> str:
    """How far the run came and what it reached, as one paragraph. metric: what the best checkpoint was chosen by."""
    steps, losses = series(state.log_history, "loss")
    text = f"{state.global_step:,} optimizer steps, {state.epoch or 0:.2f} epochs"
    if losses:
        text += f"; training loss {losses[0]:.4f} at step {steps[0]:,}, {losses[-1]:.4f} at step {steps[-1]:,}"
    if state.best_metric is not None:
        text += f". Best {metric} {state.best_metric:.4f} at step {state.best_global_step:,}"
    return f"{text}. final_checkpoint/ holds the model of step {kept_step(state):,}."


def evaluations_table(state: TrainerState) -> str:
    """One line per evaluation."""
    found = [entry for entry in state.log_history if "eval_loss" in entry]
    keys = {key: name for key, name in EVALUATED.items() if any(key in entry for entry in found)}
    if not found:
        return "No evaluation (no --eval_file)."
    lines = [
        [f"{entry['step']:,}", f"{entry.get('epoch', 0):.2f}", *(f"{entry[key]:.4f}" for key in keys if key in entry)]
        for entry in found
    ]
    return "## Evaluations\n\n" + markdown_table(["step", "epoch", *keys.values()], lines)


def trained_table(model: PreTrainedModel, rows: SidRows | None, adapters: Adapters | None) -> str:
    """What of the model trains: in freeze mode the SID rows of each table and the adapters, otherwise all of it."""
    total = model.num_parameters()
    if rows is None:
        parts = [("all parameters", "", total)]
    else:
        span = f"ids {int(rows.ids[0])} to {int(rows.ids[-1])}"
        parts = [
            (
                f"{table.name}: {len(rows.ids)} SID rows, {span}",
                " x ".join(map(str, table.master.shape)),
                table.master.numel(),
            )
            for table in rows.tables
        ]
    if adapters:
        parts.append((f"LoRA adapters of {adapters.layers} layers", f"rank {adapters.rank}", adapters.numbers))
    lines = [[name, shape, f"{count:,}", f"{100 * count / total:.4f} %"] for name, shape, count in parts]
    trained = sum(count for _, _, count in parts)
    lines.append(["frozen", "", f"{total - trained:,}", f"{100 * (total - trained) / total:.4f} %"])
    return markdown_table(["part", "shape", "numbers", "share"], lines)


def command_line() -> str:
    """The command that started this program, ready to be pasted."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    start = ["python"] if processes == 1 else ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    return shlex.join([*start, *sys.argv])


def measuring_command(flags: TrainFlags) -> str:
    """What to type next: evaluate.py on final_checkpoint/ and the .test file beside --eval_file, or that file itself.

    python evaluate.py --base_model output/toys/final_checkpoint --test_file data/Toys.test.csv --train_file ...
    """
    beside = flags.eval_file.replace(".valid.", ".test.")
    files = {
        "base_model": str(Path(flags.output_dir) / "final_checkpoint"),
        "test_file": beside if Path(beside).is_file() else flags.eval_file,
        "train_file": flags.train_file,
        "sid_index_path": flags.sid_index_path,
        "item_meta_path": flags.item_meta_path,
    }
    others = {name: getattr(flags, name) for name in ("cutoff_len", "max_left_out", "trust_remote_code")}
    given = files | {name: str(value) for name, value in others.items() if value != getattr(TrainFlags, name)}
    words = [word for name, value in given.items() if value for word in (f"--{name}", value)]
    return shlex.join(["python", "evaluate.py", *words])


def inputs_table(flags: TrainFlags) -> str:
    """Each input file with its size and the beginning of its SHA-256."""
    lines = [
        [f"--{name}", source_name(path), f"{source_size(path):,}", source_hash(path)[:16]]
        for name, path in flags.input_files.items()
    ]
    return markdown_table(["flag", "file", "bytes", "SHA-256 begins"], lines)


def versions_table() -> str:
    import torch

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    lines = [["Python", platform.python_version()]]
    lines += [[name, importlib.metadata.version(name)] for name in PACKAGES]
    lines += [["device", f"{processes} x {device}"]]
    return markdown_table(["", "version"], lines)


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    """[["a", "b"]] under ["x", "y"] -> "| x | y |\\n| --- | --- |\\n| a | b |"."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


# ---------------------------------------------------------------------------------------------- the curves


class Panel(NamedTuple):
    """One picture of curves: key of the log -> label."""

    title: str
    curves: dict[str, str]
    from_zero: bool = False


PANELS = (
    Panel("Training loss by task", {f"loss_{name}": name for name in TASKS}),
    Panel("Loss", {"loss": "training, all tasks", "eval_loss": "evaluation"}),
    Panel("Recommendation, evaluation rows", {"eval_hr@10": "HR@10", "eval_ndcg@10": "NDCG@10"}, from_zero=True),
    Panel("Learning rate", {"learning_rate": ""}, from_zero=True),
    Panel("Tokens per second", {"tokens_per_s": ""}, from_zero=True),
)


def draw_curves(path: Path, log: Log) -> bool:
    """Draws the panels that the log has numbers for; returns whether there was any."""
    panels = [panel for panel in PANELS if any(series(log, key)[0] for key in panel.curves)]
    if not panels:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(4.8 * columns, 3.6 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for key, label in panel.curves.items():
            steps, values = series(log, key)
            if steps:
                axis.plot(steps, values, label=label, marker="o" if len(steps) < 40 else None, markersize=3, linewidth=1.5)
        axis.set_title(panel.title)
        axis.set_xlabel("optimizer step")
        if panel.from_zero:
            axis.set_ylim(0, 1.08 * axis.dataLim.y1 or 1)
        if any(panel.curves.values()):
            axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.7)
    with whole_file(path) as scratch:
        figure.savefig(scratch, dpi=130, format="png")
    pyplot.close(figure)
    return True


# ---------------------------------------------------------------------------------------------- the model card

CARD = """---
{front}
---

# {name} for recommendation with semantic IDs

Reads what a customer bought and writes the semantic ID (SID) of what the customer will want next. A SID is a few
tokens such as `<a_12><b_3><c_40>`, one per level; the index (`.index.json`) says which item has which.

## Training

Fine-tuned from `{name}` for {steps:,} optimizer steps of {batch_size} examples, peak learning rate {learning_rate:g},
seed {seed}.{further}
{how}
{reached}
## Prompts

The tasks and their templates, as in `prompts.json`; in a history each item stands on a line of its own.

```json
{prompts}
```

## Use

```
python evaluate.py --base_model THIS_FOLDER --sid_index_path X.index.json --item_meta_path X.item.json \\
    --recommend "a title | another title"
python evaluate.py --base_model THIS_FOLDER --sid_index_path X.index.json --item_meta_path X.item.json \\
    --test_file X.test.csv --train_file X.train.csv
```

Beam search must be constrained to the SIDs of the index: freely generated SIDs may not exist.

## Limits

It recommends only items of the index that it was trained with, and all items that share a SID alike.
"""
FROZEN = """Only the rows of the SID tokens were trained, in the embedding and in the output head where it is not tied;
every other number is the base model's. `sid_rows.safetensors` holds those rows alone."""


ADAPTED = """The rows of the SID tokens were trained, in the embedding and in the output head where it is not tied, and LoRA
adapters of rank {rank} (alpha {alpha}, peak learning rate {learning_rate:g}) in the layers, which are merged into the
weights here. `sid_rows.safetensors` and `adapter/`, for peft, hold rows and adapters alone."""
QUANTIZED = "\nWhile they trained, the base was held in {bits} bits; here it has its own numbers."


def how_it_trained(flags: TrainFlags) -> str:
    """What was trained, for the model card."""
    if not flags.freeze_LLM:
        return "All parameters were trained."
    text = FROZEN
    if flags.lora_rank:
        text = ADAPTED.format(rank=flags.lora_rank, alpha=flags.lora_alpha, learning_rate=flags.lora_learning_rate)
    return text + (QUANTIZED.format(bits=flags.bits) if flags.bits else "")


def model_card(flags: TrainFlags, state: TrainerState, wording: dict[str, str]) -> str:
    """The README.md of final_checkpoint/ as the Hugging Face hub reads it.

    flags: with the learning rate that the run found where none was given; wording: task name -> template.
    """
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    front += ["- generative-recommendation", "- semantic-ids", "- sft"]
    if not Path(flags.base_model).exists():  # a hub name, which the hub makes a link
        front.insert(0, f"base_model: {flags.base_model}")
    kept = kept_step(state)
    further = f" It evaluated best of a run of {state.global_step:,} steps." if kept < state.global_step else ""
    evaluation = next((entry for entry in state.log_history if entry["step"] == kept and "eval_loss" in entry), {})
    reached = ", ".join(f"{name} {evaluation[key]:.4f}" for key, name in EVALUATED.items() if key in evaluation)
    templates = {name: wording[name] for name, task in TASKS.items() if task.group in flags.task_names}
    return CARD.format(
        front="\n".join(front),
        name=Path(flags.base_model).name,
        steps=kept,
        further=further,
        batch_size=examples_per_step(flags),
        learning_rate=flags.learning_rate,
        seed=flags.seed,
        how=how_it_trained(flags),
        reached=f"Its evaluation: {reached}.\n" if reached else "",
        prompts=json.dumps(templates, indent=1, ensure_ascii=False),
    )
