"""What RecBole 1.2.1 does with an exported folder, written out: for where RecBole itself is not installed.

Reads the files as RecBole does and computes its scores on padded sessions with torch's own layers; shares no code with
the project.
"""

from __future__ import annotations

from pathlib import Path

import torch
import yaml


class ExportedModel:
    """The model of an exported folder on the data set in it."""

    def __init__(self, folder: Path) -> None:
        self.settings = yaml.safe_load((folder / "recbole.yaml").read_text())
        self.weights = torch.load(folder / "model.pth", weights_only=True)["state_dict"]
        base = folder / self.settings["dataset"] / self.settings["dataset"]
        events = [line.split("\t") for line in Path(f"{base}.inter").read_text().splitlines()[1:]]
        header, *lines = [line.split("\t") for line in Path(f"{base}.item").read_text().splitlines()]
        rows = {row[0]: row[1:] for row in lines}
        # Numbers follow the order of appearance: events, then items; a feature's values as the items stand.
        self.items = ["[PAD]", *dict.fromkeys([*(event[1] for event in events), *rows])]
        self.columns, self.vocabularies = {}, {}
        for place, (name, kind) in enumerate(column.split(":") for column in header[1:]):
            cells = {token: row[place] for token, row in rows.items()}
            if kind == "float":
                values = torch.tensor([0.0] + [float(cells[token]) for token in self.items[1:]])
                self.columns[name] = (kind, values)
                continue
            split = {token: cell.split(" ") if kind == "token_seq" else [cell] for token, cell in cells.items()}
            seen = ["[PAD]", *dict.fromkeys(value for token in rows for value in split[token] if value)]
            numbers = [[]] + [[seen.index(value) for value in split[token] if value] for token in self.items[1:]]
            longest = max(map(len, numbers))
            padded = torch.tensor([each + [0] * (longest - len(each)) for each in numbers])
            self.columns[name], self.vocabularies[name] = (kind, padded), seen

    def ids(self) -> tuple[list[str], dict[str, list[str]]]:
        return self.items, self.vocabularies

    def scores(self, session: list[str]) -> dict[str, float]:
        """Every item's score after a session, by token."""
        recent = session[-self.settings["MAX_ITEM_LIST_LENGTH"] :]
        items = torch.tensor([self.items.index(token) for token in recent])
        table, is_f = self.weights["item_embedding.weight"], self.settings["model"] == "GRU4RecF"
        outputs = [self._run("item_gru_layers" if is_f else "gru_layers", table[items])]
        if is_f:
            outputs.append(self._run("feature_gru_layers", self._features(items)))
        dense = "dense_layer" if is_f else "dense"
        output = torch.cat(outputs) @ self.weights[f"{dense}.weight"].T + self.weights[f"{dense}.bias"]
        return dict(zip(self.items[1:], (table @ output)[1:].tolist(), strict=True))

    def _run(self, name: str, events: torch.Tensor) -> torch.Tensor:
        layers, hidden = self.settings["num_layers"], self.settings["hidden_size"]
        gru = torch.nn.GRU(events.shape[1], hidden, layers, bias=False, batch_first=True)
        gru.load_state_dict({key[len(name) + 1 :]: w for key, w in self.weights.items() if key.startswith(f"{name}.")})
        with torch.no_grad():
            return gru(events[None])[0][0, -1]

    def _features(self, items: torch.Tensor) -> torch.Tensor:
        """[L, F*D], token fields first, then sequences, then floats."""
        prefix = "feature_embed_layer.{}_embedding_table.item.{}.weight"
        parts, offset, field, number = {"token": [], "token_seq": [], "float": []}, 0, 0, 0
        for name in self.settings["selected_features"]:
            kind, values = self.columns[name]
            if kind == "token":
                parts[kind].append(self.weights[prefix.format("token", "embedding")][offset + values[items, 0]])
                offset += len(self.vocabularies[name])
            elif kind == "token_seq":
                embedded = self.weights[prefix.format("token_seq", field)][values[items]]
                parts[kind].append(self._pooled(embedded, values[items] != 0))
                field += 1
            else:
                vector = self.weights[prefix.format("float", "embedding")][2 * number + 1]
                parts[kind].append(values[items][:, None] * vector)
                number += 1
        return torch.cat([part for kind in parts.values() for part in kind], dim=1)

    def _pooled(self, embedded: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        if self.settings["pooling_mode"] == "max":
            return embedded.masked_fill(~real[..., None], -1e9).amax(dim=1)
        total = (embedded * real[..., None]).sum(dim=1)
        return total if self.settings["pooling_mode"] == "sum" else total / real.sum(dim=1, keepdim=True).clamp(min=1)
