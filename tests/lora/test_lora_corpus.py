"""Real adapters from public repositories: what each folder is, decided by reading it, not by running the reader.

The corpus lies outside the repository: in ``../shared/corpus`` or where ``HUB_ROUTER_CORPUS`` says.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hub_router.errors import UnsupportedAdapterError
from hub_router.lora.config import read_config
from hub_router.lora.facts import inspect
from hub_router.lora.reader import read_adapter
from hub_router.lora.spectrum import spectra

CORPUS = Path(os.environ.get("HUB_ROUTER_CORPUS") or Path(__file__).parents[3] / "shared" / "corpus")

pytestmark = pytest.mark.skipif(not CORPUS.is_dir(), reason=f"no corpus at {CORPUS.name}; set HUB_ROUTER_CORPUS")


@dataclass(frozen=True)
class Usable:
    """A folder that can be used: number of modules, their rank and scaling, and the head that is left out."""

    modules: int
    rank: int
    scaling: float
    targets: tuple[str, ...]
    head: str | None = None


VERDICTS: dict[str, Usable | str] = {
    "appledouble_not_an_adapter": "AppleDouble",
    "bloom560m_merged_linear_bin": "MergedLinear",
    "diffusers_sd_lora_no_config": "diffusers LoRA weights",
    "distilbert_lora_imdb": Usable(12, 8, 16 / 8, ("q_lin", "v_lin"), "classifier, pre_classifier"),
    "gemma3_270m_lora": Usable(36, 4, 4 / 4, ("q_proj", "v_proj")),
    "gpt2_lora_tigrinya": Usable(36, 8, 32 / 8, ("c_attn", "c_proj")),
    "gpt2_lora_udacity": Usable(12, 8, 16 / 8, ("c_attn",), "score"),
    "gpt2_prompt_tuning_bin": "unsupported: PROMPT_TUNING",
    "gpt_oss_privacy_filter_token_cls": Usable(32, 16, 32 / 16, ("k_proj", "o_proj", "q_proj", "v_proj"), "score"),
    "lfs_pointer_colpali": "Git LFS pointer",
    "lfs_pointer_esm2_bin": "Git LFS pointer",
    "malformed_two_byte_safetensors": "only 2 bytes",
    "mlx_lora": "MLX-LM",
    "peft_adalora_mlp_bin": "unsupported: ADALORA",
    "peft_lora_conv2d_bin": "convolution",
    "peft_lora_mlp_modules_to_save_bin": "lin1.weight",
    "peft_monteclora_roberta": Usable(24, 8, 16 / 8, ("query", "value"), "classifier.dense, classifier.out_proj"),
    "peft_mt0_large_IA3_bin": "unsupported: IA3",
    "t5_small_lora_bin": Usable(36, 16, 32 / 16, ("q", "v")),
    "vit_lora": Usable(24, 16, 32 / 16, ("query", "value"), "classifier"),
}

# LORA configs of variants whose update is not scaling * B A on the unchanged base: DoRA twice, OLoRA, KaSA, BD-LoRA.
VARIANTS = 5


def test_every_weight_folder_has_a_verdict() -> None:
    assert {folder.name for folder in (CORPUS / "weights").iterdir()} == set(VERDICTS)


@pytest.mark.parametrize("name", VERDICTS)
def test_verdict(name: str) -> None:
    folder, verdict = CORPUS / "weights" / name, VERDICTS[name]
    if isinstance(verdict, str):
        with pytest.raises(UnsupportedAdapterError) as refusal:
            inspect(folder)
        assert verdict in str(refusal.value)
        assert "\n" not in str(refusal.value)
        return
    facts = inspect(folder)
    assert len(facts.modules) == verdict.modules
    assert facts.ranks == (verdict.rank,)
    assert {module.scaling for module in facts.modules} == {verdict.scaling}
    assert facts.targets == verdict.targets
    assert facts.dtypes == ("float32",)
    heads = [note for note in facts.notes if note.startswith("modules_to_save: ")]
    assert heads == ([f"modules_to_save: {verdict.head} ignored, a mix has no task head"] if verdict.head else [])


@pytest.mark.parametrize("name", [name for name, verdict in VERDICTS.items() if isinstance(verdict, Usable)])
def test_spectra_of_real_adapters(name: str) -> None:
    adapter = read_adapter(CORPUS / "weights" / name)
    for found in list(spectra(adapter))[::17]:
        factors = adapter.modules[found.module]
        update = factors.scaling * factors.B.double() @ factors.A.double()
        _, S, Vt = torch.linalg.svd(update, full_matrices=False)
        values = torch.from_numpy(found.singular_values).double()
        assert torch.allclose(values, S[: factors.rank], rtol=1e-5, atol=1e-7 * float(S[0]))
        assert found.direction is not None
        direction = torch.from_numpy(found.direction).double()
        assert torch.linalg.norm(direction - Vt[0] * torch.sign(direction @ Vt[0])) < 1e-6


def test_every_config_is_read_or_refused_with_one_line() -> None:
    accepted = lora = 0
    folders = sorted((CORPUS / "configs").iterdir())
    for folder in folders:
        with pytest.raises(UnsupportedAdapterError) as refusal:
            inspect(folder)
        assert "\n" not in str(refusal.value)
        assert len(str(refusal.value)) < 400
        try:
            read_config(folder)
        except UnsupportedAdapterError:
            pass
        else:
            accepted += 1
        content = (folder / "adapter_config.json").read_bytes()
        lora += content.startswith(b"{") and json.loads(content).get("peft_type") == "LORA"
    assert len(folders) > 100
    assert accepted == lora - VARIANTS
