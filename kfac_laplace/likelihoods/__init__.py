"""Likelihoods p(y | f): densities, scores, draws, roots of their curvature, and predictives.

Everything works on *aligned* outputs f (n, t, c): n examples, t positions that the loss keeps
(1 for one output row an example), c outputs. Curvature is stored at σ = 1; the noise enters only
through `precision` and `log_likelihood`.
"""

from typing import Literal

from kfac_laplace.errors import InvalidType
from kfac_laplace.likelihoods.alignment import aligned_target as aligned_target
from kfac_laplace.likelihoods.alignment import settled_axis as settled_axis
from kfac_laplace.likelihoods.bernoulli import Bernoulli as Bernoulli
from kfac_laplace.likelihoods.bradley_terry import BradleyTerry as BradleyTerry
from kfac_laplace.likelihoods.categorical import Categorical as Categorical
from kfac_laplace.likelihoods.checks import check_finite as check_finite
from kfac_laplace.likelihoods.gaussian import Gaussian as Gaussian
from kfac_laplace.likelihoods.heteroscedastic import Heteroscedastic as Heteroscedastic
from kfac_laplace.likelihoods.latent import Latent as Latent
from kfac_laplace.likelihoods.likelihood import Likelihood as Likelihood
from kfac_laplace.likelihoods.poisson import Poisson as Poisson
from kfac_laplace.likelihoods.studentt import StudentT as StudentT
from kfac_laplace.options import check_choice

LikelihoodName = Literal[
    "classification",
    "regression",
    "binary",
    "poisson",
    "studentt",
    "heteroscedastic",
    "reward_modeling",
]
NAMED: dict[str, type[Likelihood]] = {
    "classification": Categorical,
    "regression": Gaussian,
    "binary": Bernoulli,
    "poisson": Poisson,
    "studentt": StudentT,
    "heteroscedastic": Heteroscedastic,
    "reward_modeling": BradleyTerry,
}


def resolve(likelihood: str | Likelihood) -> Likelihood:
    """The likelihood named by a string, or the object itself."""
    if isinstance(likelihood, Likelihood):
        return likelihood
    if not isinstance(likelihood, str):
        raise InvalidType(
            "not a likelihood",
            where="likelihood",
            got=repr(likelihood),
            remedy=f"Choose one of {sorted(NAMED)} or pass a Likelihood object",
        )
    check_choice("likelihood", likelihood, NAMED, "pass a Likelihood object")
    return NAMED[likelihood]()
