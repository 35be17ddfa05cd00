"""Checkpoint folders: a model, a tokenizer, the wording it was trained with, and in freeze mode the SID rows."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sid_sft.catalogue import Catalogue
from sid_sft.command_line import rank
from sid_sft.files import LONGEST_PATH, InputError, cut, error_text, read_json, shown
from sid_sft.tasks import TASK_GROUPS, category_name, check_prompts
from sid_sft.training_arguments import compute_dtype
from sid_sft.vocabulary import add_sid_tokens, grow_embeddings, vocabulary_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from sid_sft.adapters import Adapters
    from sid_sft.settings import TrainFlags
    from sid_sft.sid_rows import SidRows

logger = logging.getLogger("sft.checkpoint")

PROMPTS_FILE = "prompts.json"  # travels with a checkpoint: its wording, filled-in category and tasks


class Wording(NamedTuple):
    """How a checkpoint was spoken to: the words for the category, the names of --tasks, task name -> template."""

    category: str
    tasks: list[str]
    prompts: dict[str, str]


def read_wording(folder: Path) -> Wording | None:
    """The wording beside a checkpoint, checked; None where there is none."""
    path = Path(folder) / PROMPTS_FILE
    if not path.is_file():
        return None
    expected = 'a file of sft.py: {"category": ..., "tasks": [...], "prompts": {...}}'
    content = read_json(path, expected)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds {shown(content)}; expected {expected}")
    category, tasks, prompts = (content.get(key) for key in ("category", "tasks", "prompts"))
    if not isinstance(category, str):
        raise InputError(f"{path}: has {shown(category)} for a category; expected {expected}")
    if not isinstance(tasks, list) or not all(isinstance(name, str) and name in TASK_GROUPS for name in tasks):
        raise InputError(f"{path}: has {shown(tasks)} for tasks; expected names of {', '.join(TASK_GROUPS)}")
    if not isinstance(prompts, dict):
        raise InputError(f"{path}: has {shown(prompts)} for prompts; expected {expected}")
    return Wording(category, tasks, check_prompts(prompts, category, str(path)))


def load_tokenizer(base_model: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name, with a pad token, padding on the left (a decoder generates on the right)."""
    from transformers import AutoTokenizer

    with loading(base_model, "has no tokenizer that loads"):
        tokenizer = AutoTokenizer.from_pretrained(base_model, trust_remote_code=trust_remote_code)
        tokenizer("a")  # some settings of a wrong type are met only here
    if tokenizer.eos_token_id is None:
        raise InputError(f"--base_model {base_model}: its tokenizer has no end token, so no answer could end; set eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        logger.info(f"The tokenizer has no pad token: {tokenizer.eos_token!r} pads")
    tokenizer.padding_side = "left"
    return tokenizer


# What configurations call the number of positions that a model was made for.
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length")
MOST_LAYERS = 1000  # no model has so many, and to build a million takes all memory
# Models whose first position stands behind the padding's row of the position table (fairseq's RoBERTa and its kin).
POSITIONS_BEHIND_PAD = (
    "camembert",
    "data2vec-text",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)


def model_positions(base_model: str, *, trust_remote_code: bool) -> int | None:
    """How many tokens the model of a folder or hub name can tell the places of; None where nothing limits them.

    A table of positions has no row behind its last; rotary positions beyond those of pretraining mean nothing to a model.
    """
    config = load_config(base_model, trust_remote_code=trust_remote_code).get_text_config(decoder=True)
    found = [value for name in POSITIONS if type(value := getattr(config, name, None)) is int and value > 0]
    if found and config.model_type in POSITIONS_BEHIND_PAD:
        return min(found) - (config.pad_token_id or 0) - 1
    return min(found, default=None)


def fit_cutoff(cutoff_len: int, positions: int | None) -> int:
    """--cutoff_len, or the model's positions where they are fewer; says so."""
    if positions is None or positions >= cutoff_len:
        return cutoff_len
    logger.info(
        f"--cutoff_len {cutoff_len}: the model has {positions} positions, so examples have at most {positions} tokens"
    )
    return positions


def beams_beyond(catalogue: Catalogue) -> int:
    """By how many tokens beams that write the deepest SID may pass an example that ends with the shallowest one.

    The example's end token has a place that no beam needs: SIDs of 3 and 4 tokens, where some collide, give 0.
    """
    depths = [len(item.sid) for item in catalogue.items]
    return max(max(depths) - min(depths) - 1, 0)


def load_model(
    base_model: str, *, from_scratch: bool = False, trust_remote_code: bool, quantized: dict[str, Any] | None = None
) -> PreTrainedModel:
    """The model of a folder or hub name in the dtype of its files, or with random weights of its shape. quantized: see
    quantized_settings.

    InputError where the files lack a weight, which would be random, or hold one that the model has no place for.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(base_model, trust_remote_code=trust_remote_code)
    check_size(base_model, config, trust_remote_code=trust_remote_code)
    with loading(base_model, "no causal language model loads"):
        if from_scratch:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            return model.to(config.dtype or model.dtype)
        model, found = AutoModelForCausalLM.from_pretrained(
            base_model,
            **(quantized or {"dtype": "auto"}),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
        )
    check_weights(base_model, found)
    return model


def load_base(flags: TrainFlags, device: torch.device) -> tuple[PreTrainedModel, torch.dtype]:
    """The base model of a run and the dtype of its files; quantized, and on the device, where the flags ask for that."""
    import torch

    from sid_sft.quantizing import make_trainable, quantized_settings, tell_quantized

    trust = flags.trust_remote_code
    config = load_config(flags.base_model, trust_remote_code=trust)
    if found := getattr(config, "quantization_config", None):
        method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
        raise InputError(
            f"--base_model {flags.base_model}: is quantized already ({cut(str(method))}); start from the unquantized model, "
            "with --freeze_LLM True --load_in_4bit True where memory is short"
        )
    if not flags.bits:
        model = load_model(flags.base_model, from_scratch=flags.train_from_scratch, trust_remote_code=trust)
        return model, model.dtype
    base_dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    dtype = compute_dtype(flags, base_dtype)
    settings = quantized_settings(flags.bits, dtype=dtype, device=device)
    model = load_model(flags.base_model, trust_remote_code=trust, quantized=settings)
    make_trainable(model)
    tell_quantized(model, flags.bits, dtype)
    return model, base_dtype


@contextlib.contextmanager
def loading(base_model: str, fault: str) -> Iterator[None]:
    """Turns whatever transformers raises over the files of a model, which may hold anything, into an InputError."""
    try:
        yield
    except Exception as error:  # other people's code
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        text = cut(kind + error_text(error), 200)
        raise InputError(f"--base_model {cut(base_model, LONGEST_PATH)}: {fault} ({text})") from None


def load_config(base_model: str, *, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration of a folder or hub name. InputError where it asks for more layers than could be built."""
    from transformers import AutoConfig, PreTrainedConfig

    with loading(base_model, "has no config that loads"):
        parts = [PreTrainedConfig.get_config_dict(base_model)[0]]
    while parts:  # looked at before it is believed: a configuration makes lists as long as its layers
        part = parts.pop()
        for name, value in part.items() if isinstance(part, dict) else ():
            parts.append(value)
            if "layer" in name and type(value) is int and value > MOST_LAYERS:
                raise InputError(
                    f"--base_model {base_model}: its config.json has {shown(value)} for {cut(name)}; "
                    f"expected {MOST_LAYERS} at most"
                )
    with loading(base_model, "has no config that loads"):
        return AutoConfig.from_pretrained(base_model, trust_remote_code=trust_remote_code)


def check_size(base_model: str, config: PreTrainedConfig, *, trust_remote_code: bool) -> None:
    """InputError where a config.json asks for a model that this machine's memory cannot hold."""
    import torch
    from transformers import AutoModelForCausalLM

    if getattr(config, "quantization_config", None) is not None:
        return  # its files are smaller than such a model
    try:
        with torch.device("meta"):  # a model without its numbers
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # other people's code, which may not know this device; loading tells what else is wrong
        return
    needed = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise InputError(
            f"--base_model {base_model}: a model of the sizes in its config.json takes {needed / 1e9:,.0f} GB, this machine "
            f"has {memory / 1e9:,.0f} GB"
        )


def check_weights(base_model: str, found: dict[str, Iterable]) -> None:
    """Refuses files that are not all of the model and nothing but the model. found: what transformers tells of a loading."""
    faults = {
        "missing_keys": "its files lack {count}, which would be random: {names}",
        "mismatched_keys": "its files hold {count} of another shape than its config.json says: {names}",
        "unexpected_keys": "its files hold {count} that the model has no place for: {names}",
    }
    for key, fault in faults.items():
        names = sorted(entry if isinstance(entry, str) else entry[0] for entry in found[key])
        if names:
            count = f"{len(names)} weight{'s' * (len(names) > 1)}"
            first = ", ".join(map(cut, names[:3])) + (", ..." if len(names) > 3 else "")
            raise InputError(
                f"--base_model {base_model}: {fault.format(count=count, names=first)}; expected a whole causal language "
                "model, as its own save_pretrained writes it"
            )


def apply_sid_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Turns a base model and its tokenizer, in place, into those of a freeze run, from its sid_rows.safetensors.

    InputError when the rows were trained on another base model, or when the tokenizer gives the tokens other ids.
    """
    import torch

    from sid_sft.forward.architecture import tables_of
    from sid_sft.sid_rows import base_hash, read_rows_file

    saved = read_rows_file(Path(path))
    tables = {name: weight.shape[1] for name, weight in tables_of(model).items()}
    if (widths := {name: rows.shape[1] for name, rows in saved.rows.items()}) != tables:
        raise InputError(f"{path}: its rows are those of another model (tables and widths {widths}, this one's {tables})")
    if (found := base_hash(model, int(saved.ids[0]))) != saved.base_hash:
        raise InputError(f"{path}: was trained on another base model (hash {shown(saved.base_hash)}, this one's is {found})")
    add_sid_tokens(tokenizer, saved.tokens)
    if tokenizer.convert_tokens_to_ids(saved.tokens) != saved.ids.tolist():
        raise InputError(f"{path}: the tokenizer gives the SID tokens other ids; use the tokenizer of the base model")
    grow_embeddings(model, vocabulary_size(tokenizer))
    with torch.no_grad():
        for name, weight in tables_of(model).items():
            weight[saved.ids] = saved.rows[name].to(weight)


def bytes_to_write(
    model: PreTrainedModel, rows: SidRows | None, base_dtype: torch.dtype, adapters: Adapters | None = None
) -> tuple[int, int]:
    """How many bytes one checkpoint of a run and its final model take, but for small files. rows, adapters: all that trains,
    or None.

    A checkpoint has what trains in float32 (the rows twice, as rows and as masters), and two moments of it.
    """
    total, beside = model.num_parameters(), adapters.numbers if adapters else 0
    return (12 * total if rows is None else 16 * rows.numbers + 12 * beside), total * base_dtype.itemsize + 4 * beside


def save_final(
    flags: TrainFlags,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: SidRows | None,
    wording: dict[str, str],
    base_dtype: torch.dtype,
    card: str,
    adapters: Adapters | None = None,
    bits_before: dict[str, str] | None = None,
) -> None:
    """Writes output_dir/final_checkpoint: a plain HF folder in the base model's dtype, with the wording beside it. Adapters
    are merged into it, and stand beside it as peft reads them. bits_before: frozen_bits of a quantized base.

    Nothing unproven is left there: the base that a frozen model came from is loaded again and compared value by value, only
    its SID rows are set, and the folder is loaded once more and compared with the trained model. Every process that has a
    part of the model must call; rank 0 writes.
    """
    from sid_sft.adapters import ADAPTER_FOLDER, merged
    from sid_sft.sharding import cast, folder_of_all, save_whole
    from sid_sft.sid_rows import ROWS_FILE

    folder = Path(flags.output_dir) / "final_checkpoint"
    with folder_of_all(folder, model) as scratch:
        if rows is None:
            final = cast(model, base_dtype)
        else:
            if adapters:
                adapters.save(scratch / ADAPTER_FOLDER)
                adapters.load(scratch / ADAPTER_FOLDER)  # refuses a file that does not hold all of them
                adapters.take_out()
            final, digest = base_with_rows(flags, model, tokenizer, rows, bits_before)
            if rank() == 0:
                rows.save(scratch / ROWS_FILE, digest)
        if adapters:
            final = merged(final, scratch / ADAPTER_FOLDER)
        if adapters or bits_before:
            model = final  # what the saved folder must be equal to: the trained model has other numbers in its layers
        final.config.pad_token_id = tokenizer.pad_token_id
        trust = flags.trust_remote_code
        final.generation_config = plain_generation(flags.base_model, tokenizer, trust_remote_code=trust)
        save_whole(final, scratch)
        del final
        if rank() == 0:
            tokenizer.save_pretrained(scratch)
            content = {"category": category_name(flags.category), "tasks": flags.task_names, "prompts": wording}
            (scratch / PROMPTS_FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False))
            (scratch / "README.md").write_text(card, encoding="utf-8")
        check_saved(scratch, model, rows, trust_remote_code=flags.trust_remote_code)
    logger.info(f"Saved the model and tokenizer to {folder}")


def plain_generation(base_model: str, tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool) -> GenerationConfig:
    """How a trained model generates where nobody says how: greedily, with the base's begin and end tokens and nothing else.

    What a base has beside them, such as do_sample, temperature and repetition_penalty of a chat model, would change the
    scores of SIDs, in transformers and in servers that read generation_config.json. A base with the end tokens [7, 9] whose
    tokenizer ends with 9 keeps [7, 9]; the tokenizer's is added where the base does not have it.
    """
    from transformers import GenerationConfig

    try:
        base = GenerationConfig.from_pretrained(base_model)
    except Exception:  # other people's code: there is no such file, or it holds something else
        base = GenerationConfig.from_model_config(load_config(base_model, trust_remote_code=trust_remote_code))
    own, given = tokenizer.eos_token_id, base.eos_token_id
    ends = [*(end for end in (given if isinstance(given, list) else [given]) if type(end) is int), own]
    ends = list(dict.fromkeys(ends))
    return GenerationConfig(
        bos_token_id=base.bos_token_id if type(base.bos_token_id) is int else None,
        eos_token_id=ends if len(ends) > 1 else own,
        pad_token_id=tokenizer.pad_token_id,
    )


def base_with_rows(
    flags: TrainFlags,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: SidRows,
    bits_before: dict[str, str] | None,
) -> tuple[PreTrainedModel, str]:
    """The base model, loaded again, with the trained SID rows, and its hash before; proves that no frozen value moved."""
    from sid_sft.forward.architecture import tables_of
    from sid_sft.quantizing import differing_bits, frozen_bits
    from sid_sft.sharding import shard_like
    from sid_sft.sid_rows import base_hash, differing_values

    base = load_model(flags.base_model, from_scratch=False, trust_remote_code=flags.trust_remote_code)
    if bits_before is None:
        changed = sum(differing_values(model, base, rows.ids).values())
        logger.info(f"frozen values changed: {changed}")
    else:
        changed = len(differing_bits(bits_before, frozen_bits(model, rows.ids)))
        logger.info(f"frozen values changed: {changed} ({len(bits_before)} tensors of the quantized base, by SHA-256)")
    if changed:
        raise InputError(f"{changed} frozen values changed in training; no final_checkpoint was written")
    # What the model has of the base is the base's own, and sharded; a quantized one has other numbers.
    digest = base_hash(model if bits_before is None else base, int(rows.ids[0]))
    sizes = {name: len(weight) for name, weight in tables_of(base).items()}
    grow_embeddings(base, vocabulary_size(tokenizer))
    trained, tables = tables_of(model), tables_of(base)
    for name, size in sizes.items():
        tables[name].data[size:] = trained[name].data[size:].to(tables[name])
    for name, _, master in rows.tables:
        tables[name].data[rows.ids.cpu()] = master.data.to(tables[name])
    shard_like(model, base)
    return base, digest


def check_saved(folder: Path, model: PreTrainedModel, rows: SidRows | None, *, trust_remote_code: bool) -> None:
    """InputError unless a saved folder, loaded again, holds the trained model's values, and the SID rows' masters."""
    import torch

    from sid_sft.forward.architecture import tables_of
    from sid_sft.sid_rows import differing_values

    saved = load_model(str(folder), trust_remote_code=trust_remote_code)
    found = differing_values(model, saved, rows.ids if rows else None)
    for name, _, master in rows.tables if rows else ():
        weight = tables_of(saved)[name].detach()
        if not torch.equal(weight[rows.ids.cpu()], master.detach().to(weight)):
            found[name] = len(rows.ids)
    if found:
        name, count = next(iter(found.items()))
        raise InputError(
            f"the saved model is not the trained one ({count:,} values of {name} differ after loading), so no "
            f"final_checkpoint was written; transformers does not save {type(model).__name__} whole"
        )
