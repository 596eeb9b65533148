"""compose: a base model, a pool of adapters and a routing method become one routed model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hub_router.composition.architecture import empty_model
from hub_router.composition.assemble import stack
from hub_router.composition.attach import need_unrouted
from hub_router.composition.base_model import base_name, load_model, load_tokenizer
from hub_router.composition.needs import check_needs
from hub_router.composition.plan import TextEncoder
from hub_router.composition.pool import AdapterSource, read_pool
from hub_router.composition.routed import RoutedModel
from hub_router.composition.setup import Background, make_setup
from hub_router.composition.tasks import Samples
from hub_router.errors import MissingError
from hub_router.features import PoolFeatures
from hub_router.routing.registry import create


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
    background = Background(features or PoolFeatures()).with_samples(samples, encoder)
    if isinstance(model, str | Path):
        path = str(model)
        # Only the weights themselves can be compared with those that came along.
        compared = any(adapter.copies or adapter.saved for adapter in pool)
        if compared:
            known, given, by = background.features, background.samples, background.encoder
            check_needs(router, stack(pool), known, samples=given, encoder=by)
        held = load_model(path) if compared else empty_model(path)
        tokenizer = load_tokenizer(path) if tokenizer is None else tokenizer
        setup = make_setup(held, path, router, pool, unreadable, background, tokenizer)
        return RoutedModel.attached(held if compared else load_model(path), tokenizer, setup)
    if not isinstance(model, nn.Module):
        raise MissingError(f"model is {model!r}, expected a transformers model, a folder or a Hub id")
    need_unrouted(model)
    setup = make_setup(model, base_name(model), router, pool, unreadable, background, tokenizer)
    return RoutedModel.attached(model, tokenizer, setup)
