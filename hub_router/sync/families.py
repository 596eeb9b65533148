"""What a model's name claims about its modules, and whether an adapter's modules can belong to such a model.

An adapter holds tensors for modules that were there when it was trained. A GPT-2 has no ``q_proj``, so an adapter with
``q_proj`` that names GPT-2 as its base model was trained on something else. Only what is certain counts: modules of
kinds that are not described here, heads, embeddings and the towers of other modalities say nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from hub_router.records import AdapterFacts
from hub_router.sync.published import family_of

_OTHER_TOWERS = re.compile(
    r"vis(?:ion|ual)|image|vit\b|audio|speech|projector|projection|connector|perceiver|merger|resampler|adapter"
)
_CLASS = re.compile(r"([A-Za-z0-9_]+?)(?:LMHead|PreTrained|For[A-Z]|Model$|DoubleHeads).*")
_SHOWN = 6


@dataclass(frozen=True)
class Family:
    """One architecture as transformers builds it, older releases and the remote code before them included.

    Args:
        label (str): what to call it in a message.
        leaves (frozenset[str]): last parts of the names of the modules in its layers.
        containers (frozenset[str]): names of the list of layers, as in ``transformer.h.0``.
        classes (frozenset[str]): what its classes begin with, as in ``LlamaForCausalLM``.
        name (re.Pattern | None): names of repositories that claim to be such a model; None to go by listed ids alone.
    """

    label: str
    leaves: frozenset[str]
    containers: frozenset[str]
    classes: frozenset[str]
    name: re.Pattern[str] | None

    def has(self, container: str, leaf: str) -> bool:
        """Whether its layers hold such a module."""
        return container in self.containers and leaf in self.leaves


def _family(label: str, leaves: str, containers: str, classes: str, name: str = "") -> Family:
    return Family(
        label,
        frozenset(leaves.split()),
        frozenset(containers.split()),
        frozenset(classes.split()),
        re.compile(rf"(?<![a-z]){name}", re.IGNORECASE) if name else None,
    )


_GATED = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
_FUSED = "query_key_value dense dense_h_to_4h dense_4h_to_h"
_ENCODER = "query key value dense"
_SPLIT = "q_proj k_proj v_proj out_proj"

# Keys as in hub_router.sync.published. A GLM or Qwen of the first generation is remote code, so it has no class here.
FAMILIES: Mapping[str, Family] = {
    "llama": _family("Llama", _GATED, "layers", "Llama Granite", r"(?:code-?)?llama(?!va)"),
    "mistral": _family("Mistral", _GATED, "layers", "Mistral", r"mistral"),
    "mixtral": _family("Mixtral", f"{_GATED} gate w1 w2 w3 experts", "layers", "Mixtral", r"mixtral"),
    "qwen": _family("Qwen (first generation)", "c_attn c_proj w1 w2", "h", "QWen"),
    "qwen2": _family("Qwen2", _GATED, "layers", "Qwen2", r"qwen(?:1\.5|2)"),
    "qwen3": _family("Qwen3", _GATED, "layers", "Qwen3", r"qwen3"),
    "gemma": _family("Gemma", _GATED, "layers", "Gemma", r"gemma"),
    "gemma2": _family("Gemma 2", _GATED, "layers", "Gemma2", r"gemma-?2"),
    "gemma3": _family("Gemma 3", f"{_GATED} out_proj fc1 fc2", "layers", "Gemma3", r"gemma-?3"),
    "phi": _family("Phi", "q_proj k_proj v_proj dense fc1 fc2 Wqkv out_proj", "layers h", "Phi", r"phi-?(?:1|2)"),
    "phi3": _family("Phi-3", "qkv_proj o_proj gate_up_proj down_proj", "layers", "Phi3", r"phi-?(?:3|4)"),
    "gpt2": _family("GPT-2", "c_attn c_proj c_fc q_attn", "h", "GPT2", r"(?:distil)?gpt-?2"),
    "gpt_neo": _family("GPT-Neo", f"{_SPLIT} c_fc c_proj", "h", "GPTNeo", r"gpt-?neo(?!x)"),
    "gpt_neox": _family("GPT-NeoX", _FUSED, "layers", "GPTNeoX", r"(?:gpt-?neox|pythia)"),
    "gptj": _family("GPT-J", f"{_SPLIT} fc_in fc_out", "h", "GPTJ", r"gpt-?j(?![a-z])"),
    "gpt_oss": _family("gpt-oss", "q_proj k_proj v_proj o_proj router experts", "layers", "GptOss"),
    "gpt_bigcode": _family("GPTBigCode", "c_attn c_proj c_fc q_attn kv_attn", "h", "GPTBigCode"),
    "starcoder2": _family("StarCoder2", "q_proj k_proj v_proj o_proj c_fc c_proj", "layers", "Starcoder2"),
    "opt": _family("OPT", f"{_SPLIT} fc1 fc2", "layers", "OPT", r"opt-\d"),
    "bloom": _family("BLOOM", _FUSED, "h", "Bloom", r"bloom"),
    "falcon": _family("Falcon", _FUSED, "h", "Falcon", r"falcon-?(?:7b|40b|180b|11b|rw)"),
    "mamba": _family("Mamba", "in_proj x_proj dt_proj out_proj conv1d", "layers", "Mamba FalconMamba", r"mamba-\d+m"),
    "mpt": _family("MPT", "Wqkv out_proj up_proj down_proj", "blocks", "Mpt", r"mpt-\d"),
    "t5": _family("T5", "q k v o wi wi_0 wi_1 wo relative_attention_bias", "block", "T5 MT5 UMT5", r"(?:flan-?|m)?t5"),
    "bert": _family("BERT", _ENCODER, "layer", "Bert", r"bert-(?:base|large)"),
    "roberta": _family("RoBERTa", _ENCODER, "layer", "Roberta XLMRoberta Camembert", r"(?:xlm-)?roberta-"),
    "electra": _family("ELECTRA", _ENCODER, "layer", "Electra"),
    "esm": _family("ESM", _ENCODER, "layer layers", "Esm"),
    "deberta_v2": _family("DeBERTa-v2", "query_proj key_proj value_proj dense", "layer", "DebertaV2", r"deberta-v[23]"),
    "distilbert": _family("DistilBERT", "q_lin k_lin v_lin out_lin lin1 lin2", "layer", "DistilBert", r"distilbert"),
    "albert": _family("ALBERT", f"{_ENCODER} ffn ffn_output", "albert_layer_groups albert_layers", "Albert"),
    "vit": _family("ViT", f"{_ENCODER} q_proj k_proj v_proj o_proj fc1 fc2", "layer layers", "ViT"),
    "whisper": _family("Whisper", f"{_SPLIT} fc1 fc2", "layers", "Whisper", r"whisper-"),
    "chatglm": _family("ChatGLM", _FUSED, "layers", "ChatGLM", r"chatglm"),
    "baichuan": _family("Baichuan", "W_pack o_proj gate_proj up_proj down_proj", "layers", "Baichuan BaiChuan"),
    "internlm2": _family("InternLM2", "wqkv wo w1 w2 w3", "layers", "InternLM2"),
}

_LEAVES = frozenset().union(*(family.leaves for family in FAMILIES.values()))
_CLASSES = frozenset().union(*(family.classes for family in FAMILIES.values()))


@dataclass(frozen=True)
class _Layers:
    """The modules of an adapter that say what kind of model it was trained on."""

    facts: AdapterFacts

    @cached_property
    def places(self) -> Sequence[tuple[str, str]]:
        """(container, leaf) of the modules of layers that some family has, each once."""
        found = [_place(module.name) for module in self.facts.modules]
        return list(dict.fromkeys(place for place in found if place and place[1] in _LEAVES))

    @property
    def base(self) -> str:
        """What the class of its base model begins with, empty where that is no class of a family here."""
        match = _CLASS.fullmatch(self.facts.base_class or "")
        return match[1] if match and match[1] in _CLASSES else ""


def misfit(model: str, facts: AdapterFacts) -> str:
    """Why an adapter cannot belong to a model, as far as the model's name and the modules' names tell.

    A listed model (:mod:`hub_router.sync.published`) is what it is called, so a single module that it lacks is enough.
    Any other name that holds a family's is only contradicted by an adapter of which nothing fits: neither a module's
    name nor what its layers are called.

    Args:
        model (str): Hub id.
        facts (AdapterFacts): the adapter's modules and, where known, the class of its base model.

    Returns:
        str: one line; empty where everything can belong to it, or nothing is known.
    """
    layers = _Layers(facts)
    known = FAMILIES.get(family_of(model))
    if known is not None:
        return _against(known, layers)
    claimed = [each for each in FAMILIES.values() if each.name and each.name.search(model.rpartition("/")[2])]
    foreign = bool(layers.places) and not any(
        leaf in family.leaves or container in family.containers
        for container, leaf in layers.places
        for family in claimed
    )
    return _modules_line(claimed[0], layers.places) if claimed and foreign else ""


def _against(family: Family, layers: _Layers) -> str:
    wrong = [place for place in layers.places if not family.has(*place)]
    if wrong:
        return _modules_line(family, wrong)
    if layers.base and layers.base not in family.classes:
        return f"it was trained on a model of class {layers.base}..., which is no {family.label}"
    return ""


def _modules_line(family: Family, wrong: Sequence[tuple[str, str]]) -> str:
    own = f"{', '.join(sorted(family.leaves)[:_SHOWN])} in {' or '.join(sorted(family.containers))}"
    missing = list(dict.fromkeys(leaf for _, leaf in wrong if leaf not in family.leaves))
    if missing:
        return f"modules {', '.join(missing[:_SHOWN])} do not exist in a {family.label} model ({own})"
    placed = list(dict.fromkeys(f"{container}.N….{leaf}" for container, leaf in wrong))
    return f"modules {', '.join(placed[:_SHOWN])} do not exist in a {family.label} model ({own})"


def _place(module: str) -> tuple[str, str] | None:
    """The name of the list that a module's layer is in, and the module's last part; None outside of text layers."""
    parts = module.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), 0)
    if number == 0 or any(_OTHER_TOWERS.search(part) for part in parts[:-1]):
        return None
    return parts[number - 1], parts[-1]
