"""Escaping of names chosen by others, such as class names, so that they are plain text wherever they appear."""

from __future__ import annotations

import re
import unicodedata

_JOINERS = "\u200c\u200d"
"""Invisible, but part of words (Persian) and emoji."""
_MARKDOWN = str.maketrans({**{c: f"\\{c}" for c in "\\`*_[]|~$@"}, "&": "&amp;", "<": "&lt;", ">": "&gt;"})


def visible(text: object) -> str:
    """Escape text for a console, a commit message or a picture: on one line, with special characters escaped.

    These are control characters (newline, ANSI escape), invisible ones such as those that change the text direction,
    and lone surrogates, from file names that are not UTF-8.
    """
    return "".join(_escaped(c) if _is_special(c) else c for c in str(text))


def visible_lines(text: object) -> str:
    """The same for text with intended line breaks."""
    return "\n".join(map(visible, str(text).split("\n")))


def markdown(text: object) -> str:
    """Escape text for Markdown outside code, including table cells: no markup, no HTML, no automatic links."""
    shown = visible(text).translate(_MARKDOWN)
    return re.sub(r"(?i)\b(https?|ftp|mailto|xmpp):|\b(www)\.", lambda m: f"{m[1] or m[2]}\\{m[0][-1]}", shown)


def code(text: object) -> str:
    """Format text as a Markdown code span that no backtick in it can end."""
    shown = visible(text)
    fence = "`" * (longest_run(shown) + 1)
    space = " " if shown.startswith("`") or shown.endswith("`") or not shown else ""
    return f"{fence}{space}{shown}{space}{fence}"


def longest_run(text: str) -> int:
    """Longest run of backticks; the text cannot end a longer fence."""
    return max(map(len, re.findall("`+", text)), default=0)


def needs_escaping(text: str) -> bool:
    """Whether text contains anything other than newlines that `visible` would escape."""
    return any(_is_special(c) for c in text if c != "\n")


def _is_special(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte of a file name
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
