"""Makes `fixtures.tar.xz`: checkpoints, scores and metrics of RecBole 1.2.1 on a small synthetic data set.

    make recbole-fixtures    # or, in RecBole's environment: python tests/recbole/make_fixtures.py [OUTPUT]

Runs in RecBole's own environment, so it imports nothing of this project. In the archive:

    shop/shop.inter, shop/shop.item    the data set, as RecBole's atomic files
    ids/items.json, ids/features.json  RecBole's id of every token, as in docs/recbole.md
    checkpoints/NAME.pth               written by RecBole's trainer: GRU4Rec, and GRU4RecF of every combination of kinds
                                       of features and of poolings, with 1 and 2 layers, untrained; and two trained ones
    shop-SequentialDataset.pth         the data set as RecBole saves it
    inputs.json                        sessions, as tokens
    scores.npz                         NAME -> float32 [sessions, items + 1], `full_sort_predict` of these sessions
    metrics.json                       of the trained ones: RecBole's own on the validation and test split
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_logger, init_seed

NAME = "shop"
ITEMS, USERS, INPUTS = 60, 70, 6
FEATURES = {"brand": "token", "tags": "token_seq", "price": "float"}
POOLINGS = ("mean", "sum", "max")
SIZES = {"embedding_size": 6, "hidden_size": 5}
METRICS = ("Hit", "NDCG", "MRR")
EPOCHS = 25
SETTINGS = {
    **SIZES,
    "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", *FEATURES]},
    "numerical_features": ["price"],
    # Shorter than many sessions, so that histories are cut.
    "MAX_ITEM_LIST_LENGTH": 8,
    "train_neg_sample_args": None,
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
    "metrics": list(METRICS),
    "topk": [5, 10],
    "valid_metric": "NDCG@10",
    "metric_decimal_place": 6,
    "epochs": EPOCHS,
    # Evaluated once, at the end: so the checkpoint that the trainer writes is of the last epoch.
    "eval_step": EPOCHS,
    "train_batch_size": 64,
    "learning_rate": 0.01,
    "use_gpu": False,
    "show_progress": False,
    "state": "WARNING",
}


def main(output: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # RecBole writes logs and TensorBoard files into the working folder and reads the command line.
        os.chdir(folder)
        sys.argv = sys.argv[:1]
        _write_atomic_files(Path(NAME))
        Path("checkpoints").mkdir()
        scores, metrics = {}, {}
        for name, (model, settings, is_trained) in _variants().items():
            scores[name], metrics_of_it = _run(name, model, settings, is_trained)
            if is_trained:
                metrics[name] = metrics_of_it
        np.savez("scores.npz", **scores)
        Path("metrics.json").write_text(json.dumps(metrics, indent=1))
        _write_archive(output)


def _variants() -> dict[str, tuple[str, dict, bool]]:
    """By name of the checkpoint: model, RecBole's settings, whether it is trained."""
    variants = {}
    for layers in (1, 2):
        variants[f"none-{layers}"] = ("GRU4Rec", {"num_layers": layers}, False)
        for count in range(1, len(FEATURES) + 1):
            for features in itertools.combinations(FEATURES, count):
                for pooling in POOLINGS:
                    settings = {"num_layers": layers, "selected_features": list(features), "pooling_mode": pooling}
                    variants[f"{'+'.join(features)}-{pooling}-{layers}"] = ("GRU4RecF", settings, False)
    variants["trained-items"] = ("GRU4Rec", {"num_layers": 1}, True)
    # Not in the order in which the embeddings lie.
    settings = {"num_layers": 1, "selected_features": ["price", "tags", "brand"], "pooling_mode": "mean"}
    variants["trained-features"] = ("GRU4RecF", settings, True)
    return variants


