"""The flags of rq.prepare, kept beside its outputs, so that the run with --index reads the tables as the run before did.

    NAME.prepare.json  {"user_column": null, .., "k_core": 5, .., "interactions": "orders.csv", "rows_kept": 81}

A flag left out takes the value that is kept; a flag that differs from it is obeyed, and named with what it does.
"""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path

from rq import command_line
from rq.files import InputError, read_json, shown
from rq.formats import FIELD_NAMES

log = logging.getLogger("rq.settings")

# What rq.prepare writes: NAME.item.json and so on.
ENDINGS = (
    "item.json",
    "item_ids.csv",
    "prepare.json",
    *(f"{part}.{kind}" for part in ("train", "valid", "test") for kind in ("csv", "parquet")),
    "info.txt",
)  # NAME.item.json, ..
SPLITS = ("global", "leave_one_out")
FORMATS = ("csv", "parquet")
COLUMNS = tuple(f"{field}_column" for field in FIELD_NAMES)
DEFAULTS: dict[str, object] = {
    **dict.fromkeys(COLUMNS),
    "sep": None,
    "encoding": None,
    "bought_only": False,
    "dayfirst": None,
    "k_core": 5,
    "split": "global",
    "max_history": 10,
    "output_format": "csv",
}
# What a value that differs from the one remembered does.
EFFECTS = {
    **dict.fromkeys(COLUMNS, "another column is read"),
    "sep": "text files may be read otherwise",
    "encoding": "text files may be read otherwise",
    "bought_only": "more or fewer items are numbered",
    "dayfirst": "dates may come in another order",
    "k_core": "other rows are kept: the CSVs have more or fewer rows",
    "split": "rows go to other files",
    "max_history": "histories are of another length",
    "output_format": "train, valid and test are files of another kind",
}
OF_THE_TRAINING_FILES = ("split", "max_history", "output_format")  # the rest belongs to the run that numbers the items


def _can_be_typed(value: object, kind: Callable[[str], str]) -> bool:
    try:
        return isinstance(value, str) and bool(kind(value))
    except argparse.ArgumentTypeError:
        return False


# What earlier versions did not keep, and did as if it had been this.
EARLIER: dict[str, object] = {
    **dict.fromkeys(("features_column", "sep", "encoding", "output_format")),
    "bought_only": True,
}
_GOOD: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(COLUMNS, lambda value: value is None or isinstance(value, str)),
    "sep": lambda value: value is None or _can_be_typed(value, command_line.separator),
    "encoding": lambda value: value is None or _can_be_typed(value, command_line.text_encoding),
    "bought_only": lambda value: isinstance(value, bool),
    "dayfirst": lambda value: value is None or isinstance(value, bool),
    "split": lambda value: value is None or value in SPLITS,
    "max_history": lambda value: value is None or (type(value) is int and value >= 1),
    "output_format": lambda value: value is None or value in FORMATS,
    **dict.fromkeys(("k_core", "rows_kept"), lambda value: type(value) is int and value >= 1),
    "interactions": lambda value: isinstance(value, str),
}


def settings_file(output_dir: Path, name: str) -> Path:
    """Where the settings of NAME are kept."""
    return output_dir / f"{name}.prepare.json"


def read_settings(path: Path) -> dict[str, object] | None:
    """The settings of the run before; None where it left none."""
    if not path.exists():
        return None
    kept = read_json(path, expected="the settings of rq.prepare, or no such file and the flags of the first run again")
    kept = {**EARLIER, **kept} if isinstance(kept, dict) else kept
    if not isinstance(kept, dict) or (lacking := next((name for name in _GOOD if name not in kept), None)):
        fault = f"{lacking} is missing" if isinstance(kept, dict) else f"they are {shown(kept)}"
        raise InputError(
            f"{path}: not settings of rq.prepare ({fault}); remove the file, and give the flags of the first run again"
        )
    if wrong := next((name for name, good in _GOOD.items() if not good(kept[name])), None):
        raise InputError(f"{path}: {wrong} is {shown(kept[wrong])}; mend it, or remove the file and give the flags again")
    return kept


def fill_in(flags: argparse.Namespace, remembered: dict[str, object] | None, *, path: Path) -> None:
    """Give each flag left out its value: the one remembered, or in a run that starts anew its default.

    One line says what was taken over, and one for each flag what it does that it differs from the value remembered.
    """
    anew = not (flags.index or flags.append)
    given_before = {name: value for name, value in (remembered or {}).items() if value is not None}
    before = {**DEFAULTS, **given_before}
    taken = []
    for name, default in DEFAULTS.items():
        if getattr(flags, name) is None:
            setattr(flags, name, default if anew else before[name])
            if not anew and before[name] != default:
                taken.append(f"--{name} {before[name]}")
        value = getattr(flags, name)
        open_before = name in OF_THE_TRAINING_FILES and (anew or name not in given_before)
        if remembered and value != before[name] and not open_before:
            log.warning("--%s is %s, in the run before it was %s: %s", name, value, before[name], EFFECTS[name])
    if taken:
        log.info("as in the run before (%s): %s", path, ", ".join(taken))
    if remembered is None and not anew:
        log.warning("%s is not there: flags left out have their defaults, --k_core is %s", path, flags.k_core)


def to_keep(flags: argparse.Namespace, remembered: dict[str, object] | None, *, rows_kept: int) -> str:
    """The content of the settings file after this run; a run with --index changes only what concerns the CSVs.

    What concerns the CSVs is null until a run has made them, unless an earlier run was given another value than the default.
    """
    used = {name: getattr(flags, name) for name in DEFAULTS}
    if not flags.index:
        used |= {name: None for name in OF_THE_TRAINING_FILES if used[name] == DEFAULTS[name]}
    used |= {"interactions": flags.interactions.name, "rows_kept": rows_kept}
    if flags.index and remembered:
        used = {**remembered, **{name: used[name] for name in OF_THE_TRAINING_FILES}}
    return json.dumps(used, indent=1, ensure_ascii=False) + "\n"


def log_other_rows(flags: argparse.Namespace, remembered: dict[str, object] | None, *, rows_kept: int) -> None:
    """One line where this run keeps other rows than the run that numbered the items."""
    now = {"interactions": flags.interactions.name, "rows_kept": rows_kept}
    if remembered and any(remembered[name] != value for name, value in now.items()):
        log.warning(
            "%s rows of %s are kept, in the run that numbered the items it was %s of %s",
            f"{rows_kept:,}",
            flags.interactions.name,
            f"{remembered['rows_kept']:,}",
            remembered["interactions"],
        )
