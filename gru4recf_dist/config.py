"""The typed, validated configuration of training and evaluation.

YAML under `configs/` holds a recipe; `key.sub=value` on the command line overrides it; what results is written to the
run's folder as `config.yaml`. Every key, its default and its bounds are declared here (of the sections `model` and
`storage`: in `model_config` and `data.storage_config`) and nowhere else.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from gru4recf_dist import typed_yaml
from gru4recf_dist.data.storage_config import StorageConfig
from gru4recf_dist.errors import UserError
from gru4recf_dist.model_config import ModelConfig
from gru4recf_dist.section import Section


class LossConfig(Section):
    """The softmax is cross-entropy; the others are GRU4Rec's (`model.ranking_losses`), over the same sampled negatives.

    ``exact`` logQ corrects the negatives only, ``classic`` the positive too, ``off`` nothing: sampled softmax alone.
    """

    name: Literal["full_softmax", "sampled_softmax", "bpr", "bpr_max", "top1", "top1_max"] = "sampled_softmax"
    negatives: NonNegativeInt = Field(
        2048, description="K, drawn with replacement, shared by the global batch; 0: those of in_batch alone"
    )
    in_batch: NonNegativeInt | Literal["all"] = Field(
        0, description="M, further ones drawn from the targets of the global batch; all: each target once"
    )
    sampler: Literal["popularity", "log_uniform", "uniform"] = "popularity"
    alpha: NonNegativeFloat = Field(0.75, description="popularity sampler: drawn in proportion to count ** alpha")
    logq: Literal["exact", "classic", "off"] = "exact"
    regularization: NonNegativeFloat = Field(1.0, description="bpr_max only: on the negatives' scores")
    elu: NonNegativeFloat = Field(0.0, description="GRU4Rec's losses only: alpha of an ELU on all scores; 0: none")
    block_rows: PositiveInt = Field(256, description="rows of logits that exist at a time")

    @property
    def samples(self) -> bool:
        """Whether negatives are drawn: all losses but the full softmax."""
        return self.name != "full_softmax"

    @field_validator("logq", mode="before")
    @classmethod
    def _off_is_no_boolean(cls, given: Any) -> Any:
        # YAML reads an off without quotes as false.
        return "off" if given is False else given

    @model_validator(mode="after")
    def _something_is_drawn(self) -> LossConfig:
        if self.samples and not self.negatives and not self.in_batch:
            raise ValueError("negatives is 0, and so is in_batch: there would be no negative")
        if self.name == "sampled_softmax" and not self.negatives and self.logq != "off":
            # Nothing stands for the items that are no target of the batch.
            raise ValueError(
                "negatives is 0, so items outside the batch are never drawn, and no correction makes up for that: set "
                f"logq ({self.logq}) to off"
            )
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> LossConfig:
        for key, reason in _ignored_by(self.name).items():
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is not for {self.name}: {reason}")
        return self


def _ignored_by(loss: str) -> dict[str, str]:
    """The keys of the section that ``loss`` has no use for, and why."""
    ignored = {}
    if loss.endswith("softmax"):
        ignored["elu"] = "the scores of a softmax are taken as they are"
    if loss != "bpr_max":
        ignored["regularization"] = "bpr_max alone has it"
    if loss != "sampled_softmax":
        ignored["logq"] = "sampled_softmax alone has a correction"
    return ignored


class TableConfig(Section):
    """The sharded item table and its own optimizer."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: the encoder's; cpu: the host's memory, from where only the rows of a step travel"
    )
    optimizer: Literal["rowwise_adagrad", "adagrad", "lazy_adam", "sgd"] = "lazy_adam"
    lr: PositiveFloat = 0.002
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    beta2: float = Field(0.999, ge=0.0, lt=1.0)
    eps: PositiveFloat = 1e-8
    clip: PositiveFloat | None = Field(None, description="bound of the global norm of the rows' gradients")


