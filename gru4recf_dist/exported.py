"""A trained model of any fusion in a folder of its own, for programs that serve it: no data set, no ranks.

    DIR/model.json              settings of the model, and what else its scores depend on
    DIR/weights.pt              its tensors by name: torch.load(.., weights_only=True) reads them
    DIR/manifest.json, items/   tokens, features and popularity of the items, as a data set without sessions

`gru4recf_dist.export --format torch` writes it, `load` makes a torch module of it (docs/export.md). Shapes: B sessions,
N items, T packed events, Q size of a query.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from gru4recf_dist import recommender
from gru4recf_dist.config import Config, ModelConfig
from gru4recf_dist.data import storage
from gru4recf_dist.data.batches import pack_histories
from gru4recf_dist.data.shard_format import (
    POPULARITY,
    SPLITS,
    TOKENS,
    Manifest,
    SplitInfo,
    file_url,
    read_manifest,
    write_manifest,
)
from gru4recf_dist.errors import UserError, first_line
from gru4recf_dist.model.gru4recf import GRU4RecF
from gru4recf_dist.model.subnets import ITEM_TABLE, subnets
from gru4recf_dist.recommend_input import SessionReader, to_block
from gru4recf_dist.recommender import Recommender
from gru4recf_dist.table.feature_store import read_column

SETTINGS, WEIGHTS = "model.json", "weights.pt"
FORMAT_VERSION = 1
# Items that are scored at a time: what is made of their rows does not grow with the catalog.
_BLOCK_ITEMS = 1 << 16

# A session: tokens of its items, or a line of `gru4recf_dist.recommend`'s input.
Given = Sequence[str] | dict[str, Any]


def write(folder: str, config: Config, model: Recommender, manifest: Manifest) -> None:
    """Write ``model``, of one rank, into ``folder``; `WEIGHTS` comes last.

    Args:
        config, manifest: of its run, and of the data set as it was trained on.
    """
    names = [spec.name for spec in recommender.feature_specs(config.model, manifest)]
    _write_items(folder, config.data, manifest, names)
    encoder = model.encoder
    settings = {
        "format": FORMAT_VERSION,
        "model": config.model.model_dump(mode="json"),
        "max_length": config.loader.max_length,
        "present_subnets": [name for name in subnets(config.model) if name in encoder.present],
    }
    storage.write_json(storage.join(folder, SETTINGS), settings)
    weights = {name: parameter.detach().cpu() for name, parameter in encoder.named_parameters()}
    for name in model.tables.names:
        whose = "item_embedding" if name == ITEM_TABLE else f"output_embedding.{name}"
        weights[f"{whose}.weight"] = model.tables[name].weight.cpu()
    with storage.open_atomic(storage.join(folder, WEIGHTS)) as stream:
        torch.save(weights, stream)


def _write_items(folder: str, data: str, manifest: Manifest, names: list[str]) -> None:
    """Write what is known of the items, and the values of event features, as a data set without sessions.

    Args:
        names: the item features to take along.
    """
    copies = {TOKENS: manifest.tokens, POPULARITY: manifest.popularity}
    features = []
    for number, feature in enumerate(manifest.feature(name) for name in names):
        # By number: the names of features are not made for files.
        names_of = {"values": ".npy", "indptr": ".indptr.npy", "vocabulary": ".vocabulary.parquet"}
        given = {key: getattr(feature, key) for key in names_of}
        placed = {key: f"items/features/{number}{names_of[key]}" for key, name in given.items() if name is not None}
        copies |= {placed[key]: given[key] for key in placed}
        features.append(feature.model_copy(update=placed))
    events = []
    for number, feature in enumerate(manifest.event_features):
        placed = {}
        if feature.vocabulary is not None:
            placed["vocabulary"] = f"items/events/{number}.vocabulary.parquet"
            copies[placed["vocabulary"]] = feature.vocabulary
        events.append(feature.model_copy(update=placed))
    for name, origin in copies.items():
        with (
            storage.open_read(file_url(data, origin)) as source,
            storage.open_atomic(storage.join(folder, name)) as target,
        ):
            shutil.copyfileobj(source, target)
    empty = SplitInfo(sessions=0, events=0, targets=0, shards=[])
    without_sessions = Manifest(
        name=manifest.name,
        seed=manifest.seed,
        items=manifest.items,
        streams=1,
        protocol=manifest.protocol,
        splits=dict.fromkeys(SPLITS, empty),
        features=features,
        event_features=events,
    )
    write_manifest(folder, without_sessions)


def load(folder: str, device: torch.device | str = "cpu") -> ExportedModel:
    """The model in ``folder``, a path or URL, ready to score.

    Raises:
        UserError: something is missing there, or damaged.
    """
    url = storage.join(folder, SETTINGS)
    settings = storage.read_json(url)
    if not isinstance(settings, dict) or settings.get("format") != FORMAT_VERSION:
        raise UserError(f"{url}: not a model that this program exported in format {FORMAT_VERSION}")
    try:
        config = ModelConfig.model_validate(settings["model"])
        max_length, present = int(settings["max_length"]), list(settings["present_subnets"])
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{url}: not the settings of a model ({first_line(error)})") from error
    manifest = read_manifest(folder)
    # Without memory or random numbers: all parameters are replaced.
    with torch.device("meta"):
        model = ExportedModel(folder, config, manifest, max_length)
    url = storage.join(folder, WEIGHTS)
    try:
        weights = torch.load(io.BytesIO(storage.read_bytes(url)), weights_only=True)
        model.load_state_dict(weights, assign=True)
    except UserError:
        raise
    except Exception as error:
        # torch's own errors for files that are damaged, or of another model, are of many types.
        raise UserError(f"{url}: not the weights of this model ({first_line(error)})") from error
    model.take_part(present)
    return model.requires_grad_(False).eval().to(device)


class ExportedModel(GRU4RecF):
    """A trained GRU4RecF that takes sessions as tokens. Use `load`.

    Attributes:
        item_count: N; column j of `scores` is item j + 1.
    """

    def __init__(self, folder: str, config: ModelConfig, manifest: Manifest, max_length: int) -> None:
        specs = recommender.feature_specs(config, manifest)
        super().__init__(
            config, manifest.items + 1, specs, item_features=None, events=recommender.event_specs(config, manifest)
        )
        self.item_count, self._max_length = manifest.items, max_length
        rows, cpu = range(manifest.items + 1), torch.device("cpu")
        with cpu:
            # Values as they lie on disk: padded, those of the item with most would decide the size.
            columns = [read_column(folder, manifest.feature(spec.name), manifest.items, rows, cpu) for spec in specs]
        self._columns = columns
        self._event_features = recommender.used_event_features(config, manifest)
        self._reader = SessionReader(folder, manifest, self._event_features)

    def features_of(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        local = ids.cpu()
        return {column.feature.name: column.decode(column.rows(local)).to(ids.device) for column in self._columns}

    def tokens(self, columns: Sequence[int]) -> list[str]:
        """The items' tokens of ``columns`` of `scores`."""
        return self._reader.index.tokens(np.asarray(columns, np.int64) + 1)

    @torch.no_grad()
    def scores(self, sessions: Sequence[Given]) -> torch.Tensor:
        """Scores of all items as each session's next one, float64 [B, N]; NaN for a session without a known item.

        Args:
            sessions: lists of tokens; or, with event features, dictionaries as in the lines that
                `gru4recf_dist.recommend` reads. Unknown items are left out.

        Raises:
            UserError: a session has not that form; it is named by its place.
        """
        return self._scores(sessions)[0]

    @torch.no_grad()
    def recommend(
        self, sessions: Sequence[Given], k: int = 20, exclude_seen: bool = False
    ) -> list[list[tuple[str, float]]]:
        """The k best items of each session with their scores, best first; none for a session without a known item.

        Among equal scores the smaller id comes first. Arguments and errors as `scores`.

        Args:
            exclude_seen: never an item of the session itself.
        """
        scores, known = self._scores(sessions)
        found = []
        for row, items in zip(scores, known, strict=True):
            if exclude_seen:
                row[torch.from_numpy(items.astype(np.int64)) - 1] = -torch.inf
            candidates = int((row > -torch.inf).sum())
            count = min(k, candidates)
            if not count:
                found.append([])
                continue
            lowest = row.topk(count).values[-1]
            # In the order of ids, so that a stable sort leaves equal ones in it.
            columns = (row >= lowest).nonzero()[:, 0]
            best = columns[row[columns].argsort(descending=True, stable=True)[:count]]
            found.append(list(zip(self.tokens(best.cpu().numpy()), row[best].tolist(), strict=True)))
        return found

    def _scores(self, sessions: Sequence[Given]) -> tuple[torch.Tensor, list[np.ndarray]]:
        """`scores`, and the known items of each session."""
        device = self.item_embedding.weight.device
        scores = torch.full((len(sessions), self.item_count), torch.nan, dtype=torch.float64, device=device)
        lines = [(f"session {number}", _line(session, number)) for number, session in enumerate(sessions)]
        encoded = list(self._reader.sessions(lines))
        real = [number for number, session in enumerate(encoded) if len(session.items)]
        if real:
            block = to_block([encoded[number] for number in real])
            batch = pack_histories(block, self._max_length, self._event_features)
            events = {name: values.to(device) for name, values in batch.event_features.items()}
            queries = self.encode(batch.items.to(device), batch.batch_sizes, events)
            queries = queries[batch.positions.to(device)].float().double()
            places = torch.tensor(real, device=device)
            for start in range(1, self.item_count + 1, _BLOCK_ITEMS):
                ids = torch.arange(start, min(start + _BLOCK_ITEMS, self.item_count + 1), device=device)
                # The scores that rankings are defined by: float64 ones of the float32 vectors.
                scores[places, start - 1 : start - 1 + len(ids)] = queries @ self.candidates(ids, torch.float64).T
        return scores, [session.items for session in encoded]


def _line(session: Given, number: int) -> dict[str, Any]:
    """A session as a line of `gru4recf_dist.recommend`'s input."""
    line = session if isinstance(session, dict) else {"items": session}
    items = line.get("items")
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise UserError(f"session {number}: must be a list of tokens, or a dictionary with a list called 'items'")
    return line
