"""A frozen base model in 8 or 4 bits: how it is loaded, what it takes, and the proof that none of its bits has moved.

    settings = quantized_settings(4, dtype=torch.bfloat16, device=torch.device("cuda"))      # for from_pretrained
    before = frozen_bits(model, rows.ids)
    ...                                                                                      # rows and adapters train
    changed = differing_bits(before, frozen_bits(model, rows.ids))                           # [] or the names that moved

8 bits are torchao's int8 weights with a scale per row, 4 bits the nf4 of bitsandbytes (https://arxiv.org/abs/2305.14314).
Both quantize weights alone, so what a token becomes does not depend on what stands beside it in a batch. The 8 bits of
bitsandbytes quantize activations, too, and treat some columns by what the batch holds: a prefix that is computed alone
would differ from the same prefix in its sequence.
"""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sid_sft.forward.architecture import parts_of, tables_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("sft.quantizing")

LIBRARIES = {4: "bitsandbytes", 8: "torchao"}


def quantized_settings(bits: int, *, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What from_pretrained must be told. dtype: what the model computes in, and what stays unquantized is held in."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if bits == 4:
        how: Any = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    else:
        from torchao.quantization import Int8WeightOnlyConfig

        how = TorchAoConfig(Int8WeightOnlyConfig())
    return {"quantization_config": how, "dtype": dtype, "device_map": {"": device}}


def tell_quantized(model: PreTrainedModel, bits: int, dtype: torch.dtype) -> None:
    """Logs what a quantized model takes, beside what all of it would take in the dtype that it computes in."""
    now, before = stored_bytes(model), model.num_parameters() * dtype.itemsize
    unquantized = f"{before / 1e6:,.1f} MB in {str(dtype).removeprefix('torch.')}"
    logger.info(
        f"Base model in {bits} bits ({LIBRARIES[bits]}): {now / 1e6:,.1f} MB, in place of {unquantized}; training goes "
        "against the quantized numbers, and final_checkpoint/ will hold the base's own, unquantized"
    )


def make_trainable(model: PreTrainedModel) -> None:
    """Sets what lets SID rows train through a quantized model."""
    # The Trainer refuses a quantized model without peft's adapters, as it would train its bits. Here none of them trains.
    model.is_quantized = False  # type: ignore[assignment]
    # On CPUs with bfloat16 instructions bitsandbytes repacks a weight the first time it is used without gradients, and lets
    # no gradient through it from then on.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def stored_bytes(model: PreTrainedModel) -> int:
    """How many bytes a model's tensors take, each counted once."""
    sizes = {value.data_ptr(): value.numel() * value.element_size() for _, value in parts_of(model.state_dict().items())}
    return sum(sizes.values())


def frozen_bits(model: PreTrainedModel, ids: Tensor) -> dict[str, str]:
    """The SHA-256 of every tensor of a model, of its tables without the SID rows; ids (M,): these rows."""
    tables = {weight.data_ptr() for weight in tables_of(model).values()}
    values = model.state_dict()
    found, seen = {}, set()
    for name, value in parts_of(values.items()):
        if value.data_ptr() in seen:  # tied: a second name of the same values
            continue
        seen.add(value.data_ptr())
        value = value.index_fill(0, ids, 0) if value.data_ptr() in tables else value
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        found[name] = hashlib.sha256(content.data).hexdigest()
    return found


def differing_bits(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """The names of the tensors that are not what they were: [] where every bit is."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
