"""SpectR against a loop-written float64 reference of its Eq. 2-13."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from routing_cases import Case, Pair, assert_close, check_against, make_case, make_update

from hub_router.errors import MethodError
from hub_router.routing.spectr import Spectr


def align(A: torch.Tensor, B: torch.Tensor) -> Pair:
    U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)  # Eq. 2
    rank = min(A.shape[0], S.shape[0])
    return torch.diag(S[:rank]) @ Vh[:rank], U[:, :rank]  # Eq. 6: A* = S V^T, B* = U


def aligned(case: Case) -> list[Pair]:
    return [align(A, B) for A, B in case.pairs]


def reference(
    pool: Sequence[Pair], top_k: int, weighting: str, merge: str
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    def one(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = [A @ x for A, _ in pool]  # Eq. 7
        scores = [torch.sqrt((each * each).sum()) for each in h]  # Eq. 8
        best = sorted(range(len(pool)), key=lambda e: (-scores[e].item(), e))[:top_k]  # Eq. 9
        total = sum(torch.exp(scores[e]) for e in best)
        share = {e: torch.exp(scores[e]) / total if weighting == "softmax" else 1 / len(best) for e in best}
        if merge == "outputs":
            y = sum(share[e] * (pool[e][1] @ h[e]) for e in best)  # Eq. 13
        else:
            mean_h = sum(share[e] * h[e] for e in best)  # Eq. 10
            mean_B = sum(share[e] * pool[e][1] for e in best)  # Eq. 11
            y = mean_B @ mean_h  # Eq. 12
        weights = torch.zeros(len(pool), dtype=x.dtype)
        for e in best:
            weights[e] = torch.as_tensor(share[e]).detach()
        return y, weights

    return one


@pytest.mark.parametrize("weights", ["uniform", "softmax"])
@pytest.mark.parametrize("top_k", [1, 2, 4, 100])
def test_equals_the_reference(case: Case, top_k: int, weights: str) -> None:
    check_against(Spectr(top_k, weights), case, reference(aligned(case), top_k, weights, "outputs"), 2e-5)


def test_all_selected_with_equal_weights_is_uniform_on_the_aligned_factors() -> None:
    case = make_case([4, 8], (2, 3))
    got = make_update(Spectr(top_k=2), case)(case.inputs())
    expected = sum(case.inputs().double() @ (B @ A).T for A, B in case.pairs) / 2
    assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("weights", ["uniform", "softmax"])
def test_merging_factors_equals_the_reference(weights: str) -> None:
    # The sign of a pair (row of A*, column of B*) is free and Eq. 12 mixes the pairs of different experts, so the
    # reference starts from the same aligned factors as the engine; test_alignment holds them to Eq. 6.
    for case in (make_case([4, 4, 4, 4], (2, 7)), make_case([3, None, 3], (1, 63)), make_case([2], (4,))):
        router = Spectr(2, weights, "factors")
        bank = make_update(router, case)
        pairs, start = [], 0
        for rank in bank.ranks:
            part = slice(start, start + rank)
            pairs.append((bank.A[part].double(), bank.Bt[part].mT.double()))
            start += rank
        one = reference(pairs, 2, weights, "factors")
        check_against(router, case, one, 2e-5)


def test_alignment(case: Case) -> None:
    update = make_update(Spectr(), case)
    start = 0
    for (A, B), rank in zip(case.pairs, update.ranks, strict=True):
        part = slice(start, start + rank)
        aligned_A, aligned_B = update.A[part].double(), update.Bt[part].mT.double()
        assert_close(aligned_B @ aligned_A, B @ A, 1e-5)
        assert_close(aligned_B.T @ aligned_B, torch.eye(rank, dtype=torch.float64), 1e-5)
        lengths = aligned_A.norm(dim=1)
        assert_close(aligned_A @ aligned_A.T, torch.diag(lengths**2), 1e-5)
        assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
        start += rank


def test_token_that_projects_to_nothing_has_a_finite_gradient() -> None:
    case = make_case([4, 4, 2], (2, 3))
    x = torch.zeros(2, case.d_in, requires_grad=True)
    make_update(Spectr(2, "softmax"), case)(x).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_merging_factors_of_different_ranks_is_refused_with_all_of_them_named() -> None:
    with pytest.raises(
        MethodError, match=r"(?s)spectr.*'adapter-0' rank 4, 'adapter-1' rank 8.*merge='outputs'"
    ) as caught:
        make_update(Spectr(merge="factors"), make_case([4, 8, None], (1,)))
    assert "adapter-2" not in str(caught.value)


def test_rank_above_the_width_of_the_map() -> None:
    case = make_case([9, 9], (2, 3), d_in=5, d_out=6)
    check_against(Spectr(1), case, reference(aligned(case), 1, "uniform", "outputs"), 2e-5)


def test_bfloat16_stays_near_the_reference() -> None:
    case = make_case([4, 4, 4], (2, 9))
    got = make_update(Spectr(top_k=3, weights="softmax"), case, torch.bfloat16)(case.inputs(torch.bfloat16))
    one = reference(aligned(case), 3, "softmax", "outputs")
    x = case.inputs(torch.bfloat16).double()
    expected = torch.stack([one(token)[0] for token in x.reshape(-1, case.d_in)]).reshape(2, 9, -1)
    assert_close(got, expected, 3e-2)
