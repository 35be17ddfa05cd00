"""How well a checkpoint recommends: constrained HR@K and NDCG@K beside simple baselines; `--help` lists the flags.

    python evaluate.py --base_model run/final_checkpoint --test_file X.test.csv --sid_index_path X.index.json \
        --item_meta_path X.item.json --train_file X.train.csv --examples 5
    python evaluate.py --base_model run/final_checkpoint --sid_index_path X.index.json --item_meta_path X.item.json \
        --recommend "Scotch Vinyl Electrical Tape | 278"

rows -> prompts (the checkpoint's wording) -> constrained beams -> ranked SIDs -> metrics, predictions, picture
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sid_sft.catalogue import Catalogue, read_catalogue
from sid_sft.checkpoint import (
    PROMPTS_FILE,
    Wording,
    beams_beyond,
    fit_cutoff,
    load_model,
    load_tokenizer,
    model_positions,
    read_wording,
)
from sid_sft.command_line import command, rank, run, tell, world_size
from sid_sft.faults import memory_in_one_line
from sid_sft.files import InputError, cut, shown
from sid_sft.finite import check_finite
from sid_sft.flag_checks import check_evaluating
from sid_sft.interactions import Row, read_rows
from sid_sft.output_folder import OutputFolder
from sid_sft.process_groups import process_groups_left
from sid_sft.recommend.answers import answers_of, write_answers
from sid_sft.recommend.evaluator import RECOMMENDING_TASKS, Evaluator, sampled
from sid_sft.recommend.histories import Histories, read_histories
from sid_sft.recommend.named_items import find_in_catalogue, split_history
from sid_sft.recommend.ranking import item_popularity, sid_table
from sid_sft.recommend.results import RESULT_FILES, free_rows, in_words, write_results
from sid_sft.serving.export import export_serving
from sid_sft.settings import EvaluateFlags, answers_path, results_folder
from sid_sft.tasks import DEFAULT_TASKS, TASKS, category_name, read_prompts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("sft.evaluate")


@command(EvaluateFlags)
def evaluate(flags: EvaluateFlags) -> None:
    """Measure how well a checkpoint recommends, or ask it for recommendations."""
    check_evaluating(flags)
    flags = dataclasses.replace(flags, output_dir=str(results_folder(flags)))
    outputs = outputs_of(flags)
    if outputs:
        outputs.check()
    catalogue = read_catalogue(Path(flags.sid_index_path), Path(flags.item_meta_path) if flags.item_meta_path else None)
    wording = wording_of(flags)
    task = task_of(flags, wording)
    train = rows_of(flags.train_file, catalogue, flags) if flags.train_file else []
    if flags.export_serving:
        export(flags, catalogue, wording, task, train)
        return
    histories = None
    if flags.recommend:
        history = tuple(find_in_catalogue(text, catalogue) for text in split_history(flags.recommend, catalogue))
        rows = [Row("", history, history[-1])]
    elif flags.recommend_file:
        file, shows = Path(flags.recommend_file), TASKS[task].shows
        histories = read_histories(file, catalogue, shows=shows, max_left_out=flags.max_left_out)
        rows = [row for row in histories.rows if row]
    else:
        rows = sampled(rows_of(flags.test_file, catalogue, flags), flags.sample, flags.seed)
    positions = model_positions(flags.base_model, trust_remote_code=flags.trust_remote_code)
    cutoff_len = fit_cutoff(flags.cutoff_len, positions and positions - beams_beyond(catalogue))
    cure = f"try --batch_size {max(1, flags.batch_size // 2)} or fewer --num_beams"
    held = outputs.held("evaluate.py") if outputs and rank() == 0 else contextlib.nullcontext()
    with held, memory_in_one_line(cure), process_groups_left():
        recommend_and_measure(flags, catalogue, wording.prompts, task, rows, histories, train, cutoff_len)


def recommend_and_measure(
    flags: EvaluateFlags,
    catalogue: Catalogue,
    prompts: dict[str, str],
    task: str,
    rows: list[Row],
    histories: Histories | None,
    train: list[Row],
    cutoff_len: int,
) -> None:
    """Recommends for the rows, and tells what was found: in words with --recommend, in a file with --recommend_file, whose
    histories are given, as metrics and files otherwise."""
    import torch

    quiet_transformers()
    tokenizer = load_tokenizer(flags.base_model, trust_remote_code=flags.trust_remote_code)
    check_vocabulary(tokenizer, catalogue, flags)
    device = own_device()
    if world_size() > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model = load_model(flags.base_model, trust_remote_code=flags.trust_remote_code)
    if device.type == "cpu":
        model = model.float()  # what a bf16 file holds is exact in float32, and CPUs are no faster at less
    check_finite(model, f"--base_model {flags.base_model}")
    check_rows_of(model, tokenizer, catalogue, flags)
    model.to(device).eval()
    evaluator = Evaluator(
        tokenizer,
        catalogue,
        prompts,
        rows,
        task=task,
        num_beams=flags.num_beams,
        batch_size=flags.batch_size,
        cutoff_len=cutoff_len,
        exclude_history=flags.exclude_history,
        model_name=f"--base_model {flags.base_model}",
    )
    started = time.monotonic()
    recommended = evaluator.recommend(model, progress=not flags.recommend)
    seconds = time.monotonic() - started
    table = sid_table(catalogue, item_popularity(train))
    if rank() == 0:
        if not flags.recommend:
            speed = f"{seconds:.1f} s, {len(rows) / seconds:,.0f} rows/s"
            logger.info(f"{len(rows):,} rows x {flags.num_beams} beams in {speed}")
        if flags.recommend:
            tell(in_words(rows[0], recommended.sid[0], recommended.score[0], catalogue, table, truth=False))
        elif histories:
            path = answers_path(flags)
            write_answers(path, answers_of(histories, recommended, catalogue, table), histories.users)
            logger.info(f"Wrote {len(histories.rows):,} rows to {path}")
        else:
            free = free_rows(evaluator, model, flags.seed)
            write_results(flags, task, rows, train, catalogue, table, recommended, free, seconds)


def export(flags: EvaluateFlags, catalogue: Catalogue, wording: Wording, task: str, train: list[Row]) -> None:
    """--export_serving: the folder for an inference server."""
    quiet_transformers()
    tokenizer = load_tokenizer(flags.base_model, trust_remote_code=flags.trust_remote_code)
    check_vocabulary(tokenizer, catalogue, flags)
    table = sid_table(catalogue, item_popularity(train))
    if rank() == 0:
        export_serving(
            Path(flags.export_serving),
            Path(flags.base_model),
            tokenizer,
            catalogue,
            table,
            wording,
            task,
            trust_remote_code=flags.trust_remote_code,
        )


def quiet_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def outputs_of(flags: EvaluateFlags) -> OutputFolder | None:
    """The folder that the results go to; None where the answer is told, or a folder of its own is written."""
    if flags.recommend or flags.export_serving:
        return None
    if not flags.recommend_file:
        return OutputFolder(Path(flags.output_dir), RESULT_FILES)
    path = answers_path(flags)
    return OutputFolder(
        path.parent, (path.name,), flag="recommendations_file" if flags.recommendations_file else "output_dir"
    )


def rows_of(path: str, catalogue: Catalogue, flags: EvaluateFlags) -> list[Row]:
    return list(read_rows(Path(path), catalogue, max_left_out=flags.max_left_out))


def own_device() -> torch.device:
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def wording_of(flags: EvaluateFlags) -> Wording:
    """The wording that the checkpoint was trained with; the shipped one, said so, where it has none."""
    wording = read_wording(Path(flags.base_model))
    if wording is not None:
        return wording
    logger.warning(
        f"{flags.base_model} has no {PROMPTS_FILE}: the prompts are the shipped ones for --category "
        f"{shown(flags.category)}; a model that was trained with others does worse on them"
    )
    return Wording(category_name(flags.category), list(DEFAULT_TASKS), read_prompts(None, flags.category))


def task_of(flags: EvaluateFlags, wording: Wording) -> str:
    known = [name for name in RECOMMENDING_TASKS if name in wording.tasks]
    task = flags.task or (known[0] if known else RECOMMENDING_TASKS[0])
    if task not in wording.tasks:
        logger.warning(f"{flags.base_model} was trained on {', '.join(wording.tasks)}, not on the task {task} it is asked")
    if TASKS[task].shows == "title" and not flags.item_meta_path:
        raise InputError(f"--item_meta_path is missing; the task {task} shows titles")
    return task


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, catalogue: Catalogue, flags: EvaluateFlags) -> None:
    """Every SID token of the index is a token of the checkpoint, or the two do not belong together."""
    tokens = sorted({token for item in catalogue.items for token in item.sid})
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in tokens if token not in vocabulary]
    if len(missing) == len(tokens):
        raise InputError(
            f"--base_model {flags.base_model}: its tokenizer knows no SID token of {flags.sid_index_path} "
            f"(e.g. {cut(missing[0])}); expected a checkpoint trained on them, like the final_checkpoint/ of sft.py"
        )
    if missing:
        raise InputError(
            f"--sid_index_path {flags.sid_index_path}: {len(missing)} of its {len(tokens)} SID tokens "
            f"(e.g. {cut(missing[0])}) are unknown to {flags.base_model}; give the index that the model was trained with"
        )


def check_rows_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, catalogue: Catalogue, flags: EvaluateFlags
) -> None:
    """The embedding has a row for every SID token; one that was not grown would fail much later, and not in words."""
    tokens = {token for item in catalogue.items for token in item.sid}
    highest, size = max(tokenizer.convert_tokens_to_ids(sorted(tokens))), len(model.get_input_embeddings().weight)
    if highest >= size:
        raise InputError(
            f"--base_model {flags.base_model}: its tokenizer goes up to id {highest}, but its embedding has {size} "
            "rows; the folder mixes two models"
        )


def main(arguments: list[str]) -> int:
    return run(evaluate, arguments, program="evaluate.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
