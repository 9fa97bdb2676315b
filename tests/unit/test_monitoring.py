"""What a run shows, read back with TensorBoard's own reader."""

from __future__ import annotations

import json
import math
import time
import uuid
from pathlib import Path

import pytest
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

from gru4recf_dist.config import Config, MonitoringConfig
from gru4recf_dist.data import storage
from gru4recf_dist.data.shard_format import SPLITS, Manifest, ShardInfo, SplitInfo
from gru4recf_dist.monitoring import Monitor
from gru4recf_dist.run_description import describe

CONFIG = Config(data="d", run_dir="r", seed=7, max_steps=3)
SPLIT = SplitInfo(
    sessions=1,
    events=2,
    targets=1,
    shards=[ShardInfo(url="x", stream=0, sessions=1, events=2, targets=1, bytes=512, sha256="")],
)
MANIFEST = Manifest(name="m", seed=0, items=9, streams=8, protocol="leave_one_out", splits=dict.fromkeys(SPLITS, SPLIT))
DESCRIPTION = describe(CONFIG, MANIFEST, world=2)
TEST = "eval/when_finished/test/ndcg@10"


def _monitor(run_dir, first_step: int = 0, **settings) -> Monitor:
    config = MonitoringConfig(**{"progress": False, **settings})
    return Monitor(config, str(run_dir), DESCRIPTION, enabled=True, first_step=first_step, total_steps=100)


def _log(run_dir, steps, first_step: int = 0, offset: float = 0.0, **settings) -> None:
    monitor = _monitor(run_dir, first_step, **settings)
    for step in steps:
        monitor.scalars(step, {"train/loss": offset + step})
        monitor.advance(loss=offset + step)
    monitor.close()


def _lines(run_dir) -> list[dict]:
    content = storage.read_bytes(storage.join(str(run_dir), "metrics.jsonl")).decode()
    assert content == "" or content.endswith("\n")
    return [json.loads(line) for line in content.splitlines()]


def _events(run_dir, tmp_path: Path | None = None) -> EventAccumulator:
    """What TensorBoard, started now, sees; of a run in memory by a copy in ``tmp_path``."""
    folder = storage.join(str(run_dir), "tensorboard")
    if not storage.is_local(folder):
        copy = tmp_path / uuid.uuid4().hex
        copy.mkdir()
        for name in storage.list_names(folder):
            (copy / name).write_bytes(storage.read_bytes(storage.join(folder, name)))
        folder = str(copy)
    return EventAccumulator(folder).Reload()


def _curve(run_dir, tmp_path: Path | None = None, tag: str = "train/loss") -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in _events(run_dir, tmp_path).Scalars(tag)]


def _hparams(run_dir, name: str):
    content = _events(run_dir).SummaryMetadata(f"_hparams_/{name}").plugin_data.content
    return getattr(plugin_data_pb2.HParamsPluginData.FromString(content), name)


@pytest.fixture(params=["local", "memory"])
def run_dir(request, tmp_path):
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def test_each_call_is_one_line(run_dir):
    monitor = _monitor(run_dir, tensorboard=False)
    monitor.scalars(1, {"train/loss": 0.5, "perf/events_per_second": 10.0})
    monitor.scalars(2, {"train/loss": 0.25})
    monitor.close()
    assert _lines(run_dir) == [
        {"step": 1, "train/loss": 0.5, "perf/events_per_second": 10.0},
        {"step": 2, "train/loss": 0.25},
    ]


def test_what_is_not_finite_is_null(run_dir):
    _log(run_dir, [1], offset=math.nan)
    monitor = _monitor(run_dir, first_step=1)
    monitor.scalars(2, {"train/loss": 0.5, "train/gradient_norm": math.nan, "table/gradient_norm": -math.inf})
    monitor.close()
    assert storage.read_bytes(storage.join(run_dir, "metrics.jsonl")).decode().splitlines() == [
        '{"step": 1, "train/loss": null}',
        '{"step": 2, "train/loss": 0.5, "train/gradient_norm": null, "table/gradient_norm": null}',
    ]


def test_lines_can_be_read_while_the_run_goes_on(tmp_path):
    monitor = _monitor(tmp_path, tensorboard=False)
    monitor.scalars(1, {"train/loss": 0.5})
    assert _lines(tmp_path) == [{"step": 1, "train/loss": 0.5}]
    monitor.close()


def test_restart_drops_the_lines_after_its_checkpoint(run_dir):
    _log(run_dir, range(1, 8), tensorboard=False)
    _log(run_dir, [5, 6], first_step=4, offset=100.0, tensorboard=False)
    assert [(line["step"], line["train/loss"]) for line in _lines(run_dir)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 4.0),
        (5, 105.0),
        (6, 106.0),
    ]


