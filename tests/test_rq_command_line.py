"""The rq commands as a user types them: quick help, one clear line for each mistake, nothing half-written."""

import ast
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from refusals import refusal

from rq import (
    prepare,
    publishing,
    report,
    rqfaiss,
    rqkmeans,
    rqkmeans_constrained,
    rqkmeans_plus,
    rqvae,
    text2emb,
)
from rq.command_line import switch
from rq.files import whole_file, whole_path

ROOT = Path(__file__).parent.parent
QUANTIZERS = (rqvae, rqkmeans, rqkmeans_constrained, rqkmeans_plus, rqfaiss)


def typed(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    path = tmp_path / "E.npy"
    np.save(path, np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32))
    return path


def test_help_takes_less_than_a_second():
    fastest_s = []
    for command in ("rq.rqvae", "rq.text2emb", "rq.report"):
        start_s = time.monotonic()
        result = typed(command, "--help")
        fastest_s.append(time.monotonic() - start_s)
        assert result.returncode == 0
        assert "--output" in result.stdout
    assert min(fastest_s) < 1.0


def test_commands_import_nothing_heavy_before_they_run():
    modules = sorted(f"rq.{path.stem}" for path in (ROOT / "rq").glob("*.py") if "\nif __name__ ==" in path.read_text())
    assert len(modules) == 11
    heavy = ("torch", "faiss", "sklearn", "numpy", "pandas", "scipy", "transformers", "matplotlib")
    code = f"import sys, {', '.join(modules)}; sys.stdout.write(str([m for m in {heavy} if m in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]"


def test_a_mistyped_flag_ends_in_one_line_that_names_the_right_one():
    result = typed("rq.rqkmeans", "--data_pth", "E.npy", "--output", "X.index.json")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "rq.rqkmeans: unknown flag --data_pth (did you mean --data_path?)\n"


def test_a_missing_flag_and_a_wrong_type_are_one_line_each(embeddings):
    assert "arguments are required: --data_path" in refusal(rqkmeans.main, "--output", "X.index.json")
    told = refusal(rqkmeans.main, "--data_path", embeddings, "--output", "X.index.json", "--seed", "x")
    assert told == "rq.rqkmeans: argument --seed: 'x' is not a whole number"


@pytest.mark.parametrize("module", QUANTIZERS)
def test_every_quantizer_has_the_same_flags_for_the_same_things(module, capsys):
    with pytest.raises(SystemExit):
        module.main(["--help"])
    shown = capsys.readouterr().out
    for flag in [
        "item_file",
        "data_path",
        "levels",
        "ckpt_path",
        "output",
        "codes_output",
        "seed",
        "device",
        "collisions",
        "overwrite",
    ]:
        assert f"--{flag}" in shown


@pytest.mark.parametrize("module", QUANTIZERS)
def test_missing_input_and_bad_levels_are_refused_before_anything_runs(module, embeddings, tmp_path):
    output = tmp_path / "X.index.json"
    assert "no such file" in refusal(module.main, "--data_path", tmp_path / "none.npy", "--output", output)
    told = refusal(module.main, "--data_path", embeddings, "--output", output, "--levels", "8,two")
    assert "'8,two'" in told
    assert "like 256,256,256" in told


@pytest.mark.parametrize("module", QUANTIZERS)
def test_fewer_items_than_centroids_is_one_line_and_writes_nothing(module, embeddings, tmp_path):
    told = refusal(module.main, "--data_path", embeddings, "--output", tmp_path / "X.index.json", "--levels", "64,64")
    assert "40 items, fewer than the 64 centroids" in told
    assert [path.name for path in tmp_path.iterdir()] == ["E.npy"]


def test_a_row_with_nan_is_named(embeddings, tmp_path):
    rows = np.load(embeddings)
    rows[17, 3] = np.nan
    np.save(embeddings, rows)
    told = refusal(rqkmeans.main, "--data_path", embeddings, "--output", tmp_path / "X.index.json", "--levels", "4,4")
    assert "row 17 has a NaN" in told
    assert not (tmp_path / "X.index.json").exists()


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.zeros((4, 3), np.int64), "holds int64 (4, 3)"),
        (np.zeros(4, np.float32), "holds float32 (4,)"),
        (np.array([{}], dtype=object), "not a plain .npy array"),
    ],
)
def test_embeddings_that_are_no_float_matrix_are_refused(array, told, tmp_path):
    np.save(tmp_path / "E.npy", array, allow_pickle=True)
    assert told in refusal(rqkmeans.main, "--data_path", tmp_path / "E.npy", "--output", tmp_path / "X.index.json")


def test_item_ids_with_a_gap_are_named(embeddings, tmp_path):
    item_file = tmp_path / "X.item.json"
    item_file.write_text(json.dumps({"0": {"title": "a"}, "2": {"title": "b"}}))
    told = refusal(text2emb.main, "--item_file", item_file)
    assert "gap: 1 is missing" in told
    item_file.write_text(json.dumps({"00": {"title": "a"}}))
    assert "'00' is not a decimal number" in refusal(text2emb.main, "--item_file", item_file)


