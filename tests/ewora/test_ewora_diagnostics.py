"""Mean expert weights per module and task, and their distances, against loops over tokens."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from ewora_models import GPT2_TARGETS, adapted, factors, gpt2, ids, layers_of, llama, randomise, reference, t5
from peft import PeftModel
from torch import nn

from hub_router.errors import MethodError
from hub_router.ewora import EworaConfig
from hub_router.ewora.diagnostics import ExpertRecord, TaskDistance, heatmap

TASKS = {"code": 2, "math": 3, "general": 4}


def record_tasks(model: nn.Module) -> ExpertRecord:
    record = ExpertRecord(model)
    for task, seed in TASKS.items():
        with record.task(task), torch.no_grad():
            model(ids(2, 6, seed=seed))
            model(ids(1, 9, seed=seed + 10))
    return record


def loop_means(model: PeftModel) -> dict[str, dict[str, list[float]]]:
    """Mean of alpha over all tokens of a task, from each module's own input, token by token."""
    found: dict[str, dict[str, list[float]]] = {}
    layers = layers_of(model.get_base_model())
    for task, seed in TASKS.items():
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
        handles = [
            layer.register_forward_pre_hook(lambda _, args, own=seen[name]: own.extend(args[0].flatten(0, -2)))
            for name, layer in layers.items()
        ]
        with torch.no_grad():
            model(ids(2, 6, seed=seed))
            model(ids(1, 9, seed=seed + 10))
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            A, B, R = factors(layer)
            sums = [0.0] * R.shape[0]
            for x in seen[name]:
                for i, weight in enumerate(reference(x.double(), A, B, R, 1.0)[1]):
                    sums[i] += weight.item()
            assert len(seen[name]) == 2 * 6 + 9
            found.setdefault(name, {})[task] = [each / len(seen[name]) for each in sums]
    return found


def small(**options: object) -> PeftModel:
    return randomise(adapted(llama(), **{"n": 2, "target_modules": ["q_proj", "down_proj"], **options}), 1)


def test_means_and_distances_equal_the_loops() -> None:
    model = small(lora_alpha=0.5)
    record, expected = record_tasks(model), loop_means(model)
    means = record.means()
    assert record.tasks == tuple(TASKS)
    assert list(means) == list(expected) == list(layers_of(model.get_base_model()))
    for name, of_tasks in expected.items():
        for task, values in of_tasks.items():
            assert means[name][task].tolist() == pytest.approx(values, rel=1e-5, abs=1e-8)
    for found in record.distances():
        vectors = expected[found.module].values()
        pairs = [sum(abs(p - q) for p, q in zip(one, other, strict=True)) for one, other in combinations(vectors, 2)]
        assert found.distance == pytest.approx(sum(pairs) / 3, rel=1e-4)  # Dist of Section 5, three tasks


def test_rows_and_columns_of_the_figure() -> None:
    distances = record_tasks(small()).distances()
    assert [(each.module, each.layer, each.kind) for each in distances] == [
        ("model.layers.0.self_attn.q_proj", 0, "model.layers.#.self_attn.q_proj"),
        ("model.layers.0.mlp.down_proj", 0, "model.layers.#.mlp.down_proj"),
        ("model.layers.1.self_attn.q_proj", 1, "model.layers.#.self_attn.q_proj"),
        ("model.layers.1.mlp.down_proj", 1, "model.layers.#.mlp.down_proj"),
    ]
    table = heatmap(distances)
    assert table.kinds == ("model.layers.#.self_attn.q_proj", "model.layers.#.mlp.down_proj")
    assert table.layers == (0, 1)
    values = [each.distance for each in distances]
    assert table.values.tolist() == [[values[0], values[2]], [values[1], values[3]]]


def test_cells_without_a_module_are_nan() -> None:
    given = [
        TaskDistance("layers.10.a", 10, "layers.#.a", 1.0),
        TaskDistance("layers.2.b", 2, "layers.#.b", 2.0),
        TaskDistance("head", None, "head", 3.0),
    ]
    table = heatmap(given)
    assert table.layers == (None, 2, 10)
    assert [[None if math.isnan(v) else v for v in row] for row in table.values.tolist()] == [
        [None, None, 1.0],
        [None, 2.0, None],
        [3.0, None, None],
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side: str) -> None:
    model = small()
    long, short = ids(1, 8, seed=5), ids(1, 5, seed=6)
    pad, gap = torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long)
    order = (pad, short) if side == "left" else (short, pad)
    marks = (gap, torch.ones_like(short)) if side == "left" else (torch.ones_like(short), gap)
    batch = torch.cat([long, torch.cat(order, 1)])
    mask = torch.cat([torch.ones_like(long), torch.cat(marks, 1)])
    record = ExpertRecord(model)
    with torch.no_grad():
        with record.task("batch"):
            model(input_ids=batch, attention_mask=mask)
        with record.task("alone"):
            model(input_ids=long)
            model(input_ids=short)
    for of_tasks in record.means().values():
        assert torch.allclose(of_tasks["batch"], of_tasks["alone"], rtol=1e-4, atol=1e-6)


