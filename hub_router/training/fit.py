"""fit: train the gates of a routed model, whatever its method."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from hub_router.composition.attach import routed_updates
from hub_router.composition.base_model import base_id, base_name
from hub_router.composition.reference import fingerprint
from hub_router.composition.routed import RoutedModel
from hub_router.composition.text import has_encoder, pad_token
from hub_router.composition.trained import is_set_file
from hub_router.errors import RoutedStateError, TrainingError
from hub_router.progress import SILENT, Progress
from hub_router.prototypes import PrototypeMember, Prototypes, read_prototypes
from hub_router.records import Sample
from hub_router.routing.registry import hyperparameters_of
from hub_router.training.checkpoint import remove
from hub_router.training.data import (
    Encoded,
    Example,
    check_examples,
    data_hash,
    encode,
    from_samples,
    needs_labels,
    read_jsonl,
    split,
)
from hub_router.training.gating import Reading, training
from hub_router.training.loop import Loop, is_log
from hub_router.training.recipe import Recipe, SearchRecipe
from hub_router.training.registry import create_recipe
from hub_router.training.search import Search
from hub_router.training.settings import TrainingSettings


@dataclass(frozen=True, eq=False)
class FitResult:
    """What a run made.

    Args:
        prototypes (Prototypes): the trained vectors of every adapter, for the catalog, or for a file that
            ``compose(prototypes=FILE)`` takes (:func:`hub_router.prototypes.write_prototypes`).
        loss (float): mean of the answer tokens' loss over the last tenth of the steps, nats.
        validation (float | None): loss on the examples that were set aside.
        steps (int): optimizer steps, of all phases.
    """

    prototypes: Prototypes
    loss: float
    validation: float | None
    steps: int


def fit(
    routed: RoutedModel,
    data: str | Path | Sequence[Example] | Mapping[str, Sequence[Sample]],
    *,
    settings: TrainingSettings | None = None,
    checkpoint: str | Path | None = None,
    keep_checkpoint: bool = False,
    log: str | Path | None = None,
    progress: Progress = SILENT,
    **options: Any,
) -> FitResult:
    """Train a routed model's gates; base model and adapters stay as they are.

    A run that was killed goes on from its last checkpoint and gives the weights of one that was not, bit for bit on a
    CPU in float32: what a step draws depends on the seed and the step's number alone.

    Args:
        routed (RoutedModel): composed with a method that is trained (``phatgoose``, ``maple``, ``lora-mixer``,
            ``lorahub``, ``mole``); its gates are the trained ones afterwards.
        data (str | Path | Sequence[Example] | Mapping): a JSONL file with ``input``, ``output`` and ``adapter`` per
            line, examples, or samples by adapter. Where the method does not ask whose task an example is of, the
            adapter may be missing.
        settings (TrainingSettings | None): None takes the paper's.
        checkpoint (str | Path | None): folder for checkpoints, from which a stopped run goes on; removed at the end.
        keep_checkpoint (bool): leave the last one there, for a caller that has to store the result first.
        log (str | Path | None): file that gets a JSON line per step.
        progress (Progress): told of every step, with loss and routing entropy.
        **options (Any): the method's own, such as ``mask="none"`` of MAPLE or ``balance="aux"`` of LoRA-Mixer.

    Returns:
        FitResult: the trained vectors, and the losses.

    Raises:
        TrainingError: a method that is not trained, an invalid option, unusable data (every bad line named), or a
            checkpoint of another run; nothing is trained then.
        RoutedStateError: after ``detach()``, or without a tokenizer.
    """
    model = routed.model
    _check_state(routed)
    folder, lines = (None if path is None else Path(path) for path in (checkpoint, log))
    _check_places(folder, lines)
    recipe = create_recipe(routed.method.name, options)
    _check_start(routed)
    if settings is not None and not isinstance(settings, TrainingSettings):
        raise TrainingError(f"settings is {settings!r}, expected TrainingSettings(...)")
    settings = recipe.settings if settings is None else settings
    examples = _examples(data, routed.adapters, needs_labels(recipe))
    encoded, held_out = encoded_parts(model, routed.tokenizer, examples, routed.adapters, settings)
    reading = Reading()
    rule = partial(recipe.gate, routed.method)
    with (
        torch.enable_grad(),
        torch.random.fork_rng(range(torch.cuda.device_count())),
        training(model, rule, reading) as gates,
        checkpointing(model, settings),
    ):
        phases = recipe.phases(routed.adapters, sorted({each.adapter for each in encoded}))
        common: dict[str, Any] = {
            "model": model,
            "gates": gates,
            "recipe": recipe,
            "settings": settings,
            "reading": reading,
            "pad": pad_token(model, routed.tokenizer),
            "fingerprint": _fingerprint(routed, recipe, settings, examples, folder is not None),
            "checkpoint": folder,
            "log": lines,
        }
        run: Loop | Search = (
            Search(phase=phases[0], adapters=routed.adapters, **common)
            if isinstance(recipe, SearchRecipe)
            else Loop(phases=phases, **common)
        )
        outcome = run.go(encoded, held_out, progress)
    measured = {"loss": outcome.loss, "validation_loss": outcome.validation, "steps": outcome.steps}
    prototypes = _prototypes(routed, recipe, settings, examples, measured)
    routed.keep_vectors()
    if folder is not None and not keep_checkpoint:
        finish(model, folder)
    return FitResult(prototypes, outcome.loss, outcome.validation, outcome.steps)


def encoded_parts(
    model: Any, tokenizer: Any, examples: Sequence[Example], names: Sequence[str], settings: TrainingSettings
) -> tuple[list[Encoded], list[Encoded]]:
    """Examples in tokens, some of them set aside.

    Args:
        model (PreTrainedModel): that is to read them.
        tokenizer (PreTrainedTokenizerBase): its tokenizer.
        examples (Sequence[Example]): checked.
        names (Sequence[str]): of the adapters or tasks that the examples name.
        settings (TrainingSettings): say how many are set aside.

    Returns:
        tuple[list[Encoded], list[Encoded]]: to learn from, and for validation; the latter may be empty.

    Raises:
        TrainingError: an example cannot be learned, or none would be set aside.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    learned, held = (
        encode(part, names, tokenizer, longest, has_encoder(model)) if part else []
        for part in split(examples, settings.validation, settings.seed)
    )
    return learned, held


