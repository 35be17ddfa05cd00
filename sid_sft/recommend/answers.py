"""The file of --recommend_file's answers: a row for each user, in the order of the histories.

    {"user_id": "ann", "sid": ["<a_0><b_1>", "<a_2><b_0>"], "item_id": ["17", "4"], "title": ["Tape", "Saw"],
     "log_p": [-2.31, -4.07]}

The lists are aligned, best first. Items that share a SID follow one another, the more popular first, with one score: so K
SIDs are K items or a few more. A user of whom nothing is known has empty lists. A CSV holds the lists as JSON.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from sid_sft.catalogue import Catalogue
from sid_sft.faults import disk_fault
from sid_sft.files import FaultHere, whole_file
from sid_sft.recommend.evaluator import Recommended
from sid_sft.recommend.histories import USER_COLUMN, Histories
from sid_sft.recommend.ranking import SidTable

LIST_COLUMNS = ("sid", "item_id", "title", "log_p")
ROWS_AT_ONCE = 4096  # of a Parquet file


def answers_of(
    histories: Histories, recommended: Recommended, catalogue: Catalogue, table: SidTable
) -> Iterator[dict[str, Any]]:
    """One row for each history, in order; `recommended` has those alone that are not None."""
    found = zip(recommended.lists(), recommended.score.tolist(), strict=True)
    for number, row in enumerate(histories.rows):
        sids, scores = next(found) if row else ([], [])
        entries = [
            ("".join(table.sids[sid]), catalogue.items[place].id, catalogue.items[place].title, round(score, 5))
            for sid, score in zip(sids, scores, strict=False)
            for place in table.items[sid]
        ]
        user = {USER_COLUMN: histories.users[number]} if histories.users else {}
        yield user | {name: [entry[i] for entry in entries] for i, name in enumerate(LIST_COLUMNS)}


def write_answers(path: Path, answers: Iterable[dict[str, Any]], users: list[Any] | None) -> None:
    """Writes rows to a CSV, a Parquet file or JSON lines, as the path's ending says; FaultHere where the disk fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as scratch:
            WRITERS[path.suffix.lower()](scratch, answers, users)
    except OSError as error:
        reason = disk_fault(error) or error
        raise FaultHere(
            f"--recommendations_file {path}: cannot be written ({reason}); make room, or choose another folder"
        ) from None


def write_csv(path: Path, answers: Iterable[dict[str, Any]], users: list[Any] | None) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*([USER_COLUMN] if users else []), *LIST_COLUMNS])
        for row in answers:
            lists = [json.dumps(row[name], ensure_ascii=False) for name in LIST_COLUMNS]
            writer.writerow([*([row[USER_COLUMN]] if users else []), *lists])


def write_json_lines(path: Path, answers: Iterable[dict[str, Any]], users: list[Any] | None) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in answers:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_parquet(path: Path, answers: Iterable[dict[str, Any]], users: list[Any] | None) -> None:
    import pyarrow
    import pyarrow.parquet

    text, number = pyarrow.list_(pyarrow.string()), pyarrow.list_(pyarrow.float64())
    fields = {"sid": text, "item_id": text, "title": text, "log_p": number}
    kinds = {type(user) for user in users or [] if user is not None}
    whole = kinds == {int} and all(abs(user) < 2**63 for user in users or [] if user is not None)
    if users:
        fields = {USER_COLUMN: pyarrow.int64() if whole else pyarrow.string(), **fields}
    with pyarrow.parquet.ParquetWriter(path, schema := pyarrow.schema(list(fields.items()))) as writer:
        rest = iter(answers)
        while rows := list(islice(rest, ROWS_AT_ONCE)):
            for row in rows if users and not whole else []:  # a column has one type
                row[USER_COLUMN] = None if row[USER_COLUMN] is None else str(row[USER_COLUMN])
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


WRITERS = {".csv": write_csv, ".parquet": write_parquet, ".jsonl": write_json_lines, ".json": write_json_lines}
