"""A run's report: the console table as text, the comparison as Markdown, the plots as real images."""

from __future__ import annotations

import copy
import os
import random

import pytest
from PIL import Image

from hf_cdl.runs import pictures, report

MATRIX = [[80.0], [90.0, 60.0], [70.0, 50.0, 100.0]]
RESULTS = {
    "name": "quickstart",
    "seed": 3,
    "finished": True,
    "class_names": [["cat", "dog"], ["oak"], ["car", "bus", "tram"]],
    "roles": {
        "teacher": {
            "label": "teacher (CODA-Prompt)",
            "accuracy_matrix": [[90.0], [90.0, 90.0], [90.0, 90.0, 90.0]],
            "counts": [20, 10, 30],
            "train_seconds": [100.0, 50.0, 150.0],
            "images_per_second": [200.0, 100.0, 300.0],
            "peak_memory_bytes": [2**30, 3 * 2**30, 2**30],
        },
        "student": {
            "label": "student (KDP)",
            "accuracy_matrix": MATRIX,
            "counts": [20, 10, 30],
            "train_seconds": [10.0, 5.0, 15.0],
            "images_per_second": [20.0, 10.0, 30.0],
            "peak_memory_bytes": [700 * 2**20] * 3,
        },
        "nearest_class_mean": {"accuracy_matrix": [[50.0], [50.0, 50.04], [50.0, 50.0, 50.0]]},
    },
}
GOLDEN = """\
quickstart, seed 3: 3 tasks

student (KDP): accuracy (%) on each task, after each task
after    mean      1      2      3  classes of the task
    1    80.0   80.0                cat, dog
    2    75.0   90.0   60.0         oak
    3    73.3   70.0   50.0  100.0  car, bus, tram

                       ------- accuracy (%) -------  - forgotten -  transfer  -------- training --------
                       mean over    over  mean over  since   since
role                       tasks  images       time   best  learnt  backward  seconds  images/s   memory
teacher (CODA-Prompt)       90.0    90.0       90.0    0.0     0.0       0.0      300       233  3.0 GiB
student (KDP)               73.3    81.7       76.1   15.0     6.7     -10.0     30.0      23.3  700 MiB
nearest class mean          50.0       -       50.0    0.0     0.0       0.0        -         -        -

Use the student: 73.3 %, 23.3 points ahead of the nearest class mean (95 % interval 4.0 to 40.8, by 60 test images).
"""


def stream(tasks: int, learned: int | None = None) -> dict:
    """Results of a longer stream with tasks of 1 to 4 classes."""
    source = random.Random(tasks)
    rows = range(tasks if learned is None else learned)
    return {
        "name": "a run with $dollars$ and _under_scores_",
        "seed": 0,
        "finished": learned is None,
        "class_names": [[f"class {i} of task {t}" for i in range(t % 4 + 1)] for t in range(tasks)],
        "roles": {
            role: {"accuracy_matrix": [[source.uniform(0, 100) for _ in range(t + 1)] for t in rows]}
            for role in ("nearest_class_mean", "student", "teacher")
        },
    }


def test_golden_table():
    assert report.table(RESULTS) == GOLDEN


def test_with_the_cdl_protocol_the_authors_forgetting_comes_first():
    shown = report.table({**RESULTS, "recipe": {"protocol": "cdl"}})
    assert "  learnt   best  backward  seconds" in shown
    assert "student (KDP)               73.3    81.7       76.1     6.7   15.0     -10.0" in shown
    assert report.table({**RESULTS, "recipe": {"protocol": "default"}}) == GOLDEN


def test_table_does_not_change_what_it_shows():
    before = copy.deepcopy(RESULTS)
    report.table(RESULTS)
    assert before == RESULTS


def test_table_of_an_unfinished_run_shows_what_is_there():
    results = copy.deepcopy(RESULTS)
    results["finished"] = False
    student = results["roles"]["student"]
    student["accuracy_matrix"] = MATRIX[:2]
    lines = report.table(results).splitlines()
    assert lines[:2] == [
        "quickstart, seed 3: 3 tasks",
        "Not finished; tasks learned so far: teacher 3, student 2, nearest class mean 3",
    ]
    cells = next(line for line in lines if line.startswith("student (KDP) ")).split()
    assert cells[2:8] == ["75.0", "80.0", "77.5", "-10.0", "-5.0", "10.0"]
    assert "    2    75.0   90.0   60.0         oak" in lines and "Use the" not in lines[-1]


