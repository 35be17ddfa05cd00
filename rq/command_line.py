"""What every `python -m rq.x` has in common: its flags, its log, its exit code. Standard library only, so --help is quick.

Exit code 0: done. 2: what a user can mend, said in the last line of standard error, such as

    rq.rqkmeans: E.npy has 40 items, fewer than the 64 centroids of a level; give smaller --levels

1: the run was stopped. The log goes to standard error; only what was asked for, the table of rq.report, goes to
standard output.
"""

import argparse
import codecs
import contextlib
import difflib
import functools
import inspect
import logging
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rq.files import InputError, check_output, named, one_line, shown, told
from rq.parts import parts_of

log = logging.getLogger("rq")

LARGEST_LEVEL = 10**9  # codes
MOST_LAYERS, WIDEST_LAYER = 16, 65_536  # of a network that is asked for
MOST_BEAMS = 1_024  # partial codes of an item at a time
LARGEST_SEED = 2**31 - 64  # every library that takes a seed, also one plus the level, takes this one
LONGEST_REFUSAL = 450  # characters


def switch(text: str) -> bool:
    """`--overwrite`, `--overwrite True` and `--overwrite false` all mean what they say."""
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{shown(text)} is neither true nor false")


def level_sizes(text: str) -> tuple[int, ...]:
    """'256,256,128' -> (256, 256, 128): the codebook size of each level."""
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        sizes = ()
    if not 1 <= len(sizes) <= 25 or not all(2 <= size <= LARGEST_LEVEL for size in sizes):
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not a list of 1 to 25 codebook sizes of 2 or more, like 256,256,256"
        )
    return sizes


def numbers(text: str) -> tuple[float, ...]:
    """'0,0,0.003' -> (0.0, 0.0, 0.003)."""
    try:
        read = tuple(float(number) for number in text.split(","))
    except ValueError:
        read = (math.nan,)
    if not all(0 <= number < math.inf for number in read):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a list of numbers from 0 on, like 0,0,0.003")
    return read


def whole_numbers(text: str) -> tuple[int, ...]:
    """'512,256' -> (512, 256); '' -> ()."""
    try:
        read = tuple(int(number) for number in text.split(",") if number)
    except ValueError:
        read = (0,)
    if len(read) > MOST_LAYERS or not all(1 <= number <= WIDEST_LAYER for number in read):
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not a list of at most {MOST_LAYERS} whole numbers from 1 to {WIDEST_LAYER}, like 512,256"
        )
    return read


def at_least(least: float, *, kind: type = int, most: float = math.inf) -> Callable[[str], float]:
    """A flag type: a number that is no smaller than `least`, no larger than `most`, and not infinite."""

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if value != value:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a {'whole ' if kind is int else ''}number")
        if value < least:
            raise argparse.ArgumentTypeError(f"{shown(value)} is less than {least}")
        if value > most or value == math.inf:
            raise argparse.ArgumentTypeError(f"{shown(value)} is more than {most}")
        return value

    return number


def separator(text: str) -> str:
    """A flag type: what stands between cells; '\\t' and 'tab' are a tab."""
    mark = "\t" if text in ("\\t", "tab") else text
    if not 1 <= len(mark) <= 3 or not mark.isascii() or any(c.isalnum() or c in "\"'\r\n\0" for c in mark):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not what can stand between cells, such as ; or tab or ::")
    return mark


def text_encoding(text: str) -> str:
    """A flag type: the name of an encoding in which ASCII is ASCII, such as latin-1 or gb18030."""
    try:
        name, same = codecs.lookup(text).name, "a,;\t\n".encode(text) == b"a,;\t\n"
    except (LookupError, ValueError):
        name, same = "", False
    if not same:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not an encoding that can be read, such as latin-1 or gb18030; save other files as UTF-8"
        )
    return name


def plain_name(text: str) -> str:
    """A flag type: what file names can begin with, such as 'Shop', and nothing that leads to another folder."""
    if not text.isprintable() or set(text) & set("/\\") or text.startswith(".") or not 0 < len(text.encode()) <= 200:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a plain name, like Shop: it becomes part of file names")
    return text


def existing(text: str) -> Path:
    """A flag type: a file or folder to read, refused at once when it is missing."""
    path = Path(text)
    if not text or not path.exists():
        raise argparse.ArgumentTypeError(f"{one_line(text) or 'nothing'}: no such file")
    return path


