"""Regression with heavy-tailed noise."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent
from torch.distributions import StudentT as StudentTDistribution

from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods.likelihood import Likelihood
from kfac_laplace.likelihoods.residuals import residual_table, sum_of_logs
from kfac_laplace.likelihoods.roots import diagonal_roots
from kfac_laplace.options import check_positive


class StudentT(Likelihood):
    """y = f + σ t_ν for each output: Λ = (ν + 1)/(ν + 3) I at σ = 1, and 1/σ² of it at σ.

    Λ is the Fisher information of the location. The Hessian of −log p is none: it is negative where
    a residual is beyond √ν σ.

    σ is a hyperparameter like that of the Gaussian, moved without another data pass, though no
    finite statistic is sufficient for it: the statistic is a table of the residuals' logarithms
    (`residuals`), which adds over batches and gives the log-likelihood at any σ with an error below
    1e-12 for each residual. ν is fixed: evidences of several fits compare its values.

    Args:
        df: degrees of freedom ν > 1; without them there is no mean.

    Raises:
        InvalidValue: ν ≤ 1.
        InvalidType: ν is no number.
    """

    has_noise = True

    def __init__(self, *, df: float = 4.0):
        check_positive("df", df)
        if df <= 1:
            raise InvalidValue(
                "the predictive has no mean", where="df", got=df, remedy="Take more than 1"
            )
        self.df = float(df)

    def distribution(self, f: Tensor, sigma: Tensor) -> Distribution:
        """f + σ t_ν."""
        df = torch.full_like(f, self.df)
        return Independent(StudentTDistribution(df, f, sigma), 1)

    def statistic(self, f: Tensor, y: Tensor) -> Tensor:
        """The table of y − f."""
        return residual_table(y.double() - f.double())

    def log_likelihood(self, statistic: Tensor, count: float, sigma: Tensor) -> Tensor:
        """count · (log Γ((ν+1)/2)/Γ(ν/2) − ½ log πνσ²) − ½ (ν+1) Σ log(1 + r²/(νσ²))."""
        df = self.df
        constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(math.pi * df)
        log_sigma = sigma.log()
        tails = sum_of_logs(statistic, 2 * log_sigma + math.log(df))
        return count * (constant - log_sigma) - 0.5 * (df + 1) * tails

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        """(ν + 1) r/(ν + r²) of the residuals r = f − y."""
        r = f - y
        return (self.df + 1) * r / (self.df + r.square())

    def hessian(self, f: Tensor) -> Tensor:
        """(ν + 1)/(ν + 3) I."""
        return torch.diag_embed(torch.full_like(f, self._information))

    def roots(self, f: Tensor) -> Iterator[Tensor]:
        """The c unit vectors times √((ν + 1)/(ν + 3))."""
        return diagonal_roots(torch.full_like(f, self._information**0.5))

    @property
    def _information(self) -> float:
        return (self.df + 1) / (self.df + 3)

    def precision(self, sigma: Tensor) -> Tensor:
        """1/σ²."""
        return sigma**-2

    def predictive_mean(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """The mean of f."""
        return mean

    def options(self) -> dict[str, Any]:
        """`df`."""
        return {"df": self.df}
