"""Where samples come from: files and cards of repositories, manifests, a user's files and datasets."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
import pytest
from sync_world import Bench, outcomes, write_adapter

from hub_router.errors import SamplesError
from hub_router.records import SAMPLES_LEAST, SAMPLES_PER_SPLIT, Sample
from hub_router.store.samples import add_given, merge_samples, samples
from hub_router.sync.card import parse_card
from hub_router.sync.dataset import Columns, read_dataset
from hub_router.sync.samples import Fields, read_sample_file, read_samples


def write_rows(path: Path, inputs: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"input": text, "output": f"{text}!"}) + "\n" for text in inputs))
    return path


def inputs(found: Sequence[Sample]) -> list[str]:
    return [sample.input for sample in found]


def stored(bench: Bench, repo_id: str, subfolder: str = "") -> list[Sample]:
    with bench.store.read() as session:
        return samples(session, bench.adapter(repo_id, subfolder).id)


def test_both_splits(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text('{"input": "a", "output": "b"}\n\n{"input": " c "}\n')
    (tmp_path / "test.jsonl").write_text('{"input": "d", "output": "e", "other": 1}')
    found, notes = read_samples(tmp_path)
    assert found == (
        Sample("a", "b", "sample", "samples.jsonl"),
        Sample(" c ", "", "sample", "samples.jsonl"),
        Sample("d", "e", "test", "test.jsonl"),
    )
    assert notes == ()


def test_no_files(tmp_path: Path) -> None:
    assert read_samples(tmp_path) == ((), ())


BAD_LINES = [
    b"not json",
    b'["input"]',
    b'{"input": 3}',
    b'{"input": "a", "output": 1}',
    b'{"input": "  "}',
    b'{"input": "\\ud800"}',
    b'{"input": "a\\u0000"}',
    b"\xff\xfe",
    b"[" * 100_000,
    json.dumps({"input": "x" * 20_001}).encode(),
]


def test_bad_lines_of_a_repository_are_counted_and_the_first_is_explained(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_bytes(b"\n".join([b'{"input": "good", "output": "x"}', *BAD_LINES]))
    found, notes = read_samples(tmp_path)
    assert inputs(found) == ["good"]
    assert len(notes) == 1
    assert notes[0].startswith("10 lines of samples.jsonl left out (line 2: not JSON")


def test_a_file_within_the_cap_is_kept_whole_in_its_order(tmp_path: Path) -> None:
    wanted = [str(number) for number in range(SAMPLES_PER_SPLIT)]
    write_rows(tmp_path / "test.jsonl", [*wanted, *wanted])
    found, notes = read_samples(tmp_path)
    assert inputs(found) == wanted
    assert notes == ()


def test_choice_beyond_the_cap_is_the_same_whatever_the_order_and_spread_over_the_file(tmp_path: Path) -> None:
    rows = [f"row {number}" for number in range(5 * SAMPLES_PER_SPLIT)]
    write_rows(tmp_path / "test.jsonl", rows)
    found, notes = read_samples(tmp_path)
    assert len(found) == len(set(inputs(found))) == SAMPLES_PER_SPLIT
    assert len(notes) == 1
    assert notes[0].startswith(f"test.jsonl: {4 * SAMPLES_PER_SPLIT} samples left out")
    for part in (found, found[:100]):
        fifths = [sum(rows.index(sample.input) // SAMPLES_PER_SPLIT == fifth for sample in part) for fifth in range(5)]
        assert min(fifths) > len(part) / 10, fifths
    write_rows(tmp_path / "test.jsonl", rows[::-1])
    assert read_samples(tmp_path)[0] == found
    write_rows(tmp_path / "test.jsonl", [*rows, "one more"])
    assert len(set(inputs(read_samples(tmp_path)[0])) - set(inputs(found))) <= 1


def test_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "samples.jsonl").open("wb") as stream:
        stream.truncate(32_000_001)
    assert read_samples(tmp_path) == ((), ("samples.jsonl ignored: 32000001 bytes, at most 32000000 are read",))


def test_the_first_source_wins_and_fills_the_split() -> None:
    first = [Sample(f"a{number}", "first") for number in range(SAMPLES_PER_SPLIT - 1)]
    second = [Sample("a0", "second", origin="m"), Sample("b", "", origin="m"), Sample("c", "", origin="m")]
    merged, notes = merge_samples([first, second, [Sample("d", "", "test")]])
    assert list(merged[:-2]) == first
    assert merged[-2].input in ("b", "c")
    assert merged[-1] == Sample("d", "", "test")
    assert notes == (f"m: 1 samples left out, at most {SAMPLES_PER_SPLIT} are kept",)


def test_widget_examples_that_are_one_text_become_samples() -> None:
    card = parse_card(
        "---\nwidget:\n"
        "- text: Is it good?\n  example_title: Mood\n  output:\n    text: yes it is\n"
        "- text: A cat\n  output:\n    url: images/cat.png\n"
        "- text: Is it good?\n  output: {text: twice}\n"
        "- messages:\n  - role: user\n    content: How are you?\n"
        "- messages:\n  - {role: user, content: First}\n  - {role: assistant, content: Second}\n"
        "- messages: [{role: system, content: Rules}]\n"
        "- messages:\n  - role: user\n    content: What is your favorite condiment?\n"
        '- text: "I love AutoTrain 🤗"\n'
        "- src: https://example.org/dog.png\n  text: What animal?\n"
        "- text: Where do I live?\n  context: I live in Oslo.\n"
        "---\nprose\n"
    )
    assert card.widget == (
        Sample("Is it good?", "yes it is", "sample", "card widget"),
        Sample("A cat", "", "sample", "card widget"),
        Sample("How are you?", "", "sample", "card widget"),
    )
    assert card.notes == ()


@pytest.mark.parametrize(
    "value",
    [
        "3",
        "null",
        "text",
        "[3, null, [text], {text: 3}, {text: {a: b}}, {text: ' '}]",
        '[{text: "a\\0b"}, {text: "\\ud800"}]',
        "[{messages: {role: user}}, {messages: [3]}, {messages: [{role: [user], content: x}]}]",
        "[{text: " + "x" * 20_001 + "}]",
    ],
)
def test_hostile_widget_gives_nothing_and_does_not_fail_the_card(value: str) -> None:
    card = parse_card(f"---\nlicense: mit\nwidget: {value}\n---\nprose\n")
    assert (card.licence, card.prose, card.widget, card.notes) == ("mit", "prose", (), ())


def test_number_of_widget_examples_is_capped() -> None:
    rows = "".join(f"- text: t{number}\n" for number in range(3000))
    assert len(parse_card(f"---\nwidget:\n{rows}---\n").widget) == 100


def test_sources_of_a_repository_in_order_of_priority(bench: Bench) -> None:
    widget = "---\nwidget:\n- text: review 1\n  output: {text: never}\n- text: from the card\n---\n"
    bench.repo("ann/one", card=widget)
    manifest = bench.folder / "mine.toml"
    manifest.write_text(
        'name = "mine"\ntitle = "t"\ndescription = "d"\nbase_model = "owner/base"\nlicence = "mit"\nconfidence = "A"\n'
        'repos = ["ann/one"]\n'
        '[[samples]]\nrepo = "ann/one"\ninput = "review 0"\noutput = "never"\n'
        '[[samples]]\nrepo = "ann/one"\ninput = "from the manifest"\noutput = "yes"\n'
        '[[samples]]\nrepo = "ann/one"\ninput = "from the card"\noutput = "said the manifest"\n'
    )
    assert outcomes(bench.sync(collection=manifest)) == {"ann/one": "added"}
    assert [(sample.input, sample.output, sample.origin) for sample in stored(bench, "ann/one")] == [
        *((f"review {number}", "good", "samples.jsonl") for number in range(3)),
        ("from the manifest", "yes", "manifest mine"),
        ("from the card", "said the manifest", "manifest mine"),
    ]


def test_manifest_samples_reach_adapters_that_are_in_the_catalog_already(bench: Bench) -> None:
    bench.repo("ann/one", card="---\nwidget: [{text: from the card}]\n---\n")
    write_adapter(bench.folder / "hub/ann/many/a", 1, card=None)
    write_adapter(bench.folder / "hub/ann/many/b", 2, card=None)
    bench.sync("ann/one", "ann/many/a")
    give(bench, "ann/one", "mine")
    manifest = bench.folder / "mine.toml"
    head = (
        'name = "mine"\ntitle = "t"\ndescription = "d"\nbase_model = "owner/base"\nlicence = "mit"\nconfidence = "A"\n'
        'repos = ["ann/one", "ann/many"]\n'
    )
    for text in ("first", "second"):
        rows = "".join(f'[[samples]]\nrepo = "{repo}"\ninput = "{text}"\n' for repo in ("ann/one", "ann/many"))
        manifest.write_text(head + rows)
        summary = bench.sync(collection=manifest)
        assert outcomes(summary)["ann/one"] == "unchanged"
        reviews = [f"review {number}" for number in range(3)]
        assert inputs(stored(bench, "ann/one")) == ["mine", *reviews, text, "from the card"]
        assert inputs(stored(bench, "ann/many", "a")) == inputs(stored(bench, "ann/many", "b")) == [*reviews, text]


def test_widget_of_a_shared_card_is_not_taken_for_its_subfolders(bench: Bench) -> None:
    top = bench.folder / "hub" / "ann" / "many"
    write_adapter(top / "own", 1, card="---\nwidget: [{text: mine}]\n---\n")
    write_adapter(top / "bare", 2, card=None)
    for name in ("own", "bare"):
        (top / name / "samples.jsonl").unlink()
    (top / "README.md").write_text("---\nwidget: [{text: of all}]\n---\n")
    bench.sync("ann/many")
    assert inputs(stored(bench, "ann/many", "own")) == ["mine"]
    assert stored(bench, "ann/many", "bare") == []


def give(bench: Bench, repo_id: str, *texts: str) -> None:
    rows = [Sample(text, "mine", "sample", "file mine.jsonl") for text in texts]
    with bench.store.write() as session:
        add_given(session, bench.adapter(repo_id).id, rows)


def test_given_samples_stay_through_every_kind_of_sync(bench: Bench) -> None:
    folder = bench.repo("ann/one")
    bench.sync("ann/one")
    give(bench, "ann/one", "mine", "review 1")
    kept = ["mine", "review 1"]
    assert outcomes(bench.sync("ann/one")) == {"ann/one": "unchanged"}
    assert inputs(stored(bench, "ann/one")) == [*kept, "review 0", "review 2"]

    first = bench.adapter("ann/one").id
    write_rows(folder / "samples.jsonl", ["other"])
    assert outcomes(bench.sync("ann/one")) == {"ann/one": "updated"}
    assert bench.adapter("ann/one").id == first
    assert inputs(stored(bench, "ann/one")) == [*kept, "other"]

    write_adapter(folder, seed=9)
    assert outcomes(bench.sync("ann/one")) == {"ann/one": "updated"}
    assert bench.adapter("ann/one").id != first
    assert inputs(stored(bench, "ann/one")) == [*kept, "review 0", "review 2"]

    second = bench.adapter("ann/one")
    (Path(second.path) / "adapter_model.safetensors").unlink()
    assert outcomes(bench.sync("ann/one")) == {"ann/one": "updated"}
    assert (bench.adapter("ann/one").id, bench.adapter("ann/one").revision) == (second.id, second.revision)
    assert inputs(stored(bench, "ann/one")) == [*kept, "review 0", "review 2"]

    (bench.folder / "hub/ann/one").rename(bench.folder / "hub/ann/two")
    bench.hub.renames["ann/one"] = "ann/two"
    bench.sync("ann/one")
    assert bench.adapter("ann/two").id == second.id
    assert inputs(stored(bench, "ann/two")) == [*kept, "review 0", "review 2"]


def test_given_samples_of_a_local_folder_stay_when_it_changes(bench: Bench) -> None:
    folder = write_adapter(bench.folder / "mine")
    bench.sync(folder)
    give(bench, str(folder), "mine")
    write_adapter(folder, seed=5)
    assert outcomes(bench.sync(folder)) == {str(folder): "updated"}
    assert inputs(stored(bench, str(folder)))[0] == "mine"


def test_users_file_is_taken_whole(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"q": "a", "a": "b"}\n\n{"q": "c", "a": ""}\n{"q": "a", "a": "again"}\n')
    reading = read_sample_file(path, "sample", 200, Fields("q", "a"))
    assert reading.samples == (
        Sample("a", "b", "sample", "file mine.jsonl"),
        Sample("c", "", "sample", "file mine.jsonl"),
    )
    assert reading.left_out == 0
    with pytest.raises(SamplesError, match=r"1 lines .*\n  - line 3: a is missing or empty"):
        read_sample_file(path, "test", 200, Fields("q", "a", needs_output=True))


def test_every_bad_line_of_a_users_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    good = b'{"input": "good", "output": "x"}'
    path.write_bytes(b"\n".join([good, *BAD_LINES, good, b"not json", b"not json"]))
    with pytest.raises(SamplesError) as caught:
        read_sample_file(path, "sample", 200, Fields())
    head, *lines = str(caught.value).splitlines()
    assert head == f"12 lines of {path} are no samples, nothing was added:"
    assert lines[0] == "  - line 2, 13-14: not JSON: Expecting value at column 1"
    assert lines[1] == '  - line 3-4: expected {"input": text, "output": text}'
    named = ",".join(line.split(":")[0].removeprefix("  - line ") for line in lines).replace(" ", "").split(",")
    spans = [span.split("-") for span in named]
    assert sorted(n for span in spans for n in range(int(span[0]), int(span[-1]) + 1)) == [*range(2, 12), 13, 14]


def test_choice_from_a_users_file_keeps_at_least_what_a_method_compares(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "mine.jsonl", [f"row {number}" for number in range(500)])
    twenty = read_sample_file(path, "sample", SAMPLES_LEAST, Fields())
    assert (len(twenty.samples), twenty.left_out) == (20, 480)
    # A prefix of a larger choice is the smaller choice.
    assert read_sample_file(path, "sample", 100, Fields()).samples[:20] == twenty.samples
    for limit in (SAMPLES_LEAST - 1, SAMPLES_PER_SPLIT + 1):
        with pytest.raises(SamplesError, match=f"limit is {limit}, expected 20 to 1000"):
            read_sample_file(path, "sample", limit, Fields())


def test_users_file_that_cannot_be_read_or_is_empty(tmp_path: Path) -> None:
    with pytest.raises(SamplesError, match="cannot be read: No such file"):
        read_sample_file(tmp_path / "none.jsonl", "sample", 200, Fields())
    with pytest.raises(SamplesError, match="cannot be read: Is a directory"):
        read_sample_file(tmp_path, "sample", 200, Fields())
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(SamplesError, match=r'expected lines such as \{"question": "text"\}'):
        read_sample_file(tmp_path / "empty.jsonl", "sample", 200, Fields("question"))


def write_csv(path: Path, rows: Sequence[tuple[object, object]]) -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("sentence", "label"), *rows])
    return path


def test_dataset_of_a_file_by_format(tmp_path: Path) -> None:
    rows = [(f"sentence {number}", number % 2) for number in range(30)]
    table = datasets.Dataset.from_dict({"sentence": [row[0] for row in rows], "label": [row[1] for row in rows]})
    files = [write_csv(tmp_path / "a[1]*.csv", rows), tmp_path / "b.parquet", tmp_path / "c.jsonl", tmp_path / "d.tsv"]
    table.to_parquet(files[1])
    table.to_json(files[2])
    files[3].write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    for file in files:
        reading = read_dataset(Columns(str(file), "sentence", "label"), "sample", 200)
        origin = f"dataset {file.name}/train: sentence"
        assert reading.samples == tuple(Sample(text, str(label), "sample", origin) for text, label in rows)


def test_dataset_of_a_folder_has_splits_and_names_of_classes(tmp_path: Path) -> None:
    kinds = datasets.Features({"text": datasets.Value("string"), "mood": datasets.ClassLabel(names=["bad", "good"])})
    for split, moods in (("train", [0, 1, 1]), ("test", [1, -1, 0])):
        rows = {"text": [f"{split} {number}" for number in range(3)], "mood": moods}
        (tmp_path / "moods").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=kinds).to_parquet(tmp_path / "moods" / f"{split}.parquet")
    columns = Columns(str(tmp_path / "moods"), "text", "mood", split="test")
    reading = read_dataset(columns, "test", 200)
    assert [(sample.input, sample.output) for sample in reading.samples] == [("test 0", "good"), ("test 2", "bad")]
    assert (reading.unusable, reading.reason) == (1, "a test sample needs an output")
    assert {sample.origin for sample in reading.samples} == {"dataset moods/test: text"}
    with pytest.raises(SamplesError, match=r"split dev cannot be read: .*\['train', 'test'\]"):
        read_dataset(Columns(str(tmp_path / "moods"), "text", split="dev"), "sample", 200)
    with pytest.raises(SamplesError, match="name their column with --output-column"):
        read_dataset(Columns(str(tmp_path / "moods"), "text", split="test"), "test", 200)


def test_choice_from_a_dataset_is_spread_over_all_of_its_rows(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "sorted.csv", [(f"sentence {number}", number // 1000) for number in range(5000)])
    reading = read_dataset(Columns(str(path), "sentence", "label"), "sample", 100)
    assert (len(reading.samples), reading.left_out) == (100, 4900)
    assert {sample.output for sample in reading.samples[:20]} == {"0", "1", "2", "3", "4"}
    assert read_dataset(Columns(str(path), "sentence", "label"), "sample", 20).samples == reading.samples[:20]


def test_rows_of_a_dataset_that_give_no_sample_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    rows = [{"q": "a", "a": None}, {"q": None, "a": "x"}, {"q": " ", "a": "x"}, {"q": "b", "a": "y"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reading = read_dataset(Columns(str(path), "q", "a"), "sample", 200)
    assert [(sample.input, sample.output) for sample in reading.samples] == [("a", ""), ("b", "y")]
    assert (reading.unusable, reading.reason) == (2, "column 'q' holds a NoneType, expected text")


def test_datasets_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "a.csv", [(1, "x"), (2, "y")])
    nested = tmp_path / "nested.jsonl"
    nested.write_text('{"q": "a", "a": {"text": ["b"]}}\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "header.csv").write_text("sentence,label\n")
    (tmp_path / "notes.docx").write_bytes(b"x")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "code.py").write_text("raise SystemExit('it ran')")
    cases = [
        (Columns(str(table), "text", "mood"), "has no column 'text' or 'mood'; its columns are: sentence, label"),
        (Columns(str(table), "sentence"), "none of its 2 rows gives one, the first because column 'sentence' holds a"),
        (Columns(str(nested), "q", "a"), "column 'a' holds a dict, expected text or a number"),
        (Columns(str(tmp_path / "broken.parquet"), "q"), "cannot be read: "),
        (Columns(str(tmp_path / "header.csv"), "sentence"), "it has no rows"),
        (Columns(str(tmp_path / "notes.docx"), "q"), r"expected OWNER/NAME on the Hub, a folder, or a file \(.csv"),
        (Columns(str(tmp_path / "none.csv"), "q"), "expected OWNER/NAME on the Hub"),
        (Columns("json", "q"), "expected OWNER/NAME on the Hub"),
        (Columns(str(table), "sentence", config="x"), "is a file, which has no configuration 'x'"),
        (Columns(str(tmp_path / "code"), "q"), "scripts are no longer supported"),
    ]
    for columns, message in cases:
        with pytest.raises(SamplesError, match=message):
            read_dataset(columns, "sample", 200)


def test_without_the_library_one_error_names_the_extra(tmp_path: Path) -> None:
    probe = (
        "import sys; sys.modules['datasets'] = None\n"
        "from hub_router.errors import SamplesError\n"
        "from hub_router.sync.dataset import Columns, read_dataset\n"
        "try:\n    read_dataset(Columns('owner/name', 'text'), 'sample', 200)\n"
        "except SamplesError as error:\n    print(error)\n"
        "print([name for name in ('pandas', 'torch', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    said, loaded = done.stdout.splitlines()
    assert "pip install 'hub-router[datasets]'" in said
    assert loaded == "[]"
