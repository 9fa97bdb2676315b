"""What a run shows: TensorBoard, metrics.jsonl, one progress bar. Rank 0 only; on other ranks everything is silent."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from tqdm import tqdm

from gru4recf_dist.config import MonitoringConfig
from gru4recf_dist.data import storage
from gru4recf_dist.metrics_log import MetricsLog
from gru4recf_dist.run_description import RunDescription
from gru4recf_dist.shown_metrics import FINAL

if TYPE_CHECKING:
    from gru4recf_dist.tensorboard_log import TensorBoardLog

# The first part of a scalar's name, by which TensorBoard groups them.
GROUPS = ("train", "eval", "perf", "data", "table", "checkpoint")


class Monitor:
    """Writes scalars to all places at once.

    Args:
        description: what TensorBoard shows of the run besides curves.
        enabled: whether this rank is the one that shows things.
        first_step: training goes on after it: what an interrupted run had logged beyond is dropped.
        total_steps: length of the progress bar.
        evaluates_first: an evaluation after ``first_step`` is made before anything else; an earlier one's is dropped.
    """

    def __init__(
        self,
        config: MonitoringConfig,
        run_dir: str,
        description: RunDescription,
        enabled: bool,
        first_step: int,
        total_steps: int,
        evaluates_first: bool = False,
    ) -> None:
        self.enabled = enabled
        if not enabled:
            return

        def keep(step: int, names: Iterable[str]) -> bool:
            """Whether what is there of ``step`` will not be logged again."""
            if step == first_step and evaluates_first and any(name.startswith("eval/") for name in names):
                return False
            return step <= first_step and not any(name.startswith(FINAL) for name in names)

        self._logs: list[MetricsLog | TensorBoardLog] = [
            MetricsLog(storage.join(run_dir, "metrics.jsonl"), keep, self.say)
        ]
        if config.tensorboard:
            # A quarter of a second to import, which only one rank of a run needs.
            from gru4recf_dist.tensorboard_log import TensorBoardLog

            self._logs.append(TensorBoardLog(storage.join(run_dir, "tensorboard"), description, keep, self.say))
        # On a terminal a bar; elsewhere it would fill the log with copies of itself.
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            disable=None if config.progress else True,
            dynamic_ncols=True,
        )

    def advance(self, **shown: float) -> None:
        """One step is done; ``shown`` is put beside the bar."""
        if self.enabled:
            if shown:
                self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
            self._bar.update()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log ``values``, with names such as `train/loss`, as one line of metrics.jsonl and to TensorBoard."""
        if self.enabled:
            for log in self._logs:
                log.append(step, values)

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self.enabled:
            tqdm.write(text, file=sys.stderr)

    def finish(self, step: int, metrics: dict[str, float]) -> None:
        """Log what the run is judged by, and close everything."""
        if self.enabled:
            for log in self._logs:
                log.finish(step, metrics)
            self._bar.close()

    def flush(self) -> None:
        """Make sure that what was logged survives this process."""
        if self.enabled:
            for log in self._logs:
                log.flush()

    def close(self) -> None:
        """Flush and close; what was logged stays."""
        if self.enabled:
            self._bar.close()
            for log in self._logs:
                log.close()
