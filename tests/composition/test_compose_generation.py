"""Token-level methods while text is generated: caches, beams, samples, draft models, compiled, other architectures."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compose_models import assert_close, llama, prompt_ids
from compose_zoo import ARCHITECTURES, lora, peft_adapter

from hub_router.composition.attach import routed_updates
from hub_router.composition.build import compose
from hub_router.composition.routed import RoutedModel
from hub_router.routing.registry import METHODS

TOKEN_LEVEL = [name for name, method in METHODS.items() if not hasattr(method, "plan")]
# xlora gates a layer by what the whole model reads.
BY_LAYER = [name for name in TOKEN_LEVEL if name != "xlora"]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
PROMPT = 7


@pytest.fixture(params=TOKEN_LEVEL)
def routed(request: pytest.FixtureRequest, equal_folders: dict[str, Path]) -> RoutedModel:
    return composed(request.param, equal_folders)


def composed(name: str, folders: dict[str, Path]) -> RoutedModel:
    options: dict[str, Any] = {"adapter": "green"} if name == "single" else {}
    if name in ("arrow", "spectr"):
        options["top_k"] = 2
    return compose(llama(), folders, name, **options)


def generated(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **{**GREEDY, **options})


def read(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits ``(B, T, V)`` of a forward without a cache."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_with_any_cache_as_without(routed: RoutedModel) -> None:
    ids = prompt_ids(2, PROMPT)
    options = {"return_dict_in_generate": True, "output_logits": True}
    output = generated(routed.model, ids, **options)
    whole = read(routed.model, output.sequences)
    for step, logits in enumerate(output.logits):
        assert_close(logits, whole[:, PROMPT - 1 + step], 1e-4)
    for other in ({"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 1, "prefill_chunk_size": 3}):
        assert torch.equal(generated(routed.model, ids, **other), output.sequences)


def test_a_draft_model_changes_nothing(routed: RoutedModel) -> None:
    ids = prompt_ids(1, PROMPT)
    assert torch.equal(generated(routed.model, ids, assistant_model=llama(seed=3)), generated(routed.model, ids))


def test_as_a_draft_model(equal_folders: dict[str, Path]) -> None:
    ids = prompt_ids(1, PROMPT)
    draft = composed("arrow", equal_folders)
    assert torch.equal(generated(llama(), ids, assistant_model=draft.model), generated(llama(), ids))


def test_samples_are_drawn_from_the_logits_of_a_plain_forward(equal_folders: dict[str, Path]) -> None:
    routed = composed("arrow", equal_folders)
    ids = prompt_ids(2, PROMPT)
    options = {"do_sample": True, "num_return_sequences": 3, "return_dict_in_generate": True, "output_logits": True}
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(generated(routed.model, ids, **options))
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    assert runs[0].sequences.unique(dim=0).shape[0] == 6
    assert torch.equal(runs[0].sequences[:, :PROMPT], ids.repeat_interleave(3, 0))
    whole = read(routed.model, runs[0].sequences)
    for step, logits in enumerate(runs[0].logits):
        assert_close(logits, whole[:, PROMPT - 1 + step], 1e-4)


def test_scores_of_beams_are_those_of_a_plain_forward(equal_folders: dict[str, Path]) -> None:
    routed = composed("spectr", equal_folders)
    options = {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.0}
    output = generated(routed.model, prompt_ids(2, PROMPT), **options, return_dict_in_generate=True, output_scores=True)
    logs = read(routed.model, output.sequences).log_softmax(-1)[:, PROMPT - 1 : -1]
    chosen = logs.gather(-1, output.sequences[:, PROMPT:, None]).squeeze(-1).sum(-1)
    assert_close(output.sequences_scores, chosen, 1e-4)


@pytest.mark.parametrize("method", BY_LAYER)
def test_routed_layer_compiles_as_one_graph_with_gradients(method: str, equal_folders: dict[str, Path]) -> None:
    linear = composed(method, equal_folders).model.model.layers[0].self_attn.q_proj
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    results = []
    for layer in (linear, compiled):
        x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
        output = layer(x)
        output.square().sum().backward()
        results.append((output, x.grad))
    for got, expected in zip(results[1], results[0], strict=True):
        assert_close(got, expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of torch.compile's kernels is not here")
@pytest.mark.parametrize("method", ["arrow", "hilora-roc"])
def test_routed_layer_compiles_to_kernels(method: str, folders: dict[str, Path]) -> None:
    linear = compose(llama(), folders, method).model.model.layers[0].self_attn.q_proj
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True)
    for tokens in (1, 3, 40):
        x = torch.randn(2, tokens, 32)
        assert_close(compiled(x), linear(x))


ZOO = ["gpt2", "gpt_neox", "bloom", "phi3", "mamba", "falcon_mamba", "t5"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ZOO)
def test_other_architectures_generate(name: str, tmp_path: Path) -> None:
    """Conv1D, fused maps, recurrent states, an encoder and a decoder: a batch with a cache as one by one without."""
    architecture = ARCHITECTURES[name]
    pool = {
        f"{seed}": peft_adapter(architecture.make, tmp_path / f"{seed}", seed, lora(architecture.targets))
        for seed in range(3)
    }
    ids = prompt_ids(3, PROMPT)
    routed = compose(architecture.make(0), pool, "arrow", top_k=2)
    for method in ("arrow", "hilora-roc"):
        routed.set_method(method, **{"top_k": 2} if method == "arrow" else {"top_rocs": 3})
        together = generated(routed.model, ids)
        for number, row in enumerate(ids.split(1)):
            assert torch.equal(generated(routed.model, row, use_cache=False)[0], together[number])
        assert not torch.equal(together, generated(architecture.make(0), ids))
    # Of all modules that were adapted none was passed over.
    with routed.trace() as trace:
        generated(routed.model, ids)
    assert trace.steps.keys() == {update.module for _, update in routed_updates(routed.model)}
