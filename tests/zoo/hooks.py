"""What module hooks see of a case: the inputs of its layers and the gradients of their outputs.

Nothing here comes from the library. Index letters: r row of a layer (all its calls one after
another), n example, m loss term (an output row that has a label), s slot (the how-manieth term of
its example), c output, g group, o/i weight rows/columns, p parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import oracles
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from zoo.case import IGNORED, N_DATA, ZooCase
from zoo.layers import Kind, kind_of
from zoo.plain import plain_copy


@dataclass(frozen=True)
class Terms:
    """The loss terms of a data set, sigma = 1.

    Args:
        f: outputs (m, c), in the graph.
        owner: example of each (m,).
        slot: running number of each within its example (m,).
        hessian: Lambda of each (m, c, c), zero where the label is left out.
    """

    f: Tensor
    owner: Tensor
    slot: Tensor
    hessian: Tensor

    @property
    def table(self) -> Tensor:
        """Lambda by example and slot (n, s, c, c), zero where an example has no such term."""
        shape = N_DATA, int(self.slot.max()) + 1, *self.hessian.shape[1:]
        table = self.hessian.new_zeros(shape)
        table[self.owner, self.slot] = self.hessian
        return table


def loss_terms(case: ZooCase, output: Tensor, x: Any, y: Tensor) -> Terms:
    """The terms of an output (n, c), (n, t, c), (n, c, h, w) or, for node labels, (nodes, c)."""
    f = oracles.terms(output, y, case.likelihood)  # (n, s, c)
    count, slots = f.shape[:2]
    owner, slot = torch.arange(count).repeat_interleave(slots), torch.arange(slots).repeat(count)
    if count != N_DATA:  # nodes, one graph after another
        owner = x.batch
        slot = torch.arange(count) - x.ptr[owner]
    f = f.flatten(0, 1)
    y = y.reshape(len(f), -1) if y.is_floating_point() else y.flatten()
    hessian = oracles.output_hessian(f, y, case.likelihood)
    if not y.is_floating_point():
        hessian = hessian * (y != IGNORED)[:, None, None]
    return Terms(f, owner, slot, hessian)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer: its input, its output in the graph, and the example of each row."""

    kind: Kind
    x: Tensor
    output: Tensor
    owner: Tensor

    def gradients(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Gradients of the output as rows (s c, r, g, o), zero where they stop at the layer."""
        zero = torch.zeros_like(self.output)
        rows = torch.stack([self.kind.output_rows(zero if g is None else g) for g in grads])
        return rows * self.kind.reaches(self.x)[..., None, None]


class Hooks:
    """What hooks see of a case, run once forward and once backward for each output of a term."""

    def __init__(self, case: ZooCase):
        self.case = case
        self.twin, self.places = plain_copy(case.model)
        self.x, self.y = case.data
        self.calls: dict[nn.Module, list[Call]] = {}
        self.biases: set[str] = set()
        self.last = self.twin  # the layer called last
        with self._watched():
            # Fused kernels leave rounding noise where gradients are zero.
            with sdpa_kernel(SDPBackend.MATH):
                output = case.forward(self.x, self.twin)
        torch.testing.assert_close(output, case.forward(self.x), rtol=1e-12, atol=1e-12)
        self.terms = loss_terms(case, output, self.x, self.y)
        self.uses = self._backward()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Record calls of layers, as modules or as `F.linear` with a module's weight."""
        layers = {
            module: name
            for name, module in self.twin.named_modules()
            if kind_of(module) is not None
            and any(p.requires_grad for p in module.parameters(recurse=False))
        }
        weights = {id(m.weight): m for m in layers if isinstance(m, nn.Linear)}
        running: set[nn.Module] = set()
        plain, fastpath = F.linear, torch.backends.mha.get_fastpath_enabled()

        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            running.discard(module)
            kind = kind_of(module)
            owner = self._owner(layers[module], kind.lead(output))
            call = Call(kind, args[0].detach().clone(), output, owner)
            self.calls.setdefault(module, []).append(call)
            self.last = module
            return output.clone()  # what follows may work in place on the clone

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            output, module = plain(x, weight, bias), weights.get(id(weight))
            return output if module is None or module in running else keep(module, (x,), output)

        hooks = [m.register_forward_pre_hook(lambda m, _: running.add(m)) for m in layers]
        hooks += [m.register_forward_hook(keep) for m in layers]
        try:
            F.linear = linear
            torch.backends.mha.set_fastpath_enabled(False)  # it asks for the packed weights
            yield
        finally:
            F.linear = plain
            torch.backends.mha.set_fastpath_enabled(fastpath)
            for hook in hooks:
                hook.remove()

    def _owner(self, module: str, lead: tuple[int, ...]) -> Tensor:
        """The example of each row of a layer's output, (r,)."""
        layout = self.case.layout(module)
        if layout == "nodes":
            owner = self.x.batch
        elif layout == "edges":
            owner = self.x.batch[self.x.edge_index[0]]
        else:
            axis = 1 if layout == "second" else 0
            if lead[axis] % N_DATA:  # looked up by position, the same for all examples
                return torch.zeros(lead, dtype=torch.long).flatten()
            owner = torch.arange(N_DATA).repeat_interleave(lead[axis] // N_DATA)
            owner = owner.view(-1, *(1,) * (len(lead) - axis - 1))
            return owner.expand(lead).flatten()
        return owner.view(-1, *(1,) * (len(lead) - 1)).expand(lead).flatten()

    def all_rows(self, part: str) -> tuple[Tensor, Tensor, Tensor]:
        """Over all calls of a weight or bias: a (r, g, i), b (s, c, r, g, o), examples (r,)."""
        calls = [call for call, _ in self.uses[part]]
        a = torch.cat([call.kind.input_rows(call.x) for call in calls])
        b = torch.cat([gradients for _, gradients in self.uses[part]], 2)
        return a, b, torch.cat([call.owner for call in calls])

    def _backward(self) -> dict[str, list[tuple[Call, Tensor]]]:
        """For each weight and bias of the twin its calls with gradients (s, c, r, g, o)."""
        f, slots, c = self.terms.f, int(self.terms.slot.max()) + 1, self.terms.f.shape[1]
        calls = [call for group in self.calls.values() for call in group]
        grads = [
            torch.autograd.grad(
                f[self.terms.slot == s, k].sum(),  # examples do not mix: the sum separates them
                [call.output for call in calls],
                retain_graph=True,
                allow_unused=True,
            )
            for s in range(slots)
            for k in range(c)
        ]
        found = {
            call: call.gradients(column).unflatten(0, (slots, c))
            for call, column in zip(calls, zip(*grads, strict=True), strict=True)
        }
        uses: dict[str, list[tuple[Call, Tensor]]] = {}
        for module, group in self.calls.items():
            for name, parameter in self.twin.named_parameters():
                if parameter is module.weight or parameter is getattr(module, "bias", None):
                    uses.setdefault(name, []).extend((call, found[call]) for call in group)
                if parameter is getattr(module, "bias", None):
                    self.biases.add(name)
        return uses
