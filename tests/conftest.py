"""What the tests share: the demo's shop on disk, a tokenizer, small models of several architectures, the command line."""

from __future__ import annotations

import os

# Small tensors on few cores: more threads, or threads that spin, only get into each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"
# No number may depend on memory that nobody wrote: here and in every process that a test starts, such memory is NaN.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [os.path.join(os.path.dirname(__file__), "unwritten_memory"), *filter(None, [os.environ.get("PYTHONPATH")])]
)

import functools
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from forks import run_in_forks
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import data
import sft
from sid_sft import demo
from sid_sft.tasks import DEFAULT_TASKS, PROMPTS

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True, warn_only=True)
assert torch.utils.deterministic.fill_uninitialized_memory
transformers.logging.set_verbosity_error()

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}


def byte_bpe(texts: list[str], size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose end token pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def small_model(kind: str, vocabulary: int, **settings) -> PreTrainedModel:
    """A randomly initialised model of an architecture, with weights large enough for every part to matter."""
    config = transformers.AutoConfig.for_model(
        kind,
        **{**SIZES, "vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, **settings},
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


@pytest.fixture(scope="session")
def shop(tmp_path_factory) -> Path:
    """The demo's files: shop.index.json, shop.item.json and three CSVs."""
    folder = tmp_path_factory.mktemp("shop")
    demo.write_files(folder, seed=1)
    return folder


@pytest.fixture(scope="session")
def catalogue(shop) -> data.Catalogue:
    return data.read_catalogue(shop / "shop.index.json", shop / "shop.item.json")


@pytest.fixture(scope="session")
def sid_tokens(shop) -> list[str]:
    return sft.TokenExtender(str(shop), "shop").get_new_tokens()


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A small base model and tokenizer on disk, in float32, with 20 more rows than tokens."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = byte_bpe([*demo.pretraining_texts(1), *PROMPTS.values()])
    model = small_model("qwen2", len(tokenizer) + 20, tie_word_embeddings=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(base, sid_tokens) -> PreTrainedTokenizerFast:
    """The base's tokenizer with the shop's SID tokens added."""
    tokenizer = sft.load_tokenizer(str(base), trust_remote_code=False)
    sft.add_sid_tokens(tokenizer, sid_tokens)
    return tokenizer


@pytest.fixture(scope="session")
def dataset(shop, catalogue, tokenizer, tmp_path_factory):
    """40 examples of each of the five tasks."""
    return data.build_dataset(
        data.Source(shop / "shop.train.csv"),
        list(DEFAULT_TASKS),
        catalogue=catalogue,
        prompts=data.read_prompts(None, "kitchen"),
        tokenizer=tokenizer,
        cutoff_len=256,
        sample=40,
        cache_dir=tmp_path_factory.mktemp("cache"),
    )


def run_command(*arguments: str, processes: int = 1, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Runs sft.py as a user does, on one process or several."""
    return run_in_forks([str(argument) for argument in arguments], processes=processes, env=env or {})


def short_run(base: Path, shop: Path, folder: Path, **changes) -> list[str]:
    """The command line of a short freeze run on the shop; later flags replace earlier ones, None leaves one out."""
    values = {
        "base_model": base,
        "train_file": shop / "shop.train.csv",
        "eval_file": shop / "shop.valid.csv",
        "sid_index_path": shop / "shop.index.json",
        "item_meta_path": shop / "shop.item.json",
        "output_dir": folder / "run",
        "cache_dir": folder / "cache",
        "category": "kitchen",
        "tasks": ",".join(data.DEFAULT_TASKS),
        "freeze_LLM": True,
        "sample": 30,
        "eval_sample": 20,
        "batch_size": 16,
        "micro_batch_size": 4,
        "max_steps": 6,
        "logging_steps": 1,
        "eval_steps": 3,
        "save_steps": 3,
        "num_proc": 1,
    }
    values.update(changes)
    return [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]


@pytest.fixture
def flags(base, shop, tmp_path):
    """short_run in the test's own folder."""
    return functools.partial(short_run, base, shop, tmp_path)
