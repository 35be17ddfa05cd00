"""The index file, `X.index.json`: the form of a token, and reading, checking, writing and appending SIDs.

    {"0": ["<a_12>", "<b_3>", "<c_255>"]      item 0: code 12 on level a, 3 on level b, 255 on level c
    ,"1": ["<a_12>", "<b_3>", "<c_7>"]        one item a line, the comma in front
    }

    write_sids(path, [(12, 3, 255), (12, 3, 7)])
    read_sids(path)                        -> {0: (12, 3, 255), 1: (12, 3, 7)}

Inside rq a SID is a tuple of codes counted from 0, first level first; only the file holds tokens.
N items, L levels.
"""

import json
import re
import string
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rq.catalogue import LONGEST_ID
from rq.files import InputError, named, read_json, shown, whole_file

if TYPE_CHECKING:
    import numpy as np

Sid = tuple[int, ...]
TOKEN = re.compile(r"<([a-z])_(0|[1-9][0-9]{0,8})>")  # codes below 10^9, so that an array of int32 holds them


def sid_tokens(codes: Sequence[int]) -> list[str]:
    """The tokens of a SID: a letter for the level, the code counted from 0.

    >>> sid_tokens([12, 3, 255])
    ['<a_12>', '<b_3>', '<c_255>']
    """
    return [f"<{letter}_{code}>" for letter, code in zip(string.ascii_lowercase, codes, strict=False)]


def sid_codes(tokens: Sequence[str], *, where: str) -> Sid:
    """The codes of a SID, `sid_tokens` read backwards.

    >>> sid_codes(["<a_12>", "<b_3>"], where="X.index.json")
    (12, 3)
    """
    if len(tokens) > len(string.ascii_lowercase):
        raise InputError(
            f"{where}: {len(tokens)} tokens, expected one token per level, at most {len(string.ascii_lowercase)}"
        )
    codes = []
    for letter, token in zip(string.ascii_lowercase, tokens, strict=False):
        match = TOKEN.fullmatch(token) if isinstance(token, str) else None
        if match is None or match[1] != letter:
            raise InputError(
                f"{where}: token {shown(token)}, expected '<{letter}_0>' or another code of that letter; one token per level"
            )
        codes.append(int(match[2]))
    return tuple(codes)


def read_sids(path: Path) -> dict[int, Sid]:
    """{item id: SID}, ids ascending, of an index made here or elsewhere; SIDs may differ in length."""
    expected = "{'0': ['<a_12>', '<b_3>'], ..}"
    pairs = read_json(path, expected=expected, object_pairs_hook=list)  # pairs, so that an id given twice is seen
    if not isinstance(pairs, list) or not pairs or not all(isinstance(pair, tuple) for pair in pairs):
        raise InputError(f"{path}: expected a JSON object of items, like {expected}")
    sids: dict[int, Sid] = {}
    for item, tokens in pairs:
        if not (item.isascii() and item.isdigit() and len(item) <= LONGEST_ID):
            raise InputError(f"{path}: item id {shown(item)} is not a decimal number")
        if not isinstance(tokens, list) or not tokens:
            raise InputError(f"{path}: item {item} has {shown(tokens)}, expected a list of tokens like ['<a_12>', '<b_3>']")
        if int(item) in sids:
            raise InputError(f"{path}: item {item} stands twice; remove one line")
        sids[int(item)] = sid_codes(tokens, where=f"{path}: item {item}")
    return dict(sorted(sids.items()))


def sid_lines(sids: Iterable[Sequence[int]], *, first_item: int) -> Iterator[str]:
    """One line an item, the comma at its start: an appended item then leaves every line before it as it was.

    >>> list(sid_lines([(12, 3), (12, 4)], first_item=0))
    ['{"0": ["<a_12>", "<b_3>"]\\n', ',"1": ["<a_12>", "<b_4>"]\\n']
    """
    for item, codes in enumerate(sids, first_item):
        yield f'{"," if item else "{"}"{item}": {json.dumps(sid_tokens(codes))}\n'


def write_sids(path: Path, sids: Iterable[Sequence[int]]) -> None:
    """Write the index of items 0..N-1, whole or not at all."""
    with whole_file(path) as file:
        file.writelines(sid_lines(sids, first_item=0))
        file.write("}\n")


def append_sids(path: Path, sids: Iterable[Sequence[int]], *, first_item: int) -> None:
    """Add the items from `first_item` on; every byte before the closing brace stays."""
    published = path.read_text(encoding="utf-8").rstrip()
    with whole_file(path) as file:
        file.write(published.removesuffix("}").rstrip() + "\n")
        file.writelines(sid_lines(sids, first_item=first_item))
        file.write("}\n")


def check_codes(codes_NL: "np.ndarray", levels: Sequence[int], *, where: object) -> None:
    """InputError at the first code of an array (N, L) outside its codebook: `levels` (256, 64) allows 0..255, then 0..63."""
    if codes_NL.ndim != 2 or codes_NL.dtype.kind not in "iu" or codes_NL.shape[1] != len(levels):
        raise InputError(
            f"{where}: holds {named(str(codes_NL.dtype))} {shown(codes_NL.shape)}; "
            f"expected whole numbers of shape (N items, {len(levels)} levels) for levels {','.join(map(str, levels))}"
        )
    if not len(codes_NL):
        raise InputError(f"{where}: holds no codes; expected a row for each item")
    for level, size in enumerate(levels):
        wrong = (codes_NL[:, level] < 0) | (codes_NL[:, level] >= size)
        if wrong.any():
            item = int(wrong.argmax())
            raise InputError(
                f"{where}: item {item} has code {codes_NL[item, level]} at level {level + 1}, whose "
                f"codebook holds 0..{size - 1}; codes count from 0"
            )


def check_appendable(published: dict[int, Sid], levels: Sequence[int], *, where: Path) -> None:
    """InputError unless new items can be appended: ids 0..N-1, SIDs of L codes inside the codebooks and at most one more."""
    if list(published) != list(range(len(published))):
        raise InputError(
            f"{where}: its {len(published):,} item ids are not 0..{len(published) - 1}; cannot tell which items are new"
        )
    for item, codes in published.items():
        if not len(levels) <= len(codes) <= len(levels) + 1:
            raise InputError(
                f"{where}: item {item} has {len(codes)} tokens, the quantizer has {len(levels)} levels; "
                "use its own checkpoint"
            )
        for level, (code, size) in enumerate(zip(codes, levels, strict=False)):
            if code >= size:
                raise InputError(
                    f"{where}: item {item} has code {code} at level {level + 1}, whose codebook holds 0..{size - 1}; "
                    "the index is of another quantizer, or counts codes from 1"
                )
