"""What rq reads, made wrong in many ways: every reader reads it, or refuses it by one plain line. The long run:

FUZZ_EXAMPLES=20000 python -m pytest tests/test_rq_fuzz.py --hypothesis-show-statistics
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import gzip
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy
import sklearn.feature_extraction.text  # noqa: F401  (imported by the encoder, which may import nothing while it is watched)
from fuzzing import accepted, check_line, fuzz, mutated_bytes, mutated_json, mutated_tree, odd_json, odd_numbers, odd_text
from hypothesis import strategies as st

from rq import (
    build,
    checkpoints,
    generate_indices,
    generate_indices_plus,
    index_file,
    prepare,
    publishing,
    quantizers,
    report,
    rqfaiss,
    rqkmeans,
    rqkmeans_constrained,
    rqkmeans_plus,
    rqvae,
    settings,
    text2emb,
)
from rq.build_record import BuildRecord
from rq.catalogue import item_text, plain, read_items
from rq.embeddings import open_embeddings
from rq.files import InputError
from rq.formats import FIELD_NAMES
from rq.interaction_log import InteractionLog, opened_base
from rq.markup import without_markup
from rq.metadata import ITEM_FIELDS, OPTIONAL_FIELDS, catalogue
from rq.origin import Origin, write_record
from rq.sentence_encoder import own_settings
from rq.sequences import read_interactions
from rq.tables import read_table
from rq.training_files import csv_cells, csv_lines
from rq.windows import histories, split_windows

READING = {"names": {}, "sep": None, "encoding": "cp1252"}
RECORD = {
    "user_id": "A53",
    "item_id": "p",
    "timestamp": 1465862400,
    "title": "Pan",
    "description": ["Steel.", "Big."],
    "brand": "Acme",
    "categories": [["Kitchen", "Pans"]],
}


SMALL = Path()  # a folder for files that are made once


@pytest.fixture(scope="module", autouse=True)
def small_files(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is right is read; and libraries that import on first use have done so before they are watched."""
    global SMALL
    SMALL = tmp_path_factory.mktemp("small")
    rows = pd.DataFrame([RECORD, {**RECORD, "item_id": "q"}])
    rows.to_csv(SMALL / "t.csv", index=False)
    rows.to_parquet(SMALL / "t.parquet")
    rows.to_json(SMALL / "t.jsonl", orient="records", lines=True)
    for path in SMALL.iterdir():
        assert list(read_as_items(path)) == ["p", "q"]
        read_as_interactions(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def read_as_items(path: Path) -> dict[str, dict[str, str]]:
    return catalogue(read_table(path, ITEM_FIELDS, optional=OPTIONAL_FIELDS, **READING))


def read_as_interactions(path: Path) -> None:
    with opened_base(path.parent, "X", memory_gb=1) as base:
        log = InteractionLog(read_interactions(path, **READING), base)
        kept = log.filtered(known_items=log.texts("item"), k_core=1, dayfirst=None)
    numbers = {item: number for number, item in enumerate(kept.bought())}
    made = histories(kept, numbers)
    windows = split_windows(made, split="global")["train"]
    cells = csv_cells(made, *({number: item for item, number in numbers.items()},) * 2)
    assert len("".join(csv_lines(made, windows, cells, max_history=3)).splitlines()) > len(windows)


READ_TABLE = st.sampled_from([read_as_items, read_as_interactions])


# ---------------------------------------------------------------------------------------------- tables

TIMES = ["13/01/2016", "02/01/2016", "2016-01-31T12:00:00Z", "1465862400", "1465862400000", "1.46E+12", "31 Jan 2016", "7"]
TIMES += ["2016-W54-9", "30 Feb 2016 25:61", "1e308", "9" * 25, "20160131", "00/00/0000", "2016-366", "-5", "1970-01-01"]


def times() -> st.SearchStrategy[str]:
    digits = st.text("0123456789/-.:TZ+eE ", min_size=1, max_size=24)
    return st.one_of(st.sampled_from(TIMES), digits, odd_numbers().map(str), odd_text())


@st.composite
def csv_files(draw: Callable) -> bytes:
    """A CSV of a few rows: ragged, with odd names, cells, separators and quotes, and perhaps with changed bytes."""
    header = draw(st.permutations(list(RECORD)))
    header = header[: draw(st.sampled_from([7, 7, 7, 7, 3, 1]))] + draw(st.lists(odd_text(), max_size=1))
    cells = {"timestamp": times(), "item_id": st.sampled_from(["p", "q", " p ", "05", "1.0"])}
    cell = [st.one_of(cells.get(name, odd_text()), odd_text()) if draw(st.integers(0, 5)) == 0 else None for name in header]
    rows = []
    for number in range(draw(st.integers(0, 5))):
        usual = {**RECORD, "timestamp": TIMES[3], "item_id": "pq"[number % 2]}
        row = [str(usual.get(name, "")) if made is None else draw(made) for name, made in zip(header, cell, strict=True)]
        rows.append(row[: draw(st.sampled_from([len(row)] * 6 + [1]))] + draw(st.sampled_from([[]] * 9 + [["x"]])))
    text = io.StringIO()
    writer = csv.writer(
        text, lineterminator=draw(st.sampled_from(["\n", "\r\n", "\r"])), quoting=draw(st.sampled_from([0, 1]))
    )
    with contextlib.suppress(csv.Error):
        writer.writerows([header, *rows])
    content = text.getvalue().encode("utf-8", "surrogatepass")
    return draw(mutated_bytes(content)) if draw(st.integers(0, 3)) == 0 else content


@st.composite
def json_lines(draw: Callable) -> bytes:
    """A few records a line, changed, as JSON or as Python writes them."""
    lines = []
    for number in range(draw(st.integers(1, 4))):
        record = {**RECORD, "item_id": "pq"[number % 2]}
        how = draw(st.sampled_from(["as it is", "json", "python", "time", "raw"]))
        if how == "python":
            lines.append(repr(draw(mutated_tree(record))).encode("utf-8", "surrogatepass").replace(b"\n", b""))
        elif how == "raw":
            lines.append(draw(mutated_json(record)).replace(b"\n", b""))
        else:
            record = draw(mutated_tree(record)) if how == "json" else record
            if how == "time":
                record["timestamp"] = draw(st.one_of(times(), odd_json()))
            lines.append(json.dumps(record).encode())
    return b"\n".join(lines)


TYPES: list[tuple[pyarrow.DataType, st.SearchStrategy]] = [
    (pyarrow.string(), st.sampled_from(["p", "q", "", "Pan", "13/01/2016", "a\0b", "\x1b[2J", "x" * 20_000])),
    (pyarrow.large_string(), st.sampled_from(["p", "1465862400"])),
    (pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), st.sampled_from(["p", "q"])),
    (pyarrow.binary(), st.binary(max_size=4)),
    (pyarrow.int64(), st.integers(-(2**63), 2**63 - 1)),
    (pyarrow.int64(), st.sampled_from([1465862400, 1465862401, 7])),
    (pyarrow.uint64(), st.integers(0, 2**64 - 1)),
    (pyarrow.int8(), st.integers(-128, 127)),
    (pyarrow.float32(), st.floats(width=32)),
    (pyarrow.float64(), st.floats()),
    (pyarrow.bool_(), st.booleans()),
    (pyarrow.null(), st.none()),
    (pyarrow.timestamp("s"), st.integers(-(2**52), 2**52)),
    *((pyarrow.timestamp(unit), st.integers(-(2**63), 2**63 - 1)) for unit in ("ms", "us", "ns")),
    (pyarrow.timestamp("ms", tz="Europe/Berlin"), st.sampled_from([0, 1465862400000, -1, 2**55])),
    (pyarrow.date32(), st.integers(-(2**31), 2**31 - 1)),
    (pyarrow.date32(), st.dates(datetime.date(1960, 1, 1), datetime.date(2110, 1, 1))),
    (pyarrow.time64("us"), st.integers(0, 86_399_999_999)),
    (pyarrow.duration("s"), st.integers(-(2**63), 2**63 - 1)),
    (pyarrow.decimal128(20, 3), st.sampled_from([Decimal("1.5"), Decimal("1465862400"), Decimal("-1")])),
    (pyarrow.list_(pyarrow.string()), st.lists(st.one_of(st.none(), st.just("Pan")), max_size=3)),
    (pyarrow.list_(pyarrow.list_(pyarrow.int64())), st.lists(st.lists(st.integers(0, 3), max_size=2), max_size=2)),
    (pyarrow.struct([("a", pyarrow.string())]), st.fixed_dictionaries({"a": st.sampled_from(["p", None])})),
    (pyarrow.map_(pyarrow.string(), pyarrow.int64()), st.lists(st.tuples(st.just("p"), st.integers(0, 3)), max_size=2)),
]


