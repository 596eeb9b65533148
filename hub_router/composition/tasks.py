"""What a sequence-level method needs beside the adapters: samples of their tasks, an encoder, a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hub_router.composition.plan import Planner, TextEncoder, embed
from hub_router.errors import EncoderUnavailableError, MethodError
from hub_router.features import PoolFeatures
from hub_router.gaussian import Gaussian, fit
from hub_router.lora.bank import AdapterBank
from hub_router.routing.base import Router, SequenceRouter

Samples = Mapping[str, Sequence[str]]


@dataclass(frozen=True, eq=False)
class Tasks:
    """The tasks of a pool as a sequence-level method sees them.

    Args:
        gaussians (Sequence[Gaussian]): of each adapter's embedded samples, in pool order.
        encoder (TextEncoder): that embedded them, and embeds the inputs.
    """

    gaussians: Sequence[Gaussian]
    encoder: TextEncoder


def need_tasks(
    router: Router,
    adapters: Sequence[str],
    *,
    features: PoolFeatures,
    samples: Samples,
    encoder: str | TextEncoder | None,
    tokenizer: bool,
) -> None:
    """Say in one error what a method needs and lacks; nothing is loaded for it.

    Args:
        router (Router): the method.
        adapters (Sequence[str]): names of the pool.
        features (PoolFeatures): of a catalog; may lack adapters.
        samples (Mapping[str, Sequence[str]]): sample inputs by adapter, where the features lack its Gaussian.
        encoder (str | TextEncoder | None): sentence encoder; None takes the one of the features, or the default one.
        tokenizer (bool): whether there is, or will be, a tokenizer to read the model's inputs with.

    Raises:
        MethodError: lists the adapters with too few samples, and whatever else is missing.
    """
    if not isinstance(router, SequenceRouter):
        return
    name, known = _at_hand(features, encoder)
    faults = []
    counts = {each: known[each].samples if each in known else len(set(samples.get(each, ()))) for each in adapters}
    lacking = [f"{each} ({count})" for each, count in counts.items() if count < router.least_samples]
    if lacking:
        faults.append(
            f"it compares the input with samples of every adapter's task, at least {router.least_samples} different "
            f"ones, and has fewer of: {', '.join(lacking)}; pass samples={{name: [input, ...]}}, or in the catalog: "
            "hub-router samples add, then hub-router index; or leave these adapters out"
        )
    strangers = [each for each in samples if each not in adapters]
    if strangers:
        faults.append(f"samples are given for names that are not in the pool: {', '.join(strangers)}")
    if not tokenizer:
        faults.append("it reads the text of the model's inputs, and there is no tokenizer (tokenizer=...)")
    if encoder is None or isinstance(encoder, str):
        from hub_router.encoder import locate

        try:
            locate(name)
        except EncoderUnavailableError as error:
            faults.append(str(error))
    if faults:
        raise MethodError(f"method {router.name!r} lacks what it needs: {'; '.join(faults)}")


def find_tasks(
    router: Router,
    adapters: Sequence[str],
    *,
    features: PoolFeatures,
    samples: Samples,
    encoder: str | TextEncoder | None,
) -> Tasks | None:
    """Load the encoder, embed the samples, fit what is not known; the arguments are those of :func:`need_tasks`.

    Returns:
        Tasks | None: None where the method decides per token, or not at all.
    """
    if not isinstance(router, SequenceRouter):
        return None
    name, known = _at_hand(features, encoder)
    if encoder is None or isinstance(encoder, str):
        from hub_router.encoder import load_encoder

        encoder = load_encoder(name)
    gaussians = []
    for each in adapters:
        if each in known:
            gaussians.append(known[each])
        else:
            gaussians.append(fit(embed(encoder, list(dict.fromkeys(samples[each])))))
    return Tasks(gaussians, encoder)


def make_planner(router: Router, bank: AdapterBank, tasks: Tasks | None, tokenizer: Any) -> Planner | None:
    """Who asks a sequence-level method for its plans.

    Args:
        router (Router): the method.
        bank (AdapterBank): the pool, stacked.
        tasks (Tasks | None): from :func:`find_tasks`.
        tokenizer (PreTrainedTokenizerBase): of the base model.

    Returns:
        Planner | None: None where the method decides per token, or not at all.
    """
    if tasks is None or not isinstance(router, SequenceRouter):
        return None
    return Planner(router, router.plan_state(bank, tasks.gaussians), tasks.encoder, tokenizer)


def _at_hand(features: PoolFeatures, encoder: str | TextEncoder | None) -> tuple[str | None, Mapping[str, Gaussian]]:
    """The encoder's name, and the catalog's Gaussians where they are of that encoder's vectors."""
    name = encoder if isinstance(encoder, str) else encoder.name if encoder is not None else features.encoder
    return name, features.gaussians if name == features.encoder else {}
