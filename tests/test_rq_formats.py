"""Files of other programs enter rq.prepare as they are: a small file of each, the command, rows counted by hand."""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
from pathlib import Path

import pytest
import refusals
from conftest import ROOT

from rq import prepare
from rq.index_file import write_sids


def rows_of(path: Path) -> list[tuple[str, str, str]]:
    """(user, history, item) of each row of a CSV."""
    with open(path, newline="") as file:
        return [(row["user_id"], row["history_item_id"], row["item_id"]) for row in csv.DictReader(file)]


def parts_of(folder: Path) -> dict[str, list[tuple[str, str, str]]]:
    return {part: rows_of(folder / f"X.{part}.csv") for part in ("train", "valid", "test")}


# ---------------------------------------------------------------------------------------------- LC-Rec, LETTER

INTER = {"0": [0, 1, 2, 3], "1": [3, 0], "2": [1], "3": [2, 2, 0]}
INDEX = {str(item): [f"<a_{item}>", "<b_0>", f"<c_{9 - item}>"] for item in range(5)}
LC_REC_ITEMS = {str(item): {"title": f"Drum {item}", "description": "", "brand": ""} for item in range(5)}
LEAVE_ONE_OUT = ("--split", "leave_one_out", "--k_core", "1")


@pytest.fixture
def triple(tmp_path: Path) -> Path:
    """The folder of a triple X.inter.json, X.index.json, X.item.json, indented as LC-Rec writes them."""
    for name, content in {"inter": INTER, "index": INDEX, "item": LC_REC_ITEMS}.items():
        (tmp_path / f"X.{name}.json").write_text(json.dumps(content, indent=4))
    return tmp_path


def triple_line(folder: Path, *extra: str, items: bool = True) -> list[str]:
    line = [
        f"--interactions={folder}/X.inter.json",
        f"--index={folder}/X.index.json",
        f"--output_dir={folder}/out",
        "--name=X",
    ]
    return [*line, *([f"--items={folder}/X.item.json"] if items else []), *extra]


def test_a_triple_becomes_csvs_in_one_run_and_keeps_its_numbers(triple, capsys):
    prepare.main(triple_line(triple, *LEAVE_ONE_OUT, "--max_history", "2"))
    # the last item of a user is test, the last but one valid, an earlier one train; a user's first item is only history
    assert parts_of(triple / "out") == {
        "train": [("0", "[0]", "1"), ("1", "[3]", "0")],
        "valid": [("0", "[0, 1]", "2"), ("3", "[2]", "2")],
        "test": [("0", "[1, 2]", "3"), ("3", "[2, 2]", "0")],
    }
    told = capsys.readouterr().err
    assert "X.inter.json: LC-Rec's user -> items in order; 4 users, 10 items in all" in told
    assert "titles of 5 of 5 items" in told
    assert "1 of 5 items are in no row that is kept" in told
    with open(triple / "out/X.test.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert row["history_item_title"] == "['Drum 1', 'Drum 2']"
    assert row["history_item_sid"] == "['<a_1><b_0><c_8>', '<a_2><b_0><c_7>']"
    assert (row["item_title"], row["item_sid"]) == ("Drum 3", "<a_3><b_0><c_6>")
    assert (triple / "out/X.info.txt").read_text().splitlines()[4] == "<a_4><b_0><c_5>\tDrum 4\t4"


def test_a_triple_without_titles_says_which_tasks_are_not_to_be_had(triple, capsys):
    prepare.main(triple_line(triple, *LEAVE_ONE_OUT, items=False))
    told = capsys.readouterr().err
    assert "no titles, SIDs only: train with --tasks sid_sid and without --item_meta_path; the tasks item, sid_title" in told
    assert parts_of(triple / "out")["test"] == [("0", "[0, 1, 2]", "3"), ("3", "[2, 2]", "0")]
    assert (triple / "out/X.info.txt").read_text().splitlines()[0] == "<a_0><b_0><c_9>\t\t0"


@pytest.mark.parametrize("indent", [None, 1])
def test_a_triple_is_known_by_its_content_whatever_its_name(triple, indent):
    path = triple / "purchases.json"
    path.write_text(json.dumps(INTER, indent=indent))
    prepare.main([*triple_line(triple, *LEAVE_ONE_OUT, items=False), f"--interactions={path}"])
    assert [len(rows) for rows in parts_of(triple / "out").values()] == [2, 2, 2]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("inter", {"0": [0, 7, 1]}, "user '0', item 2 of the sequence: item 7 is not in "),
        ("inter", {"0": [0, 1.5]}, "user '0' has the item 1.5; expected "),
        ("inter", {"0": 5}, "'0' has 5; expected "),
        ("inter", {"0": []}, "no user has an item; expected "),
        ("inter", [], "holds []; expected "),
        (
            "item",
            {"17": {"title": "Drum"}},
            "no item of the interactions has a title: ids here are like '17', those of ",
        ),
        ("item", {"0": "Drum"}, "'0' has 'Drum'; expected "),
    ],
)
def test_a_triple_that_does_not_fit_is_refused(triple, name, content, told):
    (triple / f"X.{name}.json").write_text(json.dumps(content))
    line = refusals.refusal(prepare.main, *triple_line(triple, *LEAVE_ONE_OUT))
    assert line.startswith(f"rq.prepare: {triple}/X.{name}.json")
    assert told in line
    assert not (triple / "out").exists()


