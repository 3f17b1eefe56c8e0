"""The picture in docs/guides/demo.md, docs/space.png: two states of the quickstart's student in the demo.

make quickstart && python benchmarks/demo_picture.py

It needs the extras `demo` and `dev` and Chromium.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
DEMO = ["demo", "runs/quickstart/ridge_head", "--compare", "task-02", "--reject"]
PORT = 7861


def wait_for(url: str, seconds: float = 120) -> None:
    for _ in range(int(seconds)):
        try:
            urllib.request.urlopen(url).close()
            return
        except OSError:
            time.sleep(1)
    raise TimeoutError(f"{url} does not answer")


def main() -> None:
    url, env = f"http://127.0.0.1:{PORT}", {**os.environ, "GRADIO_SERVER_PORT": str(PORT), "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen([sys.executable, "-m", "hf_cdl", *DEMO], env=env, cwd=ROOT)
    try:
        wait_for(url)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1200, "height": 720})
            page.set_default_timeout(120_000)
            page.goto(url)
            page.locator("button.gallery-item").nth(5).click()
            for answers in range(2):
                page.locator(".answers").nth(answers).locator("tbody tr").first.wait_for()
            page.wait_for_timeout(2000)  # until the picture that was chosen has been drawn
            page.screenshot(path=ROOT / "docs" / "space.png")
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
