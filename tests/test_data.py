import ast
import csv
import json
import logging
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import toy

import data
from data import build_dataset
from sid_sft.catalogue import read_catalogue
from sid_sft.cells import LIST_COLUMNS, read_list
from sid_sft.dataset_cache import Source, processes
from sid_sft.encoding import LINE_PATTERNS, Encoder
from sid_sft.files import InputError, whole_folder
from sid_sft.interactions import Row, read_preferences, read_rows
from sid_sft.tasks import PROMPTS, TASK_GROUPS, TASKS, read_prompts, render

AMAZON = Path(__file__).parents[2] / "shared/data/amazon/Industrial_and_Scientific"
PREFERENCE = "wants sturdy things"
PREFERENCES = [
    {
        "user": "ann",
        "split": "train",
        "user_preference": PREFERENCE,
        "context": {"history_items": ["0", {"item_id": 1}], "target_item": {"sid": "<a_1><b_0><c_1><d_0>"}},
    },
    {
        "user": "zoe",
        "split": "train",
        "user_preference": "likes\ntape",
        "context": {"history_items": ["<a_0><b_1><c_1>"], "target_item": 4},
    },
    {
        "user": "bob",
        "split": "valid",
        "user_preference": "tape",
        "context": {"history_items": ["1"], "target_item": "0"},
    },
]


@pytest.fixture
def folder(tmp_path):
    toy.write_index(tmp_path)
    toy.write_items(tmp_path)
    toy.write_csv(tmp_path / "toy.csv")
    toy.write_json(tmp_path / "toy.preferences.json", PREFERENCES)
    return tmp_path


def catalogue_of(folder):
    return read_catalogue(folder / "toy.index.json", folder / "toy.item.json")


def rows_of(task, folder, catalogue):
    if task.rows == "items":
        return [Row("", (), item) for item in range(len(catalogue.items))]
    if task.rows == "preferences":
        return list(read_preferences(folder / "toy.preferences.json", catalogue, "train"))
    return list(read_rows(folder / "toy.csv", catalogue))


def build(folder, tasks=TASK_GROUPS, tokenizer=None, split="train", **options):
    options = {"cutoff_len": 512, "cache_dir": folder / "cache", "prompts": read_prompts(None, "Toys")} | options
    return build_dataset(
        Source(folder / "toy.csv", folder / "toy.preferences.json", split),
        list(tasks),
        **{"catalogue": catalogue_of(folder), "tokenizer": tokenizer or toy.byte_level(), **options},
    )


