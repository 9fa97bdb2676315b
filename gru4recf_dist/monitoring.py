"""What a run shows: TensorBoard, metrics.jsonl, one progress bar. Rank 0 only; on other ranks everything is silent."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from gru4recf_dist.config import Config, MonitoringConfig
from gru4recf_dist.data import storage


class Monitor:
    """Writes scalars to all places at once.

    Args:
        enabled: whether this rank is the one that shows things.
        first_step: training goes on after it: what an interrupted run had logged beyond is dropped.
        total_steps: length of the progress bar.
    """

    def __init__(
        self, config: MonitoringConfig, run_dir: str, enabled: bool, first_step: int, total_steps: int
    ) -> None:
        self.enabled = enabled
        if not enabled:
            return
        self._log = _JsonLines(storage.join(run_dir, "metrics.jsonl"), keep=lambda line: line["step"] <= first_step)
        self._loss: float | None = None
        self._writer: SummaryWriter | None = None
        if config.tensorboard:
            self._writer = SummaryWriter(storage.join(run_dir, "tensorboard"), purge_step=first_step + 1)
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
        """Log ``values``, with names such as `train/loss`, as one line of metrics.jsonl and to TensorBoard.

        Every line of metrics.jsonl has `train/loss`: one without it repeats the last.
        """
        if not self.enabled:
            return
        self._loss = values.get("train/loss", self._loss)
        self._log.append({"step": step, "train/loss": self._loss, **values})
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self.enabled:
            tqdm.write(text, file=sys.stderr)

    def finish(self, config: Config, metrics: dict[str, float]) -> None:
        """Record the hyper-parameters with the final metrics and close everything."""
        if not self.enabled:
            return
        if self._writer:
            # `SummaryWriter.add_hparams` would start a second run in a folder of its own.
            for summary in hparams(flatten(config.model_dump(mode="json")), metrics):
                self._writer.file_writer.add_summary(summary)
            for name, value in metrics.items():
                self._writer.add_scalar(name, value)
        self.close()

    def flush(self) -> None:
        """Make sure that what was logged survives this process."""
        if self.enabled:
            self._log.flush()
            if self._writer:
                self._writer.flush()

    def close(self) -> None:
        """Flush and close; what was logged stays."""
        if self.enabled:
            self._bar.close()
            self._log.flush()
            if self._writer:
                self._writer.close()


class _JsonLines:
    """A file of JSON objects that grows by a line at a time.

    Object storage cannot append: there the file is written again as a whole, at most once in ``rewrite_seconds``.
    """

    rewrite_seconds = 10.0

    def __init__(self, url: str, keep) -> None:
        self._url, self._local = url, storage.is_local(url)
        self._lines: list[bytes] = []
        self._written = 0.0
        if storage.exists(url):
            lines = storage.read_bytes(url).splitlines()
            self._lines = [line for line in lines if _is_whole(line) and keep(json.loads(line))]
        self._rewrite()

    def append(self, line: dict) -> None:
        content = json.dumps(line).encode()
        if self._local:
            with open(storage.local_path(self._url), "ab") as stream:
                stream.write(content + b"\n")
            return
        self._lines.append(content)
        if time.monotonic() - self._written > self.rewrite_seconds:
            self._rewrite()

    def flush(self) -> None:
        if not self._local:
            self._rewrite()

    def _rewrite(self) -> None:
        storage.write_bytes(self._url, b"".join(line + b"\n" for line in self._lines))
        self._written = time.monotonic()


def _is_whole(line: bytes) -> bool:
    """A process that was killed may have left half a line at the end, a machine that lost power zeros."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str | float | int | bool]:
    """A nested mapping as dotted keys, with values of the types that TensorBoard's HPARAMS takes."""
    flat: dict[str, str | float | int | bool] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value if isinstance(value, int | float | bool | str) else json.dumps(value)
    return flat
