"""Recommends for fixed rows with a model in whatever state it is, and measures how well."""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sid_sft.catalogue import Catalogue
from sid_sft.encoding import Encoder
from sid_sft.faults import out_of_memory
from sid_sft.files import InputError, error_text
from sid_sft.finite import broken_weights, in_words
from sid_sft.interactions import Row
from sid_sft.recommend.ranking import KS, Lists, means, ranks_of, row_values, sid_table
from sid_sft.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sid_sft.recommend.beam_search import Decoder
    from sid_sft.recommend.trie import Trie

logger = logging.getLogger("sft.evaluator")

TRIAL_BEAMS = 4
TRIAL_TOLERANCE = 1e-3  # of a score, when the two decoders are compared; a low-precision model gets LOW_TOLERANCE
LOW_TOLERANCE = 3e-2
RECOMMENDING_TASKS = ("sid_sid", "title_sid")  # a history in, a SID out


class Recommended(NamedTuple):
    """sid (U, K): SID numbers, best first, -1 where there are no more; score (U, K): their log p, where there is a SID."""

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

    exclude_history: the SIDs of a row's history are left out. A row whose history has H SIDs is searched with `num_beams` +
    H beams, and only with rows of the same H, so its list depends on no other row and has `num_beams` SIDs, or all others.
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
        exclude_history: bool = False,
        model_name: str = "the model",
    ) -> None:
        from sid_sft.recommend.beam_search import common_template
        from sid_sft.recommend.trie import score_sequences, sid_matrix

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
        self.sids = sid_matrix(self.table.sids, ids_of_tokens(tokenizer, self.table.sids))
        self.sequences = score_sequences(self.sids, self.end_id)
        self.trie: Trie | None = None  # on the device of the model, once it is seen
        histories = [row.history if exclude_history else () for row in rows]
        self.excluded = [sorted({self.table.of_item[place] for place in history}) for history in histories]
        self.batches = batches_of([*zip(map(len, self.excluded), map(len, self.prompts), strict=True)], batch_size)
        self.make_decoder: Callable[[PreTrainedModel], Decoder] | None = None  # what serves the model, once it is tried

    def recommend(
        self, model: PreTrainedModel, *, progress: bool = False, before_batch: Callable[[], None] = lambda: None
    ) -> Recommended:
        """The best SIDs for every row. before_batch: called as often on every process, and may raise to stop them all."""
        import torch

        from sid_sft.sharding import gathered, is_sharded

        width = min(self.num_beams, len(self.sequences))
        sid = torch.zeros(len(self.prompts), width, dtype=torch.int64, device=model.device)
        score = torch.zeros(len(self.prompts), width, dtype=torch.float64, device=model.device)
        together = is_sharded(model)
        with evaluating(model):
            gathered(self.search_batches)(
                model, sid, score, self.own_batches(progress=progress, together=together), before_batch
            )
        if together and place_among_processes()[1]:
            sid, score = torch.zeros_like(sid), torch.zeros_like(score)  # all have computed all rows: the first one's count
        sum_over_processes(sid, score)  # a row is zero everywhere but where it was computed
        if not can_rank(score):
            raise InputError(not_finite(self.model_name, model))
        return Recommended(sid.cpu().numpy(), score.cpu().numpy())

    def search_batches(
        self,
        model: PreTrainedModel,
        sid: torch.Tensor,
        score: torch.Tensor,
        batches: Iterable[np.ndarray],
        before_batch: Callable[[], None],
    ) -> None:
        """Fills in the rows of some batches: sid (U, K) and score (U, K) as in Recommended."""
        import torch

        from sid_sft.recommend.beam_search import search, without

        trie, decoder, width = self.trie_on(model.device), self.decoder(model), sid.shape[1]
        for batch in batches:
            before_batch()
            if not len(batch) or not can_rank(score):
                continue  # to where the processes meet: what cannot be ranked is refused there, by all of them
            excluded = torch.tensor([self.excluded[i] for i in batch], dtype=torch.int64, device=model.device)
            found = search(decoder, trie, [self.prompts[i] for i in batch], self.num_beams + excluded.shape[1])
            if excluded.shape[1] and can_rank(found.score):
                found = without(found, excluded, width)
            sid[batch], score[batch] = found.leaf[:, :width], found.score[:, :width].double()

    def recommend_freely(self, model: PreTrainedModel, rows: np.ndarray) -> list[list[tuple[int, ...]]]:
        """What a beam search that knows no catalogue writes for some rows: token ids up to the end token.

        It has as many beams as the constrained search can fill: with more, some would be no SID in any case.
        """
        from sid_sft.recommend.beam_search import search_freely

        levels, width = self.sids.shape[1], min(self.num_beams, len(self.sids))
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

    def metrics(self, model: PreTrainedModel, *, before_batch: Callable[[], None] = lambda: None) -> dict[str, float]:
        """HR@K and NDCG@K at SID level for the K that the beams allow. before_batch: see recommend."""
        ranks = ranks_of(self.recommend(model, before_batch=before_batch).lists(), self.targets)
        values = row_values(ranks, measurable(self.num_beams))
        return {name: value for name, value in means(values).items() if not name.startswith("mrr")}

    def own_batches(self, *, progress: bool, together: bool) -> Iterator[np.ndarray]:
        """This process's batches, as many on every process, the last maybe empty; rank 0 may show how far it is.

        together: every process takes all of them, as it must where a model is sharded and each call is one of all processes.
        """
        from tqdm import tqdm

        processes, process = (1, 0) if together else place_among_processes()
        own = self.batches[process::processes]
        if len(own) < math.ceil(len(self.batches) / processes):
            own = [*own, np.zeros(0, np.int64)]
        yield from tqdm(own, desc="Recommending", unit="batch", disable=not progress or place_among_processes()[1] > 0)

    def trie_on(self, device: torch.device) -> Trie:
        from sid_sft.recommend.trie import build_trie

        if self.trie is None or self.trie.start.device != device:
            self.trie = build_trie(self.sequences, device)
        return self.trie

    def decoder(self, model: PreTrainedModel) -> Decoder:
        if self.make_decoder is None:
            self.make_decoder = self.choose_decoder(model)
        return self.make_decoder(model)

    def choose_decoder(self, model: PreTrainedModel) -> Callable[[PreTrainedModel], Decoder]:
        """The fastest decoder with which two rows get the scores of the model's own forward; says where it is a slow one."""
        import torch

        from sid_sft.forward.architecture import why_not_exact
        from sid_sft.recommend.beam_search import OwnForwardDecoder, WholeSequenceDecoder, search

        trie = self.trie_on(model.device)
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
                except Exception as error:  # other people's code: what it does not take is a reason to go another way
                    if out_of_memory(error):
                        raise
                    reason = f"{type(error).__name__}: {error_text(error)[:100]}"
            logger.info(f"{otherwise} ({reason}); this is slow, the result is right")
        return OwnForwardDecoder

    def shared_decoder(self, model: PreTrainedModel) -> Decoder:
        from sid_sft.recommend.beam_search import SharedPromptDecoder

        return SharedPromptDecoder(model, self.template)


