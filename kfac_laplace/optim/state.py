"""What a first batch taught, as plain data and back."""

from collections.abc import Mapping
from typing import Any

from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.curvature.state import ggn_from_state, ggn_to_state
from kfac_laplace.optim.learning import Learned
from kfac_laplace.states.stored import Stored, refusing_damage


def learned_to_state(learned: Learned, options: CurvatureOptions) -> dict[str, Any]:
    """Groups, row layouts, class axis and settings, as those of a curvature without data."""
    return {
        "ggn": ggn_to_state(GGN(options, learned.knowledge, learned.settings)),
        "all_read": learned.all_read,
    }


def learned_from_state(
    state: Mapping[str, Any], network: Network, options: CurvatureOptions
) -> Learned:
    """The same from plain data.

    Raises:
        InvalidValue: a damaged state, or one of another model or of other options.
    """
    with refusing_damage("state_dict"):
        found = Stored(state, "state_dict.kfac.learned").fields(("ggn", "all_read"))
        ggn = ggn_from_state(found["ggn"], network, options)
        return Learned(ggn.knowledge, ggn.settings, found["all_read"].flag())
