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
from transformers import LlamaConfig, LlamaForCausalLM

from hub_router import RoutedModel, compose
from hub_router.lora.adapter import LoraAdapter, LoraFactors

LAYERS, WIDTH, INNER, RANK, PROMPT, NEW, ROUNDS, THREADS = 16, 1024, 2816, 8, 16, 24, 9, 2


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@cache
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


def pool(experts: int) -> list[LoraAdapter]:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        name: (module.in_features, module.out_features)
        for name, module in llama().named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert len(shapes) == 7 * LAYERS
    return [
        LoraAdapter(
            f"adapter-{e}",
            None,
            None,
            {
                name: LoraFactors(
                    torch.randn(RANK, d_in, generator=generator) / d_in**0.5,
                    torch.randn(d_out, RANK, generator=generator) * 0.01,
                    1.0,
                )
                for name, (d_in, d_out) in shapes.items()
            },
            str(e),
        )
        for e in range(experts)
    ]


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
    routed: RoutedModel = compose(twin, pool(experts), method)
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
