"""The one module that talks to the Hub, through huggingface_hub's session, headers, error classes and download cache.

huggingface_hub's own listing and info calls wait without limit, give up a whole listing for one malformed item, and
send the token wherever a ``Link`` header points; its downloads wait as long as ``Retry-After`` says. So API requests
go through its session here, and downloads run under two event hooks on that session; both share one policy for
timeouts and retries (:class:`ClientOptions`), and every failure becomes one of :mod:`hub_router.errors` with a
one-line reason.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urljoin, urlsplit

import httpx2
from huggingface_hub import constants, hf_hub_download, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers, get_session, hf_raise_for_status, silent_tqdm

from hub_router.errors import HubError, UnreachableError
from hub_router.sync.failures import HELD_BACK, UNEXPECTED, Refusal, TooManyAttempts, diagnose, gated
from hub_router.sync.hubrecords import RepoInfo, TreeFile, parse_repo_info, parse_tree_file

T = TypeVar("T")
_EXPAND = ("author", "cardData", "downloads", "gated", "lastModified", "likes", "sha", "tags")
_MAX_PAGES = 10_000


@dataclass(frozen=True)
class ClientOptions:
    """How to reach the Hub and how patient to be.

    Args:
        endpoint (str | None): URL of the Hub; default huggingface_hub's (``HF_ENDPOINT``).
        cache_dir (Path | None): download cache; default huggingface_hub's (``HF_HOME``, ``HF_HUB_CACHE``).
        token (str | None): access token; default huggingface_hub's (``HF_TOKEN`` or the stored login).
        timeout (float): seconds without an answer or without further bytes after which a request has failed.
        retries (int): further tries after a failure that may pass (429, 5xx, network).
        backoff (float): seconds before the first further try; doubles each time.
        max_backoff (float): longest wait in seconds that the client chooses itself.
        max_retry_after (float): longest wait in seconds that the Hub may ask for; beyond it the call fails at once.
        give_up_after (int): failed calls in a row after which no further call is tried.
    """

    endpoint: str | None = None
    cache_dir: Path | None = None
    token: str | None = None
    timeout: float = 15.0
    retries: int = 4
    backoff: float = 1.0
    max_backoff: float = 8.0
    max_retry_after: float = 300.0
    give_up_after: int = 8


@dataclass
class _Guard:
    """What the hooks know about the download that runs in this thread."""

    client: HubClient
    seen: dict[tuple[str, str, str], int] = field(default_factory=dict)


_GUARD: ContextVar[_Guard | None] = ContextVar("hub_router_download", default=None)
_HOOKS = threading.Lock()
_LOGGERS = ("huggingface_hub.file_download", "huggingface_hub.utils._http")


class Cancelled(Exception):  # noqa: N818 - not an error
    """The run was stopped; raised in its threads."""


class HubClient:
    """Lists, inspects and downloads; used from many threads.

    Args:
        options (ClientOptions): endpoint, cache and patience.

    Attributes:
        requests (int): HTTP requests sent.
    """

    def __init__(self, options: ClientOptions) -> None:
        self.options = options
        self.requests = 0
        self._endpoint = (options.endpoint or constants.ENDPOINT).rstrip("/")
        self._cache = Path(options.cache_dir or constants.HF_HUB_CACHE)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._failed_in_a_row = 0

    @property
    def offline(self) -> bool:
        """Whether ``HF_HUB_OFFLINE`` forbids requests."""
        return is_offline_mode()

    @cached_property
    def _headers(self) -> dict[str, str]:
        # Not built before the first request: it may ask the Hub what to put in the user agent.
        return build_hf_headers(token=self.options.token, library_name="hub_router")

    @property
    def has_token(self) -> bool:
        """Whether requests carry a token."""
        return "authorization" in self._headers

    def cancel(self) -> None:
        """Makes every running and later call raise :class:`Cancelled` at its next wait or request."""
        self._stop.set()

    def list_repos(
        self, *, author: str | None = None, tag: str | None = None, limit: int | None = None
    ) -> Iterator[tuple[list[RepoInfo], list[str]]]:
        """The Hub's listing of models, page by page, most downloaded first.

        Args:
            author (str | None): only of this user or organisation.
            tag (str | None): only with this tag, e.g. ``base_model:adapter:owner/name``.
            limit (int | None): number of repositories wanted; the caller stops there.

        Returns:
            Iterator[tuple[list[RepoInfo], list[str]]]: per page its repositories, and a line per malformed item.

        Raises:
            HubError: the listing cannot be read.
        """
        params: dict[str, Any] = {"expand": list(_EXPAND), "sort": "downloads"}
        params |= {key: value for key, value in (("author", author), ("filter", tag), ("limit", limit)) if value}
        for page in self._pages("/api/models", params, "list models"):
            infos, faults = [], []
            for item in page:
                info = parse_repo_info(item)
                if info is None:
                    name = item.get("id") if isinstance(item, dict) else None
                    faults.append(f"{name or 'an item'}: the listing's entry has no usable id or sha")
                else:
                    infos.append(info)
            yield infos, faults

    def repo_info(self, repo_id: str, revision: str | None = None) -> RepoInfo:
        """One repository; follows a renamed one.

        Args:
            repo_id (str): ``owner/repo``.
            revision (str | None): branch, tag or commit.

        Returns:
            RepoInfo: ``sha`` is that of the revision.

        Raises:
            MissingError: the repository or revision does not exist, or is private.
            HubError: the Hub cannot be reached or answers nonsense.
        """
        path = f"/api/models/{repo_id}" + (f"/revision/{quote(revision, safe='')}" if revision else "")
        item = self._json(self._endpoint + path, {"expand": list(_EXPAND)}, repo_id)[0]
        info = parse_repo_info(item)
        if info is None:
            raise HubError(f"{repo_id}: the Hub's answer names no id and commit; is {self._endpoint} a Hub?")
        return info

    def tree(self, repo_id: str, sha: str) -> dict[str, TreeFile]:
        """All files of a repository at a commit.

        Args:
            repo_id (str): ``owner/repo``.
            sha (str): commit.

        Returns:
            dict[str, TreeFile]: by path, as the Hub wrote it: paths may be unsafe.

        Raises:
            MissingError: no such commit.
            HubError: the Hub cannot be reached or answers nonsense.
        """
        params = {"recursive": "true", "expand": "false"}
        files: dict[str, TreeFile] = {}
        for page in self._pages(f"/api/models/{repo_id}/tree/{quote(sha, safe='')}", params, repo_id):
            for entry in page:
                file = parse_tree_file(entry)
                if file is not None:
                    files[file.path] = file
        return files

    def check_access(self, repo_id: str, sha: str, path: str) -> None:
        """Asks a gated repository for the headers of a file, which it refuses to those without access.

        Args:
            repo_id (str): ``owner/repo``.
            sha (str): commit.
            path (str): a file of it.

        Raises:
            GatedError: no access.
            HubError: as for :meth:`repo_info`.
        """
        url = f"{self._endpoint}/{repo_id}/resolve/{sha}/{quote(path)}"

        def attempt() -> None:
            try:
                self._request("HEAD", url, None, follow_redirects=False)
            except HfHubHTTPError as error:
                # Mirrors refuse without the Hub's error code; a token that is no longer valid is another matter.
                if error.response.status_code in (401, 403) and "credentials" not in str(error):
                    raise gated(repo_id, self._endpoint, self.has_token) from error
                raise

        self._retrying(repo_id, attempt)

    def download(self, repo_id: str, sha: str, path: str) -> Path:
        """A file in the Hub cache, downloaded unless it is there; its contents are not checked.

        Args:
            repo_id (str): ``owner/repo``.
            sha (str): commit.
            path (str): a file of it.

        Returns:
            Path: in the snapshot folder of that commit.

        Raises:
            GatedError: no access.
            HubError: it cannot be downloaded.
        """

        def attempt() -> Path:
            with self._guarded():
                return Path(
                    hf_hub_download(
                        repo_id,
                        path,
                        revision=sha,
                        endpoint=self._endpoint,
                        cache_dir=self._cache,
                        token=self.options.token,
                        etag_timeout=self.options.timeout,
                        library_name="hub_router",
                        tqdm_class=silent_tqdm,
                    )
                )

        return self._retrying(f"{repo_id}: {path}", attempt)

    def sweep(self, repo_id: str) -> None:
        """Removes half files that a killed process left in the cache; running downloads hold a lock and are spared.

        Args:
            repo_id (str): ``owner/repo``.
        """
        name = repo_folder_name(repo_id=repo_id, repo_type="model")
        for half in (self._cache / name / "blobs").glob("*.incomplete"):
            lock = self._cache / ".locks" / name / f"{half.name.split('.')[0]}.lock"
            lock.parent.mkdir(parents=True, exist_ok=True)
            try:
                with WeakFileLock(lock, timeout=0.01):
                    half.unlink(missing_ok=True)
            except TimeoutError:
                continue

    def _pages(self, path: str, params: Mapping[str, Any], what: str) -> Iterator[list[Any]]:
        url, query = self._endpoint + path, params
        for _ in range(_MAX_PAGES):
            page, links = self._json(url, query, what)
            if not isinstance(page, list):
                raise HubError(f"{what}: expected a list, got a {type(page).__name__}; is {self._endpoint} a Hub?")
            yield page
            following = links.get("next", {}).get("url")
            if not following:
                return
            url, query = urljoin(url, following), {}
            if urlsplit(url)[:2] != urlsplit(self._endpoint)[:2]:
                raise HubError(f"{what}: the next page is on another host ({urlsplit(url).netloc}); not followed")
        raise HubError(f"{what}: more than {_MAX_PAGES} pages")

    def _json(self, url: str, params: Mapping[str, Any], what: str) -> tuple[Any, dict[str, dict[str, str]]]:
        def attempt() -> tuple[Any, Any]:
            response = self._request("GET", url, params)
            return response.json(), response.links

        return self._retrying(what, attempt)

    def _request(
        self, method: str, url: str, params: Mapping[str, Any] | None, follow_redirects: bool = True
    ) -> httpx2.Response:
        self._count()
        response = get_session().request(
            method,
            url,
            params=params or None,
            headers=self._headers,
            timeout=self.options.timeout,
            follow_redirects=follow_redirects,
        )
        if response.status_code in HELD_BACK:
            raise Refusal(response.status_code, response.headers)
        hf_raise_for_status(response)
        return response

    def _count(self) -> None:
        if self._stop.is_set():
            raise Cancelled
        with self._lock:
            self.requests += 1

    def _retrying(self, what: str, attempt: Callable[[], T]) -> T:
        """The result of a call, tried again while its failures may pass."""
        if self._failed_in_a_row >= self.options.give_up_after:
            raise UnreachableError(f"{what}: not tried, the Hub failed {self._failed_in_a_row} calls in a row")
        for tries in range(self.options.retries + 1):
            try:
                result = attempt()
            except UNEXPECTED as error:
                failure = diagnose(what, error, self._endpoint, self.has_token)
                wait = failure.wait
                if wait is not None and wait > self.options.max_retry_after:
                    text = f"{failure.error}; it asks to wait {wait:.0f} s, run the command again after that"
                    failure = failure.final(UnreachableError(text))
                if not failure.passing or tries == self.options.retries:
                    self._note(failed=failure.counts)
                    raise failure.after(tries + 1).error from error
                chosen = min(self.options.backoff * 2**tries, self.options.max_backoff)
                if self._stop.wait(chosen if wait is None else wait):
                    raise Cancelled from error
            else:
                self._note(failed=False)
                return result
        raise AssertionError("unreachable: the last try returns or raises")

    def _note(self, failed: bool) -> None:
        with self._lock:
            self._failed_in_a_row = self._failed_in_a_row + 1 if failed else 0

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Puts huggingface_hub's requests of this thread under the client's policy."""
        session = get_session()
        with _HOOKS:
            hooks = session.event_hooks
            if _before not in hooks["request"]:
                session.event_hooks = {
                    "request": [*hooks["request"], _before],
                    "response": [*hooks["response"], _after],
                }
            for name in _LOGGERS:
                logging.getLogger(name).addFilter(_is_not_ours)
        token = _GUARD.set(_Guard(self))
        try:
            yield
        finally:
            _GUARD.reset(token)


def _is_not_ours(record: logging.LogRecord) -> bool:
    """Log filter: what goes wrong in a guarded download is told by its outcome, not by huggingface_hub's warnings."""
    return _GUARD.get() is None


def _before(request: httpx2.Request) -> None:
    """Request hook: timeout, count, cancellation, and an end to repetitions that make no progress."""
    guard = _GUARD.get()
    if guard is None:
        return
    options = guard.client.options
    guard.client._count()
    request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), options.timeout)
    key = (request.method, str(request.url), request.headers.get("range", ""))
    guard.seen[key] = guard.seen.get(key, 0) + 1
    # A HEAD is repeated by the client's own loop; a broken GET is resumed by huggingface_hub.
    if guard.seen[key] > (1 if request.method == "HEAD" else options.retries + 1):
        start = re.match(r"bytes=(\d+)-", key[2])
        raise TooManyAttempts(
            guard.seen[key] - 1, options.timeout, request.method == "GET", int(start[1]) if start else 0
        )


def _after(response: httpx2.Response) -> None:
    """Response hook: failures that may pass leave huggingface_hub at once and are waited for here."""
    if _GUARD.get() is not None and response.status_code in HELD_BACK:
        raise Refusal(response.status_code, response.headers)
