"""Texts of a shop's pages as running text: entities decoded, mark-up dropped.

>>> without_markup("Nuts &amp; Bolts<br>100 <b>pieces</b>, < 5 mm")
'Nuts & Bolts 100 pieces, < 5 mm'
"""

import html
import re

MOST_TIMES = 3  # a text may have been escaped more than once: &amp;lt;b&amp;gt;
INLINE = "a|abbr|b|big|cite|code|em|font|i|mark|s|small|span|strong|sub|sup|tt|u"
BLOCK = (
    "address|article|blockquote|body|br|button|center|col|dd|div|dl|dt|fieldset|footer|form|h[1-6]|head|header|hr|html|iframe|"
    "img|input|label|li|link|main|meta|nav|noscript|object|ol|option|p|param|pre|script|section|select|style|table|tbody|td|"
    "textarea|tfoot|th|thead|title|tr|ul|video|wbr"
)
_INLINE = re.compile(rf"</?(?:{INLINE})(?:\s[^<>]*)?/?>", re.IGNORECASE)
_BLOCK = re.compile(rf"</?(?:{BLOCK})(?:\s[^<>]*)?/?>", re.IGNORECASE)
_UNSEEN = re.compile(r"(?P<begin><!--|<(?:script|style)\b)|(?P<end>-->|</(?:script|style)\s*>)", re.IGNORECASE)


def without_markup(text: str) -> str:
    """A text without what a browser does not show; what only looks like a tag, such as <a_12> or < 5 mm, stays."""
    for _ in range(MOST_TIMES):
        if "<" not in text and "&" not in text:
            break
        text = html.unescape(_BLOCK.sub(" ", _INLINE.sub("", _seen(text))))
    return text


def _seen(text: str) -> str:
    """The text without comments, scripts and styles; one that does not end is left as it is."""
    parts, at, begun = [], 0, -1
    for found in _UNSEEN.finditer(text):
        if found["begin"] and begun < 0:
            begun = found.start()
        elif found["end"] and begun >= 0:
            parts.append(text[at:begun])
            at, begun = found.end(), -1
    return " ".join([*parts, text[at:]])
