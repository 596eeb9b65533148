"""RoutedModel: a transformers model with a pool of adapters attached, as people use it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch

from hub_router.composition import artifact
from hub_router.composition.assemble import make_updates
from hub_router.composition.attach import attach, detach, need_unrouted, routed_updates
from hub_router.composition.base_model import base_name, load_tokenizer
from hub_router.composition.check import check_fit
from hub_router.composition.explain import Explanation, explain
from hub_router.composition.plan import Planner, TextEncoder
from hub_router.composition.reference import check_base, restore_base
from hub_router.composition.saved import Replacement, SavedPlan, plan_saved
from hub_router.composition.text import generate_texts, stream_text
from hub_router.composition.trace import Trace, traced
from hub_router.errors import HubRouterError, IncompatibleAdaptersError, RoutedStateError
from hub_router.lora.adapter import LoraAdapter
from hub_router.routing.base import Prepared, Router, SequenceRouter
from hub_router.routing.registry import create

_LOG = logging.getLogger(__name__)


class RoutedModel:
    """A base model that runs with the adapters that its method picks; made by ``compose`` or :meth:`load`.

    Args:
        model (PreTrainedModel): the base model with the updates attached.
        tokenizer (PreTrainedTokenizerBase | None): for text in and out.
        pool (Sequence[LoraAdapter]): the adapters in the order of axis E.
        method (Router): the routing method with its hyperparameters.
        replacement (Replacement): parameters of the base model that an adapter used alone replaces.
        notes (tuple[str, ...]): what a user should know about this composition.
        planner (Planner | None): asks the method, where it decides per sequence.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        pool: Sequence[LoraAdapter],
        method: Router,
        replacement: Replacement,
        notes: tuple[str, ...] = (),
        planner: Planner | None = None,
    ) -> None:
        self._model = model
        self._pool = tuple(pool)
        self._attached = True
        self._replacement = replacement
        self._planner = planner
        self.notes = notes
        self.tokenizer = tokenizer
        self.method = method

    @classmethod
    def attached(
        cls,
        model: Any,
        tokenizer: Any,
        pool: Sequence[LoraAdapter],
        method: Router,
        prepared: Mapping[str, Prepared],
        plan: SavedPlan,
        notes: Sequence[str],
        planner: Planner | None = None,
    ) -> RoutedModel:
        """Attach a pool that was checked; if anything fails, the base model is as it was.

        Args:
            model (PreTrainedModel): the base model.
            tokenizer (PreTrainedTokenizerBase | None): for text in and out.
            pool (Sequence[LoraAdapter]): the adapters in the order of axis E.
            method (Router): the routing method.
            prepared (Mapping[str, Prepared]): its state, by module path.
            plan (SavedPlan): parameters that replace the base model's; DoRA's gains are those of the replaced weights.
            notes (Sequence[str]): what a user should know.
            planner (Planner | None): asks the method, where it decides per sequence.

        Returns:
            RoutedModel: holds the model, now routed.
        """
        for note in plan.notes:
            _LOG.warning("%s", note)
        replacement = Replacement(model, plan.replace)
        try:
            attach(model, make_updates(model, method, prepared, len(pool), planner), planner)
            return cls(model, tokenizer, pool, method, replacement, tuple(notes), planner)
        except BaseException:
            detach(model)
            replacement.restore()
            raise

    @property
    def model(self) -> Any:
        """The transformers model itself: its own class, parameters and ``state_dict``, with routed outputs.

        Raises:
            RoutedStateError: after :meth:`detach`.
        """
        if not self._attached:
            raise RoutedStateError("this routed model was detached; compose again to route the base model")
        return self._model

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the pool, in the order of axis E of all weights."""
        return tuple(adapter.name for adapter in self._pool)

    def __repr__(self) -> str:
        state = "" if self._attached else ", detached"
        return f"RoutedModel({base_name(self._model)}, {len(self._pool)} adapters, {self.method!r}{state})"

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """Run the model.

        Args:
            *args (Any): of the transformers model's forward.
            **inputs (Any): of the transformers model's forward, e.g. ``input_ids`` ``(B, T)``.

        Returns:
            ModelOutput: the transformers model's own.
        """
        return self.model(*args, **inputs)

    def generate(self, prompt: str | Sequence[str], max_new_tokens: int | None = 64, **options: Any) -> Any:
        """Continue text.

        Args:
            prompt (str | Sequence[str]): one prompt, or a batch of any lengths.
            max_new_tokens (int | None): at most this many tokens each; None leaves it to the generation config.
            **options (Any): of transformers' ``generate``, e.g. ``do_sample``, ``temperature``, ``num_beams``.

        Returns:
            str | list: the new text alone; a list for a list. With ``num_return_sequences`` above 1, a list of texts
                in the place of each text.

        Raises:
            HubRouterError: there is no tokenizer, or a prompt has no tokens.
            RoutedStateError: after :meth:`detach`.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            return []
        options = _with_length(max_new_tokens, options)
        several = generate_texts(self.model, self._need_tokenizer(), prompts, options)
        texts = [each[0] if len(each) == 1 else each for each in several]
        return texts[0] if isinstance(prompt, str) else texts

    def stream(self, prompt: str, max_new_tokens: int | None = 64, **options: Any) -> Iterator[str]:
        """Continue one prompt and give the new text piece by piece.

        Args:
            prompt (str): one prompt.
            max_new_tokens (int | None): at most this many tokens.
            **options (Any): of transformers' ``generate``; beams cannot be streamed.

        Returns:
            Iterator[str]: joined, the text that :meth:`generate` gives. Closing it stops the generation.

        Raises:
            HubRouterError: there is no tokenizer, or the prompt has no tokens.
            RoutedStateError: after :meth:`detach`.
        """
        return stream_text(self.model, self._need_tokenizer(), prompt, _with_length(max_new_tokens, options))

    def explain(self, prompt: str, max_new_tokens: int | None = 64, **options: Any) -> Explanation:
        """Continue one prompt and say which adapters each token used.

        Args:
            prompt (str): one prompt.
            max_new_tokens (int | None): at most this many tokens.
            **options (Any): of transformers' ``generate``.

        Returns:
            Explanation: tokens, mean expert weights ``(T, E)`` and the new text.

        Raises:
            HubRouterError: there is no tokenizer, or the prompt has no tokens.
            RoutedStateError: after :meth:`detach`.
        """
        options = _with_length(max_new_tokens, options)
        return explain(self.model, self._need_tokenizer(), self.adapters, prompt, options, self._planner)

    def trace(self) -> AbstractContextManager[Trace]:
        """Record the expert weights of every forward inside a with-block.

        Returns:
            AbstractContextManager[Trace]: ``trace.weights[module]`` is ``(B, T, E)`` in the order of :attr:`adapters`.

        Raises:
            RoutedStateError: after :meth:`detach`; or, on entering, if a trace is open already.
        """
        return traced(self.model, self.adapters)

    def save(self, folder: str | Path) -> None:
        """Write everything needed to :meth:`load` this routed model with equal outputs.

        Args:
            folder (str | Path): new, empty, or an earlier composition, which is replaced.

        Raises:
            ArtifactError: the folder holds something else.
            RoutedStateError: after :meth:`detach`.
        """
        updates = [update for _, update in routed_updates(self.model)]
        with self._replacement.lifted():
            artifact.write(
                Path(folder).expanduser().absolute(),
                router=self.method,
                adapters=self._pool,
                updates=updates,
                model=self._model,
                tokenizer=self.tokenizer,
                planner=self._planner,
            )

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: Any = None,
        tokenizer: Any = None,
        device: torch.device | str | None = None,
        encoder: TextEncoder | None = None,
    ) -> RoutedModel:
        """Read a routed model that :meth:`save` wrote.

        Args:
            folder (str | Path): the composition's folder.
            model (PreTrainedModel | str | Path | None): base model to attach to, or its folder or Hub id; None loads
                the one it was composed with.
            tokenizer (PreTrainedTokenizerBase | None): None takes the saved one.
            device (torch.device | str | None): where to put the base model; None leaves it where it is.
            encoder (TextEncoder | None): of a method that decides per sequence; None loads the one that it was
                composed with.

        Returns:
            RoutedModel: with the outputs of the one that was saved.

        Raises:
            ArtifactError: a file is missing or was changed, or the base model has other weights.
            MissingError: the base model is not where it was.
            EncoderUnavailableError: nor is the sentence encoder.
            IncompatibleAdaptersError: ``model`` has other modules.
        """
        folder = Path(folder).expanduser().absolute()
        saved = artifact.read(folder)
        router = create(saved.method, saved.hyperparameters)
        if saved.plan is not None and encoder is None:
            from hub_router.encoder import load_encoder

            encoder = load_encoder(saved.plan.encoder)
        if model is None or isinstance(model, str | Path):
            moved = None if model is None else str(model)
            model = restore_base(saved.base, saved.buffers, folder, device, moved)
            check_fit(model, base_name(model), saved.adapters)
        else:
            need_unrouted(model)
            check_fit(model, base_name(model), saved.adapters)
            check_base(saved.base, model, folder)
            model = model if device is None else model.to(device)
        if tokenizer is None and saved.tokenizer is not None:
            tokenizer = load_tokenizer(str(saved.tokenizer))
        plan = plan_saved(model, saved.adapters, router.members([adapter.name for adapter in saved.adapters]))
        if plan.faults:
            raise IncompatibleAdaptersError(base_name(model), plan.faults)
        planner = None
        if saved.plan is not None and encoder is not None:
            planner = Planner(cast(SequenceRouter, router), saved.plan.state, encoder, tokenizer)
        return cls.attached(model, tokenizer, saved.adapters, router, saved.prepared, plan, plan.notes, planner)

    def detach(self) -> Any:
        """Take the adapters off.

        Returns:
            PreTrainedModel: the base model, bit for bit as it was; this object refuses use from here on.
        """
        if self._attached:
            detach(self._model)
            self._replacement.restore()
            self._attached = False
        return self._model

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise HubRouterError(
                "this routed model has no tokenizer, which text needs; pass compose(..., tokenizer=...)"
            )
        return self.tokenizer


def _with_length(max_new_tokens: int | None, options: dict[str, Any]) -> dict[str, Any]:
    """Options of ``generate`` with the length, which transformers takes as given even where it is None."""
    return options if max_new_tokens is None else {"max_new_tokens": max_new_tokens, **options}
