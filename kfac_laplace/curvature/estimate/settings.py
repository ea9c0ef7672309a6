"""Weight sharing: expand or reduce, by layer."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal

from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.options import check_choice

Setting = Literal["expand", "reduce"]
SETTINGS = ("auto", "expand", "reduce")
KfacApprox = str | Mapping[str, str]


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


def resolve_settings(
    kfac_approx: KfacApprox, groups: list[str], keeps_shared_axis: bool
) -> dict[str, Setting]:
    """Setting of each group: the first matching pattern, else "auto".

    "auto" is "expand" where the loss keeps the shared axis (token or pixel outputs) and "reduce"
    where the model returns one output row for each example.
    """
    patterns = {"*": kfac_approx} if isinstance(kfac_approx, str) else dict(kfac_approx)
    for pattern in patterns if not isinstance(kfac_approx, str) else ():
        if not any(_matches(name, pattern) for name in groups):
            raise InvalidValue(
                "pattern matches no layer",
                where="kfac_approx",
                got=repr(pattern),
                remedy=f"The layers are {groups}",
            )
    automatic: Setting = "expand" if keeps_shared_axis else "reduce"
    settings: dict[str, Setting] = {}
    for name in groups:
        chosen = next((s for p, s in patterns.items() if _matches(name, p)), "auto")
        settings[name] = "expand" if chosen == "expand" else "reduce"
        if chosen == "auto":
            settings[name] = automatic
    return settings


def _matches(name: str, pattern: str) -> bool:
    """Whether a parameter name, or the module it belongs to, fits a glob."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)
