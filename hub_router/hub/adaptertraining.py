"""Training of one adapter of PEFT on the data of many tasks, into a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hub_router.errors import TrainingError
from hub_router.hub.composing import load_base
from hub_router.hub.trainingdata import TrainingData, encoded_examples, read_examples
from hub_router.hub.trainingoptions import adapter_options
from hub_router.hub.trainingpool import samples_of
from hub_router.progress import Progress
from hub_router.store import selection
from hub_router.store.selection import AdapterRef
from hub_router.store.session import Store

if TYPE_CHECKING:
    from hub_router.records import AdapterRecord, Sample
    from hub_router.training.data import Example
    from hub_router.training.settings import TrainingSettings


@dataclass(frozen=True)
class AdapterSummary:
    """What ``train`` made into a folder.

    Args:
        out (Path): folder of the adapter; of several trained together, the folder of their folders.
        kind (str): ``shared``, ``ewora``, ``experts``, ``lora-mixer`` or ``mixlora``.
        examples (int): that were learned from, or set aside.
        steps (int): of the optimizer.
        loss (float | None): over the last tenth of the steps, nats per answer token; None where nothing was trained.
        validation (float | None): on the examples that were set aside.
        notes (tuple[str, ...]): what to know of the run, a line each.
        adapters (tuple[str, ...]): names of those trained together; each has a folder of its name.
    """

    out: Path
    kind: str
    examples: int
    steps: int
    loss: float | None
    validation: float | None
    notes: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()


def train_adapter(
    store: Store,
    kind: str,
    out: str | Path,
    adapters: Mapping[str, AdapterRef] | Iterable[AdapterRef],
    *,
    base_model: str | None,
    data: TrainingData,
    options: Mapping[str, Any],
    log: str | Path | None,
    device: str | None,
    dry_run: bool,
    restart: bool,
    progress: Progress,
) -> AdapterSummary:
    """See :meth:`hub_router.hub.Hub.train_adapter`; one adapter."""
    from hub_router.training.checkpoint import remove
    from hub_router.training.lock import held
    from hub_router.training.peft_adapter import fit_adapter

    settings, config = adapter_options(kind, options)
    _, base, examples, notes = read_tasks(store, kind, adapters, base_model, data, labelled=False, progress=progress)
    folder = Path(out).expanduser().absolute()
    checkpoint = checkpoint_of(folder)
    if dry_run:
        steps, more = checked_run(base, config, settings, examples, folder, None if restart else checkpoint)
        return AdapterSummary(folder, kind, len(examples), steps, None, None, (*notes, *more))
    with held(checkpoint):
        if restart:
            remove(checkpoint)
        model, tokenizer = load_base(base, device)
        outcome = fit_adapter(
            model,
            tokenizer,
            examples,
            config,
            settings=settings,
            out=folder,
            checkpoint=checkpoint,
            log=log,
            progress=progress,
        )
    return AdapterSummary(folder, kind, len(examples), outcome.steps, outcome.loss, outcome.validation, notes)


def read_tasks(
    store: Store,
    kind: str,
    adapters: Mapping[str, AdapterRef] | Iterable[AdapterRef],
    base_model: str | None,
    data: TrainingData,
    *,
    labelled: bool,
    progress: Progress,
) -> tuple[Mapping[str, AdapterRecord], str, list[Example], tuple[str, ...]]:
    """The data of a run that needs no adapters of the catalog, and its base model.

    Args:
        store (Store): catalog.
        kind (str): what is trained, for the message.
        adapters (Mapping | Iterable): whose samples are learned; may be none.
        base_model (str | None): base model; None takes the one that all adapters name.
        data (TrainingData): where it is.
        labelled (bool): whether every example must name one of the adapters, where there are any.
        progress (Progress): counts rows of a dataset.

    Returns:
        tuple: the adapters by name, the base model, the examples, and what to know of them.

    Raises:
        TrainingError: there are no adapters, and no data or no base model; or unusable data.
    """
    members: Mapping[str, AdapterRecord] = {}
    samples: dict[str, list[Sample]] = {}
    if adapters:
        with store.read() as session:
            members = selection.select(session, adapters)
            samples = samples_of(session, members)
    if not members and (data.source is None or base_model is None):
        raise TrainingError(
            f"training {kind} without adapters of the catalog needs a base model and data (--data FILE)"
        )
    examples, notes = read_examples(data, samples, members or None, labelled=labelled, progress=progress)
    return members, base_model or selection.common_base(members), examples, notes


def checkpoint_of(out: Path) -> Path:
    """Folder for the checkpoints of a run into a folder.

    Args:
        out (Path): absolute.

    Returns:
        Path: beside it.
    """
    return out.with_name(f".{out.name}.training")


def checked_run(
    base: str,
    config: Any,
    settings: TrainingSettings,
    examples: Sequence[Example],
    folder: Path,
    checkpoint: Path | None,
) -> tuple[int, tuple[str, ...]]:
    """Check all of a run that takes no weights.

    Args:
        base (str): base model.
        config (PeftConfig | None): of a new adapter; None where adapters were checked already.
        settings (TrainingSettings): of the loop.
        examples (Sequence[Example]): the data.
        folder (Path): that is to be written.
        checkpoint (Path | None): of a stopped run that would go on.

    Returns:
        tuple[int, tuple[str, ...]]: steps of the run, and a note where it would go on from a stopped one.

    Raises:
        TrainingError: the folder exists, PEFT refuses the config, or data that cannot be tokenized.
    """
    import peft

    from hub_router.composition.architecture import empty_model
    from hub_router.training.checkpoint import is_left
    from hub_router.training.data import data_hash, split
    from hub_router.training.loop import planned_steps
    from hub_router.training.peft_adapter import need_new
    from hub_router.training.recipe import Phase

    need_new(folder)
    model: Any = empty_model(base)
    tasks = list(dict.fromkeys(each.adapter for each in examples))
    encoded_examples(base, model, examples, tasks)
    try:
        if config is not None:
            peft.get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise TrainingError(f"PEFT cannot put the adapter on {base}: {error}") from error
    learned, _ = split(examples, settings.validation, settings.seed)
    of_task = [tasks.index(each.adapter) for each in learned]
    steps = planned_steps(Phase("shared", (), tuple(range(len(tasks)))), of_task, settings)
    known = {
        "settings": settings.decisive,
        "data": data_hash(examples),
    }
    left = checkpoint is not None and is_left(checkpoint, known)
    return steps, ((f"a run in {checkpoint}, stopped or still going, would go on",) if left else ())
