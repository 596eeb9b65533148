"""Methods whose gates read what lies outside of a module: the base model's hidden states, or a whole block's input."""

from __future__ import annotations

import copy
import inspect
import threading
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hub_router.composition.caches import caches_in, holds_tokens, length_of, mark, recall
from hub_router.composition.maps import LinearMap, linear_map
from hub_router.composition.plan import with_gradients
from hub_router.composition.text import has_encoder
from hub_router.errors import MethodError, RoutedStateError
from hub_router.lora.bank import AdapterBank
from hub_router.routing.base import Gates, OuterRouter, Router
from hub_router.routing.mixlora import block_of

# Where a cache keeps the base model's own, and what its rows are called there.
_BESIDE, _PLACES = "hub_router_base", "places"


class Routed(Protocol):
    """What is known here of a module's update.

    Attributes:
        module (str): path of its linear map.
        candidates (int): number C.
        experts (torch.Tensor): int64 ``(C,)``, each candidate's pool position, ascending.
        router (Router): of the module, or what stands in its place while it is trained.
        outer (Outer | None): who gates it, where its router does not read its input.
    """

    module: str
    candidates: int
    experts: torch.Tensor
    router: Router
    outer: Outer | None

    def state(self) -> Mapping[str, torch.Tensor]:
        """The router's tensors."""
        ...


R = TypeVar("R", bound=Routed)


class Outer(Protocol):
    """Gates the modules of a model, or of a part of it."""

    def gates(self, update: Routed, leading: torch.Size, device: torch.device) -> tuple[Gates, Gates | None] | None:
        """What a module is to sum at the moment.

        Args:
            update (Routed): of the module.
            leading (torch.Size): leading axes of its inputs.
            device (torch.device): the module's.

        Returns:
            tuple[Gates, Gates | None] | None: gates to sum by, and those to record, where they are not recorded yet;
                None where the module is to be as the base model's.
        """
        ...

    def uninstall(self, model: nn.Module) -> None:
        """Take its hooks off."""
        ...


def widths_of(model: Any, router: Router, modules: Iterable[str]) -> dict[str, int]:
    """Length of the vectors that an outer method reads in the place of modules' inputs.

    Args:
        model (PreTrainedModel): the base model.
        router (Router): any method.
        modules (Iterable[str]): paths of adapted maps.

    Returns:
        dict[str, int]: of the hidden states as a head or a block gets them, by module; without those that the method
            gates by their inputs.
    """
    if not isinstance(router, OuterRouter):
        return {}
    width = int(model.config.get_text_config().hidden_size)
    if router.reads == "block":
        return {name: width for name in modules if _feed_forward(model, name) is not None}
    head = model.get_output_embeddings()
    return dict.fromkeys(modules, width if head is None else head.weight.shape[1])


def check_outer(model: nn.Module, router: Router, bank: AdapterBank) -> None:
    """Refuse what an outer method cannot read.

    Args:
        model (nn.Module): the base model, or one without weights.
        router (Router): any method.
        bank (AdapterBank): the pool, every module of which is in the model.

    Raises:
        MethodError: says what is wrong with the model, or lists the blocks of which no map has all the experts.
    """
    if not isinstance(router, OuterRouter):
        return
    if router.reads == "base":
        if has_encoder(model):
            raise MethodError(
                f"method {router.name!r} reads the hidden states of a model that continues text, and "
                f"{type(model).__name__} has an encoder; choose a method that reads each module's input, such as "
                "lora-mixer"
            )
        return
    blocks: dict[str, list[set[int]]] = {}
    for name, module in bank.modules.items():
        if _feed_forward(model, name) is not None and module.experts:
            blocks.setdefault(block_of(name), []).append(set(module.experts))
    if split := [name for name, maps in blocks.items() if set().union(*maps) not in maps]:
        raise MethodError(
            f"method {router.name!r} gives each adapter a whole feed-forward block, one map of which all of them must "
            f"adapt; there is no such map in: {', '.join(split)}; leave adapters out"
        )


def feed_forward_maps(model: nn.Module) -> list[str]:
    """The linear maps of a model's feed-forward blocks.

    Args:
        model (nn.Module): the base model, or one without weights.

    Returns:
        list[str]: their paths.
    """
    found = {name: linear_map(module) for name, module in model.named_modules() if name}
    return [
        name
        for name, each in found.items()
        if isinstance(each, LinearMap) and not each.lookup and _feed_forward(model, name) is not None
    ]


