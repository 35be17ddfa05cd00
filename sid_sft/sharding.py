"""A model that is shared out: each process holds a slice of every block (--fsdp True, torch's fully_shard).

    shard(model, args.device, torch.float32, keep_tables=False)
    model.model.layers[0].mlp.up_proj.weight       # DTensor of 1536 rows, of which this process holds 768
    local(weight), whole(weight)                   # its own rows; all rows, gathered from all processes

A block is gathered when it is called and let go of behind it, in the forward and in the backward. The gather and the sum of
gradients are talks between all processes, so every process must call the model equally often: see `even`. The outermost
unit, which holds what belongs to no block (tables, last norm), is gathered by `gathered` functions.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from sid_sft.command_line import rank
from sid_sft.files import InputError, error_text, follow_umask, whole_folder
from sid_sft.forward.architecture import blocks_of, tables_of

Result = TypeVar("Result")

FILE_SIZE = "1GB"  # of a final model's files: what rank 0 holds of it at a time
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of AdamW, for each weight


class Outermost(nn.Module):
    """What gathers the weights that belong to no block, for as long as a computation runs."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.running = False

    def forward(self, compute: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
        """(what `compute` gives, None), or (None, what it raised): handed out, so that the weights are let go of first."""
        self.running = True
        try:
            return compute(), None
        except Exception as error:
            return None, error
        finally:
            self.running = False


def shard(model: PreTrainedModel, device: torch.device, dtype: torch.dtype, *, keep_tables: bool) -> None:
    """Leaves each process a slice of every block and, unless `keep_tables`, of the tables; on a device, in a dtype.

    The model has the same values on all processes before. It is sliced block by block in the dtype in which it was loaded,
    and what transformers loads is mapped from its files: only the process's own rows are ever read into memory.
    """
    blocks = blocks_of(model)
    check_apart(model, blocks)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
        block.to(dtype)
    outermost = Outermost(model)
    kept = None
    if keep_tables:
        head = model.get_output_embeddings()
        kept = {*tables_of(model).values(), *(head.parameters() if head is not None else ())}  # with its bias
    fully_shard(outermost, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    outermost.to(device, dtype)
    for module in outermost.modules():
        if isinstance(module, FSDPModule):  # the loss is divided by all labels of a step already: gradients are summed
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_reduce_scatter_unused_params(True)
    object.__setattr__(model, "outermost", outermost)  # not as a submodule: it holds the model


def shard_like(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Shards a frozen model's `other`, in its own dtype, where the model is sharded."""
    if is_sharded(model):
        shard(other, model.device, other.dtype, keep_tables=True)


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model itself in another dtype."""
    (model.outermost if is_sharded(model) else model).to(dtype)
    return model


def check_apart(model: PreTrainedModel, blocks: list[nn.Module]) -> None:
    """InputError where the model has no blocks, or where two of them have a weight in common."""
    kind = type(model).__name__
    if not blocks:
        raise InputError(f"--fsdp True: {kind} has no list of layers to shard; start without --fsdp")
    inside = [id(weight) for block in blocks for weight in block.parameters()]
    around = {id(weight) for weight in model.parameters()} - set(inside)
    if len(set(inside)) < len(inside) or around & set(inside):
        raise InputError(f"--fsdp True: layers of {kind} have weights in common; start without --fsdp")


def is_sharded(model: PreTrainedModel) -> bool:
    return hasattr(model, "outermost")


def gathered(function: Callable[..., Result]) -> Callable[..., Result]:
    """Makes a function of a model, or a method of an object with a `model`, run with the weights that are in no block."""

    @functools.wraps(function)
    def call(first: Any, *args: Any, **settings: Any) -> Result:
        outermost = getattr(first if isinstance(first, nn.Module) else first.model, "outermost", None)
        if outermost is None or outermost.running:
            return function(first, *args, **settings)
        result, error = outermost(functools.partial(function, first, *args, **settings))
        if error is not None:
            raise error
        return result

    return call


def even(shares: list[list[np.ndarray]], process: int) -> list[tuple[np.ndarray, bool]]:
    """A process's micro-batches with True, and so many further ones with False that all processes have equally many.

    [[[7, 3], [5]], [[4]]] for process 1 -> [([4], True), ([4], False)]. One that has none takes another's.
    """
    own = shares[process]
    spare = next((hand[-1] for hand in (own, *shares) if hand), None)
    missing = max(map(len, shares)) - len(own)
    return [(part, True) for part in own] + [(part, False) for part in [spare] * missing if part is not None]


# ---------------------------------------------------------------------------------------------- tensors


def local(weight: Tensor) -> Tensor:
    """The rows of a weight that this process holds; all where it is not sharded."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def whole(weight: Tensor) -> Tensor:
    """All rows of a weight, gathered from all processes, each of which must call."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def own_rows(values: Tensor, weight: Tensor) -> Tensor:
    """Of `values`, which every process has whole, the rows that this process holds of a weight of that shape."""
    if not isinstance(weight, DTensor):
        return values
    return distribute_tensor(values, weight.device_mesh, weight.placements, src_data_rank=None).to_local()


def counts_of_all(found: dict[str, int], model: PreTrainedModel) -> dict[str, int]:
    """Weight -> a count that each process made of its own rows, as the sum over all; those of whole weights stay."""
    if not is_sharded(model):
        return found
    by_process: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(by_process, found)
    values = model.state_dict()
    names = [name for name in values if any(name in counts for counts in by_process)]
    return {
        name: sum(counts.get(name, 0) for counts in by_process) if isinstance(values[name], DTensor) else found[name]
        for name in names
    }


# ---------------------------------------------------------------------------------------------- checkpoints


def shard_file(folder: Path, process: int, processes: int) -> Path:
    """checkpoint-150/shard-00001-of-00004.safetensors"""
    return folder / f"shard-{process:05d}-of-{processes:05d}.safetensors"


def save_shard(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Writes this process's rows of each weight and of its two moments."""
    tensors = {}
    for name, weight in model.named_parameters():
        tensors[f"weight/{name}"] = local(weight.detach())
        state = optimizer.state.get(weight, {})
        tensors |= {f"{moment}/{name}": local(state[moment]) for moment in MOMENTS if moment in state}
    folder.mkdir(parents=True, exist_ok=True)
    file = shard_file(folder, *place())
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, file)
    follow_umask(file)


class Shards:
    """The shards of a checkpoint, written by any number of processes: rows of the same names, one file behind the other."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("shard-*-of-*.safetensors"))
        if not files or files != [shard_file(folder, number, len(files)) for number in range(len(files))]:
            raise InputError(f"{folder}: has no shards of a run with --fsdp True; go on without --fsdp, or start afresh")
        self.folder = folder
        try:
            self.files = [safe_open(file, framework="pt") for file in files]
        except (OSError, SafetensorError) as error:
            raise InputError(f"{folder}: a shard cannot be read ({error_text(error)})") from None
        self.names = set(self.files[0].keys())

    def fill(self, name: str, target: Tensor) -> None:
        """Copies the rows that this process holds of a tensor from the files that have them."""
        if name not in self.names:
            raise InputError(f"{self.folder}: its shards lack {name}; they are of another model")
        if isinstance(target, DTensor):
            first, end = own_places(len(target), *place())
            local(target).copy_(self.rows(name, first, end))
        else:
            target.copy_(self.files[0].get_tensor(name))

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """The rows `first` to `end` - 1 of a tensor; those of a shard follow on those of the shard before."""
        parts, start = [], 0
        for file in self.files:
            held = file.get_slice(name)
            size = held.get_shape()[0]
            parts.append(held[min(max(first - start, 0), size) : min(max(end - start, 0), size)])
            start += size
        return torch.cat(parts)


def own_places(count: int, process: int, processes: int) -> tuple[int, int]:
    """The first of `count` rows that a process holds, and the end of its rows: of 5 rows three processes hold 2, 2 and 1."""
    most = -(-count // processes)  # as torch.chunk has it
    return min(process * most, count), min((process + 1) * most, count)


@torch.no_grad()
def load_weights(folder: Path, model: PreTrainedModel) -> None:
    """Takes the weights of a checkpoint."""
    shards = Shards(folder)
    for name, weight in model.named_parameters():
        shards.fill(f"weight/{name}", weight)


def keep_moments_apart(optimizer: torch.optim.Optimizer, model: PreTrainedModel, folder: Path | None) -> None:
    """Lets an optimizer's state_dict be without moments, which `save_shard` writes; when one is loaded, they come from the
    shards in `folder`."""

    @torch.no_grad()
    def take_moments(optimizer: torch.optim.Optimizer) -> None:
        shards = Shards(folder)  # type: ignore[arg-type]
        for name, weight in model.named_parameters():
            if not weight.requires_grad or f"step/{name}" not in shards.names:
                continue
            state = {moment: torch.zeros_like(weight) for moment in ("exp_avg", "exp_avg_sq")}
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            for moment in MOMENTS:
                shards.fill(f"{moment}/{name}", state[moment])
            optimizer.state[weight] = state

    optimizer.register_state_dict_post_hook(lambda _, content: {**content, "state": {}})
    if folder is not None:
        optimizer.register_load_state_dict_post_hook(take_moments)


# ---------------------------------------------------------------------------------------------- the final model


@contextlib.contextmanager
def folder_of_all(folder: Path, model: PreTrainedModel) -> Iterator[Path]:
    """whole_folder(folder), as rank 0 makes it and all processes of a sharded model see it."""
    if not is_sharded(model):
        with whole_folder(folder) as scratch:
            yield scratch
        return
    with contextlib.ExitStack() as stack:
        shown = [str(stack.enter_context(whole_folder(folder))) if rank() == 0 else ""]
        dist.broadcast_object_list(shown)
        yield Path(shown[0])


def save_whole(model: PreTrainedModel, folder: Path) -> None:
    """model.save_pretrained(folder); all processes call where it is sharded, and rank 0 writes file by file."""
    if not is_sharded(model):
        model.save_pretrained(folder)
        return
    entries: dict[str, Tensor] = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        if all(weight is not other for other in entries.values()):  # tied: a second name of the same values
            entries[name] = weight
    sizes = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in entries.items()}
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=FILE_SIZE)
    if rank() == 0:
        model.save_pretrained(folder, state_dict={})  # all but the weights
        for empty in folder.glob("model*.safetensors*"):
            empty.unlink()
    for file, names in plan.filename_to_tensors.items():
        content = {}
        for name in names:
            values = whole(entries[name].detach())
            if rank() == 0:
                content[name] = values.cpu().contiguous()
        if rank() == 0:
            save_file(content, folder / file, metadata={"format": "pt"})
    if rank() == 0 and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    dist.barrier()


def place() -> tuple[int, int]:
    """Which process this is, and how many there are."""
    return dist.get_rank(), dist.get_world_size()
