"""W ranks with global batch B make the updates of one rank with batch B (no dropout)."""

from __future__ import annotations

import json

import pytest
import torch

from gru4recf_dist.config import Config
from gru4recf_dist.parallel.ranks import Ranks
from tests.support.ranks import run_ranks
from tests.support.synthetic import random_sessions, write_dataset
from tests.support.training import small_config, train, whole

pytestmark = pytest.mark.dist

SGD = ("optimizer.name=sgd", "optimizer.lr=0.3", "table.optimizer=sgd", "table.lr=0.3")
ADAM = ("optimizer.name=adam", "optimizer.lr=0.01", "table.optimizer=lazy_adam", "table.lr=0.01", "optimizer.clip=0.5")
ADAGRAD = ("optimizer.name=adamw", "table.optimizer=rowwise_adagrad", "table.lr=0.05", "table.clip=0.05")
SAMPLED = ("loss.name=sampled_softmax",)
CLASSIC = ("loss.name=sampled_softmax", "loss.logq=classic", "model.score=cosine", "model.learn_temperature=true")
IN_BATCH = (*SAMPLED, "loss.in_batch=24", "loss.sampler=uniform")
IN_BATCH_CLASSIC = (*CLASSIC, "loss.in_batch=9")
FULL = ("loss.name=full_softmax",)
BPR_MAX = ("loss.name=bpr_max", "loss.in_batch=all", "loss.regularization=0.5", "loss.elu=0.5")
BATCH_ALONE = {
    "bpr_max": ("loss.name=bpr_max", "loss.negatives=0", "loss.in_batch=all", "accumulation=2"),
    "softmax": ("loss.logq=off", "loss.negatives=0", "loss.in_batch=11"),
    "softmax beside sampled ones": ("loss.logq=off", "loss.in_batch=all"),
}
TOP1_MAX = ("loss.name=top1_max", "loss.sampler=uniform", "loss.in_batch=7")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """47 sessions in 8 streams: the last batch of an epoch leaves some ranks empty-handed. Most exceed a window."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(str(folder), random_sessions(0, 41, items=30), random_sessions(1, 9, 30), random_sessions(2, 9, 30))
    return folder


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).norm() / reference.norm().clamp(min=1e-12))


def run(world: int, tmp_path, data, name: str, *overrides: str) -> tuple[dict, list[float]]:
    folder = tmp_path / f"{name}-{world}"
    states = run_ranks(world, train, tmp_path, small_config(data, folder, *overrides))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return whole(states), [line["train/loss"] for line in lines if "train/lr" in line]


@pytest.mark.parametrize(
    ("optimizers", "loss"),
    [
        (SGD, SAMPLED),
        (SGD, FULL),
        (SGD, IN_BATCH),
        (ADAM, SAMPLED),
        (ADAM, FULL),
        (ADAM, IN_BATCH_CLASSIC),
        (ADAGRAD, CLASSIC),
        (SGD, BPR_MAX),
        (ADAM, TOP1_MAX),
    ],
    ids=[
        "sgd-sampled",
        "sgd-full",
        "sgd-in-batch",
        "adam-sampled",
        "adam-full",
        "adam-in-batch-classic",
        "adagrad-classic-cosine",
        "sgd-bpr-max-in-batch",
        "adam-top1-max",
    ],
)
def test_float64_updates_are_equal_at_1_2_and_4_ranks(tmp_path, data, optimizers, loss):
    reference, reference_losses = run(1, tmp_path, data, "run", *optimizers, *loss, "precision=fp64")
    assert len(reference_losses) == 20
    assert reference_losses[-1] < reference_losses[0]
    for world in (2, 4):
        state, losses = run(world, tmp_path, data, "run", *optimizers, *loss, "precision=fp64")
        assert losses == pytest.approx(reference_losses, rel=1e-10)
        for name, tensor in reference.items():
            assert relative_error(state[name], tensor) < 1e-10, name


def test_micro_batches_share_the_negatives_of_the_whole_batch(tmp_path, data):
    reference, losses = run(1, tmp_path, data, "whole", *SGD, *IN_BATCH, "precision=fp64")
    for world in (1, 2):
        state, parts = run(world, tmp_path, data, "parts", *SGD, *IN_BATCH, "precision=fp64", "accumulation=4")
        assert parts == pytest.approx(losses, rel=1e-10)
        for name, tensor in reference.items():
            assert relative_error(state[name], tensor) < 1e-10, name


def test_updates_from_negatives_of_the_batch_are_equal_at_1_and_2_ranks(tmp_path, data):
    ends = {}
    for world in (1, 2):
        configs = {
            name: small_config(data, tmp_path / name / str(world), *SGD, *loss, "precision=fp64", "max_steps=8")
            for name, loss in BATCH_ALONE.items()
        }
        states = run_ranks(world, train_each, tmp_path, configs)
        ends[world] = {name: whole([state[name] for state in states]) for name in configs}
    before = ends[1]["bpr_max"]
    for name, reference in ends[1].items():
        for key, tensor in reference.items():
            assert relative_error(ends[2][name][key], tensor) < 1e-10, (name, key)
        assert name == "bpr_max" or not torch.equal(reference["table.weight"], before["table.weight"])


def train_each(ranks: Ranks, configs: dict[str, Config]) -> dict[str, dict[str, torch.Tensor]]:
    return {name: train(ranks, config) for name, config in configs.items()}


@pytest.mark.parametrize("optimizers", [SGD, ADAM], ids=["sgd", "adam"])
def test_float32_updates_are_equal_within_rounding(tmp_path, data, optimizers):
    reference, _ = run(1, tmp_path, data, "run", *optimizers)
    for world in (3, 8):
        state, _ = run(world, tmp_path, data, "run", *optimizers)
        for name in (name for name in reference if not name.startswith("optimizer.")):
            assert relative_error(state[name], reference[name]) < 1e-5, name


@pytest.mark.parametrize(("optimizers", "stage"), [(ADAM, 1), (SGD, 1), (ADAM, 2)], ids=["adam-1", "sgd-1", "adam-2"])
def test_zero_stages_of_deepspeed_give_ddps_updates(tmp_path, data, optimizers, stage):
    reference, losses = run(1, tmp_path, data, "ddp", *optimizers)
    engine = ("engine.name=deepspeed", f"engine.deepspeed.zero_optimization.stage={stage}")
    state, deepspeed_losses = run(2, tmp_path, data, "deepspeed", *optimizers, *engine)
    assert deepspeed_losses == pytest.approx(losses, rel=1e-5)
    for name, tensor in reference.items():
        assert relative_error(state[name], tensor) < 1e-5, name
