"""Conversion of other PEFT types to LoRA, with real PEFT adapters; the truth is PEFT's own forward, and a dense SVD."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lora_files import PREFIX, tiny_llama
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from hub_router import compose
from hub_router.errors import SettingsError, UnsupportedAdapterError
from hub_router.lora.conversion_record import RECORD_FILE, ConversionRecord, ConvertedModule, read_record
from hub_router.lora.convert import convert, is_current, source_hash
from hub_router.lora.convertible import BEYOND, COMPOSED, CONVERTIBLE, check_rank, foreign_type
from hub_router.lora.facts import inspect

TARGETS = ["q_proj", "v_proj", "down_proj"]
FULL = 24  # the smaller width of the largest module
# Type -> (config class, settings); the tensors of the first half tell the modules' widths.
TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "LOHA": ("LoHaConfig", {"r": 2, "alpha": 3, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"down_proj": 5}}),
    "LOKR": ("LoKrConfig", {"r": 2, "alpha": 3}),
    "LOKR in four factors": ("LoKrConfig", {"r": 1, "alpha": 3, "decompose_both": True}),
    "LOKR whole": ("LoKrConfig", {"r": 10_000, "alpha": 10_000}),
    "C3A": ("C3AConfig", {"block_size": 4, "block_size_pattern": {"v_proj": 6}}),
    "DELORA": ("DeloraConfig", {"r": 3}),
    "GRALORA": ("GraloraConfig", {"r": 4, "alpha": 6, "gralora_k": 2, "hybrid_r": 1}),
    "VBLORA": ("VBLoRAConfig", {"r": 3, "num_vectors": 9, "vector_length": 4}),
    "FOURIERFT": ("FourierFTConfig", {"n_frequency": 30, "n_frequency_pattern": {"v_proj": 20}}),
    "MISS": ("MissConfig", {"r": 5}),
    "MISS mini": ("MissConfig", {"r": 4, "mini_r": 6, "init_weights": "mini"}),
    "RANDLORA": ("RandLoraConfig", {"r": 3}),
    "VERA": ("VeraConfig", {"r": 5}),
    "VERA without projections": ("VeraConfig", {"r": 5, "save_projection": False}),
    "WAVEFT": ("WaveFTConfig", {"n_frequency": 30, "proportional_parameters": True}),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "IA3": ("IA3Config", {"feedforward_modules": ["down_proj"]}, "unsupported: IA3, PEFT has no conversion"),
    "HIRA": ("HiraConfig", {"r": 2}, "unsupported: HIRA, PEFT has no conversion"),
    "OFT": ("OFTConfig", {"r": 0, "oft_block_size": 4}, "unsupported: OFT, PEFT has no conversion"),
    "PSOFT": ("PsoftConfig", {"r": 2}, "unsupported: PSOFT, .* needs the weights of the base"),
    "TINYLORA": ("TinyLoraConfig", {}, "unsupported: TINYLORA, .* needs the weights of the base"),
    "UNILORA": ("UniLoraConfig", {"r": 2, "theta_d_length": 64}, "unsupported: UNILORA, .* needs the base model"),
    "MISS bat": ("MissConfig", {"r": 4, "init_weights": "bat"}, r"unsupported: MISS \(bat\), .* needs the weights"),
    "VERA": ("VeraConfig", {"r": 5}, "unsupported: VERA, its tensors do not tell the widths"),
}


def save(folder: Path, kind: str, settings: dict[str, Any], safe: bool = True, **more: Any) -> Any:
    """A PEFT model of another type with random factors, saved to ``folder``."""
    config = getattr(peft, kind)(**{"target_modules": TARGETS, **settings, **more})
    model = get_peft_model(tiny_llama(), config).eval()
    generator = torch.Generator().manual_seed(7)
    prefix = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].prefix
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{prefix}" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    model.save_pretrained(folder, safe_serialization=safe)
    return model


def base_widths() -> dict[str, tuple[int, int]]:
    return {
        name: (module.out_features, module.in_features)
        for name, module in tiny_llama().named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(3, 15).reshape(2, 6)).logits
    return found


def composed(folder: Path) -> torch.Tensor:
    return logits(compose(tiny_llama(), {"only": folder}, method="single", adapter="only"))


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Error of the adapter's effect on the logits, relative to that effect."""
    return float((got - expected).norm() / (expected - logits(tiny_llama())).norm())


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """B A of every module of a LoRA folder whose alpha is its rank."""
    stored = load_file(folder / "adapter_model.safetensors")
    stems = [name.removesuffix(".lora_A.weight") for name in stored if name.endswith(".lora_A.weight")]
    return {
        stem.removeprefix(PREFIX): stored[f"{stem}.lora_B.weight"].double() @ stored[f"{stem}.lora_A.weight"].double()
        for stem in stems
    }


