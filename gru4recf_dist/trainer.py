"""The training loop: one for every engine, device and number of ranks."""

from __future__ import annotations

import math
import signal
import time
from dataclasses import dataclass, field

import torch

from gru4recf_dist import recommender, typed_yaml, warm_start
from gru4recf_dist.checkpoint import Checkpoints, weight_settings
from gru4recf_dist.config import Config
from gru4recf_dist.data import storage
from gru4recf_dist.data.batches import PackedBatch, pack_training
from gru4recf_dist.data.shard_format import read_manifest
from gru4recf_dist.data.streams import SessionLoader
from gru4recf_dist.errors import UserError
from gru4recf_dist.evaluation.baselines import evaluate_baselines
from gru4recf_dist.evaluation.evaluator import Evaluator, protocol_of
from gru4recf_dist.monitoring import Monitor
from gru4recf_dist.objective import Objective
from gru4recf_dist.parallel import collectives
from gru4recf_dist.parallel.engines import make_engine
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.schedule import factor
from gru4recf_dist.table.negatives import NegativeSampler, read_popularity
from gru4recf_dist.table.partition import route


@dataclass
class Progress:
    """Where training is, besides the loader's position; JSON types only.

    Attributes:
        step: updates made.
        best, evaluations_since_best: early stopping's memory.
        sessions_lost: training sessions, each epoch anew, of damaged shards (`loader.on_bad_shard: skip`).
        trained_events, trained_seconds: over all ranks, for the throughput of the whole run.
    """

    step: int = 0
    best: float | None = None
    evaluations_since_best: int = 0
    trained_events: int = 0
    sessions_lost: int = 0
    trained_seconds: float = 0.0


@dataclass
class _Window:
    """Sums over the steps since the last log line."""

    loss: float = 0.0
    targets: float = 0.0
    events: float = 0.0
    wait_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class _Totals:
    """A step's sums over all ranks."""

    loss: float
    targets: float
    events: float
    sessions_lost: float
    stop: bool


