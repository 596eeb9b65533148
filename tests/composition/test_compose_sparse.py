"""Products with chosen rows against loops, and the three ways to sum chosen components against the whole bank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from compose_models import assert_close
from torch import nn

from hub_router.composition.grouped import can_group, grouped_update
from hub_router.composition.layer import RoutedUpdate
from hub_router.composition.maps import LinearMap
from hub_router.composition.naive import naive_update
from hub_router.composition.sparse import chosen_products, weighted_rows
from hub_router.composition.stacked import is_sparse, sparse_update
from hub_router.lora.bank import ModuleBank
from hub_router.routing.base import Gates, Merge, Prepared
from hub_router.routing.registry import create

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, so that a value that is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rows_of(tokens: int, chosen: int, count: int) -> torch.Tensor:
    return torch.randint(count, (tokens, chosen), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("tokens", "chosen"), [(0, 3), (1, 1), (1, 7), (2, 4), (63, 5), (4, 0)])
def test_products_and_sums_of_chosen_rows(dtype: torch.dtype, tokens: int, chosen: int) -> None:
    matrix, x = random(11, 17, dtype=dtype), random(tokens, 17, seed=1, dtype=dtype)
    rows, weights = rows_of(tokens, chosen, 11), random(tokens, chosen, seed=2, dtype=dtype)
    products, sums = torch.zeros(tokens, chosen).double(), torch.zeros(tokens, 17).double()
    for t in range(tokens):
        for j in range(chosen):
            products[t, j] = sum(x[t].double() * matrix[rows[t, j]].double())
            sums[t] += weights[t, j].double() * matrix[rows[t, j]].double()
    for got, expected in ((chosen_products(x, matrix, rows), products), (weighted_rows(weights, matrix, rows), sums)):
        assert got.dtype == dtype
        assert got.shape == expected.shape
        assert got.any() == expected.any()
        if expected.any():
            assert_close(got, expected, TOLERANCE[dtype])


def test_both_are_differentiable_twice() -> None:
    matrix, rows = random(9, 5, dtype=torch.float64), rows_of(4, 3, 9)
    x, weights = random(4, 5, dtype=torch.float64).requires_grad_(), random(4, 3, dtype=torch.float64).requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: chosen_products(x, matrix, rows), (x,))
        assert check(lambda w: weighted_rows(w, matrix, rows), (weights,))
        assert check(lambda x: weighted_rows(chosen_products(x, matrix, rows).tanh(), matrix, rows), (x,))


def test_the_operators_keep_their_promises_to_the_compiler() -> None:
    matrix, rows = random(9, 5), rows_of(4, 3, 9)
    for name, tokens in (("chosen_products", random(4, 5)), ("weighted_rows", random(4, 3))):
        operator = getattr(torch.ops.hub_router, name).default
        torch.library.opcheck(operator, (tokens.requires_grad_(), matrix, rows))


def update_of(
    ranks: Sequence[int], d_in: int = 24, d_out: int = 20, dtype: torch.dtype = torch.float32
) -> RoutedUpdate:
    total = sum(ranks)
    bank = ModuleBank(
        "map", random(total, d_in), random(total, d_out, seed=1).mT, tuple(ranks), tuple(range(len(ranks)))
    )
    linear = LinearMap(nn.Linear(d_in, d_out, dtype=dtype), lookup=False)
    return RoutedUpdate(create("arrow", {}), Prepared(bank, {}), len(ranks), linear)


def bank_of(update: RoutedUpdate) -> ModuleBank:
    """The factors as the update has them, in float64."""
    A, B = update.A.double(), update.Bt.double().mT
    return ModuleBank("map", A, B, update.ranks, tuple(range(len(update.ranks))))


def gates_of(shape: tuple[int, ...], chosen: int, count: int, per: str) -> Gates:
    scores = random(*shape, count, seed=5)
    indices = scores.topk(chosen, dim=-1).indices
    return Gates(random(*shape, chosen, seed=6).abs() + 0.1, indices, per)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("per", ["expert", "component"])
@pytest.mark.parametrize("ranks", [(4,) * 20, (1, 9, 2, 16, 3, 7, 5, 1, 1, 12, 30, 2, 2, 2)])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 21), (2,), (0, 4)])
@pytest.mark.parametrize("projected", [False, True])
def test_chosen_components_equal_the_loops(
    dtype: torch.dtype, per: str, ranks: Sequence[int], shape: tuple[int, ...], projected: bool
) -> None:
    update = update_of(ranks, dtype=dtype)
    gates = gates_of(shape, 2, sum(ranks) if per == "component" else len(ranks), per)
    x = random(*shape, 24, seed=7, dtype=dtype)
    h = x @ update.A.mT if projected else None
    got = sparse_update(x, h, gates, update, "outputs")
    assert got.dtype == dtype
    expected = naive_update(
        x.double(), bank_of(update), Gates(gates.weights.double(), gates.indices, gates.per), "outputs"
    )
    assert got.shape == expected.shape
    if expected.numel():
        assert_close(got, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(1, 1), (3, 21)])
@pytest.mark.parametrize("merge", ["outputs", "factors"])
@pytest.mark.parametrize("gradient", [False, True])
def test_merged_factors_and_gradients_equal_the_loops(shape: tuple[int, ...], merge: Merge, gradient: bool) -> None:
    update = update_of((3,) * 16)
    gates = gates_of(shape, 3, 16, "expert")
    x = random(*shape, 24, seed=7).requires_grad_(gradient)
    weights = gates.weights.clone().requires_grad_(gradient)
    got = sparse_update(x, None, Gates(weights, gates.indices), update, merge)
    truth, wide = x.detach().double().requires_grad_(), gates.weights.double().requires_grad_()
    expected = naive_update(truth, bank_of(update), Gates(wide, gates.indices), merge)
    assert_close(got, expected)
    if gradient:
        direction = random(*expected.shape, seed=8)
        found = torch.autograd.grad((got * direction).sum(), (x, weights))
        true = torch.autograd.grad((expected * direction.double()).sum(), (truth, wide))
        for one, other in zip(found, true, strict=True):
            assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_tokens_equal_the_loops_forward_and_backward(dtype: torch.dtype) -> None:
    """The path of a GPU, whose grouped product torch also has for a CPU; adapters without a token are among them."""
    update = update_of((8,) * 12, 32, 16, dtype)
    gates = gates_of((2, 9), 2, 5, "expert")
    x, weights = random(2, 9, 32, seed=7, dtype=dtype).requires_grad_(), gates.weights.clone().requires_grad_()
    got = grouped_update(x, Gates(weights, gates.indices), update)
    truth, wide = x.detach().double().requires_grad_(), gates.weights.double().requires_grad_()
    expected = naive_update(truth, bank_of(update), Gates(wide, gates.indices), "outputs")
    assert_close(got, expected, 3 * TOLERANCE[dtype])
    direction = random(*expected.shape, seed=8)
    found = torch.autograd.grad((got * direction.to(dtype)).sum(), (x, weights))
    true = torch.autograd.grad((expected * direction.double()).sum(), (truth, wide))
    for one, other in zip(found, true, strict=True):
        assert_close(one, other, 3 * TOLERANCE[dtype])
    assert not can_group(x, gates, update, "outputs"), "grouping is for a GPU"


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 512])
def test_a_gpu_gives_what_the_loops_give(tokens: int) -> None:
    update = update_of((8,) * 64, 256, 128, torch.bfloat16).cuda()
    gates = gates_of((1, tokens), 4, 64, "expert")
    x = random(1, tokens, 256, seed=7, dtype=torch.bfloat16)
    expected = naive_update(x.double(), bank_of(update.cpu()), Gates(gates.weights.double(), gates.indices), "outputs")
    assert gates.indices is not None
    on_gpu = Gates(gates.weights.cuda(), gates.indices.cuda())
    assert can_group(x.cuda(), on_gpu, update.cuda(), "outputs") == (tokens >= 16)
    assert_close(sparse_update(x.cuda(), None, on_gpu, update.cuda(), "outputs").cpu(), expected, 3e-2)


def test_few_of_few_components_are_not_worth_picking() -> None:
    assert is_sparse(gates_of((3,), 2, 16, "expert"), update_of((4,) * 16))
    assert not is_sparse(gates_of((3,), 2, 4, "expert"), update_of((4,) * 4))
    assert not is_sparse(Gates(torch.ones(3, 16)), update_of((4,) * 16))
