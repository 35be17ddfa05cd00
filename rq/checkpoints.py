"""The checkpoint of a quantizer: a folder of model.safetensors and config.json, or codebooks alone in an .npz; no pickle.

    save_checkpoint(quantizer, Path("Shop.rqkmeans"))
    load_checkpoint(Path("Shop.rqkmeans")).design.levels      -> (256, 256, 256)

A checkpoint may come from anywhere: config.json is held to a table, and no memory is taken for what is not in the files.
K centroids of a level, D input dimensions.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from rq.command_line import CHECKPOINT_FILES, LARGEST_LEVEL, MOST_BEAMS, MOST_LAYERS, WIDEST_LAYER
from rq.embeddings import LARGEST_VALUE, of_type, read_header
from rq.files import InputError, read_json, shown, told, whole_path
from rq.origin import origin_from
from rq.quantizers import METHODS, NETWORK_METHODS, Design, Quantizer, quantizer_from_codebooks

WEIGHTS, CONFIG = CHECKPOINT_FILES
MOST_UNPACKED, ALWAYS_UNPACKED = 100, 2**26  # bytes of an array for each byte of its .npz; numbers hardly pack at all
BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, RuntimeError)


def save_checkpoint(quantizer: Quantizer, folder: Path) -> None:
    """Write model.safetensors and config.json into `folder`, both or neither; no pickle."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in quantizer.state_dict().items()}
    with whole_path(folder) as temporary:
        temporary.mkdir()
        (temporary / WEIGHTS).write_bytes(save(tensors))  # save_file would give the rights 0600, whatever the umask
        (temporary / CONFIG).write_text(json.dumps(asdict(quantizer.design), indent=1) + "\n", encoding="utf-8")


def load_checkpoint(
    path: Path, *, n_dims: int | None = None, data_path: Path | None = None, device: str = "cpu"
) -> Quantizer:
    """The quantizer saved in a folder, or one of the plain codebooks `codebook_0 .. codebook_{L-1}` of an .npz file."""
    quantizer = _load_codebooks(path) if path.suffix == ".npz" else _load_folder(path)
    if n_dims is not None and quantizer.design.n_dims != n_dims:
        raise InputError(
            f"{path}: made for embeddings of {quantizer.design.n_dims} dimensions, {data_path} has {n_dims}; "
            "give the embeddings it was trained on, or train again"
        )
    return quantizer.to(device).eval()


def _whole(least: int, most: int) -> Callable[[object], bool]:
    """Whether a value is a whole number in a range; True is none."""
    return lambda value: type(value) is int and least <= value <= most


def _list_of(good: Callable[[object], bool], most: int, *, least: int = 0) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and least <= len(value) <= most and all(map(good, value))


# What config.json may hold, and the words for it.
_GOOD: dict[str, tuple[Callable[[object], bool], str]] = {
    "method": (lambda value: value in METHODS, f"one of {', '.join(METHODS)}"),
    "n_dims": (_whole(1, 2**24), "a number of dimensions"),
    "levels": (_list_of(_whole(2, LARGEST_LEVEL), 25, least=1), "1 to 25 codebook sizes of 2 or more"),
    "latent": (_whole(0, WIDEST_LAYER), "a number of dimensions"),
    "hidden": (_list_of(_whole(1, WIDEST_LAYER), MOST_LAYERS), f"at most {MOST_LAYERS} widths"),
    "beam": (_whole(1, MOST_BEAMS), f"a number from 1 to {MOST_BEAMS}"),
    "sinkhorn_epsilons": (
        _list_of(lambda value: isinstance(value, int | float) and 0 <= value < float("inf"), 25),
        "a number from 0 on for each level",
    ),
    "seed": (_whole(-(2**63), 2**63), "a whole number"),
    "origin": (lambda value: value is None or isinstance(value, dict), "a record"),
}


