"""Adapters of PEFT on the data of all tasks together: the baseline ``shared``, EWoRA, or any other type."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import peft
import torch
from accelerate import PartialState

from hub_router.composition.base_model import base_name
from hub_router.composition.text import pad_token
from hub_router.errors import TrainingError
from hub_router.progress import SILENT, Progress
from hub_router.training.balance import Spread
from hub_router.training.data import Example, check_examples, data_hash
from hub_router.training.fit import base_fingerprint, checkpointing, encoded_parts, finish
from hub_router.training.gating import Reading
from hub_router.training.loop import Loop, Outcome
from hub_router.training.recipe import Objective, Phase
from hub_router.training.settings import TrainingSettings

# What the commands call PEFT's types.
_KINDS = {"PeftType.LORA": "shared", "PeftType.EWORA": "ewora"}
SETTINGS = TrainingSettings(learning_rate=1e-4, batch_size=16, epochs=1.0, warmup=0.06)


@dataclass(frozen=True)
class TaskLoss:
    """The task's loss alone.

    Args:
        name (str): of what is trained.
    """

    name: str

    def balance(self, spreads: Sequence[Spread], done: float) -> torch.Tensor | None:
        """See :class:`~hub_router.training.recipe.Objective`; none."""
        return None


@dataclass(frozen=True, eq=False)
class InPlace:
    """One factor of a LoRA, as the loop trains it: where it is.

    Args:
        parameter (torch.Tensor): a leaf that takes a gradient.
    """

    parameter: torch.Tensor

    @property
    def stored(self) -> torch.Tensor:
        """See :class:`~hub_router.training.gating.Trainable`."""
        return self.parameter.data

    def select(self, experts: Sequence[int]) -> torch.Tensor | None:
        """See :class:`~hub_router.training.gating.Trainable`; the factor, whatever the phase."""
        return self.parameter

    def put(self) -> None:
        """See :class:`~hub_router.training.gating.Trainable`; it is there."""


def fit_shared(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    rank: int,
    alpha: float,
    target_modules: Sequence[str] | str,
    settings: TrainingSettings = SETTINGS,
    out: str | Path,
    checkpoint: str | Path | None = None,
    log: str | Path | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Train one plain LoRA on all examples, whatever their task (`MAPLE`_'s baseline "Shared").

    .. _MAPLE: https://openreview.net/forum?id=YxVebk7kIw

    Args:
        model (PreTrainedModel): as for :func:`fit_adapter`.
        tokenizer (PreTrainedTokenizerBase): as for :func:`fit_adapter`.
        examples (Sequence[Example]): as for :func:`fit_adapter`.
        rank (int): r.
        alpha (float): ``lora_alpha``; the update is scaled by alpha/r.
        target_modules (Sequence[str] | str): as PEFT takes them: ends of module names, a pattern, or ``all-linear``.
        settings (TrainingSettings): as for :func:`fit_adapter`.
        out (str | Path): as for :func:`fit_adapter`.
        checkpoint (str | Path | None): as for :func:`fit_adapter`.
        log (str | Path | None): as for :func:`fit_adapter`.
        progress (Progress): as for :func:`fit_adapter`.

    Returns:
        Path: the adapter's folder, which ``hub-router sync`` takes.

    Raises:
        TrainingError: as :func:`fit_adapter`.
    """
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    fit_adapter(
        model,
        tokenizer,
        examples,
        config,
        settings=settings,
        out=out,
        checkpoint=checkpoint,
        log=log,
        progress=progress,
    )
    return Path(out).expanduser()


