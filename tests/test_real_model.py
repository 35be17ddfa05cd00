"""A real pretrained language model, SmolLM2-135M, on real interactions; skipped where the two are missing.

REAL_MODEL=/models/smollm2-135m python -m pytest -m slow tests/test_real_model.py
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import sft
from sid_sft.forward.examples import Examples
from sid_sft.steps import StepSampler

MODEL = Path(os.environ.get("REAL_MODEL", SHARED / "models" / "smollm2-135m"))
FILES = SHARED / "data" / "amazon" / "Industrial_and_Scientific"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="no REAL_MODEL"),
    pytest.mark.skipif(not Path(f"{FILES}.train.csv").is_file(), reason="no interactions"),
]


def test_a_real_model_learns_sids_and_stays_what_it_was(tmp_path, caplog):
    caplog.set_level("INFO", logger="sft")
    flags = {
        "base_model": MODEL,
        "train_file": f"{FILES}.train.csv",
        "sid_index_path": f"{FILES}.index.json",
        "item_meta_path": f"{FILES}.item.json",
        "category": "Industrial_and_Scientific",
        "output_dir": tmp_path / "run",
        "cache_dir": tmp_path / "cache",
        "freeze_LLM": True,
        "batch_size": 16,
        "micro_batch_size": 8,
        "max_steps": 12,
        "warmup_steps": 2,
        "logging_steps": 1,
    }
    assert sft.main([f"--{name}={value}" for name, value in flags.items()]) == 0, caplog.text
    assert "frozen values changed: 0" in caplog.text
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert np.mean(losses[-3:]) < losses[0] - 1

    # ---- the first loss is that of transformers, and nothing but the SID rows has moved
    base, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto"), AutoTokenizer.from_pretrained(MODEL)
    known = len(tokenizer)
    tokens = sft.token_extender(flags["sid_index_path"]).get_new_tokens()
    ids = sft.add_sid_tokens(tokenizer, tokens)
    sft.grow_embeddings(base, len(tokenizer))
    sft.init_rows(base, ids, known, seed=42)  # in the dtype of the files, as the run has it
    base.float()
    (cached,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    dataset = data.open_dataset(cached, 512)
    first = next(iter(StepSampler(Examples(dataset), 16, seed=42)))
    total = count = 0
    for example in (dataset[i] for i in first):
        inputs = torch.tensor([example["input_ids"]])
        labels = inputs.clone()
        labels[:, : example["prompt_len"]] = -100
        with torch.no_grad():
            labelled = inputs.shape[1] - example["prompt_len"]
            total += float(base(input_ids=inputs, labels=labels).loss) * labelled
        count += labelled
    assert losses[0] == pytest.approx(total / count, rel=1e-5)

    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final_checkpoint", dtype="auto").state_dict()
    for name, old in AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").state_dict().items():
        new = final[name][: len(old)] if old.dim() else final[name]
        moved = torch.nonzero((new != old).flatten(1).any(1)).flatten().tolist() if old.dim() > 1 else []
        assert set(moved) <= set(ids), name
        assert old.dim() > 1 or torch.equal(new, old), name
