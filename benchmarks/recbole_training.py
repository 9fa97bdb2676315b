"""RecBole trains and evaluates GRU4RecF. Runs in an environment of its own, so it imports nothing of this project.

    python recbole_training.py '{"data_path": FOLDER, "dataset": NAME, "epochs": 3, "output": FILE, ...}'

The other keys are `settings`, RecBole's own, and `topk_sessions` and `topk_batch` for `full_sort_topk`. FILE is written
anew after every epoch, so that what was measured stays if the program is ended.
"""

from __future__ import annotations

import json
import os
import sys
import time

import recbole
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import GRU4RecF
from recbole.trainer import Trainer
from recbole.utils import init_logger, init_seed
from recbole.utils.case_study import full_sort_topk

TOP_K = 20


class TimedTrainer(Trainer):
    """RecBole's trainer, its epochs and validations timed; the test split is evaluated outside of the clock.

    Seconds are of the CPU: with one thread on one core that is wall time, less what other programs took of the core.
    Training and the validation after each epoch count, as a user who chooses the best epoch pays for both.
    """

    def measure(self, train_data, valid_data, test_data, result: dict, output: str) -> None:
        self.test_data, self.result, self.output, self.clock = test_data, result, output, 0.0
        self.fit(train_data, valid_data, saved=False, show_progress=False)

    def _train_epoch(self, *arguments, **named):
        started, wall = time.process_time(), time.perf_counter()
        loss = super()._train_epoch(*arguments, **named)
        self.train_seconds, self.train_wall_seconds = time.process_time() - started, time.perf_counter() - wall
        return loss

    def _valid_epoch(self, *arguments, **named):
        started = time.process_time()
        score, valid = super()._valid_epoch(*arguments, **named)
        seconds = time.process_time() - started
        self.clock += self.train_seconds + seconds
        started = time.process_time()
        test = self.evaluate(self.test_data, load_best_model=False)
        epoch = {"train_seconds": self.train_seconds, "train_wall_seconds": self.train_wall_seconds}
        epoch |= {"valid_seconds": seconds, "clock": self.clock, "valid": valid, "test": test}
        self.result["epochs"].append(epoch)
        self.result["evaluation_seconds"] = time.process_time() - started
        _write(self.output, self.result)
        return score, valid


def main(given: dict) -> None:
    torch.set_num_threads(1)
    settings = {
        "data_path": given["data_path"],
        "checkpoint_dir": f"{given['data_path']}/saved",
        "use_gpu": False,
        "epochs": given["epochs"],
        # Every session's last event is the test target, the one before it the validation target.
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
        "metrics": ["Hit", "NDCG", "MRR"],
        "valid_metric": "NDCG@10",
        "metric_decimal_place": 6,
        "train_neg_sample_args": None,
        **given["settings"],
    }
    # Its logs and TensorBoard files go to the working folder, its configuration looks into the command line.
    os.chdir(given["data_path"])
    sys.argv = sys.argv[:1]
    config = Config(model="GRU4RecF", dataset=given["dataset"], config_dict=settings)
    init_seed(config["seed"], config["reproducibility"])
    init_logger(config)
    dataset = create_dataset(config)
    train_data, valid_data, test_data = data_preparation(config, dataset)
    init_seed(config["seed"], config["reproducibility"])
    model = GRU4RecF(config, train_data.dataset).to(config["device"])
    result = {
        "settings": given["settings"],
        "versions": {"recbole": recbole.__version__, "torch": torch.__version__},
        "items": dataset.item_num - 1,
        "train_targets": len(train_data.dataset),
        "test_targets": len(test_data.dataset),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "epochs": [],
    }
    # Its time does not depend on the weights; measured first, it is in the file whenever training is ended.
    result.update(_time_topk(model, test_data, given["topk_sessions"], given["topk_batch"]))
    TimedTrainer(config, model).measure(train_data, valid_data, test_data, result, given["output"])


@torch.no_grad()
def _time_topk(model, test_data, sessions: int, batch: int) -> dict:
    """Seconds that `full_sort_topk` takes for the first ``sessions`` users, ``batch`` at a time."""
    users = list(range(1, 1 + min(sessions, len(test_data.dataset))))
    started = time.process_time()
    for first in range(0, len(users), batch):
        full_sort_topk(users[first : first + batch], model, test_data, TOP_K)
    return {"topk_seconds": time.process_time() - started, "topk_sessions": len(users)}


def _write(path: str, result: dict) -> None:
    with open(f"{path}.part", "w") as stream:
        json.dump(result, stream, indent=1)
    os.replace(f"{path}.part", path)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
