"""K-FAC as a `torch.optim.Optimizer`."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from kfac_laplace.curvature.backend import Curvature
from kfac_laplace.curvature.estimate.fisher import Empirical
from kfac_laplace.curvature.estimate.settings import KfacApprox
from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.linalg.dtypes import accumulable
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.curvature.ranks import check_group
from kfac_laplace.errors import InvalidValue, NotFitted, UnsupportedUse
from kfac_laplace.likelihoods import Likelihood, LikelihoodName
from kfac_laplace.optim.averages import Sums
from kfac_laplace.optim.calls import OutputFn, called_module, calling
from kfac_laplace.optim.capture import Capture
from kfac_laplace.optim.estimate import Estimate
from kfac_laplace.optim.learning import Learned, Lesson, tracked_names
from kfac_laplace.optim.loss_scale import unscale_
from kfac_laplace.optim.memory import Numbers
from kfac_laplace.optim.parameters import check_numbers, parameter_groups
from kfac_laplace.optim.prior_damping import PriorDamping, TellsDamping
from kfac_laplace.optim.ranks import summed, tell_of_others, training_ranks
from kfac_laplace.optim.rules import EigenAdam, Rule, descend_
from kfac_laplace.optim.schedule import EARLY
from kfac_laplace.optim.shared import averaged_ggn
from kfac_laplace.optim.state import learned_from_state, learned_to_state
from kfac_laplace.optim.units import check_gradients
from kfac_laplace.optim.updates import Updates
from kfac_laplace.options import check_choice

log = logging.getLogger("kfac_laplace")

Uncovered = Literal["adamw", "error"]
UNCOVERED: tuple[Uncovered, ...] = get_args(Uncovered)
RULE, ESTIMATE = EigenAdam(), Estimate()
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
            It may be compiled; steps that are captured run it in eager mode. Where several ranks
            train it in `DistributedDataParallel`, give or wrap it: their factors are summed.
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
        process_group: of the processes whose factors are summed: "world" or a group of
            torch.distributed, where a loop averages their gradients itself; None: those of
            `DistributedDataParallel`, or this one alone.

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
        >>> loss.item() < 0.5, optimizer.coverage
        (True, {'weight': 'kfac', 'bias': 'kfac'})
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: LikelihoodName | Likelihood = "classification",
        params: Iterable[Any] | None = None,
        *,
        lr: float | Tensor = 1e-2,
        weight_decay: float = 0.01,
        rule: Rule = RULE,
        curvature: Estimate = ESTIMATE,
        kfac_approx: KfacApprox = "auto",
        uncovered: Uncovered = "adamw",
        class_axis: int | None = None,
        output_fn: OutputFn | None = None,
        seed: int = 0,
        process_group: Any = None,
    ):
        check_group(process_group)
        check_choice("uncovered", uncovered, UNCOVERED)
        self.estimate = curvature
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
        everything = tuple(n for n, p in network.model.named_parameters() if p.requires_grad)
        self._options = replace(
            options, subset_of_weights="all" if tracked == everything else list(tracked)
        )
        self._unseen, self._ranks = 0, training_ranks(model, process_group)
        self._generator = Generator().manual_seed(seed)
        self._rule = rule
        self._dampings: PriorDamping | None = None
        self._updates = Updates(self._named, rule, self.estimate, self.state)
        lesson = Lesson(network, kfac_approx, class_axis)
        called = called_module(model)
        self._capture = Capture(lesson, tracked, self.estimate, self._generator, output_fn, called)
        self._count(0)
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
            for unit in self._updates.units
            for name in unit.params
        }
        return {
            name: "frozen" if not p.requires_grad else kinds.get(name, "absent")
            for name, p in self._network.model.named_parameters()
        }

    @property
    def settings(self) -> dict[str, Any]:
        """Expand or reduce by name of the groups with factors, in the model's order."""
        learned = self._capture.learned
        if learned is None:
            return {}
        names = {group.name for group in learned.captured}
        return {name: learned.settings[name] for name in self._named if name in names}

    def numbers_of_state(self) -> Numbers:
        """How many numbers are kept beside the parameters: moments, bases, averaged factors.

        Of what is trained, once every part has been made; before the first training pass, where
        nothing is known of factors, as by AdamW. `per_parameter` is 2 for AdamW; a narrower
        `Estimate(largest=)` takes less.
        """
        return self._updates.numbers()

    @property
    def model(self) -> nn.Module:
        """The network, out of its wrappers."""
        return self._network.model

    @property
    def options(self) -> CurvatureOptions:
        """Those of `curvature`."""
        return self._options

    def damped_by(self, tuner: TellsDamping) -> None:
        """Take the damping of each layer from a tuner's prior precisions, as they are at each step.

        λ = δ/N is what the prior adds to the curvature of the tuner's loss (δ σ² T/N with a
        noise). It takes the place of the number in `Damped`, which stays that of parameters without
        a precision. A state does not hold it: call it again after making the optimiser anew.

        Args:
            tuner: a `MarglikTuner` of this model, whose loss is trained.

        Raises:
            InvalidValue: the rule has no damping.
        """
        self._dampings = PriorDamping.of(tuner, self._rule)

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
        if not n_data > 0:
            raise InvalidValue("must be positive", where="n_data", got=n_data)
        learned, averages = self._capture.learned, self._updates.averages
        if learned is None or not averages.names:
            raise NotFitted(
                "no factors yet", where="curvature", remedy="Take steps in training mode first"
            )
        shape = self._capture.outputs_per_example
        ggn = averaged_ggn(averages, learned, self._options, n_data, shape)
        made = Curvature.of(self._network.model, ggn.options)
        made.ggn = ggn
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
        scale = unscale_(self, self._named.values())
        if scale is None:
            self._capture.drop()
            return loss
        check_gradients(list(self._named.values()))
        self._form()
        sums = self._of_all_ranks(self._capture.take(scale))
        self._count(self._steps + 1)
        self._updates.take_in(self._steps, sums)
        rates = {p: group["lr"] for group in self.param_groups for p in group["params"]}
        dampings = None if self._dampings is None else self._dampings.by_name(self._named)
        updates = self._updates.by_parameter(rates, dampings)
        for group in self.param_groups:
            own = [p for p in group["params"] if p in updates]
            steps = [updates[p] for p in own]
            descend_(own, steps, lr=group["lr"], weight_decay=group["weight_decay"])
        return loss

    def _count(self, steps: int) -> None:
        """Say how many steps have been made, and whether the coming one is captured."""
        self._steps = steps
        self._capture.due = steps + 1 in EARLY or steps % self.estimate.every == 0

    def _of_all_ranks(self, sums: Sums) -> Sums:
        """The sums of a captured step over all ranks, which come here together."""
        if self._ranks is None:
            return sums
        learned = self._capture.learned
        if not self._capture.due or learned is None:
            return {}  # of a pass before: other ranks need not have it
        like = accumulable(next(iter(self._named.values())).detach().new_empty(0))
        return summed(self._ranks, sums, learned.captured, like, self.estimate.largest)

    def _form(self) -> None:
        """Take parameters together once their groups are known, those of the first rank."""
        self._ranks = self._ranks or self._capture.ranks
        if self._ranks is not None and not self._updates.formed:
            own = self._capture.learned
            state = None if own is None else learned_to_state(own, self._options)
            state = self._ranks.of_first(state)
            known = None if state is None else self._learned_of(state)
            self._capture.learned = known
        learned = self._capture.learned
        if learned is None:
            self._unseen += bool(self._capture.known.tracked)
            if self._unseen == UNSEEN:
                log.warning(
                    "KFAC has seen no training pass of the model, so that all parameters are "
                    "updated by AdamW: call the module that KFAC was given, in training mode and "
                    "with gradients; if it is compiled, give KFAC what torch.compile returns"
                )
        elif not self._updates.formed:
            if self._uncovered == "error":
                learned.check_covered()
            if self._ranks is None and learned.captured:
                tell_of_others()
            self._updates.form(learned.captured)
            others = [name for name, kind in self.coverage.items() if kind == "adamw"]
            if others:
                names = ", ".join(others)
                log.info("without Kronecker factors, updated by AdamW: %s", names)

    def _learned_of(self, state: Mapping[str, Any]) -> Learned:
        return learned_from_state(state, self._network, self._options)

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
            "outputs": list(self._capture.outputs_per_example),
            **self._updates.state_dict(),
        }
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up a state of the same model, groups and options; nothing where that is refused.

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
        self._check_groups(state_dict["param_groups"])
        own = state_dict["kfac"]
        learned = None
        if own["learned"] is not None:
            learned = self._learned_of(own["learned"])
        updates = Updates(self._named, self._rule, self.estimate, {})
        updates.load_state_dict(own, None if learned is None else learned.captured)
        params = [p for group in self.param_groups for p in group["params"]]
        states = {  # torch casts to the parameters' dtype
            params[index]: {
                key: value.to(params[index].device, copy=True)
                if isinstance(value, Tensor)
                else value
                for key, value in entry.items()
            }
            for index, entry in state_dict["state"].items()
        }
        outputs, steps, draws = tuple(own["outputs"]), int(own["steps"]), own["generator"].cpu()
        Generator().set_state(draws)
        # What is refused was, before anything changed.
        super().load_state_dict({k: state_dict[k] for k in ("state", "param_groups")})
        self.state.update(states)
        updates.states = self.state  # another object now
        self._updates = updates
        self._capture.drop()
        self._capture.learned = learned
        self._capture.outputs_per_example = outputs
        self._generator.set_state(draws)
        self._count(steps)

    def _check_groups(self, stored: Sequence[Mapping[str, Any]]) -> None:
        """Raise `InvalidValue` unless stored groups have as many parameters as those here."""
        found = [len(group["params"]) for group in stored]
        own = [len(group["params"]) for group in self.param_groups]
        if found != own:
            raise InvalidValue(
                "the state has other parameter groups",
                where="state_dict.param_groups",
                got=f"groups of {found} parameters where this optimiser has {own}",
                remedy="Load it into a KFAC with the groups that it was made with",
            )
