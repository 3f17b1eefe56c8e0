import gc
import os
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import forking
import pytest

os.environ["HF_HUB_DISABLE_XET"] = "1"  # the Hub of the tests has plain LFS; read when huggingface_hub is imported


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--references",
        default=str(Path(__file__).parent / "references"),
        help="folder of conformance vectors for test_conformance.py",
    )
    parser.addoption("--kills", type=int, default=20, help="how many random kills, and faulty pushes; 100 are all")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "strike" in metafunc.fixturenames:  # the seed of a random kill, or of a faulty push
        kills: Any = metafunc.config.getoption("--kills")
        metafunc.parametrize("strike", range(kills))


def pytest_collection_finish(session: pytest.Session) -> None:
    settle()
    modules = [vars(item.module) for item in session.items if isinstance(item, pytest.Function)]
    if any({"train", "script", "python"} & names.keys() for names in modules):  # of helpers, or the command itself
        forking.begin()  # so that it is there when the first of them comes


@pytest.hookimpl(trylast=True)  # when the fixtures are gone
def pytest_runtest_teardown() -> None:
    if len(sys.modules) != SETTLED:
        settle()


SETTLED = 0
"""How many modules there were when `settle` was called last."""


def settle() -> None:
    """Takes what is imported by now out of the garbage collector's sight: accelerate collects before every phase of
    training, and went through millions of objects of modules each time, two thirds of the tests' time.
    """
    global SETTLED
    SETTLED = len(sys.modules)
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def forked() -> ForkServerContext:
    return forking.server()
