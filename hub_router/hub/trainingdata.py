"""Data of a training run: the catalog's samples, lines of a file, or rows of a dataset, of which some may be chosen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hub_router.errors import HubRouterError, SamplesError, TrainingError
from hub_router.progress import Progress

if TYPE_CHECKING:
    from hub_router.records import AdapterRecord, Sample
    from hub_router.sync.dataset import Columns
    from hub_router.training.data import Encoded, Example

# Columns that say which adapter a row is of, where none is named.
_OF_ADAPTER = ("adapter", "task")
_STEP = 100


@dataclass(frozen=True)
class DataColumns:
    """Where a dataset holds examples.

    Args:
        input (str): column with the inputs.
        output (str): column with the outputs, text or numbers; classes give their names.
        adapter (str | None): column with the adapter that was trained on a row's task; None takes ``adapter`` or
            ``task`` where there is one.
        config (str | None): the dataset's configuration, where it has several.
        split (str): the dataset's own split.
    """

    input: str = "input"
    output: str = "output"
    adapter: str | None = None
    config: str | None = None
    split: str = "train"


@dataclass(frozen=True)
class TrainingData:
    """What to train on.

    Args:
        source (str | Path | None): JSONL file, dataset (a folder, a file such as CSV or parquet, ``owner/name`` on the
            Hub), or None for the catalog's samples.
        columns (DataColumns | None): of a dataset.
        per_task (int | None): at most this many examples of each task; a choice that is the same every time.
    """

    source: str | Path | None = None
    columns: DataColumns | None = None
    per_task: int | None = None


def read_examples(
    data: TrainingData,
    samples: Mapping[str, list[Sample]],
    members: Mapping[str, AdapterRecord] | None,
    *,
    labelled: bool,
    progress: Progress,
) -> tuple[list[Example], tuple[str, ...]]:
    """Read training data, all or none.

    Args:
        data (TrainingData): where it is.
        samples (Mapping[str, list[Sample]]): the catalog's, by name in the pool.
        members (Mapping[str, AdapterRecord] | None): the pool; None where a task may have any name.
        labelled (bool): whether every example must name an adapter of the pool.
        progress (Progress): counts rows of a dataset.

    Returns:
        tuple[list[Example], tuple[str, ...]]: the examples, and what to know of them, a line each.

    Raises:
        TrainingError: there are none, or lines or rows that are none: every one is named. Of a dataset on the Hub,
            which a user cannot mend, such rows are passed over and counted.
        SamplesError: a dataset cannot be read.
    """
    if data.per_task is not None and data.per_task < 1:
        raise TrainingError(f"per_task={data.per_task}, expected an integer of at least 1")
    names = None if members is None else callings(members)
    if data.source is None:
        if data.columns is not None:
            raise TrainingError("columns are those of a dataset, and none is given: --data DATASET")
        found, notes = _of_catalog(samples, members or {}), ()
    elif data.columns is not None or _is_dataset(data.source):
        return _of_dataset(str(data.source), data.columns or DataColumns(), data.per_task, names, labelled, progress)
    else:
        from hub_router.training.data import read_jsonl

        found, notes = read_jsonl(_file(data.source), names, labelled=labelled), ()
    chosen = choice(found, data.per_task)
    return chosen, (*notes, *_left_out(len(found) - len(chosen), data.per_task))


def callings(members: Mapping[str, AdapterRecord]) -> dict[str, str]:
    """What data may call the adapters of a pool.

    Args:
        members (Mapping[str, AdapterRecord]): by name in the pool.

    Returns:
        dict[str, str]: name in the pool by that name, by reference, and by what is left of the name without the
        beginning that all have in common, such as the task of ``owner/model-lora-TASK``.
    """
    cut = _shared_beginning(list(members)) if len(members) > 1 else 0
    short = {name[cut:]: name for name in members}
    refs = {record.ref: name for name, record in members.items()}
    return {**short, **refs, **{name: name for name in members}}


def _shared_beginning(names: Sequence[str]) -> int:
    """Length of what all names begin with, up to its last mark."""
    # The first and the last in order differ where any two do.
    first, last = min(names), max(names)
    common = next((place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), None)
    shared = first[:common] if common is not None else first
    return max(shared.rfind(mark) for mark in "-_/.") + 1


def choice(examples: Iterable[Example], most: int | None) -> list[Example]:
    """At most so many examples of each task, each input once: those whose inputs have the smallest sha256.

    Args:
        examples (Iterable[Example]): any number, read once; no more than twice the choice is held.
        most (int | None): of each task; None for all.

    Returns:
        list[Example]: in their order.
    """
    if most is None:
        return list(examples)
    kept: dict[str, dict[bytes, tuple[int, Example]]] = {}
    for number, each in enumerate(examples):
        own = kept.setdefault(each.adapter, {})
        own.setdefault(hashlib.sha256(each.input.encode()).digest(), (number, each))
        if len(own) > 2 * most:
            kept[each.adapter] = _smallest(own, most)
    chosen = [entry for own in kept.values() for entry in _smallest(own, most).values()]
    return [each for _, each in sorted(chosen, key=lambda entry: entry[0])]


def _smallest(own: dict[bytes, tuple[int, Example]], most: int) -> dict[bytes, tuple[int, Example]]:
    return {digest: own[digest] for digest in sorted(own)[:most]}


def _left_out(count: int, most: int | None) -> tuple[str, ...]:
    return (f"{count} examples are left out: at most {most} of each task, each input once",) if count else ()


def _of_catalog(samples: Mapping[str, list[Sample]], members: Mapping[str, AdapterRecord]) -> list[Example]:
    from hub_router.training.data import from_samples

    examples = from_samples(samples)
    having = {each.adapter for each in examples}
    lacking = [name for name in members if name not in having]
    if lacking:
        raise TrainingError(
            f"the catalog holds no samples with an output of: {', '.join(lacking)}; add some with hub-router "
            "samples add, leave these adapters out, or give --data FILE"
        )
    return examples


def _is_dataset(source: str | Path) -> bool:
    from hub_router.sync.dataset import READERS
    from hub_router.sync.targets import is_repo_id

    path = Path(source).expanduser()
    if path.is_file():
        return path.suffix in READERS and path.suffix not in (".json", ".jsonl")
    return path.is_dir() or (path.suffix not in READERS and is_repo_id(str(source)))


def _file(source: str | Path) -> Path:
    from hub_router.sync.dataset import READERS

    path = Path(source).expanduser()
    if not path.is_file():
        raise HubRouterError(
            f"training data {path} is no file, expected JSONL with input, output and adapter per line, or a dataset: "
            f"OWNER/NAME on the Hub, a folder, or a file ({' '.join(READERS)})"
        )
    return path


def _of_dataset(
    name: str,
    columns: DataColumns,
    most: int | None,
    names: Mapping[str, str] | None,
    labelled: bool,
    progress: Progress,
) -> tuple[list[Example], tuple[str, ...]]:
    from hub_router.training.data import Example, example_of, refuse_faults

    faults: dict[int, str] = {}
    read = 0

    def usable(rows: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
        nonlocal read
        for number, row in enumerate(rows, 1):
            found = example_of(row, names, labelled=labelled)
            if isinstance(found, Example):
                read += 1
                yield found
            else:
                faults[number] = found
            if number % _STEP == 0:
                advance(_STEP)

    with progress.task("Reading rows", None) as advance, _rows(name, columns) as rows:
        examples = choice(usable(rows), most)
    source = f"dataset {name}, split {columns.split}"
    if not examples or Path(name).expanduser().exists():
        refuse_faults(source, "row", faults, names)
    if not examples:
        raise TrainingError(f"{source} holds no rows")
    notes = _left_out(read - len(examples), most)
    if faults:
        number, fault = next(iter(faults.items()))
        notes = (f"{len(faults)} rows of {source} are no examples, the first is row {number}: {fault}", *notes)
    return examples, notes


@contextmanager
def _rows(name: str, columns: DataColumns) -> Iterator[Iterator[Mapping[str, Any]]]:
    """Rows with ``input``, ``output`` and ``adapter``."""
    from hub_router.sync.dataset import Columns, load

    place = Columns(name, columns.input, columns.output, columns.config, columns.split)
    with TemporaryDirectory() as scratch:
        dataset, held = load(place, scratch)
        label = columns.adapter or next((each for each in _OF_ADAPTER if each in held), None)
        taken = {"input": columns.input, "output": columns.output} | ({"adapter": label} if label else {})
        absent = sorted({column for column in taken.values() if column not in held})
        if held and absent:
            raise SamplesError(
                f"dataset {name}, split {columns.split} has no column {' or '.join(map(repr, absent))}; its columns "
                f"are: {', '.join(held)}"
            )
        kinds = {key: getattr((dataset.features or {}).get(column), "names", None) for key, column in taken.items()}
        yield _plain(dataset.select_columns(list(dict.fromkeys(taken.values()))), place, taken, kinds)


def _plain(
    dataset: Iterable[Mapping[str, Any]], place: Columns, taken: Mapping[str, str], kinds: Mapping[str, Any]
) -> Iterator[Mapping[str, Any]]:
    from hub_router.sync.dataset import translated

    with translated(place):
        for row in dataset:
            yield {key: _text(row.get(column), kinds[key]) for key, column in taken.items()}


def _text(value: Any, classes: Sequence[str] | None) -> Any:
    """A cell as text: of a class its name, of a number its digits; splits without labels hold the class -1."""
    if classes and isinstance(value, int):
        return classes[value] if 0 <= value < len(classes) else None
    return str(value) if isinstance(value, int | float) else value


def encoded_examples(base: str, model: Any, examples: Sequence[Example], adapters: Sequence[str]) -> list[Encoded]:
    """Tokenize data for a base model of which only the config is at hand.

    Args:
        base (str): Hub id or folder of the base model.
        model (PreTrainedModel): of that config; needs no weights.
        examples (Sequence[Example]): the data.
        adapters (Sequence[str]): names of the pool, or of the tasks.

    Returns:
        list[Encoded]: in order.

    Raises:
        TrainingError: the base model has no tokenizer, or an example cannot be learned.
    """
    from hub_router.composition.base_model import load_tokenizer
    from hub_router.composition.text import has_encoder
    from hub_router.training.data import encode

    tokenizer = load_tokenizer(base)
    if tokenizer is None:
        raise TrainingError(f"training reads text, and base model {base} has no tokenizer")
    longest = getattr(model.config, "max_position_embeddings", None)
    return encode(examples, adapters, tokenizer, longest, has_encoder(model))
