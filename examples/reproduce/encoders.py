"""Sentence encoders that need no download: the packaged MiniLM, its first dimensions alone, and hashed words."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import zoo

from hub_router.composition.plan import TextEncoder
from hub_router.encoder import load_encoder
from hub_router.evaluate.calibration import EPSILONS, calibrate
from hub_router.evaluate.comparison import Remembering


@dataclass(frozen=True)
class HashedWords:
    """Counts of words at hashed places, with hashed signs: no meaning, only which words occur.

    Args:
        name (str): see :class:`~hub_router.composition.plan.TextEncoder`.
        dimension (int): number of places.
    """

    name: str = "hashed words"
    dimension: int = 256

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors ``(N, D)``."""
        counts = np.zeros((len(texts), self.dimension))
        for row, text in zip(counts, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                code = zlib.crc32(word.encode())
                row[code % self.dimension] += 1 if code >> 31 else -1
        return _units(counts)


@dataclass(frozen=True)
class Shortened:
    """The first dimensions of another encoder's vectors.

    Args:
        whole (TextEncoder): the other one.
        name (str): see :class:`~hub_router.composition.plan.TextEncoder`.
        dimension (int): how many are kept.
    """

    whole: TextEncoder
    name: str = "MiniLM, 64 of 384"
    dimension: int = 64

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors ``(N, D)``."""
        return _units(self.whole.encode(texts)[:, : self.dimension])


def _units(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)).astype(np.float32)


@cache
def _minilm() -> TextEncoder:
    return load_encoder("offline")


@cache
def encoder(name: str) -> Remembering:
    """An encoder that embeds no text twice in a process."""
    if name == "hashed words":
        return Remembering(HashedWords())
    return Remembering(_minilm() if name == "MiniLM" else Shortened(_minilm()))


@cache
def epsilon(name: str) -> float:
    """HiLoRA's ridge as the pool's report calibrates it, on a coarser grid, from 20 samples of every task."""
    texts = {task: [each.input for each in zoo.pairs(task, "samples.jsonl")[:20]] for task in zoo.tasks()}
    vectors = {task: encoder(name).encode(own) for task, own in texts.items()}
    return calibrate(vectors, EPSILONS[::3]).chosen.epsilon
