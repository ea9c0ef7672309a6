"""Everything that a posterior with its scale κ can say about new inputs."""

import logging
from collections.abc import MutableSet
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from kfac_laplace.curvature.linalg.dtypes import without_autocast
from kfac_laplace.curvature.model.batches import AnyBatch
from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.likelihoods.links import LINKS, sample_outputs
from kfac_laplace.options import check_choice, check_whole
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.predict.finite import COVARIANCE, MEAN, WEIGHTS, finite
from kfac_laplace.posterior.predict.glm import (
    OutputGaussian,
    output_features,
    output_gaussian,
    output_mean,
)
from kfac_laplace.posterior.predict.in_graph import (
    check_differentiable,
    check_reaches,
    features_in_graph,
    gaussian_in_graph,
    mean_in_graph,
)
from kfac_laplace.posterior.predict.inputs import inputs_of
from kfac_laplace.posterior.predict.predictive import Predictive, from_samples, restore
from kfac_laplace.posterior.predict.sampling import linearised_samples, network_samples
from kfac_laplace.posterior.predict.scaling import Scaling

log = logging.getLogger("kfac_laplace")

SAYS_NO_GRAPH = (
    "x asks for gradients, which predictions carry with enable_backprop=True alone, in la(x), "
    "la.predict and la.functional_samples: pass it to one of these, or x.detach()"
)
PredType = Literal["glm", "linear", "nn"]
SAMPLERS = {"glm": linearised_samples, "linear": linearised_samples, "nn": network_samples}


