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
    """What ``train shared`` and ``train ewora`` made.

    Args:
        out (Path): folder of the adapter.
        kind (str): ``shared`` or ``ewora``.
        examples (int): that were learned from, or set aside.
        steps (int): of the optimizer.
        loss (float | None): over the last tenth of the steps, nats per answer token; None where nothing was trained.
        validation (float | None): on the examples that were set aside.
        notes (tuple[str, ...]): what to know of the run, a line each.
    """

    out: Path
    kind: str
    examples: int
    steps: int
    loss: float | None
    validation: float | None
    notes: tuple[str, ...] = ()


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
    """See :meth:`hub_router.hub.Hub.train_adapter`."""
    from hub_router.training.checkpoint import remove
    from hub_router.training.lock import held
    from hub_router.training.peft_adapter import fit_adapter

    settings, config = adapter_options(kind, options)
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
    examples, notes = read_examples(data, samples, members or None, labelled=False, progress=progress)
    folder = Path(out).expanduser().absolute()
    base = base_model or selection.common_base(members)
    checkpoint = folder.with_name(f".{folder.name}.training")
    if dry_run:
        steps, more = _checked(base, config, settings, examples, folder, None if restart else checkpoint)
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


def _checked(
    base: str,
    config: Any,
    settings: TrainingSettings,
    examples: Sequence[Example],
    folder: Path,
    checkpoint: Path | None,
) -> tuple[int, tuple[str, ...]]:
    """Steps of a run, after all checks that take no weights, and a note where it would go on from a stopped one."""
    import peft

    from hub_router.composition.architecture import empty_model
    from hub_router.training.checkpoint import is_left
    from hub_router.training.data import data_hash, split
    from hub_router.training.loop import planned_steps
    from hub_router.training.recipe import Phase

    if folder.exists():
        raise TrainingError(f"{folder} exists and is left as it is; name a folder that does not")
    model: Any = empty_model(base)
    tasks = list(dict.fromkeys(each.adapter for each in examples))
    encoded_examples(base, model, examples, tasks)
    try:
        peft.get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise TrainingError(f"PEFT cannot put the adapter on {base}: {error}") from error
    learned, _ = split(examples, settings.validation, settings.seed)
    of_task = [tasks.index(each.adapter) for each in learned]
    steps = planned_steps(Phase("shared", (), tuple(range(len(tasks)))), of_task, settings)
    known = {
        "settings": {key: value for key, value in settings.to_json().items() if key != "save_every"},
        "data": data_hash(examples),
    }
    left = checkpoint is not None and is_left(checkpoint, known)
    return steps, ((f"a stopped run in {checkpoint} would go on",) if left else ())
