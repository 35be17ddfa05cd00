"""Every name that another library keeps to itself and that is used all the same: here, and nowhere else.

A name that begins with an underscore may be renamed by any release, and a method that replaces a renamed one is never
called again. So each door below says why there is no public one, and what stops a run when it closes.
tests/test_private_doors.py compares DOORS with the installed libraries, and finds such names anywhere else.
"""

from __future__ import annotations

import inspect
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# class of transformers -> name -> the parameters of a method; () for a value
DOORS: dict[str, dict[str, tuple[str, ...]]] = {
    "Trainer": {"_load_from_checkpoint": ("self", "resume_from_checkpoint", "model")},
    "PreTrainedModel": {"_is_stateful": ()},
}


def closed_doors(owner: str) -> list[str]:
    """What a class of the installed transformers no longer has as DOORS says, one line each; [] where all is well."""
    closed = []
    for name, parameters in DOORS[owner].items():
        found = getattr(getattr(transformers, owner), name, None)
        if found is None or (parameters and tuple(inspect.signature(found).parameters) != parameters):
            wanted = f"{name}({', '.join(parameters)})" if parameters else name
            closed.append(f"with {installed()} there is no {owner}.{wanted}; install the versions of requirements.txt")
    return closed


def installed() -> str:
    """The releases at hand of the two libraries whose Trainer this is: "transformers 5.23.0 and accelerate 1.15.0"."""
    return " and ".join(f"{package} {version(package)}" for package in ("transformers", "accelerate"))


class ResumesFromOwnFiles:
    """Stands before the HF Trainer in a class's bases; a resumed run then asks the class for the weights first.

    Why there is no public door: Trainer.train(resume_from_checkpoint=..) restores optimizer, schedule, random numbers and
    position, but refuses a folder in which it finds no file with all of a model's weights.
    When it closes: SidTrainer stops before it resumes, or where the method is there and not called, before the first step.
    """

    def load_weights(self, folder: Path) -> bool:
        """Loads a checkpoint's weights; False leaves that to the Trainer."""
        raise NotImplementedError

    def load_checkpoint_weights(self, folder: Path) -> None:
        """Loads a checkpoint's weights into the model at hand, outside of training."""
        self._load_from_checkpoint(str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        if not self.load_weights(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether some layers carry a state from token to token that cannot be cut like a cache of keys.

    Why there is no public door: configs name such layers differently in each family, or not at all.
    When it closes: no model seems to have them; the trial batch (see choose_forward) then meets another loss or an error,
    and the plain forward is taken.
    """
    return bool(getattr(model, "_is_stateful", False))
