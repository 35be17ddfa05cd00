"""The cache of tokenized datasets: what is damaged is seen and built again, what may only be read is read."""

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import toy
from machine import one_line, read_only, run_as_user, small_disk

from data import build_dataset
from sid_sft.catalogue import read_catalogue
from sid_sft.dataset_cache import CONTENTS_FILE, Source, fault_of
from sid_sft.tasks import read_prompts


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Toy files; what is this user's own, home and temporary files, is in there too."""
    for name in ("home", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    toy.write_index(tmp_path)
    toy.write_items(tmp_path)
    toy.write_csv(tmp_path / "toy.csv")
    return tmp_path


def build(folder: Path):
    return build_dataset(
        Source(folder / "toy.csv"),
        ["sid_sid", "title_title"],
        catalogue=read_catalogue(folder / "toy.index.json", folder / "toy.item.json"),
        prompts=read_prompts(None, "Toys"),
        tokenizer=toy.byte_level(),
        cutoff_len=512,
        cache_dir=folder / "cache",
    )


def entry_of(folder: Path) -> Path:
    (entry,) = [path for path in (folder / "cache").iterdir() if not path.name.endswith(".lock")]
    return entry


def flip(path: Path, place: int) -> None:
    """Turns one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def folder_for_file(path: Path) -> None:
    path.unlink()
    path.mkdir()


def emptied(entry: Path) -> None:
    for path in entry.iterdir():
        path.unlink()


def file_for_entry(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("not a folder")


def dangling(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.symlink_to("nowhere")


DAMAGES = {
    "ids cut off": lambda entry: half(entry / "examples.arrow"),
    "ids emptied": lambda entry: (entry / "examples.arrow").write_bytes(b""),
    "ids zeroed": lambda entry: zeros(entry / "examples.arrow"),
    "a bit of the ids": lambda entry: flip(entry / "examples.arrow", 1500),
    "the last bit of the ids": lambda entry: flip(entry / "examples.arrow", -1),
    "something behind the ids": lambda entry: (entry / "examples.arrow").open("ab").write(b"more"),
    "no ids": lambda entry: (entry / "examples.arrow").unlink(),
    "a folder for the ids": lambda entry: folder_for_file(entry / "examples.arrow"),
    "no summary": lambda entry: (entry / "summary.json").unlink(),
    "half a summary": lambda entry: half(entry / "summary.json"),
    "another summary": lambda entry: (entry / "summary.json").write_text('{"files": [], "notes": [], "tasks": {}}'),
    "no contents": lambda entry: (entry / CONTENTS_FILE).unlink(),
    "half the contents": lambda entry: half(entry / CONTENTS_FILE),
    "contents of nothing": lambda entry: (entry / CONTENTS_FILE).write_text("{}"),
    "contents that are a list": lambda entry: (entry / CONTENTS_FILE).write_text("[1]"),
    "contents that are no text": lambda entry: (entry / CONTENTS_FILE).write_bytes(b"\xff\xfe{"),
    "an empty folder": emptied,
    "a file for the folder": file_for_entry,
    "a link to nowhere": dangling,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_dataset_is_named_in_one_line_and_built_again(name, folder, caplog):
    expected = build(folder)[:]
    entry = entry_of(folder)
    DAMAGES[name](entry)
    caplog.set_level(logging.INFO, "sft")
    assert build(folder)[:] == expected
    (line,) = [message for message in caplog.messages if "built again" in message]
    assert line.startswith(f"{entry}: ")
    assert line.endswith(", so the dataset is built again")
    assert fault_of(entry) is None
    assert list((folder / "cache").iterdir()) == [entry]
    caplog.clear()
    assert build(folder)[:] == expected
    assert not [message for message in caplog.messages if "built again" in message]


def test_what_is_recorded_of_a_dataset_are_its_files(folder):
    build(folder)
    entry = entry_of(folder)
    contents = json.loads((entry / CONTENTS_FILE).read_text())
    assert contents.keys() | {CONTENTS_FILE} == {path.name for path in entry.iterdir()}
    assert {name: size for name, (size, _) in contents.items()} == {name: (entry / name).stat().st_size for name in contents}


def test_a_dataset_that_is_whole_is_taken_without_anything_being_written(folder):
    build(folder)
    cache = folder / "cache"
    before = {path: path.stat().st_mtime_ns for path in [cache, *cache.rglob("*")]}
    build(folder)
    assert {path: path.stat().st_mtime_ns for path in [cache, *cache.rglob("*")]} == before


# ---------------------------------------------------------------------------------------------- from the command line


def checked(flags, tmp_path: Path, **options) -> str:
    """The log of `sft.py --check`, run by somebody whom modes bind, with a home and temporary files of his own."""
    homes = {"HOME": tmp_path / "home", "TMPDIR": tmp_path / "temporary"}
    for path in homes.values():
        path.mkdir(exist_ok=True)
    env = {**os.environ, **{name: str(path) for name, path in homes.items()}}
    done = run_as_user("sft.py", *flags(check=True), env=env, **options)
    assert done.returncode == 0, done.stderr
    return done.stderr


def examples(log: str) -> list[str]:
    return [line for line in log.splitlines() if " -> " in line]


def test_a_cache_that_may_only_be_read_serves_and_what_it_lacks_is_built_elsewhere(flags, tmp_path):
    log = checked(flags, tmp_path)
    cache = tmp_path / "cache"
    with read_only(cache):
        served = checked(flags, tmp_path)
    assert "is kept in" not in served
    assert examples(served) == examples(log) != []
    assert list((tmp_path / "home").iterdir()) == []

    for entry in cache.iterdir():
        shutil.rmtree(entry)
    written = []
    for _ in range(2):
        with read_only(cache):
            missed = checked(flags, tmp_path)
        own = tmp_path / "home" / ".cache" / "sid-sft"
        assert f"{cache}: cannot be written (Permission denied); the dataset is kept in {own}" in missed
        written.append({path: path.stat().st_mtime_ns for path in own.rglob("*.arrow")})
        assert examples(missed) == examples(log)
    assert list(cache.iterdir()) == []
    assert len(written[0]) == len(list(own.iterdir())) == 2
    assert written[0] == written[1]  # built the first time, and found there the second time


@pytest.mark.slow
def test_a_damaged_dataset_in_a_cache_that_may_only_be_read_is_built_elsewhere(flags, tmp_path):
    log = checked(flags, tmp_path)
    cache = tmp_path / "cache"
    for entry in cache.iterdir():
        flip(entry / "examples.arrow", 1500)
    with read_only(tmp_path / "cache"):
        found = checked(flags, tmp_path)
    damaged = f"{cache}: a dataset is damaged (examples.arrow has another content than was written), and the folder "
    assert f"{damaged}cannot be written (Permission denied); the dataset is kept in {tmp_path / 'home'}" in found
    assert examples(found) == examples(log)


def test_without_a_home_that_may_be_written_the_place_for_temporary_files_serves(flags, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "home").mkdir()
    with read_only(tmp_path / "cache"), read_only(tmp_path / "home"):
        checked(flags, tmp_path)
    (own,) = (tmp_path / "temporary").glob("sid-sft-*")
    assert own.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mask", [0o002, 0o027])
def test_a_cache_follows_the_umask(mask, flags, tmp_path):
    checked(flags, tmp_path, umask=mask)
    cache = tmp_path / "cache"
    found = [cache, *cache.rglob("*")]
    assert len(found) == 1 + 2 * 5
    for path in found:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_a_full_disk_under_the_cache_is_one_line(flags, tmp_path):
    with small_disk(tmp_path / "disk", 40_000) as disk:
        line = one_line(run_as_user("sft.py", *flags(cache_dir=disk / "cache", check=True)))
        assert f"{disk / 'cache'}: cannot keep the dataset (No space left on device); free some room or choose" in line
        assert [path for path in (disk / "cache").iterdir() if path.is_dir()] == []
