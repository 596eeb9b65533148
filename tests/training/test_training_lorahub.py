"""LoRAHub's search: each evaluation against a float64 reference, what is kept, resuming, and what is refused."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compose_models import ATTENTION, llama, save_adapter
from training_models import Frozen, Watch, logits, make_examples, same_vectors

from hub_router.composition.assemble import stack
from hub_router.composition.build import compose
from hub_router.composition.routed import RoutedModel
from hub_router.errors import MethodError, TrainingError
from hub_router.lora.reader import read_adapter
from hub_router.prototypes import read_prototypes, write_prototypes
from hub_router.training import Example, TrainingSettings, checkpoint, fit
from hub_router.training.data import Encoded, encode, split
from hub_router.training.lorahub import LorahubRecipe
from hub_router.training.recipe import SearchRecipe
from hub_router.training.registry import RECIPES, create_recipe, recipe_options
from hub_router.training.search import few

PROGRAM = Path(__file__).with_name("training_run.py")
SHORT = TrainingSettings(steps=9, batch_size=4)


@pytest.fixture(scope="module")
def equal(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three adapters of rank 4, the last of one layer alone."""
    root = tmp_path_factory.mktemp("equal")
    more: dict[str, dict[str, Any]] = {"a": {}, "b": {}, "c": {"layers_to_transform": [1]}}
    return {
        name: save_adapter(llama(), root / name, seed, r=4, lora_alpha=4, target_modules=ATTENTION, **options)
        for seed, (name, options) in enumerate(more.items())
    }


@pytest.fixture(scope="module")
def data(equal: dict[str, Path], tokenizer: Any) -> list[Example]:
    return make_examples(equal, tokenizer, count=7)


@pytest.fixture
def routed(equal: dict[str, Path], tokenizer: Any) -> RoutedModel:
    return compose(llama(), equal, "lorahub", tokenizer=tokenizer)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def true_loss(equal: Mapping[str, Path], weights: Mapping[str, float], examples: Sequence[Encoded]) -> float:
    """A model whose weights are W + (sum w B) (sum w A), example by example and token by token, in float64."""
    model = llama().double()
    bank = stack([read_adapter(path, name=name) for name, path in equal.items()])
    names = list(equal)
    with torch.no_grad():
        for name, module in bank.modules.items():
            A = sum(
                weights[names[e]] * module.A[part].double()
                for e, part in zip(module.experts, module.slices, strict=True)
            )
            B = sum(
                weights[names[e]] * module.B[:, part].double()
                for e, part in zip(module.experts, module.slices, strict=True)
            )
            model.get_submodule(name).weight.add_(B @ A)
        total, count = 0.0, 0
        for each in examples:
            ids = each.prompt + each.answer
            scores = model(input_ids=torch.tensor([ids])).logits[0]
            for place in range(len(each.prompt), len(ids)):
                row = scores[place - 1]
                total += math.log(sum(math.exp(float(value)) for value in row)) - float(row[ids[place]])
                count += 1
    return total / count


def test_every_evaluation_is_the_papers_loss(
    routed: RoutedModel, equal: dict[str, Path], data: list[Example], tokenizer: Any, tmp_path: Path
) -> None:
    # Of adapter a's task, so that some of its update is better than none.
    data = [each for each in data if each.adapter == "a"]
    result = fit(routed, data, settings=SHORT, log=tmp_path / "log.jsonl", shots=5)
    encoded = few(encode(data, routed.adapters, tokenizer, 128, encoder=False), 5, 0)
    assert len(encoded) == 5
    log = lines(tmp_path / "log.jsonl")
    assert [line["step"] for line in log] == list(range(9))
    assert not any(log[0]["weights"].values())
    for line in log:
        assert list(line["weights"]) == ["a", "b", "c"]
        assert line["loss"] == pytest.approx(true_loss(equal, line["weights"], encoded), rel=1e-5)
        assert line["penalty"] == pytest.approx(0.05 * sum(abs(w) for w in line["weights"].values()) / 3, rel=1e-12)
        assert all(abs(weight) <= 1.5 for weight in line["weights"].values())
    best = min(log, key=lambda line: line["loss"] + line["penalty"])
    assert best["step"] > 0
    assert (result.loss, result.steps) == (best["loss"], 9)
    for name, vectors in routed.vectors.items():
        assert len(vectors) == (2 if name == "c" else 4)
        assert all(vector.tolist() == [np.float32(best["weights"][name])] for vector in vectors.values())


