"""Training over catalogued adapters: gates become the next version of a prototype set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from hub_router.errors import HubRouterError, TrainingError
from hub_router.hub.composing import checked_pool, load_base, pinned, pool_features
from hub_router.hub.prototypes import PrototypeSets, check_name
from hub_router.progress import Progress
from hub_router.settings import Settings
from hub_router.store import adapters as adapter_queries
from hub_router.store import selection
from hub_router.store.selection import AdapterRef
from hub_router.store.session import Store

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from hub_router.records import AdapterRecord, Sample
    from hub_router.training.data import Example
    from hub_router.training.recipe import Recipe
    from hub_router.training.settings import TrainingSettings


@dataclass(frozen=True)
class TrainingSummary:
    """What ``train`` made.

    Args:
        name (str): of the prototype set.
        version (int | None): of this run; None where nothing was trained.
        method (str): that was trained.
        adapters (tuple[str, ...]): names in the pool.
        examples (int): that were learned from, or set aside.
        steps (int): of the optimizer.
        loss (float | None): over the last tenth of the steps, nats per answer token.
        validation (float | None): on the examples that were set aside.
    """

    name: str
    version: int | None
    method: str
    adapters: tuple[str, ...]
    examples: int
    steps: int
    loss: float | None
    validation: float | None


def train(
    store: Store,
    home: Settings,
    method: str,
    name: str,
    adapters: Mapping[str, AdapterRef] | Iterable[AdapterRef],
    *,
    base_model: str | None,
    data: str | Path | None,
    options: Mapping[str, Any],
    log: str | Path | None,
    device: str | None,
    dry_run: bool,
    restart: bool,
    progress: Progress,
) -> TrainingSummary:
    """See :meth:`hub_router.hub.Hub.train`."""
    from hub_router.composition.build import compose
    from hub_router.routing.registry import create
    from hub_router.training.checkpoint import remove
    from hub_router.training.fit import fit
    from hub_router.training.registry import create_recipe

    settings, own, hyperparameters = _sorted_out(method, options)
    recipe = create_recipe(method, own)
    given = _settings(recipe.settings, settings)
    check_name(name)
    create(method, hyperparameters)
    with store.read() as session:
        hyperparameters = pinned(session, hyperparameters)
        router = create(method, hyperparameters)
        members = selection.select(session, adapters)
        _refuse_doubles(members)
        features = pool_features(session, members, [router])
        samples = _samples(session, members)
    examples = _examples(data, samples, members)
    lacking = [each for each in members if not any(example.adapter == each for example in examples)]
    if method == "phatgoose" and lacking:
        raise TrainingError(
            "phatgoose trains each adapter's gate on its own task, and there are no examples of: "
            f"{', '.join(lacking)}; give some, or leave these adapters out"
        )
    base = base_model or selection.common_base(members)
    pool = checked_pool(members, base, router, features)
    names = tuple(members)
    if dry_run:
        steps = _planned(recipe, names, examples, given)
        return TrainingSummary(name, None, method, names, len(examples), steps, None, None)
    # A set's name may be "..", its folder not.
    folder = home.home / "training" / f"{quote(name, safe='')}.run"
    if restart:
        remove(folder)
    model, tokenizer = load_base(base, device)
    routed = compose(model, pool, method, tokenizer=tokenizer, features=features, **hyperparameters)
    result = fit(
        routed, examples, settings=given, checkpoint=folder, keep_checkpoint=True, log=log, progress=progress, **own
    )
    version = PrototypeSets(store).save(name, replace(result.prototypes, base_model=base), members)
    # Only now: a set that could not be stored need not be trained again.
    remove(folder)
    return TrainingSummary(
        name=name,
        version=version,
        method=method,
        adapters=names,
        examples=len(examples),
        steps=result.steps,
        loss=result.loss,
        validation=result.validation,
    )


@dataclass(frozen=True)
class AdapterSummary:
    """What ``train shared`` and ``train ewora`` made.

    Args:
        out (Path): folder of the adapter.
        kind (str): ``shared`` or ``ewora``.
        examples (int): that were learned from, or set aside.
        steps (int): of the optimizer.
        loss (float): over the last tenth of the steps, nats per answer token.
        validation (float | None): on the examples that were set aside.
    """

    out: Path
    kind: str
    examples: int
    steps: int
    loss: float
    validation: float | None


def train_adapter(
    store: Store,
    kind: str,
    out: str | Path,
    adapters: Mapping[str, AdapterRef] | Iterable[AdapterRef],
    *,
    base_model: str | None,
    data: str | Path | None,
    options: Mapping[str, Any],
    log: str | Path | None,
    device: str | None,
    progress: Progress,
) -> AdapterSummary:
    """See :meth:`hub_router.hub.Hub.train_adapter`."""
    from hub_router.training.data import read_jsonl
    from hub_router.training.peft_adapter import SETTINGS, fit_adapter
    from hub_router.training.settings import TrainingSettings

    loop = {each.name for each in fields(TrainingSettings)}
    settings = _settings(SETTINGS, {key: value for key, value in options.items() if key in loop})
    config = _adapter_config(kind, {key: value for key, value in options.items() if key not in loop})
    members: Mapping[str, AdapterRecord] = {}
    if adapters:
        with store.read() as session:
            members = selection.select(session, adapters)
            samples = _samples(session, members)
    if not members and (data is None or base_model is None):
        raise TrainingError(
            f"training {kind} without adapters of the catalog needs a base model and data (--data FILE)"
        )
    examples = _examples(data, samples, members) if members else read_jsonl(_file(data), None)
    folder = Path(out).expanduser().absolute()
    model, tokenizer = load_base(base_model or selection.common_base(members), device)
    checkpoint = folder.with_name(f".{folder.name}.training")
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
    return AdapterSummary(folder, kind, len(examples), outcome.steps, outcome.loss, outcome.validation)


def _adapter_config(kind: str, options: Mapping[str, Any]) -> Any:
    """PEFT's config of a kind of adapter, on all linear maps unless said otherwise."""
    import peft

    from hub_router.ewora import EworaConfig

    make = {"shared": peft.LoraConfig, "ewora": EworaConfig}[kind]
    if "peft_type" in options or not isinstance(options.get("r", 8), int):
        raise TrainingError(f"training {kind} takes an integer r, and no peft_type; got {dict(options)}")
    try:
        return make(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})
    except (TypeError, ValueError) as error:
        raise TrainingError(f"{make.__name__} cannot be made of {dict(options)}: {error}") from error


