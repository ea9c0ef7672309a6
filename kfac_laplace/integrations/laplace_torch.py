"""This library's curvature as backends of laplace-torch 0.3: `backend=KfacGGN` in its `Laplace`.

Factors, evidence and predictive are then those of `kfac_laplace.Laplace(joint_bias=False)`, with
the weight sharing, layers and checks of this library. What `Kron` cannot hold is refused.
"""

import glob
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfac_laplace.curvature.backend import Curvature
from kfac_laplace.curvature.estimate.fisher import Fisher, MonteCarlo
from kfac_laplace.curvature.estimate.structures import Word
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.errors import InvalidType, MissingPackage, UnsupportedUse
from kfac_laplace.integrations.kron_entries import ELSEWHERE, Batch, entry, positions

REMEDY = 'Install it: pip install "kfac-laplace[laplace]"'


def check_version() -> None:
    """Raise `MissingPackage` unless laplace-torch 0.3 is installed."""
    try:
        version = importlib.metadata.version("laplace-torch")
    except importlib.metadata.PackageNotFoundError:
        raise MissingPackage(
            "these backends are for laplace-torch, which is not installed",
            where=__name__,
            remedy=REMEDY,
        ) from None
    if version.split(".")[:2] != ["0", "3"]:
        raise MissingPackage(
            "these backends are for laplace-torch 0.3", where=__name__, got=version, remedy=REMEDY
        )


check_version()
try:
    from laplace.curvature import CurvatureInterface, EFInterface, GGNInterface
    from laplace.utils import Kron
except Exception as error:  # builds that do not match raise other errors
    raise MissingPackage(
        "laplace-torch cannot be imported",
        where=__name__,
        got=error,
        remedy=f"{REMEDY}; it imports torchvision, which has to fit the torch that is here",
    ) from error


class KfacInterface(CurvatureInterface):
    """What the three backends share; not to be used itself.

    Args:
        model: the network, or laplace-torch's feature extractor around it.
        likelihood: "classification" or "regression".
        last_layer: whether only the parameters of the last layer are random.
        subnetwork_indices: entries of the parameter vector that are random; for "diag" and "full".
        dict_key_x: not used: batches that are mappings go to the model as they are.
        dict_key_y: likewise.
        options: "kfac_approx", "seed" and the other options of `Curvature`, but for those that
            laplace-torch has words for and for `batch_fn`.

    Raises:
        InvalidType: an option that is none.
        InvalidValue: an option out of range.
        UnsupportedUse: `joint_bias=True` or `uncovered="freeze"`, for which it has no place.
    """

    _fisher: str | Fisher = "exact"

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        last_layer: bool = False,
        subnetwork_indices: torch.LongTensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        **options: Any,
    ):
        super().__init__(model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y)
        if self._fisher != "exact" and "fisher" in options:
            raise InvalidType(
                f"{type(self).__name__} is one of its own",
                where="fisher",
                got=repr(options["fisher"]),
                remedy="Leave it out, or use KfacGGN",
            )
        self._options = {"fisher": self._fisher, **_checked(options)}
        self._curvatures: dict[str, Curvature] = {}
        self._seen, self._positions = 0, dict[str, float]()

    def kron(self, x: Any, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Kron]:
        """Loss and Kronecker factors of a batch.

        Args:
            x: inputs.
            y: targets.
            N: number of examples of the data set.
            kwargs: none.

        Returns:
            −Σ log p at σ = 1 without constants, and a `Kron` whose sum over batches is the GGN.

        Raises:
            UnsupportedUse: a parameter whose block `Kron` cannot hold.
        """
        _none_more(kwargs)
        loss, curvature = self._of_batch("kron", x, y)
        batch = Batch(curvature.n_data, N)
        self._check_positions(curvature, batch)
        entries = [entry(curvature.blocks[name], batch) for name in self._names]
        factors: list[Any] = [[self._as_theirs(factor) for factor in one] for one in entries]
        return loss, Kron(factors)

    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss and the diagonal (P,) of a batch; arguments as for `kron`."""
        _none_more(kwargs)
        loss, curvature = self._of_batch("diag", x, y)
        parts: dict[str, Tensor] = {}
        for block in curvature.blocks.values():
            order = block.layout.order.to(block.factors.device)
            sizes = [shape.numel() for shape in block.layout.shapes]
            parts |= dict(
                zip(block.params, block.factors.flatten()[order].split(sizes), strict=True)
            )
        diagonal = torch.cat([parts[name] for name in self._names])
        if self.subnetwork_indices is not None:
            diagonal = diagonal[self.subnetwork_indices.to(diagonal.device)]
        return loss, self._as_theirs(diagonal)

    def full(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss and the matrix (P, P) of a batch; arguments as for `kron`.

        Raises:
            UnsupportedUse: a subnetwork by another curvature than the GGN.
        """
        _none_more(kwargs)
        if self.subnetwork_indices is not None:  # P² entries would be made for a few of them
            if self._options["fisher"] != "exact":
                raise UnsupportedUse(
                    "a subnetwork has its whole matrix by the exact GGN alone",
                    where="hessian_structure",
                    got="'full'",
                    remedy="Use KfacGGN, or hessian_structure='diag'",
                )
            return super().full(x, y)
        loss, curvature = self._of_batch("full", x, y)
        return loss, self._as_theirs(curvature.blocks["full"].dense())

    @property
    def _names(self) -> list[str]:
        """The random parameters in laplace-torch's order, by their names in the whole model."""
        if not self.last_layer:
            return list(self.params_dict)
        names = {id(p): name for name, p in self.model.named_parameters()}
        return [names[id(p)] for p in self._model.parameters()]

    def _of_batch(self, structure: Word, x: Any, y: Tensor) -> tuple[Tensor, Curvature]:
        """The curvature of one batch, and its loss."""
        curvature = self._curvatures.get(structure) or self._start(structure)
        curvature.accumulate(x, y)
        after = curvature.empty()  # of no data, but it knows how the rows of the model lie
        after.generator.set_state(curvature.generator.get_state())
        self._curvatures[structure] = after
        self._check_names(curvature)
        one = torch.ones((), dtype=torch.float64, device=curvature.statistic.device)
        loss = -curvature.likelihood.log_likelihood(curvature.statistic, 0, one)
        return self._as_theirs(loss), curvature

    def _start(self, structure: Word) -> Curvature:
        patterns = [glob.escape(name) for name in self._names]
        options = CurvatureOptions.of(
            str(getattr(self.likelihood, "value", self.likelihood)),
            hessian_structure=structure,
            subset_of_weights=patterns if self.last_layer else "all",
            joint_bias=False,
            **{"forward_fn": _whole, **self._options},
        )
        return Curvature.of(self.model, options)

    def _check_names(self, curvature: Curvature) -> None:
        missing = [name for name in self._names if name not in curvature.params]
        if missing:
            raise UnsupportedUse(
                "laplace-torch takes these parameters for random, which are frozen",
                where=", ".join(missing),
                remedy="Let all parameters of the last layer require gradients, or make the "
                "posterior anew after freezing",
            )

    def _check_positions(self, curvature: Curvature, batch: Batch) -> None:
        """Raise `UnsupportedUse` where laplace-torch's sum of averages is not the average.

        It weighs the input factors of batches by their examples, the average over positions by
        positions. The same where each example has as many as in every other batch.
        """
        if self._seen + batch.examples > batch.total:  # another pass over the data
            self._seen, self._positions = 0, {}
        for name, block in curvature.blocks.items():
            found = positions(block, batch)
            known = self._positions.setdefault(name, found) if found is not None else None
            if found is None or known is None or abs(found - known) <= 1e-9 * known:
                continue
            self._seen, self._positions = 0, {}
            raise UnsupportedUse(
                "laplace-torch adds the input factors of batches by numbers of examples, which is "
                "right only where all batches have as many positions an example",
                where=name,
                got=f"{found:g} and {known:g}",
                remedy="Give all data in one batch, choose kfac_approx='reduce', or " + ELSEWHERE,
            )
        self._seen += batch.examples

    def _as_theirs(self, tensor: Tensor) -> Tensor:
        """In the model's precision, in which laplace-torch adds."""
        parameter = next(self.model.parameters())
        return tensor.to(parameter.device, parameter.dtype)


