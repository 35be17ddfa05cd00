"""Tokenized datasets on disk, memory-mapped: built once per content, opened by every process of the node."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sid_sft.catalogue import Catalogue
from sid_sft.encoding import Encoder, Example, has_reserved_text
from sid_sft.files import InputError
from sid_sft.interactions import MAX_LEFT_OUT, Row, check_share, read_preferences, read_rows
from sid_sft.tasks import TASKS, Task

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, Features

logger = logging.getLogger("sft.dataset_cache")

CACHE_FORMAT = 3  # raise it when the ids of the same text and files change


class Source(NamedTuple):
    """Where the rows of a dataset come from: an interaction CSV or none, and a preference file (one split) or none."""

    interactions: Path | None = None
    preferences: Path | None = None
    split: str = "train"


def write_dataset(
    folder: Path,
    source: Source,
    names: list[str],
    encoder: Encoder,
    *,
    sample: int,
    seed: int,
    max_left_out: float,
    num_proc: int | None,
) -> None:
    """Writes the examples of all tasks as Arrow files, and summary.json: the files in order, and what to tell."""
    import numpy as np
    from datasets import concatenate_datasets

    notes: list[str] = []
    users: dict[str, int] = {"": -1}
    tables: dict[str, Dataset] = {}
    parts, untitled = [], {}
    without_title = {place for place, item in enumerate(encoder.catalogue.items) if not item.title}
    for name in names:
        task = TASKS[name]
        if task.rows not in tables:
            rows = source_rows(task.rows, source, encoder.catalogue, notes.append, max_left_out)
            tables[task.rows] = write_rows(folder / f"rows-{task.rows}.arrow", rows, users)
        table = tables[task.rows]
        part = table.add_column("task", np.full(len(table), list(TASKS).index(name), np.int8))
        parts.append(part.select(sample_of(len(part), sample, seed, task)))
        untitled[name] = sum(place in without_title for place in parts[-1]["item"]) if task.rows == "items" else 0
    rows = concatenate_datasets(parts)
    encoder.prepare([TASKS[name] for name in names])
    encoded = rows.map(
        functools.partial(encode_batch, encoder=encoder),
        batched=True,
        batch_size=1000,
        num_proc=processes(len(rows), num_proc, whole_texts=encoder.needs_whole_texts(names)),
        remove_columns=rows.column_names,
        features=example_features(),
        cache_file_name=str(folder / "examples.arrow"),
        new_fingerprint=folder.stem,
        desc="Encoding",
    )
    texts = chain((item.title for item in encoder.catalogue.items), preferences_of(tables.get("preferences")))
    if reserved := has_reserved_text(encoder.tokenizer, texts):
        notes.append(f"{reserved:,} titles or preferences hold a SID or special token as text, which is read as that token")
    examples, cut = count_examples(encoded)
    counts = zip(names, map(len, parts), (list(TASKS).index(name) for name in names), strict=True)
    summary = {
        "files": [Path(file["filename"]).name for file in encoded.cache_files],
        "notes": notes,
        "tasks": {
            name: {"rows": count, "untitled": untitled[name], "examples": int(examples[number]), "cut": int(cut[number])}
            for name, count, number in counts
        },
    }
    for table in tables.values():
        for file in table.cache_files:
            Path(file["filename"]).unlink()
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))


def sample_of(count: int, sample: int, seed: int, task: Task) -> Sequence[int]:
    """Which of a task's rows are used: all, or `sample` random ones in their order, whatever other tasks there are."""
    if not 0 < sample < count:
        return range(count)
    import numpy as np

    return np.sort(np.random.default_rng([seed, list(TASKS).index(task.name)]).choice(count, sample, replace=False))


