"""The curvature backend: the GGN of a model, batch by batch."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm
from typing_extensions import Self

from kfac_laplace.curvature.accumulate import with_batch
from kfac_laplace.curvature.checkpoint import Checkpoint, Keeping, Phase
from kfac_laplace.curvature.distributed import Source, decomposed, eigenbases, read_parts
from kfac_laplace.curvature.estimate.blocks import Block
from kfac_laplace.curvature.estimate.fisher import Fisher, FisherName
from kfac_laplace.curvature.estimate.settings import KfacApprox, Setting
from kfac_laplace.curvature.estimate.structures import Structure
from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.gradients.effect import check_effect, tell_unused
from kfac_laplace.curvature.gradients.groups import Group, Subset
from kfac_laplace.curvature.gradients.knowledge import Knowledge
from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.gradients.subnetwork import GivenSubnetwork
from kfac_laplace.curvature.linalg.dtypes import FactorDtype
from kfac_laplace.curvature.model.batches import BatchFn, split_batch
from kfac_laplace.curvature.model.forward import ForwardFn
from kfac_laplace.curvature.model.unchanged import parameters_of
from kfac_laplace.curvature.options import CurvatureOptions, Offload, Uncovered
from kfac_laplace.curvature.ranks import Ranks
from kfac_laplace.curvature.shards import own_part, tell_of_a_part
from kfac_laplace.curvature.spelling import suggesting
from kfac_laplace.curvature.state import ggn_from_state, ggn_to_state
from kfac_laplace.errors import InvalidValue, NotFitted
from kfac_laplace.likelihoods import Likelihood, LikelihoodName
from kfac_laplace.options import check_iterable, check_text
from kfac_laplace.process import draws_kept
from kfac_laplace.states.plain import check_seal, sealed
from kfac_laplace.states.stored import FORMAT, opened, refusing_damage


class Curvature:
    """The GGN Σ_n J_nᵀ Λ_n J_n of a model as blocks, at σ = 1 and T = 1 [KFAC23].

    What it has found so far is `ggn`, a frozen object that each batch replaces.

    Args:
        model: the network; it is never changed. Passes run in evaluation mode.
        likelihood: "classification" or another name of docs/likelihoods.md, or a `Likelihood`.
        kfac_approx: "auto", "expand", "reduce", or patterns of layer names to these (the first
            match counts).
        fisher: "exact", "hybrid", "mc", "empirical" or an object such as `Hybrid(passes=4)`.
        hessian_structure: "kron", "ekfac", "diag", "full", "lowrank", `LowRank(rank)`,
            or `Kron(rank)`.
        subset_of_weights: "all", "last_layer", patterns of names, or a subnetwork; see `Laplace`.
        joint_bias: whether a weight and its bias share a block.
        uncovered: "diag", "error" or "freeze", for parameters without a layer rule under "kron".
        seed: seed of labels and signs.
        factor_dtype: precision in which products of rows are summed; `CurvatureOptions` says what
            each of "auto", torch.float64 and torch.float32 costs.
        class_axis: axis of the outputs that holds the outputs of one row, also from the end; None:
            told by the shapes, and refused where they allow two.
        forward_fn: called as `forward_fn(model, x)` to give the output, where `model(x)` does not.
        batch_fn: takes a batch of the loader to (x, y), where it is no pair and no mapping.
        memory_budget: bytes that temporary tensors may take, about; None: 1 GiB on a CPU, 8 GiB on
            other devices. Results do not depend on it.
        offload: "cpu": curvature of a model on a GPU lies in the CPU's memory, and a block at a
            time comes to the GPU; None: it stays on the model's device.
        process_group: "world" or a group of torch.distributed, whose processes each read their part
            of the data: what is found is that of all data, and on all of them the same. None: this
            process reads all data.

    Raises:
        InvalidValue: an unknown option or a pattern that matches nothing.
        UnsupportedUse: a scripted or compiled module, or parameters that are complex, without
            shapes yet, made in inference mode, or on several devices.
    """

    @suggesting
    def __init__(
        self,
        model: nn.Module,
        likelihood: LikelihoodName | Likelihood,
        *,
        kfac_approx: KfacApprox = "auto",
        fisher: FisherName | Fisher = "exact",
        hessian_structure: Structure = "kron",
        subset_of_weights: Subset | GivenSubnetwork = "all",
        joint_bias: bool = True,
        uncovered: Uncovered = "diag",
        seed: int = 0,
        factor_dtype: FactorDtype = "auto",
        class_axis: int | None = None,
        forward_fn: ForwardFn | None = None,
        batch_fn: BatchFn | None = None,
        memory_budget: int | None = None,
        offload: Offload | None = None,
        process_group: Any = None,
    ):
        options = CurvatureOptions.of(
            likelihood,
            kfac_approx=kfac_approx,
            fisher=fisher,
            hessian_structure=hessian_structure,
            subset_of_weights=subset_of_weights,
            joint_bias=joint_bias,
            uncovered=uncovered,
            seed=seed,
            factor_dtype=factor_dtype,
            class_axis=class_axis,
            forward_fn=forward_fn,
            batch_fn=batch_fn,
            memory_budget=memory_budget,
            offload=offload,
            process_group=process_group,
        )
        self._start(model, options)

    def _start(self, model: nn.Module, options: CurvatureOptions) -> None:
        options = options.for_model(model)
        self.options = options
        self.network = Network.of(model, options.likelihood, options.forward_fn, options.budget)
        chosen = self.network.select(options.subset_of_weights, options.uncovered_stay_out)
        self.ggn = GGN(options, Knowledge(chosen))
        self.generator = Generator().manual_seed(options.seed)

    @classmethod
    def of(cls, model: nn.Module, options: CurvatureOptions) -> Self:
        """A curvature of no data by options that are an object."""
        made = cls.__new__(cls)
        made._start(model, options)
        return made

    def remember(self, known: Knowledge, settings: Mapping[str, Setting] | None = None) -> Self:
        """Take over what is known of the same model: it need not be found out again.

        Args:
            known: how rows lie.
            settings: expand or reduce, as they were decided; decided anew unless they are those
                of all groups that are found.
        """
        rows = known.rows_alone(self.ggn.knowledge.tracked)
        self.ggn = replace(self.ggn, knowledge=rows, settings=settings or {})
        return self

    def copy(self) -> Self:
        """The same data so far, to which each of the two adds its own."""
        made = self.of(self.network.model, self.options)
        made.ggn = self.ggn
        made.generator.set_state(self.generator.get_state())
        return made

    def empty(self) -> Self:
        """A curvature of no data with the same options, which knows the model's groups already."""
        made = self.of(self.network.model, self.options)
        made.ggn = self.ggn.without_data()
        return made

    # --- what was found ----------------------------------------------------------------------

    @property
    def likelihood(self) -> Likelihood:
        """p(y | f)."""
        return self.options.likelihood

    @property
    def blocks(self) -> Mapping[str, Block]:
        """Blocks by name of their group, or one block "full" or "lowrank"."""
        return self.ggn.blocks

    @property
    def groups(self) -> tuple[Group, ...]:
        """Groups of parameters that share a prior precision by layer, in model order."""
        return self.ggn.groups

    @property
    def settings(self) -> Mapping[str, Setting]:
        """Expand or reduce, by name of the groups with Kronecker factors."""
        return self.ggn.settings

    @property
    def params(self) -> tuple[str, ...]:
        """Names of the parameters inside the posterior, in model order."""
        return self.ggn.params

    @property
    def n_data(self) -> int:
        """Number of examples seen."""
        return int(self.ggn.n_data)

    @property
    def n_rows(self) -> int:
        """Number of output rows seen: examples, or nodes that have outputs of their own."""
        return int(self.ggn.n_rows)

    @property
    def n_outputs(self) -> int:
        """Number of scalar outputs seen."""
        return int(self.ggn.n_outputs)

    @property
    def statistic(self) -> Tensor:
        """The likelihood's sum over the data, float64."""
        return self.ggn.statistic

    @property
    def coverage(self) -> dict[str, str]:
        """How each parameter of the model is treated.

        "kron", "ekfac", "diag", "dense", "lowrank" or "frozen"; "unused" are those of the
        posterior that no output depends on: their curvature is zero.
        """
        unused = self.ggn.knowledge.unused
        kinds = {
            name: "unused" if name in unused else block.kind
            for block in self.blocks.values()
            for name in block.params
        }
        return {name: kinds.get(name, "frozen") for name in parameters_of(self.network.model)}

    # --- data --------------------------------------------------------------------------------

    def fit(
        self,
        loader: Iterable[Any],
        *,
        key_y: str = "labels",
        progress: bool = False,
        checkpoint: Checkpoint | str | Path | None = None,
    ) -> Self:
        """Add every batch of a loader, and name the parameters without effect on any output.

        With a process group all of its processes call this, each with a loader of its own part. The
        examples that `DistributedSampler` repeats count once. Where one fails, all raise: it its
        own error, the others `OtherRankFailed` with its message, and nothing was added.

        Args:
            loader: yields pairs (x, y) or mappings that hold the targets under `key_y`.
            key_y: name of the targets in mappings.
            progress: show a progress bar.
            checkpoint: a path, or a `Checkpoint`, where the pass keeps what it has counted. Called
                again after the process died, it goes on there; the file is removed at the end.

        Raises:
            InvalidValue: the loader is empty, a batch is bad, or no parameter has an effect on the
                outputs, or a checkpoint that is damaged or of another fit. Batches before it stay
                counted.
        """
        kept = Checkpoint.of(checkpoint, self.options.ranks)
        self.read(loader, key_y=key_y, progress=progress, checkpoint=kept).finish()
        if kept is not None:
            kept.ended()
        return self

    def read(
        self,
        loader: Iterable[Any],
        *,
        key_y: str = "labels",
        progress: bool = False,
        check: Callable[[], object] | None = None,
        checkpoint: Checkpoint | str | Path | None = None,
    ) -> Self:
        """Add every batch of a loader, which may be a part of the data; arguments as for `fit`.

        Args:
            loader: as for `fit`.
            key_y: as for `fit`.
            progress: as for `fit`.
            check: called after the first batch, when the groups are known; what it raises ends
                the pass.
            checkpoint: as for `fit`, but the file stays, until `Checkpoint.remove`.
        """
        ranks, kept = self.options.ranks, Checkpoint.of(checkpoint, self.options.ranks)
        with ExitStack() as around:

            def entered() -> tuple[Iterable[Any], Keeping]:
                self._check(loader, key_y)
                if ranks is None:
                    tell_of_a_part(loader)
                part = loader if ranks is None else own_part(loader, ranks)
                return part, around.enter_context(Keeping(kept, self, part, key_y))

            part, keeping = entered() if ranks is None else ranks.together(entered)
            twice = self.options.hessian_structure == "ekfac" and not self.ggn.bases
            if twice and not keeping.past_factors(ranks):
                factors = self._of_factors()
                factors._read(part, key_y, progress, keeping, "factors")
                self._take_bases(factors)
            self._read(part, key_y, progress, keeping, "own", check)
        return self

    def _check(self, loader: Iterable[Any], key_y: str) -> None:
        """Raise where the loader or the model cannot be read."""
        check_iterable("train_loader", loader)
        check_text("key_y", key_y)
        options = self.options
        self.network.check_none_new(
            self.ggn.knowledge, options.subset_of_weights, options.uncovered_stay_out
        )
        if options.hessian_structure == "ekfac" and not self.ggn.bases:
            _check_read_twice(loader)

    def _read(
        self,
        loader: Iterable[Any],
        key_y: str,
        progress: bool,
        kept: Keeping,
        phase: Phase,
        check: Callable[[], object] | None = None,
    ) -> None:
        """Add the batches that were not counted before the pass was interrupted."""
        bar = tqdm(loader, desc="curvature", disable=not progress, leave=False)
        batches = (split_batch(raw, key_y, self.options.batch_fn) for raw in kept.uncounted(bar))
        ranks = self.options.ranks
        with draws_kept():
            if ranks is not None:
                self._read_part(ranks, Source(batches, kept, phase), check)
                return
            count = kept.begin(phase, self)
            if count and check is not None:
                check()
            for x, y in batches:
                self._add(x, y)
                count += 1
                if count == 1 and check is not None:
                    check()
        if not count:
            raise InvalidValue(
                "the loader yielded no batch",
                where="train_loader",
                got="0 batches",
                remedy="Check its length; a generator can be read only once",
            )

    def _read_part(
        self,
        ranks: Ranks,
        source: Source,
        check: Callable[[], object] | None = None,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add the data of all ranks, of which this one reads a part; after an exception nothing.

        Args:
            ranks: the processes, all of which come here.
            source: this rank's batches, which may be none.
            check: as for `read`.
            parameters: as for `accumulate`.
        """
        before, draws = self.ggn, self.generator.get_state()

        def begun(ggn: GGN) -> None:
            if check is not None:
                self.ggn = ggn
                check()
                self.ggn = before  # nothing is held beside what is summed

        try:
            self.ggn = read_parts(ranks, self, source, begun, parameters)
        except BaseException:
            self.ggn = before
            self.generator.set_state(draws)
            raise

    def finish(self) -> Self:
        """Name the parameters that had no effect on any output, in a log record.

        Raises:
            InvalidValue: no parameter had any.
        """
        check_effect(self.ggn.knowledge)
        self._tell("the outputs of any batch")
        return self

    def decompose(self) -> Self:
        """Share the eigenvalues of Kronecker factors out over the ranks, all of which come here.

        Without a process group nothing is done: they are computed when they are first wanted.
        """
        ranks = self.options.ranks
        if ranks is not None:
            self.ggn = decomposed(ranks, self.ggn)
        return self

    def accumulate(
        self, x: Any, y: Tensor, *, parameters: Mapping[str, Tensor] | None = None
    ) -> Self:
        """Add one batch; after an exception nothing has been added.

        With a process group all of its processes call this, each with its part of the batch, which
        may be without examples.

        Args:
            x: inputs: a tensor (n, ...), a mapping (keyword arguments) or a sequence.
            y: targets that fit the likelihood.
            parameters: weights by name at which to take the curvature; the model's own by default.

        Raises:
            InvalidValue: non-finite outputs or curvature, targets of a wrong shape or range, or no
                parameter has an effect on the outputs.
            InvalidType: targets of a wrong dtype.
            UnsupportedUse: a use of a parameter that cannot be treated correctly.
        """
        if self.options.hessian_structure == "ekfac" and not self.ggn.bases:
            self._take_bases(self._of_factors().accumulate(x, y, parameters=parameters))
        first, before = not self.blocks, self.ggn
        draws = self.generator.get_state()
        if (ranks := self.options.ranks) is None:
            self._add(x, y, parameters)
        else:
            none = isinstance(y, Tensor) and y.ndim > 0 and not len(y)
            own = [] if none else [(x, y)]
            self._read_part(ranks, Source(iter(own)), parameters=parameters)
        try:
            check_effect(self.ggn.knowledge)
        except InvalidValue:
            self.ggn = before
            self.generator.set_state(draws)
            raise
        if first:
            self._tell("the outputs of the first batch")
        return self

    def _add(self, x: Any, y: Tensor, parameters: Mapping[str, Tensor] | None = None) -> None:
        """Add one batch, or nothing."""
        draws = self.generator.get_state()
        try:
            self.ggn = with_batch(self.ggn, self.network, (x, y), self.generator, parameters)
        except BaseException:
            self.generator.set_state(draws)
            raise

    def _of_factors(self) -> "Curvature":
        """A curvature of no data with Kronecker factors, whose eigenbases are wanted."""
        options = replace(self.options, hessian_structure="kron")
        return Curvature.of(self.network.model, options).remember(
            self.ggn.knowledge, self.ggn.settings
        )

    def _take_bases(self, factors: "Curvature") -> None:
        """Take over what was learned, and the eigenbases of the factors; data are not counted."""
        known, settings = factors.ggn.knowledge, factors.ggn.settings
        ranks = self.options.ranks
        bases = factors.ggn.eigenbases() if ranks is None else eigenbases(ranks, factors.ggn)
        self.ggn = replace(self.ggn, knowledge=known, settings=settings, bases=bases)

    def _tell(self, span: str) -> None:
        """Name the parameters without effect on `span`."""
        self.ggn = replace(self.ggn, knowledge=tell_unused(self.ggn.knowledge, span))

    def merge(self, other: "Curvature") -> Self:
        """Add the curvature of other data, computed on the same model with the same options.

        Raises:
            NotFitted: `other` has seen no data.
            InvalidValue: the two have different blocks or settings.
        """
        if not other.blocks:
            raise NotFitted("nothing to merge", where="other", remedy="Fit it first")
        self.ggn = self.ggn + other.ggn
        return self

    # --- state -------------------------------------------------------------------------------

    def state_dict(self, *, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Tensors and plain data, sealed by a checksum; sums as they are or rounded to float32."""
        content = {
            "format": FORMAT,
            "ggn": ggn_to_state(self.ggn, dtype),
            "draws": self.generator.get_state(),
        }
        return sealed(content)

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], model: nn.Module, options: CurvatureOptions
    ) -> Self:
        """The curvature of a state, on the same model with the same options.

        Raises:
            InvalidValue: no such state, a damaged one, or one of another model, of other options or
                of another version.
        """
        made = cls.of(model, options)
        with refusing_damage("curvature"):
            found = opened(state, ("ggn", "draws"), "a curvature")
            made.ggn = ggn_from_state(found["ggn"], made.network, options)
            check_seal(state, "curvature")
            made.generator.set_state(found["draws"].value.cpu())
        return made


def _check_read_twice(loader: object) -> None:
    """Raise `InvalidValue` for data that can be read once only."""
    if isinstance(loader, Iterator):
        raise InvalidValue(
            "'ekfac' reads the data twice: for the factors, and for the diagonal in their basis",
            where="train_loader",
            got=f"an iterator, {type(loader).__name__}",
            remedy="Pass a DataLoader or a list of batches",
        )
