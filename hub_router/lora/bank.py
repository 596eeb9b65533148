"""All adapters of a pool stacked per module: ``A = [A_1; ..; A_K]`` and ``B = [s_1 B_1 .. s_K B_K]``.

With the scaling absorbed into B, every routing method is a gate on the stacked rank-one components:
``y = W x + B (gate * (A x))``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

import torch

from hub_router.errors import IncompatibleAdaptersError, MethodError
from hub_router.lora.adapter import LoraAdapter, LoraFactors


@dataclass(frozen=True, eq=False)
class Extra:
    """What an adapter's update of one module has beside B A.

    Args:
        magnitude (torch.Tensor | None): DoRA's row lengths ``(D_out,)``, as stored.
        bias (torch.Tensor | None): bias of the up projection ``(D_out,)``, scaling absorbed.
    """

    magnitude: torch.Tensor | None = None
    bias: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class ModuleBank:
    """The stacked factors of one module. A candidate is an adapter of the pool that adapts this module.

    Args:
        module (str): module path in the base model.
        A (torch.Tensor): stacked down projections ``(R, D_in)``, R the sum of the candidates' ranks.
        B (torch.Tensor): stacked up projections ``(D_out, R)``, each candidate's scaling absorbed.
        ranks (tuple[int, ...]): rank of each candidate, ``(K,)`` values.
        experts (tuple[int, ...]): pool position of each candidate, ascending, ``(K,)`` values.
        extras (Mapping[int, Extra]): by pool position, for those candidates that are more than B A.
        lookup (bool): the module is an embedding, whose inputs are token ids.
        scalings (tuple[float, ...]): what each candidate's B was multiplied by, ``(K,)`` values; empty for 1.
    """

    module: str
    A: torch.Tensor
    B: torch.Tensor
    ranks: tuple[int, ...]
    experts: tuple[int, ...]
    extras: Mapping[int, Extra] = field(default_factory=dict)
    lookup: bool = False
    scalings: tuple[float, ...] = ()

    @property
    def d_in(self) -> int:
        """Input width of the adapted linear map."""
        return self.A.shape[1]

    @property
    def d_out(self) -> int:
        """Output width of the adapted linear map."""
        return self.B.shape[0]

    @property
    def offsets(self) -> tuple[int, ...]:
        """First component of each candidate, then R: ``(K + 1,)`` values."""
        return (0, *accumulate(self.ranks))

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where each candidate's components lie: rows of A and columns of B."""
        offsets = self.offsets
        return tuple(slice(start, stop) for start, stop in pairwise(offsets))

    @property
    def component_experts(self) -> torch.Tensor:
        """Candidate number (0 .. K-1, not the pool position) of each component, int64 ``(R,)``."""
        numbers = [number for number, rank in enumerate(self.ranks) for _ in range(rank)]
        return torch.tensor(numbers, dtype=torch.int64, device=self.A.device)  # [R]

    @property
    def components(self) -> torch.Tensor:
        """Components of each candidate, int64 ``(K, r_max)``; its first one again where it has fewer."""
        firsts, ranks = torch.tensor(self.offsets[:-1]), torch.tensor(self.ranks)
        steps = torch.arange(max(self.ranks, default=0))
        return torch.where(steps < ranks.unsqueeze(-1), firsts.unsqueeze(-1) + steps, firsts.unsqueeze(-1))

    @property
    def filled(self) -> torch.Tensor | None:
        """Which entries of :attr:`components` are components, 1 or 0 ``(K, r_max)``; None where all are."""
        if len(set(self.ranks)) < 2:
            return None
        return (torch.arange(max(self.ranks)) < torch.tensor(self.ranks).unsqueeze(-1)).to(torch.float32)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ModuleBank:
        """The same bank on another device or in another dtype.

        Args:
            device (torch.device | str | None): target device; None keeps it.
            dtype (torch.dtype | None): target dtype; None keeps it.

        Returns:
            ModuleBank: shares storage with this one where nothing changes.
        """
        A, B = (factor.to(device=device, dtype=dtype) for factor in (self.A, self.B))
        return replace(self, A=A, B=B)


@dataclass(frozen=True, eq=False)
class AdapterBank:
    """A pool of adapters, stacked.

    Args:
        adapters (tuple[str, ...]): the users' names; axis E of every weight follows this order.
        modules (Mapping[str, ModuleBank]): one entry per module that any adapter adapts.
    """

    adapters: tuple[str, ...]
    modules: Mapping[str, ModuleBank]


