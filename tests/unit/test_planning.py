"""The planner's expectations against draws and sums written out, its limits, and its command line."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from gru4recf_dist import config as configuration
from gru4recf_dist.config import LossConfig
from gru4recf_dist.model.features import FeatureSpec
from gru4recf_dist.parallel.gathering import gather_shares
from gru4recf_dist.plan import main
from gru4recf_dist.planning import memory, popularity, speed, wire
from gru4recf_dist.planning.workload import ItemFeature, Workload, expected_counts
from gru4recf_dist.table.negatives import NegativeSampler
from gru4recf_dist.table.partition import RowPartition
from tests.support.synthetic import random_sessions, write_dataset

GIB = 1 << 30


def _workload(items: int = 10**6, world: int = 4, **settings) -> Workload:
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    config = configuration.load(None, ["data=x", "run_dir=x", "model.fusion=item_only", *overrides], training=False)
    return Workload(config, items, world, 8.0, (), popularity.zipf(items, 1.0))


@pytest.mark.parametrize("exponent", [0.6, 1.0, 1.3])
@pytest.mark.parametrize("draws", [300, 30_000, 3_000_000])
def test_distinct_items_of_a_zipf_catalog_are_those_of_the_sum_over_all_items(exponent, draws):
    mass = np.arange(1, 10**6 + 1, dtype=np.float64) ** -exponent
    expected = (1.0 - (1.0 - mass / mass.sum()) ** draws).sum()
    assert popularity.zipf(10**6, exponent).distinct(draws) == pytest.approx(expected, rel=1e-3)


def test_distinct_items_of_a_log_are_those_of_drawing_from_it():
    generator = np.random.default_rng(0)
    log = generator.integers(0, 50, 400) ** 2
    drawn = [len(np.unique(generator.choice(log, 150, replace=False))) for _ in range(2000)]
    counts = np.bincount(log, minlength=3000)
    assert popularity.of_counts(counts).distinct(150) == pytest.approx(np.mean(drawn), rel=0.01)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(("world", "draws"), [(4, 600), (16, 600), (64, 300)])
def test_the_most_asked_rank_is_that_of_items_dealt_to_ranks(world, draws, balanced):
    """Few ranks are even, many are not: an item that all of them ask for is one rank's work."""
    items, seen = 20_000, []
    mass = np.cumsum(1.0 / np.arange(1, items + 1))
    for seed in range(30):
        generator = np.random.default_rng(seed)
        owner = np.arange(items) % world if balanced else generator.integers(world, size=items)
        asked = np.zeros(world)
        for _ in range(world):
            ids = np.unique(np.searchsorted(mass, generator.random(draws) * mass[-1]))
            asked += np.bincount(owner[ids], minlength=world)
        seen.append(asked.max() / asked.mean())
    popular = popularity.zipf(items, 1.0, balanced)
    expected = popular.lookup_imbalance(draws, world)
    assert expected == pytest.approx(np.mean(seen), abs=4 * np.std(seen) / np.sqrt(len(seen)))
    assert popular.lookup_imbalance(draws, 1) == 1.0


@pytest.mark.parametrize("draws", [1, 2, 5])
def test_the_most_asked_of_two_ranks_is_asked_for_all_at_most(draws):
    assert 1.0 <= popularity.zipf(10**6, 0.1).lookup_imbalance(draws, 2) <= 2.0


@pytest.mark.parametrize("sampler", ["popularity", "log_uniform", "uniform"])
def test_distinct_negatives_and_their_shares_are_those_of_the_sampler(sampler):
    counts = np.random.default_rng(1).permutation((1e6 / np.arange(1, 50_001)).astype(np.int64))
    settings = LossConfig(negatives=8192, sampler=sampler, alpha=0.5)
    draws = [NegativeSampler(np.append(0, counts), settings, 0).draw(step).ids for step in range(40)]
    workload = _workload(50_000, 64, batch_size=512, loss__negatives=8192, loss__sampler=sampler, loss__alpha=0.5)
    expected = expected_counts(replace(workload, popularity=popularity.of_counts(counts)))
    assert expected.negatives == pytest.approx(np.mean([len(ids) for ids in draws]), rel=0.01)

    splits = [gather_shares(RowPartition(50_001, 64).split(ids).tolist()) for ids in draws]
    assert expected.negatives_share == pytest.approx(np.mean([max(shares) for shares, _ in splits]), rel=0.02)
    moved = np.mean([(moves.sum() - np.trace(moves)) / 64 for _, moves in splits])
    assert expected.negatives_moved == pytest.approx(moved, rel=0.2)


