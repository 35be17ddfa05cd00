"""The tasks: what an example shows, what it asks for, and in which words.

    render(TASKS["sid_sid"], Row("ann", (0, 1), 2), catalogue, read_prompts(None, "Toys"))
        -> ("Semantic IDs of the Toys products that one customer bought, oldest first, one per line:\\n"
            "<a_0><b_0>\\n<a_0><b_1>\\n", "<a_1><b_0>")

Text alone: nothing here needs a tokenizer.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from sid_sft.catalogue import Catalogue, Item
from sid_sft.files import InputError, cut, read_json, shown
from sid_sft.interactions import Row

SEPARATOR = "\n"  # ends each item of a history; a title is one line, so no title holds a separator


class Task(NamedTuple):
    """One way to make an example of a row: sid_title shows the SIDs of a history and asks for the next item's title."""

    name: str
    group: str  # the name that --tasks takes: "item" stands for item_sid_title and item_title_sid
    rows: str  # what it makes examples of: "interactions" (a CSV), "items" (the catalogue) or "preferences"
    shows: str  # how items are written in the prompt: "sid" or "title"
    answers: str  # what the answer is: "sid", "title" or "preference" (the user's preference, then the SID)


TASKS = {
    task.name: task
    for task in (
        Task("sid_sid", "sid_sid", "interactions", "sid", "sid"),
        Task("item_sid_title", "item", "items", "sid", "title"),
        Task("item_title_sid", "item", "items", "title", "sid"),
        Task("sid_title", "sid_title", "interactions", "sid", "title"),
        Task("title_title", "title_title", "interactions", "title", "title"),
        Task("title_sid", "title_sid", "interactions", "title", "sid"),
        Task("preference", "preference", "preferences", "sid", "preference"),
        Task("preference_sid", "preference_sid", "preferences", "sid", "sid"),
    )
}
TASK_GROUPS = tuple(dict.fromkeys(task.group for task in TASKS.values()))
DEFAULT_TASKS = ("sid_sid", "item", "sid_title", "title_title", "title_sid")
PROMPTS = {
    "sid_sid": "Semantic IDs of the {category} products that one customer bought, oldest first, one per line:\n{history}",
    "item_sid_title": "A product from a catalogue of {category} products.\nSemantic ID: {item}\nTitle:\n",
    "item_title_sid": "A product from a catalogue of {category} products.\nTitle: {item}\nSemantic ID:\n",
    "sid_title": "A customer bought the {category} products with these semantic IDs, oldest first, one per line. "
    "The title of the next product follows them.\n{history}",
    "title_title": "Titles of the {category} products that one customer bought, oldest first, one per line:\n{history}",
    "title_sid": "A customer bought the {category} products with these titles, oldest first, one per line. "
    "The semantic ID of the next product follows them.\n{history}",
    "preference": "A customer bought the {category} products with these semantic IDs, oldest first, one per line. "
    "What the customer is looking for follows them, then the semantic ID of the next product.\n{history}",
    "preference_sid": "A customer looks for {category} products: {preference}\n"
    "Semantic IDs of the products that this customer bought, oldest first, one per line:\n{history}",
}
CATEGORY_NAMES = {
    "Industrial_and_Scientific": "industrial and scientific",
    "Office_Products": "office",
    "Toys_and_Games": "toy and game",
    "Sports_and_Outdoors": "sports and outdoor",
    "Video_Games": "video game",
    "Musical_Instruments": "musical instrument",
    "Arts_Crafts_and_Sewing": "arts, crafts and sewing",
    "Books": "book",
    "Beauty": "beauty",
    "Yelp": "local business",
}


def category_name(category: str) -> str:
    """A category in words, for prompts: "Office_Products" -> "office", "garden_tools" -> "garden tools", "" -> "shop"."""
    return CATEGORY_NAMES.get(category, category.replace("_", " ").strip()) or "shop"


def read_prompts(own: str | Path | dict[str, str] | None, category: str) -> dict[str, str]:
    """Task name -> template with the category filled in: the shipped wording, where `own` has no other for the task.

    read_prompts({"sid_sid": "{category} so far:\\n{history}"}, "Toys")["sid_sid"] -> "Toys so far:\\n{history}"
    A path is a JSON file of such templates. InputError names a task that is unknown or a template that cannot be used.
    """
    where = "prompts"
    if isinstance(own, str | Path):
        where, own = str(own), read_json(Path(own), 'prompts like {"sid_sid": "Bought so far:\\n{history}"}')
    templates = check_prompts({} if own is None else own, category_name(category), where)
    for name, template in templates.items():
        if TASKS[name].rows != "items" and not template.endswith("{history}"):
            raise InputError(f"{where}: {name!r} must end with {{history}}: what is constant comes first, the history last")
    return templates


def check_prompts(own: object, category: str, where: str) -> dict[str, str]:
    """Task name -> template with the category's name filled in, of all tasks; InputError begins with `where`."""
    if not isinstance(own, dict) or not all(isinstance(text, str) for text in own.values()):
        raise InputError(f"{where}: must map task names to templates, all strings")
    if unknown := own.keys() - PROMPTS.keys():
        raise InputError(f"{where}: unknown task {shown(min(unknown))}; the tasks are {', '.join(TASKS)}")
    templates = {name: text.replace("{category}", category) for name, text in {**PROMPTS, **own}.items()}
    for name, template in templates.items():
        check_template(f"{where}: {name!r}", template, TASKS[name])
    return templates


def check_template(where: str, template: str, task: Task) -> None:
    """InputError unless a template has each of its fields once, and no other."""
    fields = ["{item}"] if task.rows == "items" else ["{history}"]
    fields += ["{preference}"] if task.name == "preference_sid" else []
    for field in fields:
        if template.count(field) != 1:
            raise InputError(f"{where} has {template.count(field)} {field}; expected one")
    if unknown := set(re.findall(r"\{\w+\}", template)) - set(fields):
        raise InputError(f"{where} has {cut(min(unknown))}; expected only {', '.join(fields)} and {{category}}")


def render(task: Task, row: Row, catalogue: Catalogue, prompts: dict[str, str]) -> tuple[str, str]:
    """The prompt and the answer of an example as text; encoding adds the end token to the answer."""
    target = catalogue.items[row.item]
    sid = "".join(target.sid)
    if task.rows == "items":
        prompt = prompts[task.name].replace("{item}", target.title if task.shows == "title" else sid)
    else:
        lines = (history_line(catalogue.items[position], task.shows) for position in row.history)
        head, tail = around_history(task, row, prompts)
        prompt = head + "".join(lines) + tail
    answer = {"sid": sid, "title": target.title, "preference": row.preference + SEPARATOR + sid}[task.answers]
    return prompt, answer


def around_history(task: Task, row: Row, prompts: dict[str, str]) -> tuple[str, str]:
    """The text of a prompt before its history and behind it, where only a chat template puts any."""
    head, _, tail = prompts[task.name].partition("{history}")
    return head.replace("{preference}", row.preference), tail


def history_line(item: Item, shows: str) -> str:
    """The line of a history that shows an item, such as "<a_0><b_1>\\n"; "" for an item without the title to show."""
    text = item.title if shows == "title" else "".join(item.sid)
    return text + SEPARATOR if text else ""
