"""A Hugging Face Hub on loopback: serves folders as model repositories in the Hub's own HTTP protocol.

It speaks the part of the protocol that huggingface_hub uses to list, inspect and download models
(https://huggingface.co/docs/hub/api): listings with pages, model info, file trees, refs, paths-info, and files with
ranges. ``hub-router demo`` runs against it, and so do the tests, which add faults.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

from hub_router.demo.hubfaults import Fault, FaultPlan
from hub_router.demo.hubrepo import RepoShelf, ServedFile, ServedRepo

_SORT_KEYS = ("lastModified", "downloads", "likes", "createdAt")
_LIST_KEYS = (
    *("_id", "id", "modelId", "author", "private", "gated", "downloads", "likes", "tags"),
    *("library_name", "pipeline_tag", "createdAt", "lastModified", "sha"),
)


@dataclass(frozen=True)
class Answer:
    """One HTTP answer: status, headers, body."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""


@dataclass(frozen=True)
class LoggedRequest:
    """One request that the server saw: method, path with query, whether a token came with it, status of the answer."""

    method: str
    path: str
    authorised: bool
    status: int


class LoopbackHub:
    """Serves ``<root>/<owner>/<repo>/...`` on 127.0.0.1; a context manager.

    Args:
        root (Path): folder of repositories; ``<owner>/<repo>@<branch>`` is another branch of ``<owner>/<repo>``.
        page_size (int): items per page of a listing.

    Attributes:
        gated (dict[str, set[str]]): gated repositories and the tokens that may download them.
        renames (dict[str, str]): old id -> new id; old ids are answered with a redirect.
        faults (FaultPlan): what goes wrong.
        requests (list[LoggedRequest]): every request, in order of its end.
    """

    def __init__(self, root: Path, page_size: int = 1000) -> None:
        self.shelf = RepoShelf(root)
        self.page_size = page_size
        self.gated: dict[str, set[str]] = {}
        self.renames: dict[str, str] = {}
        self.faults = FaultPlan()
        self.requests: list[LoggedRequest] = []
        self.stopping = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def endpoint(self) -> str:
        """URL for ``HF_ENDPOINT``."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """The answer to one request.

        Args:
            method (str): ``GET``, ``HEAD`` or ``POST``.
            target (str): path and query.
            headers (Mapping[str, str]): request headers.
            body (bytes): request body.

        Returns:
            Answer: for a ``HEAD`` request too with its body, which is not sent.
        """
        url = urlsplit(target)
        query = parse_qs(url.query)
        token = headers.get("authorization", "").removeprefix("Bearer ")
        if url.path == "/api/models":
            return self._listing(query)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|refs|paths-info)(?:/(.*))?)?", url.path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", url.path)
        match = api or file
        if match is None:
            return _refusal(404, "", f"no such page: {url.path}")
        repo_id = unquote(match[1])
        if repo_id in self.renames:
            moved = target.replace(match[1], self.renames[repo_id], 1)
            return Answer(307, {"Location": moved, "Content-Type": "text/plain"}, b"moved")
        if self.shelf.get(repo_id) is None:
            return _refusal(404 if token else 401, "RepoNotFound", "Repository not found")
        if file:
            return self._file(repo_id, unquote(file[2]), unquote(file[3]), token, headers)
        return self._model(method, repo_id, match[2] or "revision", match[3] or "", query, body)

    def _listing(self, query: dict[str, list[str]]) -> Answer:
        author, search = query.get("author", [""])[0].lower(), query.get("search", [""])[0].lower()
        wanted = set(query.get("filter", []))
        repos = [
            repo
            for repo_id in self.shelf.ids()
            if (not author or repo_id.split("/")[0].lower() == author) and search in repo_id.lower()
            if (repo := self.shelf.get(repo_id)) is not None and wanted <= set(repo.tags)
        ]
        items = [repo.info(repo.id in self.gated) for repo in repos]
        if (key := query.get("sort", [""])[0]) in _SORT_KEYS:
            items.sort(key=lambda item: item[key], reverse=True)  # type: ignore[arg-type, return-value]
        start, size = int(query.get("cursor", ["0"])[0]), self.page_size
        if "limit" in query:
            size = min(size, int(query["limit"][0]))
        keys = _keys(query, _LIST_KEYS)
        page = [{key: item[key] for key in keys if key in item} for item in items[start : start + size]]
        headers = {}
        if start + size < len(items):
            after = urlencode({**query, "cursor": [str(start + size)]}, doseq=True)
            headers["Link"] = f'<{self.endpoint}/api/models?{after}>; rel="next"'
        return _json(page, headers)

    def _model(
        self, method: str, repo_id: str, kind: str, rest: str, query: dict[str, list[str]], body: bytes
    ) -> Answer:
        if kind == "refs":
            names = self.shelf.branches(repo_id)
            found = [(name, self.shelf.get(repo_id, name)) for name in names]
            rows = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": repo.sha} for name, repo in found if repo
            ]
            return _json({"branches": rows, "converts": [], "tags": [], "pullRequests": []})
        revision, _, inner = rest.partition("/")
        repo = self.shelf.get(repo_id, unquote(revision) or "main")
        if repo is None:
            return _refusal(404, "RevisionNotFound", f"Invalid rev id: {unquote(revision)}")
        if kind == "tree":
            return self._tree(repo, unquote(inner), query)
        if kind == "paths-info":
            paths = parse_qs(body.decode()).get("paths", [])
            return _json([repo.files[path].tree_entry() for path in paths if path in repo.files])
        info = repo.info(repo_id in self.gated, blobs="blobs" in query)
        return _json({key: info[key] for key in _keys(query, info) if key in info})

    def _tree(self, repo: ServedRepo, inner: str, query: dict[str, list[str]]) -> Answer:
        prefix = f"{inner}/" if inner else ""
        recursive = query.get("recursive", ["false"])[0].lower() == "true"
        entries: dict[str, dict[str, object]] = {}
        for path, file in repo.files.items():
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                folder = prefix + "/".join(parts[:depth])
                entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": file.git_oid}
            if recursive or len(parts) == 1:
                entries[path] = file.tree_entry()
        if inner and not entries:
            return _refusal(404, "EntryNotFound", f"{inner} does not exist on {repo.sha}")
        start = int(query.get("cursor", ["0"])[0])
        rows = list(entries.values())
        headers = {}
        if start + self.page_size < len(rows):
            after = urlencode({**query, "cursor": [str(start + self.page_size)]}, doseq=True)
            path = f"/api/models/{repo.id}/tree/{repo.sha}" + (f"/{inner}" if inner else "")
            headers["Link"] = f'<{self.endpoint}{path}?{after}>; rel="next"'
        return _json(rows[start : start + self.page_size], headers)

    def _file(self, repo_id: str, revision: str, path: str, token: str, headers: Mapping[str, str]) -> Answer:
        if repo_id in self.gated and token not in self.gated[repo_id]:
            what = f"Access to model {repo_id} is restricted"
            return _refusal(403 if token else 401, "GatedRepo", what)
        repo = self.shelf.get(repo_id, revision)
        if repo is None:
            return _refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if path not in repo.files:
            return _refusal(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": repo.sha})
        return _contents(repo, repo.files[path], headers.get("range"))


def _keys(query: dict[str, list[str]], default: Any) -> list[str]:
    """The properties that an answer holds: those asked for with ``expand`` or by older flags, else the default ones."""
    if "expand" in query:
        return ["id", *query["expand"]]
    flags = {"full": ["siblings", "cardData"], "cardData": ["cardData"], "config": ["config"]}
    return [*default, *(key for flag, keys in flags.items() if flag in query for key in keys)]


def _json(value: object, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(
        200, {"Content-Type": "application/json; charset=utf-8", **(headers or {})}, json.dumps(value).encode()
    )


def _refusal(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> Answer:
    shown = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
    return Answer(status, {"Content-Type": "application/json", **shown}, json.dumps({"error": message}).encode())


def _contents(repo: ServedRepo, file: ServedFile, asked: str | None) -> Answer:
    """A file, or the range of it that was asked for."""
    data = file.location.read_bytes()
    headers = {"Content-Type": "application/octet-stream", "X-Repo-Commit": repo.sha, "Accept-Ranges": "bytes"}
    headers["ETag"] = f'"{file.etag}"'
    if file.sha256:
        headers |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
    if asked is None:
        return Answer(200, headers, data)
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked)
    first, last = match.groups() if match else ("", "")
    start = int(first) if first else max(len(data) - int(last or 0), 0)
    end = min(int(last), len(data) - 1) if first and last else len(data) - 1
    if not (first or last) or start > end:
        return Answer(416, {"Content-Range": f"bytes */{len(data)}"})
    return Answer(206, {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"}, data[start : end + 1])


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    hub: LoopbackHub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of the server."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    # Headers and body leave in one segment; otherwise delayed acknowledgements cost 40 ms per request.
    wbufsize = -1
    disable_nagle_algorithm = True
    timeout = 60

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr; see ``LoopbackHub.requests``."""

    def _serve(self) -> None:
        hub = self.server.hub
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        fault = hub.faults.take(self.command, self.path)
        if fault and fault.reset:
            self._log(0)
            # A linger time of zero makes closing the descriptor send a reset instead of an orderly end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            socket.close(self.connection.detach())
            self.close_connection = True
            return
        if fault and fault.delay:
            hub.stopping.wait(fault.delay)
        if fault and fault.status:
            answer = Answer(fault.status, {"Content-Type": "text/plain"}, fault.body)
        else:
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = hub.answer(self.command, self.path, headers, body)
        self._log(answer.status)
        self._send(answer, fault or Fault(""))

    def _log(self, status: int) -> None:
        entry = LoggedRequest(self.command, self.path, "authorization" in self.headers, status)
        self.server.hub.requests.append(entry)

    def _send(self, answer: Answer, fault: Fault) -> None:
        data = answer.body
        if fault.flip is not None and fault.flip < len(data):
            data = data[: fault.flip] + bytes([data[fault.flip] ^ 0xFF]) + data[fault.flip + 1 :]
        self.send_response(answer.status, HTTPStatus(answer.status).phrase)
        for name, value in {**answer.headers, **fault.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            data = data[: fault.truncate] if fault.truncate is not None else data
            self.close_connection = self.close_connection or fault.truncate is not None
            if fault.stall:
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                self.server.hub.stopping.wait(fault.stall)
                data = data[len(data) // 2 :]
            self.wfile.write(data)
        self.wfile.flush()
