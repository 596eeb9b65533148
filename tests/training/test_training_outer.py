"""Training of xlora and mixlora: gates that lie outside of the modules, and are shared by those of a block."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from compose_models import MLP, llama, prompt_ids, save_adapter
from training_models import Frozen, Watch, logits, make_examples

from hub_router import compose
from hub_router.composition.attach import routed_updates
from hub_router.prototypes import write_prototypes
from hub_router.routing.trained import PROTOTYPES
from hub_router.training import Example, TrainingSettings, fit
from hub_router.training.balance import Spread
from hub_router.training.gating import Reading, training
from hub_router.training.mixlora import MixloraRecipe
from hub_router.training.registry import create_recipe

SETTINGS = TrainingSettings(steps=6, batch_size=6, learning_rate=1e-2, warmup=0.0)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("experts")
    return {
        f"expert-{seed}": save_adapter(llama(), root / f"expert-{seed}", seed, r=2 + seed, target_modules=MLP)
        for seed in range(4)
    }


@pytest.fixture(scope="module")
def tasks(experts: dict[str, Path], tokenizer: Any) -> list[Example]:
    return make_examples(experts, tokenizer, count=6)


@pytest.mark.parametrize("method", ["xlora", "mixlora"])
def test_training_changes_the_gates_and_nothing_else(
    experts: dict[str, Path], tasks: list[Example], tokenizer: Any, tmp_path: Path, method: str
) -> None:
    routed = compose(llama(), experts, method, tokenizer=tokenizer)
    before, start = Frozen(routed), routed.vectors
    result = fit(routed, tasks, settings=SETTINGS)
    before.check()
    assert any(
        (vector != start[name][module]).any() for name, own in routed.vectors.items() for module, vector in own.items()
    )
    write_prototypes(tmp_path / "set.safetensors", result.prototypes)
    again = compose(llama(), experts, method, tokenizer=tokenizer, prototypes=str(tmp_path / "set.safetensors"))
    assert torch.equal(logits(again), logits(routed))


def test_the_maps_of_a_block_keep_the_same_gates(
    experts: dict[str, Path], tasks: list[Example], tokenizer: Any
) -> None:
    routed = compose(llama(), experts, "mixlora", tokenizer=tokenizer)
    fit(routed, tasks, settings=SETTINGS)
    blocks: dict[str, list[torch.Tensor]] = {}
    for _, update in routed_updates(routed.model):
        blocks.setdefault(update.module.rpartition(".")[0], []).append(update.state()[PROTOTYPES])
    assert [len(each) for each in blocks.values()] == [3, 3]
    for first, *others in blocks.values():
        assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(*(each[0] for each in blocks.values()))


@pytest.mark.parametrize("method", ["xlora", "mixlora"])
def test_the_first_step_reads_the_gates_of_inference(experts: dict[str, Path], tokenizer: Any, method: str) -> None:
    routed = compose(llama(), experts, method, tokenizer=tokenizer)
    expected = logits(routed)
    reading = Reading()
    with training(routed.model, partial(create_recipe(method).gate, routed.method), reading) as gates:
        assert len(gates) == (2 if method == "mixlora" else 6)
        reading.begin(torch.zeros(2, dtype=torch.int64), (torch.ones(2, 9),), spreading=True, observing=True)
        assert torch.equal(logits(routed), expected)
        assert len(reading.entropies) == len(gates)


def test_mixloras_gradient_reaches_the_gates_through_the_blocks(experts: dict[str, Path], tokenizer: Any) -> None:
    """Against central differences of the whole model's output in float64."""
    model = llama().double()
    routed = compose(model, experts, "mixlora", tokenizer=tokenizer)
    ids, reading = prompt_ids(2, 5), Reading()
    reading.begin(torch.zeros(2, dtype=torch.int64), (), spreading=False, observing=False)
    with training(routed.model, partial(MixloraRecipe().gate, routed.method), reading) as gates:
        gate = next(iter(gates.values()))
        leaf = gate.select(range(4))
        assert leaf is not None

        def loss() -> torch.Tensor:
            return routed.model(input_ids=ids).logits.square().mean()

        (gradient,) = torch.autograd.grad(loss(), leaf)
        for row, column in ((0, 3), (2, 17), (3, 31)):
            values = []
            for step in (1e-3, -1e-3):
                with torch.no_grad():
                    leaf[row, column] += step
                    values.append(float(loss()))
                    leaf[row, column] -= step
            difference = (values[0] - values[1]) / 2e-3
            assert float(gradient[row, column]) == pytest.approx(difference, rel=2e-2, abs=1e-7)


def test_mixloras_balance_is_eq_5() -> None:
    shares = torch.softmax(torch.randn(9, 4, generator=torch.Generator().manual_seed(1)), dim=-1)
    chosen = shares.topk(2, dim=-1).indices
    slots = torch.bincount(chosen.flatten(), minlength=4) / chosen.numel()
    expected = 0.0
    for expert in range(4):
        used = sum(int(expert in row) for row in chosen.tolist()) / (9 * 2)
        expected += used * sum(float(row[expert]) for row in shares) / 9
    found = MixloraRecipe().balance([Spread(shares, slots)], 0.0)
    assert found is not None
    assert float(found) == pytest.approx(0.01 * 4 * expected, rel=1e-5)


def test_a_stopped_run_goes_on(experts: dict[str, Path], tasks: list[Example], tokenizer: Any, tmp_path: Path) -> None:
    whole = compose(llama(), experts, "mixlora", tokenizer=tokenizer)
    fit(whole, tasks, settings=SETTINGS)
    halves = compose(llama(), experts, "mixlora", tokenizer=tokenizer)
    often = replace(SETTINGS, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        fit(halves, tasks, settings=often, checkpoint=tmp_path / "run", progress=Watch(stop_at=4))
    watch = Watch()
    fit(halves, tasks, settings=often, checkpoint=tmp_path / "run", progress=watch)
    assert "going on from step 3" in watch.label
    assert torch.equal(logits(halves), logits(whole))
