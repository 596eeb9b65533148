from __future__ import annotations

from pathlib import Path

import pytest

from hub_router.errors import ManifestError
from hub_router.records import Sample
from hub_router.sync.manifest import MANIFEST_BYTES, load_manifest, manifest_faults
from hub_router.sync.manifestcheck import MEMBERS, TEXTS
from hub_router.sync.samples import SAMPLES_PER_SPLIT, TEXT_CHARACTERS
from hub_router.sync.targets import HubTarget

HEAD = 'name = "x"\ntitle = "X"\ndescription = "d"\nbase_model = "a/base"\nlicence = "mit"\nconfidence = "A"\n'
LISTED = HEAD + 'repos = ["a/b", "a/c/sub@v1"]\n'


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
    with pytest.raises(ManifestError, match=r"bundled are: arrow-phi3, .*lorahub, .*zoo"):
        load_manifest("nothing")


def test_base_model_may_be_left_out(tmp_path: Path) -> None:
    manifest = load_manifest(write(tmp_path, LISTED.replace('base_model = "a/base"\n', "")))
    assert manifest.base_model is None
    assert manifest.members == ("a/b", "a/c/sub")


def test_tasks_samples_and_certainty_belong_to_entries_without_their_revision(tmp_path: Path) -> None:
    text = (
        LISTED
        + 'sample_source = "a data set"\n[uncertain]\nB = ["a/c/sub"]\n[tasks]\n"a/c/sub" = "mood"\n'
        + '[[samples]]\nrepo = "a/c/sub@v1"\ninput = "Is it good?"\noutput = "yes"\n'
        + '[[samples]]\nrepo = "a/c/sub"\ninput = " And now? "\n'
    )
    manifest = load_manifest(write(tmp_path, text))
    assert dict(manifest.tasks) == {"a/c/sub": "mood"}
    assert manifest.confidences() == {"a/b": "A", "a/c/sub": "B"}
    assert manifest.samples == {
        "a/c/sub": (
            Sample("Is it good?", "yes", "sample", "manifest x"),
            Sample(" And now? ", "", "sample", "manifest x"),
        )
    }
    assert manifest.sample_source == "a data set"


def test_tasks_of_an_author_must_fit_the_pattern(tmp_path: Path) -> None:
    text = HEAD + 'author = "a"\nprefix = "zoo-"\n[tasks]\n"A/Zoo-x" = "mood"\n"a/other" = "t"\n"a/zoo-é" = "t"\n'
    assert manifest_faults(write(tmp_path, text)) == (
        "tasks: 'a/other' is not among the repositories of author and prefix",
        "tasks: 'a/zoo-é' is not among the repositories of author and prefix",
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (LISTED.replace('"x"', '"two words"'), "name is 'two words', expected letters, digits"),
        (HEAD + 'author = "a b"\n', "author is 'a b', expected a user or organisation"),
        (HEAD + 'author = "a"\nprefix = "b c"\n', "prefix is 'b c', expected what names"),
        (HEAD + 'repos = ["a/b@v1", "a/b/sub"]\n', "'a/b/sub' names another revision than an entry above"),
        (HEAD + 'repos = ["a/b", "a/b@v1"]\n', "'a/b@v1' is listed twice"),
        (HEAD + 'repos = ["a/b/../c"]\n', "'a/b/../c' is not owner/repo"),
        (HEAD + 'repos = ["a/b@\\u0000"]\n', "is not owner/repo"),
        (LISTED + '[tasks]\n"a/c" = "t"\n', "tasks: 'a/c' is not among repos"),
        (LISTED + '[tasks]\n"a/b" = " "\n', "tasks: 'a/b' is ' ', expected a text"),
        (LISTED + '[tasks]\n"a/b" = 3\n', "tasks: 'a/b' is 3, expected a text"),
        (LISTED + 'tasks = "mood"\n', "tasks is no table of texts"),
        (LISTED + 'uncertain = ["a/b"]\n', "uncertain is no table of lists"),
        (LISTED + '[uncertain]\nA = ["a/b"]\n', "'A' is no confidence below that of the manifest"),
        (LISTED + '[uncertain]\nD = ["a/b"]\n', "'D' is no confidence below that of the manifest"),
        (LISTED + '[uncertain]\nB = "a/b"\n', "'B' is no list of texts"),
        (LISTED + '[uncertain]\nB = ["a/z"]\n', "uncertain: 'a/z' is not among repos"),
        (LISTED + '[uncertain]\nB = ["a/b"]\nC = ["a/b"]\n', "uncertain: 'a/b' is listed twice"),
        (LISTED + "samples = [3]\n", "samples is no list of tables"),
        (LISTED + '[[samples]]\nrepo = "a/z"\ninput = "x"\n', "repo of number 1 is 'a/z', which is not among repos"),
        (LISTED + '[[samples]]\ninput = "x"\n', "repo of number 1 is None"),
        (LISTED + '[[samples]]\nrepo = "a/b"\n', "input of number 1 is None, expected a text"),
        (LISTED + '[[samples]]\nrepo = "a/b"\ninput = "\\u0000"\n', "input of number 1 holds a NUL character"),
        (LISTED + '[[samples]]\nrepo = "a/b"\ninput = "x"\noutput = 1\n', "output of number 1 is 1, expected a text"),
        (LISTED + '[[samples]]\nrepo = "a/b"\ninput = "x"\ntarget = "y"\n', "number 1 has unknown key 'target'"),
    ],
)
def test_one_fault(tmp_path: Path, text: str, fault: str) -> None:
    (found,) = manifest_faults(write(tmp_path, text))
    assert fault in found
    with pytest.raises(ManifestError, match=r"x\.toml has 1 fault:\n  - "):
        load_manifest(tmp_path / "x.toml")


