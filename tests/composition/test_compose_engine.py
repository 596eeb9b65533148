"""The stacked path against the loops of naive.py, its memory, and gates of every kind that the seam promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from compose_models import assert_close
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hub_router.composition.assemble import prepare, stack
from hub_router.composition.layer import RoutedUpdate
from hub_router.composition.maps import LinearMap
from hub_router.composition.naive import naive_update
from hub_router.features import PoolFeatures
from hub_router.lora.adapter import LoraAdapter, LoraFactors
from hub_router.lora.bank import AdapterBank, ModuleBank
from hub_router.routing.base import Gates, Prepared, Router
from hub_router.routing.registry import create


def pool(ranks: Sequence[int], d_in: int, d_out: int) -> list[LoraAdapter]:
    generator = torch.Generator().manual_seed(1)
    return [
        LoraAdapter(
            f"adapter-{e}",
            None,
            None,
            {
                "proj": LoraFactors(
                    torch.randn(rank, d_in, generator=generator) / d_in**0.5,
                    torch.randn(d_out, rank, generator=generator),
                    1.5,
                )
            },
            str(e),
        )
        for e, rank in enumerate(ranks)
    ]


@dataclass(frozen=True)
class LargestComponents:
    """HiLoRA's token level on its own: the ``count`` components with the largest a.x, as ``hilora-roc`` will do."""

    name: ClassVar[str] = "largest-components"
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    projects: ClassVar[bool] = True
    count: int = 5

    def check(self, pool: AdapterBank) -> None:
        """Any pool."""

    def prepare(self, bank: ModuleBank, adapters: Sequence[str], spectra: Mapping[str, Any]) -> Prepared:
        return Prepared(bank, {})

    def route(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, h: torch.Tensor | None) -> Gates:
        assert h is not None
        chosen = h.topk(self.count, dim=-1).indices
        return Gates(torch.zeros_like(h).scatter(-1, chosen, 0.7), per="component")


METHODS: list[tuple[Router, Sequence[int]]] = [
    (create("single", {"adapter": "adapter-1"}), (1, 7, 3)),
    (create("uniform", {}), (1, 7, 3)),
    (create("merged", {}), (4, 4, 4)),
    (create("arrow", {"top_k": 2}), (1, 7, 3)),
    (create("spectr", {"top_k": 2, "weights": "softmax"}), (1, 7, 3)),
    (create("spectr", {"top_k": 2, "weights": "softmax", "merge": "factors"}), (4, 4, 4)),
    (LargestComponents(), (1, 7, 3)),
]


@pytest.mark.parametrize(("router", "ranks"), METHODS, ids=lambda value: getattr(value, "name", str(value)))
@pytest.mark.parametrize("shape", [(1, 63), (3,), (2, 3, 5)])
def test_stacked_equals_naive_forward_and_backward(
    router: Router, ranks: Sequence[int], shape: tuple[int, ...]
) -> None:
    bank = stack(pool(ranks, 24, 20))
    state = prepare(router, bank, PoolFeatures())["proj"]
    update = RoutedUpdate(router, state, 3, LinearMap(nn.Linear(state.bank.d_in, state.bank.d_out), lookup=False))
    x = torch.randn(*shape, 24, generator=torch.Generator().manual_seed(2), requires_grad=True)
    got = update(x)
    wide = state.bank.to(dtype=torch.float64)
    truth = x.detach().double().requires_grad_()
    tensors = {name: t.double() if t.is_floating_point() else t for name, t in state.tensors.items()}
    gates = router.route(tensors, truth, truth @ wide.A.T if router.projects else None)
    expected = naive_update(truth, wide, gates, state.merge)
    assert_close(got, expected)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (got * direction.float()).sum().backward()
    (expected * direction).sum().backward()
    assert x.grad is not None and truth.grad is not None
    assert_close(x.grad, truth.grad)


def test_component_gates_are_traced_as_their_mean_per_expert() -> None:
    router = LargestComponents(count=2)
    state = prepare(router, stack(pool((1, 3), 8, 6)), PoolFeatures())["proj"]
    update = RoutedUpdate(router, state, 2, LinearMap(nn.Linear(state.bank.d_in, state.bank.d_out), lookup=False))
    seen = []
    update.recorder = type("Keep", (), {"record": lambda self, module, weights: seen.append(weights)})()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    update(x)
    for token, weights in zip(x, seen[0], strict=True):
        best = (state.bank.A @ token).topk(2).indices.tolist()
        gate = [0.7 if component in best else 0.0 for component in range(4)]
        assert weights.tolist() == pytest.approx([gate[0], sum(gate[1:]) / 3])


class LargestOutput(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return result


@pytest.mark.parametrize(
    ("method", "options"),
    [("uniform", {}), ("merged", {}), ("arrow", {}), ("spectr", {}), ("spectr", {"merge": "factors"})],
)
def test_nothing_of_size_tokens_experts_width_is_made(method: str, options: dict[str, Any]) -> None:
    tokens, experts, rank, d_in, d_out = 40, 16, 2, 128, 96
    router = create(method, options)
    state = prepare(router, stack(pool([rank] * experts, d_in, d_out)), PoolFeatures())["proj"]
    update = RoutedUpdate(router, state, experts, LinearMap(nn.Linear(state.bank.d_in, state.bank.d_out), lookup=False))
    x = torch.randn(tokens, d_in, requires_grad=True)
    with LargestOutput() as mode:
        update(x).sum().backward()
    # The largest that the arithmetic needs: x, the output, the projections, the bank itself.
    needed = max(tokens * d_in, tokens * d_out, tokens * experts * rank, experts * rank * max(d_in, d_out))
    assert mode.largest <= needed < tokens * experts * d_out / 8