def finish(model: Any, checkpoint: Path) -> None:
    """Remove the checkpoint of a run that is done.

    Args:
        model (PreTrainedModel): that was trained.
        checkpoint (Path): its folder.
    """
    ranks = PartialState(cpu=next(model.parameters()).device.type == "cpu")
    if ranks.is_main_process:
        remove(checkpoint)
    # Else another process could go on from it in its next run.
    ranks.wait_for_everyone()


def _check_state(routed: RoutedModel) -> None:
    """Refuse a model that cannot be trained as it is."""
    if routed.tokenizer is None:
        raise RoutedStateError("training reads text, and there is no tokenizer; compose(..., tokenizer=...)")
    if torch.is_inference_mode_enabled() or any(update.A.is_inference() for _, update in routed_updates(routed.model)):
        raise RoutedStateError("nothing can be trained under torch.inference_mode(); compose and fit outside of it")


def _check_start(routed: RoutedModel) -> None:
    """Refuse MAPLE on gates of PHATGOOSE that were never trained."""
    trains_gates = getattr(routed.method, "parent", "") == "phatgoose"
    if trains_gates and not any(vector.any() for own in routed.vectors.values() for vector in own.values()):
        raise TrainingError(
            "maple with parent='phatgoose' refines trained gates, and these are all zero; train phatgoose first, then "
            "give its set: prototypes=SET"
        )


def _check_places(checkpoint: Path | None, log: Path | None) -> None:
    """Refuse paths that cannot be written, before anything is trained."""
    if checkpoint is not None and checkpoint.exists() and not checkpoint.is_dir():
        raise TrainingError(f"checkpoint {checkpoint} is a file, expected a folder")
    if log is not None and log.is_dir():
        raise TrainingError(f"log {log} is a folder, expected a file")
    if log is not None and log.exists() and log.stat().st_size and not is_log(log):
        raise TrainingError(f"log {log} holds something else and is left as it is; name another file")


