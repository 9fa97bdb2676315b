"""Training strategies: what is frozen keeps every bit and costs no communication, and a resume finds its phase."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from gru4recf_dist import trained_run
from gru4recf_dist.config import Config
from gru4recf_dist.data.shard_format import read_manifest
from gru4recf_dist.data.streams import SessionLoader
from gru4recf_dist.evaluation.evaluator import Evaluator
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.table.negatives import read_popularity
from gru4recf_dist.trainer import Trainer
from tests.dist.test_architectures import GROUPS, ITEMS, data  # noqa: F401 (a fixture)
from tests.dist.test_resume import resume, train_until, train_until_signal
from tests.dist.test_world_size_equality import relative_error
from tests.support.plain_models import PlainModel, padded, read_features
from tests.support.ranks import run_ranks
from tests.support.training import final_state, logged_lines, small_config, train, whole

pytestmark = pytest.mark.dist

# 41 sessions, 16 a step: 3 steps an epoch.
EPOCH = 3
ALTERNATING = ("training.strategy=alternating",)
RESIDUAL = ("training.strategy=residual", "training.epochs_per_phase=1")
INTERLEAVING = ("training.strategy=interleaving",)
PARALLEL = ("model.fusion=parallel", "model.output_bias=true")
TIED = (*PARALLEL, "model.output_table=tied", GROUPS)


def owner(name: str) -> str | None:
    """Whose a tensor of a checkpoint is: of the item subnet, of feature subnet 0, 1, .. (or `feature`), of all."""
    parts = name.split(".")
    if parts[0] in ("table", "output_item") or "item_gru_layers" in parts:
        return "item"
    if parts[0].startswith("output_feature"):
        return parts[0].removeprefix("output_")
    for module in ("feature_gru_layers", "feature_embed_layer"):
        if module in parts:
            number = parts[parts.index(module) + 1]
            return f"feature_{number}" if number.isdigit() else "feature"
    return None


def train_and_watch(ranks: Ranks, configs: dict[str, Config]) -> dict[str, tuple[list[dict], list[int]]]:
    """Of each: its state before the first step and after each; and the bytes that DDP's buckets held in each."""
    return {name: _watch(ranks, config) for name, config in configs.items()}


def _watch(ranks: Ranks, config: Config) -> tuple[list[dict], list[int]]:
    trainer = Trainer(config, ranks)
    states, reduced, update = [final_state(trainer)], [], trainer.update

    def watched(batches):
        done = update(batches)
        states.append(final_state(trainer))
        reduced.append(trainer.engine._forward._get_ddp_logging_data()["total_parameter_size_bytes"])
        return done

    trainer.update = watched
    trainer.train()
    return states, reduced


FROZEN = {
    "alternating": (*TIED, *ALTERNATING),
    "residual": (*TIED, *RESIDUAL),
    "interleaving": (*TIED, *INTERLEAVING),
    "shared-parts": ("model.fusion=concat_output", "model.learn_temperature=true", *ALTERNATING),
    "untied": (*PARALLEL, "model.hidden_size=6", *INTERLEAVING),
}