def install_outer(model: nn.Module, updates: Sequence[Routed]) -> None:
    """Let an outer method see what it reads; nothing for other methods.

    Args:
        model (nn.Module): with the updates attached.
        updates (Sequence[Routed]): all of them.
    """
    routed = [update for update in updates if update.candidates]
    if not routed or not isinstance(routed[0].router, OuterRouter):
        return
    if routed[0].router.reads == "base":
        base = _Base(model)
        for update in routed:
            update.outer = base
        return
    blocks: dict[str, list[Routed]] = {}
    for update in routed:
        if _feed_forward(model, update.module) is not None:
            blocks.setdefault(block_of(update.module), []).append(update)
    for path, members in blocks.items():
        block = _Block(model.get_submodule(path), max(members, key=lambda update: update.candidates))
        for update in members:
            update.outer = block


def by_decider(updates: Iterable[R]) -> dict[str, list[R]]:
    """Which updates share their gates.

    Args:
        updates (Iterable[Routed]): attached.

    Returns:
        dict[str, list[Routed]]: by the module of the update that decides, all those that it decides for, itself first.
            Their candidates are among its own.
    """
    found: dict[str, list[R]] = {}
    for update in updates:
        decider = update.outer.leader if isinstance(update.outer, _Block) else update
        led = found.setdefault(decider.module, [])
        led.insert(0 if update is decider else len(led), update)
    return found


@dataclass(eq=False)
class _Turn:
    """Where a block stands: what was decided for its tokens, and which of the K experts it is at."""

    gates: Gates
    place: int = 0


