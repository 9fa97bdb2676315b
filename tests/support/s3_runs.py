"""The project's programs on local files and on S3: in a process of their own, or quickly on several ranks."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from gru4recf_dist.parallel.ranks import Ranks
from tests.support.s3 import ROOT
from tests.support.training import SMALL

# A short run of 3 epochs on `write_raw_events`, dropout included.
SHORT = [
    *(setting for setting in SMALL if not setting.startswith(("max_", "evaluation", "model.dropout", "monitoring")))
]
SHORT += ["max_epochs=3", "model.dropout=0.2", "evaluation.ks=[1,5,10]", "monitoring.log_every_steps=2"]


def program(*arguments: object, environment: Mapping[str, str]) -> subprocess.CompletedProcess:
    """Run a program as a user does, in one process."""
    command = [sys.executable, *map(str, arguments)]
    everything = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=everything, capture_output=True, text=True, timeout=120)


def together(runs: Iterable[tuple[tuple, Mapping[str, str]]]) -> list[subprocess.CompletedProcess]:
    """`program` for each (arguments, environment), two at a time: most of their time goes into imports and waiting."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda run: program(*run[0], environment=run[1]), runs))


def in_environment(ranks: Ranks, environment: Mapping[str, str], function: Callable[..., Any], *arguments: Any) -> Any:
    """For `run_ranks`: call ``function(ranks, *arguments)`` with other environment variables.

    Ranks are forks of a server that has the environment of the moment when the first of them was started.
    """
    os.environ.update(environment)
    return function(ranks, *arguments)


def main_of(ranks: Ranks, module: str, *arguments: str) -> None:
    """For `run_ranks`: the program ``python -m module arguments``, on ranks that are there already."""
    code = importlib.import_module(module).main(list(arguments))
    assert code == 0, f"{module} {arguments}: exit code {code}"


def write_raw_events(folder: Path) -> None:
    """`events.csv`, in which each item is mostly followed by the next one, and `products.csv`."""
    generator = np.random.default_rng(0)
    lines, items = ["user,product,at"], 30
    for user in range(90):
        item = int(generator.integers(items))
        for time in range(int(generator.integers(5, 14))):
            lines.append(f"u{user},p{item},{time}")
            item = (item + 1) % items if generator.random() < 0.9 else int(generator.integers(items))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.csv").write_text("\n".join(lines) + "\n")
    products = "\n".join(f"p{i},shelf{i % 5}" for i in range(items))
    (folder / "products.csv").write_text(f"product,shelf\n{products}\n")


def write_recipe(path: Path, source: str, output: str) -> None:
    """A preparation recipe for `write_raw_events`, with small shards."""
    path.write_text(
        f"""
name: shop
source: {source}
output: {output}
input: {{format: csv, files: [events.csv], session: user, item: product, time: at}}
split: {{method: leave_one_out}}
items: {{format: csv, file: products.csv, item: product}}
features: [{{name: shelf, kind: token}}]
shard_sessions: 4
block_sessions: 2
"""
    )


def checkpoint_tensors(checkpoint: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder, read by torch's own converter."""
    file = tmp_path / f"{checkpoint.name}.pt"
    dcp_to_torch_save(checkpoint, file)
    tensors = torch.load(file)
    file.unlink()
    return tensors


def assert_equal_tensors(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
