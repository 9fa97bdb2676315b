"""Whether the ranks still hold the same encoder: a broken GPU, or a bug, lets one of them drift away in silence."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from torch import nn

from gru4recf_dist.errors import UserError
from gru4recf_dist.parallel.collectives import gather_vector
from gru4recf_dist.parallel.ranks import Ranks

# A checksum travels as float64, which holds integers up to 2^53 exactly.
_PART_BITS = 32


def check_replicas(step: int, module: nn.Module, ranks: Ranks) -> None:
    """Compare a checksum of the parameters' bits over the ranks. All ranks must call it alike.

    ZeRO's stages 1 and 2 make the copies equal again with every update, and with stage 3 there are none.

    Raises:
        UserError: on every rank; it names those that differ from most others.
    """
    if ranks.world == 1:
        return
    total = checksum(module)
    parts = np.array([total & (2**_PART_BITS - 1), total >> _PART_BITS & (2**_PART_BITS - 1)], np.float64)
    found = [tuple(row) for row in gather_vector(parts, ranks.host).tolist()]
    usual, _ = Counter(found).most_common(1)[0]
    others = [str(rank) for rank, each in enumerate(found) if each != usual]
    if others:
        raise UserError(
            f"step {step}: the encoder's weights of rank {', '.join(others)} are not those of rank "
            f"{found.index(usual)}: a broken device, or a bug (monitoring.replica_check_steps)"
        )


def checksum(module: nn.Module) -> int:
    """Of the bits of all parameters, 64 bits wide: any one bit changes it, wherever it is."""
    total = torch.zeros((), dtype=torch.int64, device=next(module.parameters()).device)
    for place, parameter in enumerate(module.parameters(), start=1):
        values = parameter.detach().flatten()
        bits = values.view(torch.int64 if values.element_size() == 8 else torch.int32).to(torch.int64)
        # Odd factors, so that no bit is lost, and values that change places are seen.
        factors = 2 * torch.arange(len(bits), device=bits.device) + 1
        total += (bits * factors).sum() * (2 * place + 1)
    return int(total)
