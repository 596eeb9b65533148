from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_files import PLAIN
from peft.utils.other import get_pattern_key

from hub_router.errors import UnsupportedAdapterError
from hub_router.lora.config import AdapterConfig
from hub_router.lora.config_file import MAX_CONFIG_BYTES, read_config


def write(folder: Path, fields: Any) -> Path:
    (folder / "adapter_config.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return folder


def reason(folder: Path) -> str:
    with pytest.raises(UnsupportedAdapterError) as refusal:
        read_config(folder)
    message = str(refusal.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def scaling(config: AdapterConfig, module: str, stored_rank: int) -> float:
    return config.scalings({module: stored_rank})[module]


def test_scaling_by_hand(tmp_path: Path) -> None:
    fields = PLAIN | {"r": 8, "lora_alpha": 16}
    assert scaling(read_config(write(tmp_path, fields)), "m.q", 8) == 2.0
    assert scaling(read_config(write(tmp_path, fields | {"use_rslora": True})), "m.q", 8) == pytest.approx(16 / 8**0.5)
    patterned = fields | {"rank_pattern": {"q": 4}, "alpha_pattern": {"layers.1.q": 10}}
    config = read_config(write(tmp_path, patterned))
    assert [scaling(config, f"layers.{n}.q", 99) for n in (0, 1)] == [4.0, 2.5]
    assert scaling(config, "layers.1.v", 99) == 2.0
    assert config.ranks(["layers.1.q"]) == {"layers.1.q": 4}


def test_adalora_divides_by_its_first_rank_whatever_was_left(tmp_path: Path) -> None:
    fields = {**PLAIN, "peft_type": "ADALORA", "r": 8, "target_r": 4, "init_r": 12, "lora_alpha": 6}
    config = read_config(write(tmp_path, fields | {"rank_pattern": {"m.q.lora_E": [True, False]}}))
    assert scaling(config, "m.q", 3) == pytest.approx(6 / (12 + 1e-5), rel=1e-12)
    assert scaling(read_config(write(tmp_path, fields | {"lora_alpha": 0})), "m.q", 3) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({"lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0}, "fine_tune_type": "lora"}, 20.0),
        # Until June 2024 MLX-LM multiplied by alpha/rank; configs of that time know neither of the later fields.
        ({"lora_parameters": {"rank": 8, "alpha": 16, "scale": 10.0}, "lora_layers": 4}, 20.0),
        ({"lora_parameters": {"rank": 8, "alpha": 16, "scale": 10.0}, "lora_layers": 4, "use_dora": False}, 10.0),
        ({"lora_parameters": {"rank": 8, "alpha": 16, "scale": 10.0}, "num_layers": 4, "fine_tune_type": "dora"}, 10.0),
    ],
)
def test_mlx_scale(tmp_path: Path, fields: dict[str, Any], factor: float) -> None:
    config = read_config(write(tmp_path, {"model": "org/base", **fields}))
    assert (config.kind, config.base_model, config.r) == ("MLX", "org/base", 8)
    assert scaling(config, "m.q", 8) == factor
    assert config.use_dora == (fields.get("fine_tune_type") == "dora")
    assert any("alpha" in note and f"{factor:g}" in note for note in config.notes) == (
        "alpha" in fields["lora_parameters"]
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"fine_tune_type": "full", "lora_parameters": {"scale": 1}}, "unsupported: MLX-LM fine_tune_type='full'"),
        ({"fine_tune_type": "lora"}, "lora_parameters is null, expected an object with a scale"),
        ({"lora_parameters": {"rank": 8}}, "expected an object with a scale"),
        ({"lora_parameters": {"rank": 8, "scale": "x"}}, "lora_parameters.scale is"),
        ({"lora_parameters": {"rank": 0, "scale": 1}}, "lora_parameters.rank is 0"),
    ],
)
def test_mlx_configs_that_cannot_be_used(tmp_path: Path, fields: dict[str, Any], expected: str) -> None:
    assert expected in reason(write(tmp_path, fields))


MODULES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
    "xq_proj",
    "q_proj",
)


