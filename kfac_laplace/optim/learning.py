"""What the first batch teaches: groups of parameters, whose rows are whose, expand or reduce.

It runs in evaluation mode, where examples do not mix and nothing is drawn. What was learned holds
for the training passes: their uses have the same parameters, kinds and order.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from kfac_laplace.curvature.estimate.choice import choose_settings, first_examples
from kfac_laplace.curvature.estimate.settings import KfacApprox, Setting, chosen_settings
from kfac_laplace.curvature.gradients.effect import effective
from kfac_laplace.curvature.gradients.forward_pass import ForwardPass
from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.curvature.gradients.knowledge import Knowledge
from kfac_laplace.curvature.gradients.network import Network, learn_groups
from kfac_laplace.curvature.gradients.probing import learn_row_layouts
from kfac_laplace.curvature.model.batches import Batch, check_rows
from kfac_laplace.curvature.model.kept import without_trace
from kfac_laplace.curvature.model.random_states import random_states_kept
from kfac_laplace.curvature.model.unchanged import undisturbed
from kfac_laplace.curvature.rows.row_layout import Segments
from kfac_laplace.errors import UnsupportedUse
from kfac_laplace.likelihoods.axes import canonical_axis


@dataclass(frozen=True)
class Learned:
    """What is known about a model.

    Args:
        knowledge: groups of parameters, the class axis, and how rows lie.
        settings: expand or reduce, by name of the groups with Kronecker factors.
        all_read: whether outputs depended on every row: no padding, no token that nothing reads.
    """

    knowledge: Knowledge
    settings: Mapping[str, Setting]
    all_read: bool

    @property
    def captured(self) -> tuple[Group, ...]:
        """The groups whose factors are captured: weights of layers, with their biases.

        Not tables, whose diagonal A counts how often each entry was looked up, nor biases alone.
        """
        return tuple(
            group
            for group in self.knowledge.groups
            if group.treatment == "kron" and group.role in ("joint", "weight")
            if not group.diagonal
        )

    def check_covered(self) -> None:
        """Raise `UnsupportedUse` for parameters that no layer rule covers."""
        groups = [group for group in self.knowledge.groups if not group.covered]
        if groups:
            raise UnsupportedUse(
                "no layer rule covers these parameters",
                where=", ".join(name for group in groups for name in group.layout.params),
                remedy="Choose uncovered='adamw', or register a rule",
            )


@dataclass(frozen=True)
class Lesson:
    """What is asked of a first batch.

    Args:
        network: the model, with a forward function that makes its calls.
        kfac_approx: expand or reduce.
        class_axis: axis of the outputs that holds those of one row; None: what the likelihood takes
            to be likely.
    """

    network: Network
    kfac_approx: KfacApprox = "auto"
    class_axis: int | None = None

    def learn(self, inputs: Any, known: Knowledge) -> Learned:
        """Run a batch in evaluation mode; the model, its buffers and random states stay as found.

        Args:
            inputs: of the batch, as the forward function takes them.
            known: names of the tracked parameters, and what earlier batches taught.
        """
        model = self.network.model
        with (
            undisturbed(model),
            random_states_kept(self.network.device),
            without_trace(model),
        ):
            return self._learn(self._pass(inputs, known))

    def _pass(self, inputs: Any, known: Knowledge) -> ForwardPass:
        """A pass over the batch; as many examples as outputs say, where inputs leave it open."""
        batch = self.network.batch(inputs, None, known.interface)
        passed = self.network.record(batch, known)
        rows = passed.recording.output.shape[:1]
        nodes = passed.output_segments is not None
        if isinstance(batch, Batch) and rows and rows[0] != batch.n and not nodes:
            batch = batch.of(rows[0])
            passed = self.network.record(batch, known)
        output = passed.recording.output
        check_rows(output, batch)
        interface = known.interface.after(batch.shapes, batch.n, output.ndim)
        given = self.class_axis
        likely = passed.likelihood.likely_axis(output.shape)
        axis = canonical_axis(likely if given is None else given, output.shape)
        known = replace(known, interface=interface).with_axis(axis, output.ndim)
        return passed.knowing(known)

    def _learn(self, passed: ForwardPass) -> Learned:
        passed = passed.knowing(learn_row_layouts(passed))
        if not passed.knowledge.groups:
            passed = passed.knowing(learn_groups(passed, "all", joint_bias=True))
        known = passed.knowledge
        found = effective(passed.recording).intersection(known.tracked)
        passed = passed.knowing(replace(known, effective=known.effective | found))
        few = partial(first_examples, self.network, passed, None)
        settings = choose_settings(passed, self.kfac_approx, few)
        settings |= dict.fromkeys(self._of_nodes(passed, settings), "expand")
        used = bool(passed.recording.uses)
        all_read = not used or all(bool(mask.all()) for mask in passed.reachable)
        return Learned(passed.learned, settings, all_read)

    def _of_nodes(self, passed: ForwardPass, settings: Mapping[str, Setting]) -> list[str]:
        """Groups left to "auto" whose rows are nodes or edges: steps were fewer under expand."""
        chosen = chosen_settings(self.kfac_approx, list(settings))
        return [
            name
            for name in settings
            if chosen[name] == "auto"
            and any(
                isinstance(passed.row_layout(term.use), Segments) for term in passed.terms[name]
            )
        ]


def network_for_training(network: Network) -> Network:
    """The network without checks of what leaves examples without Jacobians of their own.

    Batch statistics mix the examples: factors are then those of each example with the others held.
    """
    return replace(network, guarded=False)


def tracked_names(model: nn.Module, wanted: frozenset[int]) -> tuple[str, ...]:
    """Names of the real trainable parameters among some, by identity, in model order."""
    return tuple(
        name
        for name, p in model.named_parameters()
        if id(p) in wanted and p.requires_grad and p.numel() and not p.is_complex()
    )
