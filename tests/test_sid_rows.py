"""Only the SID rows move, every other number is bit-equal, and the rows travel alone."""

import json
import shutil

import pytest
import torch
from conftest import small_model
from safetensors.torch import load_file, save_file

import sft
from sid_sft.checkpoint import apply_sid_rows
from sid_sft.files import InputError
from sid_sft.forward.architecture import tables_of
from sid_sft.sid_rows import ROWS_FILE, SidRowAdamW, SidRows, base_hash, differing_values
from sid_sft.vocabulary import vocabulary_size

IDS = [5, 40, 41, 90]
TOKENS = ["<a_0>", "<a_1>", "<b_0>", "<b_1>"]


def loss_of(model, seed=0):
    ids = torch.randint(100, (4, 12), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_sid_rows_move_whatever_the_optimizer_does(tied, dtype):
    model = small_model("qwen2", 100, tie_word_embeddings=tied).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = sft.freeze_llm(model, IDS, TOKENS)
    assert [table.name for table in rows.tables] == (["embedding"] if tied else ["embedding", "head"])
    optimizer = SidRowAdamW(rows, lr=0.05, weight_decay=0.1)
    for step in range(5):
        loss_of(model, step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    others = [i for i in range(100) if i not in IDS]
    for name, value in model.state_dict().items():
        if name in tables:
            assert (value[IDS] != before[name][IDS]).any(dim=1).all()
            assert torch.equal(value[others], before[name][others])
        else:
            assert torch.equal(value, before[name])


@pytest.mark.parametrize("tied", [True, False])
def test_freezing_leaves_gradients_on_the_sid_rows_alone(tied):
    model = small_model("qwen2", 100, tie_word_embeddings=tied)
    SidRows(model, IDS, TOKENS)
    assert all(parameter.requires_grad for parameter in model.parameters())
    rows = sft.freeze_llm(model, IDS, TOKENS)
    loss_of(model).backward()
    tables = [table.weight for table in rows.tables]
    assert len(tables) == (1 if tied else 2)
    for parameter in model.parameters():
        assert parameter.requires_grad == any(parameter is weight for weight in tables)
    for weight in tables:
        others = [i for i in range(100) if i not in IDS]
        assert weight.grad[IDS].ne(0).any()
        assert weight.grad[others].eq(0).all()


def test_an_index_without_sid_tokens_cannot_be_frozen_for():
    with pytest.raises(InputError, match="--freeze_LLM True, but the index has no SID token"):
        sft.freeze_llm(small_model("qwen2", 100), [], [])


def test_the_hook_returns_a_new_tensor_with_the_sid_rows_alone():
    model = small_model("qwen2", 100, tie_word_embeddings=True)
    rows = SidRows(model, IDS, TOKENS)
    grad = torch.ones(100, 32)
    masked = rows.mask_grad(grad)
    assert masked[IDS].eq(1).all()
    assert masked.sum() == len(IDS) * 32
    assert grad.eq(1).all()


def test_the_step_is_torch_s_adamw_on_the_rows_alone():
    model = small_model("qwen2", 100, tie_word_embeddings=True)
    rows = sft.freeze_llm(model, IDS, TOKENS)
    reference = torch.nn.Parameter(rows.masters[0].detach().clone())
    optimizer = SidRowAdamW(rows, lr=0.01, weight_decay=0.3)
    expected = torch.optim.AdamW([reference], lr=0.01, weight_decay=0.3)
    for step in range(4):
        loss_of(model, step).backward()
        reference.grad = model.get_input_embeddings().weight.grad[IDS].clone()
        optimizer.step()
        expected.step()
        optimizer.zero_grad()
    torch.testing.assert_close(rows.masters[0], reference)
    assert torch.equal(model.get_input_embeddings().weight[IDS], rows.masters[0])


def test_a_thousand_steps_below_a_bfloat16_step_add_up():
    model = small_model("qwen2", 100, tie_word_embeddings=True).to(torch.bfloat16)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[IDS] = 1.0
    rows = SidRows(model, IDS, TOKENS)
    optimizer = SidRowAdamW(rows, lr=1e-4)  # bfloat16 has no number between 1 and 1 - 2**-8 = 0.996
    for _ in range(1000):
        rows.masters[0].grad = torch.ones_like(rows.masters[0])
        optimizer.step()
    assert torch.allclose(weight[IDS].float(), torch.tensor(0.9), atol=0.004)


def test_a_resumed_optimizer_goes_on_from_its_float32_rows():
    paths = []
    for resumed in (False, True):
        model = small_model("qwen2", 100, tie_word_embeddings=True).to(torch.bfloat16)
        rows = sft.freeze_llm(model, IDS, TOKENS)
        optimizer = SidRowAdamW(rows, lr=1e-3)
        for step in range(6):
            if resumed and step == 3:
                state = optimizer.state_dict()
                model = small_model("qwen2", 100, tie_word_embeddings=True).to(torch.bfloat16)
                rows = sft.freeze_llm(model, IDS, TOKENS)
                optimizer = SidRowAdamW(rows, lr=1e-3)
                optimizer.load_state_dict(state)
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        paths.append(rows.masters[0].detach())
    assert torch.equal(*paths)


def test_a_rows_file_turns_the_base_into_the_trained_model(base, tokenizer, sid_tokens, tmp_path):
    trained = sft.load_model(str(base), from_scratch=False, trust_remote_code=False)
    sft.grow_embeddings(trained, len(tokenizer))
    rows = SidRows(trained, tokenizer.convert_tokens_to_ids(sid_tokens), sid_tokens)
    digest = base_hash(trained, int(rows.ids[0]))
    with torch.no_grad():
        rows.masters[0].normal_()
    rows.write()
    rows.save(tmp_path / ROWS_FILE, digest)
    model = sft.load_model(str(base), from_scratch=False, trust_remote_code=False)
    plain = sft.load_tokenizer(str(base), trust_remote_code=False)
    apply_sid_rows(model, plain, tmp_path / ROWS_FILE)
    assert plain.convert_tokens_to_ids(sid_tokens) == rows.ids.tolist() or set(sid_tokens) <= set(plain.get_vocab())
    for (name, value), other in zip(model.state_dict().items(), trained.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_rows_of_another_base_or_tokenizer_are_refused(base, tokenizer, sid_tokens, tmp_path):
    model = sft.load_model(str(base), from_scratch=False, trust_remote_code=False)
    sft.grow_embeddings(model, len(tokenizer))
    rows = SidRows(model, tokenizer.convert_tokens_to_ids(sid_tokens), sid_tokens)
    rows.save(tmp_path / "other", "0" * 24)
    rows.save(tmp_path / "same", base_hash(model, int(rows.ids[0])))
    fresh = sft.load_tokenizer(str(base), trust_remote_code=False)
    with pytest.raises(InputError, match="another base model"):
        apply_sid_rows(model, fresh, tmp_path / "other")
    assert "<a_0>" not in fresh.get_vocab()
    fresh.add_tokens(["something else"])
    with pytest.raises(InputError, match="other ids"):
        apply_sid_rows(model, fresh, tmp_path / "same")


def test_a_broken_rows_file_is_named(tmp_path):
    path = tmp_path / ROWS_FILE
    path.write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="is not a rows file"):
        apply_sid_rows(small_model("qwen2", 100), None, path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="is not a rows file"):
        apply_sid_rows(small_model("qwen2", 100), None, path)


BROKEN_ROWS = {  # what is changed of a right file's tensors and metadata, and what is told
    "no ids": ({"ids": None}, {}, "its tensors are"),
    "no table": ({"embedding": None}, {}, "its tensors are"),
    "a table that no model has": ({"other": torch.ones(4, 32)}, {}, "its tensors are"),
    "one row for all": ({"embedding": torch.ones(1, 32)}, {}, r"the shape \(1, 32\), not one row for each of 4 ids"),
    "a number for a row": ({"embedding": torch.ones(4)}, {}, r"the shape \(4,\)"),
    "NaN": ({"embedding": torch.full((4, 32), torch.nan)}, {}, "no finite number"),
    "whole numbers": ({"embedding": torch.ones(4, 32, dtype=torch.int32)}, {}, "no finite number of 32 or 64 bits"),
    "ids twice": ({"ids": torch.tensor([5, 40, 40, 90])}, {}, "no ascending list"),
    "ids below zero": ({"ids": torch.tensor([-5, 40, 41, 90])}, {}, "no ascending list"),
    "ids that are no whole numbers": ({"ids": torch.tensor([5.0, 40, 41, 90])}, {}, "no ascending list"),
    "no ids at all": ({"ids": torch.zeros(0, dtype=torch.int64), "embedding": torch.ones(0, 32)}, {}, "no ascending list"),
    "tokens that are null": ({}, {"tokens": "null"}, "it has None for the tokens of 4 ids"),
    "tokens in a list": ({}, {"tokens": '[["<a_0>", "<a_1>", "<b_0>", "<b_1>"]]'}, "for the tokens of 4 ids"),
    "tokens nested too deep": ({}, {"tokens": "[" * 100_000}, "recursion"),
    "a token too few": ({}, {"tokens": '["<a_0>", "<a_1>", "<b_0>"]'}, "for the tokens of 4 ids"),
    "no tokens": ({}, {"tokens": None}, "it has None for the tokens"),
    "no hash": ({}, {"base": None}, "no hash of a base"),
}


@pytest.mark.parametrize("fault", BROKEN_ROWS)
def test_a_rows_file_that_no_run_wrote_is_refused_and_changes_nothing(fault, tmp_path):
    model = small_model("qwen2", 100, tie_word_embeddings=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tensors, metadata, message = BROKEN_ROWS[fault]
    right = {"ids": torch.tensor(IDS), "embedding": torch.ones(4, 32)}, {"tokens": json.dumps(TOKENS), "base": "0" * 24}
    tensors, metadata = ({**old, **new} for old, new in zip(right, (tensors, metadata), strict=True))
    path = tmp_path / ROWS_FILE
    save_file(
        {name: value for name, value in tensors.items() if value is not None},
        path,
        metadata={name: value for name, value in metadata.items() if value is not None},
    )
    with pytest.raises(InputError, match=message):
        apply_sid_rows(model, None, path)
    with pytest.raises(InputError, match="is not a rows file"):
        SidRows(model, IDS, TOKENS).load(path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_rows_file_cut_short_or_of_another_width_is_refused(tmp_path):
    model = small_model("qwen2", 100, tie_word_embeddings=True)
    path = tmp_path / ROWS_FILE
    SidRows(small_model("qwen2", 100, tie_word_embeddings=True, hidden_size=16, head_dim=4), IDS, TOKENS).save(
        path, "0" * 24
    )
    with pytest.raises(InputError, match=r"those of another model \(tables and widths {'embedding': 16}, this one's"):
        apply_sid_rows(model, None, path)
    for size in (0, 7, 100, path.stat().st_size - 1):
        (tmp_path / "short").write_bytes(path.read_bytes()[:size])
        with pytest.raises(InputError, match="is not a rows file"):
            apply_sid_rows(model, None, tmp_path / "short")


def test_the_hash_of_a_base_knows_its_weights_but_not_their_dtype_or_the_sid_rows():
    model = small_model("qwen2", 100, tie_word_embeddings=True).to(torch.bfloat16)
    digest = base_hash(model, 40)
    with torch.no_grad():
        model.get_input_embeddings().weight[40:] += 1
    assert base_hash(model.float(), 40) == digest
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 1.5
    assert base_hash(model, 40) != digest


def test_a_single_changed_frozen_value_is_counted():
    base, model = (small_model("qwen2", 100, tie_word_embeddings=False) for _ in range(2))
    rows = SidRows(model, IDS, TOKENS)
    with torch.no_grad():
        rows.masters[0].add_(1)
    rows.write()
    assert differing_values(model, base, rows.ids) == {}
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
        model.lm_head.weight[0, 0] += 1
    assert differing_values(model, base, rows.ids) == {"model.norm.weight": 1, "lm_head.weight": 1}


# ---------------------------------------------------------------------------------------------- the vocabulary


def test_new_rows_are_distinct_and_nearer_to_the_mean_than_the_old_ones_which_stay():
    model = small_model("qwen2", 100, tie_word_embeddings=False)
    before = {name: weight.detach().clone() for name, weight in tables_of(model).items()}
    sft.init_rows(model, [60, 61, 62], known=50, seed=1)
    for name, weight in tables_of(model).items():
        old, new = before[name], weight[60:63]
        assert torch.equal(weight[:60], old[:60])
        assert torch.equal(weight[63:], old[63:])
        spread, around_mean = old[:50].std(0), (new - old[:50].mean(0)) / old[:50].std(0)
        assert 0.2 < around_mean.std() < 0.4
        distances = torch.cdist(new, new) + 99 * torch.eye(3)
        assert distances.min() > 0.3 * spread.norm()


def test_a_row_s_first_value_depends_on_its_own_id_alone():
    first, second = (small_model("qwen2", 100) for _ in range(2))
    sft.init_rows(first, [60, 61, 62], known=50, seed=1)
    sft.init_rows(second, [60, 62], known=50, seed=1)
    assert torch.equal(first.get_input_embeddings().weight[62], second.get_input_embeddings().weight[62])


def test_every_seed_that_a_flag_takes_gives_first_values_of_its_own():
    seeds = [0, 1, 42, 2**29, 2**30 - 1, 2**30, 2**30 + 42, 1764000000, 2**31, 2**32 - 1]
    drawn = []
    for seed in seeds:
        model = small_model("qwen2", 100)
        sft.init_rows(model, [60], known=50, seed=seed)
        drawn.append(model.get_input_embeddings().weight[60].detach())
    assert len({tuple(row.tolist()) for row in drawn}) == len(seeds)
    old = small_model("qwen2", 100).get_input_embeddings().weight[:50]
    noise = torch.randn(32, generator=torch.Generator().manual_seed(60 << 1))
    torch.testing.assert_close(drawn[2], old.mean(0) + 0.3 * old.std(0) * noise)


def test_embeddings_grow_and_never_shrink():
    model = small_model("qwen2", 100)
    sft.grow_embeddings(model, 80)
    assert model.get_input_embeddings().weight.shape[0] == 100
    sft.grow_embeddings(model, 130)
    assert model.get_input_embeddings().weight.shape[0] == 130 == model.config.vocab_size


def test_a_tokenizer_whose_ids_would_need_rows_beyond_all_memory_is_refused(base, tmp_path):
    for last, fits in ((5000, True), (2**31 - 1, False)):
        shutil.copytree(base, tmp_path / str(last))
        path = tmp_path / str(last) / "tokenizer.json"
        content = json.loads(path.read_text())
        content["model"]["vocab"]["far"] = last
        path.write_text(json.dumps(content))
        tokenizer = sft.load_tokenizer(str(tmp_path / str(last)), trust_remote_code=False)
        if fits:
            assert vocabulary_size(tokenizer) == last + 1
        else:
            with pytest.raises(InputError, match=r"its tokenizer has \d+ tokens, but ids up to 2,147,483,647"):
                vocabulary_size(tokenizer)


def test_a_grown_catalogue_appends_and_leaves_old_ids_alone(base):
    tokenizer = sft.load_tokenizer(str(base), trust_remote_code=False)
    first = sft.add_sid_tokens(tokenizer, ["<a_1>", "<b_1>"])
    again = sft.add_sid_tokens(tokenizer, ["<a_1>", "<b_1>"])
    assert again == []
    grown = sft.add_sid_tokens(tokenizer, ["<a_0>", "<a_1>", "<b_1>", "<d_1>"])
    assert tokenizer.convert_tokens_to_ids(["<a_1>", "<b_1>"]) == first
    assert grown == [max(first) + 1, max(first) + 2]


def test_a_sid_token_that_means_something_to_the_tokenizer_is_refused(base):
    tokenizer = sft.load_tokenizer(str(base), trust_remote_code=False)
    for token in ("<|end|>", "a"):
        with pytest.raises(InputError, match="already means something else"):
            sft.add_sid_tokens(tokenizer, [token])


def test_the_index_named_on_the_command_line_is_the_one_that_opens(tmp_path):
    for name, token in (("X.index.json", "<a_1>"), ("X.faiss-rq.index.json", "<a_2>"), ("odd.json", "<a_3>")):
        (tmp_path / name).write_text(json.dumps({"0": [token]}))
        assert sft.token_extender(str(tmp_path / name)).get_new_tokens() == [token]
    extender = sft.TokenExtender(str(tmp_path), "X", ".faiss-rq.index.json")
    assert extender.get_new_tokens() == ["<a_2>"]


def test_a_rows_file_holds_ids_tokens_and_rows_and_nothing_else(tmp_path):
    model = small_model("qwen2", 100, tie_word_embeddings=False)
    SidRows(model, IDS, TOKENS).save(tmp_path / ROWS_FILE, "x")
    content = load_file(tmp_path / ROWS_FILE)
    assert {name: tuple(value.shape) for name, value in content.items()} == {
        "ids": (4,),
        "embedding": (4, 32),
        "head": (4, 32),
    }
