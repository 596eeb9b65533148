"""Arrow against a loop-written float64 reference of SpectR's Eq. 2-5, where the paper restates it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from routing_cases import (
    MODULE,
    Case,
    Pair,
    adapter,
    assert_close,
    check_against,
    make_case,
    make_update,
    random_factors,
)

from hub_router.composition.assemble import prepare, stack
from hub_router.errors import MethodError
from hub_router.features import PoolFeatures
from hub_router.lora.adapter import LoraFactors
from hub_router.records import Spectrum
from hub_router.routing.arrow import Arrow


def reference(
    pairs: Sequence[Pair], top_k: int, temperature: float
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    prototypes = [torch.linalg.svd(B @ A)[2][0] for A, B in pairs]  # Eq. 2-4: dense SVD, first right vector

    def one(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = [abs(prototype @ x) for prototype in prototypes]  # Eq. 5
        best = sorted(range(len(pairs)), key=lambda e: (-scores[e].item(), e))[:top_k]
        total = sum(torch.exp(scores[e] / temperature) for e in best)
        y, weights = torch.zeros(pairs[0][1].shape[0], dtype=x.dtype), torch.zeros(len(pairs), dtype=x.dtype)
        for e in best:
            weight = torch.exp(scores[e] / temperature) / total
            y = y + weight * (pairs[e][1] @ (pairs[e][0] @ x))
            weights[e] = weight.detach()
        return y, weights

    return one


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.3), (4, 1.0), (100, 5.0)])
def test_equals_the_reference(case: Case, top_k: int, temperature: float) -> None:
    check_against(Arrow(top_k, temperature), case, reference(case.pairs, top_k, temperature))


def test_bfloat16_stays_near_the_reference() -> None:
    case = make_case([4, 4, 4], (2, 9))
    # All experts take part, so that rounding cannot change who is selected.
    got = make_update(Arrow(top_k=3), case, torch.bfloat16)(case.inputs(torch.bfloat16))
    rounded = [(A.bfloat16().double(), B.float().bfloat16().double()) for A, B in case.pairs]
    one = reference(rounded, 3, 1.0)
    x = case.inputs(torch.bfloat16).double()
    expected = torch.stack([one(token)[0] for token in x.reshape(-1, case.d_in)]).reshape(2, 9, -1)
    assert got.dtype == torch.bfloat16
    assert_close(got, expected, 2e-2)


def test_score_does_not_depend_on_the_sign_of_a_prototype() -> None:
    case = make_case([4, 2, 8], (2, 5))
    update, flipped = make_update(Arrow(top_k=2), case), make_update(Arrow(top_k=2), case)
    signs = torch.tensor([-1.0, 1.0, -1.0]).unsqueeze(-1)
    flipped.router_P.mul_(signs)
    assert torch.equal(update(case.inputs()), flipped(case.inputs()))


def test_sign_of_factors_does_not_matter() -> None:
    case = make_case([4, 4, 4], (2, 5))
    flip = {e: LoraFactors(-f.A, -f.B, f.scaling) for e, a in enumerate(case.adapters) for f in a.modules.values()}
    turned = replace(case, adapters=[replace(a, modules={MODULE: flip[e]}) for e, a in enumerate(case.adapters)])
    assert_close(make_update(Arrow(2), turned)(case.inputs()), make_update(Arrow(2), case)(case.inputs()), 1e-5)


def test_takes_prototypes_from_the_catalog() -> None:
    case = make_case([4, 4], (3,))
    bank = stack(case.adapters)
    direction = np.zeros(case.d_in, dtype=np.float32)
    direction[5] = 1.0
    known = Spectrum(MODULE, np.ones(4, dtype=np.float32), direction, ambiguous=False)
    state = prepare(Arrow(), bank, PoolFeatures({"adapter-1": {MODULE: known}, "stranger": {MODULE: known}}))[MODULE]
    assert torch.equal(state.tensors["P"][1], torch.from_numpy(direction))
    assert math.isclose(state.tensors["P"][0].norm().item(), 1.0, rel_tol=1e-5)


def test_catalog_prototype_of_another_width_is_refused() -> None:
    case = make_case([4, 4], (3,))
    known = Spectrum(MODULE, np.ones(4, dtype=np.float32), np.ones(7, dtype=np.float32), ambiguous=False)
    with pytest.raises(MethodError, match=r"'adapter-0'.*\(7,\), expected \(24,\).*hub-router index"):
        prepare(Arrow(), stack(case.adapters), PoolFeatures({"adapter-0": {MODULE: known}}))


def test_module_whose_updates_are_all_zero_is_the_base_module() -> None:
    zero = random_factors(0, 4, 24, 20)
    pool = [adapter("a", {MODULE: LoraFactors(zero.A, torch.zeros_like(zero.B), 1.0)})]
    update = make_update(Arrow(), Case(pool, [], (2,), 24))
    assert update(torch.ones(2, 24)) is None


def test_ties_go_to_the_first_adapters() -> None:
    factors = random_factors(3, 4, 24, 20)
    pool = [adapter(f"adapter-{e}", {MODULE: factors}) for e in range(6)]
    case = Case(pool, list(range(6)), (5,), 24)
    check_against(Arrow(top_k=2), case, reference(case.pairs, 2, 1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast_afterwards", [False, True])
def test_half_precision_chooses_what_the_reference_chooses(dtype: torch.dtype, cast_afterwards: bool) -> None:
    case = make_case([4] * 12, (500,), d_in=64)
    update = make_update(Arrow(top_k=3), case, torch.float32 if cast_afterwards else dtype).to(dtype)
    x = case.inputs(dtype)
    chosen = update.router.route(update.state(), x, None).indices
    assert chosen is not None
    prototypes = torch.stack([torch.linalg.svd(B @ A)[2][0] for A, B in case.pairs])
    for token, got in zip(x.double(), chosen, strict=True):
        scores = (prototypes @ token).abs()
        ordered = scores.sort(descending=True).values
        # Float32 may not tell apart what differs by less.
        if ordered[2] - ordered[3] > 1e-5 * ordered[0]:
            assert set(got.tolist()) == set(scores.topk(3).indices.tolist())


def test_autocast_does_not_round_the_scores() -> None:
    case = make_case([4] * 12, (200,), d_in=64)
    update = make_update(Arrow(top_k=3), case)
    expected = update.router.route(update.state(), case.inputs(), None)
    with torch.autocast("cpu", torch.bfloat16):
        got = update.router.route(update.state(), case.inputs(), None)
    assert got.indices is not None and expected.indices is not None
    assert torch.equal(got.indices, expected.indices)
