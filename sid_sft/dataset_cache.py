"""Tokenized datasets on disk, memory-mapped: written once per content, opened by every process of the node.

    write_dataset(folder, Source(Path("X.train.csv")), ["sid_sid"], encoder, ...)
        folder/examples.arrow   {"input_ids": [464, ...], "length": 29, "prompt_len": 24, "task": 0, "user": 17, ...}
        folder/plan.safetensors the numbers as arrays, and what steps are planned with (forward/prefix_parts.py)
        folder/summary.json     files, notes for the log, and for each task: rows, examples, examples that were cut
        folder/contents.json    {"examples.arrow": [81234, "9f3c01aa"], "summary.json": [...]}: bytes and CRC-32 of each file
    cached_folder(cache_dir, key, write)  -> where the folder is: it is written unless one is there whose files are whole
    open_dataset(folder, cutoff_len=512)  -> the Dataset; logs the notes, whether this run or an earlier one wrote it

The tasks share the rows of a file, which are read once; each task draws its own sample of them.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sid_sft.catalogue import Catalogue
from sid_sft.encoding import Encoder, Example, count_with_added_tokens
from sid_sft.files import FaultHere, InputError, error_text, whole_folder
from sid_sft.interactions import MAX_LEFT_OUT, Row, check_share, read_preferences, read_rows
from sid_sft.locks import waiting_for
from sid_sft.tasks import TASKS, Task

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, Features
    from transformers import PreTrainedTokenizerBase

    from sid_sft.forward.examples import PlannedDataset

logger = logging.getLogger("sft.dataset_cache")

CACHE_FORMAT = 4  # raise it when the ids of the same text and files change, or what is known of them
CACHE_DIR = Path("~/.cache/sid-sft")  # where datasets are kept unless another folder is given
ROWS_AT_ONCE = 10_000  # rows encoded together, and examples in a piece of the file; each piece is read to open it
CONTENTS_FILE = "contents.json"
NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}  # a cache that is there to be read


class Source(NamedTuple):
    """The files that a dataset's rows are read from: Source(Path("X.train.csv")) for tasks over interactions and items,
    Source(Path("train/part-*.parquet")) where these are several.

    The tasks over preferences read the entries of one split of a preference file.
    """

    interactions: Path | None = None
    preferences: Path | None = None
    split: str = "train"


# ---------------------------------------------------------------------------------------------- a folder of the cache


def cached_folder(cache_dir: Path, key: str, write: Callable[[Path], None]) -> Path:
    """The folder cache_dir/key, whole; where it is not, `write` fills it, or a private one if cache_dir is read-only.

    The first process of a node writes it; the others wait and then take the same files. A folder that is there and whole
    is taken without anything being written. InputError where the folder can neither be read nor made.
    """
    own = Path(tempfile.gettempdir()) / f"sid-sft-{os.getuid()}"  # one for all processes of this user on this node
    refused = ""
    for place in dict.fromkeys([cache_dir, CACHE_DIR.expanduser(), own]):
        if place != cache_dir and os.path.lexists(place) and os.lstat(place).st_uid != os.getuid():
            continue  # somebody else's, who could put anything there
        folder = place / key
        try:
            if fault_of(folder) is not None:
                place.mkdir(parents=True, exist_ok=True, mode=0o777 if place == cache_dir else 0o700)
                fill(folder, write)
        except OSError as error:
            if error.errno not in NOT_ALLOWED:
                raise FaultHere(
                    f"{place}: cannot keep the dataset ({error_text(error)}); free some room or choose another --cache_dir"
                ) from None
            because = f"a dataset is damaged ({fault_of(folder)}), and the folder " if os.path.lexists(folder) else ""
            refused = refused or f"{place}: {because}cannot be written ({error_text(error)})"
            continue
        if refused:
            logger.info(f"{refused}; the dataset is kept in {place}")
        return folder
    raise FaultHere(f"{refused}, nor can any folder of this user; choose another --cache_dir")


def fill(folder: Path, write: Callable[[Path], None]) -> None:
    """Writes a folder of the cache, unless another process has done so before it is this one's turn."""
    with waiting_for(folder.with_name(f"{folder.name}.lock")):
        if (fault := fault_of(folder)) is None:
            return
        if os.path.lexists(folder):
            logger.info(f"{folder}: {fault}, so the dataset is built again")
        with whole_folder(folder) as scratch:
            write(scratch)
            write_contents(scratch)


