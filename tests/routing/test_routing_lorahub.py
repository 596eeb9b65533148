"""lorahub against a loop-written float64 reference of LoRAHub's Eq. 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from routing_cases import MODULE, OTHER, Case, Pair, assert_close, make_case, make_update, per_token, some_map

from hub_router.composition.assemble import prepare, stack
from hub_router.composition.layer import RoutedUpdate
from hub_router.errors import MethodError
from hub_router.features import PoolFeatures
from hub_router.routing.lorahub import Lorahub


def weights_of(case: Case) -> list[float]:
    """Of the pool; some negative, none the same."""
    return [round(0.9 - 0.55 * number, 3) for number in range(len(case.adapters))]


def known(case: Case) -> PoolFeatures:
    vectors = {
        each.name: {module: np.array([weight], dtype=np.float32) for module in each.modules}
        for each, weight in zip(case.adapters, weights_of(case), strict=True)
    }
    return PoolFeatures(prototypes={"set": vectors})


def trained(case: Case) -> RoutedUpdate:
    prepared = prepare(Lorahub("set"), stack(case.adapters), known(case))[MODULE]
    return RoutedUpdate(Lorahub("set"), prepared, len(case.adapters), some_map(prepared))


def reference(
    pairs: Sequence[Pair], weights: Sequence[float]
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    def one(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        A = torch.zeros_like(pairs[0][0])
        B = torch.zeros_like(pairs[0][1])
        for (A_e, B_e), weight in zip(pairs, weights, strict=True):  # Eq. 1: (w_1 A_1 + ..) and (w_1 B_1 + ..)
            A = A + weight * A_e
            B = B + weight * B_e
        return B @ (A @ x), torch.tensor(weights, dtype=torch.float64)

    return one


def test_equals_the_reference(equal_case: Case) -> None:
    case = equal_case
    update, x = trained(case), case.inputs().requires_grad_()
    seen: list[torch.Tensor] = []
    update.recorder = type("Kept", (), {"record": lambda self, module, weights: seen.append(weights)})()
    got = update(x)
    wide = case.inputs().double().requires_grad_()
    weights = [weights_of(case)[expert] for expert in case.experts]
    expected, _ = per_token(wide, reference(case.pairs, weights))
    assert_close(got, expected, 1e-5)
    assert seen[0].shape == (*case.shape, len(case.adapters))
    everybody = [weights_of(case)[e] if e in case.experts else 0.0 for e in range(len(case.adapters))]
    assert torch.equal(seen[0], torch.tensor(everybody).expand_as(seen[0]))
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (found,) = torch.autograd.grad((got * direction.float()).sum(), x)
    (true,) = torch.autograd.grad((expected * direction).sum(), wide)
    assert_close(found, true, 1e-5)


def test_untrained_is_the_base_module() -> None:
    case = make_case([4, 4, 4], (2, 5))
    got = make_update(Lorahub(), case)(case.inputs())
    assert got.shape == (2, 5, 20) and not got.any()


def test_weights_are_not_normalised() -> None:
    case = make_case([4], (3,))
    half = PoolFeatures(prototypes={"set": {"adapter-0": {MODULE: np.array([0.5], dtype=np.float32)}}})
    prepared = prepare(Lorahub("set"), stack(case.adapters), half)[MODULE]
    ((A, B),) = case.pairs
    got = RoutedUpdate(Lorahub("set"), prepared, 1, some_map(prepared))(case.inputs())
    assert_close(got, 0.25 * (case.inputs().double() @ A.mT @ B.mT), 1e-5)


def test_other_ranks_are_refused() -> None:
    with pytest.raises(MethodError, match=r"method 'lorahub' .*equal rank(?s:.*)rank 4(?s:.*)rank 2"):
        Lorahub().check(stack(make_case([4, 2], (2,)).adapters))


def test_vectors_of_another_length_are_refused() -> None:
    case = make_case([4, 4], (2,))
    wide = {each.name: {MODULE: np.ones(24, dtype=np.float32)} for each in case.adapters}
    with pytest.raises(MethodError, match=r"shape \(1,\) for every adapter, but 'adapter-0' has one of shape \(24,\)"):
        prepare(Lorahub("set"), stack(case.adapters), PoolFeatures(prototypes={"set": wide}))


def test_adapters_of_other_modules_have_their_weight_there() -> None:
    case = make_case([2, None], (2,))
    prepared = prepare(Lorahub("set"), stack(case.adapters), known(case))
    assert prepared[MODULE].tensors["P"].tolist() == [[np.float32(0.9)]]
    assert prepared[OTHER].tensors["P"].tolist() == [[np.float32(0.35)]]
