"""Methods that decide per sequence: a text gets the same plan alone, in any batch, and however it is decoded."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from compose_models import assert_close, llama, opt, save_adapter
from compose_tasks import PROMPTS, SAMPLES, offline_encoder
from compose_zoo import ARCHITECTURES, lora, peft_adapter
from transformers import StaticCache

from hub_router.composition.build import compose
from hub_router.composition.routed import RoutedModel
from hub_router.errors import ArtifactError, EncoderUnavailableError, MethodError, RoutedStateError

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "retriever": ("retriever", {"top_k": 2}),
    # A wide ridge makes every adapter a candidate.
    "hilora": ("hilora", {"epsilon": 1e-3}),
    "hilora-gs": ("hilora-gs", {"epsilon": 1e-3}),
}
Q_PROJ = "model.layers.1.self_attn.q_proj"
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return METHODS[request.param]


@pytest.fixture
def routed(method: tuple[str, dict[str, Any]], folders: dict[str, Path], tokenizer: Any) -> RoutedModel:
    return composed(llama(), folders, tokenizer, method)


def composed(model: Any, folders: dict[str, Path], tokenizer: Any, method: tuple[str, dict[str, Any]]) -> RoutedModel:
    samples = dict(zip(folders, SAMPLES.values(), strict=False))
    name, options = method
    return compose(model, folders, name, tokenizer=tokenizer, samples=samples, encoder=offline_encoder(), **options)


def encoded(routed: RoutedModel, prompts: list[str], side: str = "left") -> dict[str, torch.Tensor]:
    inputs = routed.tokenizer(prompts, padding=True, padding_side=side, return_tensors="pt")
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def read(routed: RoutedModel, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``(B, T, V)`` and the expert weights of one module ``(B, T, E)``."""
    with routed.trace() as trace, torch.no_grad():
        logits = routed(**inputs).logits
    return logits, trace.weights[Q_PROJ]


def rows_of(routed: RoutedModel, prompts: list[str]) -> torch.Tensor:
    """The plan of each prompt read alone, ``(B, E)``."""
    planner = routed._planner
    assert planner is not None
    return torch.cat([planner.make(encoded(routed, [each])["input_ids"], None).rows["weights"] for each in prompts])


def generated(routed: RoutedModel, prompts: list[str], **options: Any) -> torch.Tensor:
    """New tokens ``(N, 6)``."""
    inputs = encoded(routed, prompts)
    return routed.model.generate(**inputs, **{**GREEDY, **options})[:, inputs["input_ids"].shape[1] :]


def test_texts_are_told_apart(routed: RoutedModel) -> None:
    """Without this nothing below would be shown."""
    rows = rows_of(routed, PROMPTS)
    assert len({tuple(row) for row in rows.tolist()}) >= 3
    one, other = (read(routed, encoded(routed, [each]))[0][0, -1] for each in PROMPTS[:2])
    assert not torch.allclose(one, other, atol=0.1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (3, 0, 4, 2, 1), (1, 1, 3)])
def test_alone_and_in_a_batch(routed: RoutedModel, order: tuple[int, ...], side: str) -> None:
    inputs = encoded(routed, [PROMPTS[number] for number in order], side)
    logits, weights = read(routed, inputs)
    for number, mask, row, expected in zip(order, inputs["attention_mask"].bool(), logits, weights, strict=True):
        alone, own = read(routed, encoded(routed, [PROMPTS[number]]))
        assert_close(row[mask], alone[0], 1e-4)
        assert_close(expected[mask], own[0])


def test_the_plan_is_the_same_bit_for_bit_whoever_stands_beside(folders: dict[str, Path], tokenizer: Any) -> None:
    rows = []
    for prompts in (PROMPTS, PROMPTS[:1], [PROMPTS[0], "a much longer text " * 20]):
        fresh = composed(llama(), folders, tokenizer, METHODS["hilora-gs"])
        planner = fresh._planner
        assert planner is not None
        rows.append(planner.make(**renamed(encoded(fresh, prompts))).rows["weights"][0])
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


