"""Arrays in a file of the safetensors format, read without loading them: pages come from the disk as they are touched.

Processes of a node that map the same file share its memory. write_arrays(path, {"length": np.array([29, 31])}), and then
read_arrays(path)["length"][1] -> 31.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

DTYPES = {"I8": np.int8, "U8": np.uint8, "BOOL": np.bool_, "I32": np.int32, "I64": np.int64}  # as the format names them


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays of one dimension and of the DTYPES."""
    save_file(arrays, path)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, memory-mapped and read-only."""
    content = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    begin = 8 + int(content[:8].view(np.int64)[0])  # the length of the header, the header, the arrays
    header = json.loads(content[8:begin].tobytes())
    arrays: dict[str, np.ndarray] = {}
    for name, described in header.items():
        first, last = described["data_offsets"]
        arrays[name] = content[begin + first : begin + last].view(DTYPES[described["dtype"]])
    return arrays
