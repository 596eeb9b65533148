"""Every method in the engine, in every precision, on equal and ragged pools, against float64 loops.

The reference takes the factors and inputs as the engine has them, rounded, and goes on in float64 with loops over
tokens and components (``naive.py``); each method's own test holds its gates to the paper's equations. In half precision
the methods that choose by ``h = A x`` may choose otherwise, for h is rounded; those tokens are counted apart. Run with
``-s`` to see the table.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from routing_cases import MODULE, Case, make_case, some_map
from sequence_cases import gaussians_of, inputs_near

from hub_router.composition.assemble import prepare, stack
from hub_router.composition.layer import RoutedUpdate
from hub_router.composition.naive import naive_update
from hub_router.composition.plan import Plan, Planner
from hub_router.composition.stacked import dense_weights
from hub_router.errors import MethodError
from hub_router.features import PoolFeatures
from hub_router.lora.bank import ModuleBank
from hub_router.routing.base import Gates, Router, SequenceRouter
from hub_router.routing.registry import METHODS, create

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SETTINGS = {
    "single": {"adapter": "adapter-1"},
    "lego": {"clusters": 30},
    **{method: {"prototypes": "random"} for method in ("phatgoose", "maple", "lora-mixer", "xlora", "mixlora")},
}
POOLS = {
    "equal": lambda: make_case([4] * 24, (3, 11), zero=(5,)),
    "ragged": lambda: make_case(
        [1, 8, 3, 16, 2, None, 7, 1, 5, 12, 4, None, 3, 30, 2, 6, 9, 1, 20], (3, 11), zero=(4,)
    ),
}


def random_vectors(case: Case, method: str) -> PoolFeatures:
    """A prototype set with a vector for every adapter and module; X-LoRA's have a bias at the end."""
    rng = np.random.default_rng(11)
    width = case.d_in + (method == "xlora")
    vectors = {
        each.name: {module: rng.standard_normal(width).astype(np.float32) for module in each.modules}
        for each in case.adapters
    }
    return PoolFeatures(prototypes={"random": vectors}, widths={MODULE: case.d_in})


def engine(router: Router, case: Case, dtype: torch.dtype) -> RoutedUpdate:
    bank = stack(case.adapters)
    router.check(bank)
    prepared = prepare(router, bank, random_vectors(case, router.name))[MODULE]
    planner = None
    if isinstance(router, SequenceRouter):
        state = router.plan_state(bank, gaussians_of(case))
        planner = Planner(router, state, SimpleNamespace(name="made up", encode=None), None)
        embeddings = torch.from_numpy(inputs_near(case, case.shape[0]))
        planner.plan = Plan(router.plan(state, embeddings, range(case.shape[0])), case.shape[1])
    return RoutedUpdate(router, prepared, len(case.adapters), some_map(prepared, dtype), planner)


def truth(update: RoutedUpdate, x: torch.Tensor) -> tuple[torch.Tensor, Gates]:
    """The same factors and router state in float64, gate by gate and loop by loop."""
    tensors = {name: t.double() if t.is_floating_point() else t for name, t in update.state().items()}
    if update.planner is not None:
        assert update.planner.plan is not None
        tensors |= update.planner.plan.spread(MODULE, x.shape[:-1], x.device)
    A = update.A.double()
    bank = ModuleBank(MODULE, A, update.Bt.double().mT, update.ranks, tuple(update.experts.tolist()))
    gates = update.router.route(tensors, x, x @ A.mT if update.router.projects else None)
    return naive_update(x, bank, gates, update.merge), gates


def choices(update: RoutedUpdate, x: torch.Tensor, gates: Gates) -> torch.Tensor:
    """Tokens for which the engine's projections lead to the reference's choice ``(B, T)``."""
    tensors = dict(update.state())
    if update.planner is not None:
        assert update.planner.plan is not None
        tensors |= update.planner.plan.spread(MODULE, x.shape[:-1], x.device)
    own = update.router.route(tensors, x, x @ update.A.mT if update.router.projects else None)
    count = update.A.shape[0] if gates.per == "component" else len(update.ranks)
    chosen, other = (dense_weights(each, count) != 0 for each in (gates, own))
    return (chosen == other).all(-1).expand(x.shape[:-1])


def relative(got: torch.Tensor, expected: torch.Tensor, same: torch.Tensor) -> float:
    if not expected[same].any():
        return float(got[same].abs().max()) if same.any() else 0.0
    return float((got.double() - expected)[same].abs().max() / expected[same].abs().max())


@pytest.mark.parametrize("pool", list(POOLS))
@pytest.mark.parametrize("method", list(METHODS))
def test_engine_equals_float64_loops_in_every_precision(method: str, pool: str) -> None:
    case = POOLS[pool]()
    router = create(method, SETTINGS.get(method, {}))
    cells = []
    for dtype, tolerance in TOLERANCE.items():
        try:
            update = engine(router, case, dtype)
        except MethodError as error:
            assert pool == "ragged", error
            print(f"{method:20} {pool:7} refused: ranks differ")
            return
        x = case.inputs(dtype).requires_grad_()
        wide = x.detach().double().requires_grad_()
        got = update(x)
        if got is None:
            assert method == "base"
            return
        expected, gates = truth(update, wide)
        same = choices(update, x.detach(), gates)
        direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
        # Tokens are independent of each other, so a token of another choice spoils its own gradient alone.
        (found,) = torch.autograd.grad((got * direction).sum(), x)
        (true,) = torch.autograd.grad((expected * direction.double()).sum(), wide)
        errors = relative(got.detach(), expected.detach(), same), relative(found, true, same)
        changed = int((~same).sum())
        cells.append(f"{errors[0]:.0e} {errors[1]:.0e}" + (f" ({changed}/{same.numel()})" if changed else ""))
        assert max(errors) <= tolerance, f"{dtype}: {errors}"
        assert changed == 0 or (router.projects and dtype in (torch.float16, torch.bfloat16))
        assert changed <= same.numel() // 2
    print(f"{method:20} {pool:7} " + "  ".join(f"{cell:22}" for cell in cells))
