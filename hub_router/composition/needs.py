"""What a method needs of a pool and does not find there, all in one error and before anything is loaded."""

from __future__ import annotations

from hub_router.composition.tasks import need_tasks
from hub_router.errors import MethodError
from hub_router.features import PoolFeatures
from hub_router.lora.bank import AdapterBank
from hub_router.routing.base import Router, SequenceRouter


def check_needs(router: Router, bank: AdapterBank, features: PoolFeatures) -> None:
    """Hold a method against a pool of the catalog: ranks, samples of every task, and the encoder.

    Args:
        router (Router): the method.
        bank (AdapterBank): the pool, stacked.
        features (PoolFeatures): what the catalog knows of the adapters.

    Raises:
        MethodError: lists the adapters of ranks that it cannot merge, those without enough samples, and whatever else
            it lacks.
    """
    faults = []
    for check in (_ranks, _tasks, _enough_samples):
        try:
            check(router, bank, features)
        except MethodError as error:
            faults.append(str(error))
    if faults:
        raise MethodError("\n".join(faults))


def _ranks(router: Router, bank: AdapterBank, _features: PoolFeatures) -> None:
    router.check(bank)


def _tasks(router: Router, bank: AdapterBank, features: PoolFeatures) -> None:
    need_tasks(router, bank.adapters, features=features, samples={}, encoder=features.encoder, tokenizer=True)


def _enough_samples(router: Router, bank: AdapterBank, features: PoolFeatures) -> None:
    """Of the adapters that have samples at all; a method says how many it needs where it makes its state."""
    known = tuple(name for name in bank.adapters if name in features.gaussians)
    if isinstance(router, SequenceRouter) and known:
        router.plan_state(AdapterBank(known, {}), [features.gaussians[name] for name in known])
