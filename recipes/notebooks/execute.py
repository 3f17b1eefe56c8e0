"""Run the notebook anew and store what it puts out, without times: python recipes/notebooks/execute.py [FILE.ipynb]

It runs in the file's folder, with this Python. It needs nbclient and ipykernel, of the extra `dev`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).with_name("student_for_life.ipynb")


def execute(file: Path) -> None:
    """Run a notebook; the file is written only if no cell fails."""
    notebook: Any = nbformat.read(file, as_version=4)
    options: dict[str, Any] = {"record_timing": False, "coalesce_streams": True}
    place = {"metadata": {"path": str(file.resolve().parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place, **options).execute()
    notebook.metadata.language_info = {"name": "python"}  # without the version that ran it
    nbformat.write(notebook, file)


if __name__ == "__main__":
    execute(Path(sys.argv[1]) if len(sys.argv) > 1 else NOTEBOOK)
