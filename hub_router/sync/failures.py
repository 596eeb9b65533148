"""Every way in which a call to the Hub fails, told apart: what to tell the user, and whether to try again.

The client library's exceptions are not one family (its own classes, httpx2's, JSON and key errors, ``OSError``), and
one of them hides its cause; :mod:`hub_router.sync.client` is the only user of this table.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime

import httpx2
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from hub_router.errors import GatedError, HubError, MissingError, UnreachableError

HELD_BACK = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})


class Refusal(Exception):  # noqa: N818 - an answer, turned into an error by diagnose
    """An answer that says to come back later: status and headers."""

    def __init__(self, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(status)
        self.status = status
        self.headers = headers


class TooManyAttempts(Exception):  # noqa: N818 - as above
    """huggingface_hub repeated a request without progress; ``resumed`` if it had spent all tries.

    Raised while the last try's failure is handled, so that is its context. ``start`` is the first byte asked for.
    """

    def __init__(self, attempts: int, timeout: float, resumed: bool, start: int = 0) -> None:
        super().__init__(f"no complete answer in {attempts} tries of {timeout:g} s")
        self.attempts = attempts
        self.resumed = resumed
        self.start = start


# InvalidURL is raised for an endpoint that is no URL; the plain Python errors come from answers of an unexpected shape.
UNEXPECTED = (
    Refusal,
    TooManyAttempts,
    httpx2.HTTPError,
    httpx2.InvalidURL,
    EntryNotFoundError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    AssertionError,
    RuntimeError,
)


@dataclass(frozen=True)
class Failure:
    """One failed try.

    Args:
        error (HubError): what to raise if no further try helps.
        passing (bool): whether a further try may help.
        wait (float | None): seconds that the Hub asks to wait.
        counts (bool): whether it says something about the Hub as a whole, not about one repository.
    """

    error: HubError
    passing: bool = False
    wait: float | None = None
    counts: bool = False

    def final(self, error: HubError) -> Failure:
        """The same failure, not worth another try."""
        return replace(self, error=error, passing=False)

    def after(self, tries: int) -> Failure:
        """The same failure, whose text says how often it was tried if that was more than once."""
        return replace(self, error=type(self.error)(f"{self.error}, {tries} tries")) if tries > 1 else self


def diagnose(what: str, error: BaseException, endpoint: str, has_token: bool) -> Failure:
    """Tell failures apart.

    Args:
        what (str): repository, and file if any.
        error (BaseException): one of :data:`UNEXPECTED`.
        endpoint (str): URL of the Hub.
        has_token (bool): whether a token was sent.

    Returns:
        Failure: with one line of reason.
    """
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return diagnose(what, error.__cause__, endpoint, has_token)
    if isinstance(error, Refusal):
        text = f"{what}: the Hub answered {error.status}{' (rate limit)' if error.status == 429 else ''}"
        return Failure(UnreachableError(text), True, asked_wait(error.headers), True)
    if isinstance(error, TooManyAttempts):
        return _repeated(what, error, endpoint)
    if isinstance(error, OfflineModeIsEnabled):
        return Failure(UnreachableError(f"{what}: HF_HUB_OFFLINE is set, so the Hub is not asked"))
    # A gated repository's error is a subclass of a missing one's.
    if isinstance(error, GatedRepoError):
        return Failure(gated(what.split(":")[0], endpoint, has_token))
    if isinstance(error, DisabledRepoError):
        return Failure(MissingError(f"{what}: disabled by the Hub"))
    if isinstance(error, RevisionNotFoundError):
        return Failure(MissingError(f"{what}: no such revision"))
    if isinstance(error, RepositoryNotFoundError):
        return Failure(MissingError(f"{what}: not on the Hub, or private"))
    if isinstance(error, EntryNotFoundError):
        return Failure(MissingError(f"{what}: no such file"))
    if isinstance(error, HfHubHTTPError):
        return _status(what, error, has_token)
    return _broken(what, error, endpoint)


def gated(repo_id: str, endpoint: str, has_token: bool) -> GatedError:
    """The error for a repository that lets this user not in.

    Args:
        repo_id (str): ``owner/repo``.
        endpoint (str): URL of the Hub.
        has_token (bool): whether a token was sent.

    Returns:
        GatedError: says what helps.
    """
    hint = "the token has no access" if has_token else "no token was sent, set HF_TOKEN"
    return GatedError(f"{repo_id}: accept its licence at {endpoint}/{repo_id} ({hint})")


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that an answer asks to wait, from ``RateLimit`` or ``Retry-After`` (seconds or a date).

    Args:
        headers (Mapping[str, str]): headers of the answer.

    Returns:
        float | None: None if it asks for nothing.
    """
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    stated = next((value.strip() for name, value in headers.items() if name.lower() == "retry-after"), "")
    if stated.isascii() and stated.isdigit():
        return float(stated)
    try:
        return max(parsedate_to_datetime(stated).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


def _status(what: str, error: HfHubHTTPError, has_token: bool) -> Failure:
    """An HTTP error without a code that names its meaning."""
    status = error.response.status_code
    if status == 401 and has_token and "credentials" in str(error):
        return Failure(HubError(f"{what}: the Hub does not accept the token; check HF_TOKEN or run: hf auth login"))
    if status in (401, 404, 410):
        return Failure(MissingError(f"{what}: not on the Hub, or private (status {status})"))
    # 416: a resumed download asked beyond the end; starting over helps.
    return Failure(HubError(f"{what}: the Hub answered {status}: {_line(error)}"), passing=status == 416)


def _repeated(what: str, error: TooManyAttempts, endpoint: str) -> Failure:
    """A request that huggingface_hub repeated in vain: told by the failure of the last try."""
    cause = error.__context__
    while cause is not None and not isinstance(cause, httpx2.HTTPError):
        cause = cause.__context__
    if cause is None:
        return Failure(UnreachableError(f"{what}: {error}"), not error.resumed, None, True)
    if not error.resumed:
        return _broken(what, cause, endpoint)
    if isinstance(cause, httpx2.TimeoutException):
        text = f"{what}: timed out after {error.start} bytes, {error}"
    else:
        text = f"{what}: {_cut(cause, error.start) or _connection(cause, endpoint)}, {error.attempts} tries"
    return Failure(UnreachableError(text), False, None, True)


def _cut(error: BaseException, start: int = 0) -> str:
    """After how many bytes an answer ended early, empty if the error is another one."""
    if match := re.search(r"received (\d+) bytes, expected (\d+)", str(error)):
        return f"connection closed after {start + int(match[1])} of {start + int(match[2])} bytes"
    if match := re.search(r"should be of size (\d+) but has size (\d+)", str(error)):
        return f"connection closed after {match[2]} of {match[1]} bytes"
    return ""


def _connection(error: BaseException, endpoint: str) -> str:
    """What happened to a connection."""
    if "refused" in str(error).lower():
        return f"the connection to {endpoint} failed: refused"
    return f"the connection to {endpoint} failed ({type(error).__name__}: {_line(error)})"


def _broken(what: str, error: BaseException, endpoint: str) -> Failure:
    """No answer, half an answer, or an answer that is no Hub's."""
    kind = type(error).__name__
    if isinstance(error, httpx2.TooManyRedirects):
        return Failure(HubError(f"{what}: redirected without end"))
    if isinstance(error, httpx2.InvalidURL | httpx2.UnsupportedProtocol):
        return Failure(HubError(f"{what}: {endpoint} is no URL of a Hub ({_line(error)}); check HF_ENDPOINT"))
    if isinstance(error, httpx2.TimeoutException):
        return Failure(UnreachableError(f"{what}: {endpoint} did not answer in time ({kind})"), True, None, True)
    if isinstance(error, httpx2.LocalProtocolError):
        # Its text quotes the header, hence the token.
        return Failure(HubError(f"{what}: no valid request can be formed; is HF_TOKEN a token without blanks?"))
    if isinstance(error, httpx2.HTTPError):
        return Failure(UnreachableError(f"{what}: {_cut(error) or _connection(error, endpoint)}"), True, None, True)
    if isinstance(error, FileMetadataError):
        return Failure(HubError(f"{what}: {endpoint} sent no commit and hash of the file; is it a Hub?"))
    if isinstance(error, OSError) and error.errno is not None:
        return Failure(HubError(f"{what}: the download cache cannot be written: {error}"))
    if isinstance(error, OSError):
        return Failure(HubError(f"{what}: {_cut(error) or _line(error)}"), passing=True)
    if isinstance(error, ValueError):
        return Failure(HubError(f"{what}: unusable answer from {endpoint} ({kind}: {_line(error)})"), passing=True)
    return Failure(HubError(f"{what}: unexpected answer from {endpoint} ({kind}: {_line(error)})"))


def _line(error: BaseException) -> str:
    """First non-empty line of an exception's text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
