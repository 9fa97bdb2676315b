"""Checkpoints on any fsspec URL: sharded tensors by `torch.distributed.checkpoint`, committed by one small file.

    RUN/checkpoints/step-00000100/*.distcp, .metadata    tensors; every rank writes its own rows
    RUN/checkpoints/step-00000100/commit.json            written last: without it the checkpoint is not there

Everything that is not a tensor is in `commit.json` as plain JSON, the step of the best checkpoint so far with it: so a
checkpoint and its being the best are committed by one file. Tensors are engine-independent and table rows are
DTensors, so that a checkpoint loads at any number of ranks.
"""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.planner import LoadPlanner

from gru4recf_dist.checkpoint_blocks import BlockSavePlanner, RowsLoadPlanner
from gru4recf_dist.checkpoint_files import CheckpointReader, CheckpointWriter, storage_errors
from gru4recf_dist.config import Config
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
        with warnings.catch_warnings(), storage_errors(f"{url}: this checkpoint cannot be written"):
            # torch announces changes of its own internals here that are of no use to a person who trains.
            warnings.simplefilter("ignore")
            dcp.save(
                _tensors(engine, table),
                storage_writer=CheckpointWriter(url),
                planner=BlockSavePlanner(),
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
        commit = read_commit(self.folder, step)
        if engine is not None:
            tensors = _tensors(engine, table)
        else:
            tensors = {f"encoder.{name}": tensor.detach() for name, tensor in encoder.named_parameters()}
            tensors["table.weight"] = table.state_dict()["weight"]
        self._read(step, tensors)
        if engine is not None:
            engine.load_state_dict(tensors)
            table.optimizer.steps = commit["table_steps"]
        return commit["state"]

    def load_smaller(
        self, step: int, engine: Engine, table: ShardedItemTable, kept_rows: dict[str, torch.Tensor]
    ) -> None:
        """Fill engine and table from the checkpoint of a smaller model; rows that it did not have stay as they are.

        Every rank reads the rows that are its own now straight into the table. The encoder's tensors are small: they
        are read at their saved size and put into the present ones afterwards.

        Args:
            kept_rows: by name of an encoder parameter that may have grown, where its saved rows lie now, int64.

        Raises:
            UserError: the checkpoint is damaged, or does not fit into the present model.
        """
        state, sizes = engine.state_dict(), self._saved_sizes(step)
        table_state = {f"table.{name}": tensor for name, tensor in table.state_dict().items()}
        for name, present in {**state, **table_state}.items():
            if len(sizes.get(name, ())) != present.dim() or any(
                saved > now for saved, now in zip(sizes[name], present.shape, strict=True)
            ):
                raise UserError(f"{self._url(step)}: '{name}' does not fit into {list(present.shape)}")
        own_rows = {name: tensor.to_local() for name, tensor in table_state.items()}
        self._read(step, own_rows, RowsLoadPlanner(dict.fromkeys(own_rows, table.own.start)))
        loaded = {name: present.new_empty(sizes[name]) for name, present in state.items()}
        self._read(step, loaded)
        for parameter, places in kept_rows.items():
            for name, present in state.items():
                if present.dim() and (name == f"encoder.{parameter}" or name.startswith(f"optimizer.{parameter}.")):
                    # A copy: the engine may have given out its own tensors.
                    loaded[name] = present.clone().index_copy_(0, places.to(present.device), loaded[name])
        engine.load_state_dict(loaded)
        table.optimizer.steps = read_commit(self.folder, step)["table_steps"]

    def _saved_sizes(self, step: int) -> dict[str, torch.Size]:
        """The size of every saved tensor, by its name."""
        url = self._url(step)
        try:
            metadata = CheckpointReader(url).read_metadata()
        except (OSError, pickle.UnpicklingError, EOFError) as error:
            raise UserError(f"{url}: this checkpoint is damaged ({storage.first_line(error)})") from error
        return {name: saved.size for name, saved in metadata.state_dict_metadata.items() if hasattr(saved, "size")}

    def _read(self, step: int, tensors: dict[str, torch.Tensor], planner: LoadPlanner | None = None) -> None:
        """Fill ``tensors`` from the checkpoint, which has each at the same size unless ``planner`` says otherwise."""
        url = self._url(step)
        damaged = f"{url}: this checkpoint is damaged or of another configuration"
        with warnings.catch_warnings(), storage_errors(damaged):
            warnings.simplefilter("ignore")
            reader = CheckpointReader(url)
            dcp.load(tensors, storage_reader=reader, planner=planner, process_group=self.ranks.host)

    def _url(self, step: int) -> str:
        return storage.join(self.folder, f"{_PREFIX}{step:08d}")


def weight_settings(config: Config) -> dict[str, Any]:
    """The settings that the tensors of a checkpoint, and what they mean, depend on; by dotted key."""
    return {
        "precision": f"{'fp64' if config.precision == 'fp64' else 'fp32'} weights",
        "table.optimizer": config.table.optimizer,
        "optimizer.name": config.optimizer.name,
        **{f"model.{name}": value for name, value in config.model if not name.startswith("dropout")},
    }


def complete_steps(folder: str) -> list[int]:
    """Steps of the complete checkpoints in a `checkpoints` folder, ascending."""
    steps = [_step_of(name) for name in storage.list_names(folder)]
    return [
        step
        for step in sorted(step for step in steps if step is not None)
        if storage.exists(storage.join(folder, f"{_PREFIX}{step:08d}", COMMIT))
    ]


def read_commit(folder: str, step: int) -> dict[str, Any]:
    """What a checkpoint's `commit.json` says: ``state`` is what it was saved with."""
    return storage.read_json(storage.join(folder, f"{_PREFIX}{step:08d}", COMMIT))


def best_step(folder: str) -> int | None:
    """Step of the best checkpoint, as the newest one has it; None if none was marked or it is gone."""
    steps = complete_steps(folder)
    if not steps:
        return None
    commit = read_commit(folder, steps[-1])
    return commit.get("best_step") if commit.get("best_step") in steps else None


def _step_of(name: str) -> int | None:
    number = name.removeprefix(_PREFIX)
    return int(number) if name.startswith(_PREFIX) and number.isdigit() else None


def _tensors(engine: Engine, table: ShardedItemTable) -> dict[str, torch.Tensor]:
    return {**engine.state_dict(), **{f"table.{name}": tensor for name, tensor in table.state_dict().items()}}
