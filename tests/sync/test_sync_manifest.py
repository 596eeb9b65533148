from __future__ import annotations

from pathlib import Path

import pytest

from hub_router.errors import ManifestError
from hub_router.settings import bundled
from hub_router.sync.manifest import load_manifest
from hub_router.sync.targets import HubTarget, is_repo_id

HEAD = 'name = "x"\ntitle = "X"\ndescription = "d"\nbase_model = "a/base"\nlicence = "mit"\nconfidence = "A"\n'
BUNDLED = sorted(path.stem for path in bundled("catalog").glob("*.toml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "x.toml"
    path.write_text(text)
    return path


def test_listed_repositories(tmp_path: Path) -> None:
    manifest = load_manifest(write(tmp_path, HEAD + 'repos = ["a/b", "a/c/sub@v1"]\n[tasks]\n"a/b" = "mood"\n'))
    assert manifest.repos == (HubTarget("a/b"), HubTarget("a/c", "sub", "v1"))
    assert dict(manifest.tasks) == {"a/b": "mood"}
    assert (manifest.author, manifest.prefix, manifest.licence) == ("", "", "mit")


def test_author_pattern(tmp_path: Path) -> None:
    manifest = load_manifest(write(tmp_path, HEAD + 'author = "a"\nprefix = "zoo-"\n'))
    assert (manifest.author, manifest.prefix, manifest.repos) == ("a", "zoo-", ())


def test_every_fault_is_listed(tmp_path: Path) -> None:
    text = (
        'name = "x"\ntitle = 3\ndescription = " "\nbase_model = "nope"\nconfidence = "Z"\nlicense = "mit"\n'
        'repos = ["a/b", "a/b", "plain", 5]\nauthor = "a"\ntasks = {"a/z" = "t"}\n'
    )
    with pytest.raises(ManifestError) as raised:
        load_manifest(write(tmp_path, text))
    lines = str(raised.value).splitlines()
    assert lines[0].endswith("has 11 faults:")
    for part in (
        "unknown key 'license'",
        "licence is missing",
        "title is 3",
        "description is ' '",
        "base_model is 'nope'",
        "confidence is 'Z'",
        "either repos, or author",
        "'a/b' is listed twice",
        "'plain' is not",
        "5 is not",
        "'a/z' is not among repos",
    ):
        assert sum(part in line for line in lines) == 1, part


@pytest.mark.parametrize("text", ["name = ", "\xff"])
def test_file_that_is_no_toml(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ManifestError, match=r"x\.toml cannot be read"):
        load_manifest(path)


def test_unknown_name_lists_the_bundled_ones() -> None:
    with pytest.raises(ManifestError, match="lora-land, lorahub, zoo"):
        load_manifest("nothing")


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_manifest_is_valid(name: str) -> None:
    manifest = load_manifest(name)
    assert manifest.name == name
    assert is_repo_id(manifest.base_model)
    assert set(manifest.tasks) <= {target.repo_id for target in manifest.repos} or manifest.author


def test_bundled_collections_have_their_published_sizes() -> None:
    assert len(load_manifest("lorahub").repos) == 196
    assert len(load_manifest("lora-land").repos) == 27
    assert load_manifest("zoo").base_model == "hub_router/zoo-base"
