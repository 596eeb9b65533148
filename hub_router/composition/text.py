"""Text in, text out: prompts become left-padded batches, and only the new text comes back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Event, Thread
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from hub_router.errors import HubRouterError


def encode(model: Any, tokenizer: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Tokenize prompts and pad them, whatever side and pad token the tokenizer is set to.

    A causal model continues its prompt, which is padded on the left; an encoder's positions begin with its first token.

    Args:
        model (PreTrainedModel): says where the tensors go.
        tokenizer (PreTrainedTokenizerBase): not changed.
        prompts (Sequence[str]): one or more.

    Returns:
        dict: ``input_ids`` and ``attention_mask``, int64 ``(B, T)``.

    Raises:
        HubRouterError: a prompt has no tokens and the tokenizer has none to begin with.
    """
    rows = [list(ids) or _beginning(tokenizer) for ids in tokenizer(list(prompts))["input_ids"]]
    empty = [number for number, row in enumerate(rows) if not row]
    if empty:
        raise HubRouterError(
            f"prompts {', '.join(map(str, empty))} of {len(rows)} have no tokens, expected at least one each"
        )
    width = max(map(len, rows))
    pad = pad_token(model, tokenizer)
    gaps = [width - len(row) for row in rows]
    if has_encoder(model):
        ids = torch.tensor([row + [pad] * gap for row, gap in zip(rows, gaps, strict=True)])  # [B, T]
        mask = torch.tensor([[1] * (width - gap) + [0] * gap for gap in gaps])
    else:
        ids = torch.tensor([[pad] * gap + row for row, gap in zip(rows, gaps, strict=True)])
        mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps])
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def has_encoder(model: Any) -> bool:
    """Whether a model answers with a decoder of its own, so that its output does not begin with the prompt.

    Args:
        model (PreTrainedModel): any.

    Returns:
        bool: so.
    """
    return bool(getattr(model.config, "is_encoder_decoder", False))


def pad_token(model: Any, tokenizer: Any) -> int:
    """The id to pad with.

    Args:
        model (PreTrainedModel): its generation config is asked where the tokenizer has no answer.
        tokenizer (PreTrainedTokenizerBase): asked first.

    Returns:
        int: the pad token, else the end token, else 0: padding is masked.
    """
    config = model.generation_config
    end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    candidates = (tokenizer.pad_token_id, config.pad_token_id, tokenizer.eos_token_id, end)
    return next((candidate for candidate in candidates if candidate is not None), 0)


def generate_texts(model: Any, tokenizer: Any, prompts: Sequence[str], options: dict[str, Any]) -> list[list[str]]:
    """Continue prompts.

    Args:
        model (PreTrainedModel): a language model.
        tokenizer (PreTrainedTokenizerBase): its tokenizer.
        prompts (Sequence[str]): one or more.
        options (dict[str, Any]): of transformers' ``generate``.

    Returns:
        list[list[str]]: the new texts of each prompt, ``num_return_sequences`` of them.
    """
    inputs = encode(model, tokenizer, prompts)
    output = model.generate(**inputs, **{"pad_token_id": pad_token(model, tokenizer), **options})
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    new = sequences if has_encoder(model) else sequences[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    each = len(texts) // len(prompts)
    return [texts[start : start + each] for start in range(0, len(texts), each)]


def stream_text(model: Any, tokenizer: Any, prompt: str, options: dict[str, Any]) -> Iterator[str]:
    """Continue one prompt, piece by piece.

    Generation runs in a thread, from the first piece asked for. What it raises is raised here; closing the iterator
    stops it at the next token.

    Args:
        model (PreTrainedModel): a language model.
        tokenizer (PreTrainedTokenizerBase): its tokenizer.
        prompt (str): one prompt.
        options (dict[str, Any]): of transformers' ``generate``; no beams.

    Returns:
        Iterator[str]: pieces of text, never empty.

    Raises:
        HubRouterError: the prompt has no tokens and the tokenizer has none to begin with.
    """
    return _pieces(model, tokenizer, encode(model, tokenizer, [prompt]), options)


def _pieces(model: Any, tokenizer: Any, inputs: dict[str, torch.Tensor], options: dict[str, Any]) -> Iterator[str]:
    """The thread, its streamer, and what becomes of it."""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = _Stop()
    criteria = StoppingCriteriaList([*(options.get("stopping_criteria") or ()), stop])
    given = {"pad_token_id": pad_token(model, tokenizer), **options, "stopping_criteria": criteria}
    failures: list[BaseException] = []

    def run() -> None:
        try:
            model.generate(**inputs, **given, streamer=streamer)
        except BaseException as error:  # noqa: BLE001 - raised again by the reader's thread
            failures.append(error)
            streamer.on_finalized_text("", stream_end=True)

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stop.asked.set()
        thread.join()
    if failures:
        raise failures[0]


class _Stop(StoppingCriteria):
    """Ends generation once the reader has gone."""

    def __init__(self) -> None:
        self.asked = Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_options: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.asked.is_set(), dtype=torch.bool, device=input_ids.device)


def _beginning(tokenizer: Any) -> list[int]:
    """What an empty prompt starts with."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [] if first is None else [first]
