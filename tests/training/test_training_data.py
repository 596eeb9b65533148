"""Examples as text, as tokens, as batches; which of them are set aside, and which a step reads."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from compose_models import llama, make_tokenizer
from compose_zoo import ARCHITECTURES
from tokenizers import Tokenizer, models, normalizers, processors
from training_models import same_vectors, train
from transformers import PreTrainedTokenizerFast

from hub_router.composition.build import compose
from hub_router.errors import TrainingError
from hub_router.records import Sample
from hub_router.training import TrainingSettings, fit
from hub_router.training.batches import collate, draw
from hub_router.training.data import (
    Encoded,
    Example,
    check_examples,
    data_hash,
    encode,
    from_samples,
    needs_labels,
    read_jsonl,
    split,
)
from hub_router.training.registry import create_recipe

POOL = ("red", "green", "blue")
CPU = torch.device("cpu")


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def line(**entry: Any) -> str:
    return json.dumps({"input": "a", "output": "b", "adapter": "red", **entry}, ensure_ascii=False)


def test_examples_come_in_the_files_order(tmp_path: Path) -> None:
    path = write(
        tmp_path / "data.jsonl",
        line(),
        "",
        line(input=" two ", output="\n3\n", adapter="blue", extra=[1]),
        "   ",
        json.dumps({"input": "c", "output": "d", "task": "green"}),
    )
    assert read_jsonl(path, POOL) == [
        Example("red", "a", "b"),
        Example("blue", " two ", "\n3\n"),
        Example("green", "c", "d"),
    ]


@pytest.mark.parametrize("text", ["a\u2028b", "a\u2029b", "a\x85b", "x\x0cy", "tab\\there", "dreißig €", "🦆"])
def test_text_stays_as_it_is(tmp_path: Path, text: str) -> None:
    assert read_jsonl(write(tmp_path / "data.jsonl", line(input=text), line()), POOL)[0].input == text


def test_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b"\r\n".join([line().encode(), line(input="c").encode(), b""]))
    assert [each.input for each in read_jsonl(tmp_path / "data.jsonl", POOL)] == ["a", "c"]


BAD: dict[str, tuple[str, str]] = {
    "no JSON": ("{'input': 1}", "no JSON"),
    "half an object": ('{"input": "a", "output": "b"', "no JSON"),
    "a list": ('["a", "b", "red"]', "a list, expected an object"),
    "a number": ("3", "a int, expected an object"),
    "null": ("null", "a NoneType, expected an object"),
    "no input": (json.dumps({"output": "b", "adapter": "red"}), "input missing, empty or no text"),
    "empty output": (line(output=" \n"), "output missing, empty or no text"),
    "neither": (line(input=None, output=5), "input and output missing, empty or no text"),
    "no adapter": (
        json.dumps({"input": "a", "output": "b"}),
        "no adapter named\nthe pool's adapters: red, green, blue",
    ),
    "a stranger": (
        line(adapter="yellow"),
        "adapter 'yellow' is not in the pool\nthe pool's adapters: red, green, blue",
    ),
    "adapter no text": (line(adapter=["red"]), "adapter ['red'] is not in the pool"),
    "deep": ("[" * 100_000, "no JSON"),
    "a huge number": ('{"input": ' + "9" * 5000 + "}", "no JSON"),
    "half a surrogate pair": (r'{"input": "a\ud800", "output": "b", "adapter": "red"}', "surrogate"),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_a_bad_line_is_named(tmp_path: Path, kind: str) -> None:
    bad, said = BAD[kind]
    path = write(tmp_path / "data.jsonl", line(), "", bad, line())
    with pytest.raises(TrainingError) as raised:
        read_jsonl(path, POOL)
    message = str(raised.value)
    assert f"{path}: 1 lines are no examples:\n  line 3: " in message
    assert said in message


def test_every_bad_line_is_named_with_its_number(tmp_path: Path) -> None:
    kinds = [bad for kind, (bad, _) in BAD.items() if kind not in ("deep", "half a surrogate pair")]
    lines = [each for bad in kinds for each in (line(), bad)]
    with pytest.raises(TrainingError) as raised:
        read_jsonl(write(tmp_path / "data.jsonl", *lines), POOL)
    message = str(raised.value)
    assert f"{len(kinds)} lines are no examples" in message
    *lines, pool = message.splitlines()[1:]
    assert [text.split(":")[0] for text in lines] == [f"  line {2 * n + 2}" for n in range(len(kinds))]
    assert pool == "the pool's adapters: red, green, blue"
    assert message.count("red, green, blue") == 1


def test_of_very_many_bad_lines_the_rest_is_counted(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as raised:
        read_jsonl(write(tmp_path / "data.jsonl", *["no"] * 73), POOL)
    message = str(raised.value)
    assert "73 lines are no examples" in message
    assert len(message.splitlines()) == 52
    assert message.endswith("and 23 more")


@pytest.mark.parametrize("content", [b"", b"\n  \n"])
def test_a_file_without_examples(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(TrainingError, match=r"data.jsonl holds no examples, expected \{\"input\""):
        read_jsonl(tmp_path / "data.jsonl", POOL)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b'{"input": "\xe4"}')
    for path in (tmp_path / "absent.jsonl", tmp_path, tmp_path / "latin"):
        with pytest.raises(TrainingError, match=r"training data .* cannot be read"):
            read_jsonl(path, POOL)


def test_samples_with_an_output_are_examples() -> None:
    samples = {
        "green": [Sample("1", "one"), Sample("2", " "), Sample("3", "three")],
        "red": [Sample("4", "")],
        "blue": [],
    }
    assert from_samples(samples) == [Example("green", "1", "one"), Example("green", "3", "three")]


def test_data_without_examples_or_with_strangers() -> None:
    with pytest.raises(TrainingError, match=r"there are no training examples; give --data FILE, or hub-router samples"):
        check_examples([], POOL)
    wrong = [Example(name, "a", "b") for name in ("red", "pink", "gold", "pink")]
    with pytest.raises(TrainingError, match=r"not in the pool: gold, pink; its adapters: red, green, blue"):
        check_examples(wrong, POOL)


def test_hash_is_of_every_text_and_the_order() -> None:
    data = [Example("red", "a", "b"), Example("red", "c", "d")]
    others = [
        data[::-1],
        data[:1],
        [*data, data[0]],
        [Example("blue", "a", "b"), data[1]],
        [Example("red", "ab", ""), data[1]],
        [Example("red", "a", "b "), data[1]],
    ]
    assert data_hash(list(data)) == data_hash(data)
    assert len({data_hash(each) for each in (data, *others)}) == 7


def texts(tokenizer: Any, encoded: Encoded) -> tuple[str, str]:
    return tokenizer.decode(list(encoded.prompt)), tokenizer.decode(list(encoded.answer))


@pytest.mark.parametrize(
    ("prompt", "answer", "read", "learned"),
    [
        ("Q:", "A", "Q:", " A</s>"),
        ("Q: ", "A", "Q: ", "A</s>"),
        ("Q:\n", "A", "Q:\n", "A</s>"),
        ("Q:", " A", "Q:", " A</s>"),
        ("Q:", "\nA\n", "Q:", "\nA\n</s>"),
        ("Q: ", " A", "Q: ", " A</s>"),
    ],
)
def test_prompt_and_answer_are_joined_by_one_space(prompt: str, answer: str, read: str, learned: str) -> None:
    tokenizer = make_tokenizer()
    (got,) = encode([Example("green", prompt, answer)], POOL, tokenizer, None, encoder=False)
    assert got.adapter == 1
    assert texts(tokenizer, got) == (read, learned)
    assert got.answer[-1] == tokenizer.eos_token_id


def spaced_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """As sentencepiece has it: a text begins with a space of the tokenizer's own, words with the one before them."""
    words = ["Q:", "\u2581Q:", "yes", "\u2581yes", "\u2581", "no", "\u2581no", "\u2581nono"]
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *words, *"\u2581Qyesno:"]
    tokenizer = Tokenizer(
        models.Unigram([(word, -1.0 - (len(word) < 2) * 9) for word in dict.fromkeys(vocabulary)], unk_id=3)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", **special
    )


