"""Which adapters of a pool are candidates in a module, and what a method may demand of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch

from hub_router.errors import MethodError
from hub_router.lora.bank import AdapterBank, ModuleBank


def select(bank: ModuleBank, numbers: Sequence[int]) -> ModuleBank:
    """The same module with fewer candidates.

    Args:
        bank (ModuleBank): stacked factors.
        numbers (Sequence[int]): candidates to keep (0 .. C-1, not pool positions), ascending; may be empty.

    Returns:
        ModuleBank: shares storage with ``bank`` where all are kept.
    """
    if len(numbers) == len(bank.ranks):
        return bank
    kept = [bank.slices[number] for number in numbers]
    rows = torch.cat([torch.arange(part.start, part.stop) for part in kept] or [torch.arange(0)])
    rows = rows.to(bank.A.device)
    experts = tuple(bank.experts[number] for number in numbers)
    return replace(
        bank,
        A=bank.A.index_select(0, rows),
        B=bank.B.mT.index_select(0, rows).mT,
        ranks=tuple(bank.ranks[number] for number in numbers),
        experts=experts,
        scalings=tuple(bank.scalings[number] for number in numbers) if bank.scalings else (),
        extras={expert: extra for expert, extra in bank.extras.items() if expert in experts},
    )


def without_zero_updates(pool: AdapterBank) -> AdapterBank:
    """Drop, module by module, the adapters whose update is zero because B A is: they have no direction.

    Args:
        pool (AdapterBank): stacked factors of a pool.

    Returns:
        AdapterBank: the same modules; a module may be left without candidates.
    """
    modules = {}
    for name, bank in pool.modules.items():
        # A component whose first elements are not zero is none; all of the others have to be looked at.
        live = (bank.A[:, 0].bool() & bank.B[0].bool()).tolist()  # [R]
        numbers = [
            number
            for number, (expert, part) in enumerate(zip(bank.experts, bank.slices, strict=True))
            if expert in bank.extras or any(live[part]) or _is_live(bank.A[part], bank.B[:, part])
        ]
        modules[name] = select(bank, numbers)
    return AdapterBank(adapters=pool.adapters, modules=modules)


def _is_live(A: torch.Tensor, B: torch.Tensor) -> bool:
    """Whether some component of a candidate is not zero."""
    return bool((A.count_nonzero(dim=1).bool() & B.count_nonzero(dim=0).bool()).any())


def need_plain_factors(pool: AdapterBank, method: str) -> None:
    """Refuse a pool that cannot become one update of two factors: candidates are more than B A.

    Args:
        pool (AdapterBank): stacked factors of a pool.
        method (str): what needs it, as the message names it.

    Raises:
        MethodError: lists the adapters that are more than B A.
    """
    more = sorted({expert for bank in pool.modules.values() for expert in bank.extras})
    if more:
        raise MethodError(
            f"{method} merges the factors, which leaves no place for DoRA magnitudes and biases, but these adapters "
            f"have some: {', '.join(repr(pool.adapters[e]) for e in more)}; choose a method that sums outputs, such as "
            "'uniform'"
        )


def need_averageable_factors(pool: AdapterBank, method: str) -> None:
    """Refuse a pool whose factors cannot be averaged: candidates of a module differ in rank, or are more than B A.

    Args:
        pool (AdapterBank): stacked factors of a pool.
        method (str): what needs it, as the message names it.

    Raises:
        MethodError: lists the adapters that are more than B A, or the adapters' ranks, once for every different case.
    """
    need_plain_factors(pool, method)
    cases: dict[tuple[tuple[str, int], ...], list[str]] = defaultdict(list)
    for name, bank in pool.modules.items():
        if len(set(bank.ranks)) > 1:
            ranks = zip((pool.adapters[e] for e in bank.experts), bank.ranks, strict=True)
            cases[tuple(ranks)].append(name)
    if not cases:
        return
    lines = [
        f"  - {', '.join(f'{adapter!r} rank {rank}' for adapter, rank in ranks)} in {names[0]}"
        + (f" and {len(names) - 1} more modules" if len(names) > 1 else "")
        for ranks, names in cases.items()
    ]
    raise MethodError(
        f"{method} merges the factors entry by entry and needs adapters of equal rank per module, got different "
        "ranks:\n"
        + "\n".join(lines)
        + "\nchoose adapters of one rank, or a method that sums outputs, such as 'uniform' or one with merge='outputs'"
    )


def need_gateable_components(pool: AdapterBank, method: str, instead: str) -> None:
    """Refuse a pool whose updates are more than their rank-one components.

    Args:
        pool (AdapterBank): stacked factors of a pool.
        method (str): what needs it, as the message names it.
        instead (str): a method that gates whole adapters, to suggest.

    Raises:
        MethodError: lists the adapters with DoRA magnitudes or biases, which no single component owns.
    """
    more = sorted({expert for bank in pool.modules.values() for expert in bank.extras})
    if more:
        raise MethodError(
            f"{method} gates single components, which does not say how much of a DoRA magnitude or a bias to add, but "
            f"these adapters have some: {', '.join(repr(pool.adapters[e]) for e in more)}; leave them out, or choose a "
            f"method that gates whole adapters, such as {instead!r}"
        )
