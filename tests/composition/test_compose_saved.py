"""Heads, embeddings and biases that adapters bring: applied alone, refused or left out in a mix, put back on detach."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compose_models import assert_close, llama
from compose_zoo import logits, lora, peft_adapter, peft_logits
from peft import PeftModel, TaskType
from transformers import LlamaForSequenceClassification

from hub_router.composition.architecture import empty_model
from hub_router.composition.build import compose
from hub_router.composition.pool import check_pool, read_pool
from hub_router.errors import HubRouterError, IncompatibleAdaptersError, RoutedStateError
from hub_router.lora.adapter import SavedParameter

pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = ["q_proj", "v_proj"]


def classifier(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = llama().config
    config.num_labels = 3
    return LlamaForSequenceClassification(config).eval()


@pytest.fixture
def head(tmp_path: Path) -> Path:
    return peft_adapter(classifier, tmp_path / "head", 1, lora(TARGETS, task_type=TaskType.SEQ_CLS))


@pytest.fixture
def embedding(tmp_path: Path) -> Path:
    return peft_adapter(llama, tmp_path / "embedding", 2, lora(TARGETS, modules_to_save=["embed_tokens"]))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return peft_adapter(llama, tmp_path / "plain", 3, lora(TARGETS))


def test_a_task_head_alone_is_that_of_the_adapter(head: Path) -> None:
    base = classifier()
    expected = logits(PeftModel.from_pretrained(classifier(), head).eval())
    before = logits(base)
    own = base.score.weight
    routed = compose(base, {"head": head}, method="single", adapter="head")
    assert_close(logits(routed.model), expected)
    assert not any("left out" in note for note in routed.notes)
    routed.detach()
    assert base.score.weight is own
    assert torch.equal(logits(base), before)


def test_a_pool_of_one_is_alone_whatever_the_method(embedding: Path) -> None:
    assert_close(logits(compose(llama(), [embedding], "arrow").model), peft_logits(llama, embedding))


def test_one_of_many_is_alone_where_the_method_uses_no_other(embedding: Path, plain: Path) -> None:
    routed = compose(llama(), {"a": plain, "b": embedding}, "single", adapter="b")
    assert_close(logits(routed.model), peft_logits(llama, embedding))
    routed.detach()
    routed = compose(llama(), {"a": plain, "b": embedding}, "single", adapter="a")
    assert_close(logits(routed.model), peft_logits(llama, plain))
    routed.detach()
    assert torch.equal(logits(compose(llama(), {"b": embedding, "a": plain}, "base").model), logits(llama()))


def test_a_mix_refuses_what_only_one_can_bring(embedding: Path, plain: Path, head: Path, tmp_path: Path) -> None:
    biased = peft_adapter(
        lambda seed: llama(seed, attention_bias=True), tmp_path / "biased", 4, lora(TARGETS, bias="lora_only")
    )
    base = llama(attention_bias=True)
    with pytest.raises(IncompatibleAdaptersError) as caught:
        compose(base, {"plain": plain, "embedding": embedding, "biased": biased})
    lines = caught.value.mismatches
    assert lines[0] == (
        "adapter 'embedding', parameter model.embed_tokens.weight: it was trained, which only one adapter alone can "
        "bring; leave the adapter out, or use method 'single' with adapter='embedding'"
    )
    assert all("adapter 'biased', parameter model.layers." in line for line in lines[1:])
    assert len(lines) == 1 + 4
    assert not any(module._forward_hooks for module in base.modules())
    with pytest.raises(IncompatibleAdaptersError, match=r"parameter score\.weight: it was trained"):
        compose(classifier(), {"head": head, "plain": plain})


def test_a_head_that_the_model_does_not_have_is_left_out_and_said_so(
    head: Path, plain: Path, caplog: pytest.LogCaptureFixture
) -> None:
    note = "adapter 'head', parameter score.weight is left out: LlamaForCausalLM has no such task head"
    for pool, options in (
        ({"head": head, "plain": plain}, {}),
        ({"head": head}, {"method": "single", "adapter": "head"}),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            routed = compose(llama(), pool, **options)
        assert [each for each in routed.notes if "left out" in each] == [note]
        assert note in caplog.text


def test_saved_weights_that_equal_the_base_models_are_no_obstacle(plain: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    stored = load_file(plain / "adapter_model.safetensors")
    stored["base_model.model.model.embed_tokens.weight"] = llama().model.embed_tokens.weight.detach().clone()
    save_file(stored, plain / "adapter_model.safetensors")
    routed = compose(llama(), {"a": plain, "b": plain})
    assert not any("left out" in note for note in routed.notes)
    assert_close(logits(routed.model), peft_logits(llama, plain))


def test_shapes_that_differ_and_parameters_that_do_not_exist(embedding: Path, tmp_path: Path) -> None:
    larger = llama(vocab_size=310)
    with pytest.raises(IncompatibleAdaptersError, match=r"got shape \(300, 32\), expected \(310, 32\) as in the model"):
        compose(larger, [embedding], "single", adapter="embedding")
    norm = peft_adapter(llama, tmp_path / "norm", 5, lora(TARGETS, modules_to_save=["norm"]))
    small = llama()
    del small.model.norm
    with pytest.raises(
        IncompatibleAdaptersError, match=r"parameter model\.norm\.weight: the model has no such parameter"
    ):
        compose(small, [norm], "single", adapter="norm")


def test_without_weights_shapes_are_compared_and_values_left_for_later(embedding: Path, tmp_path: Path) -> None:
    llama().config.save_pretrained(tmp_path / "config")
    pool, _ = read_pool([embedding])
    empty = empty_model(str(tmp_path / "config"))
    alone = check_pool(empty, "base", pool, (), ["embedding"])
    assert (alone.replace, alone.faults, alone.notes) == ({}, (), ())
    with pytest.raises(IncompatibleAdaptersError, match=r"model\.embed_tokens\.weight: it was trained"):
        check_pool(empty, "base", pool, (), ["embedding", "another"])
    loose = {path: SavedParameter(each.value, apart=False) for path, each in pool[0].saved.items()}
    later = check_pool(empty, "base", [replace(pool[0], saved=loose)], (), ["embedding", "another"])
    assert "is compared with the model's when its weights are loaded; a mix needs it equal" in later.notes[0]


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary_comes_with_its_embeddings(tied: bool, tmp_path: Path) -> None:
    """What PEFT saves of a model whose vocabulary grew stands for the base's own parameters, tied ones included."""
    from peft import get_peft_model

    def grown(seed: int = 0) -> Any:
        model = llama(seed, tie_word_embeddings=tied)
        torch.manual_seed(9)
        model.resize_token_embeddings(305)
        return model

    wrapped = get_peft_model(grown(), lora(TARGETS))
    with torch.no_grad():
        wrapped.get_input_embeddings().weight[5:] += 1.0
    wrapped.save_pretrained(tmp_path / "grown", save_embedding_layers=True)
    expected = logits(PeftModel.from_pretrained(grown(), tmp_path / "grown").eval())
    base = grown()
    before = logits(base)
    routed = compose(base, [tmp_path / "grown"], "single", adapter="grown")
    assert_close(logits(routed.model), expected)
    assert not torch.equal(logits(routed.model), before)
    assert torch.equal(logits(routed.detach()), before)


