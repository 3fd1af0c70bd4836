"""A stand-in for the Hugging Face Hub on this machine, for the real `datasets` and `huggingface_hub` in a process of their own.

    with HubServer() as hub:
        hub.add("org/name", {"data/train-00000-of-00001.parquet": parquet_bytes})
        subprocess.run([sys.executable, "-c", "..."], env=hub.env(tmp_path))
        assert hub.bytes_of("org/name", "data/train-00000-of-00001.parquet") > 0

It serves dataset repositories from memory: the API for a repository, its files and its folders, and HEAD and ranged GET of the files. It
keeps a log of what was asked, and fails on request. What the client wants of other hosts (the dataset viewer's) comes here too, through the
proxy variables of `env`, and is answered with 404: a test touches no network.
"""

import hashlib
import json
import os
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

KINDS = ("500", "429", "401", "timeout", "cut", "short")
KEPT_HEADERS = ("range", "authorization", "user-agent", "if-none-match")
CHUNK = 1 << 16
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Request:
    """One request, in the log from the moment it arrives. Status 0: not answered (yet). The bytes are those of the body, headers apart."""

    method: str
    path: str
    status: int = 0
    first_byte: int = 0
    bytes_sent: int = 0
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Failure:
    """What to do to the next `times` requests that match `pattern`."""

    pattern: re.Pattern[str]
    kind: str
    times: int
    after_bytes: int


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def card(readme: bytes) -> dict[str, object]:
    """The YAML block at the head of a README.md."""
    block = re.match(r"---\r?\n(.*?)\n---\s", readme.decode("utf-8") + "\n", re.DOTALL)
    return (block and yaml.safe_load(block[1])) or {}


def entries(files: dict[str, bytes]) -> dict[str, dict[str, object]]:
    """Every file and folder of a commit by its path, as the tree API describes it."""
    listed: dict[str, dict[str, object]] = {}
    for path, content in sorted(files.items()):
        for folder in [str(parent) for parent in reversed(Path(path).parents)][1:]:
            listed.setdefault(
                folder,
                {"type": "directory", "oid": hashlib.sha1(folder.encode()).hexdigest(), "size": 0, "path": folder},
            )
        listed[path] = {"type": "file", "oid": blob_id(content), "size": len(content), "path": path}
    return listed


