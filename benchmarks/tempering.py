"""Does online tuning ask for too strong priors, and is the overestimated log-determinant why?

    python -m benchmarks.tempering [--seeds N] [--output FILE]

Tunes the demo's two networks online at several temperatures. Block-diagonal curvature overestimates
the log-determinant (see `benchmarks.log_determinants`), which the evidence answers with stronger
priors; a temperature below 1 gives the data more weight. Where that improves the test NLL, the
priors were too strong. Temperatures are compared on test images: this explains and chooses nothing.
Needs the extra [demo].
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from kfac_laplace.demo import metrics
from kfac_laplace.demo.answers import mode
from kfac_laplace.demo.classification import draw
from kfac_laplace.demo.methods import online_default
from kfac_laplace.demo.problem import Problem
from kfac_laplace.demo.settings import Settings
from kfac_laplace.states.files import write_text

TEMPERATURES = (1.0, 0.5, 0.25)


def main() -> None:
    """Print a line for each run and write all numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    for name in ("cnn", "vit"):
        for seed in range(options.seeds):
            for temperature in TEMPERATURES:
                rows.append(measure(name, seed, temperature))
                print(rows[-1], flush=True)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(rows, indent=1) + "\n", options.output)


def measure(name: str, seed: int, temperature: float) -> dict[str, float | int | str]:
    """Test and training NLL of one tuned network."""
    settings = Settings()
    recipe = replace(settings.images[name], temperature=temperature)
    settings = replace(settings, images={**settings.images, name: recipe})
    problem = Problem(name, draw(settings, seed), settings, seed)
    fit = online_default(problem)
    predict, data = mode(fit.model), problem.data
    return {
        "network": name,
        "seed": seed,
        "temperature": temperature,
        "test_nll": metrics.nll(predict(data.test.x).probs, data.test.y),
        "train_nll": metrics.nll(predict(data.train.x).probs, data.train.y),
    }


if __name__ == "__main__":
    main()
