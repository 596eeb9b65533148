"""compose: a base model, a pool of adapters and a routing method become one routed model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hub_router.composition.architecture import empty_model
from hub_router.composition.assemble import prepare, stack
from hub_router.composition.attach import need_unrouted
from hub_router.composition.base_model import base_name, load_base
from hub_router.composition.plan import TextEncoder
from hub_router.composition.pool import AdapterSource, check_pool, read_pool
from hub_router.composition.routed import RoutedModel
from hub_router.composition.tasks import Samples, find_tasks, make_planner, need_tasks
from hub_router.errors import MissingError
from hub_router.features import PoolFeatures
from hub_router.lora.adapter import LoraAdapter
from hub_router.lora.bank import AdapterBank
from hub_router.routing.registry import create

_LOG = logging.getLogger(__name__)


def compose(
    model: Any,
    adapters: Mapping[str, AdapterSource] | Sequence[AdapterSource],
    method: str = "arrow",
    *,
    tokenizer: Any = None,
    samples: Samples | None = None,
    encoder: str | TextEncoder | None = None,
    features: PoolFeatures | None = None,
    **hyperparameters: Any,
) -> RoutedModel:
    """Attach a pool of LoRA adapters to a base model, routed by one method.

    Everything is checked before the model is touched: an error leaves it as it was.

    Args:
        model (PreTrainedModel | str | Path): a transformers model, which is changed in place until ``detach()``; or a
            folder or Hub id, from which model and tokenizer are loaded.
        adapters (Mapping | Sequence): PEFT adapter folders by name, or a list of folders, which take their folders'
            names. Ranks and adapted modules may differ. Axis E of all weights follows this order.
        method (str): a name of ``hub-router methods``.
        tokenizer (PreTrainedTokenizerBase | None): for text in and out; logits need none.
        samples (Mapping[str, Sequence[str]] | None): inputs of each adapter's task by its name, for the methods that
            compare the input with them (``retriever``, ``hilora``, ``hilora-gs``); 20 are enough.
        encoder (str | TextEncoder | None): sentence encoder of those methods: a sentence-transformers model,
            ``offline`` for the packaged one, or an object with ``name`` and ``encode``; default
            ``hkunlp/instructor-base``.
        features (PoolFeatures | None): what a catalog knows of the adapters; what is missing is computed.
        **hyperparameters (Any): the method's, where they differ from the paper's defaults.

    Returns:
        RoutedModel: holds the model, now routed.

    Raises:
        MethodError: unknown method, invalid hyperparameter, a pool that the method cannot route over, or the method
            lacks samples, encoder or tokenizer.
        UnsupportedAdapterError: lists the adapters that cannot be read, where all others fit.
        MissingError: the base model cannot be loaded, or is none.
        IncompatibleAdaptersError: lists every module of every adapter that does not fit the model,
            and the adapters that cannot be read.
        RoutedStateError: the model is routed already.
    """
    router = create(method, hyperparameters)
    pool, unreadable = read_pool(adapters)
    members = router.members([adapter.name for adapter in pool])
    path = str(model) if isinstance(model, str | Path) else None
    if path is None:
        if not isinstance(model, nn.Module):
            raise MissingError(f"model is {model!r}, expected a transformers model, a folder or a Hub id")
        need_unrouted(model)
        plan = check_pool(model, base_name(model), pool, unreadable, members)
    elif any(adapter.copies or adapter.saved for adapter in pool):
        # Only the weights themselves can be compared with those that came along.
        model, found = load_base(path)
        plan = check_pool(model, path, pool, unreadable, members)
    else:
        plan = check_pool(empty_model(path), path, pool, unreadable, members)
    bank = stack(pool)
    router.check(bank)
    features = features or PoolFeatures()
    samples = samples or {}
    text = tokenizer is not None or path is not None
    need_tasks(router, bank.adapters, features=features, samples=samples, encoder=encoder, tokenizer=text)
    tasks = find_tasks(router, bank.adapters, features=features, samples=samples, encoder=encoder)
    if path is not None:
        if isinstance(model, str | Path):
            model, found = load_base(path)
        tokenizer = found if tokenizer is None else tokenizer
    notes = (*_notes(pool, bank, members), *plan.notes)
    prepared = prepare(router, bank, features)
    planner = make_planner(router, bank, tasks, tokenizer)
    return RoutedModel.attached(model, tokenizer, pool, router, prepared, plan, notes, planner)


def _notes(pool: Sequence[LoraAdapter], bank: AdapterBank, members: Sequence[str]) -> list[str]:
    """What the reader notes about each adapter, and which adapters change nothing, which is logged as well."""
    live = {bank.adapters[expert] for module in bank.modules.values() for expert in module.experts}
    still = [
        f"adapter {adapter.name!r} changes nothing: B A is zero in all of its modules"
        for adapter in pool
        if adapter.name in members and adapter.name not in live and not adapter.saved
    ]
    for note in still:
        _LOG.warning("%s", note)
    return still + [f"adapter {adapter.name!r}: {note}" for adapter in pool for note in adapter.notes]
