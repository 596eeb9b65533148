"""LoRA-LEGO against a float64 reference in loops: clusters that Lloyd's algorithm keeps, and two scales."""

from __future__ import annotations

import math

import pytest
import torch
from merge_cases import check_merge, merge, product
from routing_cases import MODULE, Case, adapter, assert_close, make_case, random_factors

from hub_router.errors import MethodError
from hub_router.lora.adapter import LoraAdapter, LoraFactors
from hub_router.routing.lego import Lego, cluster


def points_of(case: Case) -> list[torch.Tensor]:
    """Every component [a; b] of the pool, scaling in b."""
    return [torch.cat([A[i], B[:, i]]) for A, B in case.pairs for i in range(len(A))]


def reference(case: Case, labels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The update of these clusters, and the experts' shares."""
    points, owners = points_of(case), [e for e, (A, _) in enumerate(case.pairs) for _ in range(len(A))]
    k = max(labels) + 1
    r = sum(len(A) for A, _ in case.pairs) / len(case.pairs)
    update = torch.zeros(len(points[0]) - case.d_in, case.d_in, dtype=torch.float64)
    shares = torch.zeros(len(case.pairs), dtype=torch.float64)
    for number in range(k):
        mine = [i for i in range(len(points)) if labels[i] == number]
        mean = sum(points[i] for i in mine) / len(mine)
        assert isinstance(mean, torch.Tensor)
        length = sum(math.sqrt((points[i] ** 2).sum()) for i in mine) / len(mine)
        mean = mean * length / math.sqrt((mean**2).sum())  # parameter reweighting
        update += torch.outer(mean[case.d_in :], mean[: case.d_in])
        for i in mine:
            shares[owners[i]] += 1 / len(mine) / k
    return math.sqrt(r / k) * update, shares  # output reweighting


@pytest.mark.parametrize("clusters", [1, 3, 7, 24])
def test_equals_the_reference(case: Case, clusters: int) -> None:
    labels = cluster(torch.stack(points_of(case)), clusters, seed=0).tolist()
    k = min(clusters, len(labels))
    assert sorted(set(labels)) == list(range(k))
    expected, shares = reference(case, labels)
    prepared = check_merge(Lego(clusters), case, expected, shares, 1e-5)
    assert prepared.bank.ranks == (k,)
    assert prepared.shares is not None and math.isclose(prepared.shares.sum().item(), 1.0, rel_tol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_clusters_are_what_lloyds_algorithm_leaves_as_they_are(seed: int) -> None:
    points = torch.randn(400, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = cluster(points, 9, seed).tolist()
    means = []
    for number in range(9):
        mine = [point for point, label in zip(points, labels, strict=True) if label == number]
        means.append(torch.stack(mine).mean(0))
    for point, label in zip(points, labels, strict=True):
        distances = [((point - mean) ** 2).sum().item() for mean in means]
        assert distances[label] <= min(distances) * (1 + 1e-9)


def test_components_that_belong_together_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(4, 44, generator=generator)
    orders = [torch.randperm(4, generator=generator) for _ in range(6)]
    pool = []
    for number, order in enumerate(orders):
        near = centres[order] + 0.1 * torch.randn(4, 44, generator=generator)
        pool.append(adapter(f"adapter-{number}", {MODULE: LoraFactors(near[:, :24], near[:, 24:].T, 1.0)}))
    case = Case(pool, list(range(6)), (1,), 24)
    labels = cluster(torch.stack(points_of(case)), 4, seed=0)
    found = {tuple(torch.nonzero(labels == number).flatten().tolist()) for number in range(4)}
    planted = torch.cat(orders)
    assert found == {tuple(torch.nonzero(planted == centre).flatten().tolist()) for centre in range(4)}


def test_with_a_cluster_for_every_component_the_updates_are_summed() -> None:
    case = make_case([1, 8, 3, 2], (1,))
    total = sum(B @ A for A, B in case.pairs)
    for clusters in (14, 100):
        assert_close(product(merge(Lego(clusters), case.adapters)), math.sqrt(14 / 4 / 14) * total, 1e-6)


def test_equal_components_are_one_cluster_where_there_are_fewer_than_asked_for() -> None:
    factors = random_factors(3, 4, 24, 20)
    pool = [adapter(f"adapter-{e}", {MODULE: factors}) for e in range(3)]
    prepared = merge(Lego(clusters=7), pool)
    assert prepared.bank.ranks == (4,)
    assert_close(product(prepared), 2.0 * factors.B.double() @ factors.A.double(), 1e-6)


def opposite(count: int) -> list[LoraAdapter]:
    """Adapters of one component, which cancel out."""
    factors = random_factors(0, 1, 24, 20)
    turned = LoraFactors(-factors.A, -factors.B, factors.scaling)
    return [adapter(f"adapter-{e}", {MODULE: turned if e % 2 else factors}) for e in range(count)]


def test_components_that_cancel_out_leave_nothing() -> None:
    prepared = merge(Lego(clusters=1), opposite(6))
    assert not product(prepared).any()


def test_same_seed_same_clusters() -> None:
    case = make_case([8] * 8, (1,))
    first, second = (merge(Lego(5, seed=2**40), case.adapters).bank for _ in range(2))
    assert torch.equal(first.A, second.A) and torch.equal(first.B, second.B)
    others = [product(merge(Lego(5, seed=seed), case.adapters)) for seed in range(4)]
    assert any(not torch.allclose(others[0], other) for other in others[1:])


def test_more_than_two_factors_are_refused_by_name() -> None:
    case = make_case([4, 8], (1,))
    plain = random_factors(9, 4, 24, 20)
    dora = LoraFactors(plain.A, plain.B, 1.0, magnitude=torch.ones(20))
    with pytest.raises(MethodError, match=r"'lego'.*DoRA.*: 'stretched'; choose .*'uniform'"):
        merge(Lego(), [*case.adapters, adapter("stretched", {MODULE: dora})])
