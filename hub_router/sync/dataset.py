"""Samples from the columns of a dataset; the only caller of the ``datasets`` library, which is an extra.

A dataset of the Hub is read row by row and only the split asked for, so nothing of it is kept on disk. The library runs
no code of a dataset: it refuses scripts and pickles.
"""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import NoneType
from typing import Any

import httpx2

from hub_router.errors import SamplesError
from hub_router.progress import SILENT, Progress
from hub_router.records import Sample
from hub_router.store.samples import choose
from hub_router.sync.samples import Reading, check_limit, cut_origin, text_fault
from hub_router.sync.targets import is_repo_id

# How the library calls the reader of a file, by suffix.
READERS: Mapping[str, dict[str, str]] = {
    ".csv": {"path": "csv"},
    ".tsv": {"path": "csv", "sep": "\t"},
    ".json": {"path": "json"},
    ".jsonl": {"path": "json"},
    ".parquet": {"path": "parquet"},
}
_EXPECTED = f"expected OWNER/NAME on the Hub, a folder, or a file ({' '.join(READERS)})"
_STEP = 100


@dataclass(frozen=True)
class Columns:
    """Where a dataset holds samples.

    Args:
        name (str): ``owner/name`` on the Hub, a folder or a file.
        input (str): column with the inputs.
        output (str | None): column with the outputs; None leaves them empty.
        config (str | None): configuration, for datasets that have several.
        split (str): the dataset's own split.
    """

    name: str
    input: str
    output: str | None = None
    config: str | None = None
    split: str = "train"

    @property
    def origin(self) -> str:
        """What is stored as the origin of the samples, such as ``dataset owner/name[config]/train: question``."""
        named = Path(self.name).name if Path(self.name).expanduser().exists() else self.name
        return cut_origin(f"dataset {named}{f'[{self.config}]' if self.config else ''}/{self.split}: {self.input}")


def read_dataset(columns: Columns, split: str, limit: int, progress: Progress = SILENT) -> Reading:
    """Read samples from a dataset.

    Rows that give no sample (an empty input, an input or output that is no text, one that is too long) are counted
    and left out, for a user cannot mend them. Outputs may be numbers, and names of classes for a column of labels.

    Args:
        columns (Columns): dataset and columns.
        split (str): ``sample`` or ``test``; for the latter a row without output gives no sample.
        limit (int): at most this many samples are kept, chosen by :func:`hub_router.store.samples.choose` from all rows
            of the dataset's split.
        progress (Progress): where to report; counts rows.

    Returns:
        Reading: origin ``dataset NAME[config]/split: column``.

    Raises:
        SamplesError: the library is not installed, the dataset cannot be read, has no such column or no usable row.
    """
    check_limit(limit)
    if split == "test" and columns.output is None:
        raise SamplesError("test samples need outputs to be scored against; name their column with --output-column")
    faults: Counter[str] = Counter()
    with TemporaryDirectory() as scratch, progress.task("Reading rows", None) as advance:
        rows, classes = _open(columns, scratch)
        found = _samples(_counted(rows, advance), columns, split, classes, faults)
        chosen, left_out = choose(found, limit)
    reason = next(iter(faults), "")
    if not chosen:
        why = f"none of its {faults.total()} rows gives one, the first because {reason}" if faults else "it has no rows"
        raise SamplesError(f"{_place(columns)} holds no samples: {why}")
    return Reading(tuple(chosen), left_out, faults.total(), reason)


def _open(columns: Columns, scratch: str) -> tuple[Iterator[Mapping[str, Any]], Sequence[str]]:
    """The rows, and the names of the classes where the output column holds their numbers."""
    dataset, held = load(columns, scratch)
    wanted = list(dict.fromkeys(name for name in (columns.input, columns.output) if name is not None))
    absent = [name for name in wanted if name not in held]
    if held and absent:
        raise SamplesError(
            f"{_place(columns)} has no column {' or '.join(map(repr, absent))}; its columns are: {', '.join(held)}"
        )
    feature = (dataset.features or {}).get(columns.output)
    return _rows(dataset.select_columns(wanted), columns), getattr(feature, "names", None) or ()


