"""xlora and mixlora in whole models: against PEFT's X-LoRA, and against loops over tokens and experts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from compose_models import ATTENTION, MLP, assert_close, llama, make_tokenizer, opt, prompt_ids, save_adapter
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hub_router import RoutedModel, compose
from hub_router.composition.attach import routed_updates
from hub_router.errors import MethodError, RoutedStateError
from hub_router.prototypes import PrototypeMember, Prototypes, write_prototypes
from hub_router.routing.trained import PROTOTYPES

METHODS = ["xlora", "mixlora"]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three adapters of the feed-forward maps, of different ranks."""
    root = tmp_path_factory.mktemp("outer")
    return {
        f"expert-{seed}": save_adapter(llama(), root / f"expert-{seed}", seed, r=2 + seed, target_modules=MLP)
        for seed in range(3)
    }


def set_file(routed: RoutedModel, width: int, folder: Path, scale: float = 0.5) -> str:
    """A prototype set of random vectors, one per adapter and block."""
    rng = np.random.default_rng(5)
    rows = {
        name: {
            block: (scale * rng.standard_normal(width)).astype(np.float32)
            for block in {update.module.rpartition(".")[0] for _, update in routed_updates(routed.model)}
        }
        for name in sorted(routed.adapters)
    }
    vectors = {
        name: {update.module: each[update.module.rpartition(".")[0]] for _, update in routed_updates(routed.model)}
        for name, each in rows.items()
    }
    members = tuple(PrototypeMember(name, routed.weights_hashes[name], vectors[name]) for name in routed.adapters)
    made = Prototypes(
        method=routed.method.name,
        base_model="tiny",
        members=members,
        parent="",
        hyperparameters={},
        metrics={},
        data_hash="0" * 64,
        seed=0,
    )
    path = folder / f"{routed.method.name}.safetensors"
    write_prototypes(path, made)
    return str(path)


def composed(pool: Mapping[str, Path], method: str, folder: Path, **settings: Any) -> RoutedModel:
    """A routed model with random gates."""
    untrained = compose(llama(), pool, method, tokenizer=make_tokenizer())
    width = 33 if method == "xlora" else 32
    name = set_file(untrained, width, folder)
    return compose(llama(), pool, method, tokenizer=make_tokenizer(), prototypes=name, **settings)


def logits(routed: RoutedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return routed(input_ids=ids, **options).logits


@pytest.mark.parametrize("top_k", [None, 2])
def test_xlora_equals_pefts(pool: dict[str, Path], tmp_path: Path, top_k: int | None) -> None:
    routed = composed(pool, "xlora", tmp_path, top_k=top_k, temperature=0.7)
    model = llama()
    model.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=32,
        xlora_depth=1,
        layerwise_scalings=True,
        softmax_temperature=0.7,
        top_k_lora=top_k,
        adapters={str(place): str(folder) for place, folder in enumerate(pool.values())},
    )
    theirs = peft.get_peft_model(model, config)
    classifier = theirs.base_model.internal_xlora_classifier.layers[0]
    updates = [update for _, update in routed_updates(routed.model)]
    rows = torch.cat([update.state()[PROTOTYPES] for update in updates])  # [layers C, D + 1]
    with torch.no_grad():
        classifier.weight.copy_(rows[:, :-1])
        classifier.bias.copy_(rows[:, -1])
        ids = prompt_ids(2, 9)
        expected = theirs(input_ids=ids).logits
    assert_close(logits(routed, ids), expected)


