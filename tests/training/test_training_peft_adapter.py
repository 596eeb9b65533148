"""The shared LoRA: steps against a hand-written loop, the folder it leaves, and a base model that stays as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from compose_models import ATTENTION, llama, prompt_ids
from safetensors.torch import load_file
from training_models import Watch
from transformers import AutoModelForCausalLM

from hub_router import Hub
from hub_router.composition.build import compose
from hub_router.errors import TrainingError
from hub_router.training import Example, TrainingSettings
from hub_router.training.batches import draw
from hub_router.training.data import encode
from hub_router.training.peft_adapter import fit_shared

LORA: dict[str, Any] = {"rank": 4, "alpha": 8, "target_modules": ATTENTION}
SHORT = TrainingSettings(steps=4, batch_size=6, learning_rate=1e-2)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def by_hand(examples: list[Example], tokenizer: Any, steps: int) -> dict[str, torch.Tensor]:
    """Example by example, AdamW written out, linear rate after a step of warm-up, in float64."""
    base = llama()
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION)).double()
    encoded = encode(examples, list(dict.fromkeys(each.adapter for each in examples)), tokenizer, 128, encoder=False)
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    first = {name: torch.zeros_like(each) for name, each in parameters.items()}
    second = {name: torch.zeros_like(each) for name, each in parameters.items()}
    for step in range(steps):
        batch = draw(encoded, 6, (0, 0, step))
        count, loss = sum(len(each.answer) for each in batch), torch.zeros((), dtype=torch.float64)
        for each in batch:
            ids = each.prompt + each.answer
            scores = model(input_ids=torch.tensor([ids])).logits[0]
            for place in range(len(each.prompt), len(ids)):
                loss = loss + (torch.logsumexp(scores[place - 1], 0) - scores[place - 1, ids[place]]) / count
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        norm = sum(float((each**2).sum()) for each in gradients.values()) ** 0.5
        rate = 1e-2 if step == 0 else 1e-2 * (1 - (step - 1) / (steps - 1))
        with torch.no_grad():
            for name, each in parameters.items():
                gradient = gradients[name] * min(1.0, 1.0 / (norm + 1e-6))
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
                each -= rate * mean / (square.sqrt() + 1e-8)
    return {name.replace(".default", ""): each.detach() for name, each in parameters.items()}


def test_steps_are_those_of_a_hand_written_loop(examples: list[Example], tokenizer: Any, tmp_path: Path) -> None:
    folder = fit_shared(llama(), tokenizer, examples, **LORA, settings=SHORT, out=tmp_path / "shared")
    expected = by_hand(examples, tokenizer, 4)
    got = weights_of(folder)
    assert got.keys() == expected.keys() and len(got) == 8
    for name, each in got.items():
        # Adam divides small gradients by themselves, so that rounding shows most where they are smallest.
        assert float((each.double() - expected[name]).abs().max()) < 1e-4, name
    assert max(float(each.abs().max()) for name, each in got.items() if "lora_B" in name) > 5e-3


def test_peft_and_compose_load_it(examples: list[Example], tokenizer: Any, tmp_path: Path) -> None:
    folder = fit_shared(llama(), tokenizer, examples, **LORA, settings=SHORT, out=tmp_path / "shared")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    ids = prompt_ids(2, 9)
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(llama(), folder)(input_ids=ids).logits
        routed = compose(llama(), {"shared": folder}, "single", adapter="shared")
        torch.testing.assert_close(routed(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(expected, llama()(input_ids=ids).logits, atol=1e-3)


def test_the_catalog_syncs_it(examples: list[Example], tokenizer: Any, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    folder = fit_shared(model, tokenizer, examples, **LORA, settings=SHORT, out=tmp_path / "shared")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "base")
    with Hub(home=tmp_path / "home") as hub:
        hub.sync(folder)
        (found,) = hub.list()
        assert found.name == "shared"


def test_it_learns(examples: list[Example], tokenizer: Any, tmp_path: Path) -> None:
    settings = TrainingSettings(steps=40, batch_size=16, learning_rate=1e-2)
    fit_shared(
        llama(), tokenizer, examples, **LORA, settings=settings, out=tmp_path / "shared", log=tmp_path / "log.jsonl"
    )
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.8 * losses[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_base_model_is_left_as_it_was(
    examples: list[Example], tokenizer: Any, tmp_path: Path, checkpointing: bool
) -> None:
    model = llama().train()
    model.model.norm.weight.requires_grad_(False)
    frozen = {name: each.requires_grad for name, each in model.named_parameters()}
    weights = {name: each.clone() for name, each in model.state_dict().items()}
    modules = {name: type(each) for name, each in model.named_modules()}
    attributes, config = set(vars(model)), model.config.to_dict()
    state = torch.random.get_rng_state().clone()
    settings = TrainingSettings(steps=2, batch_size=4, checkpointing=checkpointing)
    fit_shared(model, tokenizer, examples, **LORA, settings=settings, out=tmp_path / "shared")
    assert {name: type(each) for name, each in model.named_modules()} == modules
    assert all(torch.equal(each, weights[name]) for name, each in model.state_dict().items())
    assert {name: each.requires_grad for name, each in model.named_parameters()} == frozen
    assert set(vars(model)) == attributes
    assert model.config.to_dict() == config
    assert all(module.training for module in model.modules())
    assert all(each.grad is None for each in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.is_gradient_checkpointing


def test_same_seed_same_bits_and_another_seed_others(examples: list[Example], tokenizer: Any, tmp_path: Path) -> None:
    found = [
        weights_of(
            fit_shared(
                llama(),
                tokenizer,
                examples,
                **LORA,
                settings=TrainingSettings(steps=3, batch_size=4, seed=seed),
                out=tmp_path / str(place),
            )
        )
        for place, seed in enumerate((3, 3, 4))
    ]
    assert all(torch.equal(each, found[1][name]) for name, each in found[0].items())
    assert not all(torch.equal(each, found[2][name]) for name, each in found[0].items())


def test_a_stopped_run_goes_on_bit_for_bit(examples: list[Example], tokenizer: Any, tmp_path: Path) -> None:
    settings = TrainingSettings(steps=7, batch_size=4, learning_rate=1e-2, save_every=2)
    model, checkpoint = llama(attention_dropout=0.2), tmp_path / "c"
    given, watch = {**LORA, "settings": settings}, Watch(stop_at=5)
    whole = fit_shared(model, tokenizer, examples, **given, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit_shared(model, tokenizer, examples, **given, out=tmp_path / "on", checkpoint=checkpoint, progress=watch)
    assert (watch.label, watch.total) == ("training shared", 7) and all("nan" not in note for note in watch.notes)
    assert checkpoint.exists() and not (tmp_path / "on").exists()
    assert not any("lora" in name for name, _ in model.named_parameters())
    with pytest.raises(TrainingError, match="adapter r: 4, now 2"):
        fit_shared(model, tokenizer, examples, **{**given, "rank": 2}, out=tmp_path / "on", checkpoint=checkpoint)
    on = fit_shared(model, tokenizer, examples, **given, out=tmp_path / "on", checkpoint=checkpoint)
    one, other = weights_of(whole), weights_of(on)
    assert all(torch.equal(each, other[name]) for name, each in one.items())
    assert not checkpoint.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["on", "whole"]


def test_what_is_refused(examples: list[Example], tokenizer: Any, tmp_path: Path) -> None:
    given = {**LORA, "settings": SHORT}
    (tmp_path / "there").mkdir()
    with pytest.raises(TrainingError, match=r"there exists and is left as it is"):
        fit_shared(llama(), tokenizer, examples, **given, out=tmp_path / "there")
    with pytest.raises(TrainingError, match="no training examples"):
        fit_shared(llama(), tokenizer, [], **given, out=tmp_path / "new")
    model = llama()
    with pytest.raises(TrainingError, match=r"PEFT cannot put the adapter on .*nowhere"):
        fit_shared(model, tokenizer, examples, **{**given, "target_modules": ["nowhere"]}, out=tmp_path / "new")
    assert all(each.requires_grad for each in model.parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
