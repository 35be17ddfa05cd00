"""Files, read so that a fault is one line, and written so that nothing is ever half there.

    read_json(Path("X.index.json"), "an index")  -> InputError "X.index.json: is empty; expected an index"
    with whole_folder(Path("final_checkpoint")) as scratch:    # final_checkpoint.tmp, renamed when the block ends well
        model.save_pretrained(scratch)
    with whole_file(Path("metrics.json")) as scratch:          # metrics.json.tmp, likewise
        scratch.write_text("{}")

What is written so follows the umask, whoever wrote it: safetensors gives its files to their owner alone.

The lowest module of sid_sft: it imports no other.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import reprlib
import shutil
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

QUOTED = 60  # characters of what a user gave that a message quotes
LONGEST_PATH = 200  # characters of a path on the command line that a message shows
LONGEST_LINE = 2**25  # bytes of a line of text: a longer one is no CSV of interactions, and would fill the memory


class InputError(ValueError):
    """What a user gave cannot be used; the message is one line: where, what came, what was expected, what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(plain(message))


def plain(text: str) -> str:
    """Text with escapes for what a terminal would obey or not show: "Mug\x1b[2J" -> "Mug\\x1b[2J", "é" stays."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def cut(text: str, most: int = QUOTED) -> str:
    """Plain text of at most so many characters, with dots where something is left out: cut("Kettle", 5) -> "Ke..."."""
    text = plain(text[: most + 1])
    return text if len(text) <= most else text[: most - 3] + "..."


def shown(value: Any, most: int = QUOTED) -> str:
    """A value as a message quotes it, in at most so many characters between its quotes: "Mug\n" -> "'Mug\\n'"."""
    if isinstance(value, str):
        text = repr(value[: most + 1])  # of a long text, no more is made than shown
        return text if len(text) <= most + 2 else text[: most - 2] + "..." + text[0]
    try:
        return cut(reprlib.repr(value), most)
    except ValueError:  # whole numbers of thousands of digits, of which Python makes no text
        return f"{type(value).__name__} of too many digits"


class FaultHere(InputError):
    """A fault of the machine that one process of several may meet alone, such as a full disk: that process tells it."""


def error_text(error: Exception) -> str:
    """An exception as one line: FileNotFoundError(2, "No such file or directory", ...) -> "No such file or directory"."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return " ".join(text.split())


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """While millions of objects are made, none of them in a cycle, Python's search for cycles takes half the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_json(path: Path, expected: str) -> Any:
    """The content of a JSON file; InputError names the file and the line when it is missing, empty or broken."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error_text(error)}); expected {expected}") from None
    if not text.strip():
        raise InputError(f"{path}: is empty; expected {expected}")
    return json_value(text, str(path), expected)


def json_value(text: str, where: str, expected: str) -> Any:
    """The value of a JSON text; InputError begins with `where`, the text's file or line, when it is broken."""
    try:
        content = json.loads(text, object_pairs_hook=distinct_keys)
        if "\\ud" in text.lower():  # an emoji is two of these; one alone is no character, and nothing can write it
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        near = error.object[max(error.start - 30, 0) : error.start + 1].encode("ascii", "backslashreplace").decode()
        raise InputError(f"{where}: holds half a character at the end of {near!r}; mend or remove it") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not JSON ({error_text(error)}); expected {expected}") from None
    return content


def distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object from its pairs; ValueError where a key stands twice, since Python would keep the last without a word."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shown(twice)} stands twice in one object")
    return content


def read_lines(path: Path, expected: str = "a UTF-8 CSV") -> Iterator[str]:
    """The lines of a UTF-8 text file; InputError names the line that is not UTF-8 or holds a NUL byte."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
                if len(line) == LONGEST_LINE:
                    raise InputError(f"{path}:{number}: is a line of {LONGEST_LINE:,} bytes or more; expected {expected}")
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise InputError(f"{path}:{number}: is not UTF-8 ({error_text(error)}); save it as UTF-8") from None
                if "\0" in text:
                    raise InputError(f"{path}:{number}: holds a NUL byte; expected {expected}")
                yield text
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error_text(error)}); expected {expected}") from None


def one_line(text: str) -> str:
    """Text with every run of white space made one space, since a title must not end its line: "Saw \\n x" -> "Saw x"."""
    return " ".join(text.split())


def join_or(values: Iterable) -> str:
    """[3, 4] -> "3 or 4"."""
    return " or ".join(str(value) for value in values)


def file_hash(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error_text(error)})") from None


def content_hash(*values: Any) -> str:
    """24 hexadecimal digits that differ where the JSON of the values differs: a folder's name in the dataset cache."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:24]


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder under a temporary name to write into; it becomes `folder` when the block ends well.

    What is replaced is renamed first and deleted last: whenever the process is killed, one of the two is whole.
    """
    scratch, old = (folder.with_name(folder.name + suffix) for suffix in (".tmp", ".old"))
    remove(scratch)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        follow_umask(scratch)
        if os.path.lexists(folder):
            remove(old)
            os.replace(folder, old)
        os.replace(scratch, folder)
        remove(old)
    finally:
        remove(scratch)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write a file to; it becomes `path` when the block ends well."""
    scratch = path.with_name(path.name + ".tmp")
    try:
        yield scratch
        follow_umask(scratch)
        os.replace(scratch, path)
    finally:
        remove(scratch)


def remove(path: Path) -> None:
    """Deletes what stands at a path, a file, a link or a folder with all it holds, as far as that is allowed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def follow_umask(path: Path) -> None:
    """Gives a file, or every file and folder below a folder, the mode that open() and mkdir() give: 0o666 or 0o777
    less the umask. A folder keeps the bit that hands its group on."""
    mask = os.umask(0o077)
    os.umask(mask)
    for entry in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if entry.is_symlink() or (entry.is_file() and entry.stat().st_nlink > 1):
            continue  # what is a file of another folder, too, keeps its mode
        mode = entry.stat().st_mode
        wanted = (0o777 | mode & stat.S_ISGID if entry.is_dir() else 0o666) & ~mask
        if stat.S_IMODE(mode) != wanted:
            with contextlib.suppress(OSError):  # a file system without modes
                entry.chmod(wanted)
