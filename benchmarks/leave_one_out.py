"""Can leave-one-out on the training data stand in for test data when κ is chosen?

    python -m benchmarks.leave_one_out [--seeds N] [--output FILE]

For the demo's two networks, trained plainly (with a post-hoc prior) and tuned online, compares what
leave-one-out says about the training images with what the test images say: accuracy, NLL at κ = 0,
and the κ that each would choose. Also counts leverages above 1 in the K-FAC posterior's own
covariances, which is why leave-one-out does not use those. Needs the extra [demo].
"""

import argparse
import json
from pathlib import Path

import torch

from kfac_laplace import Laplace
from kfac_laplace.demo.classification import draw
from kfac_laplace.demo.methods import default_map, online_default
from kfac_laplace.demo.problem import Problem, in_order
from kfac_laplace.demo.settings import Settings
from kfac_laplace.posterior.calibrate.held_out import (
    HeldOut,
    negative_log_likelihood,
    validation_points,
)
from kfac_laplace.posterior.calibrate.leave_one_out import leave_one_out_points, leave_out
from kfac_laplace.posterior.calibrate.scale import best_scale
from kfac_laplace.posterior.predict.glm import output_gaussian
from kfac_laplace.states.files import write_text

Row = dict[str, float | int | str]


def main() -> None:
    """Print a line for each posterior and write all numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    settings, rows = Settings(), []
    for name in settings.models:
        for seed in range(options.seeds):
            problem = Problem(name, draw(settings, seed), settings, seed)
            for training, la in posteriors(problem).items():
                row: Row = {"network": name, "training": training, "seed": seed}
                rows.append(row | measure(la, problem))
                print(rows[-1], flush=True)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(rows, indent=1) + "\n", options.output)


def posteriors(problem: Problem) -> dict[str, Laplace]:
    """Default posteriors of a plainly trained and of a tuned network."""
    plain = Laplace(default_map(problem).model, "classification")
    tuned = online_default(problem).tuner
    assert tuned is not None
    return {
        "MAP": plain.fit(in_order(problem)).optimize_prior(),
        "online": tuned.laplace(in_order(problem)),
    }


def measure(la: Laplace, problem: Problem) -> dict[str, float]:
    """Leave-one-out against test data."""
    posterior, data = la.posterior, problem.data
    left_out = leave_one_out_points(posterior, in_order(problem), "labels", seed=0)
    test = validation_points(posterior, [*zip(*(part.split(256) for part in data.test))], "labels")  # noqa: B905
    kappa, best = (best_scale(la.likelihood, p, la.sigma_noise) for p in (left_out, test))
    outputs = output_gaussian(posterior, la.curvature.network.batch(data.train.x)).double()
    _, leverage = leave_out(outputs.covariance[:, 0], la.likelihood.hessian(outputs.mean)[:, 0])

    def nll(points: HeldOut, scale: float) -> float:
        return negative_log_likelihood(la.likelihood, points, la.sigma_noise, scale)

    return {
        "accuracy_left_out": accuracy(left_out),
        "accuracy_test": accuracy(test),
        "nll_left_out": nll(left_out, 0.0),
        "nll_test": nll(test, 0.0),
        "kappa_left_out": kappa,
        "kappa_test": best,
        "nll_test_at_kappa_left_out": nll(test, kappa),
        "nll_test_at_1": nll(test, 1.0),
        "leverages_above_1": float((leverage > 1).double().mean()),
    }


def accuracy(points: HeldOut) -> float:
    """Share of points whose largest mean output is at their class."""
    return float((points.mean.argmax(-1) == points.target).double().mean())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