def write_contents(folder: Path) -> None:
    """Writes what makes the folder whole: the size and the checksum of each of its files."""
    contents = {path.name: [path.stat().st_size, checksum(path)] for path in sorted(folder.iterdir())}
    (folder / CONTENTS_FILE).write_text(json.dumps(contents, indent=1))


def fault_of(folder: Path) -> str | None:
    """Why a folder is not as `cached_folder` wrote it: "examples.arrow has another content"; None where it is.

    All bytes are read, at some GB/s from memory: they are needed anyway, and a damaged file would train on other ids.
    """
    try:
        contents = json.loads((folder / CONTENTS_FILE).read_text())
        for name, (size, digest) in contents.items():
            path = folder / name
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes where {size:,} were written"
            if checksum(path) != digest:
                return f"{name} has another content than was written"
        return None if "summary.json" in contents else f"{CONTENTS_FILE} lacks summary.json"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error_text(error)})"
    except (ValueError, TypeError, AttributeError):
        return f"{CONTENTS_FILE} is damaged"


def checksum(path: Path) -> str:
    """The CRC-32 of a file's bytes, in hexadecimal: it tells any single wrong bit, at twice the speed of SHA-256."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found = zlib.crc32(block, found)
    return f"{found:08x}"


# ---------------------------------------------------------------------------------------------- what a folder holds


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
    """Writes the examples of the tasks `names`, in this order, as Arrow files, and their summary."""
    import numpy as np
    from datasets import concatenate_datasets

    from sid_sft.forward.examples import PLAN_FILE, Examples
    from sid_sft.forward.mapped import write_arrays
    from sid_sft.forward.prefix_parts import plan_arrays

    notes: list[str] = []
    users: dict[str, int] = {"": -1}
    tables: dict[str, Dataset] = {}  # by what a task makes examples of: several tasks share the rows of a CSV
    sampled: dict[str, Dataset] = {}  # by task
    for name in names:
        task = TASKS[name]
        if task.rows not in tables:
            source_rows = rows_of(task.rows, source, encoder.catalogue, notes.append, max_left_out)
            tables[task.rows] = write_rows(folder / f"rows-{task.rows}.arrow", source_rows, users)
        table = tables[task.rows]
        numbered = table.add_column("task", np.full(len(table), list(TASKS).index(name), np.int8))
        sampled[name] = numbered.select(sample_of(len(table), sample, seed, task))
    rows = concatenate_datasets(list(sampled.values()))
    encoder.prepare([TASKS[name] for name in names])
    encoded = rows.map(
        functools.partial(encode_batch, encoder=encoder),
        batched=True,
        batch_size=ROWS_AT_ONCE,
        num_proc=processes(len(rows), num_proc, whole_texts=encoder.needs_whole_texts(names)),
        remove_columns=rows.column_names,
        features=example_features(),
        cache_file_name=str(folder / "examples.arrow"),
        new_fingerprint=folder.stem,
        desc="Encoding",
    )
    texts = chain((item.title for item in encoder.catalogue.items), preferences_of(tables.get("preferences")))
    if misread := count_with_added_tokens(encoder.tokenizer, texts):
        notes.append(f"{misread:,} titles or preferences hold a SID or special token as text, which is read as that token")
    summary = {
        "files": [Path(file["filename"]).name for file in encoded.cache_files],
        "notes": notes,
        "tasks": count_rows_and_examples(encoded, sampled, encoder.catalogue),
    }
    for table in tables.values():
        for file in table.cache_files:
            Path(file["filename"]).unlink()
    if len(encoded):
        write_arrays(folder / PLAN_FILE, plan_arrays(Examples(encoded)))
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))


def sample_of(count: int, sample: int, seed: int, task: Task) -> Sequence[int] | np.ndarray:
    """The positions, ascending, of the rows that a task uses: all, or `sample` random ones drawn by seed and task alone."""
    if not 0 < sample < count:
        return range(count)
    import numpy as np

    return np.sort(np.random.default_rng([seed, list(TASKS).index(task.name)]).choice(count, sample, replace=False))


def count_rows_and_examples(
    encoded: Dataset, sampled: dict[str, Dataset], catalogue: Catalogue
) -> dict[str, dict[str, int]]:
    """{"item_sid_title": {"rows": 5, "untitled": 1, "examples": 4, "cut": 0}}: what became of each task's sampled rows."""
    examples, cut = count_examples(encoded)
    counts = {}
    for name, rows in sampled.items():
        of_items, number = TASKS[name].rows == "items", list(TASKS).index(name)
        counts[name] = {
            "rows": len(rows),
            "untitled": sum(not catalogue.items[item].title for item in rows["item"]) if of_items else 0,
            "examples": int(examples[number]),
            "cut": int(cut[number]),
        }
    return counts


