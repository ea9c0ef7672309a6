"""Gradients of predictives in x: against J(x) Σ J(x)ᵀ by torch.func, and finite differences."""

import copy

import pytest
import torch
from posterior import dense
from torch import nn
from torch.func import functional_call, jacrev, vmap

from kfac_laplace import Laplace
from kfac_laplace.errors import InvalidValue, UnsupportedUse
from kfac_laplace.likelihoods.symmetric_root import symmetric_root

CASES = ("mlp-tanh", "mlp-regression", "mlp-binary", "cnn")
# The same algebra in another order, in float64, of covariances below 1e3.
TOL = {"rtol": 1e-8, "atol": 1e-9}


def oracle(la, case, x):
    """f (n, c) and J Σ Jᵀ (n, c, c) as plain functions of x; Σ is constant."""
    model = case.model
    names = dense.covered(la, model)
    params = {name: p.detach() for name, p in model.named_parameters()}
    sigma = torch.linalg.inv(dense.precision(la, model, float(la.sigma_noise))).detach()

    def alone(chosen, one):
        return functional_call(model, {**params, **chosen}, (one[None],)).reshape(-1)

    chosen = {name: params[name] for name in names}
    rows = vmap(jacrev(alone), (None, 0))(chosen, x)
    j = torch.cat([rows[name].flatten(2) for name in names], 2)
    return vmap(alone, (None, 0))(chosen, x), j @ sigma @ j.mT


def slope(values, x):
    """Gradient of a sum with unequal weights."""
    weights = torch.linspace(-1, 2, values.numel(), dtype=values.dtype).reshape(values.shape)
    return torch.autograd.grad((weights * values).sum(), x, retain_graph=True)[0]


def inputs(case, n=3):
    return case.x[:n].clone().requires_grad_()


@pytest.mark.parametrize("structure", ["kron", "diag", "full", "lowrank"])
@pytest.mark.parametrize("name", CASES)
def test_moments(name, structure):
    la, case = dense.fit(name, hessian_structure=structure)
    case.model.eval()
    x = inputs(case)
    predictive = la.predict(x, enable_backprop=True)
    f, covariance = oracle(la, case, x)
    mean = predictive.mean_f[:, 0]
    for found, want in ((mean, f), (predictive.covariance, covariance)):
        torch.testing.assert_close(found, want, **TOL)
        torch.testing.assert_close(slope(found, x), slope(want, x), **TOL)


def linked(name, f, covariance):
    """Probabilities by a link, written out."""
    if name == "mode":
        return f.softmax(-1)
    if name == "centred":
        c = f.shape[-1]
        centre = torch.eye(c, dtype=f.dtype) - 1 / c
        f, covariance = f @ centre, centre @ covariance @ centre
    variance = covariance.diagonal(dim1=1, dim2=2)
    return (f / (1 + torch.pi / 8 * variance).sqrt()).softmax(-1)


@pytest.mark.parametrize("link", ["mode", "probit", "centred"])
@pytest.mark.parametrize("name", ["mlp-tanh", "cnn"])
def test_probabilities(name, link):
    la, case = dense.fit(name)
    case.model.eval()
    x = inputs(case)
    want = linked(link, *oracle(la, case, x))
    for found in (
        la(x, link_approx=link, enable_backprop=True),
        la.predict(x, link_approx=link, enable_backprop=True).probs,
    ):
        torch.testing.assert_close(found, want, **TOL)
        torch.testing.assert_close(slope(found, x), slope(want, x), **TOL)


WAYS = [{"link_approx": link} for link in ("mode", "probit", "centred", "bridge", "mc", "auto")] + [
    {"pred_type": "linear"},
    {"pred_type": "nn"},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way.values()))
