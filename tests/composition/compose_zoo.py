"""Tiny models with random weights of every architecture that is shown to equal PEFT, and PEFT adapters for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from compose_models import prompt_ids, spread
from peft import LoraConfig, PeftModel, get_peft_model

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(name: str, **sizes: Any) -> Callable[[int], Any]:
    """Maker of a model of that class prefix; sizes replace those of :data:`SIZES`, None leaves one out."""

    def make(seed: int = 0) -> Any:
        torch.manual_seed(seed)
        head = "ForConditionalGeneration" if name == "T5" else "LMHeadModel" if name == "GPT2" else "ForCausalLM"
        config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
        chosen = {key: value for key, value in {**SIZES, **sizes}.items() if value is not None}
        model = getattr(transformers, name + head)(config(**chosen)).eval()
        # T5's fresh weights are large as they are; larger ones make its unscaled attention amplify rounding errors.
        return model if name == "T5" else spread(model)

    return make


@dataclass(frozen=True)
class Architecture:
    """How to make a tiny model, and what to adapt in it: linear maps as PEFT's target, and its embedding."""

    make: Callable[[int], Any]
    targets: list[str]
    embedding: str = "embed_tokens"


_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_GPT: dict[str, Any] = dict.fromkeys(
    ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
)
_MAMBA: dict[str, Any] = {
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "max_position_embeddings")),
    "state_size": 8,
    "intermediate_size": None,
    "time_step_rank": 4,
}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(build("Llama"), _LLAMA),
    "mistral": Architecture(build("Mistral", sliding_window=8), _LLAMA),
    "qwen2": Architecture(build("Qwen2", tie_word_embeddings=True), _LLAMA),
    "qwen3": Architecture(build("Qwen3", head_dim=16), _LLAMA),
    "gemma2": Architecture(build("Gemma2", head_dim=16, query_pre_attn_scalar=16), _LLAMA),
    "gemma3": Architecture(build("Gemma3", head_dim=16, query_pre_attn_scalar=16), _LLAMA),
    "phi2": Architecture(
        build("Phi", num_key_value_heads=4, partial_rotary_factor=0.5),
        ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
    ),
    "phi3": Architecture(build("Phi3"), ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "gpt2": Architecture(
        build("GPT2", **_GPT, max_position_embeddings=None, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        ["c_attn", "c_proj", "c_fc"],
        "wte",
    ),
    "opt": Architecture(
        build("OPT", num_key_value_heads=None, intermediate_size=None, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    ),
    "bloom": Architecture(
        build("Bloom", **{**_GPT, "hidden_size": 32}, max_position_embeddings=None, n_layer=2, n_head=4),
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
        "word_embeddings",
    ),
    "gpt_neox": Architecture(
        build("GPTNeoX", num_key_value_heads=None, hidden_act="gelu"),
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
        "embed_in",
    ),
    "t5": Architecture(
        build(
            "T5", **_GPT, max_position_embeddings=None, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0, bos_token_id=None,
        ),
        ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
        "embed_tokens",
    ),
    "mamba": Architecture(build("Mamba", **_MAMBA), ["in_proj", "x_proj"], "embeddings"),
    "falcon_mamba": Architecture(build("FalconMamba", **_MAMBA), ["in_proj", "x_proj"], "embeddings"),
}  # fmt: skip


def peft_adapter(make: Callable[[int], Any], folder: Path, seed: int, config: Any) -> Path:
    """Save a PEFT adapter in which everything that can be trained is random.

    Args:
        make (Callable): makes the base model.
        folder (Path): where PEFT saves it.
        seed (int): of the trained values.
        config (PeftConfig): what to adapt.

    Returns:
        Path: the folder.
    """
    wrapped = get_peft_model(make(0), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            # Parameters of one dimension (magnitudes, biases) stay near what they were.
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            if parameter.requires_grad:
                parameter.copy_(noise if "lora_" in name and parameter.ndim > 1 else parameter + 0.5 * noise)
    wrapped.save_pretrained(folder)
    return folder


def peft_logits(make: Callable[[int], Any], folder: Path) -> torch.Tensor:
    """Logits of PEFT's own forward with an adapter from its folder."""
    return logits(PeftModel.from_pretrained(make(0), folder).eval())


def logits(model: Any) -> torch.Tensor:
    """Logits ``(B, T, V)`` on fixed token ids."""
    ids = prompt_ids(2, 9)
    inputs = {"decoder_input_ids": prompt_ids(2, 5, seed=4)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def lora(targets: Any, **options: Any) -> LoraConfig:
    """A LoRA config with the tests' usual rank."""
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, "lora_dropout": 0.0, **options})
