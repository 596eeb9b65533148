"""Training with transformers' Trainer: the loss falls, the base stays as it is, checkpoints resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ewora_models import VOCABULARY, adapted, ids, layers_of, llama, randomise
from peft import PeftModel
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments


class Sequences(Dataset[dict[str, torch.Tensor]]):
    """Two kinds of data, told apart by the first token: ascending and descending tokens."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        start, step = 3 + number % 40, 1 if number % 2 else -1
        tokens = (start + step * torch.arange(10)) % (VOCABULARY - 3) + 3
        tokens[0] = 1 + number % 2
        return {"input_ids": tokens, "labels": tokens}


def trainer_for(model: torch.nn.Module, folder: Path, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 30,
        "learning_rate": 2e-2,
        "per_device_train_batch_size": 16,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return Trainer(model, TrainingArguments(str(folder), **{**settings, **options}), train_dataset=Sequences())


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def wide_llama() -> PreTrainedModel:
    """A base whose outputs depend on its inputs enough to learn from."""
    model = llama()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6.0)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=["plain", "bf16", "checkpointing", "reentrant"],
)
def test_loss_falls_and_base_is_untouched(options: dict[str, Any], tmp_path: Path) -> None:
    base = {name: value.clone() for name, value in wide_llama().state_dict().items()}
    model = adapted(wide_llama())
    before = {name: value.clone() for name, value in model.state_dict().items() if ".ewora_" in name}
    trainer = trainer_for(model, tmp_path, **options)
    trainer.train()
    seen = losses(trainer)
    assert sum(seen[-5:]) / 5 < 0.8 * sum(seen[:3]) / 3
    after = model.state_dict()
    assert all(not torch.equal(after[name], value) for name, value in before.items())
    unloaded = model.unload().state_dict()
    assert unloaded.keys() == base.keys()
    assert all(torch.equal(unloaded[name], value) for name, value in base.items())


def test_checkpoints_hold_the_adapter_alone_and_resume(tmp_path: Path) -> None:
    straight = adapted(wide_llama())
    whole = trainer_for(straight, tmp_path / "straight", max_steps=6)
    start = {name: value.clone() for name, value in straight.state_dict().items()}
    whole.train()
    stopped = adapted(wide_llama())
    stopped.load_state_dict(start)
    first = trainer_for(stopped, tmp_path / "run", max_steps=6, save_strategy="steps", save_steps=3)
    first.train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()
    resumed = adapted(wide_llama())
    second = trainer_for(resumed, tmp_path / "run", max_steps=6)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert second.state.global_step == 6
    for name, value in straight.state_dict().items():
        assert torch.allclose(resumed.state_dict()[name], value, atol=1e-6), name
    second.save_model(str(tmp_path / "final"))
    loaded = PeftModel.from_pretrained(wide_llama(), tmp_path / "final")
    with torch.no_grad():
        assert torch.equal(loaded(ids(2, 7)).logits, resumed.eval()(ids(2, 7)).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_checkpointing_are_the_same(reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = randomise(adapted(llama()), 1).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=ids(2, 8), labels=ids(2, 8)).loss.backward()
        return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys() and len(plain) == 3 * len(layers_of(adapted(llama())))
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
