"""The architectures on one process with torch's own modules, padded sessions and plain autograd: the reference.

Nothing of the project computes here. The model is written from the formulas of docs/architectures.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from gru4recf_dist.config import ModelConfig

# Of `tests.support.synthetic`: sizes of their vocabularies, or of their values.
FEATURES = {"category": 6, "tags": 9, "price": 1, "image": 3}


def read_features(data: str, items: int) -> dict[str, torch.Tensor]:
    """Of all n items; tags as indicator [n, 9] of how often each value is there."""
    files = {path.stem: torch.from_numpy(np.load(path)) for path in Path(data, "items/features").glob("*.npy")}
    bounds, counts = files.pop("tags.indptr"), torch.zeros(items + 1, FEATURES["tags"], dtype=torch.float64)
    for item in range(items + 1):
        for tag in files["tags"][bounds[item] : bounds[item + 1]]:
            counts[item, tag] += 1
    return {**files, "tags": counts}


class PlainFeatures(nn.Module):
    """Each feature to D, side by side, in the order token, token_seq, float, vector."""

    def __init__(self, names: list[str], dim: int, values: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.names = [name for name in FEATURES if name in names]
        self.values = values
        self.weights = nn.ParameterDict({name: torch.zeros(FEATURES[name], dim) for name in self.names})

    def forward(self) -> torch.Tensor:
        """Of all n items."""
        parts = []
        for name in self.names:
            value, weight = self.values[name], self.weights[name]
            if name == "category":
                parts.append(weight[value.long()])
            elif name == "tags":
                parts.append(value @ weight / (value.sum(dim=1, keepdim=True) + 1e-8))
            elif name == "price":
                parts.append(value.double()[:, None] * weight)
            else:
                parts.append(value.double() @ weight)
        return torch.cat(parts, dim=1)

    def names_in(self, prefix: str) -> dict[str, nn.Parameter]:
        places = {
            "category": "token_embedding_table.item.embedding.weight",
            "tags": "token_seq_embedding_table.item.0.weight",
            "price": "float_embedding_table.item.embedding.weight",
            "image": "vector_projection.0.weight",
        }
        return {f"{prefix}.{places[name]}": self.weights[name] for name in self.names}


class PlainModel(nn.Module):
    """Any fusion, in float64, with a dense table and scores of all items."""

    def __init__(self, config: ModelConfig, items: int, features: dict[str, torch.Tensor]) -> None:
        super().__init__()
        torch.set_default_dtype(torch.float64)
        self.config, self.kind = config, config.fusion
        dim, hidden, layers = config.embedding_size, config.hidden_size, config.num_layers
        self.items = nn.Embedding(items + 1, dim)
        groups = [] if self.kind == "item_only" else config.feature_groups or [list(features)]
        self.embeds = nn.ModuleList([PlainFeatures(group, dim, features) for group in groups])

        def gru(width: int) -> nn.GRU:
            return nn.GRU(width, hidden, layers, bias=False, batch_first=True)

        widths = [len(group) * dim for group in groups]
        self.item_rnn = None if self.kind == "feature_only" else gru(dim)
        if self.kind == "concat_input":
            self.item_rnn, widths = gru(dim + widths[0]), []
        self.rnns = nn.ModuleList([gru(width) for width in widths])
        count = len(widths) + (self.item_rnn is not None)
        without_dense = self.kind in ("parallel", "shared_w", "interaction")
        weighted = self.kind in ("weighted_sum", "shared_w")
        self.dense = None if without_dense else nn.Linear(hidden if weighted else count * hidden, dim)
        self.weights = nn.Parameter(torch.zeros(count)) if weighted else None
        self.log_temperature = nn.Parameter(torch.zeros(())) if config.learn_temperature else None
        tied = config.output_table == "tied" or (config.output_table == "auto" and not without_dense)
        width = hidden if without_dense else dim
        outputs = ["item", *self._feature_names()] if self.kind == "parallel" else ["all"]
        self.outputs = nn.ModuleDict({name: nn.Embedding(items + 1, width) for name in outputs[tied:]})
        self.bias = nn.Parameter(torch.zeros(items + 1)) if config.output_bias else None
        torch.set_default_dtype(torch.float32)
        # Names of the subnets that take part.
        self.present = {"item", *self._feature_names()}

    def _feature_names(self) -> list[str]:
        count = len(self.config.feature_groups or [[]])
        return ["feature"] if count == 1 else [f"feature_{number}" for number in range(count)]

    def scores(self, sessions: torch.Tensor) -> torch.Tensor:
        """Of every item after each event, [B, L, n], for padded sessions [B, L]."""
        outputs = self._outputs(sessions)
        tables = [table.weight for table in self.outputs.values()]
        tables = tables if len(tables) == len(outputs) else [self.items.weight, *tables]
        total = 0.0
        for output, table in zip(outputs, tables, strict=True):
            if self.config.score == "cosine":
                output, table = normalize(output, dim=-1), normalize(table, dim=-1)
            total = total + output @ table.T
        scale = self.log_temperature.exp() if self.log_temperature is not None else self.config.temperature
        total = total / scale
        return total if self.bias is None else total + self.bias

    def _outputs(self, sessions: torch.Tensor) -> list[torch.Tensor]:
        described = [embed()[sessions] for embed in self.embeds]
        if self.kind == "concat_input":
            hidden = [self.item_rnn(torch.cat([self.items(sessions), described[0]], dim=-1))[0]]
        else:
            hidden = [] if self.item_rnn is None else [self.item_rnn(self.items(sessions))[0]]
            hidden += [rnn(inputs)[0] for rnn, inputs in zip(self.rnns, described, strict=True)]
        names = ["item"] * (self.item_rnn is not None) + self._feature_names()
        neutral = torch.ones_like if self.kind == "interaction" else torch.zeros_like
        hidden = [each if name in self.present else neutral(each) for name, each in zip(names, hidden, strict=False)]
        if self.kind == "parallel":
            return hidden
        if self.kind == "interaction":
            return [torch.stack(hidden).prod(dim=0)]
        if self.weights is not None:
            together = torch.einsum("s,sblh->blh", self.weights, torch.stack(hidden))
        else:
            together = torch.cat(hidden, dim=-1)
        return [together if self.dense is None else self.dense(together)]

    # -- the project's names -----------------------------------------------------------------------------------------

    def tables(self) -> dict[str, nn.Parameter]:
        """Parameters with a row an item, by their names in a checkpoint."""
        named = {"table.weight": self.items.weight}
        for name, table in self.outputs.items():
            named["output.weight" if name == "all" else f"output_{name}.weight"] = table.weight
        return named if self.bias is None else {**named, "output_bias.weight": self.bias}

    def encoder(self) -> dict[str, nn.Parameter]:
        """All other parameters, by their names in a checkpoint."""
        named = {} if self.item_rnn is None else _prefixed("item_gru_layers", self.item_rnn)
        several = len(self.embeds) > 1
        for number, embed in enumerate(self.embeds):
            named |= embed.names_in(f"feature_embed_layer{f'.{number}' * several}")
        for number, rnn in enumerate(self.rnns):
            named |= _prefixed(f"feature_gru_layers{f'.{number}' * several}", rnn)
        named |= {} if self.dense is None else _prefixed("dense_layer", self.dense)
        named |= {} if self.weights is None else {"fusion_weights": self.weights}
        named |= {} if self.log_temperature is None else {"log_temperature": self.log_temperature}
        return {f"encoder.{name}": parameter for name, parameter in named.items()}

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a state, all of it."""
        for name, parameter in {**self.tables(), **self.encoder()}.items():
            # The projection of a vector is torch's own linear layer, [D, size].
            value = state[name].T if "vector_projection" in name else state[name]
            parameter.copy_(value.reshape(parameter.shape))

    def state(self) -> dict[str, torch.Tensor]:
        """As `load` takes it, with tables of [n, width]."""
        named = {name: parameter.detach() for name, parameter in {**self.tables(), **self.encoder()}.items()}
        return {
            name: value.T
            if "vector_projection" in name
            else value[:, None]
            if name.startswith("output_bias")
            else value
            for name, value in named.items()
        }


def _prefixed(prefix: str, module: nn.Module) -> dict[str, nn.Parameter]:
    return {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}


def padded(sessions: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs [B, L] and targets [B, L], padded with 0, and where there is a target."""
    inputs = pad_sequence([torch.from_numpy(session[:-1].astype(np.int64)) for session in sessions], batch_first=True)
    targets = pad_sequence([torch.from_numpy(session[1:].astype(np.int64)) for session in sessions], batch_first=True)
    return inputs, targets, targets > 0
