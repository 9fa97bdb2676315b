"""Training engines: how the encoder's gradients are averaged over the ranks and its parameters updated.

The trainer sees the `Engine` interface only. An engine's state is plain full tensors by parameter name, whatever the
engine keeps inside, so that a checkpoint of one engine loads into another and at another world size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gru4recf_dist.config import Config, OptimizerConfig
from gru4recf_dist.parallel import traffic
from gru4recf_dist.parallel.deepspeed_settings import choose_accelerator
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.parallel.replicated import ReplicatedParameters, make_optimizer, parameter_bytes
from gru4recf_dist.parallel.waits import waiting_after_backward


class Engine(Protocol):
    """Trains an encoder. An update is one or more calls and backwards, then one of `step` and `skip`.

    Attributes:
        module: what is trained: the encoder, or a copy of it.
    """

    module: nn.Module

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        """Around each forward and backward of an update; with the ``last`` the sums are averaged over the ranks."""

    def __call__(self, *inputs) -> torch.Tensor:
        """The encoder's forward, set up for `backward`."""

    def backward(self, loss: torch.Tensor, scale: float) -> None:
        """Accumulate the gradients of ``loss`` times ``scale``; those of inputs reach the inputs unaveraged."""

    def step(self, lr: float, scale: float) -> torch.Tensor:
        """Divide the gradients by ``scale``, clip, update at learning rate ``lr``, clear the gradients.

        Returns:
            their global norm before clipping.
        """

    def skip(self) -> None:
        """Clear the gradients and update nothing."""

    def train_only(self, names: Collection[str]) -> None:
        """Train only the parameters of ``names`` from the next update on, and leave the others as they are, to the bit.

        Raises:
            NotImplementedError: the engine cannot leave parameters out; the configuration refuses to ask it to.
        """

    def copy_weights_to(self, encoder: nn.Module) -> None:
        """Give a plain encoder the present weights; a collective. Nothing to do if it is the one that is trained."""

    def figures(self) -> dict[str, float]:
        """What the engine itself measures, by name."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Full tensors: `encoder.NAME` and `optimizer.NAME.STATE`; the same keys before and after training."""

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state_dict` gave, of whichever engine and world size."""


class DDPEngine:
    """`DistributedDataParallel` and a plain torch optimizer; with one rank, the optimizer alone.

    It trains ``encoder`` itself.
    """

    def __init__(self, encoder: nn.Module, config: OptimizerConfig, ranks: Ranks) -> None:
        self.module, self._world = encoder, ranks.world
        self._optimizer = make_optimizer(encoder.parameters(), config)
        self._parameters = ReplicatedParameters(encoder, self._optimizer, config)
        self._group, self._wrappers = ranks.dense, {}
        self.train_only([name for name, _ in encoder.named_parameters()])

    def train_only(self, names: Collection[str]) -> None:
        # Without a gradient a parameter is not reduced, and every optimizer passes it over: no moment or weight decays.
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in names)
        self._trained = frozenset(names)

    @property
    def _forward(self) -> nn.Module:
        """What is called: one wrapper for each set of trained parameters, whose buckets hold these alone."""
        if self._world == 1:
            return self.module
        if self._trained not in self._wrappers:
            # find_unused_parameters keeps DDP from rebuilding its buckets after the first step. gloo's sums depend on
            # an element's place in the bucket, so a resumed run would differ from an unbroken one in the last bit.
            self._wrappers[self._trained] = DistributedDataParallel(
                self.module, process_group=self._group, find_unused_parameters=True
            )
        return self._wrappers[self._trained]

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        if last:
            traffic.TOTAL.add_all_reduce("encoder_gradients", parameter_bytes(self.module, trained=True), self._world)
        if last or not isinstance(self._forward, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._forward.no_sync()

    def __call__(self, *inputs) -> torch.Tensor:
        return self._forward(*inputs)

    def backward(self, loss: torch.Tensor, scale: float) -> None:
        loss = loss * scale
        with waiting_after_backward(loss) if self._world > 1 else contextlib.nullcontext():
            loss.backward()

    def step(self, lr: float, scale: float) -> torch.Tensor:
        norm = self._parameters.prepare_step(lr, scale)
        self._optimizer.step()
        self._parameters.clear_gradients()
        return norm

    def skip(self) -> None:
        self._parameters.clear_gradients()

    def copy_weights_to(self, encoder: nn.Module) -> None:
        pass

    def figures(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._parameters.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._parameters.load_state_dict(state)


def make_engine(encoder: nn.Module, config: Config, ranks: Ranks) -> Engine:
    """The engine that ``config.engine.name`` names, around ``encoder`` (already on its device)."""
    if config.engine.name == "ddp":
        return DDPEngine(encoder, config.optimizer, ranks)
    choose_accelerator(ranks.device.type)
    # It takes seconds to import: only who asks for it pays.
    from gru4recf_dist.parallel.deepspeed_engine import make_deepspeed_engine

    return make_deepspeed_engine(encoder, config, ranks)
