from __future__ import annotations

import numpy as np
import pytest
import torch

from hub_router.errors import IncompatibleAdaptersError, MethodError, UnsupportedAdapterError
from hub_router.lora.adapter import LoraAdapter, LoraFactors
from hub_router.lora.bank import build_bank


def adapter(
    name: str, modules: dict[str, tuple[int, int, int, float]], dtype: torch.dtype = torch.float32
) -> LoraAdapter:
    """An adapter in memory; each module is (rank, d_in, d_out, scaling)."""
    generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
    factors = {
        module: LoraFactors(
            torch.randn(rank, d_in, generator=generator).to(dtype),
            torch.randn(d_out, rank, generator=generator).to(dtype),
            scaling,
        )
        for module, (rank, d_in, d_out, scaling) in modules.items()
    }
    return LoraAdapter(name, None, "org/base", factors, weights_hash=name)


POOL = [
    adapter("alpha", {"m.q": (2, 5, 7, 0.5), "m.v": (2, 5, 4, 2.0)}),
    adapter("beta", {"m.v": (3, 5, 4, 1.5)}),
    adapter("gamma", {"m.up": (1, 6, 9, 3.0), "m.q": (4, 5, 7, 0.25)}),
]


def test_layout() -> None:
    bank = build_bank(POOL)
    assert bank.adapters == ("alpha", "beta", "gamma")
    assert list(bank.modules) == ["m.q", "m.v", "m.up"]
    q = bank.modules["m.q"]
    assert (q.module, q.ranks, q.experts, q.offsets) == ("m.q", (2, 4), (0, 2), (0, 2, 6))
    assert (q.d_in, q.d_out) == (5, 7)
    assert q.slices == (slice(0, 2), slice(2, 6))
    assert q.component_experts.tolist() == [0, 0, 1, 1, 1, 1]
    assert q.component_experts.dtype == torch.int64
    assert bank.modules["m.up"].experts == (2,)


def test_stacked_product_is_the_sum_of_the_scaled_updates() -> None:
    bank = build_bank(POOL)
    for module, stacked in bank.modules.items():
        expected = np.zeros((stacked.d_out, stacked.d_in))
        for member in POOL:
            if module in member.modules:
                one = member.modules[module]
                expected += one.scaling * one.B.double().numpy() @ one.A.double().numpy()
        np.testing.assert_allclose((stacked.B.double() @ stacked.A.double()).numpy(), expected, atol=1e-5)


def test_each_slice_is_its_candidate() -> None:
    stacked = build_bank(POOL).modules["m.q"]
    for expert, part in zip(stacked.experts, stacked.slices, strict=True):
        one = POOL[expert].modules["m.q"]
        assert torch.equal(stacked.A[part], one.A)
        assert torch.equal(stacked.B[:, part], one.B * one.scaling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_of_adapters_may_differ_from_the_banks(dtype: torch.dtype) -> None:
    pool = [adapter("a", {"m": (2, 3, 4, 1 / 3)}, torch.bfloat16), adapter("b", {"m": (2, 3, 4, 1 / 3)}, torch.float32)]
    stacked = build_bank(pool, dtype=dtype).modules["m"]
    assert (stacked.A.dtype, stacked.B.dtype) == (dtype, dtype)
    for member, part in zip(pool, stacked.slices, strict=True):
        exact = member.modules["m"].B.double() / 3
        # Rounded once to float32 for the product, once to the bank's dtype.
        assert torch.allclose(stacked.B[:, part].double(), exact, rtol=torch.finfo(dtype).eps + 2e-7, atol=0)


def test_default_is_float32_and_gradients_do_not_leak_in() -> None:
    A, B = torch.randn(2, 3, requires_grad=True), torch.randn(4, 2, requires_grad=True, dtype=torch.float32)
    stacked = build_bank([LoraAdapter("a", None, None, {"m": LoraFactors(A, B, 2.0)}, "")]).modules["m"]
    assert stacked.A.dtype == torch.float32
    assert not stacked.A.requires_grad
    assert not stacked.B.requires_grad
    assert torch.equal(stacked.A, A.detach())


def test_the_bank_does_not_share_the_adapters_storage() -> None:
    member = adapter("a", {"m": (2, 3, 4, 1.0)})
    stacked = build_bank([member]).modules["m"]
    stacked.A.zero_()
    stacked.B.zero_()
    assert member.modules["m"].A.abs().sum() > 0
    assert member.modules["m"].B.abs().sum() > 0


def test_to_moves_both_factors() -> None:
    stacked = build_bank(POOL).modules["m.q"]
    half = stacked.to(dtype=torch.bfloat16)
    assert (half.A.dtype, half.B.dtype, half.ranks, half.experts) == (
        torch.bfloat16,
        torch.bfloat16,
        stacked.ranks,
        stacked.experts,
    )
    assert stacked.to(device="cpu").A.data_ptr() == stacked.A.data_ptr()


def test_an_empty_pool_is_an_empty_bank() -> None:
    bank = build_bank([])
    assert bank.adapters == ()
    assert dict(bank.modules) == {}


def test_repeated_names_are_refused() -> None:
    with pytest.raises(MethodError, match="more than once: a, b;"):
        build_bank([adapter(name, {"m": (1, 2, 3, 1.0)}) for name in "abcab"])


def test_widths_that_differ_list_every_offender() -> None:
    pool = [
        adapter("a", {"q": (2, 5, 7, 1.0), "v": (2, 5, 4, 1.0)}),
        adapter("b", {"q": (2, 5, 7, 1.0), "v": (2, 5, 4, 1.0)}),
        adapter("c", {"q": (2, 6, 7, 1.0), "v": (2, 5, 3, 1.0)}),
    ]
    with pytest.raises(IncompatibleAdaptersError) as refusal:
        build_bank(pool)
    assert refusal.value.base == "org/base"
    assert [line.split(",")[:2] for line in refusal.value.mismatches] == [
        ["adapter 'c'", " module q: D_in x D_out is 6 x 7"],
        ["adapter 'c'", " module v: D_in x D_out is 5 x 3"],
    ]


@pytest.mark.parametrize(("A", "B"), [((2, 3), (4, 3)), ((2,), (4, 2)), ((2, 3, 1), (4, 2))])
def test_factors_that_do_not_chain(A: tuple[int, ...], B: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedAdapterError, match="do not chain"):
        LoraFactors(torch.zeros(A), torch.zeros(B), 1.0)


def test_widths_of_factors() -> None:
    one = LoraFactors(torch.zeros(2, 3), torch.zeros(5, 2), 1.0)
    assert (one.rank, one.d_in, one.d_out) == (2, 3, 5)
