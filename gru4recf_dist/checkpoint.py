"""Checkpoints on any fsspec URL: sharded tensors by `torch.distributed.checkpoint`, committed by one small file.

    RUN/checkpoints/step-00000100/*.distcp, .metadata    tensors; every rank writes its own rows
    RUN/checkpoints/step-00000100/commit.json            written last: without it the checkpoint is not there

Everything that is not a tensor is in `commit.json` as plain JSON, the step of the best checkpoint so far with it: so a
checkpoint and its being the best are committed by one file. Tensors are engine-independent and table rows are
DTensors, so that a checkpoint loads at any number of ranks.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

from gru4recf_dist.data import storage
from gru4recf_dist.errors import UserError
from gru4recf_dist.parallel.engines import Engine
from gru4recf_dist.parallel.ranks import Ranks, from_first
from gru4recf_dist.table.item_table import ShardedItemTable

COMMIT = "commit.json"
_PREFIX = "step-"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run_dir: the run's folder or URL.
        keep_last: complete checkpoints to keep besides the best one.
    """

    def __init__(self, run_dir: str, ranks: Ranks, keep_last: int = 2) -> None:
        self.folder, self.ranks, self.keep_last = storage.join(run_dir, "checkpoints"), ranks, keep_last

    def save(self, step: int, engine: Engine, table: ShardedItemTable, state: dict[str, Any], best: bool) -> None:
        """Write the checkpoint of ``step``, commit it, and remove those that are no longer kept.

        Args:
            state: what else is needed to go on; plain JSON types.
            best: whether it is the best so far.
        """
        url = self._url(step)
        # What an interrupted attempt left behind.
        from_first(self.ranks, lambda: storage.remove_tree(url))
        if storage.is_local(url):
            from_first(self.ranks, lambda: storage.make_folder(url))
        with warnings.catch_warnings():
            # torch announces changes of its own internals here that are of no use to a person who trains.
            warnings.simplefilter("ignore")
            dcp.save(
                _tensors(engine, table),
                storage_writer=FsspecWriter(url),
                process_group=self.ranks.host,
            )
        commit = {"step": step, "table_steps": table.optimizer.steps, "world_size": self.ranks.world, "state": state}
        from_first(self.ranks, lambda: self._commit(step, commit, best))

    def newest(self) -> int | None:
        """Step of the newest complete checkpoint, None without one.

        Rank 0 decides: what a shared file system shows to different machines may differ for a while.
        """
        return from_first(self.ranks, lambda: max(complete_steps(self.folder), default=None))

    def best(self) -> int | None:
        """Step of the best checkpoint, None if there was no evaluation or it is gone; rank 0 decides."""
        return from_first(self.ranks, lambda: best_step(self.folder))

    def _commit(self, step: int, commit: dict, best: bool) -> None:
        commit["best_step"] = step if best else best_step(self.folder)
        storage.write_json(storage.join(self._url(step), COMMIT), commit)
        kept = {*complete_steps(self.folder)[-self.keep_last :], commit["best_step"]}
        for name in storage.list_names(self.folder):
            number = _step_of(name)
            if number is not None and number not in kept:
                # The commit goes first: a half-removed checkpoint must not look complete.
                storage.remove_tree(storage.join(self.folder, name, COMMIT))
                storage.remove_tree(storage.join(self.folder, name))

    def load(self, step: int, engine: Engine | None, encoder: torch.nn.Module, table: ShardedItemTable) -> dict:
        """Fill engine (or, without one, the plain encoder) and table from the checkpoint of ``step``.

        Returns:
            the ``state`` it was saved with.
        """
        url = self._url(step)
        commit = storage.read_json(storage.join(url, COMMIT))
        if engine is not None:
            tensors = _tensors(engine, table)
        else:
            tensors = {f"encoder.{name}": tensor.detach() for name, tensor in encoder.named_parameters()}
            tensors["table.weight"] = table.state_dict()["weight"]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.load(tensors, storage_reader=FsspecReader(url), process_group=self.ranks.host)
        except dcp.CheckpointException as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"{url}: this checkpoint is damaged or of another configuration ({reason})") from error
        if engine is not None:
            engine.load_state_dict(tensors)
            table.optimizer.steps = commit["table_steps"]
        return commit["state"]

    def _url(self, step: int) -> str:
        return storage.join(self.folder, f"{_PREFIX}{step:08d}")


def complete_steps(folder: str) -> list[int]:
    """Steps of the complete checkpoints in a `checkpoints` folder, ascending."""
    steps = [_step_of(name) for name in storage.list_names(folder)]
    return [
        step
        for step in sorted(step for step in steps if step is not None)
        if storage.exists(storage.join(folder, f"{_PREFIX}{step:08d}", COMMIT))
    ]


def best_step(folder: str) -> int | None:
    """Step of the best checkpoint, as the newest one has it; None if none was marked or it is gone."""
    steps = complete_steps(folder)
    if not steps:
        return None
    commit = storage.read_json(storage.join(folder, f"{_PREFIX}{steps[-1]:08d}", COMMIT))
    return commit.get("best_step") if commit.get("best_step") in steps else None


def _step_of(name: str) -> int | None:
    number = name.removeprefix(_PREFIX)
    return int(number) if name.startswith(_PREFIX) and number.isdigit() else None


def _tensors(engine: Engine, table: ShardedItemTable) -> dict[str, torch.Tensor]:
    return {**engine.state_dict(), **{f"table.{name}": tensor for name, tensor in table.state_dict().items()}}
