"""Who bought what when, out of core: the rows of a table go through a DuckDB base whose memory is bounded, and come back as
three arrays in order of time.

    orders.csv  u,p,5   u,q,3   u,q,3   ,p,9
        -> Kept(user_N=[0, 0], item_N=[1, 0], time_N=[0, 1], users=["u", ""], items=["p", "q"])

    read     row, user, item, cell     the rows as they are, texts without blanks around them
    users    text, row, code           the different users, where each first stands, and their numbers in this order
    items    the same
    timed    row, user, item, time     the rows that can be used, each user, item and time once

What does not fit into memory lies in a folder beside the outputs, which is removed in any case. N rows.
"""

import contextlib
import glob
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rq.files import InputError, shown
from rq.metadata import LONGEST_NAME, cell_text, unusable
from rq.sequences import are_numbers
from rq.tables import Table
from rq.timestamps import Column, read_times

if TYPE_CHECKING:
    import duckdb
    import numpy as np
    import pandas as pd
    import pyarrow

log = logging.getLogger("rq.interaction_log")

MOST_TOLD = 160  # characters of DuckDB's error
ROWS_AT_ONCE = 2**20  # of the sorted rows
NUMBERS = ("whole numbers", "numbers")


@dataclass(frozen=True)
class Kept:
    """The rows that are kept, in order of time, those of one time as in the file."""

    user_N: "np.ndarray"  # int32, positions in `users`
    item_N: "np.ndarray"  # int32, positions in `items`
    time_N: "np.ndarray"  # int32: 0 for the earliest time of all rows, 1 for the next, ..
    users: "pyarrow.Array"
    items: list[str]

    def __len__(self) -> int:
        return len(self.user_N)

    def bought(self) -> list[str]:
        """The items of these rows in the order in which they first stand."""
        import numpy as np

        codes, first = np.unique(self.item_N, return_index=True)
        return [self.items[code] for code in codes[np.argsort(first)]]


@contextlib.contextmanager
def opened_base(output_dir: Path, name: str, *, memory_gb: float) -> Iterator["duckdb.DuckDBPyConnection"]:
    """A DuckDB base in memory, which spills to a folder beside the outputs; folders that a kill left there are removed."""
    import duckdb

    place = next(parent for parent in (output_dir.absolute(), *output_dir.absolute().parents) if parent.is_dir())
    for left in place.glob(f".{glob.escape(name)}.*.spill"):
        if not _is_running(left.name.split(".")[-2]):
            shutil.rmtree(left, ignore_errors=True)
    spill = place / f".{name}.{os.getpid()}.spill"
    base = duckdb.connect(
        config={
            "memory_limit": f"{memory_gb * 1000:.0f}MB",
            "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            "temp_directory": str(spill),
            "preserve_insertion_order": False,
            "autoinstall_known_extensions": False,
        }
    )
    try:
        with _stopped_by_signals(base):
            yield base
    except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
        what = " ".join(str(error).split())[:MOST_TOLD]
        raise InputError(f"{spill}: {what}; free space there, or give more --memory_gb than {memory_gb:g}") from error
    except (RuntimeError, duckdb.InterruptException) as error:
        if "interrupted" not in str(error).lower():
            raise
        raise KeyboardInterrupt from error  # what DuckDB makes of Ctrl-C and SIGTERM
    finally:
        base.close()
        shutil.rmtree(spill, ignore_errors=True)


