"""Adapters of one tiny Llama with examples of their tasks, runs over them, and what no run may change."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compose_models import ALL, ATTENTION, MLP, llama, prompt_ids, save_adapter
from peft import LoraConfig, get_peft_model

from hub_router.composition.attach import routed_updates
from hub_router.composition.build import compose
from hub_router.composition.routed import RoutedModel
from hub_router.features import Vectors
from hub_router.progress import Advance
from hub_router.training import Example, FitResult, TrainingSettings, fit
from hub_router.training.batches import collate
from hub_router.training.data import encode

METHODS = ["phatgoose", "maple", "lora-mixer"]
# xlora needs a model without an encoder.
DECODER_METHODS = [*METHODS, "xlora"]
SHORT = TrainingSettings(steps=5, batch_size=8, learning_rate=1e-2, warmup=0.0)
KINDS: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION},
    "mlp": {"r": 8, "lora_alpha": 4, "target_modules": MLP, "use_rslora": True},
    "all": {"r": 3, "lora_alpha": 6, "target_modules": ALL},
    "layer": {"r": 2, "lora_alpha": 8, "target_modules": ATTENTION, "layers_to_transform": [1]},
}


def save_pool(root: Path) -> dict[str, Path]:
    return {name: save_adapter(llama(), root / name, seed, **kind) for seed, (name, kind) in enumerate(KINDS.items())}


def make_examples(pool: Mapping[str, Path], tokenizer: Any, count: int = 12, seed: int = 0) -> list[Example]:
    """Prompts of random letters; the answer is the letter that the base model with the task's adapter likes best."""
    letters = tokenizer(string.ascii_lowercase, add_special_tokens=False)["input_ids"]
    draw = random.Random(seed)
    found = []
    for name in pool:
        routed = compose(llama(), pool, "single", adapter=name)
        for _ in range(count):
            prompt = "".join(draw.choices(string.ascii_lowercase, k=draw.randint(3, 9))) + " "
            with torch.no_grad():
                logits = routed(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
            found.append(Example(name, prompt, string.ascii_lowercase[int(logits[letters].argmax())]))
    return found


# Two adapters for each answer, so that one is left when the other is masked.
TWINS = {"add": "yes", "sum": "yes", "cut": "no", "del": "no"}


def twin_examples(count: int = 12) -> list[Example]:
    """The first letters of a prompt say what to answer."""
    draw = random.Random(1)
    return [
        Example(name, f"{name} {''.join(draw.choices(string.ascii_lowercase, k=4))}:", answer)
        for name, answer in TWINS.items()
        for _ in range(count)
    ]


def train_twins(root: Path, tokenizer: Any) -> dict[str, Path]:
    """Adapters that PEFT trained, each on its own task alone."""
    folders = {}
    for seed, name in enumerate(TWINS):
        torch.manual_seed(seed)
        wrapped = get_peft_model(llama(), LoraConfig(r=2, lora_alpha=4, target_modules=ALL, lora_dropout=0.0))
        optimizer = torch.optim.AdamW([each for each in wrapped.parameters() if each.requires_grad], lr=3e-2)
        own = [each for each in twin_examples() if each.adapter == name]
        batch = collate(encode(own, tuple(TWINS), tokenizer, None, False), 0, wrapped, False, torch.device("cpu"))
        for _ in range(30):
            optimizer.zero_grad()
            (batch.loss(wrapped(**batch.inputs).logits) / batch.learned).backward()
            optimizer.step()
        wrapped.save_pretrained(root / name)
        folders[name] = root / name
    return folders


def logits(routed: RoutedModel) -> torch.Tensor:
    with torch.no_grad():
        return routed(input_ids=prompt_ids(2, 9)).logits


def same_vectors(one: Vectors, other: Vectors) -> bool:
    """Every bit of every vector."""
    return {name: set(each) for name, each in one.items()} == {name: set(each) for name, each in other.items()} and all(
        np.array_equal(vector, other[name][module]) for name, each in one.items() for module, vector in each.items()
    )


def distance(one: Vectors, other: Vectors) -> float:
    """Largest difference of two sets of the same adapters and modules."""
    assert {name: set(each) for name, each in one.items()} == {name: set(each) for name, each in other.items()}
    return max(
        float(np.abs(vector - other[name][module]).max())
        for name, each in one.items()
        for module, vector in each.items()
    )


class Frozen:
    """A routed model's state apart from its vectors, and the process's random state.

    Args:
        routed (RoutedModel): as it is now.
    """

    def __init__(self, routed: RoutedModel) -> None:
        self._routed = routed
        self._before = self._state()

    def check(self) -> None:
        """All of it is as it was."""
        now = self._state()
        assert now.keys() == self._before.keys()
        for name, value in self._before.items():
            same = torch.equal(value, now[name]) if isinstance(value, torch.Tensor) else value == now[name]
            assert same, name

    def _state(self) -> dict[str, Any]:
        model = self._routed.model
        found: dict[str, Any] = {f"parameter {n}": p.detach().clone() for n, p in model.named_parameters()}
        found |= {f"requires_grad {n}": p.requires_grad for n, p in model.named_parameters()}
        found |= {f"grad {n}": p.grad is None for n, p in model.named_parameters()}
        # The updates' own flag means nothing.
        found |= {f"training {n}": m.training for n, m in model.named_modules() if not n.endswith("hub_router_update")}
        found |= {
            f"buffer {n}": b.detach().clone()
            for n, b in model.named_buffers()
            if not n.endswith("hub_router_update.router_P")
        }
        found |= {f"router {u.module}": type(u.router).__name__ for _, u in routed_updates(model)}
        found |= {f"handles {u.module}": len(u.handles) for _, u in routed_updates(model)}
        found["torch"] = torch.random.get_rng_state().clone()
        found["numpy"] = np.random.get_state()[1].tolist()  # type: ignore[index]
        found["python"] = random.getstate()
        found["threads"] = torch.get_num_threads()
        found["grad mode"] = torch.is_grad_enabled()
        return found


class Watch:
    """Progress that remembers its notes, and may stop the run.

    Args:
        stop_at (int | None): raise after that many steps.
    """

    def __init__(self, stop_at: int | None = None) -> None:
        self.notes: list[str] = []
        self.label, self.total, self.done = "", -1, 0
        self._stop_at = stop_at

    @contextmanager
    def task(self, label: str, total: int | None) -> Iterator[Advance]:
        self.label, self.total = label, total or -1

        def advance(steps: int, note: str = "") -> None:
            self.done += steps
            self.notes.append(note)
            if self.done == self._stop_at:
                raise KeyboardInterrupt

        yield advance


def train(
    pool: dict[str, Path],
    tokenizer: Any,
    examples: Sequence[Example],
    method: str,
    settings: TrainingSettings = SHORT,
    model: Any = None,
    **options: Any,
) -> tuple[RoutedModel, FitResult]:
    hyperparameters = {name: options.pop(name) for name in ("top_k", "parent") if name in options}
    routed = compose(llama() if model is None else model, pool, method, tokenizer=tokenizer, **hyperparameters)
    return routed, fit(routed, examples, settings=settings, **options)
