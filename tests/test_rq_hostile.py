"""Files and command lines meant to do harm: one plain line, exit code 2, little memory, nothing lost, nothing half there."""

from __future__ import annotations

import gzip
import json
import os
import resource
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from fuzzing import check_line
from refusals import refusal

from rq import generate_indices, prepare, report, rqkmeans, tables, text2emb, text_files
from rq.files import InputError, named, one_line, shown, told

ROOT = Path(__file__).parent.parent
ESCAPE = "\x1b[2J\x1b]0;owned\x07"
HEADER = b"user_id,item_id,timestamp,title\n"


@pytest.fixture
def orders(tmp_path: Path) -> list[str]:
    """A command line of rq.prepare that runs, but for --name."""
    (tmp_path / "i.csv").write_text("user_id,item_id,timestamp\nu,p,1\nu,q,2\nv,p,3\nv,q,4\n")
    (tmp_path / "m.csv").write_text("item_id,title\np,Pan\nq,Tab\n")
    files = [f"--interactions={tmp_path / 'i.csv'}", f"--items={tmp_path / 'm.csv'}"]
    return [*files, f"--output_dir={tmp_path / 'out'}", "--k_core=1"]


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    np.save(tmp_path / "E.npy", np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32))
    return tmp_path / "E.npy"


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ---------------------------------------------------------------------------------------------- what a message may hold


def test_a_message_quotes_sixty_characters_and_no_escape():
    assert shown("Saw") == "'Saw'"
    assert shown(ESCAPE) == "'\\x1b[2J\\x1b]0;owned\\x07'"
    for value in ("x" * 5000, "\x1b" * 5000, ["y" * 5000], 9**4000, {"k": [None] * 999}, "\U000e0041" * 99, "\ud800"):
        assert len(shown(value)) <= 60
        check_line(shown(value))
    assert one_line("a\n\tb \u202e\x9b") == "a b \\u202e\\x9b"
    assert named(ESCAPE) == "\\x1b[2J\\x1b]0;owned\\x07"
    assert told(OSError(28, "No space left on device")) == "No space left on device"
    check_line(str(InputError(f"a{ESCAPE}b\nc")))


def test_the_log_shows_control_characters_of_file_names_and_columns(orders, tmp_path, capsys):
    (tmp_path / f"{ESCAPE}.csv").write_bytes((tmp_path / "i.csv").read_bytes().replace(b"user_id", f"u{ESCAPE}".encode()))
    prepare.main([*orders, "--name=X", f"--interactions={tmp_path}/{ESCAPE}.csv", f"--user_column=u{ESCAPE}"])
    written = capsys.readouterr().err
    assert "user from u\\x1b[2J\\x1b]0;owned\\x07" in written
    assert not [c for c in written if not c.isprintable() and c != "\n"]


def test_the_table_of_a_report_shows_control_characters_of_file_names(tmp_path, capsys):
    path = tmp_path / f"{ESCAPE}.index.json"
    path.write_text('{"0": ["<a_1>"]}')
    report.main([str(path)])
    assert "\x1b" not in "".join(capsys.readouterr())


# ---------------------------------------------------------------------------------------------- where things are written


@pytest.mark.parametrize("name", ["../../evil", "a/b", "..", ".hidden", "", "a\\b", ESCAPE, "x" * 300])
def test_a_name_that_is_none_is_refused_and_nothing_is_written(orders, tmp_path, name):
    before = files_below(tmp_path)
    check_line(line := refusal(prepare.main, *orders, f"--name={name}"))
    assert "is not a plain name" in line
    assert files_below(tmp_path) == before
    assert not list(tmp_path.parent.glob("evil*"))


def blocked(folder: Path, how: str) -> Path:
    """A place where X.index.json cannot be written."""
    if how == "a folder":
        (folder / "X.index.json").mkdir()
    elif how == "below a file":
        (folder / "file").touch()
        return folder / "file/X.index.json"
    elif how == "no name":
        return folder / ".."
    elif how == "too long":
        return folder / ("x" * 250)
    return folder / "X.index.json"