def ffn_loop(routed: RoutedModel, layer: int, x: torch.Tensor, top_k: int) -> torch.Tensor:
    """MixLoRA, Eq. 2 to 4, in float64: a token's best experts, each the whole block with its own weights."""
    mlp = routed.model.model.layers[layer].mlp
    updates = {name: getattr(mlp, name).hub_router_update for name in MLP}
    gate = updates["down_proj"].state()[PROTOTYPES].double()
    experts = range(gate.shape[0])

    def weight(name: str, expert: int) -> torch.Tensor:
        update = updates[name]
        rows = slice(update.offsets[expert], update.offsets[expert + 1])
        return getattr(mlp, name).weight.double() + update.Bt[rows].double().T @ update.A[rows].double()

    out = torch.zeros_like(x)
    for place in np.ndindex(*x.shape[:-1]):
        token = x[place]
        scores = [torch.exp(gate[expert] @ token) for expert in experts]
        shares = [score / sum(scores) for score in scores]
        best = sorted(experts, key=lambda expert: -shares[expert].item())[:top_k]
        for expert in best:
            w = shares[expert] / sum(shares[each] for each in best)
            hidden = torch.nn.functional.silu(weight("gate_proj", expert) @ token) * (weight("up_proj", expert) @ token)
            out[place] += w * (weight("down_proj", expert) @ hidden)
    return out


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_mixlora_mixes_the_outputs_of_whole_blocks(pool: dict[str, Path], tmp_path: Path, top_k: int) -> None:
    routed = composed(pool, "mixlora", tmp_path, top_k=top_k)
    block = routed.model.model.layers[1].mlp
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    wide = x.detach().double().requires_grad_()
    got, expected = block(x), ffn_loop(routed, 1, wide, top_k)
    assert_close(got.detach(), expected.detach())
    direction = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    (found,) = torch.autograd.grad((got * direction).sum(), x)
    (true,) = torch.autograd.grad((expected * direction.double()).sum(), wide)
    assert_close(found, true, 1e-4)
    assert_close(block(x=x).detach(), expected.detach())


def test_mixlora_of_one_expert_is_that_adapter(pool: dict[str, Path]) -> None:
    own = compose(llama(), {"a": pool["expert-1"]}, "uniform")
    alone = compose(llama(), {"a": pool["expert-1"]}, "mixlora")
    assert_close(logits(alone, prompt_ids(1, 7)), logits(own, prompt_ids(1, 7)))


def test_the_start_of_xlora_is_the_mean_of_all(pool: dict[str, Path]) -> None:
    uniform, start = (compose(llama(), pool, method) for method in ("uniform", "xlora"))
    assert_close(logits(start, prompt_ids(2, 7)), logits(uniform, prompt_ids(2, 7)))


