"""Scores are dot products of queries and candidate rows; the cosine score is one of normalised vectors."""

from __future__ import annotations

import torch

# Keeps a zero vector at zero instead of NaN.
_SMALLEST_NORM = 1e-12


def transform_rows(rows: torch.Tensor, score: str) -> torch.Tensor:
    """Table rows [n, D] as the candidates that ``score`` compares queries with: unchanged, or of unit length."""
    if score == "dot":
        return rows
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=_SMALLEST_NORM)


def exact_scores(queries: torch.Tensor, rows: torch.Tensor, score: str) -> torch.Tensor:
    """Score of each pair (queries[i], rows[i]) in float64, [n]: what a rank is defined by.

    The sums run over D in a fixed order and element by element, so a pair's score is the same to the last bit whatever
    other pairs it is computed with: a matrix product does not promise that.

    Args:
        queries: [n, D], the encoder's output.
        rows: [n, D], table rows before any transformation.
    """
    # Columns as they are read.
    queries, rows = (
        queries.T.double(memory_format=torch.contiguous_format),
        rows.T.double(memory_format=torch.contiguous_format),
    )
    total = queries.new_zeros(queries.shape[1])
    squares = torch.zeros_like(total)
    for left, right in zip(queries, rows, strict=True):
        total += left * right
        squares += right * right
    if score == "dot":
        return total
    return total / squares.sqrt().clamp(min=_SMALLEST_NORM)