def test_a_saved_composition_brings_them_along(embedding: Path, tmp_path: Path) -> None:
    from hub_router.composition.routed import RoutedModel

    routed = compose(llama(), [embedding], "single", adapter="embedding")
    expected = logits(routed.model)
    routed.save(tmp_path / "saved")
    assert torch.equal(logits(routed.model), expected)
    again = RoutedModel.load(tmp_path / "saved")
    assert torch.equal(logits(again.model), expected)
    assert torch.equal(logits(again.detach()), logits(llama()))


def test_a_classifier_is_saved_and_loaded_as_the_class_that_it_is(head: Path, tmp_path: Path) -> None:
    from hub_router.composition.routed import RoutedModel

    routed = compose(classifier(), {"head": head}, "single", adapter="head")
    expected = logits(routed.model)
    routed.save(tmp_path / "saved")
    again = RoutedModel.load(tmp_path / "saved")
    assert type(again.model).__name__ == "LlamaForSequenceClassification"
    assert torch.equal(logits(again.model), expected)
    classifier().save_pretrained(tmp_path / "base")
    by_folder = compose(tmp_path / "base", {"head": head}, "single", adapter="head")
    assert torch.equal(logits(by_folder.model), expected)


def test_a_head_that_the_config_names_and_the_file_lacks_is_not_replaced_by_the_models_own(
    head: Path, plain: Path
) -> None:
    from safetensors.torch import load_file, save_file

    stored = load_file(head / "adapter_model.safetensors")
    save_file({name: t for name, t in stored.items() if "score" not in name}, head / "adapter_model.safetensors")
    for pool in ({"head": head}, {"head": head, "plain": plain}):
        with pytest.raises(IncompatibleAdaptersError, match=r"score was trained .*, but its weights hold no such"):
            compose(classifier(), pool)
    assert any("modules_to_save names" in note for note in compose(llama(), {"head": head}).notes)


