"""Which adapters of a pool are candidates in a module, and what a method may demand of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

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
    return ModuleBank(
        module=bank.module,
        A=bank.A.index_select(0, rows),
        B=bank.B.index_select(1, rows),
        ranks=tuple(bank.ranks[number] for number in numbers),
        experts=tuple(bank.experts[number] for number in numbers),
    )


def without_zero_updates(pool: AdapterBank) -> AdapterBank:
    """Drop, module by module, the adapters whose update B A is zero: they have no direction.

    Args:
        pool (AdapterBank): stacked factors of a pool.

    Returns:
        AdapterBank: the same modules; a module may be left without candidates.
    """
    modules = {}
    for name, bank in pool.modules.items():
        live = bank.A.count_nonzero(dim=1).bool() & bank.B.count_nonzero(dim=0).bool()  # [R]
        numbers = [number for number, part in enumerate(bank.slices) if bool(live[part].any())]
        modules[name] = select(bank, numbers)
    return AdapterBank(adapters=pool.adapters, modules=modules)


def need_equal_ranks(pool: AdapterBank, method: str) -> None:
    """Refuse a pool in which the candidates of a module differ in rank: their factors cannot be averaged.

    Args:
        pool (AdapterBank): stacked factors of a pool.
        method (str): what needs it, as the message names it.

    Raises:
        MethodError: lists the adapters' ranks, once for every different case.
    """
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
        f"{method} averages the factors and needs adapters of equal rank per module, got different ranks:\n"
        + "\n".join(lines)
        + "\nchoose adapters of one rank, or a method with merge='outputs'"
    )
