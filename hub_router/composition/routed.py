"""RoutedModel: a transformers model with a pool of adapters attached, as people use it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from hub_router.composition import artifact
from hub_router.composition.attach import attach, detach, need_unrouted, routed_updates
from hub_router.composition.base_model import base_name, load_tokenizer
from hub_router.composition.check import check_fit
from hub_router.composition.explain import Explanation, explain
from hub_router.composition.plan import Planner, TextEncoder
from hub_router.composition.pool import AdapterSource, read_pool, standing
from hub_router.composition.reference import check_base, restore_base
from hub_router.composition.saved import Replacement, plan_saved
from hub_router.composition.setup import Background, Setup, install, make_setup
from hub_router.composition.tasks import Samples
from hub_router.composition.text import generate_texts, stream_text
from hub_router.composition.trace import Trace, traced
from hub_router.composition.trained import set_of, trained_key, vectors_of_prepared, vectors_of_updates
from hub_router.errors import ArtifactError, HubRouterError, IncompatibleAdaptersError, MethodError, RoutedStateError
from hub_router.features import Vectors
from hub_router.lora.adapter import LoraAdapter
from hub_router.routing.base import Router, SequenceRouter
from hub_router.routing.registry import create


class RoutedModel:
    """A base model that runs with the adapters that its method picks; made by ``compose`` or :meth:`load`.

    Args:
        model (PreTrainedModel): the base model with the updates attached.
        tokenizer (PreTrainedTokenizerBase | None): for text in and out.
        setup (Setup): pool and method that are attached.
        replacement (Replacement): parameters of the base model that an adapter used alone replaces.

    Attributes:
        method (Router): the routing method with its hyperparameters.
        notes (tuple[str, ...]): what a user should know about this composition.
    """

    method: Router
    notes: tuple[str, ...]

    def __init__(self, model: Any, tokenizer: Any, setup: Setup, replacement: Replacement) -> None:
        self._model = model
        self._attached = True
        self.tokenizer = tokenizer
        self._take(setup, replacement)

    @classmethod
    def attached(cls, model: Any, tokenizer: Any, setup: Setup) -> RoutedModel:
        """Attach a pool that was checked; if anything fails, the base model is as it was.

        Args:
            model (PreTrainedModel): the base model.
            tokenizer (PreTrainedTokenizerBase | None): for text in and out.
            setup (Setup): from :func:`~hub_router.composition.setup.make_setup`.

        Returns:
            RoutedModel: holds the model, now routed.
        """
        return cls(model, tokenizer, setup, install(model, setup))

    def _take(self, setup: Setup, replacement: Replacement) -> None:
        self._pool = setup.pool
        self._replacement = replacement
        self._planner = setup.planner
        self._background = setup.background
        self.method = setup.router
        self.notes = setup.notes

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

    @property
    def weights_hashes(self) -> dict[str, str]:
        """Identity of each adapter's weights, by name."""
        return {adapter.name: adapter.weights_hash for adapter in self._pool}

    @property
    def vectors(self) -> Vectors:
        """The gates' vectors, float32 ``(D_in,)`` by adapter and module; empty where the method is not trained."""
        if set_of(self.method) is None:
            return {}
        return vectors_of_updates((update for _, update in routed_updates(self.model)), self.adapters)

    def keep_vectors(self) -> None:
        """Remember the gates as they are now, after training in place, for whatever pool comes next."""
        self.method = replace(cast(Any, self.method), prototypes="")
        for _, update in routed_updates(self.model):
            update.router = self.method
        self._background = self._background.with_vectors(cast(str, trained_key(self.method)), self.vectors)

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

        Samples are kept as the Gaussians that a method made of them; those that no method has needed yet are not.

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
                features=self._background.features,
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
        if saved.plan is not None and encoder is not None and encoder.name != saved.plan.encoder:
            raise ArtifactError(
                f"{folder} was composed with the sentence encoder {saved.plan.encoder!r}, got {encoder.name!r}; its "
                "vectors say nothing about the samples in there"
            )
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
        names = [adapter.name for adapter in saved.adapters]
        plan = plan_saved(model, saved.adapters, router.members(names))
        if plan.faults:
            raise IncompatibleAdaptersError(base_name(model), plan.faults)
        planner = None
        if saved.plan is not None and encoder is not None:
            planner = Planner(cast(SequenceRouter, router), saved.plan.state, encoder, tokenizer)
        background = Background(saved.features, encoder=encoder)
        if saved.trained and (key := trained_key(router)) is not None:
            background = background.with_vectors(key, vectors_of_prepared(saved.prepared, names))
        setup = Setup(router, saved.adapters, saved.prepared, plan, planner, plan.notes, background)
        return cls.attached(model, tokenizer, setup)

    def set_method(
        self,
        method: str,
        *,
        samples: Samples | None = None,
        encoder: str | TextEncoder | None = None,
        **hyperparameters: Any,
    ) -> None:
        """Route the same pool by another method; the base model stays loaded, and an error changes nothing.

        What the catalog and the caller said about the adapters before still holds.

        Args:
            method (str): a name of ``hub-router methods``.
            samples (Mapping[str, Sequence[str]] | None): as for ``compose``; these come before earlier ones.
            encoder (str | TextEncoder | None): as for ``compose``; None keeps the encoder.
            **hyperparameters (Any): the method's, where they differ from the paper's defaults.

        Raises:
            MethodError: unknown method, invalid hyperparameter, a pool that the method cannot route over, or the
                method lacks samples, encoder or tokenizer.
            IncompatibleAdaptersError: adapters bring heads or the like, which a mix cannot use.
            RoutedStateError: after :meth:`detach`, or while a trace is open.
        """
        self._need_changeable()
        self._exchange(create(method, hyperparameters), self._pool, (), samples, encoder)

    def set_adapters(
        self,
        adapters: Mapping[str, AdapterSource] | Sequence[AdapterSource],
        *,
        samples: Samples | None = None,
        encoder: str | TextEncoder | None = None,
    ) -> None:
        """Route another pool by the same method; the base model stays loaded, and an error changes nothing.

        Args:
            adapters (Mapping | Sequence): as for ``compose``; names of :attr:`adapters` stand for those adapters, which
                are not read again.
            samples (Mapping[str, Sequence[str]] | None): as for ``compose``; those of adapters that stay are known.
            encoder (str | TextEncoder | None): as for ``compose``; None keeps the encoder.

        Raises:
            MethodError: the method cannot route over the pool, or lacks samples of new adapters.
            UnsupportedAdapterError: lists the adapters that cannot be read, where all others fit.
            IncompatibleAdaptersError: adapters do not fit the model; lists them and those that cannot be read.
            RoutedStateError: after :meth:`detach`, or while a trace is open.
        """
        self._need_changeable()
        pool, unreadable = read_pool(standing(adapters, self._pool))
        self._exchange(self.method, pool, unreadable, samples, encoder)

    def add_adapters(
        self,
        adapters: Mapping[str, AdapterSource] | Sequence[AdapterSource],
        *,
        samples: Samples | None = None,
        encoder: str | TextEncoder | None = None,
    ) -> None:
        """Add adapters at the end of the pool; otherwise as :meth:`set_adapters`.

        Args:
            adapters (Mapping | Sequence): as for ``compose``; a folder whose name is taken gets ``-2``.
            samples (Mapping[str, Sequence[str]] | None): as for ``compose``, of the new adapters.
            encoder (str | TextEncoder | None): as for ``compose``; None keeps the encoder.

        Raises:
            MethodError: a name of the mapping is taken; or see :meth:`set_adapters`, as for all other errors.
        """
        self._need_changeable()
        new, unreadable = read_pool(adapters)
        taken = [adapter.name for adapter in new if adapter.name in self.adapters]
        if taken and isinstance(adapters, Mapping):
            raise MethodError(
                f"names that are in the pool already: {', '.join(taken)}; choose others, or take those adapters out "
                "with remove_adapters() first"
            )
        pool, _ = read_pool([*self._pool, *new])
        self._exchange(self.method, pool, unreadable, samples, encoder)

    def remove_adapters(self, *names: str) -> None:
        """Take adapters out of the pool; otherwise as :meth:`set_adapters`.

        Args:
            *names (str): of :attr:`adapters`.

        Raises:
            MethodError: there is no such adapter, or none would be left; or see :meth:`set_adapters`.
        """
        self._need_changeable()
        unknown = [name for name in names if name not in self.adapters]
        pool = [adapter for adapter in self._pool if adapter.name not in names]
        if unknown or not pool:
            fault = f"there are no adapters {', '.join(map(repr, unknown))}" if unknown else "no adapter would be left"
            raise MethodError(f"{fault}; the pool is: {', '.join(self.adapters)}")
        self._exchange(self.method, pool, (), None, None)

    def _need_changeable(self) -> None:
        if any(update.recorder is not None for _, update in routed_updates(self.model)):
            raise RoutedStateError("a trace is open on this model; leave its with-block before changing what it routes")

    def _exchange(
        self,
        router: Router,
        pool: Sequence[LoraAdapter],
        unreadable: Sequence[str],
        samples: Samples | None,
        encoder: str | TextEncoder | None,
    ) -> None:
        """Check all, then change over; the old routing comes back if that fails."""
        # An adapter that stays shares its factors with the one that it was.
        names = {new.name: old.name for new in pool for old in self._pool if new.modules is old.modules}
        background = self._background.of(names).with_samples(samples, encoder)
        with self._replacement.lifted():
            name = base_name(self._model)
            setup = make_setup(self._model, name, router, pool, unreadable, background, self.tokenizer)
        before = {update.module: update for _, update in routed_updates(self._model)}
        detach(self._model)
        replace_again = self._replacement.restore()
        try:
            replacement = install(self._model, setup)
        except BaseException:
            replace_again()
            attach(self._model, before, self._planner)
            raise
        self._take(setup, replacement)

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