def test_it_finds_weights_that_beat_the_base_model(routed: RoutedModel, data: list[Example], tmp_path: Path) -> None:
    # The answers are what the model says with adapter a alone.
    own = [each for each in data if each.adapter == "a"]
    fit(routed, own, log=tmp_path / "log.jsonl", shots=7)
    log = lines(tmp_path / "log.jsonl")
    assert len(log) == 40
    assert min(line["loss"] + line["penalty"] for line in log) < 0.9 * log[0]["loss"]


def test_same_seed_same_weights_and_nothing_else_changes(
    equal: dict[str, Path], data: list[Example], tokenizer: Any
) -> None:
    found = []
    for _ in range(2):
        routed = compose(llama(), equal, "lorahub", tokenizer=tokenizer)
        frozen = Frozen(routed)
        fit(routed, data, settings=SHORT)
        frozen.check()
        found.append(routed.vectors)
    assert same_vectors(*found)
    other = compose(llama(), equal, "lorahub", tokenizer=tokenizer)
    fit(other, data, settings=TrainingSettings(steps=9, batch_size=3))
    # How examples are put together does not matter beyond rounding.
    first, second = (each["a"]["model.layers.0.self_attn.q_proj"] for each in (found[0], other.vectors))
    assert abs(first - second) < 1e-3


def test_a_set_is_composed_as_it_was_trained(
    routed: RoutedModel, equal: dict[str, Path], data: list[Example], tokenizer: Any, tmp_path: Path
) -> None:
    before = logits(routed)
    result = fit(routed, data, settings=SHORT)
    write_prototypes(tmp_path / "set.safetensors", result.prototypes)
    expected = logits(routed)
    assert not torch.equal(before, expected)
    again = compose(llama(), equal, "lorahub", tokenizer=tokenizer, prototypes=str(tmp_path / "set.safetensors"))
    assert torch.equal(logits(again), expected)
    routed.save(tmp_path / "saved")
    assert torch.equal(logits(RoutedModel.load(tmp_path / "saved", model=llama())), expected)


def test_validation_is_of_the_best_weights(
    routed: RoutedModel, equal: dict[str, Path], data: list[Example], tokenizer: Any, tmp_path: Path
) -> None:
    settings = TrainingSettings(steps=6, validation=0.3)
    result = fit(routed, data, settings=settings, log=tmp_path / "log.jsonl")
    best = min(lines(tmp_path / "log.jsonl"), key=lambda line: line["loss"] + line["penalty"])
    held = encode(split(data, 0.3, 0)[1], routed.adapters, tokenizer, 128, encoder=False)
    assert result.validation == pytest.approx(true_loss(equal, best["weights"], held), rel=1e-5)


def run(spec: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), str(spec)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_killed_and_resumed(equal: dict[str, Path], data: list[Example], tmp_path: Path) -> None:
    common = {
        "pool": {name: str(path) for name, path in equal.items()},
        "model": {},
        "method": "lorahub",
        "examples": [astuple(each) for each in data],
        "settings": {"steps": 9, "batch_size": 4},
        "options": {"shots": 3},
    }
    runs = {
        "killed": {"checkpoint": str(tmp_path / "c"), "log": str(tmp_path / "resumed.jsonl"), "kill_after": 5},
        "resumed": {"checkpoint": str(tmp_path / "c"), "log": str(tmp_path / "resumed.jsonl"), "kill_after": None},
        "whole": {"checkpoint": None, "log": str(tmp_path / "whole.jsonl"), "kill_after": None},
    }
    for name, own in runs.items():
        spec = tmp_path / f"{name}.json"
        spec.write_text(json.dumps({**common, **own, "output": str(tmp_path / name)}))
        done = run(spec)
        assert done.returncode == (-signal.SIGKILL if name == "killed" else 0), done.stderr
        if name == "killed":
            assert len(lines(tmp_path / "resumed.jsonl")) == 5
            before = lines(tmp_path / "resumed.jsonl")
    assert not (tmp_path / "c").exists()
    # The evaluations that were done keep their very times, so they were not done again.
    assert lines(tmp_path / "resumed.jsonl")[:5] == before
    resumed, whole = (
        {**each, "seconds": 0} for each in (lines(tmp_path / "resumed.jsonl")[-1], lines(tmp_path / "whole.jsonl")[-1])
    )
    assert resumed == whole
    sets = [read_prototypes(tmp_path / f"{name}.0-of-1") for name in ("resumed", "whole")]
    one, other = ({member.name: member.vectors for member in each.members} for each in sets)
    assert same_vectors(one, other)


