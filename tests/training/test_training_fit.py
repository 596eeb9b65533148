"""fit on a tiny Llama: what it learns, what it leaves alone, and what it does not depend on."""

from __future__ import annotations

import json
import math
import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compose_models import llama
from training_models import (
    DECODER_METHODS,
    SHORT,
    TWINS,
    Frozen,
    Watch,
    distance,
    logits,
    same_vectors,
    train,
    train_twins,
    twin_examples,
)

from hub_router.composition.build import compose
from hub_router.errors import RoutedStateError, TrainingError
from hub_router.features import Vectors
from hub_router.records import Sample
from hub_router.training import Example, TrainingSettings, fit
from hub_router.training.batches import collate, draw
from hub_router.training.data import encode, split


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    return train_twins(tmp_path_factory.mktemp("twins"), tokenizer)


@pytest.mark.parametrize(
    ("method", "options", "steps", "least"),
    [
        ("phatgoose", {}, 20, 0.05),
        ("maple", {"mask": "none"}, 40, 0.6),
        ("maple", {}, 40, 0.6),
        ("lora-mixer", {"balance": "none"}, 40, 0.4),
        ("lora-mixer", {}, 40, 0.4),
        ("xlora", {}, 40, 0.4),
    ],
)
def test_the_loss_falls(
    twins: Any, tokenizer: Any, tmp_path: Path, method: str, options: dict[str, Any], steps: int, least: float
) -> None:
    settings = TrainingSettings(steps=steps, batch_size=16, learning_rate=5e-2, warmup=0.0)
    routed, result = train(twins, tokenizer, twin_examples(), method, settings, log=tmp_path / "log", **options)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    # Of phatgoose all phases: each has its own beginning.
    starts = [line["loss"] for line in lines if line["step"] < steps // 10]
    before, after = sum(starts) / len(starts), result.loss
    print(f"{method} {options}: {before:.3f} -> {after:.3f}")
    assert after < before - least
    if method == "lora-mixer" or options:
        answers = {name: routed.generate(f"{name} abcd:", max_new_tokens=5, do_sample=False) for name in twins}
        assert answers == {name: f" {answer}" for name, answer in TWINS.items()}


@pytest.mark.parametrize("mode", ["eval", "train", "mixed"])
@pytest.mark.parametrize("method", DECODER_METHODS)
def test_only_the_vectors_change(pool: Any, tokenizer: Any, examples: Any, method: str, mode: str) -> None:
    model = llama().train(mode != "eval")
    model.model.norm.eval()
    model.lm_head.weight.requires_grad_(False)
    routed = compose(model, pool, method, tokenizer=tokenizer)
    before, frozen = routed.vectors, Frozen(routed)
    fit(routed, examples, settings=SHORT)
    frozen.check()
    after = routed.vectors
    assert {name: set(each) for name, each in after.items()} == {name: set(each) for name, each in before.items()}
    for name in pool:
        assert any(not np.array_equal(after[name][module], before[name][module]) for module in after[name])


@pytest.mark.parametrize("method", DECODER_METHODS)
@pytest.mark.parametrize("stop_at", [3, 7])
def test_an_interrupted_run_changes_nothing(
    pool: Any, tokenizer: Any, examples: Any, method: str, stop_at: int
) -> None:
    routed = compose(llama(), pool, method, tokenizer=tokenizer)
    settings = TrainingSettings(steps=5 if method == "phatgoose" else 9, batch_size=4, checkpointing=True)
    method_before, vectors, outputs, frozen = routed.method, routed.vectors, logits(routed), Frozen(routed)
    options = {"balance": "none"} if method == "lora-mixer" else {}
    with pytest.raises(KeyboardInterrupt):
        fit(routed, examples, settings=settings, progress=Watch(stop_at), **options)
    frozen.check()
    assert routed.model.model.gradient_checkpointing is False
    assert routed.method == method_before
    assert same_vectors(routed.vectors, vectors)
    assert torch.equal(logits(routed), outputs)


@pytest.mark.parametrize("method", DECODER_METHODS)
def test_a_loss_that_is_no_number_stops_the_run(pool: Any, tokenizer: Any, examples: Any, method: str) -> None:
    routed = compose(llama(), pool, method, tokenizer=tokenizer)
    with torch.no_grad():
        routed.model.lm_head.weight[3] = math.inf
    vectors, frozen = routed.vectors, Frozen(routed)
    with pytest.raises(TrainingError, match=rf"{method}, step 0: the loss is (nan|inf).*lower learning_rate \(0.01\)"):
        fit(routed, examples, settings=SHORT)
    frozen.check()
    assert same_vectors(routed.vectors, vectors)


@pytest.mark.parametrize("top_k", [None, 2])
def test_the_first_step_of_maple_without_mask_is_arrow(
    pool: Any, tokenizer: Any, examples: Any, top_k: int | None
) -> None:
    options = {} if top_k is None else {"top_k": top_k}
    routed = compose(llama(), pool, "maple", tokenizer=tokenizer, **options)
    arrow = compose(llama(), pool, "arrow", tokenizer=tokenizer, **options)
    with routed.trace() as seen:
        fit(routed, examples, settings=TrainingSettings(steps=1, batch_size=16), mask="none")
    drawn = draw(encode(examples, arrow.adapters, tokenizer, 128, False), 16, (0, 0, 0))
    with arrow.trace() as expected:
        arrow(**collate(drawn, 0, arrow.model, False, torch.device("cpu")).inputs)
    assert seen.weights.keys() == expected.weights.keys()
    assert all(torch.equal(weights, expected.weights[module]) for module, weights in seen.weights.items())


@pytest.mark.parametrize("method", DECODER_METHODS)
def test_the_seed_decides(pool: Any, tokenizer: Any, examples: Any, method: str) -> None:
    def vectors(seed: int) -> Vectors:
        torch.manual_seed(random.randrange(1000))
        settings = TrainingSettings(steps=3, batch_size=4, learning_rate=1e-2, seed=seed)
        return train(pool, tokenizer, examples, method, settings)[0].vectors

    first = vectors(0)
    assert same_vectors(vectors(0), first)
    assert not same_vectors(vectors(1), first)


def test_dropout_of_the_base_model_is_drawn_by_the_seed(pool: Any, tokenizer: Any, examples: Any) -> None:
    def vectors(dropout: float) -> Vectors:
        torch.manual_seed(random.randrange(1000))
        model = llama(attention_dropout=dropout)
        return train(pool, tokenizer, examples, "lora-mixer", model=model)[0].vectors

    first = vectors(0.3)
    assert same_vectors(vectors(0.3), first)
    assert not same_vectors(vectors(0.0), first)


@pytest.mark.parametrize("parts", [3, 4, 100])
@pytest.mark.parametrize(("method", "options"), [("phatgoose", {}), ("maple", {}), ("lora-mixer", {"balance": "none"})])
def test_accumulation_does_not_matter(
    pool: Any, tokenizer: Any, examples: Any, method: str, options: dict[str, Any], parts: int
) -> None:
    # By the gradients themselves: AdamW's first steps are signs, of numbers as small as rounding leaves them.
    def run(accumulation: int) -> Vectors:
        settings = TrainingSettings(
            steps=2, batch_size=10, accumulation=accumulation, learning_rate=1e-4, warmup=0.0, schedule="constant"
        )
        return train(pool, tokenizer, examples, method, settings, **options)[0].vectors

    assert distance(run(1), run(parts)) <= 1e-6


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("phatgoose", {}),
        ("maple", {}),
        ("lora-mixer", {"balance": "none"}),
        ("lora-mixer", {}),
        ("lora-mixer", {"balance": "ds-moe"}),
    ],
)
def test_activation_checkpointing_does_not_matter(
    pool: Any, tokenizer: Any, examples: Any, method: str, options: dict[str, Any]
) -> None:
    plain, _ = train(pool, tokenizer, examples, method, SHORT, **options)
    settings = TrainingSettings(**{**SHORT.to_json(), "checkpointing": True})
    routed, _ = train(pool, tokenizer, examples, method, settings, **options)
    assert same_vectors(routed.vectors, plain.vectors)
    assert routed.model.model.gradient_checkpointing is False


