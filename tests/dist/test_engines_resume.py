"""One checkpoint format for every engine, ZeRO stage, precision and number of ranks."""

from __future__ import annotations

import shutil

import pytest
import torch

from gru4recf_dist.config import Config
from gru4recf_dist.parallel.ranks import Ranks
from tests.dist.test_engines import STAGES, data, engine, relative_error, train_each  # noqa: F401 (data is a fixture)
from tests.dist.test_resume import OPTIONS, STEPS, resume, train_until
from tests.support.ranks import run_ranks
from tests.support.training import small_config, train, whole

pytestmark = pytest.mark.dist

SETTINGS = (*OPTIONS, *STEPS)
VARIANTS = {
    **{str(stage): engine(stage) for stage in STAGES[1:]},
    "ddp-2": ("accumulation=2",),
    "3-2": (*engine(3), "accumulation=2"),
    "bf16": ("precision=bf16",),
    "bf16-2": (*engine(2), "precision=bf16"),
    "fp16": ("precision=fp16", "loss_scale.growth_steps=3"),
}


def train_until_each(ranks: Ranks, configs: dict[str, Config], last_step: int) -> None:
    for config in configs.values():
        train_until(ranks, config, last_step)


def resume_each(ranks: Ranks, configs: dict[str, Config]) -> dict[str, tuple[int, dict[str, torch.Tensor]]]:
    return {name: resume(ranks, config) for name, config in configs.items()}


def test_within_one_configuration_a_resumed_run_ends_bit_equal_to_an_unbroken_one(tmp_path, data):  # noqa: F811
    def configs(folder: str) -> dict[str, Config]:
        return {
            name: small_config(data, tmp_path / folder / name, *SETTINGS, *extra) for name, extra in VARIANTS.items()
        }

    unbroken = run_ranks(2, train_each, tmp_path, configs("unbroken"))
    # Steps 8 and 9 are made, and lost.
    run_ranks(2, train_until_each, tmp_path, configs("broken"), 9)
    resumed = run_ranks(2, resume_each, tmp_path, configs("broken"))
    for name in VARIANTS:
        assert [result[name][0] for result in resumed] == [7, 7], name
        expected = whole([result[name] for result in unbroken])
        state = whole([result[name][1] for result in resumed])
        assert expected.keys() == state.keys()
        for key, tensor in expected.items():
            assert torch.equal(state[key], tensor), (name, key)


@pytest.mark.parametrize(
    ("saved_by", "world", "resumed_by"),
    [
        (2, 2, [("ddp", 3), (3, 4)]),
        (3, 3, [(1, 2), ("ddp", 1)]),
        ("ddp", 4, [(0, 3), (3, 3)]),
        (0, 1, [(2, 3)]),
    ],
)
def test_a_checkpoint_resumes_under_every_other_engine_stage_and_world_size(
    tmp_path,
    data,  # noqa: F811
    saved_by,
    world,
    resumed_by,
):
    settings = (*SETTINGS, "model.dropout=0")
    unbroken = whole(run_ranks(1, train, tmp_path, small_config(data, tmp_path / "unbroken", *settings)))
    run_ranks(world, train_until, tmp_path, small_config(data, tmp_path / "saved", *settings, *engine(saved_by)), 9)
    for stage, other_world in resumed_by:
        folder = tmp_path / f"resumed-{stage}-{other_world}"
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copy(tmp_path / "saved/config.yaml", folder / "config.yaml")
        shutil.copytree(tmp_path / "saved/checkpoints/step-00000007", folder / "checkpoints/step-00000007")
        results = run_ranks(other_world, resume, tmp_path, small_config(data, folder, *settings, *engine(stage)))
        assert [first for first, _ in results] == [7] * other_world
        state = whole([state for _, state in results])
        assert state.keys() == unbroken.keys()
        for name, tensor in state.items():
            assert relative_error(tensor, unbroken[name]) < 1e-5, (stage, other_world, name)
            if name.endswith(".step"):
                assert tensor == 13