@st.composite
def parquet_files(draw: Callable) -> bytes:
    """A Parquet file whose columns are of any type, perhaps with changed bytes."""
    count = draw(st.integers(0, 4))
    columns = {}
    for name in RECORD:
        kind, values = (
            draw(st.sampled_from(TYPES)) if draw(st.integers(0, 2)) == 0 else TYPES[5 if name == "timestamp" else 1]
        )
        cells = draw(
            st.lists(st.one_of(values, st.none()) if draw(st.booleans()) else values, min_size=count, max_size=count)
        )
        columns[name] = pyarrow.array(cells, kind)
    names = [*columns][: draw(st.sampled_from([7, 7, 3]))]
    table = pyarrow.table([columns[name] for name in names], names)
    if draw(st.integers(0, 9)) == 0:
        table = table.append_column("title", table.column(0))
    sink = io.BytesIO()
    compression = draw(st.sampled_from(["none", "snappy", "zstd", "gzip"]))
    pyarrow.parquet.write_table(table, sink, compression=compression, use_dictionary=draw(st.booleans()))
    return draw(mutated_bytes(sink.getvalue())) if draw(st.booleans()) else sink.getvalue()


ENDINGS_OF_TEXT = [".data", ".csv", ".tsv", ".inter", ".item", ".txt", ".dat", ".inter.gz"]