@pytest.mark.parametrize("method", DECODER_METHODS)
def test_bfloat16_runs_near_float32(pool: Any, tokenizer: Any, examples: Any, method: str) -> None:
    settings = TrainingSettings(**{**SHORT.to_json(), "precision": "bfloat16"})
    routed, result = train(pool, tokenizer, examples, method, settings)
    _, exact = train(pool, tokenizer, examples, method, SHORT)
    assert result.loss == pytest.approx(exact.loss, rel=0.05)
    assert all(vector.dtype == np.float32 for each in routed.vectors.values() for vector in each.values())
    assert not torch.is_autocast_enabled("cpu")


def test_early_stop_keeps_the_best(pool: Any, tokenizer: Any, examples: Any, tmp_path: Path) -> None:
    # A rate at which the loss soon gets worse.
    settings = TrainingSettings(
        steps=60,
        batch_size=8,
        learning_rate=0.5,
        warmup=0.0,
        schedule="constant",
        validation=0.25,
        evaluate_every=2,
        patience=3,
    )
    routed, result = train(pool, tokenizer, examples, "maple", settings, mask="none", log=tmp_path / "log")
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    best = losses.index(min(losses))
    assert result.steps < 60
    assert len(losses) == best + 1 + 3
    assert result.steps == 2 * len(losses)
    assert result.validation == losses[best]
    # The vectors are those of that evaluation: a run that ends there has them, too.
    shorter = TrainingSettings(**{**settings.to_json(), "steps": 2 * (best + 1), "patience": 0, "evaluate_every": 0})
    until, _ = train(pool, tokenizer, examples, "maple", shorter, mask="none")
    assert same_vectors(routed.vectors, until.vectors)


