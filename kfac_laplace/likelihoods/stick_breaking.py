"""Roots of the curvature of a softmax, column by column."""

import torch
import torch.nn.functional as F
from torch import Tensor


class StickBreaking:
    """Cholesky columns S_0 … S_{C−2} of diag(p) − p pᵀ, without any C×C matrix.

    With tails q_c = Σ_{j ≥ c} p_j: S[c, c] = √(p_c q_{c+1} / q_c) and
    S[j > c, c] = −p_j / q_{c+1} · S[c, c].

    Args:
        p: probabilities (n, t, c).
    """

    def __init__(self, p: Tensor):
        self._p = p
        # A reverse cumulative sum: 1 − cumsum loses the small tails to cancellation.
        tail = _tails(p)
        tiny = torch.finfo(p.dtype).tiny
        self._rest = tail[..., 1:].clamp_min(tiny)
        self._pivots = (p[..., :-1] * tail[..., 1:] / tail[..., :-1].clamp_min(tiny)).sqrt()

    def column(self, c: int) -> Tensor:
        """S_c, shape (n, t, c)."""
        pivot = self._pivots[..., c, None]
        below = -(self._p[..., c + 1 :] / self._rest[..., c, None]) * pivot
        return torch.cat([torch.zeros_like(self._p[..., :c]), pivot, below], -1)

    def mixed(self, coefficients: Tensor) -> Tensor:
        """Σ_c coefficients_c S_c in O(n t c), for coefficients (n, t, c − 1)."""
        pivots = coefficients * self._pivots
        above = (pivots / self._rest).cumsum(-1)
        return F.pad(pivots, (0, 1)) - self._p * F.pad(above, (1, 0))

    def squares(self) -> Tensor:
        """|S_c|², shape (n, t, c − 1)."""
        below = _tails(self._p.square())[..., 1:].sqrt() / self._rest
        return self._pivots.square() * (1 + below.square())


def _tails(values: Tensor) -> Tensor:
    """Σ_{j ≥ c} of the values along the last axis."""
    return values.flip(-1).cumsum(-1).flip(-1)
