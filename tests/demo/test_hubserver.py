"""The loopback Hub, asked by the real client library."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

# Read once, when huggingface_hub is imported.
os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}

from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hub_router.demo.hubfaults import Fault
from hub_router.demo.hubrepo import RepoShelf, front_matter
from hub_router.demo.hubserver import LoopbackHub

CARD = "---\nlicense: mit\nbase_model: owner/base\ntags:\n- demo\ndatasets: [glue]\n---\nText.\n"


def header_of(tensors: int = 1) -> bytes:
    """A safetensors file of one float32 each."""
    entries = {f"t{n}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * n, 4 * n + 4]} for n in range(tensors)}
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4 * tensors)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    for repo_id in ("ann/one", "ann/two", "bob/three"):
        folder = tmp_path / "hub" / repo_id
        (folder / "sub").mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(header_of())
        (folder / "sub" / "notes.txt").write_text(repo_id)
        (folder / "README.md").write_text(CARD)
    with LoopbackHub(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=False)


def fetch(hub: LoopbackHub, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(hub.endpoint + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def test_listing_filters_sorts_and_pages(hub: LoopbackHub, api: HfApi) -> None:
    hub.page_size = 1
    assert [info.id for info in api.list_models()] == ["ann/one", "ann/two", "bob/three"]
    assert len(hub.requests) == 3
    assert [info.id for info in api.list_models(author="Ann")] == ["ann/one", "ann/two"]
    assert [info.id for info in api.list_models(search="THREE")] == ["bob/three"]
    assert [info.id for info in api.list_models(filter=["peft", "license:mit"], limit=2)] == ["ann/one", "ann/two"]
    assert list(api.list_models(filter="base_model:adapter:other/base")) == []
    downloads = [info.downloads for info in api.list_models(sort="downloads")]
    assert downloads == sorted(downloads, key=lambda count: count or 0, reverse=True)


def test_expanded_listing_holds_what_was_asked_for(hub: LoopbackHub, api: HfApi) -> None:
    [info] = api.list_models(search="three", expand=["sha", "tags", "cardData", "gated", "lastModified"])
    repo = hub.shelf.get("bob/three")
    assert repo is not None
    assert info.sha == repo.sha
    assert set(info.tags or ()) == {
        *("demo", "peft", "safetensors", "dataset:glue", "license:mit", "region:us"),
        *("base_model:owner/base", "base_model:adapter:owner/base"),
    }
    assert info.card_data is not None
    assert info.card_data.base_model == "owner/base"
    assert info.last_modified is not None
    assert info.downloads is None


def test_model_info_and_tree_state_sizes_and_hashes(hub: LoopbackHub, api: HfApi) -> None:
    info = api.model_info("ann/one", files_metadata=True)
    data = header_of()
    files = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    weights = files["adapter_model.safetensors"]
    assert weights.lfs is not None
    assert (weights.size, weights.lfs.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    text = CARD.encode()
    blob = hashlib.sha1(f"blob {len(text)}\0".encode() + text, usedforsecurity=False).hexdigest()
    assert (files["README.md"].blob_id, files["README.md"].lfs) == (blob, None)
    for page_size in (1000, 2):
        hub.page_size = page_size
        entries = {entry.path: entry for entry in api.list_repo_tree("ann/one", recursive=True, revision=info.sha)}
        assert set(entries) == {*files, "sub"}
        assert entries["README.md"].blob_id == blob  # type: ignore[union-attr]
    assert {entry.path for entry in api.list_repo_tree("ann/one")} == {*files, "sub"} - {"sub/notes.txt"}
    assert [entry.path for entry in api.list_repo_tree("ann/one", "sub")] == ["sub/notes.txt"]
    [found] = api.get_paths_info("ann/one", ["README.md", "none"])
    assert found.path == "README.md"


def test_commit_follows_the_contents(hub: LoopbackHub, api: HfApi) -> None:
    before = api.model_info("ann/one").sha
    assert api.model_info("ann/one").sha == before
    readme = hub.shelf.root / "ann/one/README.md"
    readme.write_text(CARD + "more")
    after = api.model_info("ann/one").sha
    assert after != before
    with pytest.raises(RevisionNotFoundError):
        api.model_info("ann/one", revision=before)
    readme.write_text(CARD)
    assert api.model_info("ann/one").sha == before


def test_branches(hub: LoopbackHub, api: HfApi) -> None:
    shutil.copytree(hub.shelf.root / "ann/one", hub.shelf.root / "ann/one@v1")
    (hub.shelf.root / "ann/one@v1/README.md").write_text("old")
    main, branch = api.model_info("ann/one"), api.model_info("ann/one", revision="v1")
    assert main.sha != branch.sha
    assert {ref.name: ref.target_commit for ref in api.list_repo_refs("ann/one").branches} == {
        "main": main.sha,
        "v1": branch.sha,
    }
    assert [info.id for info in api.list_models(author="ann")] == ["ann/one", "ann/two"]
    assert api.model_info("ann/one", revision=branch.sha).sha == branch.sha


def test_downloads_are_the_files(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = Path(snapshot_download("ann/one", endpoint=hub.endpoint, cache_dir=tmp_path / "cache", token=False))
    source = hub.shelf.root / "ann/one"
    names = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    assert {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} == names
    for name in names:
        assert (folder / name).read_bytes() == (source / name).read_bytes()


def test_ranges(hub: LoopbackHub, api: HfApi) -> None:
    path = hub.shelf.root / "ann/one/adapter_model.safetensors"
    path.write_bytes(header_of(3000))
    metadata = api.parse_safetensors_file_metadata("ann/one", path.name)
    assert len(metadata.tensors) == 3000
    data = path.read_bytes()
    url = f"/ann/one/resolve/main/{path.name}"
    status, headers, body = fetch(hub, url, Range="bytes=5-9")
    assert (status, body, headers["Content-Range"]) == (206, data[5:10], f"bytes 5-9/{len(data)}")
    assert fetch(hub, url, Range="bytes=-4")[2] == data[-4:]
    assert fetch(hub, url, Range=f"bytes={len(data) - 2}-")[2] == data[-2:]
    assert fetch(hub, url, Range=f"bytes={len(data)}-")[0] == 416


def test_refusals_have_the_hubs_codes(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    options = {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache"}
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("ann/none")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("ann/one", "none.txt", token=False, **options)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("ann/one", "README.md", revision="none", token=False, **options)
    hub.gated["ann/one"] = {"good"}
    assert api.model_info("ann/one").gated == "manual"
    for token in (False, "bad"):
        with pytest.raises(GatedRepoError):
            hf_hub_download("ann/one", "README.md", token=token, **options)
    assert Path(hf_hub_download("ann/one", "README.md", token="good", **options)).read_text() == CARD
    hub.gated.clear()
    assert fetch(hub, "/datasets/ann/one")[0] == 404
    assert fetch(hub, "/ann/one/resolve/main/../../bob/three/README.md")[0] == 404
    assert fetch(hub, "/../ann/resolve/main/one/README.md")[0] == 401


def test_renamed_repository_is_redirected(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    hub.renames["ann/old"] = "ann/one"
    assert api.model_info("ann/old").id == "ann/one"
    path = hf_hub_download("ann/old", "README.md", endpoint=hub.endpoint, cache_dir=tmp_path / "cache", token=False)
    assert Path(path).read_text() == CARD


def test_card_is_read_by_the_client_library(hub: LoopbackHub, tmp_path: Path) -> None:
    path = hf_hub_download("ann/one", "README.md", endpoint=hub.endpoint, cache_dir=tmp_path / "cache", token=False)
    assert ModelCard.load(path).data.license == front_matter(CARD)["license"] == "mit"
    assert front_matter("no card") == {}


def test_faults_strike_as_often_as_told_and_the_log_shows_them(hub: LoopbackHub) -> None:
    hub.faults.add(Fault("/README", times=2, status=503, headers={"Retry-After": "1"}, body=b"busy"))
    url = "/ann/one/resolve/main/README.md"
    answers = [fetch(hub, url, Authorization="Bearer x") for _ in range(3)]
    assert [answer[0] for answer in answers] == [503, 503, 200]
    assert (answers[0][1]["Retry-After"], answers[0][2]) == ("1", b"busy")
    assert [(entry.method, entry.path, entry.status, entry.authorised) for entry in hub.requests] == [
        ("GET", url, status, True) for status in (503, 503, 200)
    ]


def test_damaged_bodies(hub: LoopbackHub) -> None:
    url = "/ann/one/resolve/main/README.md"
    hub.faults.add(Fault("README", times=1, flip=3))
    damaged = fetch(hub, url)[2]
    assert [n for n, (got, sent) in enumerate(zip(damaged, CARD.encode(), strict=True)) if got != sent] == [3]
    hub.faults.add(Fault("README", times=1, truncate=5))
    with pytest.raises(http.client.IncompleteRead, match=r"5 bytes read"):
        fetch(hub, url)
    hub.faults.add(Fault("README", times=1, reset=True))
    with pytest.raises(OSError, match=r"[Rr]eset"):
        fetch(hub, url)
    hub.faults.add(Fault("README", times=1, stall=0.3))
    began = time.monotonic()
    assert fetch(hub, url)[2] == CARD.encode()
    assert time.monotonic() - began > 0.25
    hub.faults.add(Fault("README", delay=0.3))
    began = time.monotonic()
    assert fetch(hub, url)[0] == 200
    assert time.monotonic() - began > 0.25


def test_links_in_served_folders_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "hub" / "ann" / "one"
    folder.mkdir(parents=True)
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "up").symlink_to(tmp_path)
    (folder / "README.md").write_text(CARD)
    repo = RepoShelf(tmp_path / "hub").get("ann/one")
    assert repo is not None
    assert list(repo.files) == ["README.md"]