@pytest.mark.parametrize(
    "patterns",
    [
        ["q_proj"],
        ["layers.1.self_attn.q_proj", "q_proj"],
        ["q_proj", "layers.1.self_attn.q_proj"],
        [r"layers\.1\..*", "down_proj"],
        [r"^model\.layers\.1\.mlp\.down_proj"],
        ["^q_proj"],
        [r"layers\.(0|1)\.self_attn\.q_proj"],
        ["1.mlp.down_proj", r".*\.self_attn\.[a-z]_proj"],
        ["model.layers.0"],
    ],
)
def test_patterns_match_as_in_peft(tmp_path: Path, patterns: list[str]) -> None:
    values = {pattern: 10 + number for number, pattern in enumerate(patterns)}
    config = read_config(write(tmp_path, PLAIN | {"rank_pattern": values, "alpha_pattern": values}))
    for module in MODULES:
        expected = values.get(get_pattern_key(list(values), module), PLAIN["r"])
        assert config.ranks([module])[module] == expected, module


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("r", "eight", "whole number from 1"),
        ("r", 8.0, "whole number from 1"),
        ("r", True, "whole number from 1"),
        ("r", 0, "whole number from 1"),
        ("r", -4, "whole number from 1"),
        ("r", None, "whole number from 1"),
        ("r", 10**40, "whole number from 1"),
        ("lora_alpha", "16", "a number from"),
        ("lora_alpha", None, "a number from"),
        ("lora_alpha", [16], "a number from"),
        ("lora_alpha", float("nan"), "a number from"),
        ("lora_alpha", float("inf"), "a number from"),
        ("lora_alpha", 10**400, "a number from"),
        ("use_rslora", "true", "true or false"),
        ("use_rslora", 1, "true or false"),
        ("use_dora", "no", "true or false"),
        ("base_model_name_or_path", ["a"], "a string or null"),
        ("target_modules", {"q": 1}, "a list of names"),
        ("target_modules", ["q", 1], "a list of names"),
        ("rank_pattern", ["q"], "an object"),
        ("rank_pattern", {"q": "4"}, "whole number from 1"),
        ("rank_pattern", {"q": 0}, "whole number from 1"),
        ("bias", "some", "none, all or lora_only"),
        ("enable_lora", [1, 0], "a list of true and false"),
        ("layers_to_transform", "all", "a list of layer numbers"),
        ("modules_to_save", "score", "a list of names"),
        ("exclude_modules", {"a": 1}, "a list of names"),
        ("alpha_pattern", {"q": "x"}, "a number from"),
        ("peft_type", 3, "'LORA'"),
    ],
)
def test_wrong_types_are_named_with_the_field(tmp_path: Path, field: str, value: Any, expected: str) -> None:
    message = reason(write(tmp_path, PLAIN | {field: value}))
    assert field in message
    assert expected in message


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"use_dora": True, "lora_bias": True}, "unsupported: DoRA with lora_bias"),
        ({"use_qalora": True}, "unsupported: QALoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "unsupported: BD-LoRA"),
        ({"kasa_config": {"beta": 1}}, "unsupported: KaSA"),
        ({"arrow_config": {"top_k": 2}}, "unsupported: a PEFT Arrow router"),
        ({"alora_invocation_tokens": [1, 2]}, "unsupported: activated LoRA"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "unsupported: layer replication"),
        ({"target_parameters": ["experts.w"]}, "unsupported: LoRA on bare parameters"),
        ({"trainable_token_indices": [1]}, "unsupported: trained token embeddings"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"init_lora_weights": "of-next-year"}, "init_lora_weights"),
        ({"init_lora_weights": 3}, "init_lora_weights"),
        ({"peft_type": "IA3"}, "unsupported: IA3 "),
        ({"peft_type": "lo\nra"}, "unsupported:"),
        ({"peft_type": "X" * 5000}, "unsupported:"),
        ({"peft_type": None}, "peft_type is null"),
    ],
)
def test_variants_are_refused_with_their_name(tmp_path: Path, fields: dict[str, Any], expected: str) -> None:
    assert expected in reason(write(tmp_path, PLAIN | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": None, "enable_lora": None, "layer_replication": None, "rank_pattern": None, "modules_to_save": []},
        {"init_lora_weights": "gaussian", "target_modules": "all-linear", "exclude_modules": ["lm_head"]},
        {"init_lora_weights": False, "bias": "none", "fan_in_fan_out": True, "megatron_core": "megatron.core"},
        {"init_lora_weights": "eva", "target_modules": None, "base_model_name_or_path": None, "unknown": {"a": 1}},
    ],
)
def test_harmless_fields_are_accepted(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert read_config(write(tmp_path, PLAIN | fields)).r == 2


def test_missing_fields_are_noted(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, {"peft_type": "LORA", "use_something_new": True}))
    assert (config.r, config.lora_alpha, config.base_model) == (None, 8.0, None)
    assert [word for note in config.notes for word in ("no r:", "no lora_alpha:", "use_something_new") if word in note]
    assert len(config.notes) == 3


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:6d1b\nsize 700\n", "Git LFS pointer"),
        (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X", "AppleDouble"),
        (b"  <!DOCTYPE html><html></html>", "an HTML page"),
        (b'{"r": ', "not JSON"),
        (b"\xff\xfe\x00{", "not JSON"),
        (b'{"r": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"[1, 2]", "expected a JSON object"),
        (b"null", "expected a JSON object"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    assert expected in reason(tmp_path)


def test_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(PLAIN).encode())
    assert read_config(tmp_path).r == 2


def test_a_large_config_is_not_read(tmp_path: Path) -> None:
    message = reason(write(tmp_path, json.dumps(PLAIN) + " " * MAX_CONFIG_BYTES))
    assert f"at most {MAX_CONFIG_BYTES}" in message


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (None, "no adapter_config.json in"),
        ("pytorch_lora_weights.safetensors", "diffusers"),
        ("adapters.npz", "MLX-LM"),
        ("._adapter_config.json", "AppleDouble"),
        ("model.safetensors", "a full model"),
        ("pytorch_adapter.bin", "AdapterHub"),
    ],
)
def test_folders_without_config_are_named_as_what_they_are(tmp_path: Path, file: str | None, expected: str) -> None:
    if file:
        (tmp_path / file).write_bytes(b"contents")
    assert expected in reason(tmp_path)


