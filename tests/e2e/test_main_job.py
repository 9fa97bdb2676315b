"""The main job as a user runs it: raw events, shards, two ranks, metrics, TensorBoard, recommendations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
ITEMS, USERS = 40, 120
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SIZES = [
    "batch_size=16",
    "max_epochs=8",
    "model.embedding_size=16",
    "model.hidden_size=16",
    "model.dropout=0.1",
    "loss.negatives=32",
    "table.lr=0.02",
    "optimizer.lr=0.02",
    "loader.max_length=8",
    "loader.context=2",
    "monitoring.log_every_steps=5",
    "evaluation.ks=[1,5,10]",
]


def program(*arguments: object, ranks: int | None = None) -> subprocess.CompletedProcess:
    """Run a program of the project as a user does: plainly, or on several ranks."""
    command = [sys.executable, *map(str, arguments)]
    if ranks:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [*torchrun, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """A folder with raw events in which each item is mostly followed by the next one, a recipe, and prepared data."""
    folder = tmp_path_factory.mktemp("shop")
    generator = np.random.default_rng(0)
    lines = ["user\tproduct\tat"]
    for user in range(USERS):
        item = int(generator.integers(ITEMS))
        for time in range(int(generator.integers(5, 20))):
            lines.append(f"u{user}\tp{item}\t{time}")
            item = (item + 1) % ITEMS if generator.random() < 0.9 else int(generator.integers(ITEMS))
    (folder / "events.tsv").write_text("\n".join(lines) + "\n")
    products = "\n".join(f"p{i}\tshelf{i % 5}" for i in range(ITEMS))
    (folder / "products.tsv").write_text(f"product\tshelf\n{products}\n")
    (folder / "recipe.yaml").write_text(
        f"""
