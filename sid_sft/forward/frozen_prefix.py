"""The loss of freeze mode with static work done once.

A frozen causal decoder computes the same hidden states, keys and values for every token before the first SID of its
sequence, at every step. FrozenPrefix (see prefix_plan.py for the parts of an example)

    - computes a template's keys and values once a run,
    - runs own prefixes without gradients, those of one user as a single tree in which shared tokens stand once,
    - runs only the tail with gradients, against the keys and values of what stands before it,
    - caches, within a budget of bytes, what every epoch would compute again: for each static label the hidden state that
      predicts it, the log-sum-exp of the frozen logits and the label's logit; and the keys and values of own prefixes,
    - lets the loss reach the SID rows alone: as embeddings of the tail, and as rows of the output head.

Each token has the position that it has in its full sequence. Loss and gradient equal those of PlainForward up to rounding.
The model is called through its public interface and is not changed. Each call of a model that is sharded is one of all
processes; who needs fewer calls for a micro-batch than another process makes idle ones (`expect`).

Shapes: B trees, S tokens of the largest tree, V vocabulary, D hidden size, M SID rows, n labels, P cached tokens that a tree
reads, K slots of the cache (a slot holds the keys and values of one token).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from sid_sft.forward.architecture import (
    KeyLayout,
    Pair,
    Past,
    PieceCache,
    appended,
    cache_argument,
    embedding_scale,
    finish_logits,
    sliding_window,
)
from sid_sft.forward.examples import Examples, MicroBatch
from sid_sft.forward.frozen_head import FrozenHead, FrozenLogSumExp, Labels
from sid_sft.forward.prefix_cache import PrefixCache
from sid_sft.forward.prefix_plan import CPU_LIMITS, GPU_LIMITS, ModelBatch, PrefixPlan, PrefixTree
from sid_sft.forward.store import DEVICE, read
from sid_sft.forward.trees import Layout, chain, lay_out, to_device
from sid_sft.sharding import gathered
from sid_sft.sid_rows import SidRows
from sid_sft.tasks import TASKS


class PrefixKeys(NamedTuple):
    """Keys and values of own prefixes. keys (K, width of a KeyLayout); slots: example -> the slots of its tokens."""

    keys: Tensor
    slots: dict[int, np.ndarray]


class Calls(NamedTuple):
    """Calls of the model for a micro-batch: of templates and own prefixes, without gradients; and of tails, one or none."""

    static: int
    tail: int


class FrozenPrefix:
    """The loss of freeze mode with static work done once; see the head of this file.

    cache_bytes: for what is kept over the run; cache_place: where, see Store. group_users: see PrefixPlan.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sid_rows: SidRows,
        examples: Examples,
        micro_batch_size: int,
        *,
        cache_bytes: int = 0,
        cache_place: str | Path = DEVICE,
        group_users: bool = False,
    ) -> None:
        self.model, self.sid_rows, self.examples, self.micro_batch_size = model, sid_rows, examples, micro_batch_size
        self.device, self.dtype, self.window = model.device, model.dtype, sliding_window(model)
        self.cache_argument = cache_argument(model)
        self.embedding, self.scale = model.get_input_embeddings(), embedding_scale(model)
        limits = CPU_LIMITS if self.device.type == "cpu" else GPU_LIMITS
        head, finish = model.get_output_embeddings(), partial(finish_logits, model)
        self.head = FrozenHead(head.weight.detach(), head.bias, sid_rows.ids.cpu().numpy(), finish, limits.logits)
        self.row_of = torch.full((self.embedding.weight.shape[0],), -1, device=self.device)  # token id -> SID row, or -1
        self.row_of[sid_rows.ids] = torch.arange(len(sid_rows.ids), device=self.device)
        self.plan = PrefixPlan(examples, micro_batch_size, limits, group_users=group_users)
        self.template_keys: dict[int, dict[int, Pair]] = {}
        self.expected: list[Calls] = []  # of the micro-batches to come, the most that any process makes
        self.calls = 0  # made so far
        self.key_layout = self.find_key_layout()
        self.cache = PrefixCache.within(
            self.plan,
            cache_bytes,
            place=cache_place,
            device=self.device,
            dtype=self.dtype,
            hidden_size=self.embedding.weight.shape[1],
            row_width=self.key_layout.width,
        )

    def for_evaluation(self, examples: Examples) -> FrozenPrefix:
        """A FrozenPrefix over other examples, without a cache; users are grouped, as one `cut` takes all the examples."""
        return FrozenPrefix(self.model, self.sid_rows, examples, self.micro_batch_size, group_users=True)

    def resize(self, micro_batch_size: int) -> None:
        """Cuts steps into micro-batches of another size from now on; what is cached stays as it is."""
        self.micro_batch_size = micro_batch_size
        self.plan.resize(micro_batch_size)

    def cut(self, indices: np.ndarray, processes: int = 1) -> list[MicroBatch]:
        """The examples of a step as micro-batches."""
        return self.plan.cut(indices, processes)

    def shares(self) -> str:
        """What the tokens are, in words."""
        return self.plan.shares()

    @gathered
    def nll(self, indices: np.ndarray) -> Tensor:
        """Sum of -log p over the labels of a micro-batch, at the place of its task in a vector (len(TASKS),) of zeros.

        The backward reaches the masters of the SID rows, and nothing else.
        """
        casts = [master.to(self.dtype) for master in self.sid_rows.masters]
        rows, head_rows = casts[0], casts[-1]
        task, has_tail = int(self.examples.task[indices[0]]), bool(self.plan.tail_len[indices[0]])
        before = self.calls
        uncached, prefixes = self.static_pass(indices)
        if has_tail:
            self.template_past(task)
        expected = self.expected.pop(0) if self.expected else Calls(0, 0)
        for _ in range(before + expected.static - self.calls):
            self.idle(None)
        loss = self.static_nll(indices, uncached, head_rows)
        if has_tail:
            loss = loss + self.tail_nll(indices, prefixes, rows, head_rows)
        elif expected.tail:
            loss = loss + self.idle(rows)
        return F.pad(loss.view(1), (task, len(TASKS) - 1 - task))

    # ---- calls of the model

    def expect(self, parts: list[np.ndarray]) -> None:
        """Tells which micro-batches follow, as many on every process, where a model is sharded. Every process must call."""
        most = torch.tensor(self.count_calls(parts), device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        self.expected = [Calls(*calls) for calls in most.tolist()]

    def count_calls(self, parts: list[np.ndarray]) -> list[Calls]:
        """The calls of the model that some micro-batches make if they are run in this order from now on."""
        templates, counts = set(self.template_keys), []
        done: set[int] = set()
        for part in parts:
            task, has_tail = int(self.examples.task[part[0]]), bool(self.plan.tail_len[part[0]])
            members = [int(i) for i in part if self.plan.tree_of[i] >= 0]
            static = 0
            if self.cache is not None:
                missing = set(self.cache.missing({int(self.plan.tree_of[i]) for i in members})) - done
                done |= missing
                static = len(missing)
            if self.cache is None or (has_tail and members and not self.plan.caches_keys(members[0])):
                static += sum(1 for _ in self.plan.trees_of(members))
            if task not in templates and (static or has_tail):
                templates.add(task)
                static += bool(len(self.plan.templates[task]))
            counts.append(Calls(static, int(has_tail)))
        return counts

    def idle(self, rows: Tensor | None) -> Tensor:
        """Calls the model for nothing, with the SID rows (M, D) so that a backward follows: zero."""
        hidden, _ = self.call(lay_out([chain(self.head.ids[:1])]), {}, rows=rows)
        return 0 * hidden.sum()

    def call(
        self, layout: Layout, past: Past, *, rows: Tensor | None = None, keep: bool = False
    ) -> tuple[Tensor, dict[int, Pair]]:
        """Hidden states (B, S, D) of trees that follow a past; with `keep` also their keys and values per layer, else {}.
        rows: the SID rows (M, D) that embed SID tokens, so that the gradient reaches them; None if `layout` has no SID."""
        self.calls += 1
        cache = PieceCache(past, keep=keep)
        output = self.model.base_model(
            inputs_embeds=self.embed(to_device(layout.tokens, self.device), rows),
            attention_mask=layout.masks(self.window, self.dtype, self.device),
            position_ids=to_device(layout.positions, self.device),
            **{self.cache_argument: cache},
            use_cache=True,
        )
        return output.last_hidden_state, cache.new

    def embed(self, tokens: Tensor, rows: Tensor | None) -> Tensor:
        """Embeddings (B, S, D); those of SID tokens come from `rows`, through which their gradient flows."""
        with torch.no_grad():
            frozen = self.embedding(tokens)
        if rows is None:
            return frozen
        place = self.row_of[tokens]
        trained = F.embedding(place.clamp(min=0), rows)
        if self.scale is not None:
            trained = trained * self.scale
        return torch.where((place >= 0).unsqueeze(-1), trained, frozen)

    @gathered
    @torch.no_grad()
    def find_key_layout(self) -> KeyLayout:
        """How the model's keys and values lie in a row, as it shows with one token."""
        _, new = self.call(lay_out([chain(np.zeros(1, dtype=np.int64))]), {}, keep=True)
        return KeyLayout.of(new)

    def template_past(self, task: int) -> Past:
        """The keys and values of a task's template as a past; computed once, empty if the template is empty."""
        if task not in self.template_keys:
            new: dict[int, Pair] = {}
            if len(self.plan.templates[task]):
                _, new = self.call(self.plan.template_batch(task).layout, {}, keep=True)
            self.template_keys[task] = new
        return appended({}, self.template_keys[task])

    def read_slots(self, keys: Tensor, slots: list[np.ndarray]) -> Tensor:
        """The cached rows at B lists of slots, from keys (K, width), padded to the longest list: (B, P, width).

        A shorter list is padded with its own last slot: [[0, 1, 4], [6]] is read as [[0, 1, 4], [6, 6, 6]]. The mask hides
        the padding, but a hidden NaN still makes a NaN (0 x NaN), and a slot not yet written may hold one.
        """
        size = max(map(len, slots))
        places = np.stack([own[np.minimum(np.arange(size), len(own) - 1)] for own in slots])
        return read(keys, places.ravel(), self.device).unflatten(0, places.shape)

    # ---- own prefixes

    @torch.no_grad()
    def static_pass(self, indices: np.ndarray) -> tuple[Labels | None, PrefixKeys | None]:
        """The static labels of a micro-batch, and the keys and values that its tails read.

        The labels are None where a cache holds them, or where there are none; the keys are None where no example has both
        an own prefix and a tail. Without a cache both are computed for these examples alone. With one, the fixed batches of
        their trees are run first, unless they have been; keys that the cache has no room for are computed at every step.
        """
        with_prefix = [int(i) for i in indices if self.plan.tree_of[i] >= 0]
        if self.cache is None:
            return self.run_uncached(with_prefix)
        self.fill_cache(with_prefix)
        tails = [i for i in with_prefix if self.plan.tail_len[i]]
        if not tails:
            return None, None
        if not self.plan.caches_keys(tails[0]):
            return None, self.run_uncached(tails)[1]
        return None, PrefixKeys(self.cache.keys, {i: self.plan.slots_of(i) for i in tails})

    def fill_cache(self, members: list[int]) -> None:
        """Computes the fixed batches of the examples' trees, where that has not happened yet."""
        for number in self.cache.missing({int(self.plan.tree_of[i]) for i in members}):
            trees = self.cache.cache_plan.batch(number)
            prefixes = [self.plan.tree(tree) for tree in trees]
            keep = bool((self.cache.cache_plan.first_slot[trees] >= 0).any())
            batch, hidden, keys = self.run_prefixes(prefixes, keep=keep)
            if batch.labelled:
                self.cache.put_labels(batch.labelled, self.labels_of(batch, hidden))
            if keys is not None:
                self.cache.put_keys(trees, [len(prefix.tree.tokens) for prefix in prefixes], keys)
            self.cache.done[number] = True

    def run_uncached(self, members: list[int]) -> tuple[Labels | None, PrefixKeys | None]:
        """Static labels (unless they are cached), and keys and values, of some examples alone, for one micro-batch."""
        labels: list[Labels] = []
        keys: list[Tensor] = []
        slots: dict[int, np.ndarray] = {}
        count = 0
        for prefixes in self.plan.trees_of(members):
            batch, hidden, new = self.run_prefixes(prefixes, keep=bool(self.plan.tail_len[prefixes[0].members[0]]))
            if self.cache is None and batch.labelled:
                labels.append(self.labels_of(batch, hidden))
            if new is None:
                continue
            for row, (group, tree) in zip(new, prefixes, strict=True):
                keys.append(row[: len(tree.tokens)])
                slots |= {i: count + path for i, path in zip(group, tree.paths, strict=True)}
                count += len(tree.tokens)
        return (
            Labels(*(torch.cat(parts) for parts in zip(*labels, strict=True))) if labels else None,
            PrefixKeys(torch.cat(keys), slots) if keys else None,
        )

    def run_prefixes(self, prefixes: list[PrefixTree], *, keep: bool) -> tuple[ModelBatch, Tensor, Tensor | None]:
        """Trees of one task as a batch, its hidden states (B, S, D), and if wanted keys and values (B, S, width)."""
        batch = self.plan.prefix_batch(prefixes)
        hidden, new = self.call(batch.layout, self.template_past(batch.task), keep=keep)
        return batch, hidden, self.key_layout.pack(new) if keep else None

    # ---- losses

    def static_nll(self, indices: np.ndarray, uncached: Labels | None, head_rows: Tensor) -> Tensor:
        """Sum of -log p over the static labels of the examples, differentiable in the head's SID rows (M, D)."""
        labelled = [int(i) for i in indices if self.plan.static_labels[i]]
        if not labelled:
            return head_rows.new_zeros((), dtype=torch.promote_types(head_rows.dtype, torch.float32))
        return self.label_nll(uncached if self.cache is None else self.cache.labels_of(labelled), head_rows)

    def tail_nll(self, indices: np.ndarray, prefixes: PrefixKeys | None, rows: Tensor, head_rows: Tensor) -> Tensor:
        """Sum of -log p over the labels predicted from the tails, differentiable in both tables' SID rows (M, D)."""
        batch = self.plan.tail_batch(indices, prefixes.slots if prefixes else None)
        past = self.template_past(batch.task)
        if prefixes is not None:
            past = appended(past, self.key_layout.unpack(self.read_slots(prefixes.keys, batch.slots)))
        hidden, _ = self.call(batch.layout, past, rows=rows)
        return self.label_nll(self.labels_of(batch, hidden), head_rows)

    def labels_of(self, batch: ModelBatch, hidden: Tensor) -> Labels:
        """A batch's labels from its hidden states (B, S, D); differentiable in these."""
        predicting = hidden.flatten(0, 1)[to_device(batch.predicting, self.device)]
        target = to_device(batch.targets, self.device)
        return Labels(predicting, FrozenLogSumExp.apply(predicting, self.head), self.head.logit(predicting, target), target)

    def label_nll(self, labels: Labels, head_rows: Tensor) -> Tensor:
        """Sum of -log p over labels, differentiable in the head's SID rows (M, D), and in the hidden states of tail labels.

        -log p = logaddexp(log-sum-exp of the frozen logits, log-sum-exp of the SID logits) - logit of the target.
        """
        bias = None if self.head.bias is None else self.head.bias[self.sid_rows.ids]
        sid_logits = self.head.finish(F.linear(labels.hidden, head_rows, bias))
        place = self.row_of[labels.target]
        trained = sid_logits.gather(1, place.clamp(min=0)[:, None]).squeeze(1)
        target = torch.where(place >= 0, trained, labels.logit)
        return (torch.logaddexp(labels.rest, sid_logits.logsumexp(1)) - target).sum()
