"""PEFT's static merges against PEFT's own, on a real model with saved adapters; DARE's draws by their effects too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_cases import check_merge, merge, product
from peft import LoraConfig, PeftModel, get_peft_model
from routing_cases import MODULE, Case, adapter, assert_close, make_case, random_factors
from transformers import LlamaConfig, LlamaForCausalLM

from hub_router.errors import MethodError
from hub_router.lora.adapter import LoraAdapter, LoraFactors
from hub_router.lora.reader import read_adapter
from hub_router.routing.peft_merge import MERGES, module_seed
from hub_router.routing.registry import create

EQUAL_RANKS = {"linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"}
DRAWN = {"dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"}
TARGETS = ["q_proj", "v_proj", "down_proj"]
NAMES = [method.name for method in MERGES]
Q_PROJ = "model.layers.1.self_attn.q_proj"


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).eval()


def save(folder: Path, settings: Sequence[dict[str, Any]]) -> list[Path]:
    """Adapters with random factors, one for each config."""
    saved = []
    for seed, chosen in enumerate(settings):
        model = get_peft_model(llama(), LoraConfig(**{"target_modules": TARGETS, **chosen}))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        saved.append(folder / f"adapter-{seed}")
        model.save_pretrained(saved[-1])
    return saved


@pytest.fixture(scope="module")
def equal(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save(tmp_path_factory.mktemp("equal"), [{"r": 4, "lora_alpha": alpha} for alpha in (6, 2, 11)])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Ranks and scalings differ, also within an adapter."""
    settings = [
        {"r": 4, "lora_alpha": 6},
        {"r": 8, "lora_alpha": 4, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"down_proj": 11}},
        {"r": 2, "lora_alpha": 16, "use_rslora": True},
    ]
    return save(tmp_path_factory.mktemp("mixed"), settings)


def load(folders: Sequence[Path]) -> PeftModel:
    model = PeftModel.from_pretrained(llama(), folders[0], "0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, str(number))
    return model.eval()


def merge_by_peft(folders: Sequence[Path], name: str, weight: float, **settings: Any) -> PeftModel:
    """PEFT's model with the merged adapter active."""
    model = load(folders)
    members = [str(number) for number in range(len(folders))]
    model.add_weighted_adapter(members, [weight] * len(members), "merged", combination_type=name, **settings)
    model.set_adapter("merged")
    return model


def updates(model: PeftModel) -> dict[str, torch.Tensor]:
    """PEFT's merged update of every module."""
    return {
        path.removeprefix("base_model.model."): layer.get_delta_weight("merged").detach()
        for path, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def weight_of(name: str, scale: float, count: int) -> float:
    return scale if "ties" in name else scale / count


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DRAWN])
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_updates_and_logits_are_those_of_peft(equal: list[Path], name: str, scale: float) -> None:
    density = {} if name in ("linear", "cat", "svd") else {"density": 0.5}
    model = merge_by_peft(equal, name, weight_of(name, scale, 3), **density)
    pool = [read_adapter(folder) for folder in equal]
    router = create(name, {"scale": scale, **density})
    base = llama()
    expected = updates(model)
    assert len(expected) == 6
    for path, update in expected.items():
        got = product(merge(router, pool, path))
        assert_close(got, update.double(), 1e-5)
        with torch.no_grad():
            base.get_submodule(path).weight.add_(got.float())
    ids = torch.arange(3, 21).reshape(2, 9)
    with torch.no_grad():
        assert_close(base(input_ids=ids).logits, model(input_ids=ids).logits.double(), 1e-5)


@pytest.mark.parametrize("name", ["cat", "svd", "ties_svd", "magnitude_prune_svd"])
@pytest.mark.parametrize("rank", [None, 5])
def test_ranks_and_scalings_may_differ(mixed: list[Path], name: str, rank: int | None) -> None:
    settings: dict[str, Any] = {} if name == "cat" else {"svd_rank": rank}
    if name not in ("cat", "svd"):
        settings |= {"density": 0.3}
    if name == "ties_svd":
        settings |= {"majority_sign_method": "frequency"}
    # PEFT cuts every module to the largest rank of any; here that is said of the module's own candidates.
    given = settings if rank or name == "cat" else {**settings, "svd_rank": 8}
    expected = updates(merge_by_peft(mixed, name, weight_of(name, 1.0, 3), **given))
    pool = [read_adapter(folder) for folder in mixed]
    for path, update in expected.items():
        if rank is None and name != "cat" and "v_proj" in path:
            continue
        assert_close(product(merge(create(name, settings), pool, path)), update.double(), 1e-5)