def dense_loha(folder: Path) -> dict[str, torch.Tensor]:
    """Update of a LoHa adapter (FedPara, https://arxiv.org/abs/2108.06098): alpha/r (w1_a w1_b) * (w2_a w2_b)."""
    config = json.loads((folder / "adapter_config.json").read_text())
    stored = {name: tensor.double() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    found = {}
    for name in (name for name in stored if name.endswith("hada_w1_a")):
        stem = name.removesuffix(".hada_w1_a")
        leaf = stem.rpartition(".")[2]
        alpha = config["alpha_pattern"].get(leaf, config["alpha"])
        r = config["rank_pattern"].get(leaf, config["r"])
        pair = [stored[f"{stem}.hada_{w}_a"] @ stored[f"{stem}.hada_{w}_b"] for w in ("w1", "w2")]
        found[stem.removeprefix(PREFIX)] = alpha / r * pair[0] * pair[1]
    return found


@pytest.mark.parametrize("name", TYPES)
def test_composed_at_full_rank_it_equals_peft(name: str, tmp_path: Path) -> None:
    kind, settings = TYPES[name]
    model = save(tmp_path / "a", kind, settings)
    record = convert(tmp_path / "a", tmp_path / "b", FULL, base=base_widths())
    assert record.peft_type == name.split()[0] == foreign_type(tmp_path / "a")
    assert set(record.modules) == {module for module in base_widths() if module.rpartition(".")[2] in TARGETS}
    assert all(module.error < 1e-5 for module in record.modules.values())
    assert relative(composed(tmp_path / "b"), logits(model)) < 1e-4
    assert inspect(tmp_path / "b").peft_type == "LORA"


@pytest.mark.parametrize("name", ["LOHA", "LOKR", "VBLORA", "VERA"])
def test_peft_loads_the_result_too(name: str, tmp_path: Path) -> None:
    """A share of the energy gives ranks that differ, so that PEFT has to follow the patterns."""
    model = save(tmp_path / "a", *TYPES[name])
    convert(tmp_path / "a", tmp_path / "b", 0.999999, base=base_widths())
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "b").eval()
    assert relative(logits(loaded), logits(model)) < 0.01
    torch.testing.assert_close(logits(loaded), composed(tmp_path / "b"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 0.5, 0.97])
def test_recorded_error_is_that_of_a_dense_svd(rank: int | float, tmp_path: Path) -> None:
    """Eckart and Young: no factors of that rank come closer than the singular values cut off."""
    save(tmp_path / "a", *TYPES["LOHA"])
    record = convert(tmp_path / "a", tmp_path / "b", rank)
    expected, got = dense_loha(tmp_path / "a"), updates(tmp_path / "b")
    assert set(record.modules) == set(expected) == set(got)
    for name, module in record.modules.items():
        energy = torch.linalg.svdvals(expected[name]) ** 2
        if isinstance(rank, float):
            share = energy.cumsum(0) / energy.sum()
            assert module.rank == int((share < rank).sum()) + 1
        else:
            assert module.rank == rank
        optimal = float((energy[module.rank :].sum() / energy.sum()).sqrt())
        measured = float((expected[name] - got[name]).norm() / expected[name].norm())
        assert module.error == pytest.approx(optimal, abs=1e-5)
        assert module.error == pytest.approx(measured, abs=1e-5)
    errors = sorted(module.error for module in record.modules.values())
    assert record.modules[record.worst].error == errors[-1]
    assert record.median == pytest.approx((errors[2] + errors[3]) / 2)
    assert f"{errors[-1]:.2g} ({record.worst})" in record.note


def test_a_rank_above_a_modules_width_becomes_that_width(tmp_path: Path) -> None:
    save(tmp_path / "a", *TYPES["LOHA"])
    record = convert(tmp_path / "a", tmp_path / "b", 1000)
    assert {name.rpartition(".")[2]: module.rank for name, module in record.modules.items()} == {
        "q_proj": 24, "v_proj": 12, "down_proj": 24
    }  # fmt: skip
    assert record.rank == 1000
    assert "at ranks 12 to 24:" in record.note


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_refused_by_type(name: str, tmp_path: Path) -> None:
    kind, settings, reason = REFUSED[name]
    save(tmp_path / "a", kind, settings)
    with pytest.raises(UnsupportedAdapterError, match=reason) as caught:
        convert(tmp_path / "a", tmp_path / "out" / "b", 4)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_prompt_tuning_is_refused(tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "a")
    with pytest.raises(UnsupportedAdapterError, match=r"^unsupported: PROMPT_TUNING, PEFT has no conversion"):
        convert(tmp_path / "a", tmp_path / "b", 4)


