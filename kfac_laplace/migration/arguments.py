"""Arguments of predictions as laplace-torch orders and names them, in this library's order."""

from kfac_laplace.errors import InvalidType


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


def ordered(link_approx: str | bool, joint: bool | str) -> tuple[str, bool]:
    """`link_approx` and `joint`, which laplace-torch has the other way round by position."""
    if isinstance(link_approx, bool):
        link_approx, joint = joint if isinstance(joint, str) else "auto", link_approx
    if not isinstance(joint, bool):
        raise InvalidType("neither True nor False", where="joint", got=repr(joint))
    return link_approx, joint


def _twice(where: str, other: str, got: str) -> InvalidType:
    return InvalidType(
        f"says the same as {other}", where=where, got=got, remedy="Pass one of the two"
    )
