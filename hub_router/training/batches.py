"""Batches: which examples a step reads, and the tensors that the model takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hub_router.training.data import Encoded

_NO_LABEL = -100


@dataclass(frozen=True, eq=False)
class Batch:
    """Some examples, as the model reads them.

    Args:
        inputs (Mapping[str, torch.Tensor]): of the model's forward; padded on the right.
        labels (torch.Tensor): int64 ``(B, T)``, -100 where nothing is learned.
        own (torch.Tensor): int64 ``(B,)``, pool position of the adapter that was trained on each example's task.
        shifted (bool): whether token t is predicted at t - 1; a decoder of its own predicts it at t.
    """

    inputs: Mapping[str, torch.Tensor]
    labels: torch.Tensor
    own: torch.Tensor
    shifted: bool

    @property
    def masks(self) -> tuple[torch.Tensor, ...]:
        """1 for tokens, 0 for padding ``(B, T)``, of the input and of a decoder's; their widths differ."""
        given = self.inputs["attention_mask"]
        return (given,) if self.shifted else (given, (self.labels != _NO_LABEL).to(given))

    @property
    def learned(self) -> int:
        """Number of answer tokens."""
        return int((self.labels != _NO_LABEL).sum())

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the answer tokens, summed.

        Args:
            logits (torch.Tensor): ``(B, T, V)``.

        Returns:
            torch.Tensor: scalar, in float32 or wider.
        """
        logits, labels = (logits[:, :-1], self.labels[:, 1:]) if self.shifted else (logits, self.labels)
        # Only what is learned is widened: all of it would be the largest tensor of the step.
        kept = labels != _NO_LABEL
        chosen = logits[kept]
        wide = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
        return torch.nn.functional.cross_entropy(wide, labels[kept], reduction="sum")


def draw(examples: Sequence[Encoded], count: int, seed: Sequence[int]) -> list[Encoded]:
    """Examples of one step: an adapter uniformly, then one of its examples uniformly (MAPLE, Algorithm 1).

    Args:
        examples (Sequence[Encoded]): the data.
        count (int): examples of the step.
        seed (Sequence[int]): the run's seed, phase and step, so that a resumed run draws alike.

    Returns:
        list[Encoded]: ``count`` of them; repetitions are possible.
    """
    rng = np.random.default_rng(tuple(seed))
    tasks: dict[int, list[Encoded]] = {}
    for each in examples:
        tasks.setdefault(each.adapter, []).append(each)
    names = list(tasks)
    chosen = [tasks[names[rng.integers(len(names))]] for _ in range(count)]
    return [task[rng.integers(len(task))] for task in chosen]


def collate(examples: Sequence[Encoded], pad: int, model: Any, encoder: bool, device: torch.device) -> Batch:
    """Pad examples to one length.

    Args:
        examples (Sequence[Encoded]): at least one.
        pad (int): token that fills up.
        model (PreTrainedModel): makes a decoder's inputs of its labels, where it has one of its own.
        encoder (bool): whether it has.
        device (torch.device): where the tensors go.

    Returns:
        Batch: with a row per example.
    """
    own = torch.tensor([each.adapter for each in examples], device=device)
    if encoder:
        ids, mask = _padded([each.prompt for each in examples], pad, device)
        # Of another width than the prompts, so that a module's inputs say which of both they are.
        wider = max(len(each.answer) for each in examples) == ids.shape[1]
        labels, kept = _padded([each.answer for each in examples], pad, device, extra=int(wider))
        labels = labels.masked_fill(kept == 0, _NO_LABEL)
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=labels),
        }
        return Batch(inputs, labels, own, shifted=False)
    ids, mask = _padded([each.prompt + each.answer for each in examples], pad, device)
    steps = torch.arange(ids.shape[1], device=device)
    starts = torch.tensor([len(each.prompt) for each in examples], device=device)
    labels = ids.masked_fill((steps < starts.unsqueeze(-1)) | (mask == 0), _NO_LABEL)
    return Batch({"input_ids": ids, "attention_mask": mask}, labels, own, shifted=True)


def predict(model: Any, batch: Batch, precision: str) -> torch.Tensor:
    """Run a model over a batch.

    Args:
        model (PreTrainedModel): any with logits.
        batch (Batch): from :func:`collate`.
        precision (str): ``float32``, or ``bfloat16`` for autocast.

    Returns:
        torch.Tensor: logits ``(B, T, V)``.
    """
    bfloat16 = precision == "bfloat16"
    cast = torch.autocast(batch.labels.device.type, dtype=torch.bfloat16) if bfloat16 else nullcontext()
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with cast:
        return model(**batch.inputs, **options).logits


def _padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device, extra: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows)) + extra
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask
