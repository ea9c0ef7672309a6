"""What hyperparameters are chosen by: functions of a posterior that are to be large.

An objective takes a posterior at some hyperparameters and returns one number, in nats over the
whole data, differentiable in them. One file an objective; importing it here registers its names.
"""

from kfac_laplace.posterior.objectives import evidence as evidence
from kfac_laplace.posterior.objectives.registry import Objective as Objective
from kfac_laplace.posterior.objectives.registry import objective as objective
from kfac_laplace.posterior.objectives.registry import resolve_objective as resolve_objective
