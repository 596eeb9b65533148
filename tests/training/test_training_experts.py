"""Adapters that are trained together: by labels, with a router, and as experts of feed-forward blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from compose_models import ALL, MLP, assert_close, llama, prompt_ids, save_adapter
from training_models import TWINS, Watch, logits, twin_examples

from hub_router import compose
from hub_router.errors import HubRouterError, TrainingError
from hub_router.lora.reader import read_adapter
from hub_router.routing.lora_mixer import LoraMixer
from hub_router.training import Example, TrainingSettings
from hub_router.training.experts import fit_experts, fresh_experts
from hub_router.training.peft_adapter import fit_adapter

CONFIG = peft.LoraConfig(r=4, lora_alpha=12, target_modules=ALL, lora_dropout=0.0)
SETTINGS = TrainingSettings(steps=6, batch_size=8, learning_rate=1e-2, warmup=0.0)


def of(*names: str) -> list[Example]:
    return [each for each in twin_examples() if each.adapter in names]


def same_factors(one: Path, other: Path, tolerance: float) -> None:
    first, second = read_adapter(one).modules, read_adapter(other).modules
    assert first.keys() == second.keys()
    for name, each in first.items():
        assert_close(each.A, second[name].A, tolerance)
        assert_close(each.B * each.scaling, second[name].B * second[name].scaling, tolerance)


def test_fresh_experts_start_as_pefts() -> None:
    model = llama()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    a, b = fresh_experts(model, ["a", "b"], CONFIG, seed=3)
    other = llama()
    torch.manual_seed(4)
    theirs = peft.get_peft_model(other, CONFIG)
    layer = theirs.base_model.model.model.layers[1].mlp.up_proj
    assert torch.equal(b.modules["model.layers.1.mlp.up_proj"].A, layer.lora_A["default"].weight)
    assert not any(each.B.any() for each in a.modules.values())
    assert a.modules["model.layers.0.self_attn.q_proj"].scaling == 3.0
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_one_labelled_expert_is_what_peft_trains(tokenizer: Any, tmp_path: Path) -> None:
    model, data = llama(), of("add")
    fit_adapter(model, tokenizer, data, CONFIG, settings=SETTINGS, out=tmp_path / "peft")
    ours = fit_experts(
        model,
        tokenizer,
        data,
        fresh_experts(model, ["add"], CONFIG),
        "experts",
        settings=SETTINGS,
        out=tmp_path / "out",
    )
    same_factors(ours.folders["add"], tmp_path / "peft", 1e-4)
    assert ours.prototypes is None


def test_labelled_experts_learn_from_their_own_examples_alone(tokenizer: Any, tmp_path: Path) -> None:
    """The loss is a mean over all answers, so its gradient to one expert is that of its own examples, times a share."""
    names = list(TWINS)
    model = llama()
    settings = replace(SETTINGS, steps=60, learning_rate=1e-2)
    made = fit_experts(
        model, tokenizer, twin_examples(), fresh_experts(model, names, CONFIG), "experts", settings=settings,
        out=tmp_path / "out",
    )  # fmt: skip
    for name, answer in TWINS.items():
        own = compose(llama(), {name: made.folders[name]}, "single", tokenizer=tokenizer, adapter=name)
        assert own.generate(f"{name} abcd:", max_new_tokens=5, do_sample=False) == f" {answer}"
    few = fit_experts(
        model, tokenizer, of("add", "cut"), fresh_experts(model, names, CONFIG), "experts", settings=SETTINGS,
        out=tmp_path / "few",
    )  # fmt: skip
    start = {each.name: each for each in fresh_experts(model, names, CONFIG)}
    for name, folder in few.folders.items():
        moved = any((each.B != 0).any() for each in read_adapter(folder, name).modules.values())
        assert moved == (name in ("add", "cut"))
        if not moved:
            assert all(
                torch.equal(each.A, start[name].modules[m].A) for m, each in read_adapter(folder).modules.items()
            )


def folders(root: Path, count: int = 3, modules: Sequence[str] = ALL) -> dict[str, Path]:
    return {
        f"e{seed}": save_adapter(
            llama(), root / f"e{seed}", seed, r=2 + seed, lora_alpha=4, target_modules=list(modules)
        )
        for seed in range(count)
    }


@pytest.mark.parametrize("method", ["lora-mixer", "mixlora"])
def test_adapters_and_gates_are_trained_together(tokenizer: Any, tmp_path: Path, method: str) -> None:
    pool = folders(tmp_path / "pool", modules=MLP)
    model = llama()
    before = model(input_ids=prompt_ids(2, 9)).logits
    settings = replace(SETTINGS, steps=120, learning_rate=3e-2)
    made = fit_experts(
        model, tokenizer, twin_examples(), pool, method, settings=settings, out=tmp_path / "out", log=tmp_path / "log"
    )
    assert torch.equal(model(input_ids=prompt_ids(2, 9)).logits, before)
    assert set(made.folders) == set(pool)
    for name, folder in made.folders.items():
        one, other = read_adapter(folder), read_adapter(pool[name])
        assert {m: (each.rank, each.scaling) for m, each in one.modules.items()} == {
            m: (each.rank, each.scaling) for m, each in other.modules.items()
        }
        assert any((one.modules[m].A != other.modules[m].A).any() for m in one.modules)
        assert any((one.modules[m].B != other.modules[m].B).any() for m in one.modules)
    routed = compose(llama(), made.folders, method, tokenizer=tokenizer, prototypes=str(made.prototypes))
    answers = {name: routed.generate(f"{name} abcd:", max_new_tokens=5, do_sample=False) for name in TWINS}
    assert answers == {name: f" {answer}" for name, answer in TWINS.items()}


def reference(
    pool: dict[str, Path], tokenizer: Any, examples: Sequence[Example], beta: float, steps: int, rate: float
) -> dict[str, dict[str, Any]]:
    """LoRA-Mixer's Eq. 12 on the routed model itself, its parameters plain tensors, stepped by AdamW."""
    from hub_router.composition.attach import routed_updates
    from hub_router.training.batches import collate, draw
    from hub_router.training.data import encode

    routed = compose(llama(), pool, LoraMixer.name, tokenizer=tokenizer, top_k=len(pool))
    updates = [update for _, update in routed_updates(routed.model)]
    leaves: list[torch.Tensor] = []
    held: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for update in updates:
        scales = torch.cat(
            [
                torch.full((rank, 1), read_adapter(folder).modules[update.module].scaling)
                for rank, folder in zip(update.ranks, pool.values(), strict=True)
            ]
        )
        A, up, gate = update.A.clone(), update.Bt / scales, update.state()["P"].clone()
        leaves += [each.requires_grad_() for each in (A, up, gate)]
        held.append((A, up, gate, scales))
    start = [leaf.detach().clone() for leaf in leaves]
    optimizer = torch.optim.AdamW(leaves, lr=rate, weight_decay=0.0)
    encoded = encode(examples, tuple(TWINS), tokenizer, 128, False)
    for step in range(steps):
        batch = collate(draw(encoded, 8, (0, 0, step)), 0, routed.model, False, torch.device("cpu"))
        for update, (A, up, gate, scales) in zip(updates, held, strict=True):
            update._buffers["A"], update._buffers["Bt"], update._buffers["router_P"] = A, up * scales, gate
        loss = batch.loss(routed.model(**batch.inputs).logits) / batch.learned
        moved = sum(
            ((leaf - was) ** 2).sum()
            for place, (leaf, was) in enumerate(zip(leaves, start, strict=True))
            if place % 3 < 2
        )
        optimizer.zero_grad()
        (loss + beta * moved).backward()
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()
    return {
        update.module: {"A": A.detach(), "up": up.detach(), "gate": gate.detach()}
        for update, (A, up, gate, _) in zip(updates, held, strict=True)
    }


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_joint_loss_is_eq_12(tokenizer: Any, tmp_path: Path, beta: float) -> None:
    pool, data = folders(tmp_path / "pool"), twin_examples()
    settings = replace(SETTINGS, steps=3, learning_rate=1e-3, schedule="constant")
    made = fit_experts(
        llama(),
        tokenizer,
        data,
        pool,
        "lora-mixer",
        settings=settings,
        out=tmp_path / "out",
        preserve=beta,
        balance="none",
    )
    expected = reference(pool, tokenizer, data, beta, 3, 1e-3)
    read = {name: read_adapter(folder).modules for name, folder in made.folders.items()}
    for module, each in expected.items():
        assert_close(torch.cat([read[name][module].A for name in read]), each["A"], 1e-4)
        assert_close(torch.cat([read[name][module].B.T for name in read]), each["up"], 1e-4)


