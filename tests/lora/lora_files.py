"""Adapter folders written the way they are found: by PEFT, or by hand where PEFT would not write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

PLAIN = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
PREFIX = "base_model.model."


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def peft_adapter(folder: Path, *, dtype: torch.dtype | None = None, safe: bool = True, **config: Any) -> PeftModel:
    """A PEFT model with random factors, saved to ``folder``."""
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **config}
    model = get_peft_model(tiny_llama(), LoraConfig(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
                if dtype is not None:
                    parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder, safe_serialization=safe)
    return model


def factors(module: str = "layers.0.q", *, rank: int = 2, d_in: int = 5, d_out: int = 3) -> dict[str, torch.Tensor]:
    """A and B of one module under today's key spelling."""
    generator = torch.Generator().manual_seed(len(module))
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(rank, d_in, generator=generator),
        f"{PREFIX}{module}.lora_B.weight": torch.randn(d_out, rank, generator=generator),
    }


def write_adapter(
    folder: Path,
    tensors: Mapping[str, torch.Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    safe: bool = True,
) -> Path:
    """A folder with a config and weights; the defaults make one usable module of rank 2."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN if config is None else dict(config)))
    stored = dict(factors() if tensors is None else tensors)
    if safe:
        save_file(stored, folder / "adapter_model.safetensors")
    else:
        torch.save(stored, folder / "adapter_model.bin")
    return folder
