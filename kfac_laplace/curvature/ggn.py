"""The curvature backend: the GGN of a model as blocks, summed over the data batch by batch.

All scaling happens here and in the blocks' normalisation: curvature is a raw sum over examples at
σ = 1 and T = 1. The likelihood scale 1/(σ²T) and the prior join in the posterior.
"""

import copy
import logging
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm
from typing_extensions import Self

from kfac_laplace import likelihoods
from kfac_laplace.curvature.estimate import fisher as fishers
from kfac_laplace.curvature.estimate.blocks import Block
from kfac_laplace.curvature.estimate.estimator import Estimator
from kfac_laplace.curvature.estimate.fisher import Fisher
from kfac_laplace.curvature.estimate.settings import (
    KfacApprox,
    Setting,
    check_kfac_approx,
    resolve_settings,
)
from kfac_laplace.curvature.gradients.forward_pass import Pass
from kfac_laplace.curvature.gradients.groups import Group, Subset
from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.gradients.probing import learn_row_layouts
from kfac_laplace.curvature.linalg.dtypes import FACTOR_DTYPES, FactorDtype, SumDtype
from kfac_laplace.curvature.model.batches import AnyBatch, Batch, BatchFn, split_batch
from kfac_laplace.curvature.model.budget import Budget
from kfac_laplace.curvature.model.forward import ForwardFn
from kfac_laplace.curvature.model.unchanged import undisturbed
from kfac_laplace.curvature.rows.layout import Layout, flat_layout
from kfac_laplace.errors import (
    InvalidType,
    InvalidValue,
    KfacLaplaceError,
    NotFitted,
    UnsupportedUse,
)
from kfac_laplace.likelihoods import Likelihood, check_finite
from kfac_laplace.options import check_choice, check_whole

log = logging.getLogger("kfac_laplace")

Structure = Literal["kron", "diag", "full"]
STRUCTURES = ("kron", "diag", "full")
Uncovered = Literal["diag", "error", "freeze"]
UNCOVERED = ("diag", "error", "freeze")


