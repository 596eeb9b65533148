"""A base model's architecture, built from its config alone: no weights, nothing downloaded but that one file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

from hub_router.errors import MissingError

# Models that read text and answer with a head of their own: what their config declares is what was trained.
_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def text_model_class(config: Any, reference: str) -> Any:
    """The class that a text model of this config is loaded with.

    Args:
        config (PretrainedConfig): of the base model.
        reference (str): folder or Hub id, for messages.

    Returns:
        type: ``AutoModelForCausalLM``, for encoder-decoder models ``AutoModelForSeq2SeqLM``, and the class itself of
            a checkpoint that declares a classifier or question answerer.

    Raises:
        MissingError: transformers has neither for it.
    """
    declared = next(iter(config.architectures or ()), "")
    if declared.endswith(_HEADS) and hasattr(transformers, declared):
        return getattr(transformers, declared)
    if getattr(config, "is_encoder_decoder", False) and type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return AutoModelForSeq2SeqLM
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    raise MissingError(
        f"base model {reference!r}: {type(config).__name__} is no causal or sequence-to-sequence language model; "
        "load it with transformers and pass the model itself to compose()"
    )


def empty_model(reference: str) -> nn.Module:
    """The text model of a reference without weights, enough to check adapters against.

    Args:
        reference (str): folder or Hub id of the base model; only its config is read.

    Returns:
        nn.Module: on the meta device.

    Raises:
        MissingError: there is no such model, or its architecture is not one of transformers' text models.
    """
    with loading(reference):
        config = AutoConfig.from_pretrained(reference, trust_remote_code=False)
    return _build(text_model_class(config, reference), config, reference)


def any_model(reference: str, local_only: bool = False) -> nn.Module:
    """The architecture that a config declares, of whatever kind: text, vision, classification; without weights.

    Args:
        reference (str): folder or Hub id of the base model; only its config is read.
        local_only (bool): never ask the Hub.

    Returns:
        nn.Module: on the meta device; not to be changed, for it is kept.

    Raises:
        MissingError: there is no such model, or transformers does not know its architecture.
    """
    return _any_model(reference, local_only)


@lru_cache(maxsize=8)
def _any_model(reference: str, local_only: bool) -> nn.Module:
    with loading(reference):
        config = AutoConfig.from_pretrained(reference, trust_remote_code=False, local_files_only=local_only)
    try:
        kind = text_model_class(config, reference)
    except MissingError:
        declared = getattr(transformers, next(iter(config.architectures or ()), ""), None)
        kind = declared if isinstance(declared, type) and issubclass(declared, nn.Module) else AutoModel
    return _build(kind, config, reference)


def _build(kind: Any, config: Any, reference: str) -> nn.Module:
    with loading(reference), torch.device("meta"):
        if kind in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
            model: nn.Module = kind.from_config(config, trust_remote_code=False)
        else:
            model = kind(config)
        return model


@contextmanager
def loading(reference: str) -> Iterator[None]:
    """Turn what transformers raises for a model that it cannot load into one error.

    Args:
        reference (str): folder or Hub id.

    Raises:
        MissingError: names the reference and transformers' reason.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise MissingError(
            f"base model {reference!r} cannot be loaded, expected a folder or Hub id of a transformers language model "
            f"(HF_TOKEN for a gated one): {why}"
        ) from error
