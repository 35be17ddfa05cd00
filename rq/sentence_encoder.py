"""What a sentence encoder says of itself: the files that sentence-transformers keeps beside a model.

modules.json                {"type": "..models.Transformer"}, {"type": "..models.Pooling", "path": "1_Pooling"}, ..Normalize
1_Pooling/config.json       {"pooling_mode_mean_tokens": true, ..}
sentence_bert_config.json   {"max_seq_length": 256}

own_settings("all-MiniLM-L6-v2")   -> OwnSettings(pooling="mean", max_len=256, normalize=True, not_applied=())
own_settings("Qwen2.5-0.5B")       -> OwnSettings(None, None, False, ()): it says nothing
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rq.files import InputError, named, one_line, read_json, shown

POOLING = {"lasttoken": "last", "cls_token": "first", "cls": "first", "mean_tokens": "mean", "mean": "mean"}
APPLIED = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class OwnSettings:
    """None and False where an encoder says nothing."""

    pooling: str | None
    max_len: int | None  # tokens
    normalize: bool
    not_applied: tuple[str, ...]  # kinds of modules that rq.text2emb leaves out, such as Dense


def own_settings(encoder: str, *, pooling_asked: bool = True) -> OwnSettings:
    """The settings in the files of `encoder`, a folder or a Hugging Face name; InputError for what cannot be followed.

    Without `pooling_asked`, since a flag decides it, no pooling is read, and none is refused.
    """
    modules = _kept(encoder, "modules.json", kind=list) or []
    if not all(isinstance(module, dict) and isinstance(module.get("type"), str) for module in modules):
        raise InputError(f"{one_line(encoder)}: modules.json holds {shown(modules)}; expected modules with a type")
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    path = next((module.get("path") for module, kind in zip(modules, kinds, strict=True) if kind == "Pooling"), None)
    pooling = _pooling(encoder, path if isinstance(path, str) and path else "1_Pooling") if pooling_asked else None
    length = (_kept(encoder, "sentence_bert_config.json", kind=dict) or {}).get("max_seq_length")
    if length is not None and (type(length) is not int or length < 1):
        raise InputError(
            f"{one_line(encoder)}: sentence_bert_config.json has a max_seq_length of {shown(length)}, "
            "expected a number of tokens; mend or remove it"
        )
    not_applied = tuple(named(kind) for kind in kinds if kind not in APPLIED)
    return OwnSettings(pooling, length, "Normalize" in kinds, not_applied)


def _pooling(encoder: str, folder: str) -> str | None:
    """last, mean or first; None where the encoder has no such file."""
    modes = _kept(encoder, f"{folder}/config.json", kind=dict)
    if modes is None:
        return None
    newer = modes.get("pooling_mode")  # a name, where older files have a switch for each
    chosen = [newer] if isinstance(newer, str) else [name for name in modes if modes[name] is True]
    chosen = [name.removeprefix("pooling_mode_") for name in chosen if name != "include_prompt"]
    if len(chosen) != 1 or chosen[0] not in POOLING:
        raise InputError(
            f"{one_line(encoder)}: {folder}/config.json asks for the pooling {shown(', '.join(chosen))}; "
            "expected one of last, mean and first: give --pooling"
        )
    return POOLING[chosen[0]]


def _kept(encoder: str, name: str, *, kind: type) -> Any:
    """The content of one of the files, of that kind; None where there is no such file, or no connection leads to it."""
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(encoder, name)
    except OSError:
        return None
    if not found:
        return None
    content = read_json(Path(found), expected="the settings of sentence-transformers")
    if not isinstance(content, kind):
        raise InputError(f"{found}: holds {shown(content)}; expected the settings of sentence-transformers")
    return content
