"""save and load: equal to the bit, whole or not at all, and refused when changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compose_models import llama, prompt_ids
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from hub_router.composition.artifact import FACTORS, MANIFEST, STATE
from hub_router.composition.attach import routed_updates
from hub_router.composition.build import compose
from hub_router.composition.routed import RoutedModel
from hub_router.errors import ArtifactError, IncompatibleAdaptersError, MissingError, RoutedStateError
from hub_router.lora.reader import read_adapter

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("base", {}),
    ("single", {"adapter": "mlp"}),
    ("uniform", {}),
    ("arrow", {"top_k": 2, "temperature": 0.7}),
    ("spectr", {"top_k": 3, "weights": "softmax"}),
]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=prompt_ids(2, 9)).logits


@pytest.mark.parametrize(("method", "options"), METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_model_is_equal_to_the_bit(
    folders: dict[str, Path], tokenizer: Any, tmp_path: Path, method: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    routed = compose(llama().to(dtype), folders, method, tokenizer=tokenizer, **options)
    expected, text = logits(routed.model), routed.generate("Hello", max_new_tokens=5, do_sample=False)
    routed.save(tmp_path / "saved")
    assert torch.equal(logits(routed.model), expected)
    loaded = RoutedModel.load(tmp_path / "saved")
    assert (loaded.adapters, loaded.method) == (routed.adapters, routed.method)
    assert torch.equal(logits(loaded.model), expected)
    assert loaded.generate("Hello", max_new_tokens=5, do_sample=False) == text
    loaded.save(tmp_path / "again")
    assert torch.equal(logits(RoutedModel.load(tmp_path / "again").model), expected)
    assert torch.equal(logits(loaded.detach()), logits(llama().to(dtype)))


@pytest.mark.parametrize(("method", "options"), [("merged", {}), ("spectr", {"merge": "factors"})])
def test_methods_on_equal_ranks(
    equal_folders: dict[str, Path], tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    routed = compose(llama(), equal_folders, method, **options)
    routed.save(tmp_path / "saved")
    assert torch.equal(logits(RoutedModel.load(tmp_path / "saved").model), logits(routed.model))


def test_router_state_does_not_depend_on_the_machine_that_loads(folders: dict[str, Path], tmp_path: Path) -> None:
    routed = compose(llama(), folders, "spectr")
    routed.save(tmp_path / "saved")
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - threads if threads < 3 else 1)
    try:
        loaded = RoutedModel.load(tmp_path / "saved")
    finally:
        torch.set_num_threads(threads)
    there = {update.module: update for _, update in routed_updates(loaded.model)}
    for _, update in routed_updates(routed.model):
        assert torch.equal(there[update.module].A, update.A)
        assert torch.equal(there[update.module].Bt, update.Bt)


def test_factors_are_stored_exactly_in_their_own_dtype_with_their_scaling(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(folders["mlp"], half)
    weights = load_file(half / "adapter_model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, half / "adapter_model.safetensors")
    compose(llama(), [half, folders["all"]], "uniform").save(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / FACTORS)
    manifest = json.loads((tmp_path / "saved" / MANIFEST).read_text())
    for number, folder in enumerate((half, folders["all"])):
        adapter = read_adapter(folder)
        entry = manifest["adapters"][number]
        assert (entry["name"], entry["weights_hash"]) == (adapter.name, adapter.weights_hash)
        for module, factors in adapter.modules.items():
            for which in ("A", "B"):
                tensor = stored[f"{number}/{module}/{which}"]
                assert tensor.dtype == (torch.bfloat16 if number == 0 else torch.float32)
                assert torch.equal(tensor, getattr(factors, which))
            assert entry["scaling"][module] == factors.scaling


def test_one_adapter_under_two_names(folders: dict[str, Path], tmp_path: Path) -> None:
    adapter = read_adapter(folders["all"])
    routed = compose(llama(), {"once": adapter, "twice": adapter}, "uniform")
    routed.save(tmp_path / "saved")
    assert torch.equal(logits(RoutedModel.load(tmp_path / "saved").model), logits(routed.model))


def test_base_with_a_folder_is_referred_to_and_checked(folders: dict[str, Path], tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    routed = compose(tmp_path / "base", folders)
    expected = logits(routed.model)
    routed.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "base").exists()
    assert torch.equal(logits(RoutedModel.load(tmp_path / "saved").model), expected)
    llama(seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(ArtifactError, match=r"fingerprint .*, expected .*weights were changed"):
        RoutedModel.load(tmp_path / "saved")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(MissingError, match=r"cannot be loaded.*pass the base model as load\(\.\.\., model=\.\.\.\)"):
        RoutedModel.load(tmp_path / "saved")
    llama().save_pretrained(tmp_path / "moved")
    assert torch.equal(logits(RoutedModel.load(tmp_path / "saved", model=tmp_path / "moved").model), expected)
    assert torch.equal(logits(RoutedModel.load(tmp_path / "saved", model=llama()).model), expected)


def test_base_that_was_never_on_disk_is_saved_along(folders: dict[str, Path], tmp_path: Path) -> None:
    named = llama()
    named.config._name_or_path = named.name_or_path = "somebody/never-downloaded"
    compose(named, folders).save(tmp_path / "saved")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "saved" / "base")), logits(llama()))


def test_load_refuses_a_base_that_does_not_fit_or_is_routed(folders: dict[str, Path], tmp_path: Path) -> None:
    routed = compose(llama(), folders)
    routed.save(tmp_path / "saved")
    with pytest.raises(IncompatibleAdaptersError):
        RoutedModel.load(tmp_path / "saved", model=llama(hidden_size=64))
    with pytest.raises(RoutedStateError, match="routed already"):
        RoutedModel.load(tmp_path / "saved", model=routed.model)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [FACTORS, STATE])
def test_changed_and_missing_files_are_named(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    compose(llama(), folders, "spectr").save(tmp_path / "saved")
    flip(tmp_path / "saved" / name)
    with pytest.raises(ArtifactError, match=rf"{name} was changed: got sha256 \w+, expected \w+"):
        RoutedModel.load(tmp_path / "saved")
    (tmp_path / "saved" / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        RoutedModel.load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "composition.json is missing, expected a folder written by RoutedModel.save"),
        ("{", "is no JSON"),
        ("[]", "expected .*hub-router composition.*3"),
        ('{"format": "hub-router composition", "version": 99}', "99.*, expected"),
        ('{"format": "hub-router composition", "version": 2}', "lacks or garbles 'sha256'"),
    ],
)
def test_broken_manifest(folders: dict[str, Path], tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=message):
        RoutedModel.load(tmp_path)


def test_saving_replaces_a_composition_and_spares_everything_else(
    folders: dict[str, Path], equal_folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    first = compose(llama(), folders)
    first.save(tmp_path / "empty")
    second = compose(llama(), equal_folders)
    second.save(tmp_path / "empty")
    assert RoutedModel.load(tmp_path / "empty").adapters == ("red", "green", "blue")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(ArtifactError, match="holds something that is no composition"):
        first.save(tmp_path / "full")
    with pytest.raises(ArtifactError, match="holds something that is no composition"):
        first.save(tmp_path / "full" / "thesis.txt")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def test_failed_save_leaves_the_earlier_one_and_no_debris(folders: dict[str, Path], tmp_path: Path) -> None:
    routed = compose(llama(), folders)
    routed.save(tmp_path / "saved")
    expected = logits(routed.model)
    routed.tokenizer = "no tokenizer at all"
    with pytest.raises(AttributeError):
        routed.save(tmp_path / "saved")
    assert torch.equal(logits(RoutedModel.load(tmp_path / "saved").model), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
