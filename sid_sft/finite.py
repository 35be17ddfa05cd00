"""Whether a model's values are numbers: one NaN in one row of one table can make every loss and every score NaN."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sid_sft.files import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_finite(model: PreTrainedModel, name: str) -> None:
    """InputError that names the first weight with values that are NaN or infinite. Every value is read once."""
    if broken := broken_weights(model):
        raise InputError(
            f"{name}: {in_words(broken)}, so no loss or score is sure to be a number; take an earlier checkpoint or "
            "another model"
        )


def broken_weights(model: PreTrainedModel) -> dict[str, int]:
    """Weight -> how many of its values are NaN or infinite; {} where all are finite.

    Of a model that is sharded each process looks at its own rows, and all processes get the sums.
    """
    from sid_sft.forward.architecture import parts_of
    from sid_sft.sharding import counts_of_all, local

    weights = {name: local(weight.detach()) for name, weight in parts_of(model.named_parameters())}
    # A sum is not finite if a term is not: a pass without a copy. Finite terms may overflow; then they are counted.
    suspects = {name: weight for name, weight in weights.items() if not weight.sum().isfinite()}
    found = {name: int((~weight.isfinite()).sum()) for name, weight in suspects.items()}
    return counts_of_all({name: count for name, count in found.items() if count}, model)


def in_words(broken: dict[str, int]) -> str:
    """{"norm.weight": 3} -> "norm.weight holds 3 values that are NaN or infinite"."""
    first, *others = broken
    more = f" (as do {len(others)} more weights)" if others else ""
    return f"{first} holds {broken[first]:,} values that are NaN or infinite{more}"