def test_every_type_that_peft_converts_is_known() -> None:
    """A newer PEFT that converts more, or less, fails here."""
    converts = set()
    for peft_type, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items():
        module = sys.modules.get(tuner.__module__.rpartition(".")[0] + ".layer", sys)
        layers = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, BaseTunerLayer)]
        own = [each for each in layers if each.supports_lora_conversion is not BaseTunerLayer.supports_lora_conversion]
        if own and str(peft_type.value) not in COMPOSED:
            converts.add(str(peft_type.value))
    # HiRA and SHiRA say of themselves that they cannot be converted; EWoRA is not PEFT's own.
    known = {*CONVERTIBLE, *(name for name in BEYOND if "(" not in name)}
    assert converts - {"HIRA", "SHIRA"} == known - {"EWORA"}


def test_parameters_saved_beside_the_update_are_taken_over(tmp_path: Path) -> None:
    kind, settings = TYPES["LOHA"]
    model = save(tmp_path / "a", kind, settings, modules_to_save=["lm_head"])
    convert(tmp_path / "a", tmp_path / "b", FULL)
    before, after = (load_file(tmp_path / side / "adapter_model.safetensors") for side in "ab")
    heads = [name for name in before if "lm_head" in name]
    assert heads
    assert all(torch.equal(before[name], after[name]) for name in heads)
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "b").eval()
    assert relative(logits(loaded), logits(model)) < 1e-4


def test_half_precision_pickles_are_converted_in_float32(tmp_path: Path) -> None:
    save(tmp_path / "a", *TYPES["LOHA"])
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    half = {name: tensor.bfloat16() for name, tensor in stored.items()}
    torch.save(half, tmp_path / "a" / "adapter_model.bin")
    convert(tmp_path / "a", tmp_path / "b", FULL)
    save_file({name: tensor.float() for name, tensor in half.items()}, tmp_path / "a" / "adapter_model.safetensors")
    for name, expected in dense_loha(tmp_path / "a").items():
        torch.testing.assert_close(updates(tmp_path / "b")[name], expected, rtol=1e-4, atol=1e-6)


