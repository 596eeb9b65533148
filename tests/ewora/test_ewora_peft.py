"""Through PEFT: make, save, load, switch, disable, delete, refuse; on a tiny Llama and a tiny GPT-2."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ewora_models import (
    GPT2_TARGETS,
    LLAMA_TARGETS,
    adapted,
    assert_close,
    factors,
    gpt2,
    ids,
    layers_of,
    llama,
    randomise,
    reference,
)
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hub_router.errors import IncompatibleAdaptersError, MethodError
from hub_router.ewora import EworaConfig, EworaModel
from hub_router.ewora.layer import EworaLayer

Make = Callable[[], PreTrainedModel]
BASES = pytest.mark.parametrize(("make", "targets"), [(llama, LLAMA_TARGETS), (gpt2, GPT2_TARGETS)])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(ids(2, 9)).logits


def loop_forward(base: PreTrainedModel, layers: dict[str, EworaLayer]) -> torch.Tensor:
    """Logits of a float64 base model whose modules are followed by the paper's formula in loops."""

    def follow(layer: EworaLayer) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor]:
        own, scaling = factors(layer), layer.scaling["default"]

        def add(_: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
            flat = args[0].reshape(-1, args[0].shape[-1])
            return y + torch.stack([reference(x, *own, scaling)[0] for x in flat]).reshape(y.shape)

        return add

    base = base.double()
    for name, layer in layers.items():
        base.get_submodule(name).register_forward_hook(follow(layer))
    return logits(base)


@BASES
def test_untrained_model_is_the_base_model(make: Make, targets: list[str]) -> None:
    expected = logits(make())
    model = adapted(make(), target_modules=targets)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(randomise(model, 1)), expected)


@BASES
def test_whole_model_equals_the_reference(make: Make, targets: list[str]) -> None:
    model = randomise(adapted(make().double(), target_modules=targets, n=2, lora_alpha=4), 1)
    assert_close(logits(model), loop_forward(make(), layers_of(model.get_base_model())), 1e-12)


def test_targets_of_gpt2_are_conv1d() -> None:
    layers = layers_of(adapted(gpt2(), target_modules=None))
    assert len(layers) == 2 and all(isinstance(layer.base_layer, Conv1D) for layer in layers.values())
    layer = layers["base_model.model.transformer.h.0.attn.c_attn"]
    assert (layer.in_features, layer.out_features) == (32, 96)


def test_targets_are_those_of_lora_by_default() -> None:
    ewora = adapted(llama(), target_modules=None).base_model.targeted_module_names
    assert ewora == get_peft_model(llama(), LoraConfig()).base_model.targeted_module_names


def test_all_linear_leaves_the_head_out() -> None:
    names = {name.rsplit(".", 1)[-1] for name in layers_of(adapted(llama(), target_modules="all-linear"))}
    assert names == set(LLAMA_TARGETS)


def test_layers_and_exclusions() -> None:
    model = adapted(llama(), layers_to_transform=[1], exclude_modules=["o_proj"])
    names = set(model.base_model.targeted_module_names)
    assert names and all(".1." in name and not name.endswith("o_proj") for name in names)


def test_trains_its_own_parameters_alone() -> None:
    trained = {name for name, value in adapted(llama()).named_parameters() if value.requires_grad}
    assert trained and all(".ewora_" in name for name in trained)
    some = adapted(gpt2(), target_modules=["c_attn"], bias="ewora_only", modules_to_save=["ln_f"])
    others = {n for n, value in some.named_parameters() if value.requires_grad and ".ewora_" not in n}
    assert {name.rsplit("model.", 1)[-1] for name in others} == {
        "transformer.h.0.attn.c_attn.base_layer.bias",
        "transformer.h.1.attn.c_attn.base_layer.bias",
        "transformer.ln_f.modules_to_save.default.weight",
        "transformer.ln_f.modules_to_save.default.bias",
    }


@BASES
def test_parameters_are_those_of_lora_and_the_routers(make: Make, targets: list[str]) -> None:
    r, n = 32, 4
    ewora = adapted(make(), r=r, n=n, target_modules=targets)
    lora = get_peft_model(make(), LoraConfig(r=r, target_modules=targets))
    routers = len(layers_of(ewora)) * n * r
    assert ewora.get_nb_trainable_parameters()[0] == lora.get_nb_trainable_parameters()[0] + routers


@pytest.mark.parametrize("whole", [False, True])
def test_model_in_half_precision_stays_near_the_exact_one(whole: bool) -> None:
    # The update is quadratic in its input: with a large one, depth would amplify the rounding without bound.
    config = EworaConfig(r=8, lora_alpha=0.1, target_modules=LLAMA_TARGETS)
    model = randomise(get_peft_model(llama().bfloat16(), config, autocast_adapter_dtype=not whole), 1)
    stored = {value.dtype for name, value in model.named_parameters() if ".ewora_" in name}
    assert stored == {torch.bfloat16 if whole else torch.float32}
    got, exact = logits(model), logits(copy.deepcopy(model).double())
    assert got.dtype == torch.bfloat16
    assert_close(got, exact, 2e-2)
    assert (exact - logits(llama())).abs().max() > 0.2 * exact.abs().max()


