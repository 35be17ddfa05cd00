"""The house itself: what lies at the root, how long files are, who imports whom, and what the documents promise."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT

AT_THE_ROOT = {
    *("sft.py", "data.py", "evaluate.py", "sft.sh", "rq", "sid_sft", "tests"),
    *("README.md", "README.zh-CN.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"),
    *("Makefile", "pyproject.toml", "requirements.txt", "requirements-dev.txt", "requirements.lock"),
}
MOST_LINES = 450
FEWER_LINES = {"sft.py": 300, "data.py": 350}

COMMANDS = {"sft", "evaluate"}  # the two at the root; those of rq/ have a main guard
NAMES = {"data"}  # public names for users and the two commands; the package itself does without
HEAVY = {"torch", "transformers", "datasets", "accelerate", "pandas", "matplotlib", "faiss", "sklearn", "duckdb"}

KNOWN_HOSTS = {"arxiv.org", "www.apache.org", "keepachangelog.com"}


def tracked() -> list[str]:
    """The paths of the files that git knows of and that exist."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip(f"not a checkout that git reads: {listed.stderr.strip()}")
    return [path for path in listed.stdout.split("\0") if path and (ROOT / path).exists()]


def text_of(path: str) -> str:
    """The text of a file; "" for a picture."""
    content = (ROOT / path).read_bytes()
    return "" if b"\0" in content else content.decode()


# ---------------------------------------------------------------------------------------------- places and sizes


def test_the_root_holds_the_names_of_the_house_and_no_others():
    assert {path.split("/")[0] for path in tracked() if not path.startswith(".")} == AT_THE_ROOT


def test_no_file_of_code_is_too_long():
    code = [path for path in tracked() if path.endswith((".py", ".sh")) and not path.startswith("tests/")]
    lines = {path: len(text_of(path).splitlines()) for path in code}
    most = {path: FEWER_LINES.get(path, MOST_LINES) for path in code}
    assert {path: f"{lines[path]} lines, at most {most[path]}" for path in code if lines[path] > most[path]} == {}


# ---------------------------------------------------------------------------------------------- imports


def modules() -> dict[str, Path]:
    """Module name -> file, of all that is no test: {"sft": sft.py, "sid_sft.files": sid_sft/files.py, ...}."""
    paths = [*ROOT.glob("*.py"), *(path for room in ("sid_sft", "rq") for path in (ROOT / room).rglob("*.py"))]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def imports(path: Path, known: set[str]) -> set[str]:
    """The modules among `known` that a file imports, wherever the import stands: at the top, in a function, for types."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= submodules & known or {node.module}
    return found & known


def import_graph() -> dict[str, set[str]]:
    files = modules()
    return {name: imports(path, set(files)) for name, path in files.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle, the first one again at the end; [] where there is none. {"a": {"b"}, "b": {"a"}} -> a b a."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for imported in sorted(graph[name]):
                if found := visit(imported, [*path, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def is_command(path: Path) -> bool:
    return 'if __name__ == "__main__":' in path.read_text()


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_imports_of_all_kinds_are_seen(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "from __future__ import annotations\nimport sid_sft.files\nfrom rq import tables\n"
        "if TYPE_CHECKING:\n    import sft\ndef f():\n    from sid_sft.cells import read\n"
    )
    assert imports(path, {"sid_sft", "sid_sft.files", "sid_sft.cells", "rq", "rq.tables", "sft", "data"}) == {
        *("sid_sft.files", "sid_sft.cells", "rq.tables", "sft")
    }


def test_imports_run_in_no_circle():
    """Not even through imports inside functions or for types alone: two modules that need each other are one."""
    found = circle(import_graph())
    assert not found, " -> ".join(found)


def test_no_library_code_imports_a_command():
    files = modules()
    commands = {name for name, path in files.items() if is_command(path)}
    assert commands > COMMANDS
    for name, imported in import_graph().items():
        assert not imported & COMMANDS, name
        if name not in commands:
            assert not imported & commands, name


def test_the_package_does_without_the_root_and_rq_without_everything():
    for name, imported in import_graph().items():
        room = name.split(".")[0]
        rooms = {other.split(".")[0] for other in imported}
        if room == "sid_sft":
            assert rooms <= {"sid_sft"}, name
        elif room == "rq":
            assert rooms <= {"rq"}, name
        elif room in NAMES:
            assert rooms <= {"sid_sft"}, name
        else:
            assert rooms <= {"sid_sft"} | NAMES, name


def test_no_module_is_named_like_a_package_or_like_nothing():
    own = {name.split(".")[-1] for name in modules()}
    assert not own & ({"utils", "helpers", "common", "misc", "numpy"} | HEAVY | set(sys.stdlib_module_names))


@pytest.mark.parametrize("name", sorted(name for name, path in modules().items() if is_command(path)))
def test_help_loads_nothing_heavy(name):
    """As a user types it; Python itself tells what was imported."""
    start = [f"{name}.py"] if name in COMMANDS else ["-m", name]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *start, "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "os" in loaded
    assert not loaded & HEAVY


# ---------------------------------------------------------------------------------------------- documents


def code_lines(text: str) -> list[str]:
    """The lines of a document's code blocks without their comments."""
    blocks = re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE)
    lines = [re.sub(r"(^|\s)#.*", "", line).rstrip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def sections(text: str) -> list[str]:
    return re.split(r"^## ", text, flags=re.MULTILINE)


def code_spans(text: str) -> Counter[str]:
    """What stands between backticks outside of code blocks."""
    return Counter(re.findall(r"`([^`]+)`", re.sub(r"^ {4}.*\n", "", text, flags=re.MULTILINE)))


def links(text: str) -> list[str]:
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not target.startswith("http")]


def both_readmes() -> tuple[str, str]:
    return text_of("README.md"), text_of("README.zh-CN.md")


def test_both_readmes_show_the_same_commands():
    english, chinese = both_readmes()
    assert code_lines(english) == code_lines(chinese)
    assert "bash sft.sh" in [line.strip() for line in code_lines(english)]


def test_both_readmes_name_the_same_flags_and_words_in_the_same_sections():
    english, chinese = map(sections, both_readmes())
    assert len(english) == len(chinese)
    for ours, theirs in zip(english, chinese, strict=True):
        assert code_spans(ours) == code_spans(theirs), ours.splitlines()[0]
        assert ours.count("\n| ") == theirs.count("\n| "), ours.splitlines()[0]


def test_both_readmes_link_to_the_same_files_and_to_each_other():
    english, chinese = both_readmes()
    assert Counter(links(english)) - Counter(["README.zh-CN.md"]) == Counter(links(chinese)) - Counter(["README.md"])
    assert "README.zh-CN.md" in links(english)
    assert "README.md" in links(chinese)


def test_every_link_leads_to_a_file():
    documents = [path for path in tracked() if path.endswith(".md")]
    assert "rq/README.md" in documents
    targets = [(path, target) for path in documents for target in links(text_of(path))]
    assert [pair for pair in targets if not ((ROOT / pair[0]).parent / pair[1].split("#")[0]).exists()] == []


def test_no_file_names_a_place_of_one_machine():
    for path in tracked():
        text = text_of(path)
        assert not re.search(r"(?<![\w.])/(work|root|home)/", text), path
        assert not re.search(r"--(extra-)?index-url|--find[-]links", text), path
        assert set(re.findall(r"https?://([\w.-]+)", text)) <= KNOWN_HOSTS, path
