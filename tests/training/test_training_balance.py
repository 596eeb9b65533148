"""Balance losses against loop-written float64 references, values and gradients, and what of a batch they see."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from compose_models import llama
from compose_zoo import ARCHITECTURES, lora, peft_adapter

from hub_router.composition.build import compose
from hub_router.errors import TrainingError
from hub_router.routing.base import Gates
from hub_router.routing.lora_mixer import LoraMixer
from hub_router.routing.top_k import top_k
from hub_router.training.balance import (
    BALANCE_LOSSES,
    Auxiliary,
    MutualInformation,
    PoissonNormal,
    Specialisation,
    Spread,
    Variance,
    entropy,
)
from hub_router.training.batches import collate
from hub_router.training.data import Encoded
from hub_router.training.gating import Decision, Reading, training
from hub_router.training.lora_mixer import LoraMixerRecipe
from hub_router.training.registry import create_recipe


def p_bar(p: torch.Tensor) -> list[torch.Tensor]:
    return [sum(p[n, i] for n in range(p.shape[0])) / p.shape[0] for i in range(p.shape[1])]


def f_bar(p: torch.Tensor, k: int) -> list[float]:
    """Share of the top-k slots; a count, so nothing flows back."""
    counts = [0] * p.shape[1]
    for row in p.tolist():
        for i in sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]:
            counts[i] += 1
    return [count / sum(counts) for count in counts]


def h(row: Any) -> torch.Tensor:
    return -sum(share * torch.log(share) for share in row)


def balance(p: torch.Tensor, k: int) -> torch.Tensor:
    return sum(mean * slots for mean, slots in zip(p_bar(p), f_bar(p, k), strict=True))  # Eq. 3


def mean_entropy(p: torch.Tensor) -> torch.Tensor:
    return sum(h(row) for row in p) / p.shape[0]  # Eq. 6


def variance(p: torch.Tensor) -> torch.Tensor:
    """AESL: each expert's variance over the tokens, mean over both."""
    means = p_bar(p)
    return sum((p[n, i] - means[i]) ** 2 for n in range(p.shape[0]) for i in range(p.shape[1])) / p.numel()


def gmoe(p: torch.Tensor, alpha: float, distinction: float, rate: float) -> torch.Tensor:
    """Sorted shares against a Poisson law at 1 .. C, the sorted mean against a normal law at 0 .. C - 1."""
    count = p.shape[1]

    def apart(target: list[float], shares: list[torch.Tensor]) -> torch.Tensor:
        total = sum(target)
        ordered = sorted(shares, key=lambda share: -float(share.detach()))
        return sum(a / total * abs(math.log(a / total) - torch.log(b)) for a, b in zip(target, ordered, strict=True))

    poisson = [rate**k * math.exp(-rate) / math.factorial(k) for k in range(1, count + 1)]
    normal = sorted((math.exp(-(((k - count / 2) / (count / 2)) ** 2) / 2) for k in range(count)), reverse=True)
    tokens = sum(apart(poisson, list(row)) for row in p) / p.shape[0]
    return distinction * tokens + alpha * apart(normal, p_bar(p))


def slots_of(p: torch.Tensor, k: int) -> torch.Tensor:
    return torch.tensor(f_bar(p, k), dtype=p.dtype)


REFERENCES: dict[str, tuple[Any, Callable[[torch.Tensor, int, float], torch.Tensor]]] = {
    "aux": (Auxiliary(0.3), lambda p, k, ramp: ramp * 0.3 * balance(p, k)),
    # Eq. 5 as printed, and with the sign that its text means.
    "rsl": (Specialisation(0.3, 0.7), lambda p, k, ramp: ramp * (0.3 * balance(p, k) - 0.7 * mean_entropy(p))),
    "rsl minimised": (
        Specialisation(0.3, 0.7, "minimise"),
        lambda p, k, ramp: ramp * (0.3 * balance(p, k) + 0.7 * mean_entropy(p)),
    ),
    "ds-moe": (MutualInformation(0.3), lambda p, k, ramp: ramp * 0.3 * (mean_entropy(p) - h(p_bar(p)))),
    "aesl": (Variance(0.3, 0.7), lambda p, k, ramp: ramp * (0.3 * balance(p, k) - 0.7 * variance(p))),
    "gmoe": (PoissonNormal(0.3, 0.7, 1.2), lambda p, k, ramp: ramp * gmoe(p, 0.3, 0.7, 1.2)),
}


