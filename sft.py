"""Supervised fine-tuning for generative recommendation with semantic IDs (SIDs); `python sft.py --help` lists the flags.

flags -> index -> SID tokens -> tokenizer and model -> (frozen) -> tokenized datasets -> Trainer -> checkpoint and log
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint import PROMPTS_FILE, load_model, load_tokenizer
from data import (
    DEFAULT_TASKS,
    TASK_GROUPS,
    TASKS,
    Catalogue,
    InputError,
    Source,
    build_dataset,
    category_name,
    error_text,
    read_catalogue,
    read_index,
    read_prompts,
    read_rows,
)
from evaluate import RECOMMENDING_TASKS, Evaluator, sampled
from flags import rank, run, suggestion, typed_flags, world_size
from run_report import REPORT_FILE, model_card, write_run_report

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from sid_rows import SidRows

logger = logging.getLogger("sft")

FULL_LEARNING_RATE = 3e-4
FREEZE_REACH = 2.4  # freeze mode's default learning rate x width: an AdamW step moves each number of a row by about the
# rate, and so a logit, a sum over the width, by about rate x width; the best of those tried at widths 128, 256 and 576
FIRST_SPREAD = 0.3  # of the known rows' spread, for the first values of new rows: at the full spread a pretrained model's
# first loss is that of confident guesses, and the first steps go into taking these back
EVAL_BEAMS = 20  # of the recommendations measured during training: HR@10 with twice as many beams
FREEZE_TASKS = ("sid_sid",)  # what freeze mode trains on unless told: at equal time the other four cost it recommendations
BEST_METRICS = ("eval_loss", "eval_hr@10", "eval_ndcg@10")


# ---------------------------------------------------------------------------------------------- the vocabulary


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


def add_sid_tokens(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> list[int]:
    """Adds the tokens that the tokenizer lacks, as ordinary tokens that nothing normalizes; returns the ids it assigned.

    Every token is one id afterwards: InputError otherwise, or where a SID token is a piece of text to the tokenizer.
    """
    from tokenizers import AddedToken

    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    special = set(tokenizer.all_special_tokens)
    for token in tokens:
        if token in vocabulary and (token not in added or token in special):
            raise InputError(f"SID token {token!r} already means something else to the tokenizer; rename it in the index")
    new = [token for token in tokens if token not in vocabulary]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in new])
    for token in tokens:
        if len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1:
            raise InputError(f"SID token {token!r} is not one id after it was added; rename it in the index")
    return tokenizer.convert_tokens_to_ids(new)


def assert_sids_round_trip(tokenizer: PreTrainedTokenizerBase, catalogue: Catalogue) -> None:
    """Every item's SID as text is exactly its tokens to the tokenizer, alone and behind a line of text."""
    sids = sorted({item.sid for item in catalogue.items})
    for lead in ("", "x\n"):
        encoded = tokenizer([lead + "".join(sid) for sid in sids], add_special_tokens=False)["input_ids"]
        for sid, ids in zip(sids, encoded, strict=True):
            if tuple(tokenizer.convert_ids_to_tokens(ids[-len(sid) :])) != sid or (not lead and len(ids) != len(sid)):
                raise InputError(f"SID {''.join(sid)!r} does not survive the tokenizer; rename its tokens in the index")


def grow_embeddings(model: PreTrainedModel, vocab_size: int) -> None:
    """Gives the model a row for each token. Never shrinks: many models have more rows than their tokenizer has tokens.

    InputError where a further matrix grows with the vocabulary, of whose rows freeze mode would know nothing.
    """
    from sid_rows import tables_of

    before = {name: len(weight) for name, weight in model.named_parameters() if weight.dim()}
    rows = [len(weight) for weight in tables_of(model).values()]
    if vocab_size <= min(rows):
        return
    try:
        model.resize_token_embeddings(max(vocab_size, *rows), mean_resizing=False)
    except Exception as error:  # other people's code
        raise InputError(f"--base_model: {type(model).__name__} takes no new tokens ({error_text(error)[:100]})") from error
    known = {id(weight) for weight in tables_of(model).values()}
    for name, weight in model.named_parameters():
        if id(weight) not in known and weight.dim() == 2 and len(weight) > before[name]:
            raise InputError(f"--base_model: {type(model).__name__} has a further matrix with a row per token ({name})")


