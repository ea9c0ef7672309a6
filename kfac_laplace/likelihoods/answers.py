"""What calling a posterior gives, by likelihood, for type checkers."""

from typing import Literal

from kfac_laplace.likelihoods.bernoulli import Bernoulli
from kfac_laplace.likelihoods.bradley_terry import BradleyTerry
from kfac_laplace.likelihoods.categorical import Categorical
from kfac_laplace.likelihoods.gaussian import Gaussian
from kfac_laplace.likelihoods.heteroscedastic import Heteroscedastic
from kfac_laplace.likelihoods.poisson import Poisson
from kfac_laplace.likelihoods.studentt import StudentT

#: Likelihoods of which a call gives E[y], class probabilities among them.
ShowsMean = (
    Literal["classification", "binary", "poisson", "studentt", "heteroscedastic"]
    | Categorical
    | Bernoulli
    | Poisson
    | StudentT
    | Heteroscedastic
)
#: Likelihoods of which it gives the Gaussian over outputs.
ShowsOutputs = Literal["regression", "reward_modeling"] | Gaussian | BradleyTerry
