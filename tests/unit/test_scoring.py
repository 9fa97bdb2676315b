"""Scores: the transformation of candidate rows, and the float64 scores that define a rank."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from gru4recf_dist.model.scoring import exact_scores, transform_rows


def _float32(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.from_numpy((np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32))


def test_dot_leaves_rows_alone_and_cosine_gives_them_unit_length():
    rows = _float32(0, 7, 5).double()
    assert transform_rows(rows, "dot") is rows
    unit = transform_rows(rows, "cosine")
    for before, after in zip(rows.tolist(), unit.tolist(), strict=True):
        length = math.sqrt(sum(value * value for value in before))
        assert after == pytest.approx([value / length for value in before], rel=1e-14)


def test_a_zero_row_stays_zero_under_cosine_and_gets_a_finite_gradient():
    rows = torch.zeros(2, 3)
    rows[1] = torch.tensor([3.0, 0.0, 4.0])
    rows.requires_grad_()
    unit = transform_rows(rows, "cosine")
    assert torch.equal(unit[0], torch.zeros(3)) and torch.equal(unit[1], torch.tensor([0.6, 0.0, 0.8]))
    unit.sum().backward()
    assert rows.grad.isfinite().all()
    assert exact_scores(torch.ones(2, 3), rows.detach(), "cosine").tolist() == pytest.approx([0.0, 1.4], abs=1e-7)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_exact_scores_equal_rational_arithmetic_to_float64_rounding(scale):
    queries, rows = _float32(1, 20, 16), _float32(2, 20, 16, scale=scale)
    dots, cosines = exact_scores(queries, rows, "dot"), exact_scores(queries, rows, "cosine")
    assert dots.dtype == cosines.dtype == torch.float64
    for query, row, dot, cosine in zip(queries.tolist(), rows.tolist(), dots.tolist(), cosines.tolist(), strict=True):
        exact = sum(Fraction(a) * Fraction(b) for a, b in zip(query, row, strict=True))
        size = sum(abs(Fraction(a) * Fraction(b)) for a, b in zip(query, row, strict=True))
        length = math.sqrt(sum(Fraction(value) ** 2 for value in row))
        assert abs(Fraction(dot) - exact) <= 16 * Fraction(2) ** -53 * size
        assert cosine == pytest.approx(float(exact) / length, rel=0, abs=float(size) / length * 1e-14)


@pytest.mark.parametrize("score", ["dot", "cosine"])
def test_an_exact_score_has_the_same_bits_whatever_else_is_computed_with_it(score):
    queries, rows = _float32(3, 101, 24), _float32(4, 101, 24)
    together = exact_scores(queries, rows, score)
    for start, stop in [(0, 1), (3, 4), (5, 12), (17, 101)]:
        assert torch.equal(exact_scores(queries[start:stop], rows[start:stop], score), together[start:stop])
    strided = torch.stack([rows, rows], dim=2)[:, :, 1]
    assert not strided.is_contiguous() and torch.equal(exact_scores(queries, strided, score), together)


def test_exact_scores_tell_apart_rows_that_differ_in_the_last_bit():
    row = torch.tensor([[0.7, -0.3, 0.9]])
    other = row.clone()
    other[0, 2] = torch.nextafter(row[0, 2], torch.tensor(2.0))
    query = torch.tensor([[1.0, 1.0, 1e-3]])
    assert exact_scores(query, other, "dot") > exact_scores(query, row, "dot")