@BASES
def test_saved_and_loaded(make: Make, targets: list[str], tmp_path: Path) -> None:
    model = randomise(adapted(make(), target_modules=targets, n=2, lora_alpha=6), 1)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.split(".")[-2] for key in keys} == {"ewora_A", "ewora_B", "ewora_R"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "EWORA"
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert isinstance(loaded.base_model, EworaModel)
    assert torch.equal(logits(loaded), expected)
    assert not any(value.requires_grad for value in loaded.parameters())
    trainable = PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)
    assert all(value.requires_grad == (".ewora_" in name) for name, value in trainable.named_parameters())
    lean = PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(lean), expected)


def test_transformers_loads_it_without_a_wrapper(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = randomise(adapted(base), 1)
    model.save_pretrained(tmp_path / "adapter")
    plain = llama()
    plain.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(plain), logits(model))
    by_name = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(by_name), logits(model))


@BASES
def test_two_adapters(make: Make, targets: list[str], tmp_path: Path) -> None:
    options = {
        "red": {"r": 8, "n": 4, "target_modules": targets},
        "blue": {"r": 6, "n": 3, "target_modules": targets[:1]},
    }
    base, alone = logits(make()), {}
    for seed, (name, chosen) in enumerate(options.items()):
        model = randomise(adapted(make(), **chosen), seed)
        alone[name] = logits(model)
        model.save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(make(), tmp_path / "red", adapter_name="red")
    model.load_adapter(tmp_path / "blue", adapter_name="blue")
    assert torch.equal(logits(model), alone["red"])
    model.set_adapter("blue")
    assert torch.equal(logits(model), alone["blue"])
    assert {n for n, value in model.named_parameters() if value.requires_grad} == {
        n for n, _ in model.named_parameters() if ".ewora_" in n and ".blue." in n
    }
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), alone["blue"])
    model.set_adapter("red")
    assert (
        get_peft_model_state_dict(model, adapter_name="blue").keys()
        == load_file(tmp_path / "blue" / "adapter_model.safetensors").keys()
    )
    model.save_pretrained(tmp_path / "both")
    again = PeftModel.from_pretrained(make(), tmp_path / "both" / "blue")
    assert torch.equal(logits(again), alone["blue"])
    model.delete_adapter("red")
    assert list(model.peft_config) == ["blue"] and not any(".red." in name for name, _ in model.named_parameters())
    model.set_adapter("blue")
    assert torch.equal(logits(model), alone["blue"])


def test_both_adapters_at_once_add_up() -> None:
    model = adapted(llama(num_hidden_layers=1), target_modules=["q_proj"])
    model.add_adapter("other", EworaConfig(r=4, n=2, target_modules=["q_proj"]))
    randomise(randomise(model, 1), 2, "other")
    model.base_model.set_adapter(["default", "other"])
    (layer,) = layers_of(model).values()
    x = torch.randn(3, 32)
    expected = layer.base_layer(x) + layer.update("default", x) + layer.update("other", x)
    assert torch.equal(layer(x), expected)


def test_generation_with_a_cache_and_without() -> None:
    model = randomise(adapted(llama()), 1)
    prompt = ids(2, 5)
    cached = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, use_cache=False))


def test_compiled_layer_equals_itself() -> None:
    layer = next(iter(layers_of(randomise(adapted(llama()), 1)).values()))
    x = torch.randn(3, 32)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


def test_merging_is_refused_and_changes_nothing() -> None:
    model = randomise(adapted(llama()), 1)
    expected = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(MethodError, match=r"cannot be merged .* depend on the input .*unload\(\)"):
            merge()
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert torch.equal(logits(model.unload()), logits(llama()))


def test_other_layer_types_are_refused_all_at_once() -> None:
    model = llama()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(IncompatibleAdaptersError) as caught:
        adapted(model, target_modules=["q_proj", "embed_tokens", "input_layernorm"])
    assert [line.split(":")[0] for line in caught.value.mismatches] == [
        "module model.embed_tokens",
        "module model.layers.0.input_layernorm",
        "module model.layers.1.input_layernorm",
    ]
    assert "torch.nn.modules.sparse.Embedding, expected torch.nn.Linear or transformers' Conv1D" in str(caught.value)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_map_that_its_owner_does_not_call_is_refused() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2)

    with pytest.raises(IncompatibleAdaptersError, match=r"inner.out_proj: got .*uses without calling it"):
        get_peft_model(Attention(), EworaConfig(r=4, target_modules=["out_proj"]))


def test_lora_layer_is_refused() -> None:
    model = llama()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "lora")
    with pytest.raises(IncompatibleAdaptersError, match=r"q_proj: got peft.tuners.lora"):
        model.add_adapter(EworaConfig(target_modules=["q_proj"]), "ewora")


def test_refused_second_adapter_leaves_the_first() -> None:
    model = randomise(adapted(llama()), 1)
    expected = logits(model)
    with pytest.raises(IncompatibleAdaptersError, match="norm"):
        model.add_adapter("bad", EworaConfig(r=8, target_modules=["q_proj", "norm"]))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)


def test_config_changed_after_construction_is_checked() -> None:
    config = EworaConfig(target_modules=["q_proj"])
    config.n = 5
    with pytest.raises(MethodError, match="r=32 with n=5"):
        get_peft_model(llama(), config)
