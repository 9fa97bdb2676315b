"""What needs a GPU: the same updates as on the CPU, over NCCL."""

from __future__ import annotations

import pytest
import torch

from tests.dist.test_world_size_equality import relative_error
from tests.support.ranks import run_ranks
from tests.support.synthetic import random_sessions, write_dataset
from tests.support.training import small_config, train, whole

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("loss", ["sampled_softmax", "full_softmax"])
def test_a_gpu_makes_the_updates_of_the_cpu(tmp_path, loss):
    write_dataset(str(tmp_path / "data"), random_sessions(0, 41, 30), random_sessions(1, 9, 30))
    options = ("optimizer.name=sgd", "table.optimizer=sgd", f"loss.name={loss}")
    states = {}
    for device in ("cpu", "cuda"):
        config = small_config(tmp_path / "data", tmp_path / device, *options, f"device={device}")
        (state,) = run_ranks(1, train, tmp_path, config, device=device)
        states[device] = {name: tensor.cpu() for name, tensor in whole([state]).items()}
    for name, expected in states["cpu"].items():
        assert relative_error(states["cuda"][name], expected) < 1e-4, name
