"""The gates of xlora and mixlora against loop-written float64 references; whole models are in tests/composition."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from routing_cases import MODULE, Case, assert_close, make_case

from hub_router.composition.assemble import prepare, stack
from hub_router.composition.stacked import dense_weights
from hub_router.errors import MethodError
from hub_router.features import PoolFeatures
from hub_router.routing.base import OuterRouter, Router
from hub_router.routing.mixlora import Mixlora
from hub_router.routing.trained import PROTOTYPES
from hub_router.routing.xlora import Xlora

Rule = Callable[[Sequence[torch.Tensor], torch.Tensor], list[torch.Tensor]]


def xlora_rule(temperature: float, top_k: int | None) -> Rule:
    """X-LoRA's classifier of one layer: a softmax of affine scores, of which the best are left as they are."""

    def weights(vectors: Sequence[torch.Tensor], z: torch.Tensor) -> list[torch.Tensor]:
        scores = [(v[:-1] @ z + v[-1]) / temperature for v in vectors]
        shares = [torch.exp(s) / sum(torch.exp(t) for t in scores) for s in scores]
        best = sorted(range(len(shares)), key=lambda e: (-shares[e].item(), e))[:top_k]
        return [share if e in best else torch.zeros_like(share) for e, share in enumerate(shares)]

    return weights


def mixlora_rule(top_k: int) -> Rule:
    """MixLoRA, Eq. 3 and 4: a softmax over all, the best of which are divided by their sum."""

    def weights(vectors: Sequence[torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
        shares = [torch.exp(v @ x) / sum(torch.exp(u @ x) for u in vectors) for v in vectors]
        best = sorted(range(len(shares)), key=lambda e: (-shares[e].item(), e))[:top_k]
        total = sum(shares[e] for e in best)
        return [share / total if e in best else torch.zeros_like(share) for e, share in enumerate(shares)]

    return weights


RULES: list[tuple[Router, Rule]] = [
    (Xlora(), xlora_rule(1.0, None)),
    (Xlora(top_k=2, temperature=0.5), xlora_rule(0.5, 2)),
    (Mixlora(), mixlora_rule(2)),
    (Mixlora(top_k=1), mixlora_rule(1)),
    (Mixlora(top_k=50), mixlora_rule(50)),
]


@pytest.mark.parametrize(("router", "rule"), RULES)
@pytest.mark.parametrize("ranks", [[4, 4, 4, 4, 4], [1, 8, 3, 16, 2], [5]])
def test_gates_and_their_gradients(router: Router, rule: Rule, ranks: list[int]) -> None:
    case = make_case(ranks, (2, 7))
    x = case.inputs()
    width = case.d_in + (router.name == "xlora")
    vectors = torch.randn(len(ranks), width, generator=torch.Generator().manual_seed(4)).requires_grad_()
    wide = [row.detach().double().requires_grad_() for row in vectors]
    got = dense_weights(router.route({PROTOTYPES: vectors}, x, None), len(ranks))
    rows = [torch.stack(rule(wide, token)) for token in x.double().reshape(-1, case.d_in)]
    expected = torch.stack(rows).reshape(2, 7, -1)
    assert_close(got.detach(), expected.detach(), 1e-5)
    direction = torch.randn(2, 7, len(ranks), generator=torch.Generator().manual_seed(5))
    (found,) = torch.autograd.grad((got * direction).sum(), vectors)
    true = torch.autograd.grad((expected * direction.double()).sum(), wide)
    if len(ranks) > 1 and router != Mixlora(top_k=1):
        assert_close(found, torch.stack(true), 1e-5)
    else:
        assert found.abs().max() < 1e-6
    assert isinstance(router, OuterRouter)


def prepared(case: Case, router: Router, features: PoolFeatures) -> torch.Tensor:
    return prepare(router, stack(case.adapters), features)[MODULE].tensors[PROTOTYPES]


def test_the_start() -> None:
    case = make_case([4, 4, 4], (2, 7))
    assert torch.equal(prepared(case, Xlora(), PoolFeatures(widths={MODULE: 24})), torch.zeros(3, 25))
    gates = prepared(case, Mixlora(), PoolFeatures(widths={MODULE: 24}))
    assert gates.shape == (3, 24)
    assert 0.01 < gates.std() < 0.03
    assert torch.equal(gates, prepared(case, Mixlora(), PoolFeatures(widths={MODULE: 24})))
    weights = dense_weights(Xlora().route({PROTOTYPES: torch.zeros(3, 25)}, case.inputs(), None), 3)
    assert_close(weights, torch.full((2, 7, 3), 1 / 3), 1e-5)
    assert math.isclose(float(weights[0, 0].sum()), 1, rel_tol=1e-6)


@pytest.mark.parametrize("router", [Xlora(prototypes="set"), Mixlora(prototypes="set")])
def test_vectors_of_another_length_are_refused(router: Router) -> None:
    case = make_case([4, 4], (2, 7))
    vectors = {each.name: {MODULE: np.zeros(7, np.float32)} for each in case.adapters}
    with pytest.raises(MethodError, match=r"'adapter-0' has one of shape \(7,\)"):
        prepared(case, router, PoolFeatures(prototypes={"set": vectors}, widths={MODULE: 24}))
