"""A small model of every causal family of the installed transformers, randomly initialised, to check forwards against.

`families()` names the families that can be built and that answer token ids alone with logits; REASONS says why the others
are left out. Run as a script, the module prints a line of facts about each family.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import time

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Kinds beyond the families' own names: the family, and settings to change
VARIANTS = {
    "bert-bidirectional": ("bert", {"is_decoder": False}),  # a negative case: earlier tokens see the later ones
    "doge-experts": ("doge", {"is_moe": True}),  # a negative case: its experts' router mixes tokens and rows
    "falcon-alibi": ("falcon", {"alibi": True}),
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "opt-projected": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 48}),
    "reformer-local": ("reformer", {"attn_layers": ["local"] * 4}),
}

REASONS: dict[str, str] = {
    "gemma3n": "its vision tower needs the package timm",
    "gemma4_assistant": "every layer reads keys of another model, which it needs beside embeddings",
    "gemma4_unified_assistant": "every layer reads keys of another model, which it needs beside embeddings",
    "musicgen": "its class reads the decoder's settings from the configuration, which is the encoder-decoder's",
    "musicgen_melody": "its class reads the decoder's settings from the configuration, which is the encoder-decoder's",
}

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, POSITIONS, WINDOW = 64, 96, 4, 2, 8, 4, 512, 9

SMALL = {
    # sizes
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "emb_dim"], HIDDEN),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "dff"], FFN),
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
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "max_window_layers": 2,
    "index_head_dim": 16,
    "index_n_heads": 16,  # few heads leave many keys with a score of exactly zero, and ties
    "index_topk": 12,
    # state spaces, linear attention and convolutions
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "mamba_n_heads": 8,
    "mamba_d_head": 12,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "state_size": 8,
    "time_step_rank": 6,
    "conv_kernel": 4,
    # settings whose usual value hides a forward that forgets them
    "embedding_multiplier": 5.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.4,
    "logits_scaling": 3.0,
    "logit_scale": 0.4,
    "lm_head_multiplier": 0.4,
    "key_multiplier": 0.7,
    "ssm_in_multiplier": 0.8,
    "attention_in_multiplier": 0.8,
    "attention_out_multiplier": 1.3,
    "ssm_out_multiplier": 1.2,
    "final_logit_softcapping": 3.0,
    "attn_logit_softcapping": 2.0,
    "logits_soft_cap": 3.0,
    "output_logit_soft_cap": 3.0,
    "query_pre_attn_scalar": 20,
    "logits_mup_width_multiplier": 3.0,
    "dim_model_base": 16,
    "scale_embedding": True,
    # the plain token is also the end and the padding
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    # decoders
    "is_decoder": True,
    "is_encoder_decoder": False,
}
VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size")

SLIDING_FULL = ["sliding_attention", "full_attention"] * 2
DENSE_SPARSE = ["dense", "sparse", "sparse", "sparse"]
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
GEMMA3N = {
    "layer_types": SLIDING_FULL,
    "num_kv_shared_layers": 2,
    "intermediate_size": [FFN] * 4,
    "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0],
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
}
GEMMA4_UNIFIED = {"layer_types": SLIDING_FULL, "num_kv_shared_layers": 2, "global_head_dim": 16}
GEMMA4 = GEMMA4_UNIFIED | {"hidden_size_per_layer_input": 8}
GEMMA4_EXPERTS = {
    "layer_types": SLIDING_FULL,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
}
LLAMA4 = {
    "attention_chunk_size": 16,
    "interleave_moe_layer_step": 2,
    "no_rope_layer_interval": 2,
    "intermediate_size_mlp": 80,
    "floor_scale": 16,
}
QWEN4 = {
    "hc_lowrank": 8,
    "ple_layer_ids": [1, 3],
    "ple_embed_dim": HIDDEN,
    "ngram_vocab_size_base": 500,
    "heads_per_ngram": 2,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 1,
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 12,
    "indexer_compress_ratio": 4,
}
DOTS3 = {
    "num_key_value_heads": HEADS,
    "shared_experts_intermediate_size": 32,
    "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention", "sliding_attention"],
    "rope_parameters": {kind: ROPE | {"partial_rotary_factor": 0.5} for kind in ("sliding_attention", "indexed_attention")},
    "head_dim": 16,
    "per_layer_config": {
        layer: {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 12, "qk_nope_head_dim": 8}
        for layer in (1, 3)
    },
}
INKLING = {
    "layer_types": ["hybrid_sliding", "hybrid"] * 2,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 1,
    "swa_head_dim": 12,
    "sliding_window_size": WINDOW,
    "d_rel": 4,
    "rel_extent": 16,
    "log_scaling_n_floor": 16,
}
KDA = {"linear_head_dim": 8, "linear_num_heads": 4, "num_expert_group": 1}
OVERRIDES: dict[str, dict] = {
    "afmoe": {"mup_enabled": True, "global_attn_every_n_layers": 2},
    "bailing_hybrid": KDA | {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_d_head": 16},
    "blt": {
        "use_cache": False,
        "local_attention_window_len": WINDOW,
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": HIDDEN, "intermediate_size": FFN},
        "decoder_config": {"hidden_size_global": HIDDEN},
    },
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "layer_types": SLIDING_FULL,
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": None},
    },
    "cpmant": {"dim_head": 16, "dim_ff": FFN},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 32, "hidden_size": HIDDEN},
    },
    "deepseek_v4": {
        "layer_types": [
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "sliding_attention",
            "compressed_sparse_attention",
        ],
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "num_key_value_heads": 1,
        "o_groups": 2,
        "o_lora_rank": 16,
        "hc_mult": 2,
        "index_topk": 4,
    },
    "doge": {"keep_window_size": WINDOW},
    "dots1": {"layer_types": SLIDING_FULL},
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {"mlp_layer_types": ["dense"] * LAYERS, "adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
        "audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN, "downsample_hidden_size": 16},
    },
    "dots3_note_text": DOTS3,
    "falcon_h1": {
        "mamba_d_ssm": 96,
        "mamba_d_head": 12,
        "mlp_multipliers": [0.7, 1.4],
        "ssm_multipliers": [0.7, 1.2, 0.8, 1.3, 0.9],
        "mamba_rms_norm": True,
    },
    "gemma3": {"text_config": {"layer_types": SLIDING_FULL}},
    "gemma3_text": {"layer_types": SLIDING_FULL},
    "gemma3n": {"text_config": GEMMA3N},
    "gemma3n_text": GEMMA3N,
    "gemma4": {"text_config": GEMMA4_EXPERTS},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gemma4_text": GEMMA4,
    "gemma4_unified": {"text_config": GEMMA4_UNIFIED, "vision_config": {"mm_embed_dim": 64, "patch_size": 4}},
    "gemma4_unified_text": GEMMA4_UNIFIED,
    "got_ocr2": {"text_config": {"layer_types": SLIDING_FULL}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "mamba_d_head": 16,
        "position_embedding_type": "rope",
    },
    "helium": {"head_dim": 16},
    "hrm_text": {"num_hidden_layers": 1},
    "hyperclovax": {"logits_scaling": 0.4},
    "inkling2_text": INKLING | {"n_layers_per_attn_res_block": 2},
    "inkling_text": INKLING | {"mlp_layer_types": DENSE_SPARSE},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4},
    "kimi_linear": KDA | {"layer_types": ["linear_attention", "full_attention"] * 2},
    "kolibri1": {"layer_types": SLIDING_FULL},
    "laguna": {"layer_types": SLIDING_FULL, "num_attention_heads_per_layer": [4, 2, 4, 2]},
    "lfm2": {"full_attn_idxs": [1, 3]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm3": {"layer_types": ["conv", "sliding_attention", "full_attention", "conv"]},
    "llama4": {"text_config": LLAMA4},
    "llama4_text": LLAMA4,
    "longcat_flash": {
        "num_layers": 2,
        "ffn_hidden_size": FFN,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "mellum": {"layer_types": SLIDING_FULL},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "mlp_layer_types": DENSE_SPARSE,
        "dense_intermediate_size": FFN,
        "rotary_dim": 4,
        "index_head_dim": 8,
        "index_n_heads": 4,
        "index_block_size": 4,
        "index_topk_blocks": 3,
    },
    "ministral": {"layer_types": SLIDING_FULL},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "mimo_v2_flash": {"v_head_dim": 12},
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "moe_shared_expert_intermediate_size": 32,
        "moe_latent_size": 24,
    },
    "phi4_multimodal": {
        "audio_config": {
            "ext_pw_out_channel": HIDDEN,
            "depthwise_separable_out_channel": HIDDEN,
            "nemo_conv_channels": HIDDEN,
            "num_blocks": 2,
            "sliding_window": WINDOW,
        },
    },
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "axial_pos_shape": [8, 64],
        "axial_pos_embds_dim": [16, 48],
        "attention_head_size": 16,
        "feed_forward_size": FFN,
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "hash_seed": 0,
        "num_buckets": 8,
    },
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 48},
    "roc_bert": {
        "pronunciation_embed_dim": 32,
        "pronunciation_vocab_size": 128,
        "shape_embed_dim": 24,
        "shape_vocab_size": 128,
    },
    "smollm3": {"no_rope_layer_interval": 2},
    "xlm": {"causal": True},
    "xlnet": {"d_head": 16, "d_inner": FFN},
    "xlstm": {"hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "n_mamba_heads": 2,
        "num_key_value_heads": HEADS,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_key_value_heads": HEADS,
        "adapter_rank": 8,
        "mamba_ngroups": 2,
        "num_mem_blocks": 2,
        "use_mem_rope": True,
        "use_shared_attention_adapter": True,
    },
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"] * 2, "router_hidden_size": 24},
}


def small_config(config_class: type, vocabulary: int, overrides: dict) -> PreTrainedConfig:
    """The family's configuration with every size cut down. `overrides` wins; a dict in it is a sub-configuration's."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    arguments = {name: value for name, value in SMALL.items() if name in fields}
    arguments.update({name: vocabulary for name in VOCABULARIES if name in fields})
    if "unpadded_vocab_size" in fields:
        arguments["unpadded_vocab_size"] = vocabulary - 7
    if "kv_lora_rank" in fields:  # latent attention has as many key heads as queries, and turns qk_rope_head_dim of each
        arguments |= {"num_key_value_heads": HEADS, "head_dim": arguments["qk_rope_head_dim"]}
    for name, subclass in (config_class.sub_configs or {}).items():
        if name in overrides and not isinstance(overrides[name], dict):
            continue
        if subclass is AutoConfig:  # a default says which family's
            model_type = getattr(getattr(config_class, "sub_configs_defaults", {}).get(name), "model_type", None)
            default = None if model_type else getattr(config_class(), name, None)
            if model_type is None and default is None:
                continue
            subclass = CONFIG_MAPPING[model_type] if model_type else type(default)
        arguments[name] = small_config(subclass, vocabulary, overrides.get(name, {}))
    arguments.update(
        {name: value for name, value in overrides.items() if not isinstance(arguments.get(name), PreTrainedConfig)}
    )
    return config_class(**arguments)


