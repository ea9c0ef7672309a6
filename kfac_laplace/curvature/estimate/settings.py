"""Weight sharing: expand or reduce, by layer."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal, get_args

from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.options import check_choice

PartSetting = Literal["expand", "reduce"]
#: of a group, or of each of its parts where they differ, as those of a packed projection do
Setting = PartSetting | tuple[PartSetting, ...]
SettingName = Literal["auto", "expand", "reduce"]
SETTINGS: tuple[SettingName, ...] = get_args(SettingName)
KfacApprox = SettingName | Mapping[str, SettingName]


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


def of_part(setting: Setting, part: int) -> PartSetting:
    """The setting of one part of a weight."""
    return setting if isinstance(setting, str) else setting[part]


def _matches(name: str, pattern: str) -> bool:
    """Whether a parameter name, or the module it belongs to, fits a glob."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)
