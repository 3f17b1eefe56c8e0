"""hf-cdl compare as real processes on tiny recipes: shared teachers, failures, kills, the test split read once."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas
import psutil
import pytest
import yaml
from filelock import FileLock
from helpers import make_recipe, make_table, write_recipe

from hf_cdl.compare.records import CHANGING
from hf_cdl.compare.spec import read_comparison

for needed in ("matplotlib", "scipy", "statsmodels"):
    pytest.importorskip(needed)

ALONE = {"teacher": None, "distill": [], "ce_weight": 1.0}
KILLS = 20


def tiny_spec(folder: Path, variants: dict[str, Any], **fields: Any) -> Path:
    """A spec of a tiny recipe, with validation images, in `folder`."""
    recipe = make_recipe(folder, baselines=[])
    recipe["student"]["train"] = {"eval_strategy": "epoch"}
    make_table([c for c in range(6) for _ in range(2)], 6, 20_000).to_parquet(str(folder / "data/validation.parquet"))
    recipe = str(write_recipe(folder / "tiny.yaml", recipe))
    spec = {"recipe": recipe, "variants": variants, **fields}
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    return folder / "spec.yaml"


def start(folder: Path, *arguments: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "hf_cdl", "compare", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def compare(folder: Path, *arguments: Any) -> tuple[int, str]:
    process = start(folder, *arguments)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def lasting(root: Path) -> pandas.DataFrame:
    """The table without the columns that differ between runs of the same recipe."""
    table = pandas.read_parquet(root / "table.parquet")
    return table.drop(columns=[*CHANGING])


def gone(pid: int, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


STARTS = """
import json, os, sys, time
from pathlib import Path
from hf_cdl.compare.worker import start
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    two = {"OMP_NUM_THREADS": "2"}
    workers = [{**two, "CUDA_VISIBLE_DEVICES": "5"}, two, {"OMP_NUM_THREADS": "1"}]
    runs = [start(["script", str(n)], folder / f"logs/{n}.log", worker) for n, worker in enumerate(workers)]
    while not all((folder / f"logs/{n}.log").read_text().count(chr(10)) >= 2 for n in range(3)):
        time.sleep(0.05)
    same = [name for worker in workers for name in worker if name in os.environ] == ["OMP_NUM_THREADS"] * 3
    assert same and os.environ["OMP_NUM_THREADS"] == "3"
    print(json.dumps([run.pid for run in runs]), flush=True)
    for run in runs[:2]:
        run.join()
    print(json.dumps([run.exitcode for run in runs[:2]]), flush=True)
    time.sleep(600)
"""
SCRIPT = """
import atexit, json, multiprocessing, os, sys, time
names = ("hf_cdl.training.trainer", "matplotlib.pyplot")
number, modules = sys.argv[1], [name for name in names if name in sys.modules]
import torch
devices = os.environ.get("CUDA_VISIBLE_DEVICES")
told = [sys.argv[1:], modules, torch.get_num_threads(), devices, multiprocessing.get_start_method(), os.getppid()]
print(json.dumps(told), flush=True)
print("an error", file=sys.stderr, flush=True)
atexit.register(print, "the end")
while number != "0" or not os.path.exists("go"):
    time.sleep(0.05)
