"""A Llama of width 1024 with random weights, and pools of random adapters of rank 8 on all of its linear maps."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hub_router.lora.adapter import LoraAdapter, LoraFactors

RANK, VOCABULARY = 8, 8192


def make_llama(layers: int) -> LlamaForCausalLM:
    """Fresh, the same weights every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config)


def make_pool(model: LlamaForCausalLM, experts: int) -> list[LoraAdapter]:
    """Adapters for a model, the same every time."""
    generator = torch.Generator().manual_seed(1)
    shapes = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert len(shapes) == 7 * model.config.num_hidden_layers
    return [
        LoraAdapter(
            f"adapter-{e}",
            None,
            None,
            {
                name: LoraFactors(
                    torch.randn(RANK, d_in, generator=generator) / d_in**0.5,
                    torch.randn(d_out, RANK, generator=generator) * 0.01,
                    1.0,
                )
                for name, (d_in, d_out) in shapes.items()
            },
            str(e),
        )
        for e in range(experts)
    ]
