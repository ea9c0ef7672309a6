"""Recurrent networks in plain calls, unrolled over time.

Of each layer the input projection is one linear layer over all time steps, and the recurrent
projection is one linear layer that is used once a step. Inputs keep the axes they came with, so
that one axis of every call runs over the examples. Packed sequences have no such axis: their steps
lose the examples that are over. Index letters: n example, t time step, i input, h hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_laplace.curvature.layers.registry import equivalent_form

#: what a layer hands from step to step: (h,) or, for an LSTM, (h, c); each (n, h)
State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Weights:
    """Weights of one layer in one direction, in torch's order.

    Args:
        ih: input weight, (gates · h, i).
        hh: recurrent weight, (gates · h, h).
        b_ih: input bias.
        b_hh: recurrent bias.
        hr: projection of an LSTM's hidden state.
    """

    ih: Tensor
    hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    hr: Tensor | None = None

    def project(self, x: Tensor) -> Tensor:
        """What inputs (…, i) add to the gates."""
        return F.linear(x, self.ih, self.b_ih)

    def recur(self, h: Tensor) -> Tensor:
        """What the hidden state (n, h) adds to the gates."""
        return F.linear(h, self.hh, self.b_hh)


#: takes projected inputs (n, gates · h), a state and weights to the next state
Step = Callable[[Tensor, State, Weights], State]


def _lstm_step(x: Tensor, state: State, weights: Weights) -> State:
    h, c = state
    i, f, g, o = (x + weights.recur(h)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return h if weights.hr is None else F.linear(h, weights.hr), c


def _gru_step(x: Tensor, state: State, weights: Weights) -> State:
    (h,) = state
    x_r, x_z, x_n = x.chunk(3, -1)
    h_r, h_z, h_n = weights.recur(h).chunk(3, -1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()  # the reset gate acts after the recurrent bias
    return (n + z * (h - n),)


def _tanh_step(x: Tensor, state: State, weights: Weights) -> State:
    return ((x + weights.recur(state[0])).tanh(),)


def _relu_step(x: Tensor, state: State, weights: Weights) -> State:
    return ((x + weights.recur(state[0])).relu(),)


@dataclass(frozen=True)
class Padded:
    """Sequences of one length: time is an axis."""

    axis: int

    def projected(self, x: Tensor, weights: Weights) -> Sequence[Tensor]:
        """Projected inputs (n, gates · h) of each time step."""
        return weights.project(x).unbind(self.axis)

    def sequence(self, steps: Sequence[Tensor]) -> Tensor:
        """The hidden states (n, h) of all time steps, laid out as the inputs are."""
        return torch.stack(list(steps), self.axis)


@dataclass(frozen=True)
class Packed:
    """Sequences sorted by length: step t has rows of the first sizes[t] examples only."""

    sizes: tuple[int, ...]

    def projected(self, x: Tensor, weights: Weights) -> Sequence[Tensor]:
        """Projected inputs (sizes[t], gates · h) of each time step.

        Each step is a call of its own: rows of all steps together could pass for examples of one
        length, and be assigned to the wrong ones.
        """
        return [weights.project(rows) for rows in x.split(self.sizes)]

    def sequence(self, steps: Sequence[Tensor]) -> Tensor:
        """The hidden states (sizes[t], h) of all time steps, laid out as the inputs are."""
        return torch.cat(list(steps))


@dataclass(frozen=True)
class Unrolled:
    """One call, whatever the kind of its cells and of its sequences.

    Args:
        step: one time step.
        layout: where the time steps lie in the input.
        layers: weights by layer and direction.
        dropout: rate of dropout between layers.
    """

    step: Step
    layout: Padded | Packed
    layers: Sequence[Sequence[Weights]]
    dropout: float

    def run(self, x: Tensor, initial: State) -> tuple[Tensor, ...]:
        """The last layer's outputs, and the final states.

        Args:
            x: inputs, laid out as `layout` says.
            initial: states (layers, n, h); directions of a layer follow one another, and so they
                do in the final states.
        """
        states = iter(zip(*(part.unbind(0) for part in initial), strict=True))
        finals: list[State] = []
        for depth, directions in enumerate(self.layers):
            if depth and self.dropout:
                x = F.dropout(x, self.dropout)
            outputs = []
            for backward, weights in enumerate(directions):
                steps = self.layout.projected(x, weights)
                hidden, final = self._walk(steps, next(states), weights, bool(backward))
                outputs.append(self.layout.sequence(hidden))
                finals.append(final)
            x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        return x, *(torch.stack(parts) for parts in zip(*finals, strict=True))

    def _walk(
        self, steps: Sequence[Tensor], state: State, weights: Weights, backward: bool
    ) -> tuple[list[Tensor], State]:
        """Hidden states in order of time, and the state after the walk.

        Rows of packed sequences leave a forward walk at their end and join a backward one there.
        """
        hidden: list[Tensor] = []
        for x in reversed(steps) if backward else steps:
            n = x.shape[0]
            moved = self.step(x, tuple(part[:n] for part in state), weights)
            hidden.append(moved[0])
            if n < state[0].shape[0]:
                pairs = zip(moved, state, strict=True)
                moved = tuple(torch.cat([new, old[n:]]) for new, old in pairs)
            state = moved
        return hidden[::-1] if backward else hidden, state


def _unroll(step: Step, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Either overload of a recurrent call: its second argument are batch sizes or states."""
    second = args[1] if len(args) > 1 else None
    sizes = isinstance(second, Tensor) and not second.is_floating_point()
    return (_packed if sizes or "batch_sizes" in kwargs else _padded)(step, *args, **kwargs)