class Trainer:
    """Builds every part of a run from its configuration, resumes it, and trains it to its end.

    Raises:
        UserError: configuration, data set and run folder do not fit together.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.manifest = read_manifest(config.data)
        self.popularity = read_popularity(config.data, self.manifest)
        self.loader = SessionLoader(
            config.data, self.manifest, config.loader, config.batch_size, config.seed, ranks.rank, ranks.world
        )
        self.model = recommender.build(config, self.manifest, ranks)
        self.table = self.model.table
        self.engine = make_engine(self.model.encoder, config, ranks)
        sampler = None
        if config.loss.name == "sampled_softmax":
            sampler = NegativeSampler(self.popularity, config.loss, config.seed)
        self.objective = Objective(config, self.table, sampler)
        self.evaluator = Evaluator(config, self.manifest, self.popularity, ranks)
        self.checkpoints = Checkpoints(config.run_dir, ranks, config.checkpoint.keep_last)
        self.progress = Progress()
        self._stop_requested = False
        self._resume()
        self.total_steps = total_steps(config, self.loader, self.progress.step)

    # -- the loop ----------------------------------------------------------------------------------------------------

    def train(self) -> dict | None:
        """Train, evaluate the best checkpoint and write `result.json`.

        Returns:
            what is in `result.json`; None if a signal stopped the run, which then can be resumed.
        """
        config, progress = self.config, self.progress
        if self.ranks.is_first:
            storage.write_bytes(storage.join(config.run_dir, "config.yaml"), typed_yaml.dump(config).encode())
        self.monitor = Monitor(config.monitoring, config.run_dir, self.ranks.is_first, progress.step, self.total_steps)
        if progress.step == 0 and config.init_from is not None:
            self.monitor.say(f"starting from the weights of {config.init_from}")
        self._catch_signals()
        finished = progress.step >= self.total_steps or self._out_of_patience()
        self._window = _Window()
        while not finished:
            batches = iter(self.loader)
            steps = self.loader.steps_left
            for left in range(steps - 1, -1, -1):
                before = time.perf_counter()
                batch = pack_training(next(batches), config.loader.max_length, config.loader.context)
                self._window.wait_seconds += time.perf_counter() - before
                totals = self.step(batch)
                progress.trained_seconds += time.perf_counter() - before
                finished = progress.step >= self.total_steps
                evaluate = self._evaluation_is_due(epoch_ended=left == 0, last=finished)
                save = self._checkpoint_is_due(epoch_ended=left == 0) or finished or totals.stop
                self._log(totals, at_once=evaluate or save)
                is_best = evaluate and self._evaluate()
                finished = finished or self._out_of_patience()
                if save or is_best or finished:
                    self._save(is_best)
                if totals.stop and not finished:
                    self.monitor.say(f"stopped by a signal after step {progress.step}; the run can be resumed")
                    self.monitor.close()
                    return None
                if finished:
                    break
        return self._finish()

    def step(self, batch: PackedBatch) -> _Totals:
        """One update of encoder and table with a global batch, of which this is the rank's part."""
        self.progress.step += 1
        step = self.progress.step
        # Dropout depends on (seed, step, rank) alone: there is no generator state to save.
        torch.manual_seed(hash((self.config.seed, step, self.ranks.rank)) & 0x7FFFFFFFFFFFFFFF)

        routing = route(self.table.partition, batch.items, batch.targets)
        item_places, target_places = (places.to(self.ranks.device) for places in routing.inverse)
        exchange = self.table.exchange(routing)
        features = self.model.features.lookup(exchange)
        rows = self.table.lookup(exchange)
        queries = self.engine(rows, features, item_places, batch.batch_sizes)
        local_loss = self.objective(queries, rows[target_places], batch, step)

        totals = self._reduce(local_loss, batch)
        # The engine's mean over ranks and the table's division by W both undo the factor W.
        self.engine.backward(local_loss * (self.ranks.world / max(totals.targets, 1.0)))
        scale = factor(self.config.schedule, step - 1, self.total_steps)
        self._gradient_norm = self.engine.step(self.config.optimizer.lr * scale)
        self._table_squared_norm = self.table.apply_gradients(self.config.table.lr * scale)
        self._learning_rate = self.config.optimizer.lr * scale
        self.progress.trained_events += int(totals.events)
        self.progress.sessions_lost += int(totals.sessions_lost)
        return totals

    def _reduce(self, local_loss: torch.Tensor, batch: PackedBatch) -> _Totals:
        """The step's one exchange of counts and flags; it comes before the update, so a bad loss stops every rank."""
        sums = torch.tensor(
            [
                float(local_loss.detach()),
                batch.targets_count,
                batch.events,
                batch.sessions_lost,
                self._stop_requested,
            ],
            dtype=torch.float64,
        )
        loss, targets, events, sessions_lost, stop = collectives.sum_over_ranks(sums, self.ranks.host).tolist()
        if not math.isfinite(loss):
            raise UserError(
                f"step {self.progress.step}: the loss is {loss}; nothing was updated. "
                "Try lower optimizer.lr and table.lr, or optimizer.clip"
            )
        return _Totals(loss, targets, events, sessions_lost, stop > 0)

    # -- logging, evaluation, checkpoints ----------------------------------------------------------------------------

    def _log(self, totals: _Totals, at_once: bool) -> None:
        window, step = self._window, self.progress.step
        window.loss += totals.loss
        window.targets += totals.targets
        window.events += totals.events
        if step % self.config.monitoring.log_every_steps and step != 1 and not at_once:
            self.monitor.advance()
            return
        seconds = time.perf_counter() - window.started
        table_norm = collectives.sum_over_ranks(self._table_squared_norm.clone(), self.ranks.table).sqrt()
        values = {
            "train/loss": window.loss / max(window.targets, 1.0),
            "train/lr": self._learning_rate,
            "train/gradient_norm": float(self._gradient_norm),
            "train/epoch": self.loader.epochs_done,
            "table/gradient_norm": float(table_norm),
            "perf/events_per_second": window.events / seconds,
            "data/wait_share": window.wait_seconds / seconds,
            "data/sessions_lost": self.progress.sessions_lost,
        }
        self.monitor.scalars(step, values)
        self.monitor.advance(loss=values["train/loss"], events_per_s=values["perf/events_per_second"])
        self._window = _Window()

    def _evaluation_is_due(self, epoch_ended: bool, last: bool) -> bool:
        settings = self.config.evaluation
        if not self.manifest.splits["valid"].sessions:
            return False
        return last or self._is_due(settings.every_steps, settings.every_epochs, epoch_ended)

    def _checkpoint_is_due(self, epoch_ended: bool) -> bool:
        settings = self.config.checkpoint
        return self._is_due(settings.every_steps, settings.every_epochs, epoch_ended)

    def _is_due(self, every_steps: int | None, every_epochs: int | None, epoch_ended: bool) -> bool:
        if every_steps is not None and self.progress.step % every_steps == 0:
            return True
        # The loader already stands at the beginning of the next epoch.
        return epoch_ended and every_epochs is not None and self.loader.epoch % every_epochs == 0

    def _evaluate(self) -> bool:
        """Evaluate on the validation split; whether that is the best so far."""
        progress = self.progress
        started = time.perf_counter()
        metrics = self.evaluator.evaluate(self.model, "valid")
        values = {f"eval/{name}/{key}": value for name, part in metrics.items() for key, value in part.items()}
        self.monitor.scalars(progress.step, {**values, "eval/seconds": time.perf_counter() - started})
        name = self.config.early_stopping.metric
        value = metrics["valid"][name]
        is_best = progress.best is None or value > progress.best
        if is_best:
            progress.best = value
        progress.evaluations_since_best = 0 if is_best else progress.evaluations_since_best + 1
        shown = f"step {progress.step}, epoch {self.loader.epochs_done:.4g}: valid {name} {value:.4f}"
        self.monitor.say(shown + (" (best so far)" if is_best else ""))
        # Time spent here is not the loop's.
        self._window.started += time.perf_counter() - started
        return is_best

    def _out_of_patience(self) -> bool:
        patience = self.config.early_stopping.patience
        return patience is not None and self.progress.evaluations_since_best >= patience

    def _save(self, is_best: bool) -> None:
        started = time.perf_counter()
        self._check_finite()
        state = {
            "progress": vars(self.progress),
            "loader": self.loader.state_dict(),
            "training_data": self.manifest.training_digest,
            # What a run that starts from this one on a grown data set has to know of the embedded vocabularies.
            "features": [vars(spec) for spec in recommender.feature_specs(self.config.model, self.manifest)],
        }
        self.checkpoints.save(self.progress.step, self.engine, self.table, state, is_best)
        seconds = time.perf_counter() - started
        self.monitor.scalars(self.progress.step, {"checkpoint/seconds": seconds})
        # A run that is killed goes on from here: the lines up to here must be there too.
        self.monitor.flush()
        self._window.started += seconds

    def _check_finite(self) -> None:
        """A finite loss may have a gradient that is not: a checkpoint of what it left could never be resumed."""
        weights = [self.table.weight, *self.model.encoder.parameters()]
        broken = torch.stack([(~weight.detach().isfinite()).any() for weight in weights]).any().to(torch.int64)
        if int(collectives.sum_over_ranks(broken, self.ranks.table)):
            raise UserError(
                f"step {self.progress.step}: the weights are not finite; this checkpoint was not written. "
                "Try lower optimizer.lr and table.lr, or optimizer.clip"
            )

    def _resume(self) -> None:
        """Go on from the run folder's newest complete checkpoint; if there is none, start from ``init_from``."""
        newest = self.checkpoints.newest()
        check_run_folder(self.config, newest is not None)
        if newest is not None:
            state = self.checkpoints.load(newest, self.engine, self.model.encoder, self.table)
            if state["training_data"] != self.manifest.training_digest:
                raise UserError(
                    f"data: {self.config.data} is not the data set that the checkpoints in {self.config.run_dir} were "
                    "made with; choose another run_dir"
                )
            self.progress = Progress(**state["progress"])
            self.loader.load_state_dict(state["loader"])
        elif self.config.init_from is not None:
            warm_start.load(self.config, self.manifest, self.engine, self.table, self.ranks)

    def _finish(self) -> dict:
        """Evaluate the best checkpoint and write `result.json`."""
        config, progress = self.config, self.progress
        best = self.checkpoints.best()
        if best is not None and best != progress.step:
            self.checkpoints.load(best, None, self.model.encoder, self.table)
        result: dict = {}
        for split in ("valid", "test"):
            if self.manifest.splits[split].sessions:
                result.update(self.evaluator.evaluate(self.model, split))
        measured = [split for split in ("valid", "test") if split in result]
        result.update(
            steps=progress.step,
            epochs=self.loader.epochs_done,
            best_step=best,
            sessions_lost=progress.sessions_lost,
            events_per_second=progress.trained_events / max(progress.trained_seconds, 1e-9),
            world_size=self.ranks.world,
        )
        if self.ranks.is_first:
            storage.write_json(storage.join(config.run_dir, "result.json"), result)
            if config.evaluation.baselines and self.manifest.splits["test"].sessions:
                # One process counts these; should the others give up waiting on a large log, the result is there.
                result["baselines"] = evaluate_baselines(
                    config.data,
                    self.manifest,
                    self.popularity,
                    "test",
                    protocol_of(config, self.manifest),
                    config.evaluation.ks,
                    config.loader.on_bad_shard,
                )
                storage.write_json(storage.join(config.run_dir, "result.json"), result)
        lost_targets = {split: result[split]["sessions_lost"] for split in measured if result[split]["sessions_lost"]}
        if progress.sessions_lost or lost_targets:
            counts = {"train": progress.sessions_lost, **lost_targets}
            self.monitor.say(
                "damaged shards were skipped, sessions lost: "
                + ", ".join(f"{count} ({split})" for split, count in counts.items())
            )
        named = {f"result/{split}/{key}": value for split in measured for key, value in result[split].items()}
        self.monitor.finish(config, named)
        return result

    def _catch_signals(self) -> None:
        """SIGTERM and SIGUSR1 ask for a stop; the ranks agree on the step in `_reduce`."""

        def request(number, frame) -> None:
            self._stop_requested = True

        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, request)


