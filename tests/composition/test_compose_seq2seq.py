"""Encoder-decoder models: text in and out, batches, traces, explanations, stored compositions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compose_models import assert_close
from compose_zoo import ARCHITECTURES, lora, peft_adapter

from hub_router.composition.base_model import load_base
from hub_router.composition.build import compose
from hub_router.composition.routed import RoutedModel

OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
T5 = ARCHITECTURES["t5"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("t5")
    targets = {"all": T5.targets, "attention": ["q", "v"], "mlp": ["wo"]}
    return {
        name: peft_adapter(T5.make, root / name, seed, lora(each)) for seed, (name, each) in enumerate(targets.items())
    }


@pytest.fixture
def routed(folders: dict[str, Path], tokenizer: Any) -> RoutedModel:
    return compose(T5.make(0), folders, "arrow", tokenizer=tokenizer, top_k=2)


def test_generate_gives_the_answer_alone(routed: RoutedModel) -> None:
    ids = torch.tensor([routed.tokenizer("a prompt")["input_ids"]])
    output = routed.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **OPTIONS)
    assert routed.generate("a prompt", **OPTIONS) == routed.tokenizer.decode(output[0], skip_special_tokens=True)


def test_a_batch_equals_its_prompts_alone(routed: RoutedModel) -> None:
    prompts = ["short", "a rather longer prompt", "x"]
    assert routed.generate(prompts, **OPTIONS) == [routed.generate(prompt, **OPTIONS) for prompt in prompts]


def test_stream_equals_generate(routed: RoutedModel) -> None:
    assert "".join(routed.stream("a prompt", **OPTIONS)) == routed.generate("a prompt", **OPTIONS)


def test_both_sides_are_traced(routed: RoutedModel) -> None:
    with routed.trace() as trace:
        routed(input_ids=torch.full((2, 7), 5), decoder_input_ids=torch.full((2, 3), 6))
    encoder = trace.weights["encoder.block.1.layer.0.SelfAttention.q"]
    decoder = trace.weights["decoder.block.1.layer.1.EncDecAttention.q"]
    crossed = trace.weights["decoder.block.1.layer.1.EncDecAttention.v"]
    assert (encoder.shape, decoder.shape, crossed.shape) == ((2, 7, 3), (2, 3, 3), (2, 7, 3))
    assert_close(encoder.sum(-1), torch.ones(2, 7))


def test_explain_shows_prompt_and_answer(routed: RoutedModel) -> None:
    explanation = routed.explain("a prompt", **OPTIONS)
    assert explanation.text == routed.generate("a prompt", **OPTIONS)
    assert explanation.prompt_tokens == len("a prompt")
    assert "".join(explanation.tokens[: explanation.prompt_tokens]) == "a prompt"
    assert explanation.weights.shape == (len(explanation.tokens), 3)
    assert_close(explanation.weights.sum(-1), torch.ones(len(explanation.tokens)))


def test_by_folder_saved_and_loaded(folders: dict[str, Path], tokenizer: Any, tmp_path: Path) -> None:
    T5.make(0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model, found = load_base(str(tmp_path / "base"))
    assert type(model).__name__ == "T5ForConditionalGeneration"
    assert found is not None
    routed = compose(tmp_path / "base", folders, "spectr")
    expected = routed.generate("a prompt", **OPTIONS)
    routed.save(tmp_path / "saved")
    assert RoutedModel.load(tmp_path / "saved").generate("a prompt", **OPTIONS) == expected