@pytest.mark.parametrize("key", sorted(TEXTS.keys() - {"confidence", "author", "prefix"}))
def test_texts_have_a_bound(tmp_path: Path, key: str) -> None:
    rest = "".join(line for line in HEAD.splitlines(keepends=True) if not line.startswith(f"{key} "))
    for length, faulty in ((TEXTS[key], False), (TEXTS[key] + 1, True)):
        value = "a/" + "b" * (length - 2) if key == "base_model" else "a" * length
        faults = manifest_faults(write(tmp_path, f'{rest}repos = ["a/b"]\n{key} = "{value}"\n'))
        assert any("characters, at most" in fault for fault in faults) == faulty


def test_members_and_samples_have_a_bound(tmp_path: Path) -> None:
    many = [f"a/b{number}" for number in range(MEMBERS + 1)]
    rows = [f'[[samples]]\nrepo = "a/b0"\ninput = "{number}"\n' for number in range(SAMPLES_PER_SPLIT + 1)]
    long = f'[[samples]]\nrepo = "a/b1"\ninput = "{"x" * (TEXT_CHARACTERS + 1)}"\n'
    assert manifest_faults(write(tmp_path, HEAD + f"repos = {many}\n" + "".join(rows) + long)) == (
        f"repos has {MEMBERS + 1} entries, at most {MEMBERS} are read",
        f"samples: input of number {len(rows) + 1} has {TEXT_CHARACTERS + 1} characters, at most "
        f"{TEXT_CHARACTERS} are allowed",
        f"samples: 'a/b0' has {len(rows)}, at most {SAMPLES_PER_SPLIT} are kept",
    )


def test_hostile_files_are_refused_with_a_short_message(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    for text, message in (
        ("#" * (MANIFEST_BYTES + 1), f"longer than {MANIFEST_BYTES} bytes"),
        ("a = " + "[" * 200_000, "cannot be read"),
        ("a = " + "9" * 100_000, "cannot be read"),
        (HEAD + f"repos = {['#' * 90_000] * 50}\n", "has 50 faults"),
        ("".join(f"key{number} = 1\n" for number in range(200_000)), "200006 faults"),
    ):
        path.write_text(text)
        with pytest.raises(ManifestError, match=message) as raised:
            load_manifest(path)
        assert len(str(raised.value)) < 15_000


def test_name_too_long_for_a_file_is_no_collection() -> None:
    assert "neither a TOML file nor a bundled collection" in manifest_faults("x" * 5_000)[0]
