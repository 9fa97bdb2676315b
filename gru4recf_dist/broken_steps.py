"""What happens to a step whose loss or gradients are not finite: the run ends, or goes on without it.

Either way no rank has updated anything, and what each rank worked on is kept in the run folder, for
`gru4recf_dist.replay`.
"""

from __future__ import annotations

import io
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from gru4recf_dist.config import NonFiniteConfig
from gru4recf_dist.data import storage
from gru4recf_dist.data.batches import PackedBatch
from gru4recf_dist.errors import UserError, first_line
from gru4recf_dist.parallel.ranks import Ranks, from_each

FOLDER = "non-finite"
# Batches that a process keeps at most: they are evidence, and the first ones tell the most.
KEPT_BATCHES = 16


class BrokenSteps:
    """Decides, and keeps the batches."""

    def __init__(self, config: NonFiniteConfig, run_dir: str, ranks: Ranks) -> None:
        self._config, self._run_dir, self._ranks = config, run_dir, ranks
        self._kept = 0

    def broken(self, step: int, batches: list[PackedBatch], names: list[str], in_a_row: int) -> str:
        """Deal with a broken step; all ranks must call it alike.

        Args:
            batches: what this rank worked on.
            names: of what is not finite on this rank.
            in_a_row: broken steps since the last good one, with this one.

        Returns:
            what is to be said, if the run goes on.

        Raises:
            UserError: it does not.
        """
        folder = storage.join(self._run_dir, f"{FOLDER}/step-{step}")
        self._kept += 1
        found = from_each(self._ranks, lambda: (names, self._save(folder, batches)))
        shown = "; ".join(f"rank {rank}: {_listed(each)}" for rank, (each, _) in enumerate(found) if each)
        failed = [error for _, error in found if error]
        where = f"the batch was not saved ({failed[0]})" if failed else f"the batch: {folder}"
        text = f"step {step}: loss or gradients are not finite ({shown}); nothing was updated; {where}"
        if self._config.policy == "stop":
            raise UserError(
                f"{text}. Try lower optimizer.lr and table.lr, or optimizer.clip, or non_finite.policy=skip"
            )
        if in_a_row > self._config.max_skips:
            raise UserError(f"{text}. {self._config.max_skips} in a row before it were skipped (non_finite.max_skips)")
        return f"warning: {text}. Skipped, {in_a_row} of at most {self._config.max_skips} in a row"

    def _save(self, folder: str, batches: list[PackedBatch]) -> str | None:
        """Why this rank's part could not be saved; raises nothing: what broke the step must not get lost."""
        if self._kept > KEPT_BATCHES:
            return f"{KEPT_BATCHES} were"
        try:
            save_batches(folder, self._ranks, batches)
        except (OSError, UserError) as error:
            return first_line(error)
        return None


def save_batches(folder: str, ranks: Ranks, batches: list[PackedBatch]) -> None:
    """Write the micro-batches of this rank as `rank-R.npz`; rank 0 adds how many ranks there were."""
    arrays: dict[str, np.ndarray] = {}
    for number, batch in enumerate(batches):
        for name, value in vars(batch).items():
            parts = value if isinstance(value, dict) else {"": value}
            for key, part in parts.items():
                arrays["/".join((str(number), name, key))] = np.asarray(part)
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    storage.write_bytes(storage.join(folder, f"rank-{ranks.rank}.npz"), stream.getvalue())
    if ranks.is_first:
        storage.write_json(storage.join(folder, "step.json"), {"world_size": ranks.world})


def load_batches(folder: str, ranks: Ranks) -> list[PackedBatch]:
    """What was kept of a step, for this rank: its own part, or with one rank all of it.

    Raises:
        UserError: nothing was kept in ``folder``, or by another number of ranks.
    """
    if not storage.exists(storage.join(folder, "step.json")):
        raise UserError(f"{folder}: no batch was kept here")
    world = storage.read_json(storage.join(folder, "step.json"))["world_size"]
    if ranks.world not in (1, world):
        raise UserError(f"{folder}: was kept by {world} ranks; replay it with as many, or with one")
    batches = []
    for rank in [ranks.rank] if ranks.world == world else range(world):
        content = storage.read_bytes(storage.join(folder, f"rank-{rank}.npz"))
        batches += _batches(np.load(io.BytesIO(content), allow_pickle=False))
    return batches


def _batches(arrays) -> list[PackedBatch]:
    found: dict[int, dict[str, Any]] = {}
    kinds = {field.name: field.type for field in fields(PackedBatch)}
    for path, values in arrays.items():
        number, name, key = path.split("/", 2)
        batch = found.setdefault(int(number), {})
        if kinds[name] == "int":
            batch[name] = int(values)
        elif key:
            batch.setdefault(name, {})[key] = torch.from_numpy(values)
        else:
            batch[name] = torch.from_numpy(values)
    return [PackedBatch(**found[number]) for number in sorted(found)]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
