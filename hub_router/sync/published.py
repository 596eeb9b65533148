"""Base models by the names under which their publishers put them on the Hub, and what else they are called there.

Data, not a registry: it gives well-known names one spelling and leads copies back to their originals without asking the
Hub. A model that is not listed is taken at its word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

# (family in hub_router.sync.families, owner, names); the family is empty where its modules are not described there.
# Names are in brace notation: "a-{b,c}{,-d}" stands for a-b, a-b-d, a-c, a-c-d.
ORIGINALS = (
    ("llama", "meta-llama", "Llama-2-{7b,13b,70b}{,-chat}-hf Meta-Llama-3-{8B,70B}{,-Instruct}"),
    ("llama", "meta-llama", "Llama-3.1-{8B,70B,405B}{,-Instruct} Llama-3.2-{1B,3B}{,-Instruct} Llama-3.3-70B-Instruct"),
    ("", "meta-llama", "Llama-3.2-{11B,90B}-Vision{,-Instruct} Llama-4-{Scout-17B-16E,Maverick-17B-128E}{,-Instruct}"),
    ("llama", "codellama", "CodeLlama-{7b,13b,34b,70b}{,-Python,-Instruct}-hf"),
    ("llama", "huggyllama", "llama-{7b,13b,30b,65b}"),
    ("llama", "openlm-research", "open_llama_{3b,7b,13b} open_llama_{3b,7b}_v2"),
    ("llama", "lmsys", "vicuna-{7b,13b}-v1.{3,5}"),
    ("llama", "TinyLlama", "TinyLlama-1.1B-Chat-v1.0 TinyLlama-1.1B-intermediate-step-1431k-3T"),
    ("llama", "HuggingFaceTB", "SmolLM{,2}-{135M,360M,1.7B}{,-Instruct}"),
    ("llama", "01-ai", "Yi-{6B,34B}{,-Chat} Yi-1.5-{6B,9B,34B}{,-Chat}"),
    ("llama", "deepseek-ai", "DeepSeek-R1-Distill-Llama-{8B,70B} deepseek-llm-7b-{base,chat}"),
    ("llama", "deepseek-ai", "deepseek-coder-{1.3b,6.7b,33b}-{base,instruct}"),
    ("llama", "upstage", "SOLAR-10.7B{,-Instruct}-v1.0"),
    ("llama", "tiiuae", "Falcon3-{1B,3B,7B,10B}-{Base,Instruct}"),
    ("llama", "NousResearch", "Hermes-3-Llama-3.1-{8B,70B,405B}"),
    ("mistral", "mistralai", "Mistral-7B-v0.{1,3} Mistral-7B-Instruct-v0.{1,2,3} Mistral-Nemo-{Base,Instruct}-2407"),
    ("mistral", "mistralai", "Mistral-Small-Instruct-2409 Mistral-Large-Instruct-2407 Ministral-8B-Instruct-2410"),
    ("mistral", "mistralai", "Mistral-Small-24B-{Base,Instruct}-2501"),
    ("mistral", "HuggingFaceH4", "zephyr-7b-{alpha,beta} mistral-7b-sft-beta"),
    ("mistral", "teknium", "OpenHermes-2.5-Mistral-7B"),
    ("mistral", "NousResearch", "Hermes-2-Pro-Mistral-7B"),
    ("mixtral", "mistralai", "Mixtral-8x{7B,22B}{,-Instruct}-v0.1"),
    ("qwen", "Qwen", "Qwen-{1_8B,7B,14B,72B}{,-Chat}"),
    ("qwen2", "Qwen", "Qwen1.5-{0.5B,1.8B,4B,7B,14B,32B,72B,110B}{,-Chat} Qwen2-{0.5B,1.5B,7B,72B}{,-Instruct}"),
    ("qwen2", "Qwen", "Qwen2.5-{0.5B,1.5B,3B,7B,14B,32B,72B}{,-Instruct} Qwen2.5-Math-{1.5B,7B,72B}{,-Instruct}"),
    ("qwen2", "Qwen", "Qwen2.5-Coder-{0.5B,1.5B,3B,7B,14B,32B}{,-Instruct} QwQ-32B"),
    ("qwen2", "deepseek-ai", "DeepSeek-R1-Distill-Qwen-{1.5B,7B,14B,32B}"),
    ("qwen3", "Qwen", "Qwen3-{0.6B,1.7B,4B,8B,14B}{,-Base} Qwen3-32B Qwen3-4B-{Instruct,Thinking}-2507"),
    ("", "Qwen", "Qwen3-30B-A3B{,-Base,-Instruct-2507,-Thinking-2507} Qwen3.5-{0.8B,2B,4B,9B,27B}{,-Base}"),
    ("", "Qwen", "Qwen2-VL-{2B,7B,72B}{,-Instruct} Qwen2.5-VL-{3B,7B,32B,72B}-Instruct"),
    ("", "Qwen", "Qwen3-VL-{2B,4B,8B,32B}-{Instruct,Thinking}"),
    ("gemma", "google", "gemma-{2b,7b}{,-it} gemma-1.1-{2b,7b}-it codegemma-{2b,7b,7b-it}"),
    ("gemma2", "google", "gemma-2-{2b,9b,27b}{,-it}"),
    ("gemma3", "google", "gemma-3-270m{,-it} gemma-3-{1b,4b,12b,27b}-{pt,it}"),
    ("", "google", "gemma-3n-{E2B,E4B}{,-it} gemma-4-{E2B,E4B,31B,26B-A4B}{,-it} medgemma-4b-{pt,it}"),
    ("", "google", "medgemma-1.5-4b-it paligemma-3b-{pt,mix}-{224,448}"),
    ("phi", "microsoft", "phi-{1,1_5,2}"),
    ("phi3", "microsoft", "Phi-3-{mini,medium}-{4k,128k}-instruct Phi-3.5-mini-instruct phi-4 Phi-4-mini-instruct"),
    ("gpt2", "openai-community", "gpt2{,-medium,-large,-xl}"),
    ("gpt2", "distilbert", "distilgpt2"),
    ("gpt_neo", "EleutherAI", "gpt-neo-{125m,1.3B,2.7B}"),
    ("gpt_neox", "EleutherAI", "gpt-neox-20b pythia-{14m,31m,70m,160m,410m,1b,1.4b,2.8b,6.9b,12b}{,-deduped}"),
    ("gptj", "EleutherAI", "gpt-j-6b"),
    ("gpt_oss", "openai", "gpt-oss-{20b,120b}"),
    ("opt", "facebook", "opt-{125m,350m,1.3b,2.7b,6.7b,13b,30b,66b}"),
    ("bloom", "bigscience", "bloom{,z}{,-560m,-1b1,-1b7,-3b,-7b1}"),
    ("falcon", "tiiuae", "falcon-{7b,40b}{,-instruct} falcon-rw-{1b,7b} falcon-180B{,-chat} falcon-11B"),
    ("mamba", "tiiuae", "falcon-mamba-7b{,-instruct}"),
    ("mamba", "state-spaces", "mamba-{130m,370m,790m,1.4b,2.8b}-hf"),
    ("mpt", "mosaicml", "mpt-{7b,30b}{,-instruct,-chat}"),
    ("gpt_bigcode", "bigcode", "starcoder{,base,base-1b,base-3b,base-7b}"),
    ("starcoder2", "bigcode", "starcoder2-{3b,7b,15b}"),
    ("chatglm", "THUDM", "chatglm{,2,3}-6b glm-4-9b{,-chat}"),
    ("baichuan", "baichuan-inc", "Baichuan-7B Baichuan-13B-{Base,Chat} Baichuan2-{7B,13B}-{Base,Chat}"),
    ("internlm2", "internlm", "internlm2-{,chat-}{1_8b,7b,20b} internlm2_5-{1_8b,7b,20b}{,-chat}"),
    ("llama", "ibm-granite", "granite-3.{0,1,2,3}-{2b,8b}-{base,instruct}"),
    ("t5", "google-t5", "t5-{small,base,large,3b,11b}"),
    ("t5", "google", "{flan-t5,mt5,t5-v1_1}-{small,base,large,xl,xxl} flan-ul2"),
    ("t5", "bigscience", "mt0-{small,base,large,xl,xxl} T0{,p,pp,_3B}"),
    ("bert", "google-bert", "bert-{base,large}-{cased,uncased}{,-whole-word-masking} bert-base-{chinese,german-cased}"),
    ("bert", "google-bert", "bert-base-multilingual-{cased,uncased}"),
    ("distilbert", "distilbert", "distilbert-base-{cased,uncased,multilingual-cased}"),
    ("distilbert", "distilbert", "distilbert-base-uncased-finetuned-sst-2-english"),
    ("roberta", "distilbert", "distilroberta-base"),
    ("roberta", "FacebookAI", "roberta-{base,large,large-mnli} xlm-roberta-{base,large}"),
    ("roberta", "almanach", "camembert-base"),
    ("electra", "google", "electra-{small,base,large}-discriminator"),
    ("deberta_v2", "microsoft", "deberta-v3-{xsmall,small,base,large} deberta-v2-{xlarge,xxlarge} mdeberta-v3-base"),
    ("albert", "albert", "albert-{base,large,xlarge,xxlarge}-v{1,2}"),
    ("", "xlnet", "xlnet-{base,large}-cased"),
    ("vit", "google", "vit-{base,large}-patch16-224{,-in21k}"),
    ("esm", "facebook", "esm2_{t6_8M,t12_35M,t30_150M,t33_650M,t36_3B}_UR50D"),
    ("whisper", "openai", "whisper-{tiny,base,small,medium}{,.en} whisper-large{,-v2,-v3,-v3-turbo}"),
)

# What a repository was called before it was renamed -> what it is called now. The Hub leads from one to the other.
RENAMED = (("meta-llama/Meta-Llama-3.1-{8B,70B,405B}{,-Instruct}", "meta-llama/Llama-3.1-{8B,70B,405B}{,-Instruct}"),)

# Models of the Hub's first years had no owner; these owners took them over, and the bare name still leads there.
OWNERLESS = frozenset(
    {"openai-community", "google-bert", "distilbert", "FacebookAI", "google-t5", "albert", "almanach"}
)
OWNERLESS |= {"xlnet"}

# Copies whose names do not say which original they are of.
COPIES = {
    "unsloth/mistral-7b": "mistralai/Mistral-7B-v0.1",
    "unsloth/tinyllama": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "unsloth/tinyllama-chat": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "unsloth/zephyr-sft": "HuggingFaceH4/mistral-7b-sft-beta",
    "unsloth/solar-10.7b": "upstage/SOLAR-10.7B-v1.0",
}

# Who puts other publishers' models on the Hub (or ModelScope) under their own names, weights unchanged but for their
# precision; in lower case.
COPIERS = frozenset(
    {
        *("unsloth", "mlx-community", "thebloke", "nousresearch", "bartowski", "quantfactory", "lmstudio-community"),
        *("hugging-quants", "neuralmagic", "redhatai", "llm-research", "ai-modelscope", "modelscope"),
    }
)

# Copies that were rearranged: their modules are not those of the original, so an adapter of one does not fit the other.
REARRANGED = re.compile(r"unsloth/phi-(?:3|3\.5|4)(?:-(?:mini|medium)\b.*|$|-(?:unsloth-)?bnb.*)", re.IGNORECASE)

# ModelScope owners under the names of their accounts on the Hub.
MODELSCOPE_OWNERS = {"qwen": "Qwen", "zhipuai": "THUDM", "01ai": "01-ai", "shanghai_ai_laboratory": "internlm"}

# Spellings that people use for an original in folder names and copies -> the part of the original's name.
_SPELLINGS = (
    ("llama-3-{8b,70b}{,-instruct}", "Meta-Llama-3-{8B,70B}{,-Instruct}"),
    ("meta-llama-3.1-{8b,70b,405b}{,-instruct}", "Llama-3.1-{8B,70B,405B}{,-Instruct}"),
)


def braces(text: str) -> Iterator[str]:
    """Every name that a text in brace notation stands for.

    Args:
        text (str): such as ``opt-{125m,350m}``; braces are not nested.

    Returns:
        Iterator[str]: names in order, the last alternatives varying fastest.
    """
    head, brace, rest = text.partition("{")
    if not brace:
        yield text
        return
    inside, _, tail = rest.partition("}")
    for choice in inside.split(","):
        for end in braces(tail):
            yield f"{head}{choice}{end}"


def _listed() -> dict[str, tuple[str, str]]:
    """Lower-case id -> (id, family)."""
    return {
        f"{owner}/{name}".lower(): (f"{owner}/{name}", family)
        for family, owner, names in ORIGINALS
        for pattern in names.split()
        for name in braces(pattern)
    }


def _by_name(listed: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Lower-case name without owner -> id, in the publisher's spelling and in those that copies use."""
    found = {key.partition("/")[2]: model for key, (model, _) in listed.items()}
    for spelled, name in _SPELLINGS:
        found |= {alias: found[original.lower()] for alias, original in zip(braces(spelled), braces(name), strict=True)}
    # Few but the publishers write the ending -hf.
    return {key.removesuffix("-hf"): model for key, model in found.items()} | found