class KfacGGN(KfacInterface, GGNInterface):
    """The generalised Gauss-Newton matrix, as `Curvature` has it.

    With laplace-torch's words `stochastic=True` and `num_samples` it is `KfacMC`; `fisher` takes
    the other choices of `Curvature`, such as "hybrid". All else as for `KfacInterface`.
    """

    def __init__(
        self,
        *args: Any,
        stochastic: bool = False,
        num_samples: int = 1,
        **kwargs: Any,
    ):
        if stochastic:
            if "fisher" in kwargs:
                raise InvalidType(
                    "says the same as fisher",
                    where="stochastic",
                    got=True,
                    remedy="Pass one of the two",
                )
            kwargs["fisher"] = MonteCarlo(num_samples)
        super().__init__(*args, **kwargs)
        self.stochastic, self.num_samples = stochastic, num_samples


class KfacMC(KfacGGN):
    """The Fisher matrix by labels that are drawn from the model, `num_samples` an example."""

    def __init__(self, *args: Any, num_samples: int = 1, **kwargs: Any):
        super().__init__(*args, stochastic=True, num_samples=num_samples, **kwargs)


class KfacEF(KfacInterface, EFInterface):
    """The empirical Fisher matrix Σ ∇ℓ ∇ℓᵀ with ℓ = −log p at σ = 1, at the observed targets."""

    _fisher = "empirical"


def _whole(model: nn.Module, x: Any) -> Any:
    """Mappings are one argument, as laplace-torch has it."""
    return model(x)


#: laplace-torch's words for these are its own arguments, and batches come as it has split them
THEIRS = ("likelihood", "hessian_structure", "subset_of_weights", "batch_fn")


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a curvature that laplace-torch can do something with."""
    names = CurvatureOptions.__dataclass_fields__.keys() - set(THEIRS)
    for name in options:
        if name not in names:
            raise InvalidType(
                "no such option",
                where="backend_kwargs",
                got=repr(name),
                remedy=f"Choose from {sorted(names)}",
            )
    if options.get("joint_bias", False):
        raise UnsupportedUse(
            "laplace-torch's Kron has one entry for each tensor",
            where="joint_bias",
            got=True,
            remedy="Leave it out, or use kfac_laplace.Laplace for blocks of a weight with its bias",
        )
    if options.get("uncovered") == "freeze":
        raise UnsupportedUse(
            "laplace-torch's posterior is over all parameters that require gradients",
            where="uncovered",
            got="'freeze'",
            remedy="Set requires_grad to False, or use kfac_laplace.Laplace",
        )
    return {name: value for name, value in options.items() if name != "joint_bias"}


def _none_more(keywords: Mapping[str, Any]) -> None:
    """Raise `InvalidType` where laplace-torch hands on keywords for another backend."""
    unknown: Sequence[str] = sorted(keywords.keys() - {"N"})
    if unknown:
        raise InvalidType(
            "keywords of the ASDL backend mean nothing here",
            where="asdl_fisher_kwargs",
            got=unknown,
            remedy="Pass the options of kfac_laplace.Curvature as backend_kwargs",
        )
