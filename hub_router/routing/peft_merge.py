"""PEFT's static merges, each a method: one adapter made of all by PEFT's own ``add_weighted_adapter``.

Every module is merged by itself, on a skeleton of nothing but it. Adapters that do not adapt the module take no part;
one that is alone there is taken as it is, for with a single adapter PEFT merges linearly.

Their hyperparameters:

- ``scale``: merges that sum (``linear``, ``cat``, ``svd``, ``magnitude_prune``, and DARE's linear ones) give each of
  the C candidates the weight ``scale / C``, so that the result is as large as that of ``uniform``; merges that average
  those that agree (TIES, and DARE with TIES) give each ``scale``, TIES's lambda.
- ``density``: the share of entries that is kept. PEFT has no default; 0.2 is what TIES recommends where nothing can be
  tuned, and what PEFT's guide to merging uses for all of them.
- ``majority_sign_method``: whether a sign is elected by the ``total`` of the entries or by ``frequency``.
- ``svd_rank``: rank of the result where it comes from an SVD; None for the largest rank of the candidates.
- ``seed``: of DARE's draws, which differ from module to module.

Those that end in ``svd`` form the dense updates of a module's candidates, a few times over, and decompose one: 20
candidates of a 4096 x 4096 module take 4 GB and most of a minute of one core.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from hub_router.errors import MethodError
from hub_router.features import ModuleFeatures
from hub_router.lora.bank import AdapterBank, ModuleBank
from hub_router.lora.skeleton import MAX_ELEMENTS
from hub_router.lora.text import listing
from hub_router.routing.base import Gates, Prepared
from hub_router.routing.candidates import need_averageable_factors, need_plain_factors
from hub_router.routing.hyperparameters import choice, fraction, integer, optional_integer, positive, validate
from hub_router.routing.one_update import one_update, whole

_TIES = "https://arxiv.org/abs/2306.01708"
_DARE = "https://arxiv.org/abs/2311.03099"
_LAYER = "layer"
_MERGED = "merged"


def _scale() -> Any:
    return positive(1.0, help="factor of the merged update")


def _density() -> Any:
    return fraction(0.2, help="share of entries that is kept of each adapter")


def _sign() -> Any:
    return choice("total", among=("total", "frequency"), help="what elects an entry's sign: the sum, or the count")


def _rank() -> Any:
    return optional_integer(at_least=1, help="rank of the merged adapter; None: the largest of the adapters'")


def _seed() -> Any:
    return integer(0, at_least=0, help="seed of the random drop")


def add_weighted(
    bank: ModuleBank, combination: str, weights: Sequence[float], seed: int, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let PEFT merge the candidates of one module.

    Args:
        bank (ModuleBank): C candidates.
        combination (str): ``combination_type`` of ``add_weighted_adapter``.
        weights (Sequence[float]): of the candidates, ``(C,)`` values.
        seed (int): of the draws, if any; the caller's random numbers stay as they are.
        **settings (Any): further arguments of ``add_weighted_adapter``.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: A ``(R', D_in)`` and B ``(D_out, R')``, on the CPU.
    """
    from peft import LoraConfig, get_peft_model

    bank = bank.to("cpu")
    linear = nn.Linear(bank.d_in, bank.d_out, bias=False, device="meta")
    # One zero, seen as a matrix: PEFT asks for its device and dtype.
    linear.weight = nn.Parameter(torch.zeros(()).expand(bank.d_out, bank.d_in), requires_grad=False)
    host = nn.ModuleDict({_LAYER: linear})
    names = [str(number) for number in range(len(bank.ranks))]
    scalings = bank.scalings or (1.0,) * len(bank.ranks)
    configs: list[Any] = [
        LoraConfig(r=rank, lora_alpha=rank * scaling, target_modules=[_LAYER])
        for rank, scaling in zip(bank.ranks, scalings, strict=True)
    ]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        model = get_peft_model(host, configs[0], names[0], low_cpu_mem_usage=True)
        for name, config in zip(names[1:], configs[1:], strict=True):
            model.add_adapter(name, config, low_cpu_mem_usage=True)
        layer: Any = host[_LAYER]
        for name, part, scaling in zip(names, bank.slices, scalings, strict=True):
            layer.lora_A[name].weight = nn.Parameter(bank.A[part], requires_grad=False)
            # PEFT gives a scaling's root to either factor, so it has to see it apart from B.
            layer.lora_B[name].weight = nn.Parameter(bank.B[:, part] / scaling, requires_grad=False)
        torch.manual_seed(seed)
        # Whole matrices of singular vectors would be cut to the same, at many times the time and memory.
        model.add_weighted_adapter(
            names, list(weights), _MERGED, combination_type=combination, svd_full_matrices=False, **settings
        )
    return layer.lora_A[_MERGED].weight.detach(), layer.lora_B[_MERGED].weight.detach()


