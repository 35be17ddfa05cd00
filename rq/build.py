"""`python -m rq.build`: from two tables to all that sft.sh trains on, by one command.

    python -m rq.build --interactions orders.csv --items products.csv --output_dir shop

runs rq.prepare, rq.text2emb, a quantizer, rq.generate_indices and rq.prepare again, each with the flags of its own, and ends
with the command that trains. NAME.build.json records what each step was made of: the same command goes on where it was
stopped, and redoes from the first step on that a changed flag or file concerns.
"""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from rq import (
    command_line,
    generate_indices,
    prepare,
    rqfaiss,
    rqkmeans,
    rqkmeans_constrained,
    rqkmeans_plus,
    rqvae,
    settings,
    text2emb,
)
from rq.build_record import BuildRecord, Step, content_hash
from rq.catalogue import read_items
from rq.command_line import log
from rq.files import InputError, check_output
from rq.hub import hub_address
from rq.origin import record_file

ROOT = Path(__file__).resolve().parent.parent
METHODS = {
    "rqkmeans": rqkmeans.main,
    "rqkmeans_constrained": rqkmeans_constrained.main,
    "rqkmeans_plus": rqkmeans_plus.main,
    "rqvae": rqvae.main,
    "rqfaiss": rqfaiss.main,
}
PER_CODE, FEWEST_CODES, MOST_CODES = 16, 8, 256
FILLED_IN = (
    *("help", "output_dir", "name", "index", "append", "overwrite", "item_file", "data_path", "output", "ckpt_path"),
    *("codes_output", "codes_path", "resume_from_checkpoint"),
)
RESOLVING = ("collisions", "capacity")  # flags of the quantizers, too, where they would come a step too early
NOT_DECIDING = ("device", "batch_size")  # of text2emb: they change how fast it is, not what it makes

Flags = dict[str, dict[str, Any]]  # {"k_core": {"type": .., "help": ..}}: options of add_argument