def existing_files(text: str) -> Path:
    """A flag type: a file to read, or several (parts.py), refused at once where there is none."""
    try:
        if not Path(text).exists():
            parts_of(Path(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


# The flags several commands share: one meaning, one default, one help text.
SHARED_FLAGS: dict[str, dict] = {
    "item_file": {
        "type": existing,
        "metavar": "X.item.json",
        "help": "the items, to check the rows of --data_path against",
    },
    "data_path": {
        "type": existing,
        "metavar": "E.npy",
        "help": "embeddings, (N items, D); row i is the i-th smallest item id",
    },
    "levels": {
        "type": level_sizes,
        "default": (256, 256, 256),
        "metavar": "K1,K2,..",
        "help": "codebook size of each level (256,256,256)",
    },
    "ckpt_path": {
        "type": Path,
        "metavar": "FOLDER",
        "help": "the quantizer: a folder with model.safetensors and config.json",
    },
    "output": {"type": Path, "metavar": "FILE", "help": "the file to write"},
    "codes_output": {
        "type": Path,
        "metavar": "C.npy",
        "help": "also save the codes, int32 (N items, L levels), before collisions are resolved",
    },
    "seed": {"type": at_least(0, most=LARGEST_SEED), "default": 42, "help": "seed of everything random (42)"},
    "device": {"default": "auto", "help": "auto, cpu, cuda, cuda:1, .. (auto: cuda where there is one)"},
    "collisions": {
        "choices": ("token", "relocate", "keep"),
        "default": "token",
        "help": "items with equal codes: an extra <d_k> token on each (default), "
        "the last level moved to the nearest free code, or left alone",
    },
    "capacity": {
        "type": at_least(1),
        "default": 1,
        "help": "with --collisions relocate: how many items one SID may hold (1)",
    },
    "overwrite": {
        "type": switch,
        "nargs": "?",
        "const": True,
        "default": False,
        "help": "replace outputs that exist already",
    },
}
QUANTIZER_FLAGS = tuple(SHARED_FLAGS)
SHARED_FLAGS["fit_sample"] = {
    "type": at_least(2),
    "metavar": "N",
    "help": "random items to make the first codebooks of (256 for each code of the largest level; k-means takes no more)",
}
FITTING_FLAGS = (*QUANTIZER_FLAGS, "fit_sample")
OUTPUT_FLAGS = ("output", "codes_output", "ckpt_path")
CHECKPOINT_FILES = ("model.safetensors", "config.json")  # the folder --ckpt_path


TELL_FLAGS: list[str] = []  # in place of arguments, by identity: a command then tells its flags and does no more


class FlagsTold(Exception):
    """What a command answers to TELL_FLAGS; its argument is {"--k_core": {"type": .., "help": ".."}, ..}."""


def flags_of(main: Callable[..., None]) -> dict[str, dict[str, Any]]:
    """The flags of a command as its `main` adds them to its parser, without the dashes: {"k_core": {"help": ".."}, ..}."""
    try:
        inspect.unwrap(main)(TELL_FLAGS)
    except FlagsTold as told_by:
        return {name.removeprefix("--"): options for name, options in told_by.args[0].items()}
    raise AssertionError(f"{main} parses no arguments")


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the flag that was probably meant."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.flags: dict[str, dict[str, Any]] = {}
        super().__init__(*args, **options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:  # type: ignore[override]
        """As in argparse; the flag is remembered for `parse_args` and `flags_of`."""
        self.flags |= {name: options for name in names if name.startswith("--")}
        return super().add_argument(*names, **options)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse; an unknown flag is named before a missing one, of which it may be a misspelling."""
        if args is TELL_FLAGS:
            raise FlagsTold(self.flags)
        args = sys.argv[1:] if args is None else args
        for flag in (argument.split("=")[0] for argument in args if argument.startswith("--")):
            if flag not in self.flags:
                near = difflib.get_close_matches(flag, self.flags, n=1)
                self.error(
                    f"unknown flag {named(flag)}" + (f" (did you mean {near[0]}?)" if near else f" (see {self.prog} --help)")
                )
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line on stderr."""
        self.exit(2, _refusal(self.prog, message))


def parser(name: str, documentation: str, *, shared: Sequence[str], required: Sequence[str] = ()) -> OneLineParser:
    """A parser for `python -m rq.<name>` with the shared flags named in `shared`, those in `required` mandatory."""
    first_paragraph = " ".join(documentation.split("\n\n")[0].split())
    made = OneLineParser(prog=f"rq.{name}", description=first_paragraph, allow_abbrev=False)
    for flag in shared:
        made.add_argument(f"--{flag}", **SHARED_FLAGS[flag], required=flag in required)
    return made


def refuse_to_overwrite(flags: argparse.Namespace, *, outputs: Sequence[str] = OUTPUT_FLAGS) -> None:
    """Stop where an output of this run exists and --overwrite was not given, where it would replace an input or another
    output, and where it could not be written.
    """
    inputs = {
        path.resolve()
        for name, path in vars(flags).items()
        if isinstance(path, Path) and name not in outputs and path.exists()
    }
    seen: dict[Path, str] = {}
    for name in outputs:
        path = getattr(flags, name, None)
        if path is None:
            continue
        if path.resolve() in inputs:
            raise InputError(f"--{name} {path} is also an input of this run; write to another file")
        if path.resolve() in seen:
            raise InputError(f"--{name} {path} is also --{seen[path.resolve()]}; write to another file")
        seen[path.resolve()] = name
        if path.exists() and not flags.overwrite:
            raise InputError(f"{path} exists; give --overwrite to replace it, or another --{name}")
        if name == "codes_output" and path.suffix != ".npy":
            raise InputError(f"--codes_output {path}: give it a name that ends in .npy")
        check_output(path, folder_of=CHECKPOINT_FILES if name == "ckpt_path" else ())


def single_process(name: str) -> None:
    """Stop a command that uses one process (faiss spreads over cores and GPUs by itself) when several were launched."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(
            f"rq.{name} runs in one process, {named(os.environ['WORLD_SIZE'])} were launched; "
            f"start it with python -m rq.{name}"
        )


def is_first_process() -> bool:
    """True in the one process that logs and writes when several were launched."""
    return os.environ.get("RANK", "0") == "0"


def _refusal(prog: str, message: str) -> str:
    """The line by which standard error is told of a refusal; '' where another process of this machine says the same.

    What was typed may be in it, so its length has a bound.
    """
    line = one_line(message)
    if len(line) > LONGEST_REFUSAL:
        line = f"{line[: LONGEST_REFUSAL // 2]} .. {line[-LONGEST_REFUSAL // 2 :]}"
    return f"{prog}: {line}\n" if os.environ.get("LOCAL_RANK", "0") == "0" else ""


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far in GB (10^9 bytes), mapped pages included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class _OneLine(logging.Formatter):
    """A line of the log: names of files and columns are part of it, and may hold what a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        """The message, plain."""
        return "".join(c if c.isprintable() else one_line(c) for c in super().format(record).replace("\n", " "))


def _log_plainly() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if is_first_process() else logging.ERROR)


def show(text: str) -> None:
    """Write a result that was asked for to standard output, where the log does not go."""
    if is_first_process():
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, which PyTorch says by a RuntimeError."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error)


def command(name: str) -> Callable[[Callable[[list[str] | None], None]], Callable[..., None]]:
    """Decorate `main(argv)`: a plain log, time and peak memory in its last line, and the exit codes named above."""

    def decorate(main: Callable[[list[str] | None], None]) -> Callable[..., None]:
        @functools.wraps(main)
        def run(argv: list[str] | None = None) -> None:
            _log_plainly()
            start_s = time.monotonic()
            with contextlib.suppress(ValueError):  # not the main thread: the caller's signals stay the caller's
                signal.signal(
                    signal.SIGTERM,
                    lambda *_: sys.exit(f"rq.{name}: stopped by SIGTERM; unfinished outputs were removed"),
                )
            try:
                main(argv)
            except (InputError, OSError) as error:
                sys.stderr.write(_refusal(f"rq.{name}", str(error)))
                raise SystemExit(2) from error
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                sys.stderr.write(_refusal(f"rq.{name}", f"out of memory ({told(error)}); give less, or smaller sizes"))
                raise SystemExit(2) from error
            except KeyboardInterrupt:
                raise SystemExit(f"rq.{name}: interrupted; unfinished outputs were removed") from None
            log.info("rq.%s: done in %.1f s, peak memory %.2f GB", name, time.monotonic() - start_s, peak_memory_gb())

        return run

    return decorate
