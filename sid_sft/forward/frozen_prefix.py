"""The forward that knows what is constant while only SID rows train.

A frozen causal decoder computes the same hidden states, keys and values for every token before the first SID of its
sequence, at every step. With an example laid out as

    template | own prefix | tail           template: the same tokens for every example of a task
    --------- static ----- - dynamic -     own prefix: up to the first SID (a title history); tail: from the first SID on

FrozenPrefix
    - computes the template's keys and values once a run,
    - runs own prefixes without gradients, those of one user as a single tree in which shared tokens stand once,
    - runs only the tail with gradients, against the keys and values of what stands before it,
    - keeps, within a budget of bytes, what the next epoch would compute again: hidden states, log-sum-exp and target
      logits of the labels that are predicted from static positions, and keys and values of own prefixes,
    - lets the loss reach the SID rows alone: as embeddings of the tail, and as rows of the output head.

Positions are those of the full sequence, every number is the plain way's up to rounding, and the model is called
through its public interface and left as it is.

Shapes: B examples, S tokens of a batch, V vocabulary, D hidden size, M SID rows, n labels, P tokens with known keys
and values, N nodes of a tree.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from sid_sft.forward.architecture import (
    KeyLayout,
    KnownKeys,
    Pair,
    Past,
    appended,
    embedding_scale,
    finish_logits,
    known_tokens,
    sliding_window,
)
from sid_sft.forward.examples import Examples, Part
from sid_sft.forward.frozen_head import FrozenHead, FrozenLogSumExp, Labels
from sid_sft.forward.store import DEVICE, Store
from sid_sft.forward.trees import OwnKeys, Tree, build_tree, common_prefix, group_by_user, lay_out, to_device
from sid_sft.sid_rows import SidRows
from sid_sft.tasks import TASKS

TREE_TOKENS = 1024  # nodes of the largest tree: its mask is quadratic


class Room(NamedTuple):
    """How much is held at a time.

    tail, static: tokens per example of a micro-batch, on average, but no fewer in all than LEAST_TAIL and LEAST_STATIC; tail
    tokens keep activations for the backward, static ones only stand beside them as known keys. fill: static tokens run and
    kept at a time. logits: values of a piece of them.
    """

    tail: int
    static: int
    fill: int
    logits: int


SMALL_ROOM = Room(tail=16, static=48, fill=512, logits=250_000)  # a CPU is busy with little, and short of memory
LARGE_ROOM = Room(tail=128, static=512, fill=8192, logits=64_000_000)  # an accelerator waits for every launch
LEAST_TAIL, LEAST_STATIC = 128, 512  # tokens of the smallest micro-batch: as many as a plain one of one or two examples has


class PrefixKeys(NamedTuple):
    """Keys and values of own prefixes. keys (K, width of a KeyLayout); rows: example -> the rows of its tokens."""

    keys: Tensor
    rows: dict[int, np.ndarray]


class PrefixTree(NamedTuple):
    """The own prefixes of some examples of one user and task as one tree; its paths are the members', in their order."""

    members: list[int]
    tree: Tree