def init_rows(model: PreTrainedModel, ids: list[int], known: int, seed: int) -> None:
    """Gives the rows of newly assigned ids the mean of the first `known` rows, plus noise of FIRST_SPREAD of their spread.

    Each row is drawn for its own id, so it does not depend on which others are new.
    """
    import torch

    from sid_rows import tables_of

    known = min(known, min(ids, default=known))
    with torch.no_grad():
        for number, weight in enumerate(tables_of(model).values()):
            old = weight[:known].float()
            mean, spread = old.mean(0).cpu(), old.std(0).cpu()
            for token_id in ids:
                noise = torch.randn(
                    len(mean), generator=torch.Generator().manual_seed((seed << 34) + (token_id << 1) + number)
                )
                weight[token_id] = (mean + FIRST_SPREAD * spread * noise).to(weight)


# ---------------------------------------------------------------------------------------------- freezing


def freeze_llm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> SidRows:
    """Freezes the model but for the rows of the SID tokens, and logs what trains."""
    from sid_rows import SidRows

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


def rows_learning_rate(model: PreTrainedModel) -> float:
    """Freeze mode's default learning rate, from the width of the embedding."""
    width = model.get_input_embeddings().weight.shape[1]
    rate = float(f"{FREEZE_REACH / width:.2g}")
    logger.info(f"Learning rate {rate:g}: {FREEZE_REACH:g} over the model's width ({width})")
    return rate


def turn_dropout_off(model: PreTrainedModel) -> int:
    """Sets every dropout probability of the model to 0 and returns how many were not."""
    import torch

    count = 0
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0:
            module.p, count = 0.0, count + 1
        elif isinstance(value := getattr(module, "attention_dropout", 0.0), float) and value > 0:
            module.attention_dropout, count = 0.0, count + 1
    return count


