"""What a student counts each image as, through additions, corrections, renamed classes and undone changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_cdl.runs.learnt import labels_now, lasting_changes, moves_file
from hf_cdl.runs.ledger import last_learnt, state_before


def change(number: int, moves: list[Any] | None = None, **fields: Any) -> dict[str, Any]:
    return {"revision": number, "images": {} if moves is None else {"x": len(moves)}, "moves": moves, **fields}


def ledger(folder: Path, *changes: dict[str, Any]) -> dict[str, Any]:
    """Of a run of two tasks."""
    for each in changes:
        if (moves := each.pop("moves")) is not None:
            file = moves_file(folder, each["revision"])
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(moves))
    return {"entries": {"student": [{}, {}]}, "changes": [*changes]}


FIRST = {"a": ["ant"], "b": ["bee", "bee"], "d": ["ant", "bee"]}


def now(folder: Path, *changes: dict[str, Any]) -> tuple[dict[str, dict[str, int]], list[str]]:
    found, unknown = labels_now(folder, ledger(folder, *changes), FIRST)
    return {digest: dict(labels) for digest, labels in found.items()}, unknown


def test_images_are_followed(tmp_path: Path) -> None:
    assert now(tmp_path)[0] == {"a": {"ant": 1}, "b": {"bee": 2}, "d": {"ant": 1, "bee": 1}}
    corrected = change(3, [["b", "bee", "ant"], ["n", None, "cat"]])
    assert now(tmp_path, corrected)[0]["b"] == {"bee": 1, "ant": 1}
    renamed = change(4, classes={"ant": "cat"})
    found, _ = now(tmp_path, change(3, [["n", None, "cat"]]), renamed)
    assert found == {"a": {"cat": 1}, "b": {"bee": 2}, "d": {"cat": 1, "bee": 1}, "n": {"cat": 1}}
    merged = change(3, classes={"ant": "bee", "bee": "bee"})
    assert now(tmp_path, merged)[0] == {"a": {"bee": 1}, "b": {"bee": 2}, "d": {"bee": 2}}
    swapped = (change(3, classes={"ant": "x"}), change(4, classes={"bee": "ant"}), change(5, classes={"x": "bee"}))
    assert now(tmp_path, *swapped)[0] == {"a": {"bee": 1}, "b": {"ant": 2}, "d": {"bee": 1, "ant": 1}}
    removed = change(3, [["a", "ant", None], ["d", "ant", None]], classes={"ant": None})
    assert now(tmp_path, removed)[0] == {"b": {"bee": 2}, "d": {"bee": 1}}


def test_names_of_other_unicode_forms_are_one(tmp_path: Path) -> None:
    found, _ = labels_now(tmp_path, ledger(tmp_path, change(3, classes={"e\u0301": "x"})), {"a": ["\u00e9"]})
    assert found == {"a": {"x": 1}}


def test_what_was_undone_does_not_count(tmp_path: Path) -> None:
    steps = [
        change(3, [["n", None, "cat"]]),
        change(4, [["m", None, "cat"]]),
        change(5, state=3),
        change(6, state=2),
        change(7, [["o", None, "cat"]]),
    ]
    content = ledger(tmp_path, *steps)
    assert [each["revision"] for each in lasting_changes(content)] == [7]
    assert {*labels_now(tmp_path, content, {})[0]} == {"o"}
    assert [last_learnt(content["changes"], number) for number in range(2, 8)] == [2, None, None, None, 2, None]
    assert [state_before(content, number) for number in (3, 4, 5, 6, 7)] == [2, 3, 2, None, 6]


def test_a_list_that_is_lost_or_damaged_is_named(tmp_path: Path) -> None:
    steps = [change(3, [["n", None, "cat"]]), change(4, [["m", None, "cat"]]), change(5, [["o", None, "cat"]])]
    content = ledger(tmp_path, *steps)
    moves_file(tmp_path, 3).unlink()
    moves_file(tmp_path, 4).write_text('["m"]')
    found, unknown = labels_now(tmp_path, content, {})
    assert {*found} == {"o"} and unknown == ["task-03", "task-04"]
