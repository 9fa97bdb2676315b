"""What a fusion consists of, before a parameter exists: its RNNs, their features, and what their outputs meet.

A *subnet* is an RNN with what belongs to it alone: the item subnet, and a feature subnet for each group of features.
docs/architectures.md lists every fusion's, and what is shared.
"""

from __future__ import annotations

from dataclasses import dataclass

from gru4recf_dist.model.features import FeatureSpec
from gru4recf_dist.model_config import WITHOUT_DENSE, ModelConfig

ITEM, FEATURE = "item", "feature"
# Names of tables; that of the item rows is also the first part of their names in a checkpoint.
ITEM_TABLE, OUTPUT_TABLE, BIAS_TABLE = "table", "output", "output_bias"


@dataclass(frozen=True)
class OutputPart:
    """Columns of the queries [T, Q], and the table whose rows they are multiplied with.

    Attributes:
        table: its name.
        width: columns.
        score: `dot`, or `cosine`, where query and rows are brought to unit length within these columns.
        subnet: whose output this is, so that it is trained with it; None: of all of them.
    """

    table: str
    width: int
    score: str
    subnet: str | None


def has_item_subnet(config: ModelConfig) -> bool:
    """Whether an RNN sees the items themselves."""
    return config.fusion != "feature_only"


def feature_subnets(config: ModelConfig) -> list[str]:
    """Names of the subnets that see features only: `feature`, or `feature_0`, `feature_1`, ... of several groups."""
    if config.fusion in ("item_only", "concat_input"):
        return []
    groups = len(config.feature_groups or [[]])
    return [FEATURE] if groups == 1 else [f"{FEATURE}_{number}" for number in range(groups)]


def subnets(config: ModelConfig) -> list[str]:
    """Names of all subnets, in the order in which their outputs are put together."""
    return [ITEM] * has_item_subnet(config) + feature_subnets(config)


def event_subnet(config: ModelConfig) -> str | None:
    """The subnet whose RNN sees event features; None if `event_input` names one that the fusion has not."""
    of_items = [ITEM] if has_item_subnet(config) else []
    of_features = feature_subnets(config)
    wanted = {"auto": of_features + of_items, "items": of_items, "features": of_features}[config.event_input]
    return wanted[0] if wanted else None


def grouped(config: ModelConfig, specs: list[FeatureSpec]) -> list[list[FeatureSpec]]:
    """``specs`` by the RNN that sees them; without `feature_groups` all are one group.

    Raises:
        ValueError: there is no feature, and the fusion needs some.
    """
    if config.fusion == "item_only":
        return []
    if not specs:
        raise ValueError(f"fusion {config.fusion} needs at least one feature")
    if config.feature_groups is None:
        return [specs]
    by_name = {spec.name: spec for spec in specs}
    return [[by_name[name] for name in group] for group in config.feature_groups]


def output_parts(config: ModelConfig) -> list[OutputPart]:
    """What the queries consist of, in order."""
    names = subnets(config)
    if config.fusion == "parallel":
        parts = [
            OutputPart(
                ITEM_TABLE if name == ITEM and config.tied else f"{OUTPUT_TABLE}_{name}",
                config.hidden_size,
                config.score,
                name,
            )
            for name in names
        ]
    else:
        width = config.hidden_size if config.fusion in WITHOUT_DENSE else config.embedding_size
        only = names[0] if len(names) == 1 else None
        parts = [OutputPart(ITEM_TABLE if config.tied else OUTPUT_TABLE, width, config.score, only)]
    if config.output_bias:
        parts.append(OutputPart(BIAS_TABLE, 1, "dot", None))
    return parts


def subnet_of_table(config: ModelConfig, table: str) -> str | None:
    """The subnet that the table is trained with; None: with every one.

    Item rows are the item subnet's, as its inputs, even where they are the outputs of all.
    """
    if table == ITEM_TABLE and has_item_subnet(config):
        return ITEM
    return next(part.subnet for part in output_parts(config) if part.table == table)


def subnet_of_parameter(config: ModelConfig, name: str) -> str | None:
    """The subnet that the encoder's parameter ``name`` is trained with; None: with every one."""
    module, *rest = name.split(".")
    if module == "item_gru_layers" or (module == "feature_embed_layer" and config.fusion == "concat_input"):
        return ITEM
    if module == "event_inputs":
        return event_subnet(config)
    if module in ("feature_gru_layers", "feature_embed_layer"):
        names = feature_subnets(config)
        # Of several groups the modules are numbered.
        return names[0] if len(names) == 1 else names[int(rest[0])]
    return None
