"""Exact-match accuracy of a routed model on prompts with known answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hub_router.composition.routed import RoutedModel
from hub_router.errors import HubRouterError
from hub_router.records import Sample


def answer_budget(routed: RoutedModel, samples: Sequence[Sample]) -> int:
    """Tokens that the longest expected answer needs, its end token included.

    Args:
        routed (RoutedModel): supplies the tokenizer.
        samples (Sequence[Sample]): samples with outputs.

    Returns:
        int: number of new tokens to generate.
    """
    tokenizer = routed.tokenizer
    if tokenizer is None:
        raise HubRouterError("evaluation needs a tokenizer, got none; pass compose(..., tokenizer=...)")
    encoded = tokenizer([sample.output for sample in samples], add_special_tokens=False)["input_ids"]
    return max(len(ids) for ids in encoded) + 1


def answer(
    routed: RoutedModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    advance: Callable[[int], None] = lambda _n: None,
) -> list[str]:
    """Greedy answers to many prompts, batched by length so that little is spent on padding.

    Args:
        routed (RoutedModel): the model under test.
        prompts (Sequence[str]): prompts exactly as the model is to see them.
        max_new_tokens (int): longest answer in tokens.
        batch_size (int): prompts per batch.
        advance (Callable[[int], None]): told the number of prompts done.

    Returns:
        list[str]: answers in the order of the prompts.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        texts = routed.generate([prompts[i] for i in batch], max_new_tokens=max_new_tokens, do_sample=False)
        for i, text in zip(batch, texts, strict=True):
            answers[i] = text
        advance(len(batch))
    return answers


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers equal to what was expected, white space at both ends aside.

    Args:
        answers (Sequence[str]): answers given.
        expected (Sequence[str]): answers expected, same length.

    Returns:
        float: between 0 and 1.

    Raises:
        HubRouterError: there is nothing to score.
    """
    if not expected:
        raise HubRouterError("no samples to score; sync adapters that carry test.jsonl or samples.jsonl")
    hits = sum(got.strip() == want.strip() for got, want in zip(answers, expected, strict=True))
    return hits / len(expected)
