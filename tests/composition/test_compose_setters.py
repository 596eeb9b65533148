"""Another method, another pool: as if composed anew, on the base model that stays loaded; an error changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compose_models import ATTENTION, assert_close, llama, make_tokenizer, prompt_ids, save_adapter
from compose_tasks import PROMPTS, SAMPLES, offline_encoder
from compose_zoo import lora, peft_adapter
from safetensors.torch import load_file, save_file

from hub_router import Hub
from hub_router.composition.attach import routed_updates
from hub_router.composition.build import compose
from hub_router.composition.routed import RoutedModel
from hub_router.errors import (
    HubRouterError,
    IncompatibleAdaptersError,
    MethodError,
    RoutedStateError,
    UnsupportedAdapterError,
)
from hub_router.features import PoolFeatures
from hub_router.gaussian import fit
from hub_router.lora.reader import read_adapter
from hub_router.lora.spectrum import spectra
from hub_router.records import Spectrum
from hub_router.routing.registry import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")
SEQUENCE: dict[str, Any] = {"samples": SAMPLES, "encoder": offline_encoder()}


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=prompt_ids(2, 9) if ids is None else ids).logits


def text_logits(routed: RoutedModel) -> torch.Tensor:
    return logits(routed.model, routed.tokenizer(PROMPTS[:1], return_tensors="pt")["input_ids"])


def same(routed: RoutedModel, other: RoutedModel) -> None:
    """Pool, method and every bit of the outputs."""
    assert routed.adapters == other.adapters
    assert routed.method == other.method
    assert routed.notes == other.notes
    assert torch.equal(text_logits(routed), text_logits(other))


@pytest.fixture
def routed(folders: dict[str, Path], tokenizer: Any) -> RoutedModel:
    return compose(llama(), folders, "arrow", tokenizer=tokenizer, top_k=2)


def is_base(model: Any) -> bool:
    """Bit for bit, and without a trace of having been routed."""
    fresh = llama()
    hooks = any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())
    return (
        not hooks
        and not list(routed_updates(model))
        and "generate" not in vars(model)
        and all(torch.equal(one, fresh.state_dict()[name]) for name, one in model.state_dict().items())
        and torch.equal(logits(model), logits(fresh))
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_after_another(name: str, equal_folders: dict[str, Path], tokenizer: Any) -> None:
    options: dict[str, Any] = {"adapter": "green"} if name == "single" else {}
    samples = dict(zip(equal_folders, SAMPLES.values(), strict=False))
    given: dict[str, Any] = {"tokenizer": tokenizer, "samples": samples, "encoder": offline_encoder()}
    base = llama()
    routed = compose(base, equal_folders, "hilora-gs", **given)
    routed.set_method(name, **options)
    assert routed.model is base
    expected = compose(llama(), equal_folders, name, **given, **options)
    same(routed, expected)
    assert (routed._planner is None) == (expected._planner is None)
    routed.set_method("spectr", top_k=2)
    same(routed, compose(llama(), equal_folders, "spectr", tokenizer=tokenizer, top_k=2))
    assert is_base(routed.detach())


class Counting:
    """The packaged encoder, and what it was asked."""

    name = "offline"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        self.asked += texts
        return offline_encoder().encode(texts)


def test_samples_and_encoder_are_remembered_and_embedded_once(folders: dict[str, Path], tokenizer: Any) -> None:
    encoder = Counting()
    routed = compose(llama(), folders, tokenizer=tokenizer, samples=SAMPLES, encoder=encoder)
    assert not encoder.asked
    routed.set_method("hilora")
    assert sorted(encoder.asked) == sorted(text for texts in SAMPLES.values() for text in texts)
    encoder.asked.clear()
    routed.set_method("retriever", top_k=2)
    routed.remove_adapters("mlp")
    routed.add_adapters({"new": folders["mlp"]}, samples={"new": ["one more", "and another"]})
    assert encoder.asked == ["one more", "and another"]
    samples = {**{name: each for name, each in SAMPLES.items() if name != "mlp"}, "new": ["one more", "and another"]}
    pool = {**{name: folder for name, folder in folders.items() if name != "mlp"}, "new": folders["mlp"]}
    given = {"tokenizer": tokenizer, "samples": samples, "encoder": offline_encoder()}
    same(routed, compose(llama(), pool, "retriever", top_k=2, **given))
    encoder.asked.clear()
    routed.set_method("hilora", samples={"new": ["something else", "altogether"]})
    assert encoder.asked == ["something else", "altogether"]


def turned_spectra(folder: Path) -> dict[str, Spectrum]:
    """Of a folder's adapter, with directions that no computation would give."""
    return {
        each.module: Spectrum(each.module, each.singular_values, np.roll(each.direction, 1), False)
        for each in spectra(read_adapter(folder))
    }


