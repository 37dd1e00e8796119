"""A small Hub on 127.0.0.1 for tests: repositories in memory, the Hub's routes, its error codes, and faults on order.

It speaks what the client of huggingface_hub asks for when it creates, pushes, lists, downloads and deletes. It is an
imitation: no Xet storage, no pull requests, no organisations beyond "the owner is the name of the account".
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".parquet", ".png", ".jpg")
ACCOUNTS = {"hf_clinic": "clinic", "hf_guest": "guest"}  # token -> account


@dataclass
class Commit:
    """The files at one point in time."""

    sha: str
    files: dict[str, bytes]
    message: str = ""


@dataclass
class Repository:
    """One repository and its history."""

    repo_type: str
    name: str
    is_private: bool
    is_gated: bool = False
    sdk: str | None = None
    history: list[Commit] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.history[-1].files

    def commit(self, files: dict[str, bytes], message: str) -> Commit:
        sha = hashlib.sha1(f"{self.name} {len(self.history)} {message}".encode()).hexdigest()
        self.history.append(Commit(sha, files, message))
        return self.history[-1]

    def at(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.history[-1]
        return next((commit for commit in self.history if commit.sha == revision), None)


@dataclass
class Fault:
    """What goes wrong with the next requests that match.

    Args:
        route: regular expression searched in "METHOD path".
        status: of the answer; None to drop the connection.
        times: how many requests fail; then all is well.
        headers: of the answer.
        is_late: the request is carried out, and its answer lost.
        then: called once when the fault strikes.
    """

    route: str
    status: int | None = None
    times: int = 1_000
    headers: dict[str, str] = field(default_factory=dict)
    is_late: bool = False
    then: object = None


class Dropped(Exception):
    """The connection is to be closed without an answer."""


class Answer(Exception):
    """An answer that ends the handling of a request."""

    def __init__(self, status: int, body: object = None, headers: dict[str, str] | None = None, content: bytes = b""):
        super().__init__(status)
        self.status = status
        self.headers = {"Content-Type": "application/octet-stream", **(headers or {})}
        self.content = content
        if body is not None:
            self.content, self.headers["Content-Type"] = json.dumps(body).encode(), "application/json"


def failure(status: int, code: str | None, message: str) -> Answer:
    """An error as the Hub words it: its code and message stand in headers."""
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return Answer(status, {"error": message}, headers)


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """The server; `url` is what HF_ENDPOINT is set to.

    Attributes:
        repositories: by (type, "owner/name").
        requests: "METHOD path" of all that came.
        faults: to come.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, files: dict[str, bytes], *, repo_type: str = "model", **options) -> Repository:
        """A repository that is there from the start."""
        repository = Repository(repo_type, name, **({"is_private": False} | options))
        repository.commit({".gitattributes": b""}, "initial commit")
        if files:
            repository.commit({**repository.files, **files}, "files")
        self.repositories[repo_type, name] = repository
        return repository

    def repository(self, name: str, repo_type: str = "model") -> Repository | None:
        return self.repositories.get((repo_type, name))

    def fault_for(self, line: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.route, line):
                fault.times -= 1
                if callable(fault.then):
                    fault.then()
                return fault
        return None


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _handle(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        self.route, self.query = unquote(parts.path), parse_qs(parts.query)
        line = f"{self.command} {self.route}"
        with self.hub.lock:
            self.hub.requests.append(line)
            fault = self.hub.fault_for(line)
            answer = self._faulty_answer(fault) if fault and not fault.is_late else self._answer()
        if fault is not None and fault.status is None:
            self._drop()
        else:
            self._send(answer)

    def _faulty_answer(self, fault: Fault) -> Answer:
        return (
            failure(fault.status or 0, None, "on order")
            if not fault.headers
            else Answer(fault.status or 0, {"error": "on order"}, fault.headers)
        )

    def _answer(self) -> Answer:
        try:
            self._dispatch()
        except Answer as answer:
            return answer
        return failure(404, None, f"the imitation has no route {self.command} {self.route}")

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", answer.headers.get("Content-Length", str(len(answer.content))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.content)

    # Who asks, and for what

    def _account(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in ACCOUNTS:
            raise failure(401, None, "Invalid credentials in Authorization header")
        return ACCOUNTS.get(token)

    def _readable(self, repo_type: str, name: str) -> Repository:
        account, repository = self._account(), self.hub.repository(name, repo_type)
        owner = name.split("/")[0]
        if repository is None or (repository.is_private and account != owner):
            raise failure(404 if account else 401, "RepoNotFound", "Repository not found")
        if repository.is_gated and account != owner:
            raise failure(403 if account else 401, "GatedRepo", "Access is restricted")
        return repository

    def _writable(self, repo_type: str, name: str) -> Repository:
        repository = self._readable(repo_type, name)
        if self._account() != name.split("/")[0]:
            raise failure(403, None, "You don't have the rights")
        return repository

    def _commit_at(self, repository: Repository, revision: str) -> Commit:
        commit = repository.at(revision)
        if commit is None:
            raise failure(404, "RevisionNotFound", "Invalid rev id")
        return commit

    # Routes

    def _dispatch(self) -> None:
        if self.route == "/api/whoami-v2":
            raise Answer(200, {"name": self._account(), "type": "user", "orgs": []})
        if self.route == "/api/validate-yaml":
            self._validate_yaml(json.loads(self.body)["content"])
        if self.route in ("/api/repos/create", "/api/repos/delete"):
            self._create_or_delete(json.loads(self.body))
        if match := re.fullmatch(r"/lfs/(\w{64})", self.route):
            self._store_object(match[1])
        if match := re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.route):
            self._writable((match[1] or "models")[:-1], match[2])
            self._lfs_batch(json.loads(self.body))
        if match := re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.route):
            self._resolve((match[1] or "models")[:-1], *match.groups()[1:])
        if match := re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/(\w+)/([^/]+))?(/.+)?", self.route):
            repo_type, name, action, revision, folder = match.groups()
            if action in (None, "revision"):
                self._info(self._readable(repo_type, name), revision or "main")
            if action == "tree":
                self._tree(self._readable(repo_type, name), revision, (folder or "/")[1:])
            if action == "preupload":
                self._preupload(self._writable(repo_type, name), revision)
            if action == "commit":
                self._commit(self._writable(repo_type, name))

    def _validate_yaml(self, content: str) -> None:
        if not content.startswith("---\n"):
            raise Answer(200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
        raise Answer(200, {"errors": [], "warnings": []})

    def _create_or_delete(self, wanted: dict) -> None:
        account, repo_type = self._account(), wanted.get("type") or "model"
        name = f"{wanted.get('organization') or account}/{wanted['name']}"
        if account is None:
            raise failure(401, None, "Invalid username or password.")
        if name.split("/")[0] != account:
            raise failure(403, None, "You don't have the rights")
        if self.command == "DELETE":
            if self.hub.repositories.pop((repo_type, name), None) is None:
                raise failure(404, "RepoNotFound", "Repository not found")
            raise Answer(200, {})
        if self.hub.repository(name, repo_type):
            raise failure(409, None, "You already created this repo")
        is_private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.add(name, {}, repo_type=repo_type, is_private=is_private, sdk=wanted.get("sdk"))
        prefix = "" if repo_type == "model" else f"{repo_type}s/"
        raise Answer(200, {"url": f"{self.hub.url}/{prefix}{name}", "name": name})

    def _info(self, repository: Repository, revision: str) -> None:
        commit = self._commit_at(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        raise Answer(
            200,
            {
                "id": repository.name,
                "sha": commit.sha,
                "private": repository.is_private,
                "gated": "manual" if repository.is_gated else False,
                "siblings": siblings,
                "tags": [],
                "likes": 0,
                "downloads": 0,
            },
        )

    def _tree(self, repository: Repository, revision: str, folder: str) -> None:
        files = self._commit_at(repository, revision).files
        prefix = f"{folder}/" if folder else ""
        inside = [self._entry(path, files[path]) for path in sorted(files) if path.startswith(prefix)]
        if folder and not inside:
            raise failure(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        raise Answer(200, inside)

    def _entry(self, path: str, content: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
        if path.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def _preupload(self, repository: Repository, revision: str) -> None:
        there = self._commit_at(repository, revision).files
        answers = []
        for file in json.loads(self.body)["files"]:
            is_lfs = file["path"].endswith(LFS_SUFFIXES)
            content = there.get(file["path"])
            known = hashlib.sha256(content).hexdigest() if content is not None and is_lfs else None
            oid = known if is_lfs else (None if content is None else git_hash(content))
            answers.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_lfs else "regular",
                    "shouldIgnore": False,
                    "oid": oid,
                }
            )
        raise Answer(200, {"files": answers})

    def _lfs_batch(self, wanted: dict) -> None:
        objects = []
        for one in wanted["objects"]:
            entry = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}
            objects.append(entry)
        raise Answer(200, {"transfer": "basic", "objects": objects})

    def _store_object(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise failure(422, None, "the content is not what its name says")
        self.hub.objects[oid] = self.body
        raise Answer(200, {})

    def _commit(self, repository: Repository) -> None:
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        files, header = dict(repository.files), {}
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                header = value
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        if header.get("parentCommit") not in (None, repository.history[-1].sha):
            raise failure(412, None, "A commit has happened since. Please refresh and try again.")
        commit = repository.commit(files, header["summary"])
        raise Answer(
            200, {"commitUrl": f"{self.hub.url}/{repository.name}/commit/{commit.sha}", "commitOid": commit.sha}
        )

    def _resolve(self, repo_type: str, name: str, revision: str, path: str) -> None:
        commit = self._commit_at(self._readable(repo_type, name), revision)
        if path not in commit.files:
            missing = failure(404, "EntryNotFound", "Entry not found")
            missing.headers["X-Repo-Commit"] = commit.sha
            raise missing
        content = commit.files[path]
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{git_hash(content)}"'}
        if path.endswith(LFS_SUFFIXES):
            headers |= {
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Linked-Size": str(len(content)),
            }
        raise Answer(200, headers=headers, content=content)