def count_examples(encoded: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays (tasks,): how many examples each task of TASKS has, and how many of them lost items to the cutoff."""
    import numpy as np

    counts = np.zeros((2, len(TASKS)), np.int64)
    for batch in encoded.select_columns(["task", "dropped"]).with_format("numpy").iter(100_000):
        for row, tasks in zip(counts, (batch["task"], batch["task"][batch["dropped"] > 0]), strict=True):
            row += np.bincount(tasks, minlength=len(TASKS))
    return counts[0], counts[1]


def preferences_of(table: Dataset | None) -> Iterable[str]:
    """The preferences in words of a table of rows; none where no task reads preferences."""
    return () if table is None else table["preference"]


def processes(rows: int, num_proc: int | None, *, whole_texts: bool) -> int | None:
    """How many processes to start for encoding; None, this one alone, where starting others would take longer."""
    wanted = num_proc or min(os.cpu_count() or 1, 8)
    return wanted if rows >= (15_000 if whole_texts else 100_000) and wanted > 1 else None


def rows_of(
    kind: str, source: Source, catalogue: Catalogue, note: Callable[[str], None], max_left_out: float
) -> Iterable[Row]:
    """The rows that tasks of one kind make examples of: "items" -> Row("", (), 0), Row("", (), 1), ... of the catalogue."""
    if kind == "items":
        return (Row("", (), item) for item in range(len(catalogue.items)))
    path = source.interactions if kind == "interactions" else source.preferences
    if path is None:
        raise InputError(f"no file of {kind} is given; the tasks over {kind} need one")
    if kind == "interactions":
        return read_rows(path, catalogue, note, max_left_out=max_left_out)
    return read_preferences(path, catalogue, source.split, note, max_left_out=max_left_out)


def write_rows(path: Path, rows: Iterable[Row], users: dict[str, int]) -> Dataset:
    """Rows as an Arrow table on disk. A user becomes a number of `users`, which grows: {"": -1, "ann": 1, "bob": 2}."""
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
    """The columns of a dataset of examples and their types."""
    from datasets import Features, List, Value

    numbers = dict.fromkeys(("length", "prompt_len", "static_len", "dropped", "user"), Value("int32"))
    return Features({"input_ids": List(Value("int32")), "task": Value("int8"), **numbers})


def encode_batch(batch: dict[str, list], *, encoder: Encoder) -> dict[str, list]:
    """Columns of rows -> columns of examples. Rows without an example are left out."""
    examples: list[tuple] = []
    columns = zip(*(batch[name] for name in ("task", "user", "history", "item", "preference")), strict=True)
    for number, group in groupby(columns, key=itemgetter(0)):
        _, users, *fields = zip(*group, strict=True)
        rows = [Row("", tuple(history), *rest) for history, *rest in zip(*fields, strict=True)]
        for example, user in zip(encoder.encode(list(TASKS.values())[number], rows), users, strict=True):
            if example:
                examples.append((*example, len(example.input_ids), number, user))
    names = (*Example._fields, "length", "task", "user")
    return {name: [example[column] for example in examples] for column, name in enumerate(names)}


def open_dataset(folder: Path, cutoff_len: int, max_left_out: float = MAX_LEFT_OUT) -> PlannedDataset:
    """The memory-mapped dataset of a folder that `write_dataset` wrote; logs what was cut or left out.

    InputError where a task has no example, or lost a larger share of its rows than `max_left_out`. In the item tasks
    items without a title do not count as lost: a catalogue may have such items, and no row of a user is missing.
    """
    from datasets import Dataset, concatenate_datasets

    from sid_sft.forward.examples import PlannedDataset

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
    whole = concatenate_datasets([Dataset.from_file(str(folder / file)) for file in summary["files"]])
    dataset = PlannedDataset(whole.data, info=whole.info, fingerprint=folder.stem)
    dataset.folder = folder
    return dataset


def show_examples(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """Logs the first example of each task as the model will see it."""
    import numpy as np

    from sid_sft.forward.examples import Examples

    tasks, first = np.unique(Examples(dataset).task, return_index=True)
    for number, place in zip(tasks, first, strict=True):
        example = dataset[int(place)]
        ids, prompt_len = example["input_ids"], example["prompt_len"]
        prompt, answer = tokenizer.decode(ids[:prompt_len]), tokenizer.decode(ids[prompt_len:])
        logger.info(f"{list(TASKS)[number]}: {prompt!r} -> {answer!r}")
