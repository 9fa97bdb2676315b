"""RecBole's checkpoint files: reading one without running what is pickled in it, and writing one of plain data.

RecBole 1.2.1 writes {config, epoch, cur_step, best_valid_score, state_dict, other_parameter, optimizer} by torch.save,
its configuration object, the class of the model and (GRU4RecF) the whole data set pickled with it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import IO, Any

import torch

from gru4recf_dist.data import storage
from gru4recf_dist.errors import UserError
from gru4recf_dist.recbole.inert_pickle import Inert, load_torch
from gru4recf_dist.recbole.token_ids import TokenIds, pickled_ids

MODELS = ("GRU4Rec", "GRU4RecF")


@dataclass(frozen=True)
class RecBoleCheckpoint:
    """What is used of a checkpoint file.

    Attributes:
        source: the file.
        model: one of `MODELS`.
        settings: RecBole's, by its own names; those that are not plain data are `Inert`.
        weights: tensors by RecBole's names.
        ids: of the data set in it, if there is one.
        skipped: names of the functions and classes that it asks for, which were not looked up.
    """

    source: str
    model: str
    settings: dict[str, Any]
    weights: dict[str, torch.Tensor]
    ids: TokenIds | None
    skipped: list[str]

    def setting(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """A setting that must be there and be of ``kind``; UserError if it is not."""
        value = self.settings.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{self.source}: its configuration has no usable '{name}' (got {_shown(value)})")
        return value


def read_checkpoint(url: str) -> RecBoleCheckpoint:
    """Read a checkpoint of `MODELS`; nothing that is pickled in it is run.

    Raises:
        UserError: it is not a checkpoint of RecBole's, or one of another model.
    """
    content = storage.read_bytes(url)
    try:
        loaded, skipped = load_torch(content)
    except ValueError as error:
        raise UserError(f"{url}: not a RecBole checkpoint ({error})") from error
    if not isinstance(loaded, dict) or not {"config", "state_dict"} <= set(loaded):
        raise UserError(f"{url}: not a RecBole checkpoint (it has no config and state_dict)")
    config = loaded["config"]
    settings = config.attribute("final_config_dict") if isinstance(config, Inert) else config
    if not isinstance(settings, dict):
        raise UserError(f"{url}: not a RecBole checkpoint (its config is not RecBole's)")
    model = settings.get("model")
    if model not in MODELS:
        raise UserError(f"{url}: holds a model {_shown(model)}; only {' and '.join(MODELS)} can be read")
    weights = loaded["state_dict"]
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        for name, tensor in weights.items()
    ):
        raise UserError(f"{url}: not a RecBole checkpoint (its state_dict holds more than tensors of floats)")
    others = loaded.get("other_parameter")
    features = others.get("feature_embed_layer") if isinstance(others, dict) else None
    data_set = features.attribute("dataset") if isinstance(features, Inert) else None
    ids = pickled_ids(f"{url} (the data set in it)", data_set, settings.get("ITEM_ID_FIELD", "item_id"))
    return RecBoleCheckpoint(url, model, settings, dict(weights), ids, sorted(skipped))


def write_checkpoint(
    stream: IO[bytes], settings: dict[str, Any], weights: dict[str, torch.Tensor], learning_rate: float
) -> None:
    """Write a checkpoint that `trainer.resume_checkpoint` and `model.load_state_dict` of RecBole take.

    It holds plain data only, so that it also loads where torch refuses anything else.

    Args:
        settings: RecBole's, ``model`` among them.
        weights: by RecBole's names, in the order of its parameters.
    """
    # As new: with it, resume_checkpoint begins at epoch 0 and Adam without moments.
    optimizer = torch.optim.Adam([torch.nn.Parameter(tensor) for tensor in weights.values()], lr=learning_rate)
    state = {
        "config": settings,
        "epoch": -1,
        "cur_step": 0,
        "best_valid_score": float("-inf"),
        "state_dict": OrderedDict(weights),
        "other_parameter": {},
        "optimizer": optimizer.state_dict(),
    }
    torch.save(state, stream)


def _shown(value: Any) -> str:
    return value.name if isinstance(value, Inert) else repr(value)[:80]