def count_examples(encoded: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """How many examples each task of TASKS has, and how many of them lost items to the cutoff."""
    import numpy as np

    counts = np.zeros((2, len(TASKS)), np.int64)
    for batch in encoded.select_columns(["task", "dropped"]).with_format("numpy").iter(100_000):
        for row, tasks in zip(counts, (batch["task"], batch["task"][batch["dropped"] > 0]), strict=True):
            row += np.bincount(tasks, minlength=len(TASKS))
    return counts[0], counts[1]


def preferences_of(table: Dataset | None) -> Iterable[str]:
    return () if table is None else table["preference"]


def processes(rows: int, num_proc: int | None, *, whole_texts: bool) -> int | None:
    """How many processes encode: none beside this one where starting them takes longer than they would save."""
    wanted = num_proc or min(os.cpu_count() or 1, 8)
    return wanted if rows >= (15_000 if whole_texts else 100_000) and wanted > 1 else None


def source_rows(
    kind: str, source: Source, catalogue: Catalogue, tell: Callable[[str], None], max_left_out: float
) -> Iterable[Row]:
    if kind == "items":
        return (Row("", (), place) for place in range(len(catalogue.items)))
    if kind == "interactions":
        return read_rows(source.interactions, catalogue, tell, max_left_out=max_left_out)
    return read_preferences(source.preferences, catalogue, source.split, tell, max_left_out=max_left_out)


def write_rows(path: Path, rows: Iterable[Row], users: dict[str, int]) -> Dataset:
    """Rows as an Arrow table on disk: user (its number in `users`, which grows), history (places), item, preference."""
    from datasets import Dataset, Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    number = Value("int32")
    features = Features({"user": number, "history": List(number), "item": number, "preference": Value("string")})
    with ArrowWriter(features=features, path=str(path), writer_batch_size=1000) as writer:
        for row in rows:
            user = users.setdefault(row.user, len(users))
            writer.write({"user": user, "history": row.history, "item": row.item, "preference": row.preference})
        writer.finalize()
    return Dataset.from_file(str(path))


def example_features() -> Features:
    from datasets import Features, List, Value

    numbers = dict.fromkeys(("length", "prompt_len", "static_len", "dropped", "user"), Value("int32"))
    return Features({"input_ids": List(Value("int32")), "task": Value("int8"), **numbers})


def encode_batch(batch: dict[str, list], *, encoder: Encoder) -> dict[str, list]:
    """Columns of rows -> columns of examples; rows that give no example are left out."""
    examples: list[tuple] = []
    columns = zip(*(batch[name] for name in ("task", "user", "history", "item", "preference")), strict=True)
    for number, group in groupby(columns, key=itemgetter(0)):
        _, users, *fields = zip(*group, strict=True)
        rows = [Row("", tuple(history), *rest) for history, *rest in zip(*fields, strict=True)]
        for example, user in zip(encoder.encode(list(TASKS.values())[number], rows), users, strict=True):
            if example:
                examples.append((*example, len(example.input_ids), number, user))
    names = (*Example._fields, "length", "task", "user")
    return {name: [example[place] for example in examples] for place, name in enumerate(names)}


def open_dataset(folder: Path, cutoff_len: int, max_left_out: float = MAX_LEFT_OUT) -> Dataset:
    """The memory-mapped dataset of a finished folder; logs what was cut or left out.

    InputError where a task has no example or a larger share of its rows than `max_left_out` was left out. Items without
    a title do not count in the item tasks: a catalogue may have them, and no row of the user's is lost.
    """
    from datasets import Dataset, concatenate_datasets

    summary = json.loads((folder / "summary.json").read_text())
    for note in summary["notes"]:
        logger.info(note)
    for name, task in summary["tasks"].items():
        if task["cut"]:
            logger.info(
                f"{name}: {task['cut']:,} of {task['examples']:,} examples lost old items to --cutoff_len {cutoff_len}"
            )
        why = f"no title, or template, newest item and answer are longer than --cutoff_len {cutoff_len}"
        if not task["examples"]:
            raise InputError(
                f"task {name!r} has no example: its items have no titles (--item_meta_path) "
                f"or --cutoff_len {cutoff_len} is shorter than template, newest item and answer"
            )
        if missing := task["rows"] - task["examples"]:
            check_share(f"task {name!r}: ", missing - task["untitled"], task["rows"], max_left_out, why)
            logger.info(f"{name}: {missing:,} of {task['rows']:,} rows left out: {why}")
    return concatenate_datasets([Dataset.from_file(str(folder / file)) for file in summary["files"]])
