from __future__ import annotations

import pytest

from hub_router.sync.base_model import resolve_base_model


@pytest.mark.parametrize(
    ("stated", "card", "expected"),
    [
        ("google/flan-t5-large", (), "google/flan-t5-large"),
        ("google/flan-t5-large", ("other/card",), "google/flan-t5-large"),
        (
            "/home/x/.cache/huggingface/hub/models--meta-llama--Llama-2-7b-chat-hf/snapshots/902d6349",
            (),
            "meta-llama/Llama-2-7b-chat-hf",
        ),
        ("C:\\hub\\models--a--b-c\\snapshots\\1", (), "a/b-c"),
        ("/data/models/Qwen2.5-3B", ("Qwen/Qwen2.5-3B",), "Qwen/Qwen2.5-3B"),
        ("/data/models/Qwen2.5-3B", (), None),
        ("./llama", (), None),
        ("phi-2", (), "phi-2"),
        ("phi-2", ("microsoft/phi-2",), "microsoft/phi-2"),
        ("", ("not an id", "a/b", "c/d"), "a/b"),
        (None, (), None),
        ("base_model:adapter:/data/x", (), None),
    ],
)
def test_base_model_of(stated: str | None, card: tuple[str, ...], expected: str | None) -> None:
    assert resolve_base_model(stated, card) == expected