def test_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    save(tmp_path / "a", *TYPES["LOKR"])
    state = torch.get_rng_state()
    convert(tmp_path / "a", tmp_path / "b", 0.9, source="a")
    assert torch.equal(torch.get_rng_state(), state)
    program = (
        "from pathlib import Path; from hub_router.lora.convert import convert; "
        f"convert(Path({str(tmp_path / 'a')!r}), Path({str(tmp_path / 'c')!r}), 0.9, source='a')"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONHASHSEED": "3"})
    files = {path.name for path in (tmp_path / "b").iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors", RECORD_FILE}
    for name in files:
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes(), name


def edited(change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        change(config, tensors)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")

    return edit


Q = f"{PREFIX}model.layers.0.self_attn.q_proj."
HOSTILE: dict[str, tuple[Callable[[Any, Any], None], str]] = {
    "a rank that would fill the memory": (lambda c, _: c.update(r=900_000), "r is 900000, expected at most 40"),
    "the same in a pattern": (lambda c, _: c.update(rank_pattern={"q_proj": 900_000}), "rank_pattern is 900000"),
    "a pattern that is none": (lambda c, _: c.update(alpha_pattern={"(": 2}), "cannot be matched"),
    "a rank of text": (lambda c, _: c.update(r="many"), 'r is "many"'),
    "no rank for PEFT": (lambda c, _: c.update(alpha={}), "PEFT cannot load it"),
    "trained biases": (lambda c, _: c.update(bias="all"), "trained biases"),
    "a tensor too few": (lambda _, t: t.pop(f"{Q}hada_w2_a"), "1 tensors are missing or too many"),
    "a tensor too many": (lambda _, t: t.update({f"{Q}hada_x": torch.ones(1)}), "missing or too many"),
    "another shape": (lambda _, t: t.update({f"{Q}hada_w2_a": torch.ones(3, 2)}), "PEFT cannot load it"),
    "another number of axes": (lambda _, t: t.update({f"{Q}hada_w1_a": torch.ones(3)}), "not those of its type"),
    "a convolution": (lambda _, t: t.update({f"{Q}hada_t1": torch.ones(2, 2, 3, 3)}), "is a convolution"),
    "NaN": (lambda _, t: t[f"{Q}hada_w1_a"].fill_(float("nan")), "finite"),
    "names that PEFT does not write": (lambda _, t: t.update({"q.hada_w1_a": torch.ones(2)}), "do not start with"),
    "nothing of its type": (lambda _, t: [t.pop(name) for name in list(t)] and t.update(x=torch.ones(1)), "no tensor"),
    "a module in a module": (
        lambda _, t: t.update({f"{Q}in.hada_{w}": torch.ones(2, 2) for w in ("w1_a", "w1_b", "w2_a", "w2_b")}),
        "inside other",
    ),
    "a name that cannot be shown": (lambda _, t: t.update({f"{PREFIX}\x1b.hada_w1_a": torch.ones(2)}), "printable"),
    "an update that would fill the memory": (
        lambda _, t: t.update({f"{Q}hada_w1_a": torch.ones(200_000, 1), f"{Q}hada_w1_b": torch.ones(1, 200_000)}),
        "200000 x 200000, expected at most",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folders_are_refused_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    change, reason = HOSTILE[case]
    save(tmp_path / "a", *TYPES["LOHA"])
    edited(change)(tmp_path / "a")
    with pytest.raises(UnsupportedAdapterError, match=reason) as caught:
        convert(tmp_path / "a", tmp_path / "out" / "b", 4)
    assert len(str(caught.value)) < 500
    assert not (tmp_path / "out").exists()


@pytest.mark.timeout(60)
def test_patterns_never_reach_pefts_own_matching(tmp_path: Path) -> None:
    """Python's matcher, which PEFT uses, tries 2^n ways to match this one."""
    save(tmp_path / "a", *TYPES["LOHA"])
    edited(lambda config, _: config.update(alpha_pattern={r"(\w|[a-z]|\.)*!": 9}))(tmp_path / "a")
    record = convert(tmp_path / "a", tmp_path / "b", FULL)
    assert record.modules[record.worst].error < 1e-5


def test_a_base_model_without_the_modules_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a", *TYPES["MISS"])
    shapes = base_widths()
    del shapes["model.layers.1.mlp.down_proj"]
    with pytest.raises(UnsupportedAdapterError, match=r"no linear modules model\.layers\.1\.mlp\.down_proj"):
        convert(tmp_path / "a", tmp_path / "b", 4, base=shapes)
    with pytest.raises(UnsupportedAdapterError, match="PEFT cannot load it"):
        convert(tmp_path / "a", tmp_path / "b", 4, base=dict.fromkeys(base_widths(), (8, 8)))


def test_an_older_conversion_is_replaced_whole(tmp_path: Path) -> None:
    save(tmp_path / "a", *TYPES["LOHA"])
    to = tmp_path / "out" / "b"
    first = convert(tmp_path / "a", to, 2, beside={"README.md": "old", "samples.jsonl": "{}"})
    assert read_record(to) == first
    assert is_current(to, first, source_hash(tmp_path / "a"), 2)
    assert not is_current(to, first, source_hash(tmp_path / "a"), 3)
    second = convert(tmp_path / "a", to, 3, beside={"README.md": "new"})
    assert read_record(to) == second != first
    assert (to / "README.md").read_text() == "new"
    assert not (to / "samples.jsonl").exists()
    edited(HOSTILE["NaN"][0])(tmp_path / "a")
    assert not is_current(to, second, source_hash(tmp_path / "a"), 3)
    with pytest.raises(UnsupportedAdapterError):
        convert(tmp_path / "a", to, 4)
    assert read_record(to) == second
    assert [path.name for path in to.parent.iterdir()] == ["b"]


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.0, 1.5, float("nan"), True, "4", None])
def test_ranks_that_are_none(rank: Any) -> None:
    with pytest.raises(SettingsError, match="convert rank is"):
        check_rank(rank)


GOOD = ConversionRecord("owner/a", "0" * 64, "LOHA", "0.21.2", 4, {"model.q": ConvertedModule(4, 0.25)})


@pytest.mark.parametrize(
    "change",
    [
        {"source": "a\nb"},
        {"source": ""},
        {"source": 3},
        {"source": "x" * 5000},
        {"source_hash": "zz"},
        {"peft_type": "LoHa; rm"},
        {"peft_version": "\x1b[31m"},
        {"rank": None},
        {"rank": True},
        {"rank": 1e400},
        {"modules": {}},
        {"modules": []},
        {"modules": {"q\n": {"rank": 4, "error": 0.1}}},
        {"modules": {"q": {"rank": "4", "error": 0.1}}},
        {"modules": {"q": {"rank": 4, "error": float("nan")}}},
        {"modules": {"q": {"rank": 4, "error": -1}}},
        {"modules": {"q": [4, 0.1]}},
    ],
)
def test_records_that_are_none(change: dict[str, Any], tmp_path: Path) -> None:
    GOOD.write(tmp_path)
    assert read_record(tmp_path) == GOOD
    document = json.loads((tmp_path / RECORD_FILE).read_text())
    (tmp_path / RECORD_FILE).write_text(json.dumps({**document, **change}))
    assert read_record(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "null", "\xff"])
def test_files_that_are_no_record(text: str, tmp_path: Path) -> None:
    (tmp_path / RECORD_FILE).write_bytes(text.encode("latin-1"))
    assert read_record(tmp_path) is None
    assert read_record(tmp_path / "none") is None
