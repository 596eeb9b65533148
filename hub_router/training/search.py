"""The loop without gradients: a number per adapter, proposed by an optimizer that is told each proposal's loss."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce

from hub_router.composition.text import has_encoder
from hub_router.errors import TrainingError
from hub_router.progress import Progress
from hub_router.training import checkpoint
from hub_router.training.batches import collate, predict
from hub_router.training.data import Encoded
from hub_router.training.gating import Reading, TrainedGate
from hub_router.training.loop import Outcome
from hub_router.training.recipe import Phase, Searcher, SearchRecipe
from hub_router.training.settings import TrainingSettings

# What the optimizer is told of weights whose loss is no number, in nats; far above any loss that is one.
_WORST = 1e4
# Of the loop's settings those that mean something here.
SEARCH_SETTINGS = ("steps", "batch_size", "precision", "validation", "seed")


@dataclass(eq=False)
class Search:
    """A run over a routed model whose gates :func:`~hub_router.training.gating.training` holds.

    A checkpoint holds every proposal with its loss. A run that goes on tells them to a fresh optimizer of the same
    seed, which then proposes what the stopped one would have.

    Args:
        model (PreTrainedModel): the routed model's.
        gates (Mapping[str, TrainedGate]): by module path.
        recipe (SearchRecipe): the method's.
        phase (Phase): whose vectors are searched for.
        adapters (Sequence[str]): names of the pool.
        settings (TrainingSettings): ``steps`` is the number of evaluations.
        reading (Reading): what the gates are told of each batch.
        pad (int): token that fills up a batch.
        fingerprint (Mapping[str, Any]): of the run, for its checkpoints.
        checkpoint (Path | None): folder for them; one is written after every evaluation.
        log (Path | None): file that gets a JSON line per evaluation.
    """

    model: Any
    gates: Mapping[str, TrainedGate]
    recipe: SearchRecipe
    phase: Phase
    adapters: Sequence[str]
    settings: TrainingSettings
    reading: Reading
    pad: int
    fingerprint: Mapping[str, Any]
    checkpoint: Path | None
    log: Path | None

    def go(self, learned: Sequence[Encoded], held: Sequence[Encoded], progress: Progress) -> Outcome:
        """Search; the gates hold the best weights afterwards.

        Args:
            learned (Sequence[Encoded]): examples, of which some are evaluated.
            held (Sequence[Encoded]): examples set aside; may be empty.
            progress (Progress): a task of all evaluations.

        Returns:
            Outcome: loss of the best weights without their penalty, and evaluations as steps.

        Raises:
            TrainingError: no number of evaluations, a checkpoint of another run, or no weights with a finite loss.
        """
        total = self.settings.steps
        if total is None:
            raise TrainingError(
                f"{self.recipe.name} is trained by so many evaluations on the same few examples, not epochs; set steps"
            )
        self._device = next(self.model.parameters()).device
        self._ranks = PartialState(cpu=self._device.type == "cpu")
        self._leaves = {name: gate for name, gate in self.gates.items() if gate.select(self.phase.vectors) is not None}
        examples = few(learned, self.recipe.shots, self.settings.seed)
        told = self._restore()
        optimizer = self.recipe.optimizer(len(self.adapters), total, self.settings.seed)
        try:
            with progress.task(f"training {self.recipe.name}", total) as advance:
                for step in range(total):
                    advance(1, self._step(step, optimizer, told, examples))
        finally:
            optimizer.close()
        return self._end(told, held)

    def _step(self, step: int, optimizer: Searcher, told: list[dict[str, Any]], examples: Sequence[Encoded]) -> str:
        """One evaluation, unless it is done already; a note for whoever watches."""
        weights = optimizer.ask()
        if step < len(told):
            self._need_same(weights, told[step])
        else:
            told.append(self._evaluated(step, weights, examples))
            self._save(told)
        values = [each["loss"] + each["penalty"] for each in told[: step + 1]]
        optimizer.tell(values[-1] if math.isfinite(values[-1]) else _WORST)
        best = min((each for each in values if math.isfinite(each)), default=math.nan)
        return f"loss {told[step]['loss']:.3f}, best {best:.3f} with penalty"

    def _end(self, told: Sequence[Mapping[str, Any]], held: Sequence[Encoded]) -> Outcome:
        """Put the best weights into the model."""
        usable = [each for each in told if math.isfinite(each["loss"])]
        if not usable:
            raise TrainingError(
                f"{self.recipe.name}: none of {len(told)} proposals has a finite loss; load the base model in bfloat16 "
                "or float32"
            )
        kept = min(usable, key=lambda each: each["loss"] + each["penalty"])
        self._set(kept["weights"])
        for gate in self.gates.values():
            gate.put()
        validation = self._loss(held) if held else None
        return Outcome(kept["loss"], validation, len(told))

    def _evaluated(self, step: int, weights: Sequence[float], examples: Sequence[Encoded]) -> dict[str, Any]:
        started = perf_counter()
        self._set(weights)
        return {
            "phase": self.phase.title,
            "step": step,
            "loss": self._loss(examples),
            "penalty": self.recipe.penalty(weights),
            "weights": list(weights),
            "seconds": perf_counter() - started,
        }

    @torch.no_grad()
    def _set(self, weights: Sequence[float]) -> None:
        """Give every module its candidates' weights."""
        for gate in self._leaves.values():
            chosen = [weights[expert] for expert in gate.experts]
            gate.vectors.copy_(torch.tensor(chosen).unsqueeze(-1))

    @torch.no_grad()
    def _loss(self, examples: Sequence[Encoded]) -> float:
        """Mean loss of the answer tokens."""
        self.model.eval()
        ranks, size = self._ranks, self.settings.batch_size
        mine = examples[ranks.process_index :: ranks.num_processes]
        total = 0.0
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            batch = collate(part, self.pad, self.model, has_encoder(self.model), self._device)
            self.reading.begin(batch.own, batch.masks, spreading=False, observing=False)
            total += float(batch.loss(predict(self.model, batch, self.settings.precision)))
        if ranks.num_processes > 1:
            total = float(reduce(torch.tensor(total, device=self._device), "sum"))
        return total / sum(len(each.answer) for each in examples)

    def _need_same(self, weights: Sequence[float], entry: Mapping[str, Any]) -> None:
        if list(weights) != list(entry["weights"]):
            raise TrainingError(
                f"{self.checkpoint}: evaluation {entry['step']} was of {entry['weights']}, while the optimizer now "
                f"proposes {list(weights)}, so it is of another version; remove the folder to start anew"
            )

    def _save(self, told: Sequence[Mapping[str, Any]]) -> None:
        if not self._ranks.is_main_process:
            return
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(self._line(told[-1]))
        if self.checkpoint is not None:
            checkpoint.save(self.checkpoint, self.fingerprint, {"told": json.dumps(list(told))})

    def _restore(self) -> list[dict[str, Any]]:
        """The evaluations that are done, which the log then begins with."""
        found = None if self.checkpoint is None else checkpoint.load(self.checkpoint, self.fingerprint)
        told = [] if found is None else json.loads(found["told"])
        if self.log is not None and self._ranks.is_main_process:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.log.write_text("".join(map(self._line, told)), encoding="utf-8")
        return told

    def _line(self, entry: Mapping[str, Any]) -> str:
        named = dict(zip(self.adapters, entry["weights"], strict=True))
        return json.dumps({**entry, "weights": named}) + "\n"


def few(examples: Sequence[Encoded], shots: int, seed: int) -> list[Encoded]:
    """Some examples of every adapter's task.

    Args:
        examples (Sequence[Encoded]): the data.
        shots (int): how many of each; all, where there are fewer.
        seed (int): of the choice.

    Returns:
        list[Encoded]: in the order of the data.
    """
    places: dict[int, list[int]] = {}
    for place, each in enumerate(examples):
        places.setdefault(each.adapter, []).append(place)
    kept = [
        own[chosen]
        for own in places.values()
        for chosen in np.random.default_rng((seed, len(own))).permutation(len(own))[:shots]
    ]
    return [examples[place] for place in sorted(kept)]
