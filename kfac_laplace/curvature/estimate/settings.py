"""Weight sharing: expand or reduce, by layer."""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor

from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.options import check_choice

PartSetting = Literal["expand", "reduce"]
#: of a group, or of each of its parts where they differ, as those of a packed projection do
Setting = PartSetting | tuple[PartSetting, ...]
SETTINGS = ("auto", "expand", "reduce")
KfacApprox = str | Mapping[str, str]
#: Where reduce keeps less of the exact trace, gradients cancel that should not.
LEAST_TRACE = 0.1
TINY = 1e-300


def check_kfac_approx(kfac_approx: KfacApprox) -> None:
    """Raise `InvalidValue` for an unknown setting, `InvalidType` for what cannot hold one."""
    if not isinstance(kfac_approx, str | Mapping):
        raise InvalidType(
            "not a setting",
            where="kfac_approx",
            got=repr(kfac_approx),
            remedy=f"Choose one of {SETTINGS}, or a mapping from name patterns to them",
        )
    for value in [kfac_approx] if isinstance(kfac_approx, str) else kfac_approx.values():
        check_choice("kfac_approx", value, SETTINGS, "a mapping from name patterns to them")


def chosen_settings(kfac_approx: KfacApprox, groups: list[str]) -> dict[str, str]:
    """What the caller chose for each group: the first matching pattern, else "auto"."""
    patterns = {"*": kfac_approx} if isinstance(kfac_approx, str) else dict(kfac_approx)
    for pattern in patterns if not isinstance(kfac_approx, str) else ():
        if not any(_matches(name, pattern) for name in groups):
            raise InvalidValue(
                "pattern matches no layer",
                where="kfac_approx",
                got=repr(pattern),
                remedy=f"The layers are {groups}",
            )
    return {
        name: next((s for p, s in patterns.items() if _matches(name, p)), "auto") for name in groups
    }


def keeping_curvature(traces: Mapping[PartSetting, Tensor], parts: int) -> Setting:
    """Reduce, but expand for the parts whose gradients cancel under it.

    Args:
        traces: of the blocks by setting, in units of the exact ones, each of shape (b,).
        parts: number of parts of the weight, b/parts blocks each.
    """
    reduce, expand = (
        traces[name].unflatten(0, (parts, -1)).mean(1).clamp_min(TINY).log()
        for name in ("reduce", "expand")
    )
    blind = (reduce < math.log(LEAST_TRACE)) & (expand.abs() < reduce.abs())
    found: tuple[PartSetting, ...] = tuple(
        "expand" if part else "reduce" for part in blind.tolist()
    )
    return found[0] if len(set(found)) == 1 else found


def of_part(setting: Setting, part: int) -> PartSetting:
    """The setting of one part of a weight."""
    return setting if isinstance(setting, str) else setting[part]


def cancelled(traces: Mapping[PartSetting, Tensor]) -> bool:
    """Whether gradients of some block cancel under reduce; `traces` as for `keeping_curvature`."""
    return bool((traces["reduce"] < LEAST_TRACE).any())


def _matches(name: str, pattern: str) -> bool:
    """Whether a parameter name, or the module it belongs to, fits a glob."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)
