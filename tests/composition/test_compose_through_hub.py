"""Through the catalog with what plain causal LoRA is not: an encoder-decoder base, DoRA, an embedding, a pickle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compose_models import make_tokenizer
from compose_zoo import ARCHITECTURES, logits, lora, peft_adapter
from safetensors.torch import load_file

from hub_router import Hub, compose
from hub_router.errors import MethodError

pytestmark = pytest.mark.filterwarnings("ignore")
T5 = ARCHITECTURES["t5"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "t5"
    T5.make(0).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("adapters")
    configs = {
        "plain": lora(["q", "v"]),
        "dora": lora(["q", "wo"], use_dora=True),
        "tokens": lora(["embed_tokens", "q"]),
    }
    folders = {}
    for seed, (name, config) in enumerate(configs.items()):
        folders[name] = peft_adapter(T5.make, top / name, seed, config)
        fields = json.loads((folders[name] / "adapter_config.json").read_text())
        (folders[name] / "adapter_config.json").write_text(json.dumps(fields | {"base_model_name_or_path": str(base)}))
        row = json.dumps({"input": f"a prompt of {name}", "output": "an answer"})
        (folders[name] / "test.jsonl").write_text(row + "\n")
    weights = folders["plain"] / "adapter_model.safetensors"
    torch.save(load_file(weights), folders["plain"] / "adapter_model.bin")
    weights.unlink()
    return folders


def test_sync_index_compose_generate_eval(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    with Hub(tmp_path / "home") as hub:
        assert hub.sync(*adapters.values()).counts["added"] == 3
        summary = hub.index("offline")
        assert (summary.spectra, summary.failed) == (3, ())
        routed = hub.compose("mix", {name: str(folder) for name, folder in adapters.items()}, "arrow", top_k=2)
        alone = compose(T5.make(0), adapters, "arrow", top_k=2)
        assert torch.allclose(logits(routed.model.cpu()), logits(alone.model), atol=1e-4)
        assert isinstance(routed.generate("a prompt", max_new_tokens=4), str)
        table = hub.evaluate("mix", ["base", "own", "spectr"])
        assert [row.task for row in table.rows] == list(adapters)
        with pytest.raises(MethodError, match="DoRA magnitudes and biases"):
            hub.define("factors", [str(folder) for folder in adapters.values()], "merged")
