"""What the catalog records about an adapter folder."""

from __future__ import annotations

from pathlib import Path

from hub_router.errors import UnsupportedAdapterError
from hub_router.lora.adapter import LoraAdapter
from hub_router.lora.reader import read_folder, zero_modules
from hub_router.lora.text import SHOWN
from hub_router.records import AdapterFacts, ModuleFacts


def inspect(path: Path) -> AdapterFacts:
    """Read and check an adapter folder without a base model; nothing of it stays in memory.

    ``weights_hash`` is the sha256 of the weight files' bytes followed by the canonical JSON of the config fields that
    change the function: it changes exactly when a file or the scaling of a module may change, not when the config's
    other fields (base model name, dropout, task type) do.

    Args:
        path (Path): folder with ``adapter_config.json`` and weights.

    Returns:
        AdapterFacts: modules, ranks, dtypes, sizes, notes.

    Raises:
        UnsupportedAdapterError: the folder holds no adapter that can be used, or one that changes nothing; the message
            is the one reason.
    """
    path = Path(path)
    adapter, source = read_folder(path, path.name, SHOWN)
    modules = adapter.modules.values()
    others = adapter.saved or any(each.magnitude is not None or each.bias is not None for each in modules)
    if not others and len(zero_modules(adapter.modules)) == len(adapter.modules):
        scaled = any(each.scaling for each in modules)
        raise UnsupportedAdapterError(
            f"{'B A' if scaled else 'the scaling of B A'} is zero in all of its {len(adapter.modules)} modules, so the "
            "adapter changes nothing" + (": it was never trained, or saved before training" if scaled else "")
        )
    tensors = [tensor for each in modules for tensor in each.tensors.values()]
    dtypes = dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    return AdapterFacts(
        peft_type="LORA" if source.config.kind == "MLX" else source.config.kind,
        base_model=adapter.base_model,
        base_class=source.config.base_class,
        modules=module_facts(adapter),
        dtypes=tuple(dtypes),
        parameters=sum(tensor.numel() for tensor in tensors),
        size_bytes=sum(file.stat().st_size for file in source.files),
        weights_hash=adapter.weights_hash,
        rslora=source.config.use_rslora,
        weight_files=tuple(file.name for file in source.files),
        notes=adapter.notes,
        saved={path: tuple(parameter.value.shape) for path, parameter in adapter.saved.items()},
    )


def module_facts(adapter: LoraAdapter) -> tuple[ModuleFacts, ...]:
    """What an adapter adapts, without its tensors.

    Args:
        adapter (LoraAdapter): as read.

    Returns:
        tuple[ModuleFacts, ...]: in file order.
    """
    return tuple(
        ModuleFacts(name, f.rank, f.d_in, f.d_out, f.scaling, f.lookup, f.magnitude is not None)
        for name, f in adapter.modules.items()
    )
