"""Text in, text out: batches, padding, beams, sampling, streaming."""

from __future__ import annotations

import time
from pathlib import Path
from threading import active_count
from typing import Any

import pytest
import torch
from compose_models import assert_close, llama, make_tokenizer, opt, prompt_ids, qwen2
from transformers import StoppingCriteria, StoppingCriteriaList

from hub_router.composition.build import compose
from hub_router.composition.routed import RoutedModel
from hub_router.composition.text import encode
from hub_router.errors import HubRouterError

PROMPTS = ["Hi", "A much longer prompt, with commas", "mid size"]
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(params=["uniform", "arrow", "spectr"])
def routed(request: pytest.FixtureRequest, folders: dict[str, Path], tokenizer: Any) -> RoutedModel:
    return compose(llama(), folders, request.param, tokenizer=tokenizer)


@pytest.fixture
def arrow(folders: dict[str, Path], tokenizer: Any) -> RoutedModel:
    return compose(llama(), folders, "arrow", tokenizer=tokenizer, top_k=2)


def test_text_is_what_a_loop_without_cache_generates(routed: RoutedModel, tokenizer: Any) -> None:
    ids = tokenizer("Hello there", return_tensors="pt")["input_ids"]
    width = ids.shape[1]
    with torch.no_grad():
        for _ in range(8):
            following = routed(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], dim=1)
            if following.item() == tokenizer.eos_token_id:
                break
    expected = tokenizer.decode(ids[0, width:], skip_special_tokens=True)
    assert routed.generate("Hello there", **GREEDY) == expected
    assert expected


def test_batch_gives_what_single_prompts_give(routed: RoutedModel) -> None:
    assert routed.generate(PROMPTS, **GREEDY) == [routed.generate(prompt, **GREEDY) for prompt in PROMPTS]


def test_beams_give_the_same_alone_and_in_a_batch(routed: RoutedModel) -> None:
    options = {**GREEDY, "num_beams": 3}
    assert routed.generate(PROMPTS, **options) == [routed.generate(prompt, **options) for prompt in PROMPTS]


@pytest.mark.parametrize(("name", "factory"), [("qwen2", qwen2), ("opt", opt)])
def test_other_architectures(other_folders: dict[str, Path], tokenizer: Any, name: str, factory: Any) -> None:
    routed = compose(factory(), [other_folders[name]], tokenizer=tokenizer)
    texts = routed.generate(PROMPTS, **GREEDY)
    assert texts == [routed.generate(prompt, **GREEDY) for prompt in PROMPTS]
    assert all(texts)


def test_left_padding_does_not_change_logits(routed: RoutedModel) -> None:
    ids = prompt_ids(1, 6)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.int64), torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        got = routed(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
        assert_close(got, routed(input_ids=ids).logits)


def test_prompts_are_padded_on_the_left_and_the_tokenizer_is_left_alone(arrow: RoutedModel) -> None:
    tokenizer = make_tokenizer(eos_token="</s>")
    tokenizer.padding_side = "right"
    batch = encode(arrow.model, tokenizer, ["ab", "c"])
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]
    # The model's generation config supplies the pad token that this tokenizer lacks.
    assert batch["input_ids"][1].tolist() == [0, tokenizer.encode("c")[0]]
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", None)


def test_end_token_pads_where_nobody_has_a_pad_token(folders: dict[str, Path]) -> None:
    tokenizer = make_tokenizer(eos_token="</s>")
    routed = compose(llama(pad_token_id=None, eos_token_id=None), folders, tokenizer=tokenizer)
    assert encode(routed.model, tokenizer, ["ab", "c"])["input_ids"][1][0] == tokenizer.eos_token_id
    assert routed.generate(PROMPTS, **GREEDY) == [routed.generate(prompt, **GREEDY) for prompt in PROMPTS]


def test_special_tokens_are_left_out_and_generation_ends_at_the_end_token(arrow: RoutedModel) -> None:
    whole = arrow.generate("Hi", **GREEDY)
    ids = arrow.tokenizer.encode(whole)
    stop = ids[3]
    cut = arrow.generate("Hi", **GREEDY, eos_token_id=stop)
    assert arrow.tokenizer.encode(cut) == ids[: ids.index(stop) + 1]