def test_items_may_be_left_out_only_where_the_interactions_have_the_numbers_of_the_index(triple):
    told = "--items is missing; only an .inter.json with the --index of its item numbers does without it"
    line = triple_line(triple, *LEAVE_ONE_OUT, items=False)
    assert told in refusals.refusal(prepare.main, line[0], *line[2:])
    swapped = [f"--interactions={triple}/X.index.json", *line[1:]]
    assert f"{told}: {triple}/X.index.json has the item '<a_0>'" in refusals.refusal(prepare.main, *swapped)
    (triple / "o.csv").write_text("user_id,item_id,timestamp\nu,1,5\n")
    table = [f"--interactions={triple}/o.csv", *line[1:]]
    assert f"{told}: {triple}/o.csv is a table, not the item numbers of" in refusals.refusal(prepare.main, *table)
    assert not (triple / "out").exists()


@pytest.mark.parametrize("with_index", [True, False])
def test_the_item_file_of_a_triple_is_never_written_over(triple, with_index):
    before = (triple / "X.item.json").read_bytes()
    line = triple_line(triple, *LEAVE_ONE_OUT, f"--output_dir={triple}", "--overwrite")
    told = refusals.refusal(prepare.main, *(line if with_index else [line[0], *line[2:]]))
    assert f"{triple}/X.item.json is also an input of this run; give another --name or --output_dir" in told
    assert (triple / "X.item.json").read_bytes() == before
    assert not list(triple.glob("X.*.csv"))


def test_a_triple_without_its_index_is_numbered_as_it_was(triple):
    line = triple_line(triple, *LEAVE_ONE_OUT)
    prepare.main([line[0], *line[2:]])
    assert (triple / "out/X.item_ids.csv").read_text() == "raw_id,item_id\n0,0\n1,1\n2,2\n3,3\n4,4\n"


def test_a_fault_in_an_item_file_is_named_by_the_item(triple):
    (triple / "X.item.json").write_text(json.dumps({**LC_REC_ITEMS, "3": {"title": "a\0b"}}))
    told = refusals.refusal(prepare.main, *triple_line(triple, *LEAVE_ONE_OUT))
    assert f"{triple}/X.item.json: item '3': title 'a\\x00b' holds a NUL; mend or remove it" in told


def test_sequences_without_times_cannot_be_split_by_time(triple):
    told = refusals.refusal(prepare.main, *triple_line(triple, "--k_core", "1"))
    assert "X.inter.json has each user's order, but no times; give --split leave_one_out" in told
    assert not (triple / "out").exists()


# ---------------------------------------------------------------------------------------------- tables of others

# User 1 buys items 11, 12, 13 and 11 again, user 2 buys 13, 11 and 12; item 14 is in the catalogue and in no row.
EVENTS = [("1", "11", 978300001), ("1", "12", 978300002), ("1", "13", 978300003)]
EVENTS += [("2", "13", 978300001), ("2", "11", 978300002), ("2", "12", 978300003), ("1", "11", 978300004)]
TITLES = {"11": "Toy Story", "12": "Amélie", "13": 'The "Burbs"', "14": "Never Rented"}
# Numbers by first appearance in time: 11 is 0, 13 is 1 (both at ..001, user 1 stands first), 12 is 2; 14 comes last.
NUMBERED = ["11", "13", "12", "14"]
PARTS = {
    "train": [("1", "[0]", "2")],
    "valid": [("1", "[0, 2]", "1"), ("2", "[1]", "0")],
    "test": [("1", "[0, 2, 1]", "0"), ("2", "[1, 0]", "2")],
}


def lines(rows: list, separator: str) -> str:
    return "".join(separator.join(map(str, row)) + "\n" for row in rows)


