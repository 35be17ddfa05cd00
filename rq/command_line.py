"""What every `python -m rq.x` has in common: its flags, its log, its exit code. Standard library only, so --help is quick.

Exit code 0: done. 2: what a user can mend, said in the last line of standard error, such as

    rq.rqkmeans: E.npy has 40 items, fewer than the 64 centroids of a level; give smaller --levels

1: the run was stopped. The log goes to standard error; only what was asked for, the table of rq.report, goes to
standard output.
"""

import argparse
import contextlib
import difflib
import functools
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rq.files import InputError

log = logging.getLogger("rq")


def switch(text: str) -> bool:
    """`--overwrite`, `--overwrite True` and `--overwrite false` all mean what they say."""
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def level_sizes(text: str) -> tuple[int, ...]:
    """'256,256,128' -> (256, 256, 128): the codebook size of each level."""
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 2 or len(sizes) > 25:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of 1 to 25 codebook sizes of 2 or more, like 256,256,256")
    return sizes


def numbers(text: str) -> tuple[float, ...]:
    """'0,0,0.003' -> (0.0, 0.0, 0.003)."""
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, like 0,0,0.003") from None


def whole_numbers(text: str) -> tuple[int, ...]:
    """'512,256' -> (512, 256); '' -> ()."""
    try:
        return tuple(int(number) for number in text.split(",") if number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers, like 512,256") from None


def at_least(least: float, *, kind: type = int) -> Callable[[str], float]:
    """A flag type: a number that is no smaller than `least`."""

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None
        if not value >= least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value

    return number


def existing(text: str) -> Path:
    """A flag type: a file or folder to read, refused at once when it is missing."""
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return path


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
    "seed": {"type": int, "default": 42, "help": "seed of everything random (42)"},
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
OUTPUT_FLAGS = ("output", "codes_output", "ckpt_path")


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the flag that was probably meant."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.flags: list[str] = []
        super().__init__(*args, **options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:  # type: ignore[override]
        """As in argparse; the flag is remembered for `parse_args`."""
        self.flags += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **options)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse; an unknown flag is named before a missing one, of which it may be a misspelling."""
        args = sys.argv[1:] if args is None else args
        for flag in (argument.split("=")[0] for argument in args if argument.startswith("--")):
            if flag not in self.flags:
                near = difflib.get_close_matches(flag, self.flags, n=1)
                self.error(
                    f"unknown flag {flag}" + (f" (did you mean {near[0]}?)" if near else f" (see {self.prog} --help)")
                )
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line on stderr."""
        self.exit(2, f"{self.prog}: {message}\n")


def parser(name: str, documentation: str, *, shared: Sequence[str], required: Sequence[str] = ()) -> OneLineParser:
    """A parser for `python -m rq.<name>` with the shared flags named in `shared`, those in `required` mandatory."""
    first_paragraph = " ".join(documentation.split("\n\n")[0].split())
    made = OneLineParser(prog=f"rq.{name}", description=first_paragraph, allow_abbrev=False)
    for flag in shared:
        made.add_argument(f"--{flag}", **SHARED_FLAGS[flag], required=flag in required)
    return made


def refuse_to_overwrite(flags: argparse.Namespace, *, outputs: Sequence[str] = OUTPUT_FLAGS) -> None:
    """Stop when an output of this run exists and --overwrite was not given, or when it would replace an input."""
    inputs = {
        path.resolve()
        for name, path in vars(flags).items()
        if isinstance(path, Path) and name not in outputs and path.exists()
    }
    for name in outputs:
        path = getattr(flags, name, None)
        if path is None:
            continue
        if path.resolve() in inputs:
            raise InputError(f"--{name} {path} is also an input of this run; write to another file")
        if path.exists() and not flags.overwrite:
            raise InputError(f"{path} exists; give --overwrite to replace it, or another --{name}")


def single_process(name: str) -> None:
    """Stop a command that uses one process (faiss spreads over cores and GPUs by itself) when several were launched."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            f"rq.{name} runs in one process, {os.environ['WORLD_SIZE']} were launched; start it with python -m rq.{name}"
        )


def is_first_process() -> bool:
    """True in the one process that logs and writes when several were launched."""
    return os.environ.get("RANK", "0") == "0"


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far in GB (10^9 bytes), mapped pages included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _log_plainly() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if is_first_process() else logging.ERROR)


def show(text: str) -> None:
    """Write a result that was asked for to standard output, where the log does not go."""
    if is_first_process():
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


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
                line = " ".join(str(error).split())
                sys.stderr.write(f"rq.{name}: {line}\n")
                raise SystemExit(2) from error
            except KeyboardInterrupt:
                raise SystemExit(f"rq.{name}: interrupted; unfinished outputs were removed") from None
            log.info("rq.%s: done in %.1f s, peak memory %.2f GB", name, time.monotonic() - start_s, peak_memory_gb())

        return run

    return decorate
