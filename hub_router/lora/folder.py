"""Writes plain LoRA as the folders that PEFT writes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from hub_router.errors import UnsupportedAdapterError
from hub_router.formats import CONFIG_FILE, SAFETENSORS_FILE
from hub_router.lora.adapter import LoraAdapter
from hub_router.lora.skeleton import PEFT_PREFIX


def write_config(folder: Path, ranks: Mapping[str, int], alphas: Mapping[str, float], **fields: Any) -> None:
    """Write ``adapter_config.json`` as PEFT does, with a pattern for every module that differs from most.

    Args:
        folder (Path): an existing folder.
        ranks (Mapping[str, int]): r by module path.
        alphas (Mapping[str, float]): ``lora_alpha`` by module path; the scaling is alpha/r.
        **fields (Any): others of ``peft.LoraConfig``.
    """
    from peft import LoraConfig

    rank, alpha = _usual(ranks), _usual(alphas)
    LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(ranks),
        rank_pattern={name: each for name, each in ranks.items() if each != rank},
        alpha_pattern={name: each for name, each in alphas.items() if each != alpha},
        inference_mode=True,
        **fields,
    ).save_pretrained(folder)
    # PEFT holds the targets in a set, whose order differs from run to run.
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "target_modules": sorted(ranks)}, indent=2, sort_keys=True) + "\n")


def write_adapter(folder: Path, adapter: LoraAdapter, base_model: str | None, task_type: str | None = None) -> None:
    """Write an adapter in memory.

    Args:
        folder (Path): is made; must not exist.
        adapter (LoraAdapter): nothing but factors A and B, of linear maps.
        base_model (str | None): what the config is to name.
        task_type (str | None): of PEFT, such as ``CAUSAL_LM``.

    Raises:
        UnsupportedAdapterError: it has magnitudes, biases, embeddings or saved modules; names the first.
    """
    more = [name for name, each in adapter.modules.items() if each.lookup or len(each.tensors) > 2]
    if more or adapter.saved:
        raise UnsupportedAdapterError(
            f"adapter {adapter.name!r} is more than B A x of linear maps, as in {(more or list(adapter.saved))[0]}"
        )
    folder.mkdir(parents=True)
    tensors = {
        f"{PEFT_PREFIX}{name}.lora_{letter}.weight": getattr(each, letter).detach().cpu().contiguous()
        for name, each in adapter.modules.items()
        for letter in ("A", "B")
    }
    save_file(tensors, folder / SAFETENSORS_FILE)
    write_config(
        folder,
        {name: each.rank for name, each in adapter.modules.items()},
        {name: each.scaling * each.rank for name, each in adapter.modules.items()},
        base_model_name_or_path=base_model,
        task_type=task_type,
    )


def _usual(values: Mapping[str, Any]) -> Any:
    """The most frequent value; of equally frequent ones the largest."""
    return max(Counter(values.values()).items(), key=lambda item: (item[1], item[0]))[0]
