"""The training loop: one for every engine, device and number of ranks."""

from __future__ import annotations

import time
from contextlib import closing, nullcontext
from typing import Any

import numpy as np

from gru4recf_dist import recommender, stopping, trained_run, typed_yaml, warm_start
from gru4recf_dist.broken_steps import BrokenSteps
from gru4recf_dist.checkpoint import Checkpoints
from gru4recf_dist.checkpoint_saving import CheckpointSaver, check_finite
from gru4recf_dist.config import Config
from gru4recf_dist.data import storage
from gru4recf_dist.data.streams import SessionLoader
from gru4recf_dist.errors import UserError
from gru4recf_dist.evaluation.baselines import evaluate_baselines
from gru4recf_dist.evaluation.evaluator import BrokenOff, Evaluator, protocol_of
from gru4recf_dist.measurements import counted_operations, peak_memory_gib
from gru4recf_dist.model.subnets import subnets
from gru4recf_dist.monitoring import Monitor
from gru4recf_dist.objective import Objective
from gru4recf_dist.parallel import collectives, traffic
from gru4recf_dist.parallel.engines import make_engine
from gru4recf_dist.parallel.node_arrays import NodeArrays
from gru4recf_dist.parallel.ranks import Ranks, from_first
from gru4recf_dist.parallel.replicas import check_replicas
from gru4recf_dist.parallel.slow_ranks import SlowRanks, ratios
from gru4recf_dist.parallel.whereabouts import HERE
from gru4recf_dist.progress import Progress, Window, total_steps
from gru4recf_dist.run_description import describe
from gru4recf_dist.run_folder import check_run_folder
from gru4recf_dist.schedule import factor
from gru4recf_dist.shown_metrics import evaluation_scalars, final_names
from gru4recf_dist.steps_ahead import PreparedStep, StepsAhead
from gru4recf_dist.strategies import Phase, phase_of
from gru4recf_dist.table.negatives import AheadSampler, read_popularity
from gru4recf_dist.training_step import StepResult, TrainingStep

RESULT = "result.json"