class Curvature:
    """The GGN Σ_n J_nᵀ Λ_n J_n of a model as blocks, at σ = 1 and T = 1 [KFAC23].

    Args:
        model: the network; it is never changed. Passes run in evaluation mode.
        likelihood: "classification", "regression", "binary" or a `Likelihood`.
        kfac_approx: "auto", "expand", "reduce", or patterns of layer names to these (the first
            match counts).
        fisher: "exact", "hybrid", "mc", "empirical" or an object such as `Hybrid(passes=4)`.
        hessian_structure: "kron", "diag" or "full".
        subset_of_weights: "all", "last_layer" or parameter-name patterns.
        joint_bias: whether a weight and its bias share a block.
        uncovered: what happens to trainable parameters without a layer rule under "kron":
            an exact diagonal block ("diag"), an error ("error"), or they stay out ("freeze").
        seed: seed of labels and signs.
        factor_dtype: precision in which products of rows are summed. "auto": in float64, except
            that on the CPU rows of layers that share their weights are multiplied in their own
            precision before. torch.float64: all of it. torch.float32: nothing, which is fastest on
            devices that are slow in float64, and loses small eigenvalues (more so under TF32):
            trust the evidence then only where prior precisions are not small.
        forward_fn: called as `forward_fn(model, x)` to give the output, where `model(x)` does not.
        batch_fn: takes a batch of the loader to (x, y), where it is no pair and no mapping.
        memory_budget: bytes that temporary tensors may take, about, here and in what a posterior
            computes; None: 1 GiB on a CPU, 8 GiB on other devices. Results do not depend on it.

    Raises:
        InvalidValue: an unknown option or a pattern that matches nothing.
        UnsupportedUse: a scripted or compiled module, or parameters on several devices.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        kfac_approx: KfacApprox = "auto",
        fisher: str | Fisher = "exact",
        hessian_structure: Structure = "kron",
        subset_of_weights: Subset = "all",
        joint_bias: bool = True,
        uncovered: Uncovered = "diag",
        seed: int = 0,
        factor_dtype: FactorDtype = "auto",
        forward_fn: ForwardFn | None = None,
        batch_fn: BatchFn | None = None,
        memory_budget: int | None = None,
    ):
        check_choice("hessian_structure", hessian_structure, STRUCTURES)
        check_choice("uncovered", uncovered, UNCOVERED)
        check_kfac_approx(kfac_approx)
        check_whole("seed", seed)
        if factor_dtype not in FACTOR_DTYPES:
            raise InvalidValue(
                "unknown option",
                where="factor_dtype",
                got=factor_dtype,
                remedy=f"Choose one of {FACTOR_DTYPES}",
            )
        self.likelihood = likelihoods.resolve(likelihood)
        self.budget = Budget(memory_budget)
        self.network = Network(
            model, self.likelihood, subset_of_weights, joint_bias, forward_fn, self.budget
        )
        self.factor_dtype, self.sum_dtype = factor_dtype, SumDtype(factor_dtype)
        self.batch_fn = batch_fn
        self.kfac_approx = kfac_approx
        self.fisher = fishers.resolve(fisher)
        self.hessian_structure = hessian_structure
        self.uncovered = uncovered
        self.generator = torch.Generator().manual_seed(seed)
        self.blocks: dict[str, Block] = {}
        self.settings: dict[str, Setting] = {}
        self.n_data = 0
        self.n_rows = 0
        self.n_outputs = 0
        self.statistic = torch.zeros((), dtype=torch.float64)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Groups of parameters that share a prior precision by layer, in model order."""
        return self.network.groups

    @property
    def params(self) -> tuple[str, ...]:
        """Names of the parameters inside the posterior, in model order."""
        inside = {name for group in self.groups for name in group.layout.params}
        return tuple(name for name in self.network.tracked if name in inside)

    @property
    def coverage(self) -> dict[str, str]:
        """How each parameter of the model is treated: "kron", "diag", "dense" or "frozen"."""
        kinds = {name: block.kind for block in self.blocks.values() for name in block.params}
        return {
            name: kinds.get(name, "frozen") for name, _ in self.network.model.named_parameters()
        }

    def fit(self, loader: Iterable[Any], *, key_y: str = "labels", progress: bool = False) -> Self:
        """Add every batch of a loader.

        Args:
            loader: yields pairs (x, y) or mappings that hold the targets under `key_y`.
            key_y: name of the targets in mappings.
            progress: show a progress bar.

        Raises:
            InvalidValue: the loader is empty, or a batch is bad. Batches before it stay counted.
        """
        if not isinstance(loader, Iterable):
            raise InvalidType(
                "not an iterable of batches",
                where="train_loader",
                got=type(loader).__name__,
                remedy="Pass a DataLoader or a list of batches",
            )
        batches = 0
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws from the global generator
            for batch in tqdm(loader, desc="curvature", disable=not progress, leave=False):
                self.accumulate(*split_batch(batch, key_y, self.batch_fn))
                batches += 1
        if not batches:
            raise InvalidValue(
                "the loader yielded no batch",
                where="train_loader",
                got="0 batches",
                remedy="Check its length; a generator can be read only once",
            )
        return self

    def empty(self) -> "Curvature":
        """A curvature of no data with the same options, which knows the model's groups already."""
        fresh = copy.copy(self)
        fresh.blocks, fresh.n_data, fresh.n_rows, fresh.n_outputs = {}, 0, 0, 0
        fresh.statistic = torch.zeros_like(self.statistic)
        fresh.generator = torch.Generator().manual_seed(self.generator.initial_seed())
        return fresh

    def accumulate(
        self, x: Any, y: Tensor, *, parameters: Mapping[str, Tensor] | None = None
    ) -> Self:
        """Add one batch; after an exception nothing has been added.

        Args:
            x: inputs: a tensor (n, ...), a mapping (keyword arguments) or a sequence.
            y: targets that fit the likelihood.
            parameters: weights by name at which to take the curvature; the model's own by default.

        Raises:
            InvalidValue: non-finite outputs or curvature, targets of a wrong shape or range.
            InvalidType: targets of a wrong dtype.
            UnsupportedUse: a use of a parameter that cannot be treated correctly.
        """
        draws, known = self.generator.get_state(), self.network.knowledge()
        settings = self.settings
        try:
            with undisturbed(self.network.model):
                batch = self.network.batch(x, len(y) if y.ndim else None)
                try:
                    self._accumulate(batch, y, parameters)
                except RuntimeError as error:
                    # A backward pass of the model's own may mean the order in memory as well.
                    if isinstance(error, KfacLaplaceError) or not self.network.reorders:
                        raise
                    self.network.reorders = False
                    self.generator.set_state(draws)
                    self._accumulate(batch, y, parameters)
        except BaseException:
            self.generator.set_state(draws)
            self.network.forget_since(known)
            self.settings = settings
            raise
        return self

    def _accumulate(
        self, batch: AnyBatch, y: Tensor, parameters: Mapping[str, Tensor] | None
    ) -> None:
        passed = self.network.run(batch, parameters)
        f, y = self._aligned(passed, y.to(self.network.device))
        statistic = self.likelihood.statistic(f, y)
        targets = passed.by_example(y)
        passed.counted = self.likelihood.importance(targets)
        idle = _idle_examples(passed.counted)
        learn_row_layouts(passed)
        if not self.groups:
            self.network.check_examples(passed)
            self._learn(passed)
        # Examples whose labels are all ignored would enter the input factors alone.
        if bool(idle.any()) and not bool(idle.all()) and isinstance(batch, Batch):
            kept = (~idle).nonzero()[:, 0]
            passed, targets = self.network.run(batch.select(kept), parameters), targets[kept]
            passed.counted = self.likelihood.importance(targets)
        blocks = Estimator(self, passed).blocks(targets)
        if bool(idle.all()):
            blocks = {name: block.zero() for name, block in blocks.items()}
        for name, block in blocks.items():
            if not block.is_finite():
                raise InvalidValue(
                    "non-finite curvature",
                    where=name,
                    remedy="Check inputs and weights; half precision may overflow",
                )
        self.blocks = {
            name: block.absorb(self.blocks[name]) if name in self.blocks else block
            for name, block in blocks.items()
        }
        self.statistic = self.statistic.to(statistic.device) + statistic
        self.n_data += batch.n
        self.n_rows += len(f)
        self.n_outputs += f.numel()

    def _aligned(self, passed: Pass, y: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (rows, t, c) without their graph and targets, checked against each other."""
        output = passed.recording.output
        rows = (output.ndim and output.shape[0], y.ndim and y.shape[0])
        nodes = output.ndim > 0 and passed.output_segments is not None
        if rows[0] != rows[1] or not rows[0] or not (nodes or rows[0] == passed.n):
            raise InvalidValue(
                "inputs, outputs and targets differ in their number of examples",
                where="batch",
                got=f"{passed.n} inputs, output {tuple(output.shape)}, target {tuple(y.shape)}",
                remedy="The first axis must run over the examples",
            )
        axis = self.likelihood.class_axis(output, y)
        if not self.n_data:
            self.network.class_axis = axis
        f = passed.output_rows.detach()
        check_finite(f)
        return f, self.likelihood.align_target(y, f)

    def _learn(self, passed: Pass) -> None:
        """Find the groups, treat the uncovered ones, resolve the settings."""
        network = self.network
        network.learn(passed)
        generic = [group.name for group in network.groups if not group.covered]
        if generic and self.hessian_structure == "kron":
            if self.uncovered == "error":
                network.groups = ()
                raise UnsupportedUse(
                    "no layer rule gives these parameters Kronecker factors",
                    where=", ".join(generic),
                    remedy="Choose uncovered='diag' or 'freeze', or register a rule",
                )
            if self.uncovered == "freeze":
                network.groups = tuple(g for g in network.groups if g.covered)
            if not network.listed:
                names = ", ".join(generic)
                log.info("without Kronecker factors, treated as '%s': %s", self.uncovered, names)
                network.listed = True
        layers = [group.name for group in network.groups if group.treatment == "kron"]
        shared = passed.recording.output.ndim > 2 or passed.output_segments is not None
        try:
            self.settings = dict(resolve_settings(self.kfac_approx, layers, shared))
        except InvalidValue:
            network.groups = ()
            raise

    @property
    def full_layout(self) -> Layout:
        """All parameters of the posterior behind one another, in model order."""
        shapes = {
            name: shape
            for group in self.groups
            for name, shape in zip(group.layout.params, group.layout.shapes, strict=True)
        }
        return flat_layout({name: shapes[name] for name in self.params})

    def merge(self, other: "Curvature") -> Self:
        """Add the curvature of other data, computed on the same model with the same options.

        Raises:
            NotFitted: `other` has seen no data.
            InvalidValue: the two have different blocks or settings.
        """
        if not other.blocks:
            raise NotFitted("nothing to merge", where="other", remedy="Fit it first")
        if (self.hessian_structure, *self._loss) != (other.hessian_structure, *other._loss):
            raise InvalidValue(
                "the two have different structures or likelihoods",
                where="merge",
                got=f"'{other.hessian_structure}' into '{self.hessian_structure}'",
                remedy="Use the same options for both",
            )
        if not self.blocks:
            self.network.groups, self.settings = other.groups, dict(other.settings)
            self.network.tracked = list(other.network.tracked)
            self.network.class_axis = other.network.class_axis
            self.network.row_entries = other.network.row_entries
            self.blocks = dict(other.blocks)
        elif self._signature() != other._signature():
            raise InvalidValue(
                "the two were computed with different blocks or settings",
                where="merge",
                remedy="Use the same model and options for both",
            )
        else:
            self.blocks = {name: block + other.blocks[name] for name, block in self.blocks.items()}
        self.network.remember(other.network)
        self.statistic = self.statistic.to(other.statistic.device) + other.statistic
        self.n_data += other.n_data
        self.n_rows += other.n_rows
        self.n_outputs += other.n_outputs
        return self

    def _signature(self) -> object:
        """What two curvatures must share to be added."""
        layouts = {name: (type(block), block.layout) for name, block in self.blocks.items()}
        return layouts, self.settings, self.fisher, self._loss

    @property
    def _loss(self) -> tuple[type[Likelihood], dict[str, Any]]:
        """The likelihood by kind and options: objects of one's own have no equality."""
        return type(self.likelihood), self.likelihood.options()


def _idle_examples(counted: Tensor | None) -> Tensor:
    """Mask (n,) of the examples without an output that counts, shape (1,) where all count."""
    if counted is None:
        return torch.zeros(1, dtype=torch.bool)
    return (counted == 0).flatten(1).all(1)
