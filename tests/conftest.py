from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--references",
        default=str(Path(__file__).parent / "references"),
        help="folder of conformance vectors for test_conformance.py",
    )