@pytest.mark.parametrize("method", METHODS)
def test_generate_equals_reading_it_all_again(pool: dict[str, Path], tmp_path: Path, method: str) -> None:
    routed = composed(pool, method, tmp_path)
    ids = prompt_ids(1, 6)
    for _ in range(5):
        ids = torch.cat([ids, logits(routed, ids, use_cache=False)[:, -1:].argmax(-1)], dim=1)
    made = routed.model.generate(prompt_ids(1, 6), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(made, ids)
    beams = routed.model.generate(prompt_ids(1, 6), max_new_tokens=3, num_beams=3, do_sample=False)
    assert beams.shape[0] == 1


@pytest.mark.parametrize("method", METHODS)
def test_left_padding_changes_nothing(pool: dict[str, Path], tmp_path: Path, method: str) -> None:
    routed = composed(pool, method, tmp_path)
    alone = [routed.generate(text, max_new_tokens=4) for text in ("one", "a longer prompt")]
    assert routed.generate(["one", "a longer prompt"], max_new_tokens=4) == alone


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_traced_once_per_module(pool: dict[str, Path], tmp_path: Path, method: str) -> None:
    routed = composed(pool, method, tmp_path)
    with routed.trace() as trace:
        logits(routed, prompt_ids(2, 7))
    assert len(trace.weights) == 6
    for weights in trace.weights.values():
        assert weights.shape == (2, 7, 3)
        assert_close(weights.sum(-1), torch.ones(2, 7))
    used = (trace.weights["model.layers.0.mlp.up_proj"] > 0).sum(-1)
    assert torch.equal(used, torch.full((2, 7), 3 if method == "xlora" else 2))
    assert routed.explain("abc", max_new_tokens=2).weights.shape[1] == 3


def test_xlora_refuses_to_continue_a_cache_of_others(pool: dict[str, Path]) -> None:
    cache = llama()(input_ids=prompt_ids(1, 4), use_cache=True).past_key_values
    routed = compose(llama(), pool, "xlora")
    with pytest.raises(RoutedStateError, match="has not seen from its beginning"):
        routed(input_ids=prompt_ids(1, 1), past_key_values=cache)
    assert logits(routed, prompt_ids(1, 4)).shape[1] == 4


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_cache_continues_reordered_repeated_and_cropped(pool: dict[str, Path], tmp_path: Path, method: str) -> None:
    routed = composed(pool, method, tmp_path)
    ids = prompt_ids(2, 8)
    cache = routed(input_ids=ids[:, :5], use_cache=True).past_key_values
    rest = routed(input_ids=ids[:, 5:], past_key_values=copy.deepcopy(cache)).logits
    assert_close(rest.detach(), logits(routed, ids)[:, 5:], 1e-4)
    order = torch.tensor([1, 0, 1])
    several = copy.deepcopy(cache)
    several.reorder_cache(order)
    rest = routed(input_ids=ids[order, 5:], past_key_values=several).logits
    assert_close(rest.detach(), logits(routed, ids[order])[:, 5:], 1e-4)
    cache.crop(-2)
    rest = routed(input_ids=ids[:, 3:], past_key_values=cache).logits
    assert_close(rest.detach(), logits(routed, ids)[:, 3:], 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_save_load_copy_and_detach(pool: dict[str, Path], tmp_path: Path, method: str) -> None:
    model = llama()
    base = model(input_ids=prompt_ids(2, 7)).logits
    routed = composed(pool, method, tmp_path)
    before = logits(routed, prompt_ids(2, 7))
    routed.save(tmp_path / "saved")
    assert torch.equal(logits(RoutedModel.load(tmp_path / "saved"), prompt_ids(2, 7)), before)
    twin = copy.deepcopy(routed.model)
    with torch.no_grad():
        assert torch.equal(twin(input_ids=prompt_ids(2, 7)).logits, before)
    free = routed.detach()
    assert torch.equal(free(input_ids=prompt_ids(2, 7)).logits, base)
    hooks = [
        hook
        for module in free.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    # transformers leaves hooks of its own, which collect the hidden states.
    assert not any("hub_router" in repr(hook) for hook in hooks)


@pytest.mark.parametrize("method", METHODS)
def test_changing_the_method_and_back(pool: dict[str, Path], method: str) -> None:
    routed = compose(llama(), pool, method)
    before = logits(routed, prompt_ids(1, 5))
    routed.set_method("uniform")
    routed.set_method(method)
    assert torch.equal(logits(routed, prompt_ids(1, 5)), before)


def test_mixlora_gates_maps_that_are_in_no_block_by_their_inputs(tmp_path: Path) -> None:
    """Attention's maps, and those of a layer as a whole, in float64 and token by token."""
    for model, targets, path in (
        (llama(), ATTENTION, "model.layers.1.self_attn.v_proj"),
        (opt(), ["fc1", "fc2"], "model.decoder.layers.1.fc2"),
    ):
        folders = {
            f"e{seed}": save_adapter(
                copy.deepcopy(model), tmp_path / f"{path}{seed}", seed, r=2 + seed, target_modules=targets
            )
            for seed in range(3)
        }
        routed = compose(model, folders, "mixlora")
        linear = model.get_submodule(path)
        update: Any = linear.hub_router_update
        update.state()[PROTOTYPES].copy_(torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(2)))
        gate = update.state()[PROTOTYPES].double()
        x = torch.randn(2, 5, linear.in_features, generator=torch.Generator().manual_seed(1))
        expected = linear.weight.double() @ x.double().unsqueeze(-1)
        expected = expected.squeeze(-1) + (0 if linear.bias is None else linear.bias.double())
        for place in np.ndindex(2, 5):
            token = x[place].double()
            powers = [torch.exp(row @ token) for row in gate]
            best = sorted(range(3), key=lambda expert: -powers[expert].item())[:2]
            for expert in best:
                rows = slice(update.offsets[expert], update.offsets[expert + 1])
                part = update.Bt[rows].double().T @ (update.A[rows].double() @ token)
                expected[place] += powers[expert] / sum(powers[each] for each in best) * part
        assert_close(linear(x).detach(), expected.detach())
        assert routed.adapters == ("e0", "e1", "e2")


def test_mixlora_of_experts_with_other_maps(pool: dict[str, Path], tmp_path: Path) -> None:
    """An expert changes the maps that it has; the rest of its block is the base model's."""
    half = save_adapter(llama(), tmp_path / "half", 1, r=2, target_modules=["up_proj", "down_proj", "q_proj"])
    routed = composed({"half": half, **pool}, "mixlora", tmp_path, top_k=1)
    block, x = routed.model.model.layers[0].mlp, torch.randn(6, 40, 32, generator=torch.Generator().manual_seed(4))
    with routed.trace() as trace, torch.no_grad():
        got = block(x)
    weights = trace.steps["model.layers.0.mlp.up_proj"][0]
    chosen = weights.argmax(-1)
    assert set(chosen.flatten().tolist()) == {0, 1, 2, 3}
    without = trace.steps["model.layers.0.mlp.gate_proj"][0]
    assert torch.equal(without[..., 0], torch.zeros(6, 40))
    assert torch.equal(without[..., 1:], weights[..., 1:])
    for place, name in enumerate(("half", *pool)):
        alone = compose(llama(), {name: {"half": half, **pool}[name]}, "uniform").model.model.layers[0].mlp
        with torch.no_grad():
            assert_close(got[chosen == place], alone(x)[chosen == place])


def test_mixlora_refuses_a_block_of_which_no_map_has_all_experts(tmp_path: Path) -> None:
    folders = {
        name: save_adapter(llama(), tmp_path / name, 1, r=2, target_modules=[name]) for name in ("up_proj", "down_proj")
    }
    with pytest.raises(MethodError, match=r"no such map in: model\.layers\.0\.mlp, model\.layers\.1\.mlp;"):
        compose(llama(), folders, "mixlora")


def test_mixlora_on_another_kind_of_block(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=300, bos_token_id=1, eos_token_id=2, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    folders = {
        f"e{seed}": save_adapter(
            copy.deepcopy(model), tmp_path / f"e{seed}", seed, r=2, target_modules=["c_fc", "mlp.c_proj"]
        )
        for seed in range(2)
    }
    alone = compose(copy.deepcopy(model), {"e0": folders["e0"]}, "uniform")
    routed = compose(model, folders, "mixlora", top_k=1)
    for _, update in routed_updates(routed.model):
        update.state()[PROTOTYPES].zero_()  # a tie, and the first wins
    assert_close(logits(routed, prompt_ids(1, 5)), logits(alone, prompt_ids(1, 5)))


def test_xlora_refuses_a_model_with_an_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    folder = save_adapter(copy.deepcopy(model), tmp_path / "t5", 1, r=2, target_modules=["q", "v"])
    with pytest.raises(MethodError, match="has an encoder"):
        compose(model, {"a": folder}, "xlora")


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_gives_the_same_gradients(pool: dict[str, Path], tmp_path: Path, method: str) -> None:
    found = []
    for checkpointing in (False, True):
        routed = composed(pool, method, tmp_path)
        model = routed.model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        embeddings = model.get_input_embeddings().weight
        # Two forwards before the backward: each has to find its own hidden states again.
        losses = [
            model(input_ids=ids, labels=ids, use_cache=False).loss for ids in (prompt_ids(2, 7), prompt_ids(1, 4))
        ]
        (gradient,) = torch.autograd.grad(losses[0] + 2 * losses[1], embeddings)
        found.append(gradient)
    assert_close(found[1], found[0])


def test_mixlora_of_a_mixture_gates_its_maps_one_by_one(tmp_path: Path) -> None:
    """The blocks of a mixture see some of the tokens each, and their parent is no block of its own."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        shared_expert_intermediate_size=24, num_attention_heads=4, num_key_value_heads=4, num_experts=4,
        num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config).eval()
    targets = ["q_proj", "down_proj", "gate_proj", "shared_expert_gate"]
    folders = {
        f"e{seed}": save_adapter(copy.deepcopy(model), tmp_path / f"e{seed}", seed, r=2, target_modules=targets)
        for seed in range(3)
    }
    routed = compose(model, folders, "mixlora", tokenizer=make_tokenizer())
    assert len(routed.generate(["one", "a longer prompt"], max_new_tokens=3)) == 2
    alone = compose(copy.deepcopy(routed.detach()), {"e1": folders["e1"]}, "uniform")
    single = compose(model, {"e1": folders["e1"]}, "mixlora")
    assert_close(logits(single, prompt_ids(2, 6)), logits(alone, prompt_ids(2, 6)))


def test_xlora_generates_with_a_state(tmp_path: Path) -> None:
    """Mamba, whose cache has no keys."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
    model = MambaForCausalLM(config).eval()
    folders = {
        f"e{seed}": save_adapter(
            copy.deepcopy(model), tmp_path / f"e{seed}", seed, r=2, target_modules=["in_proj", "x_proj"]
        )
        for seed in range(2)
    }
    routed = compose(model, folders, "xlora")
    ids = prompt_ids(2, 6)
    made = routed.model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    again = routed.model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(made, again)
