"""Settings: defaults of the paper, every fault named at once, saved configs of other layouts refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig, PeftType

from hub_router.errors import MethodError
from hub_router.ewora import EworaConfig


def test_defaults() -> None:
    config = EworaConfig()
    assert (config.r, config.n, config.lora_alpha, config.lora_dropout, config.scaling) == (32, 4, 32, 0.0, 1.0)
    assert config.peft_type is PeftType.EWORA
    assert EworaConfig(r=8, lora_alpha=4).scaling == 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 30}, r"r=30 with n=4, expected a rank that is a multiple of the number of experts"),
        ({"r": 2, "n": 4}, r"r=2 with n=4"),
        ({"r": 0}, r"r=0, expected an integer of at least 1"),
        ({"n": 0}, r"n=0, expected an integer of at least 1"),
        ({"n": -2}, r"n=-2"),
        ({"r": 8.0}, r"r=8.0, expected an integer"),
        ({"n": True}, r"n=True, expected an integer"),
        ({"r": "8"}, r"r='8'"),
        ({"lora_alpha": 0}, r"lora_alpha=0, expected a finite number above 0"),
        ({"lora_alpha": float("nan")}, r"lora_alpha=nan"),
        ({"lora_alpha": float("inf")}, r"lora_alpha=inf"),
        ({"lora_alpha": None}, r"lora_alpha=None"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1.0, expected a number from 0, below 1"),
        ({"lora_dropout": -0.1}, r"lora_dropout=-0.1"),
        ({"bias": "lora_only"}, r"bias='lora_only', expected none, all or ewora_only"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [1]}, r"layers_to_transform=\[1\] with a pattern"),
        ({"target_modules": ".*q_proj", "layers_pattern": "h"}, r"layers_pattern='h' with a pattern"),
        ({"target_modules": ["q_proj"], "layers_pattern": "h"}, r"layers_pattern='h' without layers_to_transform"),
    ],
)
def test_wrong_values_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(MethodError, match=said):
        EworaConfig(**options)


def test_names_all_faults_at_once() -> None:
    with pytest.raises(MethodError, match=r"r=0, .*; n='4', .*; lora_alpha=-1, .*; lora_dropout=2, .*; bias='some'"):
        EworaConfig(r=0, n="4", lora_alpha=-1, lora_dropout=2, bias="some")


def test_saved_and_loaded(tmp_path: Path) -> None:
    config = EworaConfig(r=6, n=3, lora_alpha=5, lora_dropout=0.1, target_modules=["v_proj", "q_proj"], bias="all")
    config.save_pretrained(tmp_path)
    for cls in (EworaConfig, PeftConfig):
        assert cls.from_pretrained(tmp_path) == config
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stored["peft_type"], stored["r"], stored["n"], sorted(stored["target_modules"])) == (
        "EWORA",
        6,
        3,
        ["q_proj", "v_proj"],
    )


@pytest.mark.parametrize("cls", [EworaConfig, PeftConfig])
def test_config_of_another_layout_is_refused(tmp_path: Path, cls: type[PeftConfig]) -> None:
    other = {"peft_type": "EWORA", "r": 8, "num_experts": 4, "ewora_dropout": 0.0, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(other))
    with pytest.raises(MethodError, match=r"states no n, expected r .* and n .*another function"):
        cls.from_pretrained(tmp_path)


def test_other_types_are_as_before(tmp_path: Path) -> None:
    LoraConfig(r=3).save_pretrained(tmp_path)
    assert isinstance(PeftConfig.from_pretrained(tmp_path), LoraConfig)
