"""top_k against Python's own sort."""

from __future__ import annotations

import pytest
import torch

from hub_router.routing.top_k import top_k


@pytest.mark.parametrize("k", [1, 3, 7, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_best_first_and_lowest_index_among_equals(k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(k)
    # Few distinct values, both signs, so that ties are everywhere.
    scores = (torch.randint(-3, 4, (5, 4, 7), generator=generator) / 2).to(dtype)
    got = top_k(scores, k)
    assert got.shape == (5, 4, min(k, 7))
    for row, chosen in zip(scores.reshape(-1, 7).tolist(), got.reshape(-1, min(k, 7)).tolist(), strict=True):
        assert chosen == sorted(range(7), key=lambda e: (-row[e], e))[:k]


def test_negative_zero_equals_zero() -> None:
    assert top_k(torch.tensor([-0.0, 0.0, -1.0]), 2).tolist() == [0, 1]


def test_extremes() -> None:
    scores = torch.tensor([1e-45, float("-inf"), 3e38, float("inf"), 0.0])
    assert top_k(scores, 5).tolist() == [3, 2, 0, 4, 1]


def test_no_candidates_and_no_tokens() -> None:
    assert top_k(torch.zeros(2, 0), 3).shape == (2, 0)
    assert top_k(torch.zeros(0, 4), 3).shape == (0, 3)


@pytest.mark.parametrize("place", [0, 2, 3])
def test_one_tie_in_one_row_is_settled_like_any_other(place: int) -> None:
    """Scores differ everywhere but for two of one row: among the best, at the edge, and beyond it."""
    scores = torch.rand(50, 64, generator=torch.Generator().manual_seed(0))
    order = scores[7].argsort(descending=True)
    scores[7, order[place]] = scores[7, order[place + 1]]
    for row, chosen in zip(scores.tolist(), top_k(scores, 4).tolist(), strict=True):
        assert chosen == sorted(range(64), key=lambda e: (-row[e], e))[:4]


def test_compiled_gives_the_same() -> None:
    scores = torch.randint(-3, 4, (5, 4, 7), generator=torch.Generator().manual_seed(0)) / 2
    compiled = torch.compile(top_k, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores, 3), top_k(scores, 3))
