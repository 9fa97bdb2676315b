"""What the planner says that a loss costs for every logit, against the operations that torch makes of it."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gru4recf_dist import config as configuration
from gru4recf_dist.model.losses import NOTHING, sampled_softmax
from gru4recf_dist.model.ranking_losses import ranking_loss
from gru4recf_dist.planning import popularity
from gru4recf_dist.planning.workload import Workload

QUERIES, CANDIDATES, DIM = 64, 300, 8
# Exponentials, logistic functions and logarithms that each makes of a value.
FUNCTIONS = {
    **dict.fromkeys(("exp", "exp_", "exp2_", "sigmoid", "logsumexp"), 1),
    **dict.fromkeys(("_log_softmax", "_log_softmax_backward_data", "log_sigmoid_backward"), 1),
    **dict.fromkeys(("elu", "elu_backward"), 1),
    "log_sigmoid_forward": 2,
}
# Views, memory that is not touched yet, and what touches one value of a row.
FREE = ("detach", "t", "slice", "expand", "new_empty", "gather", "scatter_")


class _Operations(TorchDispatchMode):
    """Counts, over tensors of the size of all logits, reads and writes, and values of functions."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = self.functions = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if name not in FREE:
            # What `out` names is written, not read.
            reads = tree_leaves((args, {key: value for key, value in kwargs.items() if key != "out"}))
            touched = sum(_is_large(each) for each in [*reads, *tree_leaves(result)])
            self.passes += touched
            self.functions += FUNCTIONS.get(name, 0) * (touched > 0)
        return result


def _is_large(value) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == QUERIES * CANDIDATES


@pytest.mark.parametrize(
    ("loss", "elu_alpha"),
    [("sampled_softmax", 0.0), *product(["bpr", "bpr_max", "top1", "top1_max"], [0.0, 0.5])],
)
def test_the_cost_of_a_logit_is_that_of_the_operations_on_it(loss, elu_alpha):
    settings = ["data=x", "run_dir=x", "model.fusion=item_only", f"loss.name={loss}", f"loss.elu={elu_alpha}"]
    config = configuration.load(None, settings, training=False)
    cost = Workload(config, 1000, 1, 8.0, (), popularity.zipf(1000, 1.0)).logit_cost
    queries, positives, rows = (torch.randn(count, DIM, requires_grad=True) for count in (QUERIES, QUERIES, CANDIDATES))
    counts, exclude = torch.ones(CANDIDATES), torch.full((QUERIES,), NOTHING)
    saved: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        if _is_large(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with _Operations() as operations:
        if loss == "sampled_softmax":
            each = sampled_softmax(queries, positives, rows, counts, exclude)
        else:
            each = ranking_loss(loss, queries, positives, rows, counts, exclude, elu_alpha=elu_alpha)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            each.sum().backward()
    assert cost.functions == operations.functions
    assert cost.passes == operations.passes
    # Two or three more are in the making while these are kept.
    kept = sum(saved.values()) / (QUERIES * CANDIDATES * 4)
    assert kept < cost.blocks <= kept + 3
