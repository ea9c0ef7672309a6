"""Which precisions a tuner tunes: those of the matrices of layers, unless it is told otherwise.

δ = γ/‖θ − μ‖² chooses well where many weights of a layer share a scale that data and prior
determine together. It chooses badly where they do not: a position embedding that begins at a
standard deviation of 0.02, a class token, a scale or shift is switched off in the first rounds and
never comes back; weights in front of a norm shrink for ever, because nothing holds their scale; and
with batch statistics the evidence, of evaluation mode, is not that of the network in training.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.marglik.training_mode import TrainingMode
from kfac_laplace.options import check_choice
from kfac_laplace.posterior.claims import Claim
from kfac_laplace.posterior.prior import Prior

#: Which precisions are tuned: "auto", "all", or patterns of parameter names.
Tune = str | Sequence[str]

#: A layer of standard initialisation has weights of root mean square 0.6/√i and more. Matrices
#: below this over √i, and tables below this, have begun near zero or have almost gone.
SMALL = 0.1

OTHER = "no matrix of a layer"
BIAS = "a bias alone"
SMALL_TABLE = "a table that began near zero"
NEAR_ZERO = "a matrix near zero"
SCALE_FREE = "its scale changes no output in training"
BATCH = "outputs depend on batch statistics in training"
NOT_CHOSEN = "not in tune"


@dataclass(frozen=True)
class Roles:
    """The groups whose precisions stay as they are, each with its reason.

    Args:
        held: reason by group name.
    """

    held: Mapping[str, str]

    @classmethod
    def of(
        cls,
        groups: Iterable[Group],
        tune: Tune,
        training: TrainingMode,
        sizes: tuple[Mapping[str, float], Mapping[str, float]],
    ) -> "Roles":
        """The roles of groups.

        Args:
            groups: the groups.
            tune: which to tune.
            training: what is special about training mode.
            sizes: root mean squares of parameters by name, when the tuner was made and now.
        """
        if tune == "all":
            return cls({})
        if tune != "auto":
            return cls({g.name: NOT_CHOSEN for g in groups if not _matches(g, tune)})
        reasons = {group.name: _reason(group, training, *sizes) for group in groups}
        if {*reasons.values()} <= {OTHER, BIAS}:  # a model without layers has nothing else to tune
            reasons = {name: reason for name, reason in reasons.items() if reason == BIAS}
        return cls({name: reason for name, reason in reasons.items() if reason})

    def precisions(self, prior: Prior) -> Tensor:
        """Mask (length of the prior,) of the precisions that stay: those of held groups alone."""
        mask = torch.ones(prior.length, dtype=torch.bool, device=prior.device)
        for name in prior.layouts.groups:
            if name not in self.held:
                mask[prior.index[name].flatten()] = False
        return mask

    def claims(self) -> Iterator[Claim]:
        """What is to be said, once, of what is held."""
        if BATCH in self.held.values():
            yield Claim(
                "batch statistics",
                (),
                "no precision is tuned: the outputs of an example depend on the others in its "
                "batch while the model is trained (batch norm), and the evidence is that of "
                "evaluation mode, which asks for stronger priors than such a network needs. Tune "
                "all the same by tune='all' or patterns",
            )


def check_tune(tune: Tune, names: Iterable[str]) -> Tune:
    """`tune`, checked against the names of the parameters.

    Raises:
        InvalidType: neither a name nor patterns.
        InvalidValue: an unknown name, or a pattern that fits no parameter.
    """
    if isinstance(tune, str):
        check_choice("tune", tune, ("auto", "all"), "a list of parameter-name patterns")
        return tune
    if not isinstance(tune, Sequence) or not all(isinstance(p, str) for p in tune):
        raise InvalidType(
            "neither a name nor patterns",
            where="tune",
            got=repr(tune),
            remedy="Choose 'auto', 'all' or a list of parameter-name patterns",
        )
    names = list(names)
    for pattern in tune:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InvalidValue(
                "pattern matches no parameter",
                where="tune",
                got=repr(pattern),
                remedy=f"The parameters are {names}",
            )
    return list(tune)


def root_mean_squares(parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """The root mean square of the entries of each parameter."""
    if not parameters:
        return {}
    with torch.no_grad():
        found = [p.detach().abs().square().double().mean().sqrt() for p in parameters.values()]
        return dict(zip(parameters, torch.stack(found).tolist(), strict=True))


def _matches(group: Group, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, p) for name in group.layout.params for p in patterns)


def _reason(
    group: Group, training: TrainingMode, began: Mapping[str, float], now: Mapping[str, float]
) -> str:
    """Why a group's precision stays, or "" where it is tuned."""
    weight = group.layout.params[0]
    if training.batch_statistics:
        return BATCH
    if group.name in training.scale_free:
        return SCALE_FREE
    if not group.factored:
        return OTHER
    if group.role == "bias":
        return BIAS
    if group.diagonal:
        return SMALL_TABLE if began.get(weight, now[weight]) < SMALL else ""
    fan_in = group.layout.matrix[2] - (group.role == "joint")
    return NEAR_ZERO if now[weight] * max(1, fan_in) ** 0.5 < SMALL else ""
