"""Sequence-level methods at work: one plan per input sequence, from the text that the model is about to read.

The plan is made where the text begins: at the model's own forward, or at ``generate``, whose prompt's plan holds for
all forwards inside it, cached or not, with beams or a draft model. A cache remembers the plan of the text that it
holds, for whoever continues it by hand. The updates of a model share one :class:`Planner`.
"""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hub_router.composition.caches import caches_in, holds_tokens, mark, recall
from hub_router.errors import MethodError, RoutedStateError
from hub_router.routing.base import SequenceRouter

# How far from 1 the length of a unit vector in half precision may be.
_UNIT = 1e-2
# Label of the tokens that the loss leaves out, such as those of the prompt.
_NO_LABEL = -100
# Sequences whose plans are remembered; scoring the same prompts again then asks the encoder nothing.
_REMEMBERED = 4096


class TextEncoder(Protocol):
    """A sentence encoder, such as :class:`hub_router.encoder.Encoder`.

    Attributes:
        name (str): under which its vectors are kept.
    """

    @property
    def name(self) -> str:
        """See above."""
        ...

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors ``(N, D)`` in the order of ``texts``."""
        ...


@dataclass(frozen=True, eq=False)
class Plan:
    """What a method decided for the sequences of a batch.

    Args:
        rows (Mapping[str, torch.Tensor]): by name, ``(B, ...)``.
        tokens (int): tokens per sequence T of the model's last forward.
    """

    rows: Mapping[str, torch.Tensor]
    tokens: int

    @property
    def sequences(self) -> int:
        """Number B of sequences."""
        return self.rows["weights"].shape[0]

    def on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The rows on the device of a module, where a model is spread over several."""
        return {name: row.to(device) for name, row in self.rows.items()}

    def spread(self, module: str, leading: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
        """The rows as one module needs them beside its inputs.

        Args:
            module (str): its path, for the message.
            leading (Sequence[int]): axes of its inputs before the last, ``(B, T)`` or, flattened, ``(B T,)``. With
                beams there are several rows per sequence, one after another.
            device (torch.device): the module's.

        Returns:
            dict[str, torch.Tensor]: ``(B, 1, ...)`` or ``(B T, ...)``.

        Raises:
            RoutedStateError: the module sees tokens of which it cannot be told whose they are.
        """
        flat = len(leading) == 1
        count = leading[0] if leading else 0
        if not leading or count % self.sequences or (flat and count % (self.sequences * self.tokens)):
            raise RoutedStateError(
                f"module {module}: it sees inputs of shape {tuple(leading)} in a batch of {self.sequences} sequences "
                f"of {self.tokens} tokens, so it cannot be told which sequence each token is of, which a method that "
                "decides per sequence must know; choose a token-level method, such as arrow, or leave adapters of "
                "this module out"
            )
        spread = {}
        for name, row in self.on(device).items():
            each = row if count == self.sequences else row.repeat_interleave(count // self.sequences, dim=0)
            for _ in leading[1:]:
                each = each.unsqueeze(1)
            spread[name] = each
        return spread


class Planner:
    """Asks a method for a plan wherever a new input begins.

    Args:
        router (SequenceRouter): the method.
        state (Mapping[str, torch.Tensor]): what its ``plan`` reads.
        encoder (TextEncoder): embeds the text.
        tokenizer (PreTrainedTokenizerBase): turns token ids back into text.
    """

    def __init__(
        self, router: SequenceRouter, state: Mapping[str, torch.Tensor], encoder: TextEncoder, tokenizer: Any
    ) -> None:
        self.router = router
        self.state = dict(state)
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.handles: list[RemovableHandle] = []
        # What a user put in the place of the model's own generate.
        self.own_generate: Any = None
        # Caches are marked by it: another planner would decide otherwise, or over another pool.
        self.identity = uuid.uuid4().hex
        # By thread: what runs in one says nothing about the text that another one reads.
        self._running: dict[int, Plan] = {}
        self._held: set[int] = set()
        # Of the forward that a backward is at, which gradient checkpointing runs again.
        self._differentiated: Plan | None = None
        self._known: dict[str, dict[str, torch.Tensor]] = {}

    @property
    @torch.compiler.disable
    def plan(self) -> Plan | None:
        """The plan of the forward under way in this thread, or, inside a backward, of the forward that it is at."""
        found = self._running.get(threading.get_ident())
        return self._differentiated if found is None and torch._C._current_graph_task_id() != -1 else found

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self._running[threading.get_ident()] = plan

    @property
    def held(self) -> bool:
        """Whether the plan of this thread holds for several forwards."""
        return threading.get_ident() in self._held

    @contextmanager
    def holding(self, ids: torch.Tensor, mask: torch.Tensor | None) -> Iterator[None]:
        """Keep the plan of these prompts for every forward inside the block.

        Args:
            ids (torch.Tensor): token ids ``(B, T)``.
            mask (torch.Tensor | None): 1 for tokens, 0 for padding ``(B, T)``.

        Yields:
            None: while it holds.
        """
        if self.held:
            yield
            return
        self.plan = self.make(ids, mask)
        self._held.add(threading.get_ident())
        try:
            yield
        finally:
            self._held.discard(threading.get_ident())
            self._running.pop(threading.get_ident(), None)

    def make(self, ids: torch.Tensor, mask: torch.Tensor | None) -> Plan:
        """Plan for a batch.

        Args:
            ids (torch.Tensor): token ids ``(B, T)``.
            mask (torch.Tensor | None): 1 for tokens, 0 for padding ``(B, T)``; None where nothing is padded, or with
                special tokens alone, which are no text.

        Returns:
            Plan: a row per sequence.
        """
        texts = self._texts(ids, mask)
        found = {}
        for text in dict.fromkeys(texts):
            known = self._known.pop(text, None)
            found[text] = self._decide(text) if known is None else known
        self._known |= found
        while len(self._known) > _REMEMBERED:
            del self._known[next(iter(self._known))]
        return Plan(
            {name: torch.stack([found[text][name] for text in texts]).to(ids.device) for name in found[texts[0]]},
            ids.shape[1],
        )

    def _decide(self, text: str) -> dict[str, torch.Tensor]:
        """The rows of one text, which is embedded alone: beside others its vector would be rounded otherwise."""
        embedding = torch.from_numpy(embed(self.encoder, [text]))
        return {name: row[0] for name, row in self.router.plan(self.state, embedding, [seed_of(text)]).items()}

    def before_forward(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Look at what the model is about to read: a new input gets a plan, a continued one keeps its own.

        Args:
            args (Sequence[Any]): of the model's forward.
            kwargs (Mapping[str, Any]): of the model's forward.

        Raises:
            RoutedStateError: there is no text to decide by.
        """
        ids = args[0] if args and isinstance(args[0], torch.Tensor) else kwargs.get("input_ids")
        if not self.held:
            mask = _before_answers(ids, kwargs.get("attention_mask"), kwargs.get("labels"))
            self.plan = self._begin(ids, mask, caches_in(kwargs).values())
        plan = self.plan
        assert plan is not None
        keys = ("decoder_input_ids", "inputs_embeds")
        seen = next((each for key in keys if (each := kwargs.get(key)) is not None), ids)
        if seen is not None:
            self.plan = Plan(plan.rows, seen.shape[1])

    def after_forward(self, kwargs: Mapping[str, Any], output: Any, trains: bool) -> None:
        """Let the caches that the model filled remember their plan, and the output, for its backward.

        Args:
            kwargs (Mapping[str, Any]): of the model's forward.
            output (Any): of the model's forward; None where it failed.
            trains (bool): whether a backward may follow that runs the forward again.
        """
        plan = self._running.get(threading.get_ident())
        if plan is None:
            return
        values = list(output.values()) if isinstance(output, Mapping) else output if isinstance(output, tuple) else []
        for each in (*caches_in(kwargs).values(), *values):
            mark(each, self.identity, plan.rows)
        if trains:
            for each in with_gradients(output if isinstance(output, torch.Tensor) else values):
                # The gradient of an output comes before those of the layers that made it.
                each.register_hook(partial(self._differentiate, plan))
        if not self.held:
            del self._running[threading.get_ident()]

    def _differentiate(self, plan: Plan, _gradient: torch.Tensor) -> None:
        self._differentiated = plan

    def _begin(self, ids: torch.Tensor | None, mask: torch.Tensor | None, caches: Iterable[Any]) -> Plan:
        """The plan of a forward: of its text, or of the text that its cache holds."""
        for cache in caches:
            if holds_tokens(cache):
                rows = recall(cache, self.identity)
                if rows is None:
                    raise RoutedStateError(
                        f"method {self.router.name!r} decides by the text of its input, and this forward continues one "
                        "that it has not seen; start with the prompt's input_ids"
                    )
                return Plan(rows, 1)
        if ids is None:
            raise RoutedStateError(
                f"method {self.router.name!r} decides by the text of its input, got no input_ids; pass input_ids, also "
                "beside inputs_embeds or encoder_outputs, or choose a token-level method, such as arrow"
            )
        return self.make(ids, mask)

    def _texts(self, ids: torch.Tensor, mask: torch.Tensor | None) -> list[str]:
        """The text of each sequence, without padding and special tokens."""
        rows = ids.tolist()
        if mask is not None and mask.shape == ids.shape:
            rows = [
                [token for token, kept in zip(row, marks, strict=True) if kept]
                for row, marks in zip(rows, mask.tolist(), strict=True)
            ]
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def embed(encoder: TextEncoder, texts: Sequence[str]) -> np.ndarray:
    """Vectors of texts, which are what the methods take them for.

    Args:
        encoder (TextEncoder): the sentence encoder.
        texts (Sequence[str]): what to embed.

    Returns:
        np.ndarray: float64 ``(N, D)``, rows of unit length.

    Raises:
        MethodError: they are of another length, or no numbers.
    """
    vectors = np.asarray(encoder.encode(list(texts)), dtype=np.float64)
    lengths = np.linalg.norm(vectors, axis=-1) if vectors.ndim == 2 else np.zeros(1)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) < _UNIT))
    if vectors.shape[:1] != (len(texts),) or wrong.size:
        raise MethodError(
            f"sentence encoder {encoder.name!r} gave an array of shape {vectors.shape} for {len(texts)} texts, with "
            f"rows of length {lengths[wrong[:1]].tolist()}; expected one row of unit length per text"
        )
    return vectors


def seed_of(text: str) -> int:
    """A number that depends on a sequence's text alone, so that it draws alike in every batch."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def install(model: Any, planner: Planner) -> None:
    """Let a planner see what a model reads.

    Args:
        model (nn.Module): the routed model; its ``generate`` plans by the prompt until :func:`uninstall`.
        planner (Planner): shared by the model's updates.
    """
    if hasattr(type(model), "generate"):
        planner.own_generate = vars(model).get("generate")
        model.generate = partial(_generate, planner, model)
    planner.handles.append(model.register_forward_pre_hook(partial(_before, planner), with_kwargs=True))
    planner.handles.append(model.register_forward_hook(partial(_after, planner), with_kwargs=True, always_call=True))


def uninstall(model: Any, planner: Planner) -> None:
    """Take a planner off, and give the model its own ``generate`` back.

    Args:
        model (nn.Module): the routed model.
        planner (Planner): installed on it, or not any more.
    """
    if not planner.handles:
        return
    vars(model).pop("generate", None)
    if planner.own_generate is not None:
        model.generate = planner.own_generate
        planner.own_generate = None
    while planner.handles:
        planner.handles.pop().remove()


@torch.compiler.disable
def _before(planner: Planner, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        # Its labels are the decoder's, and no part of the text that is read.
        kwargs = {**kwargs, "labels": None}
    planner.before_forward(args, kwargs)


@torch.compiler.disable
def _after(planner: Planner, model: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    planner.after_forward(kwargs, output, trains=model.training and torch.is_grad_enabled())


def _generate(planner: Planner, model: Any, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    """The model's own ``generate``, all of whose forwards follow the prompt's plan."""
    ids = kwargs.get("input_ids") if inputs is None else inputs
    if ids is None:
        raise RoutedStateError(
            f"method {planner.router.name!r} decides by the text of the prompt, got no input_ids; pass input_ids, or "
            "choose a token-level method, such as arrow"
        )
    with planner.holding(ids, kwargs.get("attention_mask")):
        if planner.own_generate is not None:
            return planner.own_generate(inputs, *args, **kwargs)
        return type(model).generate(model, inputs, *args, **kwargs)


def _before_answers(
    ids: torch.Tensor | None, mask: torch.Tensor | None, labels: torch.Tensor | None
) -> torch.Tensor | None:
    """The mask without the answers, where labels say which tokens are learned; a plan must not know them beforehand.

    A text that is learned as a whole, or labels of a decoder, leave the mask as it is.
    """
    if ids is None or labels is None or labels.shape != ids.shape:
        return mask
    given = (torch.ones_like(ids) if mask is None else mask.to(ids)) * (labels == _NO_LABEL)
    return torch.where(given.any(-1, keepdim=True), given, torch.ones_like(ids) if mask is None else mask.to(ids))


def with_gradients(values: Any) -> Iterator[torch.Tensor]:
    """Those among a model's outputs that a gradient can come back through.

    Args:
        values (Any): tensors, in lists or tuples.

    Yields:
        torch.Tensor: one by one.
    """
    if isinstance(values, torch.Tensor):
        if values.requires_grad:
            yield values
    elif isinstance(values, list | tuple):
        for each in values:
            yield from with_gradients(each)
