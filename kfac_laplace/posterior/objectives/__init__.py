"""What hyperparameters are chosen by: functions of a posterior that are to be large.

An objective takes a posterior at some hyperparameters and returns one number, in nats over the
whole data, differentiable in them. One file an objective; importing it here registers its names.
"""

from kfac_laplace.posterior.objectives import evidence as evidence
from kfac_laplace.posterior.objectives.bounds import Bracket as Bracket
from kfac_laplace.posterior.objectives.columns import Columns as Columns
from kfac_laplace.posterior.objectives.estimated import Evidence as Evidence
from kfac_laplace.posterior.objectives.estimated import evidence_of as evidence_of
from kfac_laplace.posterior.objectives.exact import ExactGGN as ExactGGN
from kfac_laplace.posterior.objectives.hyperprior import GammaHyperprior as GammaHyperprior
from kfac_laplace.posterior.objectives.registry import AnyObjective as AnyObjective
from kfac_laplace.posterior.objectives.registry import CountsDimensions as CountsDimensions
from kfac_laplace.posterior.objectives.registry import Data as Data
from kfac_laplace.posterior.objectives.registry import DataObjective as DataObjective
from kfac_laplace.posterior.objectives.registry import Objective as Objective
from kfac_laplace.posterior.objectives.registry import objective as objective
from kfac_laplace.posterior.objectives.registry import on_data as on_data
from kfac_laplace.posterior.objectives.registry import resolve_objective as resolve_objective
