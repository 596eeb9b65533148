"""Which base model statements come to: the rules one by one, real configs, and whatever else a text may hold."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub_router.records import CONFIDENCES, AdapterFacts, BaseModel, ModuleFacts
from hub_router.sync.base_model import Statements, resolve
from hub_router.sync.base_names import canonical_id, read_name
from hub_router.sync.card import Card, parse_card
from hub_router.sync.targets import is_repo_id

CORPUS = Path(__file__).resolve().parents[3] / "shared" / "corpus" / "configs"
EXPECTED = tomllib.loads((Path(__file__).parent / "corpus_bases.toml").read_text())
SHA = "902d6349" + "0" * 32


def facts(*leaves: str, layer: str = "model.layers.0.self_attn", base_class: str | None = None) -> AdapterFacts:
    modules = tuple(ModuleFacts(f"{layer}.{leaf}", 4, 8, 8, 2.0) for leaf in leaves)
    return AdapterFacts("LORA", None, modules, ("float32",), 64, 256, "w", base_class=base_class)


@pytest.mark.parametrize(
    ("text", "model", "confidence"),
    [
        ("google/flan-t5-large", "google/flan-t5-large", "high"),
        ("Someone/New-Model-7B", "Someone/New-Model-7B", "high"),
        ("QWEN/qwen2.5-7b-INSTRUCT", "Qwen/Qwen2.5-7B-Instruct", "high"),
        (" gpt2 ", "openai-community/gpt2", "high"),
        ("meta-llama/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B", "high"),
        ("https://huggingface.co/a/b-c/tree/main", "a/b-c", "high"),
        # quantised and other copies
        ("unsloth/llama-3-8b-bnb-4bit", "meta-llama/Meta-Llama-3-8B", "medium"),
        ("unsloth/Qwen3-8B-unsloth-bnb-4bit", "Qwen/Qwen3-8B", "medium"),
        ("unsloth/mistral-7b-bnb-4bit", "mistralai/Mistral-7B-v0.1", "medium"),
        ("unsloth/gemma-2-9b", "google/gemma-2-9b", "medium"),
        ("unsloth/Something-New-bnb-4bit", "unsloth/Something-New", "medium"),
        ("unsloth/Phi-3-mini-4k-instruct", "unsloth/Phi-3-mini-4k-instruct", "high"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-7B-Instruct", "medium"),
        ("Qwen/Qwen99-7B-AWQ", "Qwen/Qwen99-7B", "medium"),
        ("TheBloke/Llama-2-7B-Chat-GPTQ", "meta-llama/Llama-2-7b-chat-hf", "medium"),
        ("TheBloke/Mistral-7B-v0.1-GGUF", "mistralai/Mistral-7B-v0.1", "medium"),
        ("mlx-community/quantized-gemma-2b", "google/gemma-2b", "medium"),
        ("mlx-community/Mistral-7B-v0.1-bf16", "mistralai/Mistral-7B-v0.1", "medium"),
        ("RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16", "meta-llama/Llama-3.1-8B-Instruct", "medium"),
        ("NousResearch/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf", "medium"),
        ("TheBloke/Unheard-Of-7B-AWQ", "TheBloke/Unheard-Of-7B-AWQ", "high"),
        ("someone/Mistral-7B-v0.1", "someone/Mistral-7B-v0.1", "high"),
        ("google/gemma-3-4b-it-qat-4bit", "google/gemma-3-4b-it-qat-4bit", "high"),
        # caches
        (f"/x/hub/models--meta-llama--Llama-2-7b-chat-hf/snapshots/{SHA}", "meta-llama/Llama-2-7b-chat-hf", "medium"),
        ("C:\\hub\\models--a--b-c\\snapshots\\main", "a/b-c", "medium"),
        (f"/x/models--unsloth--llama-3-8b-bnb-4bit/snapshots/{SHA}/", "meta-llama/Meta-Llama-3-8B", "medium"),
        ("/x/models--gpt2/snapshots/main", "openai-community/gpt2", "medium"),
        ("/x/models--models--final/snapshots/main", "models/final", "medium"),
        ("./models/qwen/Qwen2___5-0___5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", "medium"),
        ("/root/.cache/modelscope/hub/models/Qwen/Qwen2___5-7B", "Qwen/Qwen2.5-7B", "medium"),
        ("/root/.cache/modelscope/hub/LLM-Research/Meta-Llama-3___1-8B", "meta-llama/Llama-3.1-8B", "medium"),
        ("/root/.cache/modelscope/hub/AI-ModelScope/gemma-2b", "google/gemma-2b", "medium"),
        ("/root/.cache/modelscope/hub/someone/Model-1___5", "someone/Model-1.5", "low"),
        ("/root/.cache/modelscope/hub/qwen/Qwen2___5-7B/checkpoint-5", None, "none"),
        # paths
        ("/data/Qwen/Qwen1.5-0.5B-Chat", "Qwen/Qwen1.5-0.5B-Chat", "medium"),
        ("/data/Mistral-7B-Instruct-v0.2", "mistralai/Mistral-7B-Instruct-v0.2", "low"),
        ("/data/llama-2-7b-chat/", "meta-llama/Llama-2-7b-chat-hf", "low"),
        ("phi-2", "microsoft/phi-2", "low"),
        ("models/phi-2", "microsoft/phi-2", "low"),
        ("ann/checkpoint-500", "ann/checkpoint-500", "low"),
        ("models/checkpoint-500", None, "none"),
        ("output/final", None, "none"),
        ("results/llama", None, "none"),
        ("outputs/Qwen2.5-7B/checkpoint-500", None, "none"),
        ("./x", None, "none"),
        ("../x", None, "none"),
        ("model", None, "none"),
        # nothing
        ("None", None, "none"),
        ("base_model", None, "none"),
        ("path/to/model", None, "none"),
        ("/path/to/Llama-2-7b-hf", None, "none"),
        ("<base>/x", None, "none"),
        ("${BASE}/Llama-2-7b-hf", None, "none"),
        ("your-username/your-model", None, "none"),
        ("", None, "none"),
    ],
)
def test_one_text(text: str, model: str | None, confidence: str) -> None:
    found = read_name(text)
    assert (found.id, found.confidence) == (model, confidence), found.fact


def test_commit_in_a_cache_path_is_that_of_the_model_not_of_its_copy() -> None:
    assert read_name(f"/x/models--a--b/snapshots/{SHA}").revision == SHA
    assert read_name("/x/models--a--b/snapshots/main").revision is None
    assert read_name(f"/x/models--unsloth--llama-3-8b-bnb-4bit/snapshots/{SHA}").revision is None


def test_names_that_a_user_types() -> None:
    assert canonical_id("gpt2") == "openai-community/gpt2"
    assert canonical_id("unsloth/Qwen3-8B-bnb-4bit") == "Qwen/Qwen3-8B"
    for kept in ("owner/base", "/data/Mistral-7B-v0.1", "phi-2", "models/x", ""):
        assert canonical_id(kept) == kept


LLAMA, QWEN = "meta-llama/Llama-2-7b-hf", "Qwen/Qwen2.5-7B"


@pytest.mark.parametrize(
    ("said", "model", "confidence", "evidence"),
    [
        (Statements(LLAMA), LLAMA, "high", "is a Hub id"),
        (Statements(LLAMA, (LLAMA,)), LLAMA, "high", f"card: base_model names {LLAMA}"),
        (Statements(LLAMA, ("NousResearch/Llama-2-7b-hf",)), LLAMA, "high", "is a copy of"),
        (Statements(LLAMA, (LLAMA, QWEN)), LLAMA, "high", f"card: base_model names {LLAMA}"),
        (Statements(LLAMA, (QWEN,)), LLAMA, "low", f"card: base_model names {QWEN}"),
        (Statements(LLAMA, (), (f"base_model:adapter:{QWEN}",)), LLAMA, "low", f"tag base_model:adapter:{QWEN}"),
        (Statements(LLAMA, ("/data/llama",), ("base_model:adapter:/data/llama",)), LLAMA, "high", "is a Hub id"),
        (Statements(LLAMA, manifest=QWEN), LLAMA, "high", f"manifest names {QWEN}"),
        (Statements(f"/x/models--a--b/snapshots/{SHA}", ("a/b",)), "a/b", "high", "is a Hub cache path"),
        (Statements("/data/mine", (LLAMA,)), LLAMA, "medium", "names no known model"),
        (Statements("/data/Llama-2-7b-hf", (LLAMA,)), LLAMA, "medium", "guessed from its last part"),
        (Statements("/data/Llama-2-7b-hf", (QWEN,)), QWEN, "low", f"card: base_model names {QWEN}"),
        (Statements(None, (LLAMA,)), LLAMA, "medium", "config names no base model"),
        (Statements(" ", (), (f"base_model:quantized:{LLAMA}",)), LLAMA, "medium", "tag base_model:quantized"),
        (Statements(None, (), (f"base_model:{LLAMA}",)), LLAMA, "medium", f"tag base_model:{LLAMA}"),
        (Statements(None, (QWEN, LLAMA)), QWEN, "low", f"card: base_model names {LLAMA}"),
        (Statements(None, ("",), ("base_model:adapter:",), LLAMA), LLAMA, "medium", "manifest names"),
        (Statements("/data/x", (), (), LLAMA), LLAMA, "medium", "manifest names"),
        (Statements("./llama"), None, "none", "names no known model"),
        (Statements("None"), None, "none", "placeholder"),
        (Statements(), None, "none", "config names no base model"),
    ],
)
def test_statements_are_weighed(said: Statements, model: str | None, confidence: str, evidence: str) -> None:
    found = resolve(said)
    assert (found.id, found.confidence) == (model, confidence), found.evidence
    assert evidence in "\n".join(found.evidence)


def test_tensors_that_fit_or_do_not() -> None:
    llama = facts("q_proj", "v_proj", base_class="LlamaForCausalLM")
    fitting = resolve(Statements(LLAMA), llama, lambda _, model: "" if model == LLAMA else None)
    assert fitting.confidence == "certain"
    assert fitting.evidence[1:] == (
        "auto_mapping says LlamaForCausalLM",
        f"its tensors fit the architecture of {LLAMA}",
    )
    misfit = resolve(Statements(LLAMA), llama, lambda _, __: "q_proj: got 8 x 8")
    assert (misfit.id, misfit.confidence) == (LLAMA, "contradicted")
    assert misfit.evidence[-1] == f"not {LLAMA}: q_proj: got 8 x 8"
    assert resolve(Statements(LLAMA), llama, lambda _, __: None).confidence == "high"
    # A folder's name that fits the tensors is still only a folder's name: so do all models of that size.
    assert resolve(Statements("/data/Llama-2-7b-hf"), llama, lambda _, __: "").confidence == "medium"


def test_model_at_hand_outweighs_what_names_claim() -> None:
    odd = facts("q_proj", "v_proj")
    assert resolve(Statements("gpt2"), odd).confidence == "contradicted"
    assert resolve(Statements("gpt2"), odd, lambda _, __: "").confidence == "certain"


def test_guess_that_the_tensors_refute_is_dropped() -> None:
    found = resolve(Statements("/data/gpt2"), facts("q_proj", "v_proj"))
    assert (found.id, found.confidence) == (None, "none")
    assert "q_proj, v_proj do not exist in a GPT-2 model" in found.evidence[-1]


def test_of_two_names_the_one_that_fits_the_tensors_is_taken() -> None:
    baichuan = facts("W_pack", "o_proj")
    said = Statements("tiiuae/falcon-7b", ("baichuan-inc/Baichuan2-7B-Chat",))
    found = resolve(said, baichuan)
    assert (found.id, found.confidence) == ("baichuan-inc/Baichuan2-7B-Chat", "low")
    assert "not tiiuae/falcon-7b: modules W_pack, o_proj do not exist" in found.evidence[-1]
    fits = {"tiiuae/falcon-7b": "another shape", "baichuan-inc/Baichuan2-7B-Chat": ""}
    assert resolve(said, baichuan, lambda _, model: fits[model]).confidence == "medium"


def test_folder_of_this_machine_is_the_base_of_a_local_adapter_only(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    said = Statements(str(tmp_path))
    assert resolve(said, local=True) == BaseModel(
        str(tmp_path),
        "medium",
        (f"config: base_model_name_or_path {str(tmp_path)!r} is a folder of this machine that holds a model",),
    )
    assert resolve(said).id is None
    assert resolve(said, facts("q_proj"), lambda _, __: "", local=True).confidence == "certain"
    assert resolve(Statements("\0"), local=True).id is None
    assert resolve(Statements("/" + "x" * 5000), local=True).id is None


@pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus of real configs is not here")
@pytest.mark.parametrize("name", EXPECTED)
def test_real_configs(name: str) -> None:
    expected = EXPECTED[name]
    readme = CORPUS / name / "README.md"
    card = parse_card(readme.read_text(encoding="utf-8", errors="replace")) if readme.is_file() else Card()
    found = resolve(Statements(expected["stated"] or None, card.base_models, card.base_tags))
    known = (found.id or "").lower()
    right = {model.lower() for model in (expected["expected"], *expected.get("also", ()), expected.get("card", ""))}
    assert known not in {model.lower() for model in expected.get("never", ())}
    if known == expected.get("guess", "-").lower():
        assert found.confidence == "low"
    else:
        assert known in right, found
    if expected["kind"] == "id":
        assert found.confidence == ("medium" if f"is a copy of {found.id}" in found.evidence[0] else "high")
    elif found.id:
        assert found.confidence in ("medium", "high" if expected["kind"] == "quantised" else "low")
    assert found.revision == expected.get("revision")


WORDS = "models qwen Qwen2___5-7B models--a--b snapshots unsloth gpt2-bnb-4bit gguf 4bit modelscope hub GPTQ a None"
PARTS = st.sampled_from([*WORDS.split(), SHA, "..", ".", "", "C:", "https:", "huggingface.co", "checkpoint-1", "-"])
PATHS = st.builds(lambda parts, sep: sep.join(parts), st.lists(PARTS, max_size=6), st.sampled_from(["/", "\\", "--"]))
TEXTS = st.one_of(st.text(), PATHS)


@given(TEXTS)
def test_any_text_gives_a_hub_id_or_none_and_always_the_same(text: str) -> None:
    found = read_name(text)
    assert found == read_name(text)
    assert found.id is None or is_repo_id(found.id)
    assert (found.id is None) == (found.confidence == "none")


@given(TEXTS, st.lists(TEXTS, max_size=3), st.lists(TEXTS, max_size=3), TEXTS)
def test_what_the_catalog_keeps_resolves_to_the_same(
    config: str, cards: list[str], tags: list[str], manifest: str
) -> None:
    texts = tuple(text for text in cards if text.isprintable())
    named = tuple(f"base_model:adapter:{tag}" for tag in tags if tag.isprintable())
    said = Statements(config, texts, named, manifest if manifest.isprintable() else None)
    found = resolve(said)
    assert found.confidence in CONFIDENCES
    assert found.evidence
    again = resolve(Statements.of_stored(config, said.stored))
    assert (again.id, again.confidence, again.revision) == (found.id, found.confidence, found.revision)
