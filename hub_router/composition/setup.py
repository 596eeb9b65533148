"""What ``compose`` and the setters of a routed model share: one way from a pool and a method to what is attached."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from hub_router.composition.assemble import make_updates, prepare, stack
from hub_router.composition.attach import attach, detach
from hub_router.composition.needs import check_needs
from hub_router.composition.outer import check_outer, widths_of
from hub_router.composition.plan import Planner, TextEncoder
from hub_router.composition.pool import check_pool
from hub_router.composition.saved import Replacement, SavedPlan
from hub_router.composition.tasks import Samples, Tasks, find_tasks, make_planner
from hub_router.composition.trained import set_of, trained_key, with_set_file
from hub_router.errors import MethodError
from hub_router.features import PoolFeatures, Vectors
from hub_router.lora.adapter import LoraAdapter
from hub_router.lora.bank import AdapterBank
from hub_router.lora.reader import without_collections
from hub_router.routing.base import Prepared, Router

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Background:
    """What is known of a pool beside its weights; a routed model keeps it for its next method and its next pool.

    Args:
        features (PoolFeatures): of a catalog, and Gaussians that were fitted since.
        samples (Mapping[str, Sequence[str]]): sample inputs by adapter.
        encoder (str | TextEncoder | None): sentence encoder; None takes the one of the features, or the default one.
    """

    features: PoolFeatures = field(default_factory=PoolFeatures)
    samples: Samples = field(default_factory=dict)
    encoder: str | TextEncoder | None = None

    def with_samples(self, samples: Samples | None, encoder: str | TextEncoder | None) -> Background:
        """What a caller brings, before what was known.

        Args:
            samples (Mapping[str, Sequence[str]] | None): by adapter; these are fitted anew.
            encoder (str | TextEncoder | None): None keeps the encoder.

        Returns:
            Background: of the same adapters.

        Raises:
            MethodError: samples are no lists of texts; names every adapter.
        """
        wrong = [name for name, texts in (samples or {}).items() if not _is_texts(texts)]
        if wrong:
            raise MethodError(
                f"samples must be a list of texts for each adapter, got something else for: {', '.join(wrong)}"
            )
        given = {name: tuple(texts) for name, texts in (samples or {}).items()}
        gaussians = {name: each for name, each in self.features.gaussians.items() if name not in given}
        return Background(
            replace(self.features, gaussians=gaussians),
            {**self.samples, **given},
            self.encoder if encoder is None else encoder,
        )

    def with_vectors(self, name: str, vectors: Vectors) -> Background:
        """Trained vectors beside, or in the place of, what was known.

        Args:
            name (str): of their set, or of a training in place.
            vectors (Vectors): by adapter and module.

        Returns:
            Background: of the same adapters.
        """
        prototypes = {**self.features.prototypes, name: vectors}
        return replace(self, features=replace(self.features, prototypes=prototypes))

    def with_tasks(self, tasks: Tasks | None, adapters: Sequence[str]) -> Background:
        """What was fitted for a method, so that it is not fitted again.

        Args:
            tasks (Tasks | None): of the pool.
            adapters (Sequence[str]): names of the pool.

        Returns:
            Background: of the same adapters.
        """
        if tasks is None:
            return self
        gaussians = dict(zip(adapters, tasks.gaussians, strict=True))
        features = replace(self.features, gaussians=gaussians, encoder=tasks.encoder.name)
        return Background(features, self.samples, tasks.encoder)

    def of(self, names: Mapping[str, str]) -> Background:
        """What is known of the adapters that stay.

        Args:
            names (Mapping[str, str]): their names by their new ones.

        Returns:
            Background: by the new names; nothing of other adapters.
        """

        def kept(known: Mapping[str, Any]) -> dict[str, Any]:
            return {new: known[old] for new, old in names.items() if old in known}

        features = replace(
            self.features,
            spectra=kept(self.features.spectra),
            gaussians=kept(self.features.gaussians),
            prototypes={name: kept(vectors) for name, vectors in self.features.prototypes.items()},
        )
        return Background(features, kept(self.samples), self.encoder)


@dataclass(frozen=True, eq=False)
class Setup:
    """A checked pool under a method, ready to attach.

    Args:
        router (Router): the method with its hyperparameters.
        pool (tuple[LoraAdapter, ...]): the adapters in the order of axis E.
        prepared (Mapping[str, Prepared]): the method's state by module path.
        plan (SavedPlan): parameters of the base model that an adapter used alone replaces.
        planner (Planner | None): asks the method, where it decides per sequence.
        notes (tuple[str, ...]): what a user should know.
        background (Background): what is known of the pool beside its weights.
    """

    router: Router
    pool: tuple[LoraAdapter, ...]
    prepared: Mapping[str, Prepared]
    plan: SavedPlan
    planner: Planner | None
    notes: tuple[str, ...]
    background: Background


def make_setup(
    model: nn.Module,
    base: str,
    router: Router,
    pool: Sequence[LoraAdapter],
    unreadable: Sequence[str],
    background: Background,
    tokenizer: Any,
) -> Setup:
    """Check everything, then make what the method needs; the model is not changed.

    Args:
        model (nn.Module): the base model, or one without weights; adapters attached to it do not count.
        base (str): what to call it in messages.
        router (Router): the method.
        pool (Sequence[LoraAdapter]): the adapters that could be read.
        unreadable (Sequence[str]): a line for each of the others.
        background (Background): what is known of the pool beside its weights.
        tokenizer (PreTrainedTokenizerBase | None): reads the model's inputs, where the method decides by their text.

    Returns:
        Setup: ready to attach.

    Raises:
        MethodError: a pool that the method cannot route over, or the method lacks samples, encoder or tokenizer.
        UnsupportedAdapterError: lists the adapters that cannot be read, where all others fit.
        IncompatibleAdaptersError: lists every module of every adapter that does not fit the model, and the adapters
            that cannot be read.
        EncoderUnavailableError: the encoder cannot be loaded.
    """
    names = [adapter.name for adapter in pool]
    members = router.members(names)
    with without_collections():
        plan = check_pool(model, base, pool, unreadable, members)
        bank = stack(pool)
    background = replace(background, features=with_set_file(background.features, router, pool))
    features, samples, encoder = background.features, background.samples, background.encoder
    readable = tokenizer is not None
    check_needs(router, bank, features, samples=samples, encoder=encoder, tokenizer=readable)
    check_outer(model, router, bank)
    tasks = find_tasks(router, names, features=features, samples=samples, encoder=encoder)
    planner = make_planner(router, bank, tasks, tokenizer)
    return Setup(
        router=router,
        pool=tuple(pool),
        prepared=prepare(router, bank, replace(features, widths=widths_of(model, router, bank.modules))),
        plan=plan,
        planner=planner,
        notes=(*_notes(pool, bank, members), *_untrained(router, names, features), *plan.notes),
        background=background.with_tasks(tasks, names),
    )


def install(model: nn.Module, setup: Setup) -> Replacement:
    """Attach a pool that was checked; if anything fails, the base model is as it was.

    Args:
        model (nn.Module): the base model; DoRA's gains are those of its weights after the replacement.
        setup (Setup): from :func:`make_setup`.

    Returns:
        Replacement: parameters of the base model that were replaced.
    """
    for note in setup.plan.notes:
        _LOG.warning("%s", note)
    replacement = Replacement(model, setup.plan.replace)
    try:
        updates = make_updates(model, setup.router, setup.prepared, len(setup.pool), setup.planner)
        attach(model, updates, setup.planner)
    except BaseException:
        detach(model)
        replacement.restore()
        raise
    return replacement


def _untrained(router: Router, names: Sequence[str], features: PoolFeatures) -> list[str]:
    """Which adapters of a pool that was trained in place were not in it then."""
    trained = features.prototypes.get(trained_key(router) or "", {}) if set_of(router) == "" else {}
    new = [name for name in names if name not in trained] if trained else []
    note = f"gates of {', '.join(new)} are as before training: the pool was trained without them"
    if new:
        _LOG.warning("%s", note)
    return [note] if new else []


def _is_texts(texts: Any) -> bool:
    return isinstance(texts, Sequence) and not isinstance(texts, str) and all(isinstance(text, str) for text in texts)


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
