"""Toy catalogues, CSVs and tokenizers, small enough to check by eye."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sid_sft.encoding import LINE_PATTERNS
from sid_sft.interactions import CSV_COLUMNS

SIDS = {
    "0": ["<a_0>", "<b_0>", "<c_0>"],
    "1": ["<a_0>", "<b_1>", "<c_1>"],
    "2": ["<a_1>", "<b_0>", "<c_1>", "<d_0>"],
    "3": ["<a_1>", "<b_0>", "<c_1>", "<d_1>"],
    "4": ["<a_2>", "<b_2>", "<c_2>"],
}
TITLES = {
    "0": "Wood Screws (pack of 100)",
    "1": "3M Tape, 2 in.",
    "2": "Café Filter – it's 5%",
    "3": "/slash first: naïve ☃ title!",
    "4": "Gloves",
}
HISTORIES = [("ann", "012", "3"), ("ann", "0123", "4"), ("bob", "4", "0"), ("cleo", "21", "4"), ("bob", "40", "2")]
LINES = "".join(title + "\n" for title in TITLES.values())
TEXTS = [LINES, *TITLES.values(), "Semantic IDs of the products that a customer bought, oldest first:\n\n"] * 3


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def write_index(folder: Path, sids: dict = SIDS) -> Path:
    return write_json(folder / "toy.index.json", sids)


def write_items(folder: Path, titles: dict = TITLES) -> Path:
    return write_json(folder / "toy.item.json", {item: {"title": title} for item, title in titles.items()})


def csv_row(user: str, history: Sequence[str], item: str, sids: dict = SIDS, titles: dict = TITLES) -> dict[str, str]:
    """The cells of one row: csv_row("ann", "01", "2") is ann's third purchase."""
    return {
        "user_id": user,
        "history_item_title": repr([titles.get(i, "?") for i in history]),
        "item_title": titles.get(item, "?"),
        "history_item_id": repr([int(i) if i.isdigit() else i for i in history]),
        "item_id": item,
        "history_item_sid": repr(["".join(sids.get(i, ["?"])) for i in history]),
        "item_sid": "".join(sids.get(item, ["?"])),
    }


def write_csv(path: Path, rows: list[dict[str, str]] | None = None, columns: Sequence[str] = CSV_COLUMNS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows([csv_row(*history) for history in HISTORIES] if rows is None else rows)
    return path


def add_sids(tokenizer: PreTrainedTokenizerFast, sids: dict = SIDS) -> PreTrainedTokenizerFast:
    tokens = sorted({token for sid in sids.values() for token in sid})
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    return tokenizer


def wrapped(core: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return add_sids(PreTrainedTokenizerFast(tokenizer_object=core, **special))


def byte_level(pattern: str | None = None, *, pad: str = "<pad>") -> PreTrainedTokenizerFast:
    """Byte-level BPE as in GPT-2, or with a pattern of its own and NFC as in Qwen2."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        core.pre_tokenizer = pre_tokenizers.Sequence([split, core.pre_tokenizer])
        core.normalizer = normalizers.NFC()
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXTS, trainers.BpeTrainer(special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    )
    return wrapped(core, eos_token="<eos>", pad_token=pad)


def metaspace(prepend_scheme: str) -> PreTrainedTokenizerFast:
    """A unigram model over words that begin with a mark, as sentencepiece makes them."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", "<eos>"], unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    return wrapped(core, eos_token="<eos>", unk_token="<unk>")


def llama2() -> PreTrainedTokenizerFast:
    """No pre-tokenizer, a mark prepended by the normalizer, bytes for unknown characters, <s> set before each text."""
    special = ["<unk>", "<s>", "</s>"]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    trained.train_from_iterator(
        [*TITLES.values()], trainers.BpeTrainer(special_tokens=special, vocab_size=200, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    vocabulary = {token: number for number, token in enumerate([*special, *(f"<0x{byte:02X}>" for byte in range(256))])}
    for token in model["vocab"]:
        vocabulary.setdefault(token, len(vocabulary))
    merges = [tuple(merge) for merge in model["merges"]]
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = trained.normalizer
    core.add_special_tokens(special)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrapped(core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def closing() -> PreTrainedTokenizerFast:
    """Words alone, case ignored, and an end token that the tokenizer itself sets behind each text."""
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    core.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=["<unk>", "<eos>"], show_progress=False))
    core.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return wrapped(core, eos_token="<eos>", unk_token="<unk>")


def word_piece(**options: bool) -> PreTrainedTokenizerFast:
    """Pieces of words as in BERT: lower case, accents and line ends gone, [CLS] before and [SEP] behind each text."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(**options)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(special_tokens=["[UNK]", "[CLS]", "[SEP]", "[PAD]"], show_progress=False)
    )
    core.decoder = decoders.WordPiece()
    marks = [(token, core.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="[SEP]", unk_token="[UNK]", pad_token="[PAD]")


def characters(normalizer: normalizers.Normalizer, splitter: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    """BPE over characters that the texts have, unknown otherwise."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizer, splitter
    core.train_from_iterator(TEXTS, trainers.BpeTrainer(special_tokens=["<unk>", "<eos>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")


def words(splitter: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    """Whole words; nothing of a SID is among them."""
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = splitter
    core.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=["<unk>", "<eos>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")


def with_byte_fallback() -> PreTrainedTokenizerFast:
    """A unigram model that writes unknown characters as bytes, as in Gemma."""
    pieces = [("<unk>", 0.0), ("<eos>", 0.0), *((f"<0x{byte:02X}>", -10.0) for byte in range(256)), ("\u2581", -2.0)]
    core = Tokenizer(models.Unigram([*pieces, ("oo", -3.0), ("d", -4.0)], unk_id=0, byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "\u2581")
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")


BASES = {  # further kinds, as they come: without a SID token
    "wordpiece": word_piece,
    "wordpiece-cased": lambda: word_piece(lowercase=False, strip_accents=False),
    "bpe-whitespace": lambda: characters(normalizers.NFKC(), pre_tokenizers.Whitespace()),
    "bpe-digits": lambda: characters(
        normalizers.Lowercase(), pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.Punctuation()])
    ),
    "bpe-angle-brackets-stripped": lambda: characters(normalizers.Replace(Regex("[<>_]"), ""), pre_tokenizers.Whitespace()),
    "bpe-metaspace-never": lambda: characters(normalizers.NFC(), pre_tokenizers.Metaspace(prepend_scheme="never")),
    "bpe-prefix-space": lambda: characters(normalizers.NFD(), pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "words": lambda: words(pre_tokenizers.WhitespaceSplit()),
    "words-and-marks": lambda: words(pre_tokenizers.Whitespace()),
    "unigram-byte-fallback": with_byte_fallback,
}
TOKENIZERS = {
    "gpt2": byte_level,
    "qwen2": lambda: byte_level(LINE_PATTERNS[1]),
    "llama3": lambda: byte_level(LINE_PATTERNS[2]),
    "o200k-like": lambda: byte_level(LINE_PATTERNS[1].replace(r"[\r\n]*", r"[\r\n/]*")),
    "metaspace-always": lambda: metaspace("always"),
    "metaspace-first": lambda: metaspace("first"),
    "llama2": llama2,
    "word-level": closing,
}
