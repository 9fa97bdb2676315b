"""DeepSpeed around a copy of the encoder, behind the `Engine` interface: ZeRO stages 0 to 3."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import warnings
from collections.abc import Collection, Iterator

import deepspeed
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import (
    logger,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import nn

from gru4recf_dist.config import Config
from gru4recf_dist.parallel import traffic
from gru4recf_dist.parallel.deepspeed_settings import deepspeed_settings, zero_stage
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.parallel.replicated import OPTIMIZER_STATE, ReplicatedParameters, make_optimizer, parameter_bytes
from gru4recf_dist.parallel.waits import waiting_after_backward
from gru4recf_dist.parallel.whereabouts import HERE

GIB = 1 << 30


def make_deepspeed_engine(encoder: nn.Module, config: Config, ranks: Ranks) -> _DeepSpeedEngine:
    """The engine for the configured ZeRO stage. ``encoder`` stays as it is: a copy of it is trained."""
    kinds = {0: _UnshardedEngine, 1: _ZeroEngine, 2: _ZeroEngine, 3: _Zero3Engine}
    return kinds[zero_stage(config)](copy.deepcopy(encoder), config, ranks)


class _DeepSpeedEngine:
    """What the stages have in common."""

    def __init__(self, encoder: nn.Module, config: Config, ranks: Ranks) -> None:
        settings = deepspeed_settings(config, ranks.world)
        logger.setLevel(logging.WARNING)
        # Its collectives go by names that torch 2.13 has replaced.
        warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor)")
        # torchrun sets it; a single process without torchrun does not.
        os.environ.setdefault("LOCAL_RANK", "0")
        if ranks.device.type == "cpu":
            # Otherwise DeepSpeed compiles a shared-memory all-reduce for minutes before the first step.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.module = encoder
        self._world, self._bytes, self._stage = ranks.world, parameter_bytes(encoder), zero_stage(config)
        self._named = dict(encoder.named_parameters())
        optimizer = make_optimizer(self._named.values(), config.optimizer)
        for group in optimizer.param_groups:
            # Set anew at every step; until then, whatever DeepSpeed does with it must change nothing.
            group["lr"] = 0.0
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=encoder,
            optimizer=optimizer,
            config=settings,
            dist_init_required=False,
        )

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        # Not left to its own count, which a step that we skip at stage 0 would put out of step.
        self._engine.set_gradient_accumulation_boundary(last)
        self._count_traffic(last)
        yield
        if not last:
            # No update, but the end of a micro-batch.
            self._engine.step()

    def __call__(self, *inputs) -> torch.Tensor:
        return self._engine(*inputs)

    def backward(self, loss: torch.Tensor, scale: float) -> None:
        loss = self._scaled(loss, scale)
        with waiting_after_backward(loss) if self._world > 1 else contextlib.nullcontext():
            self._engine.backward(loss, scale_wrt_gas=False)

    def train_only(self, names: Collection[str]) -> None:
        raise NotImplementedError("DeepSpeed's partitions hold all parameters")

    def _count_traffic(self, last: bool) -> None:
        """By the size of the parameters: half an all-reduce for each time they are gathered or gradients scattered."""
        # Stage 3 gathers in forward and in backward; from stage 2 on every micro-batch's gradients are scattered.
        halves = 3 if self._stage == 3 else (self._stage == 2) + last * (1 if self._stage == 2 else 2)
        traffic.TOTAL.add_all_reduce("encoder_gradients", halves * self._bytes / 2, self._world)

    def copy_weights_to(self, encoder: nn.Module) -> None:
        # Not by `state_dict`, which would gather the optimizer's state too.
        with torch.no_grad(), HERE.waiting("encoder_weights"):
            for name, parameter in encoder.named_parameters():
                parameter.copy_(self._weight(name))

    def _weight(self, name: str) -> torch.Tensor:
        """The whole parameter ``name``; a collective where ranks hold shares."""
        return self._named[name].detach()

    def figures(self) -> dict[str, float]:
        figures = {"memory_gib": get_accelerator().max_memory_allocated() / GIB}
        timer = self._engine.tput_timer
        # It measures nothing until its own warm-up is over.
        return figures | ({"sessions_per_second": timer.avg_samples_per_sec()} if timer.total_elapsed_time else {})


class _UnshardedEngine(_DeepSpeedEngine):
    """Stage 0: DeepSpeed averages the gradients; parameters and optimizer are whole on every rank."""

    def __init__(self, encoder: nn.Module, config: Config, ranks: Ranks) -> None:
        super().__init__(encoder, config, ranks)
        self._parameters = ReplicatedParameters(encoder, self._optimizer, config.optimizer)

    def _scaled(self, loss: torch.Tensor, scale: float) -> torch.Tensor:
        return loss * scale

    def step(self, lr: float, scale: float) -> torch.Tensor:
        # DeepSpeed would clip here too, but keep the norm to itself.
        norm = self._parameters.prepare_step(lr, scale)
        self._engine.step()
        return norm

    def skip(self) -> None:
        self._parameters.clear_gradients()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._parameters.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._parameters.load_state_dict(state)


class _ZeroEngine(_DeepSpeedEngine):
    """Stages 1 and 2: optimizer state, then gradients too, are sharded over the ranks."""

    # A norm that is not finite makes DeepSpeed throw the gradients away, wherever the stage keeps them.
    _NORM, _NOT_FINITE = "scaled_global_norm", torch.tensor(torch.inf)

    def __init__(self, encoder: nn.Module, config: Config, ranks: Ranks) -> None:
        super().__init__(encoder, config, ranks)
        self._keys = OPTIMIZER_STATE[config.optimizer.name]
        if self._keys:
            self._start_optimizer_state()

    def _scaled(self, loss: torch.Tensor, scale: float) -> torch.Tensor:
        # DeepSpeed then scales the loss, and takes the scale out of norm and gradients at the step.
        self._optimizer.override_loss_scale(scale)
        return loss

    def step(self, lr: float, scale: float) -> torch.Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._step()
        return torch.as_tensor(self._engine.get_global_grad_norm())

    def skip(self) -> None:
        setattr(self._optimizer, self._NORM, lambda *_, **__: self._NOT_FINITE)
        try:
            self._step()
        finally:
            delattr(self._optimizer, self._NORM)

    def _step(self) -> None:
        # The ranks compare norms and put the updated parameters together.
        with HERE.waiting("encoder_update"):
            self._engine.step()

    def state_dict(self) -> dict[str, torch.Tensor]:
        with HERE.waiting("encoder_weights"):
            return self._gathered_state()

    def _gathered_state(self) -> dict[str, torch.Tensor]:
        state = {}
        for name, parameter in self._named.items():
            state[f"encoder.{name}"] = self._weight(name).clone()
            for key in self._keys:
                state[f"optimizer.{name}.{key}"] = safe_get_full_optimizer_state(parameter, key).clone()
            if self._keys:
                state[f"optimizer.{name}.step"] = self._flat_states()[0]["step"].clone()
        return state

    def _weight(self, name: str) -> torch.Tensor:
        return safe_get_full_fp32_param(self._named[name])

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._named.items():
            self._load_parameter(parameter, state[f"encoder.{name}"])
            for key in self._keys:
                self._load_optimizer_state(parameter, state[f"optimizer.{name}.{key}"], key)
        if self._keys:
            step = state[f"optimizer.{next(iter(self._named))}.step"]
            for flat in self._flat_states():
                flat["step"].copy_(step)

    def _load_parameter(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        parameter.copy_(value)
        safe_set_full_fp32_param(parameter, value)

    def _load_optimizer_state(self, parameter: nn.Parameter, value: torch.Tensor, key: str) -> None:
        safe_set_full_optimizer_state(parameter, value, key)

    def _flats(self) -> list[torch.Tensor]:
        """The flat partitions of parameters that this rank updates."""
        return [parameter for group in self._optimizer.optimizer.param_groups for parameter in group["params"]]

    def _flat_states(self) -> list[dict[str, torch.Tensor]]:
        """The torch optimizer's state of each."""
        return [self._optimizer.optimizer.state[flat] for flat in self._flats()]

    def _start_optimizer_state(self) -> None:
        """Create the moments now, at zero and step 0, where Adam does it at its first step.

        So the state can be read and written at any time, and nothing changes: Adam starts from the same values.
        """
        for flat in self._flats():
            state = {"step": torch.zeros(()), **{key: torch.zeros_like(flat) for key in self._keys}}
            self._optimizer.optimizer.state[flat] = state
        self._show_optimizer_state()

    def _show_optimizer_state(self) -> None:
        """Let the accessors of full optimizer state find it."""
        self._optimizer._lazy_init_hp_params_optimizer_state()


class _Zero3Engine(_ZeroEngine):
    """Stage 3: the parameters are sharded too, and gathered where a module needs them."""

    _NORM, _NOT_FINITE = "_get_norm_groups", [torch.tensor(torch.inf)]

    def _load_parameter(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
        self._copy_share(parameter, value, None)

    def _load_optimizer_state(self, parameter: nn.Parameter, value: torch.Tensor, key: str) -> None:
        self._copy_share(parameter, value, key)

    def _copy_share(self, parameter: nn.Parameter, value: torch.Tensor, key: str | None) -> None:
        """This rank's share of ``value``; DeepSpeed's own setter fails where the last rank's share is padded."""
        share, _ = self._optimizer._get_fp32_opt_state_partition(parameter, True, key)
        start = share.numel() * self._optimizer._get_param_partition_rank(parameter)
        own = value.flatten()[start : start + share.numel()]
        share[: own.numel()].copy_(own)

    def _flats(self) -> list[torch.Tensor]:
        return self._optimizer.fp32_partitioned_groups_flat

    def _show_optimizer_state(self) -> None:
        pass
