"""From one module's tensors, in the shapes that each format stores, to the factors of one linear map, or its faults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from hub_router.lora.adapter import LoraFactors
from hub_router.lora.config import AdapterConfig

Parts = Mapping[str, torch.Tensor]


def role_faults(roles: Mapping[str, Sequence[str]], config: AdapterConfig) -> Iterator[str]:
    """What keeps a module's tensors from being one update, known from their roles alone.

    Args:
        roles (Mapping[str, Sequence[str]]): tensor names by role.
        config (AdapterConfig): says which roles there must be.

    Yields:
        str: a fault, without the module's name.
    """
    for role, found in roles.items():
        if len(found) > 1:
            yield f"has {len(found)} tensors for lora_{role} ({', '.join(sorted(found)[:3])})"
    plain, lookup = {"A", "B"} & roles.keys(), {"embedding_A", "embedding_B"} & roles.keys()
    if plain and lookup:
        yield "has factors of a linear map and of an embedding"
        return
    for factors in (("A", "B"), ("embedding_A", "embedding_B")):
        for present, missing in (factors, factors[::-1]):
            if present in roles and missing not in roles:
                yield f"has lora_{present} without lora_{missing}"
    if not plain and not lookup:
        yield f"has {', '.join(f'lora_{role}' for role in sorted(roles))} without lora_A and lora_B"
    if config.kind == "MLX" and lookup and "magnitude" in roles:
        yield "is DoRA on an embedding by MLX-LM, which scales tokens where PEFT scales outputs"
    expected = {"E": config.kind == "ADALORA", "magnitude": config.use_dora, "bias": config.lora_bias}
    for role, wanted in expected.items():
        said = {"E": f"peft_type={config.kind}", "magnitude": f"use_dora={config.use_dora}"}
        what = said.get(role, f"lora_bias={config.lora_bias}")
        if (role in roles) != wanted:
            yield f"has {'a' if role in roles else 'no'} lora_{role}, but the config says {what}"


def shape_faults(parts: Parts, config: AdapterConfig) -> Iterator[str]:
    """What keeps a module's tensors from being one A ``(r, D_in)``, one B ``(D_out, r)`` and what goes with them.

    Args:
        parts (Mapping[str, torch.Tensor]): tensors by role, without role faults.
        config (AdapterConfig): its config.

    Yields:
        str: a fault, without the module's name.
    """
    A, B = (tuple(parts[_name(parts, factor)].shape) for factor in "AB")
    if config.enable_lora:
        parts_on = sum(config.enable_lora)
        fits = len(A) == 2 and len(B) == 3 and B[2] == 1 and A[0] == parts_on * B[1] and B[0] % parts_on == 0
        if not fits:
            yield (
                f"has A {A} and B {B}, expected ({parts_on} r, D_in) and ({parts_on} d, r, 1) for "
                f"enable_lora={list(config.enable_lora)}"
            )
            return
    elif config.kind == "MLX" and len(A) == len(B) == 3:
        yield f"is a stack of maps (A {A}, B {B}), expected one linear map"
        return
    elif len(A) == len(B) and len(A) in (3, 4, 5):
        yield f"is a convolution (A {A}, B {B}), expected a linear map"
        return
    elif len(A) != 2 or len(B) != 2 or _chained(A, B, config) is None:
        yield f"has A {A} and B {B} that do not chain, expected (r, D_in) and (D_out, r)"
        return
    rank = A[1] if config.kind == "MLX" else A[0]
    d_out = _d_out(B, config)
    if "E" in parts and parts["E"].numel() != rank:
        yield f"has E {tuple(parts['E'].shape)} for rank {rank}, expected ({rank}, 1)"
    for role in ("magnitude", "bias"):
        if role in parts and parts[role].numel() != d_out:
            yield f"has a lora_{role} of shape {tuple(parts[role].shape)}, expected ({d_out},)"


def stated_rank(parts: Parts, config: AdapterConfig) -> int:
    """The rank that the config speaks of: that of the tensors, for a fused map that of each adapted part.

    Args:
        parts (Mapping[str, torch.Tensor]): tensors by role, without faults.
        config (AdapterConfig): its config.

    Returns:
        int: r.
    """
    if config.enable_lora:
        return parts["B"].shape[1]
    A = parts[_name(parts, "A")]
    return A.shape[1] if config.kind == "MLX" else A.shape[0]


def assemble(parts: Parts, config: AdapterConfig, scaling: float) -> LoraFactors:
    """The factors of a module.

    Args:
        parts (Mapping[str, torch.Tensor]): tensors by role, without faults.
        config (AdapterConfig): its config.
        scaling (float): factor on B A.

    Returns:
        LoraFactors: views of the stored tensors wherever the format allows.
    """
    A, B = parts[_name(parts, "A")], parts[_name(parts, "B")]
    if config.kind == "MLX":
        A, B = A.mT, B.mT
    if config.enable_lora:
        B = _spread_groups(B, config.enable_lora)
    if "E" in parts:
        # W x + c B ((A * E) x), https://arxiv.org/abs/2303.10512, Eq. 3: the singular values go into A's rows.
        wide = torch.promote_types(torch.promote_types(A.dtype, parts["E"].dtype), torch.float32)
        A = A.to(wide) * parts["E"].to(wide).reshape(-1, 1)
    vectors = {role: parts[role].reshape(-1) for role in ("magnitude", "bias") if role in parts}
    return LoraFactors(A, B, scaling, lookup="embedding_A" in parts, **vectors)


def _name(parts: Mapping[str, object], factor: str) -> str:
    """The role that holds A or B."""
    return factor if factor in parts else f"embedding_{factor}"


def _chained(A: tuple[int, ...], B: tuple[int, ...], config: AdapterConfig) -> int | None:
    """The rank that both factors share, None where they do not."""
    one, other = (A[1], B[0]) if config.kind == "MLX" else (A[0], B[1])
    return one if one == other else None


def _d_out(B: tuple[int, ...], config: AdapterConfig) -> int:
    if config.enable_lora:
        return B[0] // sum(config.enable_lora) * len(config.enable_lora)
    return B[1] if config.kind == "MLX" else B[0]


def _spread_groups(grouped: torch.Tensor, enabled: Sequence[bool]) -> torch.Tensor:
    """The B of early PEFT's MergedLinear as that of one map.

    A fused map computes several parts one below the other. Of these n are adapted, each by its own r rows of A and its
    own ``(d, r)`` block of B, stored below each other as a grouped convolution ``(n d, r, 1)``. As one map, B is
    ``(parts d, n r)`` with a block per adapted part and zeros elsewhere.
    """
    stacked = grouped.squeeze(-1)  # [n d, r]
    n, r = sum(enabled), stacked.shape[1]
    height = stacked.shape[0] // n
    B = stacked.new_zeros(height * len(enabled), n * r)
    for group, part in enumerate(number for number, on in enumerate(enabled) if on):
        B[part * height : (part + 1) * height, group * r : (group + 1) * r] = stacked[group * height :][:height]
    return B