@fuzz(csv_files(), st.sampled_from(ENDINGS_OF_TEXT), st.sampled_from([b",", b";", b"\t", b"|", b"::", b":"]), READ_TABLE)
def test_text_with_a_header_is_read_or_refused(folder, content, ending, separator, read):
    path = folder / f"t{ending}"
    content = content.replace(b",", separator).replace(b"timestamp", b"timestamp:float", ending.startswith(".inter"))
    path.write_bytes(gzip.compress(content, 1) if ending.endswith("gz") else content)
    accepted(lambda: read(path), InputError, writes_in=folder)


RATINGS = ["1::11::5::978300001\n2::11::4::978300002\n1::12::3::978300003\n", "1\t11\t5\t978300001\n2\t11\t4\t978300002\n"]
RATINGS += ["A1,B11,5.0,978300001\nA2,B11,4.0,978300002\n"]
MOVIES = "11::Toy Story (1995)::Animation|Comedy\n12::Am\u00e9lie::(no genres listed)\n"
HEADERLESS = [text.encode() for text in (*RATINGS, MOVIES, "1 11 12\n2 12\n")] + [MOVIES.encode("latin-1")]


@fuzz(st.sampled_from(HEADERLESS).flatmap(mutated_bytes), st.sampled_from(ENDINGS_OF_TEXT), READ_TABLE)
def test_text_without_a_header_is_read_or_refused(folder, content, ending, read):
    path = folder / f"t{ending}"
    path.write_bytes(gzip.compress(content, 1) if ending.endswith("gz") else content)
    accepted(lambda: read(path), InputError, writes_in=folder)


SEQUENCES = {"0": [0, 1, 2], "1": [2, 0], "ann": ["B00X", "B00Y"]}
BY_ID = {"0": {"title": "Pan", "description": ["Steel."], "brand": "Acme"}, "1": {"title": "Tab", "features": ["Big"]}}


OBJECT_ENDINGS = ["inter.json", "item.json", "json", "json.gz"]


@fuzz(st.sampled_from([SEQUENCES, BY_ID]).flatmap(mutated_json), st.sampled_from(OBJECT_ENDINGS), READ_TABLE)
def test_one_object_of_json_is_read_or_refused(folder, content, ending, read):
    path = folder / f"t.{ending}"
    path.write_bytes(gzip.compress(content, 1) if ending.endswith("gz") else content)
    accepted(lambda: read(path), InputError, writes_in=folder)