def fit_adapter(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    config: Any,
    *,
    settings: TrainingSettings = SETTINGS,
    out: str | Path,
    checkpoint: str | Path | None = None,
    log: str | Path | None = None,
    progress: Progress = SILENT,
) -> Outcome:
    """Train an adapter of PEFT on all examples, by the loop that trains gates; the base model is left as it was.

    Args:
        model (PreTrainedModel): the base model.
        tokenizer (PreTrainedTokenizerBase): its tokenizer.
        examples (Sequence[Example]): of all tasks; ``adapter`` says which task one is of.
        config (PeftConfig): of the adapter, such as ``peft.LoraConfig`` or ``hub_router.ewora.EworaConfig``.
        settings (TrainingSettings): of the loop.
        out (str | Path): folder that gets the adapter, whole or not at all; must not exist.
        checkpoint (str | Path | None): folder for checkpoints, from which a stopped run goes on; removed at the end.
        log (str | Path | None): file that gets a JSON line per step.
        progress (Progress): told of every step.

    Returns:
        Outcome: losses and steps.

    Raises:
        TrainingError: unusable examples, a folder that exists, no such modules, or a checkpoint of another run.
    """
    folder, tasks = Path(out).expanduser(), list(dict.fromkeys(each.adapter for each in examples))
    need_new(folder)
    check_examples(examples, tasks)
    encoded, held_out = encoded_parts(model, tokenizer, examples, tasks, settings)
    # Before the adapter is on it.
    base = base_fingerprint(model, checkpoint is not None)
    with (
        torch.random.fork_rng(),
        with_adapter(model, config, settings.seed) as adapted,
        checkpointing(model, settings),
    ):
        run = Loop(
            model=model,
            gates={name: InPlace(each) for name, each in adapted.named_parameters() if each.requires_grad},
            recipe=cast(Objective, TaskLoss(_KINDS.get(str(config.peft_type), str(config.peft_type)))),
            phases=(Phase("shared", (), tuple(range(len(tasks)))),),
            settings=settings,
            reading=Reading(),
            pad=pad_token(model, tokenizer),
            fingerprint={**base, **_fingerprint(config, settings, examples)},
            checkpoint=None if checkpoint is None else Path(checkpoint),
            log=None if log is None else Path(log),
        )
        outcome = run.go(encoded, held_out, progress)
        with whole_folder(folder) as draft:
            adapted.save_pretrained(draft, save_embedding_layers=False)
    if checkpoint is not None:
        finish(model, Path(checkpoint))
    return outcome


@contextmanager
def with_adapter(model: Any, config: Any, seed: int) -> Iterator[Any]:
    """A PEFT model around the base model, which afterwards is as it was.

    Args:
        model (PreTrainedModel): the base model.
        config (PeftConfig): of the adapter.
        seed (int): of its start.

    Yields:
        PeftModel: with the adapter.

    Raises:
        TrainingError: PEFT cannot put the adapter on the model.
    """
    before = {name: each.requires_grad for name, each in model.named_parameters()}
    attributes, mode = dict(vars(model)), model.training
    pretraining = getattr(model.config, "pretraining_tp", None)
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers for an attribute by its old name.
            warnings.simplefilter("ignore", FutureWarning)
            adapted = peft.get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise TrainingError(f"PEFT cannot put the adapter on {base_name(model)}: {error}") from error
    try:
        yield adapted
    finally:
        adapted.unload()
        for name in set(vars(model)) - set(attributes):
            delattr(model, name)
        if pretraining is not None:
            model.config.pretraining_tp = pretraining
        for name, each in model.named_parameters():
            each.requires_grad_(before[name])
        model.train(mode)


def need_new(folder: Path) -> None:
    """Refuse a folder that is there already.

    Args:
        folder (Path): that is to be written.

    Raises:
        TrainingError: it exists.
    """
    if folder.exists():
        raise TrainingError(f"{folder} exists and is left as it is; name a folder that does not")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears under its name when the block has filled it, or not at all; one for all processes.

    Args:
        folder (Path): its name; must not exist.

    Yields:
        Path: the folder to fill.
    """
    ranks = PartialState()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield draft
        if ranks.is_main_process:
            draft.chmod(0o755)
            draft.rename(folder)
        ranks.wait_for_everyone()
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _fingerprint(config: Any, settings: TrainingSettings, examples: Sequence[Example]) -> dict[str, Any]:
    """What the adapter depends on beside the base model."""
    return {
        **{f"adapter {key}": _plain(value) for key, value in config.to_dict().items()},
        "settings": settings.decisive,
        "data": data_hash(examples),
    }


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value
