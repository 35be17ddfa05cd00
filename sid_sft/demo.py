"""The embedded demo's input: a small synthetic shop and a small language model pretrained on its titles.

    python -m sid_sft.demo output/demo

writes shop.index.json, shop.item.json, shop.{train,valid,test}.csv and base/ (a plain HF model that has read titles and
shopping lists but no SID). A folder that is complete is left as it is. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import random
import sys
from pathlib import Path

from sid_sft.files import whole_folder
from sid_sft.interactions import CSV_COLUMNS

logger = logging.getLogger("demo")

KINDS = ("kettle", "teapot", "mug", "bowl", "plate", "spoon", "tray", "jar", "pan", "pot")
MATERIALS = ("copper", "steel", "oak", "glass", "clay")
COLOURS = ("red", "blue", "green", "white", "black")
USERS, LONGEST = 700, 8
FAITH = 0.8  # how often a shopper takes the favourite material, and the favourite colour, rather than any
PRETRAIN_STEPS, PRETRAIN_BATCH = 400, 32


def make_items() -> dict[str, tuple[list[str], str]]:
    """Item id -> (SID tokens, title). The three levels of a SID are the kind, the material and the colour."""
    items = {}
    for kind, kind_name in enumerate(KINDS):
        for material, material_name in enumerate(MATERIALS):
            for colour, colour_name in enumerate(COLOURS):
                sid = [f"<a_{kind}>", f"<b_{material}>", f"<c_{colour}>"]
                items[str(len(items))] = (sid, f"{colour_name.capitalize()} {material_name} {kind_name}")
    return items


def make_histories(seed: int) -> list[list[int]]:
    """One list of item ids per user. A shopper furnishes a kitchen to a taste, a favourite material and a favourite colour:
    another kind each time, mostly in the favourites. So what comes next follows from the taste, not from the last item."""
    rng = random.Random(seed)
    histories = []
    for _ in range(USERS):
        favourite_material, favourite_colour = rng.randrange(len(MATERIALS)), rng.randrange(len(COLOURS))
        history = []
        for kind in rng.sample(range(len(KINDS)), rng.randint(3, LONGEST)):
            material = favourite_material if rng.random() < FAITH else rng.randrange(len(MATERIALS))
            colour = favourite_colour if rng.random() < FAITH else rng.randrange(len(COLOURS))
            history.append((kind * len(MATERIALS) + material) * len(COLOURS) + colour)
        histories.append(history)
    return histories


def write_files(folder: Path, seed: int) -> None:
    """The index, the item file, and CSVs in which each user's last item is the test, the one before the validation."""
    items = make_items()
    (folder / "shop.index.json").write_text(json.dumps({item: sid for item, (sid, _) in items.items()}))
    described = {
        item: {"title": title, "description": "", "brand": "", "categories": ""} for item, (_, title) in items.items()
    }
    (folder / "shop.item.json").write_text(json.dumps(described))
    rows: dict[str, list] = {"train": [], "valid": [], "test": []}
    for user, history in enumerate(make_histories(seed)):
        for end in range(1, len(history)):
            split = {len(history) - 1: "test", len(history) - 2: "valid"}.get(end, "train")
            rows[split].append((f"U{user}", history[:end], history[end]))
    for split, examples in rows.items():
        with (folder / f"shop.{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(CSV_COLUMNS)
            for user, history, item in examples:
                sids, titles = zip(*(("".join(items[str(i)][0]), items[str(i)][1]) for i in [*history, item]), strict=True)
                writer.writerow([user, list(titles[:-1]), titles[-1], history, item, list(sids[:-1]), sids[-1]])


def pretraining_texts(seed: int) -> list[str]:
    """Shopping lists in words, of other shoppers than the CSVs': what a pretrained model would know of the world."""
    titles = [title for _, title in make_items().values()]
    return ["\n".join(titles[item] for item in history) + "\n" for history in make_histories(seed + 1)]


def pretrain(folder: Path, seed: int) -> None:
    """Trains a tokenizer and a small Qwen2-shaped model on the texts; about half a minute on two cores."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed

    from sid_sft.tasks import PROMPTS

    set_seed(seed)
    texts = pretraining_texts(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*texts, *PROMPTS.values()], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    config = Qwen2Config(
        vocab_size=len(fast) + 40,  # rows to spare, as many real models have
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=PRETRAIN_STEPS)
    for step in range(PRETRAIN_STEPS):
        batch = [texts[i % len(texts)] + fast.eos_token for i in range(step * PRETRAIN_BATCH, (step + 1) * PRETRAIN_BATCH)]
        inputs = fast(batch, return_tensors="pt", padding=True, return_token_type_ids=False)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            logger.info(f"demo: pretraining the base model on titles, step {step + 1} of {PRETRAIN_STEPS}, loss {loss:.3f}")
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if (options.folder / "base" / "config.json").is_file():
        logger.info(f"demo: {options.folder} is there already")
        return 0
    logger.info(f"demo: making a synthetic shop and a small pretrained language model in {options.folder}")
    with whole_folder(options.folder) as scratch:
        write_files(scratch, options.seed)
        pretrain(scratch / "base", options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
