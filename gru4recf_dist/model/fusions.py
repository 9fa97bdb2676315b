"""How the outputs of the RNNs become what is compared with the items.

Hidasi, Quadrana, Karatzoglou, Tikk: "Parallel Recurrent Neural Network Architectures for Feature-rich Session-based
Recommendations", RecSys 2016, and the three combinations that RecBole 1.2.1 names in its `GRU4RecF`. Here every score
is a dot product (or cosine) of a query and an item's row, without the paper's final non-linearity.
"""

from __future__ import annotations

from functools import reduce

import torch

from gru4recf_dist.model.subnets import subnets
from gru4recf_dist.model_config import WEIGHTED, WITHOUT_DENSE, ModelConfig


def put_together(
    fusion: str, hidden: list[torch.Tensor | None], weights: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """The outputs of the subnets' RNNs, put together as ``fusion`` does it, before any dense layer.

    Args:
        hidden: [T, H] of each subnet; None for one that takes no part yet: it counts as zero, with `interaction` as
            one.
        weights: [subnets], of the fusions that have some.

    Returns:
        one tensor [T, H], or [T, subnets * H] where outputs are concatenated; with `parallel` [T, H] of each subnet.
    """
    there = [each for each in hidden if each is not None]
    if fusion == "interaction":
        return [reduce(torch.mul, there)]
    if weights is not None:
        weighted = [weight * each for weight, each in zip(weights, hidden, strict=True) if each is not None]
        return [reduce(torch.add, weighted)]
    filled = [torch.zeros_like(there[0]) if each is None else each for each in hidden]
    return filled if fusion == "parallel" else [torch.cat(filled, dim=-1)]


def dense_inputs(config: ModelConfig) -> int | None:
    """Size of what the dense layer sees; None if the fusion has none."""
    if config.fusion in WITHOUT_DENSE:
        return None
    return config.hidden_size * (1 if config.fusion in WEIGHTED else len(subnets(config)))


def initial_weights(config: ModelConfig) -> torch.Tensor | None:
    """The weights [subnets] of the outputs before training; None if the fusion has none."""
    if config.fusion not in WEIGHTED:
        return None
    count = len(subnets(config))
    return torch.tensor(config.fusion_weights or [1.0 / count] * count)
