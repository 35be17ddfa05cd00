"""The walk through README.md, every command as it is printed: from two tables to a model that recommends and is served."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

KINDS, COLOURS = ("kettle", "mug", "bowl", "plate", "tray", "jar"), ("red", "blue", "green", "white")
ITEMS = [(f"P{i}", f"{colour} {kind}") for i, (kind, colour) in enumerate((k, c) for k in KINDS for c in COLOURS)]
ORDERS = [(f"U{u}", f"P{(5 * u + 7 * n) % 24}", 1_500_000_000 + 1000 * u + n) for u in range(60) for n in range(6)]
# What a reader puts in place of the names in the text; the sizes of the tables and of the training are a test's.
IN_PLACE = {
    "Qwen/Qwen2.5-0.5B": "base",
    "X.": "shop/shop.",
    "output/rows": "output/shop",
    "a title, or a part of one title alone | an item id | a SID": "red kettle | 3",
    "256,256,256": "4,4,4",
}
SHORT = " --max_steps 2 --eval_steps 2 --save_steps 2 --batch_size 8 --num_proc 1 --cache_dir cache"


def commands(section: str) -> list[str]:
    """The command lines of a section of README.md, a line that ends with a backslash joined with the next."""
    (text,) = [part for part in (ROOT / "README.md").read_text().split("\n## ") if part.startswith(f"{section}\n")]
    code = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    return re.findall(r"^(?:python |CATEGORY=).*$", code.replace("\\\n", " "), re.MULTILINE)


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory) -> Path:
    """A checkout with two tables in it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("sft.py", "data.py", "evaluate.py", "sft.sh"):
        shutil.copy(ROOT / name, folder)
    for name in ("sid_sft", "rq"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(base, folder / "base")
    tables = {
        "products": [("item_id", "title"), *ITEMS],
        "orders": [("user_id", "item_id", "timestamp"), *ORDERS],
        "users": [("user_id", "history"), ("ann", "red kettle | 3"), ("bob", "0")],
    }
    for name, rows in tables.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return folder


def typed(command: str, folder: Path) -> str:
    """What a command prints, typed in the folder; it must succeed."""
    for name, value in IN_PLACE.items():
        command = command.replace(name, value)
    if "sft.sh" in command:
        command += SHORT
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHON": sys.executable}
    env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def test_every_command_of_the_walk_through_works_in_its_order(folder):
    making, measuring, serving = (
        commands(name) for name in ("From your own catalogue", "How well it recommends", "Serve it")
    )
    assert [len(found) for found in (making, measuring, serving)] == [6, 2, 2]
    for command in making:
        typed(command, folder)
    assert {path.name for path in (folder / "data").glob("*.csv")} >= {"Shop.train.csv", "Shop.valid.csv", "Shop.test.csv"}
    evaluated, recommended = (typed(command, folder) for command in measuring)
    assert "Example 5 of 5" in evaluated
    assert any(title in recommended for _, title in ITEMS)
    for command in serving:
        typed(command, folder)
    assert (folder / "answers.parquet").is_file()
    assert (folder / "serving" / "legal_sids.py").is_file()
