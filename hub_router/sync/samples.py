"""Reads example inputs and outputs of an adapter's task from JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

from hub_router.records import Sample
from hub_router.sync.text import is_storable

SPLITS = {"samples.jsonl": "sample", "test.jsonl": "test"}
SAMPLE_FILE_BYTES = 32_000_000
SAMPLES_PER_SPLIT = 1_000
TEXT_CHARACTERS = 20_000


def read_samples(folder: Path) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
    """Read ``samples.jsonl`` and ``test.jsonl`` of a folder; each line is ``{"input": ..., "output": ...}``.

    Args:
        folder (Path): folder of an adapter; files that are missing count as empty.

    Returns:
        tuple[tuple[Sample, ...], tuple[str, ...]]: at most ``SAMPLES_PER_SPLIT`` samples per file, and a note for each
            file of which something was left out.
    """
    samples: list[Sample] = []
    notes: list[str] = []
    for name, split in SPLITS.items():
        path = folder / name
        if not path.is_file():
            continue
        if path.stat().st_size > SAMPLE_FILE_BYTES:
            notes.append(f"{name} ignored: {path.stat().st_size} bytes, at most {SAMPLE_FILE_BYTES} are read")
            continue
        found, note = _read(path, split)
        samples += found
        notes += note
    return tuple(samples), tuple(notes)


def _read(path: Path, split: str) -> tuple[list[Sample], list[str]]:
    samples: list[Sample] = []
    faults: list[str] = []
    beyond = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if len(samples) == SAMPLES_PER_SPLIT:
                beyond += 1
                continue
            sample = _sample(line, split, path.name)
            if isinstance(sample, Sample):
                samples.append(sample)
            else:
                faults.append(f"line {number}: {sample}")
    notes = []
    if faults:
        notes.append(f"{len(faults)} lines of {path.name} left out ({faults[0]})")
    if beyond:
        notes.append(f"{path.name}: only the first {SAMPLES_PER_SPLIT} samples kept, {beyond} left out")
    return samples, notes


def _sample(line: bytes, split: str, origin: str) -> Sample | str:
    """The sample of a line, or why there is none."""
    try:
        row = json.loads(line)
    # RecursionError: thousands of opening brackets.
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if not isinstance(row, dict) or not isinstance(row.get("input"), str) or not row["input"].strip():
        return 'expected {"input": text, "output": text}'
    output = row.get("output", "")
    if not isinstance(output, str):
        return f"output is a {type(output).__name__}, expected text"
    if max(len(row["input"]), len(output)) > TEXT_CHARACTERS:
        return f"longer than {TEXT_CHARACTERS} characters"
    if not is_storable(row["input"] + output):
        return "holds a NUL character or half of a surrogate pair"
    return Sample(row["input"], output, split, origin)
