"""What is read off routing weights and prototypes beside accuracy: entropy, effective rank, cosines, expert load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from hub_router.composition.attach import routed_updates
from hub_router.composition.layer import RoutedUpdate
from hub_router.composition.routed import RoutedModel
from hub_router.errors import MethodError, RoutedStateError
from hub_router.routing.arrow import Arrow
from hub_router.routing.entropy import entropy as entropy_of_shares
from hub_router.routing.project import project
from hub_router.routing.spectr import Spectr

_SMALLEST = 1e-30


def entropy(weights: torch.Tensor) -> torch.Tensor:
    """Routing entropy H of expert weights (`MAPLE <https://openreview.net/forum?id=YxVebk7kIw>`_, Sec. 3.1).

    Args:
        weights (torch.Tensor): ``(..., E)``, not negative; divided by their sum first.

    Returns:
        torch.Tensor: nats ``(...)``, from 0 (one expert) to log E; 0 where all weights are 0.
    """
    shares = weights / weights.sum(-1, keepdim=True).clamp_min(_SMALLEST)
    return entropy_of_shares(shares)


def routing_entropies(routed: RoutedModel, prompts: Sequence[str]) -> list[float]:
    """Mean routing entropy of each prompt, over its tokens and all modules.

    Args:
        routed (RoutedModel): with a tokenizer.
        prompts (Sequence[str]): read one by one, so that none is padded.

    Returns:
        list[float]: nats, in the order of the prompts.

    Raises:
        RoutedStateError: there is no tokenizer.
    """
    return [
        float(torch.stack([entropy(weights).mean() for weights in _weights(routed, prompt).values()]).mean())
        for prompt in prompts
    ]


def expert_load(routed: RoutedModel, prompts: Sequence[str]) -> torch.Tensor:
    """Mean weight of every adapter over tokens, modules and prompts (`LoRA-Mixer`_, Fig. 3 and 4).

    .. _LoRA-Mixer: https://arxiv.org/abs/2507.00029

    Args:
        routed (RoutedModel): with a tokenizer.
        prompts (Sequence[str]): at least one.

    Returns:
        torch.Tensor: ``(E,)`` in the order of ``routed.adapters``; sums to 1.

    Raises:
        RoutedStateError: there is no tokenizer.
    """
    totals = torch.stack(
        [
            torch.stack([weights.flatten(0, -2).mean(0) for weights in _weights(routed, prompt).values()]).mean(0)
            for prompt in prompts
        ]
    ).mean(0)
    return totals / totals.sum().clamp_min(_SMALLEST)


def routing_accuracy(routed: RoutedModel, prompts: Sequence[str], own: str) -> tuple[float, float]:
    """How often the adapter of the prompts' task is chosen (`SpectR <https://arxiv.org/abs/2504.03454>`_, Table 1).

    Args:
        routed (RoutedModel): with a tokenizer.
        prompts (Sequence[str]): of one task, at least one.
        own (str): the adapter that was trained on it.

    Returns:
        tuple[float, float]: share of tokens, over the modules that the adapter adapts, in which its weight is the
            largest (the first among equals), and in which it is above 0; zeros where it is a candidate nowhere.

    Raises:
        RoutedStateError: there is no tokenizer.
    """
    place = routed.adapters.index(own)
    adapted = {update.module for _, update in routed_updates(routed.model) if place in update.experts.tolist()}
    first, any_, count = 0, 0, 0
    for prompt in prompts:
        for module, weights in _weights(routed, prompt).items():
            if module in adapted:
                rows = weights.flatten(0, -2)  # [T, E]
                first += int((rows.argmax(-1) == place).sum())
                any_ += int((rows[:, place] > 0).sum())
                count += rows.shape[0]
    return (first / count, any_ / count) if count else (0.0, 0.0)


def score_ratio(routed: RoutedModel, prompts: Sequence[str], own: str) -> float:
    """Score of the adapter of the prompts' task over the largest of all adapters (`SpectR`_, Fig. 6).

    .. _SpectR: https://arxiv.org/abs/2504.03454

    Args:
        routed (RoutedModel): composed with ``arrow`` or ``spectr``; with a tokenizer.
        prompts (Sequence[str]): of one task, at least one.
        own (str): the adapter that was trained on it.

    Returns:
        float: mean over tokens and the modules in which the adapter is a candidate; 1 where it always scores best, 0
            where it is a candidate nowhere.

    Raises:
        MethodError: the method's scores are no such scores, or there is no such adapter.
        RoutedStateError: there is no tokenizer.
    """
    if not isinstance(routed.method, Arrow | Spectr):
        raise MethodError(
            f"score ratios are of 'arrow' and 'spectr', and this model is routed by {routed.method.name!r}"
        )
    if own not in routed.adapters:
        raise MethodError(f"there is no adapter {own!r}; the pool is: {', '.join(routed.adapters)}")
    place, ratios, handles = routed.adapters.index(own), [], []

    def read(update: RoutedUpdate, candidate: int, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        scores = _scores(update, args[0])  # [1, T, C]
        ratios.append((scores[..., candidate] / scores.amax(-1).clamp_min(_SMALLEST)).flatten().double())

    try:
        for module, update in routed_updates(routed.model):
            if place in (experts := update.experts.tolist()):
                handles.append(module.register_forward_pre_hook(partial(read, update, experts.index(place))))
        for prompt in prompts:
            _forward(routed, prompt)
    finally:
        for handle in handles:
            handle.remove()
    return float(torch.cat(ratios).mean()) if ratios else 0.0


def effective_rank(matrix: torch.Tensor) -> float:
    """``exp(H(s / sum s))`` of a matrix's singular values s (`MAPLE`_, Lemma 1).

    .. _MAPLE: https://openreview.net/forum?id=YxVebk7kIw

    Args:
        matrix (torch.Tensor): ``(N, D)``, such as the prototypes of one module.

    Returns:
        float: between 1 and min(N, D); 0 for a matrix of zeros.
    """
    values = torch.linalg.svdvals(matrix.to(torch.float64))
    total = values.sum()
    return float(entropy(values).exp()) if total > 0 else 0.0


def pairwise_cosines(vectors: torch.Tensor) -> torch.Tensor:
    """Cosines between the rows of a matrix (`MAPLE`_, Fig. 3).

    .. _MAPLE: https://openreview.net/forum?id=YxVebk7kIw

    Args:
        vectors (torch.Tensor): ``(N, D)``.

    Returns:
        torch.Tensor: of each pair once, ``(N (N - 1) / 2,)``.
    """
    unit = torch.nn.functional.normalize(vectors.to(torch.float64), dim=-1)
    above, below = torch.triu_indices(len(unit), len(unit), offset=1)
    return (unit @ unit.mT)[above, below]


def _scores(update: RoutedUpdate, x: torch.Tensor) -> torch.Tensor:
    """The scores ``(..., C)`` that Arrow or SpectR gives the candidates of a module."""
    if isinstance(update.router, Arrow):
        return project(x, update.state()["P"]).abs()
    squares = project(x, update.A).square()  # [..., R]
    return torch.stack([part.sum(-1) for part in squares.split(update.ranks, dim=-1)], dim=-1).sqrt()


def _weights(routed: RoutedModel, prompt: str) -> Mapping[str, torch.Tensor]:
    """Expert weights ``(1, T, E)`` by module, of one prompt."""
    with routed.trace() as trace:
        _forward(routed, prompt)
    return trace.weights


def _forward(routed: RoutedModel, prompt: str) -> None:
    if routed.tokenizer is None:
        raise RoutedStateError("routing of prompts reads text, and there is no tokenizer; compose(..., tokenizer=...)")
    inputs = routed.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(routed.model.device)
    with torch.inference_mode():
        routed(**inputs)
