"""Posteriors as folders in the layout of the Hugging Face Hub, and what they say of themselves.

The names are those that the Hub and its libraries look for; nothing here goes to the network.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from kfac_laplace.curvature.backend import Curvature
from kfac_laplace.errors import InvalidValue
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.predict.scaling import Scaling
from kfac_laplace.states.files import write, write_bytes
from kfac_laplace.version import __version__

POSTERIOR, CONFIG, CARD = "posterior.safetensors", "config.json", "README.md"
LIBRARY = "kfac_laplace"


def about(curvature: Curvature, posterior: Posterior, scaling: Scaling) -> dict[str, Any]:
    """A posterior in JSON, for people and programs that do not load it.

    Args:
        curvature: of the posterior.
        posterior: at today's hyperparameters.
        scaling: κ and τ.
    """
    options, hyper = curvature.options, posterior.hyperparameters
    deltas = posterior.prior.by_group(hyper.prior_precision.detach())
    return {
        "library_name": LIBRARY,
        "version": __version__,
        "architecture": type(curvature.network.model).__name__,
        "likelihood": type(curvature.likelihood).__name__,
        "hessian_structure": options.structure,
        "n_data": curvature.n_data,
        "n_parameters": posterior.prior.layouts.size,
        "prior_precision": {name: _span(delta) for name, delta in deltas.items()},
        "sigma_noise": float(hyper.sigma_noise),
        "temperature": float(hyper.temperature),
        "posterior_scale": float(scaling.scale),
        "predictive_temperature": float(scaling.temperature),
        "coverage": curvature.coverage,
    }


def _span(values: Tensor) -> float | list[float]:
    """One number, or the least and the largest."""
    low, high = float(values.min()), float(values.max())
    return low if low == high else [low, high]


def write_folder(
    folder: str | os.PathLike[str], state: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Write posterior.safetensors, config.json and, where there is none, README.md.

    Args:
        folder: made where it is not there.
        state: of the posterior.
        about: it in JSON.

    Raises:
        InvalidValue: a config.json of another library is there.
    """
    place = Path(folder)
    config = place / CONFIG
    if config.exists() and not _is_ours(config):
        raise InvalidValue(
            "the folder has a config.json of another library, which would be lost",
            where=str(config),
            remedy=f"Pass a folder of its own, such as {place / 'laplace'}",
        )
    place.mkdir(parents=True, exist_ok=True)
    write(state, place / POSTERIOR, about)
    write_bytes(f"{json.dumps(about, indent=2, ensure_ascii=False)}\n".encode(), config)
    if not (place / CARD).exists():  # people write in it
        write_bytes(card(about).encode(), place / CARD)


def _is_ours(config: Path) -> bool:
    try:
        found = json.loads(config.read_text("utf-8"))
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("library_name") == LIBRARY


def card(about: Mapping[str, Any]) -> str:
    """A model card: metadata for the Hub, what the posterior is, and how it is loaded.

    Args:
        about: the posterior in JSON.
    """
    treated: dict[str, int] = {}
    for treatment in about["coverage"].values():
        treated[treatment] = treated.get(treatment, 0) + 1
    rows = {
        "model": f"`{about['architecture']}`",
        "likelihood": f"`{about['likelihood']}`",
        "structure": f"`{about['hessian_structure']}`",
        "training examples": f"{about['n_data']:g}",
        "parameters in the posterior": f"{about['n_parameters']}",
        "treatment of the model's parameters": ", ".join(f"{n} {t}" for t, n in treated.items()),
        "kfac_laplace": about["version"],
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([FRONT, "| | |", "|---|---|", *lines, "", USE])


FRONT = f"""---
library_name: {LIBRARY}
tags:
- laplace-approximation
- bayesian-deep-learning
- uncertainty
---

# Laplace posterior

A Gaussian around the trained weights of a network, by K-FAC curvature.
"""
USE = f"""## Use

```python
from kfac_laplace import Laplace

la = Laplace.from_pretrained(folder, model)  # the model with the weights of the fit
predictive = la.predict(x)
```

`{POSTERIOR}` holds the posterior, without buffers and frozen weights of the model; `{CONFIG}` says
of it what people want to know, and is not read.
"""


def posterior_file(folder: str | os.PathLike[str]) -> Path:
    """The posterior of a folder that `write_folder` made.

    Raises:
        InvalidValue: no such folder, or none with a posterior.
    """
    place = Path(folder)
    if place.is_file():
        what, remedy = "a file, where a folder is wanted", "Pass its folder, or use Laplace.load"
    elif not place.is_dir():
        what = "no such folder"
        remedy = "Of a repository on the Hub pass huggingface_hub.snapshot_download(name)"
    elif not (place / POSTERIOR).exists():
        what, remedy = f"no {POSTERIOR} in the folder", "Pass one that save_pretrained made"
    else:
        return place / POSTERIOR
    raise InvalidValue(what, where=str(folder), remedy=remedy)