@dataclass(frozen=True)
class Predictor:
    """Predictions under N(θ*, κ P⁻¹), with outputs divided by τ.

    Args:
        posterior: N(θ*, P⁻¹).
        scaling: κ and τ.
        seed: seed of samples that are drawn without a generator.
        key_y: name of the targets, which a mapping of inputs may still hold.
        said: what was logged of this posterior; added to.
    """

    posterior: Posterior
    scaling: Scaling
    seed: int
    key_y: str
    said: MutableSet[str]

    def source(self, generator: Generator | None) -> Generator:
        """The caller's generator, on whatever device, or a fresh one."""
        if generator is not None and not isinstance(generator, Generator):
            raise InvalidType(
                "neither a torch.Generator nor None",
                where="generator",
                got=repr(generator),
                remedy="Pass torch.Generator().manual_seed(...)",
            )
        return torch.Generator().manual_seed(self.seed) if generator is None else generator

    def expected(
        self,
        x: Any,
        pred_type: str,
        link: str,
        n_samples: int,
        generator: Generator | None,
        in_graph: bool = False,
    ) -> Tensor:
        """E[y] at x; without a covariance where the link takes none. Arguments as for `predict`."""
        ggn = self.posterior.ggn
        check_choice("link_approx", link, LINKS)
        if pred_type != "glm" or not ggn.likelihood.has_logits:
            return self.predict(x, pred_type, link, n_samples, generator, in_graph).mean
        link = self.scaling.link(link, ggn.likelihood, self.said)
        if link != "mode":
            return self.predict(x, pred_type, link, n_samples, generator, in_graph).mean
        check_whole("n_samples", n_samples, 1)
        self.source(generator)
        found = mean_in_graph if in_graph else output_mean
        f, shape = found(self.posterior, self._batch(x, in_graph))
        mean, none = self.scaling.moments(f, f.new_zeros(()).expand(*f.shape, f.shape[-1]))
        axis = ggn.knowledge.class_axis
        return Predictive(ggn.likelihood, mean, none, shape, axis, self._sigma, link).mean

    def predict(
        self,
        x: Any,
        pred_type: str,
        link: str,
        n_samples: int,
        generator: Generator | None,
        in_graph: bool = False,
    ) -> Predictive:
        """The predictive at x by closed form ("glm") or by samples ("linear", "nn").

        Args:
            x: inputs.
            pred_type: "glm", "linear" or "nn".
            link: one of `LINKS`.
            n_samples: number of samples.
            generator: their source.
            in_graph: whether what comes out stays in the graph of x.
        """
        self.check(pred_type, link, n_samples)
        source = self.source(generator)
        if pred_type != "glm":
            return self.by_samples(self.functions(x, n_samples, pred_type, source, in_graph))
        return self.by_outputs(self.outputs(x, in_graph), link, n_samples, generator)

    def check(self, pred_type: str, link: str, n_samples: int) -> None:
        """Raise `InvalidValue` for an option out of range, or one of a wrong type."""
        check_choice("link_approx", link, LINKS)
        check_whole("n_samples", n_samples, 1)
        check_choice("pred_type", pred_type, SAMPLERS)

    def outputs(self, x: Any, in_graph: bool = False) -> OutputGaussian:
        """The Gaussian over outputs at x, at κ = τ = 1."""
        found = gaussian_in_graph if in_graph else output_gaussian
        return found(self.posterior, self._batch(x, in_graph))

    def by_samples(self, samples: Tensor) -> Predictive:
        """The predictive of output samples (s, *output shape)."""
        return from_samples(self.posterior.ggn.likelihood, samples, self._class_axis, self._sigma)

    def by_outputs(
        self, outputs: OutputGaussian, link: str, n_samples: int, generator: Generator | None
    ) -> Predictive:
        """The predictive of outputs at κ = τ = 1. Arguments as for `predict`."""
        ggn, source = self.posterior.ggn, self.source(generator)
        axis, sigma = self._class_axis, self._sigma
        mean, scaled = self.scaling.moments(outputs.mean, outputs.covariance)
        covariance = finite(scaled, "covariance of the outputs", COVARIANCE)
        drawn, seed = None, self.seed
        link = self.scaling.link(link, ggn.likelihood, self.said)
        if link == "mc":
            with without_autocast(covariance.device):
                drawn = sample_outputs(mean, covariance, n_samples, source)
        elif link == "auto" and generator is not None:
            seed = int(torch.randint(2**62, (), generator=source, device=source.device))
        return Predictive(
            ggn.likelihood, mean, covariance, outputs.shape, axis, sigma, link, drawn, seed,
            n_samples, outputs,
        )  # fmt: skip

    def joint(self, x: Any, pred_type: str, in_graph: bool = False) -> tuple[Tensor, Tensor]:
        """Regression mean (N·C,) and covariance (N·C, N·C) over all inputs together."""
        likelihood = self.posterior.ggn.likelihood
        if pred_type != "glm" or not likelihood.has_gaussian_noise:
            raise InvalidValue(
                "a joint covariance belongs to regression by 'glm'",
                where="joint",
                got=True,
                remedy="Use functional_samples for joint draws of any likelihood",
            )
        batch = self._batch(x, in_graph)
        if in_graph:
            mean, parts = features_in_graph(self.posterior, batch)
        else:
            mean = output_gaussian(self.posterior, batch).mean.flatten()
            parts = output_features(self.posterior, batch)
        features = torch.cat(parts, 1)
        joint = features @ features.mT * self.scaling.scale.to(features)
        return mean, finite(joint, "covariance of the outputs", COVARIANCE)

    def _batch(self, x: Any, in_graph: bool) -> AnyBatch:
        batch = inputs_of(self.posterior, x, self.key_y)
        asked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in batch.data)
        if asked and not in_graph and SAYS_NO_GRAPH not in self.said:
            self.said.add(SAYS_NO_GRAPH)
            log.warning(SAYS_NO_GRAPH)
        return batch

    def parameters(self, n: int, generator: Generator | None) -> Tensor:
        """Draws (n, P) in the order of the parameters."""
        check_whole("n_samples", n, 1)
        deviations = self.posterior.deviations(n, self.source(generator))
        width = self.scaling.scale.sqrt()
        centre = {name: v.expand(n, *v.shape) for name, v in self.posterior.drawn.items()}
        drawn = [
            (value + width * deviations[name] if name in deviations else value).reshape(n, -1)
            for name, value in centre.items()
        ]
        return finite(torch.cat(drawn, 1), "sampled parameters", WEIGHTS)

    def functions(
        self,
        x: Any,
        n: int,
        pred_type: str,
        generator: Generator | None,
        in_graph: bool = False,
    ) -> Tensor:
        """Draws of functions, each at all inputs, shape (n, *output shape)."""
        check_whole("n_samples", n, 1)
        check_choice("pred_type", pred_type, SAMPLERS)
        draw = SAMPLERS[pred_type]
        width = float(self.scaling.scale) ** 0.5
        batch, source = self._batch(x, in_graph), self.source(generator)
        if in_graph:
            check_differentiable(batch)
            f = draw(self.posterior, batch, n, width, source, True)
            check_reaches(f, self.posterior, batch)
        else:
            f = draw(self.posterior, batch, n, width, source)
        return self.scaling.samples(f)

    def targets(self, x: Any, n: int, pred_type: str, generator: Generator | None) -> Tensor:
        """Draws of class probabilities, or of y with its noise, shape (n, *output shape).

        Where y has another number of values than the output, its own shape.
        """
        source = self.source(generator)
        f = self.functions(x, n, pred_type, source)
        likelihood, axis = self.posterior.ggn.likelihood, self._class_axis
        flat = f.flatten(0, 1)
        drawn = likelihood.predictive_draws(likelihood.align(flat, axis), self._sigma, source)
        drawn = finite(drawn, "draws of y", MEAN)
        if f.ndim == 2:  # one value for each input, without an axis of its own
            return drawn.reshape(f.shape)
        return restore(drawn, flat.shape, axis).unflatten(0, f.shape[:2])

    @property
    def _class_axis(self) -> int:
        return self.posterior.ggn.knowledge.class_axis

    @property
    def _sigma(self) -> Tensor:
        return self.posterior.hyperparameters.sigma_noise.detach()
