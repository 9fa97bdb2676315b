"""Every fusion, with the variants of its output: the updates of a plain torch model, on any number of ranks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

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
from tests.support.training import final_state, logged_lines, small_config, whole

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
    "parallel-sampled": ("model.hidden_size=6", "model.output_bias=true", "loss.name=sampled_softmax", "table.clip=0.1"),
    "shared_w": ("model.hidden_size=6",),
    "shared_w-tied": ("model.output_table=tied", "model.temperature=0.5", GROUPS),
    "interaction": ("model.hidden_size=6", "model.output_bias=true"),
    "interaction-tied": ("model.output_table=tied", "model.score=cosine", GROUPS),
}
SETTINGS = (
    "precision=fp64",
    f"max_steps={STEPS}",
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