def ids_of_tokens(tokenizer: PreTrainedTokenizerBase, sids: list[tuple[str, ...]]) -> dict[str, int]:
    """Token -> id, for the tokens of some SIDs."""
    tokens = sorted({token for sid in sids for token in sid})
    return dict(zip(tokens, tokenizer.convert_tokens_to_ids(tokens), strict=True))


def batches_of(keys: list[tuple[int, int]], batch_size: int) -> list[np.ndarray]:
    """The rows sorted by (what a batch must agree in, length) and cut: [(0, 9), (1, 3), (0, 5)] with 2 -> [2, 0] and [1]."""
    order = sorted(range(len(keys)), key=keys.__getitem__)
    alike = [list(rows) for _, rows in groupby(order, key=lambda row: keys[row][0])]
    return [np.array(rows[i : i + batch_size]) for rows in alike for i in range(0, len(rows), batch_size)]


def can_rank(score: torch.Tensor) -> bool:
    """Whether the best scores (U, K) of every row are numbers; topk takes a NaN for the greatest, so it stands first."""
    return bool(score[:, 0].isfinite().all())


def not_finite(name: str, model: PreTrainedModel) -> str:
    """What to tell of a model whose scores are NaN or infinite."""
    broken = broken_weights(model)
    if not broken:
        dtype = str(model.dtype).removeprefix("torch.")
        return (
            f"{name}: its weights are finite but overflow in {dtype}, so nothing can be ranked; take an earlier checkpoint"
            + (", or save the model in float32" if dtype == "float16" else "")
        )
    return (
        f"{name}: {in_words(broken)}, so nothing can be ranked; "
        "take an earlier checkpoint, or train with a lower --learning_rate"
    )


def measurable(num_beams: int) -> tuple[int, ...]:
    """The K for which so many recommendations tell HR@K."""
    return tuple(k for k in KS if k <= num_beams)


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


def sampled(rows: list[Row], sample: int, seed: int) -> list[Row]:
    """So many random rows, in their order; all where `sample` is no limit."""
    if not 0 < sample < len(rows):
        return rows
    return [rows[i] for i in np.sort(np.random.default_rng(seed).choice(len(rows), sample, replace=False))]
