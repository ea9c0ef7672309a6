"""What the tests have in common: fitting a case, comparing blocks, and the untouched-model law."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import oracles
import torch
from cases import Case, build, case
from torch import Tensor, nn

from kfac_laplace import Curvature

# Float64 sums of a few hundred products of numbers of order one, in another order.
EXACT = 1e-10
# The same products, regrouped: only the order of additions changes.
REORDERED = 1e-12
# Some blocks vanish by theory (keys under reduce: softmax ignores a shift of all scores) and hold
# rounding noise alone; they are compared on this fraction of the largest block's scale.
NEGLIGIBLE = 1e-6


def fitted(case: Case | str, batches: Iterable | None = None, **options: Any) -> Curvature:
    """A `Curvature` of the case after one pass over its batches (or the ones given)."""
    case = build(case) if isinstance(case, str) else case
    curvature = Curvature(case.model, case.likelihood, **options)
    curvature.fit(case.batches if batches is None else batches)
    return curvature


def relative_error(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    """Frobenius norm of the difference over that of `want`, or over `floor` if that is larger."""
    assert got.shape == want.shape, f"{tuple(got.shape)} is not {tuple(want.shape)}"
    scale = max(want.norm().item(), floor)
    return (got - want).norm().item() / (scale if scale > 0 else 1.0)


def negligible(curvature: Curvature) -> float:
    """The norm below which a block of this curvature counts as zero."""
    return NEGLIGIBLE * max(block.dense().norm().item() for block in curvature.blocks.values())


def dense_blocks(curvature: Curvature) -> dict[str, Tensor]:
    """Every block as a dense matrix, copied."""
    return {name: block.dense().clone() for name, block in curvature.blocks.items()}


def assert_same_blocks(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Same groups in the same order, every block within the relative tolerance."""
    assert list(got) == list(want)
    floor = NEGLIGIBLE * max(block.norm().item() for block in want.values())
    for name, block in want.items():
        error = relative_error(got[name], block, floor)
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


def assert_complete(curvature: Curvature, model: nn.Module) -> None:
    """Each parameter is in `coverage`; the covered ones lie in exactly one block, sized to fit."""
    coverage = curvature.coverage
    assert set(coverage) == {name for name, _ in model.named_parameters()}
    assert set(coverage.values()) <= {"kron", "diag", "dense", "frozen", "unused"}
    placed = [name for block in curvature.blocks.values() for name in block.params]
    assert len(placed) == len(set(placed)), "a parameter lies in two blocks"
    assert set(placed) == {name for name, kind in coverage.items() if kind != "frozen"}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    for block in curvature.blocks.values():
        size = sum(sizes[name] for name in block.params)
        assert block.dense().shape == (size, size)


def seeded_case(
    make: Callable[[], nn.Module], shape: tuple[int, ...] = (3,), likelihood: str = "classification"
) -> Case:
    """A case of a model made on the spot, always with the same weights and data."""
    torch.manual_seed(4)
    return case(make(), shape, likelihood)


def assert_dense_structures_are_exact(example: Case) -> None:
    """diag and full equal the dense oracle, whatever the uses of the parameters."""
    for structure in ("diag", "full"):
        curvature = fitted(example, hessian_structure=structure)
        assert_complete(curvature, example.model)
        for block in curvature.blocks.values():
            exact = oracles.ggn(example.model, *example.data, list(block.params))
            if structure == "diag":
                exact = exact.diagonal().diag()
            floor = negligible(curvature)
            assert relative_error(block.dense(), exact, floor) < EXACT, block.params


def assert_exact_blocks(example: Case, curvature: Curvature, names: list[str]) -> None:
    """Under kron these parameters have exact blocks, whole or diagonal as `coverage` says."""
    for name in names:
        kind = curvature.coverage[name]
        (block,) = [b for b in curvature.blocks.values() if name in b.params]
        assert block.kind == kind and kind in ("dense", "diag"), (name, kind)
        exact = oracles.ggn(example.model, *example.data, list(block.params))
        exact = exact if kind == "dense" else exact.diagonal().diag()
        assert relative_error(block.dense(), exact, negligible(curvature)) < EXACT, name


def assert_diagonal_blocks(example: Case, curvature: Curvature, names: list[str]) -> None:
    """Under kron these parameters are listed as "diag" and have exact diagonal blocks."""
    for name in names:
        assert curvature.coverage[name] == "diag", name
        (block,) = [b for b in curvature.blocks.values() if name in b.params]
        exact = oracles.ggn(example.model, *example.data, list(block.params))
        assert relative_error(block.dense(), exact.diagonal().diag()) < EXACT, name


def assert_kfac_block(
    example: Case,
    curvature: Curvature,
    layer: str,
    setting: str,
    weight: str | None = None,
    live: Tensor | None = None,
) -> None:
    """The block of a linear or conv module (joint bias) follows the K-FAC formula.

    `weight` names the block where the module belongs to a twin with other names; `live` (n, t)
    says which positions reach the output.
    """
    factors = oracles.kfac_factors(example.model, layer, example.data, setting, live=live)
    module = example.model.get_submodule(layer)
    dense = oracles.kfac_block(factors, bias_column=module.bias is not None)
    block = curvature.blocks[weight or f"{layer}.weight"]
    assert relative_error(block.dense(), dense, negligible(curvature)) < EXACT


class Untouched:
    """Photograph a model and the global RNG; `check` compares them with the photograph."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.tensors = {k: v.detach().clone() for k, v in self._tensors()}
        self.grads = {k: None if p.grad is None else p.grad.clone() for k, p in self._parameters()}
        self.identities = self._identities()
        self.rng = torch.get_rng_state()

    def check(self) -> None:
        """Raise unless weights, buffers, modes, gradients, flags, hooks and RNG are as found."""
        for name, tensor in self._tensors():
            torch.testing.assert_close(
                tensor.detach(), self.tensors[name], rtol=0, atol=0, equal_nan=True
            )
        for name, parameter in self._parameters():
            before = self.grads[name]
            assert (parameter.grad is None) == (before is None), f"{name}.grad appeared or vanished"
            if before is not None:
                assert torch.equal(parameter.grad, before), f"{name}.grad changed"
        assert self._identities() == self.identities
        assert torch.equal(torch.get_rng_state(), self.rng), "the global RNG moved"

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.model.named_parameters())

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [*self._parameters(), *self.model.named_buffers()]

    def _identities(self) -> dict[str, object]:
        """What must be the very same: parameter objects, flags, modes, hooks, attributes."""
        found: dict[str, object] = {}
        for name, parameter in self._parameters():
            hooks = len(parameter._backward_hooks or ())
            found[f"parameter {name}"] = (id(parameter), parameter.requires_grad, hooks)
        for name, module in self.model.named_modules():
            hooks = [len(v) for k, v in vars(module).items() if k.endswith("_hooks") and v]
            found[f"module {name}"] = (module.training, tuple(hooks), tuple(sorted(vars(module))))
        return found