def json_lines(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def packed(text: str) -> bytes:
    return gzip.compress(text.encode())


def movielens_dat() -> dict[str, bytes]:
    return {
        "ratings.dat": lines([(user, item, 5, time) for user, item, time in EVENTS], "::").encode(),
        "movies.dat": lines([(item, title, "Animation|Comedy") for item, title in TITLES.items()], "::").encode("latin-1"),
    }


def movielens_csv() -> dict[str, bytes]:
    ratings = [("userId", "movieId", "rating", "timestamp"), *((user, item, 5.0, time) for user, item, time in EVENTS)]
    quoted = {item: '"' + title.replace('"', '""') + '"' for item, title in TITLES.items()}
    movies = [("movieId", "title", "genres"), *((item, title, "Animation|Comedy") for item, title in quoted.items())]
    return {"ratings.csv": lines(ratings, ",").encode(), "movies.csv": lines(movies, ",").encode()}


def recbole() -> dict[str, bytes]:
    inter = [("user_id:token", "item_id:token", "rating:float", "timestamp:float")]
    inter += [(user, item, 5, f"{time}.0") for user, item, time in EVENTS]
    items = [("item_id:token", "movie_title:token_seq", "class:token_seq", "vector:float_seq")]
    items += [(item, title, "Animation Comedy", "0.5 0.25") for item, title in TITLES.items()]
    return {"X.inter": lines(inter, "\t").encode(), "X.item": lines(items, "\t").encode()}


def movielens_100k() -> dict[str, bytes]:
    movies = [(item, title, "01-Jan-1995", "", "", *[0] * 18, 1) for item, title in TITLES.items()]
    return {
        "u.data": lines([(user, item, 5, time) for user, item, time in EVENTS], "\t").encode(),
        "u.item": lines(movies, "|").encode("latin-1"),
    }


def amazon_2014() -> dict[str, bytes]:
    reviews = [{"reviewerID": user, "asin": item, "overall": 5.0, "unixReviewTime": time} for user, item, time in EVENTS]
    records = [{"asin": item, "title": title, "categories": [["Film", "DVD"]]} for item, title in TITLES.items()]
    return {
        "reviews_X_5.json.gz": packed(json_lines(reviews)),
        "meta_X.json.gz": packed("".join(f"{record!r}\n" for record in records)),  # Python, not JSON
    }


def amazon_2018() -> dict[str, bytes]:
    reviews = [
        {"image": ["a.jpg"], "overall": 5.0, "reviewerID": user, "asin": item, "unixReviewTime": time}
        for user, item, time in EVENTS
    ]
    records = [
        {"category": ["Film", "DVD"], "description": ["Steel &amp; wood."], "title": title, "feature": ["Big"], "asin": item}
        for item, title in TITLES.items()
    ]
    return {"X_5.json.gz": packed(json_lines(reviews)), "meta_X.json.gz": packed(json_lines(records))}


def amazon_2023() -> dict[str, bytes]:
    reviews = [
        {"rating": 5.0, "title": "Good", "asin": f"x{item}", "parent_asin": item, "user_id": user, "timestamp": time * 1000}
        for user, item, time in EVENTS
    ]
    records = [
        {"main_category": "Film", "title": title, "features": ["Big", "New"], "description": ["Steel."], "store": "Acme"}
        | {"categories": ["Film", "DVD"], "parent_asin": item}
        for item, title in TITLES.items()
    ]
    return {"X.jsonl.gz": packed(json_lines(reviews)), "meta_X.jsonl.gz": packed(json_lines(records))}


def semicolons() -> dict[str, bytes]:
    orders = [
        (" User_ID ", "ITEM_ID", "Timestamp", "price"),
        *((user, f" {item} ", time, "1,5") for user, item, time in EVENTS),
    ]
    quoted = [(item, '"' + title.replace('"', '""') + '"') for item, title in TITLES.items()]
    return {
        "orders.csv": lines(orders, ";").encode(),
        "products.csv": lines([("item_id", "title"), *quoted], ";").encode("cp1252"),
    }


# Format: its files, further flags, what the log says of each file, and the fields of item 0 but its title.
FORMATS = {
    "MovieLens .dat": (
        movielens_dat(),
        [],
        ("MovieLens ratings without a header, 7 rows", "MovieLens movies without a header in latin-1, 4 rows"),
        {"categories": "Animation, Comedy"},
    ),
    "MovieLens 100K": (
        movielens_100k(),
        [],
        ("MovieLens ratings without a header, 7 rows", "MovieLens movies without a header in latin-1, 4 rows"),
        {},
    ),
    "MovieLens .csv": (
        movielens_csv(),
        [],
        ("MovieLens ratings, 7 rows", "MovieLens movies, 4 rows"),
        {"categories": "Animation, Comedy"},
    ),
    "RecBole": (
        recbole(),
        [],
        ("RecBole's .inter, 7 rows, user from user_id:token", "RecBole's .item, 4 rows, item from item_id:token"),
        {"categories": "Animation Comedy"},
    ),
    "Amazon 2014": (
        amazon_2014(),
        [],
        ("Amazon 2014 or 2018 reviews, 7 rows", "Amazon 2014 or 2018 items, 4 rows"),
        {"categories": "Film, DVD"},
    ),
    "Amazon 2018": (
        amazon_2018(),
        [],
        ("Amazon 2014 or 2018 reviews, 7 rows", "Amazon 2014 or 2018 items, 4 rows"),
        {"categories": "Film, DVD", "description": "['Steel & wood.', 'Big']"},
    ),
    "Amazon 2023": (
        amazon_2023(),
        [],
        ("Amazon 2023 reviews, 7 rows", "Amazon 2023 items, 4 rows"),
        {"categories": "Film, DVD", "description": "['Steel.', 'Big', 'New']", "brand": "Acme"},
    ),
    "semicolons": (
        semicolons(),
        ["--encoding", "cp1252"],
        ("CSV with ';' between cells, 7 rows, user from User_ID", "CSV with ';' between cells in cp1252, 4 rows"),
        {},
    ),
}


def put(folder: Path, files: dict[str, bytes]) -> list[Path]:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def shop_line(folder: Path, paths: list[Path], *extra: object) -> list[str]:
    line = [f"--interactions={paths[0]}", f"--items={paths[1]}", f"--output_dir={folder}/out", "--name=X", "--k_core=1"]
    return [*line, *map(str, extra)]


def make_index(folder: Path, count: int) -> Path:
    write_sids(folder / "X.index.json", [(item, 7) for item in range(count)])
    return folder / "X.index.json"


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_enters_as_it_is(tmp_path, capsys, name):
    files, extra, told, fields = FORMATS[name]
    paths = put(tmp_path, files)
    prepare.main(shop_line(tmp_path, paths, *extra))
    written = capsys.readouterr().err
    for path, words in zip(paths, told, strict=True):
        assert f"{path}: {words}" in written
    assert "7 read, 7 kept" in written
    assert "4 items, 4 of them new; 1 are in no row that is kept" in written
    items = json.loads((tmp_path / "out/X.item.json").read_text())
    assert [item["title"] for item in items.values()] == [TITLES[raw_id] for raw_id in NUMBERED]
    assert items["0"] == {"title": "Toy Story", "description": "", "brand": "", "categories": ""} | fields
    prepare.main(shop_line(tmp_path, paths, "--index", make_index(tmp_path, 4), "--split", "leave_one_out"))
    assert parts_of(tmp_path / "out") == PARTS


def test_the_files_that_the_readme_names_are_those_of_these_tests():
    table = (ROOT / "rq/README.md").read_text().split("\n| --- | --- | --- |\n")[1].split("\n\n")[0]
    named = re.findall(r"`python -m rq.prepare --interactions (\S+)(?: --index \S+)?(?: --items ([^\s`]+))", table)
    assert len(named) == len(table.splitlines())
    tested = {tuple(files) for files, *_ in FORMATS.values()} | {("X.inter.json", "X.item.json")}
    tested |= {("sequential_data.txt", "meta.json.gz"), ("ratings_X.csv", "meta_X.json.gz")}
    assert {files for files in named if not files[0].startswith("hf://")} == tested


def test_genres_become_categories_and_no_genre_is_none(tmp_path):
    movies = "movieId,title,genres\n11,Pan,Action|Film-Noir\n12,Tab,(no genres listed)\n13,Bin,Drama\n"
    prepare.main(
        shop_line(tmp_path, put(tmp_path, {"ratings.csv": movielens_csv()["ratings.csv"], "movies.csv": movies.encode()}))
    )
    items = json.loads((tmp_path / "out/X.item.json").read_text())
    assert {item["title"]: item["categories"] for item in items.values()} == {
        "Pan": "Action, Film-Noir",
        "Tab": "",
        "Bin": "Drama",
    }


def test_a_split_by_time_goes_by_the_time_of_the_target(tmp_path):
    events = [(user, f"{item}", 978300000 + 10 * item + int(user)) for user in "12" for item in range(11, 17)]
    ratings = lines([(user, item, 5, time) for user, item, time in events], "::").encode()
    movies = lines([(item, f"Film {item}", "Drama") for item in range(11, 17)], "::").encode()
    paths = put(tmp_path, {"ratings.dat": ratings, "movies.dat": movies})
    prepare.main(shop_line(tmp_path, paths))
    prepare.main(shop_line(tmp_path, paths, "--index", make_index(tmp_path, 6), "--split", "global"))
    parts = parts_of(tmp_path / "out")
    # ten windows, two at each of five moments: the last is test, the last but one valid
    assert [len(rows) for rows in parts.values()] == [8, 1, 1]
    assert parts["valid"] == [("1", "[0, 1, 2, 3, 4]", "5")]
    assert parts["test"] == [("2", "[0, 1, 2, 3, 4]", "5")]


WITHOUT_HEADER = {
    "u.data": ("MovieLens ratings", lines([(user, item, 5, time) for user, item, time in EVENTS], "\t")),
    "ratings_X.csv": ("Amazon ratings", lines([(f"A{user}", item, "5.0", time) for user, item, time in EVENTS], ",")),
}


@pytest.mark.parametrize("name", WITHOUT_HEADER)
def test_ratings_without_a_header_are_known_by_their_first_line(tmp_path, capsys, name):
    what, content = WITHOUT_HEADER[name]
    paths = put(tmp_path, {name: content.encode(), "p.csv": b"item_id,title\n11,Pan\n12,Tab\n13,Bin\n"})
    prepare.main(shop_line(tmp_path, paths))
    assert f"{name}: {what} without a header, 7 rows, user from user_id" in capsys.readouterr().err
    assert (tmp_path / "out/X.item_ids.csv").read_text() == "raw_id,item_id\n11,0\n13,1\n12,2\n"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "users.dat",
            b"1::F::1::10::48067\n",
            "no column for the user among 1, F, 1, 10, 48067; expected user_id or user or ",
        ),
        (
            "ratings.dat",
            b"1::11::5::978300001\n1::11::5::9783::1\n",
            "saw 5; expected 4 cells in each row; no cell may hold '::'",
        ),
        ("X.inter", b"user_id:token\titem_id:token\n1\t11\n", "no column for the time among user_id:token, item_id:token"),
        ("X.inter", b"", "the file is empty"),
        ("X.txt", b"a b c\n", "(what stands between the cells? name it by --sep)"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_refused_in_one_line(tmp_path, name, content, told):
    paths = put(tmp_path, {name: content, "p.csv": lines(PRODUCTS, ",").encode()})
    line = refusals.refusal(prepare.main, *shop_line(tmp_path, paths))
    assert line.startswith(f"rq.prepare: {paths[0]}: ")
    assert told in line
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- P5

P5 = "1 3 1 2\n2 2 1\n3 1\n"
P5_TITLES = "item_id,title\n1,Pan\n2,Tab\n3,Bin\n"


def test_p5_lines_enter_in_their_order(tmp_path, capsys):
    paths = put(tmp_path, {"sequential_data.txt": P5.encode(), "titles.csv": P5_TITLES.encode()})
    prepare.main(shop_line(tmp_path, paths))
    assert "P5's lines of a user and items in order; 3 users, 6 items in all" in capsys.readouterr().err
    items = json.loads((tmp_path / "out/X.item.json").read_text())
    assert [item["title"] for item in items.values()] == ["Pan", "Tab", "Bin"]  # numbers stay in their order
    prepare.main(shop_line(tmp_path, paths, "--index", make_index(tmp_path, 3), "--split", "leave_one_out"))
    assert parts_of(tmp_path / "out") == {
        "train": [("2", "[1]", "0")],
        "valid": [("1", "[2]", "0")],
        "test": [("1", "[2, 0]", "1")],
    }


def test_lines_of_a_user_and_one_item_are_read_in_their_order(tmp_path):
    pairs = "".join(f"{user} {item}\n" for user, items in ((1, (3, 1, 2)), (2, (2, 1)), (3, (1,))) for item in items)
    paths = put(tmp_path, {"pairs.txt": pairs.encode(), "titles.csv": P5_TITLES.encode()})
    prepare.main(shop_line(tmp_path, paths))
    prepare.main(shop_line(tmp_path, paths, "--index", make_index(tmp_path, 3), "--split", "leave_one_out"))
    assert parts_of(tmp_path / "out")["test"] == [("1", "[2, 0]", "1")]


def test_p5_numbers_become_the_ids_of_its_metadata(tmp_path, capsys):
    records = [{"asin": f"B{number}", "title": title} for number, title in enumerate(("Pan", "Tab", "Bin"), 1)]
    meta = gzip.compress("".join(f"{record!r}\n" for record in records).encode())
    maps = json.dumps({"id2item": {"1": "B1", "2": "B2", "3": "B3"}}).encode()
    paths = put(tmp_path, {"sequential_data.txt": P5.encode(), "meta.json.gz": meta, "datamaps.json": maps})
    prepare.main(shop_line(tmp_path, paths))
    assert "datamaps.json: item numbers stand for the ids of its id2item, such as 'B1'" in capsys.readouterr().err
    # at position 0 stand 3, 2 and 1, in the order of the users
    assert (tmp_path / "out/X.item_ids.csv").read_text() == "raw_id,item_id\nB3,0\nB2,1\nB1,2\n"


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"sequential_data.txt": b"1 2 3\n2 x\n"}, "sequential_data.txt:2: '2 x'; expected numbers, a user and then items"),
        ({"sequential_data.txt": b"1 2 3\n", "datamaps.json": b"{}"}, "datamaps.json: no table id2item of texts"),
        (
            {"sequential_data.txt": b"1 2 3\n", "datamaps.json": b'{"id2item": {"2": "B2"}}'},
            "datamaps.json: id2item has no item '3' of ",
        ),
    ],
)
def test_p5_files_that_do_not_fit_are_refused(tmp_path, files, told):
    paths = put(tmp_path, files)
    (tmp_path / "titles.csv").write_text(P5_TITLES)
    assert told in refusals.refusal(prepare.main, *shop_line(tmp_path, [paths[0], tmp_path / "titles.csv"]))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- separators and encodings