@fuzz(mutated_bytes(b"1 11 12\n2 12 11\n\n3 12\n"), mutated_json({"id2item": {"11": "B00X", "12": "B00Y"}}))
def test_lines_of_p5_and_its_table_of_ids_are_read_or_refused(folder, content, maps):
    path = folder / "sequential_data.txt"
    path.write_bytes(content)
    (folder / "datamaps.json").write_bytes(maps)
    accepted(lambda: read_as_interactions(path), InputError, writes_in=folder)


MARKS = ["<b>", "</b>", "<br/>", "&amp;", "&lt;", "&#", "x", "<script", "</script>", "<!--", "-->", "<", ">", "&#x1b;"]
MARKS += ["&#0;", "&#55357;", "<a href='", " ", "5"]


@fuzz(st.one_of(odd_text(), st.lists(st.sampled_from(MARKS)).map("".join)))
def test_mark_up_is_dropped_whatever_it_is(folder, text):
    assert accepted(lambda: without_markup(text).encode(errors="surrogatepass"), InputError, writes_in=folder)
    assert not [tag for tag in ("<b>", "</b>", "<br/>") if tag in without_markup(text.replace("&", ""))]


@fuzz(json_lines(), READ_TABLE)
def test_json_lines_are_read_or_refused(folder, content, read):
    path = folder / "t.jsonl"
    path.write_bytes(content)
    accepted(lambda: read(path), InputError, writes_in=folder)


@fuzz(parquet_files(), READ_TABLE)
def test_a_parquet_file_is_read_or_refused(folder, content, read):
    path = folder / "t.parquet"
    path.write_bytes(content)
    accepted(lambda: read(path), InputError, writes_in=folder)


@fuzz(st.one_of(csv_files(), json_lines()), st.sampled_from(["t.csv.gz", "t.json.gz"]), READ_TABLE, st.data())
def test_packed_text_is_read_or_refused(folder, content, name, read, data):
    path = folder / name
    packed = gzip.compress(content, 1, mtime=0)
    path.write_bytes(data.draw(mutated_bytes(packed)) if data.draw(st.booleans()) else packed)
    accepted(lambda: read(path), InputError, writes_in=folder)


ENDINGS = ["t", "t.csv", "t.zip", "t.json", "t.jsonl.gz", "t.parquet", "t.parquet.gz", "t.csv.bz2", "t." + "x" * 200]


@fuzz(st.one_of(st.binary(max_size=300), st.sampled_from([b"PK\3\4", b"\x1f\x8b", b"PAR1", b"\xff\xfe"])),
      st.sampled_from(ENDINGS), READ_TABLE)  # fmt: skip
def test_any_bytes_under_any_ending_are_read_or_refused(folder, content, name, read):
    path = folder / name
    path.write_bytes(content)
    accepted(lambda: read(path), InputError, writes_in=folder)


@fuzz(st.one_of(odd_text(), odd_json().map(repr), st.text("[](){},'\"1-a\\xub+ ", max_size=40).map("[{}".format)))
def test_any_text_of_a_field_is_running_text(folder, text):
    assert accepted(lambda: plain(text), InputError, writes_in=folder)


# ---------------------------------------------------------------------------------------------- JSON of rq's own

ITEMS = {
    "0": {"title": "Pan", "description": "['Steel.', 'Big.']", "brand": "", "categories": "Kitchen"},
    "1": {"title": "Tab", "description": "", "brand": "Acme", "categories": ["a", ["b"]]},
}
INDEX = {"0": ["<a_1>", "<b_2>"], "1": ["<a_1>", "<b_0>", "<c_0>"], "2": ["<a_0>", "<b_3>"]}
SETTINGS = {**settings.DEFAULTS, "interactions": "orders.csv", "rows_kept": 81, "split": None}
ORIGIN = {"encoder": "E", "encoder_sha256": "3f2a90c1", "pooling": "", "max_len": 0, "normalize": False, "fields": "title"}


@fuzz(mutated_json(ITEMS))
def test_items_are_read_or_refused(folder, content):
    path = folder / "X.item.json"
    path.write_bytes(content)
    accepted(lambda: [item_text(item) for item in read_items(path)], InputError, writes_in=folder)


