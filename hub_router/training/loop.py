"""The loop: steps of AdamW on the vectors of one phase after another, with checkpoints, log and early stop."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce

from hub_router.composition.text import has_encoder
from hub_router.errors import TrainingError
from hub_router.progress import Advance, Progress
from hub_router.training import checkpoint
from hub_router.training.batches import Batch, collate, draw, predict
from hub_router.training.data import Encoded
from hub_router.training.gating import Reading, Trainable
from hub_router.training.recipe import Objective, Phase
from hub_router.training.settings import TrainingSettings

# Between two checkpoints, where steps take longer than that.
_SECONDS = 60.0
# Steps between two looks at the routing entropy, which costs a few small operations per module.
_OBSERVED = 10


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Args:
        loss (float): mean task loss over the last tenth of each phase's steps, nats per answer token.
        validation (float | None): mean over phases of the best loss on the examples set aside.
        steps (int): optimizer steps, of all phases.
    """

    loss: float
    validation: float | None
    steps: int


@dataclass(eq=False)
class _Position:
    """Where a run stands; all of it is in a checkpoint."""

    phase: int = 0
    step: int = 0
    steps: int = 0
    # Of the phase at hand: losses of its steps, best validation loss, its vectors, evaluations without a better one.
    losses: list[float] = field(default_factory=list)
    best: float = math.inf
    best_vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    stale: int = 0
    # Of the phases that are done.
    final_losses: list[float] = field(default_factory=list)
    final_validations: list[float] = field(default_factory=list)


