"""Reward modelling as laplace-torch has it: the same evidence and rewards by the exact diagonal."""

import oracles
import torch
from peers import peer
from torch import nn

from kfac_laplace import Laplace


class Rewards(nn.Module):
    """As their users write it: pairs in training, single inputs afterwards."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x):
        if x.ndim == 3:
            return self.net(x.reshape(-1, x.shape[-1])).reshape(len(x), 2)
        return self.net(x)


def test_evidence_and_rewards():
    model = peer.seeded(Rewards)
    x, y = peer.data("classification", 2, 4, outputs=2)
    words = {"subset_of_weights": "all", "hessian_structure": "diag", "prior_precision": 0.6}
    theirs = peer.laplace.Laplace(model, "reward_modeling", **words)
    theirs.fit(peer.loader(x, y))
    ours = Laplace(model, "reward_modeling", prior_structure="scalar", **words)
    ours.fit(peer.loader(x, y))
    torch.testing.assert_close(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())
    for inputs in (x[:, 0], x):
        for mine, other in zip(ours(inputs), theirs(inputs), strict=True):
            torch.testing.assert_close(mine, other)


def test_their_kronecker_factors_of_pairs_are_twice_too_large():
    """They divide A by the number of pairs, where each has two rows; traces show it."""
    model = peer.seeded(Rewards)
    x, y = peer.data("classification", 2, 4, outputs=2)
    theirs = peer.laplace.Laplace(
        model, "reward_modeling", subset_of_weights="all", hessian_structure="kron"
    )
    theirs.fit(peer.loader(x, y))
    ours = Laplace(model, "reward_modeling", joint_bias=False, kfac_approx="expand")
    ours.fit(peer.loader(x, y))
    names = [name for name, _ in model.named_parameters()]
    exact = oracles.ggn(model, x, y, "classification", names)
    dense, start = theirs.H.to_matrix(), 0
    for name, parameter in model.named_parameters():
        part = slice(start, start := start + parameter.numel())
        if parameter.ndim == 2:
            own = ours.curvature.blocks[name].dense()
            torch.testing.assert_close(dense[part, part], 2 * own)
            wanted = exact[part, part]
            assert (own - wanted).norm() < (dense[part, part] - wanted).norm()