name: shop
source: {folder}
output: {folder}/data
input: {{format: tsv, files: [events.tsv], session: user, item: product, time: at}}
split: {{method: leave_one_out}}
items: {{format: tsv, file: products.tsv, item: product}}
features: [{{name: shelf, kind: token}}]
"""
    )
    finished = program("-m", "data_prep", "--config", folder / "recipe.yaml")
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture(scope="module")
def run(shop) -> Path:
    """The folder of a finished run on two ranks."""
    folder = shop / "run"
    finished = program("train.py", f"data={shop}/data", f"run_dir={folder}", *SIZES, ranks=2)
    assert finished.returncode == 0, finished.stderr
    return folder


def test_a_run_leaves_the_files_that_others_rely_on(run):
    result = json.loads((run / "result.json").read_text())
    for split in ("valid", "valid_excluding_seen", "test", "test_excluding_seen"):
        assert {"hit@10", "recall@10", "ndcg@10", "mrr@10", "hit@1"} <= result[split].keys()
    assert {"popularity", "markov"} <= result["baselines"].keys()
    assert result["world_size"] == 2 and result["events_per_second"] > 0
    assert 0 < result["steps"] <= 64 and result["epochs"] == result["steps"] / 8
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "train/lr" in line]
    assert steps[0] <= 20 and steps[-1] == result["steps"]
    assert "batch_size: 16" in (run / "config.yaml").read_text()
    assert list((run / "checkpoints").glob("step-*/commit.json"))


def test_the_model_learns_what_there_is_to_learn(run):
    result = json.loads((run / "result.json").read_text())
    # Nine of ten events follow the rule. Popularity knows nothing here, a Markov chain everything.
    assert result["test"]["hit@10"] > 0.7
    assert result["baselines"]["popularity"]["hit@10"] < 0.5
    assert result["baselines"]["markov"]["hit@1"] > 0.6


def test_tensorboard_shows_the_curves_and_the_hyper_parameters(run):
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    wanted = ["train/loss", "train/lr", "train/gradient_norm", "perf/events_per_second", "data/wait_share"]
    assert {*wanted, "eval/valid/ndcg@10", "eval/when_finished/test/ndcg@10"} <= set(tags)
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses[-1] < losses[0]
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_loader_workers_and_deepspeed_run_as_configured(shop, tmp_path):
    losses = {}
    for name, options in {
        "plain": [],
        "workers": ["loader.workers=2"],
        "deepspeed": ["engine.name=deepspeed", "engine.deepspeed.zero_optimization.stage=2"],
    }.items():
        folder = tmp_path / name
        options = [f"data={shop}/data", f"run_dir={folder}", *SIZES, "max_steps=10", "model.dropout=0", *options]
        finished = program("train.py", *options, "evaluation.every_epochs=null", ranks=2)
        assert finished.returncode == 0, finished.stderr
        losses[name] = [json.loads(line)["train/loss"] for line in (folder / "metrics.jsonl").open()]
    assert len(losses["plain"]) >= 3
    assert losses["workers"] == losses["plain"]
    assert losses["deepspeed"] == pytest.approx(losses["plain"], rel=1e-5)


@pytest.mark.parametrize("ranks", [None, 1, 3])
def test_evaluation_gives_the_same_digits_at_any_number_of_ranks(run, ranks):
    flag = "--run-dir" if ranks else "--run"
    finished = program("-m", "gru4recf_dist.evaluate", flag, run, "--split", "test", ranks=ranks)
    assert finished.returncode == 0, finished.stderr
    metrics = json.loads(finished.stdout.splitlines()[-1])
    result = json.loads((run / "result.json").read_text())
    assert metrics == {split: result[split] for split in ("test", "test_excluding_seen")}
    assert json.loads((run / "eval-test.json").read_text()) == metrics


def test_recommendations_are_tokens_and_do_not_depend_on_the_ranks(run, tmp_path):
    sessions = [
        {"session": "a", "items": ["p3", "p4", "p5"]},
        {"items": ["p7", "never-seen", "p8"], "note": {"kept": True}},
        {"session": "c", "items": ["never-seen"]},
        {"session": "d", "items": []},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sessions))
    outputs = []
    for ranks in (None, 2):
        out = tmp_path / f"out-{ranks}.jsonl"
        arguments = ("--input", tmp_path / "in.jsonl", "--output", out, "-k", 4, "--exclude-seen")
        finished = program("-m", "gru4recf_dist.recommend", "--run-dir", run, *arguments, ranks=ranks)
        assert finished.returncode == 0, finished.stderr
        assert "4 sessions, 2 unknown tokens ignored, 2 sessions without a known item" in finished.stderr
        outputs.append(out.read_text())
    assert outputs[0] == outputs[1]
    lines = [json.loads(line) for line in outputs[0].splitlines()]
    assert "p6" in lines[0]["items"] and lines[0]["session"] == "a"
    assert lines[1]["note"] == {"kept": True} and "p9" in lines[1]["items"]
    assert not {"p3", "p4", "p5"} & set(lines[0]["items"])
    assert [len(line["items"]) for line in lines] == [4, 4, 0, 0]
    assert lines[0]["scores"] == sorted(lines[0]["scores"], reverse=True)


def test_a_finished_run_is_left_alone(run, shop):
    before = (run / "result.json").stat().st_mtime_ns
    for extra in ([], ["--finished"]):
        finished = program("train.py", f"data={shop}/data", f"run_dir={run}", *SIZES, *extra)
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout == f"finished: {run} holds the result of this run, nothing to do\n"
    assert (run / "result.json").stat().st_mtime_ns == before


def test_a_finished_run_is_evaluated_anew_with_other_settings_and_not_trained_again(run, shop, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    # The folder's config.yaml names the original: another run, as far as anybody can tell.
    arguments = (f"data={shop}/data", f"run_dir={folder}", *SIZES)
    assert program("train.py", "--finished", *arguments).returncode == 3
    finished = program("train.py", *arguments)
    assert finished.returncode == 0 and "finished:" not in finished.stdout, finished.stderr
    before, after = (json.loads((each / "result.json").read_text()) for each in (run, folder))
    assert after["steps"] == before["steps"] and after["test"] == before["test"]
    assert program("train.py", "--finished", *arguments).returncode == 0
    # Without the baselines, which are counted last, the result is not whole.
    (folder / "result.json").write_text(json.dumps({**after, "baselines": None}).replace('"baselines"', '"other"'))
    assert program("train.py", "--finished", *arguments).returncode == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "make quickstart"),
        (["--config", "configs/nothing.yaml"], "configs/nothing.yaml: no such file"),
        (
            ["data={shop}/data", "model.hiden_size=3"],
            "unknown key 'model.hiden_size'; did you mean 'model.hidden_size'?",
        ),
        (["data={shop}/data", "batch_size=12"], "batch_size (12) must be a multiple of the data set's 8 streams"),
        (["data={shop}/data", "model.features=[brand]"], "no feature 'brand' (it has: shelf)"),
        (["data={shop}/data", "max_epochs=none"], "max_epochs"),
        (["data={shop}/nowhere"], "no prepared data set at"),
        (["data=ftp://host/data"], "protocol 'ftp' is not supported"),
    ],
)
def test_check_names_what_is_wrong_in_one_line(shop, tmp_path, arguments, says):
    arguments = [argument.format(shop=shop) for argument in arguments]
    if not arguments:
        arguments = [f"data={tmp_path}/nothing"]
    finished = program("train.py", "--check", f"run_dir={tmp_path}/run", *arguments)
    assert finished.returncode == 2
    assert finished.stderr.count("\n") == 1 and says in finished.stderr, finished.stderr
    assert not (tmp_path / "run").exists()


def test_check_accepts_a_good_configuration_and_starts_nothing(shop, tmp_path):
    finished = program("train.py", "--check", f"data={shop}/data", f"run_dir={tmp_path}/run", *SIZES)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.startswith("ok: shop, 40 items, 120 training sessions")
    assert not (tmp_path / "run").exists()


def test_too_many_ranks_are_refused_in_the_first_line(shop, tmp_path):
    finished = program("train.py", f"data={shop}/data", f"run_dir={tmp_path}/run", "batch_size=8", ranks=9)
    assert finished.returncode != 0
    assert finished.stderr.splitlines()[0].startswith("error: 9 ranks cannot share the data set's 8 streams")


def test_a_damaged_shard_ends_training_with_a_line_that_names_it(shop, tmp_path):
    import shutil

    shutil.copytree(shop / "data", tmp_path / "data")
    shard = tmp_path / "data" / "train" / "s0003-000000.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    finished = program("train.py", f"data={tmp_path}/data", f"run_dir={tmp_path}/run", *SIZES)
    assert finished.returncode == 2
    assert "s0003-000000.tar" in finished.stderr and finished.stderr.count("error: ") == 1


def test_bad_lines_for_recommendation_are_named_and_nothing_is_written(run, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"items": ["p1"]}\n{"itemz": []}\n')
    finished = program(
        "-m", "gru4recf_dist.recommend", "--run", run, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out"
    )
    assert finished.returncode == 2
    assert "in.jsonl:2: must be an object with a list called 'items'" in finished.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
