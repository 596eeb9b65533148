"""Who was used: expert weights per module and token, recorded while a trace is open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hub_router.composition.attach import routed_updates
from hub_router.errors import RoutedStateError


class Trace:
    """Expert weights of the forwards that ran while it was open.

    Args:
        adapters (tuple[str, ...]): names along axis E.
    """

    def __init__(self, adapters: tuple[str, ...]) -> None:
        self.adapters = adapters
        self.steps: dict[str, list[torch.Tensor]] = {}
        self._tokens: tuple[int, ...] = ()

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """Weights ``(B, T, E)`` by module path, 0 for adapters that do not adapt the module.

        Several forwards are concatenated along T: a cached generation gives the prompt's tokens, then one per step (the
        last new token is never fed back, so it has no weights). Rows follow the batch as the model saw it, with padding
        and beams. :attr:`steps` holds the forwards one by one.

        Raises:
            RoutedStateError: the forwards had different batch sizes.
        """
        joined = {}
        for module, steps in self.steps.items():
            sizes = sorted({step.shape[0] for step in steps})
            if len(sizes) > 1:
                raise RoutedStateError(
                    f"the traced forwards had batch sizes {', '.join(map(str, sizes))} and cannot be joined along T; "
                    "open one trace per batch, or read trace.steps"
                )
            joined[module] = torch.cat(steps, dim=1)  # [B, T, E]
        return joined

    def record(self, module: str, weights: torch.Tensor) -> None:
        """Keep one call's weights; what gradient checkpointing computes again is left out.

        Args:
            module (str): path of the adapted module.
            weights (torch.Tensor): ``(B, T, E)``, or ``(N, E)`` from a module that sees its tokens flattened.
        """
        # Gradient checkpointing runs the forward again inside backward; compiled, it does so without this call.
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        flat = weights.flatten(0, -2)  # [N, E]
        whole = len(self._tokens) == 2 and flat.shape[0] == self._tokens[0] * self._tokens[1]
        leading = self._tokens if weights.dim() == 2 and whole else weights.shape[:-1]
        self.steps.setdefault(module, []).append(flat.reshape(*((1,) * (2 - len(leading))), *leading, -1))

    def expect(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: note how many sequences and tokens are coming."""
        given = [*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        found = [tensor for tensor in given if isinstance(tensor, torch.Tensor)]
        self._tokens = tuple(found[0].shape[:2]) if found else ()


@contextmanager
def traced(model: nn.Module, adapters: tuple[str, ...]) -> Iterator[Trace]:
    """Record a routed model's expert weights.

    Args:
        model (nn.Module): a routed model.
        adapters (tuple[str, ...]): names along axis E.

    Yields:
        Trace: filled by each forward; readable after the block, too.

    Raises:
        RoutedStateError: another trace is open on this model.
    """
    updates = [update for _, update in routed_updates(model)]
    if any(update.recorder is not None for update in updates):
        raise RoutedStateError("a trace is open on this model already; leave its with-block first")
    trace = Trace(adapters)
    hook = model.register_forward_pre_hook(trace.expect, with_kwargs=True)
    try:
        for update in updates:
            update.recorder = trace
        yield trace
    finally:
        hook.remove()
        for update in updates:
            update.recorder = None