def test_validation_is_the_loss_of_what_was_set_aside(pool: Any, tokenizer: Any, examples: Any) -> None:
    settings = TrainingSettings(steps=4, batch_size=8, learning_rate=1e-2, validation=0.25)
    routed, result = train(pool, tokenizer, examples, "lora-mixer", settings, top_k=100, balance="none")
    _, held = split(examples, 0.25, 0)
    total, tokens = 0.0, 0
    for each in held:
        prompt, answer = (
            tokenizer(each.input)["input_ids"],
            [*tokenizer(each.output)["input_ids"], tokenizer.eos_token_id],
        )
        with torch.no_grad():
            p = torch.log_softmax(routed(input_ids=torch.tensor([prompt + answer])).logits[0].double(), -1)
        total -= sum(float(p[len(prompt) - 1 + place, token]) for place, token in enumerate(answer))
        tokens += len(answer)
    assert len(held) == 12
    assert result.validation == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize("method", DECODER_METHODS)
def test_the_log_has_a_line_for_every_step(
    pool: Any, tokenizer: Any, examples: Any, tmp_path: Path, method: str
) -> None:
    log, watch = tmp_path / "logs" / "run.jsonl", Watch()
    routed = compose(llama(), pool, method, tokenizer=tokenizer)
    settings = TrainingSettings(steps=12, batch_size=4, learning_rate=1e-2, warmup=0.25)
    result = fit(routed, examples, settings=settings, log=log, progress=watch)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    phases = list(pool) if method == "phatgoose" else [method]
    assert [(line["phase"], line["step"]) for line in lines] == [(p, step) for p in phases for step in range(12)]
    assert [line["learning_rate"] for line in lines] == [settings.rate(step, 12) for _ in phases for step in range(12)]
    assert [line["step"] for line in lines if "entropy" in line] == [0, 10] * len(phases)
    assert all(math.isfinite(line[key]) for line in lines for key in ("loss", "balance", "gradient_norm", "seconds"))
    assert all((line["balance"] != 0) == (method == "lora-mixer" and line["step"] > 0) for line in lines)
    assert result.steps == watch.total == watch.done == len(lines)
    assert method in watch.label
    assert all("loss" in note and "nan" not in note for note in watch.notes if note)
    assert result.loss == pytest.approx(np.mean([line["loss"] for line in lines if line["step"] == 11]))


def test_epochs_count_steps(pool: Any, tokenizer: Any, examples: Any) -> None:
    settings = TrainingSettings(epochs=1.5, batch_size=16)
    assert train(pool, tokenizer, examples, "maple", settings)[1].steps == math.ceil(1.5 * 48 / 16)
    assert train(pool, tokenizer, examples, "phatgoose", settings)[1].steps == 4 * math.ceil(1.5 * 12 / 16)


def test_adapters_without_examples_keep_their_vectors_in_phatgoose(pool: Any, tokenizer: Any, examples: Any) -> None:
    some = [each for each in examples if each.adapter in ("mlp", "layer")]
    routed, result = train(pool, tokenizer, some, "phatgoose")
    assert result.steps == 10
    for name, vectors in routed.vectors.items():
        assert any(vector.any() for vector in vectors.values()) == (name in ("mlp", "layer"))


