"""Commands whose flags stand in a frozen record: the type, default, help and range of a flag are written there alone.

@dataclass(frozen=True, kw_only=True)
class ResizeFlags:
    image: str = flag("", "picture to read", required=True, is_file=True)
    width: int = flag(80, "pixels", at_least(1))

@command(ResizeFlags)
def resize(flags: ResizeFlags) -> None:
    "Make a picture smaller."

resize(image="a.png", width=40)                                   # from Python
run(resize, ["--image", "a.png", "--width", "8x"], program="resize.py")
# exit code 2: "resize.py: --width '8x' is no whole number"
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import functools
import inspect
import logging
import math
import os
import signal
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fire

from sid_sft.files import LONGEST_PATH, FaultHere, InputError, cut, error_text, plain, shown
from sid_sft.parts import parts_of

logger = logging.getLogger("sft.command_line")

Flags = TypeVar("Flags")
LARGEST = 2**32 - 1  # the largest number that a flag takes, and the largest seed that NumPy takes


# ---------------------------------------------------------------------------------------------- what is known of a flag


class Range(NamedTuple):
    """Which numbers a flag takes. words: they complete '--width 0 must be ...'."""

    words: str
    holds: Callable[[float], bool]


def from_to(least: float, most: float) -> Range:
    return Range(f"from {least} to {most}", lambda value: least <= value <= most)


def at_least(least: float) -> Range:
    return Range(f"at least {least}", lambda value: value >= least)


def above(bound: float, most: float = math.inf) -> Range:
    words = f"above {bound}" + (f", at most {most}" if most < math.inf else "")
    return Range(words, lambda value: bound < value <= most)


SHARE = from_to(0, 1)
COUNT_OR_ALL = Range("positive, or -1 for no limit", lambda value: value == -1 or value > 0)


class About(NamedTuple):
    """What a record knows of a flag beside its type and default."""

    help: str
    range: Range | None
    choices: tuple[str, ...]
    if_unset: str  # what stands in for a flag that is left out, where its default cannot say it
    in_sft_sh: str  # what sft.sh gives for a flag that is left out, if anything
    required: bool
    is_file: bool
    several: bool

    def meaning(self) -> str:
        """'pixels (at least 1)'."""
        words = self.range.words if self.range else ", ".join(self.choices)
        return f"{self.help} ({words})" if words else self.help


def flag(
    default: Any,
    help: str,
    range: Range | None = None,
    *,
    choices: tuple[str, ...] = (),
    if_unset: str = "",
    in_sft_sh: str = "",
    required: bool = False,
    is_file: bool = False,
    several: bool = False,
) -> Any:
    """A field of a record of flags. is_file: where it is given, such a file must exist; several: or some (parts.py)."""
    about = About(help, range, choices, if_unset, in_sft_sh, required, is_file, several)
    return dataclasses.field(default=default, metadata={"about": about})


def same_flag(record: type, name: str, help: str, *, if_unset: str = "") -> Any:
    """A flag that another record has too: its default and range are taken from there, its words are its own."""
    (field,) = [field for field in dataclasses.fields(record) if field.name == name]
    about = field.metadata["about"]
    required = about.required and not if_unset
    about = about._replace(help=help, if_unset=if_unset, required=required, in_sft_sh="")
    return dataclasses.field(default=field.default, metadata={"about": about})


def flags_of(record: Any) -> dict[str, About]:
    """The names of a record's flags, in order, and what is known of each."""
    return {field.name: field.metadata["about"] for field in dataclasses.fields(record)}


# ---------------------------------------------------------------------------------------------- from text to a record


def read_flags(record: type[Flags], values: Mapping[str, Any]) -> Flags:
    """A record from what a user gave: each flag in its type and range, all that is required there, every file too."""
    types = typing.get_type_hints(record)
    flags = record(**{name: convert(name, value, types[name]) for name, value in values.items()})
    for name, about in flags_of(record).items():
        check_flag(name, getattr(flags, name), about)
    return flags


def check_flag(name: str, value: Any, about: About) -> None:
    if value is None or value == "":
        if about.required:
            raise InputError(f"--{name} is missing")
        return
    if about.range and not about.range.holds(value):
        raise InputError(f"--{name} {value:g} must be {about.range.words}")
    if about.choices and value not in about.choices:
        like = suggestion(value, about.choices)
        raise InputError(f"--{name} {shown(value)}{like}; expected one of {', '.join(about.choices)}")
    if about.several:
        try:
            parts_of(Path(value))
        except InputError as error:
            raise InputError(f"--{name} {error}") from None
    elif about.is_file and not os.path.isfile(value):
        raise InputError(f"--{name} {cut(value, LONGEST_PATH)}: there is no such file")


def convert(name: str, value: Any, hint: Any) -> Any:
    """A flag's value in its type."""
    options = typing.get_args(hint) or (hint,)
    kind = options[0]
    if value is None and type(None) in options:
        return None
    if kind is str:
        return utf8(name, str(value))
    if kind is not bool:
        return number_of(name, value, kind)
    if isinstance(value, bool):
        return value
    text = value if isinstance(value, str) else shown(value)
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    raise InputError(f"--{name} {shown(text)} is neither True nor False")


