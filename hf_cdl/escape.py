"""Names that others chose, such as those of classes, written so that they are text wherever they stand."""

from __future__ import annotations

import re
import unicodedata

_JOINERS = "\u200c\u200d"
"""Invisible, but parts of words (Persian) and of emoji."""
_MARKDOWN = str.maketrans({**{c: f"\\{c}" for c in "\\`*_[]|~$@"}, "&": "&amp;", "<": "&lt;", ">": "&gt;"})


def visible(text: object) -> str:
    """For a console, a commit's message or a picture: on one line, what would act instead of being seen as its escape.

    That is control characters (newline, ANSI's escape), the marks that turn the reading direction and other invisible
    ones, and lone surrogates, of file names that are no UTF-8.
    """
    return "".join(_escaped(c) if _acts(c) else c for c in str(text))


def visible_lines(text: object) -> str:
    """The same for a text whose lines were broken on purpose."""
    return "\n".join(map(visible, str(text).split("\n")))


def markdown(text: object) -> str:
    """For Markdown outside of code, in a table's cell too: no markup, no HTML, no address that becomes a link."""
    shown = visible(text).translate(_MARKDOWN)
    return re.sub(r"(?i)\b(https?|ftp|mailto|xmpp):|\b(www)\.", lambda m: f"{m[1] or m[2]}\\{m[0][-1]}", shown)


def code(text: object) -> str:
    """For Markdown as code: a span that no backtick in the text ends."""
    shown = visible(text)
    fence = "`" * (longest_run(shown) + 1)
    space = " " if shown.startswith("`") or shown.endswith("`") or not shown else ""
    return f"{fence}{space}{shown}{space}{fence}"


def longest_run(text: str) -> int:
    """The most backticks in a row: a fence of more is not ended by the text."""
    return max(map(len, re.findall("`+", text)), default=0)


def acts(text: str) -> bool:
    """Whether a text has anything that `visible` shows as an escape, beside newlines."""
    return any(_acts(c) for c in text if c != "\n")


def _acts(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte of a file's name
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
