"""Subnetworks by laplace-torch's names: each mask selects entries of the vector of all parameters.

`Laplace(model, likelihood, hessian_structure="full", subset_of_weights=mask.select(train_loader))`
takes what they return. Entries of frozen parameters are never selected.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from kfac_laplace.curvature.gradients.groups import last_layer
from kfac_laplace.curvature.gradients.knowledge import Knowledge
from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.model.batches import BatchFn, split_batch
from kfac_laplace.curvature.model.forward import ForwardFn
from kfac_laplace.curvature.model.unchanged import in_turn, parameters_of, undisturbed
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.errors import InvalidType, InvalidValue, NotFitted
from kfac_laplace.likelihoods import resolve
from kfac_laplace.options import check_whole
from kfac_laplace.process import draws_kept


class SubnetMask(ABC):
    """Chooses entries of `parameters_to_vector(model.parameters())`.

    Args:
        model: the network at its mode.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._indices: Tensor | None = None

    def select(self, train_loader: Iterable[Any] | None = None) -> Tensor:
        """Indices of the chosen entries, ascending, int64 (k,).

        Args:
            train_loader: training data, for masks that look at them.
        """
        self._indices = (self._mask(train_loader) & _trainable(self.model)).nonzero()[:, 0]
        return self._indices

    @property
    def indices(self) -> Tensor:
        """What `select` returned last.

        Raises:
            NotFitted: before `select`.
        """
        if self._indices is None:
            raise NotFitted("nothing selected yet", where="indices", remedy="Call select first")
        return self._indices

    @property
    def n_params_subnet(self) -> int:
        """Number of chosen entries."""
        return len(self.indices)

    @abstractmethod
    def _mask(self, train_loader: Iterable[Any] | None) -> Tensor:
        """True for the chosen entries, (P,)."""


class ScoreBasedSubnetMask(SubnetMask):
    """The entries with the largest scores.

    Args:
        model: the network at its mode.
        n_params_subnet: how many entries.

    Raises:
        InvalidValue: more than there are trainable ones, or none.
    """

    def __init__(self, model: nn.Module, n_params_subnet: int):
        super().__init__(model)
        check_whole("n_params_subnet", n_params_subnet, 1)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if n_params_subnet > trainable:
            raise InvalidValue(
                f"the model has {trainable} trainable parameters",
                where="n_params_subnet",
                got=n_params_subnet,
            )
        self._count = n_params_subnet

    def _mask(self, train_loader: Iterable[Any] | None) -> Tensor:
        scores = self._scores(train_loader).double().cpu()
        scores = scores.where(_trainable(self.model), -torch.inf)
        first = scores.sort(descending=True, stable=True).indices[: self._count]
        return torch.zeros_like(scores, dtype=torch.bool).index_fill(0, first, True)

    @abstractmethod
    def _scores(self, train_loader: Iterable[Any] | None) -> Tensor:
        """A number for each entry, (P,)."""


class LargestMagnitudeSubnetMask(ScoreBasedSubnetMask):
    """The entries of the largest magnitude |θ|."""

    def _scores(self, train_loader: Iterable[Any] | None) -> Tensor:
        return torch.cat([p.detach().abs().flatten() for p in self.model.parameters()])


class RandomSubnetMask(ScoreBasedSubnetMask):
    """Entries drawn uniformly without replacement.

    Args:
        model: the network.
        n_params_subnet: how many entries.
        generator: source of the draw; by default a fresh one with seed 0.
    """

    def __init__(self, model: nn.Module, n_params_subnet: int, generator: Generator | None = None):
        super().__init__(model, n_params_subnet)
        self._generator = generator or Generator().manual_seed(0)

    def _scores(self, train_loader: Iterable[Any] | None) -> Tensor:
        total = sum(p.numel() for p in self.model.parameters())
        source = self._generator
        order = torch.randperm(total, generator=source, device=source.device)
        return order.double()  # distinct, where random numbers may tie


