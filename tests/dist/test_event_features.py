"""Training with event features: the same at any number of ranks, resumed, with workers, and from an earlier run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from gru4recf_dist import train as train_program
from gru4recf_dist import trained_run
from gru4recf_dist.config import Config
from gru4recf_dist.data.batches import pack_queries
from gru4recf_dist.data.blocks import Block
from gru4recf_dist.data.shard_format import read_manifest, write_manifest
from gru4recf_dist.data.streams import SessionLoader
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.trainer import Trainer
from tests.dist.test_resume import resume, train_until
from tests.dist.test_world_size_equality import ADAM, SGD, relative_error
from tests.support.ranks import RankFailed, run_ranks
from tests.support.synthetic import event_values, random_sessions, write_dataset
from tests.support.training import final_state, logged_lines, small_config, train, whole

pytestmark = pytest.mark.dist
SIZES = "model.feature_sizes={type: 3, price: 5, category: 6}"
ITEM_ONLY = ("model.fusion=item_only", "model.feature_sizes={gap: 2}")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """41 sessions in 8 streams, most of them longer than a window; an epoch's last batch leaves ranks empty-handed."""
    folder = tmp_path_factory.mktemp("data")
    held_out = random_sessions(1, 9, 30)
    write_dataset(str(folder), random_sessions(0, 41, items=30), held_out, held_out, event_features=True)
    return folder


def test_the_loader_hands_over_each_event_with_its_own_features(data):
    manifest = read_manifest(str(data))
    expected = {number: items for number, items in enumerate(random_sessions(0, 41, items=30))}
    for workers in (0, 2):
        config = small_config(data, "none", f"loader.workers={workers}").loader
        loader = SessionLoader(str(data), manifest, config, 16, 0, 0, 1)
        seen = []
        for block in loader:
            cuts = np.cumsum(block.lengths)[:-1]
            columns = {name: np.split(column, cuts) for name, column in block.event_features.items()}
            for place, (number, items) in enumerate(zip(block.sessions, np.split(block.items, cuts), strict=True)):
                seen.append(int(number))
                np.testing.assert_array_equal(items, expected[int(number)])
                for name, values in event_values(int(number), items).items():
                    np.testing.assert_array_equal(columns[name][place], values)
        assert sorted(seen) == list(range(41))


@pytest.mark.parametrize(
    ("optimizers", "options"), [(SGD, (SIZES,)), (ADAM, ITEM_ONLY)], ids=["feature-rnn-sgd", "item-rnn-adam"]
)
def test_float64_updates_are_equal_at_1_and_2_ranks(tmp_path, data, optimizers, options):
    reference, result = None, None
    for world in (1, 2):
        config = small_config(data, tmp_path / f"run-{world}", *optimizers, *options, "precision=fp64")
        state = whole(run_ranks(world, train, tmp_path, config))
        found = json.loads((tmp_path / f"run-{world}/result.json").read_text())
        if reference is None:
            reference, result = state, found["test"]
            moved = [name for name in state if name.startswith("encoder.event_inputs.")]
            assert len(moved) >= 4 and all(state[name].abs().sum() > 0 for name in moved)
        for name, tensor in reference.items():
            assert relative_error(state[name], tensor) < 1e-10, name
        assert found["test"] == result


def test_half_precision_and_deepspeed_train_them_too(tmp_path, data):
    engines = {
        "float32": (),
        "bf16": ("precision=bf16",),
        "deepspeed": ("engine.name=deepspeed", "engine.deepspeed.zero_optimization.stage=1"),
    }
    fusion = ("model.fusion=weighted_sum", "model.output_table=untied", "max_steps=8", SIZES)
    configs = {name: small_config(data, tmp_path / name, *ADAM, *fusion, *given) for name, given in engines.items()}
    found = run_ranks(2, train_each, tmp_path, configs)
    states = {name: whole([rank[name][1] for rank in found]) for name in engines}
    losses = {name: logged_lines(tmp_path / name)[0]["train/loss"] for name in engines}
    # It must not be float32 under another name.
    assert losses["bf16"] != losses["float32"] and losses["deepspeed"] == pytest.approx(losses["float32"], rel=1e-5)
    for name, bound in (("bf16", 0.02), ("deepspeed", 1e-5)):
        for key, tensor in states["float32"].items():
            if name == "deepspeed" or not key.startswith("optimizer."):
                assert relative_error(states[name][key], tensor) < bound, (name, key)
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert result["test"]["ndcg@10"] > 0


