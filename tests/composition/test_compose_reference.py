"""The base model of a saved composition: referred to only where its folder holds it exactly, and checked to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compose_models import llama, prompt_ids, qwen2
from transformers import LlamaForCausalLM, Qwen2ForCausalLM

from hub_router.composition.build import compose
from hub_router.composition.checkpoint import holds
from hub_router.composition.reference import fingerprint
from hub_router.composition.routed import RoutedModel
from hub_router.errors import ArtifactError


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=prompt_ids(2, 9)).logits


def one_bit(model: Any) -> None:
    """Change the last bit of one weight far from the first and last ones."""
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight.view(-1).view(torch.int32)[777] ^= 1


def all_weights(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def configuration(model: Any) -> None:
    model.config.rms_norm_eps = 0.5
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.5


def head_alone_in_half(model: Any) -> None:
    model.model.layers.bfloat16()
    model.model.layers.float()
    model.lm_head.bfloat16()
    model.lm_head.register_forward_pre_hook(lambda _module, args: (args[0].bfloat16(),))


@pytest.mark.parametrize("change", [one_bit, all_weights, configuration])
def test_base_changed_in_memory_is_saved_along(
    folders: dict[str, Path], tmp_path: Path, change: Callable[[Any], None]
) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    change(model)
    routed = compose(model, folders)
    routed.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "base" / "model.safetensors").is_file()
    assert torch.equal(logits(RoutedModel.load(tmp_path / "saved").model), logits(routed.model))


def test_mixed_dtypes_come_back(folders: dict[str, Path], tmp_path: Path) -> None:
    model = llama()
    head_alone_in_half(model)
    compose(model, folders).save(tmp_path / "saved")
    loaded = RoutedModel.load(tmp_path / "saved").model
    assert (loaded.dtype, loaded.lm_head.weight.dtype) == (torch.float32, torch.bfloat16)
    assert fingerprint(loaded) == fingerprint(model)


def test_folder_without_weights_is_not_referred_to(folders: dict[str, Path], tmp_path: Path) -> None:
    model = llama()
    model.config.save_pretrained(tmp_path / "config")
    model.config._name_or_path = model.name_or_path = str(tmp_path / "config")
    routed = compose(model, folders)
    routed.save(tmp_path / "saved")
    assert torch.equal(logits(RoutedModel.load(tmp_path / "saved").model), logits(routed.model))


def test_saving_a_loaded_composition_in_its_own_place_keeps_the_base(folders: dict[str, Path], tmp_path: Path) -> None:
    compose(llama(), folders).save(tmp_path / "saved")
    loaded = RoutedModel.load(tmp_path / "saved")
    loaded.save(tmp_path / "saved")
    assert torch.equal(logits(RoutedModel.load(tmp_path / "saved").model), logits(loaded.model))


def test_one_changed_bit_on_disk_is_noticed(folders: dict[str, Path], tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    compose(tmp_path / "base", folders).save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "base").exists()
    model = llama()
    one_bit(model)
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ArtifactError, match=r"fingerprint \w+, expected \w+"):
        RoutedModel.load(tmp_path / "saved")


def test_given_base_is_checked_and_left_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    compose(llama(), folders).save(tmp_path / "saved")
    other = llama()
    one_bit(other)
    other.save_pretrained(tmp_path / "other")
    for wrong in (other, tmp_path / "other", llama().bfloat16()):
        with pytest.raises(ArtifactError, match=r"LlamaForCausalLM.* has fingerprint \w+, expected \w+"):
            RoutedModel.load(tmp_path / "saved", model=wrong)
    assert not any(module._forward_hooks for module in other.modules())


def test_given_folder_is_loaded_in_the_dtype_composed_with(folders: dict[str, Path], tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    routed = compose(llama().bfloat16(), folders)
    routed.save(tmp_path / "saved")
    loaded = RoutedModel.load(tmp_path / "saved", model=tmp_path / "base")
    assert torch.equal(logits(loaded.model), logits(routed.model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [False, True])
def test_a_checkpoint_holds_its_model_in_any_narrower_dtype(tmp_path: Path, dtype: torch.dtype, shards: bool) -> None:
    qwen2().save_pretrained(tmp_path, max_shard_size="20KB" if shards else "1GB")
    assert (tmp_path / "model.safetensors").exists() is not shards
    # Qwen2 ties its output map to its embeddings, which the checkpoint stores once.
    model = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert holds(tmp_path, model)
    # The bits that bfloat16 dropped do not come back.
    assert holds(tmp_path, model.float()) is (dtype == torch.float32)
    with torch.no_grad():
        model.model.norm.weight[3] = -0.0
    assert not holds(tmp_path, model)
