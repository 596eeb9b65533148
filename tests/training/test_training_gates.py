"""Each recipe's gate while it is trained, forward and backward, against loop-written float64 references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from routing_cases import MODULE, Case, adapter, assert_close, make_case, random_factors, some_map
from torch import nn

from hub_router.composition.assemble import prepare, stack
from hub_router.composition.layer import RoutedUpdate
from hub_router.composition.maps import LinearMap
from hub_router.errors import TrainingError
from hub_router.features import PoolFeatures
from hub_router.routing.base import Router
from hub_router.routing.lora_mixer import LoraMixer
from hub_router.routing.maple import Maple
from hub_router.routing.phatgoose import Phatgoose
from hub_router.training.gating import Reading, TrainedGate
from hub_router.training.lora_mixer import LoraMixerRecipe
from hub_router.training.maple import MapleRecipe
from hub_router.training.phatgoose import PhatgooseRecipe
from hub_router.training.recipe import Recipe

Rule = Callable[[Sequence[torch.Tensor], torch.Tensor, int | None], list[torch.Tensor]]

# Two sequences each; "flat" has lost the axis of sequences.
CASES = {
    "equal": lambda: make_case([4] * 6, (2, 7)),
    "ragged": lambda: make_case([1, 8, 3, 16, 2], (2, 9)),
    "holes": lambda: make_case([4, None, 4, 4, None], (2, 5)),
    "one": lambda: make_case([5], (2, 3)),
    "zero": lambda: make_case([3, 3, 3, 3], (2, 3, 5), zero=(1,)),
    "flat": lambda: make_case([4, 2, 3, 5], (14,)),
    "many": lambda: make_case([4] * 24, (2, 11)),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def vectors_of(case: Case) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(4)
    return {
        each.name: {
            module: 0.5 * rng.standard_normal(factors.A.shape[1]).astype(np.float32)
            for module, factors in each.modules.items()
        }
        for each in case.adapters
    }


def update_of(router: Router, case: Case) -> RoutedUpdate:
    features = PoolFeatures(prototypes={"set": vectors_of(case)})
    prepared = prepare(router, stack(case.adapters), features)[MODULE]
    return RoutedUpdate(router, prepared, len(case.adapters), some_map(prepared))


def arrow_scores(vectors: Sequence[torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    return [abs(p @ x) for p in vectors]


def phatgoose_scores(vectors: Sequence[torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    def standard(v: torch.Tensor) -> torch.Tensor:
        return (v - v.mean()) / ((v - v.mean()) ** 2).mean().sqrt()

    return [standard(x) @ standard(v) / len(x) ** 0.5 for v in vectors]


def softmax(scores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    largest = max(float(score.detach()) for score in scores)
    powers = [torch.exp(score - largest) for score in scores]
    return [power / sum(powers) for power in powers]


def maple_rule(score: Callable[..., list[torch.Tensor]], top_k: int, mask: str) -> Rule:
    """MAPLE, Algorithm 1 and Fig. 2: the top k, without the input's own adapter, softmax over the rest."""

    def weights(vectors: Sequence[torch.Tensor], x: torch.Tensor, own: int | None) -> list[torch.Tensor]:
        scores = score(vectors, x)
        everyone = sorted(range(len(scores)), key=lambda e: (-float(scores[e].detach()), e))
        best = [e for e in everyone if mask != "before" or e != own][:top_k]
        if mask == "after":
            best = [e for e in best if e != own]
        found = [torch.zeros((), dtype=torch.float64)] * len(scores)
        if best:
            for e, weight in zip(best, softmax([scores[e] for e in best]), strict=True):
                found[e] = weight
        return found

    return weights


def mixer_rule(vectors: Sequence[torch.Tensor], x: torch.Tensor, own: int | None) -> list[torch.Tensor]:
    """LoRA-Mixer, stage 2: p = softmax(V x), all of it."""
    return softmax([v @ x for v in vectors])


def phatgoose_rule(vectors: Sequence[torch.Tensor], x: torch.Tensor, own: int | None) -> list[torch.Tensor]:
    """PHATGOOSE, Sec. 3.1: the own adapter by sigmoid(v . x), no other."""
    nothing = torch.zeros((), dtype=torch.float64)
    return [1 / (1 + torch.exp(-(v @ x))) if e == own else nothing for e, v in enumerate(vectors)]


