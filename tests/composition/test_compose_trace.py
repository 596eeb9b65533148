"""trace: expert weights of every module and token, in pool order, alone, padded and while generating."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compose_models import assert_close, llama, opt, prompt_ids

from hub_router.composition.build import compose
from hub_router.composition.routed import RoutedModel
from hub_router.errors import RoutedStateError

Q_PROJ = "model.layers.1.self_attn.q_proj"
UP_PROJ = "model.layers.0.mlp.up_proj"


@pytest.fixture(params=["uniform", "arrow", "spectr"])
def routed(request: pytest.FixtureRequest, folders: dict[str, Path], tokenizer: Any) -> RoutedModel:
    return compose(llama(), folders, request.param, tokenizer=tokenizer)


def test_weights_sum_to_one_and_are_zero_for_adapters_elsewhere(routed: RoutedModel) -> None:
    with routed.trace() as trace:
        routed(input_ids=prompt_ids(2, 9))
    # Every linear map of both layers is adapted by somebody.
    assert len(trace.weights) == 14
    for weights in trace.weights.values():
        assert weights.shape == (2, 9, 5)
        assert_close(weights.sum(-1), torch.ones(2, 9))
    order = ("attention", "mlp", "all", "layer", "patterns")
    assert routed.adapters == trace.adapters == order
    assert not trace.weights[UP_PROJ][..., [0, 3, 4]].any()
    assert not trace.weights[Q_PROJ][..., 1].any()


def test_arrow_weights_follow_the_inputs_of_the_module(folders: dict[str, Path]) -> None:
    routed = compose(llama(), folders, "arrow", top_k=2, temperature=0.5)
    linear = routed.model.get_submodule(Q_PROJ)
    inputs: list[torch.Tensor] = []
    linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with routed.trace() as trace:
        routed(input_ids=prompt_ids(1, 4))
    prototypes = linear.hub_router_update.router_P.detach()  # attention, all, layer, patterns
    for token, row in zip(inputs[0][0].detach(), trace.weights[Q_PROJ][0], strict=True):
        scores = {e: abs(float(p @ token)) for e, p in zip((0, 2, 3, 4), prototypes, strict=True)}
        best = sorted(scores, key=lambda e: -scores[e])[:2]
        assert sorted(row.nonzero().flatten().tolist()) == sorted(best)
        ratio = torch.tensor((scores[best[0]] - scores[best[1]]) / 0.5).exp()
        assert (row[best[0]] / row[best[1]]).item() == pytest.approx(ratio.item(), rel=1e-3)


def test_single_and_base_are_traced_too(folders: dict[str, Path]) -> None:
    single = compose(llama(), folders, "single", adapter="layer")
    with single.trace() as trace:
        single(input_ids=prompt_ids(1, 3))
    assert trace.weights[Q_PROJ].tolist() == [[[0, 0, 0, 1, 0]] * 3]
    assert not trace.weights[UP_PROJ].any()
    base = compose(llama(), folders, "base")
    with base.trace() as trace:
        base(input_ids=prompt_ids(1, 3))
    assert len(trace.weights) == 14
    assert not any(weights.any() for weights in trace.weights.values())


def test_forwards_are_concatenated_along_the_tokens(routed: RoutedModel) -> None:
    with routed.trace() as whole:
        routed(input_ids=prompt_ids(1, 7))
    with routed.trace() as stepwise:
        past = routed(input_ids=prompt_ids(1, 7)[:, :4], use_cache=True).past_key_values
        for position in range(4, 7):
            past = routed(
                input_ids=prompt_ids(1, 7)[:, position : position + 1], past_key_values=past, use_cache=True
            ).past_key_values
    for module, weights in whole.weights.items():
        assert_close(stepwise.weights[module], weights)
        assert len(stepwise.steps[module]) == 4


def test_cached_generation_and_beams(routed: RoutedModel) -> None:
    with routed.trace() as trace:
        routed.generate(["Hello", "You"], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert trace.weights[Q_PROJ].shape == (2, 5 + 6 - 1, 5)
    with routed.trace() as trace:
        routed.generate(["Hello", "You"], max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=3)
    assert trace.weights[Q_PROJ].shape == (6, 5 + 6 - 1, 5)


def test_flattened_tokens_get_their_shape_back(other_folders: dict[str, Path]) -> None:
    routed = compose(opt(), {"a": other_folders["opt"]}, "uniform")
    with routed.trace() as trace:
        routed(input_ids=prompt_ids(3, 5))
    shapes = {module.rsplit(".", 1)[-1]: weights.shape for module, weights in trace.weights.items()}
    assert shapes == dict.fromkeys(("q_proj", "out_proj", "fc1", "fc2"), (3, 5, 1))


def test_different_batches_cannot_be_joined_but_are_kept(routed: RoutedModel) -> None:
    with routed.trace() as trace:
        routed(input_ids=prompt_ids(1, 3))
        routed(input_ids=prompt_ids(2, 4))
    with pytest.raises(RoutedStateError, match=r"batch sizes 1, 2.*trace\.steps"):
        _ = trace.weights
    assert [step.shape for step in trace.steps[Q_PROJ]] == [(1, 3, 5), (2, 4, 5)]


def test_nothing_is_recorded_outside_the_block(routed: RoutedModel) -> None:
    with routed.trace() as trace:
        pass
    routed(input_ids=prompt_ids(1, 3))
    assert trace.weights == {}
    assert not routed.model._forward_pre_hooks


def test_traces_do_not_nest_and_an_error_ends_one(routed: RoutedModel) -> None:
    with pytest.raises(RoutedStateError, match="open on this model already"), routed.trace(), routed.trace():
        pass
    with routed.trace() as trace:
        routed(input_ids=prompt_ids(1, 3))
    assert len(trace.weights) == 14


def test_weights_carry_no_gradient(routed: RoutedModel) -> None:
    with routed.trace() as trace:
        routed(input_ids=prompt_ids(1, 3)).logits.sum().backward()
    assert not any(weights.requires_grad for weights in trace.weights.values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_recorded_once(routed: RoutedModel, reentrant: bool) -> None:
    ids = prompt_ids(2, 5)
    with routed.trace() as plain:
        routed(input_ids=ids, use_cache=False)
    routed.model.train()
    routed.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with routed.trace() as trace:
        for _ in range(2):
            routed(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert {module: len(steps) for module, steps in trace.steps.items()} == dict.fromkeys(plain.steps, 2)
    for module, weights in plain.weights.items():
        assert_close(trace.weights[module], torch.cat([weights, weights], dim=1))
