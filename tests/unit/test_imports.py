"""Imports point one way, read from the syntax trees of all our modules."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("gru4recf_dist", "data_prep", "train", "benchmarks")
BASE = (
    "gru4recf_dist.config",
    "gru4recf_dist.data.storage_config",
    "gru4recf_dist.errors",
    "gru4recf_dist.model_config",
    "gru4recf_dist.section",
    "gru4recf_dist.typed_yaml",
)
PROGRAMS = ("train", "evaluate", "recommend", "replay", "import_recbole")
RUN_TIME = ("gru4recf_dist.parallel", "gru4recf_dist.data", "gru4recf_dist.model", *BASE)

# Part of the project -> what it may import of ours besides itself. A name stands for the module and all under it.
MAY_IMPORT = {
    "gru4recf_dist.model": BASE,
    "gru4recf_dist.data": BASE,
    "gru4recf_dist.parallel": ("gru4recf_dist.frames", "gru4recf_dist.launcher", *BASE),
    "gru4recf_dist.table": RUN_TIME,
    "gru4recf_dist.recommender": ("gru4recf_dist.table", *RUN_TIME),
    "gru4recf_dist.evaluation": ("gru4recf_dist.table", "gru4recf_dist.recommender", *RUN_TIME),
    "gru4recf_dist.planning": RUN_TIME,
    "gru4recf_dist.recbole": ("gru4recf_dist.data", "gru4recf_dist.model", *BASE),
    "gru4recf_dist.stopping": (),
    "gru4recf_dist.frames": (),
    "gru4recf_dist.launcher": (),
    "gru4recf_dist.strategies": BASE,
    "gru4recf_dist.broken_steps": ("gru4recf_dist.data", "gru4recf_dist.parallel", *BASE),
    "gru4recf_dist.checkpoint": (
        "gru4recf_dist.checkpoint_blocks",
        "gru4recf_dist.checkpoint_commits",
        "gru4recf_dist.checkpoint_files",
        "gru4recf_dist.table",
        *RUN_TIME,
    ),
    "gru4recf_dist.checkpoint_commits": ("gru4recf_dist.checkpoint_files", "gru4recf_dist.data", *BASE),
    "gru4recf_dist.checkpoint_saving": (
        "gru4recf_dist.checkpoint",
        "gru4recf_dist.monitoring",
        "gru4recf_dist.table",
        *RUN_TIME,
    ),
    "gru4recf_dist.monitoring": (
        *(f"gru4recf_dist.{name}" for name in ("metrics_log", "run_description", "shown_metrics", "tensorboard_log")),
        "gru4recf_dist.data",
        *BASE,
    ),
    "gru4recf_dist.growing_file": ("gru4recf_dist.data", *BASE),
    "gru4recf_dist.metrics_log": ("gru4recf_dist.growing_file", "gru4recf_dist.data", *BASE),
    "gru4recf_dist.tensorboard_log": (
        *(f"gru4recf_dist.{name}" for name in ("growing_file", "run_description")),
        "gru4recf_dist.data",
        *BASE,
    ),
    "gru4recf_dist.run_description": ("gru4recf_dist.shown_metrics", "gru4recf_dist.data", *BASE),
    "gru4recf_dist.shown_metrics": ("gru4recf_dist.data", *BASE),
    "gru4recf_dist.checkpoint_blocks": (),
    "gru4recf_dist.checkpoint_files": ("gru4recf_dist.data", "gru4recf_dist.parallel.whereabouts", *BASE),
    "data_prep": (
        "gru4recf_dist.data.filesystems",
        "gru4recf_dist.data.blocks",
        "gru4recf_dist.data.event_columns",
        "gru4recf_dist.data.shard_format",
        "gru4recf_dist.data.storage",
        "gru4recf_dist.data.storage_config",
        "gru4recf_dist.data.tokens",
        "gru4recf_dist.errors",
        "gru4recf_dist.section",
        "gru4recf_dist.typed_yaml",
    ),
}
# Module -> the only ones that may import it.
ONLY_IMPORTED_BY = {
    "gru4recf_dist.trainer": (
        "benchmarks.__main__",
        "benchmarks.catalog",
        "benchmarks.overlap",
        "benchmarks.plan",
        "benchmarks.recbole",
        "benchmarks.step_times",
        "benchmarks.wire",
        *(f"gru4recf_dist.{program}" for program in PROGRAMS),
    ),
}
# Part of the project -> what it must never import, of anyone's.
NEVER_IMPORTS = {
    "gru4recf_dist.model": "torch.distributed",
    "data_prep": "torch",
    "gru4recf_dist.stopping": "torch",
    "gru4recf_dist.launcher": "torch",
}


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name; a package has the name of its folder."""
    paths = [ROOT / "train.py", *(path for package in OURS for path in (ROOT / package).rglob("*.py"))]
    found = {}
    for path in filter(Path.is_file, paths):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_under(module: str, names: str | tuple[str, ...]) -> bool:
    """Whether ``module`` is one of ``names`` or lies under one; `a.table2` does not lie under `a.table`."""
    names = (names,) if isinstance(names, str) else names
    return any(module == name or module.startswith(f"{name}.") for name in names)