def renamed(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"ids": inputs["input_ids"], "mask": inputs["attention_mask"]}


def test_generate_a_batch_and_alone(routed: RoutedModel) -> None:
    together = generated(routed, PROMPTS)
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert torch.equal(generated(routed, [prompt])[0], row)
    assert torch.equal(generated(routed, PROMPTS, use_cache=False), together)
    assert torch.equal(generated(routed, PROMPTS, cache_implementation="static"), together)


def test_beams_and_return_sequences_follow_their_prompt(routed: RoutedModel) -> None:
    expected = rows_of(routed, PROMPTS[:2])
    for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}):
        torch.manual_seed(0)
        with routed.trace() as trace:
            together = generated(routed, PROMPTS[:2], **options)
        used = trace.weights[Q_PROJ]  # [6, T, E]
        assert used.shape[:1] == (6,)
        for row, weights in zip(expected.repeat_interleave(3, 0), used, strict=True):
            # The experts that take part are those of the plan that adapt this module.
            assert not (weights > 0)[:, row == 0].any()
        if "num_beams" in options:
            for number in range(2):
                assert torch.equal(generated(routed, PROMPTS[number : number + 1], **options)[0], together[number])


def test_gates_of_beams_are_those_of_the_prompt_alone(folders: dict[str, Path], tokenizer: Any) -> None:
    routed = composed(llama(), folders, tokenizer, METHODS["hilora-gs"])
    expected = rows_of(routed, PROMPTS).repeat_interleave(2, 0)
    with routed.trace() as trace:
        generated(routed, PROMPTS, num_beams=2)
    live = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])  # "mlp" does not adapt the module
    for step in trace.weights[Q_PROJ].unbind(1):
        assert torch.equal(step, expected * live)


def test_assisted_generation(routed: RoutedModel) -> None:
    for prompt in PROMPTS[:2]:
        inputs = encoded(routed, [prompt])
        plain = routed.model.generate(**inputs, **GREEDY)
        for assistant in (llama(), llama(seed=7)):
            assert torch.equal(routed.model.generate(**inputs, **GREEDY, assistant_model=assistant), plain)


def by_hand(routed: RoutedModel, inputs: dict[str, torch.Tensor], steps: int, key: str, cache: Any = None) -> Any:
    """Greedy tokens ``(B, steps)``, each forward going on from the cache of the one before."""
    new: list[torch.Tensor] = []
    feed: dict[str, Any] = dict(inputs)
    for _ in range(steps):
        with torch.no_grad():
            output = routed(**feed, **({} if cache is None else {key: cache}), use_cache=True)
        cache = getattr(output, key)
        new.append(output.logits[:, -1].argmax(-1, keepdim=True))
        feed = {**feed, "input_ids": new[-1]}
        if key == "cache_params":
            feed.pop("attention_mask", None)  # Mamba's, which reads the mask of the tokens at hand alone
        else:
            feed["attention_mask"] = torch.cat([feed["attention_mask"], torch.ones_like(new[-1])], 1)
    return torch.cat(new, 1), cache


@pytest.mark.parametrize("static", [False, True])
def test_rows_of_a_cache_keep_their_plans_when_reordered_by_hand(routed: RoutedModel, static: bool) -> None:
    inputs = encoded(routed, PROMPTS[:3])
    cache = StaticCache(config=routed.model.config, max_cache_len=40) if static else None
    step, cache = by_hand(routed, inputs, 1, "past_key_values", cache)
    order = torch.tensor([2, 0, 1])
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.int64)], 1)
    twin = copy.deepcopy(cache)
    cache.reorder_cache(order)
    moved, _ = by_hand(routed, {"input_ids": step[order], "attention_mask": mask[order]}, 4, "past_key_values", cache)
    stayed, _ = by_hand(routed, {"input_ids": step, "attention_mask": mask}, 4, "past_key_values", twin)
    assert torch.equal(moved, stayed[order])