def test_an_answer_is_tokenized_as_it_follows_its_prompt() -> None:
    tokenizer = spaced_tokenizer()
    alone = tokenizer.tokenize(" yes", add_special_tokens=False)
    assert alone == ["\u2581", "\u2581yes"]
    (got,) = encode([Example("red", "Q:", "yes")], POOL, tokenizer, None, encoder=False)
    assert tokenizer.convert_ids_to_tokens(list(got.prompt)) == ["<s>", "\u2581Q:"]
    assert tokenizer.convert_ids_to_tokens(list(got.answer)) == ["\u2581yes", "</s>"]
    whole = tokenizer("Q: yes")["input_ids"]
    assert [*got.prompt, *got.answer] == [*whole, tokenizer.eos_token_id]


def test_where_the_whole_joins_both_sides_the_prompt_keeps_its_tokens() -> None:
    tokenizer = spaced_tokenizer()
    prompt, answer = "Q: ", "no"
    assert tokenizer.tokenize(prompt + answer) == ["\u2581Q:", "\u2581no"]
    (got,) = encode([Example("red", prompt, answer)], POOL, tokenizer, None, encoder=False)
    assert list(got.prompt) == tokenizer(prompt)["input_ids"]
    alone = tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert list(got.answer) == [*alone, tokenizer.eos_token_id]


