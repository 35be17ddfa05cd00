"""The SID rows: the only numbers that train in freeze mode.

A model has one table of rows, its input embedding, or two where the output head is not tied to it. Each table is a
matrix of the model (V tokens, D dimensions) of which M rows, the SID tokens' own, train:

    rows = sft.freeze_llm(model, ids, tokens)   # freezes the model but for its tables, which get rows.mask_grad as a hook
    optimizer = SidRowAdamW(rows, lr=1e-3)
    loss.backward(); optimizer.step()           # no number outside rows.ids can move

The optimizer never sees the matrices. It steps a float32 copy of the rows (the masters, M x D) and writes the result
back into the model, so weight decay, momentum and clipping cannot reach a frozen number, and an update that is smaller
than a bfloat16 step is not lost but adds up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from sid_sft.files import InputError, cut, error_text, shown
from sid_sft.forward.architecture import TABLES, parts_of, tables_of
from sid_sft.sharding import counts_of_all, local, own_rows, whole

ROWS_FILE = "sid_rows.safetensors"
HASHED_VALUES = 4096  # values sampled of each tensor for the hash of a base model


class Table(NamedTuple):
    """One matrix of the model whose SID rows train. weight: (V, D) of the model; master: (M, D), trained, float32."""

    name: str
    weight: nn.Parameter
    master: nn.Parameter


class SidRows:
    """The SID rows of a model: their ids, their tokens, and a float32 master of each table's rows.

    ids: (M,) token ids in ascending order; tokens: their texts in the same order. The model itself is left as it is.
    """

    def __init__(self, model: PreTrainedModel, ids: list[int], tokens: list[str]) -> None:
        order = sorted(range(len(ids)), key=ids.__getitem__)
        self.tokens = [tokens[i] for i in order]
        self.ids = torch.tensor([ids[i] for i in order], device=model.get_input_embeddings().weight.device)
        self.tables = []
        for name, weight in tables_of(model).items():
            dtype = torch.promote_types(weight.dtype, torch.float32)
            master = nn.Parameter(weight.detach()[self.ids].to(dtype))
            self.tables.append(Table(name, weight, master))

    def mask_grad(self, grad: Tensor) -> Tensor:
        """The gradient (V, D) with every row but the SID rows zero; a new tensor, as a hook must return."""
        masked = torch.zeros_like(grad)
        masked[self.ids] = grad[self.ids]
        return masked

    @property
    def masters(self) -> list[nn.Parameter]:
        return [table.master for table in self.tables]

    @property
    def numbers(self) -> int:
        """How many numbers train: rows x width, over all tables."""
        return sum(master.numel() for master in self.masters)

    def collect_gradients(self) -> None:
        """Moves the SID rows of dense gradients that a plain backward left on the model to the masters.

        A table that no loss of the step has reached gets zeros, so that its moments decay as they would in a dense step.
        """
        for _, weight, master in self.tables:
            if weight.grad is not None:
                rows = weight.grad[self.ids].to(master.dtype)
                master.grad = rows if master.grad is None else master.grad + rows
                weight.grad = None
            elif master.grad is None:
                master.grad = torch.zeros_like(master)

    @torch.no_grad()
    def write(self) -> None:
        """Copies the masters into the model, in the model's dtype."""
        for _, weight, master in self.tables:
            weight[self.ids] = master.to(weight.dtype)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Takes the rows of a rows file that was written for the same tokens."""
        saved = read_rows_file(path)
        shapes = {name: master.shape for name, _, master in self.tables}
        saved_shapes = {name: rows.shape for name, rows in saved.rows.items()}
        if saved.tokens != self.tokens or saved.ids.tolist() != self.ids.tolist() or saved_shapes != shapes:
            raise InputError(f"{path}: its SID rows are not those of this run; resume with the index it was made with")
        for name, _, master in self.tables:
            master.copy_(saved.rows[name])
        self.write()

    def save(self, path: Path, base_hash: str) -> None:
        """Writes the rows file: ids, tokens, one (M, D) matrix per table, and the hash of the base they belong to."""
        tensors = {table.name: table.master.detach().cpu().contiguous() for table in self.tables}
        metadata = {"tokens": json.dumps(self.tokens), "base": base_hash}
        path.write_bytes(in_order(save({"ids": self.ids.cpu(), **tensors}, metadata=metadata)))


class SidRowAdamW(torch.optim.AdamW):
    """AdamW over the masters of SidRows, and over adapters at a rate of their own; a step ends with the rows written into
    the model.

    Its state_dict carries the masters beside the moments, so a resumed run continues from the float32 numbers.
    """

    def __init__(self, rows: SidRows, *, adapters: Sequence[nn.Parameter] = (), adapter_lr: float = 0.0, **settings) -> None:
        self.rows = rows
        fused = rows.ids.device.type in ("cpu", "cuda")
        groups: list[dict] = [{"params": rows.masters}]
        if adapters:
            groups.append({"params": list(adapters), "lr": adapter_lr})
        super().__init__(groups, fused=fused, **settings)

    def step(self, closure=None):
        self.rows.collect_gradients()
        result = super().step(closure)
        self.rows.write()
        return result

    def state_dict(self) -> dict:
        return {**super().state_dict(), "masters": [master.detach().clone() for master in self.rows.masters]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        for master, saved in zip(self.rows.masters, state_dict["masters"], strict=True):
            master.copy_(saved)
        self.rows.write()


# ---------------------------------------------------------------------------------------------- the rows file


class SavedRows(NamedTuple):
    """The content of a rows file. ids: (M,); rows: table name -> (M, D)."""

    ids: Tensor
    tokens: list[str]
    rows: dict[str, Tensor]
    base_hash: str


def in_order(content: bytes) -> bytes:
    """A safetensors file with the entries of its header sorted: as it is written their order is a matter of chance."""
    length = int.from_bytes(content[:8], "little")  # of the header, which is JSON filled up with spaces
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def read_rows_file(path: Path) -> SavedRows:
    """The content of a rows file, checked; InputError where it is not what `SidRows.save` writes."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            metadata = file.metadata() or {}
        fault = fault_of_rows(tensors, tokens := json.loads(metadata.get("tokens", "null")))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        fault = cut(error_text(error), 200)
    if fault or "base" not in metadata:
        raise InputError(f"{path}: is not a rows file ({fault or 'no hash of a base'}); expected a {ROWS_FILE} of a run")
    return SavedRows(tensors.pop("ids"), tokens, dict(sorted(tensors.items())), metadata["base"])


