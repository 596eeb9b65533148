"""The table of failures, for the entries that no server in these tests produces."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx2
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from hub_router.errors import HubError, UnreachableError
from hub_router.sync.failures import Failure, asked_wait, diagnose


def told(error: BaseException) -> Failure:
    return diagnose("a/b", error, "http://hub", has_token=False)


def test_hidden_cause_is_brought_to_light() -> None:
    outer = LocalEntryNotFoundError("cannot find the file in the local cache")
    outer.__cause__ = httpx2.ConnectTimeout("slow")
    failure = told(outer)
    assert isinstance(failure.error, UnreachableError)
    assert failure.passing
    assert "did not answer in time (ConnectTimeout)" in str(failure.error)


@pytest.mark.parametrize(
    ("error", "kind", "passing"),
    [
        (OfflineModeIsEnabled("offline"), UnreachableError, False),
        (OSError(28, "No space left on device"), HubError, False),
        (OSError("Consistency check failed: file should be of size 5 but has size 4"), HubError, True),
        (ValueError("no JSON"), HubError, True),
        (KeyError("id"), HubError, False),
        (AssertionError("commit_hash must have been retrieved"), HubError, False),
        (httpx2.ReadError("reset"), UnreachableError, True),
        (httpx2.DecodingError("bad gzip"), UnreachableError, True),
        (httpx2.UnsupportedProtocol("ftp"), HubError, False),
        (httpx2.TooManyRedirects("20"), HubError, False),
    ],
)
def test_errors_that_are_not_the_clients_own(error: BaseException, kind: type[HubError], passing: bool) -> None:
    failure = told(error)
    assert type(failure.error) is kind
    assert failure.passing is passing
    assert str(failure.error).startswith("a/b: ")
    assert "\n" not in str(failure.error)


def test_wait_that_an_answer_asks_for() -> None:
    assert asked_wait({}) is None
    assert asked_wait({"retry-after": " 12 "}) == 12
    assert asked_wait({"Retry-After": "soon"}) is None
    assert asked_wait({"ratelimit": '"api";r=0;t=55', "Retry-After": "3"}) == 55
    assert asked_wait({"ratelimit": '"api";r=7;t=55'}) is None
    later = asked_wait({"Retry-After": format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)})
    assert later is not None
    assert 95 < later <= 100
    assert asked_wait({"Retry-After": "Fri, 01 Jan 1999 00:00:00 GMT"}) == 0