def apply_sid_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Turns a base model and its tokenizer, in place, into those of a freeze run, from its sid_rows.safetensors.

    InputError when the rows were trained on another base model, or when the tokenizer gives the tokens other ids.
    """
    import torch

    from sid_rows import base_hash, read_rows_file, tables_of

    saved = read_rows_file(Path(path))
    if (found := base_hash(model, int(saved.ids[0]))) != saved.base_hash:
        raise InputError(f"{path}: was trained on another base model (hash {saved.base_hash}, this one's is {found})")
    add_sid_tokens(tokenizer, saved.tokens)
    if tokenizer.convert_tokens_to_ids(saved.tokens) != saved.ids.tolist():
        raise InputError(f"{path}: the tokenizer gives the SID tokens other ids; use the tokenizer of the base model")
    grow_embeddings(model, len(tokenizer))
    with torch.no_grad():
        for name, weight in tables_of(model).items():
            weight[saved.ids] = saved.rows[name].to(weight)


# ---------------------------------------------------------------------------------------------- loading and saving


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder under a temporary name to write into, which takes the old one's place when all went well.

    The old one is renamed first and deleted last, so one of the two is there whenever the process is killed.
    """
    scratch, old = (folder.with_name(folder.name + suffix) for suffix in (".tmp", ".old"))
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(scratch, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- the program


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
    tasks: str = "",
    prompts: str = "",
    sample: int = -1,
    eval_sample: int = -1,
    eval_recommendation: int = 0,
    metric_for_best_model: str = "eval_loss",
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
    eval_steps: float = 0.05,
    save_steps: float = 0.05,
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
        tasks: names, comma separated, of sid_sid, item, sid_title, title_title, title_sid, preference, preference_sid;
            default: the first five, with freeze_LLM sid_sid alone
        prompts: JSON file with wording of your own, task name -> template
        sample: random rows to train on per task; -1 for all
        eval_sample: random rows to evaluate on; -1 for all
        eval_recommendation: random rows of eval_file for which each evaluation measures HR@10 and NDCG@10; 0 for none
        metric_for_best_model: eval_loss, eval_hr@10 or eval_ndcg@10; decides the best checkpoint and early stopping
        cutoff_len: tokens of the longest example; longer ones lose their oldest items, never template or answer
        freeze_LLM: train only the rows of the SID tokens, leave the language model as it is
        frozen_prefix: in freeze mode, compute what no SID can change once and without gradients; the same result, faster
        train_from_scratch: random weights of the base model's shape
        num_epochs: passes over the training data
        max_steps: optimizer steps; overrides num_epochs when positive
        batch_size: examples per optimizer step over all processes; a multiple of micro_batch_size x processes
        micro_batch_size: examples per forward pass of one process; smaller needs less memory
        learning_rate: peak learning rate; default 3e-4, with freeze_LLM 2.4 over the model's width
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
        eval_steps: steps between two evaluations; below 1 a share of the run
        save_steps: steps between two checkpoints; below 1 a share of the run; a multiple of eval_steps
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

    from sid_rows import base_hash
    from trainer import SidTrainer

    quiet_other_ranks()
    transformers.set_seed(flags.seed)
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
    if len(new_ids) < len(tokens):
        logger.info(f"{len(tokens) - len(new_ids)} of {len(tokens)} SID tokens were there already and keep their rows")
    grow_embeddings(model, len(tokenizer))
    init_rows(model, new_ids, known_tokens, flags.seed)
    model.to(args.device, compute_dtype(flags, base_dtype))  # before the rows are copied, which stay beside it
    rows = freeze_llm(model, tokenizer, tokens) if flags.freeze_LLM else None
    if rows is None:
        total = sum(parameter.numel() for parameter in model.parameters())
        logger.info(f"Trainable parameters: {total:,} / {total:,} (100%)")
    elif flags.learning_rate is None:
        args.learning_rate = rows_learning_rate(model)
    flags.learning_rate = args.learning_rate  # what was left out is known by now, and the model card names it
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
        evaluator=recommendation_evaluator(flags, catalogue, wording, tokenizer),
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
            with contextlib.closing(read_rows(Path(path), catalogue)) as rows:
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
    flags: types.SimpleNamespace, catalogue: Catalogue, wording: dict[str, str], tokenizer: PreTrainedTokenizerBase
) -> Evaluator | None:
    """What measures recommendations at each evaluation, on a sample of the evaluation rows; None where not asked for."""
    if not flags.eval_recommendation:
        return None
    rows = sampled(list(read_rows(Path(flags.eval_file), catalogue)), flags.eval_recommendation, flags.seed)
    return Evaluator(
        tokenizer,
        catalogue,
        wording,
        rows,
        task=next(task for task in RECOMMENDING_TASKS if task in flags.tasks.split(",")),
        num_beams=EVAL_BEAMS,
        batch_size=flags.micro_batch_size,
        cutoff_len=flags.cutoff_len,
    )


def compute_dtype(flags: types.SimpleNamespace, base_dtype: torch.dtype) -> torch.dtype:
    """bfloat16 for a frozen model where bf16 is on; otherwise float32 (a model that trains whole keeps float32 weights)."""
    import torch

    if base_dtype == torch.float64:
        return base_dtype
    return torch.bfloat16 if flags.freeze_LLM and use_bf16(flags) else torch.float32


