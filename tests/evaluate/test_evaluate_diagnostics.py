"""Diagnostics against loops in float64, and on a real routed model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from hub_router import compose
from hub_router.composition.attach import routed_updates
from hub_router.errors import MethodError, RoutedStateError
from hub_router.evaluate.diagnostics import (
    effective_rank,
    entropy,
    expert_load,
    pairwise_cosines,
    routing_accuracy,
    routing_entropies,
    score_ratio,
)
from hub_router.lora.reader import read_adapter
from hub_router.settings import bundled

PROMPTS = ["Is this film review positive?", "What is the plural of cat?"]


def test_entropy_equals_the_sum_over_experts() -> None:
    weights = torch.rand(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights[0, 0] = torch.tensor([0.0, 2.0, 0.0, 0.0, 0.0])
    weights[0, 1] = 0
    for row, got in zip(weights.view(-1, 5).tolist(), entropy(weights).view(-1).tolist(), strict=True):
        shares = [each / sum(row) for each in row if each > 0]
        assert got == pytest.approx(-sum(p * math.log(p) for p in shares), abs=1e-12)


def test_effective_rank() -> None:
    assert effective_rank(torch.eye(6)) == pytest.approx(6)
    assert effective_rank(torch.ones(3, 8)) == pytest.approx(1)
    assert effective_rank(torch.zeros(3, 8)) == 0
    values = [3.0, 2.0, 1.0]
    shares = [value / 6 for value in values]
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert effective_rank(torch.diag(torch.tensor(values))) == pytest.approx(expected)


def test_pairwise_cosines_are_of_each_pair_once() -> None:
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = [
        float(rows[i] @ rows[j]) / math.sqrt(float(rows[i] @ rows[i]) * float(rows[j] @ rows[j]))
        for i in range(4)
        for j in range(i + 1, 4)
    ]
    assert pairwise_cosines(rows).tolist() == pytest.approx(expected)


@pytest.fixture(scope="module")
def zoo() -> tuple[Path, dict[str, Path]]:
    top = bundled("zoo") / "hub_router"
    return top / "zoo-base", {name: top / name for name in ("zoo-film", "zoo-plural", "zoo-french")}


def test_entropy_and_load_of_known_gates(zoo: tuple[Path, dict[str, Path]]) -> None:
    base, pool = zoo
    uniform = compose(base, pool, "uniform")
    adapted = [len(weights.nonzero()) for weights in _weights(uniform, PROMPTS[0])]
    assert routing_entropies(uniform, PROMPTS)[0] == pytest.approx(sum(map(math.log, adapted)) / len(adapted), abs=1e-5)
    assert expert_load(uniform, PROMPTS).sum() == pytest.approx(1)
    single = compose(base, pool, "single", adapter="zoo-film")
    assert routing_entropies(single, PROMPTS) == pytest.approx([0, 0], abs=1e-6)
    assert expert_load(single, PROMPTS).tolist() == pytest.approx([1, 0, 0])


def test_routing_accuracy_of_known_gates(zoo: tuple[Path, dict[str, Path]]) -> None:
    base, pool = zoo
    single = compose(base, pool, "single", adapter="zoo-film")
    assert routing_accuracy(single, PROMPTS, "zoo-film") == (1, 1)
    assert routing_accuracy(single, PROMPTS, "zoo-plural") == (0, 0)
    uniform = compose(base, pool, "uniform")
    assert routing_accuracy(uniform, PROMPTS, "zoo-plural")[1] == 1
    arrow = compose(base, pool, "arrow", top_k=1)
    firsts = [routing_accuracy(arrow, PROMPTS, name) for name in pool]
    assert all(first == chosen for first, chosen in firsts)
    assert 0 < sum(first for first, _ in firsts) <= 3


@pytest.mark.parametrize("method", ["arrow", "spectr"])
def test_score_ratio_equals_the_loop_over_tokens(zoo: tuple[Path, dict[str, Path]], method: str) -> None:
    base, pool = zoo
    routed = compose(base, pool, method)
    own = routed.adapters.index("zoo-plural")
    inputs: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=update.module: inputs.update({name: args[0][0].detach().double()})
        )
        for module, update in routed_updates(routed.model)
    ]
    routed(**routed.tokenizer(PROMPTS[1], return_tensors="pt", return_token_type_ids=False))
    for handle in handles:
        handle.remove()
    updates = [read_adapter(folder, name).modules for name, folder in pool.items()]
    ratios = []
    for module, rows in inputs.items():
        if module not in updates[own]:
            continue
        for x in rows:
            scores = {}
            for number, of_adapter in enumerate(updates):
                if module in of_adapter:
                    factors = of_adapter[module]
                    matrix = factors.scaling * (factors.B.detach().double() @ factors.A.detach().double())
                    direction = torch.linalg.svd(matrix)[2][0]
                    scores[number] = abs(float(direction @ x)) if method == "arrow" else float((matrix @ x).norm())
            ratios.append(scores[own] / max(scores.values()))
    assert score_ratio(routed, PROMPTS[1:], "zoo-plural") == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)


def test_score_ratio_names_what_it_cannot_measure(zoo: tuple[Path, dict[str, Path]]) -> None:
    base, pool = zoo
    with pytest.raises(MethodError, match="routed by 'uniform'"):
        score_ratio(compose(base, pool, "uniform"), PROMPTS, "zoo-film")
    with pytest.raises(MethodError, match="no adapter 'zoo-nli'; the pool is: zoo-film"):
        score_ratio(compose(base, pool, "arrow"), PROMPTS, "zoo-nli")


def _weights(routed: object, prompt: str) -> list[torch.Tensor]:
    """Of the first token, by module."""
    with routed.trace() as trace, torch.inference_mode():  # type: ignore[attr-defined]
        routed(**routed.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False))  # type: ignore[operator,attr-defined]
    return [weights[0, 0] for weights in trace.weights.values()]


def test_a_tokenizer_is_needed(zoo: tuple[Path, dict[str, Path]]) -> None:
    from transformers import AutoModelForCausalLM

    base, pool = zoo
    bare = compose(AutoModelForCausalLM.from_pretrained(base), pool, "uniform")
    with pytest.raises(RoutedStateError, match="there is no tokenizer"):
        routing_entropies(bare, PROMPTS)
