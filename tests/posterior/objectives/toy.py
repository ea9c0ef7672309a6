"""An objective of one's own, as a user would write it: one file."""

from kfac_laplace.posterior.objectives import objective


@objective("toy")
def gamma_hyperprior(posterior):
    """The evidence with independent Gamma(2, 1) hyperpriors on the prior precisions."""
    delta = posterior.prior.full(posterior.hyperparameters.prior_precision)
    return posterior.log_marginal_likelihood + (delta.log() - delta).sum()
