"""Plans for the pools of ``routing_cases``, and one sequence-level method run beside its reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from routing_cases import MODULE, Case, Pair, assert_close

from hub_router.composition.assemble import stack
from hub_router.composition.naive import naive_update
from hub_router.features import ModuleFeatures
from hub_router.gaussian import Gaussian, fit
from hub_router.lora.bank import ModuleBank
from hub_router.routing.base import Gates, Prepared, Router, SequenceRouter

# Of the embeddings, small enough for dense covariances.
WIDTH = 6
# From the token, its place in the batch and the module's (A, s B): the update, and the gate of every component.
Reference = Callable[[torch.Tensor, int, Sequence[Pair]], tuple[torch.Tensor, torch.Tensor]]


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def embedded_samples(adapters: int, spread: float = 0.15) -> list[np.ndarray]:
    """Unit vectors of every adapter's samples, 4 of the first, 5 of the second."""
    generator = np.random.default_rng(5)
    centres = unit(generator.normal(size=(adapters, WIDTH)))
    return [unit(each + spread * generator.normal(size=(4 + e, WIDTH))) for e, each in enumerate(centres)]


def gaussians_of(case: Case) -> list[Gaussian]:
    return [fit(rows) for rows in embedded_samples(len(case.adapters))]


def inputs_near(case: Case, count: int, seed: int = 3) -> np.ndarray:
    """Embeddings of sequences, each between two tasks."""
    generator = np.random.default_rng(seed)
    means = np.stack([rows.mean(axis=0) for rows in embedded_samples(len(case.adapters))])
    mixed = means[generator.integers(len(means), size=count)] + 0.3 * means[generator.integers(len(means), size=count)]
    return unit(mixed + 0.1 * generator.normal(size=(count, WIDTH)))


def plan_of(router: SequenceRouter, case: Case, embeddings: np.ndarray, seeds: Sequence[int]) -> dict[str, Any]:
    state = router.plan_state(stack(case.adapters), gaussians_of(case))
    return router.plan(state, torch.from_numpy(embeddings), seeds)


def scores(samples: Sequence[np.ndarray], z: np.ndarray, epsilon: float) -> list[float]:
    """Eq. 3 with dense covariances, and the score below it."""
    found = []
    for rows in samples:
        mean = sum(rows) / len(rows)
        covariance = epsilon * np.eye(WIDTH)
        for row in rows:
            covariance = covariance + np.outer(row - mean, row - mean) / (len(rows) - 1)
        distance = (z - mean) @ np.linalg.inv(covariance) @ (z - mean)
        log_density = -0.5 * (WIDTH * math.log(2 * math.pi) + math.log(np.linalg.det(covariance)) + distance)
        found.append(log_density / WIDTH)
    return found


def able(case: Case) -> list[int]:
    """Each adapter's largest rank over the modules in which its update is not zero."""
    return [
        max((f.rank for f in each.modules.values() if f.A.any() and f.B.any()), default=0) for each in case.adapters
    ]


def spread_rows(plan: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """``(B, ...)`` as ``(B, 1, .., 1, ...)`` for x of leading shape ``shape``, as the engine does."""
    return {name: row.reshape(row.shape[0], *[1] * (len(shape) - 1), *row.shape[1:]) for name, row in plan.items()}


def module_of(router: Router, case: Case) -> Prepared:
    bank = stack(case.adapters)
    router.check(bank)
    return router.prepare(bank.modules[MODULE], bank.adapters, ModuleFeatures())


def run(prepared: Prepared, router: Router, rows: Mapping[str, torch.Tensor], x: torch.Tensor) -> tuple[Any, Gates]:
    """The update by the engine's naive sum, and the gates."""
    h = x @ prepared.bank.A.to(x.dtype).mT
    gates = router.route({**prepared.tensors, **rows}, x, h if router.projects else None)
    return naive_update(x, prepared.bank, gates, prepared.merge), gates


def nothing(token: torch.Tensor, pairs: Sequence[Pair]) -> torch.Tensor:
    """Zeros ``(D_out,)`` to start a sum with, which depend on the token as far as autograd is concerned."""
    return 0 * (pairs[0][1] @ (pairs[0][0] @ token))


def check_routed(
    router: Router, case: Case, rows: Mapping[str, torch.Tensor], reference: Reference, tolerance: float = 1e-5
) -> None:
    """Compare update, component gates and input gradient with a reference for one token."""
    prepared = module_of(router, case)
    x = case.inputs().requires_grad_()
    got, gates = run(prepared, router, rows, x)
    if x.numel() == 0:
        assert got.shape == (*case.shape, 20)
        return
    assert gates.weights.dtype == torch.float32
    truth = case.inputs().double().requires_grad_()
    tokens = truth.reshape(case.shape[0], -1, case.d_in)
    pairs = case.pairs
    found = [[reference(token, number, pairs) for token in each] for number, each in enumerate(tokens)]
    expected = torch.stack([one[0] for each in found for one in each]).reshape(*case.shape, -1)
    expected_gates = torch.stack([one[1] for each in found for one in each]).reshape(*case.shape, -1)
    assert_close(got, expected, tolerance)
    assert_close(component_gates(gates, prepared.bank).expand(expected_gates.shape), expected_gates, 1e-6)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (got * direction.float()).sum().backward()
    (expected * direction).sum().backward()
    assert x.grad is not None and truth.grad is not None
    assert_close(x.grad, truth.grad, tolerance)


def component_gates(gates: Gates, bank: ModuleBank) -> torch.Tensor:
    """Gates ``(..., R)`` of all components, however the method gives them."""
    weights = gates.weights
    if gates.indices is not None:
        places = bank.A.shape[0] if gates.per == "component" else len(bank.ranks)
        weights = torch.zeros(*weights.shape[:-1], places).scatter(-1, gates.indices, weights)
    return weights if gates.per == "component" else weights[..., bank.component_experts]


def check_restricted(router: SequenceRouter, case: Case, rows: Mapping[str, torch.Tensor]) -> None:
    """A module restricted to the candidates that the rows use gives the same as all of it."""
    prepared = module_of(router, case)
    bank, x = prepared.bank, case.inputs()
    full, _ = run(prepared, router, rows, x)
    used = rows["weights"].reshape(-1, len(case.adapters))[:, list(bank.experts)].any(0)
    numbers = used.nonzero().squeeze(-1)
    components = used[bank.component_experts].nonzero().squeeze(-1)
    tensors = router.restrict(prepared.tensors, numbers, components)
    assert set(tensors) == set(prepared.tensors)
    h = x @ bank.A[components].mT
    gates = router.route({**tensors, **rows}, x, h if router.projects else None)
    small = ModuleBank(
        bank.module,
        bank.A[components],
        bank.B[:, components],
        tuple(bank.ranks[number] for number in numbers),
        tuple(bank.experts[number] for number in numbers),
    )
    assert gates.weights.shape[-1] == (len(components) if gates.per == "component" else len(numbers))
    if not len(numbers):
        assert not full.any()
        return
    assert_close(naive_update(x, small, gates, prepared.merge), full, 1e-6)
