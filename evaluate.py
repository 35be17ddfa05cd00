"""How well a checkpoint recommends: constrained HR@K and NDCG@K beside simple baselines; `--help` lists the flags.

    python evaluate.py --base_model run/final_checkpoint --test_file X.test.csv --sid_index_path X.index.json \\
        --item_meta_path X.item.json --train_file X.train.csv --examples 5
    python evaluate.py --base_model run/final_checkpoint --sid_index_path X.index.json --item_meta_path X.item.json \\
        --recommend "Scotch Vinyl Electrical Tape | 278"

rows -> prompts (the checkpoint's wording) -> constrained beams -> ranked SIDs -> metrics, predictions, picture
"""

from __future__ import annotations

import contextlib
import difflib
import html
import json
import logging
import os
import sys
import time
import types
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from checkpoint import (
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
from data import (
    DEFAULT_TASKS,
    MAX_LEFT_OUT,
    TASKS,
    Catalogue,
    Encoder,
    InputError,
    Row,
    category_name,
    error_text,
    one_line,
    read_catalogue,
    read_prompts,
    read_rows,
)
from flags import rank, run, typed_flags, world_size
from ranking import (
    KS,
    Lists,
    SidTable,
    baselines,
    bootstrap,
    breadth,
    item_popularity,
    level_recall,
    means,
    ranks_of,
    row_values,
    sid_table,
    views,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from beam_search import Decoder

logger = logging.getLogger("sft.evaluate")

SHOWN = 10  # recommendations per row in predictions.jsonl and in words
FREE_ROWS = 200  # rows on which unconstrained generation is tried: enough to tell a share to a few per cent
TITLE_WIDTH = 96  # characters of a title in words
TRIAL_BEAMS = 4
TRIAL_TOLERANCE = 1e-3  # of a score, when the two decoders are compared; a low-precision model gets LOW_TOLERANCE
LOW_TOLERANCE = 3e-2
RECOMMENDING_TASKS = ("sid_sid", "title_sid")  # a history in, a SID out


# ---------------------------------------------------------------------------------------------- the model on some rows


class Recommended(NamedTuple):
    """sid (U, K): SID numbers, best first, -1 where there are no more; score (U, K): their log p."""

    sid: np.ndarray
    score: np.ndarray

    def lists(self) -> Lists:
        return [[number for number in row if number >= 0] for row in self.sid.tolist()]


class Evaluator:
    """Recommends for fixed rows with a model in whatever state it is.

    evaluator = Evaluator(tokenizer, catalogue, prompts, rows, num_beams=10, batch_size=32)
    evaluator.metrics(model)        # {"hr@10": 0.12, "ndcg@10": 0.08}, the same on every process

    Batches are cut from all rows before they are dealt to processes, so a row's numbers do not depend on how many
    processes there are. Every process must call, and every process gets the whole result.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        catalogue: Catalogue,
        prompts: dict[str, str],
        rows: list[Row],
        *,
        task: str = "sid_sid",
        num_beams: int = 10,
        batch_size: int = 32,
        cutoff_len: int = 512,
        model_name: str = "the model",
    ) -> None:
        from beam_search import common_template, score_sequences

        self.num_beams, self.end_id, self.model_name = num_beams, tokenizer.eos_token_id, model_name
        self.table = sid_table(catalogue, Counter())
        self.targets = [self.table.of_item[row.item] for row in rows]
        encoder = Encoder(tokenizer, catalogue, prompts, cutoff_len=cutoff_len)
        examples = encoder.encode(TASKS[task], rows)
        if None in examples:
            raise InputError(
                f"--cutoff_len {cutoff_len} is shorter than the template of task {task}, or an item has no title"
            )
        self.prompts = [np.array(example.input_ids[: example.prompt_len]) for example in examples]
        self.template = common_template(self.prompts)
        self.sids = [tuple(tokenizer.convert_tokens_to_ids(list(sid))) for sid in self.table.sids]
        self.sequences = score_sequences(self.sids, self.end_id)
        by_length = np.argsort([len(prompt) for prompt in self.prompts], kind="stable")
        self.batches = [by_length[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        self.make_decoder: Callable[[PreTrainedModel], Decoder] | None = None  # what serves the model, once it is tried

    def recommend(self, model: PreTrainedModel, *, progress: bool = False) -> Recommended:
        """The best SIDs for every row."""
        import torch

        from beam_search import build_trie, search

        trie = build_trie(self.sequences, model.device)
        width = min(self.num_beams, len(self.sequences))
        sid = torch.zeros(len(self.prompts), width, dtype=torch.int64, device=model.device)
        score = torch.zeros(len(self.prompts), width, dtype=torch.float64, device=model.device)
        with evaluating(model):
            decoder = self.decoder(model)
            for batch in self.own_batches(progress=progress):
                found = search(decoder, trie, [self.prompts[i] for i in batch], self.num_beams)
                sid[batch], score[batch] = found.leaf, found.score.double()
                if not can_rank(found.score):
                    break  # to where the processes meet: refused there, by all of them
        sum_over_processes(sid, score)  # a row is zero everywhere but where it was computed
        if not can_rank(score):
            raise InputError(not_finite(self.model_name, model))
        return Recommended(sid.cpu().numpy(), score.cpu().numpy())

    def recommend_freely(self, model: PreTrainedModel, rows: np.ndarray) -> list[list[tuple[int, ...]]]:
        """What a beam search that knows no catalogue writes for some rows: token ids up to the end token.

        It has as many beams as the constrained search can fill: with more, some would be no SID in any case.
        """
        from beam_search import search_freely

        levels, width = max(map(len, self.sids)), min(self.num_beams, len(self.sids))
        written = []
        with evaluating(model):
            decoder = self.decoder(model)
            size = len(self.batches[0])
            for start in range(0, len(rows), size):
                prompts = [self.prompts[i] for i in rows[start : start + size]]
                found = search_freely(decoder, prompts, width, levels=levels, end_id=self.end_id)
                written += [[self.before_end(tokens) for tokens in beams] for beams in found.tolist()]
        return written

    def before_end(self, tokens: list[int]) -> tuple[int, ...]:
        return tuple(tokens[: tokens.index(self.end_id)] if self.end_id in tokens else tokens)

    def metrics(self, model: PreTrainedModel) -> dict[str, float]:
        """HR@K and NDCG@K at SID level for the K that the beams allow."""
        ranks = ranks_of(self.recommend(model).lists(), self.targets)
        values = row_values(ranks, measurable(self.num_beams))
        return {name: value for name, value in means(values).items() if not name.startswith("mrr")}

    def own_batches(self, *, progress: bool) -> Iterator[np.ndarray]:
        """This process's batches; rank 0 may show how far it is."""
        from tqdm import tqdm

        processes, process = place_among_processes()
        own = self.batches[process::processes]
        yield from tqdm(own, desc="Recommending", unit="batch", disable=not progress or process > 0)

    def decoder(self, model: PreTrainedModel) -> Decoder:
        if self.make_decoder is None:
            self.make_decoder = self.choose_decoder(model)
        return self.make_decoder(model)

    def choose_decoder(self, model: PreTrainedModel) -> Callable[[PreTrainedModel], Decoder]:
        """The fastest decoder with which two rows get the scores of the model's own forward; says where it is a slow one."""
        import torch

        from architecture import why_not_exact
        from beam_search import OwnForwardDecoder, WholeSequenceDecoder, build_trie, search

        trie = build_trie(self.sequences, model.device)
        two = [self.prompts[i] for i in self.batches[0][:2]]
        expected = search(OwnForwardDecoder(model), trie, two, TRIAL_BEAMS).score
        if not can_rank(expected):
            raise InputError(not_finite(self.model_name, model))
        tolerance = TRIAL_TOLERANCE if model.dtype in (torch.float32, torch.float64) else LOW_TOLERANCE
        ways = (
            ("Beams do not share a prompt's keys and values", self.shared_decoder, why_not_exact(model)),
            ("Beams go through the model's own forward", WholeSequenceDecoder, ""),
        )
        for otherwise, make, reason in ways:
            if not reason:
                try:
                    found = search(make(model), trie, two, TRIAL_BEAMS).score
                    difference = float(((found - expected).abs() / expected.abs().clamp(min=1)).max())
                    if difference <= tolerance:
                        return make
                    reason = f"scores differ by {difference:.0e}"
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # other people's code: what it does not take is a reason to go another way
                    reason = f"{type(error).__name__}: {error_text(error)[:100]}"
            logger.info(f"{otherwise} ({reason}); this is slow, the result is right")
        return OwnForwardDecoder

    def shared_decoder(self, model: PreTrainedModel) -> Decoder:
        from beam_search import SharedPromptDecoder

        return SharedPromptDecoder(model, self.template)


def can_rank(score: torch.Tensor) -> bool:
    """Whether the best scores (U, K) of every row are numbers; topk takes a NaN for the greatest, so it stands first."""
    return bool(score[:, 0].isfinite().all())


def not_finite(name: str, model: PreTrainedModel) -> str:
    """What to tell of a model whose scores are NaN or infinite."""
    broken = {weight: int((~values.isfinite()).sum()) for weight, values in model.named_parameters()}
    broken = {weight: count for weight, count in broken.items() if count}
    if not broken:
        dtype = str(model.dtype).removeprefix("torch.")
        return (
            f"{name}: its weights are finite but overflow in {dtype}, so nothing can be ranked; take an earlier checkpoint"
            + (", or save the model in float32" if dtype == "float16" else "")
        )
    first, *others = broken
    more = f" (as do {len(others)} more weights)" if others else ""
    return (
        f"{name}: {first} holds {broken[first]:,} values that are NaN or infinite{more}, so nothing can be ranked; "
        "take an earlier checkpoint, or train with a lower --learning_rate"
    )


def measurable(num_beams: int) -> tuple[int, ...]:
    """The K for which so many recommendations tell HR@K."""
    return tuple(k for k in KS if k <= num_beams)


def main_k(ks: Sequence[int]) -> int:
    """The K in the words that a run ends with: 10 where there are so many beams, the largest below otherwise."""
    return max(k for k in ks if k <= 10)


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode and without gradients; afterwards in the mode it was in."""
    import torch

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def place_among_processes() -> tuple[int, int]:
    """How many processes work together, and which one this is."""
    import torch.distributed as dist

    return (dist.get_world_size(), dist.get_rank()) if dist.is_available() and dist.is_initialized() else (1, 0)


def sum_over_processes(*tensors: torch.Tensor) -> None:
    import torch.distributed as dist

    if place_among_processes()[0] > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


# ---------------------------------------------------------------------------------------------- the program


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


def tell(text: str) -> None:
    """The answer a user asked for goes to standard output; the log goes to standard error."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def own_device() -> torch.device:
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def sampled(rows: list[Row], sample: int, seed: int) -> list[Row]:
    """So many random rows, in their order; all where `sample` is no limit."""
    if not 0 < sample < len(rows):
        return rows
    return [rows[i] for i in np.sort(np.random.default_rng(seed).choice(len(rows), sample, replace=False))]


# ---------------------------------------------------------------------------------------------- flags and checks


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


# ---------------------------------------------------------------------------------------------- a history in words


def split_history(text: str, catalogue: Catalogue) -> list[str]:
    """'Wood glue | 278' -> ['Wood glue', '278']; ids alone may be separated by commas or spaces."""
    pieces = text.replace(",", " ").split()
    if "|" not in text and len(pieces) > 1 and all(piece in catalogue.place for piece in pieces):
        return pieces
    pieces = [one_line(piece) for piece in text.split("|") if piece.strip()]
    if not pieces:
        raise InputError(f"--recommend {text!r}: names no item; expected titles or item ids, separated by |")
    return pieces


def find_in_catalogue(text: str, catalogue: Catalogue) -> int:
    """The place of the item that is meant by an id, a title, or a part of one title alone; case does not matter."""
    if text in catalogue.place:
        return catalogue.place[text]
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


def short(title: str, width: int = TITLE_WIDTH) -> str:
    """A title as a person reads it: shop data holds HTML entities, and more words than a line takes."""
    title = html.unescape(title)
    return title if len(title) <= width else title[: width - 1].rstrip() + "…"


def in_words(
    row: Row,
    sids: np.ndarray,
    scores: np.ndarray,
    catalogue: Catalogue,
    table: SidTable,
    *,
    truth: bool,
) -> list[str]:
    """The lines that tell a person what was bought and what is recommended; what was bought next is marked."""

    def name(place: int) -> str:
        item = catalogue.items[place]
        return short(item.title or f"item {item.id}")

    lines = ["  bought"] + [f"        {name(place)}" for place in row.history]
    if truth:
        lines += ["  then bought", f"        {name(row.item)}"]
    lines.append("  recommended")
    for number, (sid, score) in enumerate(zip(sids[:SHOWN], scores[:SHOWN], strict=True), start=1):
        if sid < 0:
            break
        mark = "->" if truth and sid == table.of_item[row.item] else "  "
        first, *others = table.items[sid]
        more = f" (and {len(others)} more with this SID)" if others else ""
        lines.append(f"     {mark} {number:2}. {name(first)}{more} [{''.join(table.sids[sid])}, p {np.exp(score):.2g}]")
    return lines


# ---------------------------------------------------------------------------------------------- results


class Free(NamedTuple):
    """Unconstrained generation on some rows: the share of beams that are no SID of the catalogue, and the hits."""

    rows: int
    invalid: float
    invalid_at_10: float
    hit_at_10: float


def free_rows(evaluator: Evaluator, model: PreTrainedModel, seed: int) -> Free:
    """What the same model does without the constraint, on a sample of the rows."""
    count = min(FREE_ROWS, len(evaluator.prompts))
    rows = np.sort(np.random.default_rng(seed).choice(len(evaluator.prompts), count, replace=False))
    number = {sid: place for place, sid in enumerate(evaluator.sids)}
    found = [[number.get(tokens) for tokens in beams] for beams in evaluator.recommend_freely(model, rows)]
    wrong = [[sid is None for sid in beams] for beams in found]
    hits = [evaluator.targets[i] in beams[:10] for i, beams in zip(rows, found, strict=True)]
    first_ten = [share for beams in wrong for share in beams[:10]]
    return Free(count, float(np.mean(wrong)), float(np.mean(first_ten)), float(np.mean(hits)))


def write_results(
    flags: types.SimpleNamespace,
    task: str,
    rows: list[Row],
    train: list[Row],
    catalogue: Catalogue,
    table: SidTable,
    recommended: Recommended,
    free: Free,
    seconds: float,
) -> None:
    """metrics.json, predictions.jsonl and recommendations.png; the table and the examples in the log."""
    folder = Path(flags.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = measure(recommended.lists(), rows, train, table, measurable(flags.num_beams), flags.seed)
    metrics["invalid"] = {
        "constrained": 0.0,
        "unconstrained": free.invalid,
        "unconstrained@10": free.invalid_at_10,
        "unconstrained_hr@10": free.hit_at_10,
        "unconstrained_rows": free.rows,
    }
    metrics["run"] = {
        "base_model": flags.base_model,
        "test_file": flags.test_file,
        "task": task,
        "rows": len(rows),
        "users": len({row.user for row in rows}),
        "num_beams": flags.num_beams,
        "seconds": round(seconds, 2),
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    write_predictions(folder / "predictions.jsonl", rows, recommended, catalogue, table)
    draw(folder / "recommendations.png", metrics)
    for line in result_lines(metrics, with_train=bool(train)):
        logger.info(line)
    shown = sampled(list(range(len(rows))), flags.examples, flags.seed) if flags.examples else []
    for number, i in enumerate(shown, start=1):
        words = in_words(rows[i], recommended.sid[i], recommended.score[i], catalogue, table, truth=True)
        tell("\n".join([f"Example {number} of {len(shown)}: user {rows[i].user}", *words]))
    logger.info(f"Wrote metrics.json and predictions.jsonl to {folder}; the picture is {folder / 'recommendations.png'}")


def measure(
    lists: Lists, rows: list[Row], train: list[Row], table: SidTable, ks: tuple[int, ...], seed: int
) -> dict[str, Any]:
    """All metrics of a list per row, and those of the baselines where training rows are given."""
    popularity = item_popularity(train)
    k = main_k(ks)
    found = views(lists, rows, table, ks)
    users = [row.user for row in rows]
    targets = [table.of_item[row.item] for row in rows]
    metrics: dict[str, Any] = {name: means(values) for name, values in found.items()}
    metrics["interval_95"] = {name: bootstrap(found[name], users, seed) for name in ("sid", "item")}
    metrics["levels"] = level_recall(lists, targets, table, ks)
    metrics["breadth"] = breadth(lists, rows, table, popularity, k)
    metrics["baselines"] = {}
    for name, their_lists in baselines(train, rows, table, max(ks)).items() if train else ():
        theirs = {view: means(values) for view, values in views(their_lists, rows, table, ks).items()}
        metrics["baselines"][name] = {
            **theirs.pop("sid"),
            **theirs,
            "levels": level_recall(their_lists, targets, table, ks),
            "breadth": breadth(their_lists, rows, table, popularity, k),
        }
    return metrics


def write_predictions(path: Path, rows: list[Row], recommended: Recommended, catalogue: Catalogue, table: SidTable) -> None:
    """One JSON object per row: history, target, its rank (from 1, null if missed), recommendations."""

    def named(place: int) -> dict[str, str]:
        return {"id": catalogue.items[place].id, "title": catalogue.items[place].title}

    with path.open("w", encoding="utf-8") as file:
        for row, ranked, scores in zip(rows, recommended.lists(), recommended.score.tolist(), strict=True):
            target = table.of_item[row.item]
            line = {
                "user": row.user,
                "history": [named(place) for place in row.history],
                "target": {"sid": "".join(table.sids[target]), **named(row.item)},
                "rank": ranked.index(target) + 1 if target in ranked else None,
                "recommendations": [
                    {
                        "sid": "".join(table.sids[number]),
                        "log_p": round(score, 5),
                        "items": [named(place) for place in table.items[number]],
                    }
                    for number, score in zip(ranked[:SHOWN], scores, strict=False)
                ],
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def result_lines(metrics: dict[str, Any], *, with_train: bool) -> list[str]:
    """The table that a run ends with, and what else a reader should know, in words."""
    k = main_k(ks_of(metrics))
    main = f"hr@{k}"
    wanted = dict.fromkeys(("hr@1", "hr@5", main, "hr@50", f"ndcg@{k}", f"mrr@{k}"))
    names = [name for name in wanted if name in metrics["sid"]]
    lines = [f"{'SID level':<12}" + "".join(f"{name.upper():>9}" for name in names) + f"{'item ' + main.upper():>15}"]
    recommenders = {"this model": {**metrics["sid"], "item": metrics["item"]}, **metrics["baselines"]}
    for name, found in recommenders.items():
        lines.append(f"{name:<12}" + "".join(f"{found[n]:9.4f}" for n in names) + f"{found['item'][main]:15.4f}")
    low, high = metrics["interval_95"]["sid"][main]
    fresh, invalid = metrics["sid_without_history"], metrics["invalid"]
    recall = {name.partition("@")[0]: value for name, value in metrics["levels"].items() if name.endswith(f"@{k}")}
    lines += [
        f"{main.upper()} of this model: 95 % interval {low:.4f} to {high:.4f} (users drawn with replacement)",
        f"New items only ({fresh['rows']:,} rows, history taken out of the list): {main.upper()} {fresh[main]:.4f}",
        f"Share of all rows where one of the first {k} agrees with the truth down to "
        + ", ".join(f"level {name.removeprefix('level')}: {value:.3f}" for name, value in recall.items()),
        f"Of all SIDs {100 * metrics['breadth'][f'coverage@{k}']:.1f} % stand among the first {k} of some row"
        + (f"; these are {x:.1f} times as popular as what was bought" if (x := popularity_of(metrics, k)) else ""),
        f"Invalid recommendations: 0; without constraint {100 * invalid['unconstrained@10']:.1f} % of the first 10, "
        f"{100 * invalid['unconstrained']:.1f} % of all beams ({invalid['unconstrained_rows']} rows)",
    ]
    if not with_train:
        lines.append("No --train_file: no baselines, and items that share a SID stand in catalogue order at item level")
    return lines


def ks_of(metrics: dict[str, Any]) -> list[int]:
    """The K that were measured."""
    return [int(name.partition("@")[2]) for name in metrics["sid"] if name.startswith("hr@")]


def popularity_of(metrics: dict[str, Any], k: int) -> float:
    """How popular the first k are against what was bought; 0 where no training rows tell."""
    return metrics["breadth"].get(f"popularity@{k}", 0.0)


def draw(path: Path, metrics: dict[str, Any]) -> None:
    """HR@K and NDCG@K of the model beside the baselines, and in how many rows a SID was right down to each level."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ks = ks_of(metrics)
    styles = {
        "this model": {"color": "#1f5fbf", "marker": "o", "linewidth": 2.4, "zorder": 3},
        "markov": {"color": "#d1762b", "marker": "s", "linewidth": 1.4},
        "last": {"color": "#6a9a3d", "marker": "^", "linewidth": 1.4},
        "popularity": {"color": "#8a8a8a", "marker": "D", "linewidth": 1.4},
    }
    labels = {"markov": "Markov chain", "last": "last items"}
    found = {"this model": metrics["sid"], **metrics["baselines"]}
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    for axis, metric in zip(axes[:2], ("hr", "ndcg"), strict=True):
        for name, style in styles.items():
            if name in found:
                values = [found[name][f"{metric}@{k}"] for k in ks]
                axis.plot(ks, values, label=labels.get(name, name), markersize=5, **style)
        ends = np.array([metrics["interval_95"]["sid"][f"{metric}@{k}"] for k in ks])
        axis.fill_between(ks, *ends.T, color=styles["this model"]["color"], alpha=0.15, linewidth=0)
        if len(ks) > 1:
            axis.set_xscale("log")
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_xlabel("K")
        axis.set_title(f"{metric.upper()}@K, SID level")
    axes[0].legend(frameon=False, loc="upper left")
    axis, shown = axes[2], [k for k in (1, 10, 50) if k in ks]
    depth = max(int(name.removeprefix("level").partition("@")[0]) for name in metrics["levels"])
    width = 0.8 / len(shown)
    for number, k in enumerate(shown):
        heights = [metrics["levels"][f"level{level}@{k}"] for level in range(1, depth + 1)]
        places = np.arange(depth) + (number - (len(shown) - 1) / 2) * width
        bars = axis.bar(places, heights, width * 0.92, color="#1f5fbf", alpha=0.35 + 0.3 * number, label=f"first {k}")
        axis.bar_label(bars, [f"{height:.2f}" for height in heights], fontsize=8, padding=1)
    axis.set_xticks(range(depth), [f"level {level}" for level in range(1, depth + 1)])
    axis.set_ylim(0, 1.3 * max(metrics["levels"].values()) + 0.01)
    axis.set_title("Right down to level, all rows, this model")
    axis.legend(frameon=False, loc="upper right")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.7)
        axis.set_axisbelow(True)
    figure.suptitle(
        f"{metrics['run']['rows']:,} rows, {metrics['run']['num_beams']} beams; the band is a 95 % interval",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(arguments: list[str]) -> int:
    return run(evaluate, arguments, program="evaluate.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
