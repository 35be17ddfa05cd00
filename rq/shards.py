"""Embeddings in shards of some thousand items: what a run has finished when it is stopped is not computed again.

    .X.emb-Qwen3-td.npy.shards/of.json                 what decides the rows: texts, encoder, settings
                               00000.safetensors       rows (R, D) of the first R items, and how many texts were cut

A shard is whole or not there, and what is in it does not depend on how many processes there are.
N items, R rows of a shard, D dimensions.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rq.files import check_output, whole_path

if TYPE_CHECKING:
    import numpy as np

ROWS_OF_A_SHARD = 8_192  # texts tokenized, sorted by length and embedded together
IDENTITY = "of.json"


class Shards:
    """The shards of N items in a folder of their own."""

    def __init__(self, folder: Path, *, n_items: int, n_dims: int) -> None:
        self.folder, self.n_items, self.n_dims = folder, n_items, n_dims

    def parts(self) -> list[slice]:
        """The items of each shard."""
        starts = range(0, self.n_items, ROWS_OF_A_SHARD)
        return [slice(start, min(start + ROWS_OF_A_SHARD, self.n_items)) for start in starts]

    def open(self, identity: dict[str, Any]) -> list[int]:
        """The shards that are missing. Those of another identity, of other texts for example, are removed."""
        wanted = json.dumps(identity, sort_keys=True)
        kept = self.folder / IDENTITY
        if not kept.is_file() or kept.read_bytes() != wanted.encode():
            self.remove()
            check_output(kept)
            with whole_path(kept) as temporary:
                temporary.write_text(wanted, encoding="utf-8")
        for left in self.folder.glob(".*.part"):  # of a process that was killed
            left.unlink()
        return [number for number in range(len(self.parts())) if self._read(number) is None]

    def write(self, number: int, rows_RD: "np.ndarray", truncated: int) -> None:
        """Keep a shard, and how many of its texts were cut."""
        import numpy as np
        from safetensors.numpy import save

        with whole_path(self._path(number)) as temporary:
            temporary.write_bytes(save({"rows": rows_RD, "truncated": np.array([truncated])}))

    def __iter__(self) -> Iterator[tuple[slice, "np.ndarray", int]]:
        """(its items, rows, texts that were cut) of each shard."""
        for number, part in enumerate(self.parts()):
            found = self._read(number)
            assert found is not None, "all shards are written before they are read"
            yield part, *found

    def remove(self) -> None:
        """Remove the folder; what is in it is in the output then, or of no use."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05}.safetensors"

    def _read(self, number: int) -> tuple["np.ndarray", int] | None:
        """A shard; None where there is none, or another than was written."""
        import numpy as np
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        part = self.parts()[number]
        try:
            tensors = load_file(self._path(number))
            rows_RD, truncated = tensors["rows"], tensors["truncated"]
        except (OSError, ValueError, LookupError, TypeError, SafetensorError):
            return None
        if rows_RD.shape != (part.stop - part.start, self.n_dims) or rows_RD.dtype != np.float32 or truncated.shape != (1,):
            return None
        return rows_RD, int(truncated[0])
