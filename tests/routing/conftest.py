"""Pools that every method is run on."""

from __future__ import annotations

import pytest
from routing_cases import CASES, EQUAL, Case


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Every pool: equal and mixed ranks, one adapter, adapters elsewhere, zero updates, odd shapes."""
    return CASES[request.param]()


@pytest.fixture(params=EQUAL)
def equal_case(request: pytest.FixtureRequest) -> Case:
    """Pools whose candidates have equal ranks."""
    return CASES[request.param]()
