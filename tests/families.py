"""A small model of every causal family of the installed transformers, randomly initialised, to check forwards against.

`families()` names the families that can be built and that answer token ids alone with logits; REASONS says why the others
are left out. Run as a script, the module prints a line of facts about each family.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
import time

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

BIDIRECTIONAL = "bert-bidirectional"  # the negative case: a bert whose earlier tokens see the later ones

REASONS: dict[str, str] = {}

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, POSITIONS, WINDOW = 48, 64, 4, 2, 12, 4, 512, 9

SMALL = {
    # sizes
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim"], HIDDEN),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner"], FFN),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers"], LAYERS),
    **dict.fromkeys(["decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], HEADS),
    **dict.fromkeys(["decoder_attention_heads", "encoder_attention_heads"], HEADS),
    **dict.fromkeys(["num_decoder_attention_heads", "num_encoder_attention_heads"], HEADS),
    **dict.fromkeys(["num_key_value_heads"], KV_HEADS),
    **dict.fromkeys(["head_dim", "attention_head_dim", "kv_channels"], HEAD_DIM),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"], POSITIONS),
    **dict.fromkeys(["max_target_positions", "max_source_positions", "context_length"], POSITIONS),
    **dict.fromkeys(["sliding_window", "window_size", "local_attention", "attention_window_size"], WINDOW),
    "use_sliding_window": True,
    # experts
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"], 2),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers", "n_shared_experts", "num_shared_experts"], 1),
    **dict.fromkeys(["n_group", "topk_group"], 1),
    "routed_scaling_factor": 2.5,
    # latent attention: three head widths that differ
    **{"q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16},
    **{"index_head_dim": 16, "index_n_heads": 4, "index_topk": 12},
    # state spaces, linear attention and convolutions
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12},
    **{"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_d_conv": 4, "mamba_expand": 2},
    **{"mamba_chunk_size": 16, "chunk_size": 16, "state_size": 8, "time_step_rank": 6, "conv_kernel": 4},
    # settings whose usual value hides a forward that forgets them
    **{"embedding_multiplier": 5.0, "residual_multiplier": 0.6, "attention_multiplier": 0.4, "logits_scaling": 3.0},
    **{"logit_scale": 0.4, "lm_head_multiplier": 0.4, "key_multiplier": 0.7, "ssm_in_multiplier": 0.8},
    **{"attention_in_multiplier": 0.8, "attention_out_multiplier": 1.3, "ssm_out_multiplier": 1.2},
    **{"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "logits_soft_cap": 3.0, "output_logit_soft_cap": 3.0},
    **{"query_pre_attn_scalar": 20, "logits_mup_width_multiplier": 3.0, "dim_model_base": 16, "scale_embedding": True},
    # the plain token is also the end and the padding
    **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "decoder_start_token_id": 0},
    # decoders
    **{"is_decoder": True, "is_encoder_decoder": False},
}
NO_DROPOUT: dict = {}

OVERRIDES: dict[str, dict] = {}


def small_config(config_class: type, vocabulary: int, overrides: dict) -> PreTrainedConfig:
    """The family's configuration with every size cut down. `overrides` wins; a dict in it is a sub-configuration's."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    arguments = {name: value for name, value in SMALL.items() if name in fields}
    if "vocab_size" in fields:
        arguments["vocab_size"] = vocabulary
    for name, subclass in (config_class.sub_configs or {}).items():
        if name in overrides and not isinstance(overrides[name], dict):
            continue
        if subclass is AutoConfig:
            default = getattr(config_class(), name, None)
            if default is None:
                continue
            subclass = type(default)
        arguments[name] = small_config(subclass, vocabulary, overrides.get(name, {}))
    arguments.update({name: value for name, value in overrides.items() if not isinstance(arguments.get(name), PreTrainedConfig)})
    return config_class(**arguments)


def families() -> list[str]:
    """The kinds that `small_family` builds, sorted."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, BIDIRECTIONAL} - REASONS.keys())


def small_family(kind: str, vocabulary: int, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A small model of the family with random weights, all of them large enough to matter, in eval mode."""
    overrides = OVERRIDES.get(kind, {})
    overrides = overrides(vocabulary) if callable(overrides) else overrides
    config_class = CONFIG_MAPPING["bert" if kind == BIDIRECTIONAL else kind]
    config = small_config(config_class, vocabulary, overrides)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    randomise(model)
    return model.eval()


@torch.no_grad()
def randomise(model: PreTrainedModel) -> None:
    """Matrices normal with a gain of 1.2 for each input; vectors (norms, biases, decays) their initial value and noise."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and not name.endswith("A_log"):
            inputs = parameter[0].numel() if "conv" in name else parameter.shape[-1]
            parameter.normal_(0.0, 1.2 / inputs**0.5)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for name, buffer in model.named_buffers():
        if name.endswith(("correction_bias", "expert_bias", "layer_scalar")):
            buffer.add_(torch.randn_like(buffer), alpha=0.1)
