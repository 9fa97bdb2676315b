"""Where the table lives changes no update; what crosses to a GPU has its tests in `test_gpu`."""

from __future__ import annotations

import pytest
import torch

from gru4recf_dist.errors import UserError
from gru4recf_dist.table.item_table import choose_table_device
from tests.support.ranks import run_ranks
from tests.support.synthetic import random_sessions, write_dataset
from tests.support.training import small_config, train, whole

pytestmark = pytest.mark.dist


def test_the_table_is_beside_the_encoder_unless_it_is_said_to_be_on_the_cpu():
    gpu, cpu = torch.device("cuda", 1), torch.device("cpu")
    assert [choose_table_device(name, gpu) for name in ("auto", "cpu", "cuda")] == [gpu, cpu, gpu]
    assert [choose_table_device(name, cpu) for name in ("auto", "cpu")] == [cpu, cpu]
    with pytest.raises(UserError, match=r"table\.device: cuda was asked for"):
        choose_table_device("cuda", cpu)


def test_training_is_bit_equal_and_a_checkpoint_resumes_under_the_other_placement(tmp_path):
    write_dataset(str(tmp_path / "data"), random_sessions(0, 41, 30), random_sessions(1, 9, 30))

    def run(name: str, *overrides: str) -> dict[str, torch.Tensor]:
        config = small_config(tmp_path / "data", tmp_path / name, *overrides)
        return whole(run_ranks(2, train, tmp_path, config))

    expected = run("auto", "max_steps=8")
    run("moved", "max_steps=5", "table.device=cpu")
    for state in (run("cpu", "max_steps=8", "table.device=cpu"), run("moved", "max_steps=8", "table.device=auto")):
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(state[name], tensor), name
