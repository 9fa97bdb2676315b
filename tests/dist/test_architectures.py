"""Every fusion, with the variants of its output: the updates of a plain torch model, on any number of ranks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from gru4recf_dist.checkpoint_commits import read_commit, write_commit
from gru4recf_dist.config import Config
from gru4recf_dist.data.batches import pack_histories
from gru4recf_dist.data.shard_format import read_manifest
from gru4recf_dist.data.streams import SessionLoader
from gru4recf_dist.evaluation.topk import top_k
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.table.negatives import NegativeSampler, read_popularity
from gru4recf_dist.trainer import Trainer
from tests.dist.test_world_size_equality import relative_error
from tests.support.plain_models import PlainModel, padded, read_features
from tests.support.ranks import run_ranks
from tests.support.synthetic import random_sessions, to_block, write_dataset
from tests.support.training import final_state, logged_lines, small_config, train, whole

pytestmark = pytest.mark.dist
ITEMS, STEPS, TOP = 30, 7, 5

GROUPS = "model.feature_groups=[[tags,category],[price],[image]]"
CASES = {
    "item_only": ("model.output_bias=true", "model.output_table=untied", "model.hidden_size=6"),
    "feature_only": ("model.output_bias=true",),
    "feature_only-groups": ("model.feature_groups=[[tags],[category]]",),
    "concat_input": ("model.num_layers=2",),
    "concat_input-untied": ("model.output_table=untied", "model.score=cosine", "model.temperature=0.2"),
    "concat_output": ("model.output_table=untied", "model.num_layers=2", "model.output_bias=true"),
    "concat_output-groups": (GROUPS, "model.score=cosine", "model.learn_temperature=true"),
    "weighted_sum": ("model.hidden_size=6", "model.fusion_weights=[0.9,-0.3]"),
    "weighted_sum-groups": (GROUPS, "model.output_table=untied"),
    "parallel": ("model.hidden_size=6", "model.output_bias=true"),
    "parallel-tied": ("model.output_table=tied", GROUPS, "model.score=cosine", "model.learn_temperature=true"),
    "parallel-sampled": (
        "model.hidden_size=6",
        "model.output_bias=true",
        "loss.name=sampled_softmax",
        "table.clip=0.1",
    ),
    "shared_w": ("model.hidden_size=6",),
    "shared_w-tied": ("model.output_table=tied", "model.temperature=0.5", GROUPS),
    "interaction": ("model.hidden_size=6", "model.output_bias=true"),
    "interaction-tied": ("model.output_table=tied", "model.score=cosine", GROUPS),
}
SETTINGS = (
    "precision=fp64",
    f"max_steps={STEPS}",
    "checkpoint.every_epochs=null",
    "loader.max_length=20",
    "loss.name=full_softmax",
    "optimizer.lr=0.02",
    "table.optimizer=adagrad",
    "table.lr=0.1",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    held_out = [random_sessions(seed, 9, ITEMS) for seed in (1, 2)]
    write_dataset(str(folder), random_sessions(0, 41, ITEMS), *held_out, items=ITEMS)
    return str(folder)


def _configs(data, folder, *extra: str) -> dict[str, Config]:
    return {
        name: small_config(data, folder / name, f"model.fusion={name.partition('-')[0]}", *SETTINGS, *settings, *extra)
        for name, settings in CASES.items()
    }


def _train_each(ranks: Ranks, configs: dict[str, Config]) -> dict[str, tuple]:
    """Of each: the state before and after training, and the best items after some sessions."""
    found = {}
    for name, config in configs.items():
        trainer = Trainer(config, ranks)
        before = final_state(trainer)
        trainer.train()
        batch = pack_histories(to_block(random_sessions(3, 6, ITEMS)), 20)
        queries = trainer.model.encode(batch.items, batch.batch_sizes)[batch.positions]
        best, _ = top_k(queries, TOP, trainer.model.candidates, tile_rows=7)
        found[name] = before, final_state(trainer), best
    return found


def _sampled_losses(scores, targets, config: Config, step: int, popularity) -> torch.Tensor:
    """-log(e^s_t / (e^s_t + sum over the draws j that are not t of e^s_j / (K q_j)))."""
    sampler = NegativeSampler(popularity, config.loss, config.seed)
    drawn = sampler.draw(step)
    factor = torch.from_numpy(drawn.counts / (config.loss.negatives * np.exp(sampler.log_q(drawn.ids))))
    own = scores.gather(1, targets[:, None]).squeeze(1).exp()
    others = scores[:, torch.from_numpy(drawn.ids)].exp() * factor
    others = others.masked_fill(torch.from_numpy(drawn.ids) == targets[:, None], 0.0)
    return -(own / (own + others.sum(dim=1))).log()


def _train_plainly(model: PlainModel, config: Config) -> list[float]:
    """Train on the same batches; the mean loss of each step."""
    manifest = read_manifest(config.data)
    popularity = read_popularity(config.data, manifest)
    loader = SessionLoader(config.data, manifest, config.loader, config.batch_size, config.seed, rank=0, world=1)
    tables = list(model.tables().values())
    optimizers = [
        torch.optim.Adam(model.encoder().values(), lr=config.optimizer.lr),
        torch.optim.Adagrad(tables, lr=config.table.lr, eps=config.table.eps),
    ]
    losses = []
    while len(losses) < STEPS:
        for block in loader:
            bounds = np.cumsum(block.lengths)[:-1]
            inputs, targets, counted = padded(np.split(block.items, bounds))
            scores = model.scores(inputs)[counted]
            if config.loss.name == "full_softmax":
                # The padding row is no candidate.
                each = torch.nn.functional.cross_entropy(scores[:, 1:], targets[counted] - 1, reduction="none")
            else:
                each = _sampled_losses(scores, targets[counted], config, len(losses) + 1, popularity)
            each.mean().backward()
            if config.table.clip is not None:
                norm = torch.cat([table.grad.flatten() for table in tables]).norm()
                assert norm > config.table.clip
                for table in tables:
                    table.grad *= config.table.clip / norm
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(each.mean().detach()))
            if len(losses) == STEPS:
                break
    return losses


def _expected_metrics(model: PlainModel, sessions: list[np.ndarray]) -> dict[str, float]:
    """Of every position, by a full sort."""
    inputs, targets, counted = padded(sessions)
    scores, targets = model.scores(inputs)[counted], targets[counted]
    own = scores.gather(1, targets[:, None])
    ranks = 1 + (scores[:, 1:] > own).sum(dim=1).double()
    hit = (ranks <= 10).double()
    return {"hit@10": float(hit.mean()), "mrr@10": float((hit / ranks).mean())}


@pytest.mark.parametrize("world", [1, 2])
def test_every_architecture_makes_the_updates_of_a_plain_torch_model(tmp_path, data, world):
    configs = _configs(data, tmp_path)
    results = run_ranks(world, _train_each, tmp_path, configs)
    features = read_features(data, ITEMS)
    trained = np.unique(np.concatenate(random_sessions(0, 41, ITEMS)))
    for name, config in configs.items():
        model = PlainModel(config.model, ITEMS, features)
        model.load(whole([result[name][0] for result in results]))
        losses = [line["train/loss"] for line in logged_lines(tmp_path / name) if "train/lr" in line]
        assert losses == pytest.approx(_train_plainly(model, config), rel=1e-10), name
        assert losses[-1] < losses[0], name
        state, expected = whole([result[name][1] for result in results]), model.state()
        weights = {key for key in state if not key.startswith("optimizer.") and "sum_of_squares" not in key}
        assert weights == expected.keys(), name
        for key, tensor in expected.items():
            assert relative_error(state[key], tensor) < 1e-9, (name, key)
            # Nothing that is there is left untrained.
            before = whole([result[name][0] for result in results])[key]
            assert not (key.startswith("output_bias") and before.any()), "no item is preferred at first"
            assert not torch.equal(before, tensor), (name, key)
        with torch.no_grad():
            sessions = [session for session in random_sessions(1, 9, ITEMS) if len(session) > 1]
            metrics = _expected_metrics(model, sessions)
            result = json.loads((tmp_path / name / "result.json").read_text())["valid"]
            # Items without a training event would be misses.
            assert set(np.concatenate(sessions)) <= set(trained)
            assert {key: result[key] for key in metrics} == pytest.approx(metrics, rel=1e-9), name
            for place, session in enumerate(random_sessions(3, 6, ITEMS)):
                scores = model.scores(torch.from_numpy(session.astype(np.int64))[None])[0, -1, 1:]
                best = (scores.topk(TOP).indices + 1).tolist()
                assert all(result[name][2][place].tolist() == best for result in results), name


# -- sampled, in windows, in micro-batches, under the other engine -----------------------------------------------------

SAMPLED = {
    "feature_only": ("loss.in_batch=20", "model.output_bias=true"),
    "concat_input": ("loss.logq=classic", "model.score=cosine"),
    "weighted_sum": (GROUPS, "model.output_table=untied"),
    "parallel": (GROUPS, "loss.in_batch=9", "model.output_bias=true", "table.clip=0.1"),
    "interaction": ("model.output_table=tied", "training.strategy=interleaving"),
}


def _sampled_runs(world: int, data, folder, *extra: str) -> dict[str, tuple[dict, list[float]]]:
    """Of each, the end and the losses."""
    configs = {
        name: small_config(
            data,
            folder / name,
            f"model.fusion={name}",
            "max_steps=8",
            "checkpoint.every_epochs=null",
            *settings,
            *extra,
        )
        for name, settings in SAMPLED.items()
    }
    states = run_ranks(world, _end_of_each, folder, configs)
    ends = {name: whole([state[name] for state in states]) for name in configs}
    return {
        name: (end, [line["train/loss"] for line in logged_lines(folder / name) if "train/lr" in line])
        for name, end in ends.items()
    }


def _end_of_each(ranks: Ranks, configs: dict[str, Config]) -> dict[str, dict[str, torch.Tensor]]:
    return {name: train(ranks, config) for name, config in configs.items()}


def _assert_equal(ours: dict, reference: dict, error: float) -> None:
    for name, (state, losses) in reference.items():
        assert ours[name][1] == pytest.approx(losses, rel=error), name
        assert ours[name][0].keys() == state.keys(), name
        for key, tensor in state.items():
            assert relative_error(ours[name][0][key], tensor) < error, (name, key)


def test_updates_from_sampled_losses_are_equal_at_1_and_4_ranks(tmp_path, data):
    folders = [tmp_path / name for name in ("one", "four")]
    for folder in folders:
        folder.mkdir()
    reference = _sampled_runs(1, data, folders[0], "precision=fp64")
    _assert_equal(_sampled_runs(4, data, folders[1], "precision=fp64", "accumulation=2"), reference, 1e-10)


def test_deepspeed_makes_ddps_updates_of_parallel_and_weighted_subnets(tmp_path, data):
    engines = {
        "ddp": ("engine.name=ddp",),
        **{
            str(stage): ("engine.name=deepspeed", f"engine.deepspeed.zero_optimization.stage={stage}")
            for stage in (0, 1, 3)
        },
    }
    fusions = {"parallel": SAMPLED["parallel"], "shared_w": ("model.fusion_weights=[1,2]",)}
    configs = {
        f"{fusion}/{engine}": small_config(
            data, tmp_path / fusion / engine, f"model.fusion={fusion}", "max_steps=6", *settings, *given
        )
        for fusion, settings in fusions.items()
        for engine, given in engines.items()
    }
    ends = run_ranks(2, _end_of_each, tmp_path, configs)
    for fusion in fusions:
        reference, *others = (whole([end[f"{fusion}/{engine}"] for end in ends]) for engine in engines)
        for other in others:
            for key, tensor in reference.items():
                assert relative_error(other[key], tensor) < 1e-5, (fusion, key)


# -- checkpoints of before there were several tables -------------------------------------------------------------------


def test_a_checkpoint_of_before_there_were_several_tables_goes_on(tmp_path, data):
    settings = ("model.dropout=0.3", "checkpoint.keep_last=9", "checkpoint.every_steps=4")
    unbroken = whole(run_ranks(1, train, tmp_path, small_config(data, tmp_path / "unbroken", *settings, "max_steps=8")))
    run_ranks(1, train, tmp_path, small_config(data, tmp_path / "old", *settings, "max_steps=4"))
    commit = read_commit(str(tmp_path / "old/checkpoints"), 4)
    assert commit["table_steps"] == {"table": 4}
    commit["table_steps"] = 4
    del commit["state"]["present_subnets"], commit["state"]["progress"]["epoch"]
    write_commit(str(tmp_path / "old/checkpoints"), 4, commit)
    recipe = (tmp_path / "old/config.yaml").read_text().splitlines()
    new = (
        "fusion_weights",
        "feature_groups",
        "output_table",
        "output_bias",
        "dropout_output",
        "strategy",
        "epochs_per",
    )
    kept = [line for line in recipe if not line.startswith("training:") and not line.strip().startswith(new)]
    assert len(kept) == len(recipe) - len(new) - 1
    (tmp_path / "old/config.yaml").write_text("\n".join(kept))
    resumed = whole(run_ranks(1, train, tmp_path, small_config(data, tmp_path / "old", *settings, "max_steps=8")))
    for key, tensor in unbroken.items():
        assert torch.equal(resumed[key], tensor), key