@pytest.mark.parametrize("ramp", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind", list(REFERENCES))
@pytest.mark.parametrize(("tokens", "candidates", "k"), [(50, 7, 3), (1, 4, 2), (9, 1, 1), (20, 3, 3)])
def test_value_and_gradient(kind: str, tokens: int, candidates: int, k: int, ramp: float) -> None:
    loss, reference = REFERENCES[kind]
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(tokens, candidates, generator=generator, dtype=torch.float64).requires_grad_()
    got = loss(Spread(torch.softmax(logits, -1), slots_of(torch.softmax(logits, -1), k)), ramp)
    (found,) = torch.autograd.grad(got, logits)
    expected = reference(torch.softmax(logits, -1), k, ramp)
    (true,) = torch.autograd.grad(expected, logits)
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-14)
    assert torch.allclose(found, true, rtol=1e-10, atol=1e-14)


def test_entropy_of_a_sure_choice_is_zero_with_a_finite_gradient() -> None:
    shares = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]], requires_grad=True)
    got = entropy(shares)
    assert torch.allclose(got, torch.tensor([0.0, math.log(2)]))
    (gradient,) = torch.autograd.grad(got.sum(), shares)
    assert torch.isfinite(gradient).all()


def test_ds_moe_is_least_for_sure_and_even_choices() -> None:
    sure, mixed = torch.eye(4), torch.full((4, 4), 0.25)
    values = [float(MutualInformation(1.0)(Spread(each, each.mean(0)), 1.0)) for each in (sure, mixed)]
    assert values == pytest.approx([-math.log(4), 0.0], abs=1e-6)


def test_defaults_are_the_papers() -> None:
    assert Specialisation() == Specialisation(alpha=0.1, entropy_weight=0.05, entropy="maximise")
    assert LoraMixerRecipe() == LoraMixerRecipe(Specialisation())
    assert set(BALANCE_LOSSES) == {kind.split()[0] for kind in REFERENCES}


