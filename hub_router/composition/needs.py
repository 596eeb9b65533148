"""What a method needs of a pool and does not find there, all in one error and before anything is loaded."""

from __future__ import annotations

from functools import partial

from hub_router.composition.plan import TextEncoder
from hub_router.composition.tasks import Samples, need_tasks
from hub_router.composition.trained import set_of
from hub_router.errors import MethodError
from hub_router.features import PoolFeatures
from hub_router.lora.bank import AdapterBank
from hub_router.routing.base import Router


def check_trained(router: Router) -> None:
    """Refuse a method whose gates were never trained; ``compose`` in Python takes one, to train it.

    Args:
        router (Router): the method.

    Raises:
        MethodError: names the command that trains it.
    """
    if set_of(router) == "":
        raise MethodError(
            f"method {router.name!r} needs trained gates, got prototypes=''; train them with: hub-router train "
            f"{router.name} --name SET --adapters ADAPTER,..., then: --set prototypes=SET"
        )


def check_needs(
    router: Router,
    bank: AdapterBank,
    features: PoolFeatures,
    *,
    samples: Samples | None = None,
    encoder: str | TextEncoder | None = None,
    tokenizer: bool = True,
) -> None:
    """Hold a method against a pool: ranks, samples of every task, the encoder and the tokenizer.

    Args:
        router (Router): the method.
        bank (AdapterBank): the pool, stacked.
        features (PoolFeatures): what a catalog knows of the adapters.
        samples (Mapping[str, Sequence[str]] | None): sample inputs by adapter, where the features lack its Gaussian.
        encoder (str | TextEncoder | None): sentence encoder; None takes the one of the features, or the default one.
        tokenizer (bool): whether there is, or will be, a tokenizer to read the model's inputs with.

    Raises:
        MethodError: lists the adapters of ranks that it cannot merge, those without enough samples, and whatever else
            it lacks.
    """
    faults = []
    checks = (
        partial(router.check, bank),
        partial(
            need_tasks,
            router,
            bank.adapters,
            features=features,
            samples=samples or {},
            encoder=encoder or features.encoder,
            tokenizer=tokenizer,
        ),
    )
    for check in checks:
        try:
            check()
        except MethodError as error:
            faults.append(str(error))
    if faults:
        raise MethodError("\n".join(faults))
