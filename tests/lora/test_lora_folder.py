"""Adapters in memory, written as PEFT writes them and read again, by PEFT too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from hub_router import compose
from hub_router.errors import UnsupportedAdapterError
from hub_router.lora.adapter import LoraAdapter, LoraFactors
from hub_router.lora.folder import write_adapter
from hub_router.lora.reader import read_adapter


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, num_key_value_heads=4, **sizes)).eval()


def factors(rank: int, scaling: float, d_in: int = 32, d_out: int = 32) -> LoraFactors:
    generator = torch.Generator().manual_seed(rank)
    return LoraFactors(
        torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator), scaling
    )


MODULES = {
    "model.layers.0.self_attn.q_proj": factors(4, 2.0),
    "model.layers.1.self_attn.q_proj": factors(4, 2.0),
    "model.layers.1.self_attn.v_proj": factors(2, 0.25),
    "model.layers.0.mlp.down_proj": factors(3, 1.5, d_in=48),
}


def test_peft_and_the_reader_get_what_was_written(tmp_path: Path) -> None:
    written = LoraAdapter("a", None, None, MODULES, "")
    write_adapter(tmp_path / "a", written, "some/base", "CAUSAL_LM")
    found = read_adapter(tmp_path / "a", "a")
    assert found.base_model == "some/base"
    assert found.modules.keys() == MODULES.keys()
    for name, each in MODULES.items():
        assert torch.equal(found.modules[name].A, each.A)
        assert torch.equal(found.modules[name].B, each.B)
        assert found.modules[name].scaling == each.scaling
    ids = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(llama(), tmp_path / "a").eval()(ids).logits
        ours = compose(llama(), {"a": tmp_path / "a"}, "single", adapter="a")(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_the_same_bytes_again(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_adapter(tmp_path / name, LoraAdapter("a", None, None, MODULES, ""), None)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_more_than_factors_is_refused(tmp_path: Path) -> None:
    plain = factors(2, 1.0)
    dora = LoraFactors(plain.A, plain.B, 1.0, magnitude=torch.ones(32))
    with pytest.raises(UnsupportedAdapterError, match=r"'a' is more than B A x of linear maps, as in x\.q_proj"):
        write_adapter(tmp_path / "a", LoraAdapter("a", None, None, {"x.q_proj": dora}, ""), None)
    assert not (tmp_path / "a").exists()