def use_bf16(flags: types.SimpleNamespace) -> bool:
    import torch

    return flags.bf16 if flags.bf16 is not None else torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def training_arguments(flags: types.SimpleNamespace) -> TrainingArguments:
    """The flags as HF TrainingArguments. One batch of the Trainer is one optimizer step: the trainer cuts it itself."""
    import torch
    from transformers import TrainingArguments

    if flags.wandb_project:
        os.environ["WANDB_PROJECT"] = flags.wandb_project
    evaluate = bool(flags.eval_file)
    interval = {"eval_steps": whole(flags.eval_steps), "save_steps": whole(flags.save_steps)}
    try:
        return TrainingArguments(
            output_dir=flags.output_dir,
            num_train_epochs=flags.num_epochs,
            max_steps=flags.max_steps,
            per_device_train_batch_size=flags.batch_size // world_size(),
            learning_rate=flags.learning_rate or FULL_LEARNING_RATE,
            weight_decay=flags.weight_decay,
            lr_scheduler_type=flags.lr_scheduler_type,
            warmup_steps=flags.warmup_steps,
            seed=flags.seed,
            bf16=use_bf16(flags) and not flags.freeze_LLM,
            use_cpu=not torch.accelerator.is_available(),
            logging_steps=flags.logging_steps,
            logging_nan_inf_filter=False,
            eval_strategy="steps" if evaluate else "no",
            save_strategy="steps",
            **interval,
            save_total_limit=2,
            load_best_model_at_end=evaluate,
            metric_for_best_model=flags.metric_for_best_model if evaluate else None,
            greater_is_better=flags.metric_for_best_model != "eval_loss" if evaluate else None,
            report_to="wandb" if flags.wandb_project else flags.report_to,
            run_name=flags.wandb_run_name or None,
            remove_unused_columns=False,
            average_tokens_across_devices=False,
        )
    except (ValueError, KeyError) as error:
        raise InputError(f"sft.py: {error_text(error)}") from None


def whole(steps: float) -> float | int:
    """A count of steps as an int, a share of the run as it is."""
    return int(steps) if steps >= 1 else steps


def early_stopping(flags: types.SimpleNamespace, eval_data: Dataset | None) -> list:
    from transformers import EarlyStoppingCallback

    wanted = eval_data is not None and flags.early_stopping_patience > 0
    return [EarlyStoppingCallback(flags.early_stopping_patience)] if wanted else []


def resume_point(flags: types.SimpleNamespace) -> str | bool | None:
    if not flags.resume_from_checkpoint:
        return None
    if flags.resume_from_checkpoint.lower() == "true":
        return True
    return flags.resume_from_checkpoint


def save_final(
    flags: types.SimpleNamespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: SidRows | None,
    wording: dict[str, str],
    base_dtype: torch.dtype,
    card: str,
) -> None:
    """Writes output_dir/final_checkpoint: a plain HF folder in the base model's dtype, with the wording beside it.

    Nothing unproven is left there: the base that a frozen model came from is loaded again and compared value by value, only
    its SID rows are set, and the folder is loaded once more and compared with the trained model.
    """
    from sid_rows import ROWS_FILE

    folder = Path(flags.output_dir) / "final_checkpoint"
    trained = rows.masters if rows else model.parameters()
    if not all(bool(values.isfinite().all()) for values in trained):
        raise InputError(
            "training ended with values that are no numbers, so no final_checkpoint was written; try a lower --learning_rate"
        )
    with whole_folder(folder) as scratch:
        if rows is None:
            final = model.to(base_dtype)
        else:
            final, digest = base_with_rows(flags, model, tokenizer, rows)
            rows.save(scratch / ROWS_FILE, digest)
        final.config.pad_token_id = tokenizer.pad_token_id
        final.save_pretrained(scratch)
        del final
        tokenizer.save_pretrained(scratch)
        content = {"category": category_name(flags.category), "tasks": flags.tasks.split(","), "prompts": wording}
        (scratch / PROMPTS_FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False))
        (scratch / "README.md").write_text(card, encoding="utf-8")
        check_saved(scratch, model, rows, trust_remote_code=flags.trust_remote_code)
    logger.info(f"Saved the model and tokenizer to {folder}")


