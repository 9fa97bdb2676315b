"""What finished runs of `benchmarks.results` gave, kept beside the page: the runs themselves need not stay."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import yaml

BASELINES = ("popularity", "markov")
# Where a run lies and where its data are says nothing of what comes out.
_PLACES = ("data", "run_dir")


class Records:
    """Figures by experiment and seed, of the present recipe only, in a JSON file that is replaced as a whole.

    Args:
        file: need not exist.
        recipe: the YAML file that all runs share.
    """

    def __init__(self, file: str | Path, recipe: str) -> None:
        self._file = Path(file)
        self._recipe = yaml.safe_load(Path(recipe).read_text())
        self._kept: dict[str, dict[str, dict]] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def get(self, path: str, settings: tuple[str, ...], seed: int) -> dict | None:
        """A run's figures; None if it has not been made with these settings."""
        kept = self._kept.get(path, {}).get(str(seed))
        return kept if kept and kept["settings"] == self._digest(settings) else None

    def put(
        self, path: str, settings: tuple[str, ...], seed: int, result: dict, columns: list[tuple[str, str]]
    ) -> None:
        """Keep the ``columns`` (split, metric) of a run's ``result.json``, and of its baselines."""
        kept: dict[str, dict[str, float]] = {}
        for split, metric in columns:
            kept.setdefault(split, {})[metric] = result[split][metric]
            for baseline in BASELINES:
                name = baseline + split.removeprefix("test")
                kept.setdefault(name, {})[metric] = result["baselines"][name][metric]
        best_epoch = result["best_step"] * result["epochs"] / result["steps"]
        self._kept.setdefault(path, {})[str(seed)] = {
            "settings": self._digest(settings),
            "best_epoch": best_epoch,
            **kept,
        }
        whole = self._file.with_name(f"{self._file.name}.part")
        whole.write_text(json.dumps(self._kept, indent=1, sort_keys=True) + "\n")
        os.replace(whole, self._file)

    def _digest(self, settings: tuple[str, ...]) -> str:
        """Of everything that is set; not of defaults, which may gain keys."""
        recipe = {key: value for key, value in self._recipe.items() if key not in _PLACES}
        return hashlib.sha256(json.dumps([recipe, *settings], sort_keys=True).encode()).hexdigest()[:16]