@fuzz(mutated_json(INDEX))
def test_an_index_is_read_and_reported_and_appended_to_or_refused(folder, content):
    path = folder / "X.index.json"
    path.write_bytes(content)

    def read() -> None:
        index = index_file.read_sids(path)
        report.table([report.describe("X", index, sizes=None)])
        index_file.check_appendable(index, (4, 4), where=path)
        index_file.append_sids(path, [(1, 1)], first_item=len(index))
        assert len(index_file.read_sids(path)) == len(index) + 1

    accepted(read, InputError, writes_in=folder)


@fuzz(mutated_json(SETTINGS))
def test_settings_are_read_or_refused(folder, content):
    path = folder / "X.prepare.json"
    path.write_bytes(content)
    flags = argparse.Namespace(**dict.fromkeys(settings.DEFAULTS), index=path, append=False, interactions=path)

    def read() -> None:
        remembered = settings.read_settings(path)
        settings.fill_in(flags, remembered, path=path)
        settings.log_other_rows(flags, remembered, rows_kept=3)
        settings.to_keep(flags, remembered, rows_kept=3).encode()

    accepted(read, InputError, writes_in=folder)


@fuzz(mutated_bytes(b"raw_id,item_id\np,0\nq,1\n"))
def test_the_table_of_ids_is_read_or_refused(folder, content):
    path = folder / "X.item_ids.csv"
    path.write_bytes(content)
    accepted(lambda: prepare.read_numbers(path), InputError, writes_in=folder)


# ---------------------------------------------------------------------------------------------- arrays

ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)
DESCR = ["'<f4'", "'<f8'", "'<f2'", "'<i8'", "'|O'", "'<f16'", "'|b1'", "'<U3'", "'<f4, <i8'", "[('a', '<f4')]", "'(2,3)f4'"]
DESCR += ["'<f0'", "'|V0'", "'<M8[s]'", "None", "1.5", "['<f4']", "{'names': 3}", "'<c8'", "'>f4'", "'f'", "'\\x1b[2J'"]
SHAPES = [
    "(4, 3)",
    "(3, 4)",
    "(12,)",
    "()",
    "(4, 3, 1)",
    "(0, 3)",
    "(4, 0)",
    "(-4, -3)",
    "(True, 12)",
    "[4, 3]",
    "4",
    "None",
]
SHAPES += ["(10**9, 10**9)", "(9223372036854775807, 2)", "(99999999999999999999, 1)", "(4.0, 3)", "('4', 3)", "(4, 3) * 2"]


@st.composite
def npy_files(draw: Callable, array: np.ndarray = ROWS) -> bytes:
    """An .npy whose header says other than what follows, or is no header, or whose numbers are any."""
    shape = f"{array.shape}"
    how = draw(st.sampled_from(["header", "header", "bytes", "numbers", "text"]))
    if how == "numbers":
        array = np.array(draw(st.lists(odd_numbers().map(as_float), min_size=array.size, max_size=array.size)))
        array = array.astype(draw(st.sampled_from([np.float32, np.float64]))).reshape(4, -1)
    descr, order = f"'{array.dtype.str}'", "False"
    if how == "header":
        descr, shape = draw(st.sampled_from([descr, *DESCR])), draw(st.sampled_from([shape, shape, *SHAPES]))
        order = draw(st.sampled_from(["False", "True", "0", "None", "'x'"]))
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
    if how == "text":
        text = draw(st.one_of(odd_text(), odd_json().map(repr), st.just("[" * 5000), st.just("(" + text + ",")))
    header = text.encode("latin1", "replace") + b"\n"
    version = draw(st.sampled_from([1, 1, 1, 2, 3, 9]))
    length = len(header) + draw(st.sampled_from([0, 0, 0, 0, 5, -1]))
    size = min(max(length, 0), 65_535).to_bytes(2, "little") if version == 1 else max(length, 0).to_bytes(4, "little")
    content = (
        b"\x93NUMPY" + bytes([version, 0]) + size + header + array.tobytes() + draw(st.sampled_from([b"", b"", b"more"]))
    )
    return draw(mutated_bytes(content)) if how == "bytes" else content


def as_float(number: float) -> float:
    return float(max(min(number, 10**300), -(10**300))) if isinstance(number, int) else number


def read_embeddings(path: Path) -> None:
    embeddings = open_embeddings(path)
    embeddings.check_finite()
    assert embeddings.sample(2, seed=0).dtype == np.float32
    assert np.isfinite(np.square(embeddings.rows(embeddings.spread(3))).sum())


