"""LoraRetriever against a loop-written float64 reference of its cosines and its three ways to combine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from routing_cases import MODULE, Case, Pair, make_case
from sequence_cases import (
    WIDTH,
    able,
    check_restricted,
    check_routed,
    embedded_samples,
    gaussians_of,
    inputs_near,
    nothing,
    plan_of,
    spread_rows,
)

from hub_router.composition.assemble import stack
from hub_router.errors import MethodError
from hub_router.gaussian import fit
from hub_router.routing.base import SequenceRouter
from hub_router.routing.retriever import Retriever


def retrieved(case: Case, z: np.ndarray, top_k: int) -> dict[int, float]:
    """Weights by pool position: the k adapters whose mean sample embedding has the largest cosine."""
    cosines = {}
    for e, rows in enumerate(embedded_samples(len(case.adapters))):
        mean = sum(rows) / len(rows)
        if able(case)[e]:
            cosines[e] = float(mean @ z) / math.sqrt(float(mean @ mean) * float(z @ z))
    best = sorted(cosines, key=lambda e: (-cosines[e], e))[:top_k]
    return {e: 1 / len(best) for e in best}


@pytest.mark.parametrize(("top_k", "mode"), [(1, "mixture"), (2, "mixture"), (9, "mixture"), (3, "selection")])
def test_equals_the_reference(case: Case, top_k: int, mode: str) -> None:
    router, embeddings = Retriever(top_k, mode), inputs_near(case, case.shape[0])

    def one(token: torch.Tensor, number: int, pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
        weights = retrieved(case, embeddings[number], 1 if mode == "selection" else top_k)
        y, gates = nothing(token, pairs), []
        for e, (A, B) in zip(case.experts, pairs, strict=True):
            y = y + weights.get(e, 0.0) * (B @ (A @ token))
            gates += [weights.get(e, 0.0)] * A.shape[0]
        return y, torch.tensor(gates, dtype=token.dtype)

    plan = plan_of(router, case, embeddings, range(len(embeddings)))
    rows = spread_rows(plan, case.shape)
    check_routed(router, case, rows, one)
    if 0 not in case.shape:
        check_restricted(router, case, rows)


def test_fusion_averages_the_factors(equal_case: Case) -> None:
    case = equal_case
    router, embeddings = Retriever(2, "fusion"), inputs_near(case, case.shape[0])

    def one(token: torch.Tensor, number: int, pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
        weights = retrieved(case, embeddings[number], 2)
        A_mean, B_mean = torch.zeros_like(pairs[0][0]), torch.zeros_like(pairs[0][1])
        for e, (A, B) in zip(case.experts, pairs, strict=True):
            A_mean, B_mean = A_mean + weights.get(e, 0.0) * A, B_mean + weights.get(e, 0.0) * B
        gates = [weights.get(e, 0.0) for e, (A, _) in zip(case.experts, pairs, strict=True) for _ in A]
        return B_mean @ (A_mean @ token), torch.tensor(gates, dtype=token.dtype)

    rows = spread_rows(plan_of(router, case, embeddings, range(len(embeddings))), case.shape)
    check_routed(router, case, rows, one)
    check_restricted(router, case, rows)


def test_plan_is_the_same_alone_in_a_batch_and_in_another_order() -> None:
    case = make_case([4, 2, 8, None, 3], (1,))
    embeddings = inputs_near(case, 17)
    together = plan_of(Retriever(2), case, embeddings, range(17))["weights"]
    assert together.shape == (17, 5)
    assert together.dtype == torch.float32
    turned = plan_of(Retriever(2), case, embeddings[::-1].copy(), range(17))["weights"]
    assert torch.equal(turned.flip(0), together)
    for number in range(17):
        alone = plan_of(Retriever(2), case, embeddings[number : number + 1], [99])["weights"]
        assert torch.equal(alone[0], together[number])


def test_short_means_are_not_put_last() -> None:
    case = make_case([2, 2], (1,))
    axes = np.eye(WIDTH)
    # Samples far from each other have a short mean; here it points along the input all the same.
    far = fit(np.stack([0.6 * axes[0] + 0.8 * axes[1], 0.6 * axes[0] - 0.8 * axes[1]]))
    near = fit(np.stack([0.8 * axes[0] + 0.6 * axes[2]] * 2))
    router = Retriever(1)
    state = router.plan_state(stack(case.adapters), [near, far])
    assert router.plan(state, torch.from_numpy(axes[:1]), [0])["weights"].tolist() == [[0, 1]]


def test_ties_go_to_the_first_adapters() -> None:
    case = make_case([2, 2, 2, 2], (1,))
    state = Retriever(2).plan_state(stack(case.adapters), [fit(np.eye(WIDTH)[:2])] * 4)
    weights = Retriever(2).plan(state, torch.eye(WIDTH, dtype=torch.float64)[:1], [0])["weights"]
    assert weights.tolist() == [[0.5, 0.5, 0, 0]]


def test_adapter_without_any_update_is_not_retrieved() -> None:
    case = make_case([2, 2, 2], (1,), zero=(1,))
    embeddings = np.stack([rows.mean(axis=0) for rows in embedded_samples(3)])
    weights = plan_of(Retriever(3), case, embeddings, range(3))["weights"]
    assert weights[:, 1].tolist() == [0, 0, 0]
    assert torch.equal(weights[:, [0, 2]], torch.full((3, 2), 0.5))


def test_fusion_refuses_adapters_of_different_ranks() -> None:
    pool = stack(make_case([2, 3], (1,)).adapters)
    with pytest.raises(MethodError, match=r"(?s)'retriever' with mode='fusion'.*rank 3.* in " + MODULE):
        Retriever(mode="fusion").check(pool)
    Retriever(mode="mixture").check(pool)


def test_is_a_sequence_router() -> None:
    assert isinstance(Retriever(), SequenceRouter)
    case = make_case([2, 2], (1,))
    state = Retriever().plan_state(stack(case.adapters), gaussians_of(case))
    empty = Retriever().plan(state, torch.zeros(0, WIDTH, dtype=torch.float64), [])
    assert empty["weights"].shape == (0, 2)
