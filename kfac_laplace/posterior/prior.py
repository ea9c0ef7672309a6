"""Gaussian priors N(θ | μ, P₀⁻¹), P₀ = diag δ: sharing, quadratic form, log-determinant."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.curvature.linalg.dtypes import accumulable
from kfac_laplace.errors import InvalidValue
from kfac_laplace.posterior.hyperparameters import one_number, positive, real
from kfac_laplace.posterior.layouts import Layouts
from kfac_laplace.posterior.patterns import by_name
from kfac_laplace.posterior.sharing import Sharing, check_index
from kfac_laplace.posterior.squares import SMALL, Mean, WeightedSquares, squared_norms

#: What `prior_precision` and `prior_mean` may be: a number, a tensor, or {pattern: number}.
Given = float | Tensor | Mapping[str, float]


@dataclass(frozen=True)
class Prior:
    """N(θ | μ, diag δ⁻¹) over the parameters of a posterior, as a function of its precisions.

    Args:
        sharing: which entries share a precision.
        layouts: the groups' layouts.
        means: μ of each parameter, one number or a float64 tensor of its shape.
        device: where precisions and parameters lie.
    """

    sharing: Sharing
    layouts: Layouts
    means: Mapping[str, Mean]
    device: torch.device

    @classmethod
    def of(cls, sharing: Sharing, layouts: Layouts, mean: Given, device: torch.device) -> "Prior":
        """The prior with the mean that users gave.

        Raises:
            InvalidValue: a mean of a wrong length, or patterns that do not fit the parameters.
        """
        return cls(sharing, layouts, _means(mean, layouts, device), device)

    # --- precisions --------------------------------------------------------------------------

    @cached_property
    def index(self) -> dict[str, Tensor]:
        """For each group the places of its precisions, broadcastable to its matrices (b, o, i)."""
        with torch.inference_mode(False):
            whole = self.layouts.whole
            index = self.sharing.index(whole)
            check_index(index, whole, self.sharing)
            if self.layouts.has_parts:
                index = _index_of_parts(index, self.layouts)
            return {name: index[name].to(self.device) for name in self.layouts.groups}

    @cached_property
    def _places(self) -> Tensor:
        """The index of all groups, one behind the other."""
        with torch.inference_mode(False):
            return torch.cat([places.flatten() for places in self.index.values()])

    @cached_property
    def length(self) -> int:
        """Number of distinct precisions."""
        return int(self._places.max()) + 1

    @property
    def digest(self) -> str:
        """Which entry has which precision, in a few letters: they differ between sharings."""
        found = hashlib.sha256()
        for name, places in self.index.items():
            found.update(f"{name}{tuple(places.shape)}".encode())
            found.update(places.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    @property
    def size(self) -> int:
        """Number of scalar parameters p."""
        return self.layouts.size

    @property
    def constant_on_blocks(self) -> bool:
        """Whether each group has one precision."""
        return self.sharing.constant_on_blocks

    def full(self, precision: Tensor) -> Tensor:
        """The precisions as a vector (length,), from such a vector or from one value for all."""
        if precision.numel() == 1:
            return precision.reshape(1).expand(self.length)
        if precision.shape != (self.length,):
            each = precision.shape == (self.size,)
            raise InvalidValue(
                f"a '{self.sharing.title}' prior has {self.length} precisions",
                where="prior_precision",
                got=f"shape {tuple(precision.shape)}",
                remedy="Pass one value, or one for each entry of that structure"
                + ("; prior_structure='diag' has one for each parameter" if each else ""),
            )
        return precision

    def resolve(self, given: Tensor | Mapping[str, float]) -> Tensor:
        """The precisions (length,) that users gave as numbers, or by patterns of parameter names.

        Raises:
            InvalidValue: a wrong length, patterns that do not fit the parameters, or that give
                different values to entries that share a precision.
        """
        if isinstance(given, Tensor):
            return self.full(given)
        numbers = by_name(given, self.layouts.params, "prior_precision")
        places, values = self._spread(numbers)
        empty = torch.zeros(self.length, dtype=torch.float64, device="cpu")
        low, high = (
            empty.scatter_reduce(0, places, values, extreme, include_self=False)
            for extreme in ("amin", "amax")
        )
        if not torch.equal(low, high):
            place = int((low != high).nonzero()[0])
            inside = [
                f"{numbers[param]} for '{param}'"
                for name, layout in self.layouts.groups.items()
                if bool((self.index[name] == place).any())
                for param in layout.params
            ]
            raise InvalidValue(
                "patterns give different values to parameters that share a precision",
                where="prior_precision",
                got=", ".join(inside),
                remedy="Use joint_bias=False where a weight and its bias differ, a prior_structure "
                f"of more precisions than '{self.sharing.title}', or one value for them all",
            )
        return low.to(self.device)

    def _spread(self, numbers: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """Places of precisions, and the numbers that stand there, on the CPU."""
        values = {
            n: torch.tensor(float(v), dtype=torch.float64, device="cpu") for n, v in numbers.items()
        }
        if self.constant_on_blocks:
            ordered = [values[name] for bundle in self._bundles for name in bundle]
            return self._place_of_parameter.cpu(), torch.stack(ordered)
        full = {name: values[name].expand(shape) for name, shape in self.layouts.shapes.items()}
        places = [
            self.index[name].cpu().expand(layout.matrix).flatten()
            for name, layout in self.layouts.groups.items()
        ]
        packed = [matrices.flatten() for matrices in self.layouts.pack(full).values()]
        return torch.cat(places), torch.cat(packed)

    def by_group(self, precision: Tensor) -> dict[str, Tensor]:
        """δ of each group, broadcastable to its matrices (b, o, i)."""
        spread = self.full(precision).index_select(0, self._places)
        parts = spread.split([places.numel() for places in self.index.values()])
        return {
            name: part.reshape(self.index[name].shape)
            for name, part in zip(self.index, parts, strict=True)
        }

    def by_block(self, precision: Tensor) -> Tensor:
        """δ of each group, shape (groups,), where each has one."""
        assert self.constant_on_blocks
        return self.full(precision).index_select(0, self._places)

    def shared_by_block(self, values: Tensor) -> Tensor:
        """Sums (length,) of one value for each group (groups,), where each has one precision."""
        assert self.constant_on_blocks
        return self._add(self._places, values)

    def shared_sums(self, matrices: Mapping[str, Tensor]) -> Tensor:
        """Sums over the entries that share a precision, shape (length,).

        Args:
            matrices: group name to matrices (b, o, i), or to what is summed over a group already.
        """
        sums = [matrices[name].sum_to_size(places.shape) for name, places in self.index.items()]
        return self._add(self._places, torch.cat([part.flatten() for part in sums]))

    def _add(self, places: Tensor, values: Tensor) -> Tensor:
        return values.new_zeros(self.length).index_add(0, places, values)

    # --- the density -------------------------------------------------------------------------

    def log_det(self, precision: Tensor) -> Tensor:
        """log det P₀, differentiable in the precisions."""
        return (self.counts * self.full(precision).log()).sum()

    @cached_property
    def counts(self) -> Tensor:
        """How many entries share each precision, (length of the prior,)."""
        with torch.inference_mode(False):
            one = torch.ones((), dtype=torch.float64, device=self.device)
            groups = self.layouts.groups.items()
            return self.shared_sums({name: one.expand(la.matrix) for name, la in groups})

    def squares(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Σ (θ − μ)² over the entries that share a precision, float64, shape (length,).

        Args:
            parameters: θ by name, in their own shapes and dtypes; differentiable in them.
        """
        if self._is_bundled:
            norms = squared_norms(self._bundled(parameters), self._means)
            return self._add(self._place_of_parameter, norms)
        squares = {
            name: (accumulable(parameters[name]) - self._mean(name, parameters[name])).square()
            for name in self.layouts.params
        }
        return self.shared_sums(self.layouts.pack(squares)).double()

    def quadratic(self, parameters: Mapping[str, Tensor], precision: Tensor) -> Tensor:
        """(θ − μ)ᵀ P₀ (θ − μ), shape (), differentiable in parameters and precisions.

        Args:
            parameters: θ by name, in their own shapes and dtypes.
            precision: δ, one value or one for each precision.
        """
        return torch.dot(self.full(precision), self.squares(parameters))

    def penalty(self, precision: Tensor) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """The quadratic form at fixed precisions, for training: a function of the parameters.

        Where each group has one precision it is cheap: nothing of the size of the weights is made
        but their gradients, and the device is never waited for.

        Args:
            precision: δ, one value or one for each precision; its gradient is left out.
        """
        precision = self.full(precision.detach())
        if not self._is_bundled:
            return partial(self.quadratic, precision=precision)
        weights = precision.index_select(0, self._place_of_parameter)
        counts = [len(bundle) for bundle in self._bundles]
        return WeightedSquares(self._bundles, self._means, weights.split(counts))

    @property
    def _is_bundled(self) -> bool:
        """Whether each parameter has one precision for all of its entries."""
        return self.constant_on_blocks and not self.layouts.has_parts

    def _bundled(self, parameters: Mapping[str, Tensor]) -> list[list[Tensor]]:
        return [[parameters[name] for name in bundle] for bundle in self._bundles]

    @cached_property
    def _means(self) -> list[Mean]:
        """μ of each bundle."""
        return [self.means[bundle[0]] for bundle in self._bundles]

    @cached_property
    def _bundles(self) -> list[list[str]]:
        """Parameters that are taken together: small ones of one shape and mean."""
        found: dict[object, list[str]] = {}
        for name, shape in self.layouts.shapes.items():
            mean = self.means[name]
            together = shape.numel() <= SMALL and not isinstance(mean, Tensor)
            found.setdefault((shape, mean) if together else name, []).append(name)
        return list(found.values())

    @cached_property
    def _place_of_parameter(self) -> Tensor:
        """Where the precision of each parameter stands, in the order of the bundles."""
        with torch.inference_mode(False):
            groups = self.layouts.groups.items()
            place = {param: self.index[name] for name, la in groups for param in la.params}
            return torch.stack([place[name] for bundle in self._bundles for name in bundle])

    def _mean(self, name: str, like: Tensor) -> Mean:
        mean = self.means[name]
        return mean.to(accumulable(like).dtype) if isinstance(mean, Tensor) else mean


