"""Rows on their way between the host's memory and a device; on one and the same device nothing happens.

From the host they go through pinned memory, so that the copy runs beside what the device still has to do.
"""

from __future__ import annotations

import torch


def move(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``rows`` on ``device``; towards a GPU without waiting for it."""
    if rows.device.type == device.type:
        return rows
    if device.type == "cuda":
        # torch keeps the pinned memory until the copy is done.
        return rows.pin_memory().to(device, non_blocking=True)
    pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    pinned.copy_(rows, non_blocking=True)
    # The host reads them next.
    torch.cuda.current_stream(rows.device).synchronize()
    return pinned


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, device):
        ctx.origin = rows.device
        return move(rows, device)

    @staticmethod
    def backward(ctx, gradient):
        return move(gradient, ctx.origin), None


def differentiable_move(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`move` whose backward takes the rows' gradients back to where the rows are."""
    if rows.device.type == device.type:
        return rows
    return _Move.apply(rows, device)