def build_bank(
    adapters: Sequence[LoraAdapter],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> AdapterBank:
    """Stack a pool's factors, one allocation per module and factor, scaling absorbed into B.

    Args:
        adapters (Sequence[LoraAdapter]): the pool, in the order of axis E. Ranks and modules may differ.
        dtype (torch.dtype): dtype of the stacked factors; the scaling is applied in float32 at least.
        device (torch.device | str): where the stacked factors live.

    Returns:
        AdapterBank: candidates of each module in pool order; modules in order of first appearance.

    Raises:
        MethodError: two adapters have the same name.
        IncompatibleAdaptersError: adapters disagree about a module's widths; lists every one.
    """
    names = tuple(adapter.name for adapter in adapters)
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise MethodError(
            f"adapter names must be unique within a pool, got more than once: {', '.join(repeated)}; "
            "pass a mapping of name to adapter to choose the names"
        )
    candidates: dict[str, list[int]] = {}
    for position, adapter in enumerate(adapters):
        for module in adapter.modules:
            candidates.setdefault(module, []).append(position)
    _check_shapes(adapters, candidates)

    def stack(module: str) -> ModuleBank:
        experts = candidates[module]
        return _stack(module, experts, [adapters[e].modules[module] for e in experts], dtype, device)

    # Copies of a few rows each are too small for one of them to be spread over threads.
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return AdapterBank(names, dict(zip(candidates, threads.map(stack, candidates), strict=True)))


def _stack(
    module: str,
    experts: Sequence[int],
    factors: Sequence[LoraFactors],
    dtype: torch.dtype,
    device: torch.device | str,
) -> ModuleBank:
    """One module's bank; ``factors[k]`` belongs to pool position ``experts[k]``."""
    ranks = tuple(factor.rank for factor in factors)
    total = sum(ranks)
    A = torch.empty(total, factors[0].d_in, dtype=dtype, device=device)
    # Columns of B lie together in memory, as the engine multiplies them.
    B = torch.empty(total, factors[0].d_out, dtype=dtype, device=device).mT
    with torch.no_grad():
        if all(_is_like(factor, B) for factor in factors):
            torch.cat([factor.A for factor in factors], out=A)
            torch.cat([factor.B.mT for factor in factors], out=B.mT)
            B *= torch.tensor([factor.scaling for factor in factors for _ in range(factor.rank)], dtype=dtype)
        else:
            for factor, rows, columns in zip(factors, A.split(ranks), B.split(ranks, dim=1), strict=True):
                rows.copy_(factor.A)
                # A product in half precision would round twice: after scaling, and again in the target dtype.
                columns.copy_(factor.B.to(torch.promote_types(factor.B.dtype, torch.float32)) * factor.scaling)
    extras = {
        expert: _extra(factor)
        for expert, factor in zip(experts, factors, strict=True)
        if factor.magnitude is not None or factor.bias is not None
    }
    scalings = tuple(factor.scaling for factor in factors)
    return ModuleBank(module, A, B, ranks, tuple(experts), extras, factors[0].lookup, scalings)


def _is_like(factors: LoraFactors, B: torch.Tensor) -> bool:
    """Whether the scaling may be applied where the factors are stacked."""
    wide = torch.promote_types(factors.B.dtype, torch.float32)
    return wide == B.dtype and {factors.A.device, factors.B.device, B.device} == {torch.device("cpu")}


def _extra(factors: LoraFactors) -> Extra:
    bias = factors.bias
    if bias is not None:
        bias = bias.to(torch.promote_types(bias.dtype, torch.float32)) * factors.scaling
    return Extra(factors.magnitude, bias)


def _check_shapes(adapters: Sequence[LoraAdapter], candidates: Mapping[str, Sequence[int]]) -> None:
    """Raise once with every module on whose widths the pool disagrees."""
    mismatches = []
    for module, experts in candidates.items():
        widths = {e: (adapters[e].modules[module].d_in, adapters[e].modules[module].d_out) for e in experts}
        (usual, _), *others = Counter(widths.values()).most_common()
        if others:
            mismatches += [
                f"adapter {adapters[e].name!r}, module {module}: D_in x D_out is {got[0]} x {got[1]}, "
                f"expected {usual[0]} x {usual[1]} as in the other adapters of the pool"
                for e, got in widths.items()
                if got != usual
            ]
    if mismatches:
        bases = sorted({adapter.base_model or "unknown" for adapter in adapters})
        raise IncompatibleAdaptersError(" / ".join(bases), mismatches)
