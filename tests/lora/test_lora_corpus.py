"""Real adapters from public repositories: what each folder is, decided by reading it, not by running the reader.

The corpus lies outside the repository: in ``../shared/corpus`` or where ``HUB_ROUTER_CORPUS`` says. The expected
verdicts are in ``corpus_expected.toml``.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from hub_router.errors import UnsupportedAdapterError
from hub_router.lora.config_file import read_config
from hub_router.lora.facts import inspect
from hub_router.lora.reader import read_adapter
from hub_router.lora.spectrum import spectra

CORPUS = Path(os.environ.get("HUB_ROUTER_CORPUS") or Path(__file__).parents[3] / "shared" / "corpus")
EXPECTED: dict[str, dict[str, dict[str, Any]]] = tomllib.loads(
    Path(__file__).with_name("corpus_expected.toml").read_text(encoding="utf-8")
)
WEIGHTS, CONFIGS = EXPECTED["weights"], EXPECTED["configs"]
USABLE = [name for name, verdict in WEIGHTS.items() if verdict["verdict"] != "unsupported"]

pytestmark = pytest.mark.skipif(not CORPUS.is_dir(), reason=f"no corpus at {CORPUS.name}; set HUB_ROUTER_CORPUS")


def test_every_folder_has_a_verdict() -> None:
    assert {folder.name for folder in (CORPUS / "weights").iterdir()} == set(WEIGHTS)
    assert {folder.name for folder in (CORPUS / "configs").iterdir()} == set(CONFIGS)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name: str) -> None:
    folder, expected = CORPUS / "weights" / name, WEIGHTS[name]
    if expected["verdict"] == "unsupported":
        with pytest.raises(UnsupportedAdapterError) as refusal:
            inspect(folder)
        assert expected["reason"].lower() in str(refusal.value).lower()
        assert "\n" not in str(refusal.value)
        return
    facts, adapter = inspect(folder), read_adapter(folder)
    assert len(facts.modules) == expected["modules"]
    assert list(facts.ranks) == expected["ranks"]
    assert [module.scaling for module in facts.modules] == pytest.approx([expected["scaling"]] * len(facts.modules))
    assert list(facts.targets) == expected["targets"]
    assert sorted(adapter.saved) == expected.get("saved", [])
    assert bool(facts.notes) == (expected["verdict"] == "usable with note"), facts.notes
    if "zero_rows" in expected:
        start, stop = expected["zero_rows"]
        for factors in adapter.modules.values():
            assert [factors.d_out, factors.d_in] == expected["update_shape"]
            assert not factors.B[start:stop].any()
            assert factors.B[:start].any() and factors.B[stop:].any()


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name: str) -> None:
    folder, expected = CORPUS / "configs" / name, CONFIGS[name]
    if expected["config"] == "lora":
        read_config(folder)
        with pytest.raises(UnsupportedAdapterError, match="no weights: expected"):
            inspect(folder)
        return
    with pytest.raises(UnsupportedAdapterError) as refusal:
        read_config(folder)
    assert expected["reason"].lower() in str(refusal.value).lower()
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("name", USABLE)
def test_spectra_of_real_adapters(name: str) -> None:
    adapter = read_adapter(CORPUS / "weights" / name)
    for found in list(spectra(adapter))[::17]:
        factors = adapter.modules[found.module]
        update = factors.scaling * factors.B.double() @ factors.A.double()
        _, S, Vt = torch.linalg.svd(update, full_matrices=False)
        kept = min(factors.rank, len(S))
        values = torch.from_numpy(found.singular_values).double()
        assert torch.allclose(values[:kept], S[:kept], rtol=1e-5, atol=1e-7 * float(S[0]))
        assert found.direction is not None
        direction = torch.from_numpy(found.direction).double()
        assert torch.linalg.norm(direction - Vt[0] * torch.sign(direction @ Vt[0])) < 1e-6