def base_with_rows(
    flags: types.SimpleNamespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: SidRows
) -> tuple[PreTrainedModel, str]:
    """The base model, loaded again, with the trained SID rows, and its hash before; proves that no frozen value moved."""
    from sid_rows import base_hash, differing_values, tables_of

    base = load_model(flags.base_model, from_scratch=False, trust_remote_code=flags.trust_remote_code)
    changed = sum(differing_values(model, base, rows.ids).values())
    logger.info(f"frozen values changed: {changed}")
    if changed:
        raise InputError(f"{changed} frozen values changed in training; no final_checkpoint was written")
    digest = base_hash(base, int(rows.ids[0]))
    sizes = {name: len(weight) for name, weight in tables_of(base).items()}
    grow_embeddings(base, len(tokenizer))
    trained, tables = tables_of(model), tables_of(base)
    for name, size in sizes.items():
        tables[name].data[size:] = trained[name].data[size:].to(tables[name])
    for name, _, master in rows.tables:
        tables[name].data[rows.ids.cpu()] = master.data.to(tables[name])
    return base, digest


def check_saved(folder: Path, model: PreTrainedModel, rows: SidRows | None, *, trust_remote_code: bool) -> None:
    """InputError unless a saved folder, loaded again, holds the trained model's values, and the SID rows' masters."""
    import torch

    from sid_rows import differing_values, tables_of

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


# ---------------------------------------------------------------------------------------------- flags


def check_flags(values: dict[str, Any]) -> types.SimpleNamespace:
    """The flags with the types of train()'s signature, checked one by one and against each other, before anything loads."""
    flags = typed_flags(train, values)
    chosen = [name.strip() for name in flags.tasks.split(",") if name.strip()]
    flags.tasks = ",".join(chosen or (FREEZE_TASKS if flags.freeze_LLM else DEFAULT_TASKS))
    check_ranges(flags)
    check_tasks(flags)
    check_paths(flags)
    check_distribution(flags)
    return flags


def check_ranges(flags: types.SimpleNamespace) -> None:
    limits = {
        "num_epochs": 0,
        "batch_size": 1,
        "micro_batch_size": 1,
        "cutoff_len": 2,
        "learning_rate": 0,
        "weight_decay": 0,
        "warmup_steps": 0,
        "logging_steps": 1,
        "eval_steps": 0,
        "save_steps": 0,
        "early_stopping_patience": 0,
        "eval_recommendation": 0,
        "seed": 0,
        "prefix_cache_gb": 0,
        "num_proc": 1,
    }
    above = ("num_epochs", "learning_rate", "eval_steps", "save_steps")
    for name, least in limits.items():
        value = getattr(flags, name)
        if value is not None and (value < least or (name in above and value == least)):
            raise InputError(f"sft.py: --{name} {value:g} must be {'above' if name in above else 'at least'} {least}")
    for name in ("sample", "eval_sample", "max_steps"):
        value = getattr(flags, name)
        if value == 0 or value < -1:
            raise InputError(f"sft.py: --{name} {value} must be positive, or -1 for no limit")
    for name in ("eval_steps", "save_steps"):
        value = getattr(flags, name)
        if value > 1 and value != int(value):
            raise InputError(f"sft.py: --{name} {value:g} must be a whole number of steps, or a share of the run below 1")
    if flags.eval_file and not math.isclose(ratio := flags.save_steps / flags.eval_steps, max(1, round(ratio))):
        raise InputError(
            f"sft.py: --save_steps {flags.save_steps:g} is no multiple of --eval_steps {flags.eval_steps:g}; "
            "the best checkpoint must have been both evaluated and saved"
        )
    if flags.batch_size % (flags.micro_batch_size * world_size()):
        raise InputError(
            f"sft.py: --batch_size {flags.batch_size} is no multiple of micro_batch_size x processes = "
            f"{flags.micro_batch_size} x {world_size()}"
        )


