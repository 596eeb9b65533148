"""Runs against a Hub that misbehaves, over real HTTP with the real client library."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from sync_world import Bench, outcomes, reasons

from hub_router.demo.hubfaults import Fault
from hub_router.demo.hubserver import LoopbackHub
from hub_router.errors import HubError, UnreachableError
from hub_router.lora.facts import inspect
from hub_router.store.session import open_store

WEIGHTS = r"/resolve/.*/adapter_model\.safetensors"


def leftovers(bench: Bench) -> list[Path]:
    """Half files anywhere in the cache."""
    return list((bench.folder / "cache").rglob("*.incomplete"))


def assert_sound(bench: Bench, *repo_ids: str) -> None:
    """The catalog offers exactly these, and their files in the cache are the Hub's."""
    assert {name for name, (status, _) in bench.rows().items() if status == "ready"} == set(repo_ids)
    for repo_id in repo_ids:
        row = bench.adapter(repo_id)
        source = bench.folder / "hub" / repo_id
        assert inspect(Path(row.path)).weights_hash == inspect(source).weights_hash == row.weights_hash
    assert leftovers(bench) == []


@pytest.mark.parametrize(
    ("path", "method"),
    [
        (r"/api/models\?", "GET"),
        (r"/api/models/ann/one\?", "GET"),
        ("/tree/", "GET"),
        (WEIGHTS, "HEAD"),
        (WEIGHTS, "GET"),
        (r"/resolve/.*/README\.md", "GET"),
    ],
)
@pytest.mark.parametrize(
    "fault",
    [
        Fault("", status=429, headers={"Retry-After": "0"}),
        Fault("", status=503),
        Fault("", status=500, body=b"<html>oops</html>"),
        Fault("", reset=True),
    ],
    ids=["429", "503", "500", "reset"],
)
def test_passing_failure_is_waited_out_wherever_it_strikes(bench: Bench, path: str, method: str, fault: Fault) -> None:
    bench.repo("ann/one")
    bench.hub.faults.add(replace(fault, path=path, method=method, times=2))
    asked = {"author": "ann"} if "models" in path and "ann" not in path else {}
    summary = bench.sync(*(() if asked else ("ann/one",)), **asked)
    assert outcomes(summary) == {"ann/one": "added"}, reasons(summary)
    assert_sound(bench, "ann/one")


@pytest.mark.parametrize("fault", [Fault("", truncate=20), Fault("", status=200, body=b"<html>log in</html>")])
@pytest.mark.parametrize("path", [r"/api/models\?", "/tree/"])
def test_half_or_foreign_json_is_asked_for_again(bench: Bench, path: str, fault: Fault) -> None:
    bench.repo("ann/one")
    bench.hub.faults.add(replace(fault, path=path, times=1))
    assert outcomes(bench.sync(author="ann")) == {"ann/one": "added"}


def test_truncated_download_is_completed(bench: Bench) -> None:
    bench.repo("ann/one")
    bench.hub.faults.add(Fault(WEIGHTS, method="GET", truncate=100, times=1))
    assert outcomes(bench.sync("ann/one")) == {"ann/one": "added"}
    assert_sound(bench, "ann/one")


def test_flipped_byte_is_noticed_and_fetched_again(bench: Bench) -> None:
    bench.repo("ann/one")
    bench.hub.faults.add(Fault(WEIGHTS, method="GET", flip=200, times=1))
    assert outcomes(bench.sync("ann/one")) == {"ann/one": "added"}
    assert_sound(bench, "ann/one")
    assert sum(entry.startswith("GET") and "adapter_model" in entry for entry in bench.asked()) == 2


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "README.md"])
def test_file_that_stays_wrong_is_not_kept(bench: Bench, name: str) -> None:
    bench.repo("ann/one")
    bench.repo("ann/two", seed=1)
    bench.hub.faults.add(Fault(f"/ann/one/resolve/.*/{name}", method="GET", flip=10))
    summary = bench.sync(author="ann")
    assert outcomes(summary) == {"ann/one": "failed", "ann/two": "added"}
    kind = "sha256" if "adapter" in name else "git blob sha1"
    assert f"{name}: {kind} is " in reasons(summary)
    assert "downloaded twice, not kept" in reasons(summary)
    cached = bench.folder / "cache/models--ann--one"
    repo = bench.hub.shelf.get("ann/one")
    assert repo is not None
    assert not (cached / "blobs" / repo.files[name].etag).exists()
    assert list(cached.rglob(name)) == []
    assert_sound(bench, "ann/two")
    assert bench.state("ann/one").revision is None
    bench.hub.faults.clear()
    assert outcomes(bench.sync(author="ann")) == {"ann/one": "added", "ann/two": "unchanged"}
    assert_sound(bench, "ann/one", "ann/two")


