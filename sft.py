"""Supervised fine-tuning for generative recommendation with semantic IDs (SIDs); `python sft.py --help` lists the flags.

flags -> index -> SID tokens -> tokenizer and model -> (frozen) -> tokenized datasets -> Trainer -> checkpoint and log
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import build_dataset
from sid_sft.catalogue import Catalogue, read_catalogue, read_index
from sid_sft.checkpoint import beams_beyond, fit_cutoff, load_model, load_tokenizer, model_positions, save_final
from sid_sft.command_line import rank, run, typed_flags
from sid_sft.dataset_cache import Source
from sid_sft.files import InputError
from sid_sft.interactions import MAX_LEFT_OUT, read_rows
from sid_sft.recommend.evaluator import RECOMMENDING_TASKS, Evaluator, sampled
from sid_sft.run_report import REPORT_FILE, model_card, write_run_report
from sid_sft.settings import check_distribution, check_paths, check_ranges, check_tasks, set_intervals
from sid_sft.tasks import DEFAULT_TASKS, TASKS, read_prompts
from sid_sft.training_arguments import compute_dtype, early_stopping, resume_point, training_arguments
from sid_sft.vocabulary import add_sid_tokens, assert_sids_round_trip, grow_embeddings, init_rows, vocabulary_size

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sid_sft.sid_rows import SidRows

logger = logging.getLogger("sft")

FREEZE_STEP = 0.1  # freeze mode's default learning rate, as a share of the embedding's spread: rows alone bear, and need,
# larger steps than a whole model, and an AdamW step moves each number by about the learning rate
EVAL_BEAMS = 20  # of the recommendations measured during training: HR@10 with twice as many beams


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


def freeze_llm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> SidRows:
    """Freezes the model but for the rows of the SID tokens, and logs what trains."""
    from sid_sft.sid_rows import SidRows

    if not tokens:
        raise InputError("--freeze_LLM True, but the index has no SID token: nothing would train; check --sid_index_path")
    logger.info("Freezing LLM parameters, only training new token embeddings")
    rows = SidRows(model, tokenizer.convert_tokens_to_ids(tokens), tokens)
    low, high = int(rows.ids[0]), int(rows.ids[-1])
    logger.info(f"Unfrozen {len(tokens)} new token embeddings (indices {low} to {high})")
    if len(rows.tables) > 1:
        logger.info(f"Unfrozen {len(tokens)} output-head rows (indices {low} to {high}): the head is not tied")
    total = sum(parameter.numel() for parameter in model.parameters())
    share = 100 * rows.numbers / total
    logger.info(f"Trainable parameters (with grad-mask): {rows.numbers:,} / {total:,} ({share:.4f}%)")
    tables, (count, width) = len(rows.tables), rows.masters[0].shape
    state_mb = 3 * sum(master.numel() * master.element_size() for master in rows.masters) / 1e6
    logger.info(
        f"That is {count} rows x {width} wide x {tables} table{'s' * (tables > 1)}; "
        f"the optimizer holds {state_mb:.1f} MB (master copy and two moments)"
    )
    if dropout := turn_dropout_off(model):
        logger.info(f"Dropout of {dropout} frozen modules is off: it has no purpose where nothing can overfit")
    return rows


def rows_learning_rate(model: PreTrainedModel, known: int) -> float:
    """Freeze mode's default learning rate, from the standard deviation of the embedding's first `known` rows."""
    spread = float(model.get_input_embeddings().weight[:known].detach().float().std())
    rate = float(f"{FREEZE_STEP * spread:.2g}")
    logger.info(f"Learning rate {rate:g}: a tenth of the spread of the embedding's values ({spread:.2g})")
    return rate


def turn_dropout_off(model: PreTrainedModel) -> int:
    """Sets every dropout probability of the model to 0 and returns how many were not."""
    from torch import nn

    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    count = 0
    for module in model.modules():
        if isinstance(module, kinds) and module.p > 0:
            module.p, count = 0.0, count + 1
        elif isinstance(value := getattr(module, "attention_dropout", 0.0), float) and value > 0:
            module.attention_dropout, count = 0.0, count + 1
    return count


def train(
    *,
    base_model: str = "",
    train_file: str = "",
    eval_file: str = "",
    sid_index_path: str = "",
    item_meta_path: str = "",
    preference_file: str = "",
    output_dir: str = "",
    category: str = "",
    tasks: str = ",".join(DEFAULT_TASKS),
    prompts: str = "",
    sample: int = -1,
    eval_sample: int = -1,
    eval_recommendation: int = 0,
    metric_for_best_model: str = "eval_loss",
    max_left_out: float = MAX_LEFT_OUT,
    cutoff_len: int = 512,
    freeze_LLM: bool = False,
    frozen_prefix: bool = True,
    train_from_scratch: bool = False,
    num_epochs: float = 10,
    max_steps: int = -1,
    batch_size: int = 128,
    micro_batch_size: int = 4,
    learning_rate: float | None = None,
    weight_decay: float = 0.0,
    lr_scheduler_type: str = "cosine",
    warmup_steps: int = 20,
    group_by_length: bool = False,
    group_users: bool = False,
    prefix_cache_gb: float = 2.0,
    prefix_cache_in: str = "device",
    seed: int = 42,
    bf16: bool | None = None,
    logging_steps: int = 10,
    eval_steps: float | None = None,
    save_steps: float | None = None,
    early_stopping_patience: int = 3,
    resume_from_checkpoint: str = "",
    report_to: str = "none",
    wandb_project: str = "",
    wandb_run_name: str = "",
    trust_remote_code: bool = False,
    cache_dir: str = "",
    num_proc: int | None = None,
    check: bool = False,
) -> None:
    """Fine-tune a causal language model to write the semantic ID of the item that a user will want next.

    Args:
        base_model: folder or hub name of a causal language model, or a final_checkpoint/ of an earlier run
        train_file: CSV of interactions to train on
        eval_file: CSV of interactions to evaluate on (task sid_sid); without it nothing is evaluated
        sid_index_path: the .index.json, item id -> SID tokens
        item_meta_path: the .item.json with titles; the tasks item, sid_title, title_title, title_sid need it
        preference_file: JSON list of user preferences, for the tasks preference and preference_sid
        output_dir: where checkpoints, final_checkpoint/ and trainer_state.json go
        category: words for the prompts; known names (Industrial_and_Scientific) get readable words
        tasks: names, comma separated, of sid_sid, item, sid_title, title_title, title_sid, preference, preference_sid
        prompts: JSON file with wording of your own, task name -> template
        sample: random rows to train on per task; -1 for all
        eval_sample: random rows to evaluate on; -1 for all
        eval_recommendation: random rows of eval_file for which each evaluation measures HR@10 and NDCG@10; 0 for none
        metric_for_best_model: eval_loss, eval_hr@10 or eval_ndcg@10; decides the best checkpoint and early stopping
        max_left_out: share of a file's rows that may be left out before the run stops; 1 allows any share
        cutoff_len: tokens of the longest example, at most the model's positions; longer ones lose their oldest items alone
        freeze_LLM: train only the rows of the SID tokens, leave the language model as it is
        frozen_prefix: in freeze mode, compute what no SID can change once and without gradients; the same result, faster
        train_from_scratch: random weights of the base model's shape
        num_epochs: passes over the training data
        max_steps: optimizer steps; overrides num_epochs when positive
        batch_size: examples per optimizer step over all processes; a multiple of micro_batch_size x processes
        micro_batch_size: examples per forward pass of one process; smaller needs less memory
        learning_rate: peak learning rate; default 3e-4, with freeze_LLM a tenth of the spread of the embedding's values
        weight_decay: AdamW's decoupled weight decay; in freeze mode of the SID rows alone
        lr_scheduler_type: linear, cosine, constant, ... (transformers' names)
        warmup_steps: steps until the learning rate reaches its peak
        group_by_length: batches of similar length across the epoch (steps are sorted inside in any case)
        group_users: a user's examples fall into the same step, where what they share is computed once
        prefix_cache_gb: GB per process for what the frozen prefix keeps from step to step; 0 keeps nothing
        prefix_cache_in: where to keep it: device (the memory of the device that computes), host, or a folder on a fast disk
        seed: decides shuffling, sampling and the first values of new rows
        bf16: default: on GPUs that have it; True or False decides
        logging_steps: steps between two lines of the log
        eval_steps: steps between two evaluations; below 1 a share of the run; default: save_steps, or else 0.05
        save_steps: steps between two checkpoints, a multiple of eval_steps; default: eval_steps, or else 0.05
        early_stopping_patience: evaluations without a better one before the run stops; 0 never stops
        resume_from_checkpoint: a checkpoint folder, or True for the newest in output_dir
        report_to: none, wandb, tensorboard, ... (transformers' names)
        wandb_project: name of a Weights & Biases project; implies report_to wandb
        wandb_run_name: name of the run there
        trust_remote_code: run code that comes with the base model
        cache_dir: where tokenized datasets are kept; default ~/.cache/sid-sft
        num_proc: processes that tokenize; default: one per core, at most 8
        check: read everything, show one example per task and what would train, then stop; nothing is written
    """
    flags = check_flags(locals())
    started = time.monotonic()
    catalogue = read_catalogue(Path(flags.sid_index_path), optional_path(flags.item_meta_path))
    wording = read_prompts(optional_path(flags.prompts), flags.category)
    check_rows(flags, catalogue)

    import torch
    import transformers

    from sid_sft.sid_rows import base_hash
    from sid_sft.trainer import SidTrainer

    quiet_other_ranks()
    transformers.set_seed(flags.seed)
    positions = model_positions(flags.base_model, trust_remote_code=flags.trust_remote_code)
    flags.cutoff_len = fit_cutoff(flags.cutoff_len, positions)
    tokenizer = load_tokenizer(flags.base_model, trust_remote_code=flags.trust_remote_code)
    known_tokens = len(tokenizer)
    tokens = token_extender(flags.sid_index_path).get_new_tokens()
    new_ids = add_sid_tokens(tokenizer, tokens)
    assert_sids_round_trip(tokenizer, catalogue)
    train_data, eval_data = datasets_of(flags, catalogue, wording, tokenizer)

    args = training_arguments(flags)
    model = load_model(flags.base_model, from_scratch=flags.train_from_scratch, trust_remote_code=flags.trust_remote_code)
    base_dtype = model.dtype
    logger.info(f"Adding {len(new_ids)} new tokens to tokenizer")
    had_rows = len(model.get_input_embeddings().weight)
    known_tokens = min(known_tokens, had_rows)
    rowless = sorted({i for i in tokenizer.convert_tokens_to_ids(tokens) if i >= had_rows} - set(new_ids))
    if kept := len(tokens) - len(new_ids) - len(rowless):
        logger.info(f"{kept} of {len(tokens)} SID tokens were there already and keep their rows")
    if rowless:
        logger.info(f"{len(rowless)} of {len(tokens)} SID tokens were in the tokenizer, but had no row; they get one")
    grow_embeddings(model, vocabulary_size(tokenizer))
    init_rows(model, new_ids + rowless, known_tokens, flags.seed)
    model.to(args.device, compute_dtype(flags, base_dtype))  # before the rows are copied, which stay beside it
    rows = freeze_llm(model, tokenizer, tokens) if flags.freeze_LLM else None
    if rows is None:
        total = sum(parameter.numel() for parameter in model.parameters())
        logger.info(f"Trainable parameters: {total:,} / {total:,} (100%)")
    elif flags.learning_rate is None:
        args.learning_rate = rows_learning_rate(model, known_tokens)
    flags.learning_rate = args.learning_rate  # what was left out is known by now, and the model card names it
    evaluator = recommendation_evaluator(flags, catalogue, wording, tokenizer, positions)
    if flags.check:
        show_examples(train_data, tokenizer)
        logger.info("--check: everything was read and nothing was trained")
        return

    trainer = SidTrainer(
        model=model,
        args=args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        rows=rows,
        base_hash=base_hash(model, int(rows.ids[0])) if rows else "",
        micro_batch_size=flags.micro_batch_size,
        group_by_length=flags.group_by_length,
        group_users=flags.group_users,
        frozen_prefix=flags.frozen_prefix,
        cache_bytes=int(flags.prefix_cache_gb * 1e9),
        cache_place=flags.prefix_cache_in,
        evaluator=evaluator,
        callbacks=early_stopping(flags, eval_data),
    )
    trainer.train(resume_from_checkpoint=resume_point(flags))
    trainer.log_speed(started)
    if trainer.is_world_process_zero():
        trainer.save_state()
        card = model_card(flags, trainer.state, wording)
        write_run_report(flags, trainer.state, trainer.model, rows)
        save_final(flags, trainer.model, tokenizer, rows, wording, base_dtype, card)
        logger.info(f"The report of the run is {Path(flags.output_dir) / REPORT_FILE}")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def optional_path(path: str) -> Path | None:
    return Path(path) if path else None


def token_extender(sid_index_path: str) -> TokenExtender:
    """Splits the path of an index so that TokenExtender opens exactly that file: X.faiss.index.json is not X.index.json."""
    path = Path(sid_index_path)
    dataset, dot, rest = path.name.rpartition(".index.json")
    return TokenExtender(str(path.parent), dataset, dot + rest) if dot else TokenExtender(str(path.parent), path.name, "")


def check_rows(flags: types.SimpleNamespace, catalogue: Catalogue) -> None:
    """Reads the first row of each CSV, so that a wrong file is told before anything heavy is loaded."""
    for path in (flags.train_file, flags.eval_file):
        if path:
            with contextlib.closing(read_rows(Path(path), catalogue, max_left_out=flags.max_left_out)) as rows:
                next(rows, None)


def datasets_of(
    flags: types.SimpleNamespace, catalogue: Catalogue, wording: dict[str, str], tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset | None]:
    """The tokenized training data of all tasks, and the evaluation data of the task sid_sid (or of the preference tasks)."""
    groups = flags.tasks.split(",")
    common = {
        "catalogue": catalogue,
        "prompts": wording,
        "tokenizer": tokenizer,
        "cutoff_len": flags.cutoff_len,
        "seed": flags.seed,
        "max_left_out": flags.max_left_out,
        "cache_dir": Path(flags.cache_dir or "~/.cache/sid-sft").expanduser(),
        "num_proc": flags.num_proc,
    }
    preferences = optional_path(flags.preference_file)
    source = Source(optional_path(flags.train_file), preferences, "train")
    train_data = build_dataset(source, groups, sample=flags.sample, **common)
    logger.info(f"Training on {len(train_data):,} examples of {', '.join(groups)}")
    if not flags.eval_file:
        return train_data, None
    eval_data = build_dataset(Source(Path(flags.eval_file)), ["sid_sid"], sample=flags.eval_sample, **common)
    logger.info(f"Evaluating on {len(eval_data):,} examples of sid_sid")
    return train_data, eval_data


def show_examples(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """Logs the first example of each task as the model will see it."""
    import numpy as np

    tasks = dataset.with_format("numpy")["task"][:]
    for number in np.unique(tasks):
        example = dataset[int(np.argmax(np.asarray(tasks) == number))]
        ids, prompt_len = example["input_ids"], example["prompt_len"]
        prompt, answer = tokenizer.decode(ids[:prompt_len]), tokenizer.decode(ids[prompt_len:])
        logger.info(f"{list(TASKS)[number]}: {prompt!r} -> {answer!r}")


def recommendation_evaluator(
    flags: types.SimpleNamespace,
    catalogue: Catalogue,
    wording: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
) -> Evaluator | None:
    """What measures recommendations at each evaluation, on a sample of the evaluation rows; None where not asked for."""
    if not flags.eval_recommendation:
        return None
    rows = list(read_rows(Path(flags.eval_file), catalogue, max_left_out=flags.max_left_out))
    rows = sampled(rows, flags.eval_recommendation, flags.seed)
    cutoff_len = flags.cutoff_len if positions is None else min(flags.cutoff_len, positions - beams_beyond(catalogue))
    return Evaluator(
        tokenizer,
        catalogue,
        wording,
        rows,
        task=next(task for task in RECOMMENDING_TASKS if task in flags.tasks.split(",")),
        num_beams=EVAL_BEAMS,
        batch_size=flags.micro_batch_size,
        cutoff_len=cutoff_len,
    )


def check_flags(values: dict[str, Any]) -> types.SimpleNamespace:
    """The flags with the types of train()'s signature, checked one by one and against each other, before anything loads."""
    flags = typed_flags(train, values)
    flags.tasks = ",".join(name.strip() for name in flags.tasks.split(",") if name.strip())
    set_intervals(flags)
    check_ranges(flags)
    check_tasks(flags)
    check_paths(flags)
    check_distribution(flags)
    return flags


def quiet_other_ranks() -> None:
    """Only rank 0 speaks."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    if rank() > 0:
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()


def main(arguments: list[str]) -> int:
    return run(train, arguments, program="sft.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