@fuzz(st.one_of(npy_files(), st.binary(max_size=200), st.just(b"PK\3\4")))
def test_embeddings_are_read_or_refused(folder, content):
    path = folder / "E.npy"
    path.write_bytes(content)
    accepted(lambda: read_embeddings(path), InputError, writes_in=folder)


@cache
def record(folder: Path) -> dict:
    path = folder / "whole.npy"
    write_record(path, Origin(**ORIGIN), ["a", "b", "c", "d"], ROWS)
    return json.loads(path.with_suffix(".encoder.json").read_text())


@fuzz(st.data())
def test_a_record_beside_embeddings_is_read_or_refused(folder, data):
    np.save(folder / "E.npy", ROWS)
    (folder / "E.encoder.json").write_bytes(data.draw(mutated_json(record(folder))))
    accepted(lambda: read_embeddings(folder / "E.npy"), InputError, writes_in=folder)


@fuzz(st.one_of(npy_files(), npy_files(np.arange(12).reshape(4, 3))), st.sampled_from([(12, 12, 12), (2, 2), (5, 4, 3)]))
def test_codes_are_read_or_refused(folder, content, levels):
    path = folder / "C.npy"
    path.write_bytes(content)
    accepted(lambda: index_file.check_codes(publishing.load_codes(path), levels, where=path), InputError, writes_in=folder)


# ---------------------------------------------------------------------------------------------- quantizers and encoders


@st.composite
def safetensors_files(draw: Callable, content: bytes) -> bytes:
    """A file of tensors whose header was changed, its length kept right or not, or with changed bytes."""
    if draw(st.integers(0, 3)) == 0:
        return draw(mutated_bytes(content))
    length = int.from_bytes(content[:8], "little")
    header = draw(mutated_json(json.loads(content[8 : 8 + length])))
    said = draw(st.sampled_from([len(header)] * 6 + [0, 2**63, len(header) + 9]))
    return said.to_bytes(8, "little") + header + content[8 + length :]


@cache
def checkpoint_files(method: str) -> tuple[dict, bytes]:
    """config.json and model.safetensors of a small quantizer."""
    hidden = (4,) if method in quantizers.NETWORK_METHODS else ()
    design = quantizers.Design(method, 3, (4, 4), latent=2 * (method == "rqvae"), hidden=hidden, origin=Origin(**ORIGIN))
    with publishing.whole_path(SMALL / method) as temporary:
        checkpoints.save_checkpoint(quantizers.Quantizer(design), temporary)
    saved = SMALL / method
    return json.loads((saved / "config.json").read_text()), (saved / "model.safetensors").read_bytes()


@fuzz(st.sampled_from(["rqkmeans", "rqvae", "rqkmeans_plus"]), st.sampled_from(["config", "config", "weights"]), st.data())
def test_a_checkpoint_is_read_or_refused(folder, method, which, data):
    config, weights = checkpoint_files(method)
    text = data.draw(mutated_json(config)) if which == "config" else json.dumps(config).encode()
    (folder / "config.json").write_bytes(text)
    (folder / "model.safetensors").write_bytes(data.draw(safetensors_files(weights)) if which == "weights" else weights)
    accepted(lambda: checkpoints.load_checkpoint(folder, n_dims=3).codes(ROWS), InputError, writes_in=folder)


@fuzz(st.lists(npy_files(), min_size=1, max_size=3), st.data())
def test_codebooks_alone_are_read_or_refused(folder, arrays, data):
    whole = io.BytesIO()
    np.save(whole, ROWS)
    packed = io.BytesIO()
    name = data.draw(st.sampled_from(["codebook_{}.npy"] * 5 + ["codebook_{}", "../{}", "codebook_0.npy"]))
    with zipfile.ZipFile(packed, "w", data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))) as archive:
        for level, array in enumerate(arrays):
            archive.writestr(name.format(level), array if data.draw(st.booleans()) else whole.getvalue())
    content = packed.getvalue()
    path = folder / "X.npz"
    path.write_bytes(data.draw(mutated_bytes(content)) if data.draw(st.booleans()) else content)
    accepted(lambda: checkpoints.load_checkpoint(path, n_dims=3).codes(ROWS), InputError, writes_in=folder)


