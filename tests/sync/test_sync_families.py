"""What names claim about modules: held against transformers' own classes, lies found, and no false alarm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hub_router.errors import UnsupportedAdapterError
from hub_router.lora.facts import inspect
from hub_router.records import AdapterFacts, ModuleFacts
from hub_router.sync import published
from hub_router.sync.base_model import Statements, resolve
from hub_router.sync.families import FAMILIES, misfit

WEIGHTS = Path(__file__).resolve().parents[3] / "shared" / "corpus" / "weights"

# Family -> model types of transformers that are built like it. The others are remote code.
MODEL_TYPES = {
    "llama": "llama granite",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3 gemma3_text",
    "phi": "phi",
    "phi3": "phi3",
    "gpt2": "gpt2",
    "gpt_neo": "gpt_neo",
    "gpt_neox": "gpt_neox",
    "gptj": "gptj",
    "gpt_oss": "gpt_oss",
    "gpt_bigcode": "gpt_bigcode",
    "starcoder2": "starcoder2",
    "opt": "opt",
    "bloom": "bloom",
    "falcon": "falcon",
    "mamba": "mamba falcon_mamba",
    "mpt": "mpt",
    "t5": "t5 mt5",
    "bert": "bert",
    "roberta": "roberta xlm-roberta camembert",
    "electra": "electra",
    "esm": "esm",
    "deberta_v2": "deberta-v2",
    "distilbert": "distilbert",
    "albert": "albert",
    "vit": "vit",
    "whisper": "whisper",
}
REMOTE_CODE = {"qwen", "chatglm", "baichuan", "internlm2"}


def facts(*modules: str, base_class: str | None = None) -> AdapterFacts:
    found = tuple(ModuleFacts(name, 4, 8, 8, 2.0) for name in modules)
    return AdapterFacts("LORA", None, found, ("float32",), 64, 256, "w", base_class=base_class)


def test_every_family_is_checked_or_remote_code_and_every_listed_model_has_a_family_or_none() -> None:
    assert set(MODEL_TYPES) | REMOTE_CODE == set(FAMILIES)
    assert {family for family, _, _ in published.ORIGINALS} - {""} <= set(FAMILIES)
    names = [name for _, _, group in published.ORIGINALS for part in group.split() for name in published.braces(part)]
    assert len({name.lower() for name in names}) == len(names)


@pytest.mark.parametrize(
    ("family", "model_type"), [(family, kind) for family, kinds in MODEL_TYPES.items() for kind in kinds.split()]
)
def test_families_have_the_modules_that_transformers_builds(family: str, model_type: str) -> None:
    import torch
    from transformers import CONFIG_MAPPING, AutoModel

    sizes = {"vocab_size": 64} if model_type == "esm" else {}
    with torch.device("meta"):
        model = AutoModel.from_config(CONFIG_MAPPING[model_type](**sizes))
    # What can have a low-rank update: modules with a matrix of their own, in the list of layers.
    matrices = [
        name.split(".")
        for name, module in model.named_modules()
        if not list(module.children()) and any(each.ndim > 1 for each in module.parameters())
    ]
    numbers = [(parts, next((i for i, part in enumerate(parts) if part.isdigit()), 0)) for parts in matrices]
    places = {(parts[number - 1], parts[-1]) for parts, number in numbers if number}
    found = FAMILIES[family]
    assert places
    assert {place for place in places if not found.has(*place)} == set()
    assert any(type(model).__name__.startswith(prefix) for prefix in found.classes)


LLAMA_MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")


@pytest.mark.parametrize(
    ("model", "adapter", "fault"),
    [
        ("openai-community/gpt2", facts(*LLAMA_MODULES), "modules q_proj, down_proj do not exist in a GPT-2 model"),
        # One foreign module is enough where the name is an official one.
        ("openai-community/gpt2", facts("transformer.h.0.attn.c_attn", "transformer.h.0.attn.q_proj"), "q_proj"),
        ("meta-llama/Llama-2-7b-hf", facts("transformer.h.0.attn.c_attn"), "c_attn"),
        ("tiiuae/falcon-7b", facts("model.layers.0.self_attn.W_pack"), "W_pack"),
        ("tiiuae/falcon-7b", facts("gpt_neox.layers.0.attention.query_key_value"), "layers.N….query_key_value"),
        ("microsoft/Phi-3-mini-4k-instruct", facts(*LLAMA_MODULES), "modules q_proj do not exist in a Phi-3 model"),
        ("google/flan-t5-large", facts("transformer.h.0.attn.c_attn"), "T5"),
        ("state-spaces/mamba-130m-hf", facts(*LLAMA_MODULES), "Mamba"),
        ("mistralai/Mistral-7B-v0.1", facts(*LLAMA_MODULES, base_class="Qwen2ForCausalLM"), "class Qwen2"),
        ("someone/my-gpt2-tuned", facts(*LLAMA_MODULES), "GPT-2"),
        ("someone/llama-2-poems", facts("transformer.h.0.attn.c_attn"), "Llama"),
    ],
)
def test_names_that_lie(model: str, adapter: AdapterFacts, fault: str) -> None:
    assert fault in misfit(model, adapter)


@pytest.mark.parametrize(
    ("model", "adapter"),
    [
        ("meta-llama/Llama-2-7b-hf", facts(*LLAMA_MODULES, base_class="LlamaForSequenceClassification")),
        ("meta-llama/Llama-2-7b-hf", facts(*LLAMA_MODULES, base_class="PeftModel")),
        ("meta-llama/Llama-2-7b-hf", facts("lm_head", "score", "model.embed_tokens", *LLAMA_MODULES)),
        ("meta-llama/Llama-2-7b-hf", facts("layers.0.self_attn.q_proj")),
        ("meta-llama/Llama-2-7b-hf", facts("model.layers.0.self_attn.my_own_projection")),
        # a vision-language model around it
        ("google/gemma-3-4b-it", facts("model.language_model.layers.0.self_attn.q_proj", base_class="Gemma3Model")),
        ("google/gemma-3-4b-it", facts("vision_tower.vision_model.encoder.layers.0.mlp.fc1")),
        ("mistralai/Mistral-7B-v0.1", facts("language_model.model.layers.0.self_attn.q_proj", "vision.layers.0.wo")),
        # spellings of older releases and of remote code
        ("microsoft/phi-2", facts("transformer.h.0.mixer.Wqkv", "transformer.h.0.mlp.fc1")),
        ("microsoft/phi-2", facts("model.layers.0.self_attn.dense")),
        ("mistralai/Mixtral-8x7B-v0.1", facts("model.layers.0.block_sparse_moe.experts.0.w1")),
        ("google/vit-base-patch16-224", facts("vit.encoder.layer.0.attention.attention.query")),
        ("Qwen/Qwen-7B", facts("transformer.h.0.attn.c_attn", "transformer.h.0.mlp.w1")),
        # listed without a family, or not listed and named after something of another kind
        ("Qwen/Qwen2.5-VL-7B-Instruct", facts("visual.blocks.0.attn.qkv", *LLAMA_MODULES)),
        ("unsloth/Phi-3-mini-4k-instruct", facts(*LLAMA_MODULES, base_class="MistralForCausalLM")),
        ("unsloth/Phi-3-mini-4k-instruct", facts("model.layers.0.self_attn.qkv_proj")),
        ("someone/Phi-3-llamafied", facts("model.layers.0.self_attn.q_proj")),
        ("someone/Qwen-LLaMAfied-7B", facts("model.layers.0.self_attn.q_proj")),
        ("someone/llama-moe-3b", facts("model.layers.0.mlp.w1")),
        ("mosaicml/mosaic-bert-base", facts("bert.encoder.layer.0.attention.self.Wqkv")),
        ("someone/t5gemma-2b", facts("model.layers.0.self_attn.q_proj")),
        ("owner/unheard-of", facts("transformer.h.0.attn.c_attn")),
        ("openai-community/gpt2", facts()),
    ],
)
def test_no_false_alarm(model: str, adapter: AdapterFacts) -> None:
    assert misfit(model, adapter) == ""


@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="the corpus of real adapters is not here")
def test_no_real_adapter_is_called_a_liar() -> None:
    seen = 0
    for folder in sorted(WEIGHTS.iterdir()):
        try:
            found = inspect(folder)
        except UnsupportedAdapterError:
            continue
        base = resolve(Statements(found.base_model), found)
        stated = json.loads((folder / "adapter_config.json").read_text())
        named = stated.get("base_model_name_or_path") or stated.get("model")
        assert base.confidence == ("none" if named is None else "medium" if "mlx" in named else "high"), (folder, base)
        seen += 1
    assert seen >= 8