class OptimizerConfig(Section):
    """The encoder's optimizer."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: PositiveFloat = 0.002
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    beta2: float = Field(0.999, ge=0.0, lt=1.0)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    clip: PositiveFloat | None = Field(None, description="bound of the global gradient norm of the encoder")


class LossScaleConfig(Section):
    """Dynamic loss scaling, for ``precision: fp16`` only; powers of two."""

    initial: float = Field(65536.0, ge=1.0)
    growth_steps: PositiveInt = Field(2000, description="steps without overflow after which the scale doubles")
    largest: float = Field(float(1 << 24), ge=1.0)


class NonFiniteConfig(Section):
    """Steps whose loss or gradients are not finite: no rank updates anything, and the batch is kept for a replay."""

    policy: Literal["stop", "skip"] = Field("stop", description="end the run, or go on with the next batch")
    max_skips: PositiveInt = Field(10, description="steps in a row that are skipped until the run ends")


class ScheduleConfig(Section):
    """Learning-rate factor, for encoder and table alike: linear warm-up, then the named decay to ``final``.

    ``plateau`` depends on the evaluations by ``early_stopping.metric`` and not on how long the run was to be.
    """

    name: Literal["constant", "linear", "cosine", "plateau"] = "constant"
    warmup_steps: NonNegativeInt = 0
    final: float = Field(0.0, ge=0.0, le=1.0, description="factor at the last step (linear, cosine)")
    plateau_patience: PositiveInt = Field(1, description="evaluations in a row without a better one until a drop")
    plateau_factor: float = Field(0.3, gt=0.0, lt=1.0, description="of each drop")
    plateau_threshold: float = Field(0.0, ge=0.0, lt=1.0, description="share of the best that a better one must add")


class TrainingConfig(Section):
    """Which subnets an update trains; the others are left as they are, to the bit (docs/architectures.md)."""

    strategy: Literal["simultaneous", "alternating", "residual", "interleaving"] = "simultaneous"
    epochs_per_phase: PositiveInt | list[PositiveInt] | None = Field(
        None, description="alternating, residual: epochs until the next subnet's turn, or a list of each one's"
    )

    def phase_epochs(self, subnets: int) -> list[int]:
        """Epochs of each subnet's turn."""
        given = 1 if self.epochs_per_phase is None else self.epochs_per_phase
        return given if isinstance(given, list) else [given] * subnets

    @model_validator(mode="after")
    def _phases_fit(self) -> TrainingConfig:
        if self.strategy in ("simultaneous", "interleaving") and self.epochs_per_phase is not None:
            raise ValueError(f"epochs_per_phase is not for strategy {self.strategy}, which has no phases of epochs")
        if self.strategy == "residual" and self.epochs_per_phase is None:
            raise ValueError("epochs_per_phase must be given with strategy residual")
        return self


class LoaderConfig(Section):
    """How sessions are read, cut and ordered."""

    max_length: PositiveInt = Field(50, description="most events that the RNNs see of a session at once")
    context: NonNegativeInt = Field(10, description="events by which the windows of a longer session overlap")
    shuffle_window: PositiveInt = Field(16384, description="sessions of a stream that are shuffled together")
    workers: NonNegativeInt = Field(0, description="loader processes a rank")
    on_bad_shard: Literal["fail", "skip"] = Field(
        "fail", description="skip: a damaged shard's sessions count as weight 0, and what was lost is reported"
    )

    @model_validator(mode="after")
    def _context_is_shorter(self) -> LoaderConfig:
        if self.context >= self.max_length:
            raise ValueError(f"context ({self.context}) must be less than max_length ({self.max_length})")
        return self


class EngineConfig(Section):
    """``deepspeed`` is handed on to DeepSpeed's own configuration."""

    name: Literal["ddp", "deepspeed"] = "ddp"
    deepspeed: dict[str, Any] = Field(default_factory=dict)

    @field_validator("deepspeed")
    @classmethod
    def _zero_stage_one_unless_said(cls, given: dict[str, Any]) -> dict[str, Any]:
        zero = given.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError("zero_optimization must be a mapping, such as {stage: 1}")
        return {**given, "zero_optimization": {"stage": 1, **zero}}


class EvaluationConfig(Section):
    """``protocol: auto`` takes what the data set was prepared for."""

    every_epochs: PositiveInt | None = 1
    every_steps: PositiveInt | None = None
    protocol: Literal["auto", "leave_one_out", "every_position"] = "auto"
    ks: list[PositiveInt] = Field([5, 10, 20], min_length=1)
    batch_sessions: PositiveInt = 256
    tile_rows: PositiveInt | None = Field(
        None, le=1 << 24, description="table rows that are scored at a time; null: as many as the cache, or GPU, holds"
    )
    ties: Literal["against", "for"] = Field("against", description="whether items of equal score rank above the target")
    baselines: bool = True


class EarlyStoppingConfig(Section):
    """Stop after ``patience`` evaluations in a row without a better ``metric``; null: never."""

    metric: str = "ndcg@10"
    window: PositiveInt = Field(
        1, description="evaluations whose mean is compared: with few validation sessions a single one may be luck"
    )
    patience: PositiveInt | None = 10


