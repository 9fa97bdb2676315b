"""Row-wise optimizers against torch's sparse ones, and against their formulas where torch has none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gru4recf_dist.config import TableConfig
from gru4recf_dist.table.row_optimizers import make_row_optimizer

ROWS, D, STEPS, LR = 12, 3, 7, 0.05
UNTOUCHED = [4, 11]
NAMES = ["sgd", "rowwise_adagrad", "adagrad", "lazy_adam"]


def _start(dtype=torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal((ROWS, D))).to(dtype)


def _updates() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Different rows at every step, none at one of them; some rows at most once."""
    generator = np.random.default_rng(1)
    free = [row for row in range(ROWS) if row not in UNTOUCHED]
    updates = []
    for count in [4, 1, 10, 0, 6, 3, 2][:STEPS]:
        rows = torch.from_numpy(np.sort(generator.choice(free, count, replace=False)).astype(np.int64))
        scale = 10.0 ** generator.integers(-3, 3)
        updates.append((rows, torch.from_numpy(generator.standard_normal((count, D)) * scale)))
    return updates


def _ours(name: str, **config) -> list[torch.Tensor]:
    """The table after every step."""
    weight = _start()
    optimizer = make_row_optimizer(weight, TableConfig(optimizer=name, **config))
    history = []
    for step, (rows, gradient) in enumerate(_updates()):
        optimizer.step(rows, gradient, LR * (1 + step % 2))
        history.append(weight.clone())
    return history


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    ("name", "make", "config"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, lr=LR), {}),
        ("adagrad", lambda p: torch.optim.Adagrad(p, lr=LR, eps=1e-3), {"eps": 1e-3}),
        (
            # SparseAdam adds eps before the bias correction of the second moment, Adam after it: equal for a small eps.
            "lazy_adam",
            lambda p: torch.optim.SparseAdam(p, lr=LR, betas=(0.8, 0.95), eps=1e-20),
            {"eps": 1e-20, "beta1": 0.8, "beta2": 0.95},
        ),
        (
            "lazy_adam",
            lambda p: torch.optim.SparseAdam(p, lr=LR, betas=(0.0, 0.999), eps=1e-20),
            {"beta1": 0.0, "eps": 1e-20},
        ),
    ],
    ids=["sgd", "adagrad", "lazy_adam", "lazy_adam without momentum"],
)
def test_every_step_equals_torchs_optimizer_on_a_sparse_embedding(name, make, config):
    embedding = torch.nn.Embedding(ROWS, D, sparse=True, dtype=torch.float64)
    embedding.weight.data = _start()
    theirs = make([embedding.weight])
    for step, ((rows, gradient), ours) in enumerate(zip(_updates(), _ours(name, **config), strict=True)):
        theirs.zero_grad()
        (embedding(rows) * gradient).sum().backward()
        for group in theirs.param_groups:
            group["lr"] = LR * (1 + step % 2)
        theirs.step()
        torch.testing.assert_close(ours, embedding.weight.detach(), rtol=1e-12, atol=1e-14)


def test_rowwise_adagrad_equals_its_formula_with_one_accumulator_a_row():
    weight, total = _start().numpy().copy(), np.zeros(ROWS)
    for step, ((rows, gradient), ours) in enumerate(zip(_updates(), _ours("rowwise_adagrad", eps=1e-2), strict=True)):
        for row, values in zip(rows.tolist(), gradient.numpy(), strict=True):
            total[row] += sum(value**2 for value in values) / D
            weight[row] -= LR * (1 + step % 2) * values / (np.sqrt(total[row]) + 1e-2)
        np.testing.assert_allclose(ours.numpy(), weight, rtol=1e-12, atol=1e-14)


def test_lazy_adam_equals_algorithm_1_of_the_paper_on_the_rows_it_touches():
    beta1, beta2, eps = 0.7, 0.9, 0.1
    weight, first, second = _start().numpy().copy(), np.zeros((ROWS, D)), np.zeros((ROWS, D))
    history = _ours("lazy_adam", beta1=beta1, beta2=beta2, eps=eps)
    for t, ((rows, gradient), ours) in enumerate(zip(_updates(), history, strict=True), start=1):
        for row, g in zip(rows.tolist(), gradient.numpy(), strict=True):
            first[row] = beta1 * first[row] + (1 - beta1) * g
            second[row] = beta2 * second[row] + (1 - beta2) * g**2
            corrected = first[row] / (1 - beta1**t), second[row] / (1 - beta2**t)
            weight[row] -= LR * (1 + (t - 1) % 2) * corrected[0] / (np.sqrt(corrected[1]) + eps)
        np.testing.assert_allclose(ours.numpy(), weight, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_untouched_rows_and_their_state_keep_every_bit(name):
    weight = _start(torch.float32)
    optimizer = make_row_optimizer(weight, TableConfig(optimizer=name))
    for rows, gradient in _updates():
        # A fresh table differs from one in training: state that must not move has to be non-zero somewhere.
        before = {"weight": weight.clone(), **{key: value.clone() for key, value in optimizer.state.items()}}
        optimizer.step(rows, gradient.float().sign(), LR)
        others = [row for row in range(ROWS) if row not in rows.tolist()]
        for key, old in before.items():
            new = weight if key == "weight" else optimizer.state[key]
            assert torch.equal(new[others], old[others]), key
            assert not len(rows) or not torch.equal(new[rows], old[rows]), key
    assert torch.equal(weight[UNTOUCHED], _start(torch.float32)[UNTOUCHED])


@pytest.mark.parametrize("name", NAMES)
def test_state_has_an_entry_for_every_row_and_the_weights_type(name):
    weight = _start(torch.float32)
    optimizer = make_row_optimizer(weight, TableConfig(optimizer=name))
    rows, gradient = _updates()[0]
    optimizer.step(rows, gradient.float(), LR)
    for value in optimizer.state.values():
        assert len(value) == ROWS and value.dtype == torch.float32
    assert optimizer.weight is weight
    assert len(optimizer.state) == {"sgd": 0, "lazy_adam": 2}.get(name, 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_of_zero_changes_no_weight_of_a_fresh_row(name):
    """The padding row of a rank's dummy session and of context events is read, with gradient zero."""
    weight = _start(torch.float32)
    make_row_optimizer(weight, TableConfig(optimizer=name)).step(torch.tensor([0, 5]), torch.zeros(2, D), LR)
    assert torch.equal(weight, _start(torch.float32))


def test_a_step_without_rows_counts_for_adams_bias_correction():
    """Every rank counts the same steps, whether or not any of its rows was touched."""
    optimizer = make_row_optimizer(_start(), TableConfig(optimizer="lazy_adam"))
    for rows, gradient in _updates():
        optimizer.step(rows, gradient, LR)
    assert optimizer.steps == STEPS