def test_an_answer_of_an_encoder_is_not_joined() -> None:
    tokenizer = spaced_tokenizer()
    (got,) = encode([Example("red", "Q:", "yes")], POOL, tokenizer, None, encoder=True)
    assert tokenizer.convert_ids_to_tokens(list(got.answer)) == ["\u2581yes", "</s>"]


def test_lines_without_an_adapter_where_none_is_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", json.dumps({"input": "a", "output": "b"}), line(adapter="blue"))
    found = read_jsonl(path, POOL, labelled=False)
    assert found == [Example("", "a", "b"), Example("blue", "a", "b")]
    check_examples(found, POOL, labelled=False)
    with pytest.raises(TrainingError, match="not in the pool: none at all;"):
        check_examples(found, POOL)
    got = encode(found, POOL, make_tokenizer(), None, encoder=False)
    assert [each.adapter for each in got] == [-1, 2]
    with pytest.raises(TrainingError, match="'yellow' is not in the pool"):
        read_jsonl(write(path, line(adapter="yellow")), POOL, labelled=False)


def test_adapters_may_have_several_names(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", line(adapter="owner/red"), line(adapter="red"))
    assert [each.adapter for each in read_jsonl(path, {"owner/red": "red", "red": "red"})] == ["red", "red"]


@pytest.mark.parametrize(
    ("method", "options", "needs"),
    [
        ("phatgoose", {}, True),
        ("maple", {}, True),
        ("maple", {"mask": "before"}, True),
        ("maple", {"mask": "none"}, False),
        ("lora-mixer", {}, False),
        ("mole", {}, False),
        ("lorahub", {}, False),
    ],
)
def test_which_recipes_need_labels(method: str, options: dict[str, Any], needs: bool) -> None:
    assert needs_labels(create_recipe(method, options)) is needs


@pytest.mark.parametrize("method", ["lora-mixer", "mole", "maple"])
def test_examples_without_an_adapter_are_learned(
    pool: dict[str, Path], tokenizer: Any, examples: list[Example], method: str
) -> None:
    """All of one task, whichever it is: as if they named an adapter where that only balances what is drawn."""
    options = {"mask": "none"} if method == "maple" else {}
    settings = TrainingSettings(steps=3, batch_size=4, learning_rate=0.01)
    alike = []
    for adapter in ("", "attention"):
        same = [Example(adapter, each.input, each.output) for each in examples]
        routed, result = train(pool, tokenizer, same, method, settings, **options)
        alike.append((routed.vectors, result.loss))
    assert same_vectors(alike[0][0], alike[1][0])
    assert alike[0][1] == alike[1][1]


def test_weights_are_searched_for_on_examples_without_an_adapter(
    pool: dict[str, Path], tokenizer: Any, examples: list[Example]
) -> None:
    equal_ranks = dict.fromkeys(("attention", "again"), pool["attention"])
    found = []
    for adapter in ("", "attention"):
        same = [Example(adapter, each.input, each.output) for each in examples]
        routed = compose(llama(), equal_ranks, "lorahub", tokenizer=tokenizer)
        found.append(fit(routed, same, settings=TrainingSettings(steps=4), shots=3).prototypes)
    assert same_vectors(*({each.name: each.vectors for each in one.members} for one in found))


def test_an_encoders_answer_is_a_text_of_its_own() -> None:
    tokenizer = make_tokenizer()
    (got,) = encode([Example("red", "Q:", "A")], POOL, tokenizer, None, encoder=True)
    assert texts(tokenizer, got) == ("Q:", "A</s>")


def test_without_an_end_token_the_answer_has_none() -> None:
    tokenizer = make_tokenizer(pad_token="<pad>", bos_token="<s>")
    (got,) = encode([Example("red", "Q: ", "A")], POOL, tokenizer, None, encoder=False)
    assert texts(tokenizer, got) == ("Q: ", "A")


def test_a_prompt_that_is_too_long_loses_its_beginning() -> None:
    tokenizer = make_tokenizer()
    data = [Example("red", "0123456789 ", "abc"), Example("red", "89 ", "abc")]
    got = encode(data, POOL, tokenizer, 7, encoder=False)
    assert [texts(tokenizer, each) for each in got] == [("89 ", "abc</s>")] * 2
    (got,) = encode(data[:1], POOL, tokenizer, 7, encoder=True)
    assert texts(tokenizer, got) == ("456789 ", "abc</s>")


@pytest.mark.parametrize("encoder", [False, True])
def test_an_answer_that_is_too_long_is_an_error(encoder: bool) -> None:
    fits = Example("red", "Q ", "abcdef" if encoder else "abcde")
    data = [fits, Example("blue", "the one ", "abcdefg"), Example("red", "Q ", "abcdefghi"), fits]
    with pytest.raises(TrainingError) as raised:
        encode(data, POOL, make_tokenizer(), 7, encoder=encoder)
    message = str(raised.value)
    assert "2 examples have no tokens in prompt or answer, or an answer longer than the model's 7 positions" in message
    assert "the first is of adapter 'blue': 'the one '" in message
    assert len(encode([fits], POOL, make_tokenizer(), 7, encoder=encoder)) == 1


def test_examples_without_tokens_are_an_error() -> None:
    with pytest.raises(TrainingError, match="2 examples have no tokens"):
        encode([Example("red", "", "a"), Example("red", "a ", "")], POOL, make_tokenizer(), None, encoder=False)


BATCH = [Encoded(2, (5, 6, 7), (8, 9, 2)), Encoded(0, (10,), (11, 2)), Encoded(1, (12, 13, 14, 15), (2,))]


def test_the_prompt_is_masked_from_the_loss() -> None:
    # Padded with the end token itself, which is learned where it ends an answer, and only there.
    batch = collate(BATCH, 2, llama(), False, CPU)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 2], [10, 11, 2, 2, 2, 2], [12, 13, 14, 15, 2, 2]]
    assert batch.masks[0].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
    no = -100
    assert batch.labels.tolist() == [[no, no, no, 8, 9, 2], [no, 11, 2, no, no, no], [no, no, no, no, 2, no]]
    assert batch.own.tolist() == [2, 0, 1]
    assert batch.learned == 6 and batch.shifted
    logits = torch.randn(3, 6, 20, generator=torch.Generator().manual_seed(0))
    p = torch.log_softmax(logits.double(), -1)
    expected = -(p[0, 2, 8] + p[0, 3, 9] + p[0, 4, 2] + p[1, 0, 11] + p[1, 1, 2] + p[2, 3, 2])
    assert float(batch.loss(logits)) == pytest.approx(float(expected), rel=1e-6)
    half = batch.loss(logits.bfloat16())
    assert half.dtype == torch.float32


