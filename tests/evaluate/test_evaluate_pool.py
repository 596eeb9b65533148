"""The report on a pool against its parts, with each task's own Gaussian really left out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hub_router.errors import HubRouterError
from hub_router.evaluate.bounds import bhattacharyya, kl, shifted_error_bound
from hub_router.evaluate.calibration import calibrate
from hub_router.evaluate.pool import report_pool
from hub_router.gaussian import fit


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def samples() -> dict[str, np.ndarray]:
    """Four tasks; ``near`` lies beside ``first``."""
    generator = np.random.default_rng(3)
    centres = generator.normal(size=(4, 12))
    centres[3] = centres[0] + 0.3 * generator.normal(size=12)
    names, counts = ("first", "second", "third", "near"), (6, 5, 7, 4)
    return {
        name: unit(centre + 0.4 * generator.normal(size=(count, 12)))
        for name, centre, count in zip(names, centres, counts, strict=True)
    }


@pytest.mark.parametrize("epsilon", [None, 1e-2])
def test_every_figure_is_that_of_its_formula(samples: dict[str, np.ndarray], epsilon: float | None) -> None:
    report = report_pool(samples, "an encoder", epsilon=epsilon, top_k=2)
    calibration = calibrate(samples)
    chosen = epsilon or calibration.chosen.epsilon
    assert (report.adapters, report.encoder, report.top_k) == (tuple(samples), "an encoder", 2)
    assert (report.calibration, report.epsilon) == (calibration, chosen)
    pool = {name: fit(vectors) for name, vectors in samples.items()}
    for i, (name, own) in enumerate(pool.items()):
        others = {key: each for key, each in pool.items() if key != name}
        for j, other in enumerate(pool.values()):
            assert report.bhattacharyya[i, j] == pytest.approx(bhattacharyya(own, other, chosen), abs=1e-9)
            assert report.kl[i, j] == pytest.approx(kl(own, other, chosen), abs=1e-9)
        task = report.tasks[i]
        assert (task.adapter, task.samples) == (name, len(samples[name]))
        # Theorem 1
        assert task.error_bound == pytest.approx(
            sum(math.exp(-bhattacharyya(own, other, chosen)) for other in others.values()) / 2
        )
        # Theorem 2, the task's own Gaussian as q and not in the pool
        divergences = {key: kl(own, other, chosen) for key, other in others.items()}
        assert task.nearest == min(divergences, key=lambda key: divergences[key])
        assert task.divergence == pytest.approx(divergences[task.nearest])
        found = shifted_error_bound(own, list(others.values()), chosen, k=2)
        assert (task.unseen_bound, task.alpha, task.unbounded_by) == (found.bound, found.alpha, ())


def test_the_nearest_pair_comes_first(samples: dict[str, np.ndarray]) -> None:
    report = report_pool(samples, "an encoder")
    pairs = report.nearest_pairs(20)
    assert len(pairs) == 6
    assert [report.adapters[each] for each in pairs[0]] == ["first", "near"]
    distances = [report.bhattacharyya[pair] for pair in pairs]
    assert distances == sorted(distances)
    assert report.nearest_pairs(2) == pairs[:2]
    assert report.tasks[0].nearest == "near"
    assert report.tasks[3].nearest == "first"


def test_refusals(samples: dict[str, np.ndarray]) -> None:
    none = {"empty": np.empty((0, 0)), "few": samples["first"][:2]}
    with pytest.raises(HubRouterError, match=r"'empty' has 0, 'few' has 2.*hub-router index"):
        report_pool({**samples, **none}, "an encoder")
    for wrong in ({"epsilon": 0.0}, {"epsilon": math.nan}, {"top_k": 0}):
        with pytest.raises(HubRouterError, match="expected an epsilon above 0"):
            report_pool(samples, "an encoder", **wrong)  # type: ignore[arg-type]
    with pytest.raises(HubRouterError, match=rf"top_k {len(samples)} for a pool of {len(samples)} adapters"):
        report_pool(samples, "an encoder", top_k=len(samples))
    two = dict(list(samples.items())[:2])
    assert report_pool(two, "an encoder").top_k == 1
