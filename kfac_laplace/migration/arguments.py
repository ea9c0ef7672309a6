"""Arguments of predictions as laplace-torch orders and names them, in this library's order."""

from collections.abc import Mapping

from torch import Tensor

from kfac_laplace.curvature.gradients.groups import Subset
from kfac_laplace.curvature.gradients.subnetwork import GivenSubnetwork
from kfac_laplace.errors import InvalidType
from kfac_laplace.likelihoods.links import Link


def number(n: int, n_samples: int | None) -> int:
    """The number of draws, by either name."""
    if n_samples is None:
        return n
    if n != 100:
        raise _twice("n_samples", "n", f"{n_samples} and n={n}")
    return n_samples


def counted(n: int | str, n_samples: int | None, pred_type: str) -> tuple[int, str]:
    """The number of draws and how they are made.

    Args:
        n: their number, or what stands there in laplace-torch, `pred_type`.
        n_samples: their number by that name, or None.
        pred_type: how they are made.
    """
    if not isinstance(n, str):
        return number(n, n_samples), pred_type
    if pred_type not in ("glm", n):
        raise _twice("pred_type", "the argument before", f"{pred_type!r} and {n!r}")
    return number(100, n_samples), n


def ordered(link_approx: Link | bool, joint: bool | Link) -> tuple[Link, bool]:
    """`link_approx` and `joint`, which laplace-torch has the other way round by position."""
    if isinstance(link_approx, bool):
        link_approx, joint = joint if isinstance(joint, str) else "auto", link_approx
    if not isinstance(joint, bool):
        raise InvalidType("neither True nor False", where="joint", got=repr(joint))
    return link_approx, joint


def chosen_subset(
    subset_of_weights: Subset | GivenSubnetwork,
    subnetwork_indices: Tensor | None,
    subnetwork_mask: GivenSubnetwork | None,
) -> Subset | GivenSubnetwork:
    """`subset_of_weights` where "subnetwork" stands for what a second argument holds.

    Args:
        subset_of_weights: the subset, or "subnetwork".
        subnetwork_indices: int64 indices of `parameters_to_vector`.
        subnetwork_mask: a boolean mask of it, or masks by parameter name.

    Raises:
        InvalidType: "subnetwork" without either of the two, with both, or either without it.
    """
    given = {"subnetwork_indices": subnetwork_indices, "subnetwork_mask": subnetwork_mask}
    named = [name for name, value in given.items() if value is not None]
    wanted = isinstance(subset_of_weights, str) and subset_of_weights == "subnetwork"
    if wanted != (len(named) == 1):
        raise InvalidType(
            "a subnetwork is one set of indices or one mask",
            where="subset_of_weights",
            got=" and ".join([repr(subset_of_weights), *named]),
            remedy="Pass subset_of_weights='subnetwork' with subnetwork_indices, or the indices or "
            "a mask as subset_of_weights itself",
        )
    found = given[named[0]] if wanted else subset_of_weights
    assert isinstance(found, Tensor | Mapping) or found is subset_of_weights
    return found


def _twice(where: str, other: str, got: str) -> InvalidType:
    return InvalidType(
        f"says the same as {other}", where=where, got=got, remedy="Pass one of the two"
    )
