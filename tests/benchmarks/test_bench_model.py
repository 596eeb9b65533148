"""Tokens per second of a whole routed model over those of its base: a Llama of 16 layers, d = 1024, on two threads.

Every linear map carries the whole pool, rank 8. Base and routed model generate by turns; a figure is the median ratio.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from bench_llama import make_llama, make_pool
from transformers import LlamaForCausalLM

from hub_router import RoutedModel, compose

LAYERS, PROMPT, NEW, ROUNDS, THREADS = 16, 16, 24, 9, 2


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@cache
def llama() -> LlamaForCausalLM:
    return make_llama(LAYERS).eval()


def seconds(model: LlamaForCausalLM) -> float:
    ids = torch.arange(PROMPT).unsqueeze(0)
    start = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
    assert out.shape[1] == PROMPT + NEW
    return time.perf_counter() - start


def measured(experts: int, method: str) -> tuple[float, float]:
    """Median of (base's time / routed time), and the base's tokens per second."""
    model, twin = llama(), LlamaForCausalLM(llama().config).eval()
    twin.load_state_dict(model.state_dict(), assign=True)
    routed: RoutedModel = compose(twin, make_pool(twin, experts), method)
    try:
        seconds(model), seconds(twin)
        pairs = [(seconds(model), seconds(twin)) for _ in range(ROUNDS)]
    finally:
        routed.detach()
    return statistics.median(a / b for a, b in pairs), NEW / statistics.median(a for a, _ in pairs)


def test_arrow_generates_at_most_of_the_base_models_pace() -> None:
    paces = {}
    for experts in (16, 64, 256):
        paces[experts], own = measured(experts, "arrow")
        print(f"arrow, {experts} adapters: {paces[experts]:.2f} of the base's {own:.1f} tokens/s")
    assert paces[64] >= 0.6
    assert paces[256] >= 0.75 * paces[16]


@pytest.mark.parametrize("method", ["spectr", "uniform"])
def test_other_methods_beside_it(method: str) -> None:
    pace, own = measured(64, method)
    print(f"{method}, 64 adapters: {pace:.2f} of the base's {own:.1f} tokens/s")
    assert pace > 0.1