class HubServer:
    """The server, from its creation to `close`. As a context manager it closes itself."""

    def __init__(self) -> None:
        self.log: list[Request] = []
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}  # the files by repository and commit
        self.branches: dict[tuple[str, str], str] = {}  # the commit by repository and name
        self.failures: list[Failure] = []
        self.lock = threading.Lock()
        self.closed = threading.Event()
        self.hanging = threading.Event()  # set when those that hang are let go
        self.connections: set[socket.socket] = set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, name="hub", daemon=True
        ).start()

    def __enter__(self) -> "HubServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Refuses new connections and breaks the open ones, those left hanging included."""
        if self.closed.is_set():
            return
        self.closed.set()
        self.hanging.set()
        self.server.shutdown()
        self.server.server_close()
        with self.lock:
            for connection in self.connections:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:  # the client was quicker
                    pass

    def add(self, repo_id: str, files: dict[str, bytes], revision: str | None = None) -> str:
        """Makes `files` the whole content of a new commit on the branch `revision` (main if not given). Returns the commit."""
        with self.lock:
            commits = self.repositories.setdefault(repo_id, {})
            parts = [
                repo_id,
                str(len(commits)),
                *(f"{path} {blob_id(content)}" for path, content in sorted(files.items())),
            ]
            commit = hashlib.sha1("\n".join(parts).encode()).hexdigest()
            commits[commit] = dict(files)
            self.branches[repo_id, revision or "main"] = commit
        return commit

    def fail(self, pattern: str, kind: str, times: int = 1, after_bytes: int = 0) -> None:
        """Spoils the next `times` requests whose path, or method and path as in "GET /api/x", `pattern` is found in.

        The kinds: "500", "429" and "401" (a gated repository; with the pattern "/resolve/" one whose files alone are shut) are answers,
        "timeout" is none until `close` or `answer_again`. "cut" sends the headers and `after_bytes` bytes of the body and resets the
        connection, "short" sends as much and ends it in good order.
        """
        if kind not in KINDS:
            raise ValueError(f"kind is one of {', '.join(KINDS)}, not {kind}")
        with self.lock:
            self.failures.append(Failure(re.compile(pattern), kind, times, after_bytes))

    def answer_again(self) -> None:
        """Forgets all failures. What hangs is let go without an answer."""
        with self.lock:
            self.failures.clear()
            hanging, self.hanging = self.hanging, threading.Event()
        hanging.set()

    def bytes_of(self, repo_id: str, file: str) -> int:
        """Body bytes sent for all GETs of one file, whatever the revision."""
        path = re.compile(f"/datasets/{re.escape(repo_id)}/resolve/[^/]+/{re.escape(file)}")
        with self.lock:
            return sum(
                request.bytes_sent for request in self.log if request.method == "GET" and path.fullmatch(request.path)
            )

    def env(self, home: Path) -> dict[str, str]:
        """The whole environment of a process that takes this server for the Hub, has no token and keeps its caches below `home`."""
        ours = {
            name: value
            for name, value in os.environ.items()
            if not re.match(
                r"(HF|HUGGING|HUGGINGFACE|TRANSFORMERS|XDG_CACHE)_|(https?|all|no)_proxy$", name, re.IGNORECASE
            )
        }
        proxy = {
            "HTTP_PROXY": self.url,
            "HTTPS_PROXY": self.url,
            "NO_PROXY": "127.0.0.1,invalid",
        }  # a name in .invalid never resolves
        return (
            ours
            | proxy
            | {
                "HF_ENDPOINT": self.url,
                "HF_HOME": str(home),
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "HF_HUB_DISABLE_UPDATE_CHECK": "1",
                "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            }
        )

    def record(self, request: Request) -> Failure | None:
        """Notes a request that came in, and says how it is to fail."""
        with self.lock:
            self.log.append(request)
            for failure in self.failures:
                if failure.times and any(
                    failure.pattern.search(text) for text in (request.path, f"{request.method} {request.path}")
                ):
                    failure.times -= 1
                    return failure
        return None


class HubHandler(BaseHTTPRequestHandler):
    """One connection to the server, in a thread of its own."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        with self.hub.lock:
            self.hub.connections.add(self.connection)

    def finish(self) -> None:
        with self.hub.lock:
            self.hub.connections.discard(self.connection)
        super().finish()

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the client has gone
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        """Every method: the failures first, then the route."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kept = {name: self.headers[name] for name in KEPT_HEADERS if name in self.headers}
        self.request_log = Request(self.command, unquote(self.path.partition("?")[0]), headers=kept)
        self.failure = self.hub.record(self.request_log)
        kind = self.failure.kind if self.failure else ""
        if kind == "timeout":
            self.hub.hanging.wait()
            self.close_connection = True
        elif kind == "401":
            self.error(
                401, "GatedRepo", "Access to this dataset is restricted. You must be authenticated to access it."
            )
        elif kind in ("500", "429"):
            self.error(int(kind), "", "made to fail")
        else:
            self.route(body)

    do_HEAD = do_POST = do_CONNECT = do_GET

    def route(self, body: bytes) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        api = parts[:2] == ["api", "datasets"]
        if not self.path.startswith("/") or self.command == "CONNECT" or not (api or parts[0] == "datasets"):
            return self.error(404, "", "nothing is served here")  # or meant for another host
        org, name, action, revision, *rest = [*parts[2 if api else 1 :], "", "", "", ""]
        file = "/".join(part for part in rest if part)
        with self.hub.lock:
            commits = self.hub.repositories.get(f"{org}/{name}", {})
            commit = self.hub.branches.get((f"{org}/{name}", revision or "main"), revision)
            files = commits.get(commit)
        if not commits:
            return self.error(404, "RepoNotFound", "Repository not found")
        if files is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if not api and action == "resolve":
            return self.send_file(files, file, commit)
        if api and action in ("", "revision"):
            return self.send_json(self.info(f"{org}/{name}", commit, files), commit)
        if api and action == "paths-info":
            asked = parse_qs(body.decode()).get("paths", [])
            return self.send_json([entry for path, entry in entries(files).items() if path in asked], commit)
        if api and action == "tree":
            return self.send_tree(files, file, commit)
        return self.error(404, "", "nothing is served here")

    def info(self, repo_id: str, commit: str, files: dict[str, bytes]) -> dict[str, object]:
        sizes = "blobs" in parse_qs(urlsplit(self.path).query)
        siblings = [
            {"rfilename": path, **({"size": len(content), "blobId": blob_id(content)} if sizes else {})}
            for path, content in sorted(files.items())
        ]
        return {
            "_id": commit[:24],
            "id": repo_id,
            "author": repo_id.split("/")[0],
            "sha": commit,
            "private": False,
            "gated": False,
            "disabled": False,
            "createdAt": DATE,
            "lastModified": DATE,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "cardData": card(files.get("README.md", b"")),
            "siblings": siblings,
        }

    def send_tree(self, files: dict[str, bytes], folder: str, commit: str) -> None:
        query = parse_qs(urlsplit(self.path).query)
        everything, prefix = entries(files), folder and folder + "/"
        if folder and everything.get(folder, {}).get("type") != "directory":
            return self.error(404, "EntryNotFound", f"{folder} does not exist on {commit}", commit)
        below = [entry for path, entry in everything.items() if path.startswith(prefix)]
        if query.get("recursive", [""])[0].lower() not in ("1", "true"):
            below = [entry for entry in below if "/" not in str(entry["path"])[len(prefix) :]]
        if query.get("expand", [""])[0].lower() in ("1", "true"):
            below = [{**entry, "lastCommit": {"id": commit, "title": "files", "date": DATE}} for entry in below]
        self.send_json(below, commit)

    def send_file(self, files: dict[str, bytes], file: str, commit: str) -> None:
        if file not in files:
            return self.error(404, "EntryNotFound", "Entry not found", commit)
        content = files[file]
        headers = {"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted or not (wanted[1] or wanted[2]):
            return self.answer(200, content, headers)
        size = len(content)
        first = int(wanted[1]) if wanted[1] else max(size - int(wanted[2]), 0)
        end = min(int(wanted[2]) + 1, size) if wanted[1] and wanted[2] else size
        if first >= end:
            return self.answer(416, b"", headers | {"Content-Range": f"bytes */{size}"})
        self.request_log.first_byte = first
        self.answer(206, content[first:end], headers | {"Content-Range": f"bytes {first}-{end - 1}/{size}"})

    def send_json(self, value: object, commit: str) -> None:
        self.answer(
            200,
            json.dumps(value).encode(),
            {"Content-Type": "application/json; charset=utf-8", "X-Repo-Commit": commit},
        )

    def error(self, status: int, code: str, message: str, commit: str = "") -> None:
        """An error with the headers by which the client tells what is missing."""
        told = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        headers = {"Content-Type": "application/json; charset=utf-8"} | {
            name: value for name, value in told.items() if value
        }
        self.answer(status, json.dumps({"error": message}).encode(), headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        """Sends it all, or what a "cut" or a "short" leaves of it. A chunk counts just before it goes: no client is ahead of the log."""
        self.request_log.status = status
        broken = self.failure is not None and self.failure.kind in ("cut", "short")
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        sent = b"" if self.command == "HEAD" else body[: self.failure.after_bytes] if broken else body
        for start in range(0, len(sent), CHUNK):
            chunk = sent[start : start + CHUNK]
            with self.hub.lock:
                self.request_log.bytes_sent += len(chunk)
            self.connection.sendall(chunk)
        if broken:
            self.close_connection = True
            if self.failure.kind == "cut":
                self.hub.closed.wait(0.1)  # or the reset overtakes what was sent
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.rfile.close()  # now, both ends of it: the server would say goodbye first
                self.connection.close()