def test_what_the_catalog_knows_is_kept_for_the_adapters_that_stay(
    folders: dict[str, Path], other_pool: dict[str, Path], tokenizer: Any
) -> None:
    gaussians = {name: fit(offline_encoder().encode(texts)) for name, texts in SAMPLES.items()}
    known = {name: turned_spectra(folder) for name, folder in folders.items()}
    features = PoolFeatures(known, gaussians, "offline")
    routed = compose(llama(), folders, "uniform", tokenizer=tokenizer, features=features)
    routed.set_method("arrow", top_k=1)
    same(routed, compose(llama(), folders, "arrow", tokenizer=tokenizer, features=features, top_k=1))
    assert not torch.equal(text_logits(routed), text_logits(compose(llama(), folders, tokenizer=tokenizer, top_k=1)))
    # Under another name it is the same adapter; another folder under the same name is not.
    routed.set_adapters({"renamed": "mlp", "all": other_pool["all"], "layer": "layer"})
    pool = {"renamed": folders["mlp"], "all": other_pool["all"], "layer": folders["layer"]}
    kept = PoolFeatures({"renamed": known["mlp"], "layer": known["layer"]})
    same(routed, compose(llama(), pool, "arrow", tokenizer=tokenizer, features=kept, top_k=1))
    with pytest.raises(MethodError, match=r"has fewer of: all \(0\);"):
        routed.set_method("hilora")
    routed.set_method("hilora", samples={"all": SAMPLES["all"]})
    samples = {"renamed": SAMPLES["mlp"], "all": SAMPLES["all"], "layer": SAMPLES["layer"]}
    same(
        routed,
        compose(llama(), pool, "hilora", tokenizer=tokenizer, samples=samples, encoder=offline_encoder()),
    )


