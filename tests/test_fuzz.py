"""Files and command lines that hold anything: each is read, or refused in one plain line; nothing else happens.

FUZZ_EXAMPLES=20000 python -m pytest tests/test_fuzz.py --hypothesis-show-statistics     # the long run
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import toy
from fuzzing import accepted, check_line, fuzz, mutated_bytes, mutated_json, odd_json, odd_numbers, odd_text
from hypothesis import strategies as st
from safetensors.torch import save

import evaluate
import sft
from sid_sft.catalogue import Catalogue, Item, read_catalogue, read_index, read_titles, unescaped
from sid_sft.cells import ItemIds, list_cell, read_list
from sid_sft.checkpoint import PROMPTS_FILE, read_wording
from sid_sft.command_line import PlainLines, one_word_each, read_flags
from sid_sft.dataset_cache import Source, rows_of
from sid_sft.files import InputError, plain, shown
from sid_sft.flag_checks import check_evaluating, check_training
from sid_sft.interactions import CSV_COLUMNS, Row, read_preferences, read_rows
from sid_sft.recommend.answers import answers_of, write_answers
from sid_sft.recommend.evaluator import Recommended
from sid_sft.recommend.histories import HISTORY_COLUMNS, read_histories
from sid_sft.recommend.ranking import sid_table
from sid_sft.settings import EvaluateFlags, TrainFlags
from sid_sft.sid_rows import ROWS_FILE, read_rows_file
from sid_sft.tasks import DEFAULT_TASKS, PROMPTS, TASKS, read_prompts, render

PREFERENCES = [
    {
        "user": "ann",
        "split": "train",
        "user_preference": "Tools that last",
        "context": {"history_items": [0, "1", {"sid": "<a_1><b_0><c_1><d_0>"}], "target_item": {"item_id": 4}},
    },
    {"user": 7, "user_preference": "Gifts", "context": {"history_items": ["<a_0><b_0><c_0>"], "target_item": 3.0}},
]
OWN_PROMPTS = {
    "sid_sid": "{category} so far:\n{history}",
    "preference_sid": "{preference}\n{history}",
    "item_sid_title": "{item}",
}
WORDING = {"category": "toy", "tasks": list(DEFAULT_TASKS), "prompts": OWN_PROMPTS}
ITEMS = {item: {"title": title, "description": "", "brand": None} for item, title in toy.TITLES.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def catalogue(folder) -> Catalogue:
    return read_catalogue(toy.write_index(folder), toy.write_items(folder))


def reads(read, content: bytes, path: Path) -> bool:
    path.write_bytes(content)
    return accepted(lambda: read(path), InputError, writes_in=path.parent)


# ---------------------------------------------------------------------------------------------- JSON files


def test_the_files_that_are_changed_below_are_right(folder, catalogue):
    for read, content in (
        (read_index, toy.SIDS),
        (read_titles, ITEMS),
        (lambda path: list(read_preferences(path, catalogue, "train")), PREFERENCES),
        (lambda path: read_prompts(path, "Toys"), OWN_PROMPTS),
    ):
        assert reads(read, json.dumps(content).encode(), folder / "right.json")
    (folder / PROMPTS_FILE).write_text(json.dumps(WORDING))
    assert read_wording(folder).tasks == list(DEFAULT_TASKS)


@fuzz(mutated_json(toy.SIDS))
def test_an_index_is_read_or_refused(folder, content):
    reads(read_index, content, folder / "odd.index.json")


@fuzz(mutated_json(ITEMS))
def test_an_item_file_is_read_or_refused(folder, content):
    reads(read_titles, content, folder / "odd.item.json")


@fuzz(mutated_json(toy.SIDS), mutated_json(ITEMS))
def test_a_catalogue_is_read_or_refused_and_its_items_can_be_shown(folder, index, items):
    (folder / "odd.index.json").write_bytes(index)
    (folder / "odd.item.json").write_bytes(items)
    read = []
    paths = folder / "odd.index.json", folder / "odd.item.json"
    if accepted(lambda: read.append(read_catalogue(*paths)), InputError, writes_in=folder):
        for item in read[0].items:
            assert "\n" not in item.title
            (item.title + "".join(item.sid) + item.id).encode()


@fuzz(mutated_json(PREFERENCES))
def test_a_preference_file_is_read_or_refused(folder, catalogue, content):
    reads(lambda path: list(read_preferences(path, catalogue, "train")), content, folder / "odd.preferences.json")


@fuzz(mutated_json(OWN_PROMPTS), odd_text())
def test_a_file_of_prompts_is_read_or_refused(folder, catalogue, content, category):
    def read(path):
        prompts = read_prompts(path, category)
        assert prompts.keys() == PROMPTS.keys()
        for task in TASKS.values():
            render(task, Row("ann", (0, 1), 4, "Tools that last"), catalogue, prompts)

    reads(read, content, folder / "odd.prompts.json")


@fuzz(mutated_json(WORDING))
def test_the_wording_beside_a_checkpoint_is_read_or_refused(folder, content):
    def read(path):
        wording = read_wording(path.parent)
        assert isinstance(wording.category, str)
        assert ", ".join(wording.tasks).count(",") == max(len(wording.tasks) - 1, 0)
        assert wording.prompts.keys() == PROMPTS.keys()

    reads(read, content, folder / PROMPTS_FILE)


# ---------------------------------------------------------------------------------------------- interaction files


def csv_bytes(rows: list[dict]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


RIGHT_ROWS = [toy.csv_row(*history) for history in toy.HISTORIES]
ODD_ENTRIES = [
    "np.int64(0)",
    "nan",
    "None",
    "'0'",
    "0x0",
    "0" * 400,
    "-0",
    "1e0",
    "9" * 5000,
    "'\\ud800'",
    "b'0'",
    "''",
    "{}",
]
ODD_ENTRIES += ["'\\N{DIGIT ONE}'", "'a' 'b'", "f'{0}'", "[0]", "...", "True", "0_0", "'\\x1b[2J'", '"\\ud83d"', "print(1)"]


@st.composite
def odd_cell(draw) -> str:
    """A cell of a list column or of an id: of odd entries, of right ones with changes, or of any text."""
    how = draw(st.sampled_from(["entries", "entries", "changed", "text"]))
    if how == "entries":
        entries = draw(
            st.lists(st.one_of(st.sampled_from(ODD_ENTRIES), odd_text().map(repr), odd_numbers().map(repr)), max_size=4)
        )
        opening, closing = draw(st.sampled_from(["[]", "[]", "[]", "()", "[[", ["array([", "])"], ["", ""]]))
        return opening + draw(st.sampled_from([", ", ",", " ", ",\n"])).join(entries) + closing
    if how == "changed":
        right = draw(st.sampled_from([cell for row in RIGHT_ROWS for cell in row.values()]))
        return draw(mutated_bytes(right.encode())).decode("utf-8", "replace")
    return draw(odd_text())


@st.composite
def odd_csv(draw) -> bytes:
    """Rows of which one to three cells are odd, or the bytes of right ones with changes."""
    if draw(st.integers(0, 3)) == 0:
        return draw(mutated_bytes(csv_bytes(RIGHT_ROWS)))
    rows = copy.deepcopy(RIGHT_ROWS)
    for _ in range(draw(st.integers(1, 3))):
        draw(st.sampled_from(rows))[draw(st.sampled_from(CSV_COLUMNS))] = draw(odd_cell())
    return csv_bytes(rows)


def test_the_rows_that_are_changed_below_are_right(folder, catalogue):
    assert reads(lambda path: list(read_rows(path, catalogue)), csv_bytes(RIGHT_ROWS), folder / "right.csv")


def rows_are_read(content: bytes, path: Path, catalogue: Catalogue, max_left_out: float) -> bool:
    def read(path):
        for row in read_rows(path, catalogue, max_left_out=max_left_out):
            row.user.encode()
            assert {row.item, *row.history} <= set(range(len(catalogue.items)))

    return reads(read, content, path)


@fuzz(odd_csv(), st.sampled_from([0.2, 1.0]))
def test_a_csv_is_read_or_refused(folder, catalogue, content, max_left_out):
    rows_are_read(content, folder / "odd.csv", catalogue, max_left_out)


@fuzz(odd_cell(), st.sampled_from([column for column in CSV_COLUMNS if column.startswith("history")]))
def test_a_list_cell_is_read_or_refused(folder, catalogue, cell, column):
    accepted(lambda: list_cell("x.csv:2", {column: cell}, column, catalogue), InputError, writes_in=folder)


@fuzz(odd_cell())
def test_a_list_is_texts_and_numbers_alone(folder, cell):
    read = []
    if accepted(lambda: read.extend(read_list(cell)), ValueError, writes_in=folder):
        assert {type(entry) for entry in read} <= {str, int, float, type(None)}


@fuzz(st.lists(st.one_of(odd_text(), odd_cell(), odd_numbers()), min_size=1, max_size=4), odd_text())
def test_an_id_means_one_item_or_none_or_is_refused(folder, values, known):
    sids = {known: ["<a_0>"], "5": ["<a_1>"], "05": ["<a_2>"]}
    items = [Item(item, tuple(sid), "") for item, sid in sids.items()]
    catalogue = Catalogue(items, {item: place for place, item in enumerate(sids)})
    ids = ItemIds(catalogue)
    for value in values:
        accepted(lambda value=value: plain(str(ids.find(value))), ValueError, writes_in=folder)
    check_line("log: " + plain(ids.note_on_spelling()))


@fuzz(odd_csv(), mutated_json(PREFERENCES), st.sampled_from(["items", "interactions", "preferences"]), st.booleans())
def test_the_sources_of_a_dataset_are_read_or_refused(folder, catalogue, rows, preferences, kind, missing):
    paths = folder / "source.csv", folder / "source.json"
    for path, content in zip(paths, (rows, preferences), strict=True):
        path.write_bytes(content)
    source = Source(*(None if missing else path for path in paths))
    accepted(lambda: list(rows_of(kind, source, catalogue, lambda note: None, 1.0)), InputError, writes_in=folder)


@pytest.mark.parametrize("column", CSV_COLUMNS)
def test_a_row_that_is_long_and_odd_everywhere_is_refused_in_a_short_line(column, folder):
    """Each message quotes several things, each of which may be long."""
    odd = "\x1b\u202e" * 300
    sids = {"5" + odd: ["<a_0>"], "05" + odd: [f"<{'b' * 900}>"], "7": ["<a_1>"]}
    catalogue = read_catalogue(toy.write_json(folder / "long.json", sids), None)
    right = {
        "user_id": odd,
        "history_item_title": repr([odd]),
        "item_title": odd,
        "history_item_id": repr(["05" + odd]),
        "item_id": "05" + odd,
        "history_item_sid": repr([f"<{'b' * 900}>"]),
        "item_sid": f"<{'b' * 900}>",
    }
    path = folder / "long.csv"
    assert reads(lambda path: list(read_rows(path, catalogue)), csv_bytes([right]), path)
    for text in (odd, repr([odd]), repr([odd, odd]), "[" + "9" * 900 + "]", "7", "['7']", "", "'" * 900):
        reads(lambda path: list(read_rows(path, catalogue)), csv_bytes([{**right, column: text}] * 3), path)


# ---------------------------------------------------------------------------------------------- histories


pa.Table.from_pylist([{"history": 0}])  # loads pandas, here and not while a reader is watched
RIGHT_HISTORIES = [
    {"user_id": "ann", "history": [0, "1", "<a_1><b_0><c_1><d_0>", "Gloves"]},
    {"user_id": 7, "history": "0 | Gloves", "history_item_title": ["Gloves", None]},
    {"user_id": None, "history_item_id": [4, 0], "history_item_sid": ["<a_0><b_0><c_0>"]},
    {"history_item_sid": "<a_0><b_0><c_0> <a_0><b_1><c_1>"},
]


def read_and_answer(path: Path, catalogue: Catalogue) -> None:
    """Reads histories, and writes answers of one SID for each row that has a history, in all three kinds of file."""
    notes: list[str] = []
    found = read_histories(path, catalogue, notes.append, shows="sid", max_left_out=1)
    for note in notes:
        check_line("log: " + plain(note))
    for row in filter(None, found.rows):
        assert row.history
        assert {*row.history} <= set(range(len(catalogue.items)))
    table, known = sid_table(catalogue, Counter()), sum(row is not None for row in found.rows)
    recommended = Recommended(np.zeros((known, 1), dtype=np.int64), np.full((known, 1), -1.5))
    for ending in ("csv", "jsonl", "parquet"):
        write_answers(path.parent / f"answers.{ending}", answers_of(found, recommended, catalogue, table), found.users)


def histories_are_read(content: bytes, path: Path, catalogue: Catalogue) -> bool:
    return reads(lambda path: read_and_answer(path, catalogue), content, path)


@st.composite
def odd_json_lines(draw) -> bytes:
    """Lines of which some are odd, or any bytes."""
    rows = [json.dumps(row).encode() for row in RIGHT_HISTORIES]
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(rows) - 1))
        rows[at] = draw(mutated_json(RIGHT_HISTORIES[at])).replace(b"\n", b" ")
    return b"\n".join(rows)


@st.composite
def odd_csv_histories(draw) -> bytes:
    column = draw(st.sampled_from(HISTORY_COLUMNS))
    cells = draw(
        st.lists(st.one_of(odd_cell(), odd_text(), st.sampled_from(["[0, 1]", "0", "Gloves|0"])), min_size=1, max_size=4)
    )
    text = io.StringIO()
    csv.writer(text).writerows([["user_id", column], *([draw(odd_text()), cell] for cell in cells)])
    content = text.getvalue().encode("utf-8", "surrogatepass")
    return draw(mutated_bytes(content)) if draw(st.integers(0, 3)) == 0 else content


PARQUET_TYPES = {
    "text": (pa.string(), ["0", "Gloves", None, "x" * 5000, "\x1b[2J", "[0, 1]"]),
    "bytes": (pa.binary(), [b"0", b"\xff\xfe", None]),
    "numbers": (pa.float64(), [0.0, 1.5, float("nan"), 1e308, None]),
    "whole numbers": (pa.uint64(), [0, 4, 2**64 - 1, None]),
    "truth": (pa.bool_(), [True, None]),
    "times": (pa.timestamp("ns"), [0, 2**62, None]),
    "decimals": (pa.decimal128(5, 2), [None, 1]),
}


def parquet_bytes(columns: dict) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


@st.composite
def odd_column(draw) -> pa.Array:
    """Three cells of any type, lists of them or lists of lists."""
    kind, values = PARQUET_TYPES[draw(st.sampled_from([*PARQUET_TYPES]))]
    cells = st.sampled_from(values)
    for _ in range(draw(st.integers(0, 2))):
        kind, cells = pa.list_(kind), st.one_of(st.none(), st.lists(cells, max_size=3))
    return pa.array([draw(cells) for _ in range(3)], kind)


@st.composite
def odd_parquet(draw) -> bytes:
    """Columns of any type, and the bytes of such a file with changes."""
    names = draw(st.lists(st.sampled_from(["user_id", *HISTORY_COLUMNS, "other"]), min_size=1, max_size=3, unique=True))
    content = parquet_bytes({name: draw(odd_column()) for name in names})
    return draw(mutated_bytes(content)) if draw(st.booleans()) else content


def test_the_histories_that_are_changed_below_are_right(folder, catalogue):
    lines = b"\n".join(json.dumps(row).encode() for row in RIGHT_HISTORIES)
    assert histories_are_read(lines, folder / "right.jsonl", catalogue)
    assert histories_are_read(b"user_id,history\nann,Gloves|0\n", folder / "right.csv", catalogue)
    pq.write_table(pa.table({"user_id": [1, 2], "history": [[0, 4], [1]]}), folder / "right.parquet")
    assert histories_are_read((folder / "right.parquet").read_bytes(), folder / "right.parquet", catalogue)


@fuzz(odd_json_lines())
def test_histories_in_json_lines_are_read_or_refused(folder, catalogue, content):
    histories_are_read(content, folder / "odd.jsonl", catalogue)


@fuzz(odd_csv_histories())
def test_histories_in_a_csv_are_read_or_refused(folder, catalogue, content):
    histories_are_read(content, folder / "odd-histories.csv", catalogue)


@fuzz(odd_parquet())
def test_histories_in_parquet_are_read_or_refused(folder, catalogue, content):
    histories_are_read(content, folder / "odd.parquet", catalogue)


# ---------------------------------------------------------------------------------------------- rows in Parquet

RIGHT_COLUMNS = [
    {"user_id": ["ann", "bob", "ann"], "history_item_id": [[0, 1], [4], [1]], "item_id": [2, 0, 3]},
    {"user_id": [1, 2, 3], "item_ids": [["0", "1"], ["4", "0", "2"], []], "timestamps": [[1, 2], [3, 1, 2], []]},
    {"user_id": [1, 2, 3], "item_ids": [[0, 1], [4, 0, 2], [1, 2]], "targets": [1, None, 9], "max_history": [1, 2, None]},
    {"user_id": [1, 2, 3], "item_ids": [[0, 1], [4, 0, 2], [1, 2]], "row_numbers": [[3], [0, 2], [1]]},
]
for right in RIGHT_COLUMNS[:1]:
    sids = [["".join(toy.SIDS[str(item)]) for item in items] for items in right["history_item_id"]]
    right |= {"history_item_sid": sids, "item_sid": ["".join(toy.SIDS[str(item)]) for item in right["item_id"]]}


@st.composite
def odd_interactions(draw) -> bytes:
    """Right columns of which some are odd or missing, or the bytes of right ones with changes."""
    columns = dict(draw(st.sampled_from(RIGHT_COLUMNS)))
    if draw(st.integers(0, 3)) == 0:
        return draw(mutated_bytes(parquet_bytes(columns)))
    for name in draw(st.lists(st.sampled_from([*columns]), min_size=1, max_size=2, unique=True)):
        columns[name] = draw(odd_column())
    if draw(st.integers(0, 9)) == 0:
        del columns[draw(st.sampled_from([*columns]))]
    return parquet_bytes(columns)


@pytest.mark.parametrize("columns", RIGHT_COLUMNS, ids=lambda columns: ", ".join(columns))
def test_the_columns_that_are_changed_below_are_right(folder, catalogue, columns):
    assert rows_are_read(parquet_bytes(columns), folder / "right.parquet", catalogue, 0.0)


@fuzz(odd_interactions(), st.sampled_from([0.2, 1.0]))
def test_rows_in_parquet_are_read_or_refused(folder, catalogue, content, max_left_out):
    rows_are_read(content, folder / "odd.parquet", catalogue, max_left_out)


# ---------------------------------------------------------------------------------------------- rows files


def rows_bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> bytes:
    return save({name: tensor.clone() for name, tensor in tensors.items()}, metadata)


RIGHT_TENSORS = {"ids": torch.tensor([5, 40, 41]), "embedding": torch.ones(3, 4), "head": torch.zeros(3, 4)}
RIGHT_METADATA = {"tokens": '["<a_0>", "<a_1>", "<b_0>"]', "base": "0" * 24}
ODD_TENSORS = [
    *(torch.tensor(5), torch.tensor([5, 5, 6]), torch.tensor([-1, 2, 3]), torch.tensor([2**62, 2**62 + 1, 2**62 + 2])),
    *(torch.tensor([7, 6, 5]), torch.zeros(0, dtype=torch.int64), torch.tensor([1.0, 2.0, 3.0]), torch.ones(1, 4)),
    *(torch.ones(3), torch.ones(3, 0), torch.ones(3, 4, 1), torch.full((3, 4), torch.nan), torch.ones(3, 4).half()),
    *(torch.ones(3, 4, dtype=torch.int32), torch.ones(3, 4, dtype=torch.bool), torch.full((3, 4), torch.inf)),
]


@st.composite
def odd_rows_file(draw) -> bytes:
    tensors, metadata = dict(RIGHT_TENSORS), dict(RIGHT_METADATA)
    for _ in range(draw(st.integers(1, 2))):
        how = draw(st.sampled_from(["tensor", "no tensor", "tokens", "no metadata", "metadata", "bytes"]))
        if how == "tensor":
            tensors[draw(st.sampled_from([*RIGHT_TENSORS, "other"]))] = draw(st.sampled_from(ODD_TENSORS))
        elif how == "no tensor":
            tensors.pop(draw(st.sampled_from([*RIGHT_TENSORS])), None)
        elif how == "tokens":
            metadata["tokens"] = draw(mutated_json(json.loads(RIGHT_METADATA["tokens"]))).decode("utf-8", "replace")
        elif how == "metadata":
            metadata[draw(st.sampled_from(["base", "tokens", "other"]))] = (
                draw(odd_text()).encode("utf-8", "replace").decode()
            )
        elif how == "no metadata":
            metadata = {}
        else:
            return draw(mutated_bytes(rows_bytes(RIGHT_TENSORS, RIGHT_METADATA)))
    return rows_bytes(tensors, metadata)


def test_a_rows_file_of_a_run_is_read(folder):
    assert reads(read_rows_file, rows_bytes(RIGHT_TENSORS, RIGHT_METADATA), folder / ROWS_FILE)


@fuzz(odd_rows_file())
def test_a_rows_file_is_read_or_refused(folder, content):
    def read(path):
        saved = read_rows_file(path)
        assert all(isinstance(token, str) for token in saved.tokens)
        assert len(saved.tokens) == len(saved.ids) == len({*saved.ids.tolist()})
        for rows in saved.rows.values():
            assert rows.shape[0] == len(saved.ids)
            assert rows.isfinite().all()

    reads(read, content, folder / ROWS_FILE)


# ---------------------------------------------------------------------------------------------- command lines

WORDS = [
    "1",
    "0",
    "-1",
    "True",
    "none",
    "cosine",
    "polynomial",
    "sid_sid",
    "1e300",
    "4294967295",
    "4294967296",
    "0.5",
    "title_sid",
]
WORDS += ["9" * 400, "1e-320", "0x10", "-", "--", "a,b", "x/y/z", "~nobody/x", "x" * 300, ".", "..", "/dev/null", "١", "1_0"]


@st.composite
def odd_command(draw, record: type, right: dict[str, str]) -> list[str]:
    """A right command line with one to four flags more or in place of others, and sometimes words that are none."""
    values = dict(right)
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from([field.name for field in dataclasses.fields(record)]))
        values[name] = draw(st.one_of(st.sampled_from([*WORDS, *right.values()]), odd_text(), odd_numbers().map(str)))
    words = [
        word
        for name, value in values.items()
        for word in draw(st.sampled_from([(f"--{name}", value), (f"--{name}={value}",)]))
    ]
    if draw(st.integers(0, 4)) == 0:
        words.insert(draw(st.integers(0, len(words))), draw(odd_text()))
    return words


def right_flags(folder: Path, name: str) -> dict[str, str]:
    (folder / "base").mkdir(exist_ok=True)
    (folder / "base" / "config.json").write_text("{}")
    files = {"sid_index_path": toy.write_index(folder), "item_meta_path": toy.write_items(folder)}
    files["train_file"] = toy.write_csv(folder / "toy.csv")
    files[name] = files["train_file"]
    return {"base_model": str(folder / "base"), "output_dir": str(folder / "run"), **{k: str(v) for k, v in files.items()}}


def command_is_read(function, record: type, check, words: list[str], folder: Path) -> bool:
    def read():
        given = dict(word[2:].split("=", 1) for word in one_word_each(function, words))
        check(read_flags(record, given))

    return accepted(read, InputError, writes_in=folder)


@pytest.fixture(scope="module")
def commands(folder) -> dict:
    return {
        "sft": (sft.train, TrainFlags, check_training, right_flags(folder, "eval_file")),
        "evaluate": (evaluate.evaluate, EvaluateFlags, check_evaluating, right_flags(folder, "test_file")),
    }


@pytest.mark.parametrize("name", ["sft", "evaluate"])
def test_the_command_lines_that_are_changed_below_are_right(name, commands, folder):
    *how, right = commands[name]
    assert command_is_read(*how, [f"--{flag}={value}" for flag, value in right.items()], folder)


@fuzz(st.data())
def test_a_command_line_of_sft_is_read_or_refused(folder, commands, data):
    *how, right = commands["sft"]
    command_is_read(*how, data.draw(odd_command(TrainFlags, right)), folder)


@fuzz(st.data())
def test_a_command_line_of_evaluate_is_read_or_refused(folder, commands, data):
    *how, right = commands["evaluate"]
    command_is_read(*how, data.draw(odd_command(EvaluateFlags, right)), folder)


@fuzz(odd_text())
def test_what_is_asked_for_is_found_or_refused(folder, catalogue, text):
    def find():
        for piece in evaluate.split_history(text, catalogue):
            evaluate.find_in_catalogue(piece, catalogue)

    accepted(find, InputError, writes_in=folder)


# ---------------------------------------------------------------------------------------------- what is shown


@fuzz(odd_json())
def test_a_message_quotes_anything_in_sixty_plain_characters(value):
    quoted = shown(value)
    assert len(quoted) <= 62
    check_line(quoted)


@fuzz(odd_text())
def test_text_is_shown_plain_and_titles_lose_their_escapes(text):
    assert plain(text).isprintable()
    assert plain(plain(text)) == plain(text)
    assert unescaped(unescaped(text)) == unescaped(text)


@fuzz(odd_text())
def test_a_log_line_holds_nothing_that_a_terminal_would_obey(text):
    line = PlainLines().format(logging.LogRecord("sft", logging.INFO, "", 0, f"Catalogue: {text}", None, None))
    assert all(part.isprintable() for part in line.split("\n"))