def module_seed(seed: int, module: str) -> int:
    """A seed of its own for every module.

    Args:
        seed (int): of the method, any size.
        module (str): module path in the base model.

    Returns:
        int: 64 bits.
    """
    return int(np.random.SeedSequence([seed, zlib.crc32(module.encode())]).generate_state(1, np.uint64)[0])


def _need_plain(router: Any, pool: AdapterBank) -> None:
    need_plain_factors(pool, f"method {router.name!r}")


def _need_equal(router: Any, pool: AdapterBank) -> None:
    need_averageable_factors(pool, f"method {router.name!r}")


def _need_small(router: Any, pool: AdapterBank) -> None:
    _need_plain(router, pool)
    large = [name for name, bank in pool.modules.items() if bank.d_in * bank.d_out > MAX_ELEMENTS]
    if large:
        raise MethodError(
            f"method {router.name!r} forms every adapter's whole update, which has more than {MAX_ELEMENTS} elements "
            f"in {listing(large)}; choose 'cat' or 'knots', which keep to the factors"
        )


def _members(router: Any, adapters: Sequence[str]) -> Sequence[str]:
    return tuple(adapters)


def _prepare(router: Any, bank: ModuleBank, adapters: Sequence[str], known: ModuleFeatures) -> Prepared:
    count = len(bank.ranks)
    weight = router.scale if "ties" in router.name else router.scale / count
    own = {each.name: getattr(router, each.name) for each in fields(router) if each.name not in ("scale", "seed")}
    seed = module_seed(getattr(router, "seed", 0), bank.module)
    A, B = add_weighted(bank, router.name, [weight] * count, seed, **own)
    return one_update(bank, A, B, torch.full((count,), router.scale / count), adapters)


def _route(router: Any, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, h: torch.Tensor | None) -> Gates:
    return whole(x)


