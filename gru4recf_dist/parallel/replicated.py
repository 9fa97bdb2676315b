"""Parameters that every rank holds whole, with a torch optimizer: clipping, update, and state by parameter name."""

from __future__ import annotations

import torch
from torch import nn

from gru4recf_dist.config import OptimizerConfig

# What each optimizer remembers of a parameter, besides its step count.
OPTIMIZER_STATE = {"adam": ("exp_avg", "exp_avg_sq"), "adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}


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


def parameter_bytes(module: nn.Module, trained: bool = False) -> int:
    """Size of the parameters, or of those that are ``trained``; and so of their gradients."""
    return sum(each.nbytes for each in module.parameters() if each.requires_grad or not trained)


class ReplicatedParameters:
    """The parameters of ``encoder`` and ``optimizer``, which must be of `make_optimizer` and have just them."""

    def __init__(self, encoder: nn.Module, optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
        self._named = dict(encoder.named_parameters())
        self._optimizer, self._clip = optimizer, config.clip
        self._keys = OPTIMIZER_STATE[config.name]

    def prepare_step(self, lr: float, scale: float) -> torch.Tensor:
        """Divide the gradients by ``scale``, clip them and set the learning rate; returns the norm before clipping."""
        if scale != 1.0:
            for parameter in self._named.values():
                if parameter.grad is not None:
                    parameter.grad.div_(scale)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        bound = self._clip if self._clip is not None else float("inf")
        return nn.utils.clip_grad_norm_(self._named.values(), bound)

    def clear_gradients(self) -> None:
        for parameter in self._named.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`encoder.NAME` and `optimizer.NAME.STATE`; the same keys before the first step and after it."""
        state = {f"encoder.{name}": parameter.detach() for name, parameter in self._named.items()}
        for name, parameter in self._named.items():
            kept = self._optimizer.state.get(parameter, {})
            for key in self._keys:
                state[f"optimizer.{name}.{key}"] = kept.get(key, torch.zeros_like(parameter))
            if self._keys:
                state[f"optimizer.{name}.step"] = kept.get("step", torch.zeros(()))
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._named.items():
            parameter.copy_(state[f"encoder.{name}"])
            if self._keys:
                kept = {key: state[f"optimizer.{name}.{key}"].clone() for key in self._keys}
                self._optimizer.state[parameter] = {"step": state[f"optimizer.{name}.step"].clone(), **kept}
