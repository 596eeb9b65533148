"""What the catalog records about an adapter folder."""

from __future__ import annotations

from pathlib import Path

from hub_router.lora.config import read_config
from hub_router.lora.reader import SHOWN, read_folder
from hub_router.lora.weights import find_weights
from hub_router.records import AdapterFacts, ModuleFacts


def inspect(path: Path) -> AdapterFacts:
    """Read and check an adapter folder without a base model; nothing of it stays in memory.

    ``weights_hash`` is the sha256 of the weight file's bytes followed by the canonical JSON of r, lora_alpha,
    use_rslora, rank_pattern and alpha_pattern: it changes exactly when the file or the scaling of a module may change,
    not when the config's other fields (base model name, dropout, task type) do.

    Args:
        path (Path): folder with ``adapter_config.json`` and weights.

    Returns:
        AdapterFacts: modules, ranks, dtypes, sizes, notes.

    Raises:
        UnsupportedAdapterError: the folder holds no adapter that can be used; the message is the one reason.
    """
    path = Path(path)
    adapter = read_folder(path, path.name, SHOWN)
    file = find_weights(path)
    factors = adapter.modules.values()
    dtypes = dict.fromkeys(str(t.dtype).removeprefix("torch.") for f in factors for t in (f.A, f.B))
    return AdapterFacts(
        peft_type="LORA",
        base_model=adapter.base_model,
        modules=tuple(
            ModuleFacts(name=module, rank=f.rank, d_in=f.d_in, d_out=f.d_out, scaling=f.scaling)
            for module, f in adapter.modules.items()
        ),
        dtypes=tuple(dtypes),
        parameters=sum(f.A.numel() + f.B.numel() for f in factors),
        size_bytes=file.stat().st_size,
        weights_hash=adapter.weights_hash,
        rslora=read_config(path).use_rslora,
        weight_files=(file.name,),
        notes=adapter.notes,
    )