def test_finite_differences_of_every_way(way):
    """The same draws at moved inputs: they are functions of x."""
    la, case = dense.fit("mlp-tanh", prior_precision=0.5)
    la.posterior_scale = 2.0  # "auto" has points beyond moderate variances
    x = inputs(case, 2)

    def probs(x):
        return la(x, n_samples=5, enable_backprop=True, **way)

    torch.testing.assert_close(probs(x), la(x, n_samples=5, **way), rtol=1e-9, atol=1e-10)
    assert torch.autograd.gradcheck(probs, (x,))


@pytest.mark.parametrize("what", ["entropy", "epistemic", "aleatoric", "ood_score"])
@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression"])
def test_finite_differences_of_what_is_uncertain(name, what):
    la, case = dense.fit(name)

    def value(x):
        return getattr(la.predict(x, n_samples=5, enable_backprop=True), what)

    x = inputs(case, 2)
    if (name, what) == ("mlp-regression", "aleatoric"):
        assert not value(x).requires_grad  # ½ log 2πe σ² for every x
    else:
        assert torch.autograd.gradcheck(value, (x,))


@pytest.mark.parametrize("pred_type", ["glm", "linear", "nn"])
def test_finite_differences_of_regression(pred_type):
    la, case = dense.fit("mlp-regression", sigma_noise=0.6)

    def moments(x):
        return la(x, pred_type, n_samples=4, enable_backprop=True)

    assert torch.autograd.gradcheck(moments, (inputs(case, 2),))


def test_joint_moments():
    la, case = dense.fit("mlp-regression")
    x = inputs(case)
    mean, covariance = la(x, joint=True, enable_backprop=True)
    plain = la(x, joint=True)
    torch.testing.assert_close((mean, covariance), plain, **TOL)
    assert torch.autograd.gradcheck(lambda x: la(x, joint=True, enable_backprop=True), (x,))


def test_expected_counts():
    """A likelihood whose E[y] is an average over points of f."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 2).double(), torch.arange(8.0)[:, None].double() % 3
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    la = Laplace(model, "poisson").fit([(x, y)])
    asked = x[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: la(x, enable_backprop=True), (asked,))
    predictive = la.predict(asked, enable_backprop=True)
    with pytest.raises(UnsupportedUse, match="draws of y"):
        _ = predictive.entropy
    with torch.no_grad():
        torch.testing.assert_close(predictive.entropy, la.predict(asked).entropy)


def test_parameters_outside_the_posterior_get_gradients_and_those_inside_none():
    la, case = dense.fit("mlp-tanh", subset_of_weights="last_layer")
    x = case.x[:3]
    covariance = la.predict(x, enable_backprop=True).covariance
    first, last = case.model[0].weight, case.model[2].weight
    found, none = torch.autograd.grad(covariance.sum(), [first, last], allow_unused=True)
    assert none is None
    sigma = torch.linalg.inv(dense.precision(la, case.model))

    def by_hand(weight):
        hidden = (x @ weight.T + case.model[0].bias.detach()).tanh()
        eye = torch.eye(3, dtype=x.dtype)
        j = torch.cat(
            [torch.einsum("cd,ni->ncdi", eye, hidden).flatten(2), eye.expand(len(x), 3, 3)], 2
        )
        return (j @ sigma @ j.mT).sum()

    weight = first.detach().clone().requires_grad_()
    (want,) = torch.autograd.grad(by_hand(weight), weight)
    torch.testing.assert_close(found, want, **TOL)


def test_without_it_nothing_is_in_a_graph_and_the_model_is_left_alone():
    la, case = dense.fit("mlp-tanh", subset_of_weights="last_layer")
    x = inputs(case)
    for pred_type in ("glm", "linear", "nn"):
        predictive = la.predict(x, pred_type, n_samples=3)
        assert not predictive.probs.requires_grad
        assert not predictive.covariance.requires_grad
        assert not la(x, pred_type, n_samples=3).requires_grad
    la(x, link_approx="probit", enable_backprop=True).sum().backward()
    assert x.grad is not None
    assert case.model[2].weight.grad is None


class Hooked(nn.Module):
    """Gradients are turned on their way back: vectorised passes do not see hooks."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 3), nn.Linear(3, 3)

    def forward(self, x):
        hidden = self.first(x).tanh()
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: -2 * gradient)
        return self.last(hidden)


