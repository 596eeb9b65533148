"""Which experts work for which task: mean expert weights, and how far the tasks' means lie apart (Figure 2)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from hub_router.errors import MethodError
from hub_router.ewora.layer import EworaLayer
from hub_router.names import kind_of

_LAYER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class TaskDistance:
    """How distinctly one module routes the tasks: one cell of Figure 2.

    Args:
        module (str): path in the base model.
        layer (int | None): number of its layer; None where its path has none.
        kind (str): its path without that number.
        distance (float): L1 distance of the tasks' mean expert weights, averaged over all pairs of tasks.
    """

    module: str
    layer: int | None
    kind: str
    distance: float


@dataclass(frozen=True, eq=False)
class Heatmap:
    """Figure 2 as a table.

    Args:
        kinds (tuple[str, ...]): kinds of modules, the rows.
        layers (tuple[int | None, ...]): layer numbers, the columns.
        values (torch.Tensor): ``(kinds, layers)``, float64; NaN where a layer has no such module.
    """

    kinds: tuple[str, ...]
    layers: tuple[int | None, ...]
    values: torch.Tensor


class ExpertRecord:
    """Mean expert weights of one adapter, per module and task, over the forwards that run under :meth:`task`.

    A weight is alpha as the router gives it, with its sign and without ``lora_alpha / r``. The paper averages over
    inputs and does not say whether those are tokens or sequences: here every token counts once, but for the padding of
    which ``attention_mask (B, T)`` tells the model.

    Args:
        model (nn.Module): a model with EWoRA adapters, wrapped by PEFT or not.
        adapter (str | None): name of the adapter; may be left out where the model has one.

    Raises:
        MethodError: the model has no such adapter, or several of which none was named.
    """

    def __init__(self, model: nn.Module, adapter: str | None = None) -> None:
        self.model = model.get_base_model() if isinstance(model, PeftModel) else model
        layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, EworaLayer)}
        self.adapter = _chosen(sorted({name for layer in layers.values() for name in layer.ewora_R}), adapter)
        self._layers = {name: layer for name, layer in layers.items() if self.adapter in layer.ewora_R}
        self._sums: dict[str, dict[str, torch.Tensor]] = {}
        self._counts: dict[str, dict[str, int]] = {}
        self._mask: torch.Tensor | None = None
        self._open: str | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of their first forwards."""
        return tuple(self._sums)

    @contextmanager
    def task(self, name: str) -> Iterator[None]:
        """Count the forwards of the with-block as a task's; a later block of the same name adds to it.

        Args:
            name (str): the task.

        Yields:
            None: while forwards are counted.

        Raises:
            MethodError: a block of this record is open, or no forward ran through the adapter.
        """
        if self._open is not None:
            raise MethodError(f"task {self._open!r} is being recorded; leave its with-block before task {name!r}")
        self._open = name
        handles = [self.model.register_forward_pre_hook(self._expect, with_kwargs=True)]
        try:
            for module, layer in self._layers.items():
                handles.append(layer.ewora_R[self.adapter].register_forward_hook(self._counter(module)))
            yield
        finally:
            self._open = self._mask = None
            for handle in handles:
                handle.remove()
        if name not in self._sums:
            raise MethodError(
                f"task {name!r}: no forward ran through adapter {self.adapter!r}; run the model inside the with-block, "
                f"with the adapter active (set_adapter) and enabled"
            )

    def means(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Mean expert weights, ``mean over tokens of alpha``.

        Returns:
            Mapping[str, Mapping[str, torch.Tensor]]: by module path in the base model, then task: ``(n,)``, float64.
        """
        found: dict[str, dict[str, torch.Tensor]] = {}
        for module in self._layers:
            for task, sums in self._sums.items():
                if self._counts[task].get(module):
                    found.setdefault(module, {})[task] = sums[module] / self._counts[task][module]
        return found

    def distances(self) -> list[TaskDistance]:
        """Mean pairwise L1 distance of the tasks' mean expert weights (``Dist`` of Section 5), per module.

        Returns:
            list[TaskDistance]: in the model's order.

        Raises:
            MethodError: fewer than two tasks, or modules that saw no token of a task; lists all of them.
        """
        if len(self.tasks) < 2:
            raise MethodError(f"{len(self.tasks)} tasks were recorded, expected at least 2 to compare")
        means = self.means()
        faults = [
            f"module {module} saw no token of task {task!r}"
            for module in self._layers
            for task in self.tasks
            if task not in means.get(module, {})
        ]
        if faults:
            raise MethodError(f"tasks cannot be compared: {'; '.join(faults)}")
        found = []
        for module, of_tasks in means.items():
            pairs = [(first - second).abs().sum() for first, second in combinations(of_tasks.values(), 2)]
            number = _LAYER.search(module)
            distance = torch.stack(pairs).mean().item()
            found.append(TaskDistance(module, int(number[0]) if number else None, kind_of(module), distance))
        return found

    def _expect(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: keep the mask that says which tokens are padding."""
        mask = kwargs.get("attention_mask")
        self._mask = None
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or bool(mask.all()):
            return
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise MethodError(
                "attention_mask masks tokens, which an encoder-decoder model does not hand on to its modules; give "
                "batches without padding, e.g. of one sequence each"
            )
        self._mask = mask.detach().bool().cpu()

    def _counter(self, module: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        """A forward hook of one module's router."""

        def count(_: nn.Module, __: Any, alpha: torch.Tensor) -> None:
            # Gradient checkpointing runs the forward again inside backward.
            if self._open is None or torch._C._current_graph_task_id() != -1:
                return
            rows = self._unpadded(module, alpha.detach().to("cpu", torch.float64))  # [N, n]
            sums = self._sums.setdefault(self._open, {})
            counts = self._counts.setdefault(self._open, {})
            sums[module] = sums.get(module, 0) + rows.sum(0)
            counts[module] = counts.get(module, 0) + rows.shape[0]

        return count

    def _unpadded(self, module: str, alpha: torch.Tensor) -> torch.Tensor:
        """The weights of the tokens that are no padding, ``(N, n)``."""
        rows = alpha.flatten(0, -2)
        if self._mask is None:
            return rows
        batch, known = self._mask.shape
        if alpha.dim() == 3 and alpha.shape[0] == batch and alpha.shape[1] <= known:
            # With a cache the mask covers past tokens, too.
            return rows[self._mask[:, known - alpha.shape[1] :].flatten()]
        if alpha.dim() == 2 and alpha.shape[0] == batch * known:
            return rows[self._mask.flatten()]
        raise MethodError(
            f"module {module}: weights have shape {tuple(alpha.shape)}, which does not tell what of attention_mask "
            f"{tuple(self._mask.shape)} is padding here; give batches without padding"
        )


def heatmap(distances: Sequence[TaskDistance]) -> Heatmap:
    """Arrange distances as Figure 2 does: kinds of modules by layers.

    Args:
        distances (Sequence[TaskDistance]): of one model.

    Returns:
        Heatmap: kinds in order of appearance, layers ascending, those without a number first.
    """
    kinds = tuple(dict.fromkeys(each.kind for each in distances))
    layers = tuple(sorted({each.layer for each in distances}, key=lambda layer: -1 if layer is None else layer))
    values = torch.full((len(kinds), len(layers)), torch.nan, dtype=torch.float64)
    for each in distances:
        values[kinds.index(each.kind), layers.index(each.layer)] = each.distance
    return Heatmap(kinds, layers, values)


def _chosen(known: Sequence[str], adapter: str | None) -> str:
    """The adapter meant."""
    if adapter is None and len(known) == 1:
        return known[0]
    if adapter in known:
        return str(adapter)
    what = "no EWoRA adapter" if not known else f"EWoRA adapters {', '.join(map(repr, known))}"
    asked = "none was named" if adapter is None else f"{adapter!r} was asked for"
    raise MethodError(f"the model has {what}, and {asked}; pass adapter= with one of them")