def expected_turn(name: str, step: int, names: list[str]) -> str:
    """Who is trained by update ``step``, from 0."""
    if name in ("interleaving", "untied"):
        return names[step % len(names)]
    return names[step // EPOCH % len(names)]


def test_what_is_frozen_keeps_every_bit_and_is_not_sent(tmp_path, data):  # noqa: F811
    settings = (
        f"max_steps={4 * EPOCH}",
        "checkpoint.every_epochs=null",
        "optimizer.name=adamw",
        "optimizer.weight_decay=0.1",
        "table.optimizer=lazy_adam",
        "loss.in_batch=8",
        "accumulation=2",
        "optimizer.clip=1",
        "table.clip=1",
    )
    configs = {name: small_config(data, tmp_path / name, *settings, *extra) for name, extra in FROZEN.items()}
    results = run_ranks(2, train_and_watch, tmp_path, configs)
    for name, config in configs.items():
        states = [whole(list(parts)) for parts in zip(*(result[name][0] for result in results), strict=True)]
        names = (
            ["item", "feature"]
            if config.model.feature_groups is None
            else ["item", *(f"feature_{i}" for i in range(3))]
        )
        lines = [line for line in logged_lines(tmp_path / name) if "train/lr" in line]
        for step, (before, after) in enumerate(itertools.pairwise(states)):
            turn = expected_turn(name, step, names)
            if name == "residual":
                turn = names[min(step // EPOCH, 3)]
            for key, tensor in after.items():
                is_trained = owner(key) in (turn, None)
                assert torch.equal(tensor, before[key]) != is_trained, (name, step, key)
            trained = [
                tensor for key, tensor in after.items() if key.startswith("encoder.") and owner(key) in (turn, None)
            ]
            size = sum(tensor.nbytes for tensor in trained)
            assert [result[name][1][step] for result in results] == [size] * 2, (name, step)
            # Two ranks each send as much as there is to reduce.
            assert lines[step]["perf/wire/encoder_gradients_bytes"] == 2 * size
            # The gradients of rows go back only if one of the tables is trained.
            tables = {key.partition(".")[0] for key in after if not key.startswith(("encoder.", "optimizer."))}
            is_any = any(owner(f"{table}.weight") in (turn, None) for table in tables)
            assert ("perf/wire/row_gradients_bytes" in lines[step]) == is_any, (name, step)
            assert ("perf/wire/negative_gradients_bytes" in lines[step]) == is_any, (name, step)
    # In one of these nothing goes back while the feature subnet has its turn.
    assert "perf/wire/row_gradients_bytes" not in logged_lines(tmp_path / "shared-parts")[EPOCH]


def train_and_break(ranks: Ranks, configs: dict[str, tuple[Config, Config]], stops: list[int]) -> dict[str, tuple]:
    """Of each, the end of an undisturbed run and of one that died after each of ``stops`` and went on."""
    found = {}
    for name, (undisturbed, broken) in configs.items():
        trainer = Trainer(undisturbed, ranks)
        trainer.train()
        for stop in stops:
            train_until(ranks, broken, stop)
        last = Trainer(broken, ranks)
        assert last.progress.step == stops[-1]
        last.train()
        found[name] = final_state(trainer), final_state(last)
    return found


def test_a_run_that_dies_in_every_phase_and_at_their_ends_ends_bit_equal(tmp_path, data):  # noqa: F811
    settings = (
        "model.dropout=0.4",
        "model.dropout_output=0.2",
        "optimizer.clip=0.5",
        "checkpoint.every_steps=1",
        f"max_steps={4 * EPOCH + 1}",
        "evaluation.every_epochs=1",
        "early_stopping.patience=1",
        "schedule.name=cosine",
    )
    cases = {
        "alternating": (*PARALLEL, *ALTERNATING),
        "residual": (*TIED, *RESIDUAL),
        "interleaving": ("model.fusion=shared_w", *INTERLEAVING),
    }
    configs = {
        name: tuple(small_config(data, tmp_path / f"{name}-{run}", *settings, *extra) for run in ("whole", "broken"))
        for name, extra in cases.items()
    }
    # In the middle of the first phase, at its end, in the middle of the second and third, and at the latter's end.
    results = run_ranks(2, train_and_break, tmp_path, configs, [2, 3, 5, 8, 9])
    for name in cases:
        expected, state = (whole([result[name][run] for result in results]) for run in (0, 1))
        for key, tensor in expected.items():
            assert torch.equal(state[key], tensor), (name, key)
        ends = [json.loads((tmp_path / f"{name}-{run}" / "result.json").read_text()) for run in ("whole", "broken")]
        for key in ("steps", "best_step", "valid", "test"):
            assert ends[0][key] == ends[1][key], (name, key)
    # Patience is for the whole model: it does not end the run before the fourth subnet has come in.
    assert json.loads((tmp_path / "residual-whole/result.json").read_text())["steps"] >= 3 * EPOCH


def test_an_evaluation_that_a_signal_put_off_is_of_the_phase_that_had_ended(tmp_path, data):  # noqa: F811
    settings = (*TIED, "model.score=cosine", *RESIDUAL, f"max_steps={2 * EPOCH}", "evaluation.every_epochs=1")
    run_ranks(1, train, tmp_path, small_config(data, tmp_path / "unbroken", *settings))
    config = small_config(data, tmp_path / "run", *settings)
    # The first phase ends with this step: when the run goes on, it stands at the beginning of the second.
    assert run_ranks(1, train_until_signal, tmp_path, config, EPOCH) == [(None, 0)]
    run_ranks(1, resume, tmp_path, config)

    def evaluated(run: str) -> list[tuple]:
        lines = logged_lines(tmp_path / run)
        return [(line["step"], line["eval/valid/ndcg@10"]) for line in lines if "eval/valid/ndcg@10" in line]

    assert len(evaluated("run")) == 2 and evaluated("run") == evaluated("unbroken")


# -- against plain torch ----------------------------------------------------------------------------------------------

PLAIN = {
    "alternating": (*PARALLEL, "model.hidden_size=6", *ALTERNATING),
    "alternating-twice": ("model.fusion=concat_output", "training.epochs_per_phase=[2,1]", *ALTERNATING),
    "residual": (*TIED, "model.score=cosine", *RESIDUAL),
    "residual-product": ("model.fusion=interaction", *RESIDUAL),
    "residual-sum": ("model.fusion=weighted_sum", "model.output_table=untied", GROUPS, *RESIDUAL),
    "interleaving": ("model.fusion=feature_only", "model.feature_groups=[[tags],[price,image]]", *INTERLEAVING),
}
STEPS = 4 * EPOCH


def _turns(name: str, names: list[str]) -> list[str]:
    """Who is trained, update by update."""
    orders = {
        "alternating": [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1],
        "alternating-twice": [0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0],
        "residual": [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3],
        "residual-product": [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        "residual-sum": [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3],
        "interleaving": [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1],
    }
    return [names[place] for place in orders[name]]


def _train_plainly(name: str, model: PlainModel, config: Config, names: list[str]) -> list[float]:
    manifest = read_manifest(config.data)
    loader = SessionLoader(config.data, manifest, config.loader, config.batch_size, config.seed, rank=0, world=1)
    optimizers = [
        torch.optim.Adam(model.encoder().values(), lr=config.optimizer.lr),
        torch.optim.Adagrad(model.tables().values(), lr=config.table.lr, eps=config.table.eps),
    ]
    losses, turns = [], _turns(name, names)
    everything = {**model.encoder(), **model.tables()}
    while len(losses) < STEPS:
        for block in loader:
            turn = turns[len(losses)]
            if name.startswith("residual"):
                model.present = set(names[: names.index(turn) + 1])
            for key, parameter in everything.items():
                # Where no RNN sees items, their rows are the outputs of all.
                shared = key == "table.weight" and "item" not in names
                parameter.requires_grad_(shared or owner(key) in (turn, None))
            inputs, targets, counted = padded(np.split(block.items, np.cumsum(block.lengths)[:-1]))
            scores = model.scores(inputs)[counted]
            loss = torch.nn.functional.cross_entropy(scores[:, 1:], targets[counted] - 1)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
            if len(losses) == STEPS:
                break
    return losses


def train_each(ranks: Ranks, configs: dict[str, Config]) -> dict[str, tuple[dict, dict]]:
    found = {}
    for name, config in configs.items():
        trainer = Trainer(config, ranks)
        before = final_state(trainer)
        trainer.train()
        found[name] = before, final_state(trainer)
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_every_strategy_makes_the_updates_of_a_plain_torch_model(tmp_path, data, world):  # noqa: F811
    settings = ("precision=fp64", f"max_steps={STEPS}", "loader.max_length=20", "loss.name=full_softmax")
    optimizers = ("checkpoint.every_epochs=null", "optimizer.lr=0.02", "table.optimizer=adagrad", "table.lr=0.1")
    configs = {
        name: small_config(data, tmp_path / name, *settings, *optimizers, *extra) for name, extra in PLAIN.items()
    }
    results = run_ranks(world, train_each, tmp_path, configs)
    features = read_features(data, ITEMS)
    for name, config in configs.items():
        groups = config.model.feature_groups or [[]]
        names = ["feature"] if len(groups) == 1 else [f"feature_{number}" for number in range(len(groups))]
        names = names if config.model.fusion == "feature_only" else ["item", *names]
        model = PlainModel(config.model, ITEMS, features)
        model.load(whole([result[name][0] for result in results]))
        losses = [line["train/loss"] for line in logged_lines(tmp_path / name) if "train/lr" in line]
        assert losses == pytest.approx(_train_plainly(name, model, config, names), rel=1e-10), name
        state = whole([result[name][1] for result in results])
        for key, tensor in model.state().items():
            assert relative_error(state[key], tensor) < 1e-9, (name, key)


# -- a run that ends before all subnets have come in -------------------------------------------------------------------


def train_and_evaluate(ranks: Ranks, config: Config) -> tuple[set[str], dict, dict]:
    """Train, the first evaluation being the best; load the run as evaluation does; who takes part, its metrics, and
    those with all subnets.
    """
    trainer = Trainer(config, ranks)
    evaluate, calls = trainer.evaluator.evaluate, []

    def first_is_best(model, split, *is_unwanted):
        calls.append(split)
        metrics = evaluate(model, split, *is_unwanted)
        metrics[split]["ndcg@10"] += len(calls) == 1
        return metrics

    trainer.evaluator.evaluate = first_is_best
    trainer.train()
    assert calls == ["valid"] * (config.max_steps // EPOCH) + ["valid", "test"]
    model, manifest = trained_run.load_model(config, ranks)
    present = set(model.encoder.present)
    evaluator = Evaluator(config, manifest, read_popularity(config.data, manifest), ranks)
    metrics = evaluator.evaluate(model, "test")["test"]
    model.encoder.take_part(None)
    return present, metrics, evaluator.evaluate(model, "test")["test"]


@pytest.mark.parametrize("phases", [1, 2])
def test_a_subnet_that_had_not_come_in_takes_no_part_in_evaluation(tmp_path, data, phases):  # noqa: F811
    steps = (f"max_steps={phases * EPOCH}", "evaluation.every_epochs=1")
    config = small_config(data, tmp_path / "run", *TIED, "model.score=cosine", *RESIDUAL, *steps)
    for present, metrics, with_all in run_ranks(2, train_and_evaluate, tmp_path, config):
        assert present == {"item"}
        result = json.loads((tmp_path / "run/result.json").read_text())
        assert metrics == result["test"] != with_all
