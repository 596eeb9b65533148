"""KnOTS against a dense float64 reference: NumPy's SVD of the updates side by side, and TIES in loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from merge_cases import check_merge, merge, product
from routing_cases import MODULE, Case, adapter, assert_close, make_case, random_factors

from hub_router.composition.assemble import stack
from hub_router.errors import MethodError
from hub_router.lora.adapter import LoraFactors
from hub_router.routing.knots import Knots, side_by_side


def ties(rights: list[np.ndarray], density: float) -> np.ndarray:
    """Trim, elect and merge of https://arxiv.org/abs/2306.01708, Algorithm 1, entry by entry."""
    trimmed = []
    for right in rights:
        kept = int(density * right.size)
        largest = sorted(range(right.size), key=lambda i: -abs(right.flat[i]))[:kept]
        trim = np.zeros_like(right)
        for i in largest:
            trim.flat[i] = right.flat[i]
        trimmed.append(trim)
    merged = np.zeros_like(rights[0])
    for i in range(merged.size):
        values = [trim.flat[i] for trim in trimmed]
        sign = 1.0 if sum(values) >= 0 else -1.0
        agreeing = [value for value in values if value * sign > 0]
        if agreeing:
            merged.flat[i] = sum(agreeing) / len(agreeing)
    return merged


def reference(case: Case, density: float, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The update U S V^T with the merged V, and the experts' shares."""
    updates = [(B @ A).numpy() for A, B in case.pairs]
    U, S, Vt = np.linalg.svd(np.hstack(updates), full_matrices=False)
    rank = int((1e-10 * S[0] < S).sum())
    rights = [Vt[:rank, e * case.d_in : (e + 1) * case.d_in] for e in range(len(updates))]
    merged = rights[0] if len(rights) == 1 else ties(rights, density)
    shares = torch.full((len(updates),), scale / len(updates), dtype=torch.float64)
    return torch.from_numpy(scale * U[:, :rank] * S[:rank] @ merged), shares


@pytest.mark.parametrize(("density", "scale"), [(0.2, 1.0), (0.5, 0.3), (1.0, 1.0)])
def test_ties_equals_the_reference(case: Case, density: float, scale: float) -> None:
    expected, shares = reference(case, density, scale)
    check_merge(Knots(density=density, scale=scale), case, expected, shares, 1e-5)


def test_defaults_are_the_untuned_ones_of_ties() -> None:
    case = make_case([4, 4, 4], (1,))
    assert_close(product(merge(Knots(), case.adapters)), reference(case, 0.2, 1.0)[0], 1e-5)


def test_linear_is_the_mean_of_the_updates(case: Case) -> None:
    count = len(case.pairs)
    expected = sum(B @ A for A, B in case.pairs) * 0.7 / count
    assert isinstance(expected, torch.Tensor)
    shares = torch.full((count,), 0.7 / count, dtype=torch.float64)
    check_merge(Knots("linear", scale=0.7), case, expected, shares, 1e-5)


def test_svd_side_by_side() -> None:
    case = make_case([3, 8, 1], (1,))
    US, rights = side_by_side(stack(case.adapters).modules[MODULE])
    for right, (A, B) in zip(rights, case.pairs, strict=True):
        assert_close(US.double() @ right.double(), B @ A, 1e-5)
    together = torch.cat(rights, dim=1).double()
    assert_close(together @ together.T, torch.eye(12, dtype=torch.float64), 1e-5)
    lengths = US.double().norm(dim=0)
    assert_close(US.double().T @ US.double(), torch.diag(lengths**2), 1e-5)
    dense = torch.linalg.svdvals(torch.cat([B @ A for A, B in case.pairs], dim=1))[:12]
    assert_close(lengths, dense, 1e-5)


def test_directions_of_no_size_are_left_out() -> None:
    factors = random_factors(3, 4, 24, 20)
    pool = [adapter(f"adapter-{e}", {MODULE: factors}) for e in range(3)]
    prepared = merge(Knots(density=1.0), pool)
    assert prepared.bank.ranks == (4,)
    assert_close(product(prepared), 2.0 * factors.B.double() @ factors.A.double(), 1e-5)


def test_signs_of_the_factors_do_not_matter() -> None:
    case = make_case([4, 2, 8], (1,))
    turned = [
        adapter(a.name, {name: LoraFactors(-f.A, -f.B, f.scaling) for name, f in a.modules.items()})
        for a in case.adapters
    ]
    assert_close(product(merge(Knots(), turned)), product(merge(Knots(), case.adapters)), 1e-5)


def test_no_update_is_formed() -> None:
    # One dense update would take 160 GB.
    pool = [adapter(f"adapter-{e}", {MODULE: random_factors(e, 2, 200_000, 200_000)}) for e in range(2)]
    assert merge(Knots(), pool).bank.A.shape == (4, 200_000)


def test_more_than_two_factors_are_refused_by_name() -> None:
    plain = random_factors(9, 4, 24, 20)
    biased = LoraFactors(plain.A, plain.B, 1.0, bias=torch.ones(20))
    with pytest.raises(MethodError, match=r"'knots'.*biases.*: 'leaning'; choose .*'uniform'"):
        merge(Knots(), [*make_case([4, 8], (1,)).adapters, adapter("leaning", {MODULE: biased})])
