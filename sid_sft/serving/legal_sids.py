"""Which token may come next: the SIDs of a catalogue as a tree, and logits processors that allow nothing else.

One file that needs numpy and torch alone. `evaluate.py --export_serving` copies it into its folder, beside sid_trie.npz.

    trie = SidTrie.load("serving/sid_trie.npz")
    trie.sid_of([40, 17, 3])                                  -> 12, the twelfth key of sids.json, counted from 0

    transformers   generate(..., logits_processor=[LegalSids(trie, prompt_len=inputs.input_ids.shape[1])])
    vLLM           LLM("serving/model", logits_processors=["legal_sids:VllmLegalSids"])       # with serving/ in PYTHONPATH
    SGLang         generate(..., custom_logit_processor=SglangLegalSids().to_str())           # likewise; see its docstring

Scores: transformers' beam search hands its processors log p over the whole vocabulary, so a SID's score is the sum of log p
of its tokens, nothing renormalised over the legal ones: the score of evaluate.py. vLLM and SGLang take a softmax after their
processors: what they report is renormalised over the legal tokens, unless they are told to report raw log probabilities.

LegalSids was run with transformers 5.23. VllmLegalSids and RequestLegalSids are written for vLLM's V1 interface,
vllm.v1.sample.logits_processor as documented for 0.14 to 0.29 (for 0.32 with VLLM_USE_V2_MODEL_RUNNER=0), SglangLegalSids
for SGLang's CustomLogitProcessor as of its commit 065927d; these three were tested against stand-ins made after the
documentation, not in a running server.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

TRIE_FILE = Path(__file__).with_name("sid_trie.npz")
FORMAT = 1  # of the file


class SidTrie:
    """Token sequences, none of which begins another, as a tree in CSR form; node 0 is the root, N nodes in all.

    The file is a .npz without pickled objects. Its arrays, all of int64:

    start (N + 1): the children of node n are the nodes start[n] .. start[n + 1] - 1, their tokens ascending
    token (N): the token of a node
    leaf (N): which SID ends at a node, as its place in sids.json; -1 where none ends
    depth, end_id: tokens of the longest sequence; the end token, which is the last of a SID that begins another one
    prompt_ends_with_text: 1 where the last token of a prompt is never one of a SID
    format: 1

    SIDs (1, 5), (1, 6), (2, 5) -> token [0, 1, 2, 5, 6, 5], start [1, 3, 5, 6, 6, 6, 6], leaf [-1, -1, -1, 0, 1, 2].
    """

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.start, self.token, self.leaf = (torch.from_numpy(arrays[name]) for name in ("start", "token", "leaf"))
        self.depth, self.end_id = int(arrays["depth"]), int(arrays["end_id"])
        self.prompt_ends_with_text = bool(arrays["prompt_ends_with_text"])
        self.size = int(self.token.max()) + 1
        parent = torch.repeat_interleave(torch.arange(len(self.token)), self.start.diff())
        self.keys = parent * self.size + self.token[1:]  # ascending; the key of node n + 1 stands at n
        self.sid_tokens = {*self.token[1:].tolist()} - {self.end_id}

    @classmethod
    def load(cls, path: str | Path = TRIE_FILE) -> SidTrie:
        """The trie of a file; ValueError where the file is of another format."""
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        if int(arrays.get("format", 0)) != FORMAT:
            raise ValueError(f"{path}: is no trie of format {FORMAT}; write it anew with evaluate.py --export_serving")
        return cls(arrays)

    def to(self, device: torch.device | str) -> SidTrie:
        """The same trie, its arrays moved to a device."""
        if self.start.device != torch.device(device):
            self.start, self.token, self.leaf, self.keys = (
                array.to(device) for array in (self.start, self.token, self.leaf, self.keys)
            )
        return self

    def walk(self, written: Tensor) -> Tensor:
        """The nodes (R,) that rows of tokens (R, L) lead to; -1 where there is no such path.

        Negative tokens are passed over, and so is whatever stands behind a whole SID.
        """
        node = torch.zeros(len(written), dtype=torch.int64, device=written.device)
        for token in written.T:
            key = node * self.size + token
            place = torch.searchsorted(self.keys, key).clamp(max=len(self.keys) - 1)
            child = torch.where((self.keys[place] == key) & (token < self.size), place + 1, -1)
            stays = (token < 0) | (node < 0) | (self.leaf[node] >= 0)
            node = node.where(stays, child)
        return node

    def only_legal(self, scores: Tensor, node: Tensor) -> Tensor:
        """Scores (R, V) with -inf for each token that does not go on from nodes (R,).

        Behind a whole SID, and where there was no such path, the end token alone is legal, and costs nothing: score 0.
        """
        end = (node < 0) | (self.leaf[node] >= 0)
        first, last = self.start[node.clamp(min=0)], self.start[node.clamp(min=0) + 1]
        child = first[:, None] + torch.arange(max(int((last - first).max()), 1), device=node.device)
        exists = (child < last[:, None]) & ~end[:, None]
        token = self.token[child.where(exists, 0)]
        values = scores.gather(1, token).masked_fill(~exists, -torch.inf)
        legal = torch.full_like(scores, -torch.inf).scatter_reduce(1, token, values, "amax")
        legal[:, self.end_id] = legal[:, self.end_id].masked_fill(end, 0.0)
        return legal

    def sid_of(self, tokens: Sequence[int]) -> int:
        """Which SID some generated tokens begin with, as its place in sids.json; -1 where it is none or not whole."""
        node = int(self.walk(torch.tensor([list(tokens)], dtype=torch.int64, device=self.start.device))[0])
        return int(self.leaf[node]) if node >= 0 else -1

    def tail(self, prompt: Sequence[int]) -> list[int]:
        """The SID tokens that a prompt ends with, which are the beginning of its answer where prompts end with text."""
        begin = len(prompt)
        while begin and self.prompt_ends_with_text and prompt[begin - 1] in self.sid_tokens:
            begin -= 1
        return list(prompt[begin:])

    def mask(self, scores: Tensor, written: list[list[int]]) -> Tensor:
        """Scores (R, V), changed in place, of rows that have written so much of a SID."""
        longest = max(map(len, written), default=0)
        padded = [tokens + [-1] * (longest - len(tokens)) for tokens in written]
        rows = torch.tensor(padded, dtype=torch.int64, device=scores.device).view(len(written), longest)
        return scores.copy_(self.to(scores.device).only_legal(scores, self.walk(rows)))


def base(module: str, name: str) -> Any:
    """The class that a server wants its processors derived from; object where that server is not installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return object


