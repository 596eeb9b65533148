"""What a routed layer costs over the base layer, beside two plain products over the whole bank and PEFT's Arrow layer.

One process, two threads, float32, random weights. Base and contender take turns; a figure is the median over the rounds
of (contender - base) / base, so that other load on the machine weighs on both alike. The floor is what the arithmetic
needs at the base layer's own pace.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from torch import nn
from torch.profiler import ProfilerActivity, profile

from hub_router.composition.attach import attach
from hub_router.composition.layer import RoutedUpdate
from hub_router.composition.maps import LinearMap
from hub_router.composition.plan import Plan, Planner
from hub_router.features import ModuleFeatures
from hub_router.gaussian import fit
from hub_router.lora.bank import AdapterBank, ModuleBank
from hub_router.routing.base import SequenceRouter
from hub_router.routing.registry import create

THREADS, TOP_K, SECONDS = 2, 4, 6.0


@dataclass(frozen=True)
class Case:
    """A layer ``d x d``, E adapters of rank r, a number of tokens, and the most that Arrow may add."""

    width: int
    experts: int
    rank: int
    tokens: int
    target: float

    def __str__(self) -> str:
        return f"d {self.width}, E {self.experts}, r {self.rank}, {self.tokens} tokens"

    @property
    def chosen(self) -> int:
        """Components of the chosen adapters."""
        return TOP_K * self.rank

    def floor(self, method: str) -> float:
        """Multiplications over those of the base layer."""
        stacked = self.experts * self.rank
        rows = {"arrow": self.experts + 2 * self.chosen, "spectr": stacked + self.chosen}
        return rows[method] / self.width


CASES = [
    Case(1024, 64, 8, 256, 0.45),
    Case(2048, 256, 4, 256, 0.35),
    Case(2048, 256, 4, 1, 0.22),
    Case(4096, 256, 16, 64, 0.40),
]


class Host(nn.Module):
    """A model of one linear map."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.map = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.map.weight = nn.Parameter(weight, requires_grad=False)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def bank(case: Case) -> ModuleBank:
    generator = torch.Generator().manual_seed(0)
    stacked = case.experts * case.rank
    A = torch.randn(stacked, case.width, generator=generator) / case.width**0.5
    Bt = torch.randn(stacked, case.width, generator=generator) / case.rank**0.5
    return ModuleBank("map", A, Bt.mT, (case.rank,) * case.experts, tuple(range(case.experts)))


def routed(case: Case, factors: ModuleBank, method: str, **settings: Any) -> Host:
    names = [f"adapter-{e}" for e in range(case.experts)]
    router = create(method, settings)
    host = Host(torch.randn(case.width, case.width, generator=torch.Generator().manual_seed(1)) / case.width**0.5)
    planner = None
    if isinstance(router, SequenceRouter):
        planner = plan_of_one(router, factors, names, case.tokens)
    prepared = router.prepare(factors, names, ModuleFeatures())
    update = RoutedUpdate(router, prepared, case.experts, LinearMap(host.map, lookup=False), planner)
    attach(host, {"map": update})
    return host


def plan_of_one(router: SequenceRouter, factors: ModuleBank, names: list[str], tokens: int) -> Planner:
    """One sequence whose text is like the samples of the first adapter."""
    noise = np.random.default_rng(0)
    centres = noise.standard_normal((len(names), 384))
    samples = centres[:, None] + 0.3 * noise.standard_normal((len(names), 20, 384))
    samples /= np.linalg.norm(samples, axis=-1, keepdims=True)
    planner = Planner(
        router,
        router.plan_state(AdapterBank(tuple(names), {"map": factors}), [fit(each[:-1]) for each in samples]),
        SimpleNamespace(name="synthetic", encode=None),
        None,
    )
    planner.plan = Plan(router.plan(planner.state, torch.from_numpy(samples[:1, -1]), [0]), tokens)
    return planner


def peft_arrow(case: Case, factors: ModuleBank) -> Callable[[torch.Tensor], torch.Tensor]:
    """PEFT's layer over the same adapters, its prototypes made beforehand."""
    names = [f"task_{e}" for e in range(case.experts)]
    config = SimpleNamespace(
        top_k=TOP_K, router_temperature=1.0, rng_seed=0, task_adapter_names=names, gks_adapter_names=[], use_gks=False
    )
    layer = ArrowLoraLinearLayer(case.width, config)
    A, B = {}, {}
    for name, part in zip(names, factors.slices, strict=True):
        A[name] = SimpleNamespace(weight=factors.A[part])
        B[name] = SimpleNamespace(weight=factors.B[:, part])
    layer.build_prototypes(A, B)
    scaling = dict.fromkeys(names, 1.0)
    return lambda x: layer(x, A, B, nn.Identity(), scaling)


