from __future__ import annotations

from pathlib import Path

import pytest

from hub_router.errors import SettingsError
from hub_router.sync.targets import HubTarget, LocalTarget, is_repo_id, is_safe_path, parse_target, parse_targets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("predibase/cnn", HubTarget("predibase/cnn")),
        ("a/b/llama2/sst2", HubTarget("a/b", "llama2/sst2")),
        ("a/b@v1", HubTarget("a/b", "", "v1")),
        ("a/b/sub@refs/pr/1", HubTarget("a/b", "sub", "refs/pr/1")),
        ("lorahub/flan_t5_large-super_glue_wsc.fixed", HubTarget("lorahub/flan_t5_large-super_glue_wsc.fixed")),
        ("lorahub/x-race_no_instructions_", HubTarget("lorahub/x-race_no_instructions_")),
    ],
)
def test_repository_is_parsed_into_id_folder_and_revision(text: str, expected: HubTarget) -> None:
    assert parse_target(text) == expected


def test_common_revision_is_for_repositories_that_name_none() -> None:
    assert parse_targets(["a/b", "c/d@v2"], "v1") == (HubTarget("a/b", "", "v1"), HubTarget("c/d", "", "v2"))


def test_existing_folder_wins_over_a_repository_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_target("a/b") == HubTarget("a/b")
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert parse_target("a/b") == LocalTarget(tmp_path / "a" / "b")


def test_path_object_and_path_like_texts_are_folders_even_if_missing(tmp_path: Path) -> None:
    assert parse_target(Path("x/y")) == LocalTarget(Path.cwd() / "x" / "y")
    assert parse_target(str(tmp_path / "none")) == LocalTarget(tmp_path / "none")
    assert parse_target("./none") == LocalTarget(Path.cwd() / "none")


def test_repetitions_count_once() -> None:
    assert parse_targets(["a/b", "a/b", "a/b/c"]) == (HubTarget("a/b"), HubTarget("a/b", "c"))


def test_text_that_no_file_system_takes_is_refused_politely() -> None:
    for text in ("a/" + "x" * 5000, "~nobody-of-that-name/x", "./a\0b"):
        with pytest.raises(SettingsError, match="expected owner/repo"):
            parse_target(text)


def test_every_malformed_target_is_named_in_one_error() -> None:
    with pytest.raises(SettingsError) as raised:
        parse_targets(["plain", "a/b@", "a/b/../c", "a/b", "a b/c", ""])
    for text in ("'plain'", "'a/b@'", "'a/b/../c'", "'a b/c'", "''"):
        assert text in str(raised.value)
    assert str(raised.value).count("expected owner/repo") == 5


@pytest.mark.parametrize(
    "text", ["a", "a/b/c", "../b", "a/..", "a/b--c", "-a/b", "a/b.", "a/" + "x" * 200, "ä/b", "a/b\n"]
)
def test_not_a_repository_id(text: str) -> None:
    assert not is_repo_id(text)


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a//b", "./a", "a\\b", "C:/x", "c:x", "a\0b", ""])
def test_path_that_leaves_its_folder_is_not_safe(path: str) -> None:
    assert not is_safe_path(path)


def test_ordinary_paths_are_safe() -> None:
    assert all(is_safe_path(path) for path in ("a", "a/b.json", "checkpoint-10/adapter_model.bin", "..a/b..", "a b/c"))
