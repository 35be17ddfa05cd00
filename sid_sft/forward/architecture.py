"""All that is assumed about other people's models: where their tables, heads and attention windows are, and what a cache is.

Nothing here is believed without proof: before anything trains, the losses that follow from it are compared with the
model's own forward on a trial batch (see choose_forward).

Shapes: B sequences, S tokens, P cached tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sid_sft.private_doors import is_recurrent

# ---------------------------------------------------------------------------------------------- a model's own numbers


def own_logits(model: PreTrainedModel, inputs: Tensor, *, last: int = 0) -> Tensor:
    """The logits (B, S, V) of the model's own forward of token ids (B, S), none of them padding: the truth.

    last: of the last tokens only, (B, last, V); 0 for all.
    """
    accepted = inspect.signature(model.forward).parameters
    wanted = {"use_cache": False, "logits_to_keep": last}
    logits = model(input_ids=inputs, **{name: value for name, value in wanted.items() if name in accepted}).logits
    return logits[:, -last:]


def parts_of(values: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Named tensors with one that is made of others, as torchao's quantized weights are, taken apart: "q_proj.weight" ->
    "q_proj.weight.qdata" and "q_proj.weight.scale"."""
    for name, value in values:
        if hasattr(value, "__tensor_flatten__") and not isinstance(value, DTensor):
            yield from ((f"{name}.{part}", getattr(value, part)) for part in value.__tensor_flatten__()[0])
        else:
            yield name, value


TABLES = ("embedding", "layer_inputs", "head")  # what `tables_of` may find


def tables_of(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The matrices with a row per token: the input embedding; the output head where it has a matrix of its own; and the
    embedding of all layers' further inputs, in the families that have one (Gemma 4)."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tables = {"embedding": embedding}
    if has_layer_inputs(model):
        tables["layer_inputs"] = model.get_per_layer_input_embeddings().weight
    if head is not None and head.weight is not embedding:
        tables["head"] = head.weight
    return tables


def has_layer_inputs(model: PreTrainedModel) -> bool:
    """Whether a token has, beside its embedding, a row that every layer reads anew, and that grows with the vocabulary."""
    wanted = getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0)
    return bool(wanted) and hasattr(model, "get_per_layer_input_embeddings")


def embedding_scale(model: PreTrainedModel) -> Tensor | None:
    """The factor that some embedding modules apply to their rows, or None."""
    scale = getattr(model.get_input_embeddings(), "embed_scale", None)
    if scale is None:
        return None
    weight = model.get_input_embeddings().weight
    return torch.as_tensor(scale).to(weight)