@functools.cache
def trie_beside() -> SidTrie:
    return SidTrie.load(TRIE_FILE)


# ---------------------------------------------------------------------------------------------- transformers


class LegalSids:
    """For transformers' generate. prompt_len: tokens of the padded prompts, input_ids.shape[1].

    generate(**inputs, logits_processor=[LegalSids(trie, prompt_len)], num_beams=20, num_return_sequences=20,
        max_new_tokens=trie.depth, length_penalty=0.0, do_sample=False, output_scores=True, return_dict_in_generate=True)
    """

    def __init__(self, trie: SidTrie, prompt_len: int) -> None:
        self.trie, self.prompt_len = trie, prompt_len

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        trie = self.trie.to(scores.device)
        return trie.only_legal(scores, trie.walk(input_ids[:, self.prompt_len :]))


# ---------------------------------------------------------------------------------------------- vLLM


class RequestLegalSids:
    """For vLLM, one request at a time: called with the request's output tokens and its logits (V,)."""

    def __init__(self, trie: SidTrie | None = None) -> None:
        self.trie = trie or trie_beside()

    def __call__(self, output_ids: Sequence[int], logits: Tensor) -> Tensor:
        return self.trie.mask(logits[None], [list(output_ids)])[0]


class VllmLegalSids(base("vllm.v1.sample.logits_processor", "LogitsProcessor")):  # type: ignore[misc]
    """For vLLM's engine, all requests of a batch at once. SamplingParams(extra_args={"legal_sids": False}) sets one free.

    `LLM.beam_search` asks for one token at a time, with what a beam has written at the end of its prompt; that is seen here.
    Its ranking is by the log probabilities that the engine reports: LLM(..., logprobs_mode="processed_logprobs") makes them
    those of the legal tokens, renormalised; raw ones would let it keep illegal beams.
    """

    def __init__(self, vllm_config: Any = None, device: Any = None, is_pin_memory: bool = False) -> None:
        self.trie = trie_beside()
        self.requests: dict[int, tuple[list[int], Sequence[int]]] = {}  # place in the batch -> (tail of its prompt, output)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        wanted = (sampling_params.extra_args or {}).get("legal_sids", True)
        if not isinstance(wanted, bool):
            raise ValueError(f"legal_sids must be true or false, not {wanted!r:.60}")

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follows the requests through the batch: removed, then added, then moved, as vLLM asks."""
        if batch_update is None:
            return
        for place in batch_update.removed:
            self.requests.pop(place, None)
        for place, params, prompt, output in batch_update.added:
            self.requests.pop(place, None)
            if params is None or (params.extra_args or {}).get("legal_sids", True):
                self.requests[place] = self.trie.tail(prompt or ()), output
        for source, target, direction in batch_update.moved:
            moved, there = self.requests.pop(source, None), self.requests.pop(target, None)
            if moved is not None:
                self.requests[target] = moved
            if there is not None and direction.name == "SWAP":
                self.requests[source] = there

    def apply(self, logits: Tensor) -> Tensor:
        if self.requests:
            places = torch.tensor([*self.requests], device=logits.device)
            written = [[*tail, *output] for tail, output in self.requests.values()]
            logits[places] = self.trie.mask(logits[places], written)
        return logits


# ---------------------------------------------------------------------------------------------- SGLang


class SglangLegalSids(base("sglang.srt.sampling.custom_logit_processor", "CustomLogitProcessor")):  # type: ignore[misc]
    """For SGLang, started with --enable-custom-logit-processor and with this folder in the server's PYTHONPATH.

    custom_params={"legal_sids": False} sets a request free. SGLang adds the request itself as "__req__" where custom_params
    are given, so give {"legal_sids": True} at least: a row without them is left as it is.
    """

    def __call__(self, logits: Tensor, custom_param_list: list[dict[str, Any] | None] | None = None) -> Tensor:
        params = custom_param_list or []
        rows = [i for i, given in enumerate(params) if given and "__req__" in given and given.get("legal_sids", True)]
        if rows:
            written = [list(params[i]["__req__"].output_ids) for i in rows]  # type: ignore[index]
            logits[rows] = trie_beside().mask(logits[rows], written)
        return logits
