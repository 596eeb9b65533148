"""Adapters that are trained together into a folder: new ones, or those of the catalog, which stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hub_router.errors import TrainingError
from hub_router.hub.adaptertraining import AdapterSummary, checked_run, checkpoint_of, read_tasks
from hub_router.hub.composing import checked_pool, load_base, need_synced
from hub_router.hub.trainingdata import TrainingData
from hub_router.hub.trainingoptions import EXPERTS, NUMBER, adapter_config, with_given
from hub_router.progress import Progress
from hub_router.store.selection import AdapterRef
from hub_router.store.session import Store

if TYPE_CHECKING:
    from hub_router.training.data import Example
    from hub_router.training.settings import TrainingSettings


@dataclass(frozen=True, eq=False)
class _Given:
    """Options of a run by whose they are."""

    settings: TrainingSettings
    recipe: Mapping[str, Any]
    preserve: float | None
    number: int
    config: Mapping[str, Any]


def train_experts(
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
    """See :meth:`hub_router.hub.Hub.train_adapter`; several adapters, and their gates."""
    from hub_router.features import PoolFeatures
    from hub_router.routing.registry import create
    from hub_router.training.checkpoint import remove
    from hub_router.training.experts import fit_experts, fresh_experts
    from hub_router.training.lock import held

    given = _sorted_out(kind, options)
    members, base, examples, notes = read_tasks(
        store, kind, adapters, base_model, data, labelled=kind == EXPERTS, progress=progress
    )
    new = [*given.config, *(["experts"] if "experts" in options else [])]
    if members and new:
        raise TrainingError(
            f"{', '.join(new)} are settings of new adapters, and these are trained on from where they are: "
            f"{', '.join(members)}; name no adapters, or leave the settings out"
        )
    folder = Path(out).expanduser().absolute()
    checkpoint = checkpoint_of(folder)
    # Hard routing takes any pool that lora-mixer takes.
    router = create("mixlora" if kind == "mixlora" else "lora-mixer", {})
    pool = checked_pool(members, base, router, PoolFeatures()) if members else ()
    need_synced(pool, members)
    names = tuple(members) or _names(kind, given.number, examples)
    if dry_run:
        config = None if members else _config(kind, given.config, base, None)
        steps, more = checked_run(base, config, given.settings, examples, folder, None if restart else checkpoint)
        return AdapterSummary(folder, kind, len(examples), steps, None, None, (*notes, *more), names)
    with held(checkpoint):
        if restart:
            remove(checkpoint)
        model, tokenizer = load_base(base, device)
        start = pool or fresh_experts(model, names, _config(kind, given.config, base, model), given.settings.seed)
        made = fit_experts(
            model,
            tokenizer,
            examples,
            start,
            kind,
            settings=given.settings,
            preserve=given.preserve,
            out=folder,
            checkpoint=checkpoint,
            log=log,
            progress=progress,
            **given.recipe,
        )
    return AdapterSummary(folder, kind, len(examples), made.steps, made.loss, made.validation, notes, names)


def _sorted_out(kind: str, options: Mapping[str, Any]) -> _Given:
    """Refuses options that there are not."""
    from peft import LoraConfig

    from hub_router.training.experts import SETTINGS
    from hub_router.training.registry import RECIPES, recipe_options
    from hub_router.training.settings import TrainingSettings

    loop = {each.name for each in fields(TrainingSettings)}
    gated = kind != EXPERTS
    recipe = ("top_k", *recipe_options(kind, options.get("balance"))) if gated else ()
    own = ("preserve", *(("experts",) if kind == "mixlora" else ()))
    config = {each.name for each in fields(LoraConfig)} - set(recipe)
    if strangers := [name for name in options if name not in {*loop, *recipe, *own, *config}]:
        raise TrainingError(
            f"there are no settings {', '.join(strangers)} of {kind} --out; there are: "
            f"{', '.join((*own, *recipe, *sorted(loop)))}, and those of peft.LoraConfig"
        )
    number = options.get("experts", NUMBER)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise TrainingError(f"experts={number!r}, expected an integer of at least 1")

    def among(names: Iterable[str]) -> dict[str, Any]:
        return {name: value for name, value in options.items() if name in names}

    paper = RECIPES[kind].settings if gated else SETTINGS
    settings = with_given(paper, among(loop))
    return _Given(settings, among(recipe), options.get("preserve"), number, among(config - loop - {*own}))


def _names(kind: str, number: int, examples: Sequence[Example]) -> tuple[str, ...]:
    """Of new adapters: one for each task, or as many as there are to be."""
    if kind == "mixlora":
        return tuple(f"expert-{place}" for place in range(1, number + 1))
    names = tuple(dict.fromkeys(each.adapter for each in examples))
    odd = [name for name in names if not name or Path(name).name != name]
    if odd:
        raise TrainingError(
            f"new adapters are named after their tasks, and these are no names of folders: {', '.join(map(repr, odd))}"
        )
    return names


def _config(kind: str, own: Mapping[str, Any], base: str, model: Any) -> Any:
    """PEFT's config of each new adapter: on all linear maps, or on those of the feed-forward blocks."""
    from hub_router.composition.architecture import empty_model
    from hub_router.composition.outer import feed_forward_maps

    if kind != "mixlora" or "target_modules" in own:
        return adapter_config(EXPERTS, own)
    maps = feed_forward_maps(empty_model(base) if model is None else model)
    if not maps:
        raise TrainingError(f"base model {base} has no feed-forward blocks of its own; name maps: target_modules")
    return adapter_config(EXPERTS, {"target_modules": maps, **own})
