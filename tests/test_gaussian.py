"""Gaussians against dense D x D covariances, HiLoRA's Eq. 3."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hub_router.gaussian import Gaussian, fit, log_density, stack


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def dense_log_density(z: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    """The logarithm of N(z; mean, covariance), written out."""
    offset = z - mean
    distance = offset @ np.linalg.solve(covariance, offset)
    return -0.5 * (len(z) * math.log(2 * math.pi) + np.linalg.slogdet(covariance)[1] + distance)


@pytest.mark.parametrize(("m", "width"), [(2, 5), (3, 5), (6, 5), (20, 5), (4, 1), (20, 64)])
def test_fit_has_the_sample_mean_and_covariance(m: int, width: int) -> None:
    vectors = np.random.default_rng(m).normal(size=(m, width)) + 3
    fitted = fit(vectors)
    assert fitted.samples == m
    assert fitted.factors.shape == (min(m - 1, width), width)
    np.testing.assert_allclose(fitted.mean, vectors.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(fitted.factors.T @ fitted.factors, np.cov(vectors.T).reshape(width, width), atol=1e-12)
    lengths = np.linalg.norm(fitted.factors, axis=1)
    assert (np.diff(lengths) <= 0).all()
    gram = fitted.factors @ fitted.factors.T
    np.testing.assert_allclose(gram, np.diag(lengths**2), atol=1e-13)


def test_fit_computes_in_float64() -> None:
    vectors = (1 + np.random.default_rng(0).normal(size=(6, 9)) * 1e-3).astype(np.float32)
    fitted = fit(vectors)
    assert fitted.mean.dtype == fitted.factors.dtype == np.float64
    np.testing.assert_allclose(fitted.factors.T @ fitted.factors, np.cov(vectors.T.astype(np.float64)), rtol=1e-9)


def test_equal_samples_have_no_covariance() -> None:
    fitted = fit(np.full((5, 4), 0.5))
    assert not fitted.factors.any()
    (density,) = log_density(np.array([[0.5, 0.5, 0.5, 0.6]]), *stack([fitted]), 0.01)
    assert density == pytest.approx(dense_log_density(np.array([0, 0, 0, 0.1]), np.zeros(4), 0.01 * np.eye(4)))


def test_one_sample_has_no_factors() -> None:
    fitted = fit(np.array([[1.0, 2.0]]))
    assert fitted.factors.shape == (0, 2)
    (density,) = log_density(np.array([[1.0, 2.0]]), *stack([fitted]), 1e-5)
    assert density == pytest.approx(-math.log(2 * math.pi * 1e-5))


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.zeros((0, 4)), r"shape \(0, 4\)"),
        (np.zeros(4), r"shape \(4,\)"),
        (np.zeros((3, 0)), r"shape \(3, 0\)"),
        (np.array([[1.0, np.nan]]), "not finite"),
    ],
)
def test_vectors_that_are_none_are_refused(vectors: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(vectors)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-3, 0.7])
def test_density_equals_the_dense_one(epsilon: float) -> None:
    generator = np.random.default_rng(1)
    gaussians = [fit(generator.normal(size=(m, 6))) for m in (1, 2, 5, 20)]
    # Rows that are not orthogonal, and a row of zeros between others, are as good.
    loose = np.concatenate([generator.normal(size=(2, 6)), np.zeros((1, 6)), generator.normal(size=(3, 6))])
    gaussians.append(Gaussian(generator.normal(size=6), loose, 7))
    vectors = generator.normal(size=(9, 6))
    got = log_density(vectors, *stack(gaussians), epsilon)
    assert got.shape == (9, 5)
    for i, z in enumerate(vectors):
        for e, each in enumerate(gaussians):
            covariance = each.factors.T @ each.factors + epsilon * np.eye(6)
            assert got[i, e] == pytest.approx(dense_log_density(z, each.mean, covariance), rel=1e-8)


def test_published_range_of_scores() -> None:
    generator = np.random.default_rng(2)
    centre, width = unit(generator.normal(size=768)), 768
    samples = unit(centre + generator.normal(size=(20, 768)) * 0.3 / math.sqrt(width))
    fitted = fit(samples)
    dense = fitted.factors.T @ fitted.factors + 1e-5 * np.eye(width)
    others = unit(generator.normal(size=(3, width)))
    scores = log_density(np.stack([fitted.mean, *others]), *stack([fitted]), 1e-5)[:, 0] / width
    assert scores[0] == pytest.approx(dense_log_density(fitted.mean, fitted.mean, dense) / width, rel=1e-9)
    assert scores[1] == pytest.approx(dense_log_density(others[0], fitted.mean, dense) / width, rel=1e-9)
    # The paper's Fig. 4 ends at 5, and the largest score that epsilon = 1e-5 leaves possible is 4.84.
    assert 4.5 < scores[0] < -0.5 * math.log(2 * math.pi * 1e-5) < 5


def test_a_row_is_the_same_alone_in_a_batch_and_in_another_order() -> None:
    generator = np.random.default_rng(3)
    means, factors = stack([fit(generator.normal(size=(m, 384))) for m in (20, 7, 2, 13)])
    vectors = generator.normal(size=(33, 384))
    together = log_density(vectors, means, factors, 1e-5)
    alone = np.concatenate([log_density(each[None], means, factors, 1e-5) for each in vectors])
    assert np.array_equal(alone, together)
    assert np.array_equal(log_density(vectors[::-1], means, factors, 1e-5), together[::-1])


def test_no_matrix_of_the_embedding_width_is_made() -> None:
    # Squared, this width would take 320 GB.
    generator = np.random.default_rng(4)
    width = 200_000
    fitted = fit(generator.normal(size=(4, width)) / math.sqrt(width))
    density = log_density(fitted.mean[None], *stack([fitted]), 1e-3)[0, 0]
    variances = np.square(fitted.factors).sum(axis=1) + 1e-3
    expected = -0.5 * (width * math.log(2 * math.pi) + np.log(variances).sum() + (width - 3) * math.log(1e-3))
    assert density == pytest.approx(expected)


def test_stack_fills_up_with_zeros_and_refuses_other_widths() -> None:
    means, factors = stack([fit(np.eye(3)), fit(np.eye(3)[:1])])
    assert means.shape == (2, 3)
    assert factors.shape == (2, 2, 3)
    assert not factors[1].any()
    with pytest.raises(ValueError, match=r"\[2, 3\] dimensions"):
        stack([fit(np.eye(3)), fit(np.eye(2))])
    with pytest.raises(ValueError, match="expected one"):
        stack([])
