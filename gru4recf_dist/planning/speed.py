"""How fast a machine is, given or measured, and how long a training step would take on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import PackedSequence

from gru4recf_dist.model.packed_gru import PackedGRU
from gru4recf_dist.parallel.ranks import Ranks, wait_for_all
from gru4recf_dist.planning.memory import row_state_elements
from gru4recf_dist.planning.wire import ALL_TO_ALL, sent_bytes
from gru4recf_dist.planning.workload import StepCounts, Workload

# Events of the session that an RNN is measured with.
_RNN_STEPS = 64


@dataclass(frozen=True)
class Machine:
    """Sustained rates of one rank. The defaults are guesses for an H100 with NVLink and a 400 Gbit/s network card.

    Attributes:
        matmul_tflops: of float32 products (float64 and half precision differ: give what holds).
        memory_gbs, link_gbs, network_gbs, pcie_gbs: GB/s of device memory, to ranks of the same node, to others (of
            one rank), and between host and device (only for a table in host memory).
        functions_gs: billion values a second that go through an exponential or the like, beside their way from memory.
        routing_mids: million ids a second that a CPU core sorts.
        rnn_step_us: of one event of a session through one layer of an RNN, there and back: they come one by one.
        latency_us: of a collective.
        fixed_ms: what a step costs whatever its size: launching kernels.
        ranks_per_node: ranks that share a node.
    """

    matmul_tflops: float = 30.0
    memory_gbs: float = 2000.0
    link_gbs: float = 250.0
    network_gbs: float = 40.0
    pcie_gbs: float = 25.0
    functions_gs: float = 1000.0
    routing_mids: float = 15.0
    rnn_step_us: float = 15.0
    latency_us: float = 30.0
    fixed_ms: float = 2.5
    ranks_per_node: int = 8


def step_seconds(workload: Workload, counts: StepCounts, machine: Machine) -> dict[str, float]:
    """Seconds of a step, by resource, one after the other. The largest is what limits the step.

    Much of it goes on at the same time, if the machine has room for that: routing, the negatives' rows and their
    gradients, and the encoder's gradients travel beside what is computed.
    """
    config = workload.config
    size, micro = workload.element_bytes, config.accumulation
    # All wait for the rank with most events.
    events = counts.events_largest
    # Every query meets all negatives, or all queries meet this rank's rows.
    pairs = events * counts.negatives if workload.samples else counts.events * workload.world * workload.rows
    # Forward and backward of the encoder are three products a weight and event. Logits are made twice, and have two
    # gradients: four products.
    flops = 6.0 * events * _products(workload) + 8.0 * pairs * workload.query_size
    touched, widths = workload.touched_rows(counts), workload.table_widths
    # Rows are read and handed on; their gradients made, looked at for what is not finite, summed, scaled, squared, and
    # added: each of these reads or writes all values once or several times. Then the state, read and written.
    row_traffic = sum(
        rows * size * (36.0 * widths[name] + 2.0 * row_state_elements(config.table.optimizer, widths[name]))
        for name, rows in touched.items()
    )
    # What the encoder keeps, and its gradient: each written once and read once.
    activations = 4.0 * events * workload.activation_elements * size
    cost = workload.logit_cost
    functions = pairs * cost.functions + events * sum(3 * rnn.hidden_size * rnn.num_layers for rnn in workload.rnns)
    layers = sum(rnn.num_layers for rnn in workload.rnns)
    seconds = {
        "matrix products": micro * flops / machine.matmul_tflops / 1e12,
        "memory": micro * (cost.passes * pairs * size + row_traffic + activations) / machine.memory_gbs / 1e9,
        "exponentials": micro * functions / machine.functions_gs / 1e9,
        "RNN, event by event": micro * layers * counts.longest * machine.rnn_step_us / 1e6,
        "host (routing)": micro
        * (2.0 * events + config.loss.negatives * workload.samples)
        / machine.routing_mids
        / 1e6,
    }
    if workload.host_table:
        moved = sum(rows * widths[name] * size for name, rows in touched.items())
        seconds["host link (table rows)"] = micro * 2.0 * moved / machine.pcie_gbs / 1e9
    seconds["wire"] = wire_seconds(sent_bytes(workload, counts), workload.world, machine)
    # What is told a step ahead, sizes, ids and targets that are negatives, costs no time of its own.
    collectives = 5 if workload.samples else 7
    # Each further table's rows go and come by themselves.
    collectives += 4 * (len(workload.encoder.parts) - 1) + (workload.target_width > 0)
    # Counts, flags and the encoder's gradients.
    once = 3
    seconds["latency and launches"] = machine.fixed_ms / 1e3 + (
        machine.latency_us * 1e-6 * (micro * collectives + once) if workload.world > 1 else 0.0
    )
    return seconds


def wire_seconds(sent: dict[str, float], world: int, machine: Machine) -> float:
    """Time to send ``sent``, by purpose."""
    if world == 1:
        return 0.0
    exchanged = sum(size for purpose, size in sent.items() if purpose in ALL_TO_ALL)
    ring = sum(sent.values()) - exchanged
    here = min(machine.ranks_per_node, world)
    far = exchanged * (world - here) / (world - 1)
    near = exchanged - far
    # A ring leaves a node over all of its network cards, and inside it goes over links.
    hop = machine.link_gbs if world == here else min(machine.link_gbs, here * machine.network_gbs)
    return max(near / machine.link_gbs, far / machine.network_gbs) / 1e9 + ring / hop / 1e9


def _products(workload: Workload) -> int:
    """Multiplications of weights with an event in the encoder's forward."""
    hidden, total = workload.config.model.hidden_size, 0
    for rnn in workload.rnns:
        total += 3 * hidden * (rnn.input_size + hidden) + (rnn.num_layers - 1) * 6 * hidden**2
    dense = workload.encoder.dense_layer
    return total + (dense.weight.numel() if dense is not None else 0)