def test_preserving_keeps_adapters_near(tokenizer: Any, tmp_path: Path) -> None:
    pool, distances = folders(tmp_path / "pool"), []
    for beta in (0.0, 1.0):
        made = fit_experts(
            llama(), tokenizer, twin_examples(), pool, "lora-mixer", settings=replace(SETTINGS, steps=20),
            out=tmp_path / f"out{beta}", preserve=beta,
        )  # fmt: skip
        pairs = [
            (read_adapter(made.folders[name]).modules[m], each)
            for name in pool
            for m, each in read_adapter(pool[name]).modules.items()
        ]
        distances.append(sum(float((a.A - b.A).square().sum() + (a.B - b.B).square().sum()) for a, b in pairs))
    assert distances[1] < 0.8 * distances[0]


@pytest.mark.parametrize("method", ["experts", "mixlora"])
def test_a_stopped_run_goes_on(tokenizer: Any, tmp_path: Path, method: str) -> None:
    model, data = llama(), twin_examples()
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=MLP)

    def run(out: str, **more: Any) -> dict[str, Path]:
        start = fresh_experts(model, list(TWINS), config)
        settings = replace(SETTINGS, save_every=2)
        return dict(
            fit_experts(model, tokenizer, data, start, method, settings=settings, out=tmp_path / out, **more).folders
        )

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("halves", checkpoint=tmp_path / "run", progress=Watch(stop_at=5))
    assert not (tmp_path / "halves").exists()
    halves = run("halves", checkpoint=tmp_path / "run")
    for name, folder in whole.items():
        assert (folder / "adapter_model.safetensors").read_bytes() == (
            halves[name] / "adapter_model.safetensors"
        ).read_bytes()
    assert not (tmp_path / "run").exists()


