"""Constrained beam search: the catalogue's SIDs as a table on the device, all beams of a user in one sequence.

    trie    = build_trie(score_sequences(sids, end_id), device)    # the catalogue, see trie.py
    decoder = SharedPromptDecoder(model, template)                 # keys and values of the common beginning, once
    found   = search(decoder, trie, prompts, num_beams=50)         # SID numbers and their log probabilities, best first

The score of a SID is the sum of log p of its tokens under the model, normalised over the whole vocabulary: no length
penalty, nothing renormalised over the allowed tokens. Where one SID is a prefix of another, the end token tells them
apart and counts for both: (a) and (a, b) are scored as (a, end) and (a, b, end); all others without end token.

The beams of a user are not rows of a batch but tokens of one sequence, each of which reads the prompt, its ancestors
and itself. So the prompt's keys and values exist once per user, nothing is copied when beams are reordered, and a level
costs one forward of B users x K tokens.

Shapes: B users, K beams, F children of a node at most, P cached keys, S prompt tokens, V vocabulary, D hidden size,
N nodes of the trie.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from sid_sft.forward.architecture import (
    Past,
    PieceCache,
    appended,
    cache_argument,
    finish_logits,
    own_logits,
    past_length,
    sliding_window,
)
from sid_sft.forward.prefix_plan import GPU_LIMITS
from sid_sft.forward.trees import additive_masks, common_prefix, pad
from sid_sft.recommend.trie import Trie

CACHED_LOGITS = 1_000_000  # logits held at a time on a CPU, in values: 4 MB stay in its cache
OWN_BEAMS = 16  # sequences of one forward where a model's own forward is all that is known to be right
SLACK = 1e-3  # of a score: what rounding may add to it when the same logit comes out of two matrix products


# ---------------------------------------------------------------------------------------------- the model by levels


class Decoder(Protocol):
    """What a search needs of a model. What `begin` and `advance` return is only handed to `logits`; its last dimension D is
    the hidden size, or the vocabulary where a decoder returns the logits themselves."""

    model: PreTrainedModel

    def begin(self, prompts: list[np.ndarray]) -> Tensor:
        """Hidden states (B, 1, D) at the last token of each prompt; forgets the prompts before."""

    def advance(self, tokens: Tensor, parent: Tensor) -> Tensor:
        """Hidden states (B, K, D) at `tokens` (B, K), each of which continues beam `parent` (B, K) of the level."""

    def logits(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The logits (..., V) of hidden states (..., D), or (..., T) those of some `tokens` (T,) alone."""

    def vocabulary_size(self) -> int:
        """V."""


class HeadLogits:
    """Logits of hidden states by the model's output head, where that is what makes them."""

    model: PreTrainedModel

    def logits(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        head = self.model.get_output_embeddings()
        if tokens is None:
            return finish_logits(self.model, head(hidden))
        bias = None if head.bias is None else head.bias[tokens]
        return finish_logits(self.model, F.linear(hidden, head.weight[tokens], bias))

    def vocabulary_size(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]


class SharedPromptDecoder(HeadLogits):
    """Keys and values of a prompt once per user, of the prompts' common beginning (`template`) once in all."""

    def __init__(self, model: PreTrainedModel, template: np.ndarray) -> None:
        self.model, self.template, self.window = model, template, sliding_window(model)
        self.cache_argument = cache_argument(model)
        self.past: Past = {}
        if len(template):
            tokens = torch.from_numpy(template.astype(np.int64)).to(model.device)[None]
            places = torch.arange(len(template), device=model.device)[None]
            self.forward(tokens, places, places, (places[0][:, None] >= places[0])[None])
        self.template_past = self.past

    def begin(self, prompts: list[np.ndarray]) -> Tensor:
        device, known = self.model.device, len(self.template)
        self.past = self.template_past
        own = [prompt[known:] for prompt in prompts]
        lengths = torch.tensor([len(tokens) for tokens in own], device=device)
        tokens = torch.from_numpy(pad(own)).to(device)
        size = tokens.shape[1]
        places = torch.arange(known + size, device=device)
        # Padding stands on the right: nothing real reads it in the causal order, and the beams are told not to.
        causal = places[known:, None] >= places
        self.key_positions = places.expand(len(own), -1)
        hidden = self.forward(tokens, self.key_positions[:, known:], self.key_positions, causal.expand(len(own), -1, -1))
        self.seen = (places < known + lengths[:, None])[:, None]
        self.position = known + lengths
        return hidden.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, hidden.shape[2]))

    def advance(self, tokens: Tensor, parent: Tensor) -> Tensor:
        batch, beams = tokens.shape
        inherited = self.seen.gather(1, parent[:, :, None].expand(-1, -1, self.seen.shape[2]))
        itself = torch.eye(beams, dtype=torch.bool, device=tokens.device).expand(batch, -1, -1)
        self.seen = torch.cat([inherited, itself], dim=2)
        positions = self.position[:, None].expand(-1, beams)
        self.key_positions = torch.cat([self.key_positions, positions], dim=1)
        self.position = self.position + 1
        return self.forward(tokens, positions, self.key_positions, self.seen)

    def forward(self, tokens: Tensor, positions: Tensor, key_positions: Tensor, seen: Tensor) -> Tensor:
        """Hidden states (B, S, D) of new tokens (B, S), whose keys and values join the past.

        positions (B, S) of the tokens, key_positions (B, P + S) of all keys, seen (B, S, P + S): who reads what.
        """
        cache = PieceCache(self.past, keep=True)
        output = self.model.base_model(
            input_ids=tokens,
            attention_mask=additive_masks(seen, positions, key_positions, self.window, self.model.dtype),
            position_ids=positions,
            **{self.cache_argument: cache},
            use_cache=True,
        )
        self.past = appended(self.past, cache.new)
        assert past_length(self.past) == key_positions.shape[1]
        return output.last_hidden_state


