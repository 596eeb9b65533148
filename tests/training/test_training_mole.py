"""MoLE's gates while they are trained, forward, loss and backward, against loop-written float64 references."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compose_models import llama
from routing_cases import CASES, MODULE, Case, assert_close, some_map
from training_models import Frozen, logits

from hub_router.composition.assemble import prepare, stack
from hub_router.composition.build import compose
from hub_router.composition.layer import RoutedUpdate
from hub_router.errors import MethodError
from hub_router.features import PoolFeatures
from hub_router.prototypes import write_prototypes
from hub_router.routing.mole import Mole
from hub_router.training import Example, TrainingSettings, fit
from hub_router.training.balance import Auxiliary, Spread, Variance
from hub_router.training.gating import Reading, TrainedGate
from hub_router.training.mole import MoleRecipe
from hub_router.training.registry import create_recipe, recipe_options


def shares(case: Case, N: torch.Tensor, columns: torch.Tensor, temperature: float, x: torch.Tensor) -> torch.Tensor:
    """softmax(N A x / (|E| temperature)), term by term."""
    outputs = [B @ (A @ x) for A, B in case.pairs]
    length = torch.sqrt(sum(value**2 for output in outputs for value in output))
    h = [row @ x for A, _ in case.pairs for row in A]
    powers = []
    for i in range(len(outputs)):
        score = torch.zeros((), dtype=torch.float64)
        for component, value in enumerate(h):
            score = score + N[i, columns[component]] * value
        powers.append(torch.exp(score / length / temperature))
    return torch.stack(powers) / sum(powers)


@pytest.mark.parametrize("name", [name for name in CASES if name != "empty"])
def test_forward_loss_and_gradients(name: str) -> None:
    case = CASES[name]()
    router = Mole(0.7)
    prepared = prepare(router, stack(case.adapters), PoolFeatures())[MODULE]
    generator = torch.Generator().manual_seed(2)
    prepared.tensors["P"].copy_(torch.randn(prepared.tensors["P"].shape, generator=generator))
    update, reading = RoutedUpdate(router, prepared, len(case.adapters), some_map(prepared)), Reading()
    x = case.inputs().requires_grad_()
    tokens = x.shape[:-1].numel()
    reading.begin(torch.zeros(1, dtype=torch.int64), (torch.ones(1),), spreading=True, observing=False)
    gate = TrainedGate([update], partial(MoleRecipe().gate, router), reading)
    update.router = gate  # type: ignore[assignment]
    leaf = gate.select(range(len(case.adapters)))
    got = update(x)
    beside = MoleRecipe().balance(reading.spreads, 0.0)
    assert leaf is not None and beside is not None

    wide, N = case.inputs().double().requires_grad_(), gate.stored.double().requires_grad_()
    columns = prepared.tensors["columns"]
    rows = [shares(case, N, columns, 0.7, token) for token in wide.reshape(-1, case.d_in)]
    sums = []
    for token, row in zip(wide.reshape(-1, case.d_in), rows, strict=True):
        sums.append(sum(weight * (B @ (A @ token)) for weight, (A, B) in zip(row, case.pairs, strict=True)))
    expected = torch.stack(sums).reshape(*x.shape[:-1], -1)
    slots = [sum(int(row.argmax()) == i for row in rows) / tokens for i in range(len(case.experts))]
    true_beside = 0.1 * sum(sum(row[i] for row in rows) / tokens * slots[i] for i in range(len(case.experts)))
    assert_close(got, expected, 1e-5)
    assert float(beside.detach()) == pytest.approx(float(true_beside.detach()), rel=1e-5)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    true = torch.autograd.grad((expected * direction).sum() + true_beside, [wide, N])
    found = torch.autograd.grad((got * direction.float()).sum() + beside, [x, leaf])
    for one, other in zip(found, true, strict=True):
        assert_close(one, other, 2e-5)


def test_it_learns_and_the_set_gives_the_same_gates(
    pool: dict[str, Path], examples: list[Example], tokenizer: Any, tmp_path: Path
) -> None:
    routed = compose(llama(), pool, "mole", tokenizer=tokenizer, temperature=0.2)
    frozen, before = Frozen(routed), logits(routed)
    uniform = compose(llama(), pool, "uniform")
    torch.testing.assert_close(before, logits(uniform), rtol=1e-5, atol=1e-5)
    settings = TrainingSettings(steps=30, batch_size=16, learning_rate=5e-2, validation=0.2, evaluate_every=1)
    result = fit(routed, examples, settings=settings, log=tmp_path / "log.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert result.validation == pytest.approx(min(losses)) and result.validation < losses[0] - 0.02
    assert all(line["balance"] > 0 for line in lines if "balance" in line)
    frozen.check()
    for name, vectors in routed.vectors.items():
        for module, vector in vectors.items():
            # Where an adapter is alone, nothing is to be learned.
            assert np.isfinite(vector).all() and vector.any() == (len(vector) > 3), (name, module)
    assert routed.vectors["attention"]["model.layers.0.self_attn.q_proj"].shape == (4 + 3,)
    assert routed.vectors["layer"]["model.layers.1.self_attn.q_proj"].shape == (4 + 3 + 2,)
    write_prototypes(tmp_path / "set.safetensors", result.prototypes)
    chosen = {"temperature": 0.2, "prototypes": str(tmp_path / "set.safetensors")}
    again = compose(llama(), pool, "mole", tokenizer=tokenizer, **chosen)
    assert torch.equal(logits(again), logits(routed))
    turned = {f"my-{name}": pool[name] for name in reversed(pool)}
    torch.testing.assert_close(logits(compose(llama(), turned, "mole", **chosen)), logits(routed), rtol=1e-4, atol=1e-5)
    with pytest.raises(MethodError, match="all adapters that it was trained over"):
        compose(llama(), {name: pool[name] for name in ("attention", "all")}, "mole", **chosen)


def test_balance_losses_by_name() -> None:
    assert recipe_options("mole") == ("balance", "alpha")
    assert create_recipe("mole") == MoleRecipe(Auxiliary())
    assert create_recipe("mole", {"alpha": 0.5}) == MoleRecipe(Auxiliary(0.5))
    assert create_recipe("mole", {"balance": "aesl", "gamma": 0.3}) == MoleRecipe(Variance(gamma=0.3))
    assert create_recipe("mole", {"balance": "none"}) == MoleRecipe(None)
    assert recipe_options("lora-mixer") == ("balance", "alpha", "entropy_weight", "entropy")


def test_no_loss_where_there_is_none() -> None:
    spread = Spread(torch.full((3, 2), 0.5), torch.tensor([1.0, 0.0]))
    assert MoleRecipe(None).balance([spread], 0.5) is None
    assert MoleRecipe().balance([], 0.5) is None
    # From the first step on, unlike LoRA-Mixer's.
    beside = MoleRecipe().balance([spread, spread], 0.0)
    assert beside is not None and math.isclose(float(beside), 0.05, rel_tol=1e-6)