def families() -> list[str]:
    """The kinds that `small_family` builds, sorted."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS} - REASONS.keys())


def small_family(kind: str, vocabulary: int, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A small model of the family with random weights, all of them large enough to matter, in eval mode."""
    family, changes = VARIANTS.get(kind, (kind, {}))
    config = small_config(CONFIG_MAPPING[family], vocabulary, OVERRIDES.get(family, {}) | changes)
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


def accepts(forward, name: str) -> bool:
    """Whether a forward takes the argument by name, as opposed to swallowing it among others."""
    return name in inspect.signature(forward).parameters


@torch.no_grad()
def facts(kind: str, vocabulary: int = 97) -> dict[str, object]:
    """What a family's own forward does with token ids: sizes, shape, causality, padding, arguments."""
    start = time.perf_counter()
    model = small_family(kind, vocabulary)
    generator = torch.Generator().manual_seed(1)
    finite, shape = True, ()
    for length in (5, 60):
        logits = model(input_ids=torch.randint(1, vocabulary - 7, (2, length), generator=generator)).logits
        finite, shape = finite and bool(logits.isfinite().all()), tuple(logits.shape)
    ids = torch.randint(1, vocabulary - 7, (2, 40), generator=generator)
    changed = torch.cat([ids[:, :21], torch.randint(1, vocabulary - 7, (2, 19), generator=generator)], dim=1)
    both = model(input_ids=ids).logits
    causal = (model(input_ids=changed).logits - both)[:, :21].abs().max().item()
    mask = torch.ones_like(ids)
    mask[1, 23:] = 0
    masked = {"attention_mask": mask} if accepts(model.forward, "attention_mask") else {}
    padded = model(input_ids=ids * mask, **masked).logits
    alone = model(input_ids=ids[1:, :23]).logits
    padding = max((padded[1:, :23] - alone).abs().max().item(), (padded[:1] - both[:1]).abs().max().item())
    head = model.get_output_embeddings()
    names = {"inputs_embeds": "E", "past_key_values": "P", "position_ids": "I", "attention_mask": "M", "logits_to_keep": "K"}
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": time.perf_counter() - start,
        "shape": shape,
        "finite": finite,
        "spread": logits.float().std().item(),
        "causal": causal,
        "padding": padding,
        "head": type(head).__name__,
        "tied": head is not None and getattr(head, "weight", 0) is model.get_input_embeddings().weight,
        "base_is_model": model.base_model is model,
        "forward": "".join(letter for name, letter in names.items() if accepts(model.forward, name)),
        "base": "".join(letter for name, letter in names.items() if accepts(model.base_model.forward, name)),
    }


