"""A run that was stopped and resumed against one that was not."""

from __future__ import annotations

import json

import pytest
import torch

from gru4recf_dist import checkpoint_commits as commits
from gru4recf_dist import stopping
from gru4recf_dist.checkpoint_commits import best_step, complete_steps, read_commit
from gru4recf_dist.config import Config
from gru4recf_dist.data import storage
from gru4recf_dist.errors import UserError
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.trainer import Trainer
from tests.dist.test_world_size_equality import relative_error
from tests.support.ranks import RankFailed, run_ranks
from tests.support.synthetic import random_sessions, write_dataset
from tests.support.training import final_state, logged_lines, small_config, train, whole

pytestmark = pytest.mark.dist

# 41 sessions, 16 a step: 3 steps an epoch. Stopping after 7 is in mid-epoch.
OPTIONS = (
    "model.dropout=0.4",
    "model.dropout_hidden=0.2",
    "optimizer.clip=0.5",
    "checkpoint.every_epochs=null",
    "checkpoint.every_steps=7",
)
STEPS = ("max_steps=13", "schedule.name=cosine", "schedule.warmup_steps=4")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(str(folder), random_sessions(0, 41, items=30), random_sessions(1, 9, 30), random_sessions(2, 9, 30))
    return folder


class _Killed(Exception):
    pass


def train_until(ranks: Ranks, config: Config, last_step: int) -> None:
    """Train and die without a word after ``last_step``, whatever has been written by then."""
    trainer = Trainer(config, ranks)
    update = trainer.update

    def update_or_die(batches):
        if trainer.progress.step == last_step:
            raise _Killed
        return update(batches)

    trainer.update = update_or_die
    with pytest.raises(_Killed):
        trainer.train()


def train_until_signal(ranks: Ranks, config: Config, step: int) -> tuple[object, int]:
    """Train, and be asked to stop during ``step``; the result, and the number of evaluations that were made."""
    trainer = Trainer(config, ranks)
    evaluate, evaluations = trainer.evaluator.evaluate, []
    trainer.evaluator.evaluate = lambda *given: evaluations.append(given) or evaluate(*given)
    stopping.requested = lambda: ranks.rank == 0 and trainer.progress.step == step
    return trainer.train(), len(evaluations)


def train_until_signal_in_evaluation(ranks: Ranks, config: Config, step: int) -> tuple[object, int]:
    """Train, and let one rank be asked to stop after a batch of the evaluation of ``step``; the result, and the number
    of batches that were begun in it.
    """
    trainer = Trainer(config, ranks)
    gather, begun = trainer.evaluator._gather, []

    def counted(model, batch, unwanted):
        if trainer.progress.step == step:
            begun.append(batch)
        return gather(model, batch, unwanted)

    trainer.evaluator._gather = counted
    stopping.requested = lambda: ranks.rank == 1 and len(begun) == 1
    return trainer.train(), len(begun)


def resume(ranks: Ranks, config: Config) -> tuple[int, dict[str, torch.Tensor]]:
    trainer = Trainer(config, ranks)
    first = trainer.progress.step
    trainer.train()
    return first, final_state(trainer)


@pytest.mark.parametrize(
    ("world", "extra"),
    [
        (1, ()),
        (2, ("table.optimizer=rowwise_adagrad",)),
        (4, ("loss.in_batch=20",)),
        (2, ("engine.name=deepspeed",)),
    ],
    ids=["1-rank", "2-ranks", "4-ranks-in-batch", "2-ranks-deepspeed"],
)
def test_a_resumed_run_ends_bit_equal_to_an_unbroken_one(tmp_path, data, world, extra):
    unbroken = run_ranks(world, train, tmp_path, small_config(data, tmp_path / "unbroken", *OPTIONS, *STEPS, *extra))
    broken = small_config(data, tmp_path / "broken", *OPTIONS, *STEPS, *extra)
    # Steps 8 and 9 are made, logged, and lost.
    run_ranks(world, train_until, tmp_path, broken, 9)
    resumed = run_ranks(world, resume, tmp_path, broken)

    assert [first for first, _ in resumed] == [7] * world
    expected, state = whole(unbroken), whole([state for _, state in resumed])
    assert expected.keys() == state.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    logged = [json.loads(line) for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "train/lr" in line] == list(range(1, 14))


DEEPSPEED = ("engine.name=deepspeed",)
# Five tables; the checkpoint lies within the second subnet's turn, epochs 1 and 2 (steps 4 to 9).
SEVERAL_TABLES = (
    *("model.fusion=parallel", "model.feature_groups=[[tags,category],[price]]", "model.output_bias=true"),
    *("training.strategy=alternating", "training.epochs_per_phase=[1,2,1]"),
)


