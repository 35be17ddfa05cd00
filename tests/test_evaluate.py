"""Beam search against transformers and brute force, metrics against scikit-learn, the command as a user types it."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, byte_bpe, small_model
from families import small_family
from fuzzing import check_line
from sklearn.metrics import ndcg_score
from stores import (
    FIXED,
    MIXED,
    TEXT,
    arguments_of,
    catalogue_of,
    sequences_of,
    shop_rows,
    table_of,
    write_rows,
    write_store,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import evaluate
from sid_sft.catalogue import Catalogue, Item, read_catalogue
from sid_sft.files import InputError
from sid_sft.interactions import CSV_COLUMNS, Row, read_rows
from sid_sft.recommend.beam_search import (
    OwnForwardDecoder,
    SharedPromptDecoder,
    WholeSequenceDecoder,
    common_template,
    search,
    search_freely,
)
from sid_sft.recommend.ranking import (
    KS,
    MISSED,
    baselines,
    bootstrap,
    breadth,
    by_shared_levels,
    item_popularity,
    level_recall,
    means,
    ranks_of,
    row_values,
    shared_levels,
    sid_table,
    to_items,
    views,
)
from sid_sft.tasks import TASKS, render
from sid_sft.vocabulary import add_sid_tokens

AMAZON = SHARED / "data" / "amazon" / "Industrial_and_Scientific"


# ---------------------------------------------------------------------------------------------- what the tests stand on


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Llama's and Gemma's kind: spaces as a letter, a token that begins each text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"]))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


TOKENIZERS = {"byte-level": lambda: byte_bpe(TEXT, 300), "metaspace": metaspace_tokenizer}
WORDING = {"sid_sid": "Bought by one customer:\n{history}", "title_sid": "Titles:\n{history}"}


def prompts_of(tokenizer, catalogue: Catalogue) -> list[np.ndarray]:
    """Prompts of three lengths, so that a batch has padding."""
    histories = [(0,), (1, 2, 0, 1), (2, 2)]
    texts = [render(TASKS["sid_sid"], Row("", h, 0), catalogue, WORDING)[0] for h in histories]
    return [np.array(tokenizer(text)["input_ids"]) for text in texts]


def toy(tokenizer_kind: str, sids: list[tuple[str, ...]], *, tied: bool = True):
    """(model, prompts, SIDs as ids, end token id) of a toy catalogue."""
    tokenizer = TOKENIZERS[tokenizer_kind]()
    add_sid_tokens(tokenizer, sorted({token for sid in sids for token in sid}))
    ids = [tuple(tokenizer.convert_tokens_to_ids(list(sid))) for sid in sids]
    return (
        small_model("qwen2", len(tokenizer) + 3, tie_word_embeddings=tied).eval(),
        prompts_of(tokenizer, catalogue_of(sids)),
        ids,
        tokenizer.eos_token_id,
    )


@torch.no_grad()
def brute_force(model, prompt: np.ndarray, sequences: list[list[int]]) -> tuple[list[int], list[float]]:
    """Every sequence scored by the plain forward: (numbers, scores), best first."""
    scores = []
    for sequence in sequences:
        log_p = model(torch.tensor([[*prompt, *sequence]])).logits[0].float().log_softmax(-1)
        scores.append(sum(log_p[len(prompt) - 1 + place, token].item() for place, token in enumerate(sequence)))
    order = np.argsort(-np.array(scores), kind="stable")
    return order.tolist(), [scores[i] for i in order]


def decoders_of(model, prompts: list[np.ndarray]) -> list:
    return [
        SharedPromptDecoder(model, common_template(prompts)),
        WholeSequenceDecoder(model),
        OwnForwardDecoder(model),
    ]


# ---------------------------------------------------------------------------------------------- beam search


def test_the_end_token_counts_where_one_sid_begins_another():
    assert sequences_of([(1, 5), (1, 5, 9), (2, 6)], 0) == [[1, 5, 0], [1, 5, 9, 0], [2, 6]]


def test_a_trie_is_the_table_that_its_docstring_shows():
    trie = table_of([[1, 5], [1, 6], [2, 5]])
    assert trie.token.tolist() == [0, 1, 2, 5, 6, 5]
    assert trie.start.tolist() == [1, 3, 5, 6, 6, 6, 6]
    assert trie.leaf.tolist() == [-1, -1, -1, 0, 1, 2]


@pytest.mark.parametrize("sids", [FIXED, MIXED], ids=["fixed depth", "mixed depth"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_with_beams_enough_the_search_is_brute_force(kind, tied, sids):
    model, prompts, ids, end = toy(kind, sids, tied=tied)
    sequences = sequences_of(ids, end)
    for decoder in decoders_of(model, prompts):
        found = search(decoder, table_of(sequences), prompts, 100)
        for place, prompt in enumerate(prompts):
            order, scores = brute_force(model, prompt, sequences)
            assert found.leaf[place].tolist() == order
            assert np.allclose(found.score[place].numpy(), scores, atol=1e-4, rtol=0)


def generated(model, prompts, sequences, num_beams, end):
    """What transformers' generate finds: (numbers, scores) per prompt; an end token is a part of the score."""
    size, depth = max(map(len, prompts)), max(map(len, sequences))
    inputs = torch.tensor([[end] * (size - len(prompt)) + prompt.tolist() for prompt in prompts])
    mask = torch.tensor([[0] * (size - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def allowed(_, so_far):
        written = so_far[size:].tolist()
        return [s[len(written)] for s in sequences if s[: len(written)] == written and len(s) > len(written)] or [end]

    out = model.generate(
        inputs,
        attention_mask=mask,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        max_new_tokens=depth,
        length_penalty=0.0,
        do_sample=False,
        prefix_allowed_tokens_fn=allowed,
        output_scores=True,
        return_dict_in_generate=True,
        eos_token_id=end,
        pad_token_id=end,
    )
    number = {tuple(sequence): place for place, sequence in enumerate(sequences)}
    written = [tuple(row) for row in out.sequences[:, size:].tolist()]
    found = [next((number[w[:n]] for n in range(len(w), 0, -1) if w[:n] in number), -1) for w in written]
    count = len(prompts)
    return np.array(found).reshape(count, -1).tolist(), out.sequences_scores.numpy().reshape(count, -1)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_beams_and_scores_are_those_of_generate_with_allowed_tokens(kind, tied):
    model, prompts, ids, end = toy(kind, FIXED, tied=tied)
    sequences = sequences_of(ids, end)
    expected, scores = generated(model, prompts, sequences, 4, end)
    for decoder in decoders_of(model, prompts):
        found = search(decoder, table_of(sequences), prompts, 4)
        assert found.leaf.tolist() == expected
        assert np.allclose(found.score.numpy(), scores, atol=1e-4, rtol=0)


def test_with_end_tokens_the_beams_are_those_of_generate_too():
    """With a beam for each SID: with fewer, generate counts an end only among its first `num_beams` candidates."""
    sids = [*FIXED, *(sid + ("<d_1>",) for sid in FIXED)]
    model, prompts, ids, end = toy("byte-level", sids)
    sequences = sequences_of(ids, end)
    expected, scores = generated(model, prompts, sequences, 40, end)
    found = search(SharedPromptDecoder(model, common_template(prompts)), table_of(sequences), prompts, 40)
    assert found.leaf.tolist() == expected
    assert np.allclose(found.score.numpy(), scores, atol=1e-4, rtol=0)


ARCHITECTURES = {
    "soft-cap and sliding window": ("gemma2", {"sliding_window": 6}),
    "logit scale": ("cohere", {"logit_scale": 0.3}),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_scores_know_what_an_architecture_does_to_its_logits(kind):
    _, prompts, ids, end = toy("byte-level", MIXED)
    name, settings = ARCHITECTURES[kind]
    model = small_model(name, 1 + max(map(max, ids)), **settings).eval()
    sequences = sequences_of(ids, end)
    found = search(SharedPromptDecoder(model, common_template(prompts)), table_of(sequences), prompts, 100)
    for place, prompt in enumerate(prompts):
        order, scores = brute_force(model, prompt, sequences)
        assert np.allclose(found.score[place].numpy(), scores, atol=1e-4, rtol=0)
        assert found.leaf[place].tolist() == order


@pytest.mark.parametrize(
    ("kind", "decoder"),
    [
        ("hyperclovax", "SharedPromptDecoder"),
        ("deepseek_v3", "SharedPromptDecoder"),
        ("falcon-alibi", "WholeSequenceDecoder"),
        ("gemma4_text", "WholeSequenceDecoder"),
        ("bert", "OwnForwardDecoder"),
        ("falcon_h1", "OwnForwardDecoder"),
        ("llama4_text", "OwnForwardDecoder"),
    ],
)
def test_every_family_is_ranked_by_its_own_forward(kind, decoder):
    """The fastest decoder that is right for a family is chosen, and its lists are those of the model's own logits."""
    tokenizer = byte_bpe(TEXT)
    add_sid_tokens(tokenizer, sorted({token for sid in MIXED for token in sid}))
    model = small_family(kind, len(tokenizer))
    rows = [Row("", (0,), 1), Row("", (1, 2, 0), 2)]
    evaluator = evaluate.Evaluator(tokenizer, catalogue_of(MIXED), WORDING, rows, num_beams=100)
    assert type(evaluator.decoder(model)).__name__ == decoder
    found = evaluator.recommend(model)
    for place, prompt in enumerate(evaluator.prompts):
        order, scores = brute_force(model, prompt, [row[row >= 0].tolist() for row in evaluator.sequences])
        assert np.allclose(found.score[place], scores, atol=1e-3, rtol=0)
        assert found.sid[place].tolist() == order


@pytest.mark.parametrize("num_beams", [1, 3, 9, 26, 1000])
def test_no_beam_is_invalid_or_double(num_beams):
    model, prompts, ids, end = toy("byte-level", MIXED)
    found = search(WholeSequenceDecoder(model), table_of(sequences_of(ids, end)), prompts, num_beams)
    for row, scores in zip(found.leaf.tolist(), found.score.tolist(), strict=True):
        valid = [number for number in row if number >= 0]
        assert len(set(valid)) == len(valid) > 0
        assert row[: len(valid)] == valid, "what is not there stands last"
        assert scores == sorted(scores, reverse=True)
    assert found.leaf.shape[1] == min(num_beams, len(ids))


def test_a_level_with_fewer_children_than_beams_leaves_the_rest_empty():
    """Two beams of the first level with one child each; the third node of that level was pruned with its children."""
    model, prompts, ids, end = toy("byte-level", [("<a_0>", "<b_0>"), ("<a_1>", "<b_0>"), ("<a_2>", "<b_0>")])
    found = search(WholeSequenceDecoder(model), table_of(ids), prompts, 2)
    assert (found.leaf >= 0).all()
    assert all(len(set(row)) == 2 for row in found.leaf.tolist())


def test_free_search_is_generate_without_a_constraint():
    model, prompts, _, end = toy("byte-level", FIXED)
    inputs = torch.tensor(prompts[1][None])
    out = model.generate(
        inputs,
        num_beams=5,
        num_return_sequences=5,
        min_new_tokens=3,
        max_new_tokens=3,
        length_penalty=0.0,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=end,
    )
    for decoder in decoders_of(model, prompts):
        found = search_freely(decoder, prompts, 5, levels=3, end_id=-1)
        assert found[1].tolist() == out[:, len(prompts[1]) :].tolist()


def random_sids(rng: np.random.Generator) -> list[tuple[int, ...]]:
    """A catalogue of depth 1 to 5 as token ids from 1 up; what begins a SID is, by a random share, a SID too."""
    depth, codes, share = int(rng.integers(1, 6)), int(rng.integers(1, 6)), rng.random()
    step = codes if rng.random() < 0.7 else 0  # 0: the same tokens on every level
    sids = {
        tuple(int(1 + level * step + rng.integers(codes)) for level in range(rng.integers(1, depth + 1)))
        for _ in range(rng.integers(1, 40))
    }
    sids |= {sid[:size] for sid in sorted(sids) for size in range(1, len(sid)) if rng.random() < share}
    return [sorted(sids)[i] for i in rng.permutation(len(sids))]


@torch.no_grad()
def prefix_scores(model, prompt: np.ndarray, sequences: list[list[int]]) -> dict[tuple[int, ...], float]:
    """The log p of every beginning of some sequences, from the plain forward of each sequence."""
    size = len(prompt) + max(map(len, sequences))
    rows = [[*prompt, *sequence] for sequence in sequences]
    log_p = model(torch.tensor([row + [0] * (size - len(row)) for row in rows])).logits.log_softmax(-1)
    found = {(): 0.0}
    for sequence, steps in zip(sequences, log_p[:, len(prompt) - 1 :], strict=True):
        for level, token in enumerate(sequence):
            found[tuple(sequence[: level + 1])] = found[tuple(sequence[:level])] + steps[level, token].item()
    return found


def best_first(written: list[tuple[int, ...]], scores: dict[tuple[int, ...], float], size: int) -> list[tuple[int, ...]]:
    return sorted(written, key=lambda tokens: -scores[tokens])[:size]


def plain_beams(scores: dict[tuple[int, ...], float], whole: set[tuple[int, ...]], num_beams: int) -> list[tuple[int, ...]]:
    """Beam search in plain words: each level keeps its best unfinished beginnings; what is whole waits apart."""
    beams, finished = [()], []
    while beams:
        children = [tokens for tokens in scores if tokens and tokens[:-1] in beams]
        finished += [tokens for tokens in children if tokens in whole]
        beams = best_first([tokens for tokens in children if tokens not in whole], scores, num_beams)
    return best_first(finished, scores, num_beams)


def check_search(sids: list[tuple[int, ...]], all_beams: list[int], *, tied: bool) -> None:
    """The search's lists and scores are those of plain_beams; with a beam for each beginning, those of all sequences."""
    model = small_model("qwen2", 30, tie_word_embeddings=tied).eval()
    prompts = [np.array([3, 21, 22, 23, 24][:size] + [25] * extra) for size, extra in ((5, 1), (3, 0), (5, 4))]
    sequences = sequences_of(sids, 0)
    for sid, sequence in zip(sids, sequences, strict=True):
        ambiguous = any(sid[: len(other)] == other or other[: len(sid)] == sid for other in sids if other != sid)
        assert sequence == [*sid, 0] if ambiguous else sequence == list(sid)
    trie = table_of(sequences)
    asked = [*sids, *(sid[:-1] for sid in sids), *((*sid, 29) for sid in sids), (29,), (29, 3)]
    assert trie.numbers_of(asked, 0) == [sids.index(sid) if sid in sids else -1 for sid in asked]
    numbers = {tuple(sequence): number for number, sequence in enumerate(sequences)}
    scores = [prefix_scores(model, prompt, sequences) for prompt in prompts]
    for num_beams, decoder in itertools.product([*all_beams, len(scores[0])], decoders_of(model, prompts)):
        found = search(decoder, trie, prompts, num_beams)
        for place in range(len(prompts)):
            if num_beams < len(scores[place]):
                expected = plain_beams(scores[place], set(numbers), num_beams)
            else:
                expected = best_first(list(numbers), scores[place], num_beams)
            shown = f"{sids}, {num_beams} beams, {type(decoder).__name__}"
            assert found.leaf[place].tolist() == [numbers[tokens] for tokens in expected], shown
            assert np.allclose(found.score[place], [scores[place][tokens] for tokens in expected], atol=1e-4, rtol=0), shown
            assert len(expected) == min(num_beams, len(sids)), "as many as asked for, or the whole catalogue"


@pytest.mark.parametrize("seed", range(60))
def test_any_catalogue_is_searched_as_in_plain_words(seed):
    rng = np.random.default_rng(seed)
    sids = random_sids(rng)
    check_search(sids, [1, 2, int(rng.integers(3, 3 + len(sids)))], tied=bool(seed % 2))


NARROW = {
    "one SID": [(1, 5, 9)],
    "one SID of one token": [(1,)],
    "depth 1": [(1,), (2,), (3,), (4,)],
    "each begins the next": [(1,), (1, 5), (1, 5, 9), (1, 5, 9, 13)],
    "an appended item beside an old one": [
        *((1, 12, 15), (1, 12, 17), (1, 14, 18), (3, 14, 18), (4, 12, 17), (4, 13, 16)),
        *((3, 11, 15), (3, 11, 15, 24)),
    ],
    "a long SID beside many short ones": [(1, 5, 9, 13, 17), *((token,) for token in range(2, 12))],
}


@pytest.mark.parametrize("case", NARROW)
def test_a_catalogue_in_which_beams_run_out_is_searched_to_its_end(case):
    check_search(NARROW[case], [1, 2, 3, 50], tied=True)


@pytest.mark.parametrize("seed", range(20))
def test_a_model_that_is_not_finite_is_searched_to_the_end_and_its_nan_stands_first(seed):
    rng = np.random.default_rng(seed)
    sids = random_sids(rng)
    prompts = [np.array([26, 27, 28]), np.array([26, 29])]
    model = small_model("qwen2", 30, tie_word_embeddings=False).eval()
    trie = table_of(sequences_of(sids, 0))
    with torch.no_grad():
        model.get_input_embeddings().weight[1] = torch.nan  # the beams that go on from this token alone
        for decoder, num_beams in itertools.product(decoders_of(model, prompts), (1, 3, 50)):
            search(decoder, trie, prompts, num_beams)
        model.get_input_embeddings().weight[26] = torch.nan  # every prompt
    for decoder, num_beams in itertools.product(decoders_of(model, prompts), (1, 3, 50)):
        assert search(decoder, trie, prompts, num_beams).score[:, 0].isnan().all()


@torch.no_grad()
def plain_free_beams(model, prompt: np.ndarray, num_beams: int, levels: int, end: int) -> list[list[int]]:
    """Beam search over all tokens in plain words: what has ended goes on with ends, which cost nothing."""
    beams = [((), 0.0)]
    for _ in range(levels):
        candidates = []
        for written, score in beams:
            if end in written:
                candidates.append(((*written, end), score))
                continue
            log_p = model(torch.tensor([[*prompt, *written]])).logits[0, -1].log_softmax(-1).tolist()
            candidates += [((*written, token), score + step) for token, step in enumerate(log_p)]
        beams = sorted(candidates, key=lambda candidate: -candidate[1])[:num_beams]
    return [list(written) for written, _ in beams]


@pytest.mark.parametrize("num_beams", [1, 3, 5, 7, 20, 21, 500])
def test_free_search_takes_more_beams_than_there_are_tokens_or_even_sequences(num_beams):
    """5 tokens of which one ends: 5 sequences of one level, 1 + 4 x 5 = 21 of two, 1 + 4 x 21 = 85 of three."""
    model = small_model("qwen2", 5, tie_word_embeddings=False).eval()
    prompts = [np.array(prompt) for prompt in ([1, 2, 3], [1, 2], [1, 4, 4, 2])]
    for decoder, levels in itertools.product(decoders_of(model, prompts), (1, 2, 3)):
        found = search_freely(decoder, prompts, num_beams, levels=levels, end_id=0).tolist()
        assert found == [plain_free_beams(model, prompt, num_beams, levels, 0) for prompt in prompts]
        assert len(found[0]) == min(num_beams, {1: 5, 2: 21, 3: 85}[levels])


# ---------------------------------------------------------------------------------------------- metrics


def test_metrics_of_one_row_are_those_of_its_docstring():
    values = row_values(np.array([1, MISSED]), (1, 3))
    assert values["hr@1"].tolist() == [0, 0]
    assert values["hr@3"].tolist() == [1, 0]
    assert values["ndcg@3"].tolist() == pytest.approx([1 / np.log2(3), 0])
    assert values["mrr@3"].tolist() == [0.5, 0]


def test_ndcg_is_scikit_learns():
    rng = np.random.default_rng(0)
    lists = [rng.permutation(30).tolist() for _ in range(40)]
    targets = rng.integers(30, size=40).tolist()
    values = row_values(ranks_of(lists, targets), KS)
    relevance = np.eye(30)[targets]
    scores = np.zeros((40, 30))
    for row, ranked in zip(scores, lists, strict=True):
        row[ranked] = np.arange(30, 0, -1)
    for k in (1, 3, 5, 10, 20):
        assert values[f"ndcg@{k}"].mean() == pytest.approx(ndcg_score(relevance, scores, k=k))


# items 0 and 1 share a SID, item 2 and 3 have one each
TOY = Catalogue(
    [Item("7", ("<a_0>", "<b_0>"), "x"), Item("8", ("<a_0>", "<b_0>"), "y"), Item("9", ("<a_0>", "<b_1>"), "z")]
    + [Item("10", ("<a_1>", "<b_1>", "<c_0>"), "w")],
    {"7": 0, "8": 1, "9": 2, "10": 3},
)


def test_an_item_that_shares_its_sid_ranks_by_training_popularity():
    table = sid_table(TOY, Counter({1: 5, 0: 2}))
    assert table.of_item == [0, 0, 1, 2]
    assert to_items([1, 0], table) == [2, 1, 0]
    rows = [Row("u", (3,), 0), Row("v", (3,), 1)]
    found = views([[0, 1], [0, 1]], rows, table, (1, 3))
    assert means(found["sid"])["hr@1"] == 1
    assert means(found["item"])["hr@1"] == 0.5
    assert means(found["item"])["hr@3"] == 1


def test_without_history_drops_it_from_lists_and_rows():
    table = sid_table(TOY, Counter())
    rows = [Row("u", (3,), 2), Row("v", (2,), 2), Row("w", (0,), 1)]
    found = views([[2, 1, 0]] * 3, rows, table, (1,))
    assert means(found["sid"]) == {"hr@1": 0, "ndcg@1": 0, "mrr@1": 0}
    assert means(found["sid_without_history"]) == {"rows": 1, "hr@1": 1, "ndcg@1": 1, "mrr@1": 1}
    assert means(found["item_without_history"])["rows"] == 2  # the twin of a bought item is new as an item


def test_rows_are_told_apart_by_how_many_levels_their_history_shares():
    """item 0: a_0 b_0 (item 1 as well), item 2: a_0 b_1, item 3: a_1 b_1 c_0; a level counts from the first on alone."""
    table = sid_table(TOY, Counter())
    histories_and_targets = [((3,), 2), ((2, 3), 0), ((1,), 0), ((3, 2), 2), ((2,), 3)]
    shared = shared_levels([Row("u", history, target) for history, target in histories_and_targets], table)
    assert shared == ["0", "1", "all", "all", "0"]
    found = by_shared_levels({"hr@1": np.array([1.0, 0.0, 1.0, 0.0, 0.0])}, shared)
    assert found == {"0": {"rows": 2, "hr@1": 0.5}, "1": {"rows": 1, "hr@1": 0.0}, "all": {"rows": 2, "hr@1": 0.5}}


def test_a_sid_that_another_one_begins_with_is_not_the_same_sid():
    table = sid_table(catalogue_of([("<a_0>", "<b_0>"), ("<a_0>", "<b_0>", "<c_0>")]), Counter())
    assert shared_levels([Row("u", (1,), 0), Row("u", (0,), 1), Row("u", (0, 1), 0)], table) == ["2", "2", "all"]


def test_level_recall_counts_every_row_at_every_level():
    """The truth of the first row is a_0 b_0, found is a_0 b_1: it still counts, as wrong, at the level it does not reach."""
    table = sid_table(TOY, Counter())
    found = level_recall([[1], [2]], [0, 2], table, (1,))
    assert found == {"level1@1": 1.0, "level2@1": 0.5, "level3@1": 0.5}


def test_a_sid_that_begins_the_one_found_is_right_down_to_its_own_end_only():
    table = sid_table(catalogue_of([("<a_0>", "<b_0>"), ("<a_0>", "<b_0>", "<c_0>")]), Counter())
    right_down_to = {"level1@1": 1.0, "level2@1": 1.0}
    assert level_recall([[1]], [0], table, (1,)) == right_down_to | {"level3@1": 0.0}
    assert level_recall([[0]], [1], table, (1,)) == right_down_to | {"level3@1": 0.0}
    assert level_recall([[0]], [0], table, (1,)) == right_down_to | {"level3@1": 1.0}


def test_level_recall_never_rises_and_ends_with_the_hit_rate():
    rng = np.random.default_rng(0)
    for _ in range(20):
        table = sid_table(catalogue_of([tuple(map(str, sid)) for sid in random_sids(rng)]), Counter())
        lists = [rng.permutation(len(table.sids)).tolist() for _ in range(30)]
        targets = rng.integers(len(table.sids), size=30).tolist()
        hits = means(row_values(ranks_of(lists, targets), (1, 3)))
        for k in (1, 3):
            shares = [share for name, share in level_recall(lists, targets, table, (1, 3)).items() if name.endswith(f"@{k}")]
            assert shares == sorted(shares, reverse=True)
            assert shares[-1] == pytest.approx(hits[f"hr@{k}"])


def test_breadth_is_coverage_and_popularity_against_what_was_bought():
    table, popularity = sid_table(TOY, Counter()), Counter({0: 1, 1: 3, 2: 2})
    found = breadth([[0], [0]], [Row("u", (3,), 2), Row("v", (3,), 2)], table, popularity, 1)
    assert found == {"coverage@1": pytest.approx(1 / 3), "popularity@1": 2.0}


def test_intervals_hold_the_mean_and_a_constant_has_none():
    users = [str(i // 2) for i in range(400)]
    values = {"hr@1": (np.arange(400) % 5 == 0).astype(float), "one": np.ones(400)}
    found = bootstrap(values, users, 0)
    low, high = found["hr@1"]
    assert low < 0.2 < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.2 * 0.8 / 400), rel=0.35)
    assert found["one"] == [1.0, 1.0]
    assert bootstrap(values, users, 0) == found


def test_baselines_of_a_toy_shop():
    table = sid_table(TOY, Counter())
    train = [Row("u", (0,), 2), Row("v", (1,), 2), Row("w", (0,), 3), Row("x", (3,), 2)]
    lists = baselines(train, [Row("t", (3, 0), 0)], table, 2)
    assert lists["popularity"] == [[1, 2]]
    assert lists["last"] == [[0, 2, 1]]
    assert lists["markov"] == [[1, 2, 0]]


@pytest.mark.skipif(not AMAZON.parent.is_dir(), reason="the shared Amazon data is not beside the checkout")
def test_baselines_on_real_data_have_the_known_hit_rates():
    catalogue = read_catalogue(Path(f"{AMAZON}.index.json"), None)
    train, test = (list(read_rows(Path(f"{AMAZON}.{split}.csv"), catalogue)) for split in ("train", "test"))
    table = sid_table(catalogue, item_popularity(train))
    lists = baselines(train, test, table, 10)
    hits = {name: means(views(ranked, test, table, (10,))["sid"])["hr@10"] for name, ranked in lists.items()}
    assert round(hits["popularity"], 4) == 0.0618
    assert round(hits["markov"], 4) == 0.1041


# ---------------------------------------------------------------------------------------------- the evaluator


def test_the_evaluator_sees_the_model_as_it_is_and_leaves_it_as_it_was():
    catalogue, tokenizer = catalogue_of(MIXED), byte_bpe(TEXT, 300)
    add_sid_tokens(tokenizer, sorted({token for sid in MIXED for token in sid}))
    model = small_model("qwen2", len(tokenizer), tie_word_embeddings=True).train()
    evaluator = evaluate.Evaluator(tokenizer, catalogue, WORDING, shop_rows(20, len(MIXED)), num_beams=10, batch_size=8)
    before = evaluator.recommend(model)
    found = evaluator.metrics(model)
    assert set(found) == {f"{name}@{k}" for name in ("hr", "ndcg") for k in (1, 3, 5, 10)}
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        model.get_input_embeddings().weight.neg_()
    assert (evaluator.recommend(model).score != before.score).any()


def test_the_batch_size_changes_no_recommendation():
    catalogue, tokenizer = catalogue_of(MIXED), metaspace_tokenizer()
    add_sid_tokens(tokenizer, sorted({token for sid in MIXED for token in sid}))
    model, rows = small_model("qwen2", len(tokenizer), tie_word_embeddings=True).eval(), shop_rows(20, len(MIXED))
    one, many = (
        evaluate.Evaluator(tokenizer, catalogue, WORDING, rows, task=task, num_beams=6, batch_size=size).recommend(model)
        for task in ("title_sid",)
        for size in (1, 16)
    )
    assert (one.sid == many.sid).all()
    assert np.allclose(one.score, many.score, atol=1e-4)


def evaluator_of(sids: list[tuple[str, ...]], rows: list[Row], **settings) -> tuple[evaluate.Evaluator, PreTrainedModel]:
    """An evaluator of some rows on a toy catalogue, and an untied model."""
    tokenizer = byte_bpe(TEXT, 300)
    add_sid_tokens(tokenizer, sorted({token for sid in sids for token in sid}))
    model = small_model("qwen2", len(tokenizer), tie_word_embeddings=False).eval()
    return evaluate.Evaluator(tokenizer, catalogue_of(sids), WORDING, rows, **settings), model


def test_a_value_that_is_no_number_is_told_though_only_the_last_rows_meet_it():
    rows = [Row("u", (place % 5,) * (1 + place // 5), 3) for place in range(20)]
    rows[-1] = Row("u", (19,) * 4, 3)
    evaluator, model = evaluator_of([*FIXED[:19], ("<x_0>", *FIXED[19][1:])], rows, num_beams=1, batch_size=4)
    evaluator.recommend(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[evaluator.sids[19][0], 5] = torch.nan
    with pytest.raises(InputError, match=r"^the model: model.embed_tokens.weight holds 1 values that are NaN or infinite, "):
        evaluator.metrics(model)


def test_finite_weights_that_overflow_are_told_too():
    evaluator, model = evaluator_of(FIXED, shop_rows(4, len(FIXED)), model_name="--base_model run")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(3e38)
    with pytest.raises(InputError, match="^--base_model run: its weights are finite but overflow in float32, "):
        evaluator.recommend(model)


def test_more_beams_than_sids_find_each_sid_once_with_and_without_the_constraint():
    sids = [("<a_0>",), ("<a_0>", "<b_0>"), ("<a_1>", "<b_1>")]
    evaluator, model = evaluator_of(sids, shop_rows(6, 3), num_beams=1000)
    assert np.sort(evaluator.recommend(model).sid, axis=1).tolist() == [[0, 1, 2]] * 6
    assert [len(set(beams)) for beams in evaluator.recommend_freely(model, np.arange(6))] == [3] * 6


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("store"))


def test_two_processes_write_the_numbers_of_one(store, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: another number of threads sums in another order
    assert evaluate.main(arguments_of(store, output_dir=tmp_path / "one")) == 0
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "evaluate.py")]
    done = subprocess.run(
        [sys.executable, *command, *arguments_of(store, output_dir=tmp_path / "two")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    for metrics in (one, two):
        metrics["run"].pop("seconds")
    assert one == two
    assert (tmp_path / "one/predictions.jsonl").read_text() == (tmp_path / "two/predictions.jsonl").read_text()
    assert done.stderr.count("HR@10 of this model") == 1, "rank 0 alone speaks"


def test_a_run_leaves_metrics_predictions_a_picture_and_examples_in_words(store, capsys):
    assert evaluate.main(arguments_of(store, examples=2)) == 0
    folder = store / "model" / "evaluation"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["baselines"]) == {"popularity", "markov", "last"}
    assert {f"{name}@{k}" for name in ("hr", "ndcg", "mrr") for k in (1, 3, 5, 10)} == set(metrics["sid"])
    assert metrics["sid"].keys() == metrics["item"].keys() <= metrics["baselines"]["markov"].keys()
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 30
    hits = sum(line["rank"] is not None and line["rank"] <= 10 for line in lines)
    assert hits / 30 == pytest.approx(metrics["sid"]["hr@10"])
    assert len({entry["sid"] for entry in lines[0]["recommendations"]}) == 10
    assert (folder / "recommendations.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert out.count("then bought") == 2
    assert "Product number" in out


def test_an_index_with_appended_items_and_more_beams_than_tokens_is_evaluated_to_the_end(store, tmp_path, capsys, caplog):
    """What rq.generate_indices --append leaves: 10 new items, each with one more token than an old one's SID."""
    base = byte_bpe(TEXT, 300)
    sids = [*FIXED, *(sid + ("<d_0>",) for sid in FIXED[5:15])]
    add_sid_tokens(base, sorted({token for sid in sids for token in sid}))
    model = tmp_path / "model"
    base.save_pretrained(model)
    small_model("qwen2", len(base), tie_word_embeddings=True).eval().save_pretrained(model)
    (model / "prompts.json").write_text((store / "model" / "prompts.json").read_text())
    catalogue = catalogue_of(sids)
    (tmp_path / "X.index.json").write_text(json.dumps({item.id: item.sid for item in catalogue.items}))
    write_rows(tmp_path / "X.test.csv", catalogue, shop_rows(30, len(sids)))
    files = {"base_model": model, "test_file": tmp_path / "X.test.csv", "sid_index_path": tmp_path / "X.index.json"}
    for beams in (2, 5, 1000):
        flags = arguments_of(
            store, **files, train_file="", item_meta_path="", num_beams=beams, output_dir=tmp_path / str(beams)
        )
        assert evaluate.main(flags) == 0, caplog.text
        metrics = json.loads((tmp_path / str(beams) / "metrics.json").read_text())
        shares = [metrics["levels"][f"level{level}@1"] for level in (1, 2, 3, 4)]
        assert shares == sorted(shares, reverse=True)
    assert metrics["sid"]["hr@50"] == 1, "1000 beams hold all 30 SIDs"
    recommend = arguments_of(store, **files, train_file="", item_meta_path="", recommend="110 | 125", num_beams=5)
    assert evaluate.main(recommend) == 0
    assert capsys.readouterr().out.count(", p ") == 5


def test_the_prompt_is_the_one_in_the_checkpoint(store, tmp_path):
    other = tmp_path / "model"
    other.mkdir()
    for file in (store / "model").iterdir():
        if file.is_file() and file.name != "prompts.json":
            (other / file.name).write_bytes(file.read_bytes())
    assert evaluate.main(arguments_of(store, output_dir=tmp_path / "a")) == 0
    assert evaluate.main(arguments_of(store, base_model=other, output_dir=tmp_path / "b")) == 0
    first, second = ((tmp_path / name / "predictions.jsonl").read_text() for name in "ab")
    assert first != second


def test_recommend_answers_for_titles_and_ids(store, capsys):
    assert evaluate.main(arguments_of(store, recommend="product NUMBER 12 | 103")) == 0
    out = capsys.readouterr().out
    bought, recommended = out.split("recommended")
    assert "Product number 12\n" in bought
    assert "Product number 3\n" in bought
    assert recommended.count("Product number") == 10


WRONG = {
    "checkpoint without SID tokens": ({"base_model": "plain"}, "knows no SID token"),
    "index of another catalogue": (
        {"sid_index_path": "other.index.json", "train_file": ""},
        "the CSV and the index must be of one dataset",
    ),
    "empty test file": ({"test_file": "empty.csv"}, "empty.csv: is empty"),
    "test file without rows": ({"test_file": "header.csv"}, "header.csv: has no rows"),
    "no such checkpoint": ({"base_model": "nowhere"}, "there is no such folder"),
    "title of many items": ({"recommend": "product"}, "is in the titles of 20 items"),
    "title of no item": ({"recommend": "Produkt numbr 12"}, "the closest is 'Product number 12'"),
    "beams below one": ({"num_beams": 0}, "--num_beams 0 must be at least 1"),
    "unknown flag": ({"num_beam": 3}, "did you mean num_beams?"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_user_can_mend_ends_in_one_line(store, caplog, case):
    other = {str(100 + place): ["<a_0>", "<b_77>", f"<c_{place}>"] for place in range(len(FIXED))}
    (store / "other.index.json").write_text(json.dumps(other))
    (store / "empty.csv").write_text("")
    (store / "header.csv").write_text(",".join(CSV_COLUMNS) + "\n")
    flags, message = WRONG[case]
    files = {name: store / value for name, value in flags.items() if name in ("base_model", "test_file", "sid_index_path")}
    assert evaluate.main(arguments_of(store, **{**flags, **files})) == 2
    (error,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert error.startswith("evaluate.py: ")
    assert message in error
    assert "\n" not in error


def in_file(name: str, *path: str, value: object):
    """A change of a checkpoint: the value at a path of one of its JSON files."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        holder = content
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = value
        (folder / name).write_text(json.dumps(content))

    return change


def content(name: str, write):
    """A change of a checkpoint: the bytes of one of its files."""

    def change(folder: Path) -> None:
        (folder / name).write_bytes(write((folder / name).read_bytes()))

    return change


ODD_CHECKPOINTS = {
    "prompts that are null": (content("prompts.json", lambda old: b"null"), "prompts.json: holds None; expected"),
    "prompts that are a list": (in_file("prompts.json", "prompts", value=[]), "has [] for prompts"),
    "a prompt that is a number": (in_file("prompts.json", "prompts", "sid_sid", value=5), "templates, all strings"),
    "tasks in a list": (in_file("prompts.json", "tasks", value=[["sid_sid"]]), "has [['sid_sid']] for tasks"),
    "tasks that are a number": (in_file("prompts.json", "tasks", value=5), "has 5 for tasks"),
    "a category that is null": (in_file("prompts.json", "category", value=None), "has None for a category"),
    "a size that is text": (in_file("config.json", "hidden_size", value="32"), "no config that loads"),
    "a size below zero": (in_file("config.json", "vocab_size", value=-1), "no causal language model loads"),
    "a size of its own": (
        in_file("config.json", "intermediate_size", value=64),
        "of another shape than its config",
    ),
    "a size that no memory holds": (
        in_file("config.json", "vocab_size", value=10**12),
        "a model of the sizes in its",
    ),
    "more layers than any": (
        in_file("config.json", "num_hidden_layers", value=10**9),
        "has 1000000000 for num_hidden",
    ),
    "a config that is a list": (content("config.json", lambda old: b"[]"), "no config that loads"),
    "a tokenizer cut short": (content("tokenizer.json", lambda old: old[: len(old) // 2]), "no tokenizer that loads"),
    "a tokenizer without a model": (in_file("tokenizer.json", "model", value=None), "no tokenizer that loads"),
    "a length that is text": (in_file("tokenizer_config.json", "model_max_length", value="x"), "no tokenizer that loads"),
    "weights cut short": (content("model.safetensors", lambda old: old[:-1]), "no causal language model loads"),
    "weights that are none": (content("model.safetensors", lambda old: b"\xff" * 999), "no causal language model loads"),
}


@pytest.mark.parametrize("fault", ODD_CHECKPOINTS)
def test_a_checkpoint_whose_files_hold_anything_else_ends_in_one_line(store, tmp_path, caplog, fault):
    change, message = ODD_CHECKPOINTS[fault]
    shutil.copytree(store / "model", tmp_path / "model")
    change(tmp_path / "model")
    output = tmp_path / "results"
    assert evaluate.main(arguments_of(store, base_model=tmp_path / "model", output_dir=output)) == 2
    (error,) = [record.getMessage() for record in caplog.records if record.name.startswith("sft") and record.levelno > 30]
    assert message in error
    check_line(error)
    assert not output.exists()


def test_titles_cannot_speak_to_the_terminal(store, tmp_path):
    """Neither in the answer nor in the log nor in a refusal; what is trained on stays as it is."""
    odd = "Mug \x1b]0;owned\x07 \x9b31m \u202e Jug"
    items = json.loads((store / "X.item.json").read_text())
    for item in items.values():
        item["title"] = f"{odd} {item['title']}"
    (tmp_path / "X.item.json").write_text(json.dumps(items))
    for recommend, code in (("103", 0), (f"{odd} product", 2)):
        flags = arguments_of(store, item_meta_path=tmp_path / "X.item.json", recommend=recommend)
        done = subprocess.run(
            [sys.executable, "evaluate.py", *flags],
            cwd=ROOT,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            capture_output=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == code, done.stderr
        told = done.stdout.decode("ascii") if code == 0 else done.stderr.decode("ascii").splitlines()[-1]
        assert r"Mug \x1b]0;owned\x07 \x9b31m \u202e Jug" in told
        assert told.replace("\n", "").isprintable()
    catalogue = read_catalogue(store / "X.index.json", tmp_path / "X.item.json")
    assert catalogue.items[0].title.startswith(odd)


@pytest.mark.parametrize("flags", [{}, {"recommend": "103"}], ids=["all rows", "recommend"])
def test_a_model_that_is_not_finite_is_told_in_one_line(store, tmp_path, caplog, flags):
    model = AutoModelForCausalLM.from_pretrained(store / "model")
    with torch.no_grad():
        model.model.norm.weight[:3] = torch.nan
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(store / "model").save_pretrained(tmp_path / "model")
    assert evaluate.main(arguments_of(store, base_model=tmp_path / "model", **flags)) == 2
    (error,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    expected = (
        f"evaluate.py: --base_model {tmp_path / 'model'}: model.norm.weight holds 3 values that are NaN or infinite, so"
    )
    assert error.startswith(expected)
    assert not (tmp_path / "model" / "evaluation").exists()


def test_an_index_whose_tokens_the_model_lacks_is_refused(store, caplog):
    more = {str(100 + place): sid for place, sid in enumerate(FIXED)} | {"999": ("<a_0>", "<b_0>", "<c_99>")}
    (store / "more.index.json").write_text(json.dumps(more))
    assert evaluate.main(arguments_of(store, sid_index_path=store / "more.index.json")) == 2
    assert "1 of its 15 SID tokens (e.g. <c_99>) are unknown" in caplog.text


def test_help_and_bad_flags_answer_before_anything_heavy_loads():
    heavy = "assert not {'torch', 'transformers', 'matplotlib'} & {*sys.modules}"
    code = f"import sys, evaluate; evaluate.main(['--base_modle', 'x']); {heavy}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "evaluate.py: unknown flag --base_modle (did you mean base_model?); --help lists them\n"