class LargestVarianceDiagLaplaceSubnetMask(ScoreBasedSubnetMask):
    """The entries of the largest posterior variance under a diagonal posterior [SUBNET21].

    Args:
        model: the network at its mode.
        n_params_subnet: how many entries.
        diag_laplace_model: a `Laplace` of the same model with hessian_structure="diag"; `select`
            fits it where a loader is given.

    Raises:
        InvalidType: no such posterior.
        InvalidValue: another structure, or more entries than its posterior has.
    """

    def __init__(self, model: nn.Module, n_params_subnet: int, diag_laplace_model: Any):
        super().__init__(model, n_params_subnet)
        if not isinstance(getattr(diag_laplace_model, "options", None), CurvatureOptions):
            raise InvalidType(
                "not a Laplace of this library",
                where="diag_laplace_model",
                got=type(diag_laplace_model).__name__,
                remedy="Pass Laplace(model, likelihood, hessian_structure='diag')",
            )
        structure = diag_laplace_model.options.hessian_structure
        if structure != "diag":
            raise InvalidValue(
                "variances are those of a diagonal posterior",
                where="diag_laplace_model",
                got=f"hessian_structure='{structure}'",
                remedy="Pass Laplace(model, likelihood, hessian_structure='diag')",
            )
        self.diag_laplace_model = diag_laplace_model

    def _scores(self, train_loader: Iterable[Any] | None) -> Tensor:
        la = self.diag_laplace_model
        if train_loader is not None:
            la.fit(train_loader)
        layouts = la.posterior.prior.layouts
        if layouts.size < self._count:
            raise InvalidValue(
                f"the diagonal posterior has {layouts.size} parameters",
                where="n_params_subnet",
                got=self._count,
                remedy="Fit one of all weights",
            )
        variances = layouts.by_parameter(la.posterior_precision.reciprocal())
        return torch.cat(
            [
                variances[name].flatten() if name in variances else p.new_full((p.numel(),), 0.0)
                for name, p in self.model.named_parameters()
            ]
        )


class ParamNameSubnetMask(SubnetMask):
    """All entries of some parameters.

    Args:
        model: the network.
        parameter_names: as in `model.named_parameters()`.

    Raises:
        InvalidValue: no name, or one that is no parameter's.
    """

    def __init__(self, model: nn.Module, parameter_names: Sequence[str]):
        super().__init__(model)
        known = [name for name, _ in model.named_parameters()]
        _check_names("parameter_names", parameter_names, known)
        self._names = set(parameter_names)

    def _mask(self, train_loader: Iterable[Any] | None) -> Tensor:
        return _whole(self.model, self._names)


class ModuleNameSubnetMask(SubnetMask):
    """All entries of the parameters of some modules, those of their submodules as well.

    Args:
        model: the network.
        module_names: as in `model.named_modules()`.

    Raises:
        InvalidValue: no name, or one that is no module's with parameters.
    """

    def __init__(self, model: nn.Module, module_names: Sequence[str]):
        super().__init__(model)
        with in_turn(model):
            own = {name: {*module.parameters()} for name, module in model.named_modules()}
            params = parameters_of(model)
        _check_names("module_names", module_names, [name for name, found in own.items() if found])
        chosen = set[nn.Parameter]().union(*(own[name] for name in module_names))
        self._names = {name for name, p in params.items() if p in chosen}

    def _mask(self, train_loader: Iterable[Any] | None) -> Tensor:
        return _whole(self.model, self._names)


class LastLayerSubnetMask(SubnetMask):
    """All entries of the layer that the model uses last.

    Args:
        model: the network.
        last_layer_name: name of its module; by default found by a forward pass over the first
            batch of the loader.
        forward_fn: as for `Laplace`.
        batch_fn: likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        last_layer_name: str | None = None,
        *,
        forward_fn: ForwardFn | None = None,
        batch_fn: BatchFn | None = None,
    ):
        super().__init__(model)
        self._name, self._forward_fn, self._batch_fn = last_layer_name, forward_fn, batch_fn

    def _mask(self, train_loader: Iterable[Any] | None) -> Tensor:
        if self._name is not None:
            return ModuleNameSubnetMask(self.model, [self._name])._mask(None)
        if train_loader is None:
            raise InvalidValue(
                "which layer is used last shows only when the model runs",
                where="train_loader",
                got=None,
                remedy="Pass training data to select, or last_layer_name",
            )
        with draws_kept():
            batch = next(iter(train_loader))
        x, _ = split_batch(batch, "labels", self._batch_fn)
        network = Network.of(self.model, resolve("regression"), self._forward_fn)
        with undisturbed(network.model):
            passed = network.record(network.batch(x), Knowledge(network.select("all")))
        return _whole(self.model, {*last_layer(passed.recording)})


def _trainable(model: nn.Module) -> Tensor:
    params = parameters_of(model)
    return _whole(model, {name for name, p in params.items() if p.requires_grad})


def _whole(model: nn.Module, names: set[str]) -> Tensor:
    """True for all entries of some parameters, (P,)."""
    parts = [
        torch.full((p.numel(),), name in names, device="cpu")
        for name, p in model.named_parameters()
    ]
    return torch.cat(parts)


def _check_names(where: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raise `InvalidValue` unless there are names, each of them known."""
    wrong = [name for name in names if name not in known]
    if isinstance(names, str) or not names or wrong:
        raise InvalidValue(
            "a list of names of the model is needed",
            where=where,
            got=repr(wrong or names),
            remedy=f"Choose from {list(known)}",
        )