def test_a_checkpoint_of_other_proposals_is_refused(routed: RoutedModel, data: list[Example], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(routed, data, settings=SHORT, checkpoint=tmp_path / "c", progress=Watch(stop_at=2))
    with pytest.raises(TrainingError, match="recipe"):
        fit(routed, data, settings=SHORT, checkpoint=tmp_path / "c", shots=2)
    content = (tmp_path / "c" / "training.pt").read_bytes().partition(b"\n")[2]
    saved = torch.load(io.BytesIO(content), weights_only=True)
    told = json.loads(saved["told"])
    assert [each["step"] for each in told] == [0, 1]
    told[0]["weights"][1] = 0.25
    checkpoint.save(tmp_path / "c", json.loads(saved["fingerprint"]), {"told": json.dumps(told)})
    with pytest.raises(TrainingError, match=r"evaluation 0 was of \[0.0, 0.25, 0.0\].*remove the folder"):
        fit(routed, data, settings=SHORT, checkpoint=tmp_path / "c")
    assert all(not vector.any() for vectors in routed.vectors.values() for vector in vectors.values())


def test_adapters_of_other_ranks_are_refused(pool: dict[str, Path]) -> None:
    with pytest.raises(MethodError, match="equal rank"):
        compose(llama(), pool, "lorahub")


def test_epochs_mean_nothing(routed: RoutedModel, data: list[Example]) -> None:
    with pytest.raises(TrainingError, match="set steps"):
        fit(routed, data, settings=TrainingSettings(epochs=2))


def test_weights_without_a_finite_loss_are_never_kept(
    equal: dict[str, Path], data: list[Example], tokenizer: Any
) -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.inf)
    routed = compose(model, equal, "lorahub", tokenizer=tokenizer)
    with pytest.raises(TrainingError, match="none of 9 proposals has a finite loss"):
        fit(routed, data, settings=SHORT)
    assert all(not vector.any() for vectors in routed.vectors.values() for vector in vectors.values())


def test_without_nevergrad_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(TrainingError, match=r"nevergrad, which is not installed: pip install 'hub-router\[lorahub\]'"):
        create_recipe("lorahub")
    assert recipe_options("lorahub") == ("shots", "bound", "l1")


def test_wrong_options_are_named_at_once() -> None:
    with pytest.raises(TrainingError, match=r"shots=0, .*; bound=-1, .*; l1='x', expected"):
        create_recipe("lorahub", {"shots": 0, "bound": -1, "l1": "x"})


def test_it_is_the_only_recipe_that_searches() -> None:
    assert [name for name, recipe in RECIPES.items() if isinstance(recipe(), SearchRecipe)] == ["lorahub"]


def test_bounds_and_penalty_are_the_options() -> None:
    recipe = LorahubRecipe(bound=0.2, l1=0.5)
    assert recipe.penalty([0.2, -0.1, 0.0]) == pytest.approx(0.05)
    optimizer = recipe.optimizer(3, 30, 0)
    for _ in range(30):
        weights = optimizer.ask()
        assert all(abs(weight) <= 0.2 for weight in weights)
        optimizer.tell(-sum(weights))
    optimizer.close()


def test_an_optimizer_that_gives_up_is_an_error_and_leaves_no_thread() -> None:
    running = set(threading.enumerate())
    optimizer = LorahubRecipe().optimizer(3, 4, 0)
    for _ in range(2):
        optimizer.ask()
        optimizer.tell(1.0)
    (own,) = set(threading.enumerate()) - running
    optimizer.close()
    own.join(timeout=30)
    assert not own.is_alive()
    with pytest.raises(TrainingError, match=r"cannot go on with 3 adapters and 4 evaluations .*set other steps"):
        optimizer.ask()


def test_few_examples_of_each_task() -> None:
    examples = [Encoded(number % 3, (number,), (1,)) for number in range(20)]
    kept = few(examples, 4, seed=1)
    assert len(kept) == 12 and all(sum(each.adapter == task for each in kept) == 4 for task in range(3))
    assert kept == sorted(kept, key=lambda each: each.prompt)
    assert few(examples, 4, seed=1) == kept != few(examples, 4, seed=2)
    assert few(examples, 100, seed=1) == examples
