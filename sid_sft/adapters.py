"""LoRA adapters beside the SID rows: all that knows of peft.

An adapter adds B A x, scaled by alpha / rank, to what a linear layer of the frozen model makes of x (LoRA,
https://arxiv.org/abs/2106.09685). The layers keep their weights; the embedding and the output head get no adapter, since
their SID rows train as they are.

    adapters = Adapters(model, flags)                # in place; --lora_rank 8, --lora_alpha 16; the same loss as before
    adapters.save(folder); adapters.load(folder)     # adapter_config.json and adapter_model.safetensors, as peft has them
    adapters.take_out()                              # the model is the frozen one again
    model = merged(base_with_rows, folder)           # a plain model that needs no peft
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sid_sft.faults import out_of_memory
from sid_sft.files import InputError, cut, error_text

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from sid_sft.settings import TrainFlags

ADAPTER_FOLDER = "adapter"  # of a checkpoint, and of final_checkpoint/
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"  # peft's names


class Adapters:
    """Adapters in every linear layer of a model but its head. They train in float32, whatever the model's dtype is."""

    def __init__(self, model: PreTrainedModel, flags: TrainFlags) -> None:
        import peft

        assert flags.lora_alpha is not None  # with_defaults has seen to both
        assert flags.lora_learning_rate is not None
        settings = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=flags.lora_rank,
            lora_alpha=flags.lora_alpha,
            lora_dropout=0.0,
            target_modules="all-linear",
        )
        frozen = {parameter: parameter.requires_grad for parameter in model.parameters()}
        try:
            with quiet(), torch.random.fork_rng():  # the same first values on every process, and whatever was drawn before
                torch.manual_seed(flags.seed)
                self.wrapped = peft.get_peft_model(model, settings)
        except Exception as error:  # other people's code
            if out_of_memory(error):
                raise
            text = cut(error_text(error), 100)
            raise InputError(
                f"--lora_rank: peft has no adapters for {type(model).__name__} ({text}); leave it out"
            ) from error
        for parameter, trains in frozen.items():
            parameter.requires_grad_(trains)  # peft freezes the SID rows' tables, too
        self.parameters: list[nn.Parameter] = [own for own in model.parameters() if own not in frozen]
        self.base_model = flags.base_model
        self.rank, self.alpha, self.learning_rate = flags.lora_rank, flags.lora_alpha, flags.lora_learning_rate

    @property
    def numbers(self) -> int:
        """How many numbers train."""
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def layers(self) -> int:
        """How many linear layers have an adapter."""
        return len(self.parameters) // 2  # A and B

    def save(self, folder: Path) -> None:
        """Writes the adapters into a folder as peft does, with the layers' names in order and the base as it was given."""
        self.wrapped.save_pretrained(str(folder), save_embedding_layers=False)
        path = folder / CONFIG_FILE
        config = json.loads(path.read_text())
        config["target_modules"] = sorted(config["target_modules"])
        config["base_model_name_or_path"] = self.base_model
        path.write_text(json.dumps(config, indent=2, sort_keys=True))

    def load(self, folder: Path) -> None:
        """Takes the adapters of a folder; InputError where they are not those of this model and rank."""
        import peft

        fault = f"{folder}: its adapters are not those of this run"
        try:
            found: Any = peft.set_peft_model_state_dict(self.wrapped, load_file(folder / WEIGHTS_FILE))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{fault} ({cut(error_text(error), 100)})") from None
        missing = [name for name in found.missing_keys if "lora_" in name]
        if missing or found.unexpected_keys:
            raise InputError(f"{fault} ({cut(', '.join([*missing, *found.unexpected_keys]), 100)})")

    def take_out(self) -> None:
        """Takes the adapters out of the model, whose layers are again what they were before."""
        self.wrapped.unload()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """peft warns of names of transformers that are on their way out, and of what it mends by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A base model with the adapters of a folder added to its layers' weights, in place and in the model's dtype."""
    import peft

    with quiet():
        return peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
