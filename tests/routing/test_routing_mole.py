"""mole against a loop-written float64 reference of MoLE's gate, with the paper's M over the outputs themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from routing_cases import (
    CASES,
    MODULE,
    Case,
    Pair,
    adapter,
    assert_close,
    make_case,
    make_update,
    random_factors,
    some_map,
)
from torch import nn

from hub_router.composition.assemble import prepare, stack
from hub_router.composition.layer import RoutedUpdate
from hub_router.composition.maps import LinearMap
from hub_router.errors import MethodError
from hub_router.features import PoolFeatures
from hub_router.lora.adapter import LoraFactors
from hub_router.routing.mole import Mole


def gate_of(case: Case, seed: int = 3) -> list[torch.Tensor]:
    """M ``(C, D_out)`` for each block of the concatenated outputs, the candidate's that it reads."""
    generator = torch.Generator().manual_seed(seed)
    count, d_out = len(case.experts), case.pairs[0][1].shape[0]
    return [torch.randn(count, d_out, generator=generator, dtype=torch.float64) for _ in range(count)]


def stored(case: Case, M: Sequence[torch.Tensor]) -> PoolFeatures:
    """The rows of ``M diag(B)``, columns in the order that the method says."""
    prepared = prepare(Mole(), stack(case.adapters), PoolFeatures())[MODULE]
    product = torch.cat([block @ B for block, (_, B) in zip(M, case.pairs, strict=True)], dim=1)  # [C, R]
    rows = torch.zeros_like(product)
    rows[:, prepared.tensors["columns"]] = product
    vectors = {
        case.adapters[expert].name: {MODULE: row.float().numpy()}
        for expert, row in zip(case.experts, rows, strict=True)
    }
    return PoolFeatures(prototypes={"set": vectors})


def trained(case: Case, M: Sequence[torch.Tensor], temperature: float = 1.0) -> RoutedUpdate:
    router = Mole(temperature, "set")
    prepared = prepare(router, stack([replace_others(each) for each in case.adapters]), stored(case, M))[MODULE]
    return RoutedUpdate(router, prepared, len(case.adapters), some_map(prepared))


def replace_others(each):  # type: ignore[no-untyped-def]
    """The adapter in this module alone, so that a set of this module is enough."""
    return replace(each, modules={name: f for name, f in each.modules.items() if name == MODULE})


def truth(pairs: Sequence[Pair], M: Sequence[torch.Tensor], temperature: float, x: torch.Tensor) -> torch.Tensor:
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        outputs = [B @ (A @ token) for A, B in pairs]
        length = torch.sqrt(sum(value**2 for output in outputs for value in output))
        unit = [output / length for output in outputs]
        scores = []
        for i in range(len(pairs)):
            score = torch.zeros((), dtype=torch.float64)
            for block, output in zip(M, unit, strict=True):
                score = score + block[i] @ output
            scores.append(score / temperature)
        powers = [torch.exp(score) for score in scores]
        y = torch.zeros_like(outputs[0])
        for power, output in zip(powers, outputs, strict=True):
            y = y + power / sum(powers) * output
        rows.append(y)
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("name", [name for name in CASES if name != "empty"])
def test_equals_the_reference(name: str, temperature: float) -> None:
    case = CASES[name]()
    M = gate_of(case)
    update, x = trained(case, M, temperature), case.inputs().requires_grad_()
    got, wide = update(x), case.inputs().double().requires_grad_()
    expected = truth(case.pairs, M, temperature, wide)
    assert_close(got, expected, 1e-5)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (found,) = torch.autograd.grad((got * direction.float()).sum(), x)
    (true,) = torch.autograd.grad((expected * direction).sum(), wide)
    assert_close(found, true, 2e-5)


def test_an_empty_batch() -> None:
    case = CASES["empty"]()
    assert trained(case, gate_of(case))(case.inputs()).shape == (0, 3, 20)


