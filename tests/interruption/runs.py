"""Work of a second or two that a killed process goes on with: fits, trainings, an experiment.

Each run is called with a folder and the number of its life, and returns what came out when it is
done; all that it has from earlier lives is in the folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from marglik.stored_runs import Run
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.experiments.experiment import Experiment, Place, run_missing
from benchmarks.experiments.lines import Lines
from kfac_laplace import Checkpoint, Laplace, marglik_training
from kfac_laplace.optim import KFAC
from kfac_laplace.states.files import read, rewrite

MOVES = {"n_epochs_burnin": 1, "tune": "all"}


def fit(**options: Any) -> Callable[[Path, int], Any]:
    """A posterior over shuffled images, written after every batch."""

    def run(folder: Path, life: int) -> Any:
        place = Checkpoint(folder / "state", every=1)
        torch.manual_seed(5)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(64, 3),
        )  # fmt: skip
        data = TensorDataset(torch.randn(120, 1, 8, 8), torch.randint(0, 3, (120,)))
        # In what order batches come is the file's business once there is one.
        torch.manual_seed(life if Path(place.path).exists() else 0)
        loader = DataLoader(data, 4, shuffle=True)
        la = Laplace(model, prior_precision=2.0, **options).fit(loader, checkpoint=place)
        return [la.state_dict(), la.log_marginal_likelihood().detach(), la.sample(2)]

    return run


def training(name: str, kind: str, **options: Any) -> Callable[[Path, int], Any]:
    """A training loop that writes its whole state after every step and every round."""

    def run(folder: Path, life: int) -> Any:
        path, training = folder / "state", Run(name, kind, options)
        events, done = [*training.events()], 0
        torch.manual_seed(life)
        if path.exists():
            stored = read(path)
            done = stored["done"]
            training.load(stored["run"])
        else:
            torch.manual_seed(0)
        for event in events[done:]:
            training.do(event)
            done += 1
            rewrite({"done": done, "run": training.state()}, path)
        return training.result()

    return run


def loop(folder: Path, life: int) -> Any:
    """`marglik_training`, written after every step."""
    place = Checkpoint(folder / "state", every=1)
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))
    data = TensorDataset(torch.randn(30, 4), torch.randint(0, 3, (30,)))
    torch.manual_seed(life if Path(place.path).exists() else 0)
    loader = DataLoader(data, 5, shuffle=True)
    la, model, margliks, losses = marglik_training(
        model, loader, n_epochs=6, checkpoint=place, optimizer_cls=KFAC, **MOVES
    )
    return [la.state_dict(), dict(model.state_dict()), margliks, losses]


def trained(cell: Any, place: Place) -> dict[str, Any]:
    """A few steps of a small tuned network; numbers and a word."""
    run = Run(cell["network"], "adam", {**MOVES, "seed": cell["seed"]})
    for event in run.events():
        run.do(event)
    records, hyper = run.result()[:2]
    delta = hyper["prior_precision"].tolist()
    return {"evidence": [one["evidence"] for one in records], "delta": delta, "filling": "x" * 4000}


CELLS = [{"network": n, "seed": s} for s in range(3) for n in ("mlp-tanh", "mlp-regression")]
EXPERIMENT = Experiment(
    "made-up", "", lambda _: None, lambda _: CELLS, trained, lambda lines, folder: ""
)


def experiment(folder: Path, life: int) -> Any:
    """Cells of an experiment, each a line of a file when it is finished."""
    lines = Lines(folder / "lines.jsonl")
    failed = run_missing(EXPERIMENT, CELLS, lines, Place("cpu", None))
    assert not failed
    found = lines.read()
    assert [line.cell for line in found] == CELLS
    return [dict(line.found) for line in found]


RUNS: dict[str, Callable[[Path, int], Any]] = {
    "fit": fit(fisher="mc"),
    "fit-ekfac": fit(hessian_structure="ekfac"),
    "fit-lowrank": fit(hessian_structure="lowrank"),
    "tuner": training("mlp-regression", "adam", **MOVES),
    "tuner-shared": training("cnn", "shared", **MOVES),
    "kfac": training("masked", "kfac"),
    "kfac-damped": training("mlp-regression", "damped", **MOVES),
    "loop": loop,
    "experiment": experiment,
}
