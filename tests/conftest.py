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
