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
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from sid_sft.files import InputError, follow_umask
from sid_sft.forward.architecture import tables_of

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
        names = [table.name for table in self.tables]
        if saved.tokens != self.tokens or saved.ids.tolist() != self.ids.tolist() or list(saved.rows) != names:
            raise InputError(f"{path}: its SID rows are not those of this run; resume with the index it was made with")
        for name, _, master in self.tables:
            master.copy_(saved.rows[name])
        self.write()

    def save(self, path: Path, base_hash: str) -> None:
        """Writes the rows file: ids, tokens, one (M, D) matrix per table, and the hash of the base they belong to."""
        tensors = {table.name: table.master.detach().cpu().contiguous() for table in self.tables}
        metadata = {"tokens": json.dumps(self.tokens), "base": base_hash}
        save_file({"ids": self.ids.cpu(), **tensors}, path, metadata=metadata)
        follow_umask(path)


class SidRowAdamW(torch.optim.AdamW):
    """AdamW over the masters of SidRows; a step ends with the rows written into the model.

    Its state_dict carries the masters beside the moments, so a resumed run continues from the float32 numbers.
    """

    def __init__(self, rows: SidRows, **settings) -> None:
        self.rows = rows
        fused = rows.ids.device.type in ("cpu", "cuda")
        super().__init__(rows.masters, fused=fused, **settings)

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


def read_rows_file(path: Path) -> SavedRows:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            metadata = file.metadata()
        tokens = json.loads(metadata["tokens"])
        return SavedRows(tensors.pop("ids"), tokens, dict(sorted(tensors.items())), metadata["base"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: is not a rows file ({type(error).__name__}); expected a {ROWS_FILE} of a run") from None
    except Exception as error:  # safetensors raises a bare Exception subclass for a broken file
        if type(error).__name__ != "SafetensorError":
            raise
        raise InputError(f"{path}: is not a rows file ({error}); expected a {ROWS_FILE} of a run") from None


# ---------------------------------------------------------------------------------------------- the frozen numbers


@torch.no_grad()
def base_hash(model: PreTrainedModel, first_row: int) -> str:
    """A hash of a base model: every tensor's name and a sample of its values, the tables only before `first_row`.

    The sample is taken in bfloat16, so a model has one hash whatever dtype it is loaded in.
    """
    digest = hashlib.sha256()
    tables = {id(weight) for weight in tables_of(model).values()}
    for name, weight in sorted(model.named_parameters()):
        values = (weight[:first_row] if id(weight) in tables else weight).flatten()
        places = torch.linspace(0, len(values) - 1, min(HASHED_VALUES, len(values)), dtype=torch.float64).long()
        sample = values[places.to(values.device)].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:24]


@torch.no_grad()
def differing_values(model: PreTrainedModel, other: PreTrainedModel, ids: Tensor | None = None) -> dict[str, int]:
    """How many values of each tensor of `other` differ in the model: {} if none does; two that are no numbers are alike.

    ids: rows of the tables that are left out. Rows that only the model has count as little.
    """
    tables = {weight.data_ptr() for weight in tables_of(model).values()} if ids is not None else set()
    values, found, seen = model.state_dict(), {}, set()
    for name, old in other.state_dict().items():
        if old.data_ptr() in seen:  # tied: a second name of the same values
            continue
        seen.add(old.data_ptr())
        new = values[name][: len(old)] if old.dim() else values[name]
        old = old.to(new)
        differs = (new != old) & ~(new.isnan() & old.isnan())
        if values[name].data_ptr() in tables:
            differs[ids[ids < len(old)].to(differs.device)] = False
        if count := int(differs.sum()):
            found[name] = count
    return found