@pytest.mark.parametrize("half", ['{"step": 4, "train/lo', '{"step": 4, "train/loss": 4.', "{", '{"step": 4}\n{"st'])
def test_restart_drops_half_a_line(run_dir, half):
    _log(run_dir, range(1, 4), tensorboard=False)
    url = storage.join(run_dir, "metrics.jsonl")
    storage.write_bytes(url, storage.read_bytes(url) + half.encode())
    _log(run_dir, [4], first_step=3, offset=100.0, tensorboard=False)
    assert [(line["step"], line["train/loss"]) for line in _lines(run_dir)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 104.0),
    ]


def test_restart_survives_a_line_of_garbage(run_dir):
    # After a power cut a file system may leave a block of zeros, and a later line after it.
    _log(run_dir, range(1, 4), tensorboard=False)
    url = storage.join(run_dir, "metrics.jsonl")
    storage.write_bytes(url, storage.read_bytes(url) + b"\x00\x00\x00}\n")
    _log(run_dir, [4], first_step=3, tensorboard=False)
    assert [line["step"] for line in _lines(run_dir)] == [1, 2, 3, 4]


def test_restart_from_the_beginning_drops_everything(run_dir):
    _log(run_dir, range(1, 8), tensorboard=False)
    _log(run_dir, [1], offset=100.0, tensorboard=False)
    assert [line["train/loss"] for line in _lines(run_dir)] == [101.0]


def test_tensorboard_holds_the_scalars(tmp_path):
    _log(tmp_path, [1, 2, 5])
    assert _curve(tmp_path) == [(1, 1.0), (2, 2.0), (5, 5.0)]


def test_tensorboard_after_a_restart_drops_later_steps(tmp_path):
    _log(tmp_path, range(1, 8))
    _log(tmp_path, [5, 6], first_step=4, offset=100.0)
    assert _curve(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 105.0), (6, 106.0)]


def test_tensorboard_after_a_restart_from_the_beginning_drops_everything(tmp_path):
    _log(tmp_path, range(1, 8))
    _log(tmp_path, [1, 2], offset=100.0)
    assert _curve(tmp_path) == [(1, 101.0), (2, 102.0)]


@pytest.mark.parametrize("resumed_after", [6, 4, 0])
def test_a_folder_of_many_restarts_is_one_stream(run_dir, tmp_path, resumed_after):
    """Three starts in the same second, the last two after the same step, the second of which logged nothing."""
    _log(run_dir, range(1, 9))
    _log(run_dir, [], first_step=resumed_after)
    _log(run_dir, range(resumed_after + 1, 12), first_step=resumed_after, offset=100.0)
    expected = [(step, step + 100.0 * (step > resumed_after)) for step in range(1, 12)]
    assert _curve(run_dir, tmp_path) == expected
    assert [(line["step"], line["train/loss"]) for line in _lines(run_dir)] == expected


def test_times_of_what_was_kept_stay(tmp_path):
    _log(tmp_path, range(1, 5))
    before = [event.wall_time for event in _events(tmp_path).Scalars("train/loss")]
    _log(tmp_path, [4], first_step=3)
    after = [event.wall_time for event in _events(tmp_path).Scalars("train/loss")]
    assert after[:3] == before[:3] and after[3] > before[3]


def test_a_clock_that_went_backward_changes_nothing(tmp_path, monkeypatch):
    _log(tmp_path, range(1, 8))
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() - 3600)
    _log(tmp_path, [5, 6], first_step=4, offset=100.0)
    assert _curve(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 105.0), (6, 106.0)]


def test_what_a_dying_process_adds_after_the_restart_is_not_shown(tmp_path):
    dying = _monitor(tmp_path)
    dying.scalars(1, {"train/loss": 1.0})
    going_on = _monitor(tmp_path, first_step=0)
    dying.scalars(2, {"train/loss": 2.0})
    going_on.scalars(1, {"train/loss": 101.0})
    assert _curve(tmp_path) == [(1, 101.0)]
    # The server has a reader of its own, which takes the first start event of a run for no restart.
    served = plugin_event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in served.Tensors("train/loss")] == [1]


@pytest.mark.parametrize("damage", [b"\x00" * 40, b"\x07\x01", None], ids=["zeros", "half", "cut"])
def test_events_that_a_crash_left_damaged_are_dropped(tmp_path, damage):
    _log(tmp_path, range(1, 5))
    (file,) = (tmp_path / "tensorboard").iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-20] if damage is None else content + damage)
    _log(tmp_path, [4], first_step=3, offset=100.0)
    assert _curve(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 104.0)]


