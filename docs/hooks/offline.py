"""The built pages fetch nothing from the network: a script that the theme would take from elsewhere is our own."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

_SHIM = "https://unpkg.com/iframe-worker/shim"
_FETCHED = re.compile(r"""<(?:script|link|img|iframe)[^>]*\s(?:src|href)=["']?(https?://[^"'\s>]+)""")


def on_post_page(output: str, page: Page, **_: Any) -> str:
    output = output.replace(_SHIM, "../" * page.file.dest_uri.count("/") + "search_frame.js")
    if found := _FETCHED.findall(output):
        raise PluginError(
            f"{page.file.src_uri} fetches {', '.join(sorted({*found}))}. Put it into docs/ in its place."
        )
    return output
