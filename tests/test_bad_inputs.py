"""Every bad input is refused with a message, by exit code 2 or a named exception, quickly and without changes."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_inputs import ROWS, Host, Row


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with contextlib.closing(Host(tmp_path_factory.mktemp("parts"))) as host:
        yield host


@pytest.mark.parametrize(
    ("row", "alone"),
    [
        *(pytest.param(row, False, id=row.name) for row in ROWS),
        *(pytest.param(row, True, id=f"{row.name}, alone", marks=pytest.mark.slow) for row in ROWS),
    ],
)
def test_bad_input(row: Row, alone: bool, host: Host, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    host.check(row, folder, alone)
    shutil.rmtree(tmp_path)  # hundreds of them


def test_the_table_is_large_and_no_row_occurs_twice() -> None:
    names = [row.name for row in ROWS]
    assert len(names) >= 200
    assert sorted({*names}) == sorted(names)
