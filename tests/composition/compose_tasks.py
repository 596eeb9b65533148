"""Samples of the adapters' tasks, and the packaged sentence encoder, loaded once."""

from __future__ import annotations

from functools import cache

from hub_router.encoder import OFFLINE_ENCODER, Encoder, load_encoder

# By the names of the fixture ``folders``.
SAMPLES = {
    "attention": ["The film was a delight.", "A dull and tired comedy.", "Its cast is wonderful.", "I left early."],
    "mlp": ["What is 12 plus 30?", "Multiply 7 by 8.", "How much is half of 90?", "Subtract 5 from 19."],
    "all": ["Translate to German: good night.", "Say in French: the red house.", "In Spanish: thank you."],
    "layer": ["def add(a, b): return a + b", "for i in range(3): print(i)", "import os; os.getcwd()"],
    "patterns": ["Boil the pasta for ten minutes.", "Chop two onions.", "Bake it at 180 degrees.", "Add salt."],
}
# One near each task, and of different lengths.
PROMPTS = ["A warm film?", "What is 3 plus 4?", "Translate to French: a good house.", "print(a + b)", "Fry it."]


@cache
def offline_encoder() -> Encoder:
    """The packaged encoder."""
    return load_encoder(OFFLINE_ENCODER)
