"""``lego``: one adapter of a few components, each the mean of a cluster of the pool's rank-one components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from hub_router.features import ModuleFeatures
from hub_router.lora.bank import AdapterBank, ModuleBank
from hub_router.routing.base import Gates, Prepared
from hub_router.routing.candidates import need_plain_factors
from hub_router.routing.hyperparameters import integer, validate
from hub_router.routing.one_update import one_update, whole


@dataclass(frozen=True)
class Lego:
    """`LoRA-LEGO <https://arxiv.org/abs/2409.16167>`_: clusters of rank-one components, the "LEGO" of HiLoRA.

    A component is the point ``p = [a; b]``, row a of A and column b of B with the scaling in it, signs and lengths as
    stored. k-means makes k = min(``clusters``, R) clusters of a module's R points; ``y = W x + B' A' x`` sums over one
    merged component ``[a'; b']`` per cluster, with LEGO's two reweightings:

    - of parameters: the members' mean ``m`` is stretched to the mean of their lengths, ``m mean ||p|| / ||m||``
      (Euclidean), for averaging shortens;
    - of the output: ``B'`` times ``sqrt(r / k)``, r the mean rank of the candidates, for the merged update sums k
      components where each adapter sums r.

    With at least R clusters every component is one by itself, and the update is ``sqrt(r / R)`` times the sum of all.
    Where the points hold fewer different ones than clusters are wanted, k is their number. A cluster whose mean is
    zero, as that of two opposite points, merges to nothing. The share of an adapter is the mean, over the merged
    components, of the part of their members that are its.

    Args:
        clusters (int): rank of the merged adapter, as HiLoRA compares it with 24 components.
        seed (int): of the k-means++ start.
    """

    name: ClassVar[str] = "lego"
    title: ClassVar[str] = "one adapter of the means of clusters of rank-one components"
    paper: ClassVar[str] = "https://arxiv.org/abs/2409.16167"
    projects: ClassVar[bool] = False

    clusters: int = integer(24, at_least=1, help="rank of the merged adapter per module")
    seed: int = integer(0, at_least=0, help="seed of the k-means start")

    def __post_init__(self) -> None:
        validate(self)

    def check(self, pool: AdapterBank) -> None:
        """See :class:`~hub_router.routing.base.Router`; updates must be no more than B A."""
        need_plain_factors(pool, "method 'lego'")

    def members(self, adapters: Sequence[str]) -> Sequence[str]:
        """See :class:`~hub_router.routing.base.Router`; all of them."""
        return tuple(adapters)

    def prepare(self, bank: ModuleBank, adapters: Sequence[str], known: ModuleFeatures) -> Prepared:
        """See :class:`~hub_router.routing.base.Router`; the merged components."""
        points = torch.cat([bank.A, bank.B.mT], dim=1).to(torch.float64)  # [R, D_in + D_out]
        labels = cluster(points, self.clusters, self.seed)  # [R]
        merged, parts = _merge(points, labels)  # [k, D_in + D_out], [R]
        A, Bt = merged.split([bank.d_in, bank.d_out], dim=1)
        scale = (len(points) / len(bank.ranks) / len(merged)) ** 0.5
        shares = parts.new_zeros(len(bank.ranks)).index_add(0, bank.component_experts, parts) / len(merged)
        return one_update(bank, A, scale * Bt.mT, shares, adapters)

    def route(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, h: torch.Tensor | None) -> Gates:
        """See :class:`~hub_router.routing.base.Router`; the one adapter gets all."""
        return whole(x)


def cluster(points: torch.Tensor, clusters: int, seed: int) -> torch.Tensor:
    """k-means, run until no point changes its cluster.

    Args:
        points (torch.Tensor): float64 ``(R, D)``.
        clusters (int): how many clusters at most.
        seed (int): of the k-means++ start.

    Returns:
        torch.Tensor: int64 ``(R,)``, each point's cluster, 0 .. k-1 with none empty.
    """
    if clusters >= len(points):
        return torch.arange(len(points), device=points.device)
    distinct, same = points.unique(dim=0, return_inverse=True)
    if clusters >= len(distinct):
        return same
    from sklearn.cluster import KMeans

    # The points' coordinates in the space that they span: R numbers each, and all distances the same.
    coordinates = torch.linalg.qr(points.mT, mode="r").R.mT.cpu().numpy()  # [R, min(D, R)]
    # Unlike a plain integer, a sequence may be of any size.
    start = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
    found = KMeans(clusters, n_init=10, tol=0.0, random_state=start).fit(coordinates).labels_
    return torch.as_tensor(found, device=points.device).unique(return_inverse=True)[1]


def _merge(points: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each cluster's mean at its members' mean length ``(k, D)``, and 1 / the size of each point's cluster ``(R,)``."""
    sizes = torch.bincount(labels).to(points)  # [k]
    means = points.new_zeros(len(sizes), points.shape[1]).index_add(0, labels, points) / sizes.unsqueeze(1)  # [k, D]
    lengths = points.new_zeros(len(sizes)).index_add(0, labels, points.norm(dim=1)) / sizes  # [k]
    found = means.norm(dim=1)
    stretch = torch.where(found > 0, lengths / found, 0.0)
    return stretch.unsqueeze(1) * means, 1 / sizes[labels]