def test_data_from_a_file_and_from_samples(pool: Any, tokenizer: Any, examples: Any, tmp_path: Path) -> None:
    rows = [{"input": each.input, "output": each.output, "task": each.adapter} for each in examples]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = {name: [Sample(each.input, each.output) for each in examples if each.adapter == name] for name in pool}
    expected, result = train(pool, tokenizer, examples, "maple")
    for data in (tmp_path / "data.jsonl", str(tmp_path / "data.jsonl"), samples):
        routed, other = train(pool, tokenizer, data, "maple")  # type: ignore[arg-type]
        assert same_vectors(routed.vectors, expected.vectors)
        assert other.prototypes.data_hash == result.prototypes.data_hash


def test_what_cannot_be_trained(pool: Any, tokenizer: Any, examples: Any) -> None:
    with pytest.raises(TrainingError, match="method 'arrow' is not trained"):
        train(pool, tokenizer, examples, "arrow")
    with pytest.raises(RoutedStateError, match="no tokenizer"):
        train(pool, None, examples, "maple")
    with pytest.raises(TrainingError, match="without options balance"):
        train(pool, tokenizer, examples, "maple", balance="aux")
    with pytest.raises(TrainingError, match="no training examples"):
        train(pool, tokenizer, [], "maple")
    with pytest.raises(TrainingError, match=r"not in the pool: stranger"):
        train(pool, tokenizer, [Example("stranger", "a", "b")], "maple")
    routed = compose(llama(), pool, "maple", tokenizer=tokenizer)
    routed.detach()
    with pytest.raises(RoutedStateError, match="detached"):
        fit(routed, examples)


@pytest.mark.parametrize("asked", [False, True])
def test_activation_checkpointing_that_was_on_stays_on(pool: Any, tokenizer: Any, examples: Any, asked: bool) -> None:
    model = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = TrainingSettings(**{**SHORT.to_json(), "checkpointing": asked})
    routed, _ = train(pool, tokenizer, examples, "lora-mixer", settings, model=model)
    assert routed.model.model.gradient_checkpointing is True
    assert same_vectors(routed.vectors, train(pool, tokenizer, examples, "lora-mixer")[0].vectors)


def test_a_caller_without_gradients(pool: Any, tokenizer: Any, examples: Any) -> None:
    expected, _ = train(pool, tokenizer, examples, "maple")
    with torch.no_grad():
        routed, _ = train(pool, tokenizer, examples, "maple")
    assert same_vectors(routed.vectors, expected.vectors)


@pytest.mark.parametrize("what", ["checkpoint", "log"])
def test_places_that_cannot_be_written_to_are_found_before_training(
    pool: Any, tokenizer: Any, examples: Any, tmp_path: Path, what: str
) -> None:
    (tmp_path / "file").write_text("mine")
    watch = Watch()
    routed = compose(llama(), pool, "maple", tokenizer=tokenizer)
    place = {"checkpoint": tmp_path / "file"} if what == "checkpoint" else {"log": tmp_path}
    settings = TrainingSettings(steps=3, save_every=1)
    with pytest.raises(TrainingError, match=what):
        fit(routed, examples, settings=settings, progress=watch, **place)  # type: ignore[arg-type]
    assert watch.done == 0
    assert (tmp_path / "file").read_text() == "mine"


def test_fit_says_nothing_on_its_own(pool: Any, tokenizer: Any, examples: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in DECODER_METHODS:
            settings = TrainingSettings(steps=1, batch_size=4, checkpointing=method == "maple")
            train(pool, tokenizer, examples, method, settings)


def test_examples_without_an_adapter(pool: dict[str, Path], examples: list[Example], tokenizer: Any) -> None:
    """Where nothing asks whose task an example is of, they are drawn as those of one more task."""
    unnamed = [replace(each, adapter="") for each in examples]
    routed, result = train(pool, tokenizer, unnamed, "lora-mixer")
    assert any(vector.any() for own in routed.vectors.values() for vector in own.values())
    assert result.steps == SHORT.steps
    with pytest.raises(TrainingError, match="not in the pool: none at all"):
        train(pool, tokenizer, unnamed, "maple")
    train(pool, tokenizer, unnamed, "maple", mask="none")
