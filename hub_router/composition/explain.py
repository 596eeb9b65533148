"""Which adapter won each token of a prompt and of its continuation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hub_router.composition.text import encode, pad_token
from hub_router.composition.trace import traced


@dataclass(frozen=True, eq=False)
class Explanation:
    """A generated text with the expert weights of its tokens.

    Args:
        tokens (tuple[str, ...]): the text of each token of prompt and continuation; joined they are the whole text.
        prompt_tokens (int): how many of them are the prompt's.
        weights (torch.Tensor): float32 ``(T, E)``, mean over the routed modules that see every token, on the CPU.
        adapters (tuple[str, ...]): names along axis E.
        text (str): the new text.
    """

    tokens: tuple[str, ...]
    prompt_tokens: int
    weights: torch.Tensor
    adapters: tuple[str, ...]
    text: str


def explain(model: Any, tokenizer: Any, adapters: tuple[str, ...], prompt: str, options: dict[str, Any]) -> Explanation:
    """Continue a prompt, then read the whole sequence once more with the weights recorded.

    The second reading gives weights for the last token, too, which generation never feeds back.

    Args:
        model (PreTrainedModel): a routed causal language model.
        tokenizer (PreTrainedTokenizerBase): its tokenizer.
        adapters (tuple[str, ...]): names along axis E.
        prompt (str): one prompt.
        options (dict[str, Any]): of transformers' ``generate``.

    Returns:
        Explanation: tokens, weights and the new text.
    """
    inputs = encode(model, tokenizer, [prompt])
    width = inputs["input_ids"].shape[1]
    output = model.generate(**inputs, **{"pad_token_id": pad_token(model, tokenizer), **options})
    sequence = (output if isinstance(output, torch.Tensor) else output.sequences)[:1]  # [1, T]
    with traced(model, adapters) as trace, torch.no_grad():
        model(input_ids=sequence, attention_mask=torch.ones_like(sequence))
    # A module that sees a part of the tokens, as an expert of a mixture does, cannot say whose they are.
    modules = [w[0].float().cpu() for w in trace.weights.values() if w.shape[1] == sequence.shape[1]]  # each [T, E]
    ids = sequence[0].tolist()
    return Explanation(
        tokens=_pieces(tokenizer, ids),
        prompt_tokens=width,
        weights=torch.stack(modules).mean(0),
        adapters=adapters,
        text=tokenizer.decode(ids[width:], skip_special_tokens=True),
    )


def _pieces(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Each token's share of the decoded text; a character made of several tokens belongs to its last one."""
    pieces, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        whole = end == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}")
        complete = whole and text.startswith(shown)
        pieces.append(text[len(shown) :] if complete else "")
        shown = text if complete else shown
    return tuple(pieces)
