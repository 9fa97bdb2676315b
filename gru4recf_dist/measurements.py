"""What a run costs: memory of the ranks, and the operations of the encoder."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from gru4recf_dist.model.packed_gru import PackedGRU
from gru4recf_dist.parallel import collectives
from gru4recf_dist.parallel.deepspeed_settings import choose_accelerator
from gru4recf_dist.parallel.ranks import Ranks

GIB = 1 << 30


def peak_memory_gib(ranks: Ranks) -> float:
    """The most that any rank has held so far: device memory that torch allocated, on the CPU of the whole process."""
    peak = torch.cuda.max_memory_allocated(ranks.device) if ranks.device.type == "cuda" else peak_process_bytes()
    return float(collectives.max_over_ranks(torch.tensor(peak / GIB, dtype=torch.float64), ranks.host))


def peak_process_bytes() -> int:
    """The most host memory that this process has held so far."""
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def counted_operations(module: nn.Module, device: torch.device) -> Iterator[dict[str, float]]:
    """Counts the operations of ``module``'s forward calls in the block with DeepSpeed's FLOPS profiler.

    Yields:
        a dictionary that is filled at the end: ``flops``, ``macs`` (multiply-accumulates), ``parameters`` and
        ``forward_seconds``, over all calls.
    """
    choose_accelerator(device.type)
    from deepspeed.profiling.flops_profiler import profiler as deepspeed_profiler

    counts: dict[str, float] = {}
    hooks = deepspeed_profiler.MODULE_HOOK_MAPPING
    # It knows no GRU of packed sequences.
    hooks[PackedGRU] = _count_packed_gru
    profiler = deepspeed_profiler.FlopsProfiler(module)
    try:
        profiler.start_profile()
        yield counts
        profiler.stop_profile()
        counts["flops"] = float(profiler.get_total_flops())
        counts["macs"] = float(profiler.get_total_macs())
        counts["parameters"] = float(profiler.get_total_params())
        counts["forward_seconds"] = float(profiler.get_total_duration())
    finally:
        profiler.end_profile()
        del hooks[PackedGRU]


def _count_packed_gru(gru: PackedGRU, inputs: tuple[PackedSequence, ...], output) -> None:
    """Add the operations of one call: of each event, every layer's three gates see the input and the last state."""
    events = len(inputs[0].data)
    for layer in range(gru.num_layers):
        width = gru.input_size if layer == 0 else gru.hidden_size
        products = 3 * gru.hidden_size * (width + gru.hidden_size)
        gru.__macs__ += events * products
        # Besides the products: their sums, three non-linearities, and the new state from old and candidate.
        gru.__flops__ += events * (2 * products + 10 * gru.hidden_size)
