"""explain: the weights of every token of prompt and continuation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compose_models import assert_close, llama

from hub_router.composition.build import compose

OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@pytest.mark.parametrize("prompt", ["Hello", "héllo wörld ☃", ""])
def test_tokens_join_to_the_whole_text(folders: dict[str, Path], tokenizer: Any, prompt: str) -> None:
    routed = compose(llama(), folders, tokenizer=tokenizer)
    explanation = routed.explain(prompt, **OPTIONS)
    assert explanation.text == routed.generate(prompt, **OPTIONS)
    assert explanation.weights.shape == (len(explanation.tokens), 5)
    assert explanation.prompt_tokens == max(len(tokenizer.encode(prompt)), 1)
    assert "".join(explanation.tokens[: explanation.prompt_tokens]) == (prompt or "<s>")
    # A special token is shown among the tokens, and is no part of the text.
    new = "".join(explanation.tokens[explanation.prompt_tokens :])
    assert tokenizer.decode(tokenizer.encode(new), skip_special_tokens=True) == explanation.text


def test_weights_are_the_mean_over_the_modules(folders: dict[str, Path], tokenizer: Any) -> None:
    routed = compose(llama(), folders, "spectr", tokenizer=tokenizer)
    explanation = routed.explain("Hello", **OPTIONS)
    with routed.trace() as trace:
        routed.generate("Hello", **OPTIONS)
    expected = sum(weights[0] for weights in trace.weights.values()) / len(trace.weights)
    assert_close(explanation.weights[:-1], expected)
    assert_close(explanation.weights.sum(-1), torch.ones(len(explanation.tokens)))
    assert explanation.adapters == routed.adapters