def test_the_loss_is_the_models_own() -> None:
    model = llama()
    batch = collate(BATCH, 0, model, False, CPU)
    with torch.no_grad():
        output = model(**batch.inputs, labels=batch.labels)
    assert float(batch.loss(output.logits)) / batch.learned == pytest.approx(float(output.loss), rel=1e-5)


def test_encoder_and_decoder_are_padded_apart() -> None:
    model = ARCHITECTURES["t5"].make(0)
    batch = collate(BATCH, 0, model, True, CPU)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 0], [10, 0, 0, 0], [12, 13, 14, 15]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    width = batch.labels.shape[1]
    assert [row[:3] for row in batch.labels.tolist()] == [[8, 9, 2], [11, 2, -100], [2, -100, -100]]
    assert not (batch.labels[:, 3:] != -100).any()
    assert [row[:3] for row in batch.inputs["decoder_input_ids"].tolist()] == [[0, 8, 9], [0, 11, 2], [0, 2, 0]]
    assert batch.inputs["decoder_input_ids"].shape == (3, width)
    assert batch.learned == 6 and not batch.shifted
    with torch.no_grad():
        output = model(
            **{key: value for key, value in batch.inputs.items() if "decoder" not in key}, labels=batch.labels
        )
        logits = model(**batch.inputs).logits
    assert float(batch.loss(logits)) / batch.learned == pytest.approx(float(output.loss), rel=1e-5)


