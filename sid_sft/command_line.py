"""Command-line flags from a function's signature: every flag is checked before anything runs.

def resize(*, width: int = 80, image: str = "") -> None: ...

run(resize, ["--width", "8x"], program="resize.py")   # exit code 2: "resize.py: --width '8x' is no whole number"
"""

from __future__ import annotations

import difflib
import inspect
import logging
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

import fire

from sid_sft.files import InputError

logger = logging.getLogger("sft.command_line")


def world_size() -> int:
    """Processes of this run, as torchrun tells them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def run(function: Callable, arguments: list[str], *, program: str) -> int:
    """Runs a command line; returns the exit code. What a user can mend ends in one line, which rank 0 writes."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("sft").setLevel(logging.INFO if rank() == 0 else logging.ERROR)
    if {"--help", "-h"} & set(arguments):
        arguments = ["--help"]
    try:
        if arguments != ["--help"]:
            check_command_line(function, arguments)
        fire.Fire(fire.decorators.SetParseFn(str)(function), command=arguments, name=program)
    except InputError as error:
        if rank() == 0:
            logger.error(str(error) if str(error).startswith(program) else f"{program}: {error}")
        return 2
    return 0


def check_command_line(function: Callable, arguments: list[str]) -> None:
    """Refuses what fire would only complain about after the run: unknown flags, loose words, a flag given twice."""
    known = list(inspect.signature(function).parameters)
    seen = set()
    expects_value = False
    for argument in arguments:
        if not argument.startswith("--"):
            if not expects_value:
                raise InputError(f"{argument!r} belongs to no flag; expected --flag value")
            expects_value = False
            continue
        name, equals, _ = argument[2:].partition("=")
        if name not in known:
            raise InputError(f"unknown flag --{name}{suggestion(name, known)}; --help lists them")
        if name in seen:
            raise InputError(f"--{name} is given twice")
        seen.add(name)
        expects_value = not equals


def typed_flags(function: Callable, values: dict[str, Any]) -> types.SimpleNamespace:
    """The values of a function's parameters in the types of its signature; a command line gives them all as text."""
    hints = typing.get_type_hints(function)
    names = inspect.signature(function).parameters
    return types.SimpleNamespace(**{name: convert(name, values[name], hints[name]) for name in names})


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


def tell(text: str) -> None:
    """The answer a user asked for goes to standard output; the log goes to standard error."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
