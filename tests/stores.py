"""A small store on disk: a checkpoint that knows its SIDs, an index, titles and interactions, for evaluate.py."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
from conftest import byte_bpe, small_model

from sid_sft.catalogue import Catalogue, Item
from sid_sft.interactions import CSV_COLUMNS, Row
from sid_sft.recommend.trie import Trie, build_trie, score_sequences, sid_matrix
from sid_sft.tasks import DEFAULT_TASKS
from sid_sft.vocabulary import add_sid_tokens

TEXT = [
    "Semantic IDs of the products that one customer bought, oldest first, one per line:\n",
    "red wood screws",
    "glue",
]

FIXED = [(f"<a_{a}>", f"<b_{b}>", f"<c_{(a * b) % 5}>") for a, b in itertools.product(range(4), range(5))]
MIXED = [*FIXED, *(f + ("<d_1>",) for f in FIXED[:6]), FIXED[7][:2], ("<a_9>",)]


def catalogue_of(sids: list[tuple[str, ...]]) -> Catalogue:
    items = [Item(str(100 + place), sid, f"Product number {place}") for place, sid in enumerate(sids)]
    return Catalogue(items, {item.id: place for place, item in enumerate(items)})


def shop_rows(count: int, items: int) -> list[Row]:
    rng = np.random.default_rng(0)
    return [
        Row(f"u{i // 3}", tuple(rng.integers(items, size=1 + i % 4).tolist()), int(rng.integers(items)))
        for i in range(count)
    ]


def write_rows(path: Path, catalogue: Catalogue, rows: list[Row]) -> None:
    lines = [",".join(CSV_COLUMNS)]
    for row in rows:
        items = [catalogue.items[place] for place in row.history]
        target = catalogue.items[row.item]
        lists = [[i.title for i in items], [int(i.id) for i in items], ["".join(i.sid) for i in items]]
        titles, ids, sids = (f'"{cell}"' for cell in lists)
        lines.append(",".join([row.user, titles, target.title, ids, target.id, sids, "".join(target.sid)]))
    path.write_text("\n".join(lines) + "\n")


def write_store(folder: Path, sids: list[tuple[str, ...]] = FIXED) -> Path:
    """Writes X.index.json, X.item.json, X.test.csv, X.train.csv, model/ and plain/, a model without SID tokens."""
    catalogue = catalogue_of(sids)
    (folder / "X.index.json").write_text(json.dumps({item.id: item.sid for item in catalogue.items}))
    (folder / "X.item.json").write_text(
        json.dumps({item.id: {"title": item.title, "description": ""} for item in catalogue.items})
    )
    write_rows(folder / "X.test.csv", catalogue, shop_rows(30, len(sids)))
    write_rows(folder / "X.train.csv", catalogue, shop_rows(50, len(sids))[::-1])
    tokenizer = byte_bpe(TEXT, 300)
    tokenizer.save_pretrained(folder / "plain")
    small_model("qwen2", len(tokenizer), tie_word_embeddings=True).eval().save_pretrained(folder / "plain")
    add_sid_tokens(tokenizer, sorted({token for sid in sids for token in sid}))
    tokenizer.save_pretrained(folder / "model")
    small_model("qwen2", len(tokenizer), tie_word_embeddings=True).eval().save_pretrained(folder / "model")
    wording = {"category": "toy", "tasks": list(DEFAULT_TASKS), "prompts": {"sid_sid": "Bought so far:\n{history}"}}
    (folder / "model" / "prompts.json").write_text(json.dumps(wording))
    return folder


def arguments_of(store: Path, **flags) -> list[str]:
    values = {
        "base_model": store / "model",
        "test_file": store / "X.test.csv",
        "train_file": store / "X.train.csv",
        "sid_index_path": store / "X.index.json",
        "item_meta_path": store / "X.item.json",
        "num_beams": 10,
        "batch_size": 4,
    } | flags
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


# ---------------------------------------------------------------------------------------------- SIDs as token ids


def sequences_of(sids: list[tuple[int, ...]], end: int) -> list[list[int]]:
    """What is scored for SIDs of token ids: see score_sequences."""
    return [row[row >= 0].tolist() for row in score_sequences(matrix_of(sids), end)]


def table_of(sequences: list[list[int]]) -> Trie:
    return build_trie(matrix_of(sequences))


def matrix_of(sequences: list) -> np.ndarray:
    return sid_matrix(sequences, {token: token for sequence in sequences for token in sequence})
