"""A local Hub: the part of the Hugging Face Hub's HTTP API that is needed to push and load models.

The real huggingface_hub client talks to it, with HF_ENDPOINT set to its address and HF_HUB_DISABLE_XET=1. It checks
tokens, parent commits and the sha256 of uploads, and fails on request. To start it by hand:

python tests/hub/hub_server.py --root FOLDER [--port 8800] [--fault commit:503 ...] [--chaos 0.1 --seed 1]

In the folder: `objects/` has files by their sha256; `repos/OWNER/NAME/` has `commits/ID.json` (immutable),
`refs/heads/` and `refs/tags/`. A file gets its name once it is complete, refs last: a kill leaves the old state or the
new one.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
import json
import os
import random
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {"hf_write": ("me", "write"), "hf_read": ("me", "read"), "hf_other": ("someone", "write")}
TOKEN = "hf_write"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".zip")
LFS_SIZE = 10_000_000
KINDS = ("401", "403", "409", "429", "500", "503", "507", "cut", "lost", "stall", "digest")
"""Faults: a status; `cut`: the connection ends in the middle of the request; `lost`: the work is done, but the answer
never arrives; `stall`: nothing happens for a while; `digest`: the content came damaged, so that its sha256 is another.
With a status, a cut, a stall or a digest nothing was done. Only by script: `echo`, a 403 that repeats the token."""


class Failure(Exception):
    """An error response."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str):
        super().__init__(message)
        self.status, self.content = status, {"error": message}
        self.headers = {**({"X-Error-Code": code} if code else {}), **headers, "X-Error-Message": message}


class Cut(Exception):
    """Close the connection here."""


class Entry(NamedTuple):
    """A file of a commit. `oid`: git's id, for an LFS file that of its pointer; `sha256`: of the content."""

    size: int
    oid: str
    sha256: str
    lfs: bool


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


def lfs_entry(sha256: str, size: int) -> Entry:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return Entry(size, git_oid(pointer.encode()), sha256, True)


