"""Text -> token ids: prompts and answers as the tokenizer reads their text, each title and SID encoded once."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from sid_sft.catalogue import Catalogue
from sid_sft.files import InputError, content_hash
from sid_sft.interactions import Row
from sid_sft.tasks import SEPARATOR, TASKS, Task, history_line, prompt_head, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Example(NamedTuple):
    """The ids of prompt and answer in one list, the answer's end token last.

    prompt_len: tokens of the prompt; all behind it is supervised.
    static_len: tokens before the first SID token, the part that is constant while only SID rows train.
    dropped: oldest history items left out to keep within the cutoff.
    """

    input_ids: list[int]
    prompt_len: int
    static_len: int
    dropped: int


# The pre-tokenizer patterns of GPT-2, of Qwen2 and of Llama-3: see `splits_at_lines`.
LINE_PATTERNS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
)


class Encoder:
    """Turns rows of one task into ids: those of the rendered text.

    Where it follows from the tokenizer's rules that the ids of a history are those of its lines one after another, each
    distinct line is encoded once: `sids_stand_alone` for SIDs, `splits_at_lines` for titles. Whole texts are encoded
    otherwise, in batches.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        catalogue: Catalogue,
        prompts: dict[str, str],
        *,
        cutoff_len: int,
    ) -> None:
        self.tokenizer, self.catalogue, self.prompts, self.cutoff_len = tokenizer, catalogue, prompts, cutoff_len
        tokens = sorted({token for item in catalogue.items for token in item.sid})
        ids = dict(zip(tokens, tokenizer.convert_tokens_to_ids(tokens), strict=True))
        self.sid_token_ids = frozenset(ids.values())
        self.sids = [[ids[token] for token in item.sid] for item in catalogue.items]
        self.prefix, self.suffix = added_around(tokenizer)

    def encode(self, task: Task, rows: list[Row]) -> list[Example | None]:
        """One example per row, or None where a text is missing or even the newest item alone is over the cutoff."""
        items = self.catalogue.items
        kept = [[place for place in row.history if task.shows == "sid" or items[place].title] for row in rows]
        answers = self.answer_ids(task, rows)
        prompts: list[list[int] | None] = [None] * len(rows)
        dropped, least, most = [0] * len(rows), [0] * len(rows), [max(len(history) - 1, 0) for history in kept]
        trial = {i: 0 for i, row in enumerate(rows) if (kept[i] or task.rows == "items") and self.has_texts(task, row)}
        while trial:  # bisects for the fewest items to drop, from none at all
            shorter = [rows[i]._replace(history=tuple(kept[i][count:])) for i, count in trial.items()]
            for (i, count), prompt in zip(trial.items(), self.prompt_ids(task, shorter), strict=True):
                if len(prompt) + len(answers[i]) <= self.cutoff_len:
                    prompts[i], dropped[i], most[i] = prompt, count, count - 1
                else:
                    least[i] = count + 1
            trial = {i: (least[i] + most[i]) // 2 for i in trial if least[i] <= most[i]}
        return [
            None if prompt is None else self.example(prompt, answer, count)
            for prompt, answer, count in zip(prompts, answers, dropped, strict=True)
        ]

    def example(self, prompt: list[int], answer: list[int], dropped: int) -> Example:
        ids = prompt + answer
        begin = len(prompt) if self.sid_token_ids.isdisjoint(prompt) else 0  # a title history is long and has none
        static_len = next((place for place in range(begin, len(ids)) if ids[place] in self.sid_token_ids), len(ids))
        return Example(ids, len(prompt), static_len, dropped)

    def has_texts(self, task: Task, row: Row) -> bool:
        """Whether the item has a title where the task asks for it, or shows it alone."""
        needed = task.answers == "title" or (task.rows == "items" and task.shows == "title")
        return bool(self.catalogue.items[row.item].title) or not needed

    def answer_ids(self, task: Task, rows: list[Row]) -> list[list[int]]:
        end = [self.tokenizer.eos_token_id]
        if task.answers == "title":
            return [self.titles[row.item] + end for row in rows]
        if task.answers == "preference":
            texts = self.text_ids([row.preference + SEPARATOR for row in rows])
            return [text + self.sids[row.item] + end for text, row in zip(texts, rows, strict=True)]
        return [self.sids[row.item] + end for row in rows]

    def prompt_ids(self, task: Task, rows: list[Row]) -> list[list[int]]:
        """The ids of whole prompts, with the special tokens that the tokenizer begins a text with."""
        lines = None if task.rows == "items" else self.lines(task.shows)
        heads = [prompt_head(task, row, self.prompts) for row in rows]
        if lines is None or (task.shows == "title" and not all(map(ends_its_line, heads))):
            texts = [render(task, row, self.catalogue, self.prompts)[0] for row in rows]
            return [self.prefix + ids for ids in self.text_ids(texts)]
        distinct = list(dict.fromkeys(heads))
        head_ids = dict(zip(distinct, self.text_ids(distinct), strict=True))
        return [
            [*self.prefix, *head_ids[head], *chain.from_iterable(lines[place] for place in row.history)]
            for head, row in zip(heads, rows, strict=True)
        ]

    def text_ids(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts without any special token around them."""
        if not texts:
            return []
        encoded = self.tokenizer(texts, return_attention_mask=False, return_token_type_ids=False)["input_ids"]
        return [ids[len(self.prefix) : len(ids) - len(self.suffix)] for ids in encoded]

    def prepare(self, tasks: list[Task]) -> None:
        """Encodes what the examples of the tasks share, so that it is done once and not in each process."""
        for task in tasks:
            if task.rows != "items":
                self.lines(task.shows)
            if task.answers == "title":
                self.answer_ids(task, [Row("", (), 0)])

    def needs_whole_texts(self, names: list[str]) -> bool:
        return any(TASKS[name].rows != "items" and self.lines(TASKS[name].shows) is None for name in names)

    def lines(self, shows: str) -> list[list[int]] | None:
        """The ids of each item's line in a history, or None where the ids of a history are not those of its lines."""
        return self.sid_lines if shows == "sid" else self.title_lines

    @functools.cached_property
    def titles(self) -> list[list[int]]:
        """Ids of each item's title as an answer."""
        return self.text_ids([item.title for item in self.catalogue.items])

    @functools.cached_property
    def sid_lines(self) -> list[list[int]] | None:
        if not sids_stand_alone(self.tokenizer, self.catalogue):
            return None
        line = "".join(self.catalogue.items[0].sid) + SEPARATOR
        separator = self.text_ids([line])[0][len(self.sids[0]) :]
        return [[*sid, *separator] for sid in self.sids]

    @functools.cached_property
    def title_lines(self) -> list[list[int]] | None:
        if not splits_at_lines(self.tokenizer):
            return None
        return self.text_ids([history_line(item, "title") for item in self.catalogue.items])


def added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer begins and ends a text with."""
    plain, full = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
    for begin in range(len(full) - len(plain), -1, -1):
        if full[begin : begin + len(plain)] == plain:
            return full[:begin], full[begin + len(plain) :]
    raise InputError("the tokenizer reads a text differently with special tokens; no prompt could be told from an answer")


def tokenizer_rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """The rules of a `tokenizers` tokenizer but for the last call's truncation and padding; None for any other kind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    return {**json.loads(backend.to_str()), "truncation": None, "padding": None}


def sids_stand_alone(tokenizer: PreTrainedTokenizerBase, catalogue: Catalogue) -> bool:
    """Whether SID tokens are cut out of a text before anything else, so that each part between them is read alone.

    So it is in a `tokenizers` tokenizer whose SID tokens are added, unnormalized tokens without conditions on what
    stands beside them, if no other added token can begin inside a SID token, end inside one or contain one. (One that
    takes white space from beside it stops at a SID token, which has none.)
    """
    rules = tokenizer_rules(tokenizer)
    if rules is None:
        return False
    wanted = {token for item in catalogue.items for token in item.sid}
    conditions = ("normalized", "lstrip", "rstrip", "single_word")
    for token in rules["added_tokens"]:
        if token["content"] in wanted:
            wanted.discard(token["content"])
            if any(token[condition] for condition in conditions):
                return False
        elif re.search(r"(?s:.)<|>(?s:.)", token["content"]):
            return False
    return not wanted


def splits_at_lines(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the ids of lines of text, none blank or with white space at an end, are the ids of each line alone.

    So it is in a byte-level BPE with one of LINE_PATTERNS: matching goes from left to right and never looks back; no
    match runs from a newline on into a line that begins with no white space, so one ends at each newline; and what is
    looked at behind a match is one character, which changes nothing for a newline that is alone. NFC composes nothing
    with a newline, and no added token may hold one or take white space from beside it.
    """
    rules = tokenizer_rules(tokenizer)
    if rules is None or rules["model"]["type"] != "BPE" or rules["model"].get("dropout"):
        return False
    if any(t["lstrip"] or t["rstrip"] or t["single_word"] or SEPARATOR in t["content"] for t in rules["added_tokens"]):
        return False
    splitter = rules["pre_tokenizer"] or {}
    steps = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    *splits, last = steps
    if (
        last.get("type") != "ByteLevel"
        or last["add_prefix_space"]
        or (rules["normalizer"] or {"type": "NFC"}) != {"type": "NFC"}
    ):
        return False
    if not splits:
        return last["use_regex"]  # the pattern of GPT-2
    known = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in LINE_PATTERNS]
    return len(splits) == 1 and splits[0] in known and not last["use_regex"]


def ends_its_line(head: str) -> bool:
    """Whether a line that follows the head is read alone: it is empty or ends in one newline behind a character."""
    return not head or re.search(r"\S\n\Z", head) is not None


def has_reserved_text(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> int:
    """How many texts contain a SID token or special token as text, which the tokenizer would read as that token."""
    reserved = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    if not reserved:
        return 0
    pattern = re.compile("|".join(map(re.escape, reserved)))
    return sum(bool(pattern.search(text)) for text in texts)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides a tokenizer's ids."""
    rules = tokenizer_rules(tokenizer) or [tokenizer.get_vocab(), repr(tokenizer)]
    return content_hash(type(tokenizer).__name__, rules, tokenizer.eos_token_id)
