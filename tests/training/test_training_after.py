"""What becomes of trained gates: as a file, in a saved composition, and with another pool or method."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compose_models import ATTENTION, llama, save_adapter
from safetensors.torch import load_file, save_file
from training_models import DECODER_METHODS, SHORT, logits, same_vectors

from hub_router.composition.build import compose
from hub_router.composition.routed import RoutedModel
from hub_router.errors import MethodError, StaleFeaturesError
from hub_router.prototypes import Prototypes, read_prototypes, write_prototypes
from hub_router.training import TrainingSettings, fit

SETTINGS = TrainingSettings(steps=4, batch_size=8, learning_rate=5e-2, warmup=0.0)


def trained(pool: Any, tokenizer: Any, examples: Any, method: str, **options: Any) -> tuple[RoutedModel, Prototypes]:
    routed = compose(llama(), pool, method, tokenizer=tokenizer, **options)
    return routed, fit(routed, examples, settings=SETTINGS).prototypes


@pytest.fixture(params=DECODER_METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_file_of_the_vectors_gives_the_same_outputs(
    pool: Any, tokenizer: Any, examples: Any, tmp_path: Path, method: str
) -> None:
    routed, prototypes = trained(pool, tokenizer, examples, method)
    assert not torch.equal(logits(routed), logits(compose(llama(), pool, method)))
    write_prototypes(tmp_path / "set.safetensors", prototypes)
    again = compose(llama(), pool, method, prototypes=str(tmp_path / "set.safetensors"))
    assert torch.equal(logits(again), logits(routed))
    assert same_vectors(again.vectors, routed.vectors)
    # Members are found by their weights: other names, another order and fewer of them will do.
    some = {"x": pool["mlp"], "y": pool["attention"]}
    fewer = compose(llama(), some, method, prototypes=str(tmp_path / "set.safetensors"))
    routed.set_adapters({"x": "mlp", "y": "attention"})
    assert torch.equal(logits(fewer), logits(routed))


def test_the_set_says_what_it_was_made_from(pool: Any, tokenizer: Any, examples: Any, method: str) -> None:
    routed, prototypes = trained(pool, tokenizer, examples, method, top_k=2)
    assert (prototypes.method, prototypes.seed) == (method, 0)
    assert {member.name: member.weights_hash for member in prototypes.members} == routed.weights_hashes
    assert prototypes.hyperparameters["top_k"] == 2
    assert prototypes.hyperparameters["learning_rate"] == 5e-2
    assert prototypes.metrics["steps"] == (16 if method == "phatgoose" else 4)
    assert prototypes.parent == ("arrow" if method == "maple" else "")
    assert len(prototypes.data_hash) == 64


def test_a_set_is_refined_from_a_file_and_written(
    pool: Any, tokenizer: Any, examples: Any, tmp_path: Path, method: str
) -> None:
    folder = tmp_path / "a folder whose name is not short" / "and another one that is in it"
    folder.mkdir(parents=True)
    _, first = trained(pool, tokenizer, examples, "phatgoose" if method == "maple" else method)
    write_prototypes(folder / "first.safetensors", first)
    options = {"parent": "phatgoose"} if method == "maple" else {}
    routed, second = trained(pool, tokenizer, examples, method, prototypes=str(folder / "first.safetensors"), **options)
    write_prototypes(folder / "second.safetensors", second)
    found = read_prototypes(folder / "second.safetensors")
    assert found.parent
    assert same_vectors({member.name: member.vectors for member in found.members}, routed.vectors)
    assert not same_vectors({member.name: member.vectors for member in first.members}, routed.vectors)


def test_members_whose_weights_changed_are_refused(
    pool: Any, tokenizer: Any, examples: Any, tmp_path: Path, method: str
) -> None:
    _, prototypes = trained(pool, tokenizer, examples, method)
    write_prototypes(tmp_path / "set.safetensors", prototypes)
    changed = {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in pool.items()}
    for name in ("mlp", "layer"):
        weights = load_file(changed[name] / "adapter_model.safetensors")
        save_file({key: value * 1.5 for key, value in weights.items()}, changed[name] / "adapter_model.safetensors")
    with pytest.raises(StaleFeaturesError, match=r"made for other weights of: mlp, layer; train it anew"):
        compose(llama(), changed, method, prototypes=str(tmp_path / "set.safetensors"))
    extra = {**pool, "extra": changed["mlp"]}
    with pytest.raises(MethodError, match=r"'extra' has none"):
        compose(llama(), extra, method, prototypes=str(tmp_path / "set.safetensors"))


def test_saved_and_loaded(pool: Any, tokenizer: Any, examples: Any, tmp_path: Path, method: str) -> None:
    routed, _ = trained(pool, tokenizer, examples, method)
    routed.save(tmp_path / "saved")
    loaded = RoutedModel.load(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(routed))
    assert same_vectors(loaded.vectors, routed.vectors)
    for each in (routed, loaded):
        each.set_adapters({"new name": "all", "attention": "attention", "mlp": "mlp"})
        each.remove_adapters("mlp")
        assert each.adapters == ("new name", "attention")
    assert torch.equal(logits(loaded), logits(routed))
    before = routed.vectors
    loaded.save(tmp_path / "saved")
    assert same_vectors(RoutedModel.load(tmp_path / "saved").vectors, before)


def test_a_file_that_is_gone_is_not_missed_after_saving(
    pool: Any, tokenizer: Any, examples: Any, tmp_path: Path, method: str
) -> None:
    _, prototypes = trained(pool, tokenizer, examples, method)
    write_prototypes(tmp_path / "set.safetensors", prototypes)
    routed = compose(llama(), pool, method, tokenizer=tokenizer, prototypes=str(tmp_path / "set.safetensors"))
    routed.save(tmp_path / "saved")
    (tmp_path / "set.safetensors").unlink()
    loaded = RoutedModel.load(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(routed))
    loaded.remove_adapters("layer")
    assert {name: set(each) for name, each in loaded.vectors.items()} == {
        name: set(each) for name, each in routed.vectors.items() if name != "layer"
    }
    with pytest.raises(MethodError, match="'layer' has none"):
        loaded.add_adapters({"layer": pool["layer"]})


def test_members_of_the_file_can_be_added_later(
    pool: Any, tokenizer: Any, examples: Any, tmp_path: Path, method: str
) -> None:
    _, prototypes = trained(pool, tokenizer, examples, method)
    write_prototypes(tmp_path / "set.safetensors", prototypes)
    options = {"prototypes": str(tmp_path / "set.safetensors")}
    expected = compose(llama(), pool, method, **options)
    some = {name: folder for name, folder in pool.items() if name != "layer"}
    routed = compose(llama(), some, method, **options)
    routed.add_adapters({"layer": pool["layer"]})
    assert torch.equal(logits(routed), logits(expected))
    routed.remove_adapters("all")
    routed.add_adapters({"all": pool["all"]})
    assert same_vectors(routed.vectors, expected.vectors)


def test_a_new_adapter_starts_untrained(pool: Any, tokenizer: Any, examples: Any, tmp_path: Path, method: str) -> None:
    """What was trained stays, and the pool can be trained again."""
    routed, _ = trained(pool, tokenizer, examples, method)
    extra = save_adapter(llama(), tmp_path / "extra", 77, r=2, target_modules=ATTENTION)
    before = routed.vectors
    routed.add_adapters({"extra": extra})
    assert any("gates of extra are as before training" in note for note in routed.notes)
    assert same_vectors({name: own for name, own in routed.vectors.items() if name != "extra"}, before)
    untrained = compose(llama(), {**pool, "extra": extra}, method)
    assert same_vectors({"extra": routed.vectors["extra"]}, {"extra": untrained.vectors["extra"]})
    fit(routed, examples, settings=SHORT)
    routed.remove_adapters("extra")
    routed.add_adapters({"extra": extra})
    assert routed.adapters == (*pool, "extra")


def test_untrained_gates_follow_another_pool(pool: Any, tokenizer: Any, tmp_path: Path, method: str) -> None:
    some = {name: folder for name, folder in pool.items() if name != "layer"}
    routed = compose(llama(), some, method, tokenizer=tokenizer)
    routed.save(tmp_path / "saved")
    expected = compose(llama(), pool, method)
    for each in (routed, RoutedModel.load(tmp_path / "saved")):
        each.add_adapters({"layer": pool["layer"]})
        assert torch.equal(logits(each), logits(expected))


@pytest.mark.parametrize("loaded", [False, True])
def test_vectors_of_one_method_are_not_taken_for_anothers(
    pool: Any, tokenizer: Any, examples: Any, tmp_path: Path, loaded: bool
) -> None:
    # V of a linear router says nothing of Arrow's directions.
    routed, _ = trained(pool, tokenizer, examples, "lora-mixer")
    if loaded:
        routed.save(tmp_path / "saved")
        routed = RoutedModel.load(tmp_path / "saved")
    outputs = logits(routed)
    routed.set_method("maple")
    assert torch.equal(logits(routed), logits(compose(llama(), pool, "arrow")))
    routed.set_method("lora-mixer")
    assert torch.equal(logits(routed), outputs)


def test_other_methods_do_not_lose_the_vectors(pool: Any, tokenizer: Any, examples: Any, method: str) -> None:
    routed, _ = trained(pool, tokenizer, examples, method)
    outputs, vectors = logits(routed), routed.vectors
    routed.set_method("arrow")
    assert not routed.vectors or method == "maple" or not same_vectors(routed.vectors, vectors)
    assert torch.equal(logits(routed), logits(compose(llama(), pool, "arrow")))
    routed.set_method(method)
    assert torch.equal(logits(routed), outputs)


def test_methods_without_training_have_no_vectors(pool: Any) -> None:
    # Arrow's directions are computed, not trained.
    for name in ("arrow", "uniform", "spectr"):
        assert not compose(llama(), pool, name).vectors


def test_training_goes_on_from_where_it_was(pool: Any, tokenizer: Any, examples: Any, method: str) -> None:
    routed, _ = trained(pool, tokenizer, examples, method)
    first = routed.vectors
    fit(routed, examples, settings=replace(SETTINGS, steps=1, learning_rate=1e-6))
    second = routed.vectors
    largest = max(
        float(np.abs(second[name][module] - first[name][module]).max()) for name in first for module in first[name]
    )
    assert 0 < largest < 1e-4


def test_dora_without_an_update_of_its_own(
    pool: Any, tokenizer: Any, examples: Any, tmp_path: Path, method: str
) -> None:
    # A fresh DoRA adapter is a candidate (it has magnitudes), though Arrow finds no direction in it.
    fresh = save_adapter(llama(), tmp_path / "fresh", 5, r=2, target_modules=["q_proj"], use_dora=True)
    weights = load_file(fresh / "adapter_model.safetensors")
    zeroed = {key: torch.zeros_like(value) if "lora_B" in key else value for key, value in weights.items()}
    save_file(zeroed, fresh / "adapter_model.safetensors")
    more = {"attention": pool["attention"], "mlp": pool["mlp"], "fresh": fresh}
    data = [each for each in examples if each.adapter in more]
    routed, prototypes = trained(more, tokenizer, data, method)
    write_prototypes(tmp_path / "set.safetensors", prototypes)
    outputs = logits(routed)
    assert torch.equal(logits(compose(llama(), more, method, prototypes=str(tmp_path / "set.safetensors"))), outputs)
    routed.save(tmp_path / "saved")
    loaded = RoutedModel.load(tmp_path / "saved")
    assert torch.equal(logits(loaded), outputs)
    for each in (routed, loaded):
        each.remove_adapters("mlp")
        each.set_method(method)


def test_a_trained_model_is_detached_bit_for_bit(pool: Any, tokenizer: Any, examples: Any, method: str) -> None:
    routed, _ = trained(pool, tokenizer, examples, method)
    base, fresh = routed.detach(), llama()
    assert base.state_dict().keys() == fresh.state_dict().keys()
    assert all(torch.equal(one, fresh.state_dict()[name]) for name, one in base.state_dict().items())
    assert [parameter.requires_grad for parameter in base.parameters()] == [True] * len(list(fresh.parameters()))