def total_steps(config: Config, loader: SessionLoader, step: int) -> int:
    """Updates of the whole run, ``step`` of them made: the nearer of ``max_epochs`` and ``max_steps``.

    The epochs are the loader's: after a resume with another batch size, steps made do not tell how many there were.
    """
    by_epochs = math.inf if config.max_epochs is None else step + loader.steps_until(config.max_epochs)
    by_steps = math.inf if config.max_steps is None else config.max_steps
    return int(min(by_epochs, by_steps))


def check_run_folder(config: Config, has_checkpoint: bool) -> None:
    """Whether the run folder can take this run.

    Raises:
        UserError: it cannot be written; or it holds checkpoints and ``resume`` is ``never``, or they are of another
            model.
    """
    if not storage.is_writable(config.run_dir):
        raise UserError(f"run_dir: {config.run_dir} is not a folder that can be written")
    if not has_checkpoint:
        return
    if config.resume == "never":
        raise UserError(f"run_dir: {config.run_dir} holds checkpoints; choose another folder, or resume=auto")
    before, now = (
        # A position in the epoch means nothing in another order.
        {"seed": each.seed, "loader.shuffle_window": each.loader.shuffle_window, **weight_settings(each)}
        for each in (typed_yaml.load(Config, storage.join(config.run_dir, "config.yaml"), []), config)
    )
    for key, old in before.items():
        if old != now[key]:
            raise UserError(
                f"{key}: {now[key]!r}, but the checkpoints in {config.run_dir} were made with {old!r}; "
                "choose another run_dir"
            )
