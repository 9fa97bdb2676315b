"""What a run shows: TensorBoard, metrics.jsonl, one progress bar. Rank 0 only; on other ranks everything is silent."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from gru4recf_dist.config import Config, MonitoringConfig
from gru4recf_dist.data import storage
from gru4recf_dist.errors import UserError, redacted


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
        self._log = _JsonLines(
            storage.join(run_dir, "metrics.jsonl"), keep=lambda line: line["step"] <= first_step, warn=self.say
        )
        self._loss: float | None = None
        self._writer: SummaryWriter | None = None
        if config.tensorboard:
            with self._tensorboard():
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
        with self._tensorboard():
            for name, value in values.items() if self._writer else ():
                self._writer.add_scalar(name, value, step)

    @contextlib.contextmanager
    def _tensorboard(self) -> Iterator[None]:
        """What storage does not take ends TensorBoard's file, not the run."""
        try:
            yield
        except OSError as error:
            # Its thread is dead, and would raise the same from now on.
            self._writer = None
            self.say(f"warning: TensorBoard's file cannot be written any more ({_reason(error)})")

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self.enabled:
            tqdm.write(text, file=sys.stderr)

    def finish(self, config: Config, metrics: dict[str, float]) -> None:
        """Record the hyper-parameters with the final metrics and close everything."""
        if not self.enabled:
            return
        with self._tensorboard():
            # `SummaryWriter.add_hparams` would start a second run in a folder of its own.
            for summary in hparams(flatten(config.model_dump(mode="json")), metrics) if self._writer else ():
                self._writer.file_writer.add_summary(summary)
            for name, value in metrics.items() if self._writer else ():
                self._writer.add_scalar(name, value)
        self.close()

    def flush(self) -> None:
        """Make sure that what was logged survives this process."""
        if self.enabled:
            self._log.flush()
            with self._tensorboard():
                if self._writer:
                    self._writer.flush()

    def close(self) -> None:
        """Flush and close; what was logged stays."""
        if self.enabled:
            self._bar.close()
            self._log.flush()
            with self._tensorboard():
                if self._writer:
                    self._writer.close()


class _JsonLines:
    """A file of JSON objects that grows by a line at a time.

    Object storage cannot append: there the file is written again as a whole, at most once in ``rewrite_seconds``.
    Lines that storage does not take are tried again with the next one.

    Args:
        keep: whether a line that is there already stays.
        warn: is told once if a line cannot be written.
    """

    rewrite_seconds = 10.0

    def __init__(self, url: str, keep: Callable[[dict], bool], warn: Callable[[str], None]) -> None:
        self._url, self._local, self._warn = url, storage.is_local(url), warn
        # On a local disk only those that could not be written yet; on object storage all.
        self._lines: list[bytes] = []
        self._written, self._warned = 0.0, False
        if storage.exists(url):
            lines = storage.read_bytes(url).splitlines()
            self._lines = [line for line in lines if _is_whole(line) and keep(json.loads(line))]
        # A run that cannot write from its start on is not worth beginning.
        storage.write_bytes(self._url, self._content())
        if self._local:
            self._lines.clear()

    def append(self, line: dict) -> None:
        self._lines.append(json.dumps(line).encode())
        if self._local or time.monotonic() - self._written > self.rewrite_seconds:
            self.flush()

    def flush(self) -> None:
        try:
            if self._local:
                self._append_lines()
            else:
                storage.write_bytes(self._url, self._content())
        except (OSError, UserError) as error:
            if not self._warned:
                self._warn(f"warning: {self._url} cannot be written for now ({_reason(error)})")
            self._warned = True
        self._written = time.monotonic()

    def _append_lines(self) -> None:
        with open(storage.local_path(self._url), "ab", buffering=0) as stream:
            size = stream.seek(0, os.SEEK_END)
            content = self._content()
            try:
                # A disk that gets full takes a part, and says so by the count.
                while content:
                    content = content[stream.write(content) :]
            except OSError:
                stream.truncate(size)
                raise
        self._lines.clear()

    def _content(self) -> bytes:
        return b"".join(line + b"\n" for line in self._lines)


def _reason(error: Exception) -> str:
    return redacted(getattr(error, "strerror", None) or storage.first_line(error))


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
