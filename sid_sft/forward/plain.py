"""The plain way to the loss: whole sequences through the model, with gradients, logits only where a label stands.

Full fine-tuning goes this way, and freeze mode where the frozen prefix is not wanted or not exact. Where even this is not
the model's own loss (a head of another make, say), OwnForward takes all logits from the model itself.

Shapes: B examples, S tokens of a batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from sid_sft.forward.architecture import finish_logits, own_logits, sliding_window
from sid_sft.forward.examples import Examples, MicroBatch
from sid_sft.forward.trees import TREE_TOKENS, Tree, build_tree, group_by_user, lay_out, pad, split_by_nodes, to_device
from sid_sft.sharding import gathered
from sid_sft.tasks import TASKS


class PlainForward:
    """Whole sequences with gradients; logits only where a label stands.

    With `group_users` the examples of one user and task that fall into a step are one tree, in which what they share is run
    once (only for models in which a tree is exact: see architecture.why_not_exact).
    """

    def __init__(
        self, model: PreTrainedModel, examples: Examples, micro_batch_size: int, *, group_users: bool = False
    ) -> None:
        self.model, self.examples, self.micro_batch_size = model, examples, micro_batch_size
        self.group_users = group_users
        self.longest = int(examples.length.max()) if group_users else 0  # bounds a micro-batch of trees

    def resize(self, micro_batch_size: int) -> None:
        """Cuts steps into micro-batches of another size from now on."""
        self.micro_batch_size = micro_batch_size

    def cut(self, indices: np.ndarray, processes: int = 1) -> list[MicroBatch]:
        """The examples of a step as micro-batches, sorted by length so that little is padding."""
        if self.group_users:
            return self.tree_parts(indices)
        ordered = indices[np.argsort(self.examples.length[indices], kind="stable")]
        parts = [ordered[i : i + self.micro_batch_size] for i in range(0, len(ordered), self.micro_batch_size)]
        return [MicroBatch(part, float(len(part) * self.examples.length[part].max()), None) for part in parts]

    def for_evaluation(self, examples: Examples) -> PlainForward:
        """The same way over other examples, none of them in trees."""
        return PlainForward(self.model, examples, self.micro_batch_size)

    def tree_parts(self, indices: np.ndarray) -> list[MicroBatch]:
        """The examples of a step in users' trees, cut so that a micro-batch has no more tokens than one of long examples."""
        bound = self.micro_batch_size * self.longest
        groups = self.groups(indices)
        sizes = [len(self.tree(group).tokens) for group in groups]
        parts: list[list[int]] = [[]]
        rows = 0
        for g in sorted(range(len(groups)), key=lambda g: (sizes[g], groups[g])):
            if parts[-1] and (rows + 1) * sizes[g] > bound:
                parts.append([])
                rows = 0
            parts[-1] += groups[g]
            rows += 1
        return [MicroBatch(np.array(part), float(self.examples.length[part].sum()), None) for part in parts]

    def groups(self, indices: np.ndarray) -> list[list[int]]:
        """What makes one tree: an example, or with `group_users` those of one user and task."""
        if not self.group_users:
            return [[int(i)] for i in indices]
        users = group_by_user(self.examples, indices, self.examples.task)
        return [part for group in users for part in split_by_nodes({i: self.examples.ids(i) for i in group}, TREE_TOKENS)]

    def tree(self, group: list[int]) -> Tree:
        """The tree of some examples' inputs: all but the end token, from which nothing is predicted."""
        return build_tree([self.examples.ids(i)[:-1] for i in group])

    @gathered
    def nll(self, indices: np.ndarray) -> Tensor:
        """Sums of -log p over the labels of the examples, per task (len(TASKS),)."""
        groups = self.groups(indices)
        trees = [self.tree(group) for group in groups]
        hidden = self.hidden(trees).flatten(0, 1)
        width = max(len(tree.tokens) for tree in trees)
        places, targets, tasks = [], [], []
        for b, (group, tree) in enumerate(zip(groups, trees, strict=True)):
            for i, path in zip(group, tree.paths, strict=True):
                first = int(self.examples.prompt_len[i]) - 1
                places.append(b * width + path[first:])
                targets.append(self.examples.ids(i)[first + 1 :].astype(np.int64))
                tasks.append(np.full(len(path) - first, self.examples.task[i], dtype=np.int64))
        place, target, task = (to_device(np.concatenate(part), hidden.device) for part in (places, targets, tasks))
        logits = finish_logits(self.model, self.model.get_output_embeddings()(hidden[place]))
        return nll_per_task(logits, target, task)

    def hidden(self, trees: list[Tree]) -> Tensor:
        """The last hidden states (B, S, D) of a batch of trees."""
        device = self.model.device
        if all(len(tree.paths) == 1 for tree in trees):
            # Right padding needs no mask: in a causal model nothing real reads what stands behind it.
            inputs = to_device(pad([tree.tokens for tree in trees]), device)
            return self.model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
        layout = lay_out(trees)
        return self.model.base_model(
            input_ids=to_device(layout.tokens, device),
            attention_mask=layout.masks(sliding_window(self.model), self.model.dtype, device),
            position_ids=to_device(layout.positions, device),
            use_cache=False,
        ).last_hidden_state