@fuzz(mutated_json(["pan", "steel"]), st.sampled_from(["words", "weights"]), st.data())
def test_a_tfidf_encoder_is_read_or_refused(folder, words, which, data):
    tensors = {"idf": np.ones(2, np.float32), "components": np.ones((3, 2), np.float32)}
    weights = safetensors.numpy.save(tensors)
    (folder / "vocabulary.json").write_bytes(words if which == "words" else b'["pan", "steel"]')
    (folder / "tfidf.safetensors").write_bytes(data.draw(safetensors_files(weights)) if which == "weights" else weights)

    def read() -> None:
        words, idf_V, components_DV = text2emb.load_tfidf(folder)
        rows = np.zeros((2, len(components_DV)), np.float32)
        text2emb.embed_with_tfidf(["steel pan", ""], rows, words=words, idf_V=idf_V, components_DV=components_DV)

    accepted(read, InputError, writes_in=folder)


SENTENCE_FILES = {
    "1_Pooling/config.json": {"pooling_mode_lasttoken": False, "pooling_mode_mean_tokens": True},
    "modules.json": [{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "1_Pooling"}],
    "sentence_bert_config.json": {"max_seq_length": 256},
}


@fuzz(st.sampled_from(list(SENTENCE_FILES)), st.data())
def test_the_settings_of_a_sentence_encoder_are_read_or_refused(folder, name, data):
    (folder / "1_Pooling").mkdir(exist_ok=True)
    for other, right in SENTENCE_FILES.items():
        (folder / other).write_text(json.dumps(right))
    (folder / name).write_bytes(data.draw(mutated_json(SENTENCE_FILES[name])))
    accepted(lambda: own_settings(str(folder)), InputError, writes_in=folder)


@fuzz(mutated_json({"steps": {"index": {"collisions": "keep"}}, "files": {"X.index.json": "51d2", "X.info.txt": None}}))
def test_the_record_of_a_build_is_read_or_refused(folder, content):
    (folder / "X.build.json").write_bytes(content)
    accepted(lambda: BuildRecord(folder / "X.build.json"), InputError, writes_in=folder)


# ---------------------------------------------------------------------------------------------- command lines

COMMANDS = {
    build: ["--interactions=i.csv", "--items=m.csv", "--output_dir=out", "--name=X", "--k_core=1", "--plan"],
    prepare: ["--interactions=i.csv", "--items=m.csv", "--output_dir=out", "--name=X", "--k_core=1"],
    text2emb: ["--item_file=X.item.json", "--output=new.npy", "--dim=2"],
    report: ["X.index.json", "--data_path=E.npy", "--table=t.md", "--levels=4,4"],
    generate_indices: ["--codes_path=C.npy", "--levels=4,4", "--output=new.index.json"],
    generate_indices_plus: ["--codes_path=C.npy", "--levels=4,4", "--output=new.index.json"],
    rqkmeans: ["--data_path=E.npy", "--levels=2,2", "--output=new.index.json", "--device=cpu", "--rounds=1"],
    rqkmeans_constrained: ["--data_path=E.npy", "--levels=2,2", "--output=new.index.json", "--slack=0.5"],
    rqfaiss: ["--data_path=E.npy", "--levels=2,2", "--output=new.index.json", "--beam=2"],
    rqvae: ["--data_path=E.npy", "--levels=2,2", "--output=new.index.json", "--hidden=4", "--latent=2"],
    rqkmeans_plus: ["--data_path=E.npy", "--levels=2,2", "--output=new.index.json", "--hidden=4"],
}
FLAGS = ["item_file", "data_path", "levels", "ckpt_path", "output", "codes_output", "seed", "device", "collisions"]
FLAGS += ["capacity", "overwrite", "name", "output_dir", "index", "append", "k_core", "split", "max_history", "dayfirst"]
FLAGS += [f"{field}_column" for field in FIELD_NAMES] + ["encoder", "fields", "dim", "pooling", "max_len", "normalize"]
FLAGS += [
    "sep",
    "encoding",
    "bought_only",
    "codes_path",
    "table",
    "rounds",
    "slack",
    "sinkhorn_epsilon",
    "beam",
    "epochs",
    "learning_rate",
    "hidden",
]
FLAGS += ["sinkhorn_epsilons", "patience", "latent", "resume_from_checkpoint", "nonsense", "batch_size", "interactions"]
VALUES = [
    "",
    "-1",
    "0",
    "1",
    "2",
    "1e999",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "9" * 30,
    "2,2",
    "0,0",
    "1,",
    ",,",
    "8,two",
    "True",
]
VALUES += [
    ";",
    "tab",
    "::",
    "latin-1",
    "utf-16",
    "base64",
    "cp1252",
    "..",
    ".",
    "../../evil",
    "a/b",
    "new.npy",
    "X.index.json",
    "E.npy",
    "C.npy",
    "folder",
    "folder/x",
    "i.csv",
]
VALUES += ["X.item.json", "i.csv/below", "/dev/null", "/proc/new", "y" * 300, "cpu", "meta", "cuda:99", "token", "tfidf"]


