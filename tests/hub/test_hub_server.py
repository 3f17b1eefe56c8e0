"""The tests' Hub behaves as the real client expects: uploads, revisions, checks, faults, kills."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from helpers import make_backbone, python
from hub_server import HubServer, Repository
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from safetensors.torch import load_file, save_file

REPO = "me/model"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub", stall_seconds=0.2) as server:
        yield server


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi(hub.url, token="hf_write")


def checkpoint(folder: Path, value: float) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(f'{{"value": {value}}}')
    save_file({"w": torch.full((1000,), value)}, folder / "model.safetensors")
    return folder


def refused(error: pytest.ExceptionInfo[Any]) -> int:
    return error.value.response.status_code


def test_a_folder_is_uploaded_tagged_changed_and_read_back_by_tag(api: HfApi, hub: HubServer, tmp_path: Path) -> None:
    assert api.create_repo(REPO, private=True).repo_id == REPO
    for number in (1, 2):
        folder = checkpoint(tmp_path / "out", number)
        if number == 2:
            (folder / "deep").mkdir()
            (folder / "deep" / "more.txt").write_text("more")
        commit = api.upload_folder(repo_id=REPO, folder_path=folder, commit_message=f"Task {number}")
        api.create_tag(REPO, tag=f"task-0{number}", revision=commit.oid)
    api.create_commit(REPO, [CommitOperationDelete("deep/more.txt")], commit_message="Less")

    refs = api.list_repo_refs(REPO)
    titles = [commit.title for commit in api.list_repo_commits(REPO)]
    assert titles == ["Less", "Task 2", "Task 1", "initial commit"]
    assert [tag.name for tag in refs.tags] == ["task-01", "task-02"] and [b.name for b in refs.branches] == ["main"]
    info = api.model_info(REPO)
    assert isinstance(info.private, bool) and info.private and info.sha == refs.branches[0].target_commit
    for tag, files in (("task-01", set()), ("task-02", {"deep/more.txt"})):
        assert set(api.list_repo_files(REPO, revision=tag)) == files | {
            ".gitattributes",
            "config.json",
            "model.safetensors",
        }
        local = Path(
            snapshot_download(REPO, revision=tag, endpoint=hub.url, token="hf_write", cache_dir=tmp_path / "cache")
        )
        assert torch.equal(load_file(local / "model.safetensors")["w"], torch.full((1000,), float(tag[-1])))
        assert (local / "config.json").read_text() == f'{{"value": {tag[-1]}}}'
    large = {entry.path: entry.lfs for entry in api.list_repo_tree(REPO) if isinstance(entry, RepoFile)}
    assert large["config.json"] is None and large["model.safetensors"] is not None


def test_an_upload_without_changes_makes_no_commit(api: HfApi, tmp_path: Path) -> None:
    api.create_repo(REPO)
    folder = checkpoint(tmp_path / "out", 1)
    first = api.upload_folder(repo_id=REPO, folder_path=folder)
    assert api.upload_folder(repo_id=REPO, folder_path=folder).oid == first.oid


def test_a_model_is_loaded_by_tag_in_another_process(api: HfApi, hub: HubServer, tmp_path: Path) -> None:
    api.create_repo(REPO, private=True)
    for seed in (1, 2):
        api.upload_folder(repo_id=REPO, folder_path=make_backbone(tmp_path / "vit", seed=seed))
        api.create_tag(REPO, tag=f"task-0{seed}")
    code = "import sys; from transformers import AutoImageProcessor, ViTModel; "
    code += f"AutoImageProcessor.from_pretrained('{REPO}', revision='task-01'); "
    code += f"model = ViTModel.from_pretrained('{REPO}', revision='task-01', add_pooling_layer=False); "
    code += "model.save_pretrained(sys.argv[1])"
    given = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_write", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    loaded = tmp_path / "loaded"
    python(code, loaded, env=given)
    first = load_file(make_backbone(tmp_path / "again", seed=1) / "model.safetensors")
    ours = load_file(loaded / "model.safetensors")
    assert ours.keys() == first.keys() and all(torch.equal(ours[name], first[name]) for name in first)


def test_what_is_not_there_is_said_in_the_hubs_way(api: HfApi, hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api.list_repo_refs("me/none")
    api.create_repo(REPO)
    with pytest.raises(RevisionNotFoundError):
        api.list_repo_files(REPO, revision="task-09")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, "none.json", cache_dir=tmp_path)


def test_tokens_are_checked(hub: HubServer) -> None:
    mine, wrong, other, reading = (HfApi(hub.url, token=f"hf_{name}") for name in ("write", "no", "other", "read"))
    assert mine.whoami()["name"] == "me"
    mine.create_repo(REPO, private=True)
    commit: Any = {"operations": [CommitOperationAdd("a", b"a")], "commit_message": "a"}
    with pytest.raises(HfHubHTTPError, match="Invalid"):
        wrong.whoami()
    for api, status in ((wrong, 401), (other, 404), (reading, 403), (HfApi(hub.url, token=False), 401)):
        with pytest.raises(HfHubHTTPError) as error:
            api.create_commit(REPO, **commit)
        assert refused(error) == status
    with pytest.raises(HfHubHTTPError) as error:
        other.create_repo("me/theirs")
    assert refused(error) == 403
    with pytest.raises(HfHubHTTPError) as error:
        reading.auth_check(REPO, write=True)
    assert refused(error) == 403
    mine.auth_check(REPO, write=True)
    assert mine.list_repo_refs(REPO).branches and reading.list_repo_files(REPO) == [".gitattributes"]


def test_a_commit_on_an_old_parent_and_a_second_tag_are_refused(api: HfApi) -> None:
    api.create_repo(REPO)
    parent = api.model_info(REPO).sha
    commit: Any = {"commit_message": "x", "parent_commit": parent}
    api.create_commit(REPO, [CommitOperationAdd("a", b"a")], **commit)
    with pytest.raises(HfHubHTTPError) as error:
        api.create_commit(REPO, [CommitOperationAdd("b", b"b")], **commit)
    assert refused(error) == 412 and api.list_repo_files(REPO) == [".gitattributes", "a"]
    api.create_tag(REPO, tag="v1")
    with pytest.raises(HfHubHTTPError) as error:
        api.create_tag(REPO, tag="v1")
    assert refused(error) == 409


def test_an_upload_must_have_its_sha256_and_its_signature(api: HfApi, hub: HubServer) -> None:
    api.create_repo(REPO)
    asked = {"objects": [{"oid": "0" * 64, "size": 3}]}
    headers = {"Authorization": "Bearer hf_write"}
    with httpx2.Client() as client:
        answer = client.post(f"{hub.url}/{REPO}.git/info/lfs/objects/batch", json=asked, headers=headers).json()
        address = answer["objects"][0]["actions"]["upload"]["href"]
        assert client.put(address, content=b"abc").status_code == 400
        assert client.put(f"{address}0", content=b"abc").status_code == 403
        line = b'{"key": "lfsFile", "value": {"path": "w.safetensors", "oid": "%s"}}' % (b"0" * 64)
        body = b'{"key": "header", "value": {"summary": "x"}}\n' + line
        commit = client.post(f"{hub.url}/api/models/{REPO}/commit/main", content=body, headers=headers)
    assert commit.status_code == 400 and "never uploaded" in commit.text
    assert api.list_repo_files(REPO) == [".gitattributes"]


@pytest.mark.parametrize("kind", ["401", "403", "409", "429", "503", "507", "cut", "stall"])
def test_a_fault_at_a_commit_changes_nothing(api: HfApi, hub: HubServer, kind: str) -> None:
    api.create_repo(REPO)
    before = api.list_repo_refs(REPO)
    hub.faults = [("commit", kind)]
    kinds = HfHubHTTPError if kind.isdigit() else httpx2.TransportError
    with pytest.raises(kinds) as error:
        api.create_commit(REPO, [CommitOperationAdd("a", b"a" * 100_000)], commit_message="x")
    if isinstance(error.value, HfHubHTTPError):
        assert refused(error) == int(kind)
        assert ("Retry-After" in error.value.response.headers) == (kind == "429")
    assert api.list_repo_refs(REPO) == before and hub.faults == []


def test_a_lost_answer_leaves_the_commit(api: HfApi, hub: HubServer) -> None:
    api.create_repo(REPO)
    hub.faults = [("commit", "lost")]
    with pytest.raises(httpx2.HTTPError):
        api.create_commit(REPO, [CommitOperationAdd("a", b"a")], commit_message="x")
    assert api.list_repo_files(REPO) == [".gitattributes", "a"]


def test_an_upload_that_is_cut_leaves_no_object(api: HfApi, hub: HubServer, tmp_path: Path) -> None:
    api.create_repo(REPO)
    hub.faults = [("upload", "cut")]
    api.upload_folder(repo_id=REPO, folder_path=checkpoint(tmp_path / "out", 1))  # the client retries by itself
    assert [status for operation, status in hub.requests if operation == "upload"] == [0, 200]
    assert not list((tmp_path / "hub" / "objects").glob(".*"))


def test_chaos_is_drawn_by_its_seed(tmp_path: Path) -> None:
    drawn = []
    for seed in (1, 1, 2):
        with HubServer(tmp_path, chaos=0.5, seed=seed) as hub:
            drawn.append([hub.draw_fault("refs") for _ in range(40)])
    assert drawn[0] == drawn[1] != drawn[2]
    assert 10 < sum(fault is not None for fault in drawn[0]) < 30


@pytest.mark.slow
def test_a_kill_leaves_whole_commits(tmp_path: Path) -> None:
    """The server runs as a process and is killed while a client commits as fast as possible."""
    root = tmp_path / "hub"
    command = [sys.executable, str(Path(__file__).with_name("hub_server.py")), "--root", str(root), "--port", "0"]
    for wait in (0.05, 0.2, 0.3):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        url = process.stdout.readline().split("HF_ENDPOINT=")[1].split()[0]
        api = HfApi(url, token="hf_write")
        api.create_repo(REPO, exist_ok=True)
        killer = threading.Timer(wait, process.send_signal, [signal.SIGKILL])
        killer.start()
        with contextlib.suppress(httpx2.HTTPError):
            for number in range(1000):
                operation = CommitOperationAdd("a.txt", f"{time.time()} {number}".encode())
                api.create_commit(REPO, [operation], commit_message=str(number))
        process.communicate()
        repository = Repository(root, REPO)
        for commit in repository.history():
            for path, entry in repository.files(commit["id"]).items():
                assert len(repository.read(commit["id"], path)) == entry.size
    assert len(repository.history()) > 4