def layouts_of(groups: Iterable[Group], params: Iterable[str]) -> Layouts:
    """The layouts of a curvature's groups and parameters."""
    return Layouts({group.name: group.block_layout for group in groups}, tuple(params))


def _index_of_parts(index: Mapping[str, Tensor], layouts: Layouts) -> dict[str, Tensor]:
    """An index of all entries as one of those that are inside: precisions without any go."""
    found = {
        name: places if not places.ndim else layout.of_whole(places.expand(layout.whole.matrix))
        for name, places in index.items()
        for layout in (layouts.groups[name],)
    }
    used = torch.cat([places.flatten() for places in found.values()]).unique()
    return {name: torch.searchsorted(used, places) for name, places in found.items()}


def given_precision(value: object, device: torch.device) -> Tensor | dict[str, float]:
    """A checked `prior_precision`: a float64 tensor that keeps its graph, or {pattern: number}."""
    if not isinstance(value, Mapping):
        return positive(value, "prior_precision", device)
    if not value:
        raise InvalidValue("no pattern", where="prior_precision", got=value)
    return {
        pattern: float(one_number(positive(number, "prior_precision"), "prior_precision"))
        for pattern, number in value.items()
    }


def starting_precision(
    value: object, device: torch.device
) -> tuple[Tensor, dict[str, float] | None]:
    """A checked initial δ, and the patterns it was given by, if any.

    Which precisions patterns set shows only when the model is used: until then 1 stands for them.
    """
    given = given_precision(value, device)
    if isinstance(given, Tensor):
        return given, None
    return torch.ones((), dtype=torch.float64, device=device), given


