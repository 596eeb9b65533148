"""phatgoose, maple and lora-mixer against loop-written float64 references of their papers' inference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from routing_cases import (
    MODULE,
    OTHER,
    Case,
    Pair,
    adapter,
    assert_close,
    make_case,
    make_update,
    per_token,
    random_factors,
    some_map,
)
from torch import nn

from hub_router.composition.assemble import prepare, stack
from hub_router.composition.layer import RoutedUpdate
from hub_router.composition.maps import LinearMap
from hub_router.errors import MethodError
from hub_router.features import PoolFeatures
from hub_router.routing.arrow import Arrow
from hub_router.routing.base import Router
from hub_router.routing.lora_mixer import LoraMixer
from hub_router.routing.maple import Maple
from hub_router.routing.phatgoose import Phatgoose
from hub_router.routing.registry import create
from hub_router.routing.trained import PROTOTYPES, standardise

SET = "gates@2"
TRAINED = ["phatgoose", "maple", "lora-mixer"]
Rule = Callable[[Sequence[torch.Tensor], torch.Tensor], list[torch.Tensor]]


def random_set(case: Case, seed: int = 5, scale: float = 1.0) -> dict[str, dict[str, np.ndarray]]:
    """A vector for every adapter and module that it adapts."""
    rng = np.random.default_rng(seed)
    return {
        each.name: {
            module: (scale * rng.standard_normal(factors.A.shape[1])).astype(np.float32)
            for module, factors in each.modules.items()
        }
        for each in case.adapters
    }


def known(case: Case, seed: int = 5) -> PoolFeatures:
    return PoolFeatures(prototypes={SET: random_set(case, seed)})


def update_of(router: Router, case: Case, features: PoolFeatures, dtype: torch.dtype = torch.float32) -> RoutedUpdate:
    prepared = prepare(router, stack(case.adapters), features)[MODULE]
    return RoutedUpdate(router, prepared, len(case.adapters), some_map(prepared, dtype))


def arrow_scores(vectors: Sequence[torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    return [abs(p @ x) for p in vectors]


def phatgoose_scores(vectors: Sequence[torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    def standard(v: torch.Tensor) -> torch.Tensor:
        deviation = ((v - v.mean()) ** 2).mean().sqrt()
        return (v - v.mean()) / deviation

    return [standard(x) @ standard(v) / math.sqrt(len(x)) for v in vectors]  # PHATGOOSE, Sec. 3.2


def softmax_of_best(scores: Sequence[torch.Tensor], top_k: int) -> list[torch.Tensor]:
    """Weights of all candidates: a softmax over the best, ties to the first; the others none."""
    best = sorted(range(len(scores)), key=lambda e: (-scores[e].item(), e))[:top_k]
    total = sum(torch.exp(scores[e] - scores[best[0]].detach()) for e in best)
    nothing = torch.zeros((), dtype=torch.float64)
    return [
        torch.exp(scores[e] - scores[best[0]].detach()) / total if e in best else nothing for e in range(len(scores))
    ]


def parent_weights(score: Rule, top_k: int) -> Rule:
    return lambda vectors, x: softmax_of_best(score(vectors, x), top_k)


def mixer_weights(top_k: int) -> Rule:
    """LoRA-Mixer, Eq. 1-4: p of all candidates, the best of them as they are."""

    def weights(vectors: Sequence[torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
        logits = [v @ x for v in vectors]
        largest = max(logits).detach()
        total = sum(torch.exp(logit - largest) for logit in logits)
        p = [torch.exp(logit - largest) / total for logit in logits]
        best = sorted(range(len(p)), key=lambda e: (-p[e].item(), e))[:top_k]
        return [share if e in best else share * 0 for e, share in enumerate(p)]

    return weights


def reference(
    pairs: Sequence[Pair], vectors: Sequence[torch.Tensor], rule: Rule
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    def one(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = rule(vectors, x)
        y = torch.zeros(pairs[0][1].shape[0], dtype=x.dtype)
        for (A, B), weight in zip(pairs, weights, strict=True):
            y = y + weight * (B @ (A @ x))
        return y, torch.stack([weight.detach() for weight in weights])

    return one


class Weights:
    def __init__(self) -> None:
        self.last = torch.zeros(0)

    def record(self, module: str, weights: torch.Tensor) -> None:
        self.last = weights


def check(router: Router, case: Case, rule: Rule) -> None:
    """Output, weights and gradient of the input."""
    features = known(case)
    update = update_of(router, case, features)
    update.recorder = seen = Weights()
    x = case.inputs().requires_grad_()
    got = update(x)
    if x.numel() == 0:
        assert got.shape == (*case.shape, 20)
        return
    names = [case.adapters[e].name for e in case.experts]
    vectors = [torch.from_numpy(features.prototypes[SET][name][MODULE]).double() for name in names]
    truth_x = case.inputs().double().requires_grad_()
    expected, weights = per_token(truth_x, reference(case.pairs, vectors, rule))
    assert_close(got, expected, 1e-5)
    assert_close(seen.last[..., case.experts], weights, 1e-5)
    others = [e for e in range(len(case.adapters)) if e not in case.experts]
    assert not seen.last[..., others].any()
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (found,) = torch.autograd.grad((got * direction.float()).sum(), x)
    (true,) = torch.autograd.grad((expected * direction).sum(), truth_x)
    assert_close(found, true, 1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 100])
def test_phatgoose_equals_the_reference(case: Case, top_k: int) -> None:
    check(Phatgoose(top_k, prototypes=SET), case, parent_weights(phatgoose_scores, top_k))


@pytest.mark.parametrize("top_k", [1, 3, 100])
@pytest.mark.parametrize(("parent", "score"), [("arrow", arrow_scores), ("phatgoose", phatgoose_scores)])
def test_maple_equals_its_parents_rule(case: Case, parent: str, score: Rule, top_k: int) -> None:
    check(Maple(parent, top_k, SET), case, parent_weights(score, top_k))


@pytest.mark.parametrize("top_k", [1, 3, 100])
def test_lora_mixer_equals_the_reference(case: Case, top_k: int) -> None:
    check(LoraMixer(top_k, SET), case, mixer_weights(top_k))


def test_defaults_are_the_papers() -> None:
    assert (Phatgoose().top_k, LoraMixer().top_k, Maple().count, Maple("phatgoose").count) == (2, 3, 4, 2)
    assert Maple(top_k=7).count == 7


@pytest.mark.parametrize("top_k", [None, 1, 100])
def test_untrained_maple_is_arrow_bit_for_bit(case: Case, top_k: int | None) -> None:
    arrow = Arrow() if top_k is None else Arrow(top_k)
    update, parent = make_update(Maple(top_k=top_k), case), make_update(arrow, case)
    update.recorder, parent.recorder = seen, expected = Weights(), Weights()
    assert torch.equal(update(case.inputs()), parent(case.inputs()))
    assert torch.equal(seen.last, expected.last)


def test_untrained_lora_mixer_gives_every_candidate_the_same_share() -> None:
    case = make_case([4, None, 1, 16, 2, 3], (2, 5))
    update = make_update(LoraMixer(), case)
    update.recorder = seen = Weights()
    update(case.inputs())
    chosen = torch.zeros(6)
    chosen[[0, 2, 3]] = 1 / 5  # ties go to the first three of five candidates
    assert torch.equal(seen.last, chosen.expand(2, 5, 6))


def test_lora_mixer_does_not_normalise_what_it_keeps() -> None:
    case = make_case([4, 4, 4, 4], (50,))
    update = update_of(LoraMixer(2, SET), case, PoolFeatures(prototypes={SET: random_set(case, scale=0.2)}))
    weights = update.router.route(update.state(), case.inputs(), None).weights
    assert (weights.sum(-1) < 1 - 1e-3).all()


@pytest.mark.parametrize("method", TRAINED)
def test_token_ids_stand_for_one_hot_vectors(method: str) -> None:
    rng = np.random.default_rng(1)
    vectors = torch.from_numpy(rng.standard_normal((5, 40)).astype(np.float32))
    ids = torch.from_numpy(rng.integers(40, size=(3, 11)))
    one_hot = torch.nn.functional.one_hot(ids, 40).double()
    router = create(method, {"parent": "phatgoose"} if method == "maple" else {})
    got = router.route({PROTOTYPES: vectors}, ids, None)
    expected = router.route({PROTOTYPES: vectors.double()}, one_hot, None)
    assert expected.indices is not None and got.indices is not None
    assert torch.equal(got.indices, expected.indices)
    assert_close(got.weights, expected.weights, 1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 100])
def test_phatgoose_of_an_embedding_equals_the_reference(top_k: int) -> None:
    factors = [random_factors(seed, rank, 30, 16) for seed, rank in enumerate((2, 5, 3))]
    pool = [adapter(f"adapter-{e}", {MODULE: replace(each, lookup=True)}) for e, each in enumerate(factors)]
    case = Case(pool, [0, 1, 2], (2, 9), 30)
    features = known(case)
    router = Phatgoose(top_k, SET)
    prepared = prepare(router, stack(pool), features)[MODULE]
    update = RoutedUpdate(router, prepared, 3, LinearMap(nn.Embedding(30, 16), lookup=True))
    ids = torch.randint(30, (2, 9), generator=torch.Generator().manual_seed(3))
    vectors = [torch.from_numpy(features.prototypes[SET][each.name][MODULE]).double() for each in pool]
    one = reference(case.pairs, vectors, parent_weights(phatgoose_scores, top_k))
    expected, _ = per_token(torch.nn.functional.one_hot(ids, 30).double(), one)
    assert_close(update(ids), expected, 1e-5)


def test_standardise_equals_the_reference() -> None:
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 5 + 3
    expected = torch.stack([(row - row.mean()) / ((row - row.mean()) ** 2).mean().sqrt() for row in x])
    assert_close(standardise(x), expected, 1e-9)
    assert not standardise(torch.full((2, 8), 3.0)).any()
    assert standardise(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_phatgoose_does_not_see_the_scale_of_input_and_vectors(scale: float) -> None:
    case = make_case([4, 4, 4], (40,))
    features = PoolFeatures(prototypes={SET: random_set(case, scale=scale)})
    update, plain = (update_of(Phatgoose(2, SET), case, each) for each in (features, known(case)))
    got = update.router.route(update.state(), case.inputs() * scale + 2 * scale, None)
    expected = plain.router.route(plain.state(), case.inputs(), None)
    assert got.indices is not None and expected.indices is not None
    assert torch.equal(got.indices, expected.indices)
    assert_close(got.weights, expected.weights, 1e-4)


@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_stay_in_full_precision(method: str, dtype: torch.dtype) -> None:
    case = make_case([4] * 12, (100,))
    update = update_of(create(method, {"prototypes": SET, "top_k": 3}), case, known(case), dtype)
    update.to(dtype)
    assert update.state()[PROTOTYPES].dtype == torch.float32
    x = case.inputs(dtype)
    got = update.router.route(update.state(), x, None)
    exact = update.router.route({PROTOTYPES: update.state()[PROTOTYPES].double()}, x.double(), None)
    assert got.indices is not None and exact.indices is not None
    assert got.weights.dtype == torch.float32
    assert torch.equal(got.indices, exact.indices)


@pytest.mark.parametrize("method", TRAINED)
def test_autocast_does_not_round_the_scores(method: str) -> None:
    case = make_case([4] * 12, (200,))
    update = update_of(create(method, {"prototypes": SET, "top_k": 3}), case, known(case))
    expected = update.router.route(update.state(), case.inputs(), None)
    with torch.autocast("cpu", torch.bfloat16):
        got = update.router.route(update.state(), case.inputs(), None)
    assert got.indices is not None and expected.indices is not None
    assert torch.equal(got.indices, expected.indices)
    assert_close(got.weights, expected.weights, 1e-6)


@pytest.mark.parametrize("method", TRAINED)
def test_vectors_go_to_the_adapters_of_their_names(method: str) -> None:
    case = make_case([4, 2, 3], (6,))
    features = known(case)
    turned = replace(case, adapters=case.adapters[::-1], experts=[2, 1, 0])
    update, other = (
        update_of(create(method, {"prototypes": SET, "top_k": 2}), each, features) for each in (case, turned)
    )
    assert torch.equal(update.state()[PROTOTYPES], other.state()[PROTOTYPES].flip(0))
    assert_close(update(case.inputs()), other(case.inputs()).double(), 1e-5)


@pytest.mark.parametrize("method", TRAINED)
def test_a_set_that_is_not_at_hand_is_an_error(method: str) -> None:
    case = make_case([4, 4], (3,))
    message = rf"method '{method}': prototype set 'other@1' is not at hand.*hub-router prototypes list.*FILE"
    with pytest.raises(MethodError, match=message):
        update_of(create(method, {"prototypes": "other@1"}), case, known(case))


@pytest.mark.parametrize("method", TRAINED)
def test_a_set_that_lacks_adapters_or_has_vectors_of_another_length_names_all(method: str) -> None:
    case = make_case([4, 4, 4, 4], (3,))
    vectors = random_set(case)
    vectors["adapter-0"] = {OTHER: vectors["adapter-0"][MODULE]}
    vectors["adapter-2"] = {MODULE: np.zeros(7, dtype=np.float32)}
    vectors["adapter-3"] = {MODULE: np.zeros((2, 24), dtype=np.float32)}
    with pytest.raises(MethodError) as raised:
        update_of(create(method, {"prototypes": SET}), case, PoolFeatures(prototypes={SET: vectors}))
    message = str(raised.value)
    for part in (
        f"'{method}'",
        MODULE,
        f"'{SET}'",
        "shape (24,)",
        "'adapter-0' has none",
        "'adapter-2' has one of shape (7,)",
        "'adapter-3' has one of shape (2, 24)",
        "hub-router train",
    ):
        assert part in message
    assert "adapter-1" not in message


@pytest.mark.parametrize("method", TRAINED)
def test_vectors_of_adapters_that_are_no_candidates_are_not_needed(method: str) -> None:
    case = make_case([4, None, 2, 3], (3,), zero=(3,))
    vectors = random_set(case)
    del vectors["adapter-3"]
    vectors["stranger"] = {MODULE: np.zeros(3, dtype=np.float32)}
    update = update_of(create(method, {"prototypes": SET}), case, PoolFeatures(prototypes={SET: vectors}))
    assert_close(
        update.state()[PROTOTYPES],
        torch.from_numpy(np.stack([vectors["adapter-0"][MODULE], vectors["adapter-2"][MODULE]])).double(),
        0.0,
    )


@pytest.mark.parametrize(
    ("method", "wrong", "said"),
    [
        ("phatgoose", {"top_k": 0}, "top_k=0"),
        ("maple", {"parent": "spectr"}, "parent='spectr'"),
        ("maple", {"top_k": 1.5}, "top_k=1.5"),
        ("lora-mixer", {"prototypes": 3}, "prototypes=3"),
    ],
)
def test_invalid_hyperparameters(method: str, wrong: dict[str, object], said: str) -> None:
    with pytest.raises(MethodError, match=said):
        create(method, wrong)
