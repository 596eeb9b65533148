"""DoRA's gain ``g``, by which the rows of an adapted map are scaled to the lengths that were trained.

`DoRA <https://arxiv.org/abs/2402.09353>`_ (Eq. 5) computes ``m (W + B A) x / ||W + B A||`` with row lengths; with
``g = m / ||W + B A||`` that is ``W x + (g - 1) * (W x) + g * (B A x)``: a gate on two terms.
"""

from __future__ import annotations

import torch

_BLOCK = 1 << 22


def gain(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """``g = m / ||W + B A||``, row by row, a block of rows at a time.

    Args:
        weight (torch.Tensor): base weight W ``(D_out, D_in)``.
        A (torch.Tensor): down projection ``(r, D_in)``.
        B (torch.Tensor): up projection ``(D_out, r)``, scaling absorbed.
        magnitude (torch.Tensor): row lengths m ``(D_out,)``.

    Returns:
        torch.Tensor: ``(D_out,)`` in float32 or wider, on the weight's device.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    A, B, magnitude = (each.to(weight.device, dtype) for each in (A, B, magnitude))
    rows = max(1, _BLOCK // weight.shape[1])
    with torch.no_grad():
        lengths = [
            torch.linalg.vector_norm(weight[start : start + rows].to(dtype) + B[start : start + rows] @ A, dim=1)
            for start in range(0, weight.shape[0], rows)
        ]
        return magnitude / torch.cat(lengths)
