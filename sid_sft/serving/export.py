"""The folder that an inference server needs, written by --export_serving.

serving/
  model/           # the checkpoint: a plain HF folder, weights as hard links where the disk allows
  sids.json        # {"<a_0><b_1>": [{"id": "17", "title": "Tape"}], ...}: SID -> its items, the most popular first
  sid_trie.npz     # the SIDs as a tree in arrays, see SidTrie
  legal_sids.py    # logits processors for transformers, vLLM and SGLang
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sid_sft.catalogue import Catalogue
from sid_sft.checkpoint import PROMPTS_FILE, Wording, plain_generation
from sid_sft.encoding import Encoder
from sid_sft.faults import disk_fault
from sid_sft.files import FaultHere, error_text, whole_folder
from sid_sft.interactions import Row
from sid_sft.recommend.ranking import SidTable
from sid_sft.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("sft.export")

MODULE, TRIE_FILE, SIDS_FILE, MODEL_FOLDER = "legal_sids.py", "sid_trie.npz", "sids.json", "model"
CONTENT = (MODULE, TRIE_FILE, SIDS_FILE, MODEL_FOLDER)
LINKED = (".safetensors", ".bin")  # weights: large, and never changed in place
LEFT_OUT = ("sid_rows.safetensors",)  # no part of the model: a server that loads every .safetensors would stumble over it


def export_serving(
    folder: Path,
    checkpoint: Path,
    tokenizer: PreTrainedTokenizerBase,
    catalogue: Catalogue,
    table: SidTable,
    wording: Wording,
    task: str,
    *,
    trust_remote_code: bool,
) -> None:
    """Writes the folder, whole or not at all; FaultHere where the disk fails."""
    try:
        with whole_folder(folder) as scratch:
            copy_model(checkpoint, scratch / MODEL_FOLDER, tokenizer, wording, trust_remote_code=trust_remote_code)
            with (scratch / TRIE_FILE).open("wb") as file:
                np.savez(file, **trie_arrays(tokenizer, catalogue, table, wording, task))  # type: ignore[arg-type]
            (scratch / SIDS_FILE).write_text(sids_json(catalogue, table), encoding="utf-8")
            shutil.copyfile(Path(__file__).with_name(MODULE), scratch / MODULE)
    except OSError as error:
        reason = disk_fault(error) or error_text(error)
        raise FaultHere(
            f"--export_serving {folder}: cannot be written ({reason}); make room, or choose another place"
        ) from None
    logger.info(f"Wrote {MODEL_FOLDER}/, {SIDS_FILE}, {TRIE_FILE} and {MODULE} to {folder}: {len(table.sids):,} SIDs")


def copy_model(
    checkpoint: Path, folder: Path, tokenizer: PreTrainedTokenizerBase, wording: Wording, *, trust_remote_code: bool
) -> None:
    """The files of a checkpoint, weights as hard links where possible; its generation_config.json changes no score."""
    folder.mkdir()
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and path.name not in LEFT_OUT:
            link_or_copy(path.resolve(), folder / path.name)
    plain_generation(str(checkpoint), tokenizer, trust_remote_code=trust_remote_code).save_pretrained(folder)
    if not (folder / PROMPTS_FILE).exists():
        (folder / PROMPTS_FILE).write_text(json.dumps(wording._asdict(), indent=1, ensure_ascii=False), encoding="utf-8")


def link_or_copy(path: Path, target: Path) -> None:
    """A hard link to a file of weights, a copy of any other, and of weights on another disk."""
    if path.suffix in LINKED:
        try:
            os.link(path, target)
            return
        except OSError:
            pass  # another disk, or one without links
    shutil.copyfile(path, target)


def trie_arrays(
    tokenizer: PreTrainedTokenizerBase, catalogue: Catalogue, table: SidTable, wording: Wording, task: str
) -> dict[str, np.ndarray]:
    """The arrays of sid_trie.npz, see SidTrie."""
    from sid_sft.recommend.trie import build_trie, score_sequences, sid_matrix
    from sid_sft.serving.legal_sids import FORMAT

    trie = build_trie(score_sequences(sid_matrix(table.sids, tokenizer.get_vocab()), tokenizer.eos_token_id))
    encoder = Encoder(tokenizer, catalogue, wording.prompts, cutoff_len=0)
    titled = next((place for place, item in enumerate(catalogue.items) if item.title), 0)
    (prompt,) = encoder.prompt_ids(TASKS[task], [Row("", (titled,), titled)])
    numbers = {
        "depth": trie.depth,
        "end_id": tokenizer.eos_token_id,
        "prompt_ends_with_text": int(prompt[-1] not in encoder.sid_token_ids),
        "format": FORMAT,
    }
    arrays = {name: getattr(trie, name).numpy().astype(np.int64) for name in ("start", "token", "leaf")}
    return arrays | {name: np.array(value, dtype=np.int64) for name, value in numbers.items()}


def sids_json(catalogue: Catalogue, table: SidTable) -> str:
    """SID -> its items, in the order of the trie's leaf numbers, a SID a line."""

    def named(place: int) -> dict[str, str]:
        return {"id": catalogue.items[place].id, "title": catalogue.items[place].title}

    lines = [
        f"{json.dumps(''.join(sid))}: {json.dumps([named(place) for place in places], ensure_ascii=False)}"
        for sid, places in zip(table.sids, table.items, strict=True)
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"
