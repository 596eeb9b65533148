"""fit on models of other kinds: encoder-decoder, state space, embeddings, half precision, adapters that do nothing."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from compose_models import llama, save_adapter
from compose_zoo import ARCHITECTURES, lora, peft_adapter
from safetensors.torch import load_file, save_file
from training_models import METHODS, SHORT, Frozen, Watch, train

from hub_router.composition.attach import routed_updates
from hub_router.composition.build import compose
from hub_router.errors import TrainingError
from hub_router.training import Example, TrainingSettings, fit


@pytest.mark.parametrize("method", METHODS)
def test_a_base_model_in_bfloat16(pool: Any, tokenizer: Any, examples: Any, method: str) -> None:
    routed, result = train(pool, tokenizer, examples, method, model=llama().to(torch.bfloat16))
    assert math.isfinite(result.loss)
    assert all(update.state()["P"].dtype == torch.float32 for _, update in routed_updates(routed.model))


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_that_changes_nothing(pool: Any, tokenizer: Any, examples: Any, tmp_path: Path, method: str) -> None:
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
