import os
from pathlib import Path

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
        metafunc.parametrize("strike", range(metafunc.config.getoption("--kills")))