def imports(source: str, module: str, is_package: bool, known: set[str]) -> set[str]:
    """Absolute names of all that ``source`` imports, at any depth of the code.

    ``from a import b`` gives ``a.b`` when that is one of the ``known`` modules or ``a`` is not ours, so that
    ``from torch import distributed`` is seen; otherwise ``b`` is a name in ``a``, which is what is given.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                # One dot is the package itself: for a plain module, the folder that it lies in.
                steps_up = node.level - is_package
                package = module.split(".")[: len(module.split(".")) - steps_up]
                origin = ".".join([*package, *filter(None, [origin])])
            for alias in node.names:
                name = f"{origin}.{alias.name}"
                found.add(name if name in known or not is_under(origin, OURS) else origin)
    return found


@pytest.fixture(scope="module")
def imported() -> dict[str, set[str]]:
    """What each module of ours imports."""
    found = modules()
    return {
        name: imports(path.read_text(), name, path.name == "__init__.py", set(found)) for name, path in found.items()
    }


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import a", {"a"}),
        ("import torch.distributed as dist", {"torch.distributed"}),
        ("from torch import distributed", {"torch.distributed"}),
        ("from gru4recf_dist.data.storage import join", {"gru4recf_dist.data.storage"}),
        ("from gru4recf_dist.data import storage", {"gru4recf_dist.data.storage"}),
        ("from gru4recf_dist import __version__", {"gru4recf_dist"}),
        ("from . import storage", {"gru4recf_dist.data.storage"}),
        ("from .storage import join", {"gru4recf_dist.data.storage"}),
        ("from .. import errors", {"gru4recf_dist.errors"}),
        ("from ..errors import UserError", {"gru4recf_dist.errors"}),
        ("def f():\n    from gru4recf_dist import trainer", {"gru4recf_dist.trainer"}),
    ],
)
def test_every_form_of_import_is_understood(line, expected):
    known = {"gru4recf_dist.data.storage", "gru4recf_dist.errors", "gru4recf_dist.trainer"}
    assert imports(line, "gru4recf_dist.data.batches", is_package=False, known=known) == expected
    # The same lines in the package's own `__init__.py`.
    assert imports(line, "gru4recf_dist.data", is_package=True, known=known) == expected


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_point_one_way(part, imported):
    # Importing any module imports the root package, so its name is allowed everywhere.
    allowed = (part, *MAY_IMPORT[part])
    wrong = [
        f"{name} imports {other}"
        for name in imported
        if is_under(name, part)
        for other in sorted(imported[name])
        if is_under(other, OURS) and other != "gru4recf_dist" and not is_under(other, allowed)
    ]
    assert wrong == []


@pytest.mark.parametrize("module", ONLY_IMPORTED_BY)
def test_top_of_the_program_is_imported_by_programs_only(module, imported):
    importers = [name for name, others in imported.items() if any(is_under(other, module) for other in others)]
    assert set(importers) <= {module, *ONLY_IMPORTED_BY[module]}


@pytest.mark.parametrize("part", NEVER_IMPORTS)
def test_forbidden_packages_are_not_imported(part, imported):
    forbidden = NEVER_IMPORTS[part]
    wrong = [
        f"{name} imports {other}"
        for name in imported
        if is_under(name, part)
        for other in sorted(imported[name])
        if is_under(other, forbidden)
    ]
    assert wrong == []


def test_model_does_not_reach_torch_distributed_by_attribute():
    for name, path in modules().items():
        if is_under(name, "gru4recf_dist.model"):
            accesses = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
            assert "torch.distributed" not in map(ast.unparse, accesses), name


def test_preparation_runs_without_torch():
    # At run time a third package might bring torch along, which the syntax trees do not show.
    names = [name for name in modules() if is_under(name, "data_prep") and not name.endswith("__main__")]
    program = f"import importlib, sys; [importlib.import_module(n) for n in {names}]; print('torch' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert finished.stdout.strip() == "False", finished.stderr