@pytest.mark.parametrize(
    ("model", "continued"),
    [((), ((1, ()), (3, ()), (2, DEEPSPEED))), (SEVERAL_TABLES, ((1, ()), (3, ())))],
    ids=["one-table", "several-tables-alternating"],
)
def test_a_checkpoint_resumes_at_other_world_sizes_and_under_another_engine(tmp_path, data, model, continued):
    settings = (*OPTIONS, *STEPS, *model, "model.dropout=0")
    unbroken = whole(run_ranks(1, train, tmp_path, small_config(data, tmp_path / "unbroken", *settings)))
    run_ranks(2, train_until, tmp_path, small_config(data, tmp_path / "saved", *settings), 9)
    for world, extra in continued:
        folder = tmp_path / f"resumed-{world}-{len(extra)}"
        (folder / "checkpoints").mkdir(parents=True)
        for name in ("config.yaml", "checkpoints/step-00000007"):
            _copy(tmp_path / "saved" / name, folder / name)
        results = run_ranks(world, resume, tmp_path, small_config(data, folder, *settings, *extra))
        assert [first for first, _ in results] == [7] * world
        state = whole([state for _, state in results])
        assert state.keys() == unbroken.keys()
        for name, tensor in state.items():
            assert relative_error(tensor, unbroken[name]) < 1e-5, name


def _copy(source, target) -> None:
    import shutil

    shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)


def test_incomplete_checkpoints_are_passed_over_and_old_ones_removed(tmp_path, data):
    config = small_config(
        data, tmp_path / "run", "checkpoint.every_epochs=null", "checkpoint.every_steps=2", "max_steps=9"
    )
    run_ranks(1, train_until, tmp_path, config, 7)
    folder = tmp_path / "run" / "checkpoints"
    assert complete_steps(str(folder)) == [4, 6]
    (folder / "step-00000006" / "commit.json").unlink()
    ((first, _),) = run_ranks(1, resume, tmp_path, config)
    assert first == 4
    assert complete_steps(str(folder)) == [8, 9]
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000008", "step-00000009"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.hidden_size=9", "model.hidden_size: 9, but the checkpoints"),
        ("table.optimizer=sgd", "table.optimizer: 'sgd'"),
        ("model.output_table=untied", "model.output_table: 'untied', but the checkpoints in .* with 'tied'"),
        ("model.output_bias=true", "model.output_bias: True"),
        ("training.strategy=alternating", "training.strategy: 'alternating', but the checkpoints"),
        ("resume=never", "run_dir"),
    ],
)
def test_a_run_folder_of_another_run_is_refused(tmp_path, data, override, says):
    run_ranks(1, train, tmp_path, small_config(data, tmp_path / "run", "max_steps=2"))
    with pytest.raises(RankFailed, match=says):
        run_ranks(1, resume, tmp_path, small_config(data, tmp_path / "run", "max_steps=4", override))


def test_a_run_folder_of_another_data_set_is_refused(tmp_path, data):
    run_ranks(1, train, tmp_path, small_config(data, tmp_path / "run", "max_steps=2"))
    # As many items, sessions and streams, but other sessions.
    write_dataset(str(tmp_path / "other"), random_sessions(7, 41, items=30), random_sessions(1, 9, 30))
    with pytest.raises(RankFailed, match="is not the data set that the checkpoints"):
        run_ranks(1, resume, tmp_path, small_config(tmp_path / "other", tmp_path / "run", "max_steps=4"))


def test_epochs_are_counted_by_sessions_when_the_batch_size_changes_on_resume(tmp_path, data):
    epochs = ("max_steps=null", "checkpoint.every_epochs=1")
    run_ranks(1, train, tmp_path, small_config(data, tmp_path / "run", *epochs, "max_epochs=2"))
    wider = small_config(data, tmp_path / "run", *epochs, "max_epochs=3", "batch_size=8")
    ((first, _),) = run_ranks(1, resume, tmp_path, wider)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    # 2 epochs of 3 steps, and one of 6.
    assert (first, result["steps"], result["epochs"]) == (6, 12, 3.0)


def test_a_loss_that_is_not_finite_stops_every_rank_before_the_update(tmp_path, data):
    config = small_config(data, tmp_path / "run", "optimizer.name=sgd", "optimizer.lr=1e30", "table.lr=1e30")
    for name in run_ranks(2, _diverge, tmp_path, config):
        assert name == "UserError"


def _diverge(ranks: Ranks, config: Config) -> str:
    trainer = Trainer(config, ranks)
    try:
        trainer.train()
    except UserError as error:
        assert "nothing was updated" in str(error)
        assert torch.isfinite(trainer.table.weight).all()
        return "UserError"
    return "trained on"


