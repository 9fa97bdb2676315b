"""Optimizers that touch the given rows only: their cost does not depend on the size of the table.

Each keeps its state in tensors with one entry a table row, so that it is sharded, checkpointed and resharded like the
table itself.
"""

from __future__ import annotations

import torch

from gru4recf_dist.config import TableConfig


class RowOptimizer:
    """Base class. ``state`` maps a name to a tensor [rows, ...]; ``steps`` counts the updates made."""

    def __init__(self, weight: torch.Tensor, config: TableConfig) -> None:
        self.weight, self.config = weight, config
        self.state: dict[str, torch.Tensor] = {}
        self.steps = 0

    def step(self, rows: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        """Update distinct ``rows`` (int64 [U], local) with their ``gradient`` [U, D]."""
        self.steps += 1
        if rows.numel():
            self._update(rows, gradient, lr)

    def _update(self, rows: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        raise NotImplementedError


class RowSGD(RowOptimizer):
    def _update(self, rows, gradient, lr):
        self.weight.index_add_(0, rows, gradient, alpha=-lr)


class RowwiseAdagrad(RowOptimizer):
    """Adagrad with one accumulator a row, of the mean squared gradient (as FBGEMM's EXACT_ROWWISE_ADAGRAD)."""

    def __init__(self, weight, config):
        super().__init__(weight, config)
        self.state["sum_of_squares"] = weight.new_zeros(weight.shape[0])

    def _update(self, rows, gradient, lr):
        total = self.state["sum_of_squares"].index_select(0, rows) + gradient.square().mean(dim=1)
        self.state["sum_of_squares"][rows] = total
        scale = -lr / (total.sqrt() + self.config.eps)
        self.weight.index_add_(0, rows, gradient * scale[:, None])


class RowAdagrad(RowOptimizer):
    """Adagrad (Duchi et al., JMLR 2011), one accumulator an element; as `torch.optim.Adagrad` on sparse gradients."""

    def __init__(self, weight, config):
        super().__init__(weight, config)
        self.state["sum_of_squares"] = torch.zeros_like(weight)

    def _update(self, rows, gradient, lr):
        total = self.state["sum_of_squares"].index_select(0, rows) + gradient.square()
        self.state["sum_of_squares"][rows] = total
        self.weight.index_add_(0, rows, gradient / (total.sqrt() + self.config.eps), alpha=-lr)


class LazyAdam(RowOptimizer):
    """Adam (Kingma & Ba, ICLR 2015, algorithm 1) that leaves untouched rows and their moments as they are.

    Bias is corrected by the table's step count, as `torch.optim.SparseAdam` does (which adds eps before it).
    """

    def __init__(self, weight, config):
        super().__init__(weight, config)
        self.state["first_moment"] = torch.zeros_like(weight)
        self.state["second_moment"] = torch.zeros_like(weight)

    def _update(self, rows, gradient, lr):
        beta1, beta2 = self.config.beta1, self.config.beta2
        first = torch.lerp(gradient, self.state["first_moment"].index_select(0, rows), beta1)
        second = torch.lerp(gradient.square(), self.state["second_moment"].index_select(0, rows), beta2)
        self.state["first_moment"][rows] = first
        self.state["second_moment"][rows] = second
        denominator = (second / (1 - beta2**self.steps)).sqrt_().add_(self.config.eps)
        self.weight.index_add_(0, rows, first / denominator, alpha=-lr / (1 - beta1**self.steps))


_OPTIMIZERS = {"sgd": RowSGD, "rowwise_adagrad": RowwiseAdagrad, "adagrad": RowAdagrad, "lazy_adam": LazyAdam}


def make_row_optimizer(weight: torch.Tensor, config: TableConfig) -> RowOptimizer:
    """The optimizer that ``config.optimizer`` names, for the rows of ``weight`` [rows, D]."""
    return _OPTIMIZERS[config.optimizer](weight, config)
