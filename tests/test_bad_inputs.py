"""Every bad input is refused with a message, by exit code 2 or a named exception, quickly and without changes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from bad_inputs import ROWS, Parts, Row, check, make_parts
from hub_server import HubServer

from hf_cdl.training.arguments import checks


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    parts = make_parts(tmp_path_factory.mktemp("parts"))
    with HubServer(parts.root / "hub", stall_seconds=0.3) as hub:
        yield Parts(parts.root, hub.url)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that bitsandbytes, which a row asks for, is not installed."""
    monkeypatch.setattr(checks, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bad_input(row: Row, parts: Parts, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    check(row, parts, folder)
    shutil.rmtree(tmp_path)  # hundreds of them


def test_the_table_is_large_and_no_row_occurs_twice() -> None:
    names = [row.name for row in ROWS]
    assert len(names) >= 200
    assert sorted({*names}) == sorted(names)