def _padded(
    step: Step,
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """A call on sequences of one length, (t, n, i) or (n, t, i)."""
    layers = _by_layer(params, has_biases, num_layers, 2 if bidirectional else 1)
    layout = Padded(1 if batch_first else 0)
    return Unrolled(step, layout, layers, dropout if train else 0.0).run(input, _state(hx, input))


def _packed(
    step: Step,
    data: Tensor,
    batch_sizes: Tensor,
    hx: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> tuple[Tensor, ...]:
    """A call on packed sequences, (Σ sizes, i)."""
    layers = _by_layer(params, has_biases, num_layers, 2 if bidirectional else 1)
    layout = Packed(tuple(batch_sizes.tolist()))
    return Unrolled(step, layout, layers, dropout if train else 0.0).run(data, _state(hx, data))


def _state(hx: Tensor | Sequence[Tensor], x: Tensor) -> State:
    """The initial state as data: zeros that come from nowhere have a row for each example too."""
    zero = x.new_zeros(())
    return tuple(part + zero for part in ((hx,) if isinstance(hx, Tensor) else hx))


def _by_layer(
    params: Sequence[Tensor], has_biases: bool, layers: int, directions: int
) -> list[list[Weights]]:
    """The flat list of parameters by layer and direction; a layer's projection comes last."""
    names = ["ih", "hh", *(["b_ih", "b_hh"] if has_biases else []), "hr"]
    count = len(params) // (layers * directions)
    each = [
        Weights(**dict(zip(names, params[k : k + count], strict=False)))
        for k in range(0, len(params), count)
    ]
    return [each[k : k + directions] for k in range(0, len(each), directions)]


def _cell(
    step: Step,
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor | State:
    """A single time step on inputs (n, i)."""
    weights = Weights(w_ih, w_hh, b_ih, b_hh)
    state = step(weights.project(input), _state(hx, input), weights)
    return state[0] if isinstance(hx, Tensor) else state


for _sequence, _single, _step in (
    (torch.lstm, torch.lstm_cell, _lstm_step),
    (torch.gru, torch.gru_cell, _gru_step),
    (torch.rnn_tanh, torch.rnn_tanh_cell, _tanh_step),
    (torch.rnn_relu, torch.rnn_relu_cell, _relu_step),
):
    equivalent_form(_sequence)(partial(_unroll, _step))
    equivalent_form(_single)(partial(_cell, _step))
