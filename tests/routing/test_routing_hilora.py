"""HiLoRA and its two halves against loop-written float64 references of Sec. 3.2 and 3.3."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from routing_cases import MODULE, OTHER, Case, Pair, adapter, make_case, random_factors
from sequence_cases import (
    WIDTH,
    able,
    check_restricted,
    check_routed,
    embedded_samples,
    inputs_near,
    module_of,
    nothing,
    plan_of,
    run,
    scores,
    spread_rows,
)

from hub_router.composition.assemble import stack
from hub_router.errors import MethodError
from hub_router.gaussian import fit
from hub_router.lora.adapter import LoraFactors
from hub_router.routing.base import Router, SequenceRouter
from hub_router.routing.hilora import Hilora
from hub_router.routing.hilora_gs import HiloraGs
from hub_router.routing.hilora_roc import HiloraRoc
from hub_router.routing.registry import create

# With these many dimensions it lets some inputs score above zero, others below.
EPSILONS = (1e-5, 3e-3, 0.05)


def likely(case: Case, z: np.ndarray, epsilon: float) -> dict[int, float]:
    """Shares pi by pool position, Eq. 4 and the softmax below it."""
    able_ones = [e for e, rank in enumerate(able(case)) if rank]
    found = scores(embedded_samples(len(case.adapters)), z, epsilon)
    order = sorted(able_ones, key=lambda e: (-found[e], e))
    chosen = [e for e in order if found[e] > 0]
    if not chosen:
        chosen = order[: max(1, math.ceil(abs(found[order[0]])))]
    total = sum(math.exp(found[e] - found[order[0]]) for e in chosen)
    return {e: math.exp(found[e] - found[order[0]]) / total for e in chosen}


def allotted(case: Case, z: np.ndarray, seed: tuple[int, int], gamma: float, epsilon: float) -> tuple[dict, float]:
    """o_e by pool position, and sqrt(r_mean / O)."""
    pi, ranks = likely(case, z, epsilon), able(case)
    order = list(pi)  # by falling score
    budget = max(1, round(gamma * sum(ranks[e] for e in pi)))
    uniform = np.random.default_rng(seed).random(budget)
    counts = dict.fromkeys(pi, 0)
    for number in uniform:
        left = [e for e in sorted(pi) if counts[e] < ranks[e]]
        total = sum(pi[e] for e in left)
        if total < 2.3e-308:
            picked = next(e for e in order if e in left)
        else:
            point = number * total
            for picked in left:
                point -= pi[picked]
                if point < 0:
                    break
        counts[picked] += 1
    return counts, math.sqrt(sum(ranks[e] for e in pi) / len(pi) / budget)


def strongest(A: torch.Tensor, token: torch.Tensor, count: int) -> list[int]:
    """J_i of Sec. 3.3, signed."""
    values = [float(a @ token.detach()) for a in A]
    return sorted(range(len(values)), key=lambda j: (-values[j], j))[:count]


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("gamma", [0.4, 1.0])
def test_hilora_equals_the_reference(case: Case, gamma: float, epsilon: float) -> None:
    router, embeddings = Hilora(gamma, epsilon, seed=3), inputs_near(case, case.shape[0])
    seeds = [2**63 + number for number in range(len(embeddings))]

    def one(token: torch.Tensor, number: int, pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
        counts, scale = allotted(case, embeddings[number], (3, seeds[number]), gamma, epsilon)
        y, gates = nothing(token, pairs), []
        for e, (A, B) in zip(case.experts, pairs, strict=True):
            chosen = strongest(A, token, counts.get(e, 0))
            for j in chosen:
                y = y + scale * B[:, j] * (A[j] @ token)
            gates += [scale if j in chosen else 0.0 for j in range(A.shape[0])]
        return y, torch.tensor(gates, dtype=token.dtype)

    rows = spread_rows(plan_of(router, case, embeddings, seeds), case.shape)
    check_routed(router, case, rows, one)
    if 0 not in case.shape:
        check_restricted(router, case, rows)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_hilora_gs_equals_the_reference(case: Case, epsilon: float) -> None:
    router, embeddings = HiloraGs(epsilon), inputs_near(case, case.shape[0])

    def one(token: torch.Tensor, number: int, pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
        pi = likely(case, embeddings[number], epsilon)
        y, gates = nothing(token, pairs), []
        for e, (A, B) in zip(case.experts, pairs, strict=True):
            y = y + pi.get(e, 0.0) * (B @ (A @ token))
            gates += [pi.get(e, 0.0)] * A.shape[0]
        return y, torch.tensor(gates, dtype=token.dtype)

    rows = spread_rows(plan_of(router, case, embeddings, range(len(embeddings))), case.shape)
    check_routed(router, case, rows, one)
    if 0 not in case.shape:
        check_restricted(router, case, rows)


@pytest.mark.parametrize("top_rocs", [1, 5, 24])
def test_hilora_roc_equals_the_reference(case: Case, top_rocs: int) -> None:
    def one(token: torch.Tensor, number: int, pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
        A, B = torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], dim=1)
        chosen = strongest(A, token, top_rocs)
        gate = math.sqrt(A.shape[0] / len(pairs) / len(chosen))
        y, gates = torch.zeros(B.shape[0], dtype=token.dtype), torch.zeros(A.shape[0], dtype=token.dtype)
        for j in chosen:
            y = y + gate * B[:, j] * (A[j] @ token)
            gates[j] = gate
        return y, gates

    check_routed(HiloraRoc(top_rocs), case, {}, one)


def test_the_cases_reach_both_branches_of_eq_4() -> None:
    case = make_case([4] * 6, (40,))
    best = [max(scores(embedded_samples(6), z, 3e-3)) for z in inputs_near(case, 40)]
    assert min(best) < -1 < 0 < max(best)


@pytest.mark.parametrize("router", [Hilora(epsilon=3e-3), HiloraGs(epsilon=3e-3)])
def test_plan_is_the_same_alone_in_a_batch_and_in_another_order(router: SequenceRouter) -> None:
    case = make_case([4, 2, 8, None, 16], (1,))
    embeddings, seeds = inputs_near(case, 30), [7 * number + 1 for number in range(30)]
    together = plan_of(router, case, embeddings, seeds)
    turned = plan_of(router, case, embeddings[::-1].copy(), seeds[::-1])
    assert together["weights"].shape == (30, 5)
    for name, rows in together.items():
        assert rows.dtype == torch.float32
        assert torch.equal(turned[name].flip(0), rows)
        for number in range(30):
            alone = plan_of(router, case, embeddings[number : number + 1], seeds[number : number + 1])
            assert torch.equal(alone[name][0], rows[number])


def test_draws_depend_on_both_seeds_alone() -> None:
    pool = stack(make_case([16] * 6, (1,)).adapters)
    same = torch.from_numpy(inputs_near(make_case([16], (1,)), 1)).expand(12, -1)

    def counts(seed: int, seeds: Sequence[int]) -> torch.Tensor:
        router = Hilora(epsilon=0.05, seed=seed)
        # Equal Gaussians, so that every adapter is as likely to get a component.
        return router.plan(router.plan_state(pool, [fit(embedded_samples(1)[0])] * 6), same, seeds)["weights"]

    first = counts(0, range(12))
    assert (first.sum(dim=1) == round(0.4 * 96)).all()
    assert torch.equal(counts(0, range(12)), first)
    assert len(first.unique(dim=0)) == 12
    assert not torch.equal(counts(1, range(12)), first)
    assert len(counts(0, [4] * 12).unique(dim=0)) == 1


def test_scale_is_that_of_the_candidates() -> None:
    case = make_case([8, 2, None, 4], (1,))  # the third has rank 2 elsewhere
    plan = plan_of(Hilora(gamma=0.5, epsilon=1e-5), case, inputs_near(case, 8), range(8))
    assert plan["scale"].shape == (8, 1)
    for weights, scale, z in zip(plan["weights"], plan["scale"], inputs_near(case, 8), strict=True):
        ranks = [able(case)[e] for e in likely(case, z, 1e-5)]
        assert weights.sum() == max(1, round(0.5 * sum(ranks)))
        assert scale.item() == pytest.approx(math.sqrt(sum(ranks) / len(ranks) / weights.sum().item()))


def test_an_adapter_counts_with_its_largest_rank_and_is_capped_where_it_has_less() -> None:
    ranks = {"model.layers.0.mlp.down_proj": 1, OTHER: 8, MODULE: 2}
    factors = {module: random_factors(rank, rank, 24, 20) for module, rank in ranks.items()}
    case = Case([adapter("a", factors), adapter("b", {MODULE: random_factors(2, 3, 24, 20)})], [0, 1], (1,), 24)
    near = embedded_samples(2)[0].mean(axis=0, keepdims=True)
    router = Hilora(gamma=0.75, epsilon=3e-3)
    plan = plan_of(router, case, near, [0])
    assert plan["weights"].tolist() == [[6.0, 0.0]]  # 0.75 * 8
    _, gates = run(module_of(router, case), router, plan, case.inputs())
    scale = math.sqrt(8 / 6)
    assert gates.weights[0].tolist() == pytest.approx([scale, scale, 0, 0, 0])


def test_equal_projections_go_to_the_first_components() -> None:
    A = torch.ones(6, 24)
    case = Case([adapter("a", {MODULE: LoraFactors(A, torch.randn(20, 6), 1.0)})], [0], (1,), 24)
    rows = {"weights": torch.tensor([[2.0]]), "scale": torch.tensor([[1.5]])}
    _, gates = run(module_of(Hilora(), case), Hilora(), rows, torch.ones(1, 24))
    assert gates.weights.tolist() == [[1.5, 1.5, 0, 0, 0, 0]]
    _, sparse = run(module_of(HiloraRoc(2), case), HiloraRoc(2), {}, torch.ones(1, 24))
    assert sparse.indices is not None
    assert sparse.indices.tolist() == [[0, 1]]


def test_projections_are_signed() -> None:
    A = torch.tensor([[-9.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [2.0, 0.0]])
    case = Case([adapter("a", {MODULE: LoraFactors(A, torch.ones(20, 4), -3.0)})], [0], (1,), 2)
    rows = {"weights": torch.tensor([[2.0]]), "scale": torch.ones(1, 1)}
    _, gates = run(module_of(Hilora(), case), Hilora(), rows, torch.tensor([[1.0, 0.0]]))
    assert gates.weights.tolist() == [[0, 1, 0, 1]]


def test_flattened_inputs_take_a_row_per_token() -> None:
    case = make_case([4, 1, 3], (2, 7))
    router = Hilora(epsilon=0.05)
    plan = plan_of(router, case, inputs_near(case, 2), range(2))
    prepared, x = module_of(router, case), case.inputs()
    expected, _ = run(prepared, router, spread_rows(plan, (2, 7)), x)
    flat = {name: row.repeat_interleave(7, dim=0) for name, row in plan.items()}
    got, _ = run(prepared, router, flat, x.flatten(0, 1))
    assert torch.equal(got, expected.flatten(0, 1))


def test_module_of_which_no_candidate_is_used() -> None:
    case = make_case([4, 1, None], (2, 3))
    router = Hilora()
    rows = {"weights": torch.tensor([[[0.0, 0.0, 2.0]]] * 2), "scale": torch.ones(2, 1, 1)}
    check_restricted(router, case, rows)
    update, _ = run(module_of(router, case), router, rows, case.inputs())
    assert not update.any()


def test_hundreds_of_adapters() -> None:
    generator = torch.Generator().manual_seed(0)
    ranks = torch.randint(1, 9, (300,), generator=generator).tolist()
    case = make_case(ranks, (2, 3))
    counts = torch.stack([torch.randint(0, 9, (300,), generator=generator) for _ in range(2)]).float()
    counts[:, 7:] *= (torch.rand(2, 293, generator=generator) < 0.02).float()
    rows = {"weights": counts.unsqueeze(1), "scale": torch.tensor([[[0.5]], [[2.0]]])}
    prepared, x = module_of(Hilora(), case), case.inputs()
    _, gates = run(prepared, Hilora(), rows, x)
    for number in range(2):
        for token in range(3):
            for e, part in enumerate(prepared.bank.slices):
                chosen = strongest(prepared.bank.A[part].double(), x[number, token].double(), int(counts[number, e]))
                expected = [(0.5, 2.0)[number] if j in chosen else 0.0 for j in range(ranks[e])]
                assert gates.weights[number, token, part].tolist() == expected
    check_restricted(Hilora(), case, rows)


def test_half_precision_chooses_by_the_rounded_projection() -> None:
    case = make_case([8, 3, 8], (5, 4))
    router = Hilora(gamma=0.5, epsilon=0.05)
    rows = spread_rows(plan_of(router, case, inputs_near(case, 5), range(5)), case.shape)
    prepared, x = module_of(router, case), case.inputs(torch.bfloat16)
    h = x @ prepared.bank.A.bfloat16().mT
    got = router.route({**prepared.tensors, **rows}, x, h).weights
    assert got.dtype == torch.float32
    assert torch.equal(got, router.route({**prepared.tensors, **rows}, x.float(), h.float()).weights)


def test_route_compiles_in_one_graph() -> None:
    case = make_case([4, 1, 3], (2, 7))
    prepared, x = module_of(Hilora(), case), case.inputs()
    tensors = {
        **prepared.tensors,
        "weights": torch.tensor([[[2.0, 1, 1]], [[0, 0, 3.0]]]),
        "scale": torch.ones(2, 1, 1),
    }
    h = x @ prepared.bank.A.mT
    router = Hilora()
    compiled = torch.compile(lambda h: router.route(tensors, x, h).weights, fullgraph=True, backend="eager")
    assert torch.equal(compiled(h), Hilora().route(tensors, x, h).weights)


def test_pool_without_any_update_gets_an_empty_plan() -> None:
    case = make_case([2, 2], (1,), zero=(0, 1))
    for router in (Hilora(), HiloraGs()):
        plan = plan_of(router, case, inputs_near(case, 3), range(3))
        assert not plan["weights"].any()
    assert Hilora().plan_state(stack(case.adapters), [fit(np.eye(WIDTH))] * 2)["ranks"].tolist() == [0, 0]


@pytest.mark.parametrize("router", [Hilora(), HiloraRoc()])
def test_updates_that_are_more_than_their_components_are_refused(router: Router) -> None:
    case = make_case([2, 2, 2], (1,))
    factors = case.adapters[1].modules[MODULE]
    case.adapters[1] = replace(case.adapters[1], modules={MODULE: replace(factors, magnitude=torch.ones(20))})
    case.adapters[2] = replace(case.adapters[2], modules={MODULE: replace(factors, bias=torch.ones(20))})
    pool = stack(case.adapters)
    with pytest.raises(MethodError, match=rf"'{router.name}' gates single components.*'adapter-1', 'adapter-2'; leave"):
        router.check(pool)
    HiloraGs().check(pool)


def test_who_decides_per_sequence() -> None:
    assert isinstance(Hilora(), SequenceRouter)
    assert isinstance(HiloraGs(), SequenceRouter)
    assert not isinstance(HiloraRoc(), SequenceRouter)


def test_defaults_are_the_papers() -> None:
    assert create("hilora", {}) == Hilora(gamma=0.4, epsilon=1e-5, seed=0)
    assert create("hilora-gs", {}) == HiloraGs(epsilon=1e-5)
    assert create("hilora-roc", {}) == HiloraRoc(top_rocs=24)
    with pytest.raises(MethodError, match=r"gamma=1.5, expected a number above 0.*epsilon=0.*seed=-1"):
        create("hilora", {"gamma": 1.5, "epsilon": 0, "seed": -1})