ORDERS = [("user_id", "item_id", "timestamp"), *EVENTS]
PRODUCTS = [("item_id", "title"), *((item, f"Film {item}") for item in TITLES)]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|", "::"])
@pytest.mark.parametrize("ending", ["csv", "tsv", "txt", "dat"])
def test_the_header_says_what_stands_between_the_cells(tmp_path, separator, ending):
    files = {f"{name}.{ending}": lines(rows, separator).encode() for name, rows in {"o": ORDERS, "p": PRODUCTS}.items()}
    prepare.main(shop_line(tmp_path, put(tmp_path, files)))
    assert [row.split(",")[0] for row in (tmp_path / "out/X.item_ids.csv").read_text().split()[1:]] == NUMBERED


def test_sep_is_for_what_no_header_says(tmp_path):
    paths = put(tmp_path, {"o.csv": lines(ORDERS, "#").encode(), "p.csv": lines(PRODUCTS, ",").encode()})
    told = refusals.refusal(prepare.main, *shop_line(tmp_path, paths))
    assert "no column for the user among user_id#item_id#timestamp (what stands between the cells? name it by --sep)" in told
    prepare.main(shop_line(tmp_path, paths, "--sep=#"))
    index = make_index(tmp_path, 4)
    prepare.main(shop_line(tmp_path, paths, "--index", index, "--split", "leave_one_out"))  # --sep is as in the run before
    assert parts_of(tmp_path / "out") == PARTS


