"""From gradients to updates: units of parameters, their averaged factors, bases and moments."""

import logging
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.errors import InvalidValue
from kfac_laplace.optim.averages import Averages, Sums
from kfac_laplace.optim.decomposition import BasesTable
from kfac_laplace.optim.estimate import Estimate
from kfac_laplace.optim.memory import Numbers, numbers_of_state
from kfac_laplace.optim.rules import AdamW, EigenAdam, Rule
from kfac_laplace.optim.rules.rule import State, Update
from kfac_laplace.optim.schedule import affordable
from kfac_laplace.optim.units import Unit, single, units_of

log = logging.getLogger("kfac_laplace")

WIDE = (
    "some steps decompose factors up to %d wide, which takes seconds or more on a CPU; with "
    "Estimate(largest=%d), where wider sides stay in their own coordinates, none does"
)
#: What an optimiser of torch keeps, by parameter.
States = MutableMapping[Tensor, Any]


class Updates:
    """The updates of all parameters, step by step: by factors where there are any, else by AdamW.

    Args:
        named: the parameters, by name.
        rule: how factors and gradients make updates.
        estimate: how long factors are remembered, and how often they are decomposed.
        states: where moments are kept: those of a unit under its first parameter.
    """

    def __init__(self, named: Mapping[str, Tensor], rule: Rule, estimate: Estimate, states: States):
        self._named, self._estimate, self.states = dict(named), estimate, states
        self._rule = rule
        # Where no factors are, the averages are the rule's, so that one learning rate fits all.
        self._beside = AdamW(rule.betas, rule.eps) if isinstance(rule, EigenAdam) else AdamW()
        self.units = single(named)
        self.averages = Averages(estimate.ema)
        self._table: BasesTable | None = None
        self._based: set[str] = set()  # names of units that have bases

    @property
    def formed(self) -> bool:
        """Whether it is known which parameters have factors."""
        return self._table is not None

    def form(self, groups: Iterable[Group]) -> None:
        """Take the parameters of groups together; moments that they have go on in the units."""
        self.units = units_of(self._named, groups)
        states = {name: self.states[p] for name, p in self._named.items() if p in self.states}
        for unit in self.units:
            if unit.layout is not None and (state := unit.joined(states)) is not None:
                for p in unit.params.values():
                    self.states.pop(p, None)
                self.states[unit.key] = state
        self._table = self._new_table(self.units)
        self._tell_of_wide_sides()

    def _tell_of_wide_sides(self) -> None:
        """Say so before decompositions that take long, and how to spare them."""
        largest = self._estimate.largest
        shapes = {u.name: u.layout.matrix for u in self.units if u.layout is not None}
        less = affordable(shapes, self._estimate.bases_every, largest)
        if less is not None:
            widest = max(d for _, *widths in shapes.values() for d in widths if d <= largest)
            log.info(WIDE, widest, less)

    def _new_table(self, units: Sequence[Unit]) -> BasesTable:
        shapes = {u.name: u.layout.matrix for u in units if u.layout is not None}
        wanted = self._estimate
        return BasesTable(shapes, every=wanted.bases_every, largest=wanted.largest)

    def numbers(self) -> Numbers:
        """How many numbers are kept, of what is trained, once all has its moments and bases."""
        found = Numbers(0, 0, 0, 0)
        for unit in self.units:
            if not any(p.requires_grad for p in unit.params.values()):
                continue
            if unit.layout is None:
                moments = self._beside.init(unit.key.detach().to("meta"))
                kept = sum(one.numel() for one in moments.values() if isinstance(one, Tensor))
                found += Numbers(unit.key.numel(), kept, 0, 0)
            else:
                largest = self._estimate.largest
                found += numbers_of_state(unit.layout.matrix, self._rule, largest=largest)
        return found

    # --- one step ----------------------------------------------------------------------------

    def take_in(self, step: int, sums: Sums) -> None:
        """Average what was captured, decompose what is due, and turn moments to the new bases.

        Args:
            step: its number, from 1.
            sums: of the step.
        """
        self.averages.add(sums)
        table = self._table
        if table is None:
            return
        due = table.due(step)
        units = [u for u in self.units if u.layout is not None and u.name in self.averages]
        wanted = [u for u in units if u.name in due or u.name not in self._based]
        if not wanted:
            return
        turned = [u for u in wanted if u.key in self.states]
        names, likes = [u.name for u in turned], [u.like for u in turned]
        before = table.eigenbases(names, likes)
        for dtype in dict.fromkeys(u.like.dtype for u in wanted):
            own = [u.name for u in wanted if u.like.dtype == dtype]
            table.update(step, {name: self.averages.factors(name) for name in own}, dtype=dtype)
        self._based |= {u.name for u in wanted}
        after = table.eigenbases(names, likes)
        if after is not before:
            self._rule.turn([self.states[u.key] for u in turned], before, after)

    def by_parameter(
        self,
        rates: Mapping[Tensor, float | Tensor],
        dampings: Mapping[str, float] | None = None,
    ) -> dict[Tensor, Update]:
        """The update of each parameter that has a gradient; counts a step in their states.

        Args:
            rates: the learning rate of each parameter.
            dampings: λ by parameter name in place of the rule's own; a unit takes that of its
                first parameter.
        """
        pairs = [(u, g) for u in self.units if (g := u.gradient()) is not None]
        factored = [(u, g) for u, g in pairs if u.layout is not None]
        alone = [(u, g) for u, g in pairs if u.layout is None]
        return self._by_factors(factored, rates, dampings) | self._by_adam(alone)

    def _by_factors(
        self,
        pairs: Sequence[tuple[Unit, Tensor]],
        rates: Mapping[Tensor, float | Tensor],
        dampings: Mapping[str, float] | None,
    ) -> dict[Tensor, Update]:
        if not pairs:
            return {}
        assert self._table is not None
        units, gradients = [u for u, _ in pairs], [g for _, g in pairs]
        states = [self._state(self._rule, u, g) for u, g in pairs]
        bases = self._table.eigenbases([u.name for u in units], gradients)
        own = None if dampings is None else [dampings[u.name] for u in units]
        directions = self._rule.directions(gradients, states, bases, own)
        return _split(units, self._rule.lengths(directions, [rates[u.key] for u in units]))

    def _by_adam(self, pairs: Sequence[tuple[Unit, Tensor]]) -> dict[Tensor, Update]:
        states = [self._state(self._beside, u, g) for u, g in pairs]
        directions = self._beside.directions([g for _, g in pairs], states)
        return _split([u for u, _ in pairs], [one.update for one in directions])

    def _state(self, rule: Rule | AdamW, unit: Unit, gradient: Tensor) -> State:
        """The state of a unit, made at its first step."""
        if unit.key not in self.states:
            self.states[unit.key] = rule.init(gradient)
        state: State = self.states[unit.key]
        return state

    # --- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Averages and bases, and what form moments have, which are the optimiser's."""
        return {
            "form": self._form(),
            "averages": self.averages.state_dict(),
            "bases": {} if self._table is None else self._table.state_dict(),
            "based": sorted(self._based),
        }

    def _form(self) -> dict[str, Any]:
        """On what the tensors of a state depend: the rule, its moments, which sides have bases."""
        moments = sorted(self._rule.init(torch.empty(0, device="cpu")))
        rule = f"{type(self._rule).__name__} ({', '.join(moments)})"
        return {"rule": rule, "largest": self._estimate.largest}

    def load_state_dict(self, state: Mapping[str, Any], groups: Sequence[Group] | None) -> None:
        """Take up averages and bases of groups, None where none were known; nothing if it fails.

        Moments are the optimiser's: those of a unit under its first parameter.
        """
        stored = state.get("form", {})
        for option, own in self._form().items():
            if stored.get(option) != own:
                raise InvalidValue(
                    f"the state was made with another {option}",
                    where="state_dict.kfac.form",
                    got=f"{stored.get(option)} where this optimiser has {own}",
                    remedy="Load it into a KFAC with the options that it was made with",
                )
        units = single(self._named) if groups is None else units_of(self._named, groups)
        layouts = {u.name: u.layout for u in units if u.layout is not None}
        if unknown := {*state["averages"], *state["bases"], *state["based"]} - layouts.keys():
            raise InvalidValue(
                "the state has factors of layers that are not here",
                where="state_dict.kfac",
                got=", ".join(sorted(unknown)),
                remedy="Load it into an optimiser of the same model and parameters",
            )
        device = next(iter(self._named.values())).device
        averages = Averages(self._estimate.ema)
        averages.load_state_dict(state["averages"], layouts, device)
        table = None if groups is None else self._new_table(units)
        if table is not None:
            table.load_state_dict(
                {
                    name: {key: t.to(device, copy=True) for key, t in tensors.items()}
                    for name, tensors in state["bases"].items()
                }
            )
        self.units, self.averages, self._table = units, averages, table
        self._based = set(state["based"])


def _split(units: Sequence[Unit], updates: Sequence[Update]) -> dict[Tensor, Update]:
    """What each parameter's own part of the updates of units is."""
    return {
        unit.params[name]: step
        for unit, update in zip(units, updates, strict=True)
        for name, step in unit.steps(update).items()
    }