def levels_for(n_items: int) -> tuple[int, int, int]:
    """Three levels of one size: the largest power of two that leaves a code 16 items on average, from 8 to 256.

    250 items -> (8, 8, 8); 3,686 -> (128, 128, 128); 4,096 and more -> (256, 256, 256). Never more codes than items.
    """
    size = min(max(_power_of_two(n_items // PER_CODE), FEWEST_CODES), MOST_CODES, _power_of_two(n_items))
    return size, size, size


def _power_of_two(number: int) -> int:
    """The largest one that is no larger than `number`, but at least 2."""
    return max(2, 1 << number.bit_length() - 1) if number else 2


def flags_of_steps(method: str) -> dict[str, Flags]:
    """{step: its flags}, as its own command has them, without those that are filled in here."""
    preparing, indexing = command_line.flags_of(prepare.main), command_line.flags_of(generate_indices.main)
    steps = {
        "prepare": {name: options for name, options in preparing.items() if name not in settings.OF_THE_TRAINING_FILES},
        "text2emb": command_line.flags_of(text2emb.main),
        "quantizer": {n: options for n, options in command_line.flags_of(METHODS[method]).items() if n not in RESOLVING},
        "index": {name: indexing[name] for name in (*RESOLVING, "device")},
        "csvs": preparing,
    }
    return {
        step: {name: options for name, options in flags.items() if name not in FILLED_IN} for step, flags in steps.items()
    }


def flag_name(step: str, flag: str) -> str:
    """The flag of build that is a step's: text2emb and rq.rqvae both have a batch size, of other things."""
    return f"encoder_{flag}" if (step, flag) == ("text2emb", "batch_size") else flag


def make_parser(steps: dict[str, Flags]) -> command_line.OneLineParser:
    """The flags of build: a few of its own, and those of the steps, whose texts are checked here and handed on there."""
    parser = command_line.parser("build", __doc__, shared=("overwrite",))
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, metavar="FOLDER", help="where all files go")
    add("--name", type=command_line.plain_name, help="what their names begin with (the name of the folder)")
    add("--method", choices=tuple(METHODS), default="rqkmeans", help="the quantizer (rqkmeans)")
    add("--plan", type=command_line.switch, nargs="?", const=True, default=False, help="show what is to do, and stop")
    for name, options in {flag_name(step, name): o for step, flags in steps.items() for name, o in flags.items()}.items():
        options = {**options, "default": None}
        if "const" in options:
            options["const"] = str(options["const"])
        if "choices" not in options:
            options["type"] = as_typed(options.get("type", str))
        if name == "levels":
            options["help"] = f"codebook size of each level (by the items: {PER_CODE} to a code, {MOST_CODES} codes at most)"
        add(f"--{name}", **options)
    return parser


def as_typed(kind: Callable[[str], Any]) -> Callable[[str], str]:
    """A flag type that checks a text as `kind` does, and keeps the text."""

    def checked(text: str) -> str:
        kind(text)
        return text

    return checked


def method_in(arguments: list[str]) -> str:
    """The --method that was typed, which decides what other flags there are; a wrong one is refused with all flags."""
    typed = [text.removeprefix("--method=") for text in arguments if text.startswith("--method=")]
    typed += [value for flag, value in pairwise(arguments) if flag == "--method"]
    return typed[-1] if typed and typed[-1] in METHODS else "rqkmeans"


def chain(flags: argparse.Namespace, steps: dict[str, Flags]) -> list[Step]:
    """The five steps in order."""

    def path(ending: str) -> Path:
        return flags.output_dir / f"{flags.name}.{ending}"

    def given(step: str) -> dict[str, str]:
        usual = {name: str(settings.DEFAULTS[name]) for name in settings.OF_THE_TRAINING_FILES} if step == "csvs" else {}
        values = {name: getattr(flags, flag_name(step, name)) for name in steps[step]}
        return usual | {name: value for name, value in values.items() if value is not None}

    def arguments(step: str, *places: object) -> list[str]:
        return [*(part for name, value in given(step).items() for part in (f"--{name}", value)), *map(str, places)]

    def made_of(step: str, **files: str) -> dict[str, str]:
        decided = {name: value for name, value in given(step).items() if step == "quantizer" or name not in NOT_DECIDING}
        places = {name: Path(file) for name, file in files.items()}
        return decided | {name: hub_address(place) or content_hash(place) for name, place in places.items()}

    items, index, quantizer = path("item.json"), path("index.json"), path(flags.method)
    embeddings = text2emb.default_output(items, flags.encoder)
    tables = {"interactions": flags.interactions, "items": flags.items}
    encoder = {"encoder": flags.encoder} if Path(flags.encoder).is_dir() else {}
    place = ("--output_dir", flags.output_dir, "--name", flags.name)
    data = ("--item_file", items, "--data_path", embeddings, "--ckpt_path", quantizer)

    def quantizer_arguments() -> list[str]:
        sizes = ",".join(map(str, levels_for(len(read_items(items)))))
        return arguments("quantizer", *data, *(() if flags.levels else ("--levels", sizes)))

    fitted = (embeddings.with_suffix(".tfidf"),) if flags.encoder == "tfidf" else ()
    csvs = *(path(f"{part}.{flags.output_format or 'csv'}") for part in ("train", "valid", "test")), path("info.txt")
    return [
        Step(
            "prepare",
            prepare.main,
            lambda: arguments("prepare", *place),
            made_of("prepare", **tables),
            (items, path("item_ids.csv")),
        ),
        Step(
            "text2emb",
            text2emb.main,
            lambda: arguments("text2emb", "--item_file", items, "--output", embeddings),
            made_of("text2emb", **encoder),
            (embeddings, record_file(embeddings), *fitted),
        ),
        Step(
            "quantizer",
            METHODS[flags.method],
            quantizer_arguments,
            {"method": flags.method, **made_of("quantizer")},
            (quantizer,),
        ),
        Step(
            "index",
            generate_indices.main,
            lambda: arguments("index", *data, "--output", index),
            made_of("index"),
            (index,),
        ),
        Step("csvs", prepare.main, lambda: arguments("csvs", *place, "--index", index), made_of("csvs", **tables), csvs),
    ]


def training_command(output_dir: Path, name: str, kind: str) -> str:
    """The line that trains on what was made, as it is typed where build was."""
    here = Path.cwd() == ROOT
    folder = output_dir if here or output_dir.is_absolute() else output_dir.resolve()
    usual = ROOT / ".venv/bin/python"
    chosen = usual if os.access(usual, os.X_OK) else Path(shutil.which("python3") or "python3")
    own = Path(sys.executable)
    variables = {} if chosen.parent == own.parent else {"PYTHON": str(own)}
    variables |= {"CATEGORY": name, "DATA_DIR": str(folder), "BASE_MODEL": "Qwen/Qwen2.5-0.5B"}
    if kind != "csv":
        variables |= {"TRAIN_FILE": str(folder / f"{name}.train.{kind}"), "EVAL_FILE": str(folder / f"{name}.valid.{kind}")}
    script = "sft.sh" if here else shlex.quote(str(ROOT / "sft.sh"))
    return " ".join(
        [*(f"{key}={shlex.quote(value)}" for key, value in variables.items()), f"bash {script} --freeze_LLM True"]
    )


@command_line.command("build")
def main(argv: list[str] | None = None) -> None:
    """Two tables -> item file, embeddings, quantizer, index and CSVs; the training command on standard output."""
    argv = sys.argv[1:] if argv is None else argv
    steps_flags = flags_of_steps(method_in(argv))
    flags = make_parser(steps_flags).parse_args(argv)
    command_line.single_process("build")
    flags.name = flags.name or command_line.plain_name(flags.output_dir.resolve().name)
    flags.encoder = flags.encoder or "tfidf"
    if flags.items is None:
        raise InputError("--items is missing; SIDs are made of the items' titles and descriptions")
    steps = chain(flags, steps_flags)
    record = BuildRecord(flags.output_dir / f"{flags.name}.build.json")
    to_do = record.plan(steps, anew=flags.overwrite)
    for number, step in enumerate(steps, 1):
        log.info(
            "%s %-9s  %-5s  %s%s",
            number,
            step.name,
            "to do" if step.name in to_do else "done",
            ", ".join(path.name for path in step.outputs),
            f"  ({to_do[step.name]})" if step.name in to_do else "",
        )
    if not flags.overwrite:
        for step in steps:
            if step.name in to_do:
                record.check_own(step)
    if flags.plan:
        return
    check_output(record.path)
    for number, step in enumerate(steps, 1):
        if step.name in to_do:
            arguments = step.arguments()
            log.info("%s of %s: %s %s", number, len(steps), step.main.__module__, shlex.join(arguments))
            new_folder = not flags.output_dir.exists()
            record.start(step, steps)
            try:
                step.main([*arguments, "--overwrite"])
            except SystemExit:
                record.forget_nothing(new_folder=new_folder)
                raise
            record.finish(step)
    index = flags.output_dir / f"{flags.name}.index.json"
    log.info("look at the SIDs: python -m rq.report %s; train:", shlex.quote(str(index)))
    command_line.show(training_command(flags.output_dir, flags.name, flags.output_format or "csv"))


if __name__ == "__main__":
    main()
