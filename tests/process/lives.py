"""What a thread or another process does with a model of its own, from the weights to predictions.

Everything is made anew from a seed, by generators of its own: the same numbers whoever runs it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Attention, MicroViT, Pool
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kfac_laplace import Laplace, MarglikTuner
from kfac_laplace.optim import KFAC, Estimate


class Tokens(nn.Module):
    """An embedding, attention with a norm, and a mean over the tokens."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(9, 4), nn.LayerNorm(4)
        self.attention, self.head = Attention(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        return self.head((x + self.attention(self.norm(x))).mean(1))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Dropout(0.3),
        Pool(2, 3), nn.Linear(3, 3),
    )  # fmt: skip


#: Models by name, each with the shape of one input.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "cnn": (_cnn, (1, 4, 4)),
    "vit": (MicroViT, (1, 4, 4)),
    "tokens": (Tokens, (5,)),
}


def made(name: str, seed: int) -> tuple[nn.Module, TensorDataset]:
    """A float64 model and 13 examples, by the seed alone; torch initialises layers by its own."""
    draws = torch.Generator().manual_seed(seed)
    build, shape = MODELS[name]
    model = build().double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=draws, dtype=torch.float64))
    if name == "tokens":
        x = torch.randint(0, 9, (13, *shape), generator=draws)
    else:
        x = torch.randn(13, *shape, generator=draws, dtype=torch.float64)
    return model, TensorDataset(x, torch.randint(0, 3, (13,), generator=draws))


def batches(data: TensorDataset) -> list[tuple[Tensor, Tensor]]:
    """Of 5, 5 and 3."""
    return list(DataLoader(data, batch_size=5, generator=torch.Generator()))


def fit(
    model: nn.Module, data: TensorDataset, seed: int = 0, structure: str = "kron"
) -> list[Tensor]:
    """Fit, tune after training, calibrate, predict in each way."""
    loader, x = batches(data), data.tensors[0][:4]
    la = Laplace(model, "classification", hessian_structure=structure, seed=seed).fit(loader)
    found = [la.log_marginal_likelihood()]
    found += [la.optimize_prior().log_marginal_likelihood(), la.calibrate().posterior_scale]
    found += [la(x), la(x, link_approx="mc"), la(x, pred_type="nn", n_samples=5)]
    return [value.detach() for value in (*found, la.functional_samples(x, 3), la.sample(2))]


def tune(
    model: nn.Module, data: TensorDataset, seed: int = 0, structure: str = "kron"
) -> list[Tensor]:
    """Two epochs by K-FAC, with a round of the tuner after each. Dropout stays off: it draws."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    loader = batches(data)
    optimizer = KFAC(
        model, lr=1e-2, weight_decay=0, curvature=Estimate(every=2, bases_every=2), seed=seed
    )
    tuner = MarglikTuner(model, "classification", 13, hessian_structure=structure, seed=seed)
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            tuner.loss(model(x), y).backward()
            optimizer.step()
        tuner.step(loader)
    return [*(p.detach() for p in model.parameters()), *tuner.hyperparameters().values()]


LIVES = {"fit": fit, "tune": tune}


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two lives are equal bit by bit."""
    return len(one) == len(other) and all(map(torch.equal, one, other))


def put(queue: object, life: str, name: str, seed: int) -> None:
    """Target of a process: what became of a life, as lists, or the error."""
    torch.set_num_threads(1)
    try:
        queue.put([value.tolist() for value in LIVES[life](*made(name, seed), seed)])  # type: ignore[attr-defined]
    except BaseException as error:
        queue.put(repr(error))  # type: ignore[attr-defined]
        raise
