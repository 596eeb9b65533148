"""Weights that a model reads past their module: found before anything is attached, or when the model runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compose_models import llama
from compose_zoo import ARCHITECTURES, logits
from torch import nn

from hub_router.composition.build import compose
from hub_router.composition.bypass import bypassed
from hub_router.errors import IncompatibleAdaptersError, RoutedStateError
from hub_router.lora.adapter import LoraAdapter, LoraFactors


def adapter(model: nn.Module, *names: str) -> LoraAdapter:
    factors = {}
    for name in names:
        d_out, d_in = model.get_submodule(name).weight.shape
        factors[name] = LoraFactors(torch.ones(2, d_in), torch.ones(d_out, 2), 1.0)
    return LoraAdapter("a", None, None, factors, "a")


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba"])
def test_mambas_step_projection_is_refused(name: str) -> None:
    model = ARCHITECTURES[name].make(0)
    step, others = "backbone.layers.1.mixer.dt_proj", [f"backbone.layers.1.mixer.{n}_proj" for n in ("in", "x", "out")]
    assert list(bypassed(model, [step, *others])) == [step]
    with pytest.raises(IncompatibleAdaptersError) as caught:
        compose(model, {"a": adapter(model, step, *others)}, "uniform")
    assert caught.value.mismatches == (
        f"adapter 'a', module {step}: {type(model.backbone.layers[1].mixer).__name__} reads its weight without calling "
        "it, so the adapter would do nothing",
    )
    compose(model, {"a": adapter(model, *others)}, "uniform").detach()


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"mamba", "falcon_mamba"}))
def test_no_other_architecture_reads_past_its_linear_maps(name: str) -> None:
    model = ARCHITECTURES[name].make(0)
    names = [path for path, module in model.named_modules() if hasattr(module, "weight") and module.weight.ndim == 2]
    assert len(names) > 8
    # T5's own table is called only by its encoder and decoder, which hold tied copies of it.
    idle = {"shared": "the model never calls it, only others that share its weight, so the adapter would do nothing"}
    assert bypassed(model, names) == (idle if name == "t5" else {})


class Shortcut(nn.Module):
    """Calls its map, or multiplies by its weight, as a model with a fused kernel does."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)
        self.fused = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.map.weight.T if self.fused else self.map(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Shortcut()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


def test_a_shortcut_taken_while_running_is_an_error_and_not_the_base_model() -> None:
    model: Any = Model()
    routed = compose(model, {"a": adapter(model, "block.map")}, "uniform")
    x = torch.ones(1, 4)
    assert not torch.allclose(routed(x), x @ model.block.map.weight.T + model.block.map.bias)
    model.block.fused = True
    with pytest.raises(RoutedStateError, match=r"block\.map: Shortcut used its weight without calling it"):
        routed(x)
    routed.detach()
    assert torch.equal(model(x), x @ model.block.map.weight.T)


def test_what_only_asks_for_a_dtype_is_no_shortcut() -> None:
    # T5's feed-forward map and every lm_head are asked for their dtype before they are called.
    model = ARCHITECTURES["t5"].make(0)
    assert not any(module._forward_pre_hooks for module in model.modules())
    compose(model, {"a": adapter(model, "encoder.block.0.layer.1.DenseReluDense.wo", "lm_head")}, "uniform")
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.isfinite(logits(model)).all()


def test_a_model_that_cannot_run_without_weights_is_guarded(tmp_path: Path) -> None:
    # The class of a live model need not be built from a config; then only the guard can tell.
    assert bypassed(Model(), ["block.map"]) == {}
    assert bypassed(llama(), ["model.layers.0.self_attn.q_proj"]) == {}


def test_a_guarded_model_is_copied_pickled_and_used_by_threads() -> None:
    import copy
    import pickle
    from concurrent.futures import ThreadPoolExecutor

    model = ARCHITECTURES["mamba"].make(0)
    name = "backbone.layers.1.mixer.x_proj"
    routed = compose(model, {"a": adapter(model, name, "backbone.layers.0.mixer.in_proj")}, "uniform")
    assert model.get_submodule("backbone.layers.1.mixer")._forward_pre_hooks
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    with ThreadPoolExecutor(4) as threads:
        assert all(torch.equal(each, expected) for each in threads.map(lambda _: logits(model), range(24)))
    routed.detach()
    assert not model.get_submodule("backbone.layers.1.mixer")._forward_pre_hooks


class Pair(nn.Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), x


def test_a_map_that_gives_more_than_a_tensor_is_an_error() -> None:
    model = nn.ModuleDict({"map": Pair(4, 4)})
    compose(model, {"a": adapter(model, "map")}, "uniform")
    with pytest.raises(RoutedStateError, match="module map: Pair gives a tuple, expected one tensor"):
        model["map"](torch.ones(1, 4))


def test_a_tower_that_text_alone_does_not_run_is_not_called_idle() -> None:
    """A vision tower's position table is read past in places and called in others; text alone runs neither."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    class Both(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = config
            sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
            self.tower = SiglipVisionModel(SiglipVisionConfig(image_size=8, patch_size=4, **sizes))
            self.head = nn.Linear(4, 4)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.head(torch.zeros(1, 4, device=input_ids.device))

    model = Both(None)
    (name,) = [path for path, module in model.named_modules() if path.endswith("position_embedding")]
    assert bypassed(model, [name]) == {}
