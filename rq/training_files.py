"""The rows that sft.py trains on: as CSV, every history written out, or as Parquet, every item once.

    user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid
    u,"['Pan', 'Tab']",Bin,"[0, 1]",2,"['<a_0><b_0>', '<a_1><b_0>']",<a_2><b_0>

    user_id  item_ids   targets  max_history  row_numbers
    u        [0, 1, 2]  2        10           [0, 7]        the last 2 items are asked for, in rows 0 and 7 of the CSV

Both hold the same rows in the same order; row_numbers are left out where the order is that of the users. Many rows are a
folder of Parquet files, X.train.parquet/part-00000.parquet and so on: each is whole, and numbers its rows from 0.
"""

import csv
import io
from collections.abc import Callable, Iterator, Mapping
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
PARTS = "part-*.parquet"
ROWS_A_FILE = 5_000_000  # sft.py keeps the order of the rows of one file in memory, 80 bytes for each
WINDOWS_AT_ONCE, SEQUENCES_AT_ONCE = 4096, 65_536


class Cells(NamedTuple):
    """The texts of users by position, of items by number: alone in a cell, in the list of a history, as a list of one."""

    users: "pyarrow.Array"
    titles: "pyarrow.Array"
    sids: "pyarrow.Array"
    listed_titles: "pyarrow.Array"
    listed_sids: "pyarrow.Array"
    lone_titles: "pyarrow.Array"
    place_of: "np.ndarray | None"  # of an item number in these arrays; None where it is the number


def csv_cell(text: str) -> str:
    """A cell as csv.writer writes it: 'Pan' -> 'Pan', '6" pan' -> '"6"" pan"'."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(("", text))
    return line.getvalue()[1:-1]


def csv_cells(made: Histories, titles: Mapping[int, str], sids: Mapping[int, str]) -> Cells:
    """All texts, each quoted once: a cell with a comma in it, as a list of two has, is in quotes and doubles its own."""
    import numpy as np
    import pyarrow
    import pyarrow.compute as pc

    to_quote = pc.match_substring_regex(made.users, '[",\r\n]')
    quoted = [csv_cell(user) for user in made.users.filter(to_quote).to_pylist()]
    users = pc.replace_with_mask(made.users, to_quote, pyarrow.array(quoted, made.users.type))

    def texts(write: Callable[[str], str], of: Mapping[int, str]) -> "pyarrow.Array":
        return pyarrow.array([write(text) for text in of.values()], "large_string")

    numbers = np.fromiter(titles, "int64", len(titles))
    in_order = bool((numbers == np.arange(len(numbers))).all())
    return Cells(
        users,
        texts(csv_cell, titles),
        texts(csv_cell, sids),
        texts(lambda title: repr(title).replace('"', '""'), titles),
        texts(repr, sids),
        texts(lambda title: csv_cell(f"[{title!r}]"), titles),
        None if in_order else numbers,
    )


def csv_lines(made: Histories, targets: "np.ndarray", cells: Cells, *, max_history: int) -> Iterator[str]:
    """The header and the rows of some windows, many lines at a time; the three lists of a row come from one list of ids."""
    import pyarrow
    import pyarrow.compute as pc

    yield ",".join(CSV_COLUMNS) + "\n"

    def joined(*columns: "pyarrow.Array | str") -> "pyarrow.Array":
        """Columns, and texts that are the same in all rows, side by side."""
        texts = (pyarrow.scalar(part, "large_string") if isinstance(part, str) else part for part in (*columns, ""))
        return pc.binary_join_element_wise(*texts)

    def in_lists(texts: "pyarrow.Array", history: "pyarrow.ListArray") -> "pyarrow.Array":
        """The entries of each history with commas between them."""
        return pc.binary_join(pyarrow.ListArray.from_arrays(history.offsets, texts), pyarrow.scalar(", ", "large_string"))

    for at in range(0, len(targets), WINDOWS_AT_ONCE):
        some = targets[at : at + WINDOWS_AT_ONCE]
        first = made.first_of(some, max_history=max_history)
        history = lists(made.item_N, first, some - first)
        places, place = (
            pyarrow.array(_places(numbers, cells)) for numbers in (history.values.to_numpy(), made.item_N[some])
        )
        several = pyarrow.array(some - first > 1)
        quote = pc.if_else(several, '"', "").cast("large_string")
        listed = joined('"[', in_lists(cells.listed_titles.take(places), history), ']"')
        lone = cells.lone_titles.take(places.take(history.offsets[:-1]))  # a comma in the title, or a quote, decides
        lines = joined(
            *(cells.users.take(pyarrow.array(made.user_N[some])).cast("large_string"), ","),
            *(pc.if_else(several, listed, lone), ","),
            *(cells.titles.take(place), ","),
            *(quote, "[", in_lists(history.values.cast("large_string"), history), "]", quote, ","),
            *(pyarrow.array(made.item_N[some]).cast("large_string"), ","),
            *(quote, "[", in_lists(cells.listed_sids.take(places), history), "]", quote, ","),
            *(cells.sids.take(place), "\n"),
        )
        yield "".join(lines.to_pylist())


def _places(numbers: "np.ndarray", cells: Cells) -> "np.ndarray":
    """Where the texts of items stand in the arrays of `cells`."""
    import numpy as np

    return numbers if cells.place_of is None else np.searchsorted(cells.place_of, numbers)


def write_parts(path: Path, made: Histories, targets: "np.ndarray", *, max_history: int) -> None:
    """The sequences of some windows in one file, or in the parts of a folder, each with the next ROWS_A_FILE rows."""
    if len(targets) <= ROWS_A_FILE:
        write_sequences(path, made, targets, max_history=max_history)
        return
    path.mkdir()
    for number, at in enumerate(range(0, len(targets), ROWS_A_FILE)):
        part = path / PARTS.replace("*", f"{number:05}")
        write_sequences(part, made, targets[at : at + ROWS_A_FILE], max_history=max_history)


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
                made.users.take(pyarrow.array(made.user_N[target])).cast(pyarrow.string()),
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
