"""base, single, uniform and merged: gates that do not look at the input, against float64 loops."""

from __future__ import annotations

import pytest
import torch
from routing_cases import MODULE, Case, check_against, make_case, make_update

from hub_router.errors import MethodError
from hub_router.routing.merged import Merged
from hub_router.routing.no_adapter import Base
from hub_router.routing.single import Single
from hub_router.routing.uniform import Uniform


def test_base_adds_nothing(case: Case) -> None:
    assert make_update(Base(), case)(case.inputs()) is None


def test_uniform_is_the_mean_of_the_outputs(case: Case) -> None:
    def one(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count = len(case.pairs)
        y = sum((B @ (A @ x)) / count for A, B in case.pairs)
        return y, torch.full((count,), 1 / count, dtype=torch.float64)

    check_against(Uniform(), case, one)


def test_merged_is_one_adapter_of_mean_factors(equal_case: Case) -> None:
    def one(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count = len(equal_case.pairs)
        A = sum(A / count for A, _ in equal_case.pairs)
        B = sum(B / count for _, B in equal_case.pairs)
        return B @ (A @ x), torch.full((count,), 1 / count, dtype=torch.float64)

    check_against(Merged(), equal_case, one)


def test_merged_refuses_different_ranks_and_names_them() -> None:
    with pytest.raises(MethodError, match=r"(?s)'merged'.*'adapter-0' rank 1, 'adapter-1' rank 8") as caught:
        make_update(Merged(), make_case([1, 8, 3], (1,)))
    assert MODULE in str(caught.value)


@pytest.mark.parametrize("position", [0, 2, 3])
def test_single_is_that_adapter_alone(position: int) -> None:
    case = make_case([1, 8, 3, 16, 2], (1, 63))

    def one(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        A, B = case.pairs[position]
        return B @ (A @ x), torch.eye(5, dtype=torch.float64)[position]

    check_against(Single(f"adapter-{position}"), case, one)


def test_single_keeps_no_factors_of_the_others() -> None:
    update = make_update(Single("adapter-2"), make_case([1, 8, 3], (1,)))
    assert update.A.shape == (3, 24)
    assert update.Bt.shape == (3, 20)


def test_single_where_the_adapter_adapts_another_module_is_the_base_module() -> None:
    case = make_case([4, None, 4], (1, 2))
    assert make_update(Single("adapter-1"), case)(case.inputs()) is None


def test_single_of_an_unknown_adapter_names_the_pool() -> None:
    with pytest.raises(MethodError, match=r"adapter='adapter_1'.*'adapter-0', 'adapter-1'; did you mean 'adapter-1'"):
        make_update(Single("adapter_1"), make_case([4, 4], (1,)))