def test_rank_of_an_svd_is_that_of_the_modules_largest_candidate(mixed: list[Path]) -> None:
    pool = [read_adapter(folder) for folder in mixed]
    ranks = {path: merge(create("svd", {}), pool, path).bank.ranks for path in pool[0].modules}
    assert ranks == {path: (4,) if "v_proj" in path else (8,) for path in ranks}
    assert merge(create("svd", {"svd_rank": 99}), pool, Q_PROJ).bank.ranks == (32,)
    assert merge(create("cat", {}), pool, Q_PROJ).bank.ranks == (14,)


@pytest.mark.parametrize("name", ["linear", "cat", "svd", "ties", "ties_svd"])
def test_embeddings_are_merged_as_peft_merges_them(tmp_path: Path, name: str) -> None:
    folders = save(tmp_path, [{"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens"]}] * 2)
    density = {"density": 0.4} if "ties" in name else {}
    (update,) = updates(merge_by_peft(folders, name, weight_of(name, 1.0, 2), **density)).values()
    pool = [read_adapter(folder) for folder in folders]
    prepared = merge(create(name, density), pool, "model.embed_tokens")
    assert prepared.bank.lookup
    assert_close(product(prepared), update.T.double(), 1e-5)


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_the_same_draws_give_pefts_update(tmp_path: Path, name: str) -> None:
    folders = save(tmp_path, [{"r": 4, "lora_alpha": 6, "target_modules": [Q_PROJ]}] * 3)
    model = load(folders)
    # PEFT draws an adapter's start before it draws what to drop.
    torch.manual_seed(module_seed(3, Q_PROJ))
    model.add_weighted_adapter(
        ["0", "1", "2"], [weight_of(name, 1.0, 3)] * 3, "merged", combination_type=name, density=0.5
    )
    pool = [read_adapter(folder) for folder in folders]
    got = product(merge(create(name, {"density": 0.5, "seed": 3}), pool, Q_PROJ))
    assert_close(got, updates(model)[Q_PROJ].double(), 1e-5)


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_draws_follow_the_seed_and_the_module_and_leave_the_callers_alone(equal: list[Path], name: str) -> None:
    pool = [read_adapter(folder) for folder in equal]
    other = Q_PROJ.replace("1", "0")
    torch.manual_seed(5)
    untouched = torch.rand(3)
    torch.manual_seed(5)
    first, again, reseeded = (merge(create(name, {"seed": seed}), pool, Q_PROJ).bank for seed in (0, 0, 2**70))
    assert torch.equal(torch.rand(3), untouched)
    assert torch.equal(first.A, again.A) and torch.equal(first.B, again.B)
    assert not torch.equal(first.A, reseeded.A)
    if not name.endswith("svd"):
        assert not torch.equal(first.A == 0, merge(create(name, {}), pool, other).bank.A == 0)


def test_dare_keeps_entries_at_the_density_and_rescales_them() -> None:
    case = make_case([3, 5], (1,), d_in=24, d_out=20)
    settings = {"density": 0.25, "svd_rank": 20, "seed": 1}
    got = product(merge(create("dare_linear_svd", settings), case.adapters))
    first, second = (B @ A / 2 / 0.25 for A, B in case.pairs)  # weight 1/C, rescaled by 1/density
    kept = [0, 0]
    for i in range(20):
        for j in range(24):
            a, b = first[i, j].item(), second[i, j].item()
            choices = {(0, 0): 0.0, (1, 0): a, (0, 1): b, (1, 1): a + b}
            (which, value) = min(choices.items(), key=lambda choice: abs(choice[1] - got[i, j].item()))
            assert abs(value - got[i, j].item()) < 1e-4
            kept = [kept[0] + which[0], kept[1] + which[1]]
    # Five standard deviations of 480 draws.
    assert all(abs(count / 480 - 0.25) < 0.1 for count in kept)


