"""What rq.build made, of what, and so what is still to do.

    NAME.build.json  {"steps": {"prepare": {"interactions": "9f0c..", "items": "77ab..", "k_core": "3"}, ..},
                      "files": {"shop.item.json": "51d2..", "shop.emb-tfidf-td.npy": null, ..}}

A step is done when the record has it with the same flags and file hashes, and its outputs are as they were made. A file
whose hash is null was being made when the run stopped.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rq.files import InputError, named, read_json, shown, whole_file
from rq.origin import sha256_of
from rq.parts import parts_of

HASHED: tuple[str, ...] = (".safetensors", ".bin", ".json", ".txt", ".model")  # of an encoder or a quantizer
HASHED += (".parquet", ".csv", ".tsv", ".jsonl", ".gz", ".dat", ".data", ".inter", ".item")  # and tables


@dataclass(frozen=True)
class Step:
    """One command of the chain; `made_of` are the flags and the hashes of the files that decide its outputs."""

    name: str
    main: Callable[[list[str]], None]
    arguments: Callable[[], list[str]]  # made when the step runs: the sizes of the levels follow from the items
    made_of: dict[str, str]
    outputs: tuple[Path, ...]


def content_hash(path: Path) -> str:
    """A hash of a file, of several (parts.py), or of those of a folder that decide what it does."""
    if path.is_file():
        return sha256_of([path])
    if path.is_dir():
        inner = sorted(file for file in path.rglob("*") if file.suffix in HASHED and file.is_file())
        names = "\n".join(str(file.relative_to(path)) for file in inner)
    else:
        inner = parts_of(path)
        names = "\n".join(map(str, inner))
    return hashlib.sha256((names + sha256_of(inner)).encode()).hexdigest()


class BuildRecord:
    """The record of one NAME in one folder, written after every change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: dict[str, dict[str, str]] = {}
        self.files: dict[str, str | None] = {}
        if not path.exists():
            return
        kept = read_json(path, expected="the record of rq.build")
        try:
            self.steps = {str(step): {str(k): str(v) for k, v in made_of.items()} for step, made_of in kept["steps"].items()}
            self.files = {str(name): digest and str(digest) for name, digest in kept["files"].items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: holds {shown(kept)}, not the record of rq.build; remove it, and give --overwrite to make all anew"
            ) from error

    def _write(self) -> None:
        with whole_file(self.path) as file:
            file.write(json.dumps({"steps": self.steps, "files": self.files}, indent=1, ensure_ascii=False) + "\n")

    def plan(self, steps: Sequence[Step], *, anew: bool) -> dict[str, str]:
        """{step: why it is to do} of those that are, in order; after the first of them all are."""
        to_do: dict[str, str] = {}
        for step in steps:
            first = next(iter(to_do), None)
            why = f"since {first} is" if first else "--overwrite" if anew else self._why(step)
            if why:
                to_do[step.name] = why
        return to_do

    def _why(self, step: Step) -> str:
        """Why a step is to do by itself; '' where it is done."""
        before = self.steps.get(step.name)
        if before is None:
            return (
                "stopped before it was done"
                if any(self.files.get(p.name, "") is None for p in step.outputs)
                else "not made yet"
            )
        changed = [name for name in sorted({*before, *step.made_of}) if before.get(name) != step.made_of.get(name)]
        if changed:
            return "; ".join(_in_words(name, before.get(name), step.made_of.get(name)) for name in changed)
        return next((f"{path} is {fault}" for path in step.outputs if (fault := self._fault(path))), "")

    def _fault(self, path: Path) -> str:
        """What has become of a file since it was made; '' where it is as it was."""
        if not path.exists():
            return "gone"
        return "" if self.files.get(path.name) == content_hash(path) else "another than was made"

    def check_own(self, step: Step) -> None:
        """InputError where an output of a step that is to do would replace a file that is not as rq.build made it."""
        for path in step.outputs:
            if not path.exists() or self.files.get(path.name, "") is None:
                continue
            if path.name not in self.files:
                raise InputError(
                    f"{path} exists, and {self.path.name} does not say that rq.build made it; give --overwrite to "
                    "replace it, or another --output_dir"
                )
            if self._fault(path):
                raise InputError(
                    f"{path} was changed since rq.build made it, by an --append perhaps; give --overwrite to make all anew, "
                    "or another --output_dir"
                )

    def start(self, step: Step, steps: Sequence[Step]) -> None:
        """From now on `step` and those after it are not done, and the outputs of `step` may be half of one run."""
        for later in steps[steps.index(step) :]:
            self.steps.pop(later.name, None)
        self.files |= {path.name: None for path in step.outputs}
        self._write()

    def forget_nothing(self, *, new_folder: bool) -> None:
        """Takes the record back, and the folder that was made for it, where a first step was refused and made nothing."""
        if not self.steps and not any((self.path.parent / name).exists() for name in self.files):
            self.path.unlink()
            if new_folder and not any(self.path.parent.iterdir()):
                self.path.parent.rmdir()

    def finish(self, step: Step) -> None:
        """`step` is done."""
        self.steps[step.name] = step.made_of
        self.files |= {path.name: content_hash(path) for path in step.outputs}
        self._write()


def _in_words(name: str, before: str | None, now: str | None) -> str:
    """'--k_core is 3, it was 5'; for a file, which is known by its hash, 'other --interactions'."""
    if any(value and len(value) == 64 and value.isalnum() for value in (before, now)):
        return f"other --{name}"
    is_now, was = ("left out" if value is None else named(value) for value in (now, before))
    return f"--{name} is {is_now}, it was {was}"