def test_a_base_model_in_half_precision_trains_adapters_in_full(tokenizer: Any, tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=MLP)
    start = fresh_experts(llama(), ["a", "b", "c"], config)
    settings = replace(SETTINGS, learning_rate=1e-4, steps=2)
    made = fit_experts(model, tokenizer, twin_examples(), start, "mixlora", settings=settings, out=tmp_path / "out")
    for each in start:
        for module, trained in read_adapter(made.folders[each.name]).modules.items():
            moved = trained.A - each.modules[module].A
            assert trained.A.dtype == torch.float32
            # Steps that bfloat16 would have rounded away or up.
            assert 0 < moved.abs().max() < 3e-4
    assert model.dtype == torch.bfloat16


def test_gradient_checkpointing_trains_the_same(tokenizer: Any, tmp_path: Path) -> None:
    model = llama()
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=MLP)
    for checkpointing in (False, True):
        settings = replace(SETTINGS, checkpointing=checkpointing, steps=3)
        fit_experts(
            model, tokenizer, twin_examples(), fresh_experts(model, ["a", "b", "c"], config), "mixlora",
            settings=settings, out=tmp_path / str(checkpointing),
        )  # fmt: skip
    for name in "abc":
        same_factors(tmp_path / "False" / name, tmp_path / "True" / name, 1e-4)


def test_what_cannot_be_trained(tokenizer: Any, tmp_path: Path) -> None:
    model, data = llama(), twin_examples()
    start = fresh_experts(model, list(TWINS), CONFIG)

    def refused(match: str, *, experts: Any = start, method: str = "experts", base: Any = model, **more: Any) -> None:
        with pytest.raises(HubRouterError, match=match):
            fit_experts(base, tokenizer, data, experts, method, out=tmp_path / "out", **{"settings": SETTINGS, **more})
        assert not (tmp_path / "out").exists()

    refused("'arrow' trains no adapters; methods that do: experts, lora-mixer, mixlora", method="arrow")
    refused("without options top_k", top_k=3)
    refused("preserve=-1", method="lora-mixer", preserve=-1)
    refused("not in the pool: cut, del, sum", experts=start[:1])
    mixed = {name: save_adapter(llama(), tmp_path / name, 1, r=2, target_modules=[name]) for name in MLP}
    refused("whole feed-forward block", experts=mixed, method="mixlora")
    dora = save_adapter(llama(), tmp_path / "dora", 0, r=2, target_modules=ALL, use_dora=True)
    refused("these are more: add", experts=dict.fromkeys(TWINS, dora) | dict.fromkeys(list(TWINS)[1:], start[1]))
    magnitudes = fresh_experts(model, list(TWINS), peft.LoraConfig(r=2, target_modules=ALL, use_dora=True))
    refused("these are more: add, sum, cut, del", experts=magnitudes)
    with pytest.raises(TrainingError, match=r"without dropout, got lora_dropout=0\.1"):
        fresh_experts(model, ["a"], peft.LoraConfig(target_modules=MLP, lora_dropout=0.1))
    (tmp_path / "there").mkdir()
    with pytest.raises(TrainingError, match="exists and is left as it is"):
        fit_experts(model, tokenizer, data, start, "experts", out=tmp_path / "there")
    assert torch.equal(
        logits(compose(model, {"a": save_adapter(llama(), tmp_path / "a", 1, r=2)}, "base")),
        model(prompt_ids(2, 9)).logits,
    )