def one_error(function, *arguments):
    """The message of the InputError, which is one line."""

    def read() -> None:
        value = function(*arguments)
        if isinstance(value, Iterator):
            list(value)

    with pytest.raises(InputError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------- ids


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
@pytest.mark.parametrize("name", toy.TOKENIZERS)
def test_the_ids_of_a_prompt_are_the_tokenizers_ids_of_its_text(folder, name, task):
    tokenizer, catalogue, prompts = toy.TOKENIZERS[name](), catalogue_of(folder), read_prompts(None, "Toys")
    encoder = Encoder(tokenizer, catalogue, prompts, cutoff_len=512)
    rows = rows_of(task, folder, catalogue)
    assert rows
    end = tokenizer.eos_token_id
    for row, example in zip(rows, encoder.encode(task, rows), strict=True):
        prompt, answer = render(task, row, catalogue, prompts)
        whole = tokenizer(prompt)["input_ids"]
        assert example.input_ids[: example.prompt_len] == (whole[:-1] if whole[-1] == end else whole)
        assert example.input_ids[example.prompt_len :] == [
            *tokenizer(answer, add_special_tokens=False)["input_ids"],
            end,
        ]
        sids = [at for at, token in enumerate(example.input_ids) if token in encoder.sid_token_ids]
        assert example.static_len == min(sids, default=len(example.input_ids))
        assert example.dropped == 0


def test_lines_are_encoded_once_exactly_where_the_rules_allow_it(folder):
    made = {}
    for name, make in toy.TOKENIZERS.items():
        encoder = Encoder(make(), catalogue_of(folder), read_prompts(None, "Toys"), cutoff_len=512)
        made[name] = (encoder.lines("sid") is not None, encoder.lines("title") is not None)
    by_title = {name for name, (_, title) in made.items() if title}
    assert all(sid for sid, _ in made.values())
    assert by_title == {"gpt2", "qwen2", "llama3"}


def changed(tokenizer, change):
    """A tokenizer with other rules."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    change(rules)
    core = toy.Tokenizer.from_str(json.dumps(rules))
    return toy.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


def added(content, **options):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return lambda rules: rules["added_tokens"].append(
        {"id": len(rules["model"]["vocab"]) + len(rules["added_tokens"]) - 1, "content": content, **flags, **options}
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda rules: rules["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        lambda rules: rules["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True),
        lambda rules: rules["pre_tokenizer"]["pretokenizers"][0].update(behavior="MergedWithNext"),
        lambda rules: rules["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True}),
        lambda rules: rules.update(pre_tokenizer=rules["pre_tokenizer"]["pretokenizers"][1]),
        lambda rules: rules.update(pre_tokenizer=None),
        lambda rules: rules.update(normalizer={"type": "Lowercase"}),
        added("\n"),
        added("%\n/"),
        added("Tape", lstrip=True),
        added("Gloves", rstrip=True),
        added("Gloves", single_word=True),
    ],
)
def test_titles_are_encoded_whole_where_a_rule_is_not_one_that_is_known(folder, change):
    tokenizer, catalogue, prompts = (
        changed(toy.TOKENIZERS["qwen2"](), change),
        catalogue_of(folder),
        read_prompts(None, "Toys"),
    )
    encoder = Encoder(tokenizer, catalogue, prompts, cutoff_len=512)
    assert encoder.lines("title") is None
    for task in (TASKS["title_sid"], TASKS["sid_sid"]):
        rows = rows_of(task, folder, catalogue)
        for row, example in zip(rows, encoder.encode(task, rows), strict=True):
            text = render(task, row, catalogue, prompts)[0]
            assert example.input_ids[: example.prompt_len] == tokenizer(text)["input_ids"]


def test_titles_are_encoded_whole_where_chance_decides(folder):
    tokenizer = changed(toy.TOKENIZERS["qwen2"](), lambda rules: rules["model"].update(dropout=0.5))
    encoder = Encoder(tokenizer, catalogue_of(folder), read_prompts(None, "Toys"), cutoff_len=512)
    assert encoder.lines("title") is None


def test_the_tokenizer_of_qwen2_has_a_known_pattern():
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert PRETOKENIZE_REGEX in LINE_PATTERNS


def test_a_pattern_that_joins_lines_would_give_other_ids_line_by_line(folder):
    tokenizer = toy.TOKENIZERS["o200k-like"]()
    whole = tokenizer("5%\n/slash")["input_ids"]
    assert whole != tokenizer("5%\n")["input_ids"] + tokenizer("/slash")["input_ids"]


@pytest.mark.parametrize("token", ["\n<", ">\n", "<c_0>\n<a_0>", "x<a_0>"])
def test_an_added_token_that_reaches_into_a_sid_makes_whole_texts_be_encoded(folder, token):
    tokenizer, catalogue, prompts = toy.byte_level(), catalogue_of(folder), read_prompts(None, "Toys")
    assert Encoder(tokenizer, catalogue, prompts, cutoff_len=512).lines("sid") is not None
    tokenizer.add_tokens([token])
    encoder = Encoder(tokenizer, catalogue, prompts, cutoff_len=512)
    assert encoder.lines("sid") is None
    rows = rows_of(TASKS["sid_sid"], folder, catalogue)
    for row, example in zip(rows, encoder.encode(TASKS["sid_sid"], rows), strict=True):
        text = render(TASKS["sid_sid"], row, catalogue, prompts)[0]
        assert example.input_ids[: example.prompt_len] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("options", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}])
@pytest.mark.parametrize("token", ["\n", "per line", "customer"])
def test_other_added_tokens_that_take_white_space_leave_sid_lines_exact(folder, token, options):
    tokenizer, catalogue = changed(toy.byte_level(), added(token, **options)), catalogue_of(folder)
    path = toy.write_json(
        folder / "prompts.json", {"sid_sid": "one customer \n \n{history}", "sid_title": "per line{history}"}
    )
    prompts = read_prompts(path, "Toys")
    encoder = Encoder(tokenizer, catalogue, prompts, cutoff_len=512)
    assert encoder.lines("sid") is not None
    for task in (TASKS["sid_sid"], TASKS["sid_title"]):
        rows = rows_of(task, folder, catalogue)
        for row, example in zip(rows, encoder.encode(task, rows), strict=True):
            text = render(task, row, catalogue, prompts)[0]
            assert example.input_ids[: example.prompt_len] == tokenizer(text)["input_ids"]


def test_sid_tokens_that_take_white_space_from_beside_them_make_whole_texts_be_encoded(folder):
    def strip(rules):
        for token in rules["added_tokens"]:
            token["rstrip"] = token["content"] == "<c_1>"

    tokenizer = changed(toy.byte_level(), strip)
    catalogue, prompts = catalogue_of(folder), read_prompts(None, "Toys")
    encoder = Encoder(tokenizer, catalogue, prompts, cutoff_len=512)
    assert encoder.lines("sid") is None
    rows = rows_of(TASKS["sid_sid"], folder, catalogue)
    for row, example in zip(rows, encoder.encode(TASKS["sid_sid"], rows), strict=True):
        text = render(TASKS["sid_sid"], row, catalogue, prompts)[0]
        assert example.input_ids[: example.prompt_len] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("head", ["", "Bought: ", "Bought:\n\n", "Bought: \n", "Bought:\n"])
@pytest.mark.parametrize("task", ["sid_sid", "title_title"])
def test_wording_of_ones_own_may_end_in_any_way_before_the_history(folder, head, task):
    path = toy.write_json(folder / "prompts.json", {task: head + "{history}"})
    catalogue, prompts, tokenizer = catalogue_of(folder), read_prompts(path, "Toys"), toy.TOKENIZERS["qwen2"]()
    rows = rows_of(TASKS[task], folder, catalogue)
    encoder = Encoder(tokenizer, catalogue, prompts, cutoff_len=512)
    for row, example in zip(rows, encoder.encode(TASKS[task], rows), strict=True):
        text = render(TASKS[task], row, catalogue, prompts)[0]
        assert text.startswith(head)
        assert example.input_ids[: example.prompt_len] == tokenizer(text)["input_ids"]


@pytest.mark.skipif(not AMAZON.with_suffix(".train.csv").exists(), reason="the Amazon files are not beside the checkout")
@pytest.mark.parametrize("task", ["sid_sid", "title_title", "item_sid_title"])
def test_the_ids_of_real_prompts_are_the_tokenizers_ids_of_their_text(task):
    from transformers import AutoTokenizer

    catalogue = read_catalogue(Path(f"{AMAZON}.index.json"), Path(f"{AMAZON}.item.json"))
    sids = {item.id: item.sid for item in catalogue.items}
    tokenizer = toy.add_sids(AutoTokenizer.from_pretrained(AMAZON.parents[2] / "base-lm"), sids)
    prompts = read_prompts(None, "Industrial_and_Scientific")
    encoder = Encoder(tokenizer, catalogue, prompts, cutoff_len=10_000)
    assert encoder.lines("title") is not None
    if TASKS[task].rows == "items":
        rows = [Row("", (), item) for item in range(len(catalogue.items))]
    else:
        rows = list(read_rows(Path(f"{AMAZON}.valid.csv"), catalogue))[::4]
    texts = [render(TASKS[task], row, catalogue, prompts) for row in rows]
    whole = tokenizer([prompt for prompt, _ in texts])["input_ids"]
    answers = tokenizer([answer for _, answer in texts], add_special_tokens=False)["input_ids"]
    for prompt, answer, example in zip(whole, answers, encoder.encode(TASKS[task], rows), strict=True):
        assert example.input_ids == [*prompt, *answer, tokenizer.eos_token_id]
        assert example.prompt_len == len(prompt)


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "metaspace-always", "llama2", "word-level"])
@pytest.mark.parametrize("task", ["sid_sid", "sid_title", "title_title", "title_sid"])
def test_a_users_shorter_prompt_is_a_token_prefix_of_the_longer_one(folder, name, task):
    catalogue = catalogue_of(folder)
    encoder = Encoder(toy.TOKENIZERS[name](), catalogue, read_prompts(None, "Toys"), cutoff_len=512)
    short, long = encoder.encode(TASKS[task], [row for row in rows_of(TASKS[task], folder, catalogue) if row.user == "ann"])
    assert long.prompt_len > short.prompt_len
    assert long.input_ids[: short.prompt_len] == short.input_ids[: short.prompt_len]
    if task == "sid_sid":
        assert long.input_ids[: len(short.input_ids) - 1] == short.input_ids[:-1]


def test_a_pad_or_cut_that_was_asked_of_the_tokenizer_before_changes_nothing(folder):
    tokenizer = toy.byte_level()
    first = build(folder, ["sid_sid"], tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    again = build(folder, ["sid_sid"], tokenizer)
    assert again.cache_files == first.cache_files
    assert build(folder, ["title_title"], tokenizer)[:] == build(folder, ["title_title"])[:]


# ---------------------------------------------------------------------------------------------- what is supervised


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_only_the_answer_is_supervised_and_its_end_is_learned_even_where_it_pads(folder, pad):
    tokenizer = toy.byte_level(pad=pad)
    example = public(folder, "SidSFTDataset", tokenizer)[0]
    supervised = [i for i, label in enumerate(example["labels"]) if label != -100]
    assert tokenizer.decode([example["labels"][i] for i in supervised]) == "<a_1><b_0><c_1><d_1><eos>"
    assert supervised == list(range(len(example["input_ids"]) - 5, len(example["input_ids"])))
    assert [example["labels"][i] for i in supervised] == [example["input_ids"][i] for i in supervised]
    prompt = tokenizer.decode(example["input_ids"][: supervised[0]])
    assert prompt == PROMPTS["sid_sid"].format(
        category="Toys", history="<a_0><b_0><c_0>\n<a_0><b_1><c_1>\n<a_1><b_0><c_1><d_0>\n"
    )


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_the_answer_is_not_in_the_prompt(folder, task):
    catalogue, prompts = catalogue_of(folder), read_prompts(None, "Toys")
    for row in rows_of(task, folder, catalogue):
        prompt, _ = render(task, row, catalogue, prompts)
        assert row.item not in row.history
        target = catalogue.items[row.item]
        shown_alone = task.rows == "items"
        assert ("".join(target.sid) in prompt) == (shown_alone and task.shows == "sid")
        assert (target.title in prompt) == (shown_alone and task.shows == "title")
        assert (row.preference in prompt) == (task.name != "preference") or not row.preference


def test_sids_of_any_depth_stand_whole_in_prompt_and_answer(folder):
    tokenizer = toy.byte_level()
    texts = [tokenizer.decode(example["input_ids"]) for example in build(folder, ["sid_sid"], tokenizer)]
    assert texts[1].endswith("<a_0><b_1><c_1>\n<a_1><b_0><c_1><d_0>\n<a_1><b_0><c_1><d_1>\n<a_2><b_2><c_2><eos>")
    assert texts[4].endswith("\n<a_2><b_2><c_2>\n<a_0><b_0><c_0>\n<a_1><b_0><c_1><d_0><eos>")


# ---------------------------------------------------------------------------------------------- cutoff and sampling


@pytest.mark.parametrize("task", ["sid_sid", "title_title"])
@pytest.mark.parametrize("name", ["gpt2", "llama2"])
def test_the_cutoff_drops_whole_oldest_items_and_keeps_template_and_answer(folder, caplog, name, task):
    tokenizer = toy.TOKENIZERS[name]()
    whole = build(folder, [task], tokenizer)
    longest = max(whole["length"])
    caplog.clear()
    with caplog.at_level(logging.INFO, "sft"):
        cut = build(folder, [task], tokenizer, cutoff_len=longest - 1)
    assert len(cut) == len(whole) == 5
    catalogue, prompts = catalogue_of(folder), read_prompts(None, "Toys")
    changed = 0
    for before, after, row in zip(whole, cut, rows_of(TASKS[task], folder, catalogue), strict=True):
        shorter = row._replace(history=row.history[after["dropped"] :])
        prompt, _ = render(TASKS[task], shorter, catalogue, prompts)
        assert after["input_ids"][: after["prompt_len"]] == tokenizer(prompt)["input_ids"]
        assert after["input_ids"][after["prompt_len"] :] == before["input_ids"][before["prompt_len"] :]
        assert after["length"] == len(after["input_ids"]) <= longest - 1
        assert (after["dropped"] == 0) == (before["length"] < longest)
        changed += after["dropped"] > 0
    assert caplog.text.count(f"{task}: {changed} of 5 examples lost old items to --cutoff_len {longest - 1}") == 1


@pytest.mark.parametrize("task", ["sid_sid", "title_sid"])
def test_a_very_long_history_is_cut_to_the_longest_that_fits(folder, task):
    catalogue, prompts = catalogue_of(folder), read_prompts(None, "Toys")
    encoder = Encoder(toy.byte_level(), catalogue, prompts, cutoff_len=512)
    row = Row("ann", tuple(range(4)) * 5000, 4)
    (example,) = encoder.encode(TASKS[task], [row])
    longer = row._replace(history=row.history[example.dropped - 1 :])
    answer = len(example.input_ids) - example.prompt_len
    assert len(example.input_ids) <= 512 < len(encoder.prompt_ids(TASKS[task], [longer])[0]) + answer
    assert (
        example.input_ids[: example.prompt_len]
        == encoder.prompt_ids(TASKS[task], [row._replace(history=row.history[example.dropped :])])[0]
    )


def test_an_example_over_the_cutoff_with_its_newest_item_alone_is_left_out_and_counted(folder, caplog):
    whole = build(folder, ["sid_sid"])
    newest = min(whole["length"])  # bob's and cleo's one-item histories
    with caplog.at_level(logging.INFO, "sft"):
        left = build(folder, ["sid_sid"], cutoff_len=newest, max_left_out=1)
    assert 0 < len(left) < 5
    assert f"sid_sid: {5 - len(left)} of 5 rows left out" in caplog.text
    message = one_error(lambda: build(folder, ["sid_sid"], cutoff_len=newest))
    assert f"task 'sid_sid': {5 - len(left)} of 5 rows would be left out, more than --max_left_out 0.2 allows" in message
    assert f"--cutoff_len {newest}" in message
    assert "cutoff_len 20 is shorter" in one_error(lambda: build(folder, ["sid_sid"], cutoff_len=20))


def test_sampling_is_decided_by_the_seed_and_the_task_alone(folder):
    def sample(seed, tasks=("sid_sid", "title_sid")):
        dataset = build(folder, tasks, sample=3, seed=seed)
        return [(row["task"], row["input_ids"]) for row in dataset]

    assert len(sample(1)) == 6
    assert sample(1) == sample(1)
    assert len({repr(sample(seed)) for seed in range(6)}) > 1
    assert sample(1, ["title_sid"]) == sample(1)[3:]
    drawn = [build(folder, ["sid_sid", "title_sid"], sample=3, seed=seed)["user"][:] for seed in range(6)]
    assert any(users[:3] != users[3:] for users in drawn)  # each task draws for itself
    everything = [(row["task"], row["input_ids"]) for row in build(folder, ["sid_sid", "title_sid"])]
    assert [row for row in everything if row in sample(1)] == sample(1)
    assert len(build(folder, ["sid_sid"], sample=99)) == 5


# ---------------------------------------------------------------------------------------------- what is told or refused


def test_collisions_twins_untitled_and_unindexed_items_are_counted_once(tmp_path, caplog):
    index = toy.write_index(tmp_path, {**toy.SIDS, "5": toy.SIDS["0"], "6": ["<a_3>"]})
    items = toy.write_items(tmp_path, {**toy.TITLES, "5": "Gloves", "6": " \n ", "77": "Unindexed"})
    with caplog.at_level(logging.INFO, "sft"):
        read_catalogue(index, items)
    assert [record.message for record in caplog.records] == [
        "Catalogue: 7 items, 6 distinct SIDs of 1 or 3 or 4 tokens",
        "2 of 7 items share their SID with another item (a hit on one is a hit on all)",
        "1 of 7 items have no title; the tasks with titles leave them out",
        "2 of 7 items share their title with another item",
        "1 items of the item file are not in the index and are not used",
    ]


def test_an_item_without_a_title_is_neither_asked_for_nor_shown_by_its_title(folder, caplog):
    toy.write_items(folder, {**toy.TITLES, "1": ""})
    tokenizer = toy.byte_level()
    with caplog.at_level(logging.INFO, "sft"):
        dataset = build(folder, ["item", "title_sid"], tokenizer)
    texts = [tokenizer.decode(example["input_ids"]) for example in dataset]
    assert len(texts) == 4 + 4 + 5
    assert not any("<b_1>" in text for text in texts)
    assert texts[8].endswith(f"follows them.\n{toy.TITLES['0']}\n{toy.TITLES['2']}\n<a_1><b_0><c_1><d_1><eos>")
    assert caplog.text.count("item_title_sid: 1 of 5 rows left out: no title") == 1
    toy.write_items(folder, dict.fromkeys(toy.TITLES, ""))
    assert "task 'title_sid' has no example" in one_error(lambda: build(folder, ["title_sid"]))


def test_rows_with_unknown_items_are_counted_in_every_run_and_left_out(folder, caplog):
    rows = [
        toy.csv_row("ann", ["0", "99", "1"], "2"),
        toy.csv_row("bob", ["1"], "98"),
        toy.csv_row("cleo", ["97"], "1"),
        toy.csv_row("dan", [], "1"),
        {**toy.csv_row("eve", ["2"], "4"), "item_title": "Another title", "history_item_sid": "['<a_1><b_0><c_1>']"},
    ]
    toy.write_csv(folder / "toy.csv", rows)
    told = []
    for _ in range(2):  # the second run opens what the first has built
        caplog.clear()
        with caplog.at_level(logging.INFO, "sft"):
            assert len(build(folder, ["sid_sid"], max_left_out=1)) == 2
        told.append([record.message for record in caplog.records if "toy.csv" in record.message])
    assert told[0] == [
        "toy.csv: 1 rows left out: their item is not in the index (5 rows)",
        "toy.csv: 1 rows left out: no item of their history is in the index (5 rows)",
        "toy.csv: 1 rows left out: their history is empty (5 rows)",
        "toy.csv: 2 history items left out: they are not in the index (5 rows)",
        "toy.csv: 1 SIDs lack the last token that the index has; the index is used (5 rows)",
        "toy.csv: 1 titles differ from the item file's; the item file is used (5 rows)",
    ]
    assert told[1] == told[0]


def test_more_than_a_fifth_of_the_rows_left_out_stops_unless_it_is_allowed(folder):
    good = [toy.csv_row("ann", "01", "2")] * 8
    unknown, nothing, strange = (toy.csv_row("bob", history, item) for history, item in (("1", "98"), ("", "1"), ("9", "1")))
    path = toy.write_csv(folder / "toy.csv", [*good, unknown, nothing])
    assert len(list(read_rows(path, catalogue_of(folder)))) == 8  # a fifth is not more than a fifth
    path = toy.write_csv(path, [*good, unknown, nothing, strange, strange])
    assert one_error(read_rows, path, catalogue_of(folder)) == (
        f"{path}: 4 of 12 rows would be left out, more than --max_left_out 0.2 allows: "
        "1 because their item is not in the index (line 10: '98', the index has ids like '0'), "
        "1 because their history is empty (line 11), 2 because no item of their history is in the index "
        "(line 12: '[9]', the index has ids like '0'); mend that or allow it with --max_left_out 1"
    )
    assert len(list(read_rows(path, catalogue_of(folder), max_left_out=0.34))) == 8
    path = toy.write_csv(path, [unknown, strange])
    message = "no row has a known item and history (1 because their item is not in the index (line 2: '98', "
    assert message in one_error(lambda: list(read_rows(path, catalogue_of(folder), max_left_out=1)))


def test_a_dataset_that_was_allowed_to_leave_rows_out_does_not_open_where_it_is_not(folder):
    toy.write_csv(folder / "toy.csv", [toy.csv_row("ann", "01", "2"), toy.csv_row("bob", "1", "98")])
    assert len(build(folder, ["sid_sid"], max_left_out=0.5)) == 1
    assert "1 of 2 rows would be left out" in one_error(build, folder, ["sid_sid"])
    assert len(build(folder, ["sid_sid"], max_left_out=0.5)) == 1


def test_items_without_titles_stop_the_tasks_of_users_rows_and_not_the_item_tasks(folder):
    toy.write_items(folder, {**toy.TITLES, "4": "", "2": None, "0": ""})
    assert len(build(folder, ["item"])) == 4
    message = one_error(build, folder, ["sid_title"])
    assert "task 'sid_title': 4 of 5 rows would be left out, more than --max_left_out 0.2 allows: no title" in message
    assert len(build(folder, ["sid_title"], max_left_out=0.8)) == 1


@pytest.mark.parametrize(
    ("cell", "title"),
    [
        (r"Caf\u00e9 5\" wide", 'Café 5" wide'),
        (r'"Caf\u00e9 3\/4"', "Café 3/4"),
        (r"\ud83d\ude00 mug", "\N{GRINNING FACE} mug"),
        ("Nuts &amp; Bolts &#39;M5&#39;", "Nuts & Bolts 'M5'"),
        ("5&amp;amp;deg; up", "5&deg; up"),
        (r"it\'s \xe9", "it's é"),
        (r"two\nlines", "two lines"),
        (" two\n lines", "two lines"),
    ],
)
def test_a_title_that_is_only_escaped_otherwise_does_not_differ(folder, caplog, cell, title):
    toy.write_items(folder, {**toy.TITLES, "2": title})
    row = toy.csv_row("ann", "01", "2")
    for other, differs in ((cell, False), (title, False), (cell + "!", True), ("", False)):
        rows = [{**row, "item_title": other}, {**toy.csv_row("ann", "2", "1"), "history_item_title": repr([other])}]
        caplog.clear()
        with caplog.at_level(logging.INFO, "sft"):
            assert len(list(read_rows(toy.write_csv(folder / "toy.csv", rows), catalogue_of(folder)))) == 2
        assert ("2 titles differ from the item file's" in caplog.text) == differs
        assert ("differ" in caplog.text) == differs


def test_a_json_list_of_titles_does_not_differ(folder, caplog):
    titles = {**toy.TITLES, "0": '\N{GRINNING FACE} 5" é 3/4', "1": "it's"}
    toy.write_items(folder, titles)
    row = {**toy.csv_row("ann", "01", "2"), "history_item_title": json.dumps([titles["0"], titles["1"]]).replace("/", r"\/")}
    with caplog.at_level(logging.INFO, "sft"):
        assert len(list(read_rows(toy.write_csv(folder / "toy.csv", [row]), catalogue_of(folder)))) == 1
    assert "differ" not in caplog.text


@pytest.mark.parametrize(
    ("fields", "title"),
    [
        ({"title": None}, ""),
        ({}, ""),
        ({"title": float("nan")}, ""),
        ({"title": ""}, ""),
        ({"title": 5}, "5"),
        ({"title": 7.5}, "7.5"),
    ],
)
def test_a_title_that_is_missing_or_a_number_refuses_nothing(folder, fields, title):
    items = {item: {"title": text} for item, text in toy.TITLES.items()}
    toy.write_json(folder / "toy.item.json", {**items, "1": fields})
    assert [item.title for item in catalogue_of(folder).items] == [{**toy.TITLES, "1": title}[item] for item in toy.TITLES]


def test_half_an_emoji_is_one_line_and_a_whole_one_is_a_character(folder):
    path = folder / "toy.item.json"
    path.write_text(json.dumps({**{item: {"title": "x"} for item in toy.SIDS}, "0": {"title": "\N{GRINNING FACE}"}}))
    assert "\\ud83d" in path.read_text()
    assert catalogue_of(folder).items[0].title == "\N{GRINNING FACE}"
    path.write_text('{"0": {"title": "Mug \\ud83d"}}')
    assert one_error(catalogue_of, folder).startswith(f"{path}: holds half a character at the end of ")


@pytest.mark.parametrize("title", [True, ["Screws"], {"en": "Screws"}])
def test_a_title_that_is_neither_text_nor_number_is_one_line(folder, title):
    path = toy.write_items(folder, {**toy.TITLES, "1": title})
    assert one_error(catalogue_of, folder).startswith(f"{path}: item '1' has {title!r} for a title; expected an item")


def test_titles_that_hold_reserved_tokens_are_counted(folder, caplog):
    toy.write_items(folder, {**toy.TITLES, "1": "Box <a_0> of <eos>", "4": "Lamp<c_2>"})
    with caplog.at_level(logging.INFO, "sft"):
        build(folder, ["item"])
    assert caplog.text.count("2 titles or preferences hold a SID or special token as text") == 1
    caplog.clear()
    toy.write_items(folder)
    build(folder, ["item"])
    assert "hold a SID" not in caplog.text


def test_a_title_is_one_line(folder):
    toy.write_items(folder, {**toy.TITLES, "0": " Wood\n\tScrews\u2028\x85x "})
    assert catalogue_of(folder).items[0].title == "Wood Screws x"


BAD_CELLS = {
    "code": ("history_item_id", "__import__('os').system('touch broken')"),
    "a call in a list": ("history_item_sid", "[print('x')]"),
    "no list": ("history_item_title", "('a', 'b')"),
    "a word": ("history_item_title", "nan"),
    "a JSON constant": ("history_item_id", "[true, null]"),
    "a number out of JSON": ("history_item_id", "[NaN, Infinity]"),
    "an open list": ("history_item_sid", "['<a_0>'"),
    "an empty cell": ("history_item_sid", ""),
    "deep nesting": ("history_item_id", "[" * 5000),
    "a line break in a string": ("history_item_title", "['a\nb']"),
}


@pytest.mark.parametrize(("column", "cell"), BAD_CELLS.values(), ids=list(BAD_CELLS))
def test_a_cell_that_is_no_list_is_refused_with_file_line_and_column(folder, monkeypatch, column, cell):
    monkeypatch.chdir(folder)
    rows = [toy.csv_row("ann", "01", "2"), {**toy.csv_row("ann", "01", "2"), column: cell}]
    path = toy.write_csv(folder / "toy.csv", rows)
    line = 3 + cell.count("\n")
    assert one_error(read_rows, path, catalogue_of(folder)).startswith(f"{path}:{line}: column '{column}' is not a list")
    assert not (folder / "broken").exists()


@pytest.mark.parametrize(
    "cell",
    [
        "[]",
        "['a', 'b']",
        "[\"it's\", 'b\"']",
        "[1, -2]",
        "['a',]",
        "['a',\n 'b']",
        " [5, 'a']",
        r"['\x41\n']",
        "[ 'a' ,'' ]",
        "['☃']",
        "[r'a']",
        "[5.0, 1e3, -2.5]",
        "[None, 'a']",
        """["it's", 'a "b"', 'c']""",
    ],
)
def test_a_list_cell_reads_as_python_reads_it(cell):
    assert read_list(cell) == ast.literal_eval(cell.strip())


@pytest.mark.parametrize(
    ("cell", "entries"),
    [
        ("[np.int64(5), np.int64(7)]", [5, 7]),
        ("[np.str_('a'), numpy.str_(\"it's\")]", ["a", "it's"]),
        ("[np.float64(5.0)]", [5.0]),
        ("['np.int64(5)', 'nan']", ["np.int64(5)", "nan"]),
        ("['a', nan, null, <NA>]", ["a", None, None, None]),
        (r'["\ud83d\ude00 5\" 3\/4"]', ['\N{GRINNING FACE} 5" 3/4']),
        (r"['3\/4']", [r"3\/4"]),
    ],
)
def test_a_list_cell_of_numpy_pandas_or_json_reads_as_it_was_meant(cell, entries):
    assert read_list(cell) == entries


def test_what_a_list_cell_is_refused_for_is_told_in_plain_text():
    with pytest.raises(ValueError, match=r"no comma between '\\x00a' and 'b'\)$"):
        read_list("['\0a' 'b']")


NO_COMMA = {
    "two texts": "['0' '1']",
    "two texts in two lines": "['0'\n '1']",
    "the third": "['0', '2' '1']",
    "mixed quotes": "['0' \"1\"]",
    "a raw text": "['0' r'1']",
    "no space": "['0''1']",
    "numbers": "[0 1]",
    "more spaces": "[ 0  1]",
    "floats": "[0. 1.]",
    "shortened": "['0' '1' ... '2']",
}


@pytest.mark.parametrize("cell", NO_COMMA.values(), ids=list(NO_COMMA))
@pytest.mark.parametrize("column", LIST_COLUMNS)
def test_entries_without_a_comma_are_refused_with_the_cell_and_the_cure(folder, column, cell):
    path = toy.write_csv(
        folder / "toy.csv", [toy.csv_row("ann", "01", "2"), {**toy.csv_row("ann", "01", "2"), column: cell}]
    )
    message = one_error(read_rows, path, catalogue_of(folder))
    assert re.search(rf":\d: column '{column}' is not a list literal \(no comma between \S+ and \S+\)", message)
    assert repr(" ".join(cell.split())) in message
    assert {"history_item_id": "[0, 1]", "history_item_sid": "['<a_0><b_0><c_0>', "}.get(column, "['Wood") in message
    assert "tolist()" in message


WRONG_ENTRIES = {
    "a truth value": ("history_item_id", "[True, 1]", "is not a list literal"),
    "a missing id": ("history_item_id", "[None, 1]", "has the entry None"),
    "a NaN for an id": ("history_item_id", "[nan, 1]", "has the entry None"),
    "half a number": ("history_item_id", "[5.5, 1]", "has 5.5 for an item id"),
    "a number beyond what floats count": ("history_item_id", "[9007199254740993.0, 1]", "for an item id"),
    "leading zeros": ("history_item_id", "[05, 1]", "is not a list literal"),
    "a list in a list": ("history_item_id", "[[0], 1]", "is not a list literal"),
    "a tuple": ("history_item_id", "(0, 1)", "is not a list literal"),
    "a set": ("history_item_id", "{0, 1}", "is not a list literal"),
    "a dict": ("history_item_id", "{'a': 0}", "is not a list literal"),
    "bytes": ("history_item_id", "[b'0', b'1']", "is not a list literal"),
    "an f-string": ("history_item_title", "[f'{1}', 'a']", "is not a list literal"),
    "an array": ("history_item_title", "array(['a', 'b'], dtype=object)", "is not a list literal"),
    "three dots": ("history_item_id", "[0, 1, ..., 2]", "numpy left entries out of it"),
    "a number for a SID": ("history_item_sid", "[5, '<a_0>']", "has the entry 5"),
    "no SID": ("history_item_sid", "[None, '<a_0>']", "has the entry None"),
    "a SID as a list": ("history_item_sid", "[['<a_0>', '<b_0>', '<c_0>'], '<a_0>']", "is not a list literal"),
}


@pytest.mark.parametrize("name", WRONG_ENTRIES)
def test_an_entry_that_its_column_cannot_have_is_refused(folder, name):
    column, cell, message = WRONG_ENTRIES[name]
    path = toy.write_csv(
        folder / "toy.csv", [toy.csv_row("ann", "01", "2"), {**toy.csv_row("ann", "01", "2"), column: cell}]
    )
    error = one_error(read_rows, path, catalogue_of(folder))
    assert error.startswith(f"{path}:3: ")
    assert message in error


@pytest.mark.parametrize("written", ["5.0", " 5", "5 ", "05", "'5'", "np.int64(5)", "np.float64(5.0)", "np.str_('5')"])
def test_an_id_written_otherwise_than_in_the_index_is_read_where_one_item_can_be_meant(folder, caplog, written):
    sids = {"5": ["<a_0>"], "7": ["<a_1>"]}
    catalogue = read_catalogue(toy.write_index(folder, sids), None)
    row = toy.csv_row("ann", ["5"], "7", sids)
    rows = [{**row, "history_item_id": repr([written])}, {**toy.csv_row("bob", ["7"], "5", sids), "item_id": written}]
    with caplog.at_level(logging.INFO, "sft"):
        assert list(read_rows(toy.write_csv(folder / "toy.csv", rows), catalogue)) == [
            Row("ann", (0,), 1),
            Row("bob", (1,), 0),
        ]
    assert f"2 item ids are written otherwise than in the index and read as there ({written!r} as '5')" in caplog.text


def test_a_cell_or_a_line_that_would_fill_the_memory_is_refused(folder, monkeypatch):
    catalogue = catalogue_of(folder)
    row = toy.csv_row("ann", "01", "2")
    titles = lambda size: repr(["a" * (size - 9), "b"])  # noqa: E731 - one line of two quotes, brackets and a comma
    path = toy.write_csv(folder / "long.csv", [{**row, "history_item_title": titles(2**20)}])
    assert [row.item for row in read_rows(path, catalogue)] == [2]
    toy.write_csv(path, [row, {**row, "history_item_title": titles(2**20 + 1)}])
    message = one_error(read_rows, path, catalogue)
    assert message.startswith(f"{path}:3: has a cell of more than 1,048,576 characters; shorten the history")
    path.write_text(path.read_text().splitlines()[0] + '\n"' + "never closed\n" * 100_000)
    assert "or look for a quote that is never closed" in one_error(read_rows, path, catalogue)
    monkeypatch.setattr("sid_sft.files.LONGEST_LINE", 1000)
    toy.write_csv(path, [row, {**row, "user_id": "a" * 1000}])
    assert one_error(read_rows, path, catalogue).startswith(f"{path}:3: is a line of 1,000 bytes or more")


def test_ids_and_numbers_of_thousands_of_digits_are_ids_that_no_item_has(folder):
    catalogue = catalogue_of(folder)
    row = toy.csv_row("ann", "01", "2")
    for cell in ("[0, " + "9" * 4000 + "]", repr(["0", "9" * 5000]), repr(["0", "0x" + "F" * 5000])):
        path = toy.write_csv(folder / "huge.csv", [{**row, "history_item_id": cell}])
        assert [row.history for row in read_rows(path, catalogue)] == [(0,)]
    for cell in ("[0, " + "9" * 5000 + "]", "[0, 0x" + "F" * 5000 + "]"):
        path = toy.write_csv(folder / "huge.csv", [{**row, "history_item_id": cell}])
        assert "is not a list literal" in one_error(read_rows, path, catalogue)
    huge = read_catalogue(toy.write_index(folder, {"9" * 5000: ["<a_0>"], "1": ["<a_1>"]}), None)
    path = toy.write_csv(folder / "huge.csv", [{**row, "history_item_id": "?"}])
    assert "expected one like ['9999" in one_error(read_rows, path, huge)


def test_the_text_of_an_id_decides_where_the_index_has_it_and_two_readings_are_refused(folder):
    sids = {"5": ["<a_0>"], "5.0": ["<a_1>"], "05": ["<a_2>"], "x": ["<a_3>"]}
    catalogue = read_catalogue(toy.write_index(folder, sids), None)
    rows = [{**toy.csv_row("ann", [item], "x", sids), "history_item_id": repr([item])} for item in ("5", "5.0", "05")]
    path = toy.write_csv(folder / "toy.csv", rows)
    assert [row.history for row in read_rows(path, catalogue)] == [(0,), (1,), (2,)]
    path = toy.write_csv(path, [*rows, {**rows[0], "history_item_id": "['005']"}])
    message = one_error(read_rows, path, catalogue)
    assert message.startswith(f"{path}:5: has '005' for an item id, which may be '5' or '5.0' or '05' of the index")


def test_ids_that_are_text_in_an_index_of_numbers_with_zeros_are_found(folder):
    sids = {"0005": ["<a_0>"], "0007": ["<a_1>"]}
    catalogue = read_catalogue(toy.write_index(folder, sids), None)
    path = toy.write_csv(folder / "toy.csv", [{**toy.csv_row("ann", ["0005"], "0007", sids), "item_id": "7"}])
    assert list(read_rows(path, catalogue)) == [Row("ann", (0,), 1)]


def test_a_preference_file_may_write_ids_otherwise_too(folder):
    path = toy.write_json(
        folder / "toy.preferences.json",
        [{**PREFERENCES[0], "context": {"history_items": [0.0, "01"], "target_item": " 2"}}],
    )
    assert list(read_preferences(path, catalogue_of(folder), "train")) == [Row("ann", (0, 1), 2, PREFERENCE)]
    toy.write_json(path, [{**PREFERENCES[0], "context": {"history_items": [0.5], "target_item": "2"}}])
    assert f"{path}: entry 0 has 0.5 for an item id" in one_error(read_preferences, path, catalogue_of(folder), "train")


def test_a_csv_that_contradicts_the_index_is_refused_with_its_line(folder):
    rows = [toy.csv_row("ann", "01", "2"), {**toy.csv_row("ann", "01", "2"), "item_sid": "<a_9><b_9><c_9>"}]
    path = toy.write_csv(folder / "toy.csv", rows)
    message = one_error(read_rows, path, catalogue_of(folder))
    assert message.startswith(f"{path}:3: item 2 has the SID '<a_9><b_9><c_9>', in the index '<a_1><b_0><c_1><d_0>'")
    path = toy.write_csv(folder / "toy.csv", [{**toy.csv_row("ann", "01", "2"), "history_item_sid": "['<a_0>', '<b_0>']"}])
    assert one_error(read_rows, path, catalogue_of(folder)).startswith(f"{path}:2: item 0 has the SID '<a_0>'")
    path = toy.write_csv(folder / "toy.csv", [{**toy.csv_row("ann", "01", "2"), "history_item_id": "['0']"}])
    assert "the history has 1 ids, 2 SIDs and 2 titles" in one_error(read_rows, path, catalogue_of(folder))


def broken_csvs(good: bytes) -> dict[str, tuple[bytes, str]]:
    header, first, second = good.splitlines(keepends=True)[:3]
    return {
        "empty": (b"", ": is empty"),
        "header alone": (header, ": has no rows"),
        "missing column": (good.replace(b"item_sid\r\n", b"sid\r\n", 1), ": has no column 'item_sid'"),
        "column twice": (header.replace(b"user_id", b"item_id") + first, ": has no column 'user_id'"),
        "same column twice": (header.replace(b"\r\n", b",item_id\r\n") + first, ": has the column 'item_id' twice"),
        "ragged row": (header + first + second.replace(b"\r\n", b",more\r\n"), ":3: has 8 cells, expected 7"),
        "cut row": (header + first + b"ann,[]\r\n", ":3: has 2 cells, expected 7"),
        "not UTF-8": (header + first + "Café".encode("latin-1") + second, ":3: is not UTF-8"),
        "NUL": (header + b"an\0n" + first, ":2: holds a NUL byte"),
        "open quote": (header + first + b'"' + second, ": is not CSV"),
        "UTF-16": (good.decode().encode("utf-16"), ":1: is not UTF-8"),
        "unknown items": (header + first.replace(b",3,", b",33,"), ": no row has a known item"),
    }


@pytest.mark.parametrize("fault", broken_csvs(b"a\nb\nc\n"))
def test_a_broken_csv_is_one_line_that_names_the_file_and_the_line(folder, fault):
    path = folder / "toy.csv"
    content, message = broken_csvs(path.read_bytes())[fault]
    path.write_bytes(content)
    assert re.match(
        re.escape(str(path)) + (r":\d+" if fault == "open quote" else "") + message,
        one_error(read_rows, path, catalogue_of(folder)),
    )


def test_a_missing_csv_and_a_folder_without_any_are_one_line(folder):
    assert one_error(read_rows, folder / "none.csv", catalogue_of(folder)) == f"{folder / 'none.csv'}: there is no such file"
    empty = folder / "empty"
    empty.mkdir()
    wanted = f"{empty}: the folder has no file that ends in .csv or .parquet"
    assert one_error(read_rows, empty, catalogue_of(folder)) == wanted
    assert one_error(
        lambda: build_dataset(
            Source(folder / "none.csv"),
            ["sid_sid"],
            catalogue=catalogue_of(folder),
            prompts=PROMPTS,
            tokenizer=toy.byte_level(),
            cutoff_len=9,
            cache_dir=folder,
        )
    ).startswith(f"{folder / 'none.csv'}: there is no such file")


def test_a_csv_of_a_spreadsheet_reads_and_so_does_a_very_long_history(folder):
    path = folder / "toy.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n")
    catalogue = catalogue_of(folder)
    assert len(list(read_rows(path, catalogue))) == 5
    (row,) = read_rows(toy.write_csv(path, [toy.csv_row("ann", "0124" * 3000, "3")]), catalogue)
    assert max(map(len, next(csv.reader(path.open())))) < 131_072 < path.stat().st_size
    assert len(row.history) == 12_000


BAD_INDEXES = {
    "not JSON": ('{"0": ["<a_0>"', "is not JSON"),
    "empty file": ("", "is empty"),
    "list": ("[]", "holds no items"),
    "no items": ("{}", "holds no items"),
    "text for a SID": ('{"0": "<a_0><b_0>"}', "item '0' has '<a_0><b_0>' for a SID"),
    "no token": ('{"0": []}', "item '0' has [] for a SID"),
    "number": ('{"0": [7]}', "item '0' has the token 7"),
    "bare word": ('{"0": ["a_0"]}', "item '0' has the token 'a_0'"),
    "space": ('{"0": ["<a 0>"]}', "item '0' has the token '<a 0>'"),
    "two in one": ('{"0": ["<a_0><b_0>"]}', "item '0' has the token '<a_0><b_0>'"),
    "item twice": ('{"0": ["<a_0>"], "0": ["<a_1>"]}', "is not JSON (the key '0' stands twice"),
    "deep": ("[" * 100_000, "is not JSON"),
    "huge number": ('{"0": [' + "9" * 5000 + "]}", "is not JSON"),
}


@pytest.mark.parametrize("fault", BAD_INDEXES)
def test_a_broken_index_is_one_line_that_names_the_file_and_what_was_expected(folder, fault):
    path = folder / "toy.index.json"
    content, message = BAD_INDEXES[fault]
    path.write_text(content)
    error = one_error(read_catalogue, path, None)
    assert error.startswith(f"{path}: {message}")
    assert "expected an index like" in error


def test_a_broken_or_foreign_item_file_is_one_line(folder):
    path = folder / "toy.item.json"
    for content in ("[]", '{"0": "Screws"}', '{"0": null}', '{"0": {}}'):
        path.write_text(content)
        assert one_error(catalogue_of, folder).startswith(f"{path}: ")
    path.write_text('{"0": {"brand": "Acme"}}')
    told = one_error(catalogue_of, folder)
    assert "no item has a title, the first, '0', has {'brand': 'Acme'}; " in told
    assert told.endswith("or --tasks sid_sid and no --item_meta_path")
    toy.write_items(folder, {"77": "Other"})
    told = one_error(catalogue_of, folder)
    assert f"ids here are like '77', there like '{next(iter(toy.SIDS))}'; the two must be of one dataset" in told
    path.write_bytes(b'{"0": {"title": "Caf\xe9"}}')
    assert one_error(catalogue_of, folder).startswith(f"{path}: cannot be read")
    assert one_error(read_catalogue, folder / "none.json", None).startswith(f"{folder / 'none.json'}: cannot be read")


# ---------------------------------------------------------------------------------------------- preferences


def test_a_preference_file_names_items_by_id_or_sid_and_is_split(folder, caplog):
    catalogue, path = catalogue_of(folder), folder / "toy.preferences.json"
    assert list(read_preferences(path, catalogue, "train")) == [
        Row("ann", (0, 1), 2, PREFERENCE),
        Row("zoe", (1,), 4, "likes tape"),
    ]
    assert [row.user for row in read_preferences(path, catalogue, "valid")] == ["bob"]
    nothing = {
        "user": "x",
        "split": "train",
        "user_preference": " ",
        "context": {"history_items": ["0"], "target_item": "1"},
    }
    unknown = {**nothing, "user_preference": "x", "context": {"history_items": ["0", "?"], "target_item": "1"}}
    toy.write_json(path, [*PREFERENCES, nothing, unknown])
    with caplog.at_level(logging.INFO, "sft"):
        assert len(list(read_preferences(path, catalogue, "train", max_left_out=0.5))) == 2
    assert "2 of 4 entries left out" in caplog.text
    assert "2 of 4 rows would be left out" in one_error(read_preferences, path, catalogue, "train")


def test_the_preference_is_answered_in_one_task_and_given_in_the_other(folder):
    tokenizer = toy.byte_level()
    first, second, third, fourth = build(folder, ["preference", "preference_sid"], tokenizer)
    history, answer = "<a_0><b_0><c_0>\n<a_0><b_1><c_1>\n", "<a_1><b_0><c_1><d_0><eos>"
    assert tokenizer.decode(first["input_ids"][first["prompt_len"] :]) == f"{PREFERENCE}\n{answer}"
    assert tokenizer.decode(first["input_ids"][: first["prompt_len"]]).endswith(f".\n{history}")
    assert tokenizer.decode(third["input_ids"][third["prompt_len"] :]) == answer
    prompt = tokenizer.decode(third["input_ids"][: third["prompt_len"]])
    assert PREFERENCE in prompt
    assert prompt.endswith(f":\n{history}")
    assert second["user"] == fourth["user"] != first["user"] == third["user"]


def test_a_user_has_one_number_in_both_kinds_of_files(folder):
    dataset = build(folder, ["sid_sid", "item", "preference_sid"])
    by_task = {name: [row["user"] for row in dataset if list(TASKS)[row["task"]] == name] for name in TASKS}
    ann, _, bob, cleo, _ = by_task["sid_sid"]
    assert by_task["sid_sid"] == [ann, ann, bob, cleo, bob]
    assert len({ann, bob, cleo}) == 3
    assert by_task["preference_sid"][0] == ann
    assert by_task["preference_sid"][1] not in (ann, bob, cleo)
    assert set(by_task["item_sid_title"]) == {-1}


BAD_PREFERENCES = {
    "no list": ({}, "holds no entries"),
    "nothing": ([], "holds no entries"),
    "a word": (["x"], "entry 0 is no such object"),
    "no context": ([PREFERENCES[0], {"user": "x"}], "entry 1 lacks 'context'"),
    "a text for a history": (
        [{**PREFERENCES[0], "context": {"history_items": "012", "target_item": "3"}}],
        "entry 0 has history_items that are no list",
    ),
    "another split": ([PREFERENCES[2]], "no entry of split 'train' has known items"),
}


@pytest.mark.parametrize("fault", BAD_PREFERENCES)
def test_a_broken_preference_file_is_one_line(folder, fault):
    content, message = BAD_PREFERENCES[fault]
    path = toy.write_json(folder / "toy.preferences.json", content)
    assert one_error(read_preferences, path, catalogue_of(folder), "train").startswith(f"{path}: {message}")


# ---------------------------------------------------------------------------------------------- wording


def test_wording_of_ones_own_replaces_that_of_its_task_alone(tmp_path):
    path = toy.write_json(tmp_path / "prompts.json", {"sid_sid": '{category} so far, as {"json"}:\n{history}'})
    prompts = read_prompts(path, "Toys_and_Games")
    assert prompts["sid_sid"] == 'toy and game so far, as {"json"}:\n{history}'
    assert {**prompts, "sid_sid": ""} == {**read_prompts(None, "Toys_and_Games"), "sid_sid": ""}
    assert "garden tools products" in read_prompts(None, "garden_tools")["sid_sid"]
    assert "the shop products" in read_prompts(None, "")["sid_sid"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must map task names to templates"),
        ({"sid_sid": 1}, "must map task names to templates"),
        ({"sid2sid": "{history}"}, "unknown task 'sid2sid'; the tasks are sid_sid, item_sid_title"),
        ({"sid_sid": "Bought:"}, "'sid_sid' has 0 {history}; expected one"),
        ({"sid_sid": "{history}{history}"}, "'sid_sid' has 2 {history}; expected one"),
        ({"sid_sid": "{history} What next?"}, "'sid_sid' must end with {history}"),
        ({"sid_sid": "{item}: {history}"}, "'sid_sid' has {item}; expected only {history} and {category}"),
        ({"item_sid_title": "{history}"}, "'item_sid_title' has 0 {item}; expected one"),
        ({"preference": "{preference}: {history}"}, "'preference' has {preference}; expected only {history}"),
        ({"sid_sid": "{category}{item}{history}"}, "'sid_sid' has {item}"),
        ({"preference_sid": "{history}"}, "'preference_sid' has 0 {preference}; expected one"),
    ],
)
def test_wording_that_cannot_be_used_is_one_line(tmp_path, content, message):
    path = toy.write_json(tmp_path / "prompts.json", content)
    error = one_error(read_prompts, path, "Toys")
    assert error.startswith(f"{path}: ")
    assert message in error


# ---------------------------------------------------------------------------------------------- datasets on disk


def test_a_second_build_opens_the_same_files_and_encodes_nothing(folder, monkeypatch):
    first = build(folder)
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*.arrow")}
    monkeypatch.setattr(data, "write_dataset", None)
    monkeypatch.setattr(data, "Encoder", None)
    second = build(folder)
    assert second.cache_files == first.cache_files
    assert second[:] == first[:]
    assert {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*.arrow")} == stamps
    assert not list((folder / "cache").rglob("rows-*"))


def test_whatever_decides_the_ids_makes_another_dataset(folder):
    first = build(folder).cache_files
    assert build(folder, cutoff_len=511).cache_files != first
    assert build(folder, seed=7).cache_files != first
    assert build(folder, sample=2).cache_files != first
    assert build(folder, split="valid").cache_files != first
    assert build(folder, prompts=read_prompts(None, "Books")).cache_files != first
    assert build(folder, tokenizer=toy.metaspace("first")).cache_files != first
    toy.write_csv(folder / "toy.csv", [toy.csv_row("ann", "01", "2")])
    assert build(folder).cache_files != first
    toy.write_csv(folder / "toy.csv")
    assert build(folder).cache_files == first


def test_several_processes_write_the_examples_that_one_writes(folder, monkeypatch):
    one = build(folder, cache_dir=folder / "one")
    monkeypatch.setattr("sid_sft.dataset_cache.processes", lambda rows, num_proc, whole_texts: num_proc)
    two = build(folder, cache_dir=folder / "two", num_proc=2)
    assert len(two.cache_files) == 2 * len(one.cache_files)
    assert two[:] == one[:]


def test_processes_are_started_where_they_save_time():
    assert processes(50_000, 4, whole_texts=False) is None
    assert processes(50_000, 4, whole_texts=True) == processes(500_000, 4, whole_texts=False) == 4
    assert processes(500_000, 1, whole_texts=True) is None


def test_a_build_that_fails_leaves_no_dataset(folder):
    toy.write_csv(folder / "toy.csv", [toy.csv_row("ann", "01", "2"), {**toy.csv_row("ann", "01", "2"), "item_sid": "?"}])
    one_error(build, folder)
    assert [path.name for path in (folder / "cache").iterdir() if path.suffix != ".lock"] == []


def build_slowly(folder, begun):
    encode = Encoder.encode

    def slow(self, task, rows):
        begun.set()
        time.sleep(60)
        return encode(self, task, rows)

    Encoder.encode = slow
    build(folder)


def build_and_tell(folder, results):
    dataset = build(folder)
    results.put(([file["filename"] for file in dataset.cache_files], dataset["input_ids"][:]))


def test_a_killed_build_leaves_nothing_that_is_taken_for_a_dataset(folder):
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    process = context.Process(target=build_slowly, args=(folder, begun))
    process.start()
    assert begun.wait(30)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    left = [path for path in (folder / "cache").iterdir() if path.is_dir()]
    assert [path.suffix for path in left] == [".tmp"]
    assert len(build(folder)) == 5 * 4 + 5 * 2 + 2 * 2
    assert not left[0].exists()


def test_two_processes_that_build_at_once_open_one_dataset(folder):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=build_and_tell, args=(folder, results)) for _ in range(2)]
    for process in processes:
        process.start()
    (files, ids), (other_files, other_ids) = results.get(timeout=30), results.get(timeout=30)
    for process in processes:
        process.join()
    assert files == other_files
    assert ids == other_ids
    assert len([path for path in (folder / "cache").iterdir() if path.is_dir()]) == 1


def test_a_cache_folder_that_cannot_be_made_is_one_line(folder):
    assert "--cache_dir" in one_error(lambda: build(folder, cache_dir=folder / "toy.csv"))


# ---------------------------------------------------------------------------------------------- the public names


PUBLIC = {
    "SidSFTDataset": ("sid_sid", "toy.csv"),
    "SidItemFeatDataset": ("item", None),
    "FusionSeqRecDataset": ("sid_title", "toy.csv"),
    "SFTData": ("title_title", "toy.csv"),
    "TitleHistory2SidSFTDataset": ("title_sid", "toy.csv"),
    "PreferenceSFTDataset": ("preference", "toy.preferences.json"),
    "UserPreference2sidSFTDataset": ("preference_sid", "toy.preferences.json"),
    "EvalSidDataset": ("sid_sid", "toy.csv"),
}


def public(folder, name, tokenizer, **options):
    """A public dataset of the folder's files, made as a user makes one."""
    files = {"index_file": folder / "toy.index.json", "item_file": folder / "toy.item.json", "cache_dir": folder / "cache"}
    _, file = PUBLIC[name]
    return getattr(data, name)(file and folder / file, tokenizer, **{"category": "Toys", **files, **options})


def source_of(folder, name):
    """What build_dataset reads for the task of a public dataset."""
    file = PUBLIC[name][1]
    if file is None:
        return Source()
    return Source(folder / file) if file == "toy.csv" else Source(preferences=folder / file)


OWN_PROMPTS = {
    "sid_sid": "{category} so far:\n{history}",
    "item_sid_title": "{item} is called ",
    "item_title_sid": "{item} is ",
    "sid_title": "Next title, {category}:\n{history}",
    "title_title": "Titles of {category}:\n{history}",
    "title_sid": "SID after these titles:\n{history}",
    "preference": "What is looked for, then a SID:\n{history}",
    "preference_sid": "Looks for {preference}:\n{history}",
}


def test_every_task_has_a_public_dataset():
    exported = {name: getattr(data, name) for name in data.__all__}
    datasets = {name for name, value in exported.items() if isinstance(value, type) and issubclass(value, data.SFTDataset)}
    assert datasets == set(PUBLIC)
    assert {exported[name].tasks for name in datasets} == set(TASK_GROUPS)


@pytest.mark.parametrize("options", [{}, {"sample": 2}, {"sample": 2, "seed": 7}, {"prompts": OWN_PROMPTS}], ids=str)
@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_datasets_agree_with_build_dataset_example_for_example(folder, name, options):
    tokenizer = toy.byte_level()
    dataset = public(folder, name, tokenizer, **options)
    built = build_dataset(
        source_of(folder, name),
        [PUBLIC[name][0]],
        catalogue=catalogue_of(folder),
        tokenizer=tokenizer,
        cutoff_len=512,
        cache_dir=folder / "another cache",
        **{**options, "prompts": read_prompts(options.get("prompts"), "Toys")},
    )
    assert len(dataset) == len(built) > 0
    for example, row in zip(dataset, built, strict=True):
        prompt, answer = row["input_ids"][: row["prompt_len"]], row["input_ids"][row["prompt_len"] :]
        if name == "EvalSidDataset":
            assert example == {"input_ids": prompt, "attention_mask": [1] * len(prompt), "labels": answer}
        else:
            labels = [-100] * len(prompt) + answer
            assert example == {"input_ids": prompt + answer, "attention_mask": [1] * len(labels), "labels": labels}


def test_a_public_dataset_opens_the_files_that_build_dataset_wrote(folder, monkeypatch):
    tokenizer = toy.byte_level()
    built = build_dataset(
        Source(folder / "toy.csv"),
        ["sid_sid"],
        catalogue=catalogue_of(folder),
        prompts=read_prompts(None, "Toys"),
        tokenizer=tokenizer,
        cutoff_len=512,
        cache_dir=folder / "cache",
    )
    monkeypatch.setattr(data, "write_dataset", None)
    assert public(folder, "SidSFTDataset", tokenizer).dataset.cache_files == built.cache_files


def test_a_public_dataset_takes_prompts_as_templates_or_as_a_file(folder):
    tokenizer = toy.byte_level()
    path = toy.write_json(folder / "prompts.json", {"sid_sid": OWN_PROMPTS["sid_sid"]})
    for prompts in (OWN_PROMPTS, path, str(path)):
        example = public(folder, "EvalSidDataset", tokenizer, prompts=prompts)[0]
        assert tokenizer.decode(example["input_ids"]).startswith("Toys so far:\n<a_0><b_0><c_0>\n")
    fault = one_error(lambda: public(folder, "SidSFTDataset", tokenizer, prompts={"sid_sid": "Bought:"}))
    assert fault == "prompts: 'sid_sid' has 0 {history}; expected one"


def test_a_public_dataset_refuses_and_allows_lost_rows_as_build_dataset_does(folder):
    toy.write_items(folder, {**toy.TITLES, "4": "", "2": None, "0": ""})
    lost = "task 'sid_title': 4 of 5 rows would be left out, more than --max_left_out 0.2 allows: no title"
    assert lost in one_error(lambda: public(folder, "FusionSeqRecDataset", toy.byte_level()))
    assert len(public(folder, "FusionSeqRecDataset", toy.byte_level(), max_left_out=0.8)) == 1
    assert len(public(folder, "SidItemFeatDataset", toy.byte_level())) == 4
    shortest = min(len(example["input_ids"]) for example in public(folder, "SidSFTDataset", toy.byte_level()))
    lost = "5 rows would be left out, more than --max_left_out 0.2 allows: no title, or template, newest item and answer "
    assert lost in one_error(lambda: public(folder, "SidSFTDataset", toy.byte_level(), max_len=shortest))
    toy.write_items(folder, dict.fromkeys(toy.TITLES, ""))
    assert "task 'title_title' has no example" in one_error(lambda: public(folder, "SFTData", toy.byte_level()))


def test_a_public_dataset_names_what_it_lacks(folder):
    assert "needs a tokenizer" in one_error(lambda: public(folder, "SidSFTDataset", None))
    files = {"index_file": folder / "toy.index.json", "cache_dir": folder / "cache"}
    for name, kind in (("SidSFTDataset", "interactions"), ("PreferenceSFTDataset", "preferences")):
        fault = one_error(lambda name=name: getattr(data, name)(None, toy.byte_level(), **files))
        assert fault == f"no file of {kind} is given; the tasks over {kind} need one"


def test_a_public_dataset_has_an_end(folder):
    dataset = public(folder, "SidSFTDataset", toy.byte_level())
    assert dataset[-1] == dataset[len(dataset) - 1]
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_columns_count_what_they_say(folder):
    dataset = build(folder)
    assert dataset.column_names == ["input_ids", "task", "length", "prompt_len", "static_len", "dropped", "user"]
    assert [list(TASKS)[task] for task in dict.fromkeys(dataset["task"])] == list(TASKS)
    for row in dataset:
        assert row["length"] == len(row["input_ids"])
        assert 0 < row["static_len"] <= row["length"]
        assert 0 < row["prompt_len"] < row["length"]
    assert np.all(np.diff(dataset["task"]) >= 0)


# ---------------------------------------------------------------------------------------------- the modules


def imports_of(path):
    """The modules of this project that a module imports, wherever in it."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    return {module for module in modules if module.split(".")[0] in ("sid_sft", "data", "sft", "evaluate", "rq")}


def test_imports_go_one_way_from_files_to_data():
    root = Path(data.__file__).parent
    modules = ["files", "locks", "catalogue", "cells", "parquet_rows", "parts"]
    modules += ["interactions", "tasks", "encoding", "private_doors", "forward.architecture", "forward.mapped"]
    modules += ["forward.examples", "forward.trees", "forward.prefix_parts", "dataset_cache"]
    allowed = set()
    for module in modules:
        assert imports_of(root / "sid_sft" / f"{module.replace('.', '/')}.py") <= allowed, module
        allowed.add(f"sid_sft.{module}")
    assert imports_of(root / "data.py") <= allowed


def test_one_module_on_each_side_moves_what_was_written_into_place():
    root = Path(data.__file__).parent
    sources = [*root.glob("*.py"), *(root / "sid_sft").rglob("*.py"), *(root / "rq").glob("*.py")]
    moving = {str(path.relative_to(root)) for path in sources if "os.replace" in path.read_text()}
    assert moving == {"sid_sft/files.py", "rq/files.py"}


def test_a_folder_that_is_written_anew_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    folder = tmp_path / "checkpoint"
    with whole_folder(folder) as scratch:
        (scratch / "first").touch()

    def interrupted():
        with whole_folder(folder) as scratch:
            (scratch / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in folder.iterdir()] == ["first"]
    with whole_folder(folder) as scratch:
        (scratch / "second").touch()
    assert [path.name for path in folder.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [folder]