def fault_of_rows(tensors: dict[str, Tensor], tokens: object) -> str:
    """What is wrong with the content of a rows file; "" where nothing is."""
    if "ids" not in tensors or "embedding" not in tensors or not tensors.keys() <= {"ids", *TABLES}:
        return (
            f"its tensors are {shown(', '.join(sorted(tensors)))}, not ids, embedding and perhaps {' or '.join(TABLES[1:])}"
        )
    ids = tensors["ids"]
    if ids.dtype != torch.int64 or ids.dim() != 1 or not len(ids) or ids[0] < 0 or not (ids[1:] > ids[:-1]).all():
        return "its ids are no ascending list of token ids"
    if not isinstance(tokens, list) or len(tokens) != len(ids) or not all(isinstance(token, str) for token in tokens):
        return f"it has {shown(tokens)} for the tokens of {len(ids)} ids"
    for name in tensors.keys() - {"ids"}:
        rows = tensors[name]
        if rows.dim() != 2 or len(rows) != len(ids):
            return f"its {name} has the shape {shown(tuple(rows.shape))}, not one row for each of {len(ids)} ids"
        if rows.dtype not in (torch.float32, torch.float64) or not rows.isfinite().all():
            return f"its {name} holds what is no finite number of 32 or 64 bits"
    return ""


# ---------------------------------------------------------------------------------------------- the frozen numbers


@torch.no_grad()
def base_hash(model: PreTrainedModel, first_row: int) -> str:
    """A hash of a base model: every tensor's name and a sample of its values, the tables only before `first_row`.

    The sample is taken in bfloat16, so a model has one hash whatever dtype it is loaded in. A sharded one is gathered weight
    by weight, so every process must call.
    """
    digest = hashlib.sha256()
    tables = {id(weight) for weight in tables_of(model).values()}
    for name, weight in sorted(parts_of(model.named_parameters())):
        values = whole(weight)
        values = (values[:first_row] if id(weight) in tables else values).flatten()
        places = torch.linspace(0, len(values) - 1, min(HASHED_VALUES, len(values)), dtype=torch.float64).long()
        sample = values[places.to(values.device)].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:24]


@torch.no_grad()
def differing_values(model: PreTrainedModel, other: PreTrainedModel, ids: Tensor | None = None) -> dict[str, int]:
    """How many values of each tensor of `other` differ in the model: {} if none does; two that are no numbers are alike.

    ids: rows of the tables that are left out. Rows that only the model has count as little. Of a model that is sharded each
    process compares its own rows, and all processes get the sums.
    """
    tables = {weight.data_ptr() for weight in tables_of(model).values()} if ids is not None else set()
    values, found, seen = model.state_dict(), {}, set()
    for name, old in other.state_dict().items():
        if old.data_ptr() in seen:  # tied: a second name of the same values
            continue
        seen.add(old.data_ptr())
        old = own_rows(old, values[name])
        new = local(values[name])[: len(old)] if old.dim() else local(values[name])
        old = old.to(new)
        differs = (new != old) & ~(new.isnan() & old.isnan())
        if local(values[name]).data_ptr() in tables:
            differs[ids[ids < len(old)].to(differs.device)] = False
        if count := int(differs.sum()):
            found[name] = count
    return counts_of_all(found, model)