def line(kind: str) -> str:
    """A printed line about the family; an exception's first words where it cannot be built or run."""
    try:
        f = facts(kind)
    except Exception as error:  # whatever a family fails with is the answer
        return f"{kind:26} no   {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    causal = "causal" if f["causal"] < 1e-3 else f"SEES LATER TOKENS ({f['causal']:.2g})"
    padding = "padding ok" if f["padding"] < 1e-3 else f"PADDING CHANGES IT ({f['padding']:.2g})"
    finite = f"finite std {f['spread']:.2f}" if f["finite"] else "NOT FINITE"
    return (
        f"{kind:26} yes {f['parameters']:9,} {f['seconds']:5.2f}s {f['shape']} {finite} | {causal} | {padding} | "
        f"{f['head']}{' tied' if f['tied'] else ''}{' | base_model is the model' if f['base_is_model'] else ''} | "
        f"forward {f['forward']} | base {f['base']}"
    )


def main(kinds: list[str]) -> None:
    print("E inputs_embeds, P past_key_values, I position_ids, M attention_mask, K logits_to_keep\n")
    for kind in kinds or sorted({*families(), *REASONS}):
        reason = f" ({REASONS[kind]})" if kind in REASONS else ""
        print(line(kind) + reason, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    main(sys.argv[1:])
