"""Loads an exported folder in RecBole itself. Runs in RecBole's own environment, so it imports nothing of this project.

    python check_export.py FOLDER ANSWERS.jsonl OUTPUT.json [DATA_PATH DATASET]

FOLDER is what `gru4recf_dist.export` wrote. A line of ANSWERS is {"session": [token, ...], "items": [token, ...],
"scores": [score, ...]}, with every item of the catalog. OUTPUT gets the largest difference from RecBole's scores and
RecBole's metrics. With DATA_PATH and DATASET the model is loaded on that data set, not on the one in FOLDER.
"""

from __future__ import annotations

import json
import sys

import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.interaction import Interaction
from recbole.utils import get_model, get_trainer


def main(folder: str, answers: str, output: str, data_path: str | None = None, dataset: str | None = None) -> None:
    sys.argv = sys.argv[:1]  # its configuration looks into the command line
    # The lines of docs/recbole.md.
    where = {"data_path": folder} if data_path is None else {"data_path": data_path, "dataset": dataset}
    config = Config(config_file_list=[f"{folder}/recbole.yaml"], config_dict={**where, "metric_decimal_place": 6})
    dataset = create_dataset(config)
    train, valid, test = data_preparation(config, dataset)
    model = get_model(config["model"])(config, train.dataset).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    trainer.resume_checkpoint(f"{folder}/model.pth")
    ids = {"items": dataset.field2id_token["item_id"].tolist()}
    with open(f"{folder}/items.json") as stream:
        assert json.load(stream) == ids["items"], "RecBole gives other ids than the exported ones"
    with open(f"{folder}/features.json") as stream:
        for name, values in json.load(stream).items():
            if name in dataset.field2id_token:
                assert values == dataset.field2id_token[name].tolist(), f"RecBole gives other ids to {name}"
    with open(answers) as stream:
        lines = [json.loads(line) for line in stream]
    result = {
        "difference": max(_difference(model, dataset, line) for line in lines),
        "scores": sum(len(line["items"]) for line in lines),
        "valid": dict(trainer.evaluate(valid, load_best_model=False)),
        "test": dict(trainer.evaluate(test, load_best_model=False)),
    }
    # Training goes on from there, at its first epoch.
    trainer.epochs = 1
    trainer.fit(train, valid, verbose=False, saved=False, show_progress=False)
    result["trained_epochs"] = len(trainer.train_loss_dict)
    with open(output, "w") as stream:
        json.dump(result, stream)


def _difference(model, dataset, line: dict) -> float:
    """The largest difference of a line's scores from those of RecBole's model."""
    recent = line["session"][-model.max_seq_length :]
    session = torch.tensor([dataset.token2id("item_id", recent).tolist()])
    given = Interaction({"item_id_list": session, "item_length": torch.tensor([len(recent)])})
    model.eval()
    with torch.no_grad():
        scores = model.full_sort_predict(given)[0]
    found = scores[torch.as_tensor(dataset.token2id("item_id", line["items"]))]
    assert len(line["items"]) == dataset.item_num - 1
    return float((found - torch.tensor(line["scores"])).abs().max())


if __name__ == "__main__":
    main(*sys.argv[1:])
