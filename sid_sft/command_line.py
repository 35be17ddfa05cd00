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
import functools
import inspect
import logging
import math
import os
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fire

from sid_sft.files import FaultHere, InputError

logger = logging.getLogger("sft.command_line")

Flags = TypeVar("Flags")


# ---------------------------------------------------------------------------------------------- what is known of a flag


class Range(NamedTuple):
    """Which numbers a flag takes. words: they complete '--width 0 must be ...'."""

    words: str
    holds: Callable[[float], bool]


def at_least(least: float) -> Range:
    return Range(f"at least {least}", lambda value: value >= least)


def above(bound: float) -> Range:
    return Range(f"above {bound}", lambda value: value > bound)


SHARE = Range("from 0 to 1", lambda value: 0 <= value <= 1)
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
) -> Any:
    """A field of a record of flags. is_file: where it is given, such a file must exist."""
    about = About(help, range, choices, if_unset, in_sft_sh, required, is_file)
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
        raise InputError(f"--{name} {value!r}{suggestion(value, about.choices)}; expected one of {', '.join(about.choices)}")
    if about.is_file and not Path(value).is_file():
        raise InputError(f"--{name} {value}: there is no such file")


def convert(name: str, value: Any, hint: Any) -> Any:
    """A flag's value in its type."""
    options = typing.get_args(hint) or (hint,)
    kind = options[0]
    if value is None and type(None) in options:
        return None
    if not isinstance(value, str):
        if isinstance(value, kind) and (kind is bool) == isinstance(value, bool):
            return value
        if kind is float and type(value) is int:
            return float(value)
        value = str(value)
    if kind is str:
        return value
    if kind is bool:
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise InputError(f"--{name} {value!r} is neither True nor False")
    try:
        number = kind(value)
    except ValueError:
        raise InputError(f"--{name} {value!r} is no {'whole number' if kind is int else 'number'}") from None
    if not math.isfinite(number):
        raise InputError(f"--{name} {value!r} is no finite number")
    return number


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


def run(function: Callable[..., None], arguments: list[str], *, program: str) -> int:
    """Runs a command line; returns the exit code. What a user can mend ends in one line, which rank 0 writes.

    A FaultHere is written by the process that met it.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("sft").setLevel(logging.INFO if rank() == 0 else logging.ERROR)
    try:
        if {"--help", "-h"} & set(arguments):
            fire.Fire(function, command=["--help"], name=program)  # shows the help and exits
        words = one_word_each(function, arguments)
        fire.Fire(fire.decorators.SetParseFn(str)(function), command=words, name=program)
    except InputError as error:
        if rank() == 0 or isinstance(error, FaultHere):
            logger.error(str(error) if str(error).startswith(program) else f"{program}: {error}")
        return 2
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
                raise InputError(f"{argument!r} belongs to no flag; expected --flag value")
            found[waiting], waiting = argument, ""
            continue
        name, equals, value = argument[2:].partition("=")
        if name not in known:
            raise InputError(f"unknown flag --{name}{suggestion(name, known)}; --help lists them")
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


def tell(text: str) -> None:
    """The answer a user asked for goes to standard output; the log goes to standard error."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
