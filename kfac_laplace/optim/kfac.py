"""K-FAC as a `torch.optim.Optimizer`."""

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from kfac_laplace.curvature.backend import Curvature
from kfac_laplace.curvature.estimate.fisher import Empirical
from kfac_laplace.curvature.estimate.settings import KfacApprox
from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.errors import InvalidValue, NotFitted, UnsupportedUse
from kfac_laplace.likelihoods import Likelihood
from kfac_laplace.optim.averages import Averages
from kfac_laplace.optim.calls import OutputFn, calling
from kfac_laplace.optim.capture import Capture
from kfac_laplace.optim.decomposition import EARLY, BasesTable
from kfac_laplace.optim.estimate import Estimate
from kfac_laplace.optim.learning import Learned, Lesson, tracked_names
from kfac_laplace.optim.parameters import check_numbers, parameter_groups
from kfac_laplace.optim.rules import AdamW, EigenAdam, Rule, descend_
from kfac_laplace.optim.rules.rule import State, Update
from kfac_laplace.optim.state import learned_from_state, learned_to_state
from kfac_laplace.optim.units import Unit, check_gradients, single, units_of
from kfac_laplace.options import check_choice

log = logging.getLogger("kfac_laplace")

UNCOVERED = ("adamw", "error")
#: After so many steps without a training pass of the model a log record says so.
UNSEEN = 3


