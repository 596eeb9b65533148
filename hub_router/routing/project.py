"""Scalar products of a module's inputs with the rows of a matrix, such as prototypes, in full precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.functional import embedding, linear


def project(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``rows x`` for every token.

    Args:
        x (torch.Tensor): inputs ``(..., D_in)``; or integer token ids ``(...)``, which stand for one-hot vectors.
        rows (torch.Tensor): ``(C, D_in)``.

    Returns:
        torch.Tensor: ``(..., C)`` in float32 or wider.
    """
    if x.dtype == rows.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type):
        return linear(x, rows)
    if not x.is_floating_point():
        return embedding(x, rows.mT).to(torch.promote_types(rows.dtype, torch.float32))
    wide = torch.promote_types(x.dtype, torch.float32)
    # In half precision one score in a few dozen would tie with another, and the earlier adapter would win.
    with as_typed(x.device):
        return linear(x.to(wide), rows.to(wide))


def as_typed(device: torch.device) -> AbstractContextManager[object]:
    """Inside it, products are made in the dtype of what is multiplied, whatever autocast is on.

    Args:
        device (torch.device): of what is multiplied.

    Returns:
        AbstractContextManager[object]: one that does nothing, where no autocast is on.
    """
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()
