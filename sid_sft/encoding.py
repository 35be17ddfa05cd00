"""Text -> token ids: a prompt's ids are the tokenizer's ids of its text, though each title and SID is encoded once.

    encoder = Encoder(tokenizer, catalogue, prompts, cutoff_len=512)
    encoder.encode(TASKS["sid_sid"], [Row("ann", (0, 1), 2)])
        -> [Example(input_ids=[464, 1029, ..., 16004, 16011, 2], prompt_len=24, static_len=18, dropped=0)]

A server that is given the text of a prompt therefore sees the ids that training saw.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from sid_sft.catalogue import Catalogue
from sid_sft.files import InputError, content_hash
from sid_sft.interactions import Row
from sid_sft.tasks import SEPARATOR, TASKS, Task, around_history, history_line, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Example(NamedTuple):
    """The ids of a prompt and its answer in one list, the end token last.

    prompt_len: tokens of the prompt; all later tokens are supervised.
    static_len: tokens before the first SID token: nothing computed there changes while only SID rows train.
    dropped: how many items of the history, the oldest ones, were left out to keep within the cutoff.
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
    """Turns rows of one task into the ids of their rendered text.

    Where the tokenizer's rules guarantee that a history's ids are the ids of its lines one after another, each distinct
    line is encoded once (`sids_stand_alone` for SIDs, `splits_at_lines` for titles), and a history is put together
    from its lines' ids. Otherwise whole texts are encoded, in batches.
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
        ids = dict(zip(tokens, cast(list[int], tokenizer.convert_tokens_to_ids(tokens)), strict=True))
        self.sid_token_ids = frozenset(ids.values())
        self.sids = [[ids[token] for token in item.sid] for item in catalogue.items]
        self.prefix, self.suffix = added_around(tokenizer)

    def encode(self, task: Task, rows: list[Row]) -> list[Example | None]:
        """One example for each row, None where a title is missing or the newest item alone makes it longer than the cutoff.

        A longer history loses whole items, the oldest first, and no more of them than it must.
        """
        items = self.catalogue.items
        kept = [[item for item in row.history if task.shows == "sid" or items[item].title] for row in rows]
        answers = self.answer_ids(task, rows)
        prompts: list[list[int] | None] = [None] * len(rows)
        dropped, least, most = [0] * len(rows), [0] * len(rows), [max(len(history) - 1, 0) for history in kept]
        trial = {i: 0 for i, row in enumerate(rows) if (kept[i] or task.rows == "items") and self.has_texts(task, row)}
        while trial:  # row -> items to drop in this round: first 0, then a bisection for the fewest that suffice
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
        begin = len(prompt) if self.sid_token_ids.isdisjoint(prompt) else 0  # quick for a long history of titles
        static_len = next((at for at in range(begin, len(ids)) if ids[at] in self.sid_token_ids), len(ids))
        return Example(ids, len(prompt), static_len, dropped)

    def has_texts(self, task: Task, row: Row) -> bool:
        """Whether the item has a title, where the task asks for its title or shows nothing but its title."""
        needed = task.answers == "title" or (task.rows == "items" and task.shows == "title")
        return bool(self.catalogue.items[row.item].title) or not needed

    def answer_ids(self, task: Task, rows: list[Row]) -> list[list[int]]:
        """The ids of each row's answer, the end token last."""
        end = [self.tokenizer.eos_token_id]
        if task.answers == "title":
            return [self.titles[row.item] + end for row in rows]
        if task.answers == "preference":
            texts = self.text_ids([row.preference + SEPARATOR for row in rows])
            return [text + self.sids[row.item] + end for text, row in zip(texts, rows, strict=True)]
        return [self.sids[row.item] + end for row in rows]

    def prompt_ids(self, task: Task, rows: list[Row]) -> list[list[int]]:
        """The ids of each row's prompt, with the special tokens that the tokenizer begins a text with."""
        lines = None if task.rows == "items" else self.lines(task.shows)
        heads = [around_history(task, row, self.prompts)[0] for row in rows]
        tail = around_history(task, rows[0], self.prompts)[1] if rows else ""  # the same for all rows
        if lines is None or (task.shows == "title" and not (all(map(ends_its_line, heads)) and begins_a_line(tail))):
            texts = [render(task, row, self.catalogue, self.prompts)[0] for row in rows]
            return [self.prefix + ids for ids in self.text_ids(texts)]
        distinct = list(dict.fromkeys(heads))
        head_ids = dict(zip(distinct, self.text_ids(distinct), strict=True))
        prompts = [
            [*self.prefix, *head_ids[head], *chain.from_iterable(lines[item] for item in row.history)]
            for head, row in zip(heads, rows, strict=True)
        ]
        if not tail:
            return prompts
        overlap, ids = self.tail_ids(task.shows, tail)
        return [prompt[: len(prompt) - overlap] + ids for prompt in prompts]

    def text_ids(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts without any special token around them."""
        if not texts:
            return []
        encoded = self.tokenizer(texts, return_attention_mask=False, return_token_type_ids=False)["input_ids"]
        return [ids[len(self.prefix) : len(ids) - len(self.suffix)] for ids in encoded]

    def prepare(self, tasks: list[Task]) -> None:
        """Encodes the titles and lines that the examples of the tasks share, once, before several processes encode rows."""
        for task in tasks:
            if task.rows != "items":
                self.lines(task.shows)
            if task.answers == "title":
                self.answer_ids(task, [Row("", (), 0)])

    def needs_whole_texts(self, names: list[str]) -> bool:
        """Whether some of these tasks encode whole histories, which takes several times as long as joining lines."""
        return any(TASKS[name].rows != "items" and self.lines(TASKS[name].shows) is None for name in names)

    def lines(self, shows: str) -> list[list[int]] | None:
        """The ids of each item's line, or None where the ids of a history need not be the ids of its lines."""
        return self.sid_lines if shows == "sid" else self.title_lines

    @functools.cached_property
    def titles(self) -> list[list[int]]:
        """The ids of each item's title as an answer."""
        return self.text_ids([item.title for item in self.catalogue.items])

    @functools.cached_property
    def sid_lines(self) -> list[list[int]] | None:
        """The ids of each item's SID and the separator."""
        if not sids_stand_alone(self.tokenizer, self.catalogue):
            return None
        separator = self.after_sid(SEPARATOR)
        return [[*sid, *separator] for sid in self.sids]

    def after_sid(self, text: str) -> list[int]:
        """The ids of a text that follows a SID, where SIDs stand alone."""
        return self.text_ids(["".join(self.catalogue.items[0].sid) + text])[0][len(self.sids[0]) :]

    def tail_ids(self, shows: str, tail: str) -> tuple[int, list[int]]:
        """The ids of the text behind a history, and how many ids of its last line they replace.

        Behind a SID, the separator and the text are one piece for the tokenizer, and their ids may be joined ones.
        """
        if shows == "title":
            return 0, self.text_ids([tail])[0]
        return len(self.after_sid(SEPARATOR)), self.after_sid(SEPARATOR + tail)

    @functools.cached_property
    def title_lines(self) -> list[list[int]] | None:
        """The ids of each item's title and the separator."""
        if not splits_at_lines(self.tokenizer):
            return None
        return self.text_ids([history_line(item, "title") for item in self.catalogue.items])


def added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer begins and ends a text with: ([1], []) where "<s>" has the id 1."""
    plain, full = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
    for begin in range(len(full) - len(plain), -1, -1):
        if full[begin : begin + len(plain)] == plain:
            return full[:begin], full[begin + len(plain) :]
    raise InputError("the tokenizer reads a text differently with special tokens; no prompt could be told from an answer")


def tokenizer_rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """The rules of a `tokenizers` tokenizer, without truncation and padding, which calls change; None for any other kind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    return {**json.loads(backend.to_str()), "truncation": None, "padding": None}


def sids_stand_alone(tokenizer: PreTrainedTokenizerBase, catalogue: Catalogue) -> bool:
    """Whether the tokenizer cuts SID tokens out of a text first, so that the ids of a SID never depend on its neighbours.

    "<a_0><b_1>\\n<a_2>" then always has the ids of <a_0>, <b_1>, "\\n" and <a_2>. True for a `tokenizers` tokenizer if

    - every SID token is an added token, not normalized, that takes no white space and needs no word border (lstrip,
      rstrip, single_word), and
    - no other added token overlaps a SID token: begins inside it, ends inside it or contains it. An added token
      overlaps where it has "<" behind its first or ">" before its last character, as "\\n<" does. White space that
      another added token takes from its neighbours cannot come from a SID token, which has none.
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
    """Whether the ids of several lines of text are the ids of each line, one after another.

    "Tape\\n3M Glue\\n" then has the ids of "Tape\\n" and "3M Glue\\n". It holds for lines that are not blank and have no
    white space at either end, as titles are, and for a byte-level BPE with one of LINE_PATTERNS:

    - The pattern cuts a text into pieces from left to right, and BPE merges within a piece alone.
    - A piece ends at each newline: none of these patterns goes on from a newline into a character that is no white
      space. The lookahead (?!\\S) sees one character and moves no border of a piece that is a single newline.
    - NFC joins no character with a newline, and no added token may hold a newline or take white space from beside it.

    Any other tokenizer gives False; its histories are encoded whole, which is slower and always right.
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
    """Whether the line after `head` has the ids that it has alone: `head` is "" or ends in one newline, as "Bought:\\n"."""
    return not head or re.search(r"\S\n\Z", head) is not None


def begins_a_line(tail: str) -> bool:
    """Whether `tail` has the ids behind a line that it has alone: it is "" or begins with no white space."""
    return not tail or re.match(r"\S", tail) is not None


def count_with_added_tokens(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> int:
    """How many texts hold an added token: the tokenizer reads the title "Box <a_0>" as one with the SID token <a_0>."""
    reserved = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    if not reserved:
        return 0
    pattern = re.compile("|".join(map(re.escape, reserved)))
    return sum(bool(pattern.search(text)) for text in texts)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides a tokenizer's ids."""
    rules = tokenizer_rules(tokenizer) or [tokenizer.get_vocab(), repr(tokenizer)]
    return content_hash(type(tokenizer).__name__, rules, tokenizer.eos_token_id)
