"""Where embeddings come from: a small record beside X.npy, X.encoder.json, which quantizers copy into their checkpoints.

    X.encoder.json  {"origin": {"encoder": "E.tfidf", "encoder_sha256": "3f2a90c1..", "pooling": "", ..}, "texts_sha256": ..}

Embeddings of two encoders can have the same width, but the codebooks fitted to one encoder give meaningless SIDs to rows of
another, so `check_fit` refuses the pair.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rq.files import InputError, named, one_line, read_json, shown, whole_file

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger("rq.origin")

PROBED_ROWS = 64  # rows whose bytes tell whether a record still belongs to its .npy
WEIGHT_FILES = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class Origin:
    """How embeddings were made. Two origins fit together when all but the encoder's name agree."""

    encoder: str  # its name, for messages: the same encoder may lie in two places
    encoder_sha256: str
    pooling: str  # '' for TF-IDF, which has none
    max_len: int  # tokens; 0 for TF-IDF, which cuts nothing
    normalize: bool
    fields: str

    def in_words(self) -> str:
        """For messages: 'Qwen3-0.6B (3f2a90c1), last pooling, 512 tokens, title,brand'."""
        parts = [f"{named(self.encoder)} ({one_line(self.encoder_sha256[:8])})"]
        parts += [f"{named(self.pooling)} pooling"] if self.pooling else []
        parts += [f"{self.max_len} tokens"] if self.max_len else []
        parts += ["rows of length 1"] if self.normalize else []
        return ", ".join([*parts, named(self.fields)])

    def fits(self, other: "Origin") -> bool:
        """True when embeddings of the two lie in one space."""
        return {**asdict(self), "encoder": ""} == {**asdict(other), "encoder": ""}


def origin_from(record: object, *, where: Path) -> Origin:
    """The origin that a JSON file holds."""
    kinds = Origin.__annotations__
    if not isinstance(record, dict) or set(record) != set(kinds):
        raise InputError(f"{where}: expected the keys {', '.join(kinds)} of an encoder's record, as rq.text2emb writes it")
    for name, kind in kinds.items():
        if type(record[name]) is not kind:
            raise InputError(f"{where}: {name} is {shown(record[name])}, expected a value of type {kind.__name__}")
    return Origin(**record)


def record_file(npy: Path) -> Path:
    """X.npy -> X.encoder.json"""
    return npy.with_suffix(".encoder.json")


def sha256_of(files: Iterable[Path]) -> str:
    """One hash of the contents of some files, in the order given."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def sha256_of_texts(texts: Sequence[str]) -> str:
    """One hash of the texts of items 0..N-1 in their order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def sha256_of_weights(folder: Path) -> str:
    """One hash of the weights in a model's folder."""
    kinds = [sorted(folder.glob(pattern)) for pattern in WEIGHT_FILES]
    return sha256_of(next((files for files in kinds if files), []))


def probe(rows_ND: "np.ndarray") -> str:
    """A hash of the shape and of a few rows, evenly spread."""
    import numpy as np

    which = np.unique(np.linspace(0, len(rows_ND) - 1, min(PROBED_ROWS, len(rows_ND))).astype(np.int64))
    few = np.ascontiguousarray(rows_ND[which], dtype="<f4")
    return hashlib.sha256(repr(rows_ND.shape).encode() + few.tobytes()).hexdigest()


def write_record(npy: Path, origin: Origin, texts: Sequence[str], rows_ND: "np.ndarray") -> None:
    """Write the record of embeddings that are about to become `npy`."""
    record = {"origin": asdict(origin), "texts_sha256": sha256_of_texts(texts), "rows_sha256": probe(rows_ND)}
    with whole_file(record_file(npy)) as file:
        file.write(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Record:
    """What X.encoder.json holds."""

    origin: Origin
    texts_sha256: str


def read_record(npy: Path, rows_ND: "np.ndarray") -> Record | None:
    """The record beside `npy`; None where there is none. Refused when the .npy was replaced since."""
    path = record_file(npy)
    if not path.exists():
        return None
    record = read_json(path, expected="a record of rq.text2emb, or no such file to go without")
    names = ("origin", "texts_sha256", "rows_sha256")
    if not isinstance(record, dict) or not all(name in record for name in names):
        raise InputError(f"{path}: not a record of rq.text2emb, which has {', '.join(names)}; remove it to go without")
    origin, texts, rows = (record[name] for name in names)
    if rows != probe(rows_ND):
        raise InputError(
            f"{path} is the record of other rows than {npy} holds now; embed again with rq.text2emb, or remove the record "
            "to go without"
        )
    return Record(origin_from(origin, where=path), texts)


def check_fit(trained: Origin | None, given: Origin | None, *, checkpoint: Path, npy: Path) -> bool:
    """InputError where embeddings and codebooks are of two encoders; False where one of them has no record."""
    if trained is None or given is None:
        log.warning(
            "%s does not say which encoder it is of: it cannot be checked that %s and %s belong together",
            checkpoint if trained is None else npy,
            checkpoint,
            npy,
        )
        return False
    if not trained.fits(given):
        raise InputError(
            f"{checkpoint} is of {trained.in_words()}; {npy.name} is of {given.in_words()}; embed with the encoder and the "
            f"flags of the checkpoint, or train on these embeddings (or, to use them all the same, remove "
            f"{record_file(npy).name} beside them)"
        )
    return True