def argv_value() -> st.SearchStrategy[str]:
    """What can be typed: any bytes but a NUL, since a file's name may be any. No slash: a test writes to no other folder."""
    return st.one_of(st.sampled_from(VALUES), odd_text().map(typable))


def typable(text: str) -> str:
    return text.translate({0: None, ord("/"): "|"}).encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")


@st.composite
def command_lines(draw: Callable) -> tuple[Any, list[str]]:
    """A command and a line for it that would run, with one to three arguments changed, left out or set in."""
    command = draw(st.sampled_from(list(COMMANDS)))
    line = list(COMMANDS[command])
    for _ in range(draw(st.integers(1, 3))):
        how = draw(st.sampled_from(["value", "value", "flag", "flag", "remove", "any"]))
        at = draw(st.integers(0, max(len(line) - 1, 0)))
        if how == "value" and line:
            line[at] = line[at].split("=")[0] + "=" + draw(argv_value())
        elif how == "flag":
            line += [f"--{draw(st.sampled_from(FLAGS))}", *draw(st.lists(argv_value(), max_size=1))]
        elif how == "remove" and line:
            del line[at]
        else:
            line[at:at] = [draw(argv_value())]
    return command, line


class Begun(Exception):
    """The checks of a command are over, and its work would begin."""


def begin(*_: object, **__: object) -> None:
    raise Begun


@pytest.fixture
def shop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the small files of COMMANDS, as the current one; long work is not done."""
    (folder / "folder").mkdir()
    (folder / "i.csv").write_text("user_id,item_id,timestamp\nu,p,1\nu,q,2\nv,p,3\nv,q,4\n")
    (folder / "m.csv").write_text("item_id,title\np,Pan\nq,Tab\n")
    (folder / "X.item.json").write_text('{"0": {"title": "Pan"}, "1": {"title": "Tab"}, "2": {"title": ""}, "3": {}}')
    index_file.write_sids(folder / "X.index.json", [(0, 0), (1, 1), (2, 2), (3, 3)])
    np.save(folder / "E.npy", ROWS)
    np.save(folder / "C.npy", np.arange(4)[:, None].repeat(2, axis=1))
    monkeypatch.chdir(folder)
    for name in ("write_tfidf", "write_model"):
        monkeypatch.setattr(text2emb, name, begin)
    monkeypatch.setattr(publishing, "finish", begin)
    monkeypatch.setattr("rq.clustering.training_sample", begin)
    return folder


@fuzz(command_lines())
def test_a_command_line_is_obeyed_or_refused_in_one_line(shop, typed):
    command, line = typed
    before = sorted(path.name for path in shop.iterdir())
    code = 0
    with contextlib.redirect_stderr(io.StringIO()) as written, contextlib.redirect_stdout(io.StringIO()):
        try:
            command.main(line)
        except Begun:
            pass
        except SystemExit as stopped:
            code = stopped.code or 0
    assert code in (0, 2)
    if code:
        check_line(written.getvalue().splitlines()[-1])
        assert sorted(path.name for path in shop.iterdir()) == before
    made = [path for path in shop.iterdir() if path.name not in before]
    assert not [path for path in made if path.suffix in (".part", ".old")]
    assert not list(shop.parent.glob("evil*"))
    for path in made:  # the next command line finds the folder as this one did
        shutil.rmtree(path) if path.is_dir() else path.unlink()