def test_untrained_is_uniform() -> None:
    case = make_case([4, 2, 7], (2, 5))
    gates = make_update(Mole(), case).router.route(
        make_update(Mole(), case).state(), case.inputs(), torch.ones(2, 5, 13)
    )
    assert torch.equal(gates.weights, torch.full((2, 5, 3), 1 / 3))
    assert gates.indices is None


def test_gates_sum_to_one_and_differ_between_tokens() -> None:
    case = make_case([4, 2, 7], (50,))
    update = trained(case, gate_of(case))
    weights = update.router.route(update.state(), case.inputs(), case.inputs() @ update.A.mT).weights
    assert_close(weights.sum(-1), torch.ones(50).double(), 1e-6)
    assert (weights.std(0) > 0.05).all()


def test_length_of_the_input_does_not_matter() -> None:
    case = make_case([4, 2, 7], (9,))
    update = trained(case, gate_of(case))
    one, other = (update.router.route(update.state(), x, x @ update.A.mT) for x in (case.inputs(), 37 * case.inputs()))
    assert_close(one.weights, other.weights.double(), 1e-5)


def test_an_input_without_any_output_has_equal_weights_and_finite_gradients() -> None:
    case = make_case([4, 2], (3,))
    update = trained(case, gate_of(case))
    x = torch.zeros(3, 24, requires_grad=True)
    got = update(x)
    assert not got.any()
    (gradient,) = torch.autograd.grad(got.sum(), x)
    assert torch.isfinite(gradient).all()


def test_outputs_that_cancel_inside_an_adapter_keep_their_length() -> None:
    # Of nearly parallel columns the Gram matrix would lose what the triangular factor keeps.
    factors = random_factors(0, 2, 24, 20)
    B = torch.stack([factors.B[:, 0], factors.B[:, 0] + 1e-5 * factors.B[:, 1]], dim=1)
    update = make_update(Mole(), Case([adapter("a", {MODULE: LoraFactors(factors.A, B, 1.0)})], [0], (1,), 24))
    h = torch.tensor([1.0, -1.0])
    length = (update.state()["T"][0] @ h).norm().item()
    assert length == pytest.approx((B.double() @ h.double()).norm().item(), rel=2e-2)


def test_a_set_fits_its_pool_in_any_order_and_under_any_names() -> None:
    case = make_case([4, 2, 7, 4], (2, 9))
    M = gate_of(case)
    expected = trained(case, M)(case.inputs())
    order = [2, 0, 3, 1]
    named = {case.adapters[old].name: f"other-{new}" for new, old in enumerate(order)}
    vectors = stored(case, M).prototypes["set"]
    features = PoolFeatures(prototypes={"set": {named[name]: each for name, each in vectors.items()}})
    pool = [replace(case.adapters[old], name=f"other-{new}") for new, old in enumerate(order)]
    router = Mole(1.0, "set")
    prepared = prepare(router, stack(pool), features)[MODULE]
    got = RoutedUpdate(router, prepared, 4, some_map(prepared))(case.inputs())
    assert_close(got, expected.double(), 1e-6)


@pytest.mark.parametrize("pool", ["fewer", "more"])
def test_another_pool_is_refused(pool: str) -> None:
    case = make_case([4, 2, 7], (2,))
    features = stored(case, gate_of(case))
    adapters = case.adapters[:2] if pool == "fewer" else [*case.adapters, replace(case.adapters[0], name="new")]
    expected = "(6,)" if pool == "fewer" else "(17,)"
    with pytest.raises(MethodError) as caught:
        prepare(Mole(1.0, "set"), stack(adapters), features)
    message = str(caught.value)
    assert f"vector of shape {expected}" in message and "'adapter-0' has one of shape (13,)" in message
    assert "all adapters that it was trained over" in message and "hub-router train mole" in message
    assert ("'new' has none" in message) == (pool == "more")


