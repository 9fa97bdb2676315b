"""Every engine, ZeRO stage, precision and accumulation makes the updates of one process in float32."""

from __future__ import annotations

import json

import pytest
import torch

from gru4recf_dist.parallel.ranks import Ranks
from tests.support.ranks import run_ranks
from tests.support.synthetic import random_sessions, write_dataset
from tests.support.training import small_config, train, whole

pytestmark = pytest.mark.dist

STAGES = ("ddp", 0, 1, 2, 3)
ADAM = ("optimizer.name=adam", "optimizer.lr=0.01", "table.optimizer=lazy_adam", "table.lr=0.01", "optimizer.clip=0.5")
SGD = ("optimizer.name=sgd", "optimizer.lr=0.3", "table.optimizer=sgd", "table.lr=0.3")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """41 sessions in 8 streams: the last batch of an epoch leaves some ranks empty-handed. Most exceed a window."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(str(folder), random_sessions(0, 41, items=30), random_sessions(1, 9, 30), random_sessions(2, 9, 30))
    return folder


def engine(stage: str | int) -> tuple[str, ...]:
    """The overrides that choose DDP or a ZeRO stage."""
    if stage == "ddp":
        return ("engine.name=ddp",)
    return ("engine.name=deepspeed", f"engine.deepspeed.zero_optimization.stage={stage}")


def train_each(ranks: Ranks, configs: dict[str, object]) -> dict[str, dict[str, torch.Tensor]]:
    """Train one configuration after the other in the same processes."""
    return {name: train(ranks, config) for name, config in configs.items()}


def run_each(
    world: int, tmp_path, data, variants: dict[str, tuple[str, ...]], device: str = "cpu"
) -> dict[str, tuple[dict, list[float]]]:
    """Final state and losses of each variant, all in one launch."""
    folders = {name: tmp_path / f"{name}-{world}" for name in variants}
    configs = {name: small_config(data, folders[name], *overrides) for name, overrides in variants.items()}
    states = run_ranks(world, train_each, tmp_path, configs, device=device)
    result = {}
    for name, folder in folders.items():
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = [line["train/loss"] for line in lines if "train/lr" in line]
        result[name] = whole([state[name] for state in states]), losses
    return result


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).norm() / reference.norm().clamp(min=1e-12))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_all_engines_stages_and_accumulations_make_the_same_updates(tmp_path, data, world):
    (reference, reference_losses) = run_each(1, tmp_path, data, {"reference": ADAM})["reference"]
    assert len(reference_losses) == 20 and reference_losses[-1] < reference_losses[0]
    variants = {f"{stage}-{k}": (*ADAM, *engine(stage), f"accumulation={k}") for stage in STAGES for k in (1, 2)}
    for name, (state, losses) in run_each(world, tmp_path, data, variants).items():
        assert losses == pytest.approx(reference_losses, rel=1e-5), name
        assert state.keys() == reference.keys(), name
        for key, tensor in reference.items():
            assert relative_error(state[key], tensor) < 1e-5, (name, key)


def test_plain_sgd_and_weight_decay_are_the_same_too(tmp_path, data):
    decay = ("optimizer.name=adamw", "optimizer.weight_decay=0.1", "optimizer.lr=0.01")
    for options in (SGD, decay):
        variants = {f"{options[0]}-{stage}": (*options, *engine(stage)) for stage in STAGES}
        results = run_each(2, tmp_path, data, variants)
        reference, _ = results.pop(f"{options[0]}-ddp")
        for name, (state, _) in results.items():
            for key, tensor in reference.items():
                assert relative_error(state[key], tensor) < 1e-5, (name, key)