def test_table_before_the_first_task():
    assert report.table(stream(5, 0)).splitlines()[1] == "Not finished; tasks learned so far: none"


def test_the_matrix_of_the_first_role_stands_in_for_a_missing_student():
    results = copy.deepcopy(RESULTS)
    del results["roles"]["student"]
    assert "\nteacher (CODA-Prompt): accuracy (%) on each task" in report.table(results)


@pytest.mark.parametrize("tasks", [1, 2, 5, 12, 13, 20, 21, 22, 50])
def test_tables_are_at_most_119_wide_and_aligned(tasks):
    results = stream(tasks)
    results["roles"]["student"] |= {
        "label": "a student with a label that nobody should have chosen",
        "train_seconds": [54321.0] * tasks,
        "images_per_second": [1e5] * tasks,
        "peak_memory_bytes": [1023 * 2**20] * tasks,
    }
    lines = report.table(results).splitlines()
    assert max(map(len, lines)) <= 119
    first = next(i for i, line in enumerate(lines) if "accuracy (%) -" in line)
    assert len({len(line) for line in (lines[first], *lines[first + 2 : first + 6])}) == 1
    printed = [line for line in lines if line.startswith(f"{tasks:5d}  ")]
    assert len(printed) == (tasks <= 21)
    assert all(len(line[15:].split("class")[0].split()) == tasks for line in printed)


def test_without_matplotlib_plots_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not pictures.plotting_available()
    with pytest.raises(ImportError, match=r"pip install .*\[report\]"):
        pictures.save_plots(RESULTS, tmp_path)


@pytest.mark.parametrize("results", [stream(1), stream(5, 3), stream(12)], ids=["1", "3 of 5", "12"])
def test_plots_are_whole_images(results, tmp_path):
    pytest.importorskip("matplotlib")
    paths = pictures.save_plots(results, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["accuracy_matrix.png", "accuracy_curve.png"]
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["accuracy_curve.png", "accuracy_matrix.png"]
    for path in paths:
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG"
            assert 700 <= image.width <= 3600
            assert 400 <= image.height <= 2000
            shades = image.convert("L").histogram()
            assert sum(shades[:60]) > 500 and shades[255] > 0.1 * sum(shades)  # dark text on white


def test_many_tasks_have_no_more_texts_than_there_is_room_for():
    pytest.importorskip("matplotlib")
    for tasks, most in ((20, 20), (50, 50), (99, 50), (200, 25)):
        panel = pictures._matrix_figure(stream(tasks)).axes[0]
        assert most - 2 <= len(panel.get_xticklabels()) == len(panel.get_yticklabels()) <= most
        assert len(panel.texts) == (tasks * (tasks + 1) // 2 if tasks <= 30 else 0)
        assert panel.get_yticklabels()[-1].get_text().startswith(panel.get_xticklabels()[-1].get_text())


def test_plots_show_names_no_font_may_have_as_numbers(tmp_path):
    pytest.importorskip("matplotlib")  # a missing glyph is a warning, and warnings are errors
    results = copy.deepcopy(RESULTS)
    results["class_names"] = [["猫", "犬"], ["crème brûlée"], ["$x^$", "line\nbreak"]]
    results["name"] = results["roles"]["teacher"]["label"] = "$x^$"  # as a formula it would be an error
    assert len(pictures.save_plots(results, tmp_path)) == 2


def test_nothing_is_plotted_before_the_first_task(tmp_path):
    pytest.importorskip("matplotlib")
    assert pictures.save_plots(stream(5, 0), tmp_path / "folder") == []
    assert not (tmp_path / "folder").exists()


def test_a_failed_save_leaves_the_old_plot(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    (tmp_path / "accuracy_matrix.png").write_bytes(b"old")

    def full_disk(self, path, **options):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(figure, "savefig", full_disk)
    with pytest.raises(OSError, match="no space"):
        pictures.save_plots(RESULTS, tmp_path)
    assert (tmp_path / "accuracy_matrix.png").read_bytes() == b"old"


def test_plots_leave_the_users_backend_alone(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    before = matplotlib.rcParams.copy()
    pictures.save_plots(RESULTS, tmp_path)
    assert matplotlib.rcParams.copy() == before