class Asking(nn.Module):
    """Looks at its values, which a vectorised pass has none of."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x):
        return self.layer(x.sin()) if bool((x < 100).all()) else x


class Keeping(nn.Module):
    """Keeps what it computed last."""

    def __init__(self):
        super().__init__()
        self.layer, self.kept = nn.Linear(2, 3), None

    def forward(self, x):
        self.kept = self.layer(x.sin())
        return self.kept


@pytest.mark.parametrize("model", [Hooked, Asking, Keeping], ids=lambda model: model.__name__)
def test_models_that_vectorised_passes_would_mistake(model):
    """Covariances and slopes of many inputs are those of each alone, and those without a graph."""
    torch.manual_seed(0)
    la, x = fitted(model().double(), torch.float64)
    x = x.requires_grad_()
    found = la.predict(x, enable_backprop=True).covariance
    torch.testing.assert_close(found, la.predict(x).covariance, **TOL)
    alone = torch.cat([la.predict(one[None], enable_backprop=True).covariance for one in x])
    torch.testing.assert_close(slope(found, x), slope(alone, x), **TOL)
    copy.deepcopy(la.model)  # no tensor of a pass is left in it


class Severed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x):
        return self.layer(x.detach() + 0)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class OnceOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.last(Once.apply(self.first(x)))


def fitted(model, dtype=torch.float32):
    torch.manual_seed(1)
    x, y = torch.randn(7, 2, dtype=dtype), torch.randint(0, 3, (7,))
    return Laplace(model, "classification").fit([(x, y)]), x


def test_what_cannot_be_differentiated_is_refused():
    la, x = fitted(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)))
    with pytest.raises(InvalidValue, match="nothing asks for gradients"):
        la(x, enable_backprop=True)
    x = x.requires_grad_()
    for off in (torch.no_grad(), torch.inference_mode()):
        with off, pytest.raises(InvalidValue, match="gradients are off"):
            la.predict(x, enable_backprop=True)
    for pred_type in ("glm", "linear", "nn"):
        severed, _ = fitted(Severed())
        with pytest.raises(UnsupportedUse, match="do not depend on x"):
            severed.predict(x, pred_type, enable_backprop=True)


def test_gradients_without_a_derivative_are_refused_where_they_are_needed():
    la, x = fitted(OnceOnly())
    x = x.requires_grad_()
    with pytest.raises(UnsupportedUse, match="cannot be differentiated twice"):
        la(x, link_approx="probit", enable_backprop=True)
    probs = la(x, "nn", n_samples=3, enable_backprop=True)
    assert torch.autograd.grad(probs[:, 0].sum(), x)[0].any()


def test_the_symmetric_root_and_its_derivative():
    """Equal eigenvalues, and one at zero in a direction that stays."""
    torch.manual_seed(0)
    a = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    a0 = torch.eye(3, dtype=torch.float64)[:, :2].clone().requires_grad_()
    for factor in (a, a0):
        root = symmetric_root(factor @ factor.mT)
        torch.testing.assert_close(root @ root, factor @ factor.mT)
        # Differences see rounding beside the zero as variance: rows of rank two are by hand.
        (found,) = torch.autograd.grad(root[..., 0, :].sum(), factor)
        step, moved = 1e-6, torch.zeros_like(factor)
        for place in range(factor.numel()):
            for sign in (1, -1):
                other = factor.detach().clone()
                other.view(-1)[place] += sign * step
                change = symmetric_root(other @ other.mT)[..., 0, :].sum()
                moved.view(-1)[place] += sign * change / (2 * step)
        torch.testing.assert_close(found, moved.detach(), rtol=1e-6, atol=1e-7)
