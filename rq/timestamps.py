"""How a column of timestamps is read: one reading for the whole column, or a refusal that shows the rows that disagree.

Only the order counts: numbers stay in the unit they came in, dates written as text become nanoseconds since 1970. The cells
are in the table `read` of a DuckDB base, which may be larger than memory; of texts, each is looked at once.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, NoReturn

from rq.files import InputError, shown

if TYPE_CHECKING:
    import duckdb

MISSING = ("", "nan", "nat", "none", "null", "<na>", "n/a", "na")
NUMBER = r"[+-]?\d{1,25}(?:\.\d{0,25})?(?:e[+-]?\d{1,3})?"
# From 1e8 on a number is in seconds (1973 and later), from 1e11 on in milliseconds, and so on: a unit begins where the
# one before it would have reached the year 5138.
UNITS = {"nanoseconds": 1e9, "microseconds": 1e6, "milliseconds": 1e3, "seconds": 1.0}  # how many make a second
LEAST_EPOCH = 1e8
EPOCH_DAY = date(1970, 1, 1).toordinal()
LAST_YEAR, END_S = 2100, 4_133_980_800  # the last year that is believed, and its end in seconds
# Orders from 1973 to 2100 differ by a factor of 41 in all, and by far less from one to the next. Seconds and milliseconds
# differ by 1000, YYYYMMDD and seconds by 39 from 1995 on. Small numbers are positions and may jump as they like.
LARGEST_JUMP, LARGEST_POSITION = 20, 1e7
# A few cells that are no timestamp are dropped and counted; a larger share means that the column was not understood.
MOST_UNREADABLE = 0.1
COARSEST_S = 1000  # 1.4658624e+18 is whole days written in full, 1.46586e+12 is rounded to hours
EXPECTED = (
    "expected dates like 2016-01-31T12:00:00Z, 31/01/2016, 01/31/2016 or 31 Jan 2016 of the years 1970 to 2100, "
    "or seconds, milli-, micro- or nanoseconds since 1970"
)

TEXTS_AT_ONCE = 2**16
_BLANKS = "".join(chr(code) for code in range(sys.maxunicode) if chr(code).isspace())  # what str.strip takes away
_CLEAN = f"coalesce(lower(trim({{}}, '{_BLANKS}')), '')"  # a cell as it is looked at

MONTHS: tuple[str, ...] = ("january", "february", "march", "april", "may", "june")
MONTHS += ("july", "august", "september", "october", "november", "december")
_YEAR = r"(?P<year>\d{4}|\d\d)"
_MONTH = r"(?P<name>[a-z]{3,9})\.?"
_WEEKDAY = r"(?:(?:mon|tue|wed|thu|fri|sat|sun)[a-z]{0,6}\.?,? +)?"
_ZONE = r"(?: *(?P<zone>z|utc|gmt|[+-]\d\d(?::?\d\d)?))?"
_CLOCK = r"(?P<hour>\d\d?)(?::?(?P<minute>\d\d)(?::?(?P<second>\d\d)(?:[.,](?P<fraction>\d+))?)?)?(?: *(?P<half>am|pm))?"
_TIME = rf"(?:(?:t|,? +){_CLOCK}{_ZONE})?"
# A date of each format, lower case. Formats of one name may stand side by side in a column, since none of them can be
# taken for another one.
_FORMATS = [
    (name, re.compile(pattern, re.ASCII))
    for name, pattern in (
        ("year first", rf"(?P<year>\d{{4}})(?P<sep>[-/.])(?P<month>\d\d?)(?:(?P=sep)(?P<day>\d\d?){_TIME})?"),
        ("year first", rf"(?P<year>\d{{4}})(?P<month>\d\d)(?P<day>\d\d){_TIME}"),
        ("year first", rf"(?P<year>\d{{4}})-?w(?P<week>\d\d)(?:-?(?P<weekday>[1-7]){_TIME})?"),
        ("year first", rf"(?P<year>\d{{4}})-(?P<yearday>\d{{3}}){_TIME}"),
        ("numbers", rf"(?P<first>\d\d?)(?P<sep>[-/. ])(?P<other>\d\d?)(?:(?P=sep)|, +){_YEAR}{_TIME}"),
        ("month by name", rf"{_WEEKDAY}(?P<day>\d\d?)[- .]+{_MONTH}[- ,]+{_YEAR}{_TIME}"),
        ("month by name", rf"{_WEEKDAY}{_MONTH} +(?P<day>\d\d?),? +{_YEAR}{_TIME}"),
        ("month by name", rf"{_WEEKDAY}{_MONTH} +(?P<day>\d\d?) +{_CLOCK}{_ZONE} +{_YEAR}"),
    )
]


@dataclass(frozen=True)
class Column:
    """A column of timestamps: the cells of the table `read`, and where a row stands in its file: 7 -> 'orders.csv:9'."""

    name: str
    kind: str  # "text", "whole numbers", "numbers", or "moments[us]": ticks since 1970 of that unit
    base: "duckdb.DuckDBPyConnection"
    where: Callable[[int], str]

    def value(self, query: str, *values: object) -> Any:
        """The first value that a query gives; None where it gives no row."""
        found = self.base.execute(query, values).fetchall()
        return found[0][0] if found else None

    def shown(self, row: int) -> str:
        """A cell and where it stands, for a message: "orders.csv:9: 'soon'"."""
        import numpy as np

        cell = self.value("SELECT cell FROM read WHERE row = ?", row)
        if self.kind.startswith("moments"):
            cell = np.array(cell).view(f"datetime64[{self.kind.removeprefix('moments[').removesuffix(']')}]")
        return f"{self.where(row)}: {shown(str(cell))}"


@dataclass(frozen=True)
class Reading:
    """How a column is read, as SQL about its rows `r`: where the number is that grows with time, NULL for what is empty or
    unreadable, and whether the cell is empty; `in_words`: "dates with the day first".
    """

    moment: str
    empty: str
    join: str
    in_words: str


def read_times(column: Column, *, dayfirst: bool | None = None) -> Reading:
    """The one reading of a column; dates like 02/01/2016 alone need `dayfirst`, and are refused without.

    ["13/01/2016", "02/01/2016"] -> 13 January, 2 January
    ["1465862400", "1465862400000"] -> refused: seconds and milliseconds
    """
    if column.kind == "text":
        return _read_texts(column, dayfirst=dayfirst)
    if column.kind.startswith("moments"):
        ticks = _ticks_a_second(column.kind)
        good, in_words = f"value > 0 AND value < {END_S * ticks}", "moments in time"
    else:
        good, in_words = _numbers(column, "(SELECT cell AS value, row FROM read)")
    found = column.base.execute(
        f"SELECT count(value), count(value) FILTER (NOT ({good})), min(row) FILTER (value IS NOT NULL AND NOT ({good})) "
        "FROM (SELECT cell AS value, row FROM read)"
    ).fetchall()[0]
    _refuse_if_not_understood(column, *found)
    return Reading(f"CASE WHEN {good.replace('value', 'r.cell')} THEN r.cell END", "r.cell IS NULL", "", in_words)


def _ticks_a_second(kind: str) -> int:
    """'moments[us]' -> 1000000."""
    return {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[kind.removeprefix("moments[").removesuffix("]")]


def _read_texts(column: Column, *, dayfirst: bool | None) -> Reading:
    """The table `written` gets the different texts of the column and their moments."""
    base = column.base
    base.execute(
        f"""CREATE OR REPLACE TABLE written AS SELECT *, text IN {MISSING} AS empty, regexp_full_match(text, ?) AS numeric
        FROM (SELECT {_CLEAN.format("cell")} AS text, min(row) AS row, count(*) AS rows FROM read GROUP BY 1)""",
        [NUMBER],
    )
    dates = _look_at_dates(column)
    formats = dates.formats
    numeric = column.value("SELECT min(row) FROM written WHERE numeric")
    if numeric is not None:
        formats = {"a number": numeric, **formats}
    if len(formats) > 1:
        _contradict(column, formats.items())
    if numeric is not None:
        _refuse_rounded(column)
        whole = column.value(
            "SELECT bool_and(regexp_full_match(text, '[+-]?[0-9]+') AND try_cast(text AS BIGINT) IS NOT NULL) FROM written "
            "WHERE numeric"
        )
        kind = "BIGINT" if whole else "DOUBLE"
        base.execute(
            f"CREATE OR REPLACE TABLE moments AS SELECT text, text::{kind} AS value, row FROM written WHERE numeric"
        )
        good, reading = _numbers(column, "moments")
        base.execute(f"UPDATE moments SET value = NULL WHERE NOT ({good})")
    else:
        reading = _dates(column, dates, dayfirst=dayfirst)
    unreadable = "NOT empty AND value IS NULL"
    found = base.execute(
        f"SELECT coalesce(sum(rows) FILTER (NOT empty), 0), coalesce(sum(rows) FILTER ({unreadable}), 0), "
        f"min(w.row) FILTER ({unreadable}) FROM written w LEFT JOIN moments USING (text)"
    ).fetchall()[0]
    _refuse_if_not_understood(column, *found)
    join = f"LEFT JOIN moments ON moments.text = {_CLEAN.format('r.cell')}"
    return Reading("moments.value", f"{_CLEAN.format('r.cell')} IN {MISSING}", join, reading)


def _contradict(column: Column, kinds: Iterable[tuple[str, int]]) -> NoReturn:
    """Refuse a column whose rows are of two kinds, (kind in words, a row) each; the words may be the same."""
    (one, row), (other, other_row), *_ = kinds
    raise InputError(
        f"column {shown(column.name)} holds two kinds of timestamps: {column.shown(row)} ({one}) and "
        f"{column.shown(other_row)} ({other}); write all rows in one way, or empty the cells that cannot be mended"
    )


def _refuse_if_not_understood(column: Column, present: int, unreadable: int, first: int | None) -> None:
    """present, unreadable: how many cells are not empty, and of these how many cannot be read, the first in row `first`."""
    if not present:
        row = column.value("SELECT min(row) FROM read")
        raise InputError(
            f"column {shown(column.name)}: every cell is empty, the first at {column.where(row)}; {EXPECTED}; "
            "name another column by --time_column"
        )
    if first is not None and unreadable > MOST_UNREADABLE * present:
        raise InputError(
            f"{column.shown(first)} in column {shown(column.name)} cannot be read as a time, one such cell "
            f"of {unreadable:,} among {present:,}; {EXPECTED}; mend the cells, or name another column by --time_column"
        )


def _numbers(column: Column, relation: str) -> tuple[str, str]:
    """Numbers of one unit, the same for all rows of a relation (value, row): which values are good, in SQL, and the unit.

    Only counts, least and greatest values are asked for, so that nothing has to be sorted: values that differ by a factor of
    2 at most stand together, and a jump can only be from one such group to the next.
    """
    positive = f"FROM (SELECT value::DOUBLE AS value, row FROM {relation}) WHERE value > 0"
    last = None
    groups = f"SELECT min(value), max(value) {positive} GROUP BY floor(log2(value)) ORDER BY 1"
    for least, greatest in column.base.execute(groups).fetchall():
        if last is not None and least / last > LARGEST_JUMP and least >= LARGEST_POSITION:
            both = ((value, column.value(f"SELECT min(row) {positive} AND value = ?", value)) for value in (last, least))
            _contradict(column, [(_meaning(column, value), row) for value, row in both])
        last = greatest
    count = column.value(f"SELECT count(*) {positive}")

    def middle_is_below(bound: float) -> bool:
        """Of the value in the middle of all that are greater than 0, in order; 0 where there is none."""
        return not count or column.value(f"SELECT count(*) {positive} AND value < ?", bound) > count // 2

    if middle_is_below(LARGEST_POSITION):
        return "value >= 0", "small numbers as they stand"
    if written := _digits_of_dates(column, f"SELECT value {positive}"):
        return "value > 0", f"dates written {written}"
    if middle_is_below(LEAST_EPOCH):
        return "value > 0", "numbers as they stand"
    unit = next((unit for unit, a_second in UNITS.items() if not middle_is_below(LEAST_EPOCH * a_second)), "seconds")
    return f"value > 0 AND value < {END_S * UNITS[unit]:.0f}", f"{unit} since 1970"


def _refuse_rounded(column: Column) -> None:
    """Refuse 1.46586E+12, which a spreadsheet made of 1465862400123: orders of hours would all be at one time."""
    finest_s, first = float("inf"), None
    for text, row in _rows(column, "numeric AND contains(text, 'e')"):
        digits, _, power = text.partition("e")
        step = 10.0 ** min(int(power) - len(digits.partition(".")[2]), 300)
        finest_s = min(finest_s, step / UNITS[_unit(float(text))])
        first = row if first is None else first
    if first is not None and finest_s > COARSEST_S:
        raise InputError(
            f"{column.shown(first)} in column {shown(column.name)} was rounded, as a spreadsheet does; write all digits"
        )


def _unit(number: float) -> str:
    return next((unit for unit, a_second in UNITS.items() if number >= LEAST_EPOCH * a_second), "seconds")


def _meaning(column: Column, number: float) -> str:
    """What a number is on its own: 1465862400 -> 'seconds since 1970: 2016-06-14'."""
    if number < LEAST_EPOCH:
        return _digits_of_dates(column, f"SELECT {number!r}::DOUBLE AS value") or "a small number"
    unit = _unit(number)
    day = datetime.fromtimestamp(number / UNITS[unit], UTC).date() if number < 1e20 else "far away"
    return f"{unit} since 1970: {day}"


def _digits_of_dates(column: Column, values: str) -> str:
    """'YYYYMMDD' for 20160131 and the like, with hours, minutes and seconds for longer ones; '' for other numbers.

    values: a query for them, in a column of this name.
    """
    for written, below_a_day in (("YYYYMMDD", 1), ("YYYYMMDDHHMM", 10**4), ("YYYYMMDDHHMMSS", 10**6)):
        if column.value(
            f"""SELECT bool_and(floor(days / 10000) BETWEEN 1970 AND {LAST_YEAR} AND days % 100 BETWEEN 1 AND 31
            AND floor(days / 100) % 100 BETWEEN 1 AND 12)
            FROM (SELECT floor(value / {below_a_day}) AS days FROM ({values}))"""
        ):
            return written
    return ""


# ---------------------------------------------------------------------------------------------- dates


def _rows(column: Column, condition: str) -> Iterator[tuple[str, int]]:
    """(text, its first row) of the different texts of a column, in the order of the rows."""
    found = column.base.cursor().execute(f"SELECT text, row FROM written WHERE {condition} ORDER BY row")
    while some := found.fetchmany(TEXTS_AT_ONCE):
        yield from some


@dataclass
class Dates:
    """What the dates of a column are like, each thing with the first row that shows it."""

    formats: dict[str, int]
    zones: dict[str, int]
    order: dict[str, int]  # "day first", "month first", by rows like 13/01/2016 that can be read in one way only
    open_row: int | None  # a row like 02/01/2016
    numbers: bool  # dates are made of numbers: the whole column decides their order of day and month


def _look_at_dates(column: Column) -> Dates:
    found = Dates({}, {}, {}, None, False)
    for text, row in _rows(column, "NOT empty AND NOT numeric"):
        if (dated := _match(text)) is None:
            continue
        name, match = dated
        if len(match["year"]) == 2:
            raise InputError(f"{column.shown(row)} in column {shown(column.name)} has a year of two digits; write four")
        if name == "numbers":
            found.numbers = True
            first, other = int(match["first"]), int(match["other"])
            if 12 < first <= 31 and 1 <= other <= 12:
                found.order.setdefault("day first", row)
            elif 12 < other <= 31 and 1 <= first <= 12:
                found.order.setdefault("month first", row)
            elif first != other and found.open_row is None:
                found.open_row = row
            name = f"numbers with {match['sep']!r}"
        found.formats.setdefault(name, row)
        found.zones.setdefault("with a time zone" if match["zone"] else "without a time zone", row)
    if len(found.formats) == 1 and len(found.zones) > 1:
        _contradict(column, found.zones.items())
    return found


def _dates(column: Column, dates: Dates, *, dayfirst: bool | None) -> str:
    """Dates of one format: their nanoseconds since 1970 go to the table `moments`; how they are read, in words."""
    import pyarrow

    reading = "dates whose order of day and month is plain"
    if dates.numbers:
        dayfirst = _day_is_first(column, dates, dayfirst=dayfirst)
        reading = "dates with the day first" if dayfirst else "dates with the month first"
    column.base.execute("CREATE OR REPLACE TABLE moments (text VARCHAR, value BIGINT, row BIGINT)")
    rows = _rows(column, "NOT empty AND NOT numeric")
    while some := list(islice(rows, TEXTS_AT_ONCE)):
        dated = [(text, found[1].groupdict(), row) for text, row in some if (found := _match(text))]
        texts, values, places = [], [], []
        for text, parts, row in dated:
            texts.append(text)
            values.append(_nanoseconds(parts, dayfirst=dayfirst))
            places.append(row)
        columns = {"text": pyarrow.array(texts, "string"), "value": pyarrow.array(values, "int64"), "row": places}
        column.base.register("dated", pyarrow.table(columns))
        column.base.execute("INSERT INTO moments SELECT * FROM dated")
        column.base.unregister("dated")
    return reading


def _day_is_first(column: Column, dates: Dates, *, dayfirst: bool | None) -> bool:
    """Decide 02/01/2016 by the rows that can be read in one way only, like 13/01/2016, for the whole column."""
    if len(dates.order) > 1:
        _contradict(column, dates.order.items())
    if dayfirst is None:
        if not dates.order and dates.open_row is not None:
            raise InputError(
                f"{column.shown(dates.open_row)} in column {shown(column.name)}: day or month first? No row decides it; "
                "give --dayfirst True or --dayfirst False"
            )
        return "day first" in dates.order
    if dates.order and ("day first" in dates.order) != dayfirst:
        (kind, row), *_ = dates.order.items()
        raise InputError(
            f"--dayfirst {dayfirst}, but {column.shown(row)} in column {shown(column.name)} has the {kind}; "
            "leave --dayfirst out"
        )
    return dayfirst


def _match(text: str) -> tuple[str, re.Match] | None:
    """The format of a date, and its parts; None for what looks like no date."""
    for name, pattern in _FORMATS:
        if match := pattern.fullmatch(text):
            return name, match
    return None


def _nanoseconds(part: dict[str, Any], *, dayfirst: bool | None) -> int | None:
    """Nanoseconds since 1970 of a matched date; None for a day, an hour or a year that cannot be."""
    try:
        day = _day(part, dayfirst=dayfirst)
    except ValueError:
        return None
    hour, minute, second = int(part["hour"] or 0), int(part["minute"] or 0), int(part["second"] or 0)
    if part["half"]:
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + 12 * (part["half"] == "pm")
    if hour > 24 or (hour == 24 and (minute or second)) or minute > 59 or second > 60:
        return None  # ISO 8601 has 24:00 for midnight, and 60 for a leap second
    seconds = 86_400 * (day.toordinal() - EPOCH_DAY) + 3600 * hour + 60 * minute + second - _offset_s(part["zone"])
    nanoseconds = seconds * 10**9 + int((part["fraction"] or "0")[:9].ljust(9, "0"))
    return nanoseconds if 0 < nanoseconds < END_S * 10**9 else None


def _day(part: dict[str, Any], *, dayfirst: bool | None) -> date:
    year = int(part["year"])
    if part.get("week"):
        return date.fromisocalendar(year, int(part["week"]), int(part["weekday"] or 1))
    if part.get("yearday"):
        day = date(year, 1, 1) + timedelta(days=int(part["yearday"]) - 1)
        if day.year != year:
            raise ValueError(part["yearday"])
        return day
    if part.get("first"):
        first, other = int(part["first"]), int(part["other"])
        return date(year, other, first) if dayfirst else date(year, first, other)
    if part.get("name"):
        return date(year, [month.startswith(part["name"]) for month in MONTHS].index(True) + 1, int(part["day"]))
    return date(year, int(part["month"]), int(part.get("day") or 1))


def _offset_s(zone: str | None) -> int:
    """'+05:30' -> 19800 seconds; 0 for 'z', 'utc', 'gmt' and no zone."""
    if not zone or zone[0] not in "+-":
        return 0
    digits = zone[1:].replace(":", "").ljust(4, "0")
    return (1 if zone[0] == "+" else -1) * (3600 * int(digits[:2]) + 60 * int(digits[2:]))
