"""How the blocks of a layer compare with the exact GGN, measured and put into words."""

from __future__ import annotations

from dataclasses import dataclass

import oracles
import torch
from architectures.kind import Kind
from cases import Case
from laws import EXACT, fitted, negligible, relative_error
from torch import Tensor

from kfac_laplace import Curvature


@dataclass(frozen=True)
class Verdict:
    """Parameters of a layer that are treated alike.

    Args:
        params: their names inside the layer.
        treatment: the structure of their block.
        exactness: what of it equals the exact GGN block, or its diagonal.
    """

    params: tuple[str, ...]
    treatment: str
    exactness: str


def verdicts(kind: Kind) -> list[Verdict]:
    """Fit the smallest network around a layer and compare its blocks with the dense oracle."""
    example = kind.case()
    curvature = fitted(example)
    biases = exact_biases(kind)
    linear = exact_weights(kind) if kind.linear else {}
    found: dict[tuple[str, str], list[str]] = {}
    for group in curvature.groups:
        names = own_names(group.layout.params)
        if not names:
            continue
        if group.treatment != "kron":
            assert_exact(example, curvature, group.name)
        claims = [linear.get(group.name), *(biases.get(name) for name in group.layout.params)]
        treatment = TREATMENTS[group.treatment, group.role == "generic"]
        if group.treatment == "kron" and group.layout.matrix[0] > 1:
            treatment += f", {group.layout.matrix[0]} blocks"
        exactness = EXACT_PART.get(group.treatment) or "; ".join(filter(None, claims)) or "no"
        found.setdefault((treatment, exactness), []).extend(names)
    return [Verdict(tuple(names), *key) for key, names in found.items()]


TREATMENTS = {
    ("kron", False): "Kronecker",
    ("dense", False): "dense",
    ("diag", False): "diagonal",
    ("diag", True): "diagonal, by example",
}
EXACT_PART = {"dense": "yes", "diag": "its diagonal"}


def own_names(params: tuple[str, ...]) -> list[str]:
    """Names inside the layer; nothing for the head."""
    return [
        name.removeprefix("layer.").removeprefix("inner.")
        for name in params
        if name.startswith("layer.")
    ]


def assert_exact(example: Case, curvature: Curvature, name: str) -> None:
    """A dense block is the exact one, a diagonal block its diagonal."""
    block = curvature.blocks[name]
    exact = oracles.ggn(example.model, *example.data, list(block.params))
    exact = exact if block.kind == "dense" else exact.diagonal().diag()
    assert relative_error(block.dense(), exact, negligible(curvature)) < EXACT, name


def exact_biases(kind: Kind) -> dict[str, str]:
    """Biases with Kronecker factors whose own blocks are exact under reduce."""
    example = kind.case()
    curvature = fitted(example, kfac_approx="reduce", joint_bias=False)
    found = {}
    for group in curvature.groups:
        if group.role == "bias":
            sameness = compared(example, curvature, group.name)
            if sameness is not None:
                found[group.name] = f"bias under reduce{sameness}"
    return found


def exact_weights(kind: Kind) -> dict[str, str]:
    """Layers, with their biases, that are exact in a linear network with Gaussian outputs."""
    settings: dict[str, dict[str, str]] = {}
    for setting in ("reduce", "expand"):
        example = kind.linear_case(keeps_positions=setting == "expand")
        curvature = fitted(example, kfac_approx=setting)
        for group in curvature.groups:
            sameness = compared(example, curvature, group.name)
            if sameness is not None:
                settings.setdefault(group.name, {})[setting] = sameness
    found = {}
    for name, by_setting in settings.items():
        (sameness,) = set(by_setting.values())
        which = "" if len(by_setting) == 2 else f" under {next(iter(by_setting))}"
        found[name] = f"in linear networks{which}{sameness}"
    return found


def compared(example: Case, curvature: Curvature, name: str) -> str | None:
    """ "" if a block is exact, ", block by block" if its parts are; None if neither."""
    block = curvature.blocks[name]
    exact = oracles.ggn(example.model, *example.data, list(block.params))
    floor = negligible(curvature)
    if relative_error(block.dense(), exact, floor) < EXACT:
        return ""
    part = matrix_of_entries(curvature, name)
    inside = exact * (part[:, None] == part)
    return ", block by block" if relative_error(block.dense(), inside, floor) < EXACT else None


def matrix_of_entries(curvature: Curvature, name: str) -> Tensor:
    """For each entry of a block's parameters, flattened, the index of its matrix."""
    layout = curvature.blocks[name].layout
    b, o, i = layout.matrix
    tensors = layout.unpack(torch.arange(b)[:, None, None].expand(b, o, i))
    return torch.cat([tensors[param].flatten() for param in layout.params])