def _sorted_out(
    method: str, options: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]:
    """Options of a run as settings of the loop, options of the recipe, and hyperparameters of the method."""
    from hub_router.routing.registry import describe
    from hub_router.training.registry import recipe_options
    from hub_router.training.settings import TrainingSettings

    valid = {
        "training": tuple(each.name for each in fields(TrainingSettings)),
        f"training {method}": recipe_options(method, options.get("balance")),
        f"method {method}": tuple(each.name for each in describe(method).hyperparameters),
    }
    if strangers := [key for key in options if not any(key in names for names in valid.values())]:
        lines = "\n".join(f"  {what}: {', '.join(names)}" for what, names in valid.items() if names)
        raise TrainingError(f"there are no settings {', '.join(strangers)}; there are, of\n{lines}")
    settings, own, hyperparameters = (
        {key: value for key, value in options.items() if key in names} for names in valid.values()
    )
    return settings, own, hyperparameters


def _settings(paper: TrainingSettings, given: Mapping[str, Any]) -> TrainingSettings:
    """The paper's settings with those that were given; epochs that are asked for stand in the place of its steps."""
    return replace(paper, **({"steps": None, **given} if "epochs" in given else given))


def _refuse_doubles(members: Mapping[str, AdapterRecord]) -> None:
    """Refuse a pool that has an adapter under two names: a set could not hold both."""
    names: dict[int, list[str]] = {}
    for name, record in members.items():
        names.setdefault(record.id, []).append(name)
    doubled = [" and ".join(each) for each in names.values() if len(each) > 1]
    if doubled:
        raise TrainingError(f"one adapter stands in the pool under several names: {'; '.join(doubled)}; name it once")


def _planned(recipe: Recipe, names: Sequence[str], examples: Sequence[Example], settings: TrainingSettings) -> int:
    """Steps of all phases."""
    from hub_router.training.data import split
    from hub_router.training.loop import planned_steps

    learned, _ = split(examples, settings.validation, settings.seed)
    adapters = [names.index(each.adapter) for each in learned]
    return sum(planned_steps(phase, adapters, settings) for phase in recipe.phases(names, sorted(set(adapters))))


def _samples(session: Session, members: Mapping[str, AdapterRecord]) -> dict[str, list[Sample]]:
    return {name: list(adapter_queries.samples(session, record.id, split="sample")) for name, record in members.items()}


def _examples(
    data: str | Path | None, samples: Mapping[str, list[Sample]], members: Mapping[str, AdapterRecord]
) -> list[Example]:
    """From a file, whose lines may call an adapter by its name in the pool or its reference; else from the catalog."""
    from hub_router.training.data import from_samples, read_jsonl

    if data is None:
        examples = from_samples(samples)
        lacking = [name for name in members if not any(each.adapter == name for each in examples)]
        if lacking:
            raise TrainingError(
                f"the catalog holds no samples with an output of: {', '.join(lacking)}; add some with hub-router "
                "samples add, leave these adapters out, or give --data FILE"
            )
        return examples
    names = {record.ref: name for name, record in members.items()}
    found = read_jsonl(_file(data), [*members, *(ref for ref in names if ref not in members)])
    return [replace(each, adapter=names.get(each.adapter, each.adapter)) for each in found]


def _file(data: str | Path | None) -> Path:
    path = Path(data or "").expanduser()
    if not path.is_file():
        raise HubRouterError(f"training data {path} is no file, expected JSONL with input, output and adapter per line")
    return path