@dataclass(eq=False)
class Loop:
    """A run over a model whose trained tensors take gradients, such as the gates of a routed one.

    Args:
        model (PreTrainedModel): what is run.
        gates (Mapping[str, Trainable]): by module path, as :func:`~hub_router.training.gating.training` yields them.
        recipe (Objective): the method's.
        phases (Sequence[Phase]): its parts.
        settings (TrainingSettings): of the loop.
        reading (Reading): what the gates are told of each batch.
        pad (int): token that fills up a batch.
        fingerprint (Mapping[str, Any]): of the run, for its checkpoints.
        checkpoint (Path | None): folder for them.
        log (Path | None): file that gets a JSON line per step.
    """

    model: Any
    gates: Mapping[str, Trainable]
    recipe: Objective
    phases: Sequence[Phase]
    settings: TrainingSettings
    reading: Reading
    pad: int
    fingerprint: Mapping[str, Any]
    checkpoint: Path | None
    log: Path | None

    def go(self, learned: Sequence[Encoded], held: Sequence[Encoded], progress: Progress) -> Outcome:
        """Train all phases; the gates hold the vectors afterwards.

        Args:
            learned (Sequence[Encoded]): examples to learn from.
            held (Sequence[Encoded]): examples set aside; may be empty.
            progress (Progress): a task of all steps.

        Returns:
            Outcome: losses and steps.

        Raises:
            TrainingError: a checkpoint of another run, or a loss that is no number.
        """
        self._device = next(self.model.parameters()).device
        self._ranks = PartialState(cpu=self._device.type == "cpu")
        position, optimizer_state = self._restore()
        adapters = [each.adapter for each in learned]
        totals = [planned_steps(phase, adapters, self.settings) for phase in self.phases]
        going_on = f", going on from step {position.steps}" if position.steps else ""
        with progress.task(f"training {self.recipe.name}{going_on}", sum(totals)) as advance:
            advance(position.steps)
            while position.phase < len(self.phases):
                self._phase(position, optimizer_state, totals[position.phase], learned, held, advance)
                optimizer_state = None
        validations = position.final_validations
        return Outcome(
            loss=sum(position.final_losses) / len(position.final_losses),
            validation=sum(validations) / len(validations) if validations else None,
            steps=position.steps,
        )

    def _phase(
        self,
        position: _Position,
        optimizer_state: dict[str, Any] | None,
        total: int,
        learned: Sequence[Encoded],
        held: Sequence[Encoded],
        advance: Advance,
    ) -> None:
        """Train one phase to its end, from wherever it stands."""
        phase, settings = self.phases[position.phase], self.settings
        leaves = self._leaves(phase)
        if optimizer_state is not None:
            with torch.no_grad():
                for name, leaf in leaves.items():
                    leaf.copy_(optimizer_state["vectors"][name])
        optimizer = torch.optim.AdamW(
            list(leaves.values()), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        if optimizer_state is not None:
            optimizer.load_state_dict(optimizer_state["optimizer"])
        own = [each for each in learned if each.adapter in phase.tasks]
        aside = [each for each in held if each.adapter in phase.tasks]
        while position.step < total:
            note = self._step(position, optimizer, list(leaves.values()), own, total)
            position.step += 1
            position.steps += 1
            advance(1, note)
            last = position.step == total
            due = settings.evaluate_every and position.step % settings.evaluate_every == 0
            if aside and (due or last) and not self._goes_on(position, leaves, aside):
                break
            late = perf_counter() - self._saved > _SECONDS
            if (late or position.step % settings.save_every == 0) and not last:
                self._save(position, leaves, optimizer)
        self._end(position, leaves)
        self._save(position, {}, None)

    def _leaves(self, phase: Phase) -> dict[str, torch.Tensor]:
        """The vectors of a phase that take a gradient, by module."""
        found = {name: gate.select(phase.vectors) for name, gate in self.gates.items()}
        leaves = {name: leaf for name, leaf in found.items() if leaf is not None}
        if not leaves:
            raise TrainingError(f"phase {phase.title!r} has nothing to train: its adapters are candidates nowhere")
        return leaves

    def _step(
        self,
        position: _Position,
        optimizer: torch.optim.Optimizer,
        leaves: Sequence[torch.Tensor],
        examples: Sequence[Encoded],
        total: int,
    ) -> str:
        """One step of the optimizer; a note for whoever watches."""
        settings, started = self.settings, perf_counter()
        draws = (settings.seed, position.phase, position.step)
        batch = draw(examples, settings.batch_size, draws)
        # Dropout of the base model draws alike, too, when a run goes on.
        torch.manual_seed(int(np.random.default_rng(draws).integers(2**62)))
        self.model.train()
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(position.step, total)
        observed = position.step % _OBSERVED == 0
        task, balance = self._backward(batch, position.step / total, observed)
        if self._ranks.num_processes > 1:
            for leaf in leaves:
                leaf.grad = reduce(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, "sum")
        norm = float(torch.nn.utils.clip_grad_norm_(leaves, settings.clip))
        if not math.isfinite(task + balance) or not math.isfinite(norm):
            raise TrainingError(
                f"{self.recipe.name}, step {position.step}: the loss is {task + balance}, its gradient {norm} long; "
                f"lower learning_rate ({settings.learning_rate}), or load the base model in bfloat16 or float32"
            )
        optimizer.step()
        position.losses.append(task)
        line = {
            "phase": self.phases[position.phase].title,
            "step": position.step,
            "loss": task,
            "balance": balance,
            "learning_rate": settings.rate(position.step, total),
            "gradient_norm": norm,
            "seconds": perf_counter() - started,
        }
        if self._entropies:
            self._entropy = line["entropy"] = float(torch.stack(self._entropies).mean())
        self._write(line)
        return f"loss {task:.3f}" + ("" if math.isnan(self._entropy) else f", entropy {self._entropy:.2f}")

    def _backward(self, batch: Sequence[Encoded], done: float, observed: bool) -> tuple[float, float]:
        """Gradients of a batch, part by part; its task loss per answer token and its balance loss."""
        tokens = sum(len(each.answer) for each in batch)
        ranks, settings = self._ranks, self.settings
        mine = batch[ranks.process_index :: ranks.num_processes]
        size = math.ceil(len(mine) / settings.accumulation)
        sums = torch.zeros(2, dtype=torch.float64)
        self._entropies: list[torch.Tensor] = []
        for start in range(0, len(mine), max(size, 1)):
            part = mine[start : start + size]
            task, spreads = self._forward(part, observed)
            loss = task / tokens
            beside = self.recipe.balance(spreads, done)
            if beside is not None:
                beside = beside * (len(part) / len(batch))
                loss = loss + beside
            loss.backward()
            beside_value = 0.0 if beside is None else float(beside.detach())
            sums += torch.tensor([float(task.detach()) / tokens, beside_value], dtype=torch.float64)
        if ranks.num_processes > 1:
            sums = reduce(sums.to(self._device, torch.float32), "sum")
        return float(sums[0]), float(sums[1])

    def _forward(self, examples: Sequence[Encoded], observed: bool) -> tuple[torch.Tensor, Any]:
        """Sum of the answer tokens' losses, and how the modules spread the tokens."""
        batch = self._collated(examples)
        spreads, entropies = self.reading.begin(batch.own, batch.masks, spreading=True, observing=observed)
        logits = self._logits(batch)
        self.reading.close()
        self._entropies += entropies
        return batch.loss(logits), spreads

    def _collated(self, examples: Sequence[Encoded]) -> Batch:
        return collate(examples, self.pad, self.model, has_encoder(self.model), self._device)

    def _logits(self, batch: Batch) -> torch.Tensor:
        return predict(self.model, batch, self.settings.precision)

    def _goes_on(self, position: _Position, leaves: Mapping[str, torch.Tensor], aside: Sequence[Encoded]) -> bool:
        """Evaluate; keep the vectors if they are the best; whether the phase goes on."""
        loss = self._evaluate(aside)
        self._write({"phase": self.phases[position.phase].title, "step": position.step - 1, "validation_loss": loss})
        if loss < position.best:
            position.best, position.stale = loss, 0
            position.best_vectors = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        else:
            position.stale += 1
        return not self.settings.patience or position.stale < self.settings.patience

    @torch.no_grad()
    def _evaluate(self, examples: Sequence[Encoded]) -> float:
        """Mean loss of the answer tokens by the rule that is trained."""
        self.model.eval()
        total = 0.0
        for part in _parts(examples, self.settings.batch_size):
            batch = self._collated(part)
            self.reading.begin(batch.own, batch.masks, spreading=False, observing=False)
            total += float(batch.loss(self._logits(batch)))
        return total / sum(len(each.answer) for each in examples)

    def _end(self, position: _Position, leaves: Mapping[str, torch.Tensor]) -> None:
        """Put a phase's vectors, its best ones where that is known, into the model, and go to the next one."""
        with torch.no_grad():
            for name, vectors in position.best_vectors.items():
                leaves[name].copy_(vectors)
        for gate in self.gates.values():
            gate.put()
        recent = position.losses[-max(1, len(position.losses) // 10) :]
        position.final_losses.append(sum(recent) / len(recent))
        if math.isfinite(position.best):
            position.final_validations.append(position.best)
        position.phase, position.step, position.losses = position.phase + 1, 0, []
        position.best, position.best_vectors, position.stale = math.inf, {}, 0

    def _save(
        self, position: _Position, leaves: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer | None
    ) -> None:
        if self.checkpoint is None or not self._ranks.is_main_process:
            return
        self._saved = perf_counter()
        running = None
        if optimizer is not None:
            vectors = {name: leaf.detach() for name, leaf in leaves.items()}
            running = {"vectors": vectors, "optimizer": optimizer.state_dict()}
        stored = {name: gate.stored for name, gate in self.gates.items()}
        checkpoint.save(
            self.checkpoint, self.fingerprint, {"position": dict(vars(position)), "stored": stored, "running": running}
        )

    def _restore(self) -> tuple[_Position, dict[str, Any] | None]:
        """Where the run stands: at its beginning, or where its checkpoint was written."""
        self._entropy, self._saved = math.nan, perf_counter()
        found = None if self.checkpoint is None else checkpoint.load(self.checkpoint, self.fingerprint)
        if found is None:
            self._begin_log(0, 0)
            return _Position(), None
        for name, gate in self.gates.items():
            gate.stored.copy_(found["stored"][name])
        position = _Position(**found["position"])
        self._begin_log(position.phase, position.step)
        return position, found["running"]

    def _begin_log(self, phase: int, step: int) -> None:
        """Drop the log's lines of steps that will be done again."""
        if self.log is None or not self._ranks.is_main_process:
            return
        before = {each.title for each in self.phases[:phase]}
        here = self.phases[phase].title if phase < len(self.phases) else None
        kept = []
        if (phase, step) != (0, 0) and self.log.exists():
            for line in self.log.read_text(encoding="utf-8").splitlines():
                entry = _entry(line)
                if entry is None:
                    continue
                if entry["phase"] in before or (entry["phase"] == here and entry["step"] < step):
                    kept.append(line + "\n")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_text("".join(kept), encoding="utf-8")

    def _write(self, line: Mapping[str, Any]) -> None:
        if self.log is not None and self._ranks.is_main_process:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _entry(line: str) -> dict[str, Any] | None:
    """A line of a log; None for one that a kill has torn."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and {"phase", "step"} <= entry.keys() else None


def is_log(path: Path) -> bool:
    """Whether a file is the log of a run.

    Args:
        path (Path): an existing file.

    Returns:
        bool: by its first line.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        return _entry(file.readline()) is not None


def planned_steps(phase: Phase, adapters: Sequence[int], settings: TrainingSettings) -> int:
    """Optimizer steps of a phase, where no patience ends it.

    Args:
        phase (Phase): of a run.
        adapters (Sequence[int]): pool position of the adapter of each example to learn from.
        settings (TrainingSettings): of the loop.

    Returns:
        int: at least 1.
    """
    if settings.steps is not None:
        return settings.steps
    count = sum(adapter in phase.tasks for adapter in adapters)
    return max(1, math.ceil(count * settings.epochs / settings.batch_size))


def _parts(examples: Sequence[Encoded], size: int) -> Iterator[Sequence[Encoded]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]
