from __future__ import annotations

import pytest

from hub_router.lora.keys import (
    FactorKey,
    foreign_reason,
    is_head,
    is_original,
    is_printable,
    is_saved_apart,
    module_path,
    parse_base,
    parse_factor,
    parse_mlx_factor,
)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", "model.layers.0.mlp.up_proj"),
        # A model whose own attribute is called base_model keeps it: only the pair of PEFT's is taken off.
        ("base_model.model.base_model.layers.0.q.lora_A.weight", "base_model.layers.0.q"),
        ("base_model.model.module.layers.0.q.lora_A.weight", "module.layers.0.q"),
        ("encoder.block.0.layer.0.SelfAttention.q.lora_A", "encoder.block.0.layer.0.SelfAttention.q"),
        ("base_model.model._fsdp_wrapped_module.h.0._orig_mod.c_attn.lora_A.default.weight", "h.0.c_attn"),
        ("base_model.model.weight.lora_A.weight", "weight"),
    ],
)
def test_module_of_a_factor(name: str, module: str) -> None:
    assert parse_factor(name) == FactorKey(module, "A")
    assert parse_factor(name.replace("lora_A", "lora_B")) == FactorKey(module, "B")


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.q.lora_A.bias",
        "base_model.model.q.weight",
        "lora_A.weight",
        "model.layers.14.self_attn.q_proj.lora_a",
        "base_model.model.q.lora_A.one.two.weight",
    ],
)
def test_names_that_are_no_factors(name: str) -> None:
    assert parse_factor(name) is None


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("base_model.model.q.lora_A.default.bias", "a bias on lora_A"),
        ("base_model.model.q.lora_diag", "KaSA"),
        ("base_model.model.q.lora_next_years", "a LoRA variant with further tensors"),
        ("model.layers.14.self_attn.q_proj.lora_a", "MLX-LM"),
        ("unet.down_blocks.0.to_k.lora.down.weight", "diffusers"),
        ("lora_unet_down_blocks_0_to_k.lora_up.weight", "diffusers"),
        ("base_model.model.q.hada_w1_a", "other than LoRA"),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", "embeddings"),
    ],
)
def test_foreign_tensors_are_named(name: str, part: str) -> None:
    assert part in (foreign_reason(["base_model.model.score.weight", name]) or "")


def test_base_weights_are_not_foreign() -> None:
    assert foreign_reason(["base_model.model.score.weight", "base_model.model.embed.base_layer.weight"]) is None


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("q.lora_E", "E"),
        ("q.lora_E.default", "E"),
        ("q.lora_magnitude_vector", "magnitude"),
        ("q.lora_magnitude_vector.default", "magnitude"),
        ("q.lora_magnitude_vector.default.weight", "magnitude"),
        ("q.lora_B.bias", "bias"),
        ("q.lora_B.default.bias", "bias"),
        ("q.lora_embedding_A", "embedding_A"),
        ("q.lora_embedding_B.default", "embedding_B"),
    ],
)
def test_other_roles(name: str, role: str) -> None:
    assert parse_factor(f"base_model.model.{name}") == FactorKey("q", role)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.lora_a", FactorKey("model.layers.0.self_attn.q_proj", "A")),
        ("model.layers.0.self_attn.q_proj.lora_b", FactorKey("model.layers.0.self_attn.q_proj", "B")),
        ("model.layers.0.self_attn.q_proj.m", FactorKey("model.layers.0.self_attn.q_proj", "magnitude")),
        ("model.embed_tokens.lora_a", FactorKey("model.embed_tokens", "embedding_A")),
        ("model.embed_tokens.m", FactorKey("model.embed_tokens", "magnitude")),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", None),
    ],
)
def test_mlx_names(name: str, expected: FactorKey | None) -> None:
    assert parse_mlx_factor(name) == expected


def test_what_is_saved_apart() -> None:
    assert is_saved_apart("base_model.model.lm_head.modules_to_save.default.weight", [])
    assert is_saved_apart("base_model.model.score.weight", [])
    assert is_saved_apart("base_model.model.model.embed_tokens.weight", ["embed_tokens"])
    # As PEFT finds them: by the end of a module's path, be it within a word.
    assert is_saved_apart("base_model.model.generator_lm_head.weight", ["lm_head"])
    assert is_saved_apart("base_model.model.model.embed_tokens.weight", ["tokens"])
    assert is_saved_apart("base_model.model.decode_head.fuse.weight", ["decode_head"])
    assert not is_saved_apart("base_model.model.model.embed_tokens.weight", ["embed"])
    assert not is_saved_apart("base_model.model.model.layers.0.self_attn.q_proj.bias", [])
    assert is_original("base_model.model.score.original_module.weight")
    assert parse_base("base_model.model.lm_head.base_layer.weight") == ("lm_head", "weight")
    assert parse_base("base_model.model.lm_head.weight") is None


def test_saved_modules_lose_their_wrapper() -> None:
    for name in ("score.weight", "score.modules_to_save.weight", "score.modules_to_save.default.weight"):
        assert module_path(f"base_model.model.{name}") == "score.weight"
    assert module_path("classifier.modules_to_save.mine.out_proj.bias") == "classifier.out_proj.bias"


def test_heads() -> None:
    assert is_head("base_model.model.classifier.dense.weight")
    assert is_head("base_model.model.pre_classifier.bias")
    assert not is_head("base_model.model.lm_head.weight")
    assert not is_head("base_model.model.lin1.weight")


def test_printable_names() -> None:
    assert is_printable("model.layers.0.q_proj.lora_A.weight")
    for name in ("", "  ", "a\nb", "a\x00b", "a" * 513):
        assert not is_printable(name)
