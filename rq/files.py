"""Files, read so that a fault is one line, and written so that nothing is ever half there.

    with whole_file(Path("X.index.json")) as file:   # writes .X.index.json.4711.part; X.index.json stays as it was
        file.write('{"0": ["<a_12>"]\n}\n')          # X.index.json is replaced when the block ends well

What a file holds can be anything, terminal escapes among it, so messages quote it by `shown` and are plain by `one_line`.
Standard library only: every module of rq may import this one, and this one imports no other.
"""

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

MOST_SHOWN = 60  # characters of a value that a message quotes
MOST_TOLD = 160  # characters of another library's error, which may quote a value, too
MOST_NESTED = 100  # lists in lists; Python itself gives up at about 1000


class InputError(ValueError):
    """Input the user can correct: the message says where, what came, what was expected, what to do, in one plain line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """Text as one line that a terminal can only show, not obey: "Saw \\n \\x1b[2J" -> "Saw \\\\x1b[2J"."""
    line = " ".join(text.split())
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def shown(value: object) -> str:
    """A value as a message quotes it, at most 60 characters: "Saw" -> "'Saw'", "x" * 99 -> "'xxxxxx..", [1, "\\x1b"] ->
    "[1, '\\\\x1b']".
    """
    text = repr(value[:MOST_SHOWN] if isinstance(value, str) else value)
    if isinstance(value, str) and len(value) > MOST_SHOWN:
        text += ".."
    text = one_line(text)
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 2] + ".."


def named(text: str) -> str:
    """A name as a message has it, without quotes, at most 60 characters."""
    return one_line(text)[:MOST_SHOWN]


def told(error: BaseException) -> str:
    """What an exception says, in a line that is not too long: OSError(28, "No space left on device") -> its text alone."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = one_line(text) or type(error).__name__
    return line if len(line) <= MOST_TOLD else line[: MOST_TOLD - 2] + ".."


# ---------------------------------------------------------------------------------------------- JSON


def read_json(path: Path, *, expected: str, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The content of a JSON file; InputError where the file holds no JSON, or a key twice, or half a character.

    `expected` ends that message, such as "{'0': {'title': ..}, ..}"; `object_pairs_hook` is the one of json.loads, in place
    of the check that no key stands twice.
    """
    decoder = json.JSONDecoder(object_pairs_hook=object_pairs_hook or distinct_keys, parse_constant=_no_number)
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"), decoder)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not JSON ({told(error)}); expected {expected}") from error


def parse_json(text: str, decoder: json.JSONDecoder) -> Any:
    """The value of a JSON text; ValueError for all that is wrong, lists in lists without end and half characters too."""
    try:
        content = decoder.decode(text)
    except RecursionError:
        raise ValueError(f"more than {MOST_NESTED} lists or objects in each other") from None
    if text.count("[") + text.count("{") > MOST_NESTED or "\\" in text:
        check_plain(content, escaped="\\" in text)
    return content


def check_plain(content: Any, *, escaped: bool) -> None:
    """ValueError where a value is nested deeper than anything in rq follows, or where its text holds half a character.

    Only text with escapes in it (`escaped`) can hold half a character: "\\ud83d" without the other half of its emoji.
    """
    inner, depth = [content], 0
    while inner := [part for part in inner if isinstance(part, dict | list | tuple)]:
        inner = [value for part in inner for value in (part.values() if isinstance(part, dict) else part)]
        depth += 1
        if depth > MOST_NESTED:
            raise ValueError(f"more than {MOST_NESTED} lists or objects in each other")
    if escaped:
        try:
            json.dumps(content, ensure_ascii=False, default=str, skipkeys=True).encode()
        except UnicodeEncodeError as error:
            near = error.object[max(error.start - 20, 0) : error.start + 1]
            raise ValueError(f"half a character after {shown(near)}") from None


def distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object from its pairs; ValueError where a key stands twice, since json.loads would keep the last in silence."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shown(twice)} stands twice in one object")
    return content


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


# ---------------------------------------------------------------------------------------------- writing


def check_output(path: Path, *, folder_of: Sequence[str] = ()) -> None:
    """InputError, before any work is done, where `path` could not be written at its end.

    `folder_of` says that it becomes a folder, and which files it holds: a folder with others is never replaced.
    """
    if path.name in ("", ".."):
        raise InputError(f"{path}: not the name of a file; expected one to write")
    try:
        if path.is_dir():
            if not folder_of:
                raise InputError(f"{path} is a folder; expected the name of a file to write")
            if other := next((inner.name for inner in path.iterdir() if inner.name not in folder_of), None):
                raise InputError(f"{path} holds {shown(other)}, which would be lost; give the name of a folder of its own")
        elif path.exists() and (folder_of or not path.is_file()):
            raise InputError(f"{path} is {'a file' if path.is_file() else 'no ordinary file'}; give another name")
        there = next(parent for parent in path.absolute().parents if parent.exists())
        if not there.is_dir():
            raise InputError(f"{path}: {there} is a file; expected a folder to write into")
        probe = there / _temporary(path).name
        try:
            with open(probe, "wb") as file:
                file.write(bytes(4096))
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: cannot be written ({told(error)}); free space or give another place")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextlib.contextmanager
def whole_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, for a file or a folder: it becomes `path` if the block ends well, else it vanishes.

    What is replaced by a folder, or is one, is renamed first and deleted last, so that one of the two is there at any time.
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if (temporary.is_dir() and path.exists()) or path.is_dir():
            replaced = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.replace(path, replaced)
            os.replace(temporary, path)
            _remove(replaced)
        else:
            os.replace(temporary, path)
    except OSError as error:
        if error.filename is not None and Path(error.filename) not in (temporary, path, path.parent):
            raise  # another file's
        raise _not_written(path, error) from error
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[str]]:
    """An open text file, UTF-8, newlines as written, that becomes `path` if the block ends well."""
    with whole_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        yield file


def reserve(path: Path) -> None:
    """Take the disk space of a file that is about to be mapped: a full disk is then an OSError, not a crash."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