_LISTED = _listed()
_BY_NAME = _by_name(_LISTED)
_RENAMED = {
    old.lower(): new for before, after in RENAMED for old, new in zip(braces(before), braces(after), strict=True)
}
_COPIES = {copy.lower(): original for copy, original in COPIES.items()}
_BARE = {key.partition("/")[2]: model for key, (model, _) in _LISTED.items() if model.split("/")[0] in OWNERLESS}
PUBLISHERS = frozenset(key.partition("/")[0] for key in _LISTED)


def listed(model: str) -> str | None:
    """The id of a listed model in its publisher's spelling, None for all others; compared without case."""
    found = _LISTED.get(model.lower())
    return found[0] if found else None


def renamed(model: str) -> str | None:
    """What a repository that was renamed is called now, None for all others."""
    return _RENAMED.get(model.lower())


def ownerless(name: str) -> str | None:
    """The id of an old model that is named without an owner, such as ``gpt2``; None for all others."""
    return _BARE.get(name.lower())


def by_name(name: str) -> str | None:
    """The listed model of a name without owner, None where there is none."""
    return _BY_NAME.get(name.lower())


def original(copy: str) -> str | None:
    """The original of a copy whose name does not say it, None for all others."""
    return _COPIES.get(copy.lower())


def family_of(model: str) -> str:
    """Family of a listed model as :mod:`hub_router.sync.families` calls it, empty where none is known."""
    found = _LISTED.get(model.lower())
    return found[1] if found else ""
