"""The pool that a caller names: one error for all of its faults, and adapters that bring copies of base weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compose_models import ATTENTION, assert_close, llama, prompt_ids, save_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file

from hub_router.composition.architecture import empty_model
from hub_router.composition.build import compose
from hub_router.composition.pool import check_pool, read_pool
from hub_router.errors import IncompatibleAdaptersError, MethodError, UnsupportedAdapterError

HEAD = ["lm_head", "q_proj"]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def edit_tensor(folder: Path, part: str, value: float) -> None:
    """Put a value into the first element of the first tensor with this part in its name."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(name for name in tensors if part in name)].view(-1)[0] = value
    save_file(tensors, file)


@pytest.fixture
def mixed(tmp_path: Path) -> dict[str, Path]:
    """A usable adapter, three that cannot be read, and three that do not fit."""
    pool = {
        "good": save_adapter(llama(), tmp_path / "good", 1, r=2, target_modules=ATTENTION),
        "nan": save_adapter(llama(), tmp_path / "nan", 2, r=2, target_modules=ATTENTION),
        "wide": save_adapter(llama(hidden_size=64), tmp_path / "wide", 3, r=2, target_modules=["o_proj"]),
        "kasa": save_adapter(llama(), tmp_path / "kasa", 4, r=2, target_modules=ATTENTION),
        "deep": save_adapter(llama(num_hidden_layers=3), tmp_path / "deep", 5, r=2, target_modules=["up_proj"]),
        "gone": tmp_path / "gone",
        "head": save_adapter(llama(1), tmp_path / "head", 6, r=2, target_modules=HEAD),
    }
    edit_tensor(pool["nan"], "lora_A", float("nan"))
    config = pool["kasa"] / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"kasa_config": {"beta": 1}}))
    return pool


@pytest.mark.parametrize("by_folder", [False, True])
def test_one_error_lists_what_cannot_be_read_and_what_does_not_fit(
    mixed: dict[str, Path], tmp_path: Path, by_folder: bool
) -> None:
    base: Any = llama()
    if by_folder:
        base.save_pretrained(tmp_path / "base")
        base = tmp_path / "base"
    with pytest.raises(IncompatibleAdaptersError) as caught:
        compose(base, mixed)
    lines = [line for line in caught.value.mismatches if line.startswith("adapter ")]
    assert [line.split("'")[1] for line in lines] == ["nan", "kasa", "gone", "wide", "wide", "deep", "head"]
    message = str(caught.value)
    assert "'good'" not in message
    assert "NaN or infinite values in lora_A" in lines[0]
    assert "KaSA" in lines[1]
    assert "expected a folder, found nothing" in lines[2]
    assert "layers.1.self_attn.o_proj: got D_in x D_out 64 x 64" in lines[4]
    assert "model.layers.2.mlp.up_proj: the model has no such module" in lines[5]
    assert "module lm_head: the adapter was trained with another weight" in lines[6]


def test_without_misfits_the_unreadable_ones_are_listed_alone(mixed: dict[str, Path]) -> None:
    pool, unreadable = read_pool({name: mixed[name] for name in ("good", "nan", "gone")})
    assert [adapter.name for adapter in pool] == ["good"]
    assert len(unreadable) == 2
    with pytest.raises(UnsupportedAdapterError) as caught:
        check_pool(llama(), "the base", pool, unreadable)
    assert str(caught.value) == "\n".join(unreadable)


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapted_head_equals_peft(tmp_path: Path, tied: bool) -> None:
    def base() -> Any:
        return llama(tie_word_embeddings=tied)

    folder = save_adapter(base(), tmp_path / "head", 7, r=4, lora_alpha=8, target_modules=HEAD)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(folder / "adapter_model.safetensors")
    ids = prompt_ids(2, 9)
    expected = logits(PeftModel.from_pretrained(base(), folder), ids)
    assert_close(logits(compose(base(), [folder], "single", adapter="head").model, ids), expected)
    base().save_pretrained(tmp_path / "base")
    assert_close(logits(compose(tmp_path / "base", [folder], "single", adapter="head").model, ids), expected)
    plain = save_adapter(base(), tmp_path / "plain", 7, r=4, lora_alpha=8, target_modules=["q_proj"])
    assert not torch.allclose(logits(compose(base(), [plain]).model, ids), expected, rtol=1e-2)


@pytest.mark.parametrize(("stored", "loaded"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_copy_in_another_dtype_is_a_copy(tmp_path: Path, stored: str, loaded: str) -> None:
    folder = save_adapter(llama().to(getattr(torch, stored)), tmp_path / "head", 8, r=2, target_modules=HEAD)
    assert compose(llama().to(getattr(torch, loaded)), [folder]).adapters == ("head",)


def test_a_changed_head_is_refused_once_and_the_model_left_alone(tmp_path: Path) -> None:
    folder = save_adapter(llama(), tmp_path / "head", 9, r=2, target_modules=HEAD)
    edit_tensor(folder, "base_layer", 0.125)
    base = llama()
    with pytest.raises(IncompatibleAdaptersError) as caught:
        compose(base, [folder])
    assert len(caught.value.mismatches) == 1
    assert "adapter 'head', module lm_head" in caught.value.mismatches[0]
    assert not any(module._forward_hooks for module in base.modules())
    base.config.save_pretrained(tmp_path / "config")
    check_pool(empty_model(str(tmp_path / "config")), "no weights to compare", read_pool([folder])[0])


@pytest.mark.parametrize("adapters", [None, 5, "a/path", b"path", Path("a/path"), {"a/path"}])
def test_what_is_no_pool_is_named_with_what_is_expected(adapters: Any) -> None:
    with pytest.raises(MethodError, match=r"adapters is .*, expected a mapping of name to folder"):
        read_pool(adapters)


@pytest.mark.parametrize(
    ("adapters", "entries"),
    [
        ({"a": None, "b": "folder", "c": 5}, ["adapters['a'] is None", "adapters['c'] is 5"]),
        ({"a": ""}, ["adapters['a'] is ''"]),
        ([("a", "p"), ("a", "q")], ["adapters[0] is ('a', 'p')", "adapters[1] is ('a', 'q')"]),
        ({"": "p", 1: "q", "fine": "r", " ": "s"}, ["'' is no name", "1 is no name", "' ' is no name"]),
        (["/"], ["'/' gives no name"]),
    ],
)
def test_bad_entries_and_names_are_all_listed(adapters: Any, entries: list[str]) -> None:
    with pytest.raises(MethodError) as caught:
        read_pool(adapters)
    message = str(caught.value)
    assert [entry for entry in entries if entry not in message] == []
    assert "'b'" not in message
    assert "'fine'" not in message
    assert "adapters takes a mapping of name to folder" in message


def test_a_hub_id_is_told_from_a_missing_folder(tmp_path: Path) -> None:
    _, (by_id, by_path) = read_pool(["predibase/glue_sst2", tmp_path / "gone"])
    assert "`hub-router sync predibase/glue_sst2`" in by_id
    assert "Hub.compose takes ids" in by_id
    assert "hub-router" not in by_path


def test_the_home_of_nobody_is_a_missing_folder() -> None:
    _, (line,) = read_pool({"a": "~no-such-user-here/adapter"})
    assert "expected a folder, found nothing" in line