class WholeSequenceDecoder(HeadLogits):
    """Every beam as a sequence of its own, computed from its first token each time: slow, for any causal model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def begin(self, prompts: list[np.ndarray]) -> Tensor:
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.model.device)
        self.prompts = torch.from_numpy(pad(prompts)).to(self.model.device)
        self.written = self.prompts.new_empty(len(prompts), 1, 0)  # (B, K, levels so far)
        return self.last_hidden()

    def advance(self, tokens: Tensor, parent: Tensor) -> Tensor:
        before = self.written.gather(1, parent[:, :, None].expand(-1, -1, self.written.shape[2]))
        self.written = torch.cat([before, tokens[:, :, None]], dim=2)
        return self.last_hidden()

    def last_hidden(self) -> Tensor:
        batch, beams, levels = self.written.shape
        sequences = F.pad(self.prompts, (0, levels))[:, None].repeat(1, beams, 1)
        places = (self.lengths[:, None] + torch.arange(levels, device=self.lengths.device))[:, None].expand(-1, beams, -1)
        sequences = sequences.scatter(2, places, self.written).flatten(0, 1)
        hidden = self.model.base_model(input_ids=sequences, use_cache=False).last_hidden_state
        last = (self.lengths + levels - 1).repeat_interleave(beams)
        return hidden[torch.arange(len(hidden), device=hidden.device), last].view(batch, beams, -1)


class OwnForwardDecoder(HeadLogits):
    """Every beam as a sequence of its own through the model's own forward, a few of one length at a time: slower still, and
    right for every model. Its hidden states are the logits themselves."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def begin(self, prompts: list[np.ndarray]) -> Tensor:
        self.beams = [torch.from_numpy(prompt.astype(np.int64))[None].to(self.model.device) for prompt in prompts]
        return self.last_logits()

    def advance(self, tokens: Tensor, parent: Tensor) -> Tensor:
        before = zip(self.beams, parent, tokens, strict=True)
        self.beams = [torch.cat([beams[parents], new[:, None]], dim=1) for beams, parents, new in before]
        return self.last_logits()

    def last_logits(self) -> Tensor:
        rows = [torch.cat([own_logits(self.model, some, last=1) for some in beams.split(OWN_BEAMS)]) for beams in self.beams]
        found = torch.stack(rows).squeeze(2)
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def logits(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        return hidden.clone() if tokens is None else hidden[..., tokens]  # full logits are worked on in place


def common_template(prompts: list[np.ndarray]) -> np.ndarray:
    """The longest beginning that all prompts share and that leaves each at least one token of its own."""
    shared = prompts[0]
    for prompt in prompts:
        shared = shared[: min(common_prefix(shared, prompt), len(prompt) - 1)]
    return shared


# ---------------------------------------------------------------------------------------------- the search


class Found(NamedTuple):
    """The best sequences of each prompt, best first. leaf (B, K): their numbers, as in Trie.leaf, or -1 if fewer than K are
    found; score (B, K): their log p."""

    leaf: Tensor
    score: Tensor


def full_logits(decoder: Decoder, hidden: Tensor) -> Iterator[Tensor]:
    """The logits over the whole vocabulary (some, V) of hidden states (n, D), a chunk at a time."""
    values = CACHED_LOGITS if hidden.device.type == "cpu" else GPU_LIMITS.logits
    for part in hidden.split(max(1, values // decoder.vocabulary_size())):
        yield decoder.logits(part)


def normalisers(decoder: Decoder, hidden: Tensor, needed: Tensor) -> Tensor:
    """The log-sum-exp (B, K) of the whole vocabulary's logits at hidden (B, K, D), where needed; inf elsewhere."""
    places = needed.flatten().nonzero().squeeze(1)
    parts = []
    for logits in full_logits(decoder, hidden.flatten(0, 1)[places]):
        highest = logits.amax(1)
        parts.append(logits.sub_(highest[:, None]).exp_().sum(1).log_() + highest)  # in place: logits are large
    found = torch.full(needed.shape, torch.inf, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    found.view(-1)[places] = torch.cat(parts)
    return found


def child_scores(
    decoder: Decoder,
    hidden: Tensor,
    score: Tensor,
    level_tokens: Tensor,
    column: Tensor,
    exists: Tensor,
    wanted: int,
) -> Tensor:
    """Scores (B, K, F) of the children of beams: exact for the `wanted` best of each user, exact or -inf for all others.

    hidden (B, K, D) and score (B, K) of the beams; column (B, K, F): the place of each child's token in `level_tokens` (T,);
    exists (B, K, F): whether there is such a child.

    The log-sum-exp over the whole vocabulary costs most, and few beams have a child among the best. The log-sum-exp over
    `level_tokens` is never larger, so a score computed with it is an upper bound. The whole log-sum-exp is computed for the
    beams with the `wanted` highest bounds, then for each other beam with a bound above the last of the `wanted` so found.

    Example, in probabilities, wanted 1: beams of 0.6 and 0.3, with children of 0.4 and 0.2 and one child of 0.9; the level's
    tokens have 0.6 and 0.9 of the vocabulary's probability. The bounds are [0.4, 0.2] and [0.3]. The first beam is computed:
    [0.24, 0.12]. The bound 0.3 is above 0.24, so the second beam is computed too: [0.27], the best.
    """
    logits = decoder.logits(hidden, level_tokens)
    unscaled = (score[:, :, None] + logits.gather(2, column)).masked_fill(~exists, -torch.inf)
    bound = unscaled - logits.logsumexp(2, keepdim=True)
    first = torch.zeros_like(score, dtype=torch.bool)
    size = min(wanted, bound[0].numel())
    first.scatter_(1, bound.flatten(1).topk(size)[1] // exists.shape[2], True)
    normaliser = normalisers(decoder, hidden, first)
    last = (unscaled - normaliser[:, :, None]).flatten(1).topk(size)[0][:, -1:]
    second = ~first & (bound.amax(2) + SLACK > last)
    total = unscaled - normaliser.minimum(normalisers(decoder, hidden, second))[:, :, None]
    return total.masked_fill(~exists, -torch.inf)  # a NaN normaliser made NaN of -inf


@torch.no_grad()
def search(decoder: Decoder, trie: Trie, prompts: list[np.ndarray], num_beams: int) -> Found:
    """The `num_beams` best sequences of the trie for each prompt, best first.

    Sequences that end above the deepest level are collected in `finished` and do not use up beams. The number of beams is
    the same for all users; where a user has fewer nodes to stand at, the surplus beams have score -inf and no children, so
    no sequence is found twice. Every other beam leads to a sequence, so `num_beams` sequences are found, or all there are.

    [[1, 5], [1, 6], [2, 5]] of probability 0.24, 0.12 and 0.27, num_beams 2 -> leaf [[2, 0]], score log [[0.27, 0.24]].
    """
    device = decoder.model.device
    hidden = decoder.begin(prompts)
    node = torch.zeros(len(prompts), 1, dtype=torch.int64, device=device)
    score = torch.zeros(len(prompts), 1, device=device)
    finished = Found(node[:, :0], score[:, :0])
    wanted = min(num_beams, trie.sequences)
    for level in range(trie.depth):
        child = trie.start[node].long()[:, :, None] + torch.arange(trie.fan_out[level], device=device)
        alive = score != -torch.inf  # the node of a surplus beam means nothing; the root's children would be found again
        exists = (child < trie.start[node + 1][:, :, None]) & alive[:, :, None]
        child = child.where(exists, 0)
        both = trie.ends[level] and trie.inner[level]  # two lists of the best: every child is needed
        total = child_scores(
            decoder,
            hidden,
            score,
            trie.level_tokens[level],
            trie.column[child].long(),
            exists,
            child[0].numel() if both else num_beams,
        ).flatten(1)
        child = child.flatten(1)
        leaf = trie.leaf[child].long()
        if trie.ends[level]:
            pool = torch.cat([finished.score, total.masked_fill(leaf < 0, -torch.inf)], dim=1)
            finished = best(torch.cat([finished.leaf, leaf], dim=1), pool, wanted)
        if trie.inner[level]:
            score, picked = total.masked_fill(leaf >= 0, -torch.inf).topk(min(num_beams, trie.inner[level], total.shape[1]))
            node = child.gather(1, picked)
            hidden = decoder.advance(trie.token[node].long(), picked // trie.fan_out[level])
    return finished._replace(leaf=finished.leaf.masked_fill(finished.score == -torch.inf, -1))


def best(leaf: Tensor, score: Tensor, size: int) -> Found:
    score, picked = score.topk(min(size, score.shape[1]))
    return Found(leaf.gather(1, picked), score)


def without(found: Found, excluded: Tensor, size: int) -> Found:
    """The first `size` sequences that are not among `excluded` (B, H); leaf -1 and score 0 where there are no more.

    leaf [[7, 3, 5]] without [[3]], size 2 -> leaf [[7, 5]].
    """
    gone = (found.leaf[:, :, None] == excluded[:, None]).any(2)
    order = gone.int().sort(dim=1, stable=True)[1][:, :size]
    leaf = found.leaf.masked_fill(gone, -1).gather(1, order)
    return Found(leaf, found.score.gather(1, order).masked_fill(leaf < 0, 0.0))


def best_tokens(logits: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """log p (n, size) of the most likely tokens, and the tokens, from logits (n, V)."""
    log_p, token = logits.topk(size)
    return log_p - logits.logsumexp(1, keepdim=True), token


@torch.no_grad()
def search_freely(decoder: Decoder, prompts: list[np.ndarray], num_beams: int, *, levels: int, end_id: int) -> Tensor:
    """What a beam search without a trie finds: tokens (B, K, levels), best first; after an end token only end tokens.

    K is `num_beams`, or the number of all sequences of `levels` tokens if that is smaller.
    """
    device = decoder.model.device
    hidden = decoder.begin(prompts)
    score = torch.zeros(len(prompts), 1, device=device)
    written = torch.empty(len(prompts), 1, 0, dtype=torch.int64, device=device)
    for level in range(levels):
        width = min(num_beams, decoder.vocabulary_size())
        parts = [best_tokens(logits, width) for logits in full_logits(decoder, hidden.flatten(0, 1))]
        log_p, token = (torch.cat(part).unflatten(0, hidden.shape[:2]) for part in zip(*parts, strict=True))
        if level:
            over = written[:, :, -1:] == end_id  # goes on with end tokens, which cost nothing
            only = torch.arange(width, device=device) == 0
            token = token.where(~over, end_id)
            log_p = log_p.where(~over, torch.where(only, 0.0, -torch.inf))
        total = (score[:, :, None] + log_p).flatten(1)
        exist = int((total != -torch.inf).sum(1).min())
        score, picked = total.topk(min(num_beams, exist))
        parent, token = picked // width, token.flatten(1).gather(1, picked)
        before = written.gather(1, parent[:, :, None].expand(-1, -1, level))
        written = torch.cat([before, token[:, :, None]], dim=2)
        if level + 1 < levels:
            hidden = decoder.advance(token, parent)
    return written
