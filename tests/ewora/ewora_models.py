"""Tiny transformers models, EWoRA adapters with random parameters, and the paper's formula in loops."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hub_router.ewora import EworaConfig
from hub_router.ewora.layer import EworaLayer

VOCABULARY = 64
LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2_TARGETS = ["c_attn", "c_proj", "c_fc"]


def llama(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **config, **options})).eval()


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **dropouts)
    return GPT2LMHeadModel(config).eval()


def t5(seed: int = 0) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


def ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def adapted(model: nn.Module, **options: Any) -> PeftModel:
    """A model with a fresh adapter of rank 8 with 4 experts, unless the options say otherwise."""
    return get_peft_model(model, EworaConfig(**{"r": 8, "target_modules": LLAMA_TARGETS, **options}))


def randomise(model: nn.Module, seed: int, adapter: str = "default") -> nn.Module:
    """Give an adapter parameters of a size that makes its update as large as the base model's outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ewora_" in name and f".{adapter}." in name:
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(drawn * 0.4)
    return model


def layers_of(model: nn.Module) -> dict[str, EworaLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, EworaLayer)}


def factors(layer: EworaLayer, adapter: str = "default") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``A (r, D_in)``, ``B (D_out, r)`` and ``W_r (n, r)`` in float64, with gradients of their own."""
    parts = (layer.ewora_A, layer.ewora_B, layer.ewora_R)
    A, B, R = (part[adapter].weight.detach().double().requires_grad_() for part in parts)
    return A, B, R


def reference(
    x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, R: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Section 3 of the paper for one token, expert by expert, in float64.

    Args:
        x (torch.Tensor): ``(D_in,)``.
        A (torch.Tensor): ``(r, D_in)``, the experts' ``A_i`` one below the other.
        B (torch.Tensor): ``(D_out, r)``, the experts' ``B_i`` side by side.
        R (torch.Tensor): ``W_r (n, r)``.
        scaling (float): ``lora_alpha / r``.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: the update ``(D_out,)``, and alpha ``(n,)``.
    """
    n, r = R.shape
    size = r // n
    A_i = [A[i * size : (i + 1) * size] for i in range(n)]
    B_i = [B[:, i * size : (i + 1) * size] for i in range(n)]
    z_i = [A_i[i] @ x for i in range(n)]  # z_i = A_i x
    z = torch.cat(z_i)  # z = [z_1; ..; z_n]
    alpha = [sum(R[i, k] * z[k] for k in range(r)) for i in range(n)]  # alpha = W_r z
    e_i = [B_i[i] @ z_i[i] for i in range(n)]  # e_i = B_i z_i
    e = sum(alpha[i] * e_i[i] for i in range(n))  # e = sum_i alpha_i e_i
    return scaling * e, torch.stack(alpha)


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Largest error relative to the largest value expected."""
    assert got.shape == expected.shape
    error = (got.double() - expected.double()).abs().max().item() / expected.abs().max().item()
    assert error <= tolerance, f"relative error {error:.2e}"
