import gc
import os
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import forking
import pytest

gc.disable()  # until all tests are imported; collections of what stays took a third of that time
os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # of datasets; it waits for a network that is not there
os.environ["HF_HUB_DISABLE_XET"] = "1"  # the tests' Hub supports only LFS; read on import of huggingface_hub


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start what takes minutes first, so that no worker waits for it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("minutes") is None)


def pytest_collection_finish(session: pytest.Session) -> None:
    settle()
    gc.enable()
    modules = [vars(item.module) for item in session.items if isinstance(item, pytest.Function)]
    if any({"train", "script", "python", "Host"} & names.keys() for names in modules):  # imported from helpers
        forking.begin()  # so that it is ready for the first of these tests


@pytest.hookimpl(trylast=True)  # after the fixtures' teardown
def pytest_runtest_teardown() -> None:
    if len(sys.modules) != SETTLED:
        settle()


SETTLED = 0
"""Number of loaded modules at the last call of `settle`."""


def settle() -> None:
    """Hide everything imported so far from the garbage collector.

    accelerate collects before every training phase, which scanned millions of module objects each time and took two
    thirds of the tests' time.
    """
    global SETTLED
    SETTLED = len(sys.modules)
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def forked() -> ForkServerContext:
    return forking.server()
