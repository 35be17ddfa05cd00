"""How well a checkpoint recommends: constrained HR@K and NDCG@K beside simple baselines; `--help` lists the flags.

    python evaluate.py --base_model run/final_checkpoint --test_file X.test.csv --sid_index_path X.index.json \
        --item_meta_path X.item.json --train_file X.train.csv --examples 5
    python evaluate.py --base_model run/final_checkpoint --sid_index_path X.index.json --item_meta_path X.item.json \
        --recommend "Scotch Vinyl Electrical Tape | 278"

rows -> prompts (the checkpoint's wording) -> constrained beams -> ranked SIDs -> metrics, predictions, picture
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
import time
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sid_sft.catalogue import Catalogue, read_catalogue
from sid_sft.checkpoint import (
    PROMPTS_FILE,
    Wording,
    beams_beyond,
    check_base_model,
    fit_cutoff,
    load_model,
    load_tokenizer,
    model_positions,
    read_wording,
)
from sid_sft.command_line import rank, run, tell, typed_flags, world_size
from sid_sft.files import InputError, one_line
from sid_sft.interactions import MAX_LEFT_OUT, Row, read_rows
from sid_sft.recommend.evaluator import RECOMMENDING_TASKS, Evaluator, sampled
from sid_sft.recommend.ranking import item_popularity, sid_table
from sid_sft.recommend.results import free_rows, in_words, short, write_results
from sid_sft.tasks import DEFAULT_TASKS, TASKS, category_name, read_prompts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("sft.evaluate")


def evaluate(
    *,
    base_model: str = "",
    test_file: str = "",
    sid_index_path: str = "",
    item_meta_path: str = "",
    train_file: str = "",
    output_dir: str = "",
    num_beams: int = 50,
    batch_size: int = 32,
    sample: int = -1,
    seed: int = 42,
    examples: int = 0,
    recommend: str = "",
    task: str = "",
    category: str = "",
    cutoff_len: int = 512,
    max_left_out: float = MAX_LEFT_OUT,
    trust_remote_code: bool = False,
) -> None:
    """Measure how well a checkpoint recommends, or ask it for recommendations.

    Args:
        base_model: folder or hub name of a trained model, e.g. the final_checkpoint/ of sft.py
        test_file: CSV of interactions to evaluate on
        sid_index_path: the .index.json, item id -> SID tokens, that the model was trained with
        item_meta_path: the .item.json with titles, for recommendations in words and for the task title_sid
        train_file: CSV that was trained on, for the baselines and for how popular an item is
        output_dir: where metrics.json, predictions.jsonl and recommendations.png go; default: evaluation/ in base_model
        num_beams: recommendations per row; HR@K is measured for K up to it
        batch_size: rows per forward pass of one process
        sample: random rows to evaluate on; -1 for all
        seed: decides the sample, the examples and the bootstrap
        examples: rows to show in words: history, truth, recommendations
        recommend: a history, titles or item ids, oldest first, separated by |; answers and stops
        task: sid_sid (history as SIDs) or title_sid (as titles); default: the first that the model was trained on
        category: words for the prompts of a checkpoint that has no prompts.json
        cutoff_len: tokens of the longest example, as in training; longer ones lose their oldest items
        max_left_out: share of a file's rows that may be left out before the evaluation stops; 1 allows any share
        trust_remote_code: run code that comes with the model
    """
    flags = check_flags(locals())
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
    flags.cutoff_len = fit_cutoff(flags.cutoff_len, positions and positions - beams_beyond(catalogue))

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
    check_rows_of(model, tokenizer, catalogue, flags)
    model.to(device).eval()
    evaluator = Evaluator(
        tokenizer,
        catalogue,
        wording.prompts,
        rows,
        task=task,
        num_beams=flags.num_beams,
        batch_size=flags.batch_size,
        cutoff_len=flags.cutoff_len,
        model_name=f"--base_model {flags.base_model}",
    )
    started = time.monotonic()
    recommended = evaluator.recommend(model, progress=not flags.recommend)
    seconds = time.monotonic() - started
    table = sid_table(catalogue, item_popularity(train))
    if rank() == 0:
        if flags.recommend:
            tell("\n".join(in_words(rows[0], recommended.sid[0], recommended.score[0], catalogue, table, truth=False)))
        else:
            logger.info(
                f"{len(rows):,} rows x {flags.num_beams} beams in {seconds:.1f} s, {len(rows) / seconds:,.0f} rows/s"
            )
            free = free_rows(evaluator, model, flags.seed)
            write_results(flags, task, rows, train, catalogue, table, recommended, free, seconds)
    if world_size() > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def rows_of(path: str, catalogue: Catalogue, flags: types.SimpleNamespace) -> list[Row]:
    return list(read_rows(Path(path), catalogue, max_left_out=flags.max_left_out))


def own_device() -> torch.device:
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def check_flags(values: dict[str, Any]) -> types.SimpleNamespace:
    """The flags in their types, checked before anything heavy loads."""
    flags = typed_flags(evaluate, values)
    check_base_model(flags.base_model)
    required = ("sid_index_path",) if flags.recommend else ("sid_index_path", "test_file")
    for name in required:
        if not getattr(flags, name):
            raise InputError(f"--{name} is missing")
    for name in ("test_file", "train_file", "sid_index_path", "item_meta_path"):
        path = getattr(flags, name)
        if path and not Path(path).is_file():
            raise InputError(f"--{name} {path}: there is no such file")
    for name, least in {"num_beams": 1, "batch_size": 1, "examples": 0, "seed": 0, "cutoff_len": 2}.items():
        if getattr(flags, name) < least:
            raise InputError(f"--{name} {getattr(flags, name)} must be at least {least}")
    if not 0 <= flags.max_left_out <= 1:
        raise InputError(f"--max_left_out {flags.max_left_out:g} must be a share of the rows, from 0 to 1")
    if flags.sample == 0 or flags.sample < -1:
        raise InputError(f"--sample {flags.sample} must be positive, or -1 for no limit")
    if flags.task and flags.task not in RECOMMENDING_TASKS:
        raise InputError(f"--task {flags.task!r} recommends nothing; expected one of {', '.join(RECOMMENDING_TASKS)}")
    if not flags.output_dir:
        local = Path(flags.base_model)
        flags.output_dir = str(local / "evaluation" if local.is_dir() else "evaluation")
    if Path(flags.output_dir).is_file():
        raise InputError(f"--output_dir {flags.output_dir}: is a file")
    return flags


def wording_of(flags: types.SimpleNamespace) -> Wording:
    """The wording that the checkpoint was trained with; the shipped one, said so, where it has none."""
    wording = read_wording(Path(flags.base_model))
    if wording is not None:
        return wording
    logger.warning(
        f"{flags.base_model} has no {PROMPTS_FILE}: the prompts are the shipped ones for --category "
        f"{flags.category!r}; a model that was trained with others does worse on them"
    )
    return Wording(category_name(flags.category), list(DEFAULT_TASKS), read_prompts(None, flags.category))


def task_of(flags: types.SimpleNamespace, wording: Wording) -> str:
    known = [name for name in RECOMMENDING_TASKS if name in wording.tasks]
    task = flags.task or (known[0] if known else RECOMMENDING_TASKS[0])
    if task not in wording.tasks:
        logger.warning(f"{flags.base_model} was trained on {', '.join(wording.tasks)}, not on the task {task} it is asked")
    if TASKS[task].shows == "title" and not flags.item_meta_path:
        raise InputError(f"--item_meta_path is missing; the task {task} shows titles")
    return task


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, catalogue: Catalogue, flags: types.SimpleNamespace) -> None:
    """Every SID token of the index is a token of the checkpoint, or the two do not belong together."""
    tokens = sorted({token for item in catalogue.items for token in item.sid})
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in tokens if token not in vocabulary]
    if len(missing) == len(tokens):
        raise InputError(
            f"--base_model {flags.base_model}: its tokenizer knows no SID token of {flags.sid_index_path} "
            f"(e.g. {missing[0]}); expected a checkpoint trained on them, like the final_checkpoint/ of sft.py"
        )
    if missing:
        raise InputError(
            f"--sid_index_path {flags.sid_index_path}: {len(missing)} of its {len(tokens)} SID tokens "
            f"(e.g. {missing[0]}) are unknown to {flags.base_model}; give the index that the model was trained with"
        )


def check_rows_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, catalogue: Catalogue, flags: types.SimpleNamespace
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
        raise InputError(f"--recommend {text!r}: names no item; expected titles or item ids, separated by |")
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
    named = [f"{catalogue.items[place].id} ({short(catalogue.items[place].title, 60)})" for place in matches[:3]]
    if matches:
        raise InputError(
            f"--recommend {text!r}: is in the titles of {len(matches)} items, among them {', '.join(named)}; "
            "give an id or more of the title"
        )
    if not any(titles):
        raise InputError(f"--recommend {text!r}: is no item id, and without --item_meta_path items have no titles")
    close = difflib.get_close_matches(wanted, titles, n=1, cutoff=0.4)
    hint = f"; the closest is {catalogue.items[titles.index(close[0])].title!r}" if close else ""
    raise InputError(f"--recommend {text!r}: is no item id and in no title{hint}")


def main(arguments: list[str]) -> int:
    return run(evaluate, arguments, program="evaluate.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
