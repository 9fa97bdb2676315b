"""What a training run would need: memory of a rank, bytes on the wire, the time of a step and what limits it.

python -m gru4recf_dist.plan --items 2e9 --dim 128 --gpus 64 --batch 8192 --negatives 8192
python -m gru4recf_dist.plan --data data/ml-100k --config configs/ml-100k.yaml --gpus 2 --measure
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, fields
from typing import NoReturn

from gru4recf_dist import config as configuration
from gru4recf_dist.config import Config
from gru4recf_dist.data.shard_format import read_manifest
from gru4recf_dist.errors import UserError, exits_cleanly
from gru4recf_dist.model.features import FeatureSpec
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.planning import memory, popularity, speed, wire
from gru4recf_dist.planning.workload import ItemFeature, Workload, expected_counts
from gru4recf_dist.recommender import event_specs, feature_specs
from gru4recf_dist.table.negatives import read_popularity

GIB, MIB = 1 << 30, 1 << 20
# Flags that are short for a key of the configuration.
_KEYS = {
    "dim": "model.embedding_size",
    "hidden": "model.hidden_size",
    "layers": "model.num_layers",
    "batch": "batch_size",
    "accumulation": "accumulation",
    "negatives": "loss.negatives",
    "table_optimizer": "table.optimizer",
    "table_device": "table.device",
}
_UNITS = {
    "matmul_tflops": "TFLOP/s of float32 products",
    "memory_gbs": "GB/s of device memory",
    "link_gbs": "GB/s of a rank to ranks of its node",
    "network_gbs": "GB/s of a rank to other nodes",
    "pcie_gbs": "GB/s between host and device",
    "functions_gs": "billion exponentials a second on a device",
    "routing_mids": "million ids a second that a core sorts",
    "rnn_step_us": "of an event in an RNN's layer, forward and backward",
    "latency_us": "of a collective",
    "fixed_ms": "of a step, whatever its size",
}


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    """Print the plan."""
    given = parse(arguments)
    machine = speed.Machine(
        ranks_per_node=given.gpus_per_node,
        **{name: getattr(given, name) for name in _UNITS},
    )
    workload = workload_of(given)
    if given.measure:
        with process_ranks.running(given.device, timeout_seconds=300) as ranks:
            machine = speed.measure(machine, ranks, workload.config.model.hidden_size)
        if not ranks.is_first:
            return
    plan = make_plan(workload, machine, given.gpu_gib * GIB, given.node_gib * GIB)
    print(json.dumps(plan) if given.json else _text(workload, machine, plan))


def make_plan(workload: Workload, machine: speed.Machine, gpu_limit: float, node_limit: float) -> dict:
    """The plan as JSON types: sizes in bytes, times in seconds; ``gpus_needed`` is null if no number is enough."""
    counts = expected_counts(workload)
    limits = (gpu_limit, node_limit, machine.ranks_per_node)
    seconds = speed.step_seconds(workload, counts, machine)
    return {
        "counts": asdict(counts),
        "device_bytes": memory.device_bytes(workload, counts),
        "node_bytes": memory.node_bytes(workload, machine.ranks_per_node),
        "device_limit": gpu_limit,
        "node_limit": node_limit,
        "fits": memory.fits(workload, *limits),
        "gpus_needed": memory.ranks_needed(workload, *limits),
        "wire_bytes": wire.sent_bytes(workload, counts),
        "seconds": seconds,
        "step_seconds": sum(seconds.values()),
        "limited_by": max(seconds, key=seconds.get),
        "machine": asdict(machine),
    }


def workload_of(given: argparse.Namespace) -> Workload:
    """What is to be planned, given the command line.

    Raises:
        UserError: its parts do not go together.
    """
    overrides = [f"{key}={getattr(given, flag)}" for flag, key in _KEYS.items() if getattr(given, flag) is not None]
    # The configuration names both; a plan reads no more than the data set that --data names, and writes nothing.
    names = [f"data={given.data or 'none'}", "run_dir=none"]
    config = configuration.load(given.config, [*names, *given.overrides, *overrides], training=False)
    if given.data is not None:
        for flag in ("items", "feature", "event_feature", "zipf", "item_order"):
            if getattr(given, flag) is not None:
                raise UserError(f"--{flag.replace('_', '-')}: the data set decides it; leave out --data or this")
        manifest = read_manifest(config.data)
        train = manifest.splits["train"]
        items, events = manifest.items, train.events / train.sessions
        features = tuple(
            ItemFeature(spec, manifest.feature(spec.name).longest) for spec in feature_specs(config.model, manifest)
        )
        event_features = tuple(event_specs(config.model, manifest))
        balanced = manifest.recipe.get("item_order") == "balanced"
        popular = popularity.of_counts(read_popularity(config.data, manifest)[1:], balanced)
    elif given.items is None:
        raise UserError("one of --items and --data must be given")
    else:
        items, events = given.items, 8.0
        features = tuple(_feature(text, place) for place, text in enumerate(given.feature or []))
        event_features = tuple(_event_feature(text, place) for place, text in enumerate(given.event_feature or []))
        popular = popularity.zipf(items, 1.0 if given.zipf is None else given.zipf, given.item_order == "balanced")
    if config.batch_size // config.accumulation < given.gpus:
        raise UserError(
            f"--gpus: {given.gpus} ranks are more than the {config.batch_size // config.accumulation} sessions of a "
            "(micro-)batch"
        )
    unknown = {name for group in config.model.feature_groups or [] for name in group}
    unknown -= {feature.spec.name for feature in features}
    if unknown:
        raise UserError(
            f"model.feature_groups: there is no feature {', '.join(sorted(unknown))} (feature-0 is the first)"
        )
    if not features:
        config = config.model_copy(update={"model": config.model.model_copy(update={"fusion": "item_only"})})
    return Workload(config, items, given.gpus, given.session_events or events, features, popular, event_features)


def _feature(text: str, place: int) -> ItemFeature:
    """`token:SIZE`, `token_seq:SIZE:LONGEST`, `float` or `vector:SIZE`."""
    kind, *numbers = text.split(":")
    expected = {"token": 1, "token_seq": 2, "float": 0, "vector": 1}
    if expected.get(kind) != len(numbers):
        raise UserError(f"--feature: '{text}' is none of token:SIZE, token_seq:SIZE:LONGEST, float, vector:SIZE")
    size, longest, *_ = [*(_count(number, "--feature") for number in numbers), 1, 1]
    return ItemFeature(FeatureSpec(f"feature-{place}", kind, size), longest)


def _event_feature(text: str, place: int) -> FeatureSpec:
    """`token:SIZE`, which time gaps are too, or `float`."""
    kind, *numbers = text.split(":")
    if {"token": 1, "float": 0}.get(kind) != len(numbers):
        raise UserError(f"--event-feature: '{text}' is neither token:SIZE nor float")
    size = _count(numbers[0], "--event-feature") if numbers else 1
    return FeatureSpec(f"event-feature-{place}", kind, size, missing=kind == "float")


# -- the text ---------------------------------------------------------------------------------------------------------


def _text(workload: Workload, machine: speed.Machine, plan: dict) -> str:
    config: Config = workload.config
    loss = config.loss.name.replace("_", " ")
    drawn = [f"{config.loss.negatives:,} negatives ({config.loss.sampler})"] * bool(config.loss.negatives)
    drawn += [f"{config.loss.in_batch} of the batch"] * bool(config.loss.in_batch)
    if workload.samples:
        loss += f" with {' and '.join(drawn)}"
    counts = plan["counts"]
    lines = [
        f"{workload.items:,} items of {workload.dim} values, table optimizer {config.table.optimizer}, "
        f"{workload.world} GPUs ({machine.ranks_per_node} a node)",
        f"batch of {config.batch_size:,} sessions, {workload.session_events:.4g} events each; {loss}",
        f"a rank's step: {config.accumulation} x {counts['events']:,.0f} events, {counts['ids']:,.0f} distinct items"
        + (f"; {counts['negatives']:,.0f} distinct negatives" if workload.samples else ""),
        f"the rank that is asked for most rows is asked for {counts['lookup_imbalance']:.2f} times the mean",
        "",
        *_section("memory of a rank's device", plan["device_bytes"], GIB, "GiB"),
        *_section("host memory of a node", plan["node_bytes"], GIB, "GiB"),
        *_section("sent by a rank in a step", plan["wire_bytes"], MIB, "MiB"),
        *_section("time of a step", plan["seconds"], 1e-3, "ms"),
        f"a step takes {1e3 * plan['step_seconds']:.3g} ms: {config.batch_size / plan['step_seconds']:,.0f} sessions/s",
        f"limited by: {plan['limited_by']}",
        _verdict(plan),
    ]
    return "\n".join(lines)


def _section(title: str, parts: dict[str, float], unit: float, name: str) -> list[str]:
    rows = [(title, name), *((f"  {part}", f"{size / unit:,.3f}") for part, size in parts.items())]
    rows.append(("  total", f"{sum(parts.values()) / unit:,.3f}"))
    return [f"{left:<34}{right:>14}" for left, right in rows] + [""]


def _verdict(plan: dict) -> str:
    device, node = sum(plan["device_bytes"].values()), sum(plan["node_bytes"].values())
    limits = (
        f"{device / GIB:,.1f} GiB of {plan['device_limit'] / GIB:,.1f} a GPU ({memory.RESERVED:.0%} are kept free), "
        f"{node / GIB:,.1f} GiB of {plan['node_limit'] / GIB:,.1f} a node"
    )
    needed = plan["gpus_needed"]
    if plan["fits"]:
        return f"it fits: {limits}; the fewest GPUs that hold it: {needed}"
    if needed is not None:
        return f"IT DOES NOT FIT: {limits}; it takes {needed} GPUs"
    large = {**plan["device_bytes"], **plan["node_bytes"]}
    return (
        f"IT DOES NOT FIT: {limits}; nor does it on any number of GPUs that this batch can be dealt to. "
        f"The largest part is: {max(large, key=large.get)}"
    )


# -- the command line -------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Its errors are one line, as everywhere here."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message.replace("argument ", "", 1))


def _count(text: str, flag: str = "") -> int:
    number = _number(text, flag)
    if number != int(number):
        raise UserError(f"{flag}: '{text}' is not a whole number above 0".removeprefix(": "))
    return int(number)


def _number(text: str, flag: str = "") -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"{flag}: '{text}' is not a number above 0".removeprefix(": "))
    return number


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; UserError if it is wrong."""
    parser = _Parser(
        prog="gru4recf_dist.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(flag: str, kind, default, text: str) -> None:
        shown = text if default is None else f"{text} (default {default:g})"
        parser.add_argument(flag, type=lambda value: kind(value, flag), default=default, metavar="X", help=shown)

    parser.add_argument("--config", help="a recipe; the flags override it, and key=value overrides the rest of it")
    parser.add_argument("--data", help="a prepared data set, for items, popularity, features and session length")
    add("--items", _count, None, "N, without --data")
    add("--zipf", _number, None, "exponent of the items' popularity, without --data (default 1)")
    parser.add_argument(
        "--item-order", choices=("md5", "balanced"), help="of the ids, as in preparation, without --data (default md5)"
    )
    parser.add_argument(
        "--feature",
        action="append",
        help="of an item, without --data: token:SIZE, token_seq:SIZE:LONGEST, float, "
        "vector:SIZE; can be given several times",
    )
    parser.add_argument(
        "--event-feature",
        action="append",
        help="of an event, without --data: token:SIZE (time gaps, too) or float; can be given several times",
    )
    add("--session-events", _number, None, "mean events of a session (default: the data set's, or 8)")
    add("--gpus", _count, 1, "ranks")
    for flag, key in _KEYS.items():
        name = f"--{flag.replace('_', '-')}"
        if flag in ("table_optimizer", "table_device"):
            parser.add_argument(name, help=key)
        else:
            add(name, _count, None, key)
    add("--gpu-gib", _number, 80.0, "memory of a GPU")
    add("--node-gib", _number, 1024.0, "host memory of a node")
    add("--gpus-per-node", _count, 8, "ranks that share a node")
    for rate in fields(speed.Machine):
        if rate.name in _UNITS:
            add(f"--{rate.name.replace('_', '-')}", _number, rate.default, _UNITS[rate.name])
    parser.add_argument("--measure", action="store_true", help="measure rates here; under torchrun, between ranks too")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what to measure")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