class CheckpointConfig(Section):
    """A checkpoint is also written at every evaluation that is the best so far and at the end."""

    every_steps: PositiveInt | None = None
    every_epochs: PositiveInt | None = 1
    keep_last: PositiveInt = 2
    in_background: bool = Field(
        True,
        alias="async",
        description="written while training goes on, from a copy in host memory; false: training waits, without a copy",
    )
    max_failures: PositiveInt = Field(3, description="checkpoints in a row that cannot be written until the run ends")


class MonitoringConfig(Section):
    log_every_steps: PositiveInt = 10
    profile_step: PositiveInt | None = Field(None, description="step at which the encoder's operations are counted")
    replica_check_steps: PositiveInt | None = Field(
        100, description="every so many steps the ranks compare their copies of the encoder; null: never"
    )
    slow_rank_factor: float = Field(2.0, gt=1.0, description="times the median of the other ranks' time that is slow")
    slow_rank_seconds: PositiveFloat = Field(60.0, description="for how long a rank is slow until it is named")
    tensorboard: bool = True
    progress: bool = True


class Config(Section):
    """One training run. ``batch_size`` is global: sessions a step over all ranks."""

    data: str
    run_dir: str
    init_from: str | None = Field(None, description="folder of a run whose best checkpoint this one starts from")
    seed: NonNegativeInt = 0
    max_epochs: PositiveInt | None = 20
    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = 128
    accumulation: PositiveInt = Field(1, description="micro-batches that a batch is worked through in")
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = Field(
        "fp32", description="of the encoder's matrix products; weights are float32, but float64 with fp64"
    )
    loss_scale: LossScaleConfig = LossScaleConfig()
    non_finite: NonFiniteConfig = NonFiniteConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    resume: Literal["auto", "never"] = "auto"
    timeout_seconds: PositiveInt = Field(1800, description="how long a collective waits for a missing rank")
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    table: TableConfig = TableConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    loader: LoaderConfig = LoaderConfig()
    engine: EngineConfig = EngineConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
    storage: StorageConfig = StorageConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.max_epochs is None and self.max_steps is None:
            raise ValueError("one of max_epochs and max_steps must be given")
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of accumulation ({self.accumulation})")
        self._check_strategy()
        return self

    def _check_strategy(self) -> None:
        strategy, subnets = self.training.strategy, self.model.subnet_count
        if strategy == "simultaneous":
            return
        if subnets == 1:
            raise ValueError(
                f"training.strategy: {strategy} trains one subnet at a time, and with model.fusion {self.model.fusion} "
                "there is only one"
            )
        if self.engine.name == "deepspeed":
            raise ValueError(f"training.strategy: {strategy} needs engine.name ddp (DeepSpeed cannot leave parts out)")
        epochs = self.training.phase_epochs(subnets)
        if len(epochs) != subnets:
            raise ValueError(f"training.epochs_per_phase: {len(epochs)} numbers for {subnets} subnets")
        before_last = sum(epochs[:-1])
        if strategy != "interleaving" and self.max_epochs is not None and self.max_epochs <= before_last:
            raise ValueError(
                f"training.epochs_per_phase: the last subnet's turn begins after {before_last} epochs, and max_epochs "
                f"is {self.max_epochs}"
            )


def load(path: str | None, overrides: list[str], training: bool = True) -> Config:
    """Read a recipe with overrides.

    Args:
        training: whether it is to train with; then early stopping's metric must be among those that are measured.

    Raises:
        UserError: as `typed_yaml.load`.
    """
    config = typed_yaml.load(Config, path, overrides)
    metric, ks = config.early_stopping.metric, config.evaluation.ks
    name, _, k = metric.partition("@")
    if training and (name not in ("hit", "recall", "ndcg", "mrr") or not k.isdigit() or int(k) not in ks):
        known = ", ".join(f"ndcg@{k}" for k in ks)
        raise UserError(f"early_stopping.metric '{metric}' is not measured (try {known})")
    return config


def load_stored(url: str, overrides: list[str]) -> Config:
    """Read the `config.yaml` of a run's folder, with overrides.

    Earlier versions accepted settings that the run's loss ignored. They made no difference: of what is stored they are
    left out, and refused where they are newly given.

    Raises:
        UserError: as `typed_yaml.load`.
    """
    return typed_yaml.load(Config, url, overrides, _without_ignored)


def _without_ignored(content: dict[str, Any]) -> dict[str, Any]:
    loss = content.get("loss")
    if not isinstance(loss, dict):
        return content
    ignored = _ignored_by(str(loss.get("name", LossConfig.model_fields["name"].default)))
    return {**content, "loss": {key: value for key, value in loss.items() if key not in ignored}}