def test_a_damaged_file_in_a_folder_without_config_is_described(tmp_path: Path) -> None:
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"{}")
    assert reason(tmp_path).endswith("(pytorch_lora_weights.safetensors), itself a file of only 2 bytes")


def test_foreign_configs_are_named(tmp_path: Path) -> None:
    assert "AdapterHub" in reason(write(tmp_path, {"config": {"architecture": "lora"}, "model_class": "BertModel"}))
    assert "no peft_type" in reason(write(tmp_path, {"r": 8}))


@pytest.mark.parametrize("pattern", ["(", "a{99999999999999999999}", "q" * 20_000])
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_are_none_are_refused(tmp_path: Path, field: str, pattern: str) -> None:
    config = read_config(write(tmp_path, PLAIN | {field: {pattern: 4}}))
    with pytest.raises(UnsupportedAdapterError, match=f"{field} pattern .* cannot be matched") as refusal:
        config.scalings({"model.layers.0.q": 2})
    assert len(str(refusal.value)) < 300


@pytest.mark.timeout(60)
@pytest.mark.parametrize("pattern", ["(a|a)*b", "(a|a?)+b", "(.*.*.*.*.*.*.*)*x", "((a{1,200}){1,200}){1,200}b"])
def test_patterns_that_would_hang_are_stopped(tmp_path: Path, pattern: str) -> None:
    config = read_config(write(tmp_path, PLAIN | {"rank_pattern": {pattern: 4}}))
    try:
        config.scalings({"model." + "a" * 400: 2})
    except UnsupportedAdapterError as error:
        assert "takes longer than 2 seconds" in str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


FIELDS = [
    *PLAIN,
    *("use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "bias", "lora_bias", "enable_lora", "exclude_modules"),
    *(
        "layers_to_transform",
        "modules_to_save",
        "auto_mapping",
        "lora_parameters",
        "fine_tune_type",
        "init_lora_weights",
    ),
]


@given(field=st.sampled_from(FIELDS), value=JSON)
def test_any_value_of_any_field_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, field: str, value: Any
) -> None:
    folder = write(tmp_path_factory.mktemp("config"), PLAIN | {field: value})
    try:
        factor = scaling(read_config(folder), "model.layers.0.q", 2)
    except UnsupportedAdapterError as error:
        assert re.search(re.escape(field), str(error)) or "unsupported" in str(error)
    else:
        assert abs(factor) < float("inf")