sys.exit(7)
"""


@pytest.mark.slow
def test_a_run_is_a_process_that_has_imported_everything_and_ends_with_the_one_that_started_it(tmp_path: Path):
    """It passes on arguments, environment, output and exit code; one with other threads imports for itself."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "starts.py").write_text(STARTS)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "3"}
    env.pop("CUDA_VISIBLE_DEVICES", None)
    command = [sys.executable, tmp_path / "starts.py", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, cwd=tmp_path) as process:
        assert process.stdout is not None
        pids = json.loads(process.stdout.readline())
        os.kill(pids[1], signal.SIGKILL)
        (tmp_path / "go").touch()
        assert json.loads(process.stdout.readline()) == [7, -signal.SIGKILL]
        logs = [(tmp_path / f"logs/{number}.log").read_text().splitlines() for number in range(3)]
        assert [log[1:] for log in logs] == [["an error", "the end"], ["an error"], ["an error"]]
        *first, server = json.loads(logs[0][0])
        usual, all_modules = multiprocessing.get_start_method(), ["hf_cdl.training.trainer", "matplotlib.pyplot"]
        forks = sys.platform == "linux"
        assert first == [["0"], all_modules if forks else [], 2, "5", usual]
        assert json.loads(logs[1][0]) == [["1"], first[1], 2, None, usual, server]
        *third, above = json.loads(logs[2][0])
        assert third == [["2"], [], 1, None, usual] and above == process.pid and (server != above) == forks
        process.kill()
    assert gone(pids[2]) and (not forks or gone(server, 120)), "Python takes its time to clean up"


@pytest.mark.slow
def test_an_interrupted_comparison_has_stopped_its_runs_and_goes_on_to_what_hf_cdl_train_gives(tmp_path: Path):
    spec = tiny_spec(tmp_path, {"alone": {"set": ALONE, "rows": {"student": "alone"}}}, seeds=[5])
    folder = tmp_path / "runs/comparisons/spec/alone/seed-5"
    process = start(tmp_path, spec)
    while not (folder / "work").exists():
        assert process.poll() is None
        time.sleep(0.01)
    started = psutil.Process(process.pid).children(recursive=True)
    runs = [child.pid for child in started if child.ppid() != process.pid] or [child.pid for child in started]
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command resumes from there" in output
    assert runs and all(gone(pid, 1) for pid in runs) and not (folder / "results.json").exists()
    assert "Nothing finished is lost" in (tmp_path / "runs/comparisons/spec/logs/alone-seed-5.log").read_text()
    code, output = compare(tmp_path, spec)
    assert code == 0, output
    [run] = read_comparison(spec, tmp_path / "direct").runs
    command = [sys.executable, "-m", "hf_cdl", "train", *run.arguments]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    for name in ("task-01/model.safetensors", "task-02/model.safetensors"):
        assert (folder / "student" / name).read_bytes() == (run.folder / "student" / name).read_bytes()
    ours, theirs = (
        json.loads((place / "results.json").read_text())["roles"]["student"] for place in (folder, run.folder)
    )
    assert ours["accuracy_matrix"] == theirs["accuracy_matrix"] and ours["class_accuracy"] == theirs["class_accuracy"]


def test_a_folder_that_another_process_writes_to_is_left_alone(tmp_path: Path):
    from hf_cdl.compare.schedule import in_use

    assert not in_use(tmp_path / "nowhere") and not (tmp_path / "nowhere").exists()
    holder = f"import filelock, time\nwith filelock.FileLock({str(tmp_path / '.lock')!r}):\n print(1, flush=True)"
    holder += "\n time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert in_use(tmp_path)
        process.kill()
        process.wait()
        assert not in_use(tmp_path)


def test_there_are_as_many_workers_as_gpus_or_cores():
    from hf_cdl.compare.schedule import workers

    assert workers(None, [], 2) == [{"OMP_NUM_THREADS": "1"}] * 2
    assert workers(3, [], 8) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert workers(None, ["0", "3"], 8) == [{"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": gpu} for gpu in "03"]
    assert [worker["CUDA_VISIBLE_DEVICES"] for worker in workers(3, ["5", "7"], 2)] == ["5", "7", "5"]


