"""`<!-- row: METHOD -->` in a page becomes that method's row of papers.md: its files, recipe and where we differ."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

DOCS = Path(__file__).parent.parent
_ROW = re.compile(r"^<!-- row: (.+?) -->$", re.MULTILINE)
_TITLES = ("Paper", "Equations", "File", "Recipe", "Where we differ", "Reference numbers")


def rows() -> dict[str, list[str]]:
    """Method -> the other cells of its row in papers.md."""
    lines = [line for line in (DOCS / "papers.md").read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line[1:-1])] for line in lines[1:]]
    return {method: rest for method, *rest in cells}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    table = rows()

    def filled(found: re.Match[str]) -> str:
        if found[1] not in table:
            raise PluginError(f"{page.file.src_uri} asks for the row '{found[1]}', which papers.md does not have.")
        up = "../" * page.file.src_uri.count("/")
        cells = [re.sub(r"\]\((?!https?:)", f"]({up}", cell) for cell in table[found[1]]]
        pairs = zip(_TITLES, cells, strict=True)
        return "\n\n".join(f"**{title}.** {cell}" for title, cell in pairs if cell != "–")

    return _ROW.sub(filled, markdown)
