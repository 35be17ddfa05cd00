"""The frozen prefix gives the plain recipe's loss and gradient: full logits, one pass, dense masked gradient."""

import copy
import errno
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED, small_model
from datasets import Dataset

import data
import sft
from sid_sft.files import InputError
from sid_sft.forward.architecture import why_not_exact
from sid_sft.forward.choose import attempt, disagreement, make_trial
from sid_sft.forward.examples import Examples
from sid_sft.forward.frozen_head import FrozenHead, FrozenLogSumExp
from sid_sft.forward.frozen_prefix import FrozenPrefix
from sid_sft.forward.plain import PlainForward
from sid_sft.forward.store import Store
from sid_sft.forward.trees import build_tree, pad
from sid_sft.sid_rows import SidRowAdamW, SidRows
from sid_sft.steps import deal
from sid_sft.tasks import DEFAULT_TASKS, TASKS

ARCHITECTURES = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen2-untied": {"tie_word_embeddings": False},
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 11, "tie_word_embeddings": True},
    "gemma2": {
        "sliding_window": 9,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 7.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {"sliding_window": 9, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_neox": {"tie_word_embeddings": False},
    "phi": {"tie_word_embeddings": False},  # its head has a bias
}


def extended(kind: str, tokenizer, sid_tokens, dtype=torch.float32):
    """A small model with the SID rows, frozen but for them."""
    model = small_model(kind.split("-")[0], len(tokenizer) + 7, **ARCHITECTURES.get(kind, {})).to(dtype)
    rows = sft.freeze_llm(model, tokenizer.convert_tokens_to_ids(sid_tokens), sid_tokens)
    return model.eval(), rows


def plain_recipe(model, examples, indices, side="right"):
    """HF's own forward: padded batch, attention mask, all logits, labels -100 where nothing is supervised; a sum."""
    ids = [examples.ids(i) for i in indices]
    inputs, mask = torch.from_numpy(pad(ids)), torch.from_numpy(pad([np.ones_like(row) for row in ids]))
    labels = [np.where(np.arange(len(row)) < examples.prompt_len[i], -100, row) for i, row in zip(indices, ids, strict=True)]
    labels = torch.from_numpy(pad(labels, fill=-100))
    if side == "left":
        inputs, mask, labels = (
            torch.stack([row.roll(int((1 - m).sum())) for row, m in zip(part, mask, strict=True)])
            for part in (inputs, mask, labels)
        )
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=inputs, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def rows_gradient(rows, backward):
    """The gradient of each table's SID rows after a backward (zeros where none arrived); cleared behind it."""
    backward()
    rows.collect_gradients()
    gradients = [master.grad.clone() for master in rows.masters]
    for master in rows.masters:
        master.grad = None
    return gradients


def frozen_loss(frozen, indices):
    return sum(frozen.nll(part).sum() for part, *_ in frozen.cut(indices))


def assert_equal_to_plain(model, rows, frozen, indices, *, loss_tolerance=1e-6, gradient_tolerance=1e-5, side="right"):
    expected = plain_recipe(model, frozen.examples, indices, side)
    expected_gradient = rows_gradient(rows, expected.backward)
    found = frozen_loss(frozen, indices)
    gradient = rows_gradient(rows, found.backward)
    assert abs(found - expected) <= loss_tolerance * abs(expected)
    for wanted, got in zip(expected_gradient, gradient, strict=True):
        assert (got - wanted).norm() <= gradient_tolerance * wanted.norm()
    assert sum(wanted.norm() for wanted in expected_gradient) > 0


def some_of_each_task(examples, count=6):
    picks = [np.nonzero(examples.task == task)[0][:count] for task in np.unique(examples.task)]
    return np.concatenate(picks)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_loss_and_gradient_are_the_plain_recipes_on_every_architecture(kind, tokenizer, sid_tokens, dataset):
    model, rows = extended(kind, tokenizer, sid_tokens)
    assert why_not_exact(model) == ""
    examples = Examples(dataset)
    frozen = FrozenPrefix(model, rows, examples, 4, cache_bytes=10**8)
    assert_equal_to_plain(model, rows, frozen, some_of_each_task(examples))


@pytest.mark.parametrize("name", [task.name for task in TASKS.values() if task.rows != "preferences"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen2-untied"])
def test_loss_and_gradient_are_the_plain_recipes_on_every_task(kind, name, tokenizer, sid_tokens, dataset):
    model, rows = extended(kind, tokenizer, sid_tokens)
    examples = Examples(dataset)
    indices = np.nonzero(examples.task == list(TASKS).index(name))[0][:12]
    frozen = FrozenPrefix(model, rows, examples, 4)
    assert_equal_to_plain(model, rows, frozen, indices)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("group_users", [False, True])
@pytest.mark.parametrize("cache", ["none", "labels", "some", "all", "host", "disk"])
def test_every_cache_and_grouping_gives_the_plain_recipes_numbers(
    cache, group_users, side, tokenizer, sid_tokens, dataset, tmp_path
):
    model, rows = extended("qwen2", tokenizer, sid_tokens)
    examples = Examples(dataset)
    whole = FrozenPrefix(model, rows, examples, 4, cache_bytes=10**9)
    label_bytes = int(whole.cache.cache_plan.label_start[-1]) * (
        32 * 4 + 4 + 4 + 8
    )  # hidden state, log-sum-exp, logit, target
    half_of_keys = (
        whole.cache.cache_plan.slots // 2 * (2 * 2 * 2 * 8 * 4)
    )  # layers, keys and values, heads, head size, float32
    budget = {"none": 0, "labels": label_bytes, "some": label_bytes + half_of_keys}.get(cache, 10**9)
    frozen = FrozenPrefix(
        model,
        rows,
        examples,
        4,
        cache_bytes=budget,
        cache_place={"host": "host", "disk": tmp_path}.get(cache, "device"),
        group_users=group_users,
    )
    for epoch in range(2):
        half = np.arange(epoch % 2, len(examples), 2)  # the second round meets what the first one kept, and what is new
        assert_equal_to_plain(model, rows, frozen, half, side=side)
        assert_equal_to_plain(model, rows, frozen, np.arange(0, len(examples), 3), side=side)
    assert (frozen.cache is not None) == (cache != "none")
    share = {"none": 0, "labels": 0, "some": 0.5}.get(cache, 1)
    slots, keys = (frozen.cache.cache_plan.slots, frozen.cache.keys) if frozen.cache else (0, None)
    assert slots / whole.cache.cache_plan.slots == pytest.approx(share, abs=0.1)
    assert (keys is not None) == (share > 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["qwen2", "qwen2-untied"])
@pytest.mark.parametrize("budget", [0, 20_000, 10**9])
def test_what_two_processes_are_dealt_adds_up_to_the_plain_recipes_numbers(budget, kind, tokenizer, sid_tokens, dataset):
    """Each process keeps what it has computed for itself; the second epoch meets that."""
    model, rows = extended(kind, tokenizer, sid_tokens)
    examples = Examples(dataset)
    processes = [FrozenPrefix(model, rows, examples, 4, cache_bytes=budget) for _ in range(2)]
    indices = np.arange(0, len(examples), 2)
    expected = plain_recipe(model, examples, indices)
    expected_gradient = rows_gradient(rows, expected.backward)
    for _ in range(2):
        hands = [deal(frozen.cut(indices, 2), 2)[number] for number, frozen in enumerate(processes)]
        assert sorted(np.concatenate([*hands[0], *hands[1]])) == indices.tolist()
        losses = [sum(frozen.nll(part).sum() for part in hand) for frozen, hand in zip(processes, hands, strict=True)]
        gradients = [rows_gradient(rows, loss.backward) for loss in losses]
        assert abs(sum(losses) - expected) <= 1e-6 * expected
        for wanted, *parts in zip(expected_gradient, *gradients, strict=True):
            assert (sum(parts) - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.skipif(not (SHARED / "base-lm").is_dir(), reason="the real data and base model are not here")
@pytest.mark.parametrize("name", [task.name for task in TASKS.values() if task.rows != "preferences"])
def test_loss_and_gradient_are_the_plain_recipes_on_real_data_and_a_pretrained_model(name, industrial):
    model, rows, examples = industrial
    indices = np.nonzero(examples.task == list(TASKS).index(name))[0][:8]
    frozen = FrozenPrefix(model, rows, examples, 4, cache_bytes=10**9)
    for _ in range(2):
        assert_equal_to_plain(model, rows, frozen, indices)


@pytest.fixture(scope="module")
def industrial(tmp_path_factory):
    """The pretrained model with the Industrial SIDs, and 40 rows of each task."""
    files = SHARED / "data" / "amazon" / "Industrial_and_Scientific"
    tokenizer = sft.load_tokenizer(str(SHARED / "base-lm"), trust_remote_code=False)
    known, tokens = len(tokenizer), sft.token_extender(f"{files}.index.json").get_new_tokens()
    ids = sft.add_sid_tokens(tokenizer, tokens)
    model = sft.load_model(str(SHARED / "base-lm"), from_scratch=False, trust_remote_code=False).float().eval()
    sft.grow_embeddings(model, len(tokenizer))
    sft.init_rows(model, ids, known, seed=0)
    dataset = data.build_dataset(
        data.Source(Path(f"{files}.train.csv")),
        list(DEFAULT_TASKS),
        catalogue=data.read_catalogue(Path(f"{files}.index.json"), Path(f"{files}.item.json")),
        prompts=data.read_prompts(None, "Industrial_and_Scientific"),
        tokenizer=tokenizer,
        cutoff_len=512,
        sample=40,
        cache_dir=tmp_path_factory.mktemp("industrial"),
    )
    return model, sft.freeze_llm(model, ids, tokens), Examples(dataset)


def test_a_disk_without_room_is_named_and_nothing_is_left_there(tokenizer, sid_tokens, dataset, tmp_path, monkeypatch):
    model, rows = extended("qwen2", tokenizer, sid_tokens)

    def full_disk(handle, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sid_sft.forward.store.os.posix_fallocate", full_disk)
    with pytest.raises(InputError, match="has no room for the 0.0 GB .*No space left"):
        FrozenPrefix(model, rows, Examples(dataset), 4, cache_bytes=10**9, cache_place=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_stores_in_one_folder_share_no_file_and_touch_none_that_is_there(tmp_path, monkeypatch):
    """As when two processes keep things in one folder at the same moment: no name has been given back yet."""
    (tmp_path / "store-1").write_bytes(b"a user's own")
    monkeypatch.setattr("sid_sft.forward.store.os.unlink", lambda path: None)
    stores = [Store(1000, torch.device("cpu"), tmp_path) for _ in range(2)]
    first, second = (store.allocate((4,), torch.float32).fill_(number) for number, store in enumerate(stores))
    assert first.tolist() == [0.0] * 4
    assert second.tolist() == [1.0] * 4
    assert (tmp_path / "store-1").read_bytes() == b"a user's own"


def test_examples_of_one_task_with_and_without_an_own_prefix_fall_into_one_step(tokenizer, sid_tokens):
    """The second example's prompt has words before its first SID, the first one's has none beyond the template."""
    model, rows = extended("qwen2", tokenizer, sid_tokens)
    sid = rows.ids.tolist()
    ids = [[1, 2, sid[0], 5, sid[1], 0], [1, 2, 7, 8, sid[0], 5, sid[2], 0], [1, 2, 7, 9, sid[3], 5, sid[2], 0]]
    columns = {
        "input_ids": ids,
        "length": [len(row) for row in ids],
        "prompt_len": [4, 6, 6],
        "static_len": [2, 4, 4],
        "task": [0, 0, 0],
        "user": [0, 0, 1],
    }
    for budget in (0, 10**9):
        frozen = FrozenPrefix(model, rows, Examples(Dataset.from_dict(columns)), 4, cache_bytes=budget)
        assert frozen.plan.own_len.tolist() == [0, 2, 2]
        assert_equal_to_plain(model, rows, frozen, np.arange(3))


def test_a_kept_label_follows_the_rows_as_they_move(tokenizer, sid_tokens, dataset):
    model, rows = extended("qwen2", tokenizer, sid_tokens)
    examples = Examples(dataset)
    frozen = FrozenPrefix(model, rows, examples, 4, cache_bytes=10**9)
    indices = some_of_each_task(examples)
    optimizer = SidRowAdamW(rows, lr=0.05)
    for _ in range(3):
        assert_equal_to_plain(model, rows, frozen, indices)
        frozen_loss(frozen, indices).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_fifty_steps_of_both_ways_walk_the_same_path(dtype, tolerance, tokenizer, sid_tokens, dataset):
    losses, masters = {}, {}
    examples = Examples(dataset)
    for way in ("plain", "frozen"):
        model, rows = extended("qwen2", tokenizer, sid_tokens, dtype)
        frozen = FrozenPrefix(model, rows, examples, 4, cache_bytes=10**9)
        optimizer = SidRowAdamW(rows, lr=0.01, weight_decay=0.1)
        rng, losses[way] = np.random.default_rng(0), []
        for _ in range(50):
            step = rng.choice(len(examples), 16, replace=False)
            loss = plain_recipe(model, examples, step) if way == "plain" else frozen_loss(frozen, step)
            loss = loss / examples.labels[step].sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[way].append(loss.item())
        masters[way] = rows.masters[0].detach()
    np.testing.assert_allclose(losses["frozen"], losses["plain"], rtol=tolerance)
    if dtype == torch.float64:
        torch.testing.assert_close(masters["frozen"], masters["plain"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["qwen2", "qwen2-untied"])
def test_peft_trainable_tokens_give_the_same_gradient(kind, tokenizer, sid_tokens, dataset):
    peft = pytest.importorskip("peft")
    model, rows = extended(kind, tokenizer, sid_tokens)
    examples = Examples(dataset)
    indices = some_of_each_task(examples, 3)
    frozen = FrozenPrefix(model, rows, examples, 4)
    ours = rows_gradient(rows, frozen_loss(frozen, indices).backward)
    other = small_model("qwen2", len(tokenizer) + 7, **ARCHITECTURES[kind])
    targets = ["embed_tokens"] if kind == "qwen2" else ["embed_tokens", "lm_head"]
    config = peft.TrainableTokensConfig(token_indices=rows.ids.tolist(), target_modules=targets)
    adapted = peft.get_peft_model(other, config).eval()
    plain_recipe(adapted, examples, indices).backward()
    deltas = [p for name, p in adapted.named_parameters() if p.requires_grad]
    theirs = [p.grad for p in deltas]
    assert len(theirs) == len(ours)
    for wanted, got in zip(theirs, ours, strict=True):
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("kind", ["qwen2", "qwen2-untied"])
def test_in_bfloat16_it_is_no_further_from_float32_than_the_plain_recipe(kind, tokenizer, sid_tokens, dataset):
    examples = Examples(dataset)
    indices = some_of_each_task(examples, 8)
    exact_model, exact_rows = extended(kind, tokenizer, sid_tokens, torch.bfloat16)
    exact_model = exact_model.float()
    exact_rows = SidRows(exact_model, exact_rows.ids.tolist(), exact_rows.tokens)
    exact = rows_gradient(exact_rows, plain_recipe(exact_model, examples, indices).backward)
    model, rows = extended(kind, tokenizer, sid_tokens, torch.bfloat16)
    plain = rows_gradient(rows, plain_recipe(model, examples, indices).backward)
    frozen = FrozenPrefix(model, rows, examples, 4, cache_bytes=10**9)
    ours = rows_gradient(rows, frozen_loss(frozen, indices).backward)
    for wanted, theirs, got in zip(exact, plain, ours, strict=True):
        # Both errors are rounding noise of one size; a tenth is the room that noise needs.
        assert (got - wanted).norm() <= 1.1 * (theirs - wanted).norm()


def test_the_hook_guards_a_plain_forward_of_the_same_model(tokenizer, sid_tokens, dataset):
    model, rows = extended("qwen2", tokenizer, sid_tokens)
    examples = Examples(dataset)
    indices = some_of_each_task(examples, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    keys = list(before)
    frozen = FrozenPrefix(model, rows, examples, 4)
    loss = frozen_loss(frozen, indices)
    loss.backward()
    weight = model.get_input_embeddings().weight
    assert weight.grad is None  # no dense gradient exists on this way
    ours, rows.masters[0].grad = rows.masters[0].grad, None
    plain_recipe(model, examples, indices).backward()
    touched = weight.grad.abs().sum(1) > 0
    assert touched[rows.ids].any()
    touched[rows.ids] = False
    assert not touched.any()
    assert (weight.grad[rows.ids] - ours).norm() <= 1e-5 * ours.norm()
    assert list(model.state_dict()) == keys
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("mamba", {}, "recurrent"),
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic positions"),
        ("mixtral", {"output_router_logits": True}, "router loss"),
    ],
)
def test_models_for_which_it_cannot_be_exact_are_named(kind, settings, reason, tokenizer):
    assert reason in why_not_exact(small_model(kind, len(tokenizer), **settings))


def test_the_trial_at_the_start_sees_a_difference(tokenizer, sid_tokens, dataset):
    model, rows = extended("qwen2", tokenizer, sid_tokens)
    examples = Examples(dataset)
    trial, frozen = make_trial(model, examples), FrozenPrefix(model, rows, examples, 4)
    assert disagreement(frozen, trial) < 1e-5
    frozen.row_of = frozen.row_of.roll(1)
    assert disagreement(frozen, trial) > 1e-3


@pytest.mark.parametrize("kind", ["qwen2", "qwen2-untied", "gemma2", "cohere", "gpt2"])
def test_the_plain_forward_gives_hf_s_loss_per_task(kind, tokenizer, sid_tokens, dataset):
    model, _ = extended(kind, tokenizer, sid_tokens)
    examples = Examples(dataset)
    plain = PlainForward(model, examples, 5)
    indices = some_of_each_task(examples, 5)
    parts = [part.indices for part in plain.cut(indices)]
    assert sorted(np.concatenate(parts)) == sorted(indices)
    found = sum(plain.nll(part) for part in parts)
    for task in np.unique(examples.task):
        wanted = plain_recipe(model, examples, indices[examples.task[indices] == task])
        assert abs(found[int(task)] - wanted) <= 1e-5 * wanted


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "mistral", "gpt2"])
def test_users_as_trees_give_the_plain_loss_and_gradient_in_full_fine_tuning(kind, tokenizer, sid_tokens, dataset):
    model = small_model(kind, len(tokenizer) + 7, **ARCHITECTURES.get(kind, {})).eval()
    examples = Examples(dataset)
    indices = np.arange(len(examples))
    results = []
    for group_users in (False, True):
        forward = PlainForward(model, examples, 4, group_users=group_users)
        parts = forward.cut(indices)
        assert sorted(np.concatenate([part.indices for part in parts])) == indices.tolist()
        loss = sum(forward.nll(part.indices) for part in parts)
        loss.sum().backward()
        results.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
        model.zero_grad()
    (loss, gradients), (other, others) = results
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-6)
    for wanted, got in zip(gradients, others, strict=True):
        assert (got - wanted).norm() <= 2e-5 * wanted.norm() + 1e-6


def test_a_tree_stores_what_sequences_share_once():
    tree = build_tree([np.array([5, 6, 8, 9]), np.array([5, 6, 7]), np.array([5, 6]), np.array([4])])
    assert tree.tokens.tolist() == [4, 5, 6, 7, 8, 9]
    assert tree.depth.tolist() == [0, 0, 1, 2, 2, 3]
    assert [path.tolist() for path in tree.paths] == [[1, 2, 4, 5], [1, 2, 3], [1, 2], [0]]
    assert np.nonzero(tree.ancestors()[5])[0].tolist() == [1, 2, 4, 5]


def test_each_user_s_shared_beginning_is_run_once(tokenizer, sid_tokens, dataset):
    model, rows = extended("qwen2", tokenizer, sid_tokens)
    examples = Examples(dataset)
    frozen = FrozenPrefix(model, rows, examples, 4)
    trees = [frozen.plan.tree(number) for number in range(len(frozen.plan.parts.nodes))]
    assert sum(len(prefix.tree.tokens) for prefix in trees) == frozen.plan.parts.nodes.sum() < frozen.plan.own_len.sum()
    covered = sorted(i for prefix in trees for i in prefix.members)
    assert covered == np.nonzero(frozen.plan.own_len > 0)[0].tolist()


@pytest.mark.parametrize("finish", [lambda logits: logits, lambda logits: torch.tanh(logits) * 3])
@pytest.mark.parametrize("ids", [[3, 7, 1029], list(range(512, 1024)), list(range(1200))])
def test_the_frozen_head_s_log_sum_exp_and_gradient_are_those_of_all_its_logits(ids, finish):
    """Blocks of 512 rows: with some SID rows, with none, and of SID rows alone."""
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((9, 4), (1300, 4), (1300,)))
    head = FrozenHead(weight, bias, np.array(ids), finish, room=1)
    h, wanted_h = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    logits = finish(F.linear(wanted_h, weight, bias))
    frozen = torch.ones(1300, dtype=torch.bool)
    frozen[ids] = False
    expected = logits[:, frozen].logsumexp(1)
    found = FrozenLogSumExp.apply(h, head)
    torch.testing.assert_close(found, expected)
    scale = torch.arange(1.0, 10.0, dtype=torch.float64)
    (found * scale).sum().backward()
    (expected * scale).sum().backward()
    torch.testing.assert_close(h.grad, wanted_h.grad)
    targets = torch.randint(1300, (9,))
    torch.testing.assert_close(head.logit(hidden, targets), logits.gather(1, targets[:, None]).squeeze(1).detach())


def test_dropout_of_frozen_blocks_is_off_and_counted(tokenizer):
    model = small_model("gpt2", len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64)
    assert sft.turn_dropout_off(model) > 0
    assert sft.turn_dropout_off(model) == 0
    model.train()
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_the_examples_view_reads_what_the_dataset_holds(dataset):
    examples = Examples(dataset)
    for i in (0, 57, len(dataset) - 1):
        assert examples.ids(i).tolist() == dataset[i]["input_ids"]
        assert examples.labels[i] == dataset[i]["length"] - dataset[i]["prompt_len"]
    assert copy.copy(examples).length.sum() == sum(dataset["length"])


def windows_of_one_user(sid: list[int], *, titles: bool, count: int = 60) -> Examples:
    """A user's examples as a cutoff leaves them: the last ten items of a history that grows."""
    item = [[7 + (place * 10 + token) % 300 for token in range(10)] for place in range(count + 10)]
    columns: dict[str, list] = {name: [] for name in ("input_ids", "length", "prompt_len", "static_len", "task", "user")}
    for last in range(count):
        history = [token for place in range(last, last + 10) for token in (item[place] if titles else [sid[place % 5], 5])]
        prompt = [1, 2, *history]
        ids = [*prompt, sid[last % 5], 5, 0]
        static = len(prompt) if titles else 2
        task = list(TASKS).index("title_sid" if titles else "sid_sid")
        for key, value in zip(columns, (ids, len(ids), len(prompt), static, task, 1), strict=True):
            columns[key].append(value)
    return Examples(Dataset.from_dict(columns))


@pytest.mark.parametrize("titles", [True, False])
def test_no_tree_outgrows_its_bound_however_little_a_user_s_examples_share(titles, tokenizer, sid_tokens, monkeypatch):
    for module in ("prefix_parts", "prefix_plan", "plain"):
        monkeypatch.setattr(f"sid_sft.forward.{module}.TREE_TOKENS", 300)
    model, rows = extended("qwen2", tokenizer, sid_tokens)
    examples = windows_of_one_user(rows.ids.tolist(), titles=titles)
    frozen = FrozenPrefix(model, rows, examples, 4, cache_bytes=10**9, group_users=True)
    assert frozen.plan.parts.nodes.max(initial=0) <= 300
    groups = frozen.plan.tail_groups(np.arange(len(examples)))
    assert sorted(i for group in groups for i in group) == list(range(len(examples)))
    assert all(len(frozen.plan.tail_tree(group).tokens) <= 300 for group in groups)
    plain = PlainForward(model, examples, 4, group_users=True)
    assert all(len(plain.tree(group).tokens) <= 300 for group in plain.groups(np.arange(len(examples))))
    assert_equal_to_plain(model, rows, frozen, np.arange(len(examples)))


def test_nothing_is_run_to_be_cached_that_no_one_reads(tokenizer, sid_tokens):
    """Without static labels and room for keys nothing is cached, so no own prefix is run but those of the step."""
    model, rows = extended("qwen2", tokenizer, sid_tokens)
    sid = rows.ids.tolist()
    ids = [[1, 2, 7, 8 + place, sid[0], 5, sid[2], 0] for place in range(4)]
    columns = {
        "input_ids": ids,
        "length": [8] * 4,
        "prompt_len": [6] * 4,
        "static_len": [4] * 4,
        "task": [0] * 4,
        "user": [0, 1, 2, 3],
    }
    frozen = FrozenPrefix(model, rows, Examples(Dataset.from_dict(columns)), 4)
    assert frozen.cache is None or frozen.cache.cache_plan.batches == 0
    assert_equal_to_plain(model, rows, frozen, np.arange(2))


def test_keys_without_room_cost_their_own_prefix_at_every_step(tokenizer, sid_tokens, dataset):
    model, rows = extended("qwen2", tokenizer, sid_tokens)
    examples = Examples(dataset)
    title_sid = np.nonzero(examples.task == list(TASKS).index("title_sid"))[0][:1]
    kept, not_kept = (FrozenPrefix(model, rows, examples, 4, cache_bytes=size).plan for size in (10**9, 0))
    own_len = int(kept.own_len[title_sid].sum())
    assert own_len > 0
    assert not_kept.cost(title_sid) - kept.cost(title_sid) == pytest.approx(own_len)


def test_a_way_that_fails_halfway_leaves_no_gradient_for_the_next(tokenizer, sid_tokens, dataset, monkeypatch):
    model, rows = extended("qwen2", tokenizer, sid_tokens)
    examples = Examples(dataset)
    trial, frozen = make_trial(model, examples), FrozenPrefix(model, rows, examples, 4)
    with_gradient, nll = [], frozen.nll

    def fails_later(indices):
        with_gradient.append(torch.is_grad_enabled())
        if sum(with_gradient) == 3:
            raise RuntimeError("no more")
        return nll(indices)

    monkeypatch.setattr(frozen, "nll", fails_later)
    assert attempt(lambda: frozen, rows, trial)[0] is None
    assert sum(with_gradient) == 3
    assert all(table.master.grad is None and table.weight.grad is None for table in rows.tables)