class KFAC(Optimizer):
    """Updates by the Kronecker factors of the curvature, from the loop's own training passes.

    A loop stays as it was: forward, loss, backward, `step`. In some steps the model's own forward
    pass is recorded, and the factors A and B of its layers are made on its graph; they take effect
    in `step`. All micro-batches since the last step count together; forward passes without a
    backward pass, in evaluation mode or without gradients do not count. The loss is meant to be a
    mean over the examples of a step.

    Layers with weights have factors; embeddings, norms, biases alone and whatever no layer rule
    covers are updated by AdamW with the same learning rate: `coverage` names them.

    Args:
        model: the network; two hooks stand on its forward until `close`, or until this object ends.
        likelihood: what its outputs mean: "classification" or another name of docs/likelihoods.md,
            or a `Likelihood`. It is to be that of the loss.
        params: parameters or parameter groups, all of the model by default; they never change
            afterwards. Groups may set "lr", "weight_decay" and "kfac" (False: AdamW for all).
        lr: learning rate.
        weight_decay: decoupled, per unit of the learning rate.
        rule: how factors and gradients make updates: `EigenAdam()`, `Damped()`.
        curvature: which factors, and how often.
        kfac_approx: "auto", "expand", "reduce", or patterns of layer names to these. "auto" is
            expand where rows are nodes or edges of graphs, else as for `Curvature`.
        uncovered: "adamw", or "error" to refuse parameters that no layer rule covers.
        class_axis: axis of the outputs that holds those of one row. None: the last, but axis 1 of
            class scores with four axes and more; a loss that contradicts it is refused.
        output_fn: takes what the model returns to its outputs, where it is no tensor, no object
            with `.logits` and no mapping with "logits".
        seed: seed of labels and signs.

    Raises:
        InvalidValue: an unknown option, or parameters of something else than the model.
        UnsupportedUse: a scripted or compiled module, or parameters on several devices.

    Example:
        >>> import torch
        >>> from kfac_laplace.optim import KFAC
        >>> model, x, y = torch.nn.Linear(3, 2), torch.eye(3), torch.tensor([0, 1, 1])
        >>> optimizer = KFAC(model, "classification", lr=0.1)
        >>> for _ in range(20):
        ...     loss = torch.nn.functional.cross_entropy(model(x), y)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> float(loss) < 0.5, optimizer.coverage
        (True, {'weight': 'kfac', 'bias': 'kfac'})
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood = "classification",
        params: Iterable[Any] | None = None,
        *,
        lr: float | Tensor = 1e-2,
        weight_decay: float = 0.01,
        rule: Rule | None = None,
        curvature: Estimate | None = None,
        kfac_approx: KfacApprox = "auto",
        uncovered: str = "adamw",
        class_axis: int | None = None,
        output_fn: OutputFn | None = None,
        seed: int = 0,
    ):
        check_choice("uncovered", uncovered, UNCOVERED)
        self.estimate = curvature or Estimate()
        self.rule = rule or EigenAdam()
        self._uncovered = uncovered
        options = CurvatureOptions.of(
            likelihood,
            kfac_approx=kfac_approx,
            fisher=self.estimate.vectors,
            class_axis=class_axis,
            factor_dtype=torch.float32,
            seed=seed,
        )
        network = Network.of(model, options.likelihood, calling(output_fn))
        groups = parameter_groups(network.model, params)
        self._open = True
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "kfac": True})
        self._open = False
        check_numbers(self.param_groups)
        self._network = network
        own = {id(p) for group in self.param_groups for p in group["params"]}
        self._named = {n: p for n, p in network.model.named_parameters() if id(p) in own}
        wanted = {id(p) for group in self.param_groups if group["kfac"] for p in group["params"]}
        tracked = tracked_names(network.model, frozenset(wanted))
        everything = network.select("all", complex_stay_out=True)
        self._options = replace(
            options, subset_of_weights="all" if tracked == everything else list(tracked)
        )
        self._steps, self._unseen = 0, 0
        self._generator = Generator().manual_seed(seed)
        self._averages = Averages(self.estimate.ema)
        self._units = single(self._named)
        self._table: BasesTable | None = None
        self._based: set[str] = set()  # groups that have bases
        self._others = _beside(self.rule)
        lesson = Lesson(network, kfac_approx, class_axis)
        self._capture = Capture(
            lesson, tracked, self.estimate.vectors, self._generator, _Due(self), output_fn
        )
        # With this, `GradScaler` tells the scale; without, loops may clip between as they like.
        if isinstance(self.estimate.vectors, Empirical):
            self._step_supports_amp_scaling = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Groups are those of the constructor.

        Raises:
            UnsupportedUse: always, afterwards.
        """
        if not self._open:
            raise UnsupportedUse(
                "parameter groups do not change after construction",
                where="add_param_group",
                remedy="Pass all of them to KFAC; frozen parameters may be among them",
            )
        super().add_param_group(param_group)

    # --- what is known -----------------------------------------------------------------------

    @property
    def coverage(self) -> dict[str, str]:
        """How each parameter of the model is treated.

        "kfac": by its layer's factors; "adamw"; "frozen": it requires no gradient now; "absent": it
        is in no parameter group. All are "adamw" before the first training pass.
        """
        kinds = {
            name: "adamw" if unit.layout is None else "kfac"
            for unit in self._units
            for name in unit.params
        }
        return {
            name: "frozen" if not p.requires_grad else kinds.get(name, "absent")
            for name, p in self._network.model.named_parameters()
        }

    @property
    def settings(self) -> dict[str, Any]:
        """Expand or reduce by name of the groups with factors."""
        learned = self._capture.learned
        names = {group.name for group in learned.captured} if learned else set()
        return {name: learned.settings[name] for name in names} if learned else {}

    def curvature(self, n_data: int) -> Curvature:
        """The averaged factors as the curvature of so many examples, at σ = 1 and T = 1.

        Of layers with factors alone, and of the network as it was trained (dropout, statistics of
        batches). What only a pass over the data tells is not in it: `statistic` is NaN.

        Args:
            n_data: number of examples of the training data.

        Raises:
            NotFitted: nothing has been captured yet.
            InvalidValue: not a positive number.
        """
        learned = self._capture.learned
        if learned is None or not self._averages.names:
            raise NotFitted(
                "no factors yet", where="curvature", remedy="Take steps in training mode first"
            )
        if not n_data > 0:
            raise InvalidValue("must be positive", where="n_data", got=n_data)
        groups = tuple(group for group in learned.captured if group.name in self._averages)
        rows, outputs = self._capture.outputs_per_example
        made = Curvature.of(self._network.model, self._options)
        made.ggn = GGN(
            self._options,
            replace(learned.knowledge, groups=groups),
            {group.name: learned.settings[group.name] for group in groups},
            {group.name: self._averages.block(group.name, n_data) for group in groups},
            statistic=torch.full((), torch.nan, dtype=torch.float64),
            n_data=n_data,
            n_rows=n_data * rows,
            n_outputs=n_data * outputs,
        )
        return made

    # --- the loop ----------------------------------------------------------------------------

    def paused(self) -> AbstractContextManager[None]:
        """A context in which forward passes are not captured, as those of a teacher."""
        return self._capture.paused()

    def close(self) -> None:
        """Take the hooks off the model; steps go on with the factors that are there."""
        self._capture.close()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, and the curvature of the passes that they came from."""
        self._capture.drop()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take in what was captured since the last step, and update the parameters.

        Args:
            closure: computes the loss and its gradients, once.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = self._loss_scale()
        if scale is None:
            self._capture.drop()
            return loss
        self._averages.add(self._capture.take(scale))
        self._steps += 1
        self._learned()
        self._update_bases()
        self._descend()
        return loss

    def _due(self) -> bool:
        """Whether passes of the coming step are captured."""
        step = self._steps + 1
        return step in EARLY or (step - 1) % self.estimate.every == 0

    def _loss_scale(self) -> float | None:
        """The scale of the gradients, which are freed from it; None where they are not finite.

        `GradScaler` sets `grad_scale` and `found_inf` while it calls `step`.
        """
        found = getattr(self, "found_inf", None)
        if found is not None and bool(found):
            return None
        scale = getattr(self, "grad_scale", None)
        if scale is None:
            if found is not None:
                raise UnsupportedUse(
                    "gradients were unscaled before the step, and their scale is not known",
                    where="GradScaler.unscale_",
                    remedy="The empirical Fisher needs it: leave unscaling to scaler.step, or "
                    "choose curvature=Estimate(fisher='mc')",
                )
            return 1.0
        for p in self._named.values():
            if p.grad is not None:
                p.grad.div_(scale)
        return float(scale)

    def _learned(self) -> None:
        """Form units once the groups are known."""
        learned = self._capture.learned
        if learned is None:
            self._unseen += bool(self._capture.known.tracked)
            if self._unseen == UNSEEN:
                log.warning(
                    "KFAC has seen no training pass of the model, so that all parameters are "
                    "updated by AdamW: call the model itself, in training mode and with gradients"
                )
        elif self._table is None:
            self._form(learned)

    def _form(self, learned: Learned) -> None:
        """Units of the groups that are known now; moments gathered so far go on in them."""
        if self._uncovered == "error":
            _check_covered(learned)
        before = {unit.name: unit for unit in self._units}
        self._units = units_of(self._named, learned.captured)
        states = {name: self.state[p] for name, p in self._named.items() if p in self.state}
        for unit in self._units:
            if unit.layout is not None and (state := unit.joined(states)) is not None:
                for p in unit.params.values():
                    self.state.pop(p, None)
                self.state[unit.key] = state
        factored = [unit for unit in self._units if unit.layout is not None]
        self._table = BasesTable(
            {u.name: u.layout.matrix for u in factored if u.layout is not None},
            every=self.estimate.bases_every,
            largest=self.estimate.largest,
        )
        others = [name for name in before if self.coverage[name] == "adamw"]
        if others:
            log.info("without Kronecker factors, updated by AdamW: %s", ", ".join(others))

    def _update_bases(self) -> None:
        """Decompose the factors that are due, and take moments to the new bases."""
        table = self._table
        if table is None:
            return
        due = table.due(self._steps)
        units = [u for u in self._units if u.layout is not None and u.name in self._averages]
        wanted = [u for u in units if u.name in due or u.name not in self._based]
        if not wanted:
            return
        turned = [u for u in wanted if u.key in self.state]
        names, likes = [u.name for u in turned], [u.like for u in turned]
        before = table.eigenbases(names, likes)
        for dtype in {u.like.dtype for u in wanted}:
            own = [u.name for u in wanted if u.like.dtype == dtype]
            factors = {name: self._averages.factors(name) for name in own}
            table.update(self._steps, factors, dtype=dtype)
        self._based |= {u.name for u in wanted}
        after = table.eigenbases(names, likes)
        if after is not before:
            self.rule.turn([self.state[u.key] for u in turned], before, after)

    def _descend(self) -> None:
        """Update all parameters that have gradients."""
        check_gradients(list(self._named.values()))
        pairs = [(u, g) for u in self._units if (g := u.gradient()) is not None]
        updates = self._by_factors([(u, g) for u, g in pairs if u.layout is not None])
        updates |= self._by_adam([(u, g) for u, g in pairs if u.layout is None])
        for group in self.param_groups:
            own = [p for p in group["params"] if p in updates]
            steps = [updates[p] for p in own]
            descend_(own, steps, lr=group["lr"], weight_decay=group["weight_decay"])

    def _by_factors(self, pairs: list[tuple[Unit, Tensor]]) -> dict[Tensor, Update]:
        """Updates by parameter, by the rule."""
        if not pairs:
            return {}
        assert self._table is not None
        units, gradients = [u for u, _ in pairs], [g for _, g in pairs]
        states = [self._state(self.rule, u, g) for u, g in pairs]
        bases = self._table.eigenbases([u.name for u in units], gradients)
        directions = self.rule.directions(gradients, states, bases)
        rates = {p: group["lr"] for group in self.param_groups for p in group["params"]}
        return _by_parameter(units, self.rule.lengths(directions, [rates[u.key] for u in units]))

    def _by_adam(self, pairs: list[tuple[Unit, Tensor]]) -> dict[Tensor, Update]:
        """Updates of the parameters without factors."""
        units, gradients = [u for u, _ in pairs], [g for _, g in pairs]
        states = [self._state(self._others, u, g) for u, g in pairs]
        directions = self._others.directions(gradients, states)
        return _by_parameter(units, [one.update for one in directions])

    def _state(self, rule: Rule | AdamW, unit: Unit, gradient: Tensor) -> State:
        """The state of a unit, made at its first step."""
        if unit.key not in self.state:
            self.state[unit.key] = rule.init(gradient)
        return self.state[unit.key]

    # --- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data; taken up by `load_state_dict`, a run goes on bit by bit.

        What was captured since the last step is not in it: save between steps.
        """
        state = super().state_dict()
        learned = self._capture.learned
        state["kfac"] = {
            "steps": self._steps,
            "generator": self._generator.get_state(),
            "learned": None if learned is None else learned_to_state(learned, self._options),
            "averages": self._averages.state_dict(),
            "bases": {} if self._table is None else self._table.state_dict(),
            "based": sorted(self._based),
            "outputs": list(self._capture.outputs_per_example),
        }
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up a state of the same model, parameter groups and options.

        Raises:
            InvalidValue: the state of another optimiser, model or likelihood.
        """
        if "kfac" not in state_dict:
            raise InvalidValue(
                "not the state of KFAC",
                where="state_dict",
                got=", ".join(map(str, state_dict)),
                remedy="Pass what state_dict() made",
            )
        own = state_dict["kfac"]
        learned = None
        if own["learned"] is not None:
            learned = learned_from_state(own["learned"], self._network, self._options)
        super().load_state_dict({k: state_dict[k] for k in ("state", "param_groups")})
        params = [p for group in self.param_groups for p in group["params"]]
        for index, entry in state_dict["state"].items():  # torch casts to the parameters' dtype
            p = params[index]
            self.state[p] = {
                key: value.to(p.device, copy=True) if isinstance(value, Tensor) else value
                for key, value in entry.items()
            }
        self._capture.drop()
        self._steps = int(own["steps"])
        self._generator.set_state(own["generator"].cpu())
        self._capture.learned, self._table = learned, None
        self._units, self._based = single(self._named), set(own["based"])
        self._capture.outputs_per_example = tuple(own["outputs"])
        if learned is not None:
            self._take_up(learned)
            layouts = {u.name: u.layout for u in self._units if u.layout is not None}
            self._averages.load_state_dict(own["averages"], layouts, self._network.device)
            assert self._table is not None
            device = self._network.device
            self._table.load_state_dict(
                {
                    name: {key: t.to(device, copy=True) for key, t in tensors.items()}
                    for name, tensors in own["bases"].items()
                }
            )

    def _take_up(self, learned: Learned) -> None:
        """Form units whose states are those of units already."""
        states = dict(self.state)
        self.state.clear()
        self._form(learned)
        self.state.update(states)


class _Due:
    """Asks an optimiser, as long as it lives, whether its coming step is captured."""

    def __init__(self, optimizer: KFAC):
        self._optimizer = weakref.ref(optimizer)

    def __call__(self) -> bool:
        optimizer = self._optimizer()
        return optimizer is not None and optimizer._due()


def _by_parameter(units: Sequence[Unit], updates: Sequence[Update]) -> dict[Tensor, Update]:
    """What each parameter's own part of the updates of units is."""
    return {
        unit.params[name]: step
        for unit, update in zip(units, updates, strict=True)
        for name, step in unit.steps(update).items()
    }


def _beside(rule: Rule) -> AdamW:
    """AdamW for what has no factors, with the rule's averages where it has such."""
    if isinstance(rule, EigenAdam):
        return AdamW(rule.betas, rule.eps)
    return AdamW()


def _check_covered(learned: Learned) -> None:
    """Raise `UnsupportedUse` for parameters that no layer rule covers."""
    names = [n for g in learned.knowledge.groups if not g.covered for n in g.layout.params]
    if names:
        raise UnsupportedUse(
            "no layer rule covers these parameters",
            where=", ".join(names),
            remedy="Choose uncovered='adamw', or register a rule",
        )