def test_rows_that_do_not_match_the_items_are_refused(embeddings, tmp_path):
    item_file = tmp_path / "X.item.json"
    item_file.write_text(json.dumps({"0": {"title": "a"}}))
    told = refusal(
        rqkmeans.main,
        "--item_file",
        item_file,
        "--data_path",
        embeddings,
        "--output",
        tmp_path / "X.index.json",
        "--levels",
        "4",
    )
    assert "40 rows" in told
    assert "1 items" in told


def test_an_existing_index_is_replaced_only_with_overwrite(embeddings, tmp_path):
    output = tmp_path / "X.index.json"
    output.write_text("mine")
    arguments = ("--data_path", embeddings, "--output", output, "--levels", "4,4")
    assert "give --overwrite" in refusal(rqkmeans.main, *arguments)
    assert "give --overwrite" in refusal(rqkmeans.main, *arguments, "--overwrite", "false")
    assert output.read_text() == "mine"
    rqkmeans.main([*map(str, arguments), "--overwrite"])
    assert len(json.loads(output.read_text())) == 40


def test_an_output_that_is_also_an_input_is_refused(embeddings):
    told = refusal(rqkmeans.main, "--data_path", embeddings, "--output", embeddings, "--overwrite")
    assert "also an input" in told
    assert np.load(embeddings).shape == (40, 6)


def test_a_device_that_is_not_there_is_one_line(embeddings, tmp_path):
    told = refusal(
        rqkmeans.main,
        "--data_path",
        embeddings,
        "--output",
        tmp_path / "X.index.json",
        "--levels",
        "4",
        "--device",
        "cuda:77",
    )
    assert "--device cuda:77: not usable here" in told


def test_one_process_commands_refuse_to_be_launched_several_times(embeddings, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = refusal(rqkmeans.main, "--data_path", embeddings, "--output", tmp_path / "X.index.json", "--levels", "4")
    assert "runs in one process, 2 were launched" in told


def test_an_interrupted_file_vanishes_and_the_old_one_stays(tmp_path):
    target = tmp_path / "X.index.json"
    target.write_text("old")

    def interrupted() -> None:
        with whole_file(target) as file:
            file.write("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "checkpoint"
    for generation in ("first", "second"):
        with whole_path(target) as temporary:
            temporary.mkdir()
            (temporary / generation).touch()
    assert [path.name for path in target.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [target]


def test_an_interrupt_in_a_quantizer_leaves_nothing(embeddings, tmp_path, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(publishing, "write_sids", interrupt)
    output = tmp_path / "X.index.json"
    with pytest.raises(SystemExit) as stopped:
        rqkmeans.main(["--data_path", str(embeddings), "--output", str(output), "--levels", "4"])
    assert stopped.value.code == "rq.rqkmeans: interrupted; unfinished outputs were removed"
    assert list(tmp_path.iterdir()) == [embeddings]


def test_what_a_user_can_mend_exits_with_2_and_the_log_goes_to_standard_error(embeddings, tmp_path):
    output = tmp_path / "X.index.json"
    command = ("rq.rqkmeans", "--data_path", str(embeddings), "--output", str(output), "--levels")
    refused, done = typed(*command, "64"), typed(*command, "4")
    assert (refused.returncode, done.returncode) == (2, 0)
    assert refused.stderr.startswith("rq.rqkmeans: ")
    assert len(refused.stderr.splitlines()) == 1
    assert f"wrote {output}: 40 items, levels 4" in done.stderr
    assert refused.stdout == done.stdout == ""


@pytest.mark.parametrize(("text", "value"), [("True", True), ("yes", True), ("false", False), ("0", False)])
def test_a_switch_means_what_it_says(text, value):
    assert switch(text) is value


def imported_by(path: Path) -> set[str]:
    """What a module imports, wherever in it: "json", "rq.files", "rq.quantizers"."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "rq" else {node.module}
    return names


def test_modules_that_are_no_commands_import_none():
    modules = {f"rq.{path.stem}": path for path in (ROOT / "rq").glob("*.py")}
    commands = {name for name, path in modules.items() if "\nif __name__ ==" in path.read_text()}
    for name, path in modules.items():
        assert name in commands or not commands & imported_by(path), path


@pytest.mark.parametrize(
    ("typed", "told"), [("", "argument --item_file: nothing: no such file"), ("/", "/: not JSON"), (".", ".: not JSON")]
)
def test_a_path_without_a_name_is_refused_in_one_line(typed, told):
    assert told in refusal(text2emb.main, f"--item_file={typed}", "--dim=2")


def test_report_and_prepare_name_what_is_missing(tmp_path):
    assert "no such file" in refusal(report.main, tmp_path / "none.index.json")
    assert "required: --interactions" in refusal(prepare.main, "--name", "x")
