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
    queries, rows = queries.double(), rows.double()
    total = torch.zeros(len(queries), dtype=torch.float64, device=queries.device)
    squares = torch.zeros_like(total)
    for column in range(queries.shape[1]):
        value = rows[:, column]
        total += queries[:, column] * value
        squares += value * value
    if score == "dot":
        return total
    return total / squares.sqrt().clamp(min=_SMALLEST_NORM)
