"""Waits for other ranks that are not in a collective of ours: what an engine waits for itself, and what a device does.

On gloo a collective returns when it is done. On NCCL it returns when the device has been told to do it, and the host
waits where it first needs a result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from gru4recf_dist.parallel.whereabouts import HERE


@contextlib.contextmanager
def waiting_after_backward(loss: torch.Tensor) -> Iterator[None]:
    """Around a backward from ``loss``, at whose end the engine waits until all ranks' gradients are averaged."""
    waiting, begun = HERE.waiting("encoder_gradients"), []

    def begin() -> None:
        begun.append(True)
        waiting.__enter__()

    def ask(gradient: torch.Tensor) -> None:
        # Called when all gradients of this rank are there, in the order of asking: the engine asks in later hooks.
        torch.autograd.Variable._execution_engine.queue_callback(begin)

    loss.register_hook(ask)
    yield
    if begun:
        waiting.__exit__(None, None, None)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in the host's memory: waits for the device, and so for the ranks that its collectives wait for."""
    if not tensor.is_cuda:
        return tensor
    with HERE.waiting("device"):
        return tensor.cpu()
