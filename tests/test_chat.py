"""--chat_template: prompts as turns of the tokenizer's chat template, with the ids of their text."""

import json
import shutil
from pathlib import Path

import pytest
import toy
from transformers import AutoTokenizer

import evaluate
import sft
from sid_sft.catalogue import read_catalogue
from sid_sft.chat import in_chat
from sid_sft.encoding import Encoder
from sid_sft.files import InputError
from sid_sft.interactions import read_rows
from sid_sft.tasks import PROMPTS, TASKS, read_prompts, render

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BEGIN = "{{ bos_token }}{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}"
TAILS = ["<eos>\nassistant\n", "\n", " and then:\n", "\n\n\nAnswer:", "Next", "\u0301 next\n", "/next\n"]


@pytest.fixture
def folder(tmp_path):
    toy.write_index(tmp_path)
    toy.write_items(tmp_path)
    toy.write_csv(tmp_path / "x.csv")
    return tmp_path


def files(folder: Path):
    (index,), (items,) = folder.glob("*.index.json"), folder.glob("*.item.json")
    catalogue = read_catalogue(index, items)
    return catalogue, list(read_rows(folder / "x.csv", catalogue, max_left_out=1))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", toy.TOKENIZERS)
def test_text_behind_a_history_has_the_ids_that_the_tokenizer_gives_the_whole_prompt(folder, name, tail):
    tokenizer, (catalogue, rows) = toy.TOKENIZERS[name](), files(folder)
    prompts = {task: template + tail for task, template in read_prompts(None, "Toys").items()}
    encoder = Encoder(tokenizer, catalogue, prompts, cutoff_len=512)
    for task in (TASKS[task] for task in ("sid_sid", "title_title", "title_sid", "item_title_sid")):
        found = encoder.encode(task, rows)
        assert any(found)
        for row, example in zip(rows, found, strict=True):
            if example is not None:
                text = render(task, row, catalogue, prompts)[0]
                assert text.endswith(tail)
                whole = encoder.prefix + encoder.text_ids([text])[0]
                assert example.input_ids[: example.prompt_len] == whole


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "llama3"])
def test_a_prompt_in_chat_is_what_the_chat_template_makes_of_it(folder, name):
    tokenizer, (catalogue, rows) = toy.TOKENIZERS[name](), files(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    plain = read_prompts(None, "Toys")
    encoder = Encoder(tokenizer, catalogue, in_chat(plain, tokenizer), cutoff_len=512)
    for task in TASKS.values():
        if task.rows != "preferences":
            for row, example in zip(rows, encoder.encode(task, rows), strict=True):
                if example is not None:
                    turn = [{"role": "user", "content": render(task, row, catalogue, plain)[0]}]
                    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
                    assert example.input_ids[: example.prompt_len] == ids


def test_a_begin_token_that_the_tokenizer_sets_itself_stands_once(folder):
    tokenizer, (catalogue, rows) = toy.llama2(), files(folder)
    tokenizer.chat_template = WITH_BEGIN
    prompts = in_chat(read_prompts(None, "Toys"), tokenizer)
    assert prompts["sid_sid"].startswith("[INST] Semantic IDs")
    (example, *_) = Encoder(tokenizer, catalogue, prompts, cutoff_len=512).encode(TASKS["sid_sid"], rows)
    assert example.input_ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('users\nfirst') }}", "chat template fails: users"),
        ("{{ messages[0]['content']", "chat template fails"),
        ("{{ nothing.at.all }}", "chat template fails"),
        ("{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}", "text 2 times; expected once"),
        ("Hello", "text 0 times; expected once"),
        ("{{ messages[0]['content'] }}{{ '{item}' }}", "'sid_sid' has {item}; expected only {history}"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_one_line(template, message):
    tokenizer = toy.byte_level()
    tokenizer.chat_template = template
    with pytest.raises(InputError) as caught:
        in_chat(read_prompts(None, "Toys"), tokenizer)
    error = str(caught.value)
    assert error.startswith("--chat_template True: ")
    assert message in error
    assert "\n" not in error


def test_a_run_in_chat_trains_the_same_in_every_way_and_evaluates_in_its_own_words(base, flags, shop, tmp_path, capsys):
    instruct = tmp_path / "instruct"
    shutil.copytree(base, instruct)
    tokenizer = AutoTokenizer.from_pretrained(instruct)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(instruct)
    losses = {}
    for name, changes in {"chat": {}, "users": {"group_users": True}, "plain way": {"frozen_prefix": False}}.items():
        run = tmp_path / name
        assert sft.main(flags(base_model=instruct, chat_template=True, output_dir=run, batch_size=20, **changes)) == 0
        log = json.loads((run / "trainer_state.json").read_text())["log_history"]
        losses[name] = [line["loss"] for line in log if "loss" in line]
    assert losses["chat"] == pytest.approx(losses["plain way"], rel=1e-4)
    assert losses["users"][0] != losses["chat"][0]
    final = tmp_path / "chat" / "final_checkpoint"
    prompts = json.loads((final / "prompts.json").read_text())["prompts"]
    assert prompts["sid_sid"] == f"<|im_start|>user\n{PROMPTS['sid_sid']}<|im_end|>\n<|im_start|>assistant\n".replace(
        "{category}", "kitchen"
    )
    arguments = ["--base_model", str(final), "--sid_index_path", str(shop / "shop.index.json"), "--num_beams", "3"]
    assert evaluate.main([*arguments, "--item_meta_path", str(shop / "shop.item.json"), "--recommend", "0"]) == 0


def test_a_base_model_without_chat_template_is_told_before_anything_is_tokenized(flags, tmp_path, caplog):
    assert sft.main(flags(chat_template=True)) == 2
    assert "--chat_template True: the tokenizer of --base_model has no chat template" in caplog.text
    assert not (tmp_path / "cache").exists()