def _train_and_resume_on_memory(ranks: Ranks, folder: str) -> tuple[list[int], bool]:
    """All in one process: its memory is the object storage."""
    data = f"memory://{folder}/data"
    write_dataset(data, random_sessions(0, 41, items=30), random_sessions(1, 9, 30), random_sessions(2, 9, 30))
    unbroken = train(ranks, small_config(data, f"memory://{folder}/unbroken", *OPTIONS, *STEPS))
    broken = small_config(data, f"memory://{folder}/broken", *OPTIONS, *STEPS)
    train_until(ranks, broken, 9)
    _, state = resume(ranks, broken)
    lines = storage.read_bytes(f"memory://{folder}/broken/metrics.jsonl").splitlines()
    steps = [line["step"] for line in map(json.loads, lines) if "train/lr" in line]
    assert storage.read_json(f"memory://{folder}/broken/result.json")["steps"] == 13
    return steps, all(torch.equal(state[name], unbroken[name]) for name in unbroken)


def test_data_and_run_folder_may_be_urls(tmp_path):
    ((steps, equal),) = run_ranks(1, _train_and_resume_on_memory, tmp_path, tmp_path.name)
    assert steps == list(range(1, 14))
    assert equal


@pytest.mark.parametrize(
    ("until", "stops"),
    [
        (train_until_signal, [(4, 0), (8, 1)]),
        # In the second batch of five; at 8 once more in the evaluation that is made up for; and in that of the end.
        (train_until_signal_in_evaluation, [(4, 2), (8, 2), (8, 2), (12, 2)]),
    ],
)
def test_an_evaluation_that_a_signal_kept_from_being_made_is_made_up_for(tmp_path, data, until, stops):
    # The first evaluation is the best of those before the end: it must still be marked so.
    settings = (*OPTIONS, "max_steps=12", "evaluation.every_steps=4", "checkpoint.every_steps=100")
    settings += ("evaluation.batch_sessions=1",)
    unbroken = run_ranks(2, train, tmp_path, small_config(data, tmp_path / "unbroken", *settings))
    config = small_config(data, tmp_path / "run", *settings)
    for stopped_at, made in stops:
        assert run_ranks(2, until, tmp_path, config, stopped_at) == [(None, made)] * 2
        assert complete_steps(str(tmp_path / "run/checkpoints"))[-1] == stopped_at
        if stopped_at == 8:
            assert read_commit(str(tmp_path / "run/checkpoints"), 8)["best_step"] == 4
    resumed = run_ranks(2, resume, tmp_path, config)
    assert [first for first, _ in resumed] == [stops[-1][0]] * 2
    for name, tensor in whole(unbroken).items():
        assert torch.equal(whole([state for _, state in resumed])[name], tensor), name

    def evaluated(run: str) -> list[dict]:
        return [
            {name: value for name, value in line.items() if name == "step" or name.startswith("eval/valid")}
            for line in logged_lines(tmp_path / run)
            if "eval/valid/ndcg@10" in line
        ]

    assert [line["step"] for line in evaluated("run")] == [4, 8, 12]
    assert evaluated("run") == evaluated("unbroken")
    results = [json.loads((tmp_path / run / "result.json").read_text()) for run in ("run", "unbroken")]
    assert results[0]["best_step"] == results[1]["best_step"]
    # What evaluation and recommendation choose.
    assert best_step(str(tmp_path / "run/checkpoints")) == results[0]["best_step"]
    assert results[0]["test"] == results[1]["test"]


def _mark_best_on_a_full_disk(ranks: Ranks, config: Config) -> str:
    """Go on with the evaluation that is owed, with a full disk for what it found; how that ends."""
    write_commit, wrote = commits.write_commit, []

    def given(folder, step, commit):
        if not wrote:
            wrote.append(step)
            raise UserError("no space left on device")
        write_commit(folder, step, commit)

    commits.write_commit = given
    stopping.requested = lambda: False
    trainer = Trainer(config, ranks)
    evaluate = trainer.evaluator.evaluate

    def falling(model, split, *unwanted):
        found = evaluate(model, split, *unwanted)
        return {**found, split: {**found[split], "ndcg@10": 1.0 / trainer.progress.step}}

    trainer.evaluator.evaluate = falling
    try:
        trainer.train()
    except UserError as error:
        return str(error)
    return f"best: {trainer.checkpoints.best()}"


@pytest.mark.parametrize("is_last", [False, True])
def test_storage_that_does_not_take_what_is_best_ends_a_run_that_writes_nothing_more(tmp_path, data, is_last):
    # 9 steps are 3 epochs; stopped at 4, before the evaluation that is due.
    settings = (*OPTIONS, "evaluation.every_steps=4", "checkpoint.every_steps=100", "early_stopping.patience=100")
    config = small_config(data, tmp_path / "run", *settings, "max_steps=9")
    assert run_ranks(2, train_until_signal, tmp_path, config, 4) == [(None, 0)] * 2
    config = config.model_copy(update={"max_steps": 4 if is_last else 9})
    expected = "no space left on device" if is_last else "best: 4"
    assert run_ranks(2, _mark_best_on_a_full_disk, tmp_path, config) == [expected] * 2
    found = best_step(str(tmp_path / "run/checkpoints"))
    assert found == (None if is_last else 4)