@pytest.mark.parametrize("name", ["ties", "dare_ties", "svd", "magnitude_prune"])
def test_adapter_that_is_alone_in_a_module_is_taken_as_it_is(name: str) -> None:
    case = make_case([None, 4, None], (1,))
    ((A, B),) = case.pairs
    shares = torch.full((1,), 0.5, dtype=torch.float64)
    check_merge(create(name, {"scale": 0.5}), case, 0.5 * B @ A, shares, 1e-6)


def total(case: Case) -> torch.Tensor:
    return torch.stack([B @ A for A, B in case.pairs]).sum(0)


def in_one(case: Case) -> torch.Tensor:
    """Each scaling's root on either factor, as PEFT does it."""
    factors = [case.adapters[e].modules[MODULE] for e in case.experts]
    A = torch.stack([f.scaling**0.5 * f.A.double() for f in factors]).sum(0)
    B = torch.stack([f.scaling**0.5 * f.B.double() for f in factors]).sum(0)
    return B @ A


@pytest.mark.parametrize(("name", "sum_of"), [("cat", total), ("svd", total), ("linear", in_one)])
def test_candidates_share_the_scale(name: str, sum_of: Callable[[Case], torch.Tensor]) -> None:
    case = make_case([4, None, 4, 4, 4], (1,), zero=(3,))
    settings = {"svd_rank": 12} if name == "svd" else {}
    shares = torch.full((3,), 1 / 3, dtype=torch.float64)
    check_merge(create(name, settings), case, sum_of(case) / 3, shares, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_merge_cannot_take_is_refused_in_one_error(name: str) -> None:
    case = make_case([4, 8, 4], (1,))
    plain = random_factors(9, 4, 24, 20)
    dora = LoraFactors(plain.A, plain.B, 1.0, magnitude=torch.ones(20))
    with pytest.raises(MethodError, match=rf"'{name}'.*DoRA.*: 'stretched'; choose .*'uniform'"):
        merge(create(name, {}), [*case.adapters, adapter("stretched", {MODULE: dora})])
    if name in EQUAL_RANKS:
        with pytest.raises(MethodError, match=rf"(?s)'{name}'.*'adapter-0' rank 4, 'adapter-1' rank 8.*'uniform'"):
            merge(create(name, {}), case.adapters)
    else:
        assert product(merge(create(name, {}), case.adapters)).any()


@pytest.mark.parametrize("name", NAMES)
def test_updates_too_large_to_be_formed_are_refused(name: str) -> None:
    # 1.6 GB for each adapter, were it formed.
    pool: list[LoraAdapter] = [adapter(f"adapter-{e}", {MODULE: random_factors(e, 1, 20_000, 20_000)}) for e in (0, 1)]
    if name.endswith("svd"):
        with pytest.raises(MethodError, match=rf"'{name}'.*{MODULE}.*'cat' or 'knots'"):
            merge(create(name, {}), pool)
    else:
        assert merge(create(name, {}), pool).bank.d_out == 20_000


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("ties", {"density": 0.0}, r"density=0.0, expected a number above 0, at most 1"),
        ("ties", {"density": 1.5}, r"density=1.5"),
        ("ties", {"density": True}, r"density=True"),
        ("ties", {"majority_sign_method": "all"}, r"majority_sign_method='all', expected 'total' or 'frequency'"),
        ("svd", {"svd_rank": 0}, r"svd_rank=0, expected an integer of at least 1, or None"),
        ("svd", {"density": 0.5}, r"density=0.5 is none of its hyperparameters"),
        ("dare_ties", {"seed": -1}, r"seed=-1, expected an integer of at least 0"),
        ("cat", {"scale": 0}, r"scale=0, expected a finite number above 0"),
    ],
)
def test_wrong_hyperparameters_are_named(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        create(name, given)
