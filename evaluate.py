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
import difflib
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
from sid_sft.files import InputError, cut, one_line, shown
from sid_sft.finite import check_finite
from sid_sft.flag_checks import check_evaluating
from sid_sft.interactions import Row, read_rows
from sid_sft.output_folder import OutputFolder
from sid_sft.recommend.evaluator import RECOMMENDING_TASKS, Evaluator, sampled
from sid_sft.recommend.ranking import item_popularity, sid_table
from sid_sft.recommend.results import RESULT_FILES, free_rows, in_words, short, write_results
from sid_sft.settings import EvaluateFlags, results_folder
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
    outputs = OutputFolder(Path(flags.output_dir), RESULT_FILES)
    if not flags.recommend:
        outputs.check()
    catalogue = read_catalogue(Path(flags.sid_index_path), Path(flags.item_meta_path) if flags.item_meta_path else None)
    wording = wording_of(flags)
    task = task_of(flags, wording)
    if flags.recommend:
        history = tuple(find_in_catalogue(text, catalogue) for text in split_history(flags.recommend, catalogue))
        rows = [Row("", history, history[-1])]
    else:
        rows = sampled(rows_of(flags.test_file, catalogue, flags), flags.sample, flags.seed)
    train = rows_of(flags.train_file, catalogue, flags) if flags.train_file else []
    positions = model_positions(flags.base_model, trust_remote_code=flags.trust_remote_code)
    cutoff_len = fit_cutoff(flags.cutoff_len, positions and positions - beams_beyond(catalogue))
    writes = rank() == 0 and not flags.recommend
    cure = f"try --batch_size {max(1, flags.batch_size // 2)} or fewer --num_beams"
    with outputs.held("evaluate.py") if writes else contextlib.nullcontext(), memory_in_one_line(cure):
        recommend_and_measure(flags, catalogue, wording.prompts, task, rows, train, cutoff_len)


def recommend_and_measure(
    flags: EvaluateFlags,
    catalogue: Catalogue,
    prompts: dict[str, str],
    task: str,
    rows: list[Row],
    train: list[Row],
    cutoff_len: int,
) -> None:
    """Recommends for the rows, and tells what was found: in words with --recommend, as metrics and files otherwise."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
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
        model_name=f"--base_model {flags.base_model}",
    )
    started = time.monotonic()
    recommended = evaluator.recommend(model, progress=not flags.recommend)
    seconds = time.monotonic() - started
    table = sid_table(catalogue, item_popularity(train))
    if rank() == 0:
        if flags.recommend:
            tell(in_words(rows[0], recommended.sid[0], recommended.score[0], catalogue, table, truth=False))
        else:
            logger.info(
                f"{len(rows):,} rows x {flags.num_beams} beams in {seconds:.1f} s, {len(rows) / seconds:,.0f} rows/s"
            )
            free = free_rows(evaluator, model, flags.seed)
            write_results(flags, task, rows, train, catalogue, table, recommended, free, seconds)
    if world_size() > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


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


def split_history(text: str, catalogue: Catalogue) -> list[str]:
    """'Wood glue | 278' -> ['Wood glue', '278']; ids alone may be separated by commas or spaces."""
    pieces = text.replace(",", " ").split()
    if "|" not in text and len(pieces) > 1 and all(piece in catalogue.position for piece in pieces):
        return pieces
    pieces = [one_line(piece) for piece in text.split("|") if piece.strip()]
    if not pieces:
        raise InputError(f"--recommend {shown(text)}: names no item; expected titles or item ids, separated by |")
    return pieces


def find_in_catalogue(text: str, catalogue: Catalogue) -> int:
    """The place of the item that is meant by an id, a title, or a part of one title alone; case does not matter."""
    if text in catalogue.position:
        return catalogue.position[text]
    wanted = text.casefold()
    titles = [item.title.casefold() for item in catalogue.items]
    matches = [place for place, title in enumerate(titles) if title == wanted]
    matches = matches or [place for place, title in enumerate(titles) if wanted in title]
    if len(matches) == 1:
        return matches[0]
    named = [f"{cut(catalogue.items[place].id)} ({short(catalogue.items[place].title, 60)})" for place in matches[:3]]
    if matches:
        raise InputError(
            f"--recommend {shown(text)}: is in the titles of {len(matches)} items, among them {', '.join(named)}; "
            "give an id or more of the title"
        )
    if not any(titles):
        raise InputError(f"--recommend {shown(text)}: is no item id, and without --item_meta_path items have no titles")
    close = difflib.get_close_matches(wanted, titles, n=1, cutoff=0.4)
    hint = f"; the closest is {shown(catalogue.items[titles.index(close[0])].title)}" if close else ""
    raise InputError(f"--recommend {shown(text)}: is no item id and in no title{hint}")


def main(arguments: list[str]) -> int:
    return run(evaluate, arguments, program="evaluate.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
