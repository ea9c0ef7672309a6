"""K-FAC Laplace approximations and marginal-likelihood training for PyTorch.

A posterior around trained weights, then hyperparameters that choose themselves during training:

>>> import torch
>>> from kfac_laplace import Laplace, MarglikTuner
>>> x, y = torch.eye(4).repeat(5, 1), torch.arange(4).repeat(5)
>>> model = torch.nn.Linear(4, 4)
>>> la = Laplace(model, "classification").fit([(x, y)])  # one pass over batches
>>> la = la.optimize_prior()  # by the evidence, without another pass
>>> la(x[:3]).shape  # probabilities of 3 inputs
torch.Size([3, 4])
>>> la.coverage
{'weight': 'kron', 'bias': 'kron'}
>>> tuner = MarglikTuner(model, "classification", n_data=20)
>>> loss = tuner.loss(model(x), y)  # for your optimiser
>>> record = tuner.step([(x, y)])  # each epoch: curvature, and steps of the hyperparameters
>>> list(record.hyperparameters)
['prior_precision']
"""

from kfac_laplace.curvature.backend import Curvature as Curvature
from kfac_laplace.curvature.checkpoint import Checkpoint as Checkpoint
from kfac_laplace.curvature.estimate.fisher import Empirical as Empirical
from kfac_laplace.curvature.estimate.fisher import Exact as Exact
from kfac_laplace.curvature.estimate.fisher import Hybrid as Hybrid
from kfac_laplace.curvature.estimate.fisher import MonteCarlo as MonteCarlo
from kfac_laplace.curvature.estimate.structures import Kron as Kron
from kfac_laplace.curvature.estimate.structures import LowRank as LowRank
from kfac_laplace.curvature.layers import layer_rule as layer_rule
from kfac_laplace.errors import KfacLaplaceError as KfacLaplaceError
from kfac_laplace.laplace import Laplace as Laplace
from kfac_laplace.likelihoods import Bernoulli as Bernoulli
from kfac_laplace.likelihoods import BradleyTerry as BradleyTerry
from kfac_laplace.likelihoods import Categorical as Categorical
from kfac_laplace.likelihoods import Gaussian as Gaussian
from kfac_laplace.likelihoods import Heteroscedastic as Heteroscedastic
from kfac_laplace.likelihoods import Likelihood as Likelihood
from kfac_laplace.likelihoods import Poisson as Poisson
from kfac_laplace.likelihoods import StudentT as StudentT
from kfac_laplace.marglik.training import marglik_training as marglik_training
from kfac_laplace.marglik.tuner import MarglikTuner as MarglikTuner
from kfac_laplace.planning.plan import Plan as Plan
from kfac_laplace.posterior.objectives import Bracket as Bracket
from kfac_laplace.posterior.objectives import Columns as Columns
from kfac_laplace.posterior.objectives import Evidence as Evidence
from kfac_laplace.posterior.objectives import GammaHyperprior as GammaHyperprior
from kfac_laplace.posterior.predict.predictive import Predictive as Predictive
from kfac_laplace.version import __version__ as __version__
