"""Training engines: how the encoder's gradients are averaged over the ranks and its parameters updated.

The trainer sees the `Engine` interface only. An engine's state is plain full tensors by parameter name, whatever the
engine keeps inside, so that a checkpoint of one engine loads into another and at another world size.
"""

from __future__ import annotations

import os
from typing import Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gru4recf_dist.config import Config, OptimizerConfig
from gru4recf_dist.parallel.ranks import Ranks

# What each optimizer remembers of a parameter, besides its step count.
OPTIMIZER_STATE = {"adam": ("exp_avg", "exp_avg_sq"), "adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}


class Engine(Protocol):
    """Wraps the encoder for training.

    Attributes:
        encoder: the plain module, for evaluation.
    """

    encoder: nn.Module

    def __call__(self, *inputs) -> torch.Tensor:
        """The encoder's forward, set up so that `backward` averages its gradients over the ranks."""

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients; those of inputs reach the inputs unaveraged."""

    def step(self, lr: float) -> torch.Tensor:
        """Clip, update at learning rate ``lr``, clear the gradients; returns their global norm before clipping."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Full tensors: `encoder.NAME` and `optimizer.NAME.STATE`; the same keys before and after training."""

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state_dict` gave, of whichever engine and world size."""


def make_optimizer(parameters, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The torch optimizer that the configuration names. ``lr`` is set anew at every step."""
    if config.name == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, weight_decay=config.weight_decay)
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(
        parameters,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


class DDPEngine:
    """`DistributedDataParallel` and a plain torch optimizer; with one rank, the optimizer alone."""

    def __init__(self, encoder: nn.Module, config: OptimizerConfig, ranks: Ranks) -> None:
        self.encoder, self._config = encoder, config
        self._named = dict(encoder.named_parameters())
        self._optimizer = make_optimizer(self._named.values(), config)
        self._forward: nn.Module = encoder
        if ranks.world > 1:
            # find_unused_parameters keeps DDP from rebuilding its buckets after the first step. gloo's sums depend on
            # an element's place in the bucket, so a resumed run would differ from an unbroken one in the last bit.
            self._forward = DistributedDataParallel(encoder, process_group=ranks.dense, find_unused_parameters=True)

    def __call__(self, *inputs) -> torch.Tensor:
        return self._forward(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> torch.Tensor:
        bound = self._config.clip if self._config.clip is not None else float("inf")
        norm = nn.utils.clip_grad_norm_(self._named.values(), bound)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, torch.Tensor]:
        state = {f"encoder.{name}": parameter.detach() for name, parameter in self._named.items()}
        for name, parameter in self._named.items():
            kept = self._optimizer.state.get(parameter, {})
            for key in OPTIMIZER_STATE[self._config.name]:
                state[f"optimizer.{name}.{key}"] = kept.get(key, torch.zeros_like(parameter))
            if OPTIMIZER_STATE[self._config.name]:
                state[f"optimizer.{name}.step"] = kept.get("step", torch.zeros(()))
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        keys = OPTIMIZER_STATE[self._config.name]
        for name, parameter in self._named.items():
            parameter.copy_(state[f"encoder.{name}"])
            if keys:
                kept = {key: state[f"optimizer.{name}.{key}"].clone() for key in keys}
                self._optimizer.state[parameter] = {"step": state[f"optimizer.{name}.step"].clone(), **kept}


def make_engine(encoder: nn.Module, config: Config, ranks: Ranks) -> Engine:
    """The engine that ``config.engine.name`` names, around ``encoder`` (already on its device)."""
    if config.engine.name == "ddp":
        return DDPEngine(encoder, config.optimizer, ranks)
    # DeepSpeed takes seconds to import and probes the machine: only who asks for it pays. Told the device, it does not.
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from gru4recf_dist.parallel.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(encoder, config, ranks)