def test_sep_may_be_a_blank(tmp_path):
    paths = put(tmp_path, {"o.csv": lines(ORDERS, " ").encode(), "p.csv": lines(PRODUCTS, ",").encode()})
    prepare.main(shop_line(tmp_path, paths, "--sep= "))
    assert [row.split(",")[0] for row in (tmp_path / "out/X.item_ids.csv").read_text().split()[1:]] == NUMBERED


def test_an_encoding_is_for_what_is_not_utf_8(tmp_path):
    titles = [("item_id", "title"), *((item, f"电影 {item}") for item in TITLES)]
    paths = put(tmp_path, {"o.csv": lines(ORDERS, ",").encode(), "p.csv": lines(titles, ",").encode("gb18030")})
    told = refusals.refusal(prepare.main, *shop_line(tmp_path, paths))
    assert "p.csv:2: not UTF-8 text" in told
    assert "or name its encoding by --encoding, such as latin-1 or gb18030" in told
    prepare.main(shop_line(tmp_path, paths, "--encoding", "gb18030"))
    first = (tmp_path / "out/X.item.json").read_text()
    assert json.loads(first)["0"]["title"] == "电影 11"
    put(tmp_path, {"p.csv": lines(titles, ",").encode()})  # UTF-8 stays UTF-8
    prepare.main(shop_line(tmp_path, paths, "--encoding", "gb18030", "--overwrite"))
    assert (tmp_path / "out/X.item.json").read_text() == first


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--sep=abc", "'abc' is not what can stand between cells, such as ; or tab or ::"),
        ("--sep=", "'' is not what can stand between cells"),
        ("--encoding=utf-16", "'utf-16' is not an encoding that can be read"),
        ("--encoding=base64", "'base64' is not an encoding that can be read"),
        ("--encoding=klingon", "'klingon' is not an encoding that can be read"),
    ],
)
def test_what_is_no_separator_or_encoding_is_refused(tmp_path, flag, told):
    paths = put(tmp_path, {"o.csv": lines(ORDERS, ",").encode(), "p.csv": lines(PRODUCTS, ",").encode()})
    assert told in refusals.refusal(prepare.main, *shop_line(tmp_path, paths, flag))


