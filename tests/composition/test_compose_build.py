"""compose: equal to PEFT where PEFT can do it, naming, loading by path, and errors that leave the model alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compose_models import ALL, assert_close, llama, opt, prompt_ids, qwen2, save_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.arrow import ArrowConfig, create_arrow_model
from transformers import LlamaForCausalLM

from hub_router.composition.build import compose
from hub_router.errors import (
    IncompatibleAdaptersError,
    MethodError,
    MissingError,
    RoutedStateError,
    UnsupportedAdapterError,
)
from hub_router.lora.reader import read_adapter
from hub_router.routing.arrow import Arrow


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("name", ["attention", "mlp", "all", "layer", "patterns"])
def test_single_equals_peft_on_llama(folders: dict[str, Path], name: str) -> None:
    ids = prompt_ids(2, 9)
    expected = logits(PeftModel.from_pretrained(llama(), folders[name]), ids)
    routed = compose(llama(), folders, "single", adapter=name)
    assert_close(logits(routed.model, ids), expected)
    assert not torch.allclose(expected, logits(llama(), ids), rtol=1e-2)


@pytest.mark.parametrize(("name", "factory"), [("qwen2", qwen2), ("opt", opt)])
def test_single_equals_peft_on_other_architectures(other_folders: dict[str, Path], name: str, factory: Any) -> None:
    ids = prompt_ids(2, 9)
    expected = logits(PeftModel.from_pretrained(factory(), other_folders[name]), ids)
    routed = compose(factory(), [other_folders[name]], "single", adapter=name)
    assert_close(logits(routed.model, ids), expected)


def test_gradient_of_the_inputs_equals_peft(folders: dict[str, Path]) -> None:
    grads = []
    for model in (PeftModel.from_pretrained(llama(), folders["all"]), compose(llama(), [folders["all"]]).model):
        embeds = llama().get_input_embeddings()(prompt_ids(2, 9)).detach().requires_grad_()
        model(inputs_embeds=embeds).logits.logsumexp(-1).sum().backward()
        grads.append(embeds.grad)
    assert_close(grads[1], grads[0])


def test_uniform_equals_the_mean_of_peft_updates(equal_folders: dict[str, Path]) -> None:
    ids = prompt_ids(2, 9)
    merged = llama()
    with torch.no_grad():
        for folder in equal_folders.values():
            alone = PeftModel.from_pretrained(llama(), folder).merge_and_unload()
            for mine, base, theirs in zip(merged.parameters(), llama().parameters(), alone.parameters(), strict=True):
                mine.add_((theirs - base) / len(equal_folders))
    assert_close(logits(compose(llama(), equal_folders, "uniform").model, ids), logits(merged, ids))


def test_arrow_equals_pefts_arrow(tmp_path: Path) -> None:
    paths = []
    for seed in range(3):
        wrapped = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, target_modules=ALL, lora_dropout=0.0))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
                    # One component far above the rest: PEFT's power iteration has then converged.
                    (parameter[0] if "lora_A" in name else parameter[:, 0]).mul_(20.0)
        wrapped.save_pretrained(tmp_path / f"spiked-{seed}")
        paths.append(tmp_path / f"spiked-{seed}")
    ids = prompt_ids(2, 9)
    config = ArrowConfig(top_k=2, router_temperature=0.7)
    expected = logits(create_arrow_model(llama(), [str(path) for path in paths], config), ids)
    assert_close(logits(compose(llama(), paths, "arrow", top_k=2, temperature=0.7).model, ids), expected, 2e-5)


def test_base_method_is_the_base_model_bit_for_bit(folders: dict[str, Path]) -> None:
    ids = prompt_ids(2, 9)
    assert torch.equal(logits(compose(llama(), folders, "base").model, ids), logits(llama(), ids))


def test_untrained_adapter_is_the_base_model_bit_for_bit(tmp_path: Path) -> None:
    get_peft_model(llama(), LoraConfig(r=4, target_modules=ALL)).save_pretrained(tmp_path / "fresh")
    ids = prompt_ids(2, 9)
    for method in ("arrow", "spectr", "uniform", "merged"):
        routed = compose(llama(), [tmp_path / "fresh"], method)
        assert torch.equal(logits(routed.model, ids), logits(llama(), ids))


def test_names_come_from_folders_and_are_made_unique(folders: dict[str, Path], tmp_path: Path) -> None:
    twin = save_adapter(llama(), tmp_path / "all", 99, r=2, target_modules=ALL)
    routed = compose(llama(), [folders["all"], str(folders["mlp"]), twin])
    assert routed.adapters == ("all", "mlp", "all-2")
    assert routed.method == Arrow()


def test_order_of_the_pool_is_the_callers(folders: dict[str, Path]) -> None:
    routed = compose(llama(), {"z": folders["mlp"], "a": folders["all"]}, "spectr", top_k=1)
    assert routed.adapters == ("z", "a")


def test_adapters_in_memory_take_the_mappings_names(folders: dict[str, Path]) -> None:
    ids = prompt_ids(1, 5)
    pool = [read_adapter(folders["all"]), read_adapter(folders["mlp"])]
    routed = compose(llama(), {"x": pool[0], "y": pool[1]}, "uniform")
    assert routed.adapters == ("x", "y")
    assert pool[0].name == "all"
    assert torch.equal(logits(routed.model, ids), logits(compose(llama(), pool, "uniform").model, ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_base_by_folder_keeps_its_dtype_and_brings_its_tokenizer(
    folders: dict[str, Path], tokenizer: Any, tmp_path: Path, dtype: torch.dtype
) -> None:
    base = llama().to(dtype)
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    routed = compose(tmp_path, folders, "uniform")
    assert routed.model.dtype == dtype
    assert routed.tokenizer.encode("hello") == tokenizer.encode("hello")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    expected = logits(compose(loaded, folders, "uniform").model, prompt_ids(1, 5))
    assert torch.equal(logits(routed.model, prompt_ids(1, 5)), expected)
    assert routed.model.get_submodule("model.layers.0.self_attn.q_proj").hub_router_update.A.dtype == dtype


def test_base_without_tokenizer_still_computes(folders: dict[str, Path], tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    routed = compose(str(tmp_path), folders)
    assert routed.tokenizer is None
    assert logits(routed.model, prompt_ids(1, 5)).shape == (1, 5, 300)


@pytest.mark.parametrize("method", ["uniform", "merged", "arrow", "spectr"])
def test_bfloat16_is_as_near_to_float32_as_peft_is(equal_folders: dict[str, Path], method: str) -> None:
    ids = prompt_ids(2, 9)
    # Every expert takes part, so that rounding cannot change a selection.
    options = {"top_k": 3} if method in ("arrow", "spectr") else {}
    half, full = (
        logits(compose(model, equal_folders, method, **options).model, ids) for model in (llama().bfloat16(), llama())
    )
    peft_half = PeftModel.from_pretrained(llama().bfloat16(), equal_folders["red"], autocast_adapter_dtype=False)
    peft_error = distance(
        logits(peft_half.bfloat16(), ids), logits(PeftModel.from_pretrained(llama(), equal_folders["red"]), ids)
    )
    assert half.dtype == torch.bfloat16
    assert distance(half, full) < peft_error < 0.1


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def test_missing_base_is_one_error(folders: dict[str, Path]) -> None:
    with pytest.raises(
        MissingError, match=r"base model '/nowhere/at-all' cannot be loaded, expected a folder or Hub id"
    ):
        compose("/nowhere/at-all", folders)


def test_something_that_is_no_model_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(MissingError, match="model is None, expected a transformers model"):
        compose(None, folders)


def test_base_whose_weights_are_not_loaded_is_refused(folders: dict[str, Path]) -> None:
    with torch.device("meta"):
        base = LlamaForCausalLM(llama().config)
    with pytest.raises(MissingError, match="q_proj: the base model's weight is on the meta device"):
        compose(base, folders)
    assert untouched(base)


def untouched(model: Any) -> bool:
    return not any(module._forward_hooks or "hub_router_update" in module._modules for module in model.modules())


def test_every_misfit_is_listed_and_the_model_left_alone(
    folders: dict[str, Path], other_folders: dict[str, Path]
) -> None:
    base = llama(hidden_size=64)
    with pytest.raises(IncompatibleAdaptersError) as caught:
        compose(base, {**folders, "opt": other_folders["opt"]})
    message = str(caught.value)
    # attention 2x2, mlp 2x3, all 2x7, layer 2, patterns 2x2, opt 2x4; the k, v, up, ... of other widths, all misfit.
    assert len(caught.value.mismatches) == 4 + 6 + 14 + 2 + 4 + 8
    assert "LlamaForCausalLM" in message
    assert (
        "adapter 'attention', module model.layers.0.self_attn.q_proj: got D_in x D_out 32 x 32, expected 64 x 64"
        in message
    )
    assert "adapter 'opt', module model.decoder.layers.1.fc1: the model has no such module; the nearest are" in message
    assert untouched(base)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("merged", {}, r"(?s)equal rank.*'attention' rank 4"),
        ("spectr", {"merge": "factors"}, r"(?s)equal rank.*'attention' rank 4"),
        ("arrow", {"top_k": 0}, r"top_k=0"),
        ("arrow", {"gamma": 1}, r"gamma=1 is none of its hyperparameters"),
        ("single", {"adapter": "nobody"}, r"adapter='nobody'"),
        ("sparrow", {}, r"no method 'sparrow'"),
    ],
)
def test_unusable_methods_leave_the_model_alone(
    folders: dict[str, Path], method: str, options: dict[str, Any], message: str
) -> None:
    base = llama()
    with pytest.raises(MethodError, match=message):
        compose(base, folders, method, **options)
    assert untouched(base)


def test_method_is_checked_before_a_base_is_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    llama().config.save_pretrained(tmp_path)
    with pytest.raises(MethodError, match="equal rank"):
        compose(tmp_path, folders, "merged")
    with pytest.raises(IncompatibleAdaptersError):
        llama(hidden_size=64).config.save_pretrained(tmp_path)
        compose(tmp_path, folders, "uniform")


@pytest.mark.parametrize("adapters", [[], {}, "a/path", Path("a/path")])
def test_something_that_is_no_pool_is_refused(adapters: Any) -> None:
    with pytest.raises(MethodError, match="adapters is"):
        compose(llama(), adapters)


def test_all_unreadable_adapters_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "hollow").mkdir()
    with pytest.raises(UnsupportedAdapterError) as caught:
        compose(llama(), {"good": folders["all"], "gone": tmp_path / "gone", "hollow": tmp_path / "hollow"})
    assert "'gone'" in str(caught.value)
    assert "'hollow'" in str(caught.value)
    assert "'good'" not in str(caught.value)


def test_composing_a_routed_model_again_names_detach(folders: dict[str, Path]) -> None:
    routed = compose(llama(), folders, "uniform")
    ids = prompt_ids(1, 5)
    before = logits(routed.model, ids)
    with pytest.raises(RoutedStateError, match=r"routed already.*detach\(\)"):
        compose(routed.model, folders, "arrow")
    assert torch.equal(logits(routed.model, ids), before)
    assert compose(routed.detach(), folders, "arrow").method == Arrow()
