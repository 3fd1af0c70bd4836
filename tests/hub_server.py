"""A local server that imitates the Hugging Face Hub, for the real `datasets` and `huggingface_hub` in another process.

    with HubServer() as hub:
        hub.add("org/name", {"data/train-00000-of-00001.parquet": parquet_bytes})
        subprocess.run([sys.executable, "-c", "..."], env=hub.env(tmp_path))
        assert hub.bytes_of("org/name", "data/train-00000-of-00001.parquet") > 0

It serves dataset repositories from memory: the API for a repository, its files and its folders, and HEAD and ranged GET
of the files. It logs all requests, and fails on demand. Requests for other hosts (such as the dataset viewer) arrive
here, too, because of the proxy variables of `env`, and are answered with 404: a test uses no network.
"""

import contextlib
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
LOGGED_HEADERS = ("range", "authorization", "user-agent", "if-none-match")
CHUNK = 1 << 16
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Request:
    """One request, logged on arrival. status: 0 without an answer (yet). bytes_sent: of the body, without headers."""

    method: str
    path: str
    status: int = 0
    first_byte: int = 0
    bytes_sent: int = 0
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Failure:
    """How to fail the next `times` requests that match `pattern`."""

    pattern: re.Pattern[str]
    kind: str
    times: int
    after_bytes: int


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def card(readme: bytes) -> dict[str, object]:
    """Return the YAML block at the beginning of a README.md."""
    block = re.match(r"---\r?\n(.*?)\n---\s", readme.decode("utf-8") + "\n", re.DOTALL)
    return (block and yaml.safe_load(block[1])) or {}


def entries(files: dict[str, bytes]) -> dict[str, dict[str, object]]:
    """Return all files and folders of a commit by their paths, as the tree API describes them."""
    listed: dict[str, dict[str, object]] = {}
    for path, content in sorted(files.items()):
        for folder in [str(parent) for parent in reversed(Path(path).parents)][1:]:
            listed.setdefault(
                folder,
                {"type": "directory", "oid": hashlib.sha1(folder.encode()).hexdigest(), "size": 0, "path": folder},
            )
        listed[path] = {"type": "file", "oid": blob_id(content), "size": len(content), "path": path}
    return listed


def repository_info(repo_id: str, commit: str, files: dict[str, bytes], with_sizes: bool) -> dict[str, object]:
    """Return the description of a repository, as its API returns it."""
    siblings = [
        {"rfilename": path, **({"size": len(content), "blobId": blob_id(content)} if with_sizes else {})}
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


class HubServer:
    """The server, which runs from its creation to `close`, or to the end of its `with` block."""

    def __init__(self) -> None:
        self.log: list[Request] = []
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}  # files by repository and commit
        self.branches: dict[tuple[str, str], str] = {}  # commit by repository and branch
        self.failures: list[Failure] = []
        self.lock = threading.Lock()
        self.closed = threading.Event()
        self.hanging = threading.Event()  # set to release hanging requests
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
        """Refuse new connections and reset the open ones, including hanging ones."""
        if self.closed.is_set():
            return
        self.closed.set()
        self.hanging.set()
        self.server.shutdown()
        self.server.server_close()
        with self.lock:
            for connection in self.connections:
                with contextlib.suppress(OSError):  # the client has closed it already
                    connection.shutdown(socket.SHUT_RDWR)

    def add(self, repo_id: str, files: dict[str, bytes], revision: str | None = None) -> str:
        """Create a commit with exactly these files on the branch `revision`, main by default. Return the commit."""
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
        """Fail the next `times` requests whose path, or method and path as in "GET /api/x", contains `pattern`.

        kind: "500", "429" and "401" are answers; "401" means a gated repository, or gated files with the pattern
        "/resolve/". "timeout" is no answer until `close` or `answer_again`. "cut" sends the headers and `after_bytes`
        bytes of the body and resets the connection; "short" sends as much and closes it normally.
        """
        if kind not in KINDS:
            raise ValueError(f"kind is one of {', '.join(KINDS)}, not {kind}")
        with self.lock:
            self.failures.append(Failure(re.compile(pattern), kind, times, after_bytes))

    def answer_again(self) -> None:
        """Remove all failures. Release hanging requests without an answer."""
        with self.lock:
            self.failures.clear()
            hanging, self.hanging = self.hanging, threading.Event()
        hanging.set()

    def bytes_of(self, repo_id: str, file: str) -> int:
        """Return the body bytes sent for all GETs of a file, over all revisions."""
        path = re.compile(f"/datasets/{re.escape(repo_id)}/resolve/[^/]+/{re.escape(file)}")
        with self.lock:
            return sum(
                request.bytes_sent for request in self.log if request.method == "GET" and path.fullmatch(request.path)
            )

    def env(self, home: Path) -> dict[str, str]:
        """Return the environment of a process that uses this server as the Hub, has no token, and caches in `home`."""
        ours = {
            name: value
            for name, value in os.environ.items()
            if not re.match(
                r"(HF|HUGGING|HUGGINGFACE|TRANSFORMERS|XDG_CACHE)_|(https?|all|no)_proxy$", name, re.IGNORECASE
            )
        }
        # a name in .invalid never resolves
        proxy = {"HTTP_PROXY": self.url, "HTTPS_PROXY": self.url, "NO_PROXY": "127.0.0.1,invalid"}
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
        """Log a request, and return how it fails, None if it does not."""
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
    """One connection to the server, in its own thread."""

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
        except OSError:  # the client has disconnected
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        """Handle a request with any method: fail it or route it."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: self.headers[name] for name in LOGGED_HEADERS if name in self.headers}
        self.request_log = Request(self.command, unquote(self.path.partition("?")[0]), headers=headers)
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
            return self.error(404, "", "nothing is served here")  # or the request is for another host
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
            with_sizes = "blobs" in parse_qs(urlsplit(self.path).query)
            return self.send_json(repository_info(f"{org}/{name}", commit, files, with_sizes), commit)
        if api and action == "paths-info":
            asked = parse_qs(body.decode()).get("paths", [])
            return self.send_json([entry for path, entry in entries(files).items() if path in asked], commit)
        if api and action == "tree":
            return self.send_tree(files, file, commit)
        return self.error(404, "", "nothing is served here")

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
        """Send an error with the headers from which the client learns the reason."""
        details = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        headers = {"Content-Type": "application/json; charset=utf-8"} | {
            name: value for name, value in details.items() if value
        }
        self.answer(status, json.dumps({"error": message}).encode(), headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        """Send the answer, or the part that "cut" or "short" allows. Log each chunk before sending it."""
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
                self.hub.closed.wait(0.1)  # else the reset overtakes the sent bytes
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.rfile.close()  # close both now: the server would shut down the connection first
                self.connection.close()
