"""Where K-FAC-reduce sees no curvature although there is some, the log says so."""

from __future__ import annotations

from laws import fitted, seeded_case
from torch import Tensor, nn


def test_reduce_says_where_it_sees_no_curvature(caplog):
    """Softmax ignores a shift of all keys, so their gradients cancel over the tokens."""
    with caplog.at_level("WARNING", logger="kfac_laplace"):
        fitted("vit", kfac_approx="expand")
        assert not caplog.records
        reduce = fitted("vit", kfac_approx="reduce")
    assert len(caplog.records) == 1 and "attention.k.weight" in caplog.text
    assert "attention.q" not in caplog.text and "'expand'" in caplog.text
    assert reduce.blocks["attention.k.weight"].factors.output.abs().max() < 1e-12
    caplog.clear()
    fitted("vit", kfac_approx={"*attention.k*": "expand", "*": "auto"})
    assert not caplog.records


def test_reduce_sees_the_keys_of_a_packed_projection_vanish(caplog):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x)[0].mean(1))

    with caplog.at_level("WARNING", logger="kfac_laplace"):
        fitted(seeded_case(Packed, (3, 4)), kfac_approx="reduce")
    assert len(caplog.records) == 1 and "attention.in_proj_weight" in caplog.text
