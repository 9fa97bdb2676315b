"""Checkpoints on any fsspec URL: sharded tensors by `torch.distributed.checkpoint`, committed by one small file.

    RUN/checkpoints/step-00000100/*.distcp, .metadata    tensors; every rank writes its own rows
    RUN/checkpoints/step-00000100/commit.json            written last: without it the checkpoint is not there

Everything that is not a tensor is in `commit.json` as plain JSON, the step of the best checkpoint so far with it: so a
checkpoint and its being the best are committed by one file. Tensors are engine-independent and table rows are
DTensors, so that a checkpoint loads at any number of ranks.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import warnings
from collections.abc import Collection
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.planner import LoadPlanner

from gru4recf_dist import checkpoint_commits as commits
from gru4recf_dist.checkpoint_blocks import BlockSavePlanner, RowsLoadPlanner
from gru4recf_dist.checkpoint_commits import DamagedCheckpoint, best_step, complete_steps, read_commit
from gru4recf_dist.checkpoint_files import CheckpointReader, CheckpointWriter, storage_errors
from gru4recf_dist.config import Config
from gru4recf_dist.data import storage
from gru4recf_dist.errors import UserError, first_line, redacted
from gru4recf_dist.model.subnets import ITEM_TABLE
from gru4recf_dist.parallel.engines import Engine
from gru4recf_dist.parallel.ranks import Ranks, from_each, from_first
from gru4recf_dist.parallel.whereabouts import HERE
from gru4recf_dist.table.table_group import TableGroup

_log = logging.getLogger(__name__)

# torch announces changes of its own internals here that are of no use to a person who trains.
for _module in ("torch.distributed.checkpoint", "torch.distributed.tensor", "torch.storage"):
    warnings.filterwarnings("ignore", module=_module.replace(".", r"\."))


class Checkpoints:
    """The checkpoints of one run. Every method is a collective of all ranks.

    Args:
        run_dir: the run's folder or URL.
        keep_last: complete checkpoints to keep besides the best one.
    """

    def __init__(self, run_dir: str, ranks: Ranks, keep_last: int = 2) -> None:
        self.folder, self.ranks, self.keep_last = storage.join(run_dir, "checkpoints"), ranks, keep_last
        # Of the run's own writing, as rank 0 knows it: what is on the way to storage is in neither.
        self._best: int | None = None
        self._damaged: set[int] = set()

    def write(
        self, step: int, tensors: dict[str, torch.Tensor], commit: dict[str, Any], best: bool, ranks: Ranks
    ) -> int:
        """Write the checkpoint of ``step``, commit it, and remove those that are no longer kept.

        Args:
            tensors: as `state_tensors` gives them.
            commit: what else is needed to load it and go on; JSON types.
            best: whether it is the best so far.
            ranks: with the group to talk over; in a thread, `Ranks.in_background`.

        Returns:
            its size in bytes, on rank 0.

        Raises:
            UserError: it cannot be written; the same on every rank, and nothing of it is left if storage allows.
        """
        try:
            return self._write(step, tensors, commit, best, ranks)
        except UserError:
            if ranks.is_first:
                with contextlib.suppress(UserError):
                    commits.remove(self.folder, step)
            raise

    def _write(
        self, step: int, tensors: dict[str, torch.Tensor], commit: dict[str, Any], best: bool, ranks: Ranks
    ) -> int:
        url = commits.step_url(self.folder, step)

        def clear_place() -> None:
            # What an interrupted attempt, or a damaged checkpoint, left behind.
            commits.remove(self.folder, step)
            if storage.is_local(url):
                storage.make_folder(url)

        from_first(ranks, clear_place)
        writer = CheckpointWriter(url)
        with storage_errors(f"{url}: this checkpoint cannot be written"), HERE.waiting("checkpoint"):
            dcp.save(tensors, storage_writer=writer, planner=BlockSavePlanner(), process_group=ranks.host)
        # Only now has every rank written all of its files.
        files = {name: content for part in from_each(ranks, lambda: writer.contents) for name, content in part.items()}
        return from_first(ranks, lambda: self._commit(step, {**commit, "step": step, "files": files}, best))

    def _commit(self, step: int, commit: dict, best: bool) -> int:
        commit["best_step"] = step if best else self._best
        commits.write_commit(self.folder, step, commit)
        self._best = commit["best_step"]
        self._damaged.discard(step)
        try:
            commits.prune(self.folder, step, self.keep_last, self._best, self._damaged)
        except UserError as error:
            # The checkpoint is there; what is too many is removed with the next one.
            _log.warning("old checkpoints are not removed: %s", redacted(str(error)))
        return sum(content["bytes"] for content in commit["files"].values())

    def newest(self) -> int | None:
        """Step of the newest undamaged checkpoint, None if there is none at all.

        Rank 0 says what is there: what a shared file system shows to different machines may differ for a while. The
        files are read by all ranks, each some of them. A damaged checkpoint is reported and passed over.

        Raises:
            UserError: all there are are damaged; or storage does not answer.
        """
        steps = from_first(self.ranks, lambda: complete_steps(self.folder))
        for step in reversed(steps):
            damage = self._damage(step)
            if damage is None:
                best = read_commit(self.folder, step)["best_step"] if self.ranks.is_first else None
                self._best = best if best in steps and best not in self._damaged else None
                return step
            self._damaged.add(step)
            self._warn(f"the checkpoint of step {step} is damaged and passed over: {damage}")
        if steps:
            raise UserError(f"{self.folder}: every checkpoint is damaged (of the oldest: {damage})")
        return None

    def best(self) -> int | None:
        """Step of the best checkpoint, None if there was no evaluation or it is gone."""
        return from_first(self.ranks, lambda: self._best)

    def mark_best(self, step: int, is_last: bool) -> None:
        """The checkpoint of ``step``, which is there, turned out to be the best so far.

        Args:
            is_last: whether no other will be written: its commit would say so too.

        Raises:
            UserError: it is the last, and storage does not take that.
        """

        def mark() -> None:
            commits.write_commit(self.folder, step, {**read_commit(self.folder, step), "best_step": step})

        try:
            from_first(self.ranks, mark)
        except UserError as error:
            if is_last:
                raise
            self._warn(f"that step {step} is the best so far is left to the next checkpoint: {error}")
        self._best = step

    def is_sound(self, step: int, instead: str) -> bool:
        """Whether the checkpoint of ``step`` is undamaged; if not, it is reported, and what is done ``instead``."""
        damage = self._damage(step)
        if damage is not None:
            self._warn(f"the checkpoint of step {step} is damaged, {instead}: {damage}")
        return damage is None

    def chosen(self) -> int | None:
        """Step of the best checkpoint; of the newest undamaged one, if none was marked best; None if there is none.

        Raises:
            UserError: the best is damaged: another's figures or recommendations must not pass for its own.
        """
        best = from_first(self.ranks, lambda: best_step(self.folder))
        if best is None:
            return self.newest()
        damage = self._damage(best)
        if damage is not None:
            url = commits.step_url(self.folder, best)
            raise UserError(f"{damage}; the best checkpoint is damaged (remove {url} to use the newest one instead)")
        return best

    def _damage(self, step: int) -> str | None:
        """Why the checkpoint of ``step`` is not what was written, in words that name the file; None if it is."""

        def read() -> tuple[dict, str | None]:
            try:
                return read_commit(self.folder, step)["files"], None
            except DamagedCheckpoint as error:
                return {}, str(error)

        files, damage = from_first(self.ranks, read)
        if damage is not None:
            return damage
        url = commits.step_url(self.folder, step)
        mine = sorted(files)[self.ranks.rank :: self.ranks.world]
        found = from_each(
            self.ranks, lambda: [commits.file_damage(storage.join(url, name), files[name]) for name in mine]
        )
        return next((damage for damages in found for damage in damages if damage is not None), None)

    def _warn(self, text: str) -> None:
        if self.ranks.is_first:
            _log.warning("%s", redacted(text))

    def load(self, step: int, engine: Engine | None, encoder: torch.nn.Module, tables: TableGroup) -> dict:
        """Fill engine (or, without one, the plain encoder) and table from the checkpoint of ``step``.

        Returns:
            the ``state`` it was saved with.
        """
        commit = read_commit(self.folder, step)
        if engine is not None:
            tensors = state_tensors(engine, tables)
        else:
            tensors = {f"encoder.{name}": tensor.detach() for name, tensor in encoder.named_parameters()}
            tensors |= tables.weights()
        self._read(step, tensors)
        if engine is not None:
            engine.load_state_dict(tensors)
            tables.set_steps(_table_steps(commit))
        return commit["state"]

    def load_smaller(
        self,
        step: int,
        engine: Engine,
        tables: TableGroup,
        kept_rows: dict[str, torch.Tensor],
        fresh: Collection[str] = (),
    ) -> None:
        """Fill engine and tables from the checkpoint of a smaller model; rows that it did not have stay as they are.

        Every rank reads the rows that are its own now straight into the tables. The encoder's tensors are small: they
        are read at their saved size and put into the present ones afterwards.

        Args:
            kept_rows: by name of an encoder parameter that may have grown, where its saved rows lie now, int64.
            fresh: encoder parameters that it did not have; they stay as they are.

        Raises:
            UserError: the checkpoint is damaged, or does not fit into the present model.
        """
        state, sizes = engine.state_dict(), self._saved_sizes(step)
        table_state = tables.state_dict()
        begun = {name for name in state for parameter in fresh if _is_of(name, parameter)}
        for name, present in {**state, **table_state}.items():
            if name in begun:
                continue
            if len(sizes.get(name, ())) != present.dim() or any(
                saved > now for saved, now in zip(sizes[name], present.shape, strict=True)
            ):
                raise UserError(
                    f"{commits.step_url(self.folder, step)}: '{name}' does not fit into {list(present.shape)}"
                )
        own_rows = {name: tensor.to_local() for name, tensor in table_state.items()}
        self._read(step, own_rows, RowsLoadPlanner(dict.fromkeys(own_rows, tables.own.start)))
        loaded = {name: present.new_empty(sizes[name]) for name, present in state.items() if name not in begun}
        self._read(step, loaded)
        loaded |= {name: state[name].clone() for name in begun}
        for parameter, places in kept_rows.items():
            for name, present in state.items():
                if present.dim() and _is_of(name, parameter):
                    # A copy: the engine may have given out its own tensors.
                    loaded[name] = present.clone().index_copy_(0, places.to(present.device), loaded[name])
        engine.load_state_dict(loaded)
        tables.set_steps(_table_steps(read_commit(self.folder, step)))

    def _saved_sizes(self, step: int) -> dict[str, torch.Size]:
        """The size of every saved tensor, by its name."""
        url = commits.step_url(self.folder, step)
        try:
            metadata = CheckpointReader(url).read_metadata()
        except (OSError, pickle.UnpicklingError, EOFError) as error:
            raise UserError(f"{url}: this checkpoint is damaged ({first_line(error)})") from error
        return {name: saved.size for name, saved in metadata.state_dict_metadata.items() if hasattr(saved, "size")}

    def _read(self, step: int, tensors: dict[str, torch.Tensor], planner: LoadPlanner | None = None) -> None:
        """Fill ``tensors`` from the checkpoint, which has each at the same size unless ``planner`` says otherwise."""
        url = commits.step_url(self.folder, step)
        damaged = f"{url}: this checkpoint is damaged or of another configuration"
        with storage_errors(damaged), HERE.waiting("checkpoint"):
            reader = CheckpointReader(url)
            dcp.load(tensors, storage_reader=reader, planner=planner, process_group=self.ranks.host)


def _is_of(name: str, parameter: str) -> bool:
    """Whether a tensor of an engine's state is that encoder parameter, or what the optimizer remembers of it."""
    return name == f"encoder.{parameter}" or name.startswith(f"optimizer.{parameter}.")


def weight_settings(config: Config) -> dict[str, Any]:
    """The settings that the tensors of a checkpoint, and what they mean, depend on; by dotted key."""
    return {
        "precision": f"{'fp64' if config.precision == 'fp64' else 'fp32'} weights",
        "table.optimizer": config.table.optimizer,
        "optimizer.name": config.optimizer.name,
        **{f"model.{name}": value for name, value in config.model if not name.startswith(("dropout", "fusion_"))},
        "model.output_table": "tied" if config.model.tied else "untied",
    }


def state_tensors(engine: Engine, tables: TableGroup) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by name; they share memory with the parts that are trained."""
    return {**engine.state_dict(), **tables.state_dict()}


def copied_tensors(engine: Engine, tables: TableGroup) -> dict[str, torch.Tensor]:
    """`state_tensors` as they are now, copied to the host's memory."""
    state = {name: tensor.to("cpu", copy=True) for name, tensor in engine.state_dict().items()}
    return {**state, **tables.host_copy()}


def _table_steps(commit: dict[str, Any]) -> dict[str, int]:
    """Updates of each table; checkpoints of earlier versions have one table and its number."""
    steps = commit["table_steps"]
    return steps if isinstance(steps, dict) else {ITEM_TABLE: steps}