# -- measuring --------------------------------------------------------------------------------------------------------


def measure(machine: Machine, ranks: Ranks, hidden: int = 128) -> Machine:
    """``machine`` with what can be measured here: every rank measures at the same time, and the slowest counts.

    Between ranks it measures one rate, and takes it for links and network alike.

    Args:
        hidden: of the RNN.
    """
    device = ranks.device
    side, elements = (4096, 1 << 28) if device.type == "cuda" else (768, 1 << 23)
    left, right = (torch.randn(side, side, device=device) for _ in range(2))
    memory = torch.ones(elements, device=device)
    # As many as a block of logits.
    logits = torch.randn(256, 2048, device=device)
    target = torch.empty_like(memory)
    ids = np.random.default_rng(0).integers(0, 1 << 30, 1 << 18)
    rates = [
        2.0 * side**3 / _seconds(lambda: torch.mm(left, right), ranks) / 1e12,
        # A copy reads and writes.
        2.0 * memory.nbytes / _seconds(lambda: target.copy_(memory), ranks) / 1e9,
        len(ids) / _seconds(lambda: np.unique(ids, return_inverse=True), ranks) / 1e6,
        logits.numel() / _seconds(lambda: torch.sigmoid(logits), ranks) / 1e9,
        # As rates, this and the latency, so that the slowest rank's is the smallest.
        _RNN_STEPS * 1e-6 / _seconds(partial(_train_rnn, PackedGRU(hidden, hidden, 1).to(device)), ranks),
    ]
    found = {"matmul_tflops": 0, "memory_gbs": 1, "routing_mids": 2, "functions_gs": 3}
    if ranks.world > 1:
        share = (16 if device.type == "cuda" else 1) * (1 << 20)
        sent = torch.ones(share * ranks.world, device=device)
        received = torch.empty_like(sent)
        seconds = _seconds(lambda: dist.all_to_all_single(received, sent, group=ranks.table), ranks)
        rates.append(4.0 * share * (ranks.world - 1) / seconds / 1e9)
        small = torch.ones(ranks.world, device=device)
        seconds = _seconds(lambda: dist.all_to_all_single(torch.empty_like(small), small, group=ranks.table), ranks)
        rates.append(1e-6 / seconds)
        found |= {"link_gbs": 5, "network_gbs": 5}
    slowest = torch.tensor(rates, dtype=torch.float64)
    if ranks.world > 1:
        dist.all_reduce(slowest, op=dist.ReduceOp.MIN, group=ranks.host)
    rates = slowest.tolist()
    measured = {name: rates[place] for name, place in found.items()} | {"rnn_step_us": 1.0 / rates[4]}
    if ranks.world > 1:
        measured["latency_us"] = 1.0 / rates[6]
    return replace(machine, **measured)


def _train_rnn(rnn: PackedGRU) -> None:
    """Forward and backward of one session: nothing that could be done at once."""
    events = torch.ones(_RNN_STEPS, rnn.input_size, device=rnn.weight_hh_l0.device, requires_grad=True)
    rnn(PackedSequence(events, torch.ones(_RNN_STEPS, dtype=torch.int64))).data.sum().backward()


def _seconds(work: Callable[[], object], ranks: Ranks, rounds: int = 7) -> float:
    """Median time of ``work``, which every rank does at once."""
    taken = []
    work()
    for _ in range(rounds):
        _finish(ranks)
        wait_for_all(ranks)
        started = time.perf_counter()
        work()
        _finish(ranks)
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def _finish(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
