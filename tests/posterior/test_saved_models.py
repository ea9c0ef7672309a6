"""Whose model a saved posterior is for: names, shapes, weights and buffers."""

from __future__ import annotations

import copy

import pytest
import torch
from posterior.small_fits import drawn, fit, narrow, net, with_buffers
from torch import nn

from kfac_laplace import Laplace
from kfac_laplace.errors import InvalidType, InvalidValue

pytest.importorskip("safetensors")


@pytest.fixture
def saved(tmp_path):
    la = with_buffers()
    la.save(tmp_path / "la.safetensors")
    return tmp_path / "la.safetensors", la


def other_models():
    """Models that differ in names or shapes, and what is said."""
    linear, norm = nn.Linear, nn.BatchNorm1d
    return {
        "wider": (nn.Sequential(linear(4, 6), norm(6), linear(6, 3)), r"0\.weight: .*\(6, 4\)"),
        "outputs": (nn.Sequential(linear(4, 5), norm(5), linear(5, 2)), r"2\.weight: .*\(2, 5\)"),
        "no bias": (nn.Sequential(linear(4, 5), norm(5), linear(5, 3, bias=False)), r"2\.bias: "),
        "one more": (nn.Sequential(linear(4, 5), norm(5), linear(5, 3), linear(3, 3)), r"3\.we"),
        "no averages": (
            nn.Sequential(linear(4, 5), norm(5, track_running_stats=False), linear(5, 3)),
            r"1\.running_mean: the model has no such tensor",
        ),
    }


@pytest.mark.parametrize("weights", ["check", "ignore"])
@pytest.mark.parametrize("kind", other_models())
def test_another_model_is_refused_by_the_first_tensor(kind, weights, saved):
    path, _ = saved
    model, says = other_models()[kind]
    with pytest.raises(InvalidValue, match=f"^{says}"):
        Laplace.load(path, model.double().eval(), weights=weights)


CHANGES = {
    "a weight": ("0.weight", lambda model: model[0].weight.data[0, 0].add_(1e-3)),
    "a norm's": ("1.bias", lambda model: model[1].bias.data[0].add_(1e-3)),
    "a buffer": ("1.running_var", lambda model: model[1].running_var[2].mul_(1.1)),
    "a count": ("1.num_batches_tracked", lambda model: model[1].num_batches_tracked.add_(1)),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_other_weights_and_buffers_are_refused(kind, suffix, saved, tmp_path):
    _, la = saved
    la.save(tmp_path / f"la.{suffix}")
    model, (name, change) = copy.deepcopy(la.model), CHANGES[kind]
    change(model)
    with pytest.raises(InvalidValue, match=rf"^{name}: the model's weights differ.*ignore"):
        Laplace.load(tmp_path / f"la.{suffix}", model)
    fresh = Laplace(model)
    with pytest.raises(InvalidValue, match=rf"^{name}: "):
        fresh.load_state_dict(la.state_dict())
    fresh.load_state_dict(la.state_dict(), weights="ignore")
    assert torch.equal(fresh.mean, la.mean)


def test_frozen_weights_are_checked(tmp_path):
    la = fit(net(), subset_of_weights="last_layer")
    la.save(tmp_path / "la.safetensors")
    with torch.no_grad():
        la.model[0].weight[0, 0] += 1e-3
    with pytest.raises(InvalidValue, match=r"^0\.weight: the model's weights differ"):
        Laplace.load(tmp_path / "la.safetensors", la.model)


def test_weights_that_are_ignored(saved):
    """Predictions are those around the stored mean, and the model stays as it is."""
    path, la = saved
    model = copy.deepcopy(la.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    before = copy.deepcopy(model.state_dict())
    again = Laplace.load(path, model, weights="ignore")
    x = drawn(3, 4)
    one, other = la.predict(x), again.predict(x)
    assert torch.equal(one.mean, other.mean) and torch.equal(one.covariance, other.covariance)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    nn.utils.vector_to_parameters(again.mean, model.parameters())  # what the page says
    assert torch.equal(Laplace.load(path, model).predict(x).mean, one.mean)


@pytest.mark.parametrize("weights", ["restore", None, True, 3])
def test_a_word_that_says_nothing_of_weights(weights, saved):
    path, la = saved
    with pytest.raises(InvalidValue, match="weights.*'check'.*'ignore'"):
        Laplace.load(path, la.model, weights=weights)


def test_a_model_in_another_precision(tmp_path):
    """float64 holds what float32 held; float32 need not hold what float64 did."""
    single = narrow(torch.float32)
    single.save(tmp_path / "la.safetensors")
    model = copy.deepcopy(single.model).double()
    again = Laplace.load(tmp_path / "la.safetensors", model)
    assert again.predict(drawn(3, 4)).mean.dtype == torch.float64
    assert torch.equal(again.log_marginal_likelihood(), single.log_marginal_likelihood())
    double = fit(net())
    double.save(tmp_path / "la.safetensors")
    with pytest.raises(InvalidValue, match=r"^0\.weight: the model's weights differ"):
        Laplace.load(tmp_path / "la.safetensors", copy.deepcopy(double.model).float())
    narrowed = copy.deepcopy(double.model).float()
    again = Laplace.load(tmp_path / "la.safetensors", narrowed, weights="ignore")
    assert torch.equal(again.mean, double.mean)


def test_buffers_that_are_no_part_of_a_models_state_do_not_count(tmp_path):
    model = net()
    model.register_buffer("cache", torch.zeros(3), persistent=False)
    la = fit(model)
    la.save(tmp_path / "la.safetensors")
    model.cache = torch.ones(5)
    assert Laplace.load(tmp_path / "la.safetensors", model).n_data == 9


def test_a_misspelt_keyword(saved):
    path, la = saved
    with pytest.raises(InvalidType, match="'weight'.*Perhaps weights was meant"):
        Laplace.load(path, la.model, weight="ignore")