class _Block:
    """A feed-forward block that runs once for each of a token's experts.

    Args:
        block (nn.Module): the block; its forward is a function of one tensor.
        leader (Routed): of its map that has all the experts; the others' candidates and vectors are among its own.
    """

    def __init__(self, block: nn.Module, leader: Routed) -> None:
        self.leader = leader
        self._turns: dict[int, _Turn] = {}
        self._handles = [
            block.register_forward_pre_hook(self._before, with_kwargs=True),
            block.register_forward_hook(self._after, with_kwargs=True),
        ]

    def gates(self, update: Routed, leading: torch.Size, device: torch.device) -> tuple[Gates, Gates | None]:
        """See :class:`Outer`; the expert whose turn it is, alone."""
        turn = self._turns.get(threading.get_ident())
        if turn is None:
            raise RoutedStateError(f"module {update.module}: its block was not called as a whole")
        gates = turn.gates if update is self.leader else self._among(update, turn.gates)
        if gates.weights.shape[:-1].numel() != leading.numel():
            raise RoutedStateError(
                f"module {update.module}: it sees {tuple(leading)} tokens, and its block "
                f"{tuple(gates.weights.shape[:-1])}; leave adapters of this module out"
            )
        assert gates.indices is not None
        weights, indices = gates.weights.reshape(*leading, -1), gates.indices.reshape(*leading, -1)
        chosen = slice(turn.place, turn.place + 1)
        here = (weights[..., chosen].detach() != 0).to(weights.dtype)
        return Gates(here, indices[..., chosen]), None if turn.place else Gates(weights, indices)

    def _among(self, update: Routed, gates: Gates) -> Gates:
        """The leader's gates, of those candidates that a map has; others have no weight."""
        assert gates.indices is not None
        wanted = self.leader.experts.index_select(0, gates.indices.flatten()).view_as(gates.indices)
        place = torch.searchsorted(update.experts, wanted).clamp_max(update.candidates - 1)
        return Gates(gates.weights * (update.experts[place] == wanted), place)

    def uninstall(self, model: nn.Module) -> None:
        """See :class:`Outer`."""
        _remove(self._handles)

    @torch.compiler.disable
    def _before(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        (x,) = (*args, *kwargs.values())
        self._turns[threading.get_ident()] = _Turn(self.leader.router.route(self.leader.state(), x, None))

    def _after(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor:
        turn = self._turns[threading.get_ident()]
        weights = turn.gates.weights.to(output.dtype)  # [..., K]
        total = weights[..., :1] * output
        for place in range(1, weights.shape[-1]):
            turn.place = place
            total = total + weights[..., place : place + 1] * block.forward(*args, **kwargs)
        del self._turns[threading.get_ident()]
        return total


class _Base:
    """The base model's own reading of each input, before the routed one; where that fills a cache, so does this.

    Args:
        model (nn.Module): the routed model.
    """

    def __init__(self, model: Any) -> None:
        # Caches are marked by it: the reading beside them is of this base model.
        self._identity = uuid.uuid4().hex
        self._running: dict[int, torch.Tensor] = {}
        self._filled: dict[int, Any] = {}
        # Of the forward that a backward is at, which gradient checkpointing runs again.
        self._differentiated: torch.Tensor | None = None
        self._reading: set[int] = set()
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def gates(self, update: Routed, leading: torch.Size, device: torch.device) -> tuple[Gates, Gates | None] | None:
        """See :class:`Outer`; by the hidden states of the module's tokens."""
        thread = threading.get_ident()
        if thread in self._reading:
            return None
        hidden = self._running.get(thread)
        if hidden is None and torch._C._current_graph_task_id() != -1:
            hidden = self._differentiated
        if hidden is None or hidden.shape[:-1].numel() != leading.numel():
            seen = "none" if hidden is None else f"those of {tuple(hidden.shape[:-1])} tokens"
            raise RoutedStateError(
                f"module {update.module}: method {update.router.name!r} gates {tuple(leading)} tokens by the hidden "
                f"states of the base model, and has {seen}; call the whole model, or leave adapters of this module out"
            )
        gates = update.router.route(update.state(), hidden.to(device).reshape(*leading, hidden.shape[-1]), None)
        return gates, gates

    def uninstall(self, model: nn.Module) -> None:
        """See :class:`Outer`."""
        _remove(self._handles)

    @torch.compiler.disable
    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        thread = threading.get_ident()
        caches = {name: self._beside(cache) for name, cache in caches_in(kwargs).items()}
        # Without its head, which has parameters of its own, such as labels.
        inner = model.base_model
        taken = inspect.signature(inner.forward).parameters
        given = {name: value for name, value in {**kwargs, **caches}.items() if name in taken}
        self._reading.add(thread)
        try:
            with torch.no_grad():
                output = inner.forward(*args, **{**given, "return_dict": True})
        finally:
            self._reading.discard(thread)
        self._running[thread] = output.last_hidden_state
        self._filled[thread] = next(iter(caches_in(output).values()), None)

    @torch.compiler.disable
    def _after(self, model: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = self._running.pop(threading.get_ident(), None)
        filled = self._filled.pop(threading.get_ident(), None)
        if hidden is None:
            return
        values = output if isinstance(output, Mapping) else {}
        for cache in (*caches_in(kwargs).values(), *caches_in(values).values()):
            mark(cache, self._identity, {_PLACES: torch.arange(hidden.shape[0])})
            setattr(cache, _BESIDE, filled)
        if model.training and torch.is_grad_enabled():
            for each in with_gradients(list(values.values()) or output):
                # The gradient of an output comes before those of the layers that made it.
                each.register_hook(partial(self._differentiate, hidden))

    def _beside(self, cache: Any) -> Any:
        """The base model's cache of what a cache holds, with the same rows and as long."""
        if not holds_tokens(cache):
            return copy.deepcopy(cache)
        rows, filled = recall(cache, self._identity), getattr(cache, _BESIDE, None)
        if rows is None or filled is None:
            raise RoutedStateError(
                "this forward continues a cache that it has not seen from its beginning, and the method at work reads "
                "the whole input with the base model as well; start with the prompt's input_ids"
            )
        order = rows[_PLACES]
        if not torch.equal(order, torch.arange(len(order))):
            filled.reorder_cache(order)
        if (length := length_of(cache)) < length_of(filled):
            filled.crop(length - length_of(filled))
        return filled

    def _differentiate(self, hidden: torch.Tensor, _gradient: torch.Tensor) -> None:
        self._differentiated = hidden


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def _feed_forward(model: nn.Module, module: str) -> nn.Module | None:
    """The block that a map is part of, where that is a function of one tensor, as attention and layers are not."""
    block = model.get_submodule(block_of(module))
    if type(block).forward is nn.Module.forward or len(inspect.signature(block.forward).parameters) != 1:
        return None
    # Nor a mixture, whose experts see some of the tokens each.
    parts = [child for child in block.children() if not isinstance(linear_map(child), LinearMap)]
    whole = not any(list(part.children()) or any(each.ndim > 2 for each in part.parameters()) for part in parts)
    return block if whole else None
