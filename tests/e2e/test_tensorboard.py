"""What a person sees in TensorBoard, asked of its own server, while a run is killed and resumed."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gru4recf_dist.config import Config
from gru4recf_dist.monitoring import GROUPS
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.parallel.traffic import PURPOSES
from gru4recf_dist.trainer import Trainer
from tests.support.ranks import RankFailed, run_ranks
from tests.support.synthetic import random_sessions, write_dataset
from tests.support.tensorboard import TensorBoard, serving
from tests.support.training import logged_lines, small_config, train

pytestmark = [pytest.mark.e2e, pytest.mark.dist]
DOCUMENTATION = Path(__file__).parents[2] / "docs/monitoring.md"
SESSIONS = 41
# 16 a step: 3 steps an epoch. Killed in the step after 9, when 8 and 9 are logged and not in a checkpoint.
OPTIONS = (
    "monitoring.tensorboard=true",
    "checkpoint.every_epochs=null",
    "checkpoint.every_steps=7",
    "evaluation.every_epochs=1",
    "early_stopping.patience=null",
    "max_steps=13",
)
KILLED, GOING = "killed/tensorboard", "going/tensorboard"


def train_until_killed(ranks: Ranks, config: Config, last_step: int) -> None:
    trainer = Trainer(config, ranks)
    update = trainer.update

    def update_or_die(batches):
        if trainer.progress.step == last_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(batches)

    trainer.update = update_or_die
    trainer.train()


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, Config]:
    folder = tmp_path_factory.mktemp("tensorboard")
    sessions = [random_sessions(seed, count, items=30) for seed, count in enumerate((SESSIONS, 9, 9))]
    write_dataset(str(folder / "data"), *sessions)
    return {
        name: small_config(folder / "data", folder / "runs" / name, *OPTIONS, override)
        for name, override in (("killed", "table.lr=0.01"), ("going", "optimizer.clip=1.0"))
    }


@pytest.fixture(scope="module")
def servers(configs, tmp_path_factory) -> Iterator[dict[str, TensorBoard]]:
    """Servers that saw a run before it was killed, and after it was resumed; another run is going on."""
    work = tmp_path_factory.mktemp("ranks")
    for name, world, last_step in (("killed", 2, 9), ("going", 1, 5)):
        with pytest.raises(RankFailed):
            run_ranks(world, train_until_killed, work, configs[name], last_step)
    runs = Path(configs["killed"].run_dir).parent
    with serving(runs, "true") as fast, serving(runs, "false") as slow:
        for server in (fast, slow):
            _wait_for_steps(server, "train/loss", list(range(1, 10)))
        run_ranks(2, train, work, configs["killed"])
        for server in (fast, slow):
            _wait_for_steps(server, "eval/when_finished/test/mrr@10", [13])
        yield {"data-server": fast, "python": slow}


def _wait_for_steps(server: TensorBoard, tag: str, steps: list[int]) -> None:
    server.wait_until(lambda: server.curve(KILLED, tag), lambda curve: [step for step, _ in curve] == steps)


@pytest.fixture(params=["data-server", "python"])
def server(request, servers) -> TensorBoard:
    return servers[request.param]


def logged(config: Config) -> dict[str, list[tuple[int, float]]]:
    """Each scalar's steps and values, by metrics.jsonl."""
    curves = defaultdict(list)
    for line in logged_lines(Path(config.run_dir)):
        # Where it was not logged, a line has the last loss once more.
        names = line.keys() - {"step"} - (set() if "train/lr" in line else {"train/loss"})
        for name in names:
            curves[name].append((line["step"], line[name]))
    return curves


@pytest.mark.parametrize("name", ["killed", "going"])
def test_every_curve_has_each_step_of_metrics_jsonl_once(server, configs, name):
    expected = logged(configs[name])
    assert server.runs()[f"{name}/tensorboard"] == sorted(expected)
    for tag, points in expected.items():
        found = server.curve(f"{name}/tensorboard", tag)
        assert [step for step, _ in found] == [step for step, _ in points], tag
        assert np.all(np.diff([step for step, _ in found]) > 0), tag
        np.testing.assert_allclose([value for _, value in found], [value for _, value in points], rtol=1e-6)
    steps = [step for step, _ in expected["train/loss"]]
    assert steps == list(range(1, 14 if name == "killed" else 6))


def test_every_scalar_is_in_a_group(server):
    tags = {tag for tags in server.runs().values() for tag in tags}
    assert {tag.partition("/")[0] for tag in tags} == set(GROUPS)


def test_hyper_parameters_have_a_row_for_each_run(server, configs):
    rows = {row["name"]: row for row in server.session_groups()}
    assert rows.keys() == {KILLED, GOING}
    assert (rows[KILLED]["hparams"]["table.lr"], rows[GOING]["hparams"]["table.lr"]) == (0.01, 0.002)
    assert (rows[KILLED]["hparams"]["optimizer.clip"], rows[GOING]["hparams"]["optimizer.clip"]) == ("null", 1.0)
    assert (rows[KILLED]["hparams"]["ranks"], rows[GOING]["hparams"]["ranks"]) == (2, 1)
    columns = server.experiment()
    assert {info["name"] for info in columns["hparamInfos"]} == rows[KILLED]["hparams"].keys()
    shown = {info["name"]["tag"]: info["displayName"] for info in columns["metricInfos"]}
    values = {value["name"]["tag"]: value["value"] for value in rows[KILLED]["sessions"][0]["metricValues"]}
    assert values.keys() == shown.keys() and len(values) == 12
    result = json.loads((Path(configs["killed"].run_dir) / "result.json").read_text())
    for tag, value in values.items():
        split, metric = shown[tag].split()
        assert value == pytest.approx(result[split][metric], rel=1e-6), tag
    assert rows[KILLED]["sessions"][0]["status"] == "STATUS_SUCCESS"
    # One that is going on has no figures at its end yet.
    assert not rows[GOING]["sessions"][0].get("metricValues")


def test_configuration_and_data_are_there_as_text_once(server):
    for run in (KILLED, GOING):
        texts = server.texts(run)
        assert texts.keys() == {"config", "data"}
        ((step, config),) = texts["config"]
        assert step == 0 and "<code" in config and "max_steps: 13" in config
        ((step, data),) = texts["data"]
        cells = re.findall(r"<td>(.*?)</td>", data)
        assert step == 0 and "30 items, 8 streams" in data
        assert cells[:2] == ["train", str(SESSIONS)] and cells[cells.index("tags") :][:2] == ["tags", "token_seq"]


def test_the_documentation_has_the_names_that_a_run_logs(configs):
    always, sometimes = DOCUMENTATION.read_text().split("### With some settings")
    names = {re.sub(r"@\d+$", "@K", name) for name in logged(configs["killed"])}
    # What a loss does not send is not logged.
    sent = {f"perf/wire/{purpose}_bytes" for purpose in PURPOSES if purpose != "other"}
    assert _documented(always) - sent == names - sent
    assert names & sent < _documented(always) & sent == sent
    assert not _documented(sometimes) & names


def _documented(text: str) -> set[str]:
    """What stands in the first column of tables."""
    cells = re.findall(r"^\| (`.+?) \|", text, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+/.+?)`", cell)}
