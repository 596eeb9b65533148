"""Loads base models and tokenizers by folder or Hub id, never running code that comes with them."""

from __future__ import annotations

import logging
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from hub_router.composition.architecture import loading, text_model_class

_LOG = logging.getLogger(__name__)


def base_name(model: nn.Module) -> str:
    """What to call a base model in a message.

    Args:
        model (nn.Module): any model.

    Returns:
        str: its ``name_or_path`` where it has one, and its class.
    """
    name = getattr(model, "name_or_path", "")
    return f"{name} ({type(model).__name__})" if name else type(model).__name__


def base_id(model: nn.Module) -> str:
    """What to call a base model in a file that others read.

    Args:
        model (nn.Module): any model.

    Returns:
        str: its folder or Hub id; its class where it was made in memory.
    """
    return str(getattr(model, "name_or_path", "") or type(model).__name__)


def load_model(
    reference: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    kind: str | None = None,
) -> Any:
    """Load a language model, causal or encoder-decoder.

    Args:
        reference (str): folder or Hub id.
        device (torch.device | str | None): where to put the model; None leaves it on the CPU.
        dtype (torch.dtype | str): ``auto`` keeps the dtype that the checkpoint states.
        revision (str | None): commit on the Hub; None for the newest.
        kind (str | None): transformers' class; None takes the one that fits the config.

    Returns:
        PreTrainedModel: in evaluation mode.

    Raises:
        MissingError: there is no such model, or transformers cannot load it.
    """
    with loading(reference):
        config = AutoConfig.from_pretrained(reference, revision=revision or "main", trust_remote_code=False)
    chosen = getattr(transformers, kind or "", None) or text_model_class(config, reference)
    with loading(reference):
        model = chosen.from_pretrained(reference, dtype=dtype, revision=revision or "main", trust_remote_code=False)
    return model if device is None else model.to(device)


def load_base(reference: str, device: torch.device | str | None = None) -> tuple[Any, Any]:
    """Load a language model and its tokenizer.

    Args:
        reference (str): folder or Hub id.
        device (torch.device | str | None): where to put the model; None leaves it on the CPU.

    Returns:
        tuple: ``(model, tokenizer)``; the tokenizer is None where the model comes without one.

    Raises:
        MissingError: there is no such model, or transformers cannot load it.
    """
    return load_model(reference, device), load_tokenizer(reference)


def load_tokenizer(reference: str) -> Any:
    """Load a tokenizer where there is one.

    Args:
        reference (str): folder or Hub id.

    Returns:
        PreTrainedTokenizerBase | None: None, with a logged warning, where there is none that loads: logits need none.
    """
    try:
        return AutoTokenizer.from_pretrained(reference, trust_remote_code=False)
    except (OSError, ValueError) as error:
        _LOG.warning("%s has no tokenizer that loads, so it takes and gives no text: %s", reference, error)
        return None