def number_of(name: str, value: Any, kind: type[int] | type[float]) -> float:
    """A flag's number; InputError where it is none, or larger than any that a run could use."""
    try:
        number = value if type(value) in (int, kind) else kind(str(value))
    except ValueError:
        raise InputError(f"--{name} {shown(str(value))} is no {'whole number' if kind is int else 'number'}") from None
    if type(number) is float and not math.isfinite(number):
        raise InputError(f"--{name} {shown(str(value))} is no finite number")
    if abs(number) > LARGEST:
        raise InputError(f"--{name} {shown(value)} is beyond {LARGEST}")
    return kind(number)


def utf8(name: str, value: str) -> str:
    """A flag's text. InputError where its bytes on the command line are not UTF-8: Python reads them as half characters."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"--{name} {shown(value)} is not UTF-8") from None
    if "\0" in value:
        raise InputError(f"--{name} {shown(value)} holds a NUL byte")
    return value


def suggestion(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


# ---------------------------------------------------------------------------------------------- commands


def command(record: type[Flags]) -> Callable[[Callable[[Flags], None]], Callable[..., None]]:
    """Lets a function of one record be called with the flags as keyword arguments, and be read by fire and by help()."""

    def wrap(function: Callable[[Flags], None]) -> Callable[..., None]:
        types = typing.get_type_hints(record)
        signature = inspect.Signature(
            [
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=types[field.name]
                )
                for field in dataclasses.fields(record)  # type: ignore[arg-type]
            ]
        )

        @functools.wraps(function)
        def called(*args: Any, **values: Any) -> None:
            signature.bind(*args, **values)  # TypeError, as of any function that has no such argument
            function(read_flags(record, values))

        called.__signature__ = signature  # type: ignore[attr-defined]
        called.__doc__ = f"{function.__doc__}\n\nArgs:\n{help_lines(record)}"
        return called

    return wrap


def help_lines(record: type) -> str:
    """One line per flag, as fire reads them from a docstring."""
    return "\n".join(
        f"    {name}: {about.meaning()}" + (f"; default: {about.if_unset}" if about.if_unset else "")
        for name, about in flags_of(record).items()
    )


# Loggers that tell at every start, where the library is merely installed, which fast kernels this machine has no use for.
OPTIONAL_KERNELS = ("bitsandbytes", "torchao", "torch.utils._pytree")


def run(function: Callable[..., None], arguments: list[str], *, program: str) -> int:
    """Runs a command line; returns the exit code. What a user can mend ends in one line, which rank 0 writes.

    0: all is well; 2: what was given cannot be used; 130, 143, 129: stopped by Ctrl-C, SIGTERM, SIGHUP.
    A FaultHere is written by the process that met it.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("sft").setLevel(logging.INFO if rank() == 0 else logging.ERROR)
    for library in OPTIONAL_KERNELS:
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        if {"--help", "-h"} & set(arguments):
            fire.Fire(function, command=["--help"], name=program)  # shows the help and exits
        words = one_word_each(function, arguments)
        fire.Fire(fire.decorators.SetParseFn(str)(function), command=words, name=program)
    except InputError as error:
        if rank() == 0 or isinstance(error, FaultHere):
            logger.error(str(error) if str(error).startswith(program) else f"{program}: {error}")
        return 2
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise  # of a connection, not of a file
        where = f"{error.filename}: " if error.filename else ""
        logger.error(f"{program}: {where}{error_text(error)}; what was written before it is not whole")
        return 2
    except KeyboardInterrupt as stop:  # Ctrl-C, or one of the signals of StopSignals
        if rank() == 0:
            logger.error(f"{program}: {str(stop) or 'stopped by Ctrl-C'}")
        return 128 + getattr(stop, "signum", signal.SIGINT)
    return 0


def one_word_each(function: Callable[..., None], arguments: list[str]) -> list[str]:
    """The arguments with each flag as one word: ["--seed", "1", "--check"] -> ["--seed=1", "--check=True"].

    Refuses what fire would only complain about after the run (unknown flags, loose words, a flag given twice), and leaves
    it nothing to guess: to fire, the value of `--category -x` is a flag of its own.
    """
    known = list(inspect.signature(function).parameters)
    found: dict[str, str | None] = {}
    waiting = ""  # the flag that the next word may belong to
    for argument in arguments:
        if not argument.startswith("--"):
            if not waiting:
                raise InputError(f"{shown(argument)} belongs to no flag; expected --flag value")
            found[waiting], waiting = argument, ""
            continue
        name, equals, value = argument[2:].partition("=")
        if name not in known:
            raise InputError(f"unknown flag --{cut(name)}{suggestion(name, known)}; --help lists them")
        if name in found:
            raise InputError(f"--{name} is given twice")
        found[name], waiting = (value, "") if equals else (None, name)
    return [f"--{name}={'True' if value is None else value}" for name, value in found.items()]


def world_size() -> int:
    """Processes of this run, as torchrun tells them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def quiet_other_ranks() -> None:
    """Of the libraries, too, only rank 0 speaks, and of their warnings none."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    if rank() > 0:
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()


class PlainLines(logging.Formatter):
    """Messages whose lines hold nothing that a terminal would obey: titles and paths may hold anything."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(plain, super().format(record).split("\n")))


def tell(lines: Iterable[str]) -> None:
    """The answer a user asked for goes to standard output, as plain lines; the log goes to standard error."""
    text = "".join(plain(line) + "\n" for line in lines)
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()