def test_padded_generation_with_a_cache() -> None:
    model = small()
    prompt, mask = ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    prompt[1, :2], mask[1, :2] = 0, 0
    cached, full = ExpertRecord(model), ExpertRecord(model)
    with cached.task("t"):
        out = model.generate(
            input_ids=prompt, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None
        )
    longer = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1)
    positions = (longer.cumsum(-1) - 1).clamp(min=0)
    with full.task("t"), torch.no_grad():
        model(input_ids=out[:, :-1], attention_mask=longer, position_ids=positions)
    for one, other in zip(cached.means().values(), full.means().values(), strict=True):
        assert torch.allclose(one["t"], other["t"], rtol=1e-4, atol=1e-6)


def test_gpt2_and_an_encoder_decoder() -> None:
    model = randomise(adapted(gpt2(), target_modules=GPT2_TARGETS), 1)
    assert {each.kind for each in record_tasks(model).distances()} == {
        "transformer.h.#.attn.c_attn",
        "transformer.h.#.attn.c_proj",
        "transformer.h.#.mlp.c_fc",
        "transformer.h.#.mlp.c_proj",
    }
    both = randomise(adapted(t5(), target_modules=["q", "v"]), 1)
    record = ExpertRecord(both)
    for task, seed in TASKS.items():
        with record.task(task):
            both(input_ids=ids(2, 5, seed=seed), labels=ids(2, 3, seed=seed))
    assert len(record.distances()) == len(layers_of(both))
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, -1] = 0
    with pytest.raises(MethodError, match="encoder-decoder"), record.task("code"):
        both(input_ids=ids(2, 5), attention_mask=mask, labels=ids(2, 3))


def test_recomputed_forwards_count_once() -> None:
    model = small().train()
    plain, checkpointed = ExpertRecord(model), ExpertRecord(model)
    with plain.task("t"):
        model(input_ids=ids(2, 6), labels=ids(2, 6)).loss.backward()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with checkpointed.task("t"):
        model(input_ids=ids(2, 6), labels=ids(2, 6)).loss.backward()
    assert checkpointed._counts == plain._counts


def test_leaves_no_hooks_behind_also_after_an_error() -> None:
    model = small()
    record = record_tasks(model)
    with pytest.raises(ZeroDivisionError), record.task("code"):
        raise ZeroDivisionError
    base = model.get_base_model()
    assert not base._forward_pre_hooks
    assert not any(layer.ewora_R["default"]._forward_hooks for layer in layers_of(model).values())


def test_tasks_that_are_one_have_distance_zero() -> None:
    model = small()
    record = ExpertRecord(model)
    for task in ("one", "same"):
        with record.task(task), torch.no_grad():
            model(ids(2, 6))
    assert {each.distance for each in record.distances()} == {0.0}


def test_adapter_is_chosen_by_name() -> None:
    model = small()
    model.add_adapter("other", EworaConfig(r=4, n=4, target_modules=["v_proj"]))
    with pytest.raises(MethodError, match="'default', 'other', and none was named"):
        ExpertRecord(model)
    with pytest.raises(MethodError, match="'mine' was asked for"):
        ExpertRecord(model, "mine")
    with pytest.raises(MethodError, match="no EWoRA adapter"):
        ExpertRecord(llama())
    record = ExpertRecord(model, "other")
    with pytest.raises(MethodError, match=r"'code': no forward ran through adapter 'other'"), record.task("code"):
        model(ids(1, 4))
    model.set_adapter("other")
    with record.task("code"):
        model(ids(1, 4))
    assert {weights["code"].shape for weights in record.means().values()} == {(4,)}


def test_faults() -> None:
    record = ExpertRecord(small())
    with pytest.raises(MethodError, match="0 tasks were recorded, expected at least 2"):
        record.distances()
    with pytest.raises(MethodError, match="task 'a' is being recorded"), record.task("a"), record.task("b"):
        pass
