"""What a run shows, read back with TensorBoard's own reader."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from gru4recf_dist.config import Config, MonitoringConfig
from gru4recf_dist.data import storage
from gru4recf_dist.monitoring import Monitor, flatten


def _monitor(run_dir, first_step: int = 0, **settings) -> Monitor:
    config = MonitoringConfig(**{"progress": False, **settings})
    return Monitor(config, str(run_dir), enabled=True, first_step=first_step, total_steps=100)


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


def _events(run_dir) -> EventAccumulator:
    events = EventAccumulator(str(Path(run_dir) / "tensorboard"))
    events.Reload()
    return events


def _curve(run_dir, tag: str = "train/loss") -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in _events(run_dir).Scalars(tag)]


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


def test_tensorboard_holds_hyperparameters_and_final_metrics(tmp_path):
    config = Config(data="d", run_dir=str(tmp_path), seed=7, max_steps=3)
    monitor = _monitor(tmp_path)
    monitor.scalars(1, {"train/loss": 0.5})
    monitor.finish(config, {"result/test/ndcg@10": 0.125})
    events = _events(tmp_path)
    assert [event.value for event in events.Scalars("result/test/ndcg@10")] == [0.125]
    assert _curve(tmp_path) == [(1, 0.5)]
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    recorded = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert recorded["seed"].number_value == 7
    assert recorded["data"].string_value == "d"
    assert recorded["model.dropout"].number_value == config.model.dropout
    experiment = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    infos = plugin_data_pb2.HParamsPluginData.FromString(experiment).experiment.metric_infos
    assert [info.name.tag for info in infos] == ["result/test/ndcg@10"]


def test_one_run_stays_one_folder_of_events(tmp_path):
    _log(tmp_path, [1])
    _monitor(tmp_path, 1).finish(Config(data="d", run_dir=str(tmp_path)), {"result/x": 1.0})
    assert not [path for path in (tmp_path / "tensorboard").iterdir() if path.is_dir()]


def test_tensorboard_can_be_switched_off(tmp_path):
    monitor = _monitor(tmp_path, tensorboard=False)
    monitor.scalars(1, {"train/loss": 0.5})
    monitor.finish(Config(data="d", run_dir=str(tmp_path)), {"result/x": 1.0})
    assert not (tmp_path / "tensorboard").exists()
    assert len(_lines(tmp_path)) == 1


def test_disabled_monitor_writes_and_says_nothing(tmp_path, capsys):
    monitor = Monitor(MonitoringConfig(), str(tmp_path), enabled=False, first_step=0, total_steps=10)
    monitor.scalars(1, {"train/loss": 0.5})
    monitor.advance(loss=0.5)
    monitor.say("hello")
    monitor.finish(Config(data="d", run_dir=str(tmp_path)), {"result/x": 1.0})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_say_prints_one_line_on_stderr(tmp_path, capsys):
    monitor = _monitor(tmp_path, tensorboard=False)
    monitor.say("epoch 1")
    monitor.close()
    assert capsys.readouterr() == ("", "epoch 1\n")


def test_flatten_gives_dotted_keys_and_plain_values():
    tree = {"a": 1, "b": {"c": True, "d": {"e": 0.5}, "empty": {}}, "list": [1, "x"], "none": None, "text": "t"}
    assert flatten(tree) == {"a": 1, "b.c": True, "b.d.e": 0.5, "list": '[1, "x"]', "none": "null", "text": "t"}
