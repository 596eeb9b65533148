from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import PLAIN, PREFIX, factors, peft_adapter, write_adapter

from hub_router.errors import UnsupportedAdapterError
from hub_router.lora.facts import inspect
from hub_router.lora.reader import read_adapter
from hub_router.records import ModuleFacts


def test_facts_of_a_peft_adapter(tmp_path: Path) -> None:
    peft_adapter(tmp_path, use_rslora=True, rank_pattern={"down_proj": 9})
    facts = inspect(tmp_path)
    assert facts.peft_type == "LORA"
    assert facts.rslora
    assert facts.ranks == (4, 9)
    assert facts.targets == ("down_proj", "q_proj")
    assert facts.dtypes == ("float32",)
    by_name = {module.name: module for module in facts.modules}
    assert len(by_name) == 4
    assert by_name["model.layers.1.mlp.down_proj"] == ModuleFacts("model.layers.1.mlp.down_proj", 9, 40, 24, 6 / 9**0.5)
    assert by_name["model.layers.0.self_attn.q_proj"].scaling == 3.0
    # Per layer: q_proj 4 x (24 + 24) and down_proj 9 x (40 + 24).
    assert facts.parameters == 2 * (4 * 48 + 9 * 64)
    assert facts.weight_files == ("adapter_model.safetensors",)
    assert facts.size_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert facts.notes == ()


def test_facts_agree_with_the_reader(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, factors("a.q") | factors("b.v", rank=3), safe=False)
    facts, adapter = inspect(folder), read_adapter(folder, "other name")
    assert [module.name for module in facts.modules] == list(adapter.modules)
    assert facts.weights_hash == adapter.weights_hash
    assert facts.notes == adapter.notes
    assert facts.base_model == adapter.base_model == "org/base"
    assert facts.weight_files == ("adapter_model.bin",)


def test_mixed_dtypes_are_listed_once(tmp_path: Path) -> None:
    tensors = factors("a.q") | factors("b.q")
    tensors[f"{PREFIX}b.q.lora_B.weight"] = torch.ones(3, 2, dtype=torch.bfloat16)
    assert set(inspect(write_adapter(tmp_path, tensors)).dtypes) == {"float32", "bfloat16"}


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"lora_alpha": 5}, False),
        ({"r": 3}, False),
        ({"use_rslora": True}, False),
        ({"rank_pattern": {"q": 2}}, False),
        ({"alpha_pattern": {"q": 2}}, False),
        ({"lora_dropout": 0.5, "task_type": "CAUSAL_LM"}, True),
        ({"base_model_name_or_path": "other/base"}, True),
        ({"target_modules": ["q", "v"]}, True),
        ({"lora_alpha": 4.0, "use_rslora": False, "rank_pattern": {}}, True),
    ],
)
def test_hash_changes_with_the_function_only(tmp_path: Path, change: dict[str, Any], same: bool) -> None:
    folder = write_adapter(tmp_path)
    before = inspect(folder).weights_hash
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | change))
    assert (inspect(folder).weights_hash == before) is same


def test_hash_follows_the_order_of_patterns_and_the_weights(tmp_path: Path) -> None:
    patterns = {"layers.0.q": 2, "q": 4}
    hashes = set()
    for number, order in enumerate((patterns, dict(reversed(patterns.items())))):
        hashes.add(inspect(write_adapter(tmp_path / str(number), config=PLAIN | {"rank_pattern": order})).weights_hash)
    hashes.add(inspect(write_adapter(tmp_path / "other", factors(d_in=6))).weights_hash)
    assert len(hashes) == 3


def test_a_refusal_is_the_reason_alone(tmp_path: Path) -> None:
    write_adapter(tmp_path, config=PLAIN | {"peft_type": "LOHA"})
    with pytest.raises(UnsupportedAdapterError, match=r"^unsupported: LOHA \(peft_type\)"):
        inspect(tmp_path)