def test_a_quote_in_a_file_without_quotes_is_a_character(tmp_path):
    titles = [("item_id:token", "title:token_seq"), ("11", '"Weird Al'), ("12", '5" Pipe'), ("13", '""'), ("14", "x")]
    paths = put(tmp_path, {"a.csv": lines(ORDERS, ",").encode(), "a.item": lines(titles, "\t").encode()})
    prepare.main(shop_line(tmp_path, paths))
    items = json.loads((tmp_path / "out/X.item.json").read_text())
    assert [item["title"] for item in items.values()] == ['"Weird Al', '""', '5" Pipe', "x"]


def test_a_file_without_a_header_names_the_line_of_a_fault(tmp_path):
    paths = put(
        tmp_path, {"ratings.dat": b"1::11::5::978300001\n\n1::12::5::soon\n", "p.csv": lines(PRODUCTS, ",").encode()}
    )
    assert "ratings.dat:3: 'soon'" in refusals.refusal(prepare.main, *shop_line(tmp_path, paths))


# ---------------------------------------------------------------------------------------------- items in no row, ids, texts


def test_items_in_no_row_follow_and_new_ones_are_appended(tmp_path, capsys):
    paths = put(tmp_path, {"o.csv": lines(ORDERS, ",").encode(), "p.csv": lines(PRODUCTS, ",").encode()})
    prepare.main(shop_line(tmp_path, paths))
    before = (tmp_path / "out/X.item.json").read_text().splitlines()[:-1]
    more = [*PRODUCTS[:1], ("15", "Film 15"), *PRODUCTS[1:]]
    put(tmp_path, {"p.csv": lines(more, ",").encode(), "o.csv": lines([*ORDERS, ("2", "14", 978300009)], ",").encode()})
    prepare.main(shop_line(tmp_path, paths, "--append"))
    assert "5 items, 1 of them new; 1 are in no row that is kept" in capsys.readouterr().err
    after = (tmp_path / "out/X.item.json").read_text().splitlines()
    assert after[:4] == before
    assert json.loads((tmp_path / "out/X.item.json").read_text())["4"]["title"] == "Film 15"