class FrozenPrefix:
    """The loss of freeze mode with static work done once; see the head of this file.

    `group_users`: the examples of one user and task that fall into one step are one tree in the tail, too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: SidRows,
        examples: Examples,
        micro_batch_size: int,
        *,
        cache_bytes: int = 0,
        cache_place: str | Path = DEVICE,
        group_users: bool = False,
    ) -> None:
        self.model, self.rows, self.examples, self.group_users = model, rows, examples, group_users
        self.micro_batch_size = micro_batch_size
        self.device, self.dtype = model.device, model.dtype
        self.room = SMALL_ROOM if self.device.type == "cpu" else LARGE_ROOM
        self.tail_tokens = max(LEAST_TAIL, micro_batch_size * self.room.tail)
        self.static_tokens = max(LEAST_STATIC, micro_batch_size * self.room.static)
        self.embedding = model.get_input_embeddings()
        head = model.get_output_embeddings()
        finish = partial(finish_logits, model)
        self.head = FrozenHead(head.weight.detach(), head.bias, rows.ids.cpu().numpy(), finish, self.room.logits)
        self.scale = embedding_scale(model)
        vocabulary = self.embedding.weight.shape[0]
        self.row_of = torch.full((vocabulary,), -1, device=self.device)
        self.row_of[rows.ids] = torch.arange(len(rows.ids), device=self.device)
        self.window = sliding_window(model)

        self.templates = self.find_templates()  # task -> tokens shared by all its examples
        self.template_len = np.array([len(self.templates.get(task, ())) for task in range(128)])[examples.task]
        self.static_end = np.minimum(examples.static_len, examples.length - 1)  # the last token is never an input
        self.static_labels = np.maximum(0, self.static_end - examples.prompt_len + 1)
        self.own_len = self.static_end - self.template_len
        self.tail_len = examples.length - 1 - self.static_end
        self.template_keys: dict[int, dict[int, Pair]] = {}
        self.key_layout = self.find_key_layout()

        self.trees: list[PrefixTree] = []
        self.tree_of, self.place_in_tree = self.plant_trees()
        self.store = Store(cache_bytes, self.device, cache_place)
        self.label_start = np.concatenate([[0], np.cumsum(self.static_labels)])
        self.kept_labels = self.make_label_store()
        self.key_start, self.kept_nodes = self.choose_kept_keys()
        self.kept_keys: Tensor | None = None  # (kept nodes, width of the key layout) from the first one on
        self.fills = self.plan_fills()
        self.fill_of = {number: place for place, fill in enumerate(self.fills) for number in fill}
        self.filled = np.zeros(len(self.fills), dtype=bool)

    def for_evaluation(self, examples: Examples) -> FrozenPrefix:
        """The same way over other examples, of which nothing is kept; a user's examples are trees, as no step cuts them."""
        return FrozenPrefix(self.model, self.rows, examples, self.micro_batch_size, group_users=True)

    # ---- what is shared

    def find_templates(self) -> dict[int, np.ndarray]:
        """The longest common token prefix of each task, at most up to the first position that predicts a label."""
        found = {}
        for task in np.unique(self.examples.task):
            members = np.nonzero(self.examples.task == task)[0]
            bound = min(int(np.minimum(self.examples.static_len, self.examples.prompt_len - 1)[members].min()), 10**6)
            shared = self.examples.ids(members[0])[:bound]
            for i in members[1:]:
                shared = shared[: common_prefix(shared, self.examples.ids(i)[: len(shared)])]
            found[int(task)] = np.array(shared)
        return found

    def plant_trees(self) -> tuple[np.ndarray, np.ndarray]:
        """Groups the examples that have an own prefix by task and user into trees; returns each example's tree, or -1, and
        its place among the tree's members."""
        examples = self.examples
        tree_of, place = np.full((2, len(examples)), -1, dtype=np.int64)
        for members in group_by_user(examples, np.nonzero(self.own_len > 0)[0], examples.task):
            for part in self.split_members(members):
                tree_of[part], place[part] = len(self.trees), np.arange(len(part))
                self.trees.append(self.prefix_tree(part))
        return tree_of, place

    def prefix_tree(self, members: list[int]) -> PrefixTree:
        ids = self.examples.ids
        return PrefixTree(members, build_tree([ids(i)[self.template_len[i] : self.static_end[i]] for i in members]))

    def split_members(self, members: list[int]) -> Iterable[list[int]]:
        """Cuts a user's examples, shortest first, so that no tree can outgrow TREE_TOKENS (a lone example may)."""
        part, size = [], 0
        for i in sorted(members, key=lambda i: (self.examples.prompt_len[i], i)):
            # Upper bound: the longest prompt, which the others share, and each one's own static answer.
            answer = max(0, int(self.static_end[i] - self.examples.prompt_len[i]))
            grown = size + answer
            if part and grown + int(self.examples.prompt_len[i]) > TREE_TOKENS:
                yield part
                part, grown = [], answer
            part.append(i)
            size = grown
        yield part

    def find_key_layout(self) -> KeyLayout:
        """How the model's keys and values lie in a row, as it shows with one token."""
        tree = Tree(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64), [np.zeros(1, dtype=np.int64)])
        with torch.no_grad():
            _, new = self.run_trees([tree], start=0, past={}, rows=None, keep=True)
        return KeyLayout.of(new)

    def template_past(self, task: int) -> Past:
        """The past that a task's template is, computed once; empty where the template is."""
        if task not in self.template_keys:
            tokens = self.templates[task]
            new: dict[int, Pair] = {}
            if len(tokens):
                tree = Tree(tokens, np.arange(len(tokens)), [np.arange(len(tokens))])
                _, new = self.run_trees([tree], start=0, past={}, rows=None, keep=True)
            self.template_keys[task] = new
        return appended({}, self.template_keys[task])

    # ---- one call of the model

    def run_trees(
        self,
        trees: list[Tree],
        *,
        start: int,
        past: Past,
        rows: Tensor | None,
        keep: bool,
        own_keys: list[OwnKeys] | None = None,
    ) -> tuple[Tensor, dict[int, Pair]]:
        """Hidden states (B, S, D) of trees whose first tokens stand at position `start`, and new keys and values if kept.

        past: per layer, pieces of keys and values before the trees; own_keys says how the last piece is read, where it is
        not the same for all.
        """
        layout = lay_out(trees, start=start, known=known_tokens(past), own_keys=own_keys)
        cache = KnownKeys(past, keep=keep)
        output = self.model.base_model(
            inputs_embeds=self.embed(to_device(layout.tokens, self.device), rows),
            attention_mask=layout.masks(self.window, self.dtype, self.device),
            position_ids=to_device(layout.positions, self.device),
            past_key_values=cache,
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

    # ---- own prefixes: what is kept of them, their labels, their keys and values

    def make_label_store(self) -> Labels | None:
        count, width = int(self.label_start[-1]), self.embedding.weight.shape[1]
        number = torch.promote_types(self.dtype, torch.float32)
        tensors = [
            self.store.take((count, width), self.dtype),
            *(self.store.take((count,), number) for _ in range(2)),
            self.store.take((count,), torch.int64),
        ]
        return None if any(tensor is None for tensor in tensors) else Labels(*tensors)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        return self.key_layout.width * self.dtype.itemsize

    def choose_kept_keys(self) -> tuple[dict[int, int], int]:
        """The trees whose keys and values have room in the store, those that tails will read, as far as it goes: number ->
        first row of `kept_keys`; and how many rows that will have.

        What is kept is decided before the first step, and computed in batches fixed here and now (`plan_fills`), so that no
        number depends on the order of the steps: a resumed run meets the very same bits.
        """
        start: dict[int, int] = {}
        nodes = 0
        if self.kept_labels is None:
            return start, nodes
        for number, (members, tree) in enumerate(self.trees):
            if (self.tail_len[members] > 0).any() and self.store.has_room((nodes + len(tree.tokens)) * self.row_bytes):
                start[number] = nodes
                nodes += len(tree.tokens)
        return start, nodes

    def plan_fills(self) -> list[list[int]]:
        """Fixed batches of trees, of one task and similar size each, that are run whole when first needed and kept."""
        if self.kept_labels is None:
            return []
        sizes = [(self.task_of(prefix), len(prefix.tree.tokens), number) for number, prefix in enumerate(self.trees)]
        fills: list[list[int]] = []
        for task, size, number in sorted(sizes):
            full = fills and (len(fills[-1]) + 1) * size > self.room.fill
            if not fills or full or self.task_of(self.trees[fills[-1][0]]) != task:
                fills.append([])
            fills[-1].append(number)
        return fills

    def task_of(self, prefix: PrefixTree) -> int:
        return int(self.examples.task[prefix.members[0]])

    @torch.no_grad()
    def static_pass(self, indices: np.ndarray) -> tuple[Labels | None, PrefixKeys | None]:
        """What a micro-batch needs of its own prefixes: the labels that are not kept, and keys and values for its tails.

        What the store has room for is filled in, a whole fixed batch of trees at a time; the rest is computed for these
        examples alone.
        """
        with_tree = [int(i) for i in indices if self.tree_of[i] >= 0]
        if self.kept_labels is None:
            return self.run_loose(with_tree)
        self.fill(with_tree)
        tails = [i for i in with_tree if self.tail_len[i]]
        if tails and not self.keeps_keys(tails[0]):
            return None, self.run_loose(tails)[1]
        return None, PrefixKeys(self.kept_keys, {i: self.kept_rows(i) for i in tails}) if tails else None

    def keeps_keys(self, i: int) -> bool:
        """Whether the store has room for the keys and values of an example's own prefix."""
        return int(self.tree_of[i]) in self.key_start

    def kept_rows(self, i: int) -> np.ndarray:
        """The rows of `kept_keys` that hold an example's own prefix."""
        number = int(self.tree_of[i])
        return self.key_start[number] + self.trees[number].tree.paths[self.place_in_tree[i]]

    def fill(self, members: list[int]) -> None:
        """Computes what is to be kept of the examples' trees, where that has not happened yet."""
        needed = {self.fill_of[int(self.tree_of[i])] for i in members}
        for number in sorted(fill for fill in needed if not self.filled[fill]):
            batch = [self.trees[tree] for tree in self.fills[number]]
            starts = [self.key_start.get(tree, -1) for tree in self.fills[number]]
            hidden, new = self.run_prefixes(batch, keep=max(starts) >= 0)
            if (found := self.labels_of(batch, hidden)) is not None:
                owners, labels = found
                places = to_device(self.label_places(owners), self.kept_labels.hidden.device)
                for room, part in zip(self.kept_labels, labels, strict=True):
                    room[places] = part.to(room.device)
            if new is not None:
                self.keep_keys(batch, starts, new)
            self.filled[number] = True

    def keep_keys(self, batch: list[PrefixTree], starts: list[int], new: Tensor) -> None:
        """Puts new keys and values (B, S, width) of trees into the store, where they have a start."""
        if self.kept_keys is None:
            self.kept_keys = self.store.take((self.kept_nodes, new.shape[2]), new.dtype)
        for row, start, (_, tree) in zip(new, starts, batch, strict=True):
            if start >= 0:
                self.kept_keys[start : start + len(tree.tokens)] = row[: len(tree.tokens)].to(self.kept_keys.device)

    def run_loose(self, members: list[int]) -> tuple[Labels | None, PrefixKeys | None]:
        """Static labels, and keys and values, of some examples alone, for one micro-batch."""
        groups: dict[int, list[int]] = defaultdict(list)
        for i in members:
            groups[int(self.tree_of[i])].append(i)
        labels: list[Labels] = []
        keys: list[Tensor] = []
        rows: dict[int, np.ndarray] = {}
        count = 0
        for batch in self.split_batch([self.prefix_tree(group) for group in groups.values()]):
            hidden, new = self.run_prefixes(batch, keep=bool(self.tail_len[batch[0].members[0]]))
            if self.kept_labels is None and (found := self.labels_of(batch, hidden)) is not None:
                labels.append(found[1])
            if new is None:
                continue
            for row, (group, tree) in zip(new, batch, strict=True):
                keys.append(row[: len(tree.tokens)])
                rows |= {i: count + path for i, path in zip(group, tree.paths, strict=True)}
                count += len(tree.tokens)
        return (
            Labels(*(torch.cat(parts) for parts in zip(*labels, strict=True))) if labels else None,
            PrefixKeys(torch.cat(keys), rows) if keys else None,
        )

    def run_prefixes(self, batch: list[PrefixTree], *, keep: bool) -> tuple[Tensor, Tensor | None]:
        """Hidden states (B, S, D) of trees of one task; if wanted, their keys and values (B, S, width of the key layout)."""
        task = self.task_of(batch[0])
        trees = [tree for _, tree in batch]
        past = self.template_past(task)
        hidden, new = self.run_trees(trees, start=len(self.templates[task]), past=past, rows=None, keep=keep)
        return hidden, self.key_layout.pack(new) if keep else None

    def split_batch(self, batch: list[PrefixTree]) -> Iterable[list[PrefixTree]]:
        """Cuts a batch of trees so that a part holds trees of similar size and no more than `static_tokens`."""
        part: list[PrefixTree] = []
        for prefix in sorted(batch, key=lambda prefix: (len(prefix.tree.tokens), prefix.members)):
            if part and (len(part) + 1) * len(prefix.tree.tokens) > self.static_tokens:
                yield part
                part = []
            part.append(prefix)
        if part:
            yield part

    def labels_of(self, batch: list[PrefixTree], hidden: Tensor) -> tuple[list[int], Labels] | None:
        """Those of the trees' members that have static labels, and these labels, from the trees' hidden states (B, S, D)."""
        examples, places, targets, owners = self.examples, [], [], []
        for b, (members, tree) in enumerate(batch):
            for i, path in zip(members, tree.paths, strict=True):
                if self.static_labels[i]:
                    first = examples.prompt_len[i] - 1
                    nodes = path[first - self.template_len[i] :]
                    places.append(b * hidden.shape[1] + nodes)
                    targets.append(examples.ids(i)[first + 1 : first + 1 + len(nodes)])
                    owners.append(i)
        if not owners:
            return None
        place, target = (to_device(np.concatenate(part).astype(np.int64), self.device) for part in (places, targets))
        return owners, self.make_labels(hidden.flatten(0, 1)[place], target)

    def label_places(self, owners: list[int]) -> np.ndarray:
        """Where the store keeps the static labels of some examples."""
        return np.concatenate([np.arange(self.label_start[i], self.label_start[i + 1]) for i in owners])

    def make_labels(self, hidden: Tensor, target: Tensor) -> Labels:
        """The labels that hidden states (n, D) predict; differentiable in the hidden states where those are."""
        return Labels(hidden, FrozenLogSumExp.apply(hidden, self.head), self.head.logit(hidden, target), target)

    def label_nll(self, labels: Labels, rows: Tensor) -> Tensor:
        """Sum of -log p over labels, differentiable in the head's SID rows (M, D) and wherever the labels are."""
        bias = None if self.head.bias is None else self.head.bias[self.rows.ids]
        sid_logits = self.head.finish(F.linear(labels.hidden, rows, bias))
        place = self.row_of[labels.target]
        trained = sid_logits.gather(1, place.clamp(min=0)[:, None]).squeeze(1)
        target = torch.where(place >= 0, trained, labels.logit)
        return (torch.logaddexp(labels.rest, sid_logits.logsumexp(1)) - target).sum()

    def static_nll(self, indices: np.ndarray, loose: Labels | None, rows: Tensor) -> Tensor:
        """Sum of -log p over the static labels of the examples, differentiable in the head's SID rows (M, D)."""
        owners = [int(i) for i in indices if self.static_labels[i]]
        if not owners:
            return rows.new_zeros((), dtype=torch.promote_types(rows.dtype, torch.float32))
        if self.kept_labels is None:
            return self.label_nll(loose, rows)
        places = self.label_places(owners)
        return self.label_nll(Labels(*(self.store.read(tensor, places) for tensor in self.kept_labels)), rows)

    # ---- tails

    def tail_nll(self, indices: np.ndarray, known: PrefixKeys | None, rows: Tensor, head_rows: Tensor) -> Tensor:
        """Sum of -log p over the labels predicted from the tails, differentiable in both tables' SID rows (M, D)."""
        examples = self.examples
        task = int(examples.task[indices[0]])
        trees, reads, nodes, places, targets = [], [], [], [], []
        for group in self.tail_groups(indices):
            tree = self.tail_tree(group)
            if known is not None:
                own, read = self.own_keys(group, tree, known)
                nodes.append(own)
                reads.append(read)
            for i, path in zip(group, tree.paths, strict=True):
                first = max(int(examples.prompt_len[i]) - 1, int(self.static_end[i]))  # first predicting position here
                places.append((len(trees), path[len(path) - (int(examples.length[i]) - 1 - first) :]))
                targets.append(examples.ids(i)[first + 1 :])
            trees.append(tree)
        past = self.template_past(task)
        if known is not None:
            past = appended(past, self.key_layout.unpack(self.read_rows(known.keys, nodes)))
        hidden, _ = self.run_trees(
            trees, start=len(self.templates[task]), past=past, rows=rows, keep=False, own_keys=reads or None
        )
        flat = np.concatenate([b * hidden.shape[1] + path for b, path in places])
        hidden = hidden.flatten(0, 1)[to_device(flat, self.device)]
        target = to_device(np.concatenate(targets).astype(np.int64), self.device)
        return self.label_nll(self.make_labels(hidden, target), head_rows)

    def tail_groups(self, indices: np.ndarray) -> list[list[int]]:
        """The rows of a tail batch: single examples, or with `group_users` those of one user (and static tree)."""
        return group_by_user(self.examples, indices, self.tree_of) if self.group_users else [[int(i)] for i in indices]

    def tail_tree(self, group: list[int]) -> Tree:
        """The tree of a group's tails; its paths are the examples', in their order."""
        examples = self.examples
        if len(group) == 1:
            (i,) = group
            tokens = examples.ids(i)[self.static_end[i] : examples.length[i] - 1]
            return Tree(tokens, np.arange(len(tokens)) + int(self.own_len[i]), [np.arange(len(tokens))])
        whole = build_tree([examples.ids(i)[self.template_len[i] : examples.length[i] - 1] for i in group])
        dynamic = np.zeros(len(whole.tokens), dtype=bool)
        for i, path in zip(group, whole.paths, strict=True):
            dynamic[path[int(self.own_len[i]) :]] = True
        number = np.cumsum(dynamic) - 1
        paths = [number[path[int(self.own_len[i]) :]] for i, path in zip(group, whole.paths, strict=True)]
        return Tree(whole.tokens[dynamic], whole.depth[dynamic], paths)

    def own_keys(self, group: list[int], tree: Tree, known: PrefixKeys) -> tuple[np.ndarray, OwnKeys]:
        """Which rows of the known keys a tree of tails reads (P,), and how."""
        nodes = np.unique(np.concatenate([known.rows[i] for i in group]))
        positions = np.zeros(len(nodes), dtype=np.int64)
        read = np.zeros((len(tree.tokens), len(nodes)), dtype=bool)
        for i, path in zip(group, tree.paths, strict=True):
            columns = np.searchsorted(nodes, known.rows[i])
            positions[columns] = self.template_len[i] + np.arange(len(columns))
            read[np.ix_(path, columns)] = True
        return nodes, OwnKeys(positions, read)

    def read_rows(self, kept: Tensor, rows: list[np.ndarray]) -> Tensor:
        """Lists of rows of keys and values (K, width) as one (B, P, width).

        A shorter list repeats its last row. No token reads what is repeated, but 0 x NaN is NaN, and another row may be one
        that nobody has written yet.
        """
        size = max(map(len, rows))
        places = np.stack([own[np.minimum(np.arange(size), len(own) - 1)] for own in rows])
        return self.store.read(kept, places.ravel()).unflatten(0, places.shape)

    # ---- the interface of a forward

    def cut(self, indices: np.ndarray, processes: int = 1) -> list[Part]:
        """The examples of a step as micro-batches: one task in each, tails of one size, own prefixes all kept or all not.

        What one process keeps, it keeps for itself: examples with a kept tree go to the process that owns the tree.
        """
        owner = self.owners(indices, processes)
        has_tail = self.tail_len[indices] > 0
        kept = np.array([self.keeps_keys(i) if self.tree_of[i] >= 0 else -1 for i in indices])
        kinds = np.stack([self.examples.task[indices], has_tail, kept, owner], axis=1)
        parts: list[Part] = []
        for kind in np.unique(kinds, axis=0):
            members = indices[(kinds == kind).all(axis=1)]
            tail, process = bool(kind[1]), int(kind[3])
            sizes = self.tail_len if tail else self.static_labels
            parts += self.cut_kind(members, sizes, None if process < 0 else process)
        return parts

    def owners(self, indices: np.ndarray, processes: int) -> np.ndarray:
        """The process that owns each example's kept tree, -1 where any process may take it."""
        if not self.fills or processes == 1:
            return np.full(len(indices), -1)
        return np.array([self.fill_of[int(self.tree_of[i])] % processes if self.tree_of[i] >= 0 else -1 for i in indices])

    def cut_kind(self, members: np.ndarray, sizes: np.ndarray, owner: int | None) -> list[Part]:
        """Micro-batches of examples of one kind, within the bounds on tail tokens and on known keys read beside them."""
        groups = self.tail_groups(members)
        wide = [int(sizes[group].sum()) for group in groups]
        known = [int(self.own_len[group].max()) if self.tail_len[group[0]] else 0 for group in groups]
        parts: list[list[int]] = [[]]
        count = most_known = 0
        for g in sorted(range(len(groups)), key=lambda g: (wide[g], known[g], groups[g])):
            most_known = max(most_known, known[g])
            if parts[-1] and ((count + 1) * wide[g] > self.tail_tokens or (count + 1) * most_known > self.static_tokens):
                parts.append([])
                count, most_known = 0, known[g]
            parts[-1] += groups[g]
            count += 1
        return [Part(np.array(part), self.cost(np.array(part)), owner) for part in parts]

    def cost(self, part: np.ndarray) -> float:
        """Forward passes of a token, roughly: two for a tail token (forward and backward), one for a static one.

        What is kept counts as free from the start: the order of the micro-batches, and with it every bit of the gradient,
        must not depend on which step came first.
        """
        static = 0 if self.fills else self.own_len[part].sum()
        return float(2 * self.tail_len[part].sum() + static + 0.1 * self.static_labels[part].sum())

    def nll(self, indices: np.ndarray) -> Tensor:
        """Sums of -log p over the labels of a micro-batch as `cut` makes them, per task (len(TASKS),).

        The backward reaches the masters of the SID rows, and nothing else.
        """
        casts = [master.to(self.dtype) for master in self.rows.masters]
        rows, head_rows = casts[0], casts[-1]
        loose, known = self.static_pass(indices)
        loss = self.static_nll(indices, loose, head_rows)
        if self.tail_len[indices[0]]:
            loss = loss + self.tail_nll(indices, known, rows, head_rows)
        task = int(self.examples.task[indices[0]])
        return F.pad(loss.view(1), (task, len(TASKS) - 1 - task))

    def shares(self) -> str:
        """What the tokens are, in words: template, own prefix and tail add up to all."""
        total = int(self.examples.length.sum()) / 100
        template, own, labels = (int(part.sum()) / total for part in (self.template_len, self.own_len, self.examples.labels))
        return (
            f"{template:.0f}% template, {own:.0f}% own prefix, {100 - template - own:.0f}% tail; {labels:.0f}% carry a label"
        )
