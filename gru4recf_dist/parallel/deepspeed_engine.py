"""DeepSpeed's ZeRO stages 1 and 2 around the encoder, behind the `Engine` interface."""

from __future__ import annotations

import logging
import os
import warnings

import deepspeed
import deepspeed.ops
import torch
from deepspeed.utils import (
    logger,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import nn

from gru4recf_dist.config import Config
from gru4recf_dist.parallel.deepspeed_settings import deepspeed_settings
from gru4recf_dist.parallel.engines import OPTIMIZER_STATE, make_optimizer
from gru4recf_dist.parallel.ranks import Ranks


class DeepSpeedEngine:
    """`deepspeed.initialize` around the encoder with the configured torch optimizer, sharded by ZeRO."""

    def __init__(self, encoder: nn.Module, config: Config, ranks: Ranks) -> None:
        settings = deepspeed_settings(config, ranks.world)
        logger.setLevel(logging.WARNING)
        # Its collectives go by names that torch 2.13 has replaced.
        warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
        # torchrun sets it; a single process without torchrun does not.
        os.environ.setdefault("LOCAL_RANK", "0")
        if ranks.device.type == "cpu":
            # Otherwise DeepSpeed compiles a shared-memory all-reduce for minutes before the first step.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.encoder = encoder
        self._named = dict(encoder.named_parameters())
        self._keys = OPTIMIZER_STATE[config.optimizer.name]
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=encoder,
            optimizer=make_optimizer(self._named.values(), config.optimizer),
            config=settings,
            dist_init_required=False,
        )
        self._start_optimizer_state()

    def __call__(self, *inputs) -> torch.Tensor:
        return self._engine(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)

    def step(self, lr: float) -> torch.Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm())

    def state_dict(self) -> dict[str, torch.Tensor]:
        state = {}
        for name, parameter in self._named.items():
            state[f"encoder.{name}"] = safe_get_full_fp32_param(parameter).clone()
            for key in self._keys:
                state[f"optimizer.{name}.{key}"] = safe_get_full_optimizer_state(parameter, key).clone()
            if self._keys:
                state[f"optimizer.{name}.step"] = self._flat_states()[0]["step"].clone()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._named.items():
            parameter.copy_(state[f"encoder.{name}"])
            safe_set_full_fp32_param(parameter, state[f"encoder.{name}"])
            for key in self._keys:
                safe_set_full_optimizer_state(parameter, state[f"optimizer.{name}.{key}"], key)
        if self._keys:
            step = state[f"optimizer.{next(iter(self._named))}.step"]
            for flat in self._flat_states():
                flat["step"].copy_(step)

    def _flat_states(self) -> list[dict[str, torch.Tensor]]:
        """The torch optimizer's state of each flat partition that this rank holds."""
        base = self._optimizer.optimizer
        return [base.state[parameter] for group in base.param_groups for parameter in group["params"]]

    def _start_optimizer_state(self) -> None:
        """Create the moments now, at zero and step 0, where Adam does it at its first step.

        So the state can be read and written at any time, and nothing changes: Adam starts from the same values.
        """
        if not self._keys:
            return
        base = self._optimizer.optimizer
        for group in base.param_groups:
            for flat in group["params"]:
                base.state[flat] = {"step": torch.zeros(()), **{key: torch.zeros_like(flat) for key in self._keys}}
        self._optimizer._lazy_init_hp_params_optimizer_state()