def extra(base: Callable[[], Any], contender: Callable[[], Any], includes_base: bool = True) -> tuple[float, float]:
    """Median extra time over the base's, and the base's own time in milliseconds; at least 9 rounds."""
    for _ in range(3):
        base(), contender()
    ratios, times = [], []
    until = time.perf_counter() + SECONDS
    while len(ratios) < 9 or (time.perf_counter() < until and len(ratios) < 999):
        start = time.perf_counter()
        base()
        middle = time.perf_counter()
        contender()
        mine, other = middle - start, time.perf_counter() - middle
        ratios.append((other - mine if includes_base else other) / mine)
        times.append(mine)
    return statistics.median(ratios), 1e3 * statistics.median(times)


def peak_floats(run: Callable[[], Any]) -> float:
    """Largest sum of what a run has allocated and not yet freed, in floats."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 4


@pytest.mark.parametrize("case", CASES, ids=str)
def test_arrow_costs_little_over_the_base_layer(case: Case) -> None:
    factors = bank(case)
    x = torch.randn(case.tokens, case.width, generator=torch.Generator().manual_seed(2))
    host = routed(case, factors, "arrow", top_k=TOP_K)
    base = nn.Linear(case.width, case.width, bias=False)
    base.weight = host.map.weight
    got, own = extra(lambda: base(x), lambda: host.map(x))
    Bt = factors.B.mT
    two, _ = extra(lambda: base(x), lambda: (x @ factors.A.mT) @ Bt, includes_base=False)
    theirs = peft_arrow(case, factors)
    peft, _ = extra(lambda: base(x), lambda: theirs(x), includes_base=False)
    line = (
        f"{case}: base {own:.2f} ms; extra: PEFT Arrow {peft:.1f}x, two products {two:.2f}x, arrow {got:.2f}x "
        f"(floor {case.floor('arrow'):.2f}x, target {case.target}x)"
    )
    print(line)
    assert got <= case.target, line


@pytest.mark.parametrize("case", CASES, ids=str)
def test_projecting_methods_beside_their_floor(case: Case) -> None:
    """SpectR projects on every candidate, HiLoRA on those of its plan."""
    factors = bank(case)
    x = torch.randn(1, case.tokens, case.width, generator=torch.Generator().manual_seed(2))
    base = nn.Linear(case.width, case.width, bias=False)
    figures: dict[str, tuple[float, float]] = {}
    for method, settings in METHODS.items():
        host = routed(case, factors, method, **settings)
        base.weight = host.map.weight
        got, _ = extra(lambda: base(x), lambda host=host: host.map(x))
        figures[method] = (got, floor_of(case, method, host))
    Bt = factors.B.mT
    two, _ = extra(lambda: base(x), lambda: (x @ factors.A.mT) @ Bt, includes_base=False)
    line = ", ".join(f"{method} {got:.2f}x (floor {floor:.2f}x)" for method, (got, floor) in figures.items())
    print(f"{case}: two products {two:.2f}x, {line}")
    # A single token pays for the number of calls; many tokens for what is multiplied.
    assert case.tokens == 1 or figures["spectr"][0] < two, line


METHODS: Mapping[str, Mapping[str, Any]] = {"spectr": {}, "hilora": {}, "hilora-gs": {}, "retriever": {}}


def floor_of(case: Case, method: str, host: Host) -> float:
    """Multiplications over those of the base layer: the plan's adapters, projected on and summed."""
    if method == "spectr":
        return case.floor(method)
    update = host.map.hub_router_update
    assert update.planner is not None and update.planner.plan is not None
    used = int(update.planner.plan.rows["weights"].count_nonzero())
    return 2 * used * case.rank / case.width


@pytest.mark.parametrize("case", CASES, ids=str)
def test_arrow_takes_little_memory(case: Case) -> None:
    factors = bank(case)
    x = torch.randn(case.tokens, case.width, generator=torch.Generator().manual_seed(2))
    update = routed(case, factors, "arrow", top_k=TOP_K).map.hub_router_update
    floats = peak_floats(lambda: update(x)) - case.tokens * case.width
    allowed = 3 * case.tokens * (case.experts + case.chosen)
    line = f"{case}: peak {floats:,.0f} floats beside the output, {floats / allowed:.2f} of what is allowed"
    print(line)
    assert floats <= allowed, line
