"""What a step of MAPLE costs over a forward and backward of the frozen base model: a Llama of 8 layers, d = 1024.

32 adapters of rank 8 on all linear maps, a batch of 8 x 128 tokens of which half are learned. The base's backward makes
gradients of activations alone, as it would below any trained gate; it reads embeddings that take a gradient. Base and
step run by turns in one process on two threads; figures are medians of their ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from bench_llama import RANK, VOCABULARY, make_llama, make_pool
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM

from hub_router import compose
from hub_router.training.batches import Batch
from hub_router.training.gating import Reading, training
from hub_router.training.maple import MapleRecipe

LAYERS, EXPERTS, BATCH, LENGTH, ROUNDS, THREADS = 8, 32, 8, 128, 9, 2
TOP_K = 4


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def batch() -> Batch:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
    labels = ids.clone()
    labels[:, : LENGTH // 2] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch(inputs, labels, torch.arange(BATCH), shifted=True)


def peak_bytes(run: Callable[[], None]) -> int:
    """Largest sum of what a run has allocated and not yet freed."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    held = peak = 0
    for event in sorted(
        (event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def least(model: LlamaForCausalLM) -> float:
    """Multiplications that a step needs beside the base, over those of the base's forward and backward.

    Forward: scores, and the chosen components in and out. Backward: gradients of x through scores and components, of
    the gates, and of the prototypes.
    """
    maps = [module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    base = sum(2 * module.in_features * module.out_features for module in maps)
    components = TOP_K * RANK
    extra = sum(
        3 * EXPERTS * module.in_features + 2 * components * (module.in_features + module.out_features)
        for module in maps[:-1]
    )
    return 1 + extra / base


def test_a_step_of_maple() -> None:
    text, base = batch(), make_llama(LAYERS).requires_grad_(False)
    twin = LlamaForCausalLM(base.config).requires_grad_(False)
    twin.load_state_dict(base.state_dict(), assign=True)
    routed = compose(twin, make_pool(twin, EXPERTS), "maple", top_k=TOP_K)
    embedded = base.get_input_embeddings()(text.inputs["input_ids"]).requires_grad_()
    reading = Reading()

    def plain() -> None:
        embedded.grad = None
        inputs = {"inputs_embeds": embedded, "attention_mask": text.masks[0], "use_cache": False}
        (text.loss(base(**inputs).logits) / text.learned).backward()

    with training(twin, partial(MapleRecipe().gate, routed.method), reading) as gates:
        leaves = [leaf for gate in gates.values() if (leaf := gate.select(range(EXPERTS))) is not None]
        optimizer = torch.optim.AdamW(leaves, lr=1e-3, weight_decay=0.0)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            reading.begin(text.own, text.masks, spreading=False, observing=False)
            (text.loss(twin(**text.inputs, use_cache=False).logits) / text.learned).backward()
            torch.nn.utils.clip_grad_norm_(leaves, 1.0)
            optimizer.step()

        plain(), step()
        pairs = [(seconds(plain), seconds(step)) for _ in range(ROUNDS)]
        time_ratio = statistics.median(other / own for own, other in pairs)
        memory = peak_bytes(step) / peak_bytes(plain)
    own = statistics.median(each for each, _ in pairs)
    line = (
        f"MAPLE, {EXPERTS} adapters: {time_ratio:.2f} of the base's {own:.2f} s (arithmetic alone {least(base):.2f}, "
        f"target 1.6), {memory:.2f} of its memory (target 1.5)"
    )
    print(line)
    assert time_ratio <= 1.6 and memory <= 1.5, line


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
