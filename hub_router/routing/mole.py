"""``mole``: per token and module, a softmax over scores that a trained gate gives the adapters' outputs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import linear

from hub_router.features import ModuleFeatures
from hub_router.lora.bank import AdapterBank, ModuleBank
from hub_router.routing.base import Gates, Prepared
from hub_router.routing.hyperparameters import positive, set_name, validate
from hub_router.routing.project import as_typed
from hub_router.routing.trained import PROTOTYPES, trained_vectors

_COLUMNS, _COMPONENTS, _LENGTHS = "columns", "components", "T"
# Of a squared length, so that an input without any output has scores of 0 and finite gradients.
_SMALLEST = 1e-24
_ADVICE = (
    "its gate reads the outputs of all adapters that it was trained over: compose just those, or train a set over this "
    "pool with hub-router train mole"
)


@dataclass(frozen=True)
class Mole:
    """`MoLE <https://arxiv.org/abs/2404.13628>`_: a gate over the adapters' outputs.

    With the concatenated outputs ``E(x) = [B_1 A_1 x; ..; B_C A_C x]`` ``(C D_out,)`` of a module's candidates,
    ``s = M E(x) / (|E(x)| temperature)`` and ``w = softmax(s)``; all candidates take part. Before training M is zero,
    and w is 1/C.

    Differences from the paper: it flattens the outputs of all tokens of a sequence into one E, whose gate fits a single
    length, while here every token has its own; and it trains M ``(C, C D_out)``, here the product
    ``N = M diag(B_1 .. B_C)`` ``(C, R)``, with ``s = N A x / (|E(x)| temperature)``. Where the columns of every B_e are
    independent, each N is that of some M, so that the gates are the same class of functions, at R numbers per adapter
    and module instead of C D_out; only the path of the optimizer differs. ``|E(x)|`` comes from the triangular factors
    of the B_e. DoRA's gains and biases do not count in E.

    The columns of N lie in an order that the adapters' weights alone decide, so that a prototype set fits its adapters
    in any order, under any names; another pool is refused.

    Args:
        temperature (float): by which the scores are divided.
        prototypes (str): prototype set with the rows of N.
    """

    name: ClassVar[str] = "mole"
    title: ClassVar[str] = "softmax per token over all adapters, by a trained gate that reads their outputs"
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.13628"
    projects: ClassVar[bool] = True

    temperature: float = positive(1.0, help="by which the scores are divided")
    prototypes: str = set_name()

    def __post_init__(self) -> None:
        validate(self)

    def check(self, pool: AdapterBank) -> None:
        """See :class:`~hub_router.routing.base.Router`; any pool will do."""

    def members(self, adapters: Sequence[str]) -> Sequence[str]:
        """See :class:`~hub_router.routing.base.Router`; all of them."""
        return tuple(adapters)

    def prepare(self, bank: ModuleBank, adapters: Sequence[str], known: ModuleFeatures) -> Prepared:
        """See :class:`~hub_router.routing.base.Router`; N ``(C, R)``, zeros before training, and factors of the B_e."""
        start = torch.zeros(len(bank.ranks), bank.A.shape[0])
        tensors = {
            PROTOTYPES: trained_vectors(bank, adapters, known, self.prototypes, self.name, start, advice=_ADVICE),
            _COLUMNS: _columns(bank),
            _COMPONENTS: bank.components.to(bank.A.device),
            _LENGTHS: _triangles(bank),
        }
        return Prepared(bank, tensors)

    def route(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, h: torch.Tensor | None) -> Gates:
        """See :class:`~hub_router.routing.base.Router`."""
        assert h is not None
        return Gates(self.shares(tensors[PROTOTYPES], tensors, h))

    def shares(self, vectors: torch.Tensor, tensors: Mapping[str, torch.Tensor], h: torch.Tensor) -> torch.Tensor:
        """The weight of every candidate.

        Args:
            vectors (torch.Tensor): N ``(C, R)``, as a prototype set holds it.
            tensors (Mapping[str, torch.Tensor]): the module's state, for the rest of it.
            h (torch.Tensor): ``A x`` ``(..., R)``.

        Returns:
            torch.Tensor: ``(..., C)``.
        """
        wide = torch.promote_types(h.dtype, vectors.dtype)
        with as_typed(h.device):
            h = h.to(wide)
            parts = h[..., tensors[_COMPONENTS]]  # [..., C, r]
            lengths = torch.einsum("...cr,csr->...cs", parts, tensors[_LENGTHS].to(wide))
            squared = lengths.square().sum((-2, -1)).clamp_min(_SMALLEST)  # [...], |E(x)|^2
            scores = linear(h, vectors.to(wide).index_select(-1, tensors[_COLUMNS]))  # [..., C]
            return torch.softmax(scores * squared.rsqrt().unsqueeze(-1) / self.temperature, dim=-1)


def _columns(bank: ModuleBank) -> torch.Tensor:
    """Which column of a stored N belongs to each component, int64 ``(R,)``: candidates by their digests."""
    # Adapters that share their A share h, so that it does not matter whose columns are whose.
    digests = [hashlib.blake2b(bank.A[part].contiguous().cpu().numpy().tobytes()).digest() for part in bank.slices]
    columns = torch.empty(bank.A.shape[0], dtype=torch.int64, device=bank.A.device)
    start = 0
    for number in sorted(range(len(digests)), key=digests.__getitem__):
        columns[bank.slices[number]] = torch.arange(start, start + bank.ranks[number], device=bank.A.device)
        start += bank.ranks[number]
    return columns


def _triangles(bank: ModuleBank) -> torch.Tensor:
    """T_e with ``|T_e h_e| = |B_e h_e|``, float32 or wider ``(C, r_max, r_max)``, zeros where a candidate has fewer."""
    wide, most = torch.promote_types(bank.B.dtype, torch.float32), max(bank.ranks)
    triangles = torch.zeros(len(bank.ranks), most, most, dtype=wide, device=bank.B.device)
    for triangle, part in zip(triangles, bank.slices, strict=True):
        factor = torch.linalg.qr(bank.B[:, part].to(wide), mode="r").R  # [min(D_out, r), r]
        triangle[: factor.shape[0], : factor.shape[1]] = factor
    return triangles
