"""One adapter alone equals PEFT's own forward: every architecture, and every kind of adapter that PEFT trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compose_models import assert_close, llama
from compose_zoo import ARCHITECTURES, logits, lora, peft_adapter, peft_logits
from peft import AdaLoraConfig

from hub_router.composition.build import compose
from hub_router.composition.routed import RoutedModel

pytestmark = pytest.mark.filterwarnings("ignore")


def equals_peft(make: Any, folder: Path, tolerance: float = 1e-5) -> None:
    """Composed alone and loaded from a saved composition: PEFT's logits; detached: the base's, bit for bit."""
    base = make(0)
    before = logits(base)
    expected = peft_logits(make, folder)
    assert not torch.allclose(expected, before, atol=1e-3), "the adapter does nothing, so nothing is shown"
    routed = compose(base, {"only": folder}, method="single", adapter="only")
    assert_close(logits(routed.model), expected, tolerance)
    routed.save(folder.parent / "saved")
    state = {name: tensor.clone() for name, tensor in make(0).state_dict().items()}
    assert torch.equal(logits(routed.detach()), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())
    assert torch.equal(logits(RoutedModel.load(folder.parent / "saved", model=make(0)).model), logits_of(make, folder))


def logits_of(make: Any, folder: Path) -> torch.Tensor:
    return logits(compose(make(0), {"only": folder}, method="single", adapter="only").model)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_linear_maps_of(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    folder = peft_adapter(architecture.make, tmp_path / "adapter", 1, lora(architecture.targets))
    equals_peft(architecture.make, folder)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dora_of(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    folder = peft_adapter(architecture.make, tmp_path / "adapter", 2, lora(architecture.targets, use_dora=True))
    equals_peft(architecture.make, folder)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_embedding_of(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    config = lora([architecture.embedding, architecture.targets[0]])
    equals_peft(architecture.make, peft_adapter(architecture.make, tmp_path / "adapter", 3, config))


KINDS: dict[str, Any] = {
    "rank and alpha patterns": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 7, "mlp.*": 3},
        "alpha_pattern": {r"layers\.1\..*": 11},
    },
    "rslora": {"use_rslora": True, "rank_pattern": {"v_proj": 9}},
    "one layer": {"layers_to_transform": [1]},
    "a bias on lora_B": {"lora_bias": True},
    "regular expression": {"target_modules": r".*layers\.(0|1)\.(self_attn|mlp)\.(?:q|up)_proj"},
    "all linear": {"target_modules": "all-linear"},
    "excluded": {"exclude_modules": ["v_proj"]},
    "output head": {"target_modules": ["q_proj", "lm_head"]},
    "dora on an embedding": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "dora with rslora": {"use_dora": True, "use_rslora": True},
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved norm": {"modules_to_save": ["norm"]},
    "trained biases": {"bias": "all"},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_kind_of_adapter(kind: str, tied: bool, tmp_path: Path) -> None:
    def make(seed: int) -> Any:
        return llama(seed, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)

    options = {"target_modules": ["q_proj", "v_proj", "up_proj"], **KINDS[kind]}
    equals_peft(make, peft_adapter(make, tmp_path / "adapter", 4, lora(options.pop("target_modules"), **options)))


def test_biases_of_the_adapted_maps_alone(tmp_path: Path) -> None:
    def make(seed: int) -> Any:
        return llama(seed, attention_bias=True)

    equals_peft(make, peft_adapter(make, tmp_path / "adapter", 5, lora(["q_proj", "o_proj"], bias="lora_only")))


@pytest.mark.parametrize("pruned", [False, True])
def test_adalora(pruned: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"init_r": 6, "target_r": 3, "total_step": 10, "lora_alpha": 5, "tinit": 1, "tfinal": 2}
    config = AdaLoraConfig(target_modules=["q_proj", "down_proj"], **options)
    if pruned:
        kept = [True, False, True, False, False, True]
        config.rank_pattern = {
            f"model.layers.{layer}.{module}.lora_E": kept
            for layer in range(2)
            for module in ("self_attn.q_proj", "mlp.down_proj")
        }
    equals_peft(llama, peft_adapter(llama, tmp_path / "adapter", 6, config))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_files(half: torch.dtype, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = peft_adapter(llama, tmp_path / "adapter", 7, lora(["q_proj", "down_proj"], use_dora=True))
    stored = load_file(folder / "adapter_model.safetensors")
    mixed = {name: tensor.to(half) if "lora_A" in name else tensor for name, tensor in stored.items()}
    save_file(mixed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    equals_peft(llama, folder)