@pytest.mark.slow
def test_teachers_are_shared_finished_runs_stay_and_test_images_are_read_once(tmp_path: Path):
    spec = tiny_spec(
        tmp_path,
        {
            "kd": {"teacher_from": "kdp", "set": {"distill": [{"type": "kd"}]}, "rows": {"student": "KD"}},
            "kdp": {"rows": {"teacher": "teacher", "student": "KDP"}},
        },
        seeds=[0, 1],
        contrasts=[["KDP", "KD"]],
        curves={"kdp": "KDP"},
    )
    code, output = compare(tmp_path, spec, "--test")
    assert code == 2 and "4 of 4 runs of spec are not finished" in output
    code, output = compare(tmp_path, spec)
    assert code == 0, output
    root = tmp_path / "runs/comparisons/spec"
    table = lasting(root)
    assert table["row"].tolist() == ["KD", "KD", "teacher", "teacher", "KDP", "KDP"]
    assert set(table["split"]) == {"validation"} and table["training_flops"].gt(0).all()
    assert table.loc[table["row"] == "teacher", "recipe_hash"].tolist() == table["recipe_hash"].tolist()[4:]
    for seed in (0, 1):
        theirs, ours = (root / name / f"seed-{seed}/teacher/model.safetensors" for name in ("kdp", "kd"))
        assert theirs.read_bytes() == ours.read_bytes()
    assert "Validation images" in (root / "report.html").read_text() and (root / "plots/training.png").exists()
    written = {file: file.stat().st_mtime_ns for file in root.glob("*/*/results.json")}
    assert len(written) == 4
    shutil.rmtree(root / "kd/seed-1")
    with FileLock(root / ".lock"):
        assert "Another process is comparing in" in compare(tmp_path, spec)[1]
    code, output = compare(tmp_path, spec)
    assert code == 0, output
    pandas.testing.assert_frame_equal(lasting(root), table)
    again = {file: file.stat().st_mtime_ns for file in root.glob("*/*/results.json")}
    assert [file for file in again if again[file] != written[file]] == [root / "kd/seed-1/results.json"]

    ledger = tmp_path / "runs/comparisons/test_split.json"
    assert not ledger.exists()
    process = start(tmp_path, spec, "--test")
    while not list(root.glob("test/*/*.json")):  # interrupt it after the first run was measured
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    [entry] = json.loads(ledger.read_text())
    assert entry["comparison"] == "spec" and entry["started"] and entry["finished"] is None
    assert entry["recipes"] == sorted(set(table["recipe_hash"]))
    first = {file: file.read_bytes() for file in root.glob("test/*/*.json")}
    shutil.move(root / "kd/seed-1/student/task-02", tmp_path / "lost")
    code, output = compare(tmp_path, spec, "--test", "--jobs", 1)
    assert code == 2 and "1 of 4 runs of spec could not be measured, as" in output and "kd/seed-1: exit code" in output
    assert json.loads(ledger.read_text()) == [entry] and not (root / "test/report.html").exists()
    shutil.move(tmp_path / "lost", root / "kd/seed-1/student/task-02")
    code, output = compare(tmp_path, spec, "--test")
    assert code == 0, output
    assert all(file.read_bytes() == content for file, content in first.items())
    test = lasting(root / "test")
    assert set(test["split"]) == {"test"} and test["recipe_hash"].tolist() == table["recipe_hash"].tolist()
    assert "TEST SPLIT" in (root / "test/report.html").read_text()
    [done] = json.loads(ledger.read_text())
    assert done == {**entry, "finished": done["finished"]} and done["finished"]
    pandas.testing.assert_frame_equal(lasting(root), table)  # its own numbers stay those on validation images
    _the_runs_themselves_on_test_images_give_the_same(tmp_path, test)

    before = {file: file.read_bytes() for file in (tmp_path / "runs/comparisons").rglob("*") if file.is_file()}
    code, output = compare(tmp_path, spec, "--test")
    assert code == 2 and f"were read for spec before: {entry['started']} to {done['finished']}" in output
    assert before == {file: file.read_bytes() for file in before}