def test_corrupt_file_that_another_tool_left_in_the_cache_is_replaced(bench: Bench) -> None:
    bench.repo("ann/one")
    bench.sync("ann/one")
    blob = (Path(bench.adapter("ann/one").path) / "adapter_model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 0xFF
    blob.write_bytes(data)
    (bench.folder / "catalog.db").unlink()
    other = bench.folder / "other.db"
    with open_store(f"sqlite:///{other}") as store:
        bench.store = store
        assert outcomes(bench.sync("ann/one")) == {"ann/one": "added"}
        assert_sound(bench, "ann/one")


def test_one_repository_that_is_down_does_not_stop_the_others(bench: Bench) -> None:
    for name in ("a", "b", "c"):
        bench.repo(f"ann/{name}")
    bench.hub.faults.add(Fault("/api/models/ann/b/tree", status=503))
    summary = bench.sync(author="ann")
    assert outcomes(summary) == {"ann/a": "added", "ann/b": "failed", "ann/c": "added"}
    assert "the Hub answered 503, 3 tries" in reasons(summary)
    assert not summary.ok


def test_known_repository_that_cannot_be_checked_keeps_its_verified_adapter(bench: Bench) -> None:
    bench.repo("ann/one", seed=1)
    bench.sync("ann/one")
    revision = bench.adapter("ann/one").revision
    bench.hub.faults.add(Fault("/api/models/ann/one", status=503))
    summary = bench.sync("ann/one")
    assert outcomes(summary) == {"ann/one": "failed"}
    assert f"not checked, the catalog keeps revision {revision}" in reasons(summary)
    assert bench.rows() == {"ann/one": ("ready", "")}
    assert bench.state("ann/one").state == "failed"
    bench.hub.faults.clear()
    assert outcomes(bench.sync("ann/one")) == {"ann/one": "unchanged"}
    assert bench.state("ann/one").state == "ok"


def test_update_that_cannot_be_downloaded_keeps_the_old_revision(bench: Bench) -> None:
    bench.repo("ann/one", seed=1)
    bench.sync("ann/one")
    old = bench.adapter("ann/one")
    bench.repo("ann/one", seed=2)
    bench.hub.faults.add(Fault(WEIGHTS, status=503))
    assert outcomes(bench.sync("ann/one")) == {"ann/one": "failed"}
    assert (bench.adapter("ann/one").id, bench.adapter("ann/one").status) == (old.id, "ready")
    assert bench.state("ann/one").revision == old.revision
    bench.hub.faults.clear()
    assert outcomes(bench.sync("ann/one")) == {"ann/one": "updated"}
    assert_sound(bench, "ann/one")


def test_half_done_repository_is_finished_by_the_next_run(bench: Bench) -> None:
    for name in ("x", "y"):
        bench.repo(f"ann/many/{name}", seed=ord(name))
    bench.hub.faults.add(Fault("/resolve/.*/y/adapter_model", status=503))
    assert outcomes(bench.sync("ann/many")) == {"ann/many/x": "added", "ann/many/y": "failed"}
    assert bench.state("ann/many").revision is None
    bench.hub.faults.clear()
    bench.asked()
    assert outcomes(bench.sync("ann/many")) == {"ann/many/x": "unchanged", "ann/many/y": "added"}
    assert not any("/x/" in entry for entry in bench.asked())


def test_stalled_and_silent_servers_time_out(bench: Bench) -> None:
    bench.options = replace(bench.options, timeout=0.3, retries=1)
    for name in ("ok", "silent", "head", "stalled"):
        bench.repo(f"ann/{name}")
    bench.hub.faults.add(Fault("/api/models/ann/silent/tree", delay=30))
    bench.hub.faults.add(Fault("/ann/head/resolve/", method="HEAD", delay=30))
    bench.hub.faults.add(Fault(f"/ann/stalled{WEIGHTS}", method="GET", stall=30))
    began = time.monotonic()
    summary = bench.sync(author="ann", workers=8)
    assert time.monotonic() - began < 15
    assert outcomes(summary) == {
        "ann/ok": "added",
        **dict.fromkeys(("ann/silent", "ann/head", "ann/stalled"), "failed"),
    }
    assert "did not answer in time" in reasons(summary)
    assert "no complete answer in" in reasons(summary)
    assert leftovers(bench) == []


def test_retry_after_is_honoured(bench: Bench) -> None:
    bench.repo("ann/one")
    bench.hub.faults.add(Fault("/api/models/ann/one", status=429, headers={"Retry-After": "1"}, times=1))
    began = time.monotonic()
    assert outcomes(bench.sync("ann/one")) == {"ann/one": "added"}
    assert time.monotonic() - began > 1.0


@pytest.mark.parametrize(
    "headers",
    [
        {"Retry-After": "3600"},
        {"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"},
        {"RateLimit": '"api";r=0;t=3600', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'},
    ],
)
@pytest.mark.parametrize("path", ["/api/models/ann/one", WEIGHTS])
def test_endless_retry_after_is_a_reason_to_stop_not_to_wait(bench: Bench, path: str, headers: dict[str, str]) -> None:
    bench.repo("ann/one")
    bench.hub.faults.add(Fault(path, status=429, headers=headers))
    began = time.monotonic()
    summary = bench.sync("ann/one")
    assert time.monotonic() - began < 10
    assert outcomes(summary) == {"ann/one": "failed"}
    assert "(rate limit); it asks to wait" in reasons(summary)


def test_unreachable_hub_is_given_up_quickly_for_all(bench: Bench) -> None:
    ids = [f"ann{number}/one" for number in range(40)]
    bench.options = replace(bench.options, endpoint="http://127.0.0.1:9", give_up_after=4)
    began = time.monotonic()
    summary = bench.sync(*ids)
    assert time.monotonic() - began < 10
    assert set(outcomes(summary).values()) == {"failed"}
    assert "not tried, the Hub failed" in reasons(summary)
    assert "the connection to http://127.0.0.1:9 failed" in reasons(summary)


def test_listing_that_cannot_be_read_is_an_error(bench: Bench) -> None:
    bench.hub.faults.add(Fault("/api/models", status=502))
    with pytest.raises(UnreachableError, match="list models: the Hub answered 502"):
        bench.sync(author="ann")


@pytest.mark.parametrize("endpoint", ["nonsense", "ftp://127.0.0.1", "http://", "http://[::1"])
def test_endpoint_that_is_no_url(bench: Bench, endpoint: str) -> None:
    bench.options = replace(bench.options, endpoint=endpoint)
    assert outcomes(bench.sync("ann/one")) == {"ann/one": "failed"}


def test_page_on_another_host_is_refused_and_sees_no_token(bench: Bench) -> None:
    bench.repo("ann/one")
    bench.options = replace(bench.options, token="secret")
    with LoopbackHub(bench.folder / "hub") as other:
        link = {"Link": f'<{other.endpoint}/api/models?cursor=1>; rel="next"'}
        bench.hub.faults.add(Fault(r"/api/models\?", headers=link))
        with pytest.raises(HubError, match="the next page is on another host"):
            bench.sync(author="ann")
        assert other.requests == []
    assert bench.hub.requests[0].authorised


def test_files_on_another_host_are_fetched_without_the_token(bench: Bench) -> None:
    bench.repo("ann/one")
    repo = bench.hub.shelf.get("ann/one")
    assert repo is not None
    file = repo.files["adapter_model.safetensors"]
    bench.options = replace(bench.options, token="secret")
    with LoopbackHub(bench.folder / "hub") as store:
        headers = {
            "Location": f"{store.endpoint}/ann/one/resolve/{repo.sha}/{file.path}",
            "X-Repo-Commit": repo.sha,
            "X-Linked-ETag": f'"{file.etag}"',
            "X-Linked-Size": str(file.size),
        }
        bench.hub.faults.add(Fault(WEIGHTS, status=302, headers=headers))
        assert outcomes(bench.sync("ann/one")) == {"ann/one": "added"}
        assert [entry.authorised for entry in store.requests] == [False]
    assert all(entry.authorised for entry in bench.hub.requests)
    assert_sound(bench, "ann/one")


def test_token_that_breaks_the_header_is_not_repeated_in_the_reason(bench: Bench) -> None:
    bench.options = replace(bench.options, token="secret\n")
    summary = bench.sync("ann/one")
    assert outcomes(summary) == {"ann/one": "failed"}
    assert "secret" not in reasons(summary)
    assert "HF_TOKEN" in reasons(summary)


def test_rejected_token_says_so(bench: Bench) -> None:
    bench.options = replace(bench.options, token="stale")
    message = {"X-Error-Message": "Invalid credentials in Authorization header"}
    bench.hub.faults.add(Fault("/api/models/ann/one", status=401, headers=message))
    summary = bench.sync("ann/one")
    assert outcomes(summary) == {"ann/one": "failed"}
    assert "does not accept the token" in reasons(summary)


def test_server_that_is_no_hub(bench: Bench) -> None:
    bench.repo("ann/one")
    bench.hub.faults.add(Fault("/resolve/", status=200, body=b"hello"))
    summary = bench.sync("ann/one")
    assert outcomes(summary) == {"ann/one": "failed"}
    assert "sent no commit and hash of the file" in reasons(summary)
    bench.hub.faults.clear()
    bench.hub.faults.add(Fault("/api/models/ann/one", status=200, body=b'{"error": "x"}'))
    assert "names no id and commit" in reasons(bench.sync("ann/one"))
    bench.hub.faults.clear()
    bench.hub.faults.add(Fault("/api/models", status=200, body=b'{"error": "x"}'))
    with pytest.raises(HubError, match="expected a list, got a dict"):
        bench.sync(author="ann")


def test_endless_redirect_and_forbidden(bench: Bench) -> None:
    bench.hub.renames["ann/one"] = "ann/one"
    assert "redirected without end" in reasons(bench.sync("ann/one"))
    bench.hub.faults.add(Fault("/api/models/ann/two", status=403))
    assert "the Hub answered 403" in reasons(bench.sync("ann/two"))


def test_file_without_a_stated_hash_cannot_be_verified(bench: Bench) -> None:
    bench.repo("ann/one")
    repo = bench.hub.shelf.get("ann/one")
    assert repo is not None
    entries = [{**file.tree_entry(), "oid": "", "lfs": None} for file in repo.files.values()]
    bench.hub.faults.add(Fault("/tree/", status=200, body=json.dumps(entries).encode()))
    summary = bench.sync("ann/one")
    assert outcomes(summary) == {"ann/one": "failed"}
    assert "the Hub states no hash" in reasons(summary)


def test_cache_that_cannot_be_written(bench: Bench) -> None:
    bench.repo("ann/one")
    (bench.folder / "cache").write_text("a file")
    summary = bench.sync("ann/one")
    assert outcomes(summary) == {"ann/one": "failed"}
    assert "cache" in reasons(summary)


def test_cause_of_a_broken_download_is_told_and_nothing_else_is_logged(
    bench: Bench, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    bench.repo("ann/one")
    repo = bench.hub.shelf.get("ann/one")
    assert repo is not None
    size = repo.files["adapter_model.safetensors"].size
    bench.hub.faults.add(Fault(WEIGHTS, method="GET", truncate=0))
    summary = bench.sync("ann/one")
    assert outcomes(summary) == {"ann/one": "failed"}
    assert reasons(summary) == f"adapter_model.safetensors: connection closed after 0 of {size} bytes, 3 tries"
    assert "Error while downloading" not in capfd.readouterr().err + caplog.text


def test_refused_connection_is_called_refused(bench: Bench) -> None:
    bench.options = replace(bench.options, endpoint="http://127.0.0.1:9")
    assert "the connection to http://127.0.0.1:9 failed: refused, 3 tries" in reasons(bench.sync("ann/one"))