def test_the_longest_session_is_that_of_draws_and_never_longer_than_a_window():
    lengths = np.random.default_rng(0).geometric(1 / 7, (4000, 64))
    assert expected_counts(_workload(world=4, batch_size=256)).longest == pytest.approx(
        lengths.max(axis=1).mean(), rel=0.1
    )
    assert expected_counts(_workload(world=1, batch_size=10**6, loader__max_length=30)).longest == 30


def test_each_loss_has_its_own_cost_of_the_same_logits():
    def parts(loss: str, world: int = 4) -> tuple[dict, dict]:
        plan = _workload(world=world, loss__name=loss)
        counts = expected_counts(plan)
        return speed.step_seconds(plan, counts, speed.Machine()), memory.device_bytes(plan, counts)

    (seconds, held), (softmax_seconds, softmax_held) = parts("bpr_max"), parts("sampled_softmax")
    assert seconds["matrix products"] == softmax_seconds["matrix products"]
    assert seconds["wire"] == softmax_seconds["wire"]
    assert held["logits of a block"] == 5 * softmax_held["logits of a block"]
    # A device whose functions are slow, and nothing else: 15 of them a logit, and 2.
    plan = _workload(loss__name="bpr_max")
    counts = expected_counts(plan)
    machine = speed.Machine(functions_gs=1.0)
    pairs = counts.events_largest * counts.negatives
    gates = counts.events_largest * 3 * plan.config.model.hidden_size
    assert speed.step_seconds(plan, counts, machine)["exponentials"] == pytest.approx(1e-9 * (15 * pairs + gates))


def test_the_expected_largest_of_two_normal_numbers_is_known():
    assert popularity.largest_of(1) == pytest.approx(0.0, abs=1e-9)
    assert popularity.largest_of(2) == pytest.approx(np.pi**-0.5, rel=1e-4)


@pytest.mark.parametrize(("optimizer", "floats"), [("lazy_adam", 128), ("adagrad", 64), ("rowwise_adagrad", 1)])
def test_table_and_its_state_are_counted_row_by_row(optimizer, floats):
    parts = memory.device_bytes(plan := _workload(999, 8, table__optimizer=optimizer), expected_counts(plan))
    # 1000 rows with the padding row, 125 a rank.
    assert parts["table rows"] == 125 * 64 * 4
    assert parts["row optimizer state"] == 125 * floats * 4
    on_host = _workload(999, 8, table__optimizer=optimizer, table__device="cpu")
    assert "table rows" not in memory.device_bytes(on_host, expected_counts(on_host))
    assert memory.node_bytes(on_host, 4)["table rows"] == 4 * 125 * 64 * 4


@pytest.mark.parametrize(("optimizer", "floats"), [("lazy_adam", 2 * (64 + 100 + 100 + 1)), ("rowwise_adagrad", 4)])
def test_tables_that_only_outputs_have_are_counted_too(optimizer, floats):
    given = ["model.fusion=parallel", "model.output_bias=true", "model.hidden_size=100", f"table.optimizer={optimizer}"]
    config = configuration.load(None, ["data=x", "run_dir=x", *given], training=False)
    features = (ItemFeature(FeatureSpec("brand", "token", 50)),)
    plan = Workload(config, 999, 8, 8.0, features, popularity.zipf(999, 1.0))
    parts = memory.device_bytes(plan, expected_counts(plan))
    # Item rows, an output matrix of each RNN, the bias.
    assert parts["table rows"] == 125 * (64 + 100 + 100 + 1) * 4
    assert parts["row optimizer state"] == 125 * floats * 4


def test_one_rank_sends_nothing():
    plan = _workload(world=1)
    assert wire.sent_bytes(plan, expected_counts(plan)) == {}
    assert speed.step_seconds(plan, expected_counts(plan), speed.Machine())["wire"] == 0.0


def test_the_ranks_needed_fit_and_one_fewer_do_not():
    plan = _workload(10**9, 8, batch_size=4096)
    limits = (80 * GIB, 1024 * GIB, 8)
    assert not memory.fits(plan, *limits)
    needed = memory.ranks_needed(plan, *limits)
    # 10^9 rows of 64 values, with two moments: 716 GiB over GPUs of 72.
    assert needed == 10
    assert memory.fits(replace(plan, world=needed), *limits)
    assert not memory.fits(replace(plan, world=needed - 1), *limits)
    assert memory.ranks_needed(_workload(10**9, 8, batch_size=8), *limits) is None