def _read_design(path: Path) -> Design:
    config = read_json(path, expected="the config.json that rq writes")
    needed = ("method", "n_dims", "levels")
    if not isinstance(config, dict) or not all(name in config for name in needed):
        raise InputError(f"{path}: holds {shown(config)}; expected the config.json that rq writes, with {', '.join(needed)}")
    for name, value in config.items():
        good, expected = _GOOD.get(name, (lambda _: False, f"no such key, only {', '.join(_GOOD)}"))
        if not good(value):
            raise InputError(f"{path}: {shown(name)[1:-1]} is {shown(value)}; expected {expected}, as rq writes it")
    if config.get("sinkhorn_epsilons") and len(config["sinkhorn_epsilons"]) != len(config["levels"]):
        raise InputError(
            f"{path}: sinkhorn_epsilons and levels are not of one length; expected the config.json that rq writes"
        )
    if config.get("origin") is not None:
        config["origin"] = origin_from(config["origin"], where=path)
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    return Design(**values)


def _load_folder(folder: Path) -> Quantizer:
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder}: not a quantizer checkpoint; expected a folder with {CONFIG} and {WEIGHTS}")
    design = _read_design(folder / CONFIG)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, LookupError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder / WEIGHTS}: not the weights of a quantizer ({told(error)}); train it again") from error
    with torch.device("meta"):  # shapes without memory: config.json may ask for more than there is
        expected = Quantizer(design).state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        wanted, came = (_of_type(some[name]) if name in some else "no such tensor" for some in (expected, tensors))
        if wanted != came:
            raise InputError(
                f"{folder / WEIGHTS}: {shown(name)[1:-1]} is {came}, {CONFIG} asks for {wanted}; "
                "the two are not of one checkpoint"
            )
        if not bool(torch.isfinite(tensors[name]).all()):
            raise InputError(f"{folder / WEIGHTS}: {name} has NaN or infinite values; train it again")
    quantizer = Quantizer(design)
    quantizer.load_state_dict(tensors)
    return quantizer.requires_grad_(design.method in NETWORK_METHODS)


def _of_type(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {shown(tuple(tensor.shape))}"


def _load_codebooks(path: Path) -> Quantizer:
    expected = "expected arrays codebook_0, codebook_1, .. of shape (K, D), floats, with one D for every level"
    try:
        with zipfile.ZipFile(path) as archive:
            size = path.stat().st_size
            if sum(part.file_size for part in archive.infolist()) > max(ALWAYS_UNPACKED, MOST_UNPACKED * size):
                raise InputError(f"{path}: unpacks to more than {MOST_UNPACKED} times its size; {expected}")
            names = [f"codebook_{level}.npy" for level in range(len(archive.infolist()))]
            codebooks = [_read_npy(archive.read(name)) for name in names]
    except InputError:
        raise
    except (*BROKEN_ZIP, OSError, ValueError) as error:
        raise InputError(f"{path}: {told(error)}; {expected}") from error
    n_dims = {book.shape[-1] for book in codebooks if book.ndim == 2}
    if (
        not 1 <= len(codebooks) <= 25
        or any(book.ndim != 2 or book.dtype.kind != "f" for book in codebooks)
        or len(n_dims) > 1
    ):
        raise InputError(f"{path}: holds {shown([of_type(book) for book in codebooks])}; {expected}")
    for level, book in enumerate(codebooks):
        if not book.size or not (np.abs(book) <= LARGEST_VALUE).all():
            raise InputError(f"{path}: codebook_{level} is empty, or has NaN, infinite or very large values; {expected}")
    design = Design("rqkmeans", n_dims.pop(), tuple(len(book) for book in codebooks))
    return quantizer_from_codebooks(design, [book.astype(np.float32) for book in codebooks])


def _read_npy(content: bytes) -> np.ndarray:
    file = io.BytesIO(content)
    shape, fortran, dtype = read_header(file, size=len(content))
    return np.frombuffer(content, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")