def check_tasks(flags: types.SimpleNamespace) -> None:
    groups = flags.tasks.split(",")
    if flags.eval_recommendation and not flags.eval_file:
        raise InputError("sft.py: --eval_recommendation needs --eval_file")
    if flags.eval_recommendation and not set(groups) & set(RECOMMENDING_TASKS):
        raise InputError(f"sft.py: --eval_recommendation needs one of {', '.join(RECOMMENDING_TASKS)} in --tasks")
    if flags.metric_for_best_model not in BEST_METRICS:
        raise InputError(
            f"sft.py: --metric_for_best_model {flags.metric_for_best_model!r}; expected one of {', '.join(BEST_METRICS)}"
        )
    if flags.metric_for_best_model != "eval_loss" and not flags.eval_recommendation:
        raise InputError(
            f"sft.py: --metric_for_best_model {flags.metric_for_best_model} is measured with --eval_recommendation only"
        )
    for group in groups:
        if group not in TASK_GROUPS:
            raise InputError(
                f"sft.py: --tasks has {group!r}{suggestion(group, TASK_GROUPS)}; the tasks are {', '.join(TASK_GROUPS)}"
            )
    if len(set(groups)) < len(groups):
        raise InputError(f"sft.py: --tasks {flags.tasks} names a task twice")
    needed = {"interactions": "train_file", "preferences": "preference_file"}
    for task in TASKS.values():
        if task.group not in groups:
            continue
        if task.rows in needed and not getattr(flags, needed[task.rows]):
            raise InputError(f"sft.py: --{needed[task.rows]} is missing; the task {task.group} needs it")
        if "title" in (task.shows, task.answers) and not flags.item_meta_path:
            raise InputError(
                f"sft.py: --item_meta_path is missing; the task {task.group} needs titles (or leave it out of --tasks)"
            )


def check_paths(flags: types.SimpleNamespace) -> None:
    for name in ("base_model", "sid_index_path", "output_dir"):
        if not getattr(flags, name):
            raise InputError(f"sft.py: --{name} is missing")
    for name in ("train_file", "eval_file", "sid_index_path", "item_meta_path", "preference_file", "prompts"):
        path = getattr(flags, name)
        if path and not Path(path).is_file():
            raise InputError(f"sft.py: --{name} {path}: there is no such file")
    base = Path(flags.base_model)
    if base.is_dir() and not (base / "config.json").is_file():
        raise InputError(f"sft.py: --base_model {base}: the folder has no config.json; expected a saved HF model")
    if not base.exists() and (flags.base_model.startswith((".", "/", "~")) or flags.base_model.count("/") > 1):
        raise InputError(f"sft.py: --base_model {base}: there is no such folder")
    if flags.prefix_cache_in not in ("device", "host") and not Path(flags.prefix_cache_in).is_dir():
        raise InputError(
            f"sft.py: --prefix_cache_in {flags.prefix_cache_in}: is neither device nor host, and there is no such folder"
        )
    if Path(flags.output_dir).is_file():
        raise InputError(f"sft.py: --output_dir {flags.output_dir}: is a file")
    resume = flags.resume_from_checkpoint
    if resume.lower() == "true" and not any(Path(flags.output_dir).glob("checkpoint-*")):
        raise InputError(f"sft.py: --resume_from_checkpoint True, but {flags.output_dir} has no checkpoint")
    if resume and resume.lower() != "true" and not (Path(resume) / "trainer_state.json").is_file():
        raise InputError(
            f"sft.py: --resume_from_checkpoint {resume}: is no checkpoint folder (it has no trainer_state.json)"
        )


def check_distribution(flags: types.SimpleNamespace) -> None:
    """Refuses what would silently train the wrong thing."""
    if flags.train_from_scratch and flags.freeze_LLM:
        raise InputError("sft.py: --train_from_scratch with --freeze_LLM would freeze random weights; choose one")
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            why = (
                "never calls the gradient hook that keeps the other rows frozen" if flags.freeze_LLM else "is not supported"
            )
            raise InputError(f"sft.py: {name} {why}; start with torchrun (as sft.sh does), not with an {name} configuration")


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
