"""On and off a transformers model: what stays as it was, and what keeps working around the hooks."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from compose_models import assert_close, llama, opt, prompt_ids, save_adapter
from safetensors import safe_open
from torch import nn
from transformers import LlamaForCausalLM, pipeline

from hub_router.composition.attach import attach, detach, routed_updates
from hub_router.composition.build import compose
from hub_router.errors import RoutedStateError
from hub_router.lora.adapter import LoraAdapter, LoraFactors

TOKEN_LEVEL = ["uniform", "arrow", "spectr"]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_the_model_stays_what_it_was(folders: dict[str, Path]) -> None:
    base = llama()
    linear = base.model.layers[0].self_attn.q_proj
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    parameters = [name for name, _ in base.named_parameters()]
    routed = compose(base, folders)
    assert routed.model is base
    assert type(base) is LlamaForCausalLM
    assert base.model.layers[0].self_attn.q_proj is linear
    assert type(linear) is nn.Linear
    assert list(base.state_dict()) == list(before)
    assert [name for name, _ in base.named_parameters()] == parameters
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in before.items())
    base.load_state_dict(before, strict=True)


def test_detach_gives_the_base_back_bit_for_bit(folders: dict[str, Path]) -> None:
    ids = prompt_ids(2, 9)
    base = llama()
    state, before = {k: v.clone() for k, v in base.state_dict().items()}, logits(base, ids)
    shapes = {name: list(vars(module)) for name, module in base.named_modules()}
    routed = compose(base, folders)
    assert not torch.allclose(logits(base, ids), before, rtol=1e-2)
    assert routed.detach() is base
    assert torch.equal(logits(base, ids), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())
    assert {name: list(vars(module)) for name, module in base.named_modules()} == shapes
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._forward_hooks_with_kwargs for m in base.modules())


def test_detached_routed_model_refuses_use(folders: dict[str, Path], tokenizer: Any, tmp_path: Path) -> None:
    routed = compose(llama(), folders, tokenizer=tokenizer)
    base = routed.detach()
    uses = [
        lambda: routed(input_ids=prompt_ids(1, 2)),
        lambda: routed.generate("a"),
        lambda: routed.stream("a"),
        lambda: routed.explain("a"),
        routed.trace,
        lambda: routed.save(tmp_path / "x"),
        lambda: routed.model,
    ]
    for use in uses:
        with pytest.raises(RoutedStateError, match="was detached; compose again"):
            use()
    assert routed.detach() is base
    assert "detached" in repr(routed)


def test_failure_while_attaching_takes_everything_off_again(folders: dict[str, Path]) -> None:
    base = llama()
    updates = {update.module: update for _, update in routed_updates(compose(llama(), folders).model)}
    updates["model.layers.9.self_attn.q_proj"] = next(iter(updates.values()))
    with pytest.raises(AttributeError):
        attach(base, updates)
    assert not list(routed_updates(base))
    assert not any(module._forward_hooks for module in base.modules())


def test_save_pretrained_saves_the_base_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    compose(llama(), folders).model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if "hub_router" in name]  # noqa: SIM118 (not a mapping)
    ids = prompt_ids(1, 5)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path), ids), logits(llama(), ids))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_is_routed_and_independent(folders: dict[str, Path], copier: Any) -> None:
    ids = prompt_ids(2, 9)
    routed = compose(llama(), folders, "spectr")
    expected = logits(routed.model, ids)
    twin = copier(routed.model)
    routed.detach()
    assert torch.equal(logits(twin, ids), expected)
    detach(twin)
    assert torch.equal(logits(twin, ids), logits(llama(), ids))
    assert not any(module._forward_hooks for module in twin.modules())


def test_the_bank_follows_the_model_to_another_dtype(equal_folders: dict[str, Path]) -> None:
    ids = prompt_ids(1, 5)
    moved = compose(llama(), equal_folders, "uniform").model.bfloat16()
    assert all(update.A.dtype == torch.bfloat16 for _, update in routed_updates(moved))
    assert torch.equal(logits(moved, ids), logits(compose(llama().bfloat16(), equal_folders, "uniform").model, ids))


@pytest.mark.parametrize("method", [*TOKEN_LEVEL, "base"])
def test_routed_linear_map_compiles_without_a_graph_break(folders: dict[str, Path], method: str) -> None:
    linear = compose(llama(), folders, method).model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 32)
    torch._dynamo.reset()
    assert_close(torch.compile(linear, fullgraph=True, backend="eager")(x), linear(x))


def test_whole_model_compiles_without_a_graph_break_also_while_traced(tmp_path: Path) -> None:
    one_layer = {"num_hidden_layers": 1}
    pool = [
        save_adapter(llama(**one_layer), tmp_path / str(rank), rank, r=rank, target_modules=["q_proj", "up_proj"])
        for rank in (2, 5)
    ]
    routed = compose(llama(**one_layer), pool, "arrow", top_k=1)
    ids = prompt_ids(2, 9)
    with routed.trace() as expected:
        expected_logits = routed(input_ids=ids).logits
    torch._dynamo.reset()
    compiled = torch.compile(routed.model, fullgraph=True, backend="eager")
    assert_close(compiled(input_ids=ids, use_cache=False).logits, expected_logits)
    with routed.trace() as trace:
        assert_close(compiled(input_ids=ids, use_cache=False).logits, expected_logits)
    assert list(trace.weights) == list(expected.weights)
    for module, weights in expected.weights.items():
        assert_close(trace.weights[module], weights)


@pytest.mark.slow
def test_single_module_compiles_with_fullgraph_in_inductor(folders: dict[str, Path]) -> None:
    routed = compose(llama(), folders, "arrow")
    linear = routed.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 32)
    torch._dynamo.reset()
    assert_close(torch.compile(linear, fullgraph=True)(x), linear(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(folders: dict[str, Path], reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = compose(llama(), folders, "arrow").model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        ids = prompt_ids(2, 9)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert_close(checkpointed, plain)


def test_adapters_get_no_gradients(folders: dict[str, Path]) -> None:
    model = compose(llama(), folders, "spectr").model
    ids = prompt_ids(1, 5)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(
        buffer.grad is None and not buffer.requires_grad for _, u in routed_updates(model) for buffer in u.buffers()
    )


def test_composes_and_runs_in_inference_mode(folders: dict[str, Path]) -> None:
    ids = prompt_ids(2, 9)
    expected = logits(compose(llama(), folders).model, ids)
    with torch.inference_mode():
        routed = compose(llama(), folders)
        assert torch.equal(routed(input_ids=ids).logits, expected)


def test_autocast(equal_folders: dict[str, Path]) -> None:
    ids = prompt_ids(2, 9)
    routed = compose(llama(), equal_folders, "arrow", top_k=3)
    expected = logits(routed.model, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = logits(routed.model, ids)
    assert_close(got, expected, 0.1)


@pytest.mark.parametrize("tokens", [1, 7])
def test_autocast_where_few_of_many_are_chosen(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    module = "model.layers.0.self_attn.q_proj"
    pool = []
    for number in range(40):
        A, Bt = torch.randn(2, 4, 32, generator=generator)
        pool.append(LoraAdapter(f"a{number}", None, None, {module: LoraFactors(A, Bt.mT, 1.0)}, str(number)))
    linear = compose(llama(), {each.name: each for each in pool}, "arrow").model.get_submodule(module)
    x = torch.randn(1, tokens, 32, generator=generator).bfloat16().float()
    with torch.no_grad():
        expected = linear(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_close(linear(x).float(), expected, 1e-2)


def test_input_given_by_keyword(folders: dict[str, Path]) -> None:
    linear = compose(llama(), folders).model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 32)
    assert torch.equal(linear(input=x), linear(x))


def test_flattened_tokens(other_folders: dict[str, Path]) -> None:
    ids = prompt_ids(3, 5)
    model = compose(opt(), [other_folders["opt"]], "arrow").model
    together, alone = logits(model, ids), torch.cat([logits(model, row[None]) for row in ids])
    assert_close(together, alone)


def test_pipeline(folders: dict[str, Path], tokenizer: Any) -> None:
    routed = compose(llama(), folders, tokenizer=tokenizer)
    generator = pipeline("text-generation", model=routed.model, tokenizer=tokenizer)
    (answer,) = generator("Once upon", max_new_tokens=5, do_sample=False, return_full_text=False)
    assert answer["generated_text"] == routed.generate("Once upon", max_new_tokens=5, do_sample=False)


@pytest.mark.gpu
@pytest.mark.parametrize("method", TOKEN_LEVEL)
def test_cuda_equals_cpu(equal_folders: dict[str, Path], method: str) -> None:
    ids = prompt_ids(2, 9)
    expected = logits(compose(llama(), equal_folders, method).model, ids)
    moved = compose(llama(), equal_folders, method).model.to("cuda")
    assert_close(logits(moved, ids.cuda()).cpu(), expected, 1e-3)
    there = compose(llama().to("cuda"), equal_folders, method).model
    assert_close(logits(there, ids.cuda()).cpu(), expected, 1e-3)
