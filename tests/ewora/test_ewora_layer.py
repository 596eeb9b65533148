"""The adapted module against the paper's formula in loops: values, gradients, shapes, dtypes, initialisation."""

from __future__ import annotations

import math

import pytest
import torch
from ewora_models import assert_close, factors, reference
from torch import nn
from transformers.pytorch_utils import Conv1D

from hub_router.errors import MethodError
from hub_router.ewora import EworaConfig
from hub_router.ewora.layer import EworaLayer

D_IN, D_OUT = 11, 7
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def make_layer(r: int = 6, n: int = 3, alpha: float = 9.0, conv: bool = False, seed: int = 0) -> EworaLayer:
    """A module with random parameters, in float64."""
    torch.manual_seed(seed)
    base = Conv1D(D_OUT, D_IN) if conv else nn.Linear(D_IN, D_OUT)
    layer = EworaLayer(base, "default", EworaConfig(r=r, n=n, lora_alpha=alpha)).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def expected_outputs(layer: EworaLayer, x: torch.Tensor) -> torch.Tensor:
    A, B, R = factors(layer)
    weight = layer.weight.double()
    W = weight.T if isinstance(layer.base_layer, Conv1D) else weight
    tokens = [
        W @ x_t + layer.bias.double() + reference(x_t, A, B, R, layer.scaling["default"])[0]
        for x_t in x.double().reshape(-1, D_IN)
    ]
    return torch.stack(tokens).reshape(*x.shape[:-1], D_OUT)


@pytest.mark.parametrize(("r", "n"), [(6, 3), (6, 1), (6, 6), (8, 4), (1, 1)])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 4)])
def test_equals_the_reference(r: int, n: int, shape: tuple[int, ...]) -> None:
    layer, x = make_layer(r, n), torch.randn(*shape, D_IN, dtype=torch.float64)
    assert_close(layer(x), expected_outputs(layer, x), 1e-12)


def test_conv1d_equals_the_reference() -> None:
    layer, x = make_layer(conv=True), torch.randn(2, 3, D_IN, dtype=torch.float64)
    assert (layer.in_features, layer.out_features) == (D_IN, D_OUT)
    assert_close(layer(x), expected_outputs(layer, x), 1e-12)


def test_gradients_equal_the_reference() -> None:
    layer, x = make_layer(), torch.randn(2, 3, D_IN, dtype=torch.float64, requires_grad=True)
    towards = torch.randn(2, 3, D_OUT, dtype=torch.float64)
    parameters = [part["default"].weight for part in (layer.ewora_A, layer.ewora_B, layer.ewora_R)]
    got = torch.autograd.grad((layer(x) * towards).sum(), [x, *parameters])
    y, own = x.detach().clone().requires_grad_(), factors(layer)
    tokens = [
        layer.weight @ y_t + layer.bias + reference(y_t, *own, layer.scaling["default"])[0]
        for y_t in y.reshape(-1, D_IN)
    ]
    expected = torch.autograd.grad((torch.stack(tokens) * towards.reshape(-1, D_OUT)).sum(), [y, *own])
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other, 1e-12)


def test_gradients_pass_gradcheck() -> None:
    layer, x = make_layer(r=4, n=2), torch.randn(3, D_IN, dtype=torch.float64, requires_grad=True)
    parts = ("ewora_A.default.weight", "ewora_B.default.weight", "ewora_R.default.weight")
    values = tuple(layer.get_parameter(name).detach().clone().requires_grad_() for name in parts)

    def call(x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(parts, given, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values))
    assert torch.autograd.gradgradcheck(call, (x, *values))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("conv", [False, True])
def test_dtypes_stay_near_the_reference(dtype: torch.dtype, conv: bool) -> None:
    layer = make_layer(r=8, n=4, alpha=4.0, conv=conv).to(dtype)
    x = torch.randn(2, 9, D_IN, dtype=torch.float64).to(dtype)
    got = layer(x)
    assert got.dtype == dtype
    assert_close(got, expected_outputs(layer, x), TOLERANCES[dtype])


def test_adapter_in_float32_on_a_module_in_bfloat16() -> None:
    layer = make_layer()
    layer.base_layer.bfloat16()
    for part in (layer.ewora_A, layer.ewora_B, layer.ewora_R):
        part.float()
    x = torch.randn(4, D_IN).bfloat16()
    got = layer(x)
    assert got.dtype == torch.bfloat16
    assert_close(got, expected_outputs(layer, x), 1e-2)


def test_autocast() -> None:
    layer = make_layer().float()
    x = torch.randn(4, D_IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert got.dtype == torch.bfloat16
    assert_close(got.detach(), expected_outputs(layer, x.detach()).detach(), 4e-2)
    got.float().sum().backward()
    assert layer.ewora_R["default"].weight.grad.dtype == torch.float32
    assert x.grad is not None and x.grad.isfinite().all()


def test_no_tokens() -> None:
    assert make_layer()(torch.zeros(0, D_IN, dtype=torch.float64)).shape == (0, D_OUT)


def test_no_tensor_holds_tokens_by_experts_by_outputs() -> None:
    tokens, n, wide = 50, 4, 96
    layer = EworaLayer(nn.Linear(16, wide), "default", EworaConfig(r=8, n=n))
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(tokens, 16, requires_grad=True))
    assert max(kept) < tokens * wide


def test_untrained_module_is_the_base_module() -> None:
    base = nn.Linear(D_IN, D_OUT)
    layer, x = EworaLayer(base, "default", EworaConfig()), torch.randn(100, D_IN)
    assert torch.equal(layer(x), base(x))


def test_initialisation() -> None:
    torch.manual_seed(0)
    layer = EworaLayer(nn.Linear(500, 40), "default", EworaConfig(r=64, n=8))
    A, B, R = factors(layer)
    bound = 1 / math.sqrt(500)  # LoRA's, whatever the rank of an expert
    assert 0.99 * bound < A.abs().max() <= bound
    assert_close(A.std(), torch.tensor(bound / math.sqrt(3)), 0.02)
    assert not B.any()
    assert 0.0099 < R.abs().max() <= 0.01
    assert_close(R.std(), torch.tensor(0.01 / math.sqrt(3)), 0.05)


def test_dropout_acts_on_the_input_of_the_adapter_alone() -> None:
    layer, x = make_layer(), torch.randn(4, D_IN, dtype=torch.float64)
    layer.update_layer("default", EworaConfig(r=6, n=3, lora_alpha=9.0, lora_dropout=0.5))
    layer.double()
    with torch.no_grad():
        for part in (layer.ewora_A, layer.ewora_B, layer.ewora_R):
            part["default"].weight.normal_()
    assert_close(layer.eval()(x), expected_outputs(layer, x), 1e-12)
    torch.manual_seed(5)
    got = layer.train()(x)
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.5)
    expected = layer.base_layer(x) + expected_outputs(layer, dropped) - layer.base_layer(dropped)
    assert_close(got, expected, 1e-12)


def test_merging_is_refused() -> None:
    layer = make_layer()
    with pytest.raises(MethodError, match=r"cannot be merged.*depend on the input"):
        layer.merge()
    layer.unmerge()
