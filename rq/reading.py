"""SIDs that a person can read: for each first code the words that set its titles apart, and the tree below it.

    <a_2>  51 items: tape (22), vinyl (9), electrical (11)
      <a_2><b_7>  9 items: vinyl (6)
        <c_1> Scotch Vinyl Electrical Tape
        <c_4> Vinyl Tape, Black

Words are ranked by log odds against the items of all other codes, in standard errors, so that neither a word of one title
alone nor one of all titles leads.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from rq.files import one_line
from rq.index_file import Sid, sid_tokens

WORD = re.compile(r"[^\W\d_]{3,}")
LEAST_ERRORS = 2.0  # standard errors by which a word must lead to be named
MOST_WORDS, MOST_GROUPS, MOST_TITLES = 5, 3, 3
LONGEST_TITLE = 70  # characters


def words_of(title: str) -> set[str]:
    """The words of a title, each once: "Tape, 3 rolls of tape" -> {"tape", "rolls"}."""
    return set(WORD.findall(title.lower()))


def telling_words(group: Counter, everywhere: Counter, n_group: int, n_items: int) -> list[str]:
    """The words whose odds in a group lead those in the rest by most standard errors, best first.

    `group` and `everywhere` count the items whose title has a word. Half an item more on each side keeps odds finite.
    """
    found = []
    for word, here in group.items():
        there = everywhere[word] - here
        cells = here + 0.5, n_group - here + 0.5, there + 0.5, n_items - n_group - there + 0.5
        lead = math.log(cells[0] / cells[1]) - math.log(cells[2] / cells[3])
        found.append((lead / math.sqrt(sum(1 / cell for cell in cells)), word))
    return [word for errors, word in sorted(found, key=lambda pair: (-pair[0], pair[1])) if errors >= LEAST_ERRORS]


def groups_by(index: dict[int, Sid], items: Iterable[int], level: int) -> dict[Sid, list[int]]:
    """{prefix of `level` codes: its items}, the largest first."""
    groups: defaultdict[Sid, list[int]] = defaultdict(list)
    for item in items:
        groups[index[item][:level]].append(item)
    return dict(sorted(groups.items(), key=lambda pair: (-len(pair[1]), pair[0])))


def tree(index: dict[int, Sid], titles: Sequence[str], *, most_codes: int) -> str:
    """The tree of the largest first codes, as text."""
    everywhere = Counter(word for item in index for word in words_of(titles[item]))

    def line(prefix: Sid, members: list[int]) -> str:
        group = Counter(word for item in members for word in words_of(titles[item]))
        named = telling_words(group, everywhere, len(members), len(index))[:MOST_WORDS]
        words = ", ".join(f"{word} ({group[word]})" for word in named) or "no word sets them apart"
        return f"{'  ' * (len(prefix) - 1)}{''.join(sid_tokens(prefix))}  {len(members):,} items: {words}"

    lines = []
    firsts = groups_by(index, index, 1)
    for prefix, members in list(firsts.items())[:most_codes]:
        lines.append(line(prefix, members))
        below = groups_by(index, members, 2)
        for inner, few in list(below.items())[:MOST_GROUPS]:
            lines.append(line(inner, few))
            for item in sorted(few, key=lambda item: (index[item], item))[:MOST_TITLES]:
                rest = "".join(sid_tokens(index[item])[2:])
                lines.append(f"    {rest} {one_line(titles[item])[:LONGEST_TITLE] or '(no title)'}".rstrip())
            if len(few) > MOST_TITLES:
                lines.append(f"    .. and {len(few) - MOST_TITLES:,} more")
        if len(below) > MOST_GROUPS:
            lines.append(f"  .. and {len(below) - MOST_GROUPS:,} more second codes")
    if len(firsts) > most_codes:
        lines.append(f".. and {len(firsts) - most_codes:,} more first codes")
    return "\n".join(lines)