def _examples(
    data: str | Path | Sequence[Example] | Mapping[str, Sequence[Sample]], adapters: Sequence[str], labelled: bool
) -> list[Example]:
    if isinstance(data, str | Path):
        examples = read_jsonl(Path(data), adapters, labelled=labelled)
    else:
        examples = from_samples(data) if isinstance(data, Mapping) else list(data)
    check_examples(examples, adapters, labelled=labelled)
    return examples


def checkpointing(model: Any, settings: TrainingSettings) -> AbstractContextManager[Any]:
    """Activation checkpointing inside the block, where it is asked for.

    Args:
        model (PreTrainedModel): any.
        settings (TrainingSettings): of the run.

    Returns:
        AbstractContextManager[Any]: leaves the model as it was.

    Raises:
        TrainingError: the model has none.
    """
    return _Checkpointing(model) if settings.checkpointing else nullcontext()


class _Checkpointing:
    """Turns a model's activation checkpointing on and, if it was off, off again."""

    def __init__(self, model: Any) -> None:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise TrainingError(f"{type(model).__name__} has no activation checkpointing; set checkpointing=False")
        self._model, self._was_on = model, bool(getattr(model, "is_activation_checkpointing", False))

    def __enter__(self) -> None:
        self._model.activation_checkpointing_enable({"use_reentrant": False})

    def __exit__(self, *_error: object) -> None:
        if not self._was_on:
            self._model.activation_checkpointing_disable()
            # Which leaves the hooks that turning it on put on the embeddings.
            self._model.disable_input_require_grads()


def _origin(start: str) -> str:
    """What a set was refined from, as sets name it: of a file its method."""
    return read_prototypes(Path(start).expanduser()).method if is_set_file(start) else start


def base_fingerprint(model: Any, stored: bool) -> dict[str, Any]:
    """What of the base model and the machine a run's weights depend on.

    Args:
        model (PreTrainedModel): the base model; what is attached to it does not count.
        stored (bool): whether there are checkpoints, for whose sake alone its weights are hashed.

    Returns:
        dict[str, Any]: for a checkpoint's fingerprint.
    """
    return {
        "base model": base_name(model),
        "base weights": fingerprint(model) if stored else "",
        "processes": PartialState(cpu=model.device.type == "cpu").num_processes,
        "device": model.device.type,
    }


def _fingerprint(
    routed: RoutedModel, recipe: Recipe, settings: TrainingSettings, examples: Sequence[Example], stored: bool
) -> dict[str, Any]:
    """What the weights of a run depend on."""
    start = hashlib.sha256()
    for name, vectors in sorted(routed.vectors.items()):
        for module, vector in sorted(vectors.items()):
            start.update(f"{name} {module}".encode() + vector.tobytes())
    return {
        **base_fingerprint(routed.model, stored),
        "method": routed.method.name,
        "hyperparameters": hyperparameters_of(routed.method),
        "recipe": repr(recipe),
        "settings": settings.decisive,
        "data": data_hash(examples),
        "adapters": list(routed.weights_hashes.items()),  # vectors are rows in their order
        "start": start.hexdigest(),
    }


def _prototypes(
    routed: RoutedModel,
    recipe: Recipe,
    settings: TrainingSettings,
    examples: Sequence[Example],
    metrics: Mapping[str, Any],
) -> Prototypes:
    """The trained vectors with all that they were made from."""
    method = routed.method
    chosen = hyperparameters_of(method)
    start = chosen.pop("prototypes", "")
    hashes, vectors = routed.weights_hashes, routed.vectors
    trained = [name for name in routed.adapters if name in vectors]
    return Prototypes(
        method=method.name,
        base_model=base_id(routed.model),
        members=tuple(PrototypeMember(name, hashes[name], vectors[name]) for name in trained),
        parent=_origin(start) or chosen.get("parent", ""),
        hyperparameters={**chosen, "recipe": repr(recipe), **settings.to_json()},
        metrics=dict(metrics),
        data_hash=data_hash(examples),
        seed=settings.seed,
    )
