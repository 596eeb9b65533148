"""What the tests of the methods share that make one update of a whole pool."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from routing_cases import MODULE, Case, assert_close, some_map

from hub_router.composition.assemble import stack
from hub_router.composition.layer import RoutedUpdate
from hub_router.features import ModuleFeatures
from hub_router.lora.adapter import LoraAdapter
from hub_router.routing.base import Prepared, Router


def merge(router: Router, adapters: Sequence[LoraAdapter], module: str = MODULE) -> Prepared:
    """The method's state of one module of a pool that it accepts."""
    pool = stack(adapters)
    router.check(pool)
    return router.prepare(pool.modules[module], pool.adapters, ModuleFeatures())


def product(prepared: Prepared) -> torch.Tensor:
    """The update that stands for all, ``(D_out, D_in)`` in float64."""
    return prepared.bank.B.double() @ prepared.bank.A.double()


class _Seen:
    weights: torch.Tensor

    def record(self, module: str, weights: torch.Tensor) -> None:
        self.weights = weights


def check_in_the_engine(
    router: Router, prepared: Prepared, case: Case, expected: torch.Tensor, tolerance: float
) -> None:
    """What the engine adds is the reference's update of every token, and a trace shows the shares."""
    update = RoutedUpdate(router, prepared, len(case.adapters), some_map(prepared))
    seen = _Seen()
    update.recorder = seen
    x = case.inputs()
    got = update(x)
    assert got.shape == (*case.shape, len(expected))
    if x.numel():
        assert_close(got, x.double() @ expected.T, tolerance)
    assert prepared.shares is not None
    assert torch.equal(seen.weights, prepared.shares.expand(*case.shape, len(case.adapters)))


def check_merge(router: Router, case: Case, expected: torch.Tensor, shares: torch.Tensor, tolerance: float) -> Prepared:
    """Compare the one update and the experts' shares ``(C,)`` with a reference's, and look at the rest of the state."""
    prepared = merge(router, case.adapters)
    assert_close(product(prepared), expected, tolerance)
    bank = prepared.bank
    assert bank.ranks == (bank.A.shape[0],) == (bank.B.shape[1],)
    assert bank.experts == (case.experts[0],)
    assert prepared.own_factors and prepared.merge == "outputs"
    assert prepared.shares is not None and prepared.shares.dtype == torch.float32
    assert_close(prepared.shares[case.experts], shares, 1e-6)
    others = [e for e in range(len(case.adapters)) if e not in case.experts]
    assert prepared.shares.shape == (len(case.adapters),) and not prepared.shares[others].any()
    check_in_the_engine(router, prepared, case, expected, tolerance)
    gates = router.route(prepared.tensors, case.inputs(torch.bfloat16), None)
    assert gates.indices is None and torch.equal(gates.weights, torch.ones(1))
    return prepared
