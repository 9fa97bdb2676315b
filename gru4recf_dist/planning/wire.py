"""Bytes that a rank sends in a training step, by the purposes of `parallel.traffic`."""

from __future__ import annotations

from gru4recf_dist.parallel.deepspeed_settings import zero_stage
from gru4recf_dist.planning.workload import StepCounts, Workload

# The rest are rings.
ALL_TO_ALL = ("counts", "ids", "features", "rows", "row_gradients", "partial_sums", "partial_sum_gradients")


def sent_bytes(workload: Workload, counts: StepCounts) -> dict[str, float]:
    """Mean over the ranks of what each sends in a step, by purpose."""
    config, world = workload.config, workload.world
    others, remote = world - 1, (world - 1) / world
    row = workload.query_size * workload.element_bytes
    # Targets whose rows are no inputs have an exchange of their own.
    exchanges = 2 if workload.target_width else 1
    elements = workload.dim * counts.ids * workload.reads_items + workload.target_width * counts.target_ids
    sent = {
        "counts": 8.0 * others * exchanges,
        "ids": 8.0 * (counts.ids + counts.target_ids) * remote,
        "features": 4.0 * sum(feature.width for feature in workload.features) * counts.ids * remote,
        "rows": elements * workload.element_bytes * remote,
        "row_gradients": elements * workload.element_bytes * remote,
    }
    if workload.samples:
        moved = row * counts.negatives_moved
        sent["negatives"] = moved + row * counts.negatives_share * others
        share = counts.negatives / world if workload.over_gloo else counts.negatives_share
        sent["negative_gradients"] = moved + row * share * others
    else:
        sent["counts"] += 8.0 * others
        sent["queries"] = row * counts.events_largest * others
        largest = counts.events if workload.config.device == "cpu" else counts.events_largest
        sent["query_gradients"] = row * largest * others
        partial = workload.element_bytes * counts.events * others
        sent["partial_sums"] = sent["partial_sum_gradients"] = partial
    # All of these are made anew for each micro-batch.
    sent = {purpose: size * config.accumulation for purpose, size in sent.items()}
    if workload.samples and config.loss.in_batch:
        # Once for all micro-batches, as 32 bits.
        sent["counts"] += 8.0 * others
        sent["batch_targets"] = 4.0 * counts.events_largest * config.accumulation * others
    parameters = workload.encoder_parameters * workload.element_bytes
    sent["encoder_gradients"] = remote * parameters * _parts(workload)
    clipping = workload.element_bytes if config.table.clip is not None else 0
    # Four counts before the update, loss and flag after the backward.
    sent["loss"] = 2.0 * remote * (4 * 8 + 2 * 8 + clipping)
    return {purpose: size for purpose, size in sent.items() if size}


def _parts(workload: Workload) -> int:
    """How often the encoder's gradients are scattered or its parameters gathered; an all-reduce is one of each."""
    config = workload.config
    stage = zero_stage(config) if config.engine.name == "deepspeed" else 0
    return {2: config.accumulation + 1, 3: 3 * config.accumulation}.get(stage, 2)
