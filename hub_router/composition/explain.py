"""Which adapter won each token of a prompt and of its continuation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from hub_router.composition.plan import Planner
from hub_router.composition.text import encode, has_encoder, pad_token
from hub_router.composition.trace import Trace, traced


@dataclass(frozen=True, eq=False)
class Explanation:
    """A generated text with the expert weights of its tokens.

    Args:
        tokens (tuple[str, ...]): the text of each token of prompt and continuation; joined they are the whole text, for
            an encoder-decoder model that of the prompt and that of the answer one after the other.
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


def explain(
    model: Any,
    tokenizer: Any,
    adapters: tuple[str, ...],
    prompt: str,
    options: dict[str, Any],
    planner: Planner | None = None,
) -> Explanation:
    """Continue a prompt, then read the whole sequence once more with the weights recorded.

    The second reading gives weights for the last token, too, which generation never feeds back.

    Args:
        model (PreTrainedModel): a routed language model.
        tokenizer (PreTrainedTokenizerBase): its tokenizer.
        adapters (tuple[str, ...]): names along axis E.
        prompt (str): one prompt.
        options (dict[str, Any]): of transformers' ``generate``.
        planner (Planner | None): of a method that decides per sequence; both readings follow the prompt's plan.

    Returns:
        Explanation: tokens, weights and the new text.
    """
    inputs = encode(model, tokenizer, [prompt])
    ids = inputs["input_ids"]  # [1, T_prompt]
    with planner.holding(ids, inputs.get("attention_mask")) if planner is not None else nullcontext():
        sequence, trace = _read_twice(model, tokenizer, adapters, inputs, options)
    # A module that sees a part of the tokens, as an expert of a mixture does, cannot say whose they are.
    if has_encoder(model):
        weights, tokens = _two_sides(model, trace.weights, [ids[0].tolist(), sequence[0].tolist()], tokenizer)
        new = sequence[0]
    else:
        whole = [w[0] for w in trace.weights.values() if w.shape[1] == sequence.shape[1]]
        weights, tokens = _mean(whole), _pieces(tokenizer, sequence[0].tolist())
        new = sequence[0, ids.shape[1] :]
    return Explanation(
        tokens=tokens,
        prompt_tokens=ids.shape[1],
        weights=weights,
        adapters=adapters,
        text=tokenizer.decode(new.tolist(), skip_special_tokens=True),
    )


def _read_twice(
    model: Any, tokenizer: Any, adapters: tuple[str, ...], inputs: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[torch.Tensor, Trace]:
    """Generate, then read it all with the weights recorded: the sequence ``(1, T)`` and the trace."""
    output = model.generate(**inputs, **{"pad_token_id": pad_token(model, tokenizer), **options})
    sequence = (output if isinstance(output, torch.Tensor) else output.sequences)[:1]
    read = {"input_ids": sequence, "attention_mask": torch.ones_like(sequence)}
    if has_encoder(model):
        read = {**inputs, "decoder_input_ids": sequence}
    with traced(model, adapters) as trace, torch.no_grad():
        model(**read)
    return sequence, trace


def _two_sides(
    model: Any, weights: Mapping[str, torch.Tensor], ids: Sequence[Sequence[int]], tokenizer: Any
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Encoder and decoder one after the other: weights ``(T, E)`` and tokens; cross-attention's reading of the prompt
    again, once per layer of the decoder, is left out.
    """
    encoder = {id(module) for module in model.get_encoder().modules()}
    sides: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for name, each in weights.items():
        side = 0 if id(model.get_submodule(name)) in encoder else 1
        if each.shape[1] == len(ids[side]):
            sides[side].append(each[0])
    width = next(iter(weights.values())).shape[-1]
    parts = [_mean(side) if side else torch.zeros(len(row), width) for side, row in zip(sides, ids, strict=True)]
    return torch.cat(parts), tuple(piece for row in ids for piece in _pieces(tokenizer, row))


def _mean(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over modules, float32 on the CPU."""
    return torch.stack([each.float().cpu() for each in weights]).mean(0)


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
