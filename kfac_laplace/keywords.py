"""The keywords of `Laplace` and what a call of it gives, for type checkers."""

from typing import Any, TypedDict

from torch import Tensor
from typing_extensions import TypeVar

from kfac_laplace.curvature.estimate.fisher import Fisher, FisherName
from kfac_laplace.curvature.estimate.settings import KfacApprox
from kfac_laplace.curvature.estimate.structures import Structure
from kfac_laplace.curvature.gradients.groups import Subset
from kfac_laplace.curvature.gradients.subnetwork import GivenSubnetwork
from kfac_laplace.curvature.linalg.dtypes import FactorDtype
from kfac_laplace.curvature.model.batches import BatchFn
from kfac_laplace.curvature.model.forward import ForwardFn
from kfac_laplace.curvature.options import Offload, Uncovered
from kfac_laplace.posterior.prior import Given
from kfac_laplace.posterior.sharing import PriorStructure

#: The mean (N, C) of outputs and their covariance (N, C, C).
MeanAndCovariance = tuple[Tensor, Tensor]
#: What `la(x)` gives: a tensor, or `MeanAndCovariance`. Posteriors only give it, so that one of
#: tensors passes for one of tensors or pairs.
Answer = TypeVar("Answer", default=Any, covariant=True)


class LaplaceKeywords(TypedDict, total=False):
    """The options of `Laplace`, as its overloads hand them on."""

    hessian_structure: Structure
    subset_of_weights: Subset | GivenSubnetwork
    kfac_approx: KfacApprox
    fisher: FisherName | Fisher
    prior_precision: Given
    prior_structure: PriorStructure
    prior_mean: Given
    sigma_noise: float | Tensor
    temperature: float
    joint_bias: bool
    uncovered: Uncovered
    seed: int
    factor_dtype: FactorDtype
    dict_key_y: str
    class_axis: int | None
    forward_fn: ForwardFn | None
    batch_fn: BatchFn | None
    memory_budget: int | None
    offload: Offload | None
    process_group: Any
    subnetwork_indices: Tensor | None
    subnetwork_mask: GivenSubnetwork | None
