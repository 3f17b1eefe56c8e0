"""The documentation as it is built: no link leads nowhere, and every page is at most three clicks from the first."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlparse

import pytest
from helpers import ROOT

CLICKS = 3


class Page(HTMLParser):
    """A page's links, and the names of the places in it."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places = {""}
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [link for link in (found.get("href" if tag == "a" else "src"),) if link]
        self.places.add(found.get("id") or "")


@pytest.mark.slow
def test_every_page_is_near_and_no_link_is_dead(tmp_path: Path) -> None:
    site = tmp_path / "site"
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    built = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = {f"/{file.relative_to(site).as_posix()}": Page(file) for file in site.rglob("*.html")}
    clicks, waiting, dead = {"/index.html": 0}, ["/index.html"], []
    for page in waiting:
        for link in pages[page].links:
            address = urlparse(urljoin(f"http://site{page}", link))
            target = unquote(address.path) + ("index.html" if address.path.endswith("/") else "")
            if address.netloc != "site":
                continue
            if target not in pages:
                dead += [] if (site / target[1:]).exists() else [(page, link)]
                continue
            place = unquote(address.fragment)
            dead += [] if place in pages[target].places or place.startswith("__") else [(page, link)]
            if target not in clicks:
                clicks[target] = clicks[page] + 1
                waiting.append(target)
    assert not dead
    assert pages.keys() - clicks.keys() <= {"/404.html"}
    assert [page for page, count in clicks.items() if count > CLICKS] == []
    assert len(pages) > 100