def truth(case: Case, rule: Rule, own: Sequence[int], x: torch.Tensor, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Token by token, adapter by adapter; ``own`` are pool positions of the sequences."""
    tokens = x.reshape(-1, x.shape[-1])
    rows = []
    for number, token in enumerate(tokens):
        mine = own[number // (len(tokens) // len(own))]
        weights = rule(vectors, token, case.experts.index(mine) if mine in case.experts else None)
        y = torch.zeros(case.pairs[0][1].shape[0], dtype=torch.float64)
        for (A, B), weight in zip(case.pairs, weights, strict=True):
            y = y + weight * (B @ (A @ token))
        rows.append(y)
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


def owners(case: Case) -> list[int]:
    """The last candidate, and an adapter that is none where there is one."""
    others = [e for e in range(len(case.adapters)) if e not in case.experts]
    return [case.experts[-1], others[0] if others else case.experts[0]]


def check(
    recipe: Recipe,
    router: Router,
    case: Case,
    rule: Rule,
    own: Sequence[int],
    trained: Sequence[int] | None = None,
) -> None:
    """Output, gradient of the vectors and gradient of the input."""
    update, reading = update_of(router, case), Reading()
    reading.begin(torch.tensor(own), (torch.ones(1),), spreading=False, observing=False)
    gate = TrainedGate([update], partial(recipe.gate, router), reading)
    update.router = gate  # type: ignore[assignment]
    leaf = gate.select(range(len(case.adapters)) if trained is None else trained)
    rows = gate.rows.tolist()
    x = case.inputs().requires_grad_()
    got = update(x)
    wide = case.inputs().double().requires_grad_()
    stored = gate.stored.double()
    leaves = [row.clone().requires_grad_() for row in stored]
    expected = truth(case, rule, own, wide, leaves)
    assert got is not None
    assert_close(got, expected, 1e-5)
    if not expected.requires_grad or leaf is None:
        assert not got.any()
        return
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    wanted = [leaves[row] for row in rows]
    true = torch.autograd.grad((expected * direction).sum(), [wide, *wanted], allow_unused=True)
    found = torch.autograd.grad((got * direction.float()).sum(), [x, leaf])
    zeros = torch.zeros(case.d_in, dtype=torch.float64)
    assert_close(found[0], true[0], 1e-5)
    assert_close(found[1], torch.stack([zeros if each is None else each for each in true[1:]]), 1e-5)


@pytest.mark.parametrize("mask", ["after", "before", "none"])
@pytest.mark.parametrize("top_k", [1, 3, 100])
@pytest.mark.parametrize(("parent", "score"), [("arrow", arrow_scores), ("phatgoose", phatgoose_scores)])
def test_maple(case: Case, parent: str, score: Callable[..., list[torch.Tensor]], top_k: int, mask: str) -> None:
    router = Maple(parent, top_k, "set")
    check(MapleRecipe(mask=mask), router, case, maple_rule(score, top_k, mask), owners(case))


def test_lora_mixer(case: Case) -> None:
    check(LoraMixerRecipe(), LoraMixer(prototypes="set"), case, mixer_rule, owners(case))


def test_phatgoose(case: Case) -> None:
    for own in (case.experts[0], case.experts[-1]):
        check(PhatgooseRecipe(), Phatgoose(prototypes="set"), case, phatgoose_rule, [own, own], [own])


def test_phatgoose_of_an_adapter_that_is_no_candidate_is_the_base_module() -> None:
    case = CASES["holes"]()
    check(PhatgooseRecipe(), Phatgoose(prototypes="set"), case, phatgoose_rule, [1, 1], [1])


@pytest.mark.parametrize("mask", ["after", "before"])
def test_a_pool_of_one_is_the_base_module_without_gradients_that_are_no_numbers(mask: str) -> None:
    case = CASES["one"]()
    update, reading = update_of(Maple(prototypes="set"), case), Reading()
    reading.begin(torch.tensor([0, 0]), (torch.ones(1),), spreading=False, observing=False)
    gate = TrainedGate([update], partial(MapleRecipe(mask=mask).gate, update.router), reading)
    update.router = gate  # type: ignore[assignment]
    leaf = gate.select([0])
    x = case.inputs().requires_grad_()
    got = update(x)
    assert got is not None and leaf is not None
    assert not got.any()
    for gradient in torch.autograd.grad(got.sum(), [x, leaf]):
        assert torch.isfinite(gradient).all() and not gradient.any()


def test_every_chosen_adapter_but_the_own_one_is_left() -> None:
    # Fig. 2: with the own adapter among the top k, k - 1 share the token; without it, k.
    case = make_case([4] * 6, (2, 40))
    router = Maple(top_k=3, prototypes="set")
    update, reading = update_of(router, case), Reading()
    reading.begin(torch.tensor([2, 4]), (torch.ones(1),), spreading=False, observing=False)
    gate = TrainedGate([update], partial(MapleRecipe().gate, router), reading)
    gates = gate.route({}, case.inputs(), None)
    plain = router.route(update.state(), case.inputs(), None)
    assert gates.indices is not None and plain.indices is not None
    assert torch.equal(gates.indices, plain.indices)
    own = plain.indices == torch.tensor([2, 4]).view(2, 1, 1)
    assert torch.equal(gates.weights == 0, own)
    assert_close(gates.weights.sum(-1), torch.ones(2, 40).double(), 1e-6)
    assert own.any() and not own.any(-1).all()


@pytest.mark.parametrize("kind", ["maple arrow", "maple phatgoose", "phatgoose", "lora-mixer"])
def test_embeddings_take_token_ids(kind: str) -> None:
    factors = [replace(random_factors(seed, rank, 30, 16), lookup=True) for seed, rank in enumerate((2, 5, 3))]
    pool = [adapter(f"adapter-{e}", {MODULE: each}) for e, each in enumerate(factors)]
    case = Case(pool, [0, 1, 2], (2, 9), 30)
    recipe: Recipe
    router: Router
    recipe, router, rule = {
        "maple arrow": (MapleRecipe(), Maple("arrow", 2, "set"), maple_rule(arrow_scores, 2, "after")),
        "maple phatgoose": (MapleRecipe(), Maple("phatgoose", 2, "set"), maple_rule(phatgoose_scores, 2, "after")),
        "phatgoose": (PhatgooseRecipe(), Phatgoose(prototypes="set"), phatgoose_rule),
        "lora-mixer": (LoraMixerRecipe(), LoraMixer(prototypes="set"), mixer_rule),
    }[kind]  # type: ignore[assignment]
    own = [1, 1] if kind == "phatgoose" else [0, 2]
    prepared = prepare(router, stack(pool), PoolFeatures(prototypes={"set": vectors_of(case)}))[MODULE]
    update, reading = RoutedUpdate(router, prepared, 3, LinearMap(nn.Embedding(30, 16), lookup=True)), Reading()
    reading.begin(torch.tensor(own), (torch.ones(1),), spreading=False, observing=False)
    gate = TrainedGate([update], partial(recipe.gate, router), reading)
    update.router = gate  # type: ignore[assignment]
    leaf = gate.select([1] if kind == "phatgoose" else [0, 1, 2])
    assert leaf is not None
    ids = torch.randint(30, (2, 9), generator=torch.Generator().manual_seed(3))
    got = update(ids)
    assert got is not None
    leaves = [row.clone().requires_grad_() for row in gate.stored.double()]
    expected = truth(case, rule, own, torch.nn.functional.one_hot(ids, 30).double(), leaves)
    assert_close(got, expected, 1e-5)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    true = torch.autograd.grad((expected * direction).sum(), [leaves[row] for row in gate.rows.tolist()])
    (found,) = torch.autograd.grad((got * direction.float()).sum(), [leaf])
    assert_close(found, torch.stack(true), 1e-5)


def test_trained_vectors_are_put_where_they_came_from() -> None:
    case = make_case([4, None, 2, 3], (2, 3))
    update = update_of(LoraMixer(prototypes="set"), case)
    before = update.state()["P"].clone()
    gate = TrainedGate([update], partial(LoraMixerRecipe().gate, update.router), Reading())
    leaf = gate.select([1, 2])
    assert leaf is not None and leaf.shape == (1, 24)
    with torch.no_grad():
        leaf.fill_(7.0)
    assert torch.equal(update.state()["P"], before)
    gate.put()
    assert (update.state()["P"][1] == 7).all()
    assert torch.equal(update.state()["P"][[0, 2]], before[[0, 2]])
    assert not update.state()["P"].requires_grad
    assert gate.select([1]) is None


def test_inputs_that_cannot_be_told_apart_are_an_error() -> None:
    case = make_case([4, 4], (7,))
    update, reading = update_of(Maple(prototypes="set"), case), Reading()
    reading.begin(torch.tensor([0, 1]), (torch.ones(1),), spreading=False, observing=False)
    update.router = TrainedGate([update], partial(MapleRecipe().gate, update.router), reading)  # type: ignore[assignment]
    with pytest.raises(TrainingError, match=r"\(7,\) in a batch of 2 sequences"):
        update(case.inputs())


def test_unknown_mask() -> None:
    with pytest.raises(TrainingError, match=r"mask='half', expected after or before or none"):
        MapleRecipe(mask="half")
