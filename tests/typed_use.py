"""What type checkers see of the library: checked by `make types`, never run.

A comment that ignores an error stands where there has to be one: without the error it is one
itself.
"""

from typing import Any

from torch import Tensor, nn
from typing_extensions import assert_type

from kfac_laplace import BradleyTerry, Gaussian, Laplace, Likelihood, MarglikTuner, Predictive
from kfac_laplace.optim import KFAC


def answers(model: nn.Module, x: Tensor, some: Likelihood, laplace: Laplace) -> None:
    """A call gives one tensor or two, by the likelihood, and two where they are joint."""
    classes = Laplace(model, "classification").fit([])
    assert_type(classes, Laplace[Tensor])
    assert_type(classes(x), Tensor)
    assert_type(Laplace(model)(x, link_approx="probit"), Tensor)
    assert_type(Laplace(model, "poisson", hessian_structure="diag", seed=1)(x), Tensor)
    outputs = Laplace(model, "regression", prior_structure="scalar", fisher="mc")
    assert_type(outputs.optimize_prior()(x), tuple[Tensor, Tensor])
    assert_type(outputs(x, joint=True), tuple[Tensor, Tensor])
    assert_type(Laplace(model, Gaussian())(x, "nn", n_samples=5), tuple[Tensor, Tensor])
    assert_type(Laplace(model, BradleyTerry())(x), tuple[Tensor, Tensor])
    assert_type(Laplace(model, some)(x), Any)
    assert_type(laplace(x), Any)
    assert_type(outputs.predict(x), Predictive)
    assert_type(Laplace.load("posterior.pt", model)(x), Any)


def hands_on(la: Laplace[Tensor], x: Tensor, joint: bool) -> None:
    """A joint that is not known beforehand, wherever it stands."""
    assert_type(la(x, joint=joint), Any)
    assert_type(la(x, "glm", joint=joint), Any)
    assert_type(la(x, "glm", "auto", joint), Any)


def together(model: nn.Module, x: Tensor) -> None:
    """Posteriors of several likelihoods share a type; one of tensors is one of either."""
    classes, outputs = Laplace(model), Laplace(model, "regression")
    for la in [classes, outputs]:
        la.fit([])
    either: list[Laplace[Tensor | tuple[Tensor, Tensor]]] = [classes, outputs]
    assert_type(either[0](x), Tensor | tuple[Tensor, Tensor])
    wrong: Laplace[Tensor] = outputs  # type: ignore[assignment]
    hands_on(wrong, x, False)


def options(model: nn.Module, x: Tensor, la: Laplace) -> None:
    """Options of some names take these alone."""
    Laplace(model, "clasification")  # type: ignore[call-overload]
    Laplace(model, hessian_structure="kronecker")  # type: ignore[call-overload]
    Laplace(model, kfac_approx="expanded")  # type: ignore[call-overload]
    Laplace(model, prior_precison=1.0)  # type: ignore[call-overload]
    Laplace(model, kfac_approx={"conv*": "reduce"}, prior_structure={"head.*": "unit"})
    la(x, "glm", "probit", False, 10)
    la(x, "gml")  # type: ignore[call-overload]
    la.predict(x, link_approx="proit")  # type: ignore[arg-type]
    la.optimize_prior("mackay").optimize_prior_precision("gridsearch", link_approx="probit")
    la.optimize_prior("grid")  # type: ignore[arg-type]
    la.calibrate(method="validate")  # type: ignore[arg-type]
    MarglikTuner(model, "regression", 10, method="mackay", uncovered="freeze")
    MarglikTuner(model, "regresion", 10)  # type: ignore[arg-type]
    MarglikTuner(model, "regression", 10, uncovered="frozen")  # type: ignore[arg-type]
    KFAC(model, "classification", kfac_approx="expand")
    KFAC(model, "classification", uncovered="frozen")  # type: ignore[arg-type]