def test_rows_are_as_long_as_the_ranks_together() -> None:
    prepared = prepare(Mole(), stack(make_case([4, 2, 7], (2,)).adapters), PoolFeatures())[MODULE]
    assert prepared.tensors["P"].shape == (3, 13)
    assert sorted(prepared.tensors["columns"].tolist()) == list(range(13))


def test_embeddings_take_token_ids() -> None:
    factors = [replace(random_factors(seed, rank, 30, 16), lookup=True) for seed, rank in enumerate((2, 5, 3))]
    case = Case([adapter(f"adapter-{e}", {MODULE: each}) for e, each in enumerate(factors)], [0, 1, 2], (2, 9), 30)
    M = gate_of(case)
    router = Mole(0.5, "set")
    prepared = prepare(router, stack(case.adapters), stored(case, M))[MODULE]
    update = RoutedUpdate(router, prepared, 3, LinearMap(nn.Embedding(30, 16), lookup=True))
    ids = torch.randint(30, (2, 9), generator=torch.Generator().manual_seed(3))
    assert_close(update(ids), truth(case.pairs, M, 0.5, nn.functional.one_hot(ids, 30).double()), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_the_reference(dtype: torch.dtype) -> None:
    case = make_case([4, 4, 4], (2, 9))
    M, router = gate_of(case), Mole(1.0, "set")
    prepared = prepare(router, stack(case.adapters), stored(case, M))[MODULE]
    update = RoutedUpdate(router, prepared, 3, some_map(prepared, dtype))
    assert update.state()["P"].dtype == update.state()["T"].dtype == torch.float32
    got = update(case.inputs(dtype))
    assert got.dtype == dtype
    assert_close(got, truth(case.pairs, M, 1.0, case.inputs(dtype).double()), 3e-2)


def test_autocast_does_not_round_the_gates() -> None:
    case = make_case([4, 2, 7], (20,))
    update = trained(case, gate_of(case))
    h = case.inputs() @ update.A.mT
    expected = update.router.route(update.state(), case.inputs(), h)
    with torch.autocast("cpu", torch.bfloat16):
        got = update.router.route(update.state(), case.inputs(), h)
    assert torch.equal(got.weights, expected.weights)


def test_temperature_must_be_positive() -> None:
    with pytest.raises(MethodError, match=r"temperature=0\.0, expected a finite number above 0"):
        Mole(temperature=0.0)


def test_equal_adapters_share_columns_as_equals() -> None:
    case = make_case([3, 3], (4,))
    twins = replace(case, adapters=[case.adapters[0], replace(case.adapters[0], name="twin")])
    vectors = {
        "adapter-0": {MODULE: np.arange(6, dtype=np.float32)},
        "twin": {MODULE: np.arange(6, 12, dtype=np.float32)},
    }
    results = []
    for pool in (twins.adapters, twins.adapters[::-1]):
        prepared = prepare(Mole(1.0, "set"), stack(pool), PoolFeatures(prototypes={"set": vectors}))[MODULE]
        results.append(RoutedUpdate(Mole(1.0, "set"), prepared, 2, some_map(prepared))(case.inputs()))
    assert_close(results[0], results[1].double(), 1e-6)


def test_adapters_that_share_their_down_projection_are_told_apart() -> None:
    case = make_case([3, 3], (4,))
    shared = case.adapters[0].modules[MODULE].A
    case = replace(
        case, adapters=[replace(a, modules={MODULE: replace(a.modules[MODULE], A=shared)}) for a in case.adapters]
    )
    features = stored(case, gate_of(case))
    results = []
    for pool in (case.adapters, case.adapters[::-1]):
        prepared = prepare(Mole(1.0, "set"), stack(pool), features)[MODULE]
        results.append(RoutedUpdate(Mole(1.0, "set"), prepared, 2, some_map(prepared))(case.inputs()))
    assert_close(results[1], results[0].double(), 1e-6)