def test_bought_only_numbers_the_items_in_the_rows_alone(tmp_path):
    paths = put(tmp_path, {"o.csv": lines(ORDERS, ",").encode(), "p.csv": lines(PRODUCTS, ",").encode()})
    prepare.main(shop_line(tmp_path, paths, "--bought_only"))
    assert (tmp_path / "out/X.item_ids.csv").read_text() == "raw_id,item_id\n11,0\n13,1\n12,2\n"


def test_settings_of_a_version_without_these_flags_are_read(tmp_path):
    paths = put(tmp_path, {"o.csv": lines(ORDERS, ",").encode(), "p.csv": lines(PRODUCTS, ",").encode()})
    prepare.main(shop_line(tmp_path, paths, "--bought_only"))
    kept = json.loads((tmp_path / "out/X.prepare.json").read_text())
    for name in ("features_column", "sep", "encoding", "bought_only"):
        del kept[name]
    (tmp_path / "out/X.prepare.json").write_text(json.dumps(kept))
    prepare.main(shop_line(tmp_path, paths, "--append"))  # it numbered no item but those in its rows
    assert (tmp_path / "out/X.item_ids.csv").read_text() == "raw_id,item_id\n11,0\n13,1\n12,2\n"
    (tmp_path / "out/X.prepare.json").write_text(json.dumps({**kept, "encoding": "base64"}))
    told = refusals.refusal(prepare.main, *shop_line(tmp_path, paths, "--append"))
    assert "X.prepare.json: encoding is 'base64'; mend it" in told


def test_an_id_of_each_file_is_shown_where_they_do_not_meet(tmp_path):
    products = [("item_id", "title"), ("SKU-11", "Film")]
    paths = put(tmp_path, {"o.csv": lines(ORDERS, ",").encode(), "p.csv": lines(products, ",").encode()})
    told = refusals.refusal(prepare.main, *shop_line(tmp_path, paths))
    assert told.startswith(
        f"rq.prepare: {paths[1]}: no item of the interactions has a title: ids here are like 'SKU-11', those"
    )
    assert f"those of {paths[0]} like '11'" in told
    put(tmp_path, {"p.csv": b"item_id,title\n11,\n"})
    assert "p.csv: no item has a title and an id" in refusals.refusal(prepare.main, *shop_line(tmp_path, paths))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("Nuts &amp; Bolts", "Nuts & Bolts"),
        ("Nuts &amp;amp; Bolts", "Nuts & Bolts"),
        ("<b>Big</b>ger<br/>box", "Bigger box"),
        ("&lt;p class=&quot;x&quot;&gt;Steel&lt;/p&gt;", "Steel"),
        ("a <!-- note --> b<script>run()</script>", "a b"),
        ("< 5 mm & > 3 mm, <a_12><b_3>, R&D", "< 5 mm & > 3 mm, <a_12><b_3>, R&D"),
        ("<script unclosed", "<script unclosed"),
        ("&copy; &#8482; Caf&eacute;", "© ™ Café"),
    ],
)
def test_entities_are_decoded_and_mark_up_is_dropped(tmp_path, text, seen):
    records = [
        {"asin": "11", "title": f"T {text}", "description": [text, "x"]},
        {"asin": "12", "title": "T", "description": text},
    ]
    paths = put(tmp_path, {"o.csv": lines(ORDERS, ",").encode(), "p.jsonl": json_lines(records).encode()})
    prepare.main(shop_line(tmp_path, paths))
    items = json.loads((tmp_path / "out/X.item.json").read_text())
    assert items["0"]["title"] == f"T {seen}"
    assert items["0"]["description"] == repr([seen, "x"])
    assert items["1"]["description"] == (text if text == seen else repr([seen]))