class Repository:
    """One repository's folder."""

    def __init__(self, root: Path, repo_id: str):
        self.root, self.id, self.folder = root, repo_id, root / "repos" / repo_id

    @property
    def private(self) -> bool:
        return json.loads((self.folder / "repo.json").read_text())["private"]

    def refs(self, kind: str) -> dict[str, str]:
        """`heads` or `tags`: name -> commit."""
        return {file.name: file.read_text() for file in sorted((self.folder / "refs" / kind).glob("[!.]*"))}

    def commit(self, revision: str) -> dict[str, Any]:
        commit = {**self.refs("tags"), **self.refs("heads")}.get(revision, revision)
        file = self.folder / "commits" / f"{commit}.json"
        if not re.fullmatch("[0-9a-f]{40}", commit) or not file.exists():
            raise Failure(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return json.loads(file.read_text())

    def files(self, revision: str) -> dict[str, Entry]:
        return {path: Entry(**entry) for path, entry in self.commit(revision)["files"].items()}

    def history(self, revision: str = "main") -> list[dict[str, Any]]:
        """The commits up to a revision, newest first."""
        commits = [self.commit(revision)]
        while commits[-1]["parent"]:
            commits.append(self.commit(commits[-1]["parent"]))
        return commits

    def read(self, revision: str, path: str) -> bytes:
        files = self.files(revision)
        if path not in files:
            raise Failure(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": self.commit(revision)["id"]})
        return (self.root / "objects" / files[path].sha256).read_bytes()

    def add_commit(self, files: dict[str, Entry], parent: str | None, title: str, message: str, branch: str) -> str:
        content = {
            "parent": parent,
            "title": title,
            "message": message,
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z"),
            "files": {path: entry._asdict() for path, entry in sorted(files.items())},
        }
        name = hashlib.sha1(json.dumps(content).encode() + os.urandom(8)).hexdigest()
        write(self.folder / "commits" / f"{name}.json", json.dumps({"id": name, **content}).encode())
        write(self.folder / "refs" / "heads" / branch, name.encode())
        return name


def card_errors(metadata: dict[str, Any]) -> list[str]:
    """What the Hub would refuse in a card's metadata: a value of the wrong type, or an incomplete model-index."""
    texts = ("license", "pipeline_tag", "library_name", "base_model_relation")
    errors = [f'"{name}" must be a string' for name in texts if not isinstance(metadata.get(name, ""), str)]
    for name in ("tags", "datasets", "metrics"):
        value = metadata.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            errors.append(f'"{name}" must be an array of strings')
    if metadata.get("base_model_relation", "adapter") not in ("adapter", "finetune", "merge", "quantized"):
        errors.append('"base_model_relation" must be one of [adapter, merge, quantized, finetune]')
    wanted = {"task": ("type",), "dataset": ("name", "type")}
    for number, model in enumerate(metadata.get("model-index", [])):
        where = f'"model-index[{number}]'
        if not isinstance(model.get("name"), str) or not model.get("results"):
            errors.append(f'{where}" needs a name and results')
        for place, result in enumerate(model.get("results") or []):
            for part, fields in wanted.items():
                for field in fields:
                    if not isinstance(result.get(part, {}).get(field), str):
                        errors.append(f'{where}.results[{place}].{part}.{field}" must be a string')
            for metric in result.get("metrics") or [{}]:
                value = metric.get("value")
                if not isinstance(metric.get("type"), str) or not isinstance(value, int | float) or value != value:
                    errors.append(f'{where}.results[{place}].metrics" need a type and a number')
    return errors


def write(file: Path, content: bytes) -> None:
    """Write a file completely or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{uuid.uuid4().hex}")
    partial.write_bytes(content)
    os.replace(partial, file)


class HubServer(ThreadingHTTPServer):
    """Serve the repositories in a folder on 127.0.0.1; `with HubServer(root) as hub:` runs it in a thread.

    `faults`: a list of (operation, kind), each used up by the next request of that operation (`*`: any). `chaos`: the
    probability that a request fails, in one of `kinds`, drawn with `seed`. An operation is a method of Handler.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        root: Path,
        port: int = 0,
        chaos: float = 0.0,
        seed: int = 0,
        kinds: tuple[str, ...] = KINDS,
        stall_seconds: float = 60.0,
        retry_after: int = 1,
    ):
        super().__init__(("127.0.0.1", port), Handler)
        self.root, self.chaos, self.kinds = Path(root), chaos, kinds
        self.stall_seconds, self.retry_after = stall_seconds, retry_after
        self.faults: list[tuple[str, str]] = []
        self.requests: list[tuple[str, int]] = []
        """What was asked and answered: (operation, status), status 0 for none."""
        self.received = 0
        """Bytes of all request bodies."""
        self.lock = threading.RLock()
        self._random, self._secret = random.Random(seed), os.urandom(16)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def repository(self, repo_id: str) -> Repository:
        repository = Repository(self.root, repo_id)
        if not (repository.folder / "refs" / "heads" / "main").exists():
            raise Failure(404, "Repository not found", "RepoNotFound")
        return repository

    def draw_fault(self, operation: str) -> str | None:
        with self.lock:
            for index, (where, kind) in enumerate(self.faults):
                if where in (operation, "*"):
                    del self.faults[index]
                    return kind
            return self._random.choice(self.kinds) if self._random.random() < self.chaos else None

    def signature(self, text: str) -> str:
        return hmac.new(self._secret, text.encode(), "sha256").hexdigest()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client's disconnection, which is not the server's error."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


# (method, path) -> operation; {repo} is OWNER/NAME, {rev} one step of the path, {path} the rest.
ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("POST", "/api/repos/create", "create"),
    ("GET", "/api/models/{repo}/auth-check{path}", "auth_check"),
    ("GET", "/api/models/{repo}/refs", "refs"),
    ("GET", "/api/models/{repo}/commits/{rev}", "commits"),
    ("GET", "/api/models/{repo}/revision/{rev}", "info"),
    ("GET", "/api/models/{repo}/tree/{rev}/{path}", "tree"),
    ("GET", "/api/models/{repo}/tree/{rev}", "tree"),
    ("POST", "/api/models/{repo}/preupload/{rev}", "preupload"),
    ("POST", "/api/models/{repo}/commit/{rev}", "commit"),
    ("POST", "/api/models/{repo}/tag/{rev}", "tag"),
    ("POST", "/api/models/{repo}/branch/{rev}", "branch"),
    ("GET", "/api/models/{repo}", "info"),
    ("POST", "/{repo}.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", "/upload/{rev}", "upload"),
    ("HEAD", "/{repo}/resolve/{rev}/{path}", "resolve"),
    ("GET", "/{repo}/resolve/{rev}/{path}", "resolve"),
]
_PARTS = {"repo": r"(?P<repo>[^/]+/[^/]+?)", "rev": "(?P<rev>[^/]+)", "path": "(?P<path>.*)"}
PATTERNS = [(method, re.compile(path.format(**_PARTS)), operation) for method, path, operation in ROUTES]


