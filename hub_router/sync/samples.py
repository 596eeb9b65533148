"""Reads example inputs and outputs of an adapter's task from JSON lines: those of a repository, and those of a user.

What a stranger's file holds is taken as far as it goes, with a note; a user's own file is taken whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hub_router.errors import SamplesError
from hub_router.records import SAMPLES_LEAST, SAMPLES_PER_SPLIT, Sample
from hub_router.store.samples import choose
from hub_router.sync.text import is_storable, storable

SPLITS = {"samples.jsonl": "sample", "test.jsonl": "test"}
SAMPLE_FILE_BYTES = 32_000_000
# A stranger's file with so many lines that are no samples is not read further.
SAMPLE_FILE_FAULTS = 10_000
TEXT_CHARACTERS = 20_000
_ORIGIN_CHARACTERS = 255


@dataclass(frozen=True)
class Fields:
    """Where a line of JSON holds a sample.

    Args:
        input (str): name of the field with the input.
        output (str): name of the field with the output.
        needs_output (bool): whether a line without output is a fault.
    """

    input: str = "input"
    output: str = "output"
    needs_output: bool = False


@dataclass(frozen=True)
class Reading:
    """What was read from a source that a user named.

    Args:
        samples (tuple[Sample, ...]): those chosen, each input once.
        left_out (int): samples left out for the limit.
        unusable (int): rows that give no sample.
        reason (str): why the first of them gives none.
    """

    samples: tuple[Sample, ...]
    left_out: int
    unusable: int = 0
    reason: str = ""


def read_samples(folder: Path) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
    """Read ``samples.jsonl`` and ``test.jsonl`` of a folder; each line is ``{"input": ..., "output": ...}``.

    Args:
        folder (Path): folder of an adapter; files that are missing count as empty.

    Returns:
        tuple[tuple[Sample, ...], tuple[str, ...]]: at most ``SAMPLES_PER_SPLIT`` samples per file, each input once,
            chosen by :func:`hub_router.store.samples.choose`, and a note for each file of which something was left out.
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
        faults: list[tuple[int, str]] = []
        lines = _parsed(path, split, name, Fields(), faults, SAMPLE_FILE_FAULTS)
        found, left_out = choose(lines, SAMPLES_PER_SPLIT)
        samples += found
        if faults:
            rest = "; the lines after these were not read" if len(faults) == SAMPLE_FILE_FAULTS else ""
            notes.append(f"{len(faults)} lines of {name} left out (line {faults[0][0]}: {faults[0][1]}){rest}")
        if left_out:
            notes.append(
                f"{name}: {left_out} samples left out, {SAMPLES_PER_SPLIT} kept whose inputs have the smallest sha256"
            )
    return tuple(samples), tuple(notes)


def read_sample_file(path: Path, split: str, limit: int, fields: Fields) -> Reading:
    """Read the samples of a user's JSON lines file.

    Args:
        path (Path): the file.
        split (str): ``sample`` or ``test``.
        limit (int): at most this many are kept, chosen by :func:`hub_router.store.samples.choose`.
        fields (Fields): what the fields of a line are called.

    Returns:
        Reading: origin ``file NAME``.

    Raises:
        SamplesError: the file cannot be read, holds no sample, or has lines that are none; names every such line.
    """
    check_limit(limit)
    faults: list[tuple[int, str]] = []
    origin = cut_origin(f"file {path.name}")
    try:
        chosen, left_out = choose(_parsed(path, split, origin, fields, faults), limit)
    except OSError as error:
        raise SamplesError(f"{path} cannot be read: {error.strerror or error}") from error
    if faults:
        lines = "\n".join(f"  - {line}" for line in _by_reason(faults))
        raise SamplesError(f"{len(faults)} lines of {path} are no samples, nothing was added:\n{lines}")
    if not chosen:
        raise SamplesError(f'{path} holds no samples, expected lines such as {{"{fields.input}": "text"}}')
    return Reading(tuple(chosen), left_out)


def check_limit(limit: int) -> None:
    """Refuse a limit that would keep too few or too many samples.

    Raises:
        SamplesError: it is not between ``SAMPLES_LEAST`` and ``SAMPLES_PER_SPLIT``.
    """
    if not SAMPLES_LEAST <= limit <= SAMPLES_PER_SPLIT:
        raise SamplesError(
            f"limit is {limit}, expected {SAMPLES_LEAST} to {SAMPLES_PER_SPLIT}; to keep fewer samples than "
            f"{SAMPLES_LEAST}, give a file that holds no more"
        )


def cut_origin(origin: str) -> str:
    """An origin as the catalog holds it."""
    return storable(origin)[:_ORIGIN_CHARACTERS]


def text_fault(text: str, output: str) -> str:
    """Why two texts are no sample that the catalog keeps, empty if they are one.

    Args:
        text (str): input.
        output (str): expected answer; may be empty.
    """
    if not text.strip():
        return "the input is empty"
    if max(len(text), len(output)) > TEXT_CHARACTERS:
        return f"longer than {TEXT_CHARACTERS} characters"
    if not is_storable(text + output):
        return "holds a NUL character or half of a surrogate pair"
    return ""


def _parsed(
    path: Path, split: str, origin: str, fields: Fields, faults: list[tuple[int, str]], most: int | None = None
) -> Iterator[Sample]:
    """The samples of a file; lines that are none go to ``faults`` as (number, reason), until there are ``most``."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            found = _texts(line, fields)
            if isinstance(found, str):
                faults.append((number, found))
                if len(faults) == most:
                    return
            else:
                yield Sample(*found, split, origin)


def _texts(line: bytes, fields: Fields) -> tuple[str, str] | str:
    """Input and output of a line, or why there are none."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at column {error.colno}"
    # RecursionError: thousands of opening brackets.
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    text = row.get(fields.input) if isinstance(row, dict) else None
    if not isinstance(text, str):
        return f'expected {{"{fields.input}": text, "{fields.output}": text}}'
    output = row.get(fields.output, "")
    if not isinstance(output, str):
        return f"{fields.output} is a {type(output).__name__}, expected text"
    if fields.needs_output and not output.strip():
        return f"{fields.output} is missing or empty"
    return text_fault(text, output) or (text, output)


def _by_reason(faults: Sequence[tuple[int, str]]) -> list[str]:
    """Every bad line's number, as ranges, by reason."""
    ranges: dict[str, list[list[int]]] = {}
    for number, reason in faults:
        own = ranges.setdefault(reason, [])
        if own and own[-1][1] == number - 1:
            own[-1][1] = number
        else:
            own.append([number, number])
    return [
        f"line {', '.join(str(first) if first == last else f'{first}-{last}' for first, last in own)}: {reason}"
        for reason, own in ranges.items()
    ]
