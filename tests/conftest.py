import gc
import multiprocessing
import os
import sys
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

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


def pytest_collection_finish() -> None:
    settle()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is not None and nextitem.path != item.path:
        settle()


def settle() -> None:
    """Takes what is imported by now out of the garbage collector's sight: accelerate collects before every phase of
    training, and went through millions of objects of modules each time, two thirds of the tests' time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def forked() -> Iterator[ForkServerContext]:
    """Starts processes that are forked from one that has imported everything, so that none takes seconds for it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "matplotlib.pyplot", "test_hub", "test_kills"])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.setenv("HF_HUB_OFFLINE", "1")
        environment.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # else modules that are not found are left out
        process = context.Process(target=exec, args=("import sys; sys.exit('test_kills' not in sys.modules)",))
        process.start()
        process.join()
        assert process.exitcode == 0, "nothing was imported"
    yield context
