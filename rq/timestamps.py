"""How a column of timestamps is read: one reading for the whole column, or a refusal that shows the rows that disagree.

Only the order counts: numbers stay in the unit they came in, dates written as text become nanoseconds since 1970.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from rq.files import InputError, shown

if TYPE_CHECKING:
    import pandas as pd

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
    """A column of timestamps as read from a file, and where a row stands in it: where(7) -> 'orders.csv:9'."""

    name: str
    cells: "pd.Series"
    where: Callable[[int], str]

    def shown(self, row: int) -> str:
        """A cell and where it stands, for a message: "orders.csv:9: 'soon'"."""
        try:
            cell = str(self.cells[row])
        except (ValueError, NotImplementedError):  # Parquet has room for any year
            cell = "a moment far away"
        return f"{self.where(row)}: {shown(cell)}"


@dataclass(frozen=True)
class Reading:
    """Numbers that grow with time, <NA> for a cell that is empty or unreadable; `in_words`: "dates with the day first"."""

    order: "pd.Series"
    empty: "pd.Series"
    in_words: str


def read_times(column: Column, *, dayfirst: bool | None = None) -> Reading:
    """The one reading of a column; dates like 02/01/2016 alone need `dayfirst`, and are refused without.

    ["13/01/2016", "02/01/2016"] -> 13 January, 2 January
    ["1465862400", "1465862400000"] -> refused: seconds and milliseconds
    """
    import pandas as pd

    cells = column.cells
    empty = cells.isna()
    if cells.dtype.kind == "M":
        order, reading = _moments(cells[~empty])
    elif cells.dtype.kind in "iuf":
        order, reading = _numbers(column, cells[~empty])
    else:
        text = cells.astype(object).map(_text).astype("str")
        empty = text.isin(MISSING)
        present = text[~empty]
        numeric = present.str.fullmatch(NUMBER)
        moments, formats, numbered = _match_dates(column, present[~numeric])
        if numeric.any():
            formats = {"a number": numeric.idxmax(), **formats}
        if len(formats) > 1:
            _contradict(column, formats.items())
        if numeric.any():
            _refuse_rounded(column, present[numeric])
            order, reading = _numbers(column, pd.to_numeric(present[numeric]))
        else:
            order, reading = _dates(column, present, moments, numbered, dayfirst=dayfirst)
    order = order.reindex(cells.index)
    _refuse_if_not_understood(column, unreadable=order.isna() & ~empty, present=~empty)
    return Reading(order, empty, reading)


def _text(cell: object) -> str:
    if isinstance(cell, date):  # a datetime is one too
        return "" if cell != cell else cell.isoformat().lower()
    return "" if cell is None else str(cell).strip().lower()


def _contradict(column: Column, kinds: Iterable[tuple[str, int]]) -> NoReturn:
    """Refuse a column whose rows are of two kinds, (kind in words, a row) each; the words may be the same."""
    (one, row), (other, other_row), *_ = kinds
    raise InputError(
        f"column {shown(column.name)} holds two kinds of timestamps: {column.shown(row)} ({one}) and "
        f"{column.shown(other_row)} ({other}); write all rows in one way, or empty the cells that cannot be mended"
    )


def _refuse_if_not_understood(column: Column, *, unreadable: "pd.Series", present: "pd.Series") -> None:
    if not present.any():
        raise InputError(
            f"column {shown(column.name)}: every cell is empty, the first at {column.where(present.index[0])}; {EXPECTED}; "
            "name another column by --time_column"
        )
    count = int(unreadable.sum())
    if count > MOST_UNREADABLE * int(present.sum()):
        raise InputError(
            f"{column.shown(unreadable.idxmax())} in column {shown(column.name)} cannot be read as a time, one such cell "
            f"of {count:,} among {int(present.sum()):,}; {EXPECTED}; mend the cells, or name another column by --time_column"
        )


def _moments(cells: "pd.Series") -> tuple["pd.Series", str]:
    """Timestamps that a Parquet file holds as such."""
    moments = cells.dt.tz_convert("UTC").dt.tz_localize(None) if getattr(cells.dt, "tz", None) else cells
    ticks = moments.astype("int64").astype("Int64")
    return ticks.where((ticks > 0) & (moments.dt.year <= LAST_YEAR)), "moments in time"


def _numbers(column: Column, numbers: "pd.Series") -> tuple["pd.Series", str]:
    """Numbers of one unit, the same for all rows."""
    if numbers.dtype.kind != "i":
        numbers = numbers.astype("float64")
    ascending = numbers[numbers > 0].astype("float64").sort_values()
    jumps = (ascending / ascending.shift() > LARGEST_JUMP) & (ascending >= LARGEST_POSITION)
    if jumps.any():
        at = int(jumps.to_numpy().argmax())
        _contradict(column, [(_meaning(ascending.iloc[i]), ascending.index[i]) for i in (at - 1, at)])
    middle = float(ascending.iloc[len(ascending) // 2]) if len(ascending) else 0.0
    order = numbers.astype("Float64" if numbers.dtype.kind == "f" else "Int64")
    if middle < LARGEST_POSITION:
        return order.where(numbers >= 0), "small numbers as they stand"
    if written := _digits_of_dates(ascending):
        return order.where(numbers > 0), f"dates written {written}"
    if middle < LEAST_EPOCH:
        return order.where(numbers > 0), "numbers as they stand"
    unit = _unit(middle)
    return order.where((numbers > 0) & (numbers < END_S * UNITS[unit])), f"{unit} since 1970"


def _refuse_rounded(column: Column, texts: "pd.Series") -> None:
    """Refuse 1.46586E+12, which a spreadsheet made of 1465862400123: orders of hours would all be at one time."""
    short = texts[texts.str.contains("e", regex=False)]
    finest_s = float("inf")
    for text in short.drop_duplicates():
        digits, _, power = text.partition("e")
        step = 10.0 ** min(int(power) - len(digits.partition(".")[2]), 300)
        finest_s = min(finest_s, step / UNITS[_unit(float(text))])
    if len(short) and finest_s > COARSEST_S:
        raise InputError(
            f"{column.shown(short.index[0])} in column {shown(column.name)} was rounded, as a spreadsheet does; "
            "write all digits"
        )


def _unit(number: float) -> str:
    return next((unit for unit, a_second in UNITS.items() if number >= LEAST_EPOCH * a_second), "seconds")


def _meaning(number: float) -> str:
    """What a number is on its own: 1465862400 -> 'seconds since 1970: 2016-06-14'."""
    import pandas as pd

    if number < LEAST_EPOCH:
        return _digits_of_dates(pd.Series([number])) or "a small number"
    unit = _unit(number)
    day = datetime.fromtimestamp(number / UNITS[unit], UTC).date() if number < 1e20 else "far away"
    return f"{unit} since 1970: {day}"


def _digits_of_dates(numbers: "pd.Series") -> str:
    """'YYYYMMDD' for 20160131 and the like, with hours, minutes and seconds for longer ones; '' for other numbers."""
    for written, below_a_day in (("YYYYMMDD", 1), ("YYYYMMDDHHMM", 10**4), ("YYYYMMDDHHMMSS", 10**6)):
        days = numbers // below_a_day
        month, day = days // 100 % 100, days % 100
        if ((days // 10_000).between(1970, LAST_YEAR) & month.between(1, 12) & day.between(1, 31)).all():
            return written
    return ""


def _match(text: str) -> tuple[str, re.Match] | None:
    """The format of a date, and its parts; None for what looks like no date."""
    for name, pattern in _FORMATS:
        if match := pattern.fullmatch(text):
            return name, match
    return None


def _match_dates(
    column: Column, texts: "pd.Series"
) -> tuple[dict[str, int | None], dict[str, int], dict[str, tuple[int, re.Match]]]:
    """{text: moment} of the dates that can be read in one way only, {format: the first row that has it} of all dates, and
    {text: (row, parts)} of the dates made of numbers, whose order of day and month the whole column decides.
    """
    moments: dict[str, int | None] = {}
    formats: dict[str, int] = {}
    zones: dict[str, int] = {}
    numbered: dict[str, tuple[int, re.Match]] = {}
    distinct = texts.drop_duplicates()
    for row, text in zip(distinct.index.tolist(), distinct.tolist(), strict=True):
        found = _match(text)
        if found is None:
            continue
        name, match = found
        if len(match["year"]) == 2:
            raise InputError(f"{column.shown(row)} in column {shown(column.name)} has a year of two digits; write four")
        if name == "numbers":
            numbered[text] = (row, match)
            name = f"numbers with {match['sep']!r}"
        else:
            moments[text] = _nanoseconds(match.groupdict(), dayfirst=None)
        formats.setdefault(name, row)
        zones.setdefault("with a time zone" if match["zone"] else "without a time zone", row)
    if len(formats) == 1 and len(zones) > 1:
        _contradict(column, zones.items())
    return moments, formats, numbered


def _dates(
    column: Column,
    texts: "pd.Series",
    moments: dict[str, int | None],
    numbered: dict[str, tuple[int, re.Match]],
    *,
    dayfirst: bool | None,
) -> tuple["pd.Series", str]:
    """Dates of one format."""
    reading = "dates whose order of day and month is plain"
    if numbered:
        dayfirst = _day_is_first(column, numbered, dayfirst=dayfirst)
        moments = {text: _nanoseconds(match.groupdict(), dayfirst=dayfirst) for text, (_, match) in numbered.items()}
        reading = "dates with the day first" if dayfirst else "dates with the month first"
    return texts.map(moments).astype("Int64"), reading


def _day_is_first(column: Column, numbered: dict[str, tuple[int, re.Match]], *, dayfirst: bool | None) -> bool:
    """Decide 02/01/2016 by the rows that can be read in one way only, like 13/01/2016, for the whole column."""
    rows: dict[str, int] = {}
    open_row = None
    for row, match in numbered.values():
        first, other = int(match["first"]), int(match["other"])
        if 12 < first <= 31 and 1 <= other <= 12:
            rows.setdefault("day first", row)
        elif 12 < other <= 31 and 1 <= first <= 12:
            rows.setdefault("month first", row)
        elif first != other and open_row is None:
            open_row = row
    if len(rows) > 1:
        _contradict(column, rows.items())
    if dayfirst is None:
        if not rows and open_row is not None:
            raise InputError(
                f"{column.shown(open_row)} in column {shown(column.name)}: day or month first? No row decides it; "
                "give --dayfirst True or --dayfirst False"
            )
        return "day first" in rows
    if rows and ("day first" in rows) != dayfirst:
        (kind, row), *_ = rows.items()
        raise InputError(
            f"--dayfirst {dayfirst}, but {column.shown(row)} in column {shown(column.name)} has the {kind}; "
            "leave --dayfirst out"
        )
    return dayfirst


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