class OwnForward:
    """The loss of the model's own forward: slow, and right for every causal model.

    Sequences of one length at a time, so nothing is padded and no mask is needed: how a model treats those is its own
    affair. `alone`: one sequence at a time, for a model whose numbers depend on what stands beside it in a batch.
    """

    def __init__(self, model: PreTrainedModel, examples: Examples, micro_batch_size: int, *, alone: bool = False) -> None:
        self.model, self.examples, self.alone = model, examples, alone
        self.micro_batch_size = 1 if alone else micro_batch_size

    def for_evaluation(self, examples: Examples) -> OwnForward:
        """The same way over other examples."""
        return OwnForward(self.model, examples, self.micro_batch_size, alone=self.alone)

    def resize(self, micro_batch_size: int) -> None:
        """Cuts steps into micro-batches of another size from now on."""
        self.micro_batch_size = 1 if self.alone else micro_batch_size

    def cut(self, indices: np.ndarray, processes: int = 1) -> list[MicroBatch]:
        """The examples of a step as micro-batches of equal lengths."""
        lengths = self.examples.length[indices]
        parts = []
        for length in np.unique(lengths):
            same = indices[lengths == length]
            parts += [same[i : i + self.micro_batch_size] for i in range(0, len(same), self.micro_batch_size)]
        return [MicroBatch(part, float(self.examples.length[part].sum()), None) for part in parts]

    @gathered
    def nll(self, indices: np.ndarray) -> Tensor:
        """Sums of -log p over the labels of examples of one length, per task (len(TASKS),)."""
        ids = to_device(np.stack([self.examples.ids(i) for i in indices]).astype(np.int64), self.model.device)
        first = to_device(self.examples.prompt_len[indices].astype(np.int64), ids.device) - 1  # predicts the first label
        labelled = torch.arange(ids.shape[1] - 1, device=ids.device) >= first[:, None]
        logits = own_logits(self.model, ids[:, :-1])[labelled]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        task = to_device(self.examples.task[indices].astype(np.int64), ids.device)
        return nll_per_task(logits, ids[:, 1:][labelled], task[:, None].expand_as(labelled)[labelled])


def nll_per_task(logits: Tensor, target: Tensor, task: Tensor) -> Tensor:
    """Sums of -log p of the targets (n,) under logits (n, V), per task (len(TASKS),); task: (n,)."""
    losses = F.cross_entropy(logits, target, reduction="none")
    return losses.new_zeros(len(TASKS)).index_add(0, task, losses)