@contextlib.contextmanager
def _stopped_by_signals(base: "duckdb.DuckDBPyConnection") -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM stop the threads of a query: DuckDB itself waits for what they are at, maybe for minutes."""

    def stopping(handler: Callable[[int, Any], Any]) -> Callable[[int, Any], Any]:
        def stop(number: int, frame: Any) -> Any:
            base.interrupt()
            return handler(number, frame)

        return stop

    before: dict[signal.Signals, Callable[[int, Any], Any]] = {}
    with contextlib.suppress(ValueError):  # not the main thread, which alone hears signals
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(handler := signal.getsignal(number)):
                signal.signal(number, stopping(handler))
                before[number] = handler
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except OSError:
        return True
    return True


# ---------------------------------------------------------------------------------------------- reading


class InteractionLog:
    """A table of interactions in a base."""

    def __init__(self, table: Table, base: "duckdb.DuckDBPyConnection") -> None:
        self.table, self.base = table, base
        self.kind = ""  # of the cells of time: see timestamps.Column
        self.rows = 0
        base.execute("CREATE OR REPLACE TABLE read (row BIGINT, user VARCHAR, item VARCHAR, cell VARCHAR)")
        for chunk in table.chunks:
            if len(chunk):
                self._insert(chunk)
        for field in ("user", "item"):
            base.execute(
                f"CREATE OR REPLACE TABLE {field}s AS SELECT *, (row_number() OVER (ORDER BY row) - 1)::INTEGER AS code "
                f"FROM (SELECT {field} AS text, min(row) AS row FROM read GROUP BY 1)"
            )

    def _insert(self, chunk: "pd.DataFrame") -> None:
        import pyarrow

        columns = {"row": pyarrow.array(range(self.rows, self.rows + len(chunk)), "int64")}
        for field in ("user", "item"):
            columns[field] = texts_of(chunk[field])
            self._refuse_unusable(field, columns[field])
        kind, columns["cell"] = cells_of(chunk.time)
        self._take_kind(kind)
        self.base.register("chunk", pyarrow.table(columns))
        self.base.execute("INSERT INTO read SELECT * FROM chunk")
        self.base.unregister("chunk")
        self.rows += len(chunk)

    def _refuse_unusable(self, field: str, texts: "pyarrow.Array") -> None:
        import pyarrow.compute as pc

        bad = pc.or_(pc.greater(pc.utf8_length(texts), LONGEST_NAME), pc.match_substring(texts, "\0"))
        at = pc.index(bad, True).as_py()
        if at >= 0:
            text = texts[at].as_py()
            fault = f"{field} {shown(text)} {unusable(text, most=LONGEST_NAME)}"
            raise InputError(f"{self.table.where(self.rows + at)}: {fault}; mend or remove it")

    def _take_kind(self, kind: str) -> None:
        """Give the cells of time the type of a kind; whole and other numbers go together, nothing else does."""
        if kind in ("", self.kind) or (kind, self.kind) == NUMBERS:
            return
        if self.kind and (self.kind, kind) != NUMBERS:
            raise InputError(
                f"{self.table.where(self.rows)}: the column {shown(self.table.names['time'])} holds {kind} here, and "
                f"{self.kind} above; write it in all parts alike"
            )
        types = {"text": "VARCHAR", "numbers": "DOUBLE"}
        self.base.execute(f"ALTER TABLE read ALTER cell TYPE {types.get(kind, 'BIGINT')}")
        self.kind = kind

    def texts(self, field: str) -> list[str]:
        """The different users or items in the order in which they first stand."""
        return [text for (text,) in self.base.execute(f"SELECT text FROM {field}s ORDER BY code").fetchall()]

    def why_not_numbered(self, ids_file: Path) -> str:
        """Why the items are not named by their numbers in an index, in words; '' where they are."""
        if ids_file.exists():
            return f"{ids_file} is of a run that numbered the items itself"
        if self.table.has_times:
            return f"{self.table.path} is a table, not the item numbers of each user"
        other = next((raw_id for raw_id in self.texts("item") if not are_numbers([raw_id])), None)
        return "" if other is None else f"{self.table.path} has the item {shown(other)}"

    def check_in_index(self, index: Mapping[int, object], *, index_file: Path) -> None:
        """InputError where an item, which is a number, has no SID, which says that the two files are not of one dataset."""
        for text, row in self.base.execute("SELECT text, row FROM items ORDER BY row").fetchall():
            if int(text) not in index:
                raise InputError(
                    f"{self.table.where(row)}: item {text} is not in {index_file} ({len(index):,} items, like "
                    f"{next(iter(index))}); give the index of the same dataset, or leave --index out to make one"
                )

    def check_ids_meet(self, items: Mapping[str, object], *, items_file: Path) -> None:
        """InputError, with an id of each file, where no item has a title in the other file."""
        if not items:
            fault = "no item has a title and an id"
            raise InputError(f"{items_file}: {fault}; look into the file, or name its --title_column")
        texts = self.texts("item")
        if not any(text in items for text in texts):
            raise InputError(
                f"{items_file}: no item of the interactions has a title: ids here are like {shown(next(iter(items)))}, "
                f"those of {self.table.path} like {shown(texts[0])}; give two files of one dataset, or name the right "
                "--item_column"
            )

    def filtered(self, *, known_items: Iterable[str] | None, k_core: int, dayfirst: bool | None) -> Kept:
        """The rows that can be used; what is dropped is logged by reason. All items are known where `known_items`
        is None.
        """
        import pyarrow

        base = self.base
        column = Column(self.table.names["time"], self.kind or "text", base, self.table.where)
        times = read_times(column, dayfirst=dayfirst)
        log.info("%s: %s read as %s", self.table.path, column.name, times.in_words)
        base.execute(
            f"""CREATE OR REPLACE TABLE coded AS SELECT r.row, u.code AS user, i.code AS item, {times.moment} AS time,
            u.text = '' OR i.text = '' AS nameless, {times.empty} AS empty
            FROM read r JOIN users u ON r.user = u.text JOIN items i ON r.item = i.text {times.join}"""
        )
        nameless, empty, unreadable, first = base.execute(
            """SELECT count(*) FILTER (nameless), count(*) FILTER (NOT nameless AND empty),
            count(*) FILTER (NOT nameless AND NOT empty AND time IS NULL),
            min(row) FILTER (NOT nameless AND NOT empty AND time IS NULL) FROM coded"""
        ).fetchall()[0]
        first_shown = column.shown(first) if unreadable else ""
        users = base.sql("SELECT text FROM users ORDER BY code").to_arrow_table()["text"].combine_chunks()
        items = self.texts("item")
        base.execute("DROP TABLE read")
        base.execute(
            "CREATE OR REPLACE TABLE timed AS SELECT min(row) AS row, user, item, time FROM coded "
            "WHERE NOT nameless AND time IS NOT NULL GROUP BY user, item, time"
        )
        base.execute("DROP TABLE coded")
        dropped = {"no user or item id": nameless, "no timestamp": empty, "unreadable timestamp": unreadable}
        count = _count(base)
        dropped["repeats user, item and time"] = self.rows - sum(dropped.values()) - count
        if known_items is not None:
            known = set(known_items)
            codes = [code for code, text in enumerate(items) if text not in known]
            base.register("untitled", pyarrow.table({"item": pyarrow.array(codes, "int32")}))
            base.execute("DELETE FROM timed WHERE item IN (SELECT item FROM untitled)")
            left = _count(base)
            dropped["item has no title"], count = count - left, left
        kept = self._k_core(Kept(*self._in_order(count), users, items), k_core, dropped)
        log.info("interactions: %s read, %s kept", f"{self.rows:,}", f"{len(kept):,}")
        for reason, rows in dropped.items():
            log.info("  dropped, %s: %s", reason, f"{rows:,}")
        if first_shown:
            log.info("  the first unreadable timestamp: %s", first_shown)
        if not len(kept):
            raise InputError("no interaction is left; check the columns read, or give a smaller --k_core")
        return kept

    def _in_order(self, count: int) -> tuple["np.ndarray", "np.ndarray", "np.ndarray"]:
        """User, item and time (N,) of the table `timed` in order of time; it is dropped."""
        import numpy as np

        user_N, item_N, time_N = (np.empty(count, "int32") for _ in range(3))  # the loop fills all of them
        at, last, moment = 0, None, -1
        found = self.base.sql("SELECT user, item, time FROM timed ORDER BY time, row")
        for batch in found.to_arrow_reader(ROWS_AT_ONCE):
            part = slice(at, at + len(batch))
            user_N[part], item_N[part], times = (column.to_numpy(zero_copy_only=False) for column in batch.columns)
            if not len(times):
                continue
            later = np.empty(len(times), bool)
            later[0], later[1:] = last is None or times[0] != last, times[1:] != times[:-1]
            time_N[part] = moment + later.cumsum()
            at, last, moment = part.stop, times[-1], int(time_N[part.stop - 1])
        self.base.execute("DROP TABLE timed")
        return user_N, item_N, time_N

    @staticmethod
    def _k_core(kept: Kept, k_core: int, dropped: dict[str, int]) -> Kept:
        """Users and items with fewer rows are dropped, again and again, until none has."""
        import numpy as np

        user_N, item_N, time_N = kept.user_N, kept.item_N, kept.time_N
        before = -1
        while len(user_N) != before:
            before = len(user_N)
            for of_items, reason in (
                (True, f"item in fewer than {k_core} rows"),
                (False, f"user with fewer than {k_core} rows"),
            ):
                codes = item_N if of_items else user_N
                good = (np.bincount(codes, minlength=1) >= k_core)[codes]
                dropped[reason] = dropped.get(reason, 0) + len(good) - int(good.sum())
                if not good.all():
                    user_N, item_N, time_N = user_N[good], item_N[good], time_N[good]
        return Kept(user_N, item_N, time_N, kept.users, kept.items)


def _count(base: "duckdb.DuckDBPyConnection") -> int:
    """The rows of the table `timed`."""
    return base.execute("SELECT count(*) FROM timed").fetchall()[0][0]


# ---------------------------------------------------------------------------------------------- cells


def texts_of(cells: "pd.Series") -> "pyarrow.Array":
    """Users or items as text without blanks around it, '' for none: [12.0, None, " p "] -> ["12", "", "p"]."""
    import pandas as pd
    import pyarrow
    import pyarrow.compute as pc

    if isinstance(cells.dtype, pd.StringDtype):
        texts = pyarrow.array(cells, "large_string", from_pandas=True)
        texts = texts.combine_chunks() if isinstance(texts, pyarrow.ChunkedArray) else texts
        return pc.fill_null(pc.utf8_trim_whitespace(texts), "")
    if cells.dtype == object:  # may hold True and 1, which are equal and have other texts
        cells = cells.map(cell_text)
    codes, different = pd.factorize(cells, use_na_sentinel=False)
    return pyarrow.array([cell_text(value) for value in different], "large_string").take(pyarrow.array(codes))


def cells_of(cells: "pd.Series") -> tuple[str, "pyarrow.Array"]:
    """The kind of some cells of time, and the cells as the base takes them; '' where all are empty.

    ["1465862400", ""] -> "text"; [1465862400, None] -> "whole numbers"; moments as ticks, "moments[us]"
    """
    import numpy as np
    import pandas as pd
    import pyarrow

    if isinstance(cells.dtype, pd.StringDtype):
        texts = pyarrow.array(cells, "large_string", from_pandas=True)
        return "text", texts.combine_chunks() if isinstance(texts, pyarrow.ChunkedArray) else texts
    present = cells[cells.notna()]
    if not len(present):
        return "", pyarrow.nulls(len(cells))
    kind = cells.dtype.kind
    if kind == "M":
        unit, _ = np.datetime_data(cells.dtype)
        return f"moments[{unit}]", pyarrow.array(cells.to_numpy().view("int64"), "int64", mask=cells.isna().to_numpy())
    if kind == "O" and all(type(value) is int and abs(value) < 2**63 for value in present):
        return "whole numbers", pyarrow.array(cells.where(cells.notna(), None), "int64")
    if kind == "i" or (kind == "u" and cells.dtype.itemsize < 8):
        return "whole numbers", pyarrow.array(cells.to_numpy().astype("int64"))
    if kind in "uf":
        return "numbers", pyarrow.array(cells.to_numpy().astype("float64"), from_pandas=True)
    return "text", pyarrow.array([_text_of_time(value) for value in cells], "large_string")


def _text_of_time(value: object) -> str | None:
    from datetime import date

    if value is None or value != value:
        return None
    return value.isoformat() if isinstance(value, date) else str(value)  # a datetime is a date, too
