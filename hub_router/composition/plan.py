"""Sequence-level methods at work: one plan per input sequence, from the text that the model is about to read.

The plan is made where the text begins: at the model's own forward, or at ``generate``, whose prompt's plan holds for
all forwards inside it, cached or not, with beams or a draft model. The updates of a model share one :class:`Planner`.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hub_router.errors import RoutedStateError
from hub_router.routing.base import SequenceRouter

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

    def spread(self, module: str, leading: Sequence[int]) -> dict[str, torch.Tensor]:
        """The rows as one module needs them beside its inputs.

        Args:
            module (str): its path, for the message.
            leading (Sequence[int]): axes of its inputs before the last, ``(B, T)`` or, flattened, ``(B T,)``. With
                beams there are several rows per sequence, one after another.

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
        for name, row in self.rows.items():
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
        self.plan: Plan | None = None
        self.handles: list[RemovableHandle] = []
        self._held = False
        self._known: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()

    @contextmanager
    def holding(self, ids: torch.Tensor, mask: torch.Tensor | None) -> Iterator[None]:
        """Keep the plan of these prompts for every forward inside the block.

        Args:
            ids (torch.Tensor): token ids ``(B, T)``.
            mask (torch.Tensor | None): 1 for tokens, 0 for padding ``(B, T)``.

        Yields:
            None: while it holds.
        """
        if self._held:
            yield
            return
        self.make(ids, mask)
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def make(self, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Plan for a batch.

        Args:
            ids (torch.Tensor): token ids ``(B, T)``.
            mask (torch.Tensor | None): 1 for tokens, 0 for padding ``(B, T)``; None where nothing is padded, or with
                special tokens alone, which are no text.
        """
        texts = self._texts(ids, mask)
        unknown = list(dict.fromkeys(text for text in texts if text not in self._known))
        if unknown:
            embeddings = torch.as_tensor(np.asarray(self.encoder.encode(unknown), dtype=np.float64))
            rows = self.router.plan(self.state, embeddings, [seed_of(text) for text in unknown])
            for number, text in enumerate(unknown):
                self._known[text] = {name: row[number] for name, row in rows.items()}
        found = [self._known[text] for text in texts]
        for text in texts:
            self._known.move_to_end(text)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        rows = {name: torch.stack([each[name] for each in found]).to(ids.device) for name in found[0]}
        self.plan = Plan(rows, ids.shape[1])

    def before_forward(self, kwargs: Mapping[str, Any], args: Sequence[Any]) -> None:
        """Look at what the model is about to read: a new input gets a plan, a continued one keeps its own.

        Args:
            kwargs (Mapping[str, Any]): of the model's forward.
            args (Sequence[Any]): of the model's forward.

        Raises:
            RoutedStateError: there is no text to decide by.
        """
        ids = args[0] if args and isinstance(args[0], torch.Tensor) else kwargs.get("input_ids")
        seen = next(
            (each for key in ("decoder_input_ids", "inputs_embeds") if (each := kwargs.get(key)) is not None), ids
        )
        if not self._held and not _continues(kwargs):
            if ids is None and kwargs.get("encoder_outputs") is None:
                raise RoutedStateError(
                    f"method {self.router.name!r} decides by the text of its input, got no input_ids; pass input_ids, "
                    "or choose a token-level method, such as arrow"
                )
            if ids is not None:
                self.make(ids, kwargs.get("attention_mask"))
        if self.plan is None:
            raise RoutedStateError(
                f"method {self.router.name!r} decides by the text of its input, and this forward continues one that "
                "it has not seen; start with the prompt's input_ids"
            )
        if seen is not None:
            self.plan = Plan(self.plan.rows, seen.shape[1])

    def _texts(self, ids: torch.Tensor, mask: torch.Tensor | None) -> list[str]:
        """The text of each sequence, without padding and special tokens."""
        rows = ids.tolist()
        if mask is not None and mask.shape == ids.shape:
            rows = [
                [token for token, kept in zip(row, marks, strict=True) if kept]
                for row, marks in zip(rows, mask.tolist(), strict=True)
            ]
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def seed_of(text: str) -> int:
    """A number that depends on a sequence's text alone, so that it draws alike in every batch."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def install(model: nn.Module, planner: Planner) -> None:
    """Let a planner see what a model reads.

    Args:
        model (nn.Module): the routed model; its ``generate`` plans by the prompt until :func:`uninstall`.
        planner (Planner): shared by the model's updates.
    """
    if hasattr(type(model), "generate"):
        model.generate = partial(_generate, planner, model)  # type: ignore[assignment]
    planner.handles.append(model.register_forward_pre_hook(partial(_before, planner), with_kwargs=True))


def uninstall(model: nn.Module, planner: Planner) -> None:
    """Take a planner off, and give the model its own ``generate`` back.

    Args:
        model (nn.Module): the routed model.
        planner (Planner): installed on it, or not any more.
    """
    vars(model).pop("generate", None)
    while planner.handles:
        planner.handles.pop().remove()


@torch.compiler.disable
def _before(planner: Planner, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    planner.before_forward(kwargs, args)


def _generate(planner: Planner, model: Any, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    """The model's own ``generate``, all of whose forwards follow the prompt's plan."""
    ids = kwargs.get("input_ids") if inputs is None else inputs
    if ids is None:
        raise RoutedStateError(
            f"method {planner.router.name!r} decides by the text of the prompt, got no input_ids; pass input_ids, or "
            "choose a token-level method, such as arrow"
        )
    with planner.holding(ids, kwargs.get("attention_mask")):
        return type(model).generate(model, inputs, *args, **kwargs)


def _continues(kwargs: Mapping[str, Any]) -> bool:
    """Whether a forward goes on from a cache that holds earlier tokens."""
    for key in ("past_key_values", "cache_params"):
        cache = kwargs.get(key)
        if cache is None:
            continue
        if getattr(cache, "has_previous_state", False) is True:
            return True
        length = getattr(cache, "get_seq_length", None)
        if length is not None and int(length()) > 0:
            return True
    return False