def _rows(dataset: Iterable[Mapping[str, Any]], columns: Columns) -> Iterator[Mapping[str, Any]]:
    with translated(columns):
        yield from dataset


def load(columns: Columns, scratch: str) -> tuple[Any, Sequence[str]]:
    """One split of a dataset, whose rows are read as they are asked for.

    Args:
        columns (Columns): of the dataset.
        scratch (str): folder for what the library makes of local files.

    Returns:
        tuple[datasets.IterableDataset, Sequence[str]]: the split, and its columns; none where it has no rows.

    Raises:
        SamplesError: the library is not installed, or the dataset cannot be found, reached or read.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise SamplesError(
            f"a dataset is read with the datasets library, which is not installed ({error}); "
            "run: pip install 'hub-router[datasets]'"
        ) from error
    source = _source(columns, scratch)
    with translated(columns):
        dataset = datasets.load_dataset(**source, split=columns.split, streaming=True)
        # Without a schema the first row tells the columns; with one no row is read, for it may hold images to decode.
        return dataset, dataset.column_names or list(next(iter(dataset), {}))


@contextmanager
def translated(columns: Columns) -> Iterator[None]:
    """Turn what the library raises for a dataset that it cannot find, reach or read into one error.

    Args:
        columns (Columns): of the dataset.

    Yields:
        None: while the library is at work.

    Raises:
        SamplesError: with what the library said.
    """
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, httpx2.HTTPError, OSError, RuntimeError, TypeError, ValueError) as error:
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise SamplesError(f"{_place(columns)} cannot be read: {said}") from error


def _source(columns: Columns, scratch: str) -> dict[str, Any]:
    """Arguments that tell the library which dataset is meant."""
    path = Path(columns.name).expanduser()
    if path.is_dir():
        return {"path": str(path.resolve()), "name": columns.config, "cache_dir": scratch}
    if path.is_file() and path.suffix in READERS and columns.config is None:
        # The library would take brackets and stars in a file's name for a pattern.
        return {**READERS[path.suffix], "data_files": glob.escape(str(path.resolve())), "cache_dir": scratch}
    if path.is_file() and path.suffix in READERS:
        raise SamplesError(f"dataset {columns.name} is a file, which has no configuration {columns.config!r}")
    if path.is_file() or not is_repo_id(columns.name):
        raise SamplesError(f"dataset {columns.name!r} cannot be read; {_EXPECTED}")
    return {"path": columns.name, "name": columns.config}


def _samples(
    rows: Iterator[Mapping[str, Any]], columns: Columns, split: str, classes: Sequence[str], faults: Counter[str]
) -> Iterator[Sample]:
    """The samples that rows give; the reasons of those that give none are counted in ``faults``."""
    origin = columns.origin
    for row in rows:
        text = row.get(columns.input)
        value = row.get(columns.output) if columns.output else None
        if classes and isinstance(value, int):
            # Splits without labels hold -1.
            value = classes[value] if 0 <= value < len(classes) else None
        output = "" if value is None else str(value)
        if not isinstance(text, str):
            faults[f"column {columns.input!r} holds a {type(text).__name__}, expected text"] += 1
        elif not isinstance(value, (str, int, float, NoneType)):
            faults[f"column {columns.output!r} holds a {type(value).__name__}, expected text or a number"] += 1
        elif split == "test" and not output.strip():
            faults["a test sample needs an output"] += 1
        elif fault := text_fault(text, output):
            faults[fault] += 1
        else:
            yield Sample(text, output, split, origin)


def _counted(rows: Iterator[Mapping[str, Any]], advance: Callable[[int], None]) -> Iterator[Mapping[str, Any]]:
    for number, row in enumerate(rows, 1):
        if number % _STEP == 0:
            advance(_STEP)
        yield row


def _place(columns: Columns) -> str:
    return f"dataset {columns.name}, split {columns.split}"
