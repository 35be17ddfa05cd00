"""Outputs that appear whole or not at all: written under a temporary name beside the target, then moved into place."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def whole_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path; what was written there becomes
    `path` if the block ends well, and vanishes if it does not.
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
def whole_file(path: Path, mode: str = "w") -> Iterator[IO]:
    """An open file that becomes `path` if the block ends well (UTF-8, newlines as written)."""
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    with whole_path(path) as temporary, open(temporary, mode, **text) as file:
        yield file
        file.flush()
