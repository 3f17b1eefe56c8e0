"""A process that runs bad inputs, one after another.

To fork a process that has imported everything takes far longer than what most rows do.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import shutil
import traceback
import warnings
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path

import forking
from hub_server import HubServer

from bad_inputs.parts import Parts, make_parts
from bad_inputs.runner import SECONDS, Row, check, inside
from hf_cdl import TaskStream
from hf_cdl.commands.parsers import VERBS
from hf_cdl.recipe import load_recipe
from hf_cdl.recipe.build import build_models, build_processors
from hf_cdl.runs.files import versions
from hf_cdl.training.arguments import checks


class Host:
    """The process, with its parts and a Hub in the folder `root`. Another follows one that a row ended."""

    def __init__(self, root: Path):
        self._root = root
        self._begin()

    def _begin(self) -> None:
        self._mine, theirs = multiprocessing.Pipe()
        self._process = forking.server().Process(target=serve, args=(theirs, self._root))
        self._process.start()
        theirs.close()
        assert not (wrong := self._mine.recv()), wrong

    def check(self, row: Row, folder: Path, alone: bool) -> None:
        """Run a row in an empty folder, if `alone`, in a process of its own.

        Raises AssertionError with everything that is wrong.
        """
        self._mine.send((row.name, folder, alone))
        if self._mine.poll(6 * SECONDS):
            with contextlib.suppress(EOFError):
                wrong = self._mine.recv()
                assert not wrong, wrong
                return
        self.close()
        self._begin()
        raise AssertionError("it ended the process of all rows, or had to be stopped")

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._mine.close()


def serve(requests: Connection, root: Path) -> None:
    """Run rows by their names until it is killed; answers with what is wrong with a row, as text."""
    from bad_inputs import ROWS

    rows = {row.name: row for row in ROWS}
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    multiprocessing.set_start_method("fork", force=True)  # the usual method again, for data loader workers
    warnings.simplefilter("error")
    # A row asks for bitsandbytes, which is not installed here, whether it is or not.
    checks.find_spec = lambda name: None if name == "bitsandbytes" else find_spec(name)
    try:
        parts = Parts(root) if any(root.iterdir()) else make_parts(root)
        warm_up(parts)
    except Exception:
        requests.send(traceback.format_exc())
        return
    gc.collect()
    gc.freeze()  # otherwise every collection would scan all of it
    with HubServer(root / "hub", stall_seconds=0.3) as hub, contextlib.suppress(EOFError):
        requests.send("")
        while True:
            name, folder, alone = requests.recv()
            requests.send(failure(rows[name], Parts(root, hub.url), folder, alone))


def failure(row: Row, parts: Parts, folder: Path, alone: bool) -> str:
    """What is wrong with a row. What fails among the others has another try, alone: they may be the reason."""
    alone = alone or row.hub  # huggingface_hub keeps its sessions
    try:
        check(row, parts, folder, alone)
    except Exception:
        if alone:
            return traceback.format_exc(chain=False)
        shutil.rmtree(folder)
        folder.mkdir()
        return failure(row, parts, folder, True)
    return ""


def warm_up(parts: Parts) -> None:
    """Import and cache what the first row, and each in its own process, would have to."""
    for verb in VERBS:
        import_module(f"hf_cdl.commands.{verb}")
    with inside(parts.root):
        recipe = load_recipe(["recipe.yaml"], "")
        processors = build_processors(recipe)
        TaskStream(recipe.data, processors)
        build_models(recipe, processors)
    versions()