def _the_runs_themselves_on_test_images_give_the_same(folder: Path, test: pandas.DataFrame) -> None:
    """`split: test` measures during training what --test measures on the stored checkpoints."""
    spec = yaml.safe_load((folder / "spec.yaml").read_text())
    other = {**spec, "split": "test", "seeds": [0], "variants": {"kdp": spec["variants"]["kdp"]}, "contrasts": []}
    (folder / "direct.yaml").write_text(yaml.safe_dump(other, sort_keys=False))
    code, output = compare(folder, "direct.yaml")
    assert code == 0, output
    direct = lasting(folder / "runs/comparisons/direct").set_index("row").loc[["teacher", "KDP"]]
    stored = test[test["seed"] == 0].set_index("row").loc[["teacher", "KDP"]]
    same = ["average_accuracy", "forgetting", "within_task_accuracy", "task_identification", "stream"]
    pandas.testing.assert_frame_equal(direct[same], stored[same])
    code, output = compare(folder, "direct.yaml", "--test")
    assert code == 2 and "direct has split: test" in output


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_are_shown(tmp_path: Path):
    lost = {"data.path": str(tmp_path / "nowhere")}
    spec = tiny_spec(
        tmp_path,
        {
            "heir": {"teacher_from": "lost", "set": lost, "rows": {"student": "heir"}},
            "lost": {"set": lost, "rows": {"student": "lost"}},
            "alone": {"set": ALONE, "rows": {"student": "alone"}},
        },
        seeds=[3],
        contrasts=[["lost", "alone"]],
    )
    code, output = compare(tmp_path, spec)
    root = tmp_path / "runs/comparisons/spec"
    assert code == 1 and "2 of 3 runs failed" in output
    assert (
        "lost/seed-3: exit code 2, see" in output and "heir/seed-3: the run that trains its teacher failed" in output
    )
    assert "nowhere" in (root / "logs/lost-seed-3.log").read_text() and not (root / "heir").exists()
    assert lasting(root)["row"].tolist() == ["alone"]
    assert "Not finished: 1 of 3 results" in (root / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.minutes
def test_it_survives_twenty_kills_at_random_times(tmp_path: Path):
    """The table equals that of an uninterrupted comparison, whether hf-cdl alone or its runs are killed, too.

    A comparison that finishes in spite of the kills starts again in an empty folder.
    """
    variants = {
        "kdp": {"rows": {"teacher": "teacher", "student": "KDP"}},
        "kd": {"teacher_from": "kdp", "set": {"distill": [{"type": "kd"}]}, "rows": {"student": "KD"}},
    }
    spec = tiny_spec(tmp_path, variants, seeds=[0], contrasts=[["KDP", "KD"]])
    root, chance = tmp_path / "runs/comparisons/spec", random.Random(0)
    begin = time.monotonic()
    code, output = compare(tmp_path, spec, "--jobs", 1)
    assert code == 0, output
    whole, undisturbed = time.monotonic() - begin, lasting(root)
    shutil.rmtree(root)
    kills, ends, found = 0, 0, set()
    while True:
        process = start(tmp_path, spec, "--jobs", 1)
        try:
            output, _ = process.communicate(timeout=chance.uniform(0, 0.6 * whole) if kills < KILLS else 300)
        except subprocess.TimeoutExpired:
            found.add(_state(root))
            if kills % 2:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, output
        pandas.testing.assert_frame_equal(lasting(root), undisturbed)
        assert (root / "report.html").exists() and not list(root.rglob("*/.*.partial*"))
        ends += 1
        if kills == KILLS:
            break
        shutil.rmtree(root)
    assert len(found) >= 3, found  # the kills hit different things
    ours = [p.pid for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or ())]
    assert all(gone(pid) for pid in ours)


def _state(root: Path) -> tuple[int, bool]:
    """The progress of a comparison: finished runs and stored checkpoints, and whether a run was in progress."""
    return len([*root.glob("*/*/results.json"), *root.glob("*/*/*/task-0*")]), any(
        (run / "work").exists() for run in root.glob("*/*")
    )