def test_rows_of_a_cache_are_selected_and_repeated_by_hand(routed: RoutedModel) -> None:
    inputs = encoded(routed, PROMPTS[:3])
    step, cache = by_hand(routed, inputs, 1, "past_key_values")
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.int64)], 1)
    few, strange = copy.deepcopy(cache), copy.deepcopy(cache)
    chosen = torch.tensor([1, 2])
    few.batch_select_indices(chosen)
    few.batch_repeat_interleave(2)
    rows = chosen.repeat_interleave(2)
    got, _ = by_hand(routed, {"input_ids": step[rows], "attention_mask": mask[rows]}, 3, "past_key_values", few)
    whole, _ = by_hand(routed, {"input_ids": step, "attention_mask": mask}, 3, "past_key_values", cache)
    assert torch.equal(got, whole[rows])
    strange.layers[-1].keys[1] += 1
    with pytest.raises(RoutedStateError, match="holds other sequences than when they were planned"):
        routed(input_ids=step, attention_mask=mask, past_key_values=strange)


@pytest.mark.parametrize("static", [False, True])
def test_decoding_by_hand_follows_the_prompt(routed: RoutedModel, static: bool) -> None:
    inputs = encoded(routed, [PROMPTS[1]])
    cache = StaticCache(config=routed.model.config, max_cache_len=40) if static else None
    assert torch.equal(by_hand(routed, inputs, 6, "past_key_values", cache)[0], generated(routed, [PROMPTS[1]]))
    if cache is not None:
        cache.reset()
        other = by_hand(routed, encoded(routed, [PROMPTS[0]]), 6, "past_key_values", cache)[0]
        assert torch.equal(other, generated(routed, [PROMPTS[0]]))


def test_a_cache_keeps_its_own_plan_after_other_inputs(routed: RoutedModel) -> None:
    inputs = encoded(routed, [PROMPTS[0]])
    whole, _ = by_hand(routed, inputs, 4, "past_key_values")
    _, cache = by_hand(routed, inputs, 2, "past_key_values")
    twin = copy.deepcopy(cache)
    generated(routed, PROMPTS[1:3])
    mask = torch.ones(1, inputs["input_ids"].shape[1] + 2, dtype=torch.int64)
    for held in (cache, twin):
        # Two tokens were made, of which the second has not been read yet.
        got, _ = by_hand(routed, {"input_ids": whole[:, 1:2], "attention_mask": mask}, 2, "past_key_values", held)
        assert torch.equal(got, whole[:, 2:])


def test_a_cache_of_another_composition_is_refused(routed: RoutedModel) -> None:
    inputs = encoded(routed, [PROMPTS[0]])
    foreign = llama()(**inputs, use_cache=True).past_key_values
    with pytest.raises(RoutedStateError, match="continues one that it has not seen; start with the prompt"):
        routed(input_ids=inputs["input_ids"][:, :1], past_key_values=foreign)
    _, cache = by_hand(routed, inputs, 1, "past_key_values")
    routed.set_method("hilora-gs")
    with pytest.raises(RoutedStateError, match="continues one that it has not seen"):
        routed(input_ids=inputs["input_ids"][:, :1], past_key_values=cache)


