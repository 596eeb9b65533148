"""fit on a tiny Llama: what it learns, what it leaves alone, and what it does not depend on."""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compose_models import llama, save_adapter
from compose_zoo import ARCHITECTURES, lora, peft_adapter
from safetensors.torch import load_file, save_file
from training_models import TWINS, Frozen, distance, logits, same_vectors, train_twins, twin_examples

from hub_router.composition.attach import routed_updates
from hub_router.composition.build import compose
from hub_router.composition.routed import RoutedModel
from hub_router.errors import RoutedStateError, TrainingError
from hub_router.features import Vectors
from hub_router.progress import Advance
from hub_router.records import Sample
from hub_router.training import Example, FitResult, TrainingSettings, fit
from hub_router.training.batches import collate, draw
from hub_router.training.data import encode, split

METHODS: dict[str, dict[str, Any]] = {"phatgoose": {}, "maple": {}, "lora-mixer": {}}
SHORT = TrainingSettings(steps=5, batch_size=8, learning_rate=1e-2, warmup=0.0)


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
@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("method", METHODS)
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
@pytest.mark.parametrize(
    ("method", "options"), [("phatgoose", {}), ("maple", {}), ("lora-mixer", {"balance": "none"})]
)
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
    [("phatgoose", {}), ("maple", {}), ("lora-mixer", {"balance": "none"}), ("lora-mixer", {}), ("lora-mixer", {"balance": "ds-moe"})],
)
def test_activation_checkpointing_does_not_matter(
    pool: Any, tokenizer: Any, examples: Any, method: str, options: dict[str, Any]
) -> None:
    plain, _ = train(pool, tokenizer, examples, method, SHORT, **options)
    settings = TrainingSettings(**{**SHORT.to_json(), "checkpointing": True})
    routed, _ = train(pool, tokenizer, examples, method, settings, **options)
    assert same_vectors(routed.vectors, plain.vectors)
    assert routed.model.model.gradient_checkpointing is False


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_runs_near_float32(pool: Any, tokenizer: Any, examples: Any, method: str) -> None:
    settings = TrainingSettings(**{**SHORT.to_json(), "precision": "bfloat16"})
    routed, result = train(pool, tokenizer, examples, method, settings)
    _, exact = train(pool, tokenizer, examples, method, SHORT)
    assert result.loss == pytest.approx(exact.loss, rel=0.05)
    assert all(vector.dtype == np.float32 for each in routed.vectors.values() for vector in each.values())
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("method", METHODS)
def test_a_base_model_in_bfloat16(pool: Any, tokenizer: Any, examples: Any, method: str) -> None:
    routed, result = train(pool, tokenizer, examples, method, model=llama().to(torch.bfloat16))
    assert math.isfinite(result.loss)
    assert all(update.state()["P"].dtype == torch.float32 for _, update in routed_updates(routed.model))


def test_early_stop_keeps_the_best(pool: Any, tokenizer: Any, examples: Any, tmp_path: Path) -> None:
    # A rate at which the loss soon gets worse.
    settings = TrainingSettings(
        steps=60, batch_size=8, learning_rate=0.5, warmup=0.0, schedule="constant", validation=0.25, evaluate_every=2, patience=3
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
    shorter = TrainingSettings(
        **{**settings.to_json(), "steps": 2 * (best + 1), "patience": 0, "evaluate_every": 0}
    )
    until, _ = train(pool, tokenizer, examples, "maple", shorter, mask="none")
    assert same_vectors(routed.vectors, until.vectors)


def test_validation_is_the_loss_of_what_was_set_aside(pool: Any, tokenizer: Any, examples: Any) -> None:
    settings = TrainingSettings(steps=4, batch_size=8, learning_rate=1e-2, validation=0.25)
    routed, result = train(pool, tokenizer, examples, "lora-mixer", settings, top_k=100, balance="none")
    _, held = split(examples, 0.25, 0)
    total, tokens = 0.0, 0
    for each in held:
        prompt, answer = tokenizer(each.input)["input_ids"], [*tokenizer(each.output)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            p = torch.log_softmax(routed(input_ids=torch.tensor([prompt + answer])).logits[0].double(), -1)
        total -= sum(float(p[len(prompt) - 1 + place, token]) for place, token in enumerate(answer))
        tokens += len(answer)
    assert len(held) == 12
    assert result.validation == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_log_has_a_line_for_every_step(pool: Any, tokenizer: Any, examples: Any, tmp_path: Path, method: str) -> None:
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


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_that_changes_nothing(
    pool: Any, tokenizer: Any, examples: Any, tmp_path: Path, method: str
) -> None:
    still = save_adapter(llama(), tmp_path / "still", 9, r=2, target_modules=["q_proj"], init_lora_weights=True)
    weights = load_file(still / "adapter_model.safetensors")
    save_file({k: torch.zeros_like(v) for k, v in weights.items()}, still / "adapter_model.safetensors")
    more = {**pool, "still": still}
    data = [*examples, Example("still", "abc ", "d")]
    if method == "phatgoose":
        routed = compose(llama(), more, method, tokenizer=tokenizer)
        with pytest.raises(TrainingError, match=r"'still' has nothing to train"):
            fit(routed, data, settings=SHORT)
        assert all(not vector.any() for vectors in routed.vectors.values() for vector in vectors.values())
    else:
        routed, result = train(more, tokenizer, data, method)
        assert "still" not in routed.vectors
        assert [member.name for member in result.prototypes.members] == list(pool)


@pytest.mark.parametrize("method", METHODS)
def test_embeddings_are_routed_and_trained(tokenizer: Any, examples: Any, tmp_path: Path, method: str) -> None:
    targets = ["embed_tokens", "q_proj"]
    pool = {
        name: save_adapter(llama(), tmp_path / name, seed, r=seed + 1, target_modules=targets)
        for seed, name in enumerate(("attention", "mlp"))
    }
    data = [each for each in examples if each.adapter in pool]
    routed, result = train(pool, tokenizer, data, method)
    assert math.isfinite(result.loss)
    assert any(routed.vectors[name]["model.embed_tokens"].any() for name in pool)


@pytest.mark.parametrize("kind", ["t5", "mamba", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_other_architectures(tokenizer: Any, tmp_path: Path, kind: str, method: str) -> None:
    architecture = ARCHITECTURES[kind]
    pool = {
        name: peft_adapter(architecture.make, tmp_path / name, seed, lora(targets, r=seed + 2))
        for seed, (name, targets) in enumerate({"a": architecture.targets, "b": architecture.targets[:1]}.items())
    }
    data = [Example(name, f"{name} {n}", f"{name * (n + 1)}") for name in pool for n in range(5)]
    settings = TrainingSettings(steps=12, batch_size=8, learning_rate=3e-2, warmup=0.0, validation=0.2)
    routed = compose(architecture.make(0), pool, method, tokenizer=tokenizer)
    frozen, watch = Frozen(routed), Watch()
    options = {"mask": "none"} if method == "maple" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fit(routed, data, settings=settings, progress=watch, **options)
    frozen.check()
    assert math.isfinite(result.loss) and result.validation is not None
    assert all(any(vector.any() for vector in routed.vectors[name].values()) for name in pool)
    first = float(watch.notes[1].split()[1].rstrip(","))
    assert result.loss < first + 0.5
    assert isinstance(routed.generate("a 3", max_new_tokens=3, do_sample=False), str)


def test_fit_says_nothing_on_its_own(pool: Any, tokenizer: Any, examples: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in METHODS:
            settings = TrainingSettings(steps=1, batch_size=4, checkpointing=method == "maple")
            train(pool, tokenizer, examples, method, settings)
