"""Calibration against a reference that refits and scores with loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hub_router.errors import HubRouterError
from hub_router.evaluate.calibration import EPSILONS, PUBLISHED, Operating, calibrate
from hub_router.gaussian import fit, log_density, stack

GRID = (1e-5, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def tasks(counts: list[int], width: int, spread: float, seed: int = 0) -> dict[str, np.ndarray]:
    """Unit vectors around a centre per task."""
    generator = np.random.default_rng(seed)
    return {
        f"task-{number}": unit(
            unit(generator.normal(size=width)) + spread / math.sqrt(width) * generator.normal(size=(count, width))
        )
        for number, count in enumerate(counts)
    }


def score(z: np.ndarray, samples: np.ndarray, epsilon: float) -> float:
    return float(log_density(z[None], *stack([fit(samples)]), epsilon)[0, 0]) / len(z)


def admitted(scores: list[float]) -> int:
    """Size of C(x), Eq. 4."""
    positive = sum(each > 0 for each in scores)
    return positive or min(len(scores), max(1, math.ceil(abs(max(scores)))))


def reference(samples: dict[str, np.ndarray], epsilon: float) -> Operating:
    own_above, others_below, own_first, seen, unseen = [], [], [], [], []
    for name, rows in samples.items():
        for held in range(len(rows)):
            own = score(rows[held], np.delete(rows, held, axis=0), epsilon)
            others = [score(rows[held], other, epsilon) for key, other in samples.items() if key != name]
            own_above.append(own > 0)
            others_below += [each < 0 for each in others]
            own_first.append(own > max(others))
            seen.append(admitted([own, *others]))
            unseen.append(admitted(others))
    shares = (own_above, others_below, own_first, seen, unseen)
    return Operating(epsilon, *(float(np.mean(each)) for each in shares))


@pytest.mark.parametrize(
    ("counts", "width", "spread"), [([4, 3, 6], 5, 0.7), ([5, 8, 3, 4], 40, 0.5), ([5, 8, 3, 4], 6, 1.0)]
)
def test_equals_the_reference(counts: list[int], width: int, spread: float) -> None:
    samples = tasks(counts, width, spread)
    found = calibrate(samples, GRID)
    assert (found.adapters, found.samples) == (len(counts), sum(counts))
    assert [each.epsilon for each in found.curve] == sorted(GRID)
    for got in found.curve:
        expected = reference(samples, got.epsilon)
        assert vars(got) == pytest.approx(vars(expected), abs=1e-12)
    best = max(each.balanced for each in found.curve)
    assert best == found.chosen.balanced
    assert found.published == found.curve[0]


def test_the_curve_is_no_flat_line() -> None:
    curve = calibrate(tasks([5, 8, 3, 4], 6, 1.0), GRID).curve
    assert len({each.own_above for each in curve}) > 2
    assert len({each.others_below for each in curve}) > 2
    assert len({each.own_first for each in curve}) > 2
    assert len({each.candidates_seen for each in curve}) > 2


def test_the_middle_of_equals_is_chosen() -> None:
    found = calibrate(tasks([6, 6, 6], 64, 0.4))
    perfect = [each for each in found.curve if each.balanced == 1]
    assert len(perfect) > 3
    assert found.chosen == perfect[(len(perfect) - 1) // 2]


def test_calibration_ends_the_flood_of_candidates() -> None:
    # A general encoder of 384 dimensions and 18 tasks: with the published epsilon every score is far below zero.
    found = calibrate(tasks([20] * 18, 384, 0.6))
    assert found.published.epsilon == PUBLISHED
    assert found.published.own_above == 0
    assert found.published.candidates_seen > 8
    assert found.chosen.balanced == 1
    assert found.chosen.candidates_seen == 1
    assert found.chosen.candidates_unseen < found.published.candidates_unseen / 2


def test_order_of_adapters_and_samples_does_not_matter() -> None:
    samples = tasks([4, 5, 6], 12, 0.8)
    turned = {name: rows[::-1] for name, rows in reversed(samples.items())}
    for got, expected in zip(calibrate(turned).curve, calibrate(samples).curve, strict=True):
        assert vars(got) == pytest.approx(vars(expected), abs=1e-12)


def test_the_grid_spans_all_useful_values() -> None:
    assert PUBLISHED in EPSILONS
    assert list(EPSILONS) == sorted(EPSILONS)
    # No score can be positive above 1 / (2 pi).
    assert EPSILONS[-1] < 1 / (2 * math.pi) < EPSILONS[-1] * 1.26


def test_too_few_samples_are_all_named() -> None:
    samples = tasks([2, 4, 1], 5, 0.5)
    with pytest.raises(HubRouterError, match=r"'task-0' has 2, 'task-2' has 1.*hub-router samples add"):
        calibrate(samples)
    with pytest.raises(HubRouterError, match="got 1; give at least 2"):
        calibrate(tasks([4], 5, 0.5))
