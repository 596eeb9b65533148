from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hub_router.lora.adapter import LoraAdapter, LoraFactors
from hub_router.lora.spectrum import AMBIGUOUS, spectra, spectrum, svd


def factors(
    rank: int, d_in: int, d_out: int, *, scaling: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float32
) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, d_in, generator=generator).to(dtype)
    B = torch.randn(d_out, rank, generator=generator).to(dtype)
    return LoraFactors(A, B, scaling)


def with_values(values: list[float], d_in: int, d_out: int, *, dtype: torch.dtype = torch.float64) -> LoraFactors:
    """Factors whose product has exactly these singular values, up to rounding, mixed by a random square matrix."""
    rng = np.random.default_rng(len(values))
    U = np.linalg.qr(rng.normal(size=(d_out, len(values))))[0]
    V = np.linalg.qr(rng.normal(size=(d_in, len(values))))[0]
    mix = np.linalg.qr(rng.normal(size=(len(values), len(values))))[0]
    return LoraFactors(torch.tensor(mix.T @ V.T, dtype=dtype), torch.tensor(U * values @ mix, dtype=dtype), 1.0)


def dense(factors: LoraFactors) -> tuple[np.ndarray, np.ndarray]:
    """Singular values and right singular vectors of the dense product, added up element by element of the rank."""
    product = np.zeros((factors.d_out, factors.d_in))
    for component in range(factors.rank):
        column, row = factors.B[:, component].double().numpy(), factors.A[component].double().numpy()
        product += factors.scaling * np.outer(column, row)
    _, values, right = np.linalg.svd(product, full_matrices=False)
    padded = np.zeros(factors.rank)
    padded[: min(factors.rank, len(values))] = values[: factors.rank]
    return padded, right


