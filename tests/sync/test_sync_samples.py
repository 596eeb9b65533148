from __future__ import annotations

import json
from pathlib import Path

from hub_router.records import Sample
from hub_router.sync.samples import SAMPLES_PER_SPLIT, read_samples


def test_both_splits(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text('{"input": "a", "output": "b"}\n\n{"input": " c "}\n')
    (tmp_path / "test.jsonl").write_text('{"input": "d", "output": "e", "other": 1}')
    samples, notes = read_samples(tmp_path)
    assert samples == (
        Sample("a", "b", "sample", "samples.jsonl"),
        Sample(" c ", "", "sample", "samples.jsonl"),
        Sample("d", "e", "test", "test.jsonl"),
    )
    assert notes == ()


def test_no_files(tmp_path: Path) -> None:
    assert read_samples(tmp_path) == ((), ())


def test_bad_lines_are_counted_and_the_first_is_explained(tmp_path: Path) -> None:
    lines = [
        b'{"input": "good", "output": "x"}',
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
    (tmp_path / "samples.jsonl").write_bytes(b"\n".join(lines))
    samples, notes = read_samples(tmp_path)
    assert [sample.input for sample in samples] == ["good"]
    assert len(notes) == 1
    assert notes[0].startswith("10 lines of samples.jsonl left out (line 2: not JSON")


def test_samples_beyond_the_cap_are_cut(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"input": str(number), "output": ""}) + "\n" for number in range(SAMPLES_PER_SPLIT + 5))
    (tmp_path / "test.jsonl").write_text(rows)
    samples, notes = read_samples(tmp_path)
    assert len(samples) == SAMPLES_PER_SPLIT
    assert samples[-1].input == str(SAMPLES_PER_SPLIT - 1)
    assert notes == (f"test.jsonl: only the first {SAMPLES_PER_SPLIT} samples kept, 5 left out",)


def test_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "samples.jsonl").open("wb") as stream:
        stream.truncate(32_000_001)
    assert read_samples(tmp_path) == ((), ("samples.jsonl ignored: 32000001 bytes, at most 32000000 are read",))
