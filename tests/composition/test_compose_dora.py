"""Mixes of DoRA, biases and plain LoRA, on linear maps and embeddings, against the loops of naive.py in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compose_models import assert_close, llama, prompt_ids
from compose_zoo import logits, lora, peft_adapter
from torch import nn
from transformers.pytorch_utils import Conv1D

from hub_router.composition.assemble import prepare, stack
from hub_router.composition.attach import attach
from hub_router.composition.build import compose
from hub_router.composition.layer import RoutedUpdate
from hub_router.composition.maps import LinearMap
from hub_router.composition.naive import naive_update
from hub_router.composition.routed import RoutedModel
from hub_router.errors import MethodError
from hub_router.features import ModuleFeatures, PoolFeatures
from hub_router.lora.adapter import LoraAdapter, LoraFactors
from hub_router.lora.bank import AdapterBank, Extra, ModuleBank
from hub_router.routing.base import Gates, Prepared
from hub_router.routing.registry import create

D_IN, D_OUT = 12, 9
METHODS = [("uniform", {}), ("arrow", {"top_k": 2}), ("spectr", {"top_k": 3}), ("single", {"adapter": "dora"})]


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pool(lookup: bool = False) -> list[LoraAdapter]:
    """DoRA, plain, with a bias, DoRA of another rank, and one that adapts nothing here."""
    made = []
    for seed, (name, rank) in enumerate([("dora", 3), ("plain", 2), ("biased", 4), ("other", 1)]):
        extra: dict[str, Any] = {}
        if name in ("dora", "other"):
            extra["magnitude"] = randn(D_OUT, seed=seed + 20).abs() + 0.5
        if name == "biased":
            extra["bias"] = randn(D_OUT, seed=seed + 30)
        factors = LoraFactors(
            randn(rank, D_IN, seed=seed), randn(D_OUT, rank, seed=seed + 10), 0.5 + seed, lookup=lookup, **extra
        )
        made.append(LoraAdapter(name, None, None, {"map": factors}, name))
    return [*made, LoraAdapter("elsewhere", None, None, {}, "elsewhere")]


def model(kind: str) -> nn.Module:
    torch.manual_seed(5)
    linear: nn.Module = nn.Linear(D_IN, D_OUT)
    if kind == "conv1d":
        linear = Conv1D(D_OUT, D_IN)
        nn.init.normal_(linear.bias)
    if kind == "embedding":
        linear = nn.Embedding(D_IN, D_OUT)
    return nn.ModuleDict({"map": linear})


def double(bank: ModuleBank) -> ModuleBank:
    extras = {
        expert: Extra(*(None if each is None else each.double() for each in (extra.magnitude, extra.bias)))
        for expert, extra in bank.extras.items()
    }
    return ModuleBank(bank.module, bank.A.double(), bank.B.double(), bank.ranks, bank.experts, extras, bank.lookup)


@pytest.mark.parametrize(("method", "options"), METHODS)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_a_mix_equals_the_loops(kind: str, method: str, options: dict[str, Any]) -> None:
    lookup = kind == "embedding"
    router, bank = create(method, options), stack(pool(lookup))
    base = model(kind)
    adapted = LinearMap(base["map"], lookup)  # type: ignore[index]
    prepared = prepare(router, bank, PoolFeatures())["map"]
    update = RoutedUpdate(router, prepared, 5, adapted)
    x = (
        torch.randint(0, D_IN, (2, 7), generator=torch.Generator().manual_seed(3))
        if lookup
        else randn(2, 7, D_IN, seed=4)
    )
    before = base["map"](x).detach()  # type: ignore[index]
    attach(base, {"map": update})
    if not lookup:
        x.requires_grad_()
    got = base["map"](x)  # type: ignore[index]

    weight = adapted.weight.detach().double()
    truth = x.detach().clone() if lookup else x.detach().double().requires_grad_()
    exact = double(prepared.bank)
    h = exact.A.T[truth] if lookup else truth @ exact.A.T
    state = {name: t.double() if t.is_floating_point() else t for name, t in prepared.tensors.items()}
    gates = router.route(state, truth, h)
    change = naive_update(truth, exact, gates, prepared.merge, weight)
    bias = getattr(base["map"], "bias", None)  # type: ignore[index]
    plain = weight.T[truth] if lookup else truth @ weight.T
    expected = plain + (0 if bias is None else bias.detach().double()) + change
    assert_close(got.detach(), expected.detach())
    assert not torch.allclose(got, before, atol=0.1)
    if not lookup:
        direction = randn(*got.shape, seed=8)
        (got * direction).sum().backward()
        (expected * direction.double()).sum().backward()
        assert x.grad is not None and truth.grad is not None
        assert_close(x.grad, truth.grad)


@pytest.mark.parametrize(("method", "options"), [("merged", {}), ("spectr", {"merge": "factors"})])
def test_factors_cannot_be_averaged_with_more_than_factors(method: str, options: dict[str, Any]) -> None:
    with pytest.raises(
        MethodError, match=r"DoRA magnitudes and biases.*'dora', 'biased', 'other'; choose a method that sums outputs"
    ):
        create(method, options).check(stack(pool()))


def test_components_share_their_adapters_gain_by_their_mean() -> None:
    # A method that gates components gives an adapter the mean of its components' gates as a whole.
    bank = stack([pool()[0]]).modules["map"]
    adapted = LinearMap(model("linear")["map"], lookup=False)  # type: ignore[index]

    class ByComponent:
        projects = False

        def route(self, tensors: Any, x: torch.Tensor, h: Any) -> Gates:
            return Gates(torch.tensor([0.9, 0.0, 0.3]).expand(*x.shape[:-1], 3), per="component")

    update = RoutedUpdate(ByComponent(), Prepared(bank, {}), 1, adapted)  # type: ignore[arg-type]
    x = randn(4, D_IN, seed=6)
    weight = adapted.weight.detach()
    gain = bank.extras[0].magnitude / (weight + bank.B @ bank.A).norm(dim=1)
    expected = gain * ((x @ bank.A.T * torch.tensor([0.9, 0.0, 0.3])) @ bank.B.T) + 0.4 * (gain - 1) * (x @ weight.T)
    assert_close(update(x, x @ weight.T).detach(), expected.detach())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("dora")
    targets = ["q_proj", "v_proj", "down_proj"]
    return {
        "dora": peft_adapter(llama, root / "dora", 1, lora(targets, use_dora=True)),
        "plain": peft_adapter(llama, root / "plain", 2, lora(["embed_tokens", "q_proj"])),
        "biased": peft_adapter(llama, root / "biased", 3, lora(targets, lora_bias=True)),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["uniform", "arrow", "spectr"])
def test_a_mix_is_saved_and_loaded_to_the_bit(folders: dict[str, Path], method: str, tmp_path: Path) -> None:
    routed = compose(llama(), folders, method)
    expected = logits(routed.model)
    routed.save(tmp_path / "saved")
    before = logits(llama())
    assert torch.equal(logits(routed.detach()), before)
    assert torch.equal(logits(RoutedModel.load(tmp_path / "saved", model=llama()).model), expected)


def test_weights_of_an_embedding_are_traced(folders: dict[str, Path]) -> None:
    routed = compose(llama(), folders, "arrow", top_k=1)
    with routed.trace() as trace:
        routed(input_ids=prompt_ids(2, 9))
    weights = trace.weights["model.embed_tokens"]
    assert weights.shape == (2, 9, 3)
    assert torch.equal(weights, torch.tensor([0.0, 1.0, 0.0]).expand(2, 9, 3))


def test_arrow_on_an_embedding_scores_the_tokens_column() -> None:
    bank = AdapterBank(("a", "b"), stack(pool(lookup=True)[:2]).modules)
    router = create("arrow", {"top_k": 1})
    prepared = router.prepare(bank.modules["map"], bank.adapters, ModuleFeatures())
    ids = torch.arange(D_IN)
    directions = [torch.linalg.svd((B @ A).double())[2][0] for A, B in _pairs(bank.modules["map"])]
    expected = torch.stack([direction.abs() for direction in directions]).argmax(0)
    assert torch.equal(router.route(prepared.tensors, ids, None).indices, expected.unsqueeze(-1))


def _pairs(bank: ModuleBank) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(bank.A[part], bank.B[:, part]) for part in bank.slices]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["uniform", "spectr"])
def test_rounded_after_composing_a_mix_is_still_saved_to_the_bit(
    folders: dict[str, Path], method: str, tmp_path: Path
) -> None:
    # The gains were made from the weights before rounding, and cannot be made again from those that are saved.
    routed = compose(llama(), folders, method)
    routed.model.to(torch.bfloat16)
    expected = logits(routed.model)
    routed.save(tmp_path / "saved")
    assert torch.equal(logits(RoutedModel.load(tmp_path / "saved").model), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_compiled_mixes_are_compiled_once(folders: dict[str, Path]) -> None:
    routed = compose(llama(), folders, "arrow", top_k=2)
    expected = logits(routed.model)
    torch._dynamo.reset()
    compiled = torch.compile(routed.model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for _ in range(12):
            got = compiled(input_ids=prompt_ids(2, 9)).logits
    assert_close(got, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