def test_a_slower_part_limits_the_step():
    plan = _workload(world=64, batch_size=4096)
    counts = expected_counts(plan)

    def limit(**rates) -> str:
        seconds = speed.step_seconds(plan, counts, speed.Machine(**rates))
        return max(seconds, key=seconds.get)

    assert limit(network_gbs=0.01) == "wire"
    assert limit(matmul_tflops=0.01) == "matrix products"
    assert limit(memory_gbs=0.1) == "memory"
    assert limit(functions_gs=0.1) == "exponentials"
    assert limit(rnn_step_us=1e5) == "RNN, event by event"


def test_exchanges_between_nodes_go_at_the_networks_rate():
    machine = speed.Machine(link_gbs=100.0, network_gbs=10.0, ranks_per_node=8)
    assert speed.wire_seconds({"rows": 7e9}, 8, machine) == pytest.approx(0.07)
    # 8 of 15 other ranks are on the other node.
    assert speed.wire_seconds({"rows": 15e9}, 16, machine) == pytest.approx(0.8)
    # A ring crosses between nodes over eight cards.
    assert speed.wire_seconds({"negatives": 80e9}, 16, machine) == pytest.approx(1.0)


def test_the_program_prints_tables_or_json(capsys):
    arguments = ["--items", "2e9", "--dim", "128", "--gpus", "64", "--batch", "8192", "--negatives", "8192"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "2,000,000,000 items" in text and "limited by: " in text and "\nit fits: " in text
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["gpus_needed"] < 64
    assert plan["device_bytes"]["table rows"] == -(-(2 * 10**9 + 1) // 64) * 128 * 4
    assert main([*arguments, "--json", "--gpus", "8"]) == 0
    assert json.loads(capsys.readouterr().out)["gpus_needed"] == plan["gpus_needed"]
    assert main([*arguments, "--gpus", "8"]) == 0
    assert "IT DOES NOT FIT: " in (text := capsys.readouterr().out) and f"it takes {plan['gpus_needed']} GPUs" in text


def test_a_balanced_catalog_is_planned_as_one(capsys, tmp_path):
    """Told by a flag, or by the recipe that a data set was prepared with."""
    given, found = ["--items", "1000000", "--gpus", "64", "--batch", "8192", "--json"], []
    for order in ("md5", "balanced"):
        assert main([*given, "--item-order", order]) == 0
        found.append(json.loads(capsys.readouterr().out)["counts"]["lookup_imbalance"])
    assert found[1] < 1.12 < 1.25 < found[0]

    write_dataset(str(tmp_path), random_sessions(0, 80, items=30), random_sessions(1, 9, 30), random_sessions(2, 9, 30))
    given, found = ["--data", str(tmp_path), "--gpus", "8", "--batch", "64", "--json"], []
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for order in ("md5", "balanced"):
        (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "recipe": {"item_order": order}}))
        assert main(given) == 0
        found.append(json.loads(capsys.readouterr().out)["counts"]["lookup_imbalance"])
    assert found[1] < found[0]


def test_negatives_of_the_batch_alone_need_no_sampler(capsys):
    arguments = ["--items", "1000", "loss.name=bpr", "loss.in_batch=all"]
    found = []
    for negatives, text in (
        (0, "bpr with all of the batch"),
        (64, "bpr with 64 negatives (popularity) and all of the"),
    ):
        given = [*arguments, f"loss.negatives={negatives}"]
        assert main(given) == 0 and text in capsys.readouterr().out
        assert main([*given, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    # The events of each item; and the sampler's running sum.
    assert [plan["node_bytes"]["popularity and sampler"] for plan in found] == [8 * 1001, 16 * 1001]
    assert 0 < found[0]["counts"]["negatives"] < found[1]["counts"]["negatives"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of --items and --data must be given"),
        (["--items", "2x"], "--items: '2x' is not a number above 0"),
        (["--items", "-5"], "--items: '-5' is not a number above 0"),
        (["--items", "1.5"], "--items: '1.5' is not a whole number above 0"),
        (["--items", "100", "--gpus", "1000"], "--gpus: 1000 ranks are more than the 128 sessions of a (micro-)batch"),
        (["--items", "100", "--feature", "colour"], "--feature: 'colour' is none of token:SIZE"),
        (["--items", "100", "--table-optimizer", "adam"], "table.optimizer: "),
        (["--items", "100", "model.layers=2"], "unknown key 'model.layers'"),
        (["--items", "100", "--itemz", "3"], "--itemz"),
        (["--data", "nowhere"], "nowhere/manifest.json: no such file"),
        (["--data", "nowhere", "--zipf", "1"], "--zipf: the data set decides it"),
        (["--data", "nowhere", "--item-order", "md5"], "--item-order: the data set decides it"),
    ],
)
def test_errors_are_one_line(capsys, arguments, message):
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and message in shown and shown.count("\n") == 1
