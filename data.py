"""Files -> rows -> examples (text) -> ids: everything the model reads passes through here.

    catalogue = read_catalogue("X.index.json", "X.item.json")    # item id -> SID, title
    rows      = read_rows("X.train.csv", catalogue)              # user, history, next item
    prompt, answer = render(TASKS["sid_sid"], row, catalogue, prompts)
    dataset   = build_dataset(..., tokenizer=tokenizer)          # tokenized, on disk, memory-mapped

Left of `render` nothing needs a tokenizer; right of it nothing needs a file. A prompt's ids are the tokenizer's ids of
its text, so a server that is given the text sees what training saw. In the tasks over a history the constant text
comes first and the history last, one item a line, so that the next line is the answer:

    Purchases of one customer ..., one per line:
    <a_1><b_2><c_3>
    <a_4><b_5><c_6>
                      <- the model writes <a_7><b_8><c_9> and the end token

and a customer's shorter example is a token prefix of the longer one.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sid_sft.catalogue import Catalogue, Item, read_catalogue, read_index
from sid_sft.dataset_cache import CACHE_FORMAT, Source, open_dataset, sample_of, source_rows, write_dataset
from sid_sft.encoding import Encoder, Example, tokenizer_hash
from sid_sft.files import InputError, content_hash, error_text, file_hash
from sid_sft.interactions import CSV_COLUMNS, MAX_LEFT_OUT, Row, read_preferences, read_rows
from sid_sft.tasks import DEFAULT_TASKS, PROMPTS, TASKS, read_prompts, render

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "CSV_COLUMNS",
    "DEFAULT_TASKS",
    "PROMPTS",
    "TASKS",
    "Catalogue",
    "EvalSidDataset",
    "FusionSeqRecDataset",
    "InputError",
    "Item",
    "PreferenceSFTDataset",
    "Row",
    "SFTData",
    "SidItemFeatDataset",
    "SidSFTDataset",
    "Source",
    "TitleHistory2SidSFTDataset",
    "UserPreference2sidSFTDataset",
    "build_dataset",
    "read_catalogue",
    "read_index",
    "read_preferences",
    "read_prompts",
    "read_rows",
    "render",
]

logger = logging.getLogger("sft.data")


def build_dataset(
    source: Source,
    tasks: list[str],
    *,
    catalogue: Catalogue,
    prompts: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    cutoff_len: int,
    sample: int = -1,
    seed: int = 42,
    max_left_out: float = MAX_LEFT_OUT,
    cache_dir: Path,
    num_proc: int | None = None,
) -> Dataset:
    """The tokenized examples of the tasks, on disk and memory-mapped, built once per node and content.

    Columns: input_ids (list of int32), length, prompt_len, static_len, dropped, task (position in TASKS), user (a
    number per user; -1 for item tasks). `sample` > 0 takes that many random rows for each task. InputError
    where a larger share of the rows than `max_left_out` gives no example. The folder is named after a hash of all that
    decides its content; other processes of the node wait for the first and then open the same files.
    """
    from filelock import FileLock

    names = [task.name for task in TASKS.values() if task.group in tasks]
    key = content_hash(
        CACHE_FORMAT,
        names,
        [prompts[name] for name in names],
        catalogue.items,
        source.split,
        *(file_hash(path) if path else None for path in source[:2]),
        tokenizer_hash(tokenizer),
        cutoff_len,
        sample,
        seed,
        max_left_out,  # decides nothing in the folder, but whether there is one
    )
    folder = Path(cache_dir) / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{cache_dir}: cannot be made ({error_text(error)}); choose another --cache_dir") from None
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            scratch = Path(f"{folder}.tmp")
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            try:
                encoder = Encoder(tokenizer, catalogue, prompts, cutoff_len=cutoff_len)
                write_dataset(
                    scratch,
                    source,
                    names,
                    encoder,
                    sample=sample,
                    seed=seed,
                    max_left_out=max_left_out,
                    num_proc=num_proc,
                )
                os.replace(scratch, folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return open_dataset(folder, cutoff_len, max_left_out)


class SFTDataset:
    """A map-style dataset of one task: {"input_ids", "attention_mask", "labels"}, the prompt's labels -100.

    With test=True an example is its prompt alone and its labels are the answer's ids.
    """

    task_group: str
    source_kind = "interactions"

    def __init__(
        self,
        file: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        index_file: str,
        item_file: str | None = None,
        max_len: int = 512,
        sample: int = -1,
        seed: int = 42,
        max_left_out: float = MAX_LEFT_OUT,
        category: str = "",
        test: bool = False,
    ) -> None:
        if tokenizer is None:
            raise InputError(f"{type(self).__name__}: needs a tokenizer that knows the SID tokens")
        catalogue = read_catalogue(Path(index_file), Path(item_file) if item_file else None)
        prompts = read_prompts(None, category)
        encoder = Encoder(tokenizer, catalogue, prompts, cutoff_len=max_len)
        self.test = test
        self.examples: list[Example] = []
        self.texts: list[tuple[str, str]] = []
        for task in (task for task in TASKS.values() if task.group == self.task_group):
            rows = self.rows(file, catalogue, max_left_out)
            rows = [rows[place] for place in sample_of(len(rows), sample, seed, task)]
            for row, example in zip(rows, encoder.encode(task, rows), strict=True):
                if example is not None:
                    self.examples.append(example)
                    self.texts.append(render(task, row, catalogue, prompts))

    def rows(self, file: str | None, catalogue: Catalogue, max_left_out: float) -> list[Row]:
        if file is None and self.source_kind != "items":
            raise InputError(f"{type(self).__name__}: needs the file of its {self.source_kind}")
        path = Path(file) if file else None
        return list(source_rows(self.source_kind, Source(path, path), catalogue, logger.info, max_left_out))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place: int) -> dict[str, list[int]]:
        ids, prompt_len = self.examples[place][:2]
        if self.test:
            return {"input_ids": ids[:prompt_len], "attention_mask": [1] * prompt_len, "labels": ids[prompt_len:]}
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": [-100] * prompt_len + ids[prompt_len:],
        }


class SidSFTDataset(SFTDataset):
    """SID history -> next SID."""

    task_group = "sid_sid"


class SidItemFeatDataset(SFTDataset):
    """SID -> title and title -> SID of each item; takes no interaction file."""

    task_group, source_kind = "item", "items"


class FusionSeqRecDataset(SFTDataset):
    """SID history -> next title."""

    task_group = "sid_title"


class SFTData(SFTDataset):
    """Title history -> next title."""

    task_group = "title_title"


class TitleHistory2SidSFTDataset(SFTDataset):
    """Title history -> next SID."""

    task_group = "title_sid"


class PreferenceSFTDataset(SFTDataset):
    """SID history -> the user's preference in words, then the next SID."""

    task_group, source_kind = "preference", "preferences"


class UserPreference2sidSFTDataset(SFTDataset):
    """SID history and the user's preference -> next SID."""

    task_group, source_kind = "preference_sid", "preferences"


class EvalSidDataset(SidSFTDataset):
    """The prompts of SidSFTDataset, word for word, with the answers as labels."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "test": True})