def test_several_sequences_come_as_lists(arrow: RoutedModel) -> None:
    options = {**GREEDY, "num_beams": 4, "num_return_sequences": 2}
    one = arrow.generate("Hi", **options)
    many = arrow.generate(["Hi", "Ho"], **options)
    assert isinstance(one, list) and len(one) == 2
    assert [len(each) for each in many] == [2, 2]
    assert many[0] == one


def test_sampling_options_pass_through(arrow: RoutedModel) -> None:
    def sample(**options: Any) -> str:
        torch.manual_seed(0)
        return arrow.generate("Hi", max_new_tokens=12, do_sample=True, **options)

    assert sample(temperature=3.0) == sample(temperature=3.0)
    assert sample(temperature=3.0) != sample(top_k=1)
    assert sample(top_k=1) == arrow.generate("Hi", max_new_tokens=12, do_sample=False)


def test_details_can_be_asked_for(arrow: RoutedModel) -> None:
    assert arrow.generate("Hi", **GREEDY, return_dict_in_generate=True) == arrow.generate("Hi", **GREEDY)


def test_length_can_be_left_to_the_generation_config(arrow: RoutedModel) -> None:
    arrow.model.generation_config.max_new_tokens = 3
    assert arrow.generate("Hi", max_new_tokens=None, do_sample=False) == arrow.generate(
        "Hi", max_new_tokens=3, do_sample=False
    )


def test_empty_prompt_starts_from_the_first_token(arrow: RoutedModel) -> None:
    assert arrow.generate("", **GREEDY) == arrow.generate("<s>", **GREEDY)
    assert arrow.generate([], **GREEDY) == []


def test_prompt_without_any_token_is_refused(arrow: RoutedModel) -> None:
    arrow.tokenizer = make_tokenizer(pad_token="<pad>")
    with pytest.raises(HubRouterError, match="prompts 1 of 2 have no tokens"):
        arrow.generate(["a", ""])


def test_text_needs_a_tokenizer(folders: dict[str, Path]) -> None:
    routed = compose(llama(), folders)
    for use in (routed.generate, routed.stream, routed.explain):
        with pytest.raises(HubRouterError, match=r"no tokenizer.*compose\(\.\.\., tokenizer=\.\.\.\)"):
            use("Hi")


def test_stream_gives_the_generated_text_in_pieces(routed: RoutedModel) -> None:
    pieces = list(routed.stream("Once upon a time", max_new_tokens=30, do_sample=False))
    assert "".join(pieces) == routed.generate("Once upon a time", max_new_tokens=30, do_sample=False)
    assert all(pieces)


def test_stream_raises_what_generation_raises(arrow: RoutedModel) -> None:
    with pytest.raises(ValueError, match="not_an_option"):
        list(arrow.stream("Hi", not_an_option=1))
    with pytest.raises(ValueError, match="beam"):
        list(arrow.stream("Hi", num_beams=2))


def test_closing_a_stream_stops_the_generation(arrow: RoutedModel) -> None:
    class Slow(StoppingCriteria):
        steps = 0

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_options: Any) -> torch.Tensor:
            Slow.steps += 1
            time.sleep(0.01)
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    threads = active_count()
    torch.manual_seed(0)
    # Words come out whole, so what is sampled is "a" and " " alone.
    others = sorted(set(range(300)) - set(arrow.tokenizer.encode("a ")))
    options = {"max_new_tokens": 1000, "suppress_tokens": others, "do_sample": True}
    stream = arrow.stream("Once upon a time", stopping_criteria=StoppingCriteriaList([Slow()]), **options)
    next(stream)
    stream.close()
    assert active_count() == threads
    assert 0 < Slow.steps < 100


def test_stream_takes_no_stopping_criteria_as_none(arrow: RoutedModel) -> None:
    assert "".join(arrow.stream("Hi", **GREEDY, stopping_criteria=None)) == arrow.generate("Hi", **GREEDY)
