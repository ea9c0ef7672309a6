"""The curvature's options as one frozen object: fields, checks, plain data, and what they bind."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypedDict, get_args

import numpy
import torch
from torch import Tensor, nn

from kfac_laplace import likelihoods
from kfac_laplace.curvature.estimate import fisher as fishers
from kfac_laplace.curvature.estimate import structures
from kfac_laplace.curvature.estimate.fisher import Fisher, FisherName
from kfac_laplace.curvature.estimate.settings import KfacApprox, check_kfac_approx
from kfac_laplace.curvature.estimate.structures import Kron, LowRank, Structure
from kfac_laplace.curvature.gradients.groups import Subset
from kfac_laplace.curvature.gradients.subnetwork import Subnetwork
from kfac_laplace.curvature.linalg.dtypes import FACTOR_DTYPES, FactorDtype
from kfac_laplace.curvature.model.batches import BatchFn
from kfac_laplace.curvature.model.budget import Budget
from kfac_laplace.curvature.model.forward import ForwardFn
from kfac_laplace.curvature.model.unchanged import parameters_of, unwrap
from kfac_laplace.curvature.ranks import Ranks, check_group, ranks_of
from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.likelihoods import Likelihood
from kfac_laplace.options import check_choice, check_seed, check_whole, unknown

Uncovered = Literal["diag", "error", "freeze"]
#: The memory in which blocks lie between uses.
Offload = Literal["cpu"]
UNCOVERED: tuple[Uncovered, ...] = get_args(Uncovered)
#: What is of a run and of its machine, and not of what was found: no file holds it.
OF_A_RUN = frozenset({"offload", "process_group"})
#: What stands in plain data for a function, which they cannot hold.
GIVEN = "given"


class CurvatureKeywords(TypedDict, total=False):
    """`CurvatureOptions` as keywords, for signatures that hand them on: `Unpack` spells them.

    The structure is not among them: laplace-torch's `marglik_training` takes it by position.
    """

    kfac_approx: KfacApprox
    fisher: FisherName | Fisher
    subset_of_weights: Subset
    joint_bias: bool
    uncovered: Uncovered
    seed: int
    factor_dtype: FactorDtype
    class_axis: int | None
    forward_fn: ForwardFn | None
    batch_fn: BatchFn | None
    memory_budget: int | None
    offload: Offload | None
    process_group: Any


@dataclass(frozen=True)
class CurvatureOptions:
    """Which curvature of a model is wanted, and how it is computed.

    Args:
        likelihood: "classification", "regression", "binary" or another name of a likelihood, or a
            `Likelihood`.
        kfac_approx: "auto", "expand", "reduce", or patterns of layer names to these (the first
            match counts).
        fisher: "exact", "hybrid", "mc", "empirical" or an object such as `Hybrid(passes=4)`.
        hessian_structure: "kron", "ekfac" (K-FAC's eigenbasis with the exact diagonal in it, by a
            second pass), "diag", "full", "lowrank" (the leading directions of "full"), or
            `LowRank(rank)`, or `Kron(rank)` ("kron" with few directions of wide factors).
        subset_of_weights: "all", "last_layer", parameter-name patterns, or a subnetwork: a mask
            or indices of all parameters behind one another, or masks by name.
        joint_bias: whether a weight and its bias share a block.
        uncovered: what happens to trainable parameters without a layer rule under "kron":
            an exact diagonal block ("diag"), an error ("error"), or they stay out ("freeze").
        seed: seed of labels and signs.
        factor_dtype: precision in which products of rows are summed. "auto": in float64, except
            that on the CPU rows of layers that share their weights are multiplied in their own
            precision before. torch.float64: all of it. torch.float32: nothing, which is fastest on
            devices that are slow in float64, and loses small eigenvalues (more so under TF32):
            trust the evidence then only where prior precisions are not small.
        class_axis: axis of the outputs that holds the outputs of one row, counted from 0 (the
            examples) or from the end. None: told by the first batch whose outputs have more than
            two axes, and refused where its shapes allow two.
        forward_fn: called as `forward_fn(model, x)` to give the output, where `model(x)` does not.
        batch_fn: takes a batch of the loader to (x, y), where it is no pair and no mapping.
        memory_budget: bytes that temporary tensors may take, about, here and in what a posterior
            computes; None: 1 GiB on a CPU, 8 GiB on other devices. Results do not depend on it.
        offload: "cpu": Kronecker factors, diagonals and eigenvectors lie in the CPU's memory, and
            come to the model's device one block at a time; None: they stay where they are made.
            Not stored in files.
        process_group: of the processes that each read a part of the data: "world" for all, or a
            group of torch.distributed; None: this process reads all of it. Not stored in files.

    Raises:
        InvalidValue: an unknown option.
        InvalidType: an option of a wrong kind.
    """

    likelihood: Likelihood
    kfac_approx: KfacApprox = "auto"
    fisher: Fisher = fishers.Exact()
    hessian_structure: Structure = "kron"
    subset_of_weights: Subset = "all"
    joint_bias: bool = True
    uncovered: Uncovered = "diag"
    seed: int = 0
    factor_dtype: FactorDtype = "auto"
    class_axis: int | None = None
    forward_fn: ForwardFn | None = None
    batch_fn: BatchFn | None = None
    memory_budget: int | None = None
    offload: Offload | None = None
    process_group: Any = None

    @classmethod
    def of(cls, likelihood: str | Likelihood, **keywords: Any) -> "CurvatureOptions":
        """Options from what users write: names instead of objects where there are names."""
        return cls(likelihood, **keywords)  # type: ignore[arg-type]  # resolved below

    def __post_init__(self) -> None:
        """Resolve names, copy what callers could change later, and check each option."""
        for option in fields(self):
            object.__setattr__(self, option.name, _own(getattr(self, option.name)))
        object.__setattr__(self, "likelihood", likelihoods.resolve(self.likelihood))
        object.__setattr__(self, "fisher", fishers.resolve(self.fisher))
        object.__setattr__(self, "hessian_structure", structures.resolve(self.hessian_structure))
        if isinstance(self.subset_of_weights, Tensor):
            object.__setattr__(self, "subset_of_weights", Subnetwork.of(self.subset_of_weights))
        self._check_subnetwork()
        check_choice("uncovered", self.uncovered, UNCOVERED)
        check_kfac_approx(self.kfac_approx)
        Budget(self.memory_budget)  # checks it
        self._check_offload()
        check_group(self.process_group)
        check_seed(self.seed)
        if not isinstance(self.joint_bias, bool):
            raise InvalidType("neither True nor False", where="joint_bias", got=self.joint_bias)
        if self.class_axis is not None:
            check_whole("class_axis", self.class_axis)
            if self.class_axis == 0:
                raise InvalidValue("axis 0 runs over the examples", where="class_axis", got=0)
        for name in ("forward_fn", "batch_fn"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise InvalidType("not a function", where=name, got=repr(getattr(self, name)))
        if self.factor_dtype not in FACTOR_DTYPES:
            raise unknown("factor_dtype", self.factor_dtype, FACTOR_DTYPES)

    def _check_subnetwork(self) -> None:
        """Raise `InvalidValue` for Kronecker factors of a part of a tensor."""
        given = self.subset_of_weights
        if isinstance(given, Subnetwork | Mapping) and structures.is_factored(
            self.hessian_structure
        ):
            raise InvalidValue(
                "a part of a matrix has no Kronecker factors: B ⊗ A is of all its rows and columns",
                where="subset_of_weights",
                got=f"a subnetwork with hessian_structure='{self.structure}'",
                remedy="Choose hessian_structure='full' or 'diag', or whole parameters by patterns "
                "of their names",
            )

    def _check_offload(self) -> None:
        """Raise `InvalidValue` for another memory than the CPU's, or a block that is used whole."""
        if self.offload is None:
            return
        if self.offload not in get_args(Offload):
            raise InvalidValue(
                "curvature lies on the model's device or in the CPU's memory",
                where="offload",
                got=repr(self.offload),
                remedy="Pass 'cpu' for the second, or leave it out",
            )
        if self.one_block is not None:
            raise InvalidValue(
                "one block of all parameters is used as a whole: none of it could stay elsewhere",
                where="offload",
                got=f"'{self.offload}' with hessian_structure='{self.structure}'",
                remedy="Choose hessian_structure='kron', Kron(rank), 'ekfac' or 'diag', or leave "
                "offload out",
            )

    def for_model(self, model: nn.Module) -> "CurvatureOptions":
        """The same with masks by parameter name as a subnetwork of a model."""
        given = self.subset_of_weights
        if not isinstance(given, Mapping):
            return self
        shapes = {name: p.shape for name, p in parameters_of(unwrap(model)).items()}
        return replace(self, subset_of_weights=Subnetwork.by_name(given, shapes))

    @property
    def budget(self) -> Budget:
        """`memory_budget`, and what each computation gets of it."""
        return Budget(self.memory_budget)

    def home(self, device: torch.device) -> torch.device | None:
        """Where blocks lie of a model on a device; None: there as well."""
        if self.offload is None or device.type in (self.offload, "meta"):
            return None
        return torch.device(self.offload)

    @property
    def ranks(self) -> Ranks | None:
        """The processes of `process_group`; None where this one has all of the data.

        Raises:
            InvalidValue: torch.distributed is not running.
        """
        return ranks_of(self.process_group)

    def alone(self) -> "CurvatureOptions":
        """The same for this process's own data."""
        return self if self.process_group is None else replace(self, process_group=None)

    def keywords(self) -> dict[str, Any]:
        """All but the likelihood, as keywords of `Curvature` and whatever hands them on."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "likelihood"}

    @property
    def structure(self) -> str:
        """The name of the structure, whatever the rank."""
        return structures.name_of(self.hessian_structure)

    @property
    def rank(self) -> int | None:
        """How many directions the structure keeps; None where it keeps all."""
        return getattr(self.hessian_structure, "rank", None)

    @property
    def one_block(self) -> str | None:
        """Name of the one block of all parameters; None where each group has its own."""
        return self.structure if self.structure in structures.TOGETHER else None

    @property
    def uncovered_stay_out(self) -> bool:
        """Whether parameters that no layer rule covers stay out of the posterior."""
        return self.structure in structures.FACTORED and self.uncovered == "freeze"

    def seeded(self, seed: int) -> "CurvatureOptions":
        """The same with another seed."""
        return replace(self, seed=seed)

    # --- equality ----------------------------------------------------------------------------

    def __hash__(self) -> int:
        """By what can always be hashed; patterns and objects of a user's own need not be."""
        return hash((type(self.likelihood), self.hessian_structure, self.joint_bias, self.seed))

    @property
    def loss(self) -> tuple[type[Likelihood], dict[str, Any]]:
        """The likelihood by kind and options, which `options` has to tell apart."""
        return type(self.likelihood), self.likelihood.options()

    @property
    def binding(self) -> tuple[Any, ...]:
        """What curvatures must share to be added: settings are compared group by group."""
        return self.hessian_structure, *self.loss

    # --- plain data --------------------------------------------------------------------------

    def to_plain(self) -> dict[str, Any]:
        """The options as plain data; objects that have no name become None, functions "given".

        Options of a run are left out.
        """
        return {name: _plain(getattr(self, name)) for name in self.stored_names()}

    @classmethod
    def stored_names(cls) -> list[str]:
        """Names of the options that plain data have."""
        return [option.name for option in fields(cls) if option.name not in OF_A_RUN]

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords (with the likelihood) from plain data.

        Args:
            plain: what `to_plain` made.
            overrides: keywords that count instead.

        Raises:
            InvalidValue: an object or function of the user's own, which only `overrides` can give.
        """
        found = {f.name: plain[f.name] for f in fields(cls) if f.name in plain} | dict(overrides)
        named: dict[str, Mapping[str, type]] = {
            "likelihood": likelihoods.NAMED,
            "fisher": fishers.NAMED,
            "hessian_structure": structures.NAMED,
        }
        for name, value in found.items():
            if name not in overrides and (value == GIVEN or (value is None and name in named)):
                raise InvalidValue(
                    "an object of your own is not stored in the file",
                    where=name,
                    remedy=f"Pass it: Laplace.load(path, model, {name}=...)",
                )
        for name, kinds in named.items():
            if isinstance(found.get(name), list):
                kind, given = found[name]
                found[name] = kinds[kind](**given)
        return found


def _own(value: Any) -> Any:
    """An option's value as ours: numbers of numpy as Python's, mappings and lists copied."""
    if isinstance(value, numpy.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _own(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """An option's value as plain data."""
    if isinstance(value, Likelihood):
        name = _name_of(value, likelihoods.NAMED)
        return None if name is None else [name, value.options()]
    if hasattr(value, "vectors"):
        name = _name_of(value, fishers.NAMED)
        return None if name is None else [name, asdict(value)]  # all with a name are dataclasses
    if isinstance(value, LowRank | Kron):
        return [structures.name_of(value), asdict(value)]
    if isinstance(value, Subnetwork):
        return value.indices
    if isinstance(value, Mapping):
        return dict(value)
    if callable(value):
        return GIVEN
    return list(value) if isinstance(value, list | tuple) else value


def _name_of(value: object, named: Mapping[str, type]) -> str | None:
    return next((name for name, kind in named.items() if type(value) is kind), None)
