"""Rewards from preferences: which of two inputs is better, and how good each of them is."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.distributions import Distribution

from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods.categorical import Categorical, SoftmaxPredictive
from kfac_laplace.likelihoods.latent import Latent
from kfac_laplace.likelihoods.predictive import NormalPredictive, Restore, RowPredictive


class BradleyTerry(Categorical):
    """Preferences between two by their rewards: p(y = j) = e^{r_j}/(e^{r₀} + e^{r₁}) [BT52].

    The fit takes pairs of inputs along axis 1, outputs r (n, 2) and the place 0 or 1 of the one
    that is preferred. Predictions are of rewards r (n, 1) of single inputs, or of both of pairs, by
    mean and covariance. Adding a constant to all rewards changes no preference: their level is
    the prior's.
    """

    def __init__(self) -> None:
        super().__init__()

    has_logits = False
    of_pairs = True

    @property
    def shows_outputs(self) -> bool:
        """Rewards are what is asked for."""
        return True

    def check_axis(self, shape: Sequence[int], target: Tensor, axis: int) -> None:
        """Two rewards for each label."""
        if (*target.shape, 2) != tuple(shape):
            raise _no_pair(shape)

    def class_axis(self, output: Tensor, target: Tensor) -> int:
        """The last."""
        self.check_axis(output.shape, target, -1)
        return -1

    def align_target(self, target: Tensor, f: Tensor) -> Tensor:
        """Labels (n, t), 0 or 1."""
        if f.shape[-1] != 2:
            raise _no_pair((*f.shape[:1], *f.shape[2:]))
        return super().align_target(target, f)

    def activation(self, f: Tensor) -> str:
        """None is looked for: rewards may be in any range."""
        return ""

    def hessian(self, f: Tensor) -> Tensor:
        """p₀p₁ of the difference, whose small values keep their digits."""
        both = f.new_tensor([[1.0, -1.0], [-1.0, 1.0]])
        return f.softmax(-1).prod(-1)[..., None, None] * both

    def predict(self, latent: Latent, sigma: Tensor, link: str) -> RowPredictive:
        """Rewards of single inputs; of pairs the probabilities of being preferred."""
        if latent.mean.shape[-1] == 1:
            return RewardPredictive(latent)
        return SoftmaxPredictive(self, latent, "auto")

    def predictive_draws(self, f: Tensor, sigma: Tensor, generator: Generator) -> Tensor:
        """Rewards: those of functions."""
        return f

    def options(self) -> dict[str, Any]:
        """None."""
        return {}


class RewardPredictive(NormalPredictive):
    """Rewards of single inputs, which nobody observes: Gaussian without noise.

    Args:
        latent: the Gaussian over rewards.
    """

    def __init__(self, latent: Latent):
        super().__init__(latent, torch.zeros((), dtype=latent.mean.dtype, device="cpu"))

    def distribution(self, restore: Restore) -> Distribution:
        """N(mean, Σ), where there is a variance: no noise gives a certain reward a density."""
        certain = (self._latent.covariance <= 0).flatten(1).any(1)
        if bool(certain.any()):
            raise InvalidValue(
                "a reward without variance has no density",
                where="predictive",
                got=f"a variance of 0 of {int(certain.sum())} in {len(certain)} inputs",
                remedy="Take the mean. Where posterior_scale is not 0, no weight of the posterior "
                "moves the reward there",
            )
        return super().distribution(restore)

    def information(self) -> Tensor:
        """There is no observation to be informed by."""
        raise InvalidValue(
            "a reward alone is never observed, so that nothing informs of it",
            where="predictive",
            remedy="Look at its covariance, or predict pairs",
        )

    def entropy(self) -> Tensor:
        """Likewise."""
        return self.information()

    def aleatoric(self) -> Tensor:
        """Likewise."""
        return self.information()

    def strangeness(self, latent: Latent, head: Tensor) -> Tensor:
        """tr Σ."""
        return latent.covariance.diagonal(dim1=-2, dim2=-1).flatten(1).sum(1)


def _no_pair(shape: Sequence[int]) -> InvalidValue:
    return InvalidValue(
        "preferences take one reward for each input of a pair, and one label a pair",
        where="model output",
        got=f"shape {tuple(shape)}",
        remedy="Return (n, 2) for inputs (n, 2, ...): model(x.flatten(0, 1)).reshape(-1, 2), in "
        "the model or in forward_fn",
    )