def checked_mean(value: Given) -> Given:
    """A `prior_mean`, checked to be finite; patterns with plain numbers."""
    if isinstance(value, Mapping):
        if not value:
            raise InvalidValue("no pattern", where="prior_mean", got=value)
        numbers = {pattern: real(number, "prior_mean") for pattern, number in value.items()}
        return {p: float(one_number(number, "prior_mean")) for p, number in numbers.items()}
    mean = real(value, "prior_mean").detach()  # a copy: the caller's may change
    return float(mean) if mean.numel() == 1 and not isinstance(value, Tensor) else mean


def _means(given: Given, layouts: Layouts, device: torch.device) -> dict[str, Mean]:
    """μ by parameter name."""
    if isinstance(given, Mapping):
        numbers = by_name(given, layouts.params, "prior_mean")
        return {name: float(number) for name, number in numbers.items()}
    mean = real(given, "prior_mean", device).detach()
    if mean.numel() == 1:
        return dict.fromkeys(layouts.params, float(mean))
    if mean.numel() != layouts.size:
        raise InvalidValue(
            f"one value or {layouts.size} are needed",
            where="prior_mean",
            got=tuple(mean.shape),
            remedy="Follow the order of the parameters in the model",
        )
    return dict(layouts.by_parameter(mean.reshape(-1)))
