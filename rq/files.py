"""Files, read so that a fault is one line, and written so that nothing is ever half there.

    with whole_file(Path("X.index.json")) as file:   # writes .X.index.json.4711.part; X.index.json stays as it was
        file.write('{"0": ["<a_12>"]\n}\n')          # X.index.json is replaced when the block ends well

Standard library only: every module of rq may import this one, and this one imports no other.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any


class InputError(ValueError):
    """Input the user can correct: the message says where, what came, what was expected, what to do."""


def read_json(path: Path, *, expected: str, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The content of a JSON file; InputError where the file holds no JSON.

    `expected` ends that message, such as "{'0': {'title': ..}, ..}"; `object_pairs_hook` is the one of json.loads.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=object_pairs_hook)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); expected {expected}") from error


@contextlib.contextmanager
def whole_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, for a file or a folder: it becomes `path` if the block ends well, else it vanishes.

    A folder that is replaced is renamed first and deleted last, so that one of the two is there at any time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            replaced = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.replace(path, replaced)
            os.replace(temporary, path)
            shutil.rmtree(replaced)
        else:
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[str]]:
    """An open text file, UTF-8, newlines as written, that becomes `path` if the block ends well."""
    with whole_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        yield file
