"""What measures recommendations at each evaluation of a run (--eval_recommendation)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sid_sft.checkpoint import beams_beyond
from sid_sft.interactions import read_rows
from sid_sft.recommend.evaluator import RECOMMENDING_TASKS, Evaluator, sampled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sid_sft.catalogue import Catalogue
    from sid_sft.settings import TrainFlags

EVAL_BEAMS = 20  # HR@10 with twice as many beams


def recommendation_evaluator(
    flags: TrainFlags,
    catalogue: Catalogue,
    wording: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
) -> Evaluator | None:
    """What measures recommendations at each evaluation, on a sample of the evaluation rows; None where not asked for."""
    if not flags.eval_recommendation:
        return None
    rows = list(read_rows(Path(flags.eval_file), catalogue, max_left_out=flags.max_left_out))
    return Evaluator(
        tokenizer,
        catalogue,
        wording,
        sampled(rows, flags.eval_recommendation, flags.seed),
        task=next(task for task in RECOMMENDING_TASKS if task in flags.task_names),
        num_beams=EVAL_BEAMS,
        batch_size=flags.micro_batch_size,
        cutoff_len=flags.cutoff_len if positions is None else min(flags.cutoff_len, positions - beams_beyond(catalogue)),
    )