def test_coefficients_rise_over_the_first_three_tenths() -> None:
    shares = torch.softmax(torch.randn(5, 3, generator=torch.Generator().manual_seed(2)), -1)
    spreads = [Spread(shares, slots_of(shares, 2)), Spread(shares.roll(1, 1), slots_of(shares, 2))]
    recipe = LoraMixerRecipe(Auxiliary(1.0))
    full = sum(float((each.mean * each.slots).sum()) for each in spreads) / 2
    for done, ramp in ((0.0, 0.0), (0.15, 0.5), (0.3, 1.0), (0.9, 1.0)):
        got = recipe.balance(spreads, done)
        assert got is not None
        assert float(got) == pytest.approx(ramp * full)
    assert LoraMixerRecipe(None).balance(spreads, 0.5) is None
    assert recipe.balance([], 0.5) is None


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ({}, Specialisation()),
        ({"balance": "none"}, None),
        ({"balance": "aux"}, Auxiliary()),
        ({"balance": "ds-moe", "alpha": 0.5}, MutualInformation(0.5)),
        ({"balance": "gmoe", "distinction": 0.5}, PoissonNormal(distinction=0.5)),
        ({"balance": "aesl", "gamma": 0.5}, Variance(gamma=0.5)),
        ({"entropy": "minimise", "entropy_weight": 0.5}, Specialisation(entropy_weight=0.5, entropy="minimise")),
    ],
)
def test_losses_by_name(options: dict[str, Any], loss: Any) -> None:
    assert create_recipe("lora-mixer", options) == LoraMixerRecipe(loss)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("arrow", {}, "'arrow' is not trained; methods that are: phatgoose, maple, lora-mixer"),
        ("maple", {"masks": "none", "k": 3}, "'maple' is trained without options k, masks; it has: mask"),
        ("maple", {"balance": "aux"}, "'maple' is trained without options balance"),
        ("phatgoose", {"mask": "none"}, "'phatgoose' is trained without options mask; it has: none"),
        ("lora-mixer", {"balance": "even"}, "'even', expected none or one of aux, rsl, ds-moe"),
        ("lora-mixer", {"balance": "aux", "entropy_weight": 1.0}, "without options entropy_weight"),
        ("lora-mixer", {"loss": None}, "without options loss"),
        ("lora-mixer", {"entropy": "up"}, "entropy='up', expected 'maximise' or 'minimise'"),
        ("lora-mixer", {"balance": "none", "alpha": 1.0}, "without options alpha; it has: balance"),
        ("lora-mixer", {"alpha": "much"}, "alpha='much'"),
        ("lora-mixer", {"balance": "aux", "alpha": math.nan}, "alpha=nan"),
        ("lora-mixer", {"balance": "ds-moe", "alpha": -0.1}, "alpha=-0.1"),
        ("lora-mixer", {"balance": "gmoe", "rate": 3.0}, "rate=3.0"),
        ("lora-mixer", {"entropy_weight": math.inf}, "entropy_weight=inf"),
    ],
)
def test_wrong_options(method: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(TrainingError) as raised:
        create_recipe(method, options)
    assert said in str(raised.value)


BATCH = [Encoded(0, (5, 6, 7, 8, 9), (10, 2)), Encoded(1, (11, 12), (13, 14, 15, 2)), Encoded(2, (16,), (17,))]


def spreads_of(routed: Any, encoder: bool) -> tuple[list[Spread], list[torch.Tensor]]:
    """What the modules say of one padded batch."""
    model, reading = routed.model, Reading()
    batch = collate(BATCH, 0, model, encoder, torch.device("cpu"))
    with training(model, partial(LoraMixerRecipe().gate, routed.method), reading) as gates, torch.no_grad():
        for gate in gates.values():
            gate.vectors = torch.randn(gate.vectors.shape, generator=torch.Generator().manual_seed(6))
        reading.begin(batch.own, batch.masks, spreading=True, observing=True)
        model(**batch.inputs)
    return reading.spreads, reading.entropies


def test_padding_does_not_count(pool: dict[str, Path]) -> None:
    routed = compose(llama(), pool, "lora-mixer", top_k=2)
    spreads, entropies = spreads_of(routed, encoder=False)
    modules = len(routed.vectors["all"])
    assert len(spreads) == len(entropies) == modules
    assert all(each.shares.shape[0] == 7 + 6 + 2 for each in spreads)
    for each, observed in zip(spreads, entropies, strict=True):
        assert torch.allclose(each.shares.sum(-1), torch.ones(15), atol=1e-6)
        top = min(2, each.shares.shape[1])
        assert torch.allclose(
            each.slots.double(), torch.tensor(f_bar(each.shares, top), dtype=torch.float64), atol=1e-6
        )
        assert float(observed) == pytest.approx(float(each.entropy), rel=1e-5)


def test_the_slots_carry_no_gradient() -> None:
    mixer = LoraMixer(top_k=2)
    vectors = torch.randn(4, 6, requires_grad=True)
    shares = mixer.shares(vectors, torch.randn(3, 5, 6))
    reading = Reading()
    reading.begin(torch.zeros(3), (torch.ones(3, 5),), spreading=True, observing=False)
    reading.note(Decision(Gates(shares), shares, top_k(shares, 2)))
    (spread,) = reading.spreads
    assert spread.shares.requires_grad and not spread.slots.requires_grad
    assert float(spread.slots.sum()) == pytest.approx(1.0)


def test_padding_of_encoder_and_decoder_does_not_count(tmp_path: Path) -> None:
    t5 = ARCHITECTURES["t5"]
    folders = {
        name: peft_adapter(t5.make, tmp_path / name, seed, lora(["q", "v"]))
        for seed, name in enumerate(("a", "b", "c"))
    }
    spreads, _ = spreads_of(compose(t5.make(0), folders, "lora-mixer"), encoder=True)
    prompts, answers = sum(len(each.prompt) for each in BATCH), sum(len(each.answer) for each in BATCH)
    assert {each.shares.shape[0] for each in spreads} == {prompts, answers}
