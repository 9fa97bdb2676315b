"""What needs a GPU: the same updates as on the CPU, over NCCL; half precision by its kernels; pinned offloading."""

from __future__ import annotations

import pytest
import torch

from gru4recf_dist.parallel.transfers import differentiable_move
from tests.dist.test_engines import ADAM, STAGES, engine, relative_error, run_each
from tests.dist.test_precision import OVERFLOW_STEP, overflow
from tests.support.ranks import run_ranks
from tests.support.synthetic import random_sessions, write_dataset
from tests.support.training import small_config, train, whole

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# Relative error after 20 steps; here the recurrence of the GRUs is computed in half precision too.
BOUNDS = {"bf16": 0.08, "fp16": 0.02}


# Several tables and RNNs of two layers, event features, and subnets that take turns.
OTHER = (
    *("model.fusion=parallel", "model.feature_groups=[[tags,category],[price]]", "model.output_bias=true"),
    *("model.num_layers=2", "training.strategy=interleaving"),
)


@pytest.mark.parametrize(
    ("loss", "model"),
    [("sampled_softmax", ()), ("full_softmax", ()), ("bpr_max", ()), ("sampled_softmax", OTHER)],
    ids=["sampled", "full", "bpr-max", "parallel-interleaving-event-features"],
)
def test_a_gpu_makes_the_updates_of_the_cpu(tmp_path, loss, model):
    data = str(tmp_path / "data")
    write_dataset(data, random_sessions(0, 41, 30), random_sessions(1, 9, 30), event_features=bool(model))
    options = ("optimizer.name=sgd", "table.optimizer=sgd", f"loss.name={loss}", *model)
    states = {}
    for device in ("cpu", "cuda"):
        config = small_config(tmp_path / "data", tmp_path / device, *options, f"device={device}")
        (state,) = run_ranks(1, train, tmp_path, config, device=device)
        states[device] = {name: tensor.cpu() for name, tensor in whole([state]).items()}
    for name, expected in states["cpu"].items():
        assert relative_error(states["cuda"][name], expected) < 1e-4, name


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(str(folder), random_sessions(0, 41, 30), random_sessions(1, 9, 30), random_sessions(2, 9, 30))
    return folder


@pytest.mark.parametrize("world", [1, 2])
def test_every_engine_and_precision_makes_the_updates_of_the_cpu(tmp_path, data, world):
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} CUDA devices")
    (reference, losses) = run_each(1, tmp_path, data, {"reference": ADAM})["reference"]
    offload = "engine.deepspeed.zero_optimization.offload_optimizer"
    variants = {
        f"{precision}-{stage}": (*ADAM, *engine(stage), f"precision={precision}", "device=cuda")
        for precision in ("fp32", *BOUNDS)
        for stage in STAGES
    }
    for stage in (2, 3):
        pinned = (f"{offload}.device=cpu", f"{offload}.pin_memory=true")
        variants[f"fp32-{stage}-offloaded"] = (*ADAM, *engine(stage), *pinned, "device=cuda")
    for name, (state, found) in run_each(world, tmp_path, data, variants, device="cuda").items():
        bound = BOUNDS.get(name.partition("-")[0], 1e-4)
        assert found == pytest.approx(losses, rel=bound), name
        for key, tensor in reference.items():
            if not key.startswith(("optimizer.", "table.exp")):
                assert relative_error(state[key].cpu(), tensor) < bound, (name, key)


@pytest.mark.parametrize("stage", STAGES)
def test_an_fp16_overflow_skips_the_step(tmp_path, data, stage):
    options = (*ADAM, "precision=fp16", "max_steps=10", "device=cuda")
    config = small_config(data, tmp_path / "run", *options, *engine(stage))
    (result,) = run_ranks(1, overflow, tmp_path, config, "table", device="cuda")
    assert result["updated"] == [step != OVERFLOW_STEP for step in range(1, 11)]
    for key, tensor in result["before"].items():
        assert torch.equal(result["after"][key], tensor), key


@pytest.mark.parametrize("loss", ["sampled_softmax", "full_softmax", "bpr_max"])
def test_a_table_in_host_memory_makes_the_updates_of_one_beside_the_encoder(tmp_path, data, loss):
    states = {}
    for place in ("cuda", "cpu"):
        options = (*ADAM, f"loss.name={loss}", f"table.device={place}", "device=cuda", "evaluation.every_epochs=1")
        config = small_config(data, tmp_path / place, *options)
        (state,) = run_ranks(1, train, tmp_path, config, device="cuda")
        assert state["table.weight"].device.type == place
        states[place] = {name: tensor.cpu() for name, tensor in state.items()}
    for name, expected in states["cuda"].items():
        assert relative_error(states["cpu"][name], expected) < 1e-4, name


@pytest.mark.parametrize(("origin", "target"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_moving_rows_passes_gradcheck(origin, target):
    rows = torch.randn(3, 2, dtype=torch.float64, device=origin, requires_grad=True)
    assert torch.autograd.gradcheck(lambda given: differentiable_move(given, torch.device(target)), (rows,))
