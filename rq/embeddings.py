"""Embeddings on disk, (N items, D dimensions) in one .npy, worked in chunks so that memory does not grow with N.

    embeddings = open_embeddings(Path("E.npy"))
    for start, chunk_RD in embeddings.chunks():    # rows start, start + 1, .., as a float32 copy

N items, R rows of one chunk, S sampled rows, D dimensions.
"""

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rq.files import InputError
from rq.origin import Origin, Record, read_record

CHUNK_BYTES = 128 * 2**20  # a chunk, its residual and its distances fit many times into the 6 GB promised
NOT_AN_ARRAY = (ValueError, EOFError, zipfile.BadZipFile, zlib.error)  # what np.load raises on other and on broken files
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
            return np.array(self._mapped()[which], dtype=np.float32)
        rows_RD = np.empty((len(which), self.n_dims), np.float32)  # the loop writes every row
        for start in range(0, len(which), SCATTERED_ROWS):
            part = slice(start, start + SCATTERED_ROWS)
            rows_RD[part] = self._mapped()[which[part]]
        return rows_RD

    def _mapped(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r", allow_pickle=False)

    def sample(self, size: int, *, seed: int) -> np.ndarray:
        """Up to `size` rows (S, D) drawn without replacement, in
        row order; every row is checked to be finite on the way.
        """
        drawn = np.arange(self.n_items)
        if size < self.n_items:
            drawn = np.sort(np.random.default_rng(seed).choice(self.n_items, size, replace=False))
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
        # float64: a row of large finite values must not overflow to inf
        bad = np.flatnonzero(~np.isfinite(chunk_RD.sum(axis=1, dtype=np.float64)))
        if bad.size:
            raise InputError(f"{self.path}: row {start + bad[0]} has a NaN or infinite value; embed that item again")


def open_embeddings(path: Path, *, n_items: int | None = None, items_from: Path | None = None) -> Embeddings:
    """Check the header of `path`: a float array (N, D), with as many rows as there are items where that is known."""
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except NOT_AN_ARRAY as error:
        raise InputError(f"{path}: not a plain .npy array ({error})") from error
    if not isinstance(mapped, np.ndarray) or mapped.ndim != 2 or mapped.dtype.kind != "f" or 0 in mapped.shape:
        shown = f"{mapped.dtype} {mapped.shape}" if isinstance(mapped, np.ndarray) else "an archive"
        raise InputError(f"{path}: holds {shown}; expected floats of shape (N items, D dimensions)")
    if n_items is not None and len(mapped) != n_items:
        raise InputError(
            f"{path} has {len(mapped):,} rows, {items_from} has {n_items:,} items; embed that file again with rq.text2emb"
        )
    return Embeddings(path, len(mapped), mapped.shape[1], record=read_record(path, mapped))
