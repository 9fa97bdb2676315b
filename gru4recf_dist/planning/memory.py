"""Bytes that a rank holds, part by part; and how many ranks it takes until they fit."""

from __future__ import annotations

from dataclasses import replace

from gru4recf_dist.parallel.deepspeed_settings import zero_stage
from gru4recf_dist.parallel.replicated import OPTIMIZER_STATE
from gru4recf_dist.planning.workload import StepCounts, Workload, expected_counts

# Share of a GPU's memory that is left for the CUDA context, the communicators and the allocator's gaps.
RESERVED = 0.1


def row_state_elements(optimizer: str, dim: int) -> int:
    """Elements of optimizer state a table row."""
    return {"rowwise_adagrad": 1, "adagrad": dim, "lazy_adam": 2 * dim, "sgd": 0}[optimizer]


def device_bytes(workload: Workload, counts: StepCounts) -> dict[str, float]:
    """Of the largest rank, on its device."""
    size = workload.element_bytes
    # Of what is compared, and of what an exchange brings of each item.
    row = workload.query_size * size
    exchanged = (counts.ids * workload.dim * workload.reads_items + counts.target_ids * workload.target_width) * size
    parts = {} if workload.host_table else _table(workload)
    parts["encoder, gradients, moments"] = _encoder(workload)
    # Kept for backward of each event, with as much again for the gradients that are alive at the peak.
    parts["activations"] = counts.events_largest * 2.0 * workload.activation_elements * size
    candidates = counts.negatives if workload.samples else workload.rows
    rows = min(workload.config.loss.block_rows, counts.events_largest * (1 if workload.samples else workload.world))
    # Logits, and what the loss makes of them.
    parts["logits of a block"] = workload.logit_cost.blocks * rows * candidates * size
    # Rows as owner and as user, their gradients likewise, and the sums of these while they are coalesced.
    buffers = 6.0 * exchanged
    # Gathered with and without padding, and the gradients of both.
    buffers += 4.0 * counts.negatives_share * workload.world * row
    if not workload.samples:
        buffers += 3.0 * counts.events_largest * workload.world * row
        # Every row is a candidate: a copy, its gradient, and the coalesced sum; once more as one row of several tables.
        parts["rows as candidates"] = (4.0 + 2.0 * (len(workload.encoder.parts) > 1)) * workload.rows * row
    parts["exchange buffers"] = buffers
    return parts


def node_bytes(workload: Workload, ranks_per_node: int) -> dict[str, float]:
    """Of a node, in host memory."""
    ranks = min(ranks_per_node, workload.world)
    table = {part: ranks * size for part, size in _table(workload).items()}
    parts = dict(table) if workload.host_table else {}
    if workload.config.checkpoint.in_background:
        parts["copy for checkpoints"] = table["table rows"] + table["row optimizer state"]
    # The ranks of a node share these: counts, and a running sum or two orders of half the width.
    loss = workload.config.loss
    arrays = 2 if loss.samples and loss.negatives and loss.sampler != "uniform" else 1
    parts["popularity and sampler"] = 8.0 * arrays * (workload.items + 1)
    return parts


def _table(workload: Workload) -> dict[str, float]:
    widths = workload.table_widths.values()
    state = sum(row_state_elements(workload.config.table.optimizer, width) for width in widths)
    parts = {
        "table rows": float(workload.rows * sum(widths) * workload.element_bytes),
        "row optimizer state": float(workload.rows * state * workload.element_bytes),
    }
    if workload.features:
        parts["item features"] = float(workload.rows * sum(feature.row_bytes for feature in workload.features))
    return parts


def _encoder(workload: Workload) -> float:
    config, world = workload.config, workload.world
    stage = zero_stage(config) if config.engine.name == "deepspeed" else 0
    moments = len(OPTIMIZER_STATE[config.optimizer.name])
    copies = 1.0 / (world if stage == 3 else 1) + 1.0 / (world if stage >= 2 else 1)
    copies += moments / (world if stage >= 1 else 1)
    if stage:
        # ZeRO's own flat copies: of this rank's share, and a bucket to reduce.
        copies += 1.0 / world + 1.0
    elif world > 1:
        # DDP's buckets.
        copies += 1.0
    return workload.encoder_parameters * workload.element_bytes * copies


def fits(workload: Workload, gpu_limit: float, node_limit: float, ranks_per_node: int) -> bool:
    """Whether device and host memory hold a rank's and a node's parts."""
    on_device = sum(device_bytes(workload, expected_counts(workload)).values())
    on_node = sum(node_bytes(workload, ranks_per_node).values())
    return on_device <= gpu_limit * (1.0 - RESERVED) and on_node <= node_limit


def ranks_needed(workload: Workload, gpu_limit: float, node_limit: float, ranks_per_node: int) -> int | None:
    """The fewest ranks that fit, at the same global batch; None if no number does.

    A rank needs a session at least, so there are at most as many as a batch has sessions.
    """

    def enough(world: int) -> bool:
        return fits(replace(workload, world=world), gpu_limit, node_limit, ranks_per_node)

    most = workload.config.batch_size // workload.config.accumulation
    low, high = 0, 1
    while not enough(high):
        if high == most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
