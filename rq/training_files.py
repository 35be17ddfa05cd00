"""The rows that sft.py trains on: as CSV, every history written out, or as Parquet, every item once.

    user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid
    u,"['Pan', 'Tab']",Bin,"[0, 1]",2,"['<a_0><b_0>', '<a_1><b_0>']",<a_2><b_0>

    user_id  item_ids   targets  max_history  row_numbers
    u        [0, 1, 2]  2        10           [0, 7]        the last 2 items are asked for, in rows 0 and 7 of the CSV

Both hold the same rows in the same order; row_numbers are left out where the order is that of the users.
"""

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rq.windows import Histories

if TYPE_CHECKING:
    import numpy as np
    import pyarrow

CSV_COLUMNS = (
    "user_id",
    "history_item_title",
    "item_title",
    "history_item_id",
    "item_id",
    "history_item_sid",
    "item_sid",
)
LONGEST_HISTORY = 8192  # items; what sft.py reads of a sequence at most
WINDOWS_AT_ONCE, SEQUENCES_AT_ONCE = 4096, 65_536


class Cells(NamedTuple):
    """The texts of users by position, of items by number; an item's stand alone in a cell or in the list of a history."""

    users: list[str]
    titles: dict[int, str]
    sids: dict[int, str]
    listed_titles: dict[int, str]
    listed_sids: dict[int, str]


def csv_cell(text: str) -> str:
    """A cell as csv.writer writes it: 'Pan' -> 'Pan', '6" pan' -> '"6"" pan"'."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(("", text))
    return line.getvalue()[1:-1]


def csv_cells(made: Histories, titles: Mapping[int, str], sids: Mapping[int, str]) -> Cells:
    """All texts, each quoted once: a cell with a comma in it, as a list of two has, is in quotes and doubles its own."""
    return Cells(
        [csv_cell(user) for user in made.users],
        {item: csv_cell(title) for item, title in titles.items()},
        {item: csv_cell(sid) for item, sid in sids.items()},
        {item: repr(title).replace('"', '""') for item, title in titles.items()},
        {item: repr(sid) for item, sid in sids.items()},
    )


def csv_lines(made: Histories, targets: "np.ndarray", cells: Cells, *, max_history: int) -> Iterator[str]:
    """The header and the rows of some windows, many lines at a time; the three lists of a row come from one list of ids."""
    yield ",".join(CSV_COLUMNS) + "\n"
    title_of, sid_of = cells.listed_titles.__getitem__, cells.listed_sids.__getitem__
    for at in range(0, len(targets), WINDOWS_AT_ONCE):
        some = targets[at : at + WINDOWS_AT_ONCE]
        firsts = made.first_of(some, max_history=max_history)
        lines = []
        for user, first, target in zip(made.user_N[some].tolist(), firsts.tolist(), some.tolist(), strict=True):
            *history, item = made.item_N[first : target + 1].tolist()
            titles, sids = ", ".join(map(title_of, history)), ", ".join(map(sid_of, history))
            if len(history) > 1:
                lists = f'"[{titles}]"', f'"{history}"', f'"[{sids}]"'
            else:  # a comma in the title, or a quote, decides
                lists = csv_cell("[" + titles.replace('""', '"') + "]"), f"{history}", f"[{sids}]"
            lines.append(
                f"{cells.users[user]},{lists[0]},{cells.titles[item]},{lists[1]},{item},{lists[2]},{cells.sids[item]}\n"
            )
        yield "".join(lines)


def write_sequences(path: Path, made: Histories, targets: "np.ndarray", *, max_history: int) -> None:
    """One sequence for each user of some windows, as `split_windows` gives them: those of a user follow each other."""
    import numpy as np
    import pyarrow
    import pyarrow.parquet

    row_numbers = np.argsort(targets, kind="stable")
    targets = targets[row_numbers]
    columns = {
        "user_id": pyarrow.string(),
        "item_ids": pyarrow.list_(pyarrow.from_numpy_dtype(made.item_N.dtype)),
        "targets": pyarrow.int32(),
        "max_history": pyarrow.int32(),
    }
    by_user = bool((np.diff(row_numbers) == 1).all())
    if not by_user:
        columns["row_numbers"] = pyarrow.list_(pyarrow.int64())
    schema = pyarrow.schema(columns)
    begin_S = np.flatnonzero(np.diff(made.user_N[targets], prepend=-1))  # S sequences, by their first targets
    count_S = np.diff(begin_S, append=len(targets))
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for at in range(0, len(begin_S), SEQUENCES_AT_ONCE):
            begin, count = begin_S[at : at + SEQUENCES_AT_ONCE], count_S[at : at + SEQUENCES_AT_ONCE]
            target = targets[begin]
            first = made.first_of(target, max_history=max_history)
            arrays = [
                pyarrow.array([made.users[user] for user in made.user_N[target].tolist()], pyarrow.string()),
                lists(made.item_N, first, target + count - first),
                pyarrow.array(count.astype("int32")),
                pyarrow.array(np.full(len(count), max_history, dtype="int32")),
            ]
            if not by_user:
                arrays.append(lists(row_numbers, begin, count))
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))


def lists(values: "np.ndarray", begin: "np.ndarray", length: "np.ndarray") -> "pyarrow.ListArray":
    """A list of each stretch of some values: ([5, 6, 7], [0, 1], [1, 2]) -> [[5], [6, 7]]."""
    import numpy as np
    import pyarrow

    ends = length.cumsum()
    places = np.repeat(begin - ends + length, length) + np.arange(ends[-1])
    return pyarrow.ListArray.from_arrays(np.concatenate([[0], ends]).astype("int32"), values[places])