@dataclass(frozen=True)
class Linear:
    """The factors' weighted sums, the root of each weight on A and on B: ``C`` times ``merged``."""

    name: ClassVar[str] = "linear"
    title: ClassVar[str] = "one adapter of all adapters' summed factors"
    paper: ClassVar[str] = ""
    projects: ClassVar[bool] = False

    scale: float = _scale()

    check, members, prepare, route = _need_equal, _members, _prepare, _route

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class Cat:
    """The factors side by side: the weighted sum of the updates, exactly, at the sum of the ranks."""

    name: ClassVar[str] = "cat"
    title: ClassVar[str] = "one adapter of all adapters' factors side by side"
    paper: ClassVar[str] = ""
    projects: ClassVar[bool] = False

    scale: float = _scale()

    check, members, prepare, route = _need_plain, _members, _prepare, _route

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class Svd:
    """The weighted sum of the updates, cut to its largest singular values."""

    name: ClassVar[str] = "svd"
    title: ClassVar[str] = "one adapter of the summed updates' largest singular values"
    paper: ClassVar[str] = ""
    projects: ClassVar[bool] = False

    scale: float = _scale()
    svd_rank: int | None = _rank()

    check, members, prepare, route = _need_small, _members, _prepare, _route

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class Ties:
    """`TIES <https://arxiv.org/abs/2306.01708>`_ on the factors: trim by magnitude, elect signs, average."""

    name: ClassVar[str] = "ties"
    title: ClassVar[str] = "one adapter of all adapters' factors, merged by TIES"
    paper: ClassVar[str] = _TIES
    projects: ClassVar[bool] = False

    scale: float = _scale()
    density: float = _density()
    majority_sign_method: str = _sign()

    check, members, prepare, route = _need_equal, _members, _prepare, _route

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class TiesSvd:
    """`TIES <https://arxiv.org/abs/2306.01708>`_ on the updates, cut to the largest singular values."""

    name: ClassVar[str] = "ties_svd"
    title: ClassVar[str] = "one adapter of all adapters' updates, merged by TIES, then cut"
    paper: ClassVar[str] = _TIES
    projects: ClassVar[bool] = False

    scale: float = _scale()
    density: float = _density()
    majority_sign_method: str = _sign()
    svd_rank: int | None = _rank()

    check, members, prepare, route = _need_small, _members, _prepare, _route

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class DareLinear:
    """`DARE <https://arxiv.org/abs/2311.03099>`_ on the factors: drop at random, rescale what is left, sum."""

    name: ClassVar[str] = "dare_linear"
    title: ClassVar[str] = "one adapter of all adapters' factors, thinned at random and summed"
    paper: ClassVar[str] = _DARE
    projects: ClassVar[bool] = False

    scale: float = _scale()
    density: float = _density()
    seed: int = _seed()

    check, members, prepare, route = _need_equal, _members, _prepare, _route

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class DareTies:
    """`DARE <https://arxiv.org/abs/2311.03099>`_ on the factors: drop at random, rescale, then as TIES."""

    name: ClassVar[str] = "dare_ties"
    title: ClassVar[str] = "one adapter of all adapters' factors, thinned at random, then TIES"
    paper: ClassVar[str] = _DARE
    projects: ClassVar[bool] = False

    scale: float = _scale()
    density: float = _density()
    majority_sign_method: str = _sign()
    seed: int = _seed()

    check, members, prepare, route = _need_equal, _members, _prepare, _route

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class DareLinearSvd:
    """`DARE <https://arxiv.org/abs/2311.03099>`_ on the updates, summed, cut to the largest singular values."""

    name: ClassVar[str] = "dare_linear_svd"
    title: ClassVar[str] = "one adapter of all adapters' updates, thinned at random, summed, then cut"
    paper: ClassVar[str] = _DARE
    projects: ClassVar[bool] = False

    scale: float = _scale()
    density: float = _density()
    svd_rank: int | None = _rank()
    seed: int = _seed()

    check, members, prepare, route = _need_small, _members, _prepare, _route

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class DareTiesSvd:
    """`DARE <https://arxiv.org/abs/2311.03099>`_ on the updates, then as TIES, cut to the largest singular values."""

    name: ClassVar[str] = "dare_ties_svd"
    title: ClassVar[str] = "one adapter of all adapters' updates, thinned at random, then TIES, then cut"
    paper: ClassVar[str] = _DARE
    projects: ClassVar[bool] = False

    scale: float = _scale()
    density: float = _density()
    majority_sign_method: str = _sign()
    svd_rank: int | None = _rank()
    seed: int = _seed()

    check, members, prepare, route = _need_small, _members, _prepare, _route

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class MagnitudePrune:
    """The factors' weighted sums, as ``linear``, of the entries of largest magnitude alone."""

    name: ClassVar[str] = "magnitude_prune"
    title: ClassVar[str] = "one adapter of all adapters' factors, trimmed by magnitude and summed"
    paper: ClassVar[str] = ""
    projects: ClassVar[bool] = False

    scale: float = _scale()
    density: float = _density()

    check, members, prepare, route = _need_equal, _members, _prepare, _route

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class MagnitudePruneSvd:
    """The weighted sum of the updates' entries of largest magnitude, cut to its largest singular values."""

    name: ClassVar[str] = "magnitude_prune_svd"
    title: ClassVar[str] = "one adapter of all adapters' updates, trimmed by magnitude, summed, then cut"
    paper: ClassVar[str] = ""
    projects: ClassVar[bool] = False

    scale: float = _scale()
    density: float = _density()
    svd_rank: int | None = _rank()

    check, members, prepare, route = _need_small, _members, _prepare, _route

    def __post_init__(self) -> None:
        validate(self)


MERGES = (
    Linear,
    Cat,
    Svd,
    Ties,
    TiesSvd,
    DareLinear,
    DareTies,
    DareLinearSvd,
    DareTiesSvd,
    MagnitudePrune,
    MagnitudePruneSvd,
)
