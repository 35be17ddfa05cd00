"""Supervised fine-tuning for generative recommendation with semantic IDs (SIDs); `python sft.py --help` lists the flags.

flags -> index -> SID tokens -> tokenizer and model -> (frozen) -> tokenized datasets -> Trainer -> checkpoint and log
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from data import build_dataset
from sid_sft.catalogue import Catalogue, read_catalogue, read_index
from sid_sft.chat import in_chat
from sid_sft.checkpoint import (
    apply_sid_rows,
    bytes_to_write,
    fit_cutoff,
    load_base,
    load_model,
    load_tokenizer,
    model_positions,
    save_final,
)
from sid_sft.command_line import command, quiet_other_ranks, rank, run
from sid_sft.dataset_cache import Source, show_examples
from sid_sft.faults import memory_in_one_line
from sid_sft.files import InputError
from sid_sft.finite import check_finite
from sid_sft.flag_checks import check_training, takes_over_from_accelerate
from sid_sft.freezing import rows_learning_rate, tell_defaults, tell_what_trains, turn_dropout_off
from sid_sft.hub import open_repository, upload
from sid_sft.interactions import check_first_row
from sid_sft.interruption import StopSignals
from sid_sft.output_folder import STATE_FILE, OutputFolder
from sid_sft.process_groups import process_groups_left
from sid_sft.recommend.while_training import recommendation_evaluator
from sid_sft.resuming import resume_point, what_decides
from sid_sft.run_report import CURVES_FILE, REPORT_FILE, measuring_command, model_card, write_run_report
from sid_sft.settings import CACHE_DIR, TrainFlags, with_defaults
from sid_sft.tasks import read_prompts
from sid_sft.training_arguments import check_reports, check_schedule, compute_dtype, training_arguments
from sid_sft.vocabulary import (
    add_sid_tokens,
    assert_sids_round_trip,
    grow_embeddings,
    ids_to_fill,
    init_rows,
    vocabulary_size,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sid_sft.sid_rows import SidRows

__all__ = [
    "TokenExtender",
    "add_sid_tokens",
    "apply_sid_rows",
    "assert_sids_round_trip",
    "freeze_llm",
    "grow_embeddings",
    "init_rows",
    "load_model",
    "load_tokenizer",
    "main",
    "token_extender",
    "train",
    "turn_dropout_off",
]

logger = logging.getLogger("sft")


class TokenExtender:
    """The SID tokens of an index, opened as `data_path/dataset + index_file`.

    TokenExtender("data", "Toys", ".index.json").get_new_tokens() -> ["<a_0>", "<a_1>", ..., "<c_255>"], sorted.
    """

    def __init__(self, data_path: str, dataset: str, index_file: str = ".index.json") -> None:
        self.path = Path(data_path) / (dataset + index_file)
        self.indices: dict[str, tuple[str, ...]] | None = None

    def get_new_tokens(self) -> list[str]:
        if self.indices is None:
            self.indices = read_index(self.path)
        return sorted({token for sid in self.indices.values() for token in sid})


def token_extender(sid_index_path: str) -> TokenExtender:
    """Splits the path of an index so that TokenExtender opens exactly that file: X.faiss.index.json is not X.index.json."""
    path = Path(sid_index_path)
    dataset, dot, rest = path.name.rpartition(".index.json")
    return TokenExtender(str(path.parent), dataset, dot + rest) if dot else TokenExtender(str(path.parent), path.name, "")


def freeze_llm(model: PreTrainedModel, ids: list[int], tokens: list[str]) -> SidRows:
    """Freezes the model but for the rows of the SID tokens. ids, tokens: in the same order."""
    from sid_sft.sid_rows import SidRows

    if not tokens:
        raise InputError("--freeze_LLM True, but the index has no SID token: nothing would train; check --sid_index_path")
    logger.info("Freezing LLM parameters, only training new token embeddings")
    rows = SidRows(model, ids, tokens)
    model.requires_grad_(False)
    for table in rows.tables:  # the embedding, and the output head where it is not tied to it
        table.weight.requires_grad_(True)
        table.weight.register_hook(rows.mask_grad)
    turn_dropout_off(model)
    return rows


@command(TrainFlags)
def train(flags: TrainFlags) -> None:
    """Fine-tune a causal language model to write the semantic ID of the item that a user will want next."""
    started = time.monotonic()
    check_training(flags)
    flags = takes_over_from_accelerate(flags)
    files, folders = (REPORT_FILE, CURVES_FILE, STATE_FILE), ("final_checkpoint", "checkpoint-*")
    outputs = OutputFolder(Path(flags.output_dir), files, folders)
    outputs.check()
    catalogue = read_catalogue(Path(flags.sid_index_path), optional_path(flags.item_meta_path))
    wording = read_prompts(optional_path(flags.prompts), flags.category)
    for path in filter(None, (flags.train_file, flags.eval_file)):
        check_first_row(Path(path), catalogue, max_left_out=flags.max_left_out)
    writes = rank() == 0 and not flags.check
    if flags.push_to_hub and writes:
        open_repository(flags.push_to_hub, private=flags.hub_private)
    cure = f"try --micro_batch_size {max(1, flags.micro_batch_size // 2)} or a smaller --prefix_cache_gb"
    holding = outputs.held("sft.py") if writes else contextlib.nullcontext()
    with StopSignals() as signals, holding, outputs.writing(), memory_in_one_line(cure), process_groups_left():
        fine_tune(flags, catalogue, wording, outputs, signals, started)


def fine_tune(
    flags: TrainFlags,
    catalogue: Catalogue,
    wording: dict[str, str],
    outputs: OutputFolder,
    signals: StopSignals,
    started: float,
) -> None:
    """The run itself, from the tokens to the final checkpoint. started: of time.monotonic(), for the log."""
    import transformers

    from sid_sft.adapters import Adapters
    from sid_sft.forward.recompute import compute_again_in_backward
    from sid_sft.quantizing import frozen_bits
    from sid_sft.sharding import shard
    from sid_sft.sid_rows import base_hash
    from sid_sft.trainer import SidTrainer

    quiet_other_ranks()
    check_reports(flags)
    transformers.set_seed(flags.seed)
    positions = model_positions(flags.base_model, trust_remote_code=flags.trust_remote_code)
    if flags.freeze_LLM:
        tell_defaults(flags)
    flags = dataclasses.replace(with_defaults(flags), cutoff_len=fit_cutoff(flags.cutoff_len, positions))

    # ---- the SID tokens of the index become tokens of the tokenizer
    tokenizer = load_tokenizer(flags.base_model, trust_remote_code=flags.trust_remote_code)
    wording = in_chat(wording, tokenizer) if flags.chat_template else wording
    known_tokens = len(tokenizer)
    tokens = token_extender(flags.sid_index_path).get_new_tokens()
    new_ids = add_sid_tokens(tokenizer, tokens)
    assert_sids_round_trip(tokenizer, catalogue)
    train_data, eval_data = datasets_of(flags, catalogue, wording, tokenizer)

    # ---- and rows of the model
    args = training_arguments(flags)
    check_schedule(args, len(train_data))
    model, base_dtype = load_base(flags, args.device)
    if not flags.fsdp:
        check_finite(model, f"--base_model {flags.base_model}")
    known_rows = min(known_tokens, len(model.get_input_embeddings().weight))
    rows_to_fill = ids_to_fill(model, tokenizer, tokens, new_ids)
    grow_embeddings(model, vocabulary_size(tokenizer))
    init_rows(model, rows_to_fill, known_rows, flags.seed)
    dtype = compute_dtype(flags, base_dtype)  # before the rows are copied, which stay beside the model
    if flags.fsdp:
        shard(model, args.device, dtype, keep_tables=flags.freeze_LLM)
        check_finite(model, f"--base_model {flags.base_model}")  # only now: each process looks at its own rows
    elif not flags.bits:  # which have come as they are to be
        model.to(args.device, dtype)
    if flags.gradient_checkpointing:
        compute_again_in_backward(model)

    # ---- which train alone, or with everything else
    rows = freeze_llm(model, tokenizer.convert_tokens_to_ids(tokens), tokens) if flags.freeze_LLM else None
    base = base_hash(model, min(tokenizer.convert_tokens_to_ids(tokens)))
    bits_before = frozen_bits(model, rows.ids) if rows and flags.bits else None
    adapters = Adapters(model, flags) if flags.lora_rank else None
    tell_what_trains(model, rows, adapters)
    if rows and flags.learning_rate is None:
        args.learning_rate = rows_learning_rate(model)
    flags = dataclasses.replace(flags, learning_rate=args.learning_rate)  # for the model card
    evaluator = recommendation_evaluator(flags, catalogue, wording, tokenizer, positions)
    if flags.check:
        show_examples(train_data, tokenizer)
        logger.info("--check: everything was read and nothing was trained")
        return

    if rank() == 0:
        outputs.check_room(*bytes_to_write(model, rows, base_dtype, adapters))
    resumed, decides = resume_point(flags, lambda: what_decides(flags, base, tokens))
    trainer = SidTrainer(
        model=model,
        args=args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        rows=rows,
        adapters=adapters,
        base_hash=base,
        micro_batch_size=flags.micro_batch_size,
        auto_micro_batch=flags.auto_micro_batch,
        group_by_length=flags.group_by_length,
        group_users=flags.group_users,
        frozen_prefix=flags.frozen_prefix,
        cache_bytes=int(flags.prefix_cache_gb * 1e9),
        cache_place=flags.prefix_cache_in,
        evaluator=evaluator,
        patience=flags.early_stopping_patience,
        signals=signals,
        resumed=resumed,
        decides=decides,
    )
    trainer.fit()
    trainer.log_speed(started)
    if rank() == 0:
        trainer.save_state()
        write_run_report(flags, trainer.state, trainer.model, rows, adapters)
    if rank() == 0 or flags.fsdp:
        card = model_card(flags, trainer.state, wording)
        save_final(flags, trainer.model, tokenizer, rows, wording, base_dtype, card, adapters, bits_before)
    if rank() == 0:
        logger.info(f"The report of the run is {Path(flags.output_dir) / REPORT_FILE}")
        if flags.eval_file:
            logger.info(f"Measure it: {measuring_command(flags)}")
        if flags.push_to_hub:
            upload(Path(flags.output_dir) / "final_checkpoint", flags.push_to_hub)


def optional_path(path: str) -> Path | None:
    return Path(path) if path else None


def datasets_of(
    flags: TrainFlags, catalogue: Catalogue, wording: dict[str, str], tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset | None]:
    """The tokenized training data of all tasks, and the evaluation data of the task sid_sid."""

    def build(source: Source, tasks: list[str], sample: int) -> Dataset:
        return build_dataset(
            source,
            tasks,
            catalogue=catalogue,
            prompts=wording,
            tokenizer=tokenizer,
            cutoff_len=flags.cutoff_len,
            sample=sample,
            seed=flags.seed,
            max_left_out=flags.max_left_out,
            cache_dir=Path(flags.cache_dir or CACHE_DIR).expanduser(),
            num_proc=flags.num_proc,
        )

    train_source = Source(optional_path(flags.train_file), optional_path(flags.preference_file), "train")
    train_data = build(train_source, flags.task_names, flags.sample)
    logger.info(f"Training on {len(train_data):,} examples of {', '.join(flags.task_names)}")
    if not flags.eval_file:
        return train_data, None
    eval_data = build(Source(Path(flags.eval_file)), ["sid_sid"], flags.eval_sample)
    logger.info(f"Evaluating on {len(eval_data):,} examples of sid_sid")
    return train_data, eval_data


def main(arguments: list[str]) -> int:
    return run(train, arguments, program="sft.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