def test_an_evaluation_that_is_made_again_is_there_once(tmp_path):
    for value, step in ((0.25, 6), (0.5, 6)):
        monitor = Monitor(MonitoringConfig(progress=False), str(tmp_path), DESCRIPTION, True, 6, 100, True)
        monitor.scalars(step, {"eval/valid/ndcg@10": value})
        monitor.close()
    assert _curve(tmp_path, tag="eval/valid/ndcg@10") == [(6, 0.5)]
    assert [line["eval/valid/ndcg@10"] for line in _lines(tmp_path)] == [0.5]


def test_what_a_run_is_judged_by_is_there_once_though_it_is_finished_twice(tmp_path):
    _log(tmp_path, range(1, 4))
    for value in (0.25, 0.5):
        _monitor(tmp_path, 3).finish(3, {TEST: value})
    assert _curve(tmp_path, tag=TEST) == [(3, 0.5)]
    assert [line[TEST] for line in _lines(tmp_path) if TEST in line] == [0.5]
    # And gone when the run is trained on.
    _log(tmp_path, [4], first_step=3)
    assert TEST not in _events(tmp_path).Tags()["scalars"]
    assert not any(TEST in line for line in _lines(tmp_path))


def test_a_line_without_the_loss_repeats_it_after_a_restart_too(tmp_path):
    _log(tmp_path, [1, 2])
    monitor = _monitor(tmp_path, 2)
    monitor.scalars(2, {"eval/seconds": 1.0})
    monitor.close()
    assert _lines(tmp_path)[-1] == {"step": 2, "train/loss": 2.0, "eval/seconds": 1.0}
    assert _curve(tmp_path) == [(1, 1.0), (2, 2.0)]


def test_hyper_parameters_are_there_from_the_start_and_the_end_with_the_metrics(tmp_path):
    monitor = _monitor(tmp_path)
    recorded = _hparams(tmp_path, "session_start_info")
    assert recorded.hparams["seed"].number_value == 7
    assert recorded.hparams["data"].string_value == "d"
    assert recorded.hparams["model.learn_temperature"].bool_value is False
    assert recorded.hparams["model.features"].string_value == "all"
    assert recorded.hparams["early_stopping.patience"].number_value == 10
    assert recorded.hparams["ranks"].number_value == 2
    assert "run_dir" not in recorded.hparams and not any(key.startswith("monitoring") for key in recorded.hparams)
    experiment = _hparams(tmp_path, "experiment")
    assert {info.name for info in experiment.hparam_infos} == recorded.hparams.keys()
    assert TEST in [info.name.tag for info in experiment.metric_infos]
    monitor.finish(3, {TEST: 0.125})
    assert _curve(tmp_path, tag=TEST) == [(3, 0.125)]
    assert _hparams(tmp_path, "session_end_info").status == api_pb2.STATUS_SUCCESS


def test_a_restart_shows_the_settings_of_now(tmp_path):
    _log(tmp_path, [1, 2])
    changed = describe(CONFIG.model_copy(update={"seed": 8}), MANIFEST, world=4)
    Monitor(MonitoringConfig(progress=False), str(tmp_path), changed, True, 1, 100).close()
    assert _hparams(tmp_path, "session_start_info").hparams["seed"].number_value == 8
    assert _hparams(tmp_path, "session_start_info").hparams["ranks"].number_value == 4
    (text,) = _events(tmp_path).Tensors("config")
    assert "seed: 8" in text.tensor_proto.string_val[0].decode()


def test_tensorboard_can_be_switched_off(tmp_path):
    monitor = _monitor(tmp_path, tensorboard=False)
    monitor.scalars(1, {"train/loss": 0.5})
    monitor.finish(1, {TEST: 1.0})
    assert not (tmp_path / "tensorboard").exists()
    assert len(_lines(tmp_path)) == 2


def test_disabled_monitor_writes_and_says_nothing(tmp_path, capsys):
    monitor = Monitor(MonitoringConfig(), str(tmp_path), DESCRIPTION, enabled=False, first_step=0, total_steps=10)
    monitor.scalars(1, {"train/loss": 0.5})
    monitor.advance(loss=0.5)
    monitor.say("hello")
    monitor.finish(1, {TEST: 1.0})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_say_prints_one_line_on_stderr(tmp_path, capsys):
    monitor = _monitor(tmp_path, tensorboard=False)
    monitor.say("epoch 1")
    monitor.close()
    assert capsys.readouterr() == ("", "epoch 1\n")