class Handler(BaseHTTPRequestHandler):
    """One method per operation; each returns what is sent as JSON."""

    server: HubServer  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one write for headers and content: two would delay each other on loopback
    body: bytes

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path, operation, fields, status = urlsplit(self.path).path, "nothing", {}, 0
        path = re.sub("^(/api)?/datasets/", lambda m: "/api/models/" if m[1] else "/", path)  # no difference here
        for method, pattern, name in PATTERNS:
            if method == self.command and (match := pattern.fullmatch(path)):
                operation, fields = name, {key: unquote(value) for key, value in match.groupdict().items()}
                break
        try:
            status = self._answer(operation, fields)
        except Cut:
            self.close_connection = True
        except OSError:  # the client went away
            self.close_connection = True
        self.server.requests.append((operation, status))

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self, operation: str, fields: dict[str, str]) -> int:
        fault = self.server.draw_fault(operation)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length // 2 if fault == "cut" else length)
        self.server.received += len(self.body)
        if fault == "digest" and operation == "upload":
            self.body = self.body[:-1] + bytes([self.body[-1] ^ 1])
        try:
            if fault == "cut":
                raise Cut
            if fault == "stall":
                time.sleep(self.server.stall_seconds)
                raise Cut
            if fault == "echo":
                raise Failure(403, str(self.headers["Authorization"]))
            if fault is not None and fault.isdigit():
                wait = {"Retry-After": str(self.server.retry_after)} if fault == "429" else {}
                raise Failure(int(fault), f"injected {fault}", **wait)
            act: Callable[..., Any] = getattr(self, operation)
            content, status, headers = act(**fields), 200, {}
        except Failure as failure:
            content, status, headers = failure.content, failure.status, failure.headers
        if fault == "lost":
            raise Cut
        if isinstance(content, tuple):
            content, headers = content
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers.setdefault("Content-Type", "application/json")
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        return status

    # ---- who asks ----

    def _user(self) -> tuple[str, str] | None:
        """Name and role (read or write) of the caller; None without a token."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = TOKENS.get(header.removeprefix("Bearer "))
        if user is None:
            raise Failure(401, "Invalid credentials in Authorization header")
        return user

    def _may_write(self, owner: str) -> None:
        user = self._user()
        if user is None:
            raise Failure(401, "Invalid username or password.")
        if user != (owner, "write"):
            raise Failure(403, f"You don't have the rights to write under the namespace {owner!r}")

    def _writable(self, repo: str) -> Repository:
        repository = self._readable(repo)
        self._may_write(repo.split("/")[0])
        return repository

    def _readable(self, repo: str) -> Repository:
        repository, user = self.server.repository(repo), self._user()
        if repository.private and (user is None or user[0] != repo.split("/")[0]):
            raise Failure(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repository

    # ---- operations ----

    def nothing(self) -> Any:
        raise Failure(404, f"no such endpoint: {self.command} {self.path}")

    def whoami(self) -> Any:
        user = self._user()
        if user is None:
            raise Failure(401, "Invalid username or password.")
        return {"type": "user", "name": user[0], "auth": {"accessToken": {"role": user[1]}}}

    def auth_check(self, repo: str, path: str) -> Any:
        if path == "/write":
            self._writable(repo)
        self._readable(repo)
        return {}

    def validate_yaml(self) -> Any:
        text = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        try:
            metadata = yaml.safe_load(match.group(1)) if match else None
        except yaml.YAMLError as error:
            raise Failure(400, f"the metadata of README.md are no YAML: {error.__class__.__name__}") from error
        if errors := card_errors(metadata or {}):
            raise Failure(400, "; ".join(errors))
        return {"errors": [], "warnings": [] if metadata else [{"message": "empty or missing yaml metadata"}]}

    def create(self) -> Any:
        asked = json.loads(self.body)
        user = self._user()
        owner = asked.get("organization") or (user[0] if user else "")
        self._may_write(owner)
        repository = Repository(self.server.root, f"{owner}/{asked['name']}")
        url = f"{self.server.url}/{repository.id}"
        with self.server.lock:
            if (repository.folder / "refs" / "heads" / "main").exists():
                failure = Failure(409, "You already created this model repo")
                failure.content["url"] = url
                raise failure
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            write(repository.folder / "repo.json", json.dumps({"private": private}).encode())
            content = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
            files = {".gitattributes": self._store(content)}
            repository.add_commit(files, None, "initial commit", "", "main")
        return {"url": url, "name": repository.id, "private": private}

    def _store(self, content: bytes) -> Entry:
        """Store a regular file's content in the objects."""
        sha256 = hashlib.sha256(content).hexdigest()
        write(self.server.root / "objects" / sha256, content)
        return Entry(len(content), git_oid(content), sha256, False)

    def preupload(self, repo: str, rev: str) -> Any:
        there = self._writable(repo).files(rev)
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            lfs = path.endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if path in there:
                answer["oid"] = there[path].sha256 if there[path].lfs else there[path].oid
            answers.append(answer)
        return {"files": answers}

    def lfs_batch(self, repo: str) -> Any:
        self._writable(repo)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if not (self.server.root / "objects" / asked["oid"]).exists():
                query = f"size={asked['size']}&signature={self.server.signature(asked['oid'] + str(asked['size']))}"
                answer["actions"] = {"upload": {"href": f"{self.server.url}/upload/{asked['oid']}?{query}"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def upload(self, rev: str) -> Any:
        """No token needed: whoever has the signed address may upload exactly this content."""
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        if query.get("signature") != self.server.signature(rev + query.get("size", "")):
            raise Failure(403, "the signature does not match")
        if len(self.body) != int(query["size"]) or hashlib.sha256(self.body).hexdigest() != rev:
            raise Failure(400, "the content does not match its sha256")
        write(self.server.root / "objects" / rev, self.body)
        return {}

    def commit(self, repo: str, rev: str) -> Any:
        repository = self._writable(repo)
        header, *operations = map(json.loads, self.body.splitlines())
        with self.server.lock:
            heads = repository.refs("heads")
            if rev not in heads:
                raise Failure(404, f"Invalid rev id: {rev}", "RevisionNotFound")
            if header["value"].get("parentCommit") not in (None, heads[rev]):
                raise Failure(412, "A commit has happened since. Please refresh and try again.")
            files = repository.files(rev)
            for operation in operations:
                self._apply(operation["key"], operation["value"], files)
            summary, text = header["value"]["summary"], header["value"].get("description", "")
            commit = repository.add_commit(files, heads[rev], summary, text, rev)
        return {"commitUrl": f"{self.server.url}/{repo}/commit/{commit}", "commitOid": commit}

    def _apply(self, kind: str, value: dict[str, Any], files: dict[str, Entry]) -> None:
        path = value["path"]
        if kind == "file":
            files[path] = self._store(base64.b64decode(value["content"]))
        elif kind == "lfsFile":
            stored = self.server.root / "objects" / value["oid"]
            if not stored.exists():
                raise Failure(400, f"the LFS object of {path} was never uploaded")
            files[path] = lfs_entry(value["oid"], stored.stat().st_size)
        elif kind in ("deletedFile", "deletedFolder"):
            gone = [name for name in files if name == path or name.startswith(f"{path.rstrip('/')}/")]
            if not gone:
                raise Failure(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise Failure(400, f"unknown operation {kind!r}")

    def tag(self, repo: str, rev: str) -> Any:
        return self._add_ref(repo, rev, "tags", json.loads(self.body)["tag"])

    def branch(self, repo: str, rev: str) -> Any:
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        return self._add_ref(repo, start, "heads", rev)

    def _add_ref(self, repo: str, rev: str, kind: str, name: str) -> Any:
        repository = self._writable(repo)
        with self.server.lock:
            commit = repository.commit(rev)["id"]
            if name in repository.refs(kind):
                raise Failure(409, f"Reference already exists: {name}")
            write(repository.folder / "refs" / kind / name, commit.encode())
        return {}

    def refs(self, repo: str) -> Any:
        repository = self._readable(repo)
        refs = {
            kind: [
                {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit}
                for name, commit in repository.refs(kind).items()
            ]
            for kind in ("heads", "tags")
        }
        return {"branches": refs["heads"], "converts": [], "tags": refs["tags"]}

    def commits(self, repo: str, rev: str) -> Any:
        owner = [{"user": repo.split("/")[0]}]
        return [
            {**{name: commit[name] for name in ("id", "title", "message", "date")}, "authors": owner}
            for commit in self._readable(repo).history(rev)
        ]

    def info(self, repo: str, rev: str = "main") -> Any:
        repository = self._readable(repo)
        commit = repository.commit(rev)
        return {
            "id": repo,
            "modelId": repo,
            "author": repo.split("/")[0],
            "sha": commit["id"],
            "lastModified": commit["date"],
            "private": repository.private,
            "tags": [],
            "siblings": [{"rfilename": path} for path in commit["files"]],
        }

    def tree(self, repo: str, rev: str, path: str = "") -> Any:
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
        repository, prefix = self._readable(repo), f"{path}/" if path else ""
        listed: dict[str, Any] = {}
        for name, entry in repository.files(rev).items():
            rest = name.removeprefix(prefix)
            if not name.startswith(prefix):
                continue
            if "/" in rest and not recursive:
                folder = prefix + rest.split("/")[0]
                listed[folder] = {"type": "directory", "path": folder, "oid": git_oid(folder.encode()), "size": 0}
                continue
            listed[name] = {"type": "file", "path": name, "size": entry.size, "oid": entry.oid}
            if entry.lfs:
                listed[name]["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 130}
        if path and not listed:
            raise Failure(404, f"{path} does not exist on {rev}", "EntryNotFound")
        return list(listed.values())

    def resolve(self, repo: str, rev: str, path: str) -> Any:
        repository = self._readable(repo)
        content, commit = repository.read(rev, path), repository.commit(rev)
        entry = repository.files(rev)[path]
        etag = f'"{entry.sha256 if entry.lfs else entry.oid}"'
        headers = {"ETag": etag, "X-Repo-Commit": commit["id"], "Content-Type": "application/octet-stream"}
        return content, headers


def environment(hub: HubServer, home: Path, **given: str) -> dict[str, str]:
    """Environment that makes a process use `hub` as the Hub, with its own cache and short retry delays."""
    address = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return {**address, "HF_HOME": str(home), "HF_CDL_PUSH_DELAY": "0.01", **given}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of the repositories")
    parser.add_argument("--port", type=int, default=8800, help="0: any free one")
    parser.add_argument("--fault", action="append", default=[], metavar="OPERATION:KIND", help=f"kinds: {KINDS}")
    parser.add_argument("--chaos", type=float, default=0.0, help="probability that a request fails")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stall_seconds", type=float, default=60.0)
    asked = parser.parse_args()
    hub = HubServer(asked.root, asked.port, asked.chaos, asked.seed, stall_seconds=asked.stall_seconds)
    hub.faults = [(where, kind) for where, _, kind in (fault.partition(":") for fault in asked.fault)]
    print(f"export HF_ENDPOINT={hub.url} HF_HUB_DISABLE_XET=1 HF_TOKEN=hf_write", flush=True)
    hub.serve_forever()


if __name__ == "__main__":
    main()
