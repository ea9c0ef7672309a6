"""One curvature pass of each contender: a function of a batch, and what it found.

A pass is called as a user would call it for one batch of data. It returns the trace of the
curvature, the sum over examples, as a function to call afterwards: contenders that do the same work
agree in it. Peers are imported here and nowhere else, each where it is used.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.cases import Case

Trace = Callable[[], float]
Pass = Callable[[Tensor, Tensor], Trace]


def curvature_pass(contender: str, model: nn.Module, case: Case) -> Pass:
    """The pass of a contender over a model."""
    if contender == "ours-laplace" or contender.startswith("laplace-"):
        return through_posterior(contender, model, case)
    return PASSES[contender](model, case)


def ours(model: nn.Module, case: Case) -> Pass:
    """`Curvature`; passes after the first know the groups already, as in a loop over batches."""
    from kfac_laplace import Curvature

    latest = Curvature(model, "classification", kfac_approx=case.approx, fisher=case.fisher)  # type: ignore[arg-type]

    def one(x: Tensor, y: Tensor) -> Trace:
        nonlocal latest
        latest = latest.empty() if latest.n_data else latest
        latest.accumulate(x, y)
        return lambda: trace_of_ours(latest)

    return one


def trace_of_ours(curvature: Any) -> float:
    """Σ tr A · tr B, and the diagonals of blocks that are no Kronecker product."""
    total = 0.0
    for block in curvature.blocks.values():
        if block.kind == "kron" and block.factors.input.ndim == 3:
            a, b = (f.diagonal(dim1=-2, dim2=-1).sum(-1) for f in block.factors)
            total += float((a * b).sum())
        else:
            total += float(block.spectrum.values.sum())
    return total


def curvlinops(model: nn.Module, case: Case) -> Pass:
    """`KFACLinearOperator`, with all that saves it further passes over the data."""
    from curvlinops import KFACLinearOperator

    params = [p for p in model.parameters() if p.requires_grad]

    def one(x: Tensor, y: Tensor) -> Trace:
        operator = KFACLinearOperator(
            model,
            nn.CrossEntropyLoss(reduction="sum"),
            params,
            [(x, y)],
            check_deterministic=False,
            fisher_type={"exact": "type-2", "mc": "mc"}[case.fisher],
            kfac_approx=case.approx,
            num_per_example_loss_terms=1,
            separate_weight_and_bias=True,
            num_data=len(y),
        )
        operator.compute_kronecker_factors()
        return lambda: float(operator.trace)

    return one


def asdl(model: nn.Module, case: Case) -> Pass:
    """ASDL's Fisher maker with Kronecker shapes; its linear layers lack the 1/R of expand."""
    from asdl.fisher import FisherConfig, get_fisher_maker
    from asdl.grad_maker import LOSS_CROSS_ENTROPY
    from asdl.matrices import FISHER_EXACT, FISHER_MC, SHAPE_KRON

    config = FisherConfig(
        fisher_type={"exact": FISHER_EXACT, "mc": FISHER_MC}[case.fisher],
        loss_type=LOSS_CROSS_ENTROPY,
        fisher_shapes=[SHAPE_KRON],
        data_size=1,
    )

    def trace(examples: int) -> float:
        total = 0.0
        for module in model.modules():
            if (found := getattr(module, "fisher", None)) is not None:
                a, b = found.kron.A.trace(), found.kron.B.trace()
                total += float(a * b) / examples + float(b) * (module.bias is not None)
        return total

    def one(x: Tensor, y: Tensor) -> Trace:
        maker = get_fisher_maker(model, config)
        maker.setup_model_call(model, x)
        maker.forward_and_backward()
        return lambda: trace(len(y))

    return one


def backpack(model: nn.Module, case: Case) -> Pass:
    """BackPACK's KFLR (exact) and KFAC (Monte-Carlo)."""
    from backpack import backpack as extended_backward
    from backpack import extend, extensions

    extension, attribute = {
        "exact": (extensions.KFLR, "kflr"),
        "mc": (extensions.KFAC, "kfac"),
    }[case.fisher]
    model, loss = extend(model), extend(nn.CrossEntropyLoss(reduction="sum"))

    def trace() -> float:
        factors = [getattr(p, attribute) for p in model.parameters()]
        return sum(float(torch.stack([f.trace() for f in each]).prod()) for each in factors)

    def one(x: Tensor, y: Tensor) -> Trace:
        model.zero_grad()
        with extended_backward(extension()):
            loss(model(x), y).backward()
        return trace

    return one


PASSES = {"ours": ours, "ours-all": ours, "curvlinops": curvlinops, "asdl": asdl,
          "backpack": backpack}  # fmt: skip


def through_posterior(contender: str, model: nn.Module, case: Case) -> Pass:
    """A posterior made and fitted.

    laplace-torch's `fit` ends with eigendecompositions, ours leaves them to whoever asks first: it
    is asked for the log-determinant here.
    """

    def one(x: Tensor, y: Tensor) -> Trace:
        la = posterior(contender, model, case)
        la.fit(loader(x, y))
        if contender == "ours-laplace":
            _ = la.log_det_ratio
            return lambda: trace_of_ours(la.curvature)
        return lambda: sum(
            float(torch.stack([f.trace() for f in each]).prod()) for each in la.H_facs.kfacs
        )

    return one


def posterior(contender: str, model: nn.Module, case: Case) -> Any:
    """An unfitted Kronecker posterior over all trainable weights, with a precision by layer."""
    if contender == "ours-laplace":
        from kfac_laplace import Laplace

        return Laplace(model, "classification", kfac_approx=case.approx, fisher=case.fisher)  # type: ignore[arg-type]
    import laplace
    from laplace import curvature

    name = contender.removeprefix("laplace-")
    backend = {"curvlinops": "CurvlinopsGGN", "asdl": "AsdlGGN", "backpack": "BackPackGGN"}[name]
    return laplace.Laplace(
        model,
        "classification",
        subset_of_weights="all",
        hessian_structure="kron",
        backend=getattr(curvature, backend),
        backend_kwargs={"stochastic": case.fisher == "mc"},
        # Handed to whichever backend there is, in spite of its name.
        asdl_fisher_kwargs={"kfac_approx": case.approx} if name == "curvlinops" else {},
    )


def loader(x: Tensor, y: Tensor, batch: int = 0) -> DataLoader[tuple[Tensor, ...]]:
    """The data in batches, in one by default."""
    return DataLoader(TensorDataset(x, y), batch_size=batch or len(y))