GROUPS = "model.feature_groups=[[tags,category],[price]]"
FUSIONS = {
    "concat_input": (),
    "feature_only": ("model.output_bias=true",),
    "weighted_sum": (GROUPS, "model.event_input=items"),
    "parallel": (GROUPS, "training.strategy=alternating", "max_steps=3"),
    "interaction": (SIZES,),
}


def train_each(ranks: Ranks, configs: dict[str, Config]) -> dict[str, tuple[dict, dict]]:
    """Of each: the state before and after training."""
    found = {}
    for name, config in configs.items():
        trainer = Trainer(config, ranks)
        before = final_state(trainer)
        trainer.train()
        found[name] = before, final_state(trainer)
    return found


def test_every_fusion_takes_them_and_trains_them_with_the_subnet_that_sees_them(tmp_path, data):
    results = {}
    for world in (1, 2):
        configs = {
            name: small_config(data, tmp_path / f"{name}-{world}", f"model.fusion={name}", "precision=fp64", *SGD,
                               "optimizer.lr=0.05", "max_steps=6", *options)
            for name, options in FUSIONS.items()
        }  # fmt: skip
        results[world] = run_ranks(world, train_each, tmp_path, configs)
    for name in FUSIONS:
        before, reference = results[1][0][name]
        state = whole([found[name][1] for found in results[2]])
        for key, tensor in reference.items():
            assert relative_error(state[key], tensor) < 1e-10, (name, key)
        embedding = "encoder.event_inputs.embedding.token_embedding_table.item.embedding.weight"
        if name == "interaction":
            embedding = "encoder.event_inputs.embedding.sized_token_tables.0.weight"
        # The first phase of `alternating` is the item subnet's; the event features are the first feature RNN's.
        assert torch.equal(before[embedding], reference[embedding]) == (name == "parallel"), name


def test_a_resumed_run_ends_bit_equal_and_an_earlier_one_of_another_model_is_refused(tmp_path, data):
    options = ("model.dropout=0.4", "model.dropout_feature=0.3", "checkpoint.every_epochs=null",
               "checkpoint.every_steps=7", "max_steps=13", SIZES)  # fmt: skip
    unbroken = run_ranks(2, train, tmp_path, small_config(data, tmp_path / "unbroken", *options))
    broken = small_config(data, tmp_path / "broken", *options)
    run_ranks(2, train_until, tmp_path, broken, 9)
    for rank, (first, state) in enumerate(run_ranks(2, resume, tmp_path, broken)):
        assert first == 7
        for name, tensor in unbroken[rank].items():
            assert torch.equal(state[name], tensor), name
    for changed, message in (
        ("model.event_features=[type]", "model.event_features: \\['type'\\], but the checkpoints in"),
        ("model.event_input=items", "model.event_input: 'items', but the checkpoints in"),
    ):
        with pytest.raises(RankFailed, match=message):
            run_ranks(1, train, tmp_path, small_config(data, tmp_path / "broken", *options, changed))


def test_damaged_shards_are_skipped_with_their_features(tmp_path):
    data = tmp_path / "data"
    held_out = random_sessions(1, 9, 30)
    write_dataset(str(data), random_sessions(0, 41, items=30), held_out, held_out, event_features=True)
    # The only shard of a stream, so that what stands in its place is all there is of it.
    for name in ("train/s0000-000000.tar", "train/s0003-000000.tar", "valid/000000.tar"):
        path = data / name
        path.write_bytes(path.read_bytes()[:-700] + bytes(700 - 1) + b"x")
    config = small_config(data, tmp_path / "run", "loader.on_bad_shard=skip", "max_steps=5")
    run_ranks(2, train, tmp_path, config)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["sessions_lost"] > 0 and result["valid"]["sessions_lost"] == 9


def queries(ranks: Ranks, config: Config, blocks: list[Block]) -> list[torch.Tensor]:
    model, _ = trained_run.load_model(config, ranks)
    found = []
    for block in blocks:
        batch = pack_queries(block, 6, 2, every_position=True, event_features=model.event_features)
        found.append(model.encode(batch.items, batch.batch_sizes, batch.event_features)[batch.positions])
    return found