@pytest.fixture(scope="module")
def other_pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Other adapters, one of a name that the first pool has."""
    root = tmp_path_factory.mktemp("other pool")
    return {
        name: save_adapter(llama(), root / name, seed, r=5, target_modules=ATTENTION)
        for seed, name in enumerate(("all", "extra"), start=50)
    }


def test_another_pool_reads_only_what_is_new(
    folders: dict[str, Path], other_pool: dict[str, Path], tokenizer: Any, tmp_path: Path
) -> None:
    moving = {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in folders.items()}
    routed = compose(llama(), moving, "arrow", tokenizer=tokenizer, top_k=2)
    held = {adapter.name: adapter.modules for adapter in routed._pool}
    for folder in moving.values():
        folder.rename(folder.with_name(f"moved-{folder.name}"))
    routed.set_adapters(["patterns", other_pool["extra"], "all"])
    pool = {"patterns": folders["patterns"], "extra": other_pool["extra"], "all": folders["all"]}
    same(routed, compose(llama(), pool, "arrow", tokenizer=tokenizer, top_k=2))
    assert [adapter.modules is held.get(adapter.name) for adapter in routed._pool] == [True, False, True]
    assert is_base(routed.detach())


def test_adapters_are_added_and_removed(routed: RoutedModel, folders: dict[str, Path], other_pool: Any) -> None:
    routed.add_adapters({"extra": other_pool["extra"]})
    routed.add_adapters([other_pool["all"], read_adapter(other_pool["extra"], "in memory")])
    assert routed.adapters == (*folders, "extra", "all-2", "in memory")
    routed.remove_adapters("mlp", "in memory", "layer")
    pool = {
        **{name: folder for name, folder in folders.items() if name not in ("mlp", "layer")},
        "extra": other_pool["extra"],
        "all-2": other_pool["all"],
    }
    same(routed, compose(llama(), pool, "arrow", tokenizer=routed.tokenizer, top_k=2))
    with routed.trace() as trace:
        logits(routed.model)
    assert trace.weights["model.layers.0.self_attn.q_proj"].shape == (2, 9, 5)
    assert is_base(routed.detach())


def test_saved_and_loaded_after_a_change(routed: RoutedModel, other_pool: dict[str, Path], tmp_path: Path) -> None:
    routed.set_method("hilora", **SEQUENCE)
    routed.add_adapters([other_pool["extra"]], samples={"extra": ["a", "b c"]})
    routed.save(tmp_path / "saved")
    again = RoutedModel.load(tmp_path / "saved", model=llama())
    assert torch.equal(text_logits(again), text_logits(routed))
    assert again.adapters == routed.adapters
    for each in (again, routed):
        each.set_method("spectr")
        each.remove_adapters("layer")
    assert torch.equal(text_logits(again), text_logits(routed))


def test_a_loaded_composition_knows_the_tasks_of_its_adapters(routed: RoutedModel, tmp_path: Path) -> None:
    routed.set_method("hilora", **SEQUENCE)
    routed.save(tmp_path / "saved")
    again = RoutedModel.load(tmp_path / "saved", model=llama())
    for each in (again, routed):
        each.remove_adapters("layer")
    assert torch.equal(text_logits(again), text_logits(routed))
    for each in (again, routed):
        each.set_method("retriever", top_k=2)
    assert torch.equal(text_logits(again), text_logits(routed))


def too_large(folder: Path) -> Path:
    """The same adapter with a value that float16 does not have."""
    tensors = load_file(folder / "adapter_model.safetensors")
    first = next(name for name in tensors if "lora_A" in name)
    tensors[first][0, 0] = 1e6
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


FAULTS: dict[str, tuple[Callable[[RoutedModel, Path], Any], type[HubRouterError], str]] = {
    "no method": (lambda r, _: r.set_method("sparrow"), MethodError, "no method 'sparrow'"),
    "hyperparameter": (lambda r, _: r.set_method("arrow", top_k=0), MethodError, "top_k=0"),
    "pool": (lambda r, _: r.set_method("merged"), MethodError, "equal rank"),
    "samples": (lambda r, _: r.set_method("hilora", encoder=offline_encoder()), MethodError, "has fewer of: att"),
    "strangers": (lambda r, _: r.set_method("hilora", samples={**SAMPLES, "x": ["a"]}), MethodError, "not in the .* x"),
    "no pool": (lambda r, _: r.set_adapters([]), MethodError, "adapters is empty"),
    "text": (lambda r, _: r.set_adapters("attention"), MethodError, "adapters is 'attention'"),
    "added name": (lambda r, _: r.add_adapters({"mlp": "x", "y": "z"}), UnsupportedAdapterError, "found nothing"),
    "unreadable": (lambda r, p: r.add_adapters([p / "gone"]), UnsupportedAdapterError, "'gone'"),
    "unknown": (lambda r, _: r.remove_adapters("all", "nobody"), MethodError, "no adapters 'nobody'; the pool is: att"),
    "none left": (lambda r, _: r.remove_adapters(*r.adapters), MethodError, "no adapter would be left"),
    "misfit": (lambda r, p: r.add_adapters([p / "wide"]), IncompatibleAdaptersError, "expected 32 x 32"),
    "overflow": (lambda r, p: r.add_adapters([p / "large"]), UnsupportedAdapterError, "float16's largest"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_changes_nothing(fault: str, folders: dict[str, Path], tokenizer: Any, tmp_path: Path) -> None:
    """The overflow is found when half of the updates are made, the others before."""
    save_adapter(llama(hidden_size=64), tmp_path / "wide", 1, r=2, target_modules=["q_proj"])
    too_large(save_adapter(llama(), tmp_path / "large", 1, r=2, target_modules=["v_proj", "q_proj"]))
    routed = compose(llama().half(), folders, "spectr", tokenizer=tokenizer, top_k=2)
    before = (routed.adapters, routed.method, routed.notes, logits(routed.model))
    call, kind, message = FAULTS[fault]
    with pytest.raises(kind, match=message):
        call(routed, tmp_path)
    assert (routed.adapters, routed.method, routed.notes) == before[:3]
    assert torch.equal(logits(routed.model), before[3])
    # What failed is not remembered.
    with pytest.raises(MethodError, match="has fewer of: attention"):
        routed.set_method("retriever", encoder=offline_encoder())
    base = routed.detach()
    assert torch.equal(logits(base), logits(llama().half()))
    assert not any(each._forward_hooks for each in base.modules())


def test_a_name_that_is_taken(routed: RoutedModel, other_pool: dict[str, Path]) -> None:
    before = logits(routed.model)
    with pytest.raises(MethodError, match="names that are in the pool already: all; choose others"):
        routed.add_adapters(other_pool)
    assert torch.equal(logits(routed.model), before)


def test_the_adapter_of_single_cannot_leave(routed: RoutedModel) -> None:
    routed.set_method("single", adapter="all")
    routed.remove_adapters("mlp")
    before = logits(routed.model)
    with pytest.raises(MethodError, match="adapter='all', expected a name of the pool"):
        routed.remove_adapters("all")
    assert torch.equal(logits(routed.model), before)


def test_a_failed_change_brings_plans_and_replaced_parameters_back(tokenizer: Any, tmp_path: Path) -> None:
    config = lora(["q_proj"], modules_to_save=["embed_tokens"])
    embedding = peft_adapter(llama, tmp_path / "embedding", 2, config)
    large = too_large(save_adapter(llama(), tmp_path / "large", 1, r=2, target_modules=["q_proj", "v_proj"]))
    base = llama().half()
    own = base.model.embed_tokens.weight
    given: dict[str, Any] = {"samples": {"embedding": ["a", "b"]}, "encoder": offline_encoder()}
    routed = compose(base, [embedding], "hilora-gs", tokenizer=tokenizer, **given)
    before, replaced = text_logits(routed), base.model.embed_tokens.weight
    assert replaced is not own
    with pytest.raises(UnsupportedAdapterError, match="float16's largest"):
        routed.set_adapters([large], samples={"large": ["a", "b"]})
    assert base.model.embed_tokens.weight is replaced
    assert torch.equal(text_logits(routed), before)
    assert routed.generate("a prompt", max_new_tokens=3) is not None
    assert routed.detach().model.embed_tokens.weight is own


def test_saved_parameters_come_and_go_with_the_adapter_used_alone(tmp_path: Path) -> None:
    embedding = peft_adapter(llama, tmp_path / "embedding", 2, lora(["q_proj"], modules_to_save=["embed_tokens"]))
    plain = peft_adapter(llama, tmp_path / "plain", 3, lora(["q_proj"]))
    other = peft_adapter(llama, tmp_path / "other", 4, lora(["v_proj"], modules_to_save=["embed_tokens"]))
    base = llama()
    own = base.model.embed_tokens.weight
    routed = compose(base, {"plain": plain, "embedding": embedding}, "single", adapter="embedding")
    with_embedding = logits(routed.model)
    routed.set_method("single", adapter="plain")
    assert base.model.embed_tokens.weight is own
    assert torch.equal(logits(routed.model), logits(compose(llama(), [plain]).model))
    with pytest.raises(IncompatibleAdaptersError, match="it was trained, which only one adapter alone can bring"):
        routed.set_method("arrow")
    assert torch.equal(logits(routed.model), logits(compose(llama(), [plain]).model))
    routed.set_method("single", adapter="embedding")
    assert torch.equal(logits(routed.model), with_embedding)
    # From one replaced embedding to another: the base's own is what both are compared with.
    routed.set_adapters({"embedding": other})
    assert torch.equal(logits(routed.model), logits(compose(llama(), [other]).model))
    routed.model.bfloat16()
    routed.set_adapters({"embedding": embedding})
    assert base.model.embed_tokens.weight.dtype == torch.bfloat16
    assert routed.detach().model.embed_tokens.weight is own
    assert torch.equal(logits(base), logits(llama().bfloat16()))


def test_dora_gains_are_those_of_the_base(folders: dict[str, Path], tmp_path: Path) -> None:
    dora = peft_adapter(llama, tmp_path / "dora", 5, lora(["q_proj"], use_dora=True))
    routed = compose(llama(), folders, "spectr", top_k=2)
    routed.add_adapters([dora])
    expected = compose(llama(), {**folders, "dora": dora}, "spectr", top_k=2)
    assert torch.equal(logits(routed.model), logits(expected.model))


def test_a_trace_must_be_closed_first(routed: RoutedModel) -> None:
    with routed.trace() as trace:
        for change in (lambda: routed.set_method("uniform"), lambda: routed.remove_adapters("all")):
            with pytest.raises(RoutedStateError, match="a trace is open on this model; leave its with-block"):
                change()
        logits(routed.model)
    assert trace.weights
    routed.set_method("uniform")
    routed.detach()
    for change in (lambda: routed.set_method("arrow"), lambda: routed.add_adapters(["x"])):
        with pytest.raises(RoutedStateError, match="this routed model was detached"):
            change()
    for change in (lambda: routed.set_adapters(["x"]), lambda: routed.remove_adapters("all")):
        with pytest.raises(RoutedStateError, match="this routed model was detached"):
            change()


def test_a_model_that_was_moved_stays_where_it_is(folders: dict[str, Path]) -> None:
    routed = compose(llama(), folders, "uniform")
    routed.model.bfloat16()
    routed.set_method("arrow", top_k=5)
    assert {update.A.dtype for _, update in routed_updates(routed.model)} == {torch.bfloat16}
    assert torch.equal(logits(routed.model), logits(compose(llama().bfloat16(), folders, "arrow", top_k=5).model))


def test_a_compiled_model_follows(tmp_path: Path) -> None:
    one: dict[str, Any] = {"num_hidden_layers": 1}
    pool = {str(r): save_adapter(llama(**one), tmp_path / str(r), r, r=r, target_modules=["q_proj"]) for r in (2, 5)}
    routed = compose(llama(**one), pool, "uniform")
    torch._dynamo.reset()
    compiled = torch.compile(routed.model, fullgraph=True, backend="eager")
    ids = prompt_ids(2, 9)
    with torch.no_grad():
        assert_close(compiled(input_ids=ids, use_cache=False).logits, logits(routed.model))
        first = logits(routed.model)
        routed.set_method("single", adapter="5")
        assert not torch.allclose(first, logits(routed.model), atol=1e-2)
        assert_close(compiled(input_ids=ids, use_cache=False).logits, logits(routed.model))


def test_a_composition_of_the_catalog_takes_any_method(tmp_path: Path) -> None:
    base = tmp_path / "base"
    llama().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    folders = {}
    for seed, name in enumerate(("mlp", "patterns", "layer")):
        folders[name] = save_adapter(llama(), tmp_path / name, seed, r=4, target_modules=ATTENTION)
        fields = json.loads((folders[name] / "adapter_config.json").read_text())
        (folders[name] / "adapter_config.json").write_text(json.dumps({**fields, "base_model_name_or_path": str(base)}))
        rows = [json.dumps({"input": text, "output": "yes"}) for text in SAMPLES[name]]
        (folders[name] / "samples.jsonl").write_text("\n".join(rows) + "\n")
    with Hub(tmp_path / "home") as hub:
        hub.sync(*folders.values())
        hub.index("offline")
        routed = hub.compose("mix", {name: str(folder) for name, folder in folders.items()}, "arrow", top_k=2)
        routed.set_method("hilora")
        chosen = {name: SAMPLES[name] for name in folders}
        given = {"tokenizer": routed.tokenizer, "samples": chosen, "encoder": offline_encoder()}
        expected = compose(llama(), folders, "hilora", **given)
        routed.model.cpu()
        assert_close(text_logits(routed), text_logits(expected), 1e-4)
        routed.remove_adapters("layer")
        assert routed.adapters == ("mlp", "patterns")
