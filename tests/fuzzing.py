"""What fuzz tests share: how many inputs they try, how odd these are, and what a reader may do with one.

    @fuzz(mutated_json({"0": ["<a_1>"]}))
    def test_an_index_is_read_or_refused(folder, content):         # content: bytes
        path = folder / "X.index.json"
        path.write_bytes(content)
        accepted(lambda: read_index(path), InputError, writes_in=folder)   # fails unless read, or refused in one line

A test tries few inputs, always the same ones. The long run tries as many as it is told to, others each time:

    FUZZ_EXAMPLES=20000 python -m pytest tests/test_fuzz.py --hypothesis-show-statistics
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Hypothesis keeps what it knows of Unicode in a folder, which would otherwise be .hypothesis in the checkout.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(tempfile.gettempdir(), "hypothesis"))

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))  # inputs per test in the long run; 0 for the short one
SHORT_RUN = 60  # inputs per test, unless a test is slow
LONGEST_MESSAGE = 500  # characters


def fuzz(*inputs: st.SearchStrategy, slow: int = 1) -> Callable[[Callable], Callable]:
    """Calls a test with inputs drawn for its last arguments. slow: such a test tries that many times fewer inputs."""

    def wrap(test: Callable) -> Callable:
        return settings(
            max_examples=max((EXAMPLES or SHORT_RUN) // slow, 1),
            derandomize=not EXAMPLES,
            database=None,
            deadline=None,
            phases=[Phase.explicit, Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        )(given(*inputs)(test))

    return wrap


# ---------------------------------------------------------------------------------------------- what a reader may do


def accepted(read: Callable[[], Any], error: type[Exception], *, writes_in: Path) -> bool:
    """Whether `read` takes its input. False where it raises `error`, with a message of one plain line.

    The test fails on any other exception, on a message that is none, and where anything but a file in the folder
    `writes_in` is written, a program is started, text is executed or unpickled, or a connection is made.
    """
    watched.folder, watched.done = str(writes_in), []
    refusal = None
    try:
        read()
    except error as raised:
        refusal = str(raised)
    finally:
        watched.folder = ""
    assert watched.done == [], "it did what no reader may do"
    if refusal is not None:
        check_line(refusal)
    return refusal is None


def check_line(message: str) -> None:
    """A message is short and has no character that a terminal would obey or not show: no line end, no escape, no half."""
    assert message, "a refusal without a word"
    assert len(message) <= LONGEST_MESSAGE, f"{len(message)} characters: {message[:200]!r} ... {message[-200:]!r}"
    odd = [character for character in message if not character.isprintable()]
    assert not odd, f"{odd[:10]} in {message!r}"


class Watched:
    """What Python reports of itself while `folder` is set (an audit hook stays for good, so it must be told when)."""

    folder = ""
    done: list[str]

    forbidden = frozenset({"os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen"}) | frozenset(
        {"pickle.find_class", "socket.connect", "ctypes.dlopen"}
    )
    changing = frozenset({"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"})

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.folder:
            return
        if event in self.forbidden or (event == "exec" and executes_text(arguments[0])):
            self.done.append(f"{event}{arguments}"[:200])
        elif event in self.changing or (event == "open" and writes(*arguments)):
            path = os.path.abspath(os.fsdecode(arguments[0])) if not isinstance(arguments[0], int) else ""
            inside = path.startswith((self.folder, "/dev/null")) or "__pycache__" in path
            if path and not inside:
                self.done.append(f"{event} of {path}")


def executes_text(code: Any) -> bool:
    """Whether the code was made from a text, not from a file: that of eval and exec is named <string>."""
    name = getattr(code, "co_filename", "")
    return name.startswith("<") and not name.startswith("<frozen")


def writes(path: Any, mode: str | None, flags: int) -> bool:
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


watched = Watched()
sys.addaudithook(watched)


# ---------------------------------------------------------------------------------------------- odd inputs

ESCAPES = ["\x1b[2J\x1b]0;owned\x07", "\x9b31m", "\r\n", "\0", "\x7f", "\u2028", "\u202e", "\u200b", "\ufeff"]
HALVES = ["\ud800", "\udfff", "\udc80", "a\ud83d", "\ude00\ud83d"]
LOOK_ALIKES = ["٣", "½", "e\u0301", "ﬁ", "\U000e0041", "🙂" * 40, "K", "1_000", "1e5", "0x10", "-0", "nan", "1e999"]
CODE = ["__import__('os').system('false')", "{0.__class__}", "%s%n", "$(false)", "../../etc/passwd", "'; --", "[" * 300]
LONG = ["x" * 5000, "9" * 5000, "<" + "a" * 3000 + ">", "é" * 2000, "\x1b" * 900]


def odd_text() -> st.SearchStrategy[str]:
    """Text that has broken readers before, or any other: halves of characters, terminal escapes, digits of all kinds."""
    samples = ["", " ", *ESCAPES, *HALVES, *LOOK_ALIKES, *CODE, *LONG]
    everything = st.text(st.characters(codec=None, exclude_categories=()), max_size=20)
    return st.one_of(st.sampled_from(samples), everything)


def odd_numbers() -> st.SearchStrategy[int | float]:
    edges = [0, -1, 1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400, -0.0, 1e-320, 1e308, 0.5]
    return st.one_of(
        st.sampled_from([*edges, float("nan"), float("inf"), float("-inf")]), st.integers(-10, 300), st.floats()
    )


def odd_json(*, leaves: int = 6) -> st.SearchStrategy[Any]:
    """A JSON value of any type: null, booleans, numbers, odd texts, lists and objects of them, {"": [null, "\\x1b"]}."""
    scalars = st.one_of(st.none(), st.booleans(), odd_numbers(), odd_text())
    return st.recursive(
        scalars,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(odd_text(), inner, max_size=3)),
        max_leaves=leaves,
    )


@st.composite
def mutated_tree(draw: Callable, tree: Any) -> Any:
    """A copy of a JSON value with one to three places changed: {"0": ["<a_1>"]} -> {"0": [[["<a_1>"]]]} or {"0": null}."""
    tree = {"root": copy.deepcopy(tree)}
    for _ in range(draw(st.integers(1, 3))):
        holder, key = draw(st.sampled_from(list(places(tree))))
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "wrap", "swap", "repeat", "rename"]))
        if how == "remove" and holder is not tree:
            del holder[key]
        elif how == "wrap":
            holder[key] = draw(st.sampled_from([[holder[key]], {"0": holder[key]}, str(holder[key])]))
        elif how == "swap":
            other, there = draw(st.sampled_from(list(places(tree))))
            holder[key] = copy.deepcopy(other[there])
        elif how == "repeat" and isinstance(holder[key], list):
            holder[key] = holder[key] * draw(st.sampled_from([0, 2, 300]))
        elif how == "rename" and isinstance(holder, dict) and holder is not tree:
            holder[draw(odd_text())] = holder.pop(key)
        else:
            holder[key] = draw(odd_json())
    return tree["root"]


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of every value in a JSON value: holder[key] is the value."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in list(keys):
        yield tree, key
        yield from places(tree[key])


RAW = {  # what a file can hold and json.dumps does not write
    '"raw:digits"': "9" * 5000,
    '"raw:exponent"': "1e999999999",
    '"raw:deep"': "[" * 100_000,
    '"raw:closed"': "[" * 5000 + "]" * 5000,
    '"raw:twice"': '{"title": "a", "title": "b"}',
}


@st.composite
def mutated_json(draw: Callable, tree: Any) -> bytes:
    """The bytes of a JSON file: of a changed copy of `tree`, with text escaped or not, or with changed bytes, or any."""
    how = draw(st.sampled_from(["tree", "tree", "tree", "tree", "raw", "bytes", "other"]))
    if how == "other":
        tree = draw(odd_json())
    elif how != "bytes":
        tree = draw(mutated_tree(tree))
    if how == "raw":
        tree = {"root": tree}
        holder, key = draw(st.sampled_from(list(places(tree))))
        holder[key] = draw(st.sampled_from([name.strip('"') for name in RAW]))
        tree = tree["root"]
    text = json.dumps(tree, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
    for name, raw in RAW.items():
        text = text.replace(name, raw)
    content = text.encode("utf-8", "surrogatepass")
    return draw(mutated_bytes(content)) if how == "bytes" else content


CHUNKS = [b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\xc2\x9b", b"\x1b[2J", b"\r", b'"', b"'", b",", b"\\", b"[" * 1000, b"{"]
CHUNKS += [b"9" * 400, b"\n\n", b"\xef\xbb\xbf", b"-", b"1e5", b"null", b"NaN", b"\\ud800", b"\xf0\x9f", b"\xff" * 8]


@st.composite
def mutated_bytes(draw: Callable, content: bytes) -> bytes:
    """A valid file with one to four changes: a byte, a chunk set in, a part left out, a part twice, its end missing."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(changed) - 1, 0)))
        how = draw(st.sampled_from(["byte", "byte", "insert", "insert", "remove", "repeat", "cut"]))
        length = draw(st.integers(1, 40))
        if how == "byte" and changed:
            changed[at] = draw(st.integers(0, 255))
        elif how == "insert":
            changed[at:at] = draw(st.one_of(st.sampled_from(CHUNKS), st.binary(max_size=8)))
        elif how == "remove":
            del changed[at : at + length]
        elif how == "repeat":
            changed[at:at] = changed[at : at + length] * draw(st.sampled_from([1, 50]))
        else:
            del changed[at:]
    return bytes(changed)