def test_a_query_depends_on_the_features_of_its_events_and_on_no_later_ones(tmp_path, data):
    config = small_config(data, tmp_path / "run", "max_steps=3")
    run_ranks(1, train, tmp_path, config)
    items = np.array([3, 1, 4, 1, 5], np.int32)

    def block(**changes: tuple[int, float]) -> Block:
        features = event_values(0, items)
        for name, (place, value) in changes.items():
            features[name][place] = value
        return Block(items, np.array([5], np.int32), np.array([0], np.int64), event_features=features)

    plain = block(type=(2, 1), price=(2, 0.5), gap=(2, 2))
    # The last event's features are not known when it is predicted.
    others = [block(type=(2, 3), price=(2, 0.5), gap=(2, 2)), block(type=(2, 1), price=(2, np.nan), gap=(2, 2)),
              block(type=(2, 1), price=(2, 0.5), gap=(2, 4))]  # fmt: skip
    last = block(type=(4, 4), price=(4, 9.0), gap=(4, 3))
    last.event_features["type"][2], last.event_features["price"][2], last.event_features["gap"][2] = 1, 0.5, 2
    first, *changed, unchanged = run_ranks(1, queries, tmp_path, config, [plain, *others, last])[0]
    assert torch.equal(unchanged, first)
    for other in changed:
        assert torch.equal(other[:2], first[:2])
        assert (other[2:] != first[2:]).any(dim=1).all()


def start(ranks: Ranks, config: Config) -> dict[str, torch.Tensor]:
    return final_state(Trainer(config, ranks))


def test_a_run_starts_from_one_whose_vocabulary_was_shorter_and_missed_no_price(tmp_path):
    """`type` has grown by an append, and the items' `price` has missing values now."""
    data = tmp_path / "data"
    held_out = random_sessions(1, 9, 30)
    write_dataset(str(data), random_sessions(0, 41, items=30), held_out, held_out, event_features=True)
    old = read_manifest(str(data))
    run_ranks(1, train, tmp_path, small_config(data, tmp_path / "run", "max_steps=5"))
    kind, *rest = old.event_features
    price = old.feature("price").model_copy(update={"missing": True})
    features = [price if each.name == "price" else each for each in old.features]
    grown = [kind.model_copy(update={"size": 8}), *rest]
    changes = {"event_features": grown, "features": features, "ancestors": [old.training_digest]}
    # Another seed of the same shards: nothing else may tell the two states apart.
    write_dataset(str(data), random_sessions(5, 41, items=30), held_out, held_out, event_features=True)
    fresh = read_manifest(str(data))
    (data / "manifests").mkdir()
    write_manifest(str(data), old)
    (data / "manifest.json").rename(data / f"manifests/{old.training_digest}.json")
    write_manifest(str(data), fresh.model_copy(update=changes))

    config = small_config(data, tmp_path / "next", f"init_from={tmp_path}/run", "max_steps=6")
    before = run_ranks(1, start, tmp_path, small_config(data, tmp_path / "fresh", "seed=0"))[0]
    state = run_ranks(1, start, tmp_path, config)[0]
    table = "encoder.event_inputs.embedding.token_embedding_table.item.embedding.weight"
    # `type` had rows 0 to 4, `gap` those behind; the missing vectors: of `price`, of items and of events.
    missing = [name for name in state if name.startswith("encoder.") and "missing_vectors" in name]
    assert len(missing) == 2 and state[table].shape[0] == 8 + 5
    trained = run_ranks(1, weights, tmp_path, small_config(data, tmp_path / "run", "max_steps=5"))[0]
    old_table = trained[table.removeprefix("encoder.")]
    assert torch.equal(state[table][:5], old_table[:5]) and torch.equal(state[table][8:], old_table[5:])
    assert torch.equal(state[table][5:8], before[table][5:8])
    (new,) = [name for name in missing if "feature_embed_layer" in name]
    (kept,) = [name for name in missing if "event_inputs" in name]
    assert not state[new].any() and torch.equal(state[kept], trained[kept.removeprefix("encoder.")])
    assert state[kept].any()
    run_ranks(1, train, tmp_path, config)


def weights(ranks: Ranks, config: Config) -> dict[str, torch.Tensor]:
    model, _ = trained_run.load_model(config, ranks)
    return {name: parameter.detach().clone() for name, parameter in model.encoder.named_parameters()}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.event_features=[colour]",
            "model.event_features: the data set has no event feature 'colour' (it has: type",
        ),
        (
            "model.feature_sizes={colour: 3}",
            "model.feature_sizes: the data set has no feature 'colour' (it has: category",
        ),
        ("model.feature_pooling={price: max}", "model.feature_pooling: the data set has no token_seq feature 'price'"),
        ("model.feature_sizes={type: 0}", "model.feature_sizes.type: input should be greater than 0"),
        (
            "model.event_input=features model.fusion=item_only",
            "model.event_input: features have no RNN with model.fusion=item_only",
        ),
    ],
)
def test_check_finds_what_does_not_fit(tmp_path, data, capsys, override, message):
    overrides = [part if part.startswith("model.") else f"model.{part}" for part in override.split(" model.")]
    arguments = ["--check", f"data={data}", f"run_dir={tmp_path}/run", "batch_size=16", *overrides]
    assert train_program.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