def finish_logits(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """What some architectures do to the head's output: a scale, then a soft-cap. In float32, as the loss wants them."""
    config = model.config.get_text_config()
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (scale := getattr(config, "logits_scaling", None)) is not None:
        # Granite divides by a setting of this name, HyperCLOVA X multiplies.
        logits = logits * scale if config.model_type == "hyperclovax" else logits / scale
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The layers, from the first to the last: the members of the outermost lists of modules."""
    found: dict[nn.Module, None] = {}  # each once, in order
    waiting = list(model.children())
    while waiting:
        module = waiting.pop(0)
        if isinstance(module, nn.ModuleList):
            found |= dict.fromkeys(module)
        else:
            waiting = [*module.children(), *waiting]
    return list(found)


# ---------------------------------------------------------------------------------------------- attention windows


class Window(NamedTuple):
    """The kinds of attention layers of a model, and the size in tokens of its sliding window."""

    kinds: list[str]
    size: int


def sliding_window(model: PreTrainedModel) -> Window:
    config = model.config.get_text_config()
    size = getattr(config, "sliding_window", None)
    kinds = sorted(set(getattr(config, "layer_types", None) or ["sliding_attention" if size else "full_attention"]))
    return Window(kinds, size or 0)


def why_not_exact(model: PreTrainedModel) -> str:
    """Why the frozen prefix cannot be exact for an architecture, in words; "" where nothing speaks against it.

    For what a trial on a few short examples might not show, or only with a traceback.
    """
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if is_recurrent(model):
        return "it has recurrent layers"
    if has_layer_inputs(model):
        return "its layers read rows of their own for each token"
    if unknown := set(sliding_window(model).kinds) - {"full_attention", "sliding_attention"}:
        return f"it has layers of {min(unknown)}"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", None):
        return "its attention is bidirectional"
    if getattr(config, "output_router_logits", False):
        return "it adds a router loss"
    for rope in rope_types(getattr(config, "rope_parameters", None)):
        if rope in ("dynamic", "longrope"):
            return f"its {rope} positions depend on the longest one"
    accepted = inspect.signature(model.base_model.forward).parameters
    if model.base_model is model or not {"inputs_embeds", "position_ids"} <= accepted.keys() or not cache_argument(model):
        return "its forward takes no embeddings, positions or cached keys"
    return ""


def cache_argument(model: PreTrainedModel) -> str:
    """The name under which the backbone's forward takes cached keys, which transformers 5.24 has changed; "" for none."""
    accepted = inspect.signature(model.base_model.forward).parameters
    return next((name for name in ("past_key_values", "cache") if name in accepted), "")


def rope_types(parameters: dict | None) -> list[str]:
    """The rope types in a config's rope_parameters, which may be given per kind of layer."""
    if not parameters:
        return []
    if "rope_type" in parameters:
        return [parameters["rope_type"]]
    return [rope for value in parameters.values() if isinstance(value, dict) for rope in rope_types(value)]


# ---------------------------------------------------------------------------------------------- keys and values

Pair = tuple[Tensor, Tensor]  # keys and values of one layer, each (B, heads, P, head size); the two may differ in size
Past = dict[int, list[Pair]]  # layer -> pieces, one behind the other; a piece may be (1, ...), the same for all sequences


class PieceCache(Cache):
    """A cache whose past is given as pieces per layer; keeps the keys and values of the new tokens if asked."""

    def __init__(self, past: Past, *, keep: bool) -> None:
        super().__init__(layers=[])
        self.past, self.keep = past, keep
        self.new: dict[int, Pair] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs) -> Pair:
        if self.keep:
            self.new[layer_idx] = (key_states, value_states)
        batch = key_states.shape[0]
        past = [(k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)) for k, v in self.past.get(layer_idx, [])]
        keys, values = zip(*past, (key_states, value_states), strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return past_length(self.past)


def past_length(past: Past) -> int:
    """How many tokens the pieces of a past hold together."""
    return sum(keys.shape[2] for keys, _ in next(iter(past.values()))) if past else 0


def appended(past: Past, piece: dict[int, Pair]) -> Past:
    """A past with one more piece behind it."""
    return {layer: [*past.get(layer, []), pair] for layer, pair in piece.items()}


class KeyLayout(NamedTuple):
    """How the keys and values of a token lie in one row: layer after layer, keys then values, head after head.

    layers: for each layer, in order, its number and the (heads, head size) of its keys and of its values, which differ
    between layers in some families (Gemma 4) and between keys and values in others (multi-head latent attention).
    """

    layers: list[tuple[int, tuple[int, int], tuple[int, int]]]

    @classmethod
    def of(cls, new: dict[int, Pair]) -> KeyLayout:
        def shape(states: Tensor) -> tuple[int, int]:
            return states.shape[1], states.shape[3]

        return cls([(layer, shape(keys), shape(values)) for layer, (keys, values) in sorted(new.items())])

    @property
    def width(self) -> int:
        """Numbers per token."""
        return sum(heads * size for _, *pair in self.layers for heads, size in pair)

    def pack(self, new: dict[int, Pair]) -> Tensor:
        """Keys and values of B x S tokens as rows (B, S, width)."""
        return torch.cat([states.transpose(1, 2).flatten(2) for layer, *_ in self.layers for states in new[layer]], dim=2)

    def unpack(self, rows: Tensor) -> dict[int, Pair]:
        """Rows (B, P, width) as keys and values per layer, views of the rows."""
        shapes = [shape for _, *pair in self.layers for shape in pair]
        parts = rows.split([heads * size for heads, size in shapes], dim=2)
        states = [part.unflatten(2, shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True)]
        return {layer: (states[2 * i], states[2 * i + 1]) for i, (layer, *_) in enumerate(self.layers)}
