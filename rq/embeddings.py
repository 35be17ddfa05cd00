"""Embeddings on disk, (N items, D dimensions) in one .npy, worked in chunks so that memory does not grow with N.

    embeddings = open_embeddings(Path("E.npy"))
    for start, chunk_RD in embeddings.chunks():    # rows start, start + 1, .., as a float32 copy

N items, R rows of one chunk, S sampled rows, D dimensions.
"""

import math
import os
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from rq.files import InputError, named, shown, told
from rq.origin import Origin, Record, read_record

CHUNK_BYTES = 128 * 2**20  # a chunk, its residual and its distances fit many times into the 6 GB promised
LARGEST_VALUE = 1e15  # the square of a larger one, summed over the dimensions, can be more than a float32 holds
# What numpy raises on a header that it cannot read: it is a text in Python, and says anything.
BROKEN_HEADER: tuple[type[Exception], ...] = (ValueError, TypeError, LookupError, SyntaxError, ArithmeticError)
BROKEN_HEADER += (AttributeError, MemoryError, RecursionError, tokenize.TokenError)
SCATTERED_ROWS = 2_048  # touching one row maps the 64 KiB around it: 128 MiB at most for so many


@dataclass(frozen=True)
class Embeddings:
    """An .npy of N rows whose file is mapped anew for each chunk,
    since pages once touched count as memory until unmapped.
    """

    path: Path
    n_items: int
    n_dims: int
    record: Record | None = None

    @property
    def origin(self) -> Origin | None:
        """The encoder these rows are of, where that is known."""
        return self.record.origin if self.record else None

    def __len__(self) -> int:
        return self.n_items

    @property
    def chunk_rows(self) -> int:
        """Rows of one chunk."""
        return max(1, CHUNK_BYTES // (4 * self.n_dims))

    def chunks(self, *, first: int = 0, shuffle: np.random.Generator | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(number of its first row, float32 (R, D) copy) of each chunk from row `first` on, in order or shuffled."""
        starts = np.arange(first, self.n_items, self.chunk_rows)
        if shuffle is not None:
            shuffle.shuffle(starts)
        for start in starts.tolist():
            yield start, self.rows(slice(start, min(start + self.chunk_rows, self.n_items)))

    def rows(self, which: slice | np.ndarray) -> np.ndarray:
        """A float32 copy of some rows; no mapping outlives the call, nor spans more than a few scattered rows."""
        if isinstance(which, slice):
            return self._as_float32(self._mapped()[which])
        rows_RD = np.empty((len(which), self.n_dims), np.float32)  # the loop writes every row
        for start in range(0, len(which), SCATTERED_ROWS):
            part = slice(start, start + SCATTERED_ROWS)
            rows_RD[part] = self._as_float32(self._mapped()[which[part]])
        return rows_RD

    @staticmethod
    def _as_float32(rows_RD: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused as such
            return np.array(rows_RD, dtype=np.float32)

    def _mapped(self) -> np.ndarray:
        return map_npy(self.path)

    def sample(self, size: int, *, seed: int) -> np.ndarray:
        """Up to `size` rows (S, D) drawn without replacement, in
        row order; every row is checked to be finite on the way.
        """
        if size < self.n_items:
            drawn = np.sort(np.random.default_rng(seed).choice(self.n_items, size, replace=False))
        else:
            drawn = np.arange(self.n_items)
        sample_SD = np.empty((len(drawn), self.n_dims), np.float32)  # each drawn row lies in one chunk
        for start, chunk_RD in self.chunks():
            self._check_chunk(start, chunk_RD)
            first, last = np.searchsorted(drawn, (start, start + len(chunk_RD)))
            sample_SD[first:last] = chunk_RD[drawn[first:last] - start]
        return sample_SD

    def spread(self, most: int) -> np.ndarray:
        """Positions of at most `most` rows, evenly spread; all of them where N is no larger."""
        return np.unique(np.linspace(0, self.n_items - 1, min(most, self.n_items)).astype(np.int64))

    def check_finite(self) -> None:
        """Stop at the first row that holds a NaN or an infinity."""
        for start, chunk_RD in self.chunks():
            self._check_chunk(start, chunk_RD)

    def _check_chunk(self, start: int, chunk_RD: np.ndarray) -> None:
        bad = np.flatnonzero(~(np.abs(chunk_RD).max(axis=1) <= LARGEST_VALUE))
        if bad.size:
            row_D = chunk_RD[bad[0]]
            fault = "a NaN or infinite value" if not np.isfinite(row_D).all() else f"the value {np.abs(row_D).max():.0e}"
            raise InputError(f"{self.path}: row {start + bad[0]} has {fault}; embed that item again")


def read_header(file: IO[bytes], *, size: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and type of the .npy that `file` holds in `size` bytes; `file` stands at its numbers.

    ValueError for anything else, for Python objects, and where the size is not that of the numbers: nothing is unpickled,
    and no memory is taken for numbers that are not there.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of headers that are written unusually
        if (start := file.read(4)).startswith(b"PK"):
            raise ValueError("it is an archive, .npz")
        file.seek(-len(start), os.SEEK_CUR)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        try:
            shape, fortran, dtype = read(file)
        except BROKEN_HEADER as error:
            raise ValueError(f"its header cannot be read: {told(error)}") from error
    if dtype.hasobject or dtype.itemsize == 0:
        raise ValueError(f"its type is {dtype.kind!r}, which is none of numbers")
    if any(type(length) is not int or length < 0 for length in shape):
        raise ValueError("its shape is none")
    came, declared = size - file.tell(), math.prod(shape) * dtype.itemsize
    if came != declared:
        raise ValueError(f"{came:,} bytes of numbers, its header says {shown(declared)}")
    return shape, fortran, dtype


def map_npy(path: Path) -> np.ndarray:
    """The array of an .npy file, mapped into memory for reading."""
    try:
        with open(path, "rb") as file:
            shape, fortran, dtype = read_header(file, size=os.path.getsize(path))
            start = file.tell()
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.memmap(path, dtype, mode="r", offset=start, shape=shape, order="F" if fortran else "C")
    except ValueError as error:
        raise InputError(f"{path}: not a plain .npy array ({told(error)})") from error


def of_type(array: np.ndarray) -> str:
    """The type and the shape of an array, for messages: 'float32 (40, 6)'."""
    return f"{named(str(array.dtype))} {shown(array.shape)}"


def open_embeddings(path: Path, *, n_items: int | None = None, items_from: Path | None = None) -> Embeddings:
    """Check the header of `path`: a float array (N, D), with as many rows as there are items where that is known."""
    mapped = map_npy(path)
    if mapped.ndim != 2 or mapped.dtype.kind != "f" or 0 in mapped.shape:
        raise InputError(f"{path}: holds {of_type(mapped)}; expected floats of shape (N items, D dimensions)")
    if n_items is not None and len(mapped) != n_items:
        raise InputError(
            f"{path} has {len(mapped):,} rows, {items_from} has {n_items:,} items; embed that file again with rq.text2emb"
        )
    return Embeddings(path, len(mapped), mapped.shape[1], record=read_record(path, mapped))
