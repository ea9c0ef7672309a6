"""Global generators that several threads use."""

from __future__ import annotations

import threading

import torch
from process.lives import same
from process.threads import LONG, Process, at_once
from torch import Tensor
from torch.distributions import StudentT

from kfac_laplace.curvature.model.random_states import random_states_kept, seed_everywhere
from kfac_laplace.likelihoods.distributions import draw
from kfac_laplace.process import draws_kept


def test_seeds_of_one_thread_stay_beside_passes_of_another():
    """Who puts states back in the meantime leaves these; in the end all are as before both."""
    inside, seeded, left = (threading.Event() for _ in range(3))
    device, process = torch.device("cpu"), Process()

    def seeding() -> Tensor:
        assert inside.wait(LONG)
        with random_states_kept(device):
            seed_everywhere(device, 5)
            seeded.set()
            assert left.wait(LONG)
            return torch.rand(3)

    def passing() -> None:
        with draws_kept():
            with draws_kept():
                inside.set()
                assert seeded.wait(LONG)
            left.set()

    drawn, _ = at_once(seeding, passing)
    process.check()
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(5)))


def test_draws_of_distributions_are_those_of_their_generators():
    rows = StudentT(torch.full((200,), 3.0))
    draws = [torch.Generator().manual_seed(k) for k in range(4)]
    want, process = [[draw(rows, one) for _ in range(50)] for one in draws], Process()
    again = [torch.Generator().manual_seed(k) for k in range(4)]
    calls = [lambda one=one: [draw(rows, one) for _ in range(50)] for one in again]
    for got, expected in zip(at_once(*calls), want, strict=True):
        assert same(got, expected)
    process.check()
