"""Adapters of different ranks and targets for one tiny Llama, and for tiny Qwen2 and OPT models."""

from __future__ import annotations

from pathlib import Path

import pytest
from compose_models import ALL, ATTENTION, MLP, llama, make_tokenizer, opt, qwen2, save_adapter
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Five adapters: ranks 4, 8, 3 and patterns; attention, MLP, everything, one layer; rsLoRA and patterns."""
    root = tmp_path_factory.mktemp("adapters")
    kinds = {
        "attention": {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION},
        "mlp": {"r": 8, "lora_alpha": 4, "target_modules": MLP, "use_rslora": True},
        "all": {"r": 3, "lora_alpha": 6, "target_modules": ALL},
        "layer": {"r": 2, "lora_alpha": 2, "target_modules": ATTENTION, "layers_to_transform": [1]},
        "patterns": {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ATTENTION,
            "rank_pattern": {"layers.0.self_attn.q_proj": 6},
            "alpha_pattern": {"layers.1.self_attn.v_proj": 5},
        },
    }
    return {name: save_adapter(llama(), root / name, seed, **kind) for seed, (name, kind) in enumerate(kinds.items())}


@pytest.fixture(scope="session")
def equal_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three adapters of rank 4 on all linear maps of the Llama."""
    root = tmp_path_factory.mktemp("equal")
    return {
        name: save_adapter(llama(), root / name, seed, r=4, lora_alpha=8, target_modules=ALL)
        for seed, name in enumerate(("red", "green", "blue"), start=20)
    }


@pytest.fixture(scope="session")
def other_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One adapter for each of the other architectures."""
    root = tmp_path_factory.mktemp("others")
    return {
        "qwen2": save_adapter(qwen2(), root / "qwen2", 30, r=4, target_modules=ALL),
        "opt": save_adapter(opt(), root / "opt", 31, r=4, target_modules=["q_proj", "out_proj", "fc1", "fc2"]),
    }


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()