def assert_exact(one: LoraFactors, *, relative: float = 1e-5, direction: float = 1e-6) -> None:
    """Each singular value to ``relative`` of itself (or 1e-9 of the largest), the direction to ``direction``."""
    found = spectrum("m", one)
    values, right = dense(one)
    assert found.singular_values.dtype == np.float32
    np.testing.assert_allclose(found.singular_values, values, rtol=relative, atol=1e-9 * values[0])
    assert found.direction is not None
    assert found.direction.dtype == np.float32
    assert np.linalg.norm(found.direction - right[0] * np.sign(right[0] @ found.direction)) < direction
    assert np.linalg.norm(found.direction) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("rank", "d_in", "d_out"), [(1, 7, 5), (4, 33, 17), (8, 64, 8), (16, 130, 257), (3, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equals_the_dense_decomposition(rank: int, d_in: int, d_out: int, dtype: torch.dtype) -> None:
    assert_exact(factors(rank, d_in, d_out, scaling=0.37, dtype=dtype))


@pytest.mark.parametrize(("rank", "d_in", "d_out"), [(9, 4, 6), (9, 6, 4), (9, 20, 4), (9, 4, 20), (5, 1, 1)])
def test_rank_above_a_width(rank: int, d_in: int, d_out: int) -> None:
    one = factors(rank, d_in, d_out)
    assert_exact(one)
    values = spectrum("m", one).singular_values
    assert values.shape == (rank,)
    assert (values[min(d_in, d_out) :] == 0).all()


@pytest.mark.parametrize("smallest", [1e-2, 1e-4, 1e-6, 1e-9])
def test_ill_conditioned_factors_keep_their_small_values(smallest: float) -> None:
    values = list(np.geomspace(1.0, smallest, 8))
    # Stored in float64, so that the values asked for are the ones in the factors down to the smallest.
    found = spectrum("m", with_values(values, 60, 40))
    np.testing.assert_allclose(found.singular_values, values, rtol=1e-5)


def test_ill_conditioned_b_in_float32() -> None:
    one = factors(8, 200, 100)
    scales = torch.logspace(0, -6, 8)
    assert_exact(LoraFactors(one.A, one.B * scales, 2.0))
    assert_exact(LoraFactors(one.A * scales.unsqueeze(1), one.B, 2.0))


def test_factors_that_hide_each_other() -> None:
    """|A| |B| is 1e6 times the product: what is large in A is small in B."""
    one, scales = factors(6, 80, 50), torch.logspace(0, -6, 6, dtype=torch.float64)
    hidden = LoraFactors(one.A.double() * scales.unsqueeze(1), one.B.double() * scales.flip(0), 1.0)
    assert_exact(hidden)


@pytest.mark.parametrize("zero", [1, 5, 8])
def test_dead_components(zero: int) -> None:
    one = factors(8, 30, 20)
    one.B[:, :zero] = 0
    if zero < 8:
        assert_exact(one)
    found = spectrum("m", one)
    assert (found.singular_values[8 - zero :] < 1e-9).all()
    assert (found.direction is None) is (zero == 8)


@pytest.mark.parametrize("which", ["A", "B", "scaling", "both ends"])
def test_a_zero_update_has_no_direction(which: str) -> None:
    one = factors(4, 12, 10)
    if which == "both ends":
        # Neither factor is zero, their product is: live rows of A meet dead columns of B.
        one.A[:2] = 0
        one.B[:, 2:] = 0
    elif which == "scaling":
        one = LoraFactors(one.A, one.B, 0.0)
    else:
        getattr(one, which).zero_()
    found = spectrum("m", one)
    assert found.direction is None
    assert not found.ambiguous
    assert found.singular_values.tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("values", "ambiguous"),
    [
        ([2.0, 2.0, 1.0], True),
        ([2.0, 2.0 * (1 - 0.5 * AMBIGUOUS), 1.0], True),
        ([2.0, 2.0 * (1 - 2 * AMBIGUOUS), 1.0], False),
        ([2.0, 1.0, 1.0], False),
        ([2.0], False),
    ],
)
def test_ambiguous_directions_are_marked(values: list[float], ambiguous: bool) -> None:
    found = spectrum("m", with_values(values, 12, 9))
    assert found.ambiguous is ambiguous
    assert found.direction is not None


def test_sign_and_scaling() -> None:
    one = factors(4, 40, 30)
    first = spectrum("m", one)
    assert first.direction is not None
    assert first.direction[np.abs(first.direction).argmax()] > 0
    flipped = spectrum("m", LoraFactors(-one.A, one.B, 3.0))
    negative = spectrum("m", LoraFactors(one.A, one.B, -3.0))
    for other in (flipped, negative):
        assert other.direction is not None
        np.testing.assert_allclose(other.direction, first.direction, atol=1e-7)
        np.testing.assert_allclose(other.singular_values, 3 * first.singular_values, rtol=1e-6)


def test_tiny_and_huge_factors() -> None:
    for size in (1e-18, 1e15):
        one = factors(4, 40, 30)
        assert_exact(LoraFactors(one.A * size, one.B, 1.0))


@given(
    rank=st.integers(1, 10),
    d_in=st.integers(1, 12),
    d_out=st.integers(1, 12),
    seed=st.integers(0, 99),
    power=st.floats(0, 8),
)
@settings(max_examples=80, deadline=None)
def test_any_shape_and_condition(rank: int, d_in: int, d_out: int, seed: int, power: float) -> None:
    one = factors(rank, d_in, d_out, seed=seed)
    scaled = LoraFactors(one.A, one.B * torch.logspace(0, -power, rank), 1.0)
    values, right = dense(scaled)
    found = spectrum("m", scaled)
    np.testing.assert_allclose(found.singular_values, values, rtol=1e-5, atol=1e-9 * values[0])
    if not found.ambiguous:
        assert found.direction is not None
        gap = (values[0] - values[1]) / values[0] if rank > 1 else 1.0
        assert abs(right[0] @ found.direction) == pytest.approx(1.0, abs=1e-6 + 1e-10 / gap)


@pytest.mark.parametrize(("rank", "d_in", "d_out"), [(4, 33, 17), (1, 5, 7), (9, 6, 20), (9, 20, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_svd_rebuilds_the_update_with_orthonormal_vectors(rank: int, d_in: int, d_out: int, dtype: torch.dtype) -> None:
    one = factors(rank, d_in, d_out, dtype=dtype)
    U, S, V = svd(one.A, one.B)
    kept = min(rank, d_in, d_out)
    assert (U.shape, S.shape, V.shape) == ((d_out, kept), (kept,), (d_in, kept))
    assert U.dtype == S.dtype == V.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (S.diff() <= 0).all()
    product = one.B.double() @ one.A.double()
    assert torch.allclose(U.double() * S @ V.T.double(), product, atol=2e-6 * float(S[0]))
    for vectors in (U, V):
        assert torch.allclose(vectors.T @ vectors, torch.eye(kept, dtype=vectors.dtype), atol=1e-6)
    assert (V.gather(0, V.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_svd_and_spectrum_agree() -> None:
    one = factors(6, 50, 40)
    _, S, V = svd(one.A, one.B)
    found = spectrum("m", one)
    np.testing.assert_allclose(found.singular_values, S.numpy(), rtol=1e-6)
    np.testing.assert_allclose(found.direction, V[:, 0].numpy(), atol=1e-6)


def test_spectra_follow_the_adapters_modules_and_leave_them_as_they_are() -> None:
    modules = {name: factors(2, 6, 5, seed=seed) for seed, name in enumerate(("b", "a", "c"))}
    before = {name: (one.A.clone(), one.B.clone()) for name, one in modules.items()}
    found = list(spectra(LoraAdapter("x", None, None, modules, "")))
    assert [one.module for one in found] == ["b", "a", "c"]
    for name, (A, B) in before.items():
        assert torch.equal(modules[name].A, A)
        assert torch.equal(modules[name].B, B)


def test_trained_parameters_are_taken_without_gradient() -> None:
    one = factors(2, 6, 5)
    found = spectrum("m", LoraFactors(one.A.requires_grad_(), one.B.requires_grad_(), 1.0))
    assert found.direction is not None
