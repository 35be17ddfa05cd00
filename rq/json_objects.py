"""JSON files that are one object with an entry for each user or item, rather than a record a line.

    X.inter.json  {"0": [17, 4, 9], ..}          of lists: user -> item numbers, oldest first
    X.item.json   {"0": {"title": "Pan"}, ..}    of objects: item number -> its fields

Their ids are the keys, so a file is read whole.
"""

import json
from pathlib import Path
from typing import Any

from rq.files import InputError, distinct_keys, parse_json, shown, told
from rq.text_files import LONGEST_LINE, first_line, whole_text

EXPECTED: dict[type, str] = {
    list: '{"0": [17, 4, 9], ..}: user -> item numbers, oldest first',
    dict: '{"0": {"title": "Pan", ..}, ..}: item number -> its fields',
}


def is_one_object(path: Path, *, of: type) -> bool:
    """Whether a .json file is one object of lists or of objects, rather than a record a line.

    '{"0": [17, 4]}' of list -> True, '{"asin": "p", "title": "Pan"}' of either -> False
    """
    name = path.name.lower().removesuffix(".gz")
    if not name.endswith(".json") or path.is_dir():
        return False
    if name.endswith(".inter.json" if of is list else ".item.json"):
        return True
    line = first_line(path).strip()
    if line == "{" or len(line.encode()) >= LONGEST_LINE - 1:
        return True
    try:
        record = parse_json(line, json.JSONDecoder())
    except ValueError:
        return False
    return isinstance(record, dict) and bool(record) and all(isinstance(value, of) for value in record.values())


def read_object(path: Path, *, of: type) -> dict[str, Any]:
    """The content of a .json file that is one object of lists or of objects."""
    expected = EXPECTED[of]
    try:
        content = parse_json(whole_text(path), json.JSONDecoder(object_pairs_hook=distinct_keys))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({told(error)}); expected {expected}") from error
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: holds {shown(content)}; expected {expected}")
    for key, value in content.items():
        if not isinstance(value, of):
            raise InputError(f"{path}: {shown(key)} has {shown(value)}; expected {expected}")
    return content