def numbered(counts: Sequence[int]) -> list[Example]:
    return [Example(name, f"{name} {n}", "x") for name, count in zip(POOL, counts, strict=True) for n in range(count)]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_split_takes_a_share_of_every_adapter_and_never_all(share: float) -> None:
    data = numbered([1, 10, 40])
    learned, held = split(data, share, seed=3)
    assert sorted(map(repr, learned + held)) == sorted(map(repr, data))
    for name, count in zip(POOL, [1, 10, 40], strict=True):
        aside = sum(each.adapter == name for each in held)
        assert aside == min(round(share * count), count - 1)
    assert split(data, share, seed=3) == (learned, held)


def test_split_depends_on_the_seed_and_on_one_adapters_examples_alone() -> None:
    data = numbered([20, 20, 20])
    held = split(data, 0.3, seed=0)[1]
    assert split(data, 0.3, seed=1)[1] != held
    alone = [each for each in data if each.adapter == "green"]
    assert split(alone, 0.3, seed=0)[1] == [each for each in held if each.adapter == "green"]


def encoded(counts: Sequence[int]) -> list[Encoded]:
    return [Encoded(adapter, (n,), (1,)) for adapter, count in enumerate(counts) for n in range(count)]


def test_draw_depends_on_seed_phase_and_step_alone() -> None:
    data = encoded([5, 50, 500])
    first = draw(data, 8, (0, 0, 3))
    torch.manual_seed(99)
    assert draw(data, 8, (0, 0, 3)) == first
    others = [draw(data, 8, seed) for seed in ((1, 0, 3), (0, 1, 3), (0, 0, 4))]
    assert all(other != first for other in others)
    assert len(draw(data, 5, (0, 0, 3))) == 5


def test_adapters_are_drawn_uniformly_and_their_examples_too() -> None:
    data = encoded([2, 20, 200])
    drawn = [each for step in range(300) for each in draw(data, 16, (0, 0, step))]
    tasks = Counter(each.adapter for each in drawn)
    # 4800 draws: a third each, give or take five standard deviations.
    assert all(abs(tasks[adapter] - 1600) < 5 * (4800 * 2 / 9) ** 0.5 for adapter in range(3))
    own = Counter(each.prompt for each in drawn if each.adapter == 1)
    assert len(own) == 20
    assert all(abs(count - tasks[1] / 20) < 5 * (tasks[1] / 20) ** 0.5 for count in own.values())


def test_prompts_that_lose_their_beginning_are_told(caplog: pytest.LogCaptureFixture) -> None:
    encode([Example("red", "x" * 50, "yes"), Example("red", "x", "yes")], POOL, make_tokenizer(), 20, encoder=False)
    assert "1 prompts are longer than the model's 20 positions and lose their beginning" in caplog.text