def test_a_description_with_nothing_to_mend_stays_as_it_is(tmp_path):
    products = "item_id,title,description\n11,Pan,\"['Steel.',  'Big.']\"\n12,Tab,  two  blanks\n13,Bin,\"['A &amp; B']\"\n"
    paths = put(tmp_path, {"o.csv": lines(ORDERS, ",").encode(), "p.csv": products.encode()})
    prepare.main(shop_line(tmp_path, paths))
    items = json.loads((tmp_path / "out/X.item.json").read_text())
    assert [item["description"] for item in items.values()] == ["['Steel.',  'Big.']", "['A & B']", "two  blanks"]


# ---------------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def hub(monkeypatch) -> dict[str, object]:
    """Datasets that the library would fetch: (path, configuration or address of a file) -> what it gives."""
    import datasets

    def rows(events: list) -> datasets.Dataset:
        users, items, times = zip(*events, strict=True)
        return datasets.Dataset.from_dict(
            {"user_id": users, "rating": [5] * len(users), "parent_asin": items, "timestamp": times}
        )

    found = {
        ("shop/orders", None): datasets.DatasetDict({"train": rows(EVENTS[:4]), "test": rows(EVENTS[4:])}),
        ("shop/orders", "films"): rows(EVENTS),
        ("json", "hf://datasets/shop/orders/raw/films.jsonl"): rows(EVENTS),
    }

    def load_dataset(path: str, name: str | None = None, data_files: str | None = None) -> object:
        if (path, name or data_files) not in found:
            raise FileNotFoundError(f"Dataset '{path}' doesn't exist on the Hub\nor cannot be accessed.")
        return found[path, name or data_files]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return found


@pytest.mark.parametrize("address", ["shop/orders", "shop/orders/films", "shop/orders/raw/films.jsonl"])
def test_interactions_of_the_hub_enter_as_they_are(tmp_path, hub, capsys, address):
    paths = put(tmp_path, {"p.csv": lines(PRODUCTS, ",").encode()})
    line = [*shop_line(tmp_path, [paths[0], *paths]), f"--interactions=hf://datasets/{address}"]
    prepare.main(line)
    told = capsys.readouterr().err
    assert f"hf://datasets/{address}: Amazon 2023 reviews, 7 rows, user from user_id, item from parent_asin" in told
    prepare.main([*line, "--index", str(make_index(tmp_path, 4)), "--split", "leave_one_out"])
    assert parts_of(tmp_path / "out") == PARTS


def test_what_the_hub_does_not_give_is_one_line(tmp_path, hub, monkeypatch):
    paths = put(tmp_path, {"p.csv": lines(PRODUCTS, ",").encode()})
    line = shop_line(tmp_path, [paths[0], *paths])
    told = refusals.refusal(prepare.main, *line, "--interactions=hf://datasets/shop/none")
    assert (
        "hf://datasets/shop/none: cannot be read (Dataset 'shop/none' doesn't exist on the Hub or cannot be accessed.)"
        in told
    )
    told = refusals.refusal(prepare.main, *line, "--interactions=hf://datasets/shop")
    assert "hf://datasets/shop: expected hf://datasets/OWNER/NAME" in told
    told = refusals.refusal(prepare.main, *line, "--interactions=hf://datasets/shop/orders", "--time_column=when")
    assert "hf://datasets/shop/orders: no column for the time among user_id, rating, parent_asin, timestamp" in told
    monkeypatch.setitem(sys.modules, "datasets", None)
    told = refusals.refusal(prepare.main, *line, "--interactions=hf://datasets/shop/orders")
    assert "hf://datasets/shop/orders: the library datasets is not installed; pip install datasets, or give a file" in told
    assert not (tmp_path / "out").exists()
