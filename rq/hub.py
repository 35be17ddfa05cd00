"""Datasets of the Hugging Face Hub, by the `datasets` library, which is asked for only where such an address is given.

    hf://datasets/OWNER/NAME             all splits, one after another
    hf://datasets/OWNER/NAME/CONFIG      those of one configuration
    hf://datasets/OWNER/NAME/a/b.jsonl   one file of it

No code of a dataset is ever run.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rq.files import InputError, told

if TYPE_CHECKING:
    import pandas as pd

SCHEME = "hf://"
PREFIX = f"{SCHEME}datasets/"
BUILDERS = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}


def hub_address(path: Path) -> str | None:
    """The address that a flag gave, of which a Path keeps one slash: hf:/datasets/a/b -> 'hf://datasets/a/b'."""
    text = path.as_posix()
    return SCHEME + text.removeprefix("hf:/") if text.startswith("hf:/datasets/") else None


def open_dataset(address: str) -> tuple[list[str], Callable[[Sequence[int]], list["pd.DataFrame"]]]:
    """The names of a dataset's columns, and how to read some of them, by their positions."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{address}: the library datasets is not installed; pip install datasets, or give a file"
        ) from error
    try:
        made: Any = datasets.load_dataset(**_what_to_load(address))
        rows = datasets.concatenate_datasets(list(made.values())) if isinstance(made, dict) else made
        header = list(rows.column_names)
    except InputError:
        raise
    except Exception as error:  # as many kinds as the libraries below have
        raise InputError(f"{address}: cannot be read ({told(error)}); download a file of it and give that") from error

    def read(wanted: Sequence[int]) -> list["pd.DataFrame"]:
        return [rows.select_columns([header[at] for at in wanted]).to_pandas().set_axis(wanted, axis=1)]

    return header, read


def _what_to_load(address: str) -> dict[str, Any]:
    """'hf://datasets/a/b' -> {"path": "a/b"}, "name" a configuration; a file -> {"path": "json", "data_files": ..}."""
    owner, _, rest = address.removeprefix(PREFIX).partition("/")
    name, _, inner = rest.partition("/")
    if not owner or not name:
        raise InputError(f"{address}: expected {PREFIX}OWNER/NAME, or with a configuration or the name of a file after it")
    ending = inner.lower().removesuffix(".gz").rpartition(".")[2] if "." in inner else ""
    if ending in BUILDERS:
        return {"path": BUILDERS[ending], "data_files": address, **({"sep": "\t"} if ending == "tsv" else {})}
    return {"path": f"{owner}/{name}", **({"name": inner} if inner else {})}