class Trainer:
    """Builds every part of a run from its configuration, resumes it, and trains it to its end.

    Raises:
        UserError: configuration, data set and run folder do not fit together.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.checkpoints = Checkpoints(config.run_dir, ranks, config.checkpoint.keep_last)
        newest = self.checkpoints.newest()
        check_run_folder(config, newest is not None)
        # Read once: between two ranks' reading, the data set could be appended to.
        self.manifest = from_first(ranks, lambda: trained_run.read_data(config, newest))
        item_arrays = NodeArrays(ranks)
        self.popularity = read_popularity(config.data, self.manifest, item_arrays)
        self.loader = SessionLoader(
            config.data, self.manifest, config.loader, config.batch_size, config.seed, ranks.rank, ranks.world
        )
        self.model = recommender.build(config, self.manifest, ranks)
        self.table = self.model.table
        self.engine = make_engine(self.model.encoder, config, ranks)
        sampler = None
        if config.loss.samples:
            sampler = AheadSampler(self.popularity, config.loss, config.seed, item_arrays)
        objective = Objective(config, self.model.candidates, sampler)
        self.ahead = StepsAhead(config, self.model, objective, ranks)
        self.step = TrainingStep(config, self.model, self.engine, objective, ranks)
        self.evaluator = Evaluator(config, self.manifest, self.popularity, ranks)
        self.progress, self._window = Progress(), Window()
        self.broken_steps = BrokenSteps(config.non_finite, config.run_dir, ranks)
        self._slow_ranks = SlowRanks(config.monitoring.slow_rank_factor, config.monitoring.slow_rank_seconds)
        self._resume(newest)
        self._phase: Phase | None = None
        # What the last update left is evaluated as it was trained.
        self._enter_phase()
        self.total_steps = total_steps(config, self.loader, self.progress.step)

    # -- the loop ----------------------------------------------------------------------------------------------------

    def train(self) -> dict | None:
        """Train, evaluate the best checkpoint and write `result.json`.

        Returns:
            what is in `result.json`; None if a signal stopped the run, which then can be resumed.
        """
        config, progress = self.config, self.progress
        if self.ranks.is_first:
            # Beside a new config.yaml, the result of the old one would make the run look finished.
            storage.remove_tree(storage.join(config.run_dir, RESULT))
            storage.write_bytes(storage.join(config.run_dir, "config.yaml"), typed_yaml.dump(config).encode())
        self.monitor = Monitor(
            config.monitoring,
            config.run_dir,
            describe(config, self.manifest, self.ranks.world),
            self.ranks.is_first,
            progress.step,
            self.total_steps,
            progress.evaluation_owed,
        )
        self.saver = CheckpointSaver(self.checkpoints, config.checkpoint, self.ranks, self.monitor)
        if progress.step == 0 and config.init_from is not None:
            self.monitor.say(f"starting from the weights of {config.init_from}")
        stopping.catch_signals()
        # However training ends, what is being written is written first.
        with closing(self.saver):
            if not self._train_steps():
                return None
        return self._finish()

    def _train_steps(self) -> bool:
        """Train to the end; False if a signal stopped the run."""
        progress, is_best = self.progress, False
        if progress.evaluation_owed:
            is_best = self._evaluate()
            if progress.evaluation_owed:
                # The checkpoint that this start began with says so too.
                self._say_stopped()
                return False
        finished = progress.step >= self.total_steps or self._out_of_patience()
        if is_best:
            self.checkpoints.mark_best(progress.step, is_last=finished)
        self._window = Window()
        while not finished:
            steps, progress.epoch = self.loader.steps_left, self.loader.epoch
            if self._enter_phase() and self.config.training.strategy != "interleaving":
                self.monitor.say(f"epoch {progress.epoch + 1}: training of {', '.join(self._phase.trained)}")
            with self.ahead.rest_of_epoch(self.loader) as batches:
                for left in range(steps - 1, -1, -1):
                    before, waited = time.perf_counter(), HERE.waited_seconds
                    HERE.enter("reading", progress.step + 1)
                    prepared = next(batches)
                    self._window.wait_seconds += time.perf_counter() - before
                    done = self.update(prepared)
                    HERE.enter("logging")
                    seconds = time.perf_counter() - before
                    progress.trained_seconds += seconds
                    # Time spent waiting for other ranks says nothing about this one.
                    self._window.busy_seconds += seconds - (HERE.waited_seconds - waited)
                    finished = progress.step >= self.total_steps
                    evaluate = self._evaluation_is_due(epoch_ended=left == 0, last=finished)
                    if done.stop and not finished:
                        progress.evaluation_owed = evaluate
                        self._log(done, at_once=True)
                        self._stop()
                        return False
                    save = self._checkpoint_is_due(epoch_ended=left == 0) or finished
                    self._log(done, at_once=evaluate or save)
                    is_best = evaluate and self._evaluate()
                    if progress.evaluation_owed:
                        self._stop()
                        return False
                    finished = finished or self._out_of_patience()
                    if save or is_best or finished:
                        self._save(is_best)
                    if finished:
                        break
        self.saver.finish()
        return True

    def _stop(self) -> None:
        """End with a checkpoint. Who stops a run waits for that, and may not wait for an evaluation that is due."""
        self._save(is_best=False)
        self.saver.finish()
        self._say_stopped()

    def _say_stopped(self) -> None:
        self.monitor.say(f"stopped by a signal after step {self.progress.step}; the run can be resumed")
        self.monitor.close()

    def update(self, prepared: PreparedStep) -> StepResult:
        """The next update."""
        progress = self.progress
        self._enter_phase()
        progress.step += 1
        scale = factor(self.config.schedule, progress.step - 1, self.total_steps, progress.rate_drops)
        self._learning_rate = self.config.optimizer.lr * scale
        is_profiled = progress.step == self.config.monitoring.profile_step
        profile = counted_operations(self.engine.module, self.ranks.device) if is_profiled else nullcontext()
        with profile as counts:
            before = traffic.TOTAL.copy()
            done = self.step(prepared, progress.step, scale, stopping.requested())
            self._window.traffic += traffic.TOTAL - before
        if counts:
            self.monitor.scalars(
                progress.step, {f"perf/profile/encoder_{name}": value for name, value in counts.items()}
            )
            gigaflops = counts["flops"] / 1e9 / max(counts["forward_seconds"], 1e-9)
            self.monitor.say(
                f"step {progress.step}: the encoder's forward on rank 0: {counts['flops']:.4g} FLOP "
                f"in {counts['forward_seconds']:.3g} s ({gigaflops:.3g} GFLOP/s), {counts['parameters']:.0f} parameters"
            )
        progress.trained_events += int(done.events)
        progress.sessions_lost += int(done.sessions_lost)
        progress.skipped_steps += not done.updated
        progress.broken_in_a_row = 0 if done.broken is None else progress.broken_in_a_row + 1
        if done.broken is not None:
            said = self.broken_steps.broken(progress.step, prepared.packed, done.broken, progress.broken_in_a_row)
            self.monitor.say(said)
        check_steps = self.config.monitoring.replica_check_steps
        if check_steps is not None and progress.step % check_steps == 0:
            check_replicas(progress.step, self.engine.module, self.ranks)
        return done

    def _enter_phase(self) -> bool:
        """Let the next update train the subnets whose turn it is; whether these are others than before."""
        phase = phase_of(self.config.training, subnets(self.config.model), self.progress.epoch, self.progress.step)
        if phase == self._phase:
            return False
        self._phase = phase
        self.step.enter(phase)
        return True

    # -- logging, evaluation, checkpoints ----------------------------------------------------------------------------

    def _log(self, done: StepResult, at_once: bool) -> None:
        window, step = self._window, self.progress.step
        window.steps += 1
        # What a skipped step's loss was is no figure.
        if done.broken is None:
            window.loss += done.loss
            window.targets += done.targets
        window.events += done.events
        if step % self.config.monitoring.log_every_steps and step != 1 and not at_once:
            self.monitor.advance()
            return
        seconds = time.perf_counter() - window.started
        figures = {f"{self.config.engine.name}/{name}": value for name, value in self.engine.figures().items()}
        table_norm = collectives.sum_over_ranks(done.table_squared_norm.clone(), self.ranks.table).sqrt()
        of_ranks = collectives.gather_vector(np.append(window.traffic.vector(), window.busy_seconds), self.ranks.host)
        values = {
            "train/loss": window.loss / max(window.targets, 1.0),
            "train/lr": self._learning_rate,
            "train/gradient_norm": float(done.gradient_norm),
            "train/epoch": self.loader.epochs_done,
            "table/gradient_norm": float(table_norm),
            "perf/events_per_second": window.events / seconds,
            "perf/step_seconds": seconds / window.steps,
            "data/wait_share": window.wait_seconds / seconds,
            "perf/peak_memory_gib": peak_memory_gib(self.ranks),
            **traffic.summary(of_ranks[:, :-1], window.steps),
            **{f"perf/{name}": value for name, value in figures.items()},
        }
        if self.config.loader.on_bad_shard == "skip":
            values["data/sessions_lost"] = self.progress.sessions_lost
        if self.config.precision == "fp16":
            values["train/loss_scale"] = self.step.loss_scale.value
        if self.config.precision == "fp16" or self.config.non_finite.policy == "skip":
            values["train/skipped_steps"] = self.progress.skipped_steps
        if self.ranks.world > 1:
            busy = of_ranks[:, -1]
            values["perf/slowest_rank"] = float(ratios(busy).max())
            for line in self._slow_ranks.look(busy, seconds):
                self.monitor.say(line)
        self.monitor.scalars(step, values)
        self.saver.show_written()
        shown = {"loss": "train/loss", "events_per_s": "perf/events_per_second", "gib": "perf/peak_memory_gib"}
        self.monitor.advance(**{name: values[key] for name, key in shown.items()}, **figures)
        self._window = Window()

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
        """Evaluate on the validation split; whether that is the best so far. Broken off by a signal, it stays owed."""
        progress = self.progress
        progress.evaluation_owed = True
        started = time.perf_counter()
        HERE.enter("evaluation")
        self.engine.copy_weights_to(self.model.encoder)
        try:
            metrics = self.evaluator.evaluate(self.model, "valid", stopping.requested)
        except BrokenOff:
            return False
        progress.evaluation_owed = False
        values = {**evaluation_scalars(metrics), "eval/seconds": time.perf_counter() - started}
        self.monitor.scalars(progress.step, values)
        name = self.config.early_stopping.metric
        value = metrics["valid"][name]
        self._forget_lost_best()
        is_best = progress.evaluated(
            value, self.config.early_stopping.window, self.config.schedule, self._phase.is_last
        )
        shown = f"step {progress.step}, epoch {self.loader.epochs_done:.4g}: valid {name} {value:.4f}"
        self.monitor.say(shown + (" (best so far)" if is_best else ""))
        # Time spent here is not the loop's.
        self._window.started += time.perf_counter() - started
        return is_best

    def _forget_lost_best(self) -> None:
        """What storage did not take is not the best so far: a later one that is worse may be the best there is."""
        self.saver.wait()
        if self.saver.best_was_lost:
            self.progress.best, self.saver.best_was_lost = self.progress.best_before, False

    def _out_of_patience(self) -> bool:
        patience = self.config.early_stopping.patience
        return patience is not None and self.progress.evaluations_since_best >= patience

    def _save(self, is_best: bool) -> None:
        started = time.perf_counter()
        HERE.enter("checkpoint")
        self._forget_lost_best()
        self.engine.copy_weights_to(self.model.encoder)
        check_finite(self.progress.step, self.model.encoder, self.model.tables, self.ranks)
        self.saver.save(self.progress.step, self.engine, self.model.tables, self.state_dict(), is_best)
        self._window.started += time.perf_counter() - started

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds beside its tensors; JSON types."""
        return {
            "progress": vars(self.progress),
            "loss_scale": self.step.loss_scale.state_dict(),
            "loader": self.loader.state_dict(),
            "training_data": self.manifest.training_digest,
            "present_subnets": list(self._phase.present),
            # What a run that starts from this one on a grown data set has to know of the embedded vocabularies.
            "features": [vars(spec) for spec in recommender.feature_specs(self.config.model, self.manifest)],
            "event_features": [vars(spec) for spec in recommender.event_specs(self.config.model, self.manifest)],
        }

    def _resume(self, newest: int | None) -> None:
        """Go on from the run folder's newest undamaged checkpoint; if there is none, start from ``init_from``."""
        if newest is not None:
            state = self.checkpoints.load(newest, self.engine, self.model.encoder, self.model.tables)
            if state["training_data"] != self.manifest.training_digest:
                raise UserError(
                    f"data: {self.config.data} is not the data set that the checkpoints in {self.config.run_dir} were "
                    "made with; choose another run_dir"
                )
            self.progress = Progress(**state["progress"])
            self.step.loss_scale.load_state_dict(state.get("loss_scale", {}))
            self.loader.load_state_dict(state["loader"])
        elif self.config.init_from is not None:
            warm_start.load(self.config, self.manifest, self.engine, self.model.tables, self.ranks)

    def _finish(self) -> dict:
        """Evaluate the best checkpoint and write `result.json`."""
        config, progress = self.config, self.progress
        best = self.checkpoints.best()
        is_present = best is None or best == progress.step
        if not is_present and not self.checkpoints.is_sound(best, "the last weights are evaluated in its place"):
            best, is_present = None, True
        if not is_present:
            state = self.checkpoints.load(best, None, self.model.encoder, self.model.tables)
            self.model.encoder.take_part(state.get("present_subnets"))
        else:
            self.engine.copy_weights_to(self.model.encoder)
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
            storage.write_json(storage.join(config.run_dir, RESULT), result)
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
                storage.write_json(storage.join(config.run_dir, RESULT), result)
        lost_targets = {split: result[split]["sessions_lost"] for split in measured if result[split]["sessions_lost"]}
        if progress.sessions_lost or lost_targets:
            counts = {"train": progress.sessions_lost, **lost_targets}
            self.monitor.say(
                "damaged shards were skipped, sessions lost: "
                + ", ".join(f"{count} ({split})" for split, count in counts.items())
            )
        names = final_names(config, self.manifest)
        self.monitor.finish(progress.step, {name: result[split][metric] for name, (split, metric) in names.items()})
        return result