def _run(name: str, model_name: str, settings: dict, is_trained: bool) -> tuple[np.ndarray, dict]:
    """Write one checkpoint; its scores, and if it is trained its metrics."""
    given = {"data_path": ".", "checkpoint_dir": "saved", **SETTINGS, **settings}
    config = Config(model=model_name, dataset=NAME, config_dict=given)
    init_seed(len(name), reproducibility=True)
    init_logger(config)
    dataset = create_dataset(config)
    if not Path("ids").exists():
        _write_ids(dataset)
        dataset.save()
        Path("saved", f"{NAME}-SequentialDataset.pth").rename(f"{NAME}-SequentialDataset.pth")
    train, valid, test = data_preparation(config, dataset)
    model = get_model(model_name)(config, train.dataset).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], model_name)(config, model)
    trainer.saved_model_file = f"checkpoints/{name}.pth"
    metrics = {}
    if is_trained:
        trainer.fit(train, valid, verbose=False, saved=True, show_progress=False)
        for split, data in (("valid", valid), ("test", test)):
            metrics[split] = dict(trainer.evaluate(data, load_best_model=False))
            _check_for_ties(model, data)
    else:
        trainer._save_checkpoint(0, verbose=False)
    model.eval()
    sessions = test.dataset.inter_feat[:INPUTS]
    with torch.no_grad():
        scores = model.full_sort_predict(sessions).numpy()
    lengths = sessions["item_length"].tolist()
    histories = [ids[:n].tolist() for ids, n in zip(sessions["item_id_list"], lengths, strict=True)]
    tokens = [dataset.id2token("item_id", history).tolist() for history in histories]
    Path("inputs.json").write_text(json.dumps(tokens))
    return scores, metrics


def _check_for_ties(model, data) -> None:
    """Metrics can only be compared where no rounding decides which item comes first."""
    with torch.no_grad():
        scores = model.full_sort_predict(data.dataset.inter_feat[:])[:, 1:]
    target = scores.gather(1, data.dataset.inter_feat["item_id"][:, None] - 1)
    gap = (scores - target).abs().sort(dim=1).values[:, 1].min()
    assert gap > 1e-5, f"scores are {gap} apart: take another seed"


def _write_ids(dataset) -> None:
    Path("ids").mkdir()
    items = dataset.field2id_token["item_id"].tolist()
    features = {name: dataset.field2id_token[name].tolist() for name in FEATURES if name in dataset.field2id_token}
    Path("ids/items.json").write_text(json.dumps(items))
    Path("ids/features.json").write_text(json.dumps(features))


def _write_atomic_files(folder: Path) -> None:
    """Sessions in which an item is mostly followed by one of its neighbours; every item is often trained on."""
    folder.mkdir()
    generator = np.random.default_rng(5)
    tokens = [f"p{number}" for number in generator.permutation(ITEMS) + 100]
    lines = []
    for user in range(USERS):
        item = user % ITEMS
        for time in range(int(generator.integers(5, 15))):
            lines.append((time, f"u{user}\t{tokens[item]}\t{1000 * (user % 7) + time}"))
            follows = generator.random() < 0.8
            item = (item + int(generator.integers(1, 4))) % ITEMS if follows else int(generator.integers(ITEMS))
    # By time and not by user: the order of appearance is then another one than that of the items' neighbourhood.
    rows = [line for _, line in sorted(lines, key=lambda pair: pair[0])]
    (folder / f"{NAME}.inter").write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows]) + "\n")
    header = "\t".join(["item_id:token", *(f"{name}:{kind}" for name, kind in FEATURES.items())])
    described = [header]
    for item in generator.permutation(ITEMS):
        # Every tenth has no tag, every eleventh no brand.
        tags = [] if item % 10 == 9 else [f"t{tag}" for tag in generator.choice(7, int(generator.integers(1, 4)))]
        brand = "" if item % 11 == 3 else f"b{item % 5}"
        described.append(f"{tokens[item]}\t{brand}\t{' '.join(tags)}\t{generator.normal():.3f}")
    (folder / f"{NAME}.item").write_text("\n".join(described) + "\n")


def _write_archive(output: Path) -> None:
    names = [NAME, "ids", "checkpoints", f"{NAME}-SequentialDataset.pth", "inputs.json", "scores.npz", "metrics.json"]
    with tarfile.open(output, "w:xz", preset=9) as archive:
        for name in names:
            archive.add(name, filter=_without_owner)


def _without_owner(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    main(Path(*sys.argv[1:] or [Path(__file__).with_name("fixtures.tar.xz")]).resolve())