def test_what_is_put_back_follows_a_model_that_moved(embedding: Path, tmp_path: Path) -> None:
    from hub_router.composition.routed import RoutedModel

    routed = compose(llama(), [embedding], "single", adapter="embedding")
    routed.model.to(torch.bfloat16)
    expected = logits(routed.model)
    routed.save(tmp_path / "saved")
    assert torch.equal(logits(routed.model), expected)
    assert torch.equal(logits(RoutedModel.load(tmp_path / "saved").model), expected)
    base = routed.detach()
    assert {parameter.dtype for parameter in base.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(base), logits(llama().to(torch.bfloat16)))


def test_models_composed_from_one_adapter_share_nothing(embedding: Path) -> None:
    pool, _ = read_pool([embedding])
    one, other = (compose(llama(), pool, "single", adapter="embedding") for _ in range(2))
    before = logits(other.model)
    with torch.no_grad():
        one.model.model.embed_tokens.weight.zero_()
    assert torch.equal(logits(other.model), before)
    assert pool[0].saved["model.embed_tokens.weight"].value.any()


def test_a_failure_at_the_end_leaves_the_model_as_it_was(embedding: Path) -> None:
    pool, _ = read_pool([embedding])
    # A factor that float16 cannot hold is found only when the update is made.
    factors = {
        n: replace(f, B=f.B * 1e6) if n.endswith("1.self_attn.v_proj") else f for n, f in pool[0].modules.items()
    }
    wild = replace(pool[0], modules=factors)
    base = llama().half()
    own = dict(base.named_parameters())
    with pytest.raises(HubRouterError, match=r"exceed float16's largest, 65504"):
        compose(base, [wild], "single", adapter="embedding")
    assert not any(module._forward_hooks for module in base.modules())
    assert all(own[name] is parameter for name, parameter in base.named_parameters())
    assert isinstance(wild.saved["model.embed_tokens.weight"], SavedParameter)


def test_one_module_under_several_names_is_refused(tmp_path: Path) -> None:
    """A resized T5 holds one table as ``shared`` and as both sides' own; PEFT adapts it under one of the names."""
    from compose_zoo import ARCHITECTURES

    def resized(seed: int = 0) -> Any:
        model = ARCHITECTURES["t5"].make(seed)
        model.resize_token_embeddings(310)
        return model

    adapted = peft_adapter(resized, tmp_path / "adapted", 6, lora(["shared", "q"]))
    with pytest.raises(IncompatibleAdaptersError, match=r"module shared: .* this very module as encoder\."):
        compose(resized(), [adapted])
    replaced = peft_adapter(resized, tmp_path / "replaced", 7, lora(["q"], modules_to_save=["shared"]))
    with pytest.raises(IncompatibleAdaptersError, match=r"shared\.weight: .* this very module as encoder\."):
        compose(resized(), [replaced], "single", adapter="replaced")


def test_a_base_with_layers_of_peft_is_refused(plain: Path) -> None:
    wrapped = PeftModel.from_pretrained(llama(), plain)
    with pytest.raises(RoutedStateError, match=r"carries adapters of PEFT: \d+ modules, the first is "):
        compose(wrapped.get_base_model(), [plain])
