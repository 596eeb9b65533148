"""Pools of adapters on one linear map, and helpers to run a method on it beside its reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hub_router.composition.assemble import prepare, stack
from hub_router.composition.layer import RoutedUpdate
from hub_router.composition.maps import LinearMap
from hub_router.features import PoolFeatures
from hub_router.lora.adapter import LoraAdapter, LoraFactors
from hub_router.routing.base import Prepared, Router

MODULE = "model.layers.0.self_attn.q_proj"
OTHER = "model.layers.0.mlp.up_proj"
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A pool and an input.

    Args:
        adapters (list[LoraAdapter]): the pool.
        experts (list[int]): pool positions of those with a nonzero update in MODULE.
        shape (tuple[int, ...]): leading shape of the input.
        d_in (int): input width.
    """

    adapters: list[LoraAdapter]
    experts: list[int]
    shape: tuple[int, ...]
    d_in: int

    @property
    def pairs(self) -> list[Pair]:
        """(A_e, s_e B_e) in float64 of the experts above, the notation of METHODS."""
        factors = [self.adapters[e].modules[MODULE] for e in self.experts]
        return [(f.A.double(), f.scaling * f.B.double()) for f in factors]

    def inputs(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Deterministic inputs ``(*shape, d_in)``."""
        generator = torch.Generator().manual_seed(7)
        return torch.randn(*self.shape, self.d_in, generator=generator).to(dtype)


def adapter(name: str, modules: dict[str, LoraFactors]) -> LoraAdapter:
    return LoraAdapter(name, None, None, modules, f"hash of {name}")


def random_factors(seed: int, rank: int, d_in: int, d_out: int, scaling: float = 2.0) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, d_in, generator=generator) / d_in**0.5
    B = torch.randn(d_out, rank, generator=generator) / rank**0.5
    return LoraFactors(A, B, scaling)


def make_case(
    ranks: Sequence[int | None], shape: tuple[int, ...], d_in: int = 24, d_out: int = 20, zero: tuple[int, ...] = ()
) -> Case:
    """A pool with these ranks; None adapts another module only; ``zero`` has an all-zero B."""
    adapters = []
    for position, rank in enumerate(ranks):
        module = OTHER if rank is None else MODULE
        factors = random_factors(position, rank or 2, d_in, d_out, scaling=0.5 + position)
        if position in zero:
            factors = LoraFactors(factors.A, torch.zeros_like(factors.B), factors.scaling)
        adapters.append(adapter(f"adapter-{position}", {module: factors}))
    experts = [e for e, rank in enumerate(ranks) if rank is not None and e not in zero]
    return Case(adapters, experts, shape, d_in)


CASES = {
    "equal": lambda: make_case([4, 4, 4, 4, 4, 4], (2, 7)),
    "mixed": lambda: make_case([1, 8, 3, 16, 2], (1, 63)),
    "one": lambda: make_case([5], (3,)),
    "holes": lambda: make_case([4, None, 4, 4, None], (1, 1)),
    "zero": lambda: make_case([3, 3, 3, 3], (2, 3, 5), zero=(1,)),
    "wide": lambda: make_case([6, 2], (4, 1), d_in=5, d_out=40),
    "empty": lambda: make_case([2, 2], (0, 3)),
}
EQUAL = ("equal", "one", "holes", "zero")


def make_update(router: Router, case: Case, dtype: torch.dtype = torch.float32) -> RoutedUpdate:
    """The engine's update of MODULE for this pool."""
    bank = stack(case.adapters)
    router.check(bank)
    prepared = prepare(router, bank, PoolFeatures())[MODULE]
    return RoutedUpdate(router, prepared, len(case.adapters), some_map(prepared, dtype))


def some_map(prepared: Prepared, dtype: torch.dtype = torch.float32) -> LinearMap:
    """A linear map of the base model for an update that does not depend on its weight."""
    bank = prepared.bank
    return LinearMap(nn.Linear(bank.d_in, bank.d_out, dtype=dtype), lookup=False)


def per_token(
    x: torch.Tensor, one: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply a reference for one token to all tokens: outputs ``(..., D_out)`` and weights ``(..., C)``."""
    results = [one(token) for token in x.reshape(-1, x.shape[-1])]
    outputs, weights = (torch.stack([result[which] for result in results]) for which in (0, 1))
    return outputs.reshape(*x.shape[:-1], -1), weights.reshape(*x.shape[:-1], -1)


class _Weights:
    def __init__(self) -> None:
        self.last: torch.Tensor | None = None

    def record(self, module: str, weights: torch.Tensor) -> None:
        self.last = weights


def check_against(
    router: Router,
    case: Case,
    one: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    tolerance: float = 1e-5,
) -> None:
    """Compare the engine with a reference for one token: output, weights, and the gradient of the input."""
    update = make_update(router, case)
    seen = _Weights()
    update.recorder = seen
    x = case.inputs().requires_grad_()
    got = update(x)
    if x.numel() == 0:
        assert got.shape == (*case.shape, 20)
        return
    truth_x = case.inputs().double().requires_grad_()
    expected, weights = per_token(truth_x, one)
    assert_close(got, expected, tolerance)
    assert seen.last is not None
    assert_close(seen.last[..., case.experts], weights, tolerance)
    others = [e for e in range(len(case.adapters)) if e not in case.experts]
    assert seen.last.shape == (*case.shape, len(case.adapters))
    assert not seen.last[..., others].any()
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (got * direction.float()).sum().backward()
    (expected * direction).sum().backward()
    assert x.grad is not None and truth_x.grad is not None
    assert_close(x.grad, truth_x.grad, tolerance)


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Largest error relative to the largest value of the reference."""
    assert got.shape == expected.shape
    scale = max(expected.abs().max().item(), 1e-12)
    error = (got.double() - expected.double()).abs().max().item() / scale
    assert error <= tolerance, f"relative error {error:.2e}"
