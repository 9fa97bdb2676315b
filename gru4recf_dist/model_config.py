"""The section `model` of the configuration: the architecture, and what each of its fusions has."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from gru4recf_dist.section import Section

Pooling = Literal["mean", "sum", "max"]
# Fusions whose output matrices act on the RNNs' outputs themselves; the others have a dense layer in between.
WITHOUT_DENSE = ("parallel", "shared_w", "interaction")
# Fusions that sum the RNNs' outputs with learned weights.
WEIGHTED = ("weighted_sum", "shared_w")


class ModelConfig(Section):
    """GRU4RecF. ``dropout`` acts on item embeddings (RecBole's only dropout) unless ``dropout_embedding`` is given.

    ``dropout: 0`` switches off every dropout, those that are given too. One behind the RNNs alone is any other
    ``dropout`` with ``dropout_embedding: 0``. docs/architectures.md has the formula of each ``fusion``.
    """

    fusion: Literal[
        "concat_input",
        "concat_output",
        "weighted_sum",
        "parallel",
        "shared_w",
        "interaction",
        "item_only",
        "feature_only",
    ] = "concat_output"
    features: list[str] | Literal["all"] = "all"
    feature_groups: list[Annotated[list[str], Field(min_length=1)]] | None = Field(
        None, min_length=1, description="an RNN for each group of features, [[a, b], [c]]; null: one for all of them"
    )
    event_features: list[str] | Literal["all"] = "all"
    event_input: Literal["auto", "items", "features"] = Field(
        "auto", description="RNN that event features go into; auto: the (first) one of the features, where there is one"
    )
    embedding_size: PositiveInt = 64
    hidden_size: PositiveInt = 128
    num_layers: PositiveInt = 1
    feature_sizes: dict[str, PositiveInt] = Field({}, description="(event) feature -> its embedding size, if not that")
    pooling: Pooling = "mean"
    feature_pooling: dict[str, Pooling] = Field({}, description="token_seq feature -> its pooling, if another one")
    fusion_weights: list[float] | None = Field(
        None, description="initial weights of the item RNN's and each feature RNN's output; null: equal, of sum 1"
    )
    output_table: Literal["auto", "tied", "untied"] = Field(
        "auto",
        description="whether item rows are output rows too, or outputs have a table of their own; auto: tied where "
        "there is a dense layer, else untied",
    )
    output_bias: bool = Field(False, description="a learned number for each item is added to its scores")
    dropout: float = Field(
        0.3, ge=0.0, lt=1.0, description="on item rows as inputs; 0 switches off every dropout, whatever the others are"
    )
    dropout_embedding: float | None = Field(
        None, ge=0.0, lt=1.0, description="on item rows as inputs, in place of dropout; null: as dropout"
    )
    dropout_feature: float = Field(0.0, ge=0.0, lt=1.0, description="on the embedded features, of items and events")
    dropout_hidden: float = Field(
        0.0, ge=0.0, lt=1.0, description="on the RNN outputs, once put together; and between their layers"
    )
    dropout_output: float = Field(0.0, ge=0.0, lt=1.0, description="on what is compared with the items")
    score: Literal["dot", "cosine"] = "dot"
    temperature: PositiveFloat = Field(1.0, description="scores are divided by it, the output bias is not")
    learn_temperature: bool = False

    @property
    def subnet_count(self) -> int:
        """RNNs, each with what belongs to it alone."""
        if self.fusion in ("item_only", "concat_input"):
            return 1
        return (self.fusion != "feature_only") + len(self.feature_groups or [[]])

    @property
    def tied(self) -> bool:
        """Whether item rows are output rows too."""
        return self.output_table == "tied" or (self.output_table == "auto" and self.fusion not in WITHOUT_DENSE)

    @property
    def input_dropout(self) -> float:
        """On item rows as inputs."""
        return self.dropout if self.dropout_embedding is None else self.dropout_embedding

    @model_validator(mode="after")
    def _zero_dropout_is_zero_everywhere(self) -> ModelConfig:
        if self.dropout == 0.0:
            self.dropout_embedding = None
            self.dropout_feature = self.dropout_hidden = self.dropout_output = 0.0
        return self

    @model_validator(mode="after")
    def _fusion_fits(self) -> ModelConfig:
        fusion, groups = self.fusion, self.feature_groups
        if groups is not None:
            if fusion in ("item_only", "concat_input"):
                raise ValueError(f"feature_groups is not for fusion {fusion}, which has no RNN of features")
            names = [name for group in groups for name in group]
            if len(set(names)) < len(names):
                raise ValueError("feature_groups names a feature twice")
            if self.features != "all" and set(self.features) != set(names):
                raise ValueError("feature_groups names other features than features (which may be left out)")
        if self.fusion_weights is not None:
            if fusion not in WEIGHTED:
                raise ValueError(f"fusion_weights is not for fusion {fusion} ({' and '.join(WEIGHTED)} have weights)")
            if len(self.fusion_weights) != self.subnet_count:
                raise ValueError(
                    f"fusion_weights must be {self.subnet_count}, the item RNN's and one for each RNN of features"
                )
        if fusion == "feature_only" and self.output_table == "untied":
            raise ValueError("output_table cannot be untied with fusion feature_only: item rows are outputs only")
        if fusion in WITHOUT_DENSE and self.tied and self.hidden_size != self.embedding_size:
            raise ValueError(
                f"output_table tied with fusion {fusion} needs hidden_size ({self.hidden_size}) to be "
                f"embedding_size ({self.embedding_size}): there is no dense layer in between"
            )
        return self
