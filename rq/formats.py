"""What is known of files that exist: the names of their columns, what stands between their cells, and which have no header.

Everything here is data, and looked up in order. A format that is not read is one more line in a table.

    orders.csv   user_id;item_id;timestamp   -> a header, ";" between cells
    X.inter      user_id:token <tab> ..      -> RecBole: a header, tabs between cells, no quotes
    ratings.dat  1::1193::5::978300760       -> MovieLens: no header, "::" between cells
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rq.files import InputError, shown

# What a field may be called in a user's own table, in Amazon Reviews 2014/2018 and in 2023, in MovieLens and RecBole; the
# first one present is read. Case and blanks around a name do not matter, nor does what TYPED takes away.
FIELD_NAMES = {
    "user": ("user_id", "user", "reviewerID", "userId"),
    "item": ("item_id", "item", "parent_asin", "asin", "itemId", "movieId", "movie_id"),
    "time": ("timestamp", "time", "unixReviewTime", "date"),
    "title": ("title", "item_title", "name", "movie_title"),
    "description": ("description",),
    "brand": ("brand", "store"),
    "categories": ("categories", "category", "main_category", "genres", "genre", "class"),
    "features": ("features", "feature"),
}
TYPED = re.compile(r":(token|float|token_seq|float_seq)$")  # RecBole's types, as in user_id:token


@dataclass(frozen=True)
class Layout:
    """How the lines of a text file are cells."""

    what: str
    separator: str
    quoted: bool = True
    columns: tuple[str, ...] = ()  # where the first line is no header
    encoding: str = "utf-8"
    other_encoding: str | None = None  # of a file that is not UTF-8


# File ending -> its layout; a header that another separator divides into the columns needed decides for that one.
LAYOUTS = {
    "csv": Layout("CSV", ","),
    "tsv": Layout("TSV", "\t"),
    "txt": Layout("text", "\t"),
    "dat": Layout("text", "::", quoted=False),
    "data": Layout("text", "\t", quoted=False),
    "inter": Layout("RecBole's .inter", "\t", quoted=False),
    "item": Layout("RecBole's .item", "\t", quoted=False),
}
SEPARATORS = (",", ";", "\t", "|", "::")
# What the first line of a file without a header looks like, and its layout.
RATINGS = ("user_id", "item_id", "rating", "timestamp")
MOVIES = ("item_id", "title", "genres")
MOVIES_100K = ("item_id", "title", "release", "video", "address", *(f"genre_{number}" for number in range(19)))
WITHOUT_HEADER = tuple(
    (re.compile(pattern), Layout(f"{what} without a header", separator, False, columns, other_encoding=other))
    for pattern, what, separator, columns, other in (
        (r"\d+::\d+::[\d.]+::\d+", "MovieLens ratings", "::", RATINGS, None),
        (r"\d+::((?!::).)+::((?!::).)+", "MovieLens movies", "::", MOVIES, "latin-1"),
        (r"\d+\t\d+\t[\d.]+\t\d+", "MovieLens ratings", "\t", RATINGS, None),
        (r"\d+\|([^|]*\|){4}[01](\|[01]){18}", "MovieLens movies", "|", MOVIES_100K, "latin-1"),
        (r"[A-Z0-9]+,[A-Z0-9]+,\d\.\d,\d+", "Amazon ratings", ",", RATINGS, None),
    )
)
SEQUENCE = re.compile(r"\d+( +\d+)+ *")  # the first line of P5's sequential_data.txt: a user, then items
# The columns read -> whose they are.
WHOSE: dict[tuple[str, ...], str] = {
    ("reviewerID", "asin"): "Amazon 2014 or 2018 reviews",
    ("user_id", "parent_asin"): "Amazon 2023 reviews",
    ("parent_asin", "title"): "Amazon 2023 items",
    ("asin", "title"): "Amazon 2014 or 2018 items",
    ("userId", "movieId"): "MovieLens ratings",
    ("movieId", "title"): "MovieLens movies",
}


def plain_name(name: object) -> str:
    """'Timestamp:float ' -> 'timestamp'."""
    return TYPED.sub("", str(name).strip().casefold())


def find(columns: Sequence[str], candidates: Sequence[str], *, path: object) -> int | None:
    """The position of the column that one of the candidates names; the exact spelling before any other."""
    for spelled in (lambda name: str(name).strip(), plain_name):
        for candidate in candidates:
            at = [position for position, name in enumerate(columns) if spelled(name) == spelled(candidate)]
            if len(at) > 1:
                raise InputError(f"{path}: {len(at)} columns are called {shown(candidate)}; rename or remove all but one")
            if at:
                return at[0]
    return None
