"""Tiny transformers models, a real tokenizer, and adapters trained by nobody but saved by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 300
ATTENTION = ["q_proj", "v_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", *MLP]


def llama(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return spread(LlamaForCausalLM(LlamaConfig(**{**sizes, **options})).eval())


def qwen2(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    return spread(Qwen2ForCausalLM(config).eval())


def opt(seed: int = 0) -> OPTForCausalLM:
    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
        dropout=0.0,
    )
    return spread(OPTForCausalLM(config).eval())


def spread(model: Any) -> Any:
    """Give a fresh model weights large enough that its outputs differ from token to token."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6.0)
    return model


def save_adapter(model: Any, folder: Path, seed: int, **options: Any) -> Path:
    """Save a LoRA adapter with random, nonzero factors for a model of this architecture.

    Args:
        model (PreTrainedModel): a model that may be changed; pass a fresh one.
        folder (Path): where PEFT saves it.
        seed (int): of the factors.
        **options (Any): of ``peft.LoraConfig``.

    Returns:
        Path: the folder.
    """
    wrapped = get_peft_model(model, LoraConfig(**{"lora_dropout": 0.0, **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    wrapped.save_pretrained(folder)
    return folder


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: a token per byte, ``<pad> <s> </s>`` first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    chosen = special or {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **chosen)


def prompt_ids(*shape: int, seed: int = 3) -> torch.Tensor:
    """Random token ids without special tokens."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Largest error relative to the largest value expected."""
    assert got.shape == expected.shape
    error = (got.double() - expected.double()).abs().max().item() / expected.abs().max().item()
    assert error <= tolerance, f"relative error {error:.2e}"