ZOO = {"mamba": "cache_params", "falcon_mamba": "cache_params", "gpt2": "past_key_values", "bloom": "past_key_values"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ZOO)
def test_other_architectures(name: str, tokenizer: Any, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    pool = {
        f"{name}-{seed}": peft_adapter(architecture.make, tmp_path / str(seed), seed, lora(architecture.targets))
        for seed in range(3)
    }
    # Of one length: Mamba reads padding on the left as text.
    prompts = [prompt[:10] for prompt in PROMPTS[1:4]]
    for method in (METHODS["hilora"], METHODS["retriever"]):
        routed = composed(architecture.make(0), pool, tokenizer, method)
        together, steps = tokens_and_logits(routed, prompts)
        for number, prompt in enumerate(prompts):
            tokens, own = tokens_and_logits(routed, [prompt])
            assert torch.equal(tokens[0], together[number])
            assert_close(steps[number], own[0], 1e-4)
        inputs = encoded(routed, prompts)
        assert torch.equal(by_hand(routed, inputs, 6, ZOO[name])[0], together)
        # By the plan of another prompt the first would have been read otherwise.
        assert routed._planner is not None
        with routed._planner.holding(inputs["input_ids"][1:2], None):
            other = routed(**{key: each[:1] for key, each in inputs.items()}).logits[:, -1]
        assert not torch.allclose(other[0], steps[0, 0], atol=1e-3)
        routed.detach()


def tokens_and_logits(routed: RoutedModel, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens ``(B, 6)`` and the logits they were chosen by ``(B, 6, V)``."""
    inputs = encoded(routed, prompts)
    output = routed.model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    return output.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(output.logits, 1)


def test_tokens_in_one_row_belong_to_their_sequence(tokenizer: Any, tmp_path: Path) -> None:
    """OPT's MLP sees the tokens of all sequences one after another."""
    targets = ["q_proj", "fc1", "fc2"]
    pool = {
        str(seed): save_adapter(opt(), tmp_path / str(seed), seed, r=4, target_modules=targets) for seed in range(3)
    }
    routed = composed(opt(), pool, tokenizer, METHODS["hilora"])
    together = generated(routed, PROMPTS, num_beams=2)
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert torch.equal(generated(routed, [prompt], num_beams=2)[0], row)


T5 = ARCHITECTURES["t5"]


@pytest.fixture
def translator(method: tuple[str, dict[str, Any]], tokenizer: Any, tmp_path: Path) -> RoutedModel:
    targets = {"all": T5.targets, "attention": ["q", "v"], "mlp": ["wo"]}
    pool = {
        name: peft_adapter(T5.make, tmp_path / name, seed, lora(each))
        for seed, (name, each) in enumerate(targets.items())
    }
    return composed(T5.make(0), pool, tokenizer, method)


@pytest.mark.filterwarnings("ignore")
def test_encoder_and_decoder_follow_the_encoders_text(translator: RoutedModel) -> None:
    inputs = encoded(translator, PROMPTS, "right")
    for options in ({}, {"num_beams": 3}):
        together = translator.model.generate(**inputs, **GREEDY, **options)
        for number, prompt in enumerate(PROMPTS):
            alone = translator.model.generate(**encoded(translator, [prompt]), **GREEDY, **options)
            assert torch.equal(alone[0], together[number])
    with translator.trace() as trace:
        translator(**inputs, decoder_input_ids=torch.full((5, 3), 6))
    expected = rows_of(translator, PROMPTS) > 0
    for module in ("encoder.block.1.layer.0.SelfAttention.q", "decoder.block.1.layer.1.EncDecAttention.q"):
        used = trace.weights[module] > 0
        assert not (used & ~expected.unsqueeze(1)).any()
        assert used.any()
    # The decoder alone, from what the encoder gave and the cache of the first step.
    first = inputs["input_ids"].new_zeros(5, 1)
    with torch.no_grad():
        output = translator(**inputs, decoder_input_ids=first, use_cache=True)
        translator(**encoded(translator, ["something else"]), decoder_input_ids=first[:1])
        token = output.logits[:, -1:].argmax(-1)
        step = {"encoder_outputs": (output.encoder_last_hidden_state,), "attention_mask": inputs["attention_mask"]}
        again = translator(**step, decoder_input_ids=token, past_key_values=output.past_key_values)
        whole = translator(**inputs, decoder_input_ids=torch.cat([first, token], 1))
    assert_close(again.logits[:, -1], whole.logits[:, -1], 1e-4)


def test_saved_and_loaded(routed: RoutedModel, tmp_path: Path) -> None:
    expected = read(routed, encoded(routed, PROMPTS))
    routed.save(tmp_path / "saved")
    again = RoutedModel.load(tmp_path / "saved", model=llama())
    for got, wanted in zip(read(again, encoded(again, PROMPTS)), expected, strict=True):
        assert torch.equal(got, wanted)
    assert torch.equal(generated(again, PROMPTS), generated(routed, PROMPTS))


def test_explained(routed: RoutedModel) -> None:
    row = rows_of(routed, PROMPTS[:1])[0]
    explanation = routed.explain(PROMPTS[0], **GREEDY)
    assert explanation.text == routed.generate(PROMPTS[0], **GREEDY)
    assert not explanation.weights[:, row == 0].any()
    assert explanation.weights.any(-1).all()


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_plans_for_itself(folders: dict[str, Path], tokenizer: Any, copier: Callable[[Any], Any]) -> None:
    routed = composed(llama(), folders, tokenizer, METHODS["hilora"])
    expected = generated(routed, PROMPTS)
    twin = copier(routed.model)
    inputs = encoded(routed, PROMPTS)
    routed.detach()
    assert torch.equal(twin.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :], expected)


def test_threads_do_not_share_plans(routed: RoutedModel) -> None:
    expected = [generated(routed, [prompt]) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        for _ in range(3):
            got = pool.map(lambda prompt: generated(routed, [prompt]), PROMPTS)
            assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_runs_each_forward_again_by_its_own_plan(routed: RoutedModel, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        routed.model.train().zero_grad()
        if checkpointing:
            routed.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        losses = []
        for prompt in PROMPTS[:2]:
            inputs = encoded(routed, [prompt])
            losses.append(routed(**inputs, labels=inputs["input_ids"], use_cache=False).loss)
        sum(losses).backward()
        gradients.append([parameter.grad.clone() for parameter in routed.model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert_close(checkpointed, plain)


def test_compiled_with_graph_breaks(tokenizer: Any, tmp_path: Path) -> None:
    pool = {
        str(rank): save_adapter(
            llama(num_hidden_layers=1), tmp_path / str(rank), rank, r=rank, target_modules=["q_proj"]
        )
        for rank in (2, 5)
    }
    routed = composed(llama(num_hidden_layers=1), pool, tokenizer, METHODS["hilora"])
    torch._dynamo.reset()
    compiled = torch.compile(routed.model, backend="eager")
    for prompts in (PROMPTS[:2], PROMPTS[2:4], PROMPTS[4:]):
        inputs = encoded(routed, prompts)
        with torch.no_grad():
            assert_close(compiled(**inputs, use_cache=False).logits, routed(**inputs).logits)


def test_all_that_is_missing_is_said_at_once_before_anything_is_loaded(folders: dict[str, Path]) -> None:
    base = llama()
    samples = {"mlp": SAMPLES["mlp"], "nobody": ["a"]}
    with pytest.raises(MethodError) as caught:
        compose(base, folders, "hilora", samples=samples, encoder="/no/such/encoder")
    message = str(caught.value)
    assert "at least 2 different ones, and has fewer of: attention (0), all (0), layer (0), patterns (0); " in message
    assert "names that are not in the pool: nobody" in message
    assert "there is no tokenizer (tokenizer=...)" in message
    assert "sentence encoder '/no/such/encoder' cannot be loaded" in message
    assert not any(module._forward_hooks for module in base.modules())


def test_a_base_without_tokenizer_is_refused_before_its_weights_are_loaded(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    llama().config.save_pretrained(tmp_path)
    with pytest.raises(MethodError, match=r"there is no tokenizer \(tokenizer=\.\.\.\)$"):
        compose(tmp_path, folders, "retriever", samples=SAMPLES, encoder=offline_encoder())


class NeverAsked:
    name = "never asked"

    def encode(self, texts: Any) -> Any:
        raise AssertionError(f"asked to embed {texts}")


def test_too_few_samples_are_refused_before_a_base_is_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    llama().config.save_pretrained(tmp_path)
    few = {**SAMPLES, "mlp": ["one"], "layer": ["the same", "the same"]}
    for method in ("hilora", "hilora-gs"):
        with pytest.raises(MethodError, match=r"at least 2 different ones, and has fewer of: mlp \(1\), layer \(1\);"):
            compose(tmp_path, folders, method, tokenizer=object(), samples=few, encoder=NeverAsked())
    with pytest.raises(MethodError, match=r"at least 1 different ones, and has fewer of: mlp \(0\);"):
        compose(tmp_path, folders, "retriever", samples={**few, "mlp": []}, encoder=NeverAsked())


def test_an_encoder_that_is_nowhere(folders: dict[str, Path], tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(EncoderUnavailableError, match="empty"):
        compose(llama(), folders, "retriever", tokenizer=tokenizer, samples=SAMPLES, encoder=str(tmp_path / "empty"))


def test_inputs_without_text_are_refused(routed: RoutedModel) -> None:
    ids = encoded(routed, PROMPTS[:1])["input_ids"]
    embeds = routed.model.get_input_embeddings()(ids)
    with pytest.raises(RoutedStateError, match="got no input_ids; pass input_ids, also beside inputs_embeds"):
        routed(inputs_embeds=embeds)
    with pytest.raises(RoutedStateError, match="text of the prompt, got no input_ids"):
        routed.model.generate(inputs_embeds=embeds, **GREEDY)
    routed(input_ids=ids)
    with pytest.raises(RoutedStateError, match="call the whole model, not a part of it"):
        routed.model.model(input_ids=ids)


def test_labelled_answers_are_no_part_of_the_text(routed: RoutedModel) -> None:
    """In training and scoring with labels, the plan is that of the prompt, whatever the answer."""
    prompt = encoded(routed, PROMPTS[:1])["input_ids"]
    _, alone = read(routed, {"input_ids": prompt})
    for answer in PROMPTS[1:3]:
        ids = torch.cat([prompt, encoded(routed, [answer])["input_ids"]], dim=1)
        labels = ids.clone()
        labels[:, : prompt.shape[1]] = -100
        _, weights = read(routed, {"input_ids": ids, "labels": labels})
        assert_close(weights[:, : prompt.shape[1]], alone)
    _, whole = read(routed, {"input_ids": ids, "labels": ids})
    assert_close(whole, read(routed, {"input_ids": ids})[1])


def test_an_encoder_has_to_give_unit_vectors(folders: dict[str, Path], tokenizer: Any) -> None:
    class Broken:
        name = "broken"

        def encode(self, texts: list[str]) -> torch.Tensor:
            return 3 * torch.ones(len(texts), 4)

    samples = dict(zip(folders, SAMPLES.values(), strict=False))
    with pytest.raises(MethodError, match=r"'broken'.*\(4, 4\) for 4 texts.*unit length"):
        compose(llama(), folders, "hilora", tokenizer=tokenizer, samples=samples, encoder=Broken())
    with pytest.raises(MethodError, match=r"samples must be a list of texts.*: attention"):
        compose(llama(), folders, "hilora", tokenizer=tokenizer, samples={**samples, "attention": "one"})


def test_another_encoder_than_the_saved_one_is_refused(routed: RoutedModel, tmp_path: Path) -> None:
    routed.save(tmp_path / "saved")
    other = copy.copy(offline_encoder())
    object.__setattr__(other, "name", "other")
    with pytest.raises(ArtifactError, match=r"'offline', got 'other'"):
        RoutedModel.load(tmp_path / "saved", encoder=other)


def test_a_generate_of_the_users_own_is_used_and_given_back(folders: dict[str, Path], tokenizer: Any) -> None:
    model, calls = llama(), []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return type(model).generate(model, *args, **kwargs)

    model.generate = own
    routed = composed(model, folders, tokenizer, METHODS["hilora-gs"])
    generated(routed, PROMPTS[:1])
    assert len(calls) == 1
    assert routed.detach().generate is own
