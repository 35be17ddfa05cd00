"""Files -> rows -> examples -> ids: everything the model reads passes through here.

    catalogue = read_catalogue(Path("X.index.json"), Path("X.item.json"))   # item id -> SID, title
    prompts = read_prompts(None, "Toys")                                    # task -> template
    for row in read_rows(Path("X.train.csv"), catalogue):                   # Row("ann", history=(0, 1), item=2)
        prompt, answer = render(TASKS["sid_sid"], row, catalogue, prompts)  # text
    source = Source(Path("X.train.csv"))
    dataset = build_dataset(source, ["sid_sid"], catalogue=catalogue, prompts=prompts, tokenizer=tokenizer, ...)  # ids

The steps as modules, each of which imports only modules above it:

    sid_sft/files.py           reading and writing
    sid_sft/catalogue.py       the items: index and item file
    sid_sft/interactions.py    the rows: interactions or preferences (cells.py: what a CSV's cell may hold; parquet_rows.py)
    sid_sft/tasks.py           the examples as text: prompts and answers
    sid_sft/encoding.py        the examples as token ids
    sid_sft/dataset_cache.py   the dataset on disk

No step up to `render` needs a tokenizer. A prompt over a history begins with the text that is the same for all rows and
ends with the history, one item a line, oldest first; the answer is the next line:

    Semantic IDs of the Toys products that one customer bought, oldest first, one per line:
    <a_1><b_2><c_3>
    <a_4><b_5><c_6>
    <a_7><b_8><c_9>       <- the answer, which the model writes, and then the end token

The prompt for a user's earlier purchase is therefore a token prefix of the prompt for a later purchase.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sid_sft.catalogue import Catalogue, Item, read_catalogue, read_index
from sid_sft.dataset_cache import CACHE_DIR, CACHE_FORMAT, Source, cached_folder, open_dataset, write_dataset
from sid_sft.encoding import Encoder, tokenizer_hash
from sid_sft.files import InputError, content_hash
from sid_sft.interactions import CSV_COLUMNS, MAX_LEFT_OUT, Row, read_preferences, read_rows
from sid_sft.parts import source_hash
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
    number per user; -1 for item tasks). `tasks` are names that --tasks takes; `sample` > 0 takes that many random rows
    for each task. InputError where a larger share of the rows than `max_left_out` gives no example.

    The folder, such as cache_dir/7f105a443f04eb33e79091eb, is named by a hash of everything that decides its content.
    See `cached_folder` for what happens where it is damaged, in use by another process, or may not be written.
    """
    names = [task.name for task in TASKS.values() if task.group in tasks]
    key = content_hash(
        CACHE_FORMAT,
        names,
        [prompts[name] for name in names],
        catalogue.items,
        source.split,
        *(source_hash(path) if path else None for path in source[:2]),
        tokenizer_hash(tokenizer),
        cutoff_len,
        sample,
        seed,
        max_left_out,  # decides no id, but whether there is a dataset at all
    )

    def write(folder: Path) -> None:
        encoder = Encoder(tokenizer, catalogue, prompts, cutoff_len=cutoff_len)
        write_dataset(
            folder,
            source,
            names,
            encoder,
            sample=sample,
            seed=seed,
            max_left_out=max_left_out,
            num_proc=num_proc,
        )

    folder = cached_folder(Path(cache_dir), key, write)
    return open_dataset(folder, cutoff_len, max_left_out)


class SFTDataset:
    """What `build_dataset` gives for one --tasks name, as a map-style dataset of {"input_ids", "attention_mask", "labels"}.

    SidSFTDataset("X.train.csv", tokenizer, index_file="X.index.json", category="Toys")[0]
        -> {"input_ids": [464, ..., 16004, 2], "attention_mask": [1, ..., 1, 1], "labels": [-100, ..., 16004, 2]}

    The labels of the prompt are -100. With test=True the input is the prompt alone and the labels are the answer's ids.
    `file` is the interactions (one file or several, parts.py) or the preference file of the task; `max_len` is the cutoff in
    tokens; `prompts` are templates of one's own by task name, {"sid_sid": "{category} so far:\\n{history}"}, or a JSON file
    of such templates.
    """

    tasks: str  # the name that --tasks takes

    def __init__(
        self,
        file: str | Path | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        index_file: str | Path,
        item_file: str | Path | None = None,
        max_len: int = 512,
        sample: int = -1,
        seed: int = 42,
        max_left_out: float = MAX_LEFT_OUT,
        category: str = "",
        prompts: dict[str, str] | str | Path | None = None,
        cache_dir: str | Path = CACHE_DIR,
        test: bool = False,
    ) -> None:
        if tokenizer is None:
            raise InputError(f"{type(self).__name__}: needs a tokenizer that knows the SID tokens")
        self.test = test
        self.dataset = build_dataset(
            self.source(file),
            [self.tasks],
            catalogue=read_catalogue(Path(index_file), Path(item_file) if item_file else None),
            prompts=read_prompts(prompts, category),
            tokenizer=tokenizer,
            cutoff_len=max_len,
            sample=sample,
            seed=seed,
            max_left_out=max_left_out,
            cache_dir=Path(cache_dir).expanduser(),
        )

    def source(self, file: str | Path | None) -> Source:
        """The file as what the task reads: a CSV of interactions, a preference file, or nothing beside the catalogue."""
        (kind,) = {task.rows for task in TASKS.values() if task.group == self.tasks}
        path = Path(file) if file else None
        return {"items": Source(), "interactions": Source(path), "preferences": Source(None, path)}[kind]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        example = self.dataset[index]
        ids, prompt_len = example["input_ids"], example["prompt_len"]
        prompt, answer = ids[:prompt_len], ids[prompt_len:]
        if self.test:
            return {"input_ids": prompt, "attention_mask": [1] * prompt_len, "labels": answer}
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * prompt_len + answer}


class SidSFTDataset(SFTDataset):
    """SID history -> next SID."""

    tasks = "sid_sid"


class SidItemFeatDataset(SFTDataset):
    """SID -> title and title -> SID of each item; takes no interaction file."""

    tasks = "item"


class FusionSeqRecDataset(SFTDataset):
    """SID history -> next title."""

    tasks = "sid_title"


class SFTData(SFTDataset):
    """Title history -> next title."""

    tasks = "title_title"


class TitleHistory2SidSFTDataset(SFTDataset):
    """Title history -> next SID."""

    tasks = "title_sid"


class PreferenceSFTDataset(SFTDataset):
    """SID history -> the user's preference in words, then the next SID."""

    tasks = "preference"


class UserPreference2sidSFTDataset(SFTDataset):
    """SID history and the user's preference -> next SID."""

    tasks = "preference_sid"


class EvalSidDataset(SidSFTDataset):
    """The prompts of SidSFTDataset, word for word, with the answers' ids as labels."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "test": True})