@pytest.mark.parametrize("how", ["a folder", "below a file", "no name", "too long"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(embeddings, tmp_path, monkeypatch, how):
    monkeypatch.setattr("rq.clustering.training_sample", lambda *_, **__: pytest.fail("the work began"))
    output = blocked(tmp_path, how)
    before = files_below(tmp_path)
    check_line(refusal(rqkmeans.main, f"--data_path={embeddings}", f"--output={output}", "--levels=4,4", "--overwrite"))
    assert files_below(tmp_path) == before


def test_every_output_of_a_command_is_looked_at_before_the_work(embeddings, orders, tmp_path):
    (tmp_path / "X.item.json").write_text('{"0": {"title": "Pan"}}')
    (tmp_path / "new.encoder.json").mkdir()
    assert "is a folder" in refusal(text2emb.main, f"--item_file={tmp_path / 'X.item.json'}", f"--output={tmp_path}/new.npy")
    (tmp_path / "out/X.info.txt").mkdir(parents=True)
    assert "X.info.txt is a folder" in refusal(prepare.main, *orders, "--name=X")
    given = [f"--data_path={embeddings}", f"--output={tmp_path}/X.index.json", "--levels=4,4"]
    assert "ends in .npy" in refusal(rqkmeans.main, *given, f"--codes_output={tmp_path}/codes.txt")
    assert "is also --output" in refusal(rqkmeans.main, *given[:1], "--output=o.npy", "--codes_output=o.npy")
    (tmp_path / "file").touch()
    assert "file is a file" in refusal(rqkmeans.main, *given, f"--ckpt_path={tmp_path}/file", "--overwrite")
    assert files_below(tmp_path / "out") == {"X.info.txt"}


def test_a_folder_with_other_files_is_never_replaced_by_a_checkpoint(embeddings, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("years of work")
    given = [f"--data_path={embeddings}", f"--output={tmp_path}/X.index.json", "--levels=4,4", "--device=cpu", "--overwrite"]
    told = refusal(rqkmeans.main, *given, f"--ckpt_path={tmp_path}/home")
    assert "home holds 'thesis.txt', which would be lost" in told
    assert (tmp_path / "home/thesis.txt").read_text() == "years of work"
    for _ in range(2):  # a checkpoint is replaced by a checkpoint
        rqkmeans.main([*given, f"--ckpt_path={tmp_path}/c"])


def limited(folder: Path, command: list[str], prepare_process: Callable[[], None]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=prepare_process,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_disk_that_fills_up_is_one_line_and_nothing_is_left(tmp_path):
    """A limit on the size of a file stands in for the full disk: the write fails in the same place."""
    (tmp_path / "X.item.json").write_text(json.dumps({str(n): {"title": f"pan{n % 7} tab{n % 11}"} for n in range(9000)}))
    command = ["rq.text2emb", "--item_file=X.item.json", "--output=E.npy", "--dim=16"]
    done = limited(tmp_path, command, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)))
    assert done.returncode == 2
    assert "E.npy: cannot be written (File too large)" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert files_below(tmp_path) == {"X.item.json"}


def test_what_is_written_has_the_rights_that_the_umask_gives(embeddings, tmp_path):
    command = ["rq.rqkmeans", "--data_path=E.npy", "--levels=4,4", "--output=X.index.json", "--codes_output=C.npy"]
    done = limited(tmp_path, [*command, "--ckpt_path=c", "--device=cpu"], lambda: os.umask(0o027) and None)
    assert done.returncode == 0, done.stderr
    for name in ("X.index.json", "C.npy", "c/config.json", "c/model.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640, name


def test_several_processes_say_a_refusal_once(embeddings, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as stopped:
        rqkmeans.main([f"--data_path={embeddings}", f"--output={tmp_path}/X.index.json", "--levels=64,64"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------- a little that asks for much


def npy(shape: str, descr: str = "<f4", numbers: bytes = b"") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header + numbers


def write_bomb(path: Path) -> None:
    """A file of at most some hundred kilobytes that would take gigabytes."""
    name = path.name
    if name == "rows.csv.gz":
        path.write_bytes(gzip.compress(HEADER + b"u,p,1,x\n" * 2**19, 9))
    elif name == "short.csv":
        path.write_bytes(HEADER.strip() + b"," * 990 + b"\n" + b"u\n" * 20_000)
    elif name == "wide.csv":
        path.write_bytes(HEADER + b"," * 100_000 + b"\n")
    elif name == "text.parquet":
        text = pyarrow.DictionaryArray.from_arrays(np.zeros(20_000, np.int32), ["x" * 100_000])
        pyarrow.parquet.write_table(pyarrow.table([text] * 4, HEADER.decode().strip().split(",")), path, store_schema=False)
    elif name == "list.parquet":
        text = pyarrow.DictionaryArray.from_arrays(np.zeros(20_000, np.int32), ["x" * 100_000])
        column = pyarrow.ListArray.from_arrays(np.arange(20_001, dtype=np.int32), text)
        pyarrow.parquet.write_table(
            pyarrow.table([column] * 4, HEADER.decode().strip().split(",")), path, store_schema=False
        )
    elif name == "rows.parquet":
        column = pyarrow.array(np.zeros(2**22, np.int64))
        pyarrow.parquet.write_table(pyarrow.table([column] * 4, HEADER.decode().strip().split(",")), path)


BOMBS = {
    "rows.csv.gz": "unpacks to more than 40 times its size",
    "short.csv": "most rows have fewer cells than the header",
    "wide.csv": "the first row has more cells than the header",
    "text.parquet": "unpacks to more than 40 times its size",
    "list.parquet": "unpacks to more than 40 times its size",
    "rows.parquet": "unpacks to more than 40 times its size",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_table_that_would_unpack_to_gigabytes_is_refused(orders, tmp_path, monkeypatch, name):
    monkeypatch.setattr(text_files, "ALWAYS_UNPACKED", 2**20)
    monkeypatch.setattr(tables, "CELLS_AT_ONCE", 2**18)
    write_bomb(tmp_path / name)
    told = refusal(prepare.main, *orders, "--name=X", f"--interactions={tmp_path / name}")
    check_line(told)
    assert BOMBS[name] in told
    assert not (tmp_path / "out").exists()


def test_arrays_are_as_large_as_their_files_and_never_unpickled(embeddings, tmp_path):
    output = f"--output={tmp_path}/X.index.json"
    for content, fault in (
        (npy("(1000000000, 1000)"), "0 bytes of numbers, its header says 4000000000000"),
        (
            npy("(4, 3)", "|O", b"\x80\x04cposix\nsystem\n(X\x05\0\0\0falset\x85R."),
            "its type is 'O', which is none of numbers",
        ),
        (b"PK\3\4" + bytes(99), "it is an archive"),
    ):
        (tmp_path / "F.npy").write_bytes(content)
        assert fault in refusal(rqkmeans.main, f"--data_path={tmp_path}/F.npy", output)
        assert fault in refusal(generate_indices.main, f"--codes_path={tmp_path}/F.npy", "--levels=4,4", output)
    with zipfile.ZipFile(tmp_path / "X.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("codebook_0.npy", npy("(20000000, 6)", "<f4", bytes(480_000_000 // 4)))
    told = refusal(generate_indices.main, f"--ckpt_path={tmp_path}/X.npz", f"--data_path={embeddings}", output)
    assert "unpacks to more than 100 times its size" in told


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"levels": [10**9] * 25}, "residual.codebooks.0 is float32 (4, 6), config.json asks for float32 (1000000000, 6)"),
        ({"levels": 1.5}, "levels is 1.5; expected 1 to 25 codebook sizes"),
        ({"levels": [True, 4]}, "levels is [True, 4]; expected"),
        ({"n_dims": "6"}, "n_dims is '6'; expected a number of dimensions"),
        ({"method": ESCAPE}, "method is '\\x1b[2J\\x1b]0;owned\\x07'; expected one of"),
        ({"x" * 5000: 1}, "expected no such key, only method"),
    ],
)
def test_a_checkpoint_of_odd_settings_is_refused_before_memory_is_taken(embeddings, tmp_path, change, fault):
    given = [f"--data_path={embeddings}", f"--ckpt_path={tmp_path}/c", "--device=cpu"]
    rqkmeans.main([*given, f"--output={tmp_path}/X.index.json", "--levels=4,4"])
    config = json.loads((tmp_path / "c/config.json").read_text())
    (tmp_path / "c/config.json").write_text(json.dumps({**config, **change}))
    check_line(told := refusal(generate_indices.main, *given, f"--output={tmp_path}/Y.index.json"))
    assert fault in told


def test_a_report_takes_memory_for_the_codes_used_and_not_for_the_largest(tmp_path):
    (tmp_path / "X.index.json").write_text('{"0": ["<a_999999999>"], "1": ["<a_0>"]}')
    report.main([str(tmp_path / "X.index.json")])
    (tmp_path / "X.index.json").write_text(json.dumps({"0": [f"<a_{'9' * 5000}>"]}))
    assert "item 0: token '<a_9999" in refusal(report.main, tmp_path / "X.index.json")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"0": {"title": NaN}}', "NaN is no number of JSON"),
        ('{"0": {"title": "a"}, "0": {"title": "b"}}', "the key '0' stands twice in one object"),
        ('{"0": {"title": "\\ud83d"}}', "half a character"),
        ('{"0": ' + "[" * 5000 + "]" * 5000 + "}", "more than 100 lists or objects in each other"),
        ('{"0": {"title": ' + "[" * 101 + "]" * 101 + "}}", "more than 100 lists or objects in each other"),
        ("7", "expected a JSON object of items"),
        ('{"' + "9" * 5000 + '": {}}', "item id '9999"),
    ],
)
def test_an_item_file_that_is_odd_json_is_refused(tmp_path, content, fault):
    (tmp_path / "X.item.json").write_text(content)
    check_line(told := refusal(text2emb.main, f"--item_file={tmp_path}/X.item.json"))
    assert fault in told


def test_a_text_that_looks_like_a_list_and_is_none_is_text(orders, tmp_path):
    titles = ["[{[]}]", "['a'", "[0x" + "f" * 6000 + "]", "[" * 300]
    rows = "".join(f'p{n},"{title}"\n' for n, title in enumerate(titles))
    (tmp_path / "m.csv").write_text("item_id,title\n" + rows)
    (tmp_path / "i.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"u,p{n},{n}\n" for n in range(4)))
    prepare.main([*orders, "--name=X"])
    items = json.loads((tmp_path / "out/X.item.json").read_text())
    assert [item["title"] for item in items.values()] == titles


@pytest.mark.parametrize(
    ("cell", "fault"), [("a\0b", "title 'a\\x00b' holds a NUL"), ("x" * 10_001, "has 10,001 characters, more than 10,000")]
)
def test_a_title_that_no_later_file_could_hold_is_refused_by_its_line(orders, tmp_path, cell, fault):
    (tmp_path / "m.csv").write_text(f"item_id,title\np,Pan\nq,{cell}\n")
    check_line(told := refusal(prepare.main, *orders, "--name=X"))
    assert "m.csv:3: " in told
    assert fault in told
