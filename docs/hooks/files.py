"""Files of the repository that pages link to become pages themselves, so that every link works in the built folder.

A Markdown file is shown as it is, a notebook as its cells with what they put out, a folder as a list of its files, any
other file as code. It runs last: the links that other hooks write are followed too.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent.parent
PLACES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "recipes/notebooks/student_for_life.ipynb": "guides/student_for_life.md",
}
"""Files of the repository with a page of their own in the navigation."""
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_FENCE = re.compile(r"^(```.*?^```$)", re.DOTALL | re.MULTILINE)
_SHOWN = {".md", ".yaml", ".py", ".sh", ".jinja", ".ipynb"}
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".tsv": "text", ".json": "json"}
_origins: dict[str, str] = {}
"""Page -> the repository's file that it shows."""


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    _origins.clear()
    waiting = [*PLACES]
    for file in files.documentation_pages():
        waiting += _targets(file.content_string, f"docs/{file.src_uri}")
    while waiting:
        path = waiting.pop()
        place = _place(path)
        if place in _origins:
            continue
        _origins[place] = path
        text = _text(path)
        if text is None:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
            continue
        files.append(File.generated(config, place, content=text))
        waiting += _targets(text, f"{path}/folder" if (ROOT / path).is_dir() else path)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    here = page.file.src_uri
    origin = _origins.get(here, f"docs/{here}")
    if (ROOT / origin).is_dir():
        origin += "/folder"

    def moved(found: re.Match[str]) -> str:
        path = _outside(found[2], origin)
        if path is None and origin.startswith("docs/"):
            return found[0]
        target = _place(path) if path is not None else _inside(found[2], origin)
        if target is None:
            return found[0]
        return f"{found[1]}{posixpath.relpath(target, posixpath.dirname(here) or '.')}{found[3] or ''}{found[4]}"

    return "".join(part if part.startswith("```") else _LINK.sub(moved, part) for part in _FENCE.split(markdown))


def _inside(link: str, origin: str) -> str | None:
    """The page in docs/ that a file outside of it links to."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
    return path.removeprefix("docs/") if path.startswith("docs/") and "://" not in link else None


def _outside(link: str, origin: str) -> str | None:
    """The path, from the repository's root, of a file outside of docs/ that a link names; None for all other links."""
    if "://" in link or link.startswith("mailto:"):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
    return path if not path.startswith(("docs/", "..")) and (ROOT / path).exists() else None


def _targets(text: str, origin: str) -> list[str]:
    plain = _FENCE.sub("", text)
    return [path for found in _LINK.finditer(plain) if (path := _outside(found[2], origin)) is not None]


def _place(path: str) -> str:
    if path in PLACES:
        return PLACES[path]
    if (ROOT / path).is_dir():
        return f"repository/{path}/folder.md"
    return f"repository/{path}" if Path(path).suffix in (".md", ".png") else f"repository/{path}.md"


def _text(path: str) -> str | None:
    """The page that shows a file or folder; None for a picture."""
    file, quiet = ROOT / path, "---\nsearch: {exclude: true}\n---\n"
    if file.suffix == ".png":
        return None
    if file.is_dir():
        lines = [f"- {_entry(part)}" for part in sorted(file.iterdir()) if not part.name.startswith((".", "__"))]
        return f"{quiet}# {path}/\n\n" + "\n".join(lines) + "\n"
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        return "\n\n".join(_cells(json.loads(text)))
    if file.suffix == ".md":
        front, body = re.match(r"(---\n.*?\n---\n)?(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
        return body if path in PLACES else quiet + body
    return f"{quiet}# {path}\n\n````{_LANGUAGES.get(file.suffix, 'text')}\n{text}\n````\n"


def _cells(notebook: dict[str, Any]) -> Iterator[str]:
    """A notebook's text as it is, its code and what that printed as blocks, its pictures as part of the page."""
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield source
            continue
        yield f"```{'bash' if source.startswith('%%bash') else 'python'}\n{source}\n```"
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                picture = "".join(data["image/png"]).strip()
                yield f'<img alt="What the cell drew" src="data:image/png;base64,{picture}">'
            elif said := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
                yield f"```text\n{said}\n```"


def _entry(part: Path) -> str:
    return f"[{part.name}]({part.name})" if part.suffix in _SHOWN else f"{part.name}{'/' * part.is_dir()}"
