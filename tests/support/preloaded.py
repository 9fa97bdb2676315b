"""What the server of ranks imports before it forks the first: modules that every rank would import anew otherwise.

torch._dynamo is what optimizers import when they are made.
"""

from __future__ import annotations

import gc

import torch._dynamo
import torch.distributed.tensor  # noqa: F401

import gru4recf_dist.trainer  # noqa: F401

# A collection in a fork would write to, and so copy, the pages of everything that is here already.
gc.freeze()
