"""What laplace-torch cannot hold is refused with a remedy; a missing laplace-torch is said so."""

import importlib
import importlib.metadata
import sys

import pytest
import torch
from peers import peer
from torch import nn

from kfac_laplace.errors import InvalidType, MissingPackage, UnsupportedUse
from kfac_laplace.integrations import laplace_torch
from kfac_laplace.integrations.laplace_torch import KfacEF, KfacGGN


def fit(model, loader, structure="kron", subset="all", backend=KfacGGN, more=None, **options):
    la = peer.laplace.Laplace(
        model,
        "classification",
        hessian_structure=structure,
        subset_of_weights=subset,
        backend=backend,
        backend_kwargs=options,
        **(more or {}),
    )
    la.fit(loader)
    return la


class Shift(nn.Module):
    """A table of shifts, which is no layer."""

    def __init__(self):
        super().__init__()
        self.inner, self.shift = nn.Linear(5, 3), nn.Parameter(torch.randn(2, 3))

    def forward(self, x):
        return self.inner(x) + self.shift.prod(0)


class Attention(nn.Module):
    """Packed queries, keys and values; the outputs depend on the first query alone."""

    def __init__(self, first: bool):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)
        self.first = first

    def forward(self, x):
        x = x.unflatten(1, (-1, 4))
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(x[:, 0] if self.first else x.mean(1))


def grouped():
    head = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    return nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), *head)


def transposed():
    head = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    return nn.Sequential(nn.ConvTranspose2d(2, 3, 3), *head)


MODELS = {
    "no layer": (Shift, (5,), {}, "shift: .*a diag block is no Kronecker product"),
    "groups": (grouped, (2, 6, 6), {}, "0.weight: .*its 2 blocks have an A each"),
    "transposed": (transposed, (2, 6, 6), {}, "0.weight: .*do not lie along the first axis"),
    "dead queries": (
        lambda: Attention(True),
        (12,),
        {"kfac_approx": "expand"},
        "in_proj_weight: .*its parts meet different numbers of rows",
    ),
    "queries and keys": (
        lambda: Attention(False),
        (12,),
        {},
        "different numbers of rows.*kfac_approx={'attention.in_proj_weight': 'expand'}",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_blocks_that_are_no_product(name):
    """Refused under "kron"; the diagonal has them."""
    make, shape, options, message = MODELS[name]
    model, (x, y) = peer.seeded(make), peer.data("classification", *shape)
    with pytest.raises(UnsupportedUse, match=message + ".*hessian_structure='diag'"):
        fit(model, peer.loader(x, y), **options)
    assert bool(fit(model, peer.loader(x, y), "diag", **options).H.any())


def test_the_remedies_work():
    """Named in the message: one setting for all parts, or a frozen parameter."""
    model, (x, y) = peer.seeded(lambda: Attention(False)), peer.data("classification", 12)
    fit(model, peer.loader(x, y), kfac_approx={"attention.in_proj_weight": "expand"})
    model, (x, y) = peer.seeded(Shift), peer.data("classification", 5)
    model.shift.requires_grad_(False)
    fit(model, peer.loader(x, y))


class Padded(nn.Module):
    """The mean over the tokens that are not 0, of which batches have different numbers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        kept = (x != 0)[..., None]
        return self.head((self.inner(self.embed(x)).tanh() * kept).sum(1) / kept.sum(1))


def test_batches_with_other_numbers_of_positions():
    model = peer.seeded(Padded)
    x, y = torch.arange(24 * 5).reshape(24, 5) % 6 + 1, peer.data("classification", 1)[1]
    x[12:, 2:] = 0
    batches = peer.loader(x, y, batch_size=8)
    with pytest.raises(UnsupportedUse, match="positions an example. got 3.5 and 5. Give all data"):
        fit(model, batches, kfac_approx="expand")
    fit(model, peer.loader(x, y, batch_size=24), kfac_approx="expand")
    fit(model, peer.loader(x, y, batch_size=24), kfac_approx="reduce")


def test_another_pass_over_other_data_is_no_contradiction():
    """Fits may have as many positions as they like, each; also after one that was refused."""
    model = peer.seeded(Padded)
    x, y = torch.arange(24 * 5).reshape(24, 5) % 6 + 1, peer.data("classification", 1)[1]
    shorter = x.clone()
    shorter[:, 2:] = 0
    mixed = torch.cat([x[:12], shorter[12:]])
    la = fit(model, peer.loader(x, y), kfac_approx="expand")
    la.fit(peer.loader(shorter, y))
    with pytest.raises(UnsupportedUse):
        la.fit(peer.loader(mixed, y))
    la.fit(peer.loader(x, y))


def test_options_without_a_place():
    model, (x, y) = peer.mlp(), peer.data("classification", 5)
    batches = peer.loader(x, y)
    with pytest.raises(UnsupportedUse, match="joint_bias: .*one entry for each tensor"):
        fit(model, batches, joint_bias=True)
    with pytest.raises(UnsupportedUse, match="uncovered: .*requires_grad to False"):
        fit(model, batches, uncovered="freeze")
    for name in ("hessian_structure", "kfac_aprox", "batch_fn"):
        with pytest.raises(InvalidType, match=f"backend_kwargs: no such option. got '{name}'"):
            fit(model, batches, **{name: "kron"})
    with pytest.raises(InvalidType, match="stochastic: says the same as fisher"):
        fit(model, batches, stochastic=True, fisher="mc")
    with pytest.raises(InvalidType, match="fisher: KfacEF is one of its own. got 'mc'"):
        fit(model, batches, backend=KfacEF, fisher="mc")
    with pytest.raises(InvalidType, match="asdl_fisher_kwargs: .*got .'ema'"):
        fit(model, batches, more={"asdl_fisher_kwargs": {"ema": 0.1}})
    fit(model, batches, joint_bias=False, uncovered="error")


def test_frozen_parameters_of_the_last_layer():
    """laplace-torch has an entry for each of its parameters, whether they are trained or not."""
    model, (x, y) = peer.mlp(), peer.data("classification", 5)
    model[2].bias.requires_grad_(False)
    with pytest.raises(UnsupportedUse, match="model.2.bias: .*which are frozen"):
        fit(model, peer.loader(x, y), subset="last_layer")


def test_a_whole_matrix_of_a_subnetwork():
    model, (x, y) = peer.mlp(), peer.data("classification", 5)
    more = {"subnetwork_indices": torch.tensor([1, 4])}
    with pytest.raises(UnsupportedUse, match="by the exact GGN alone.*'diag'"):
        fit(model, peer.loader(x, y), "full", "subnetwork", KfacEF, more)
    fit(model, peer.loader(x, y), "diag", "subnetwork", KfacEF, more)


# --- without laplace-torch ---------------------------------------------------------------------


@pytest.fixture
def anew(monkeypatch):
    """Imports the module anew, and puts it back."""

    def anew():
        monkeypatch.delitem(sys.modules, laplace_torch.__name__)
        return importlib.import_module(laplace_torch.__name__)

    monkeypatch.setattr("kfac_laplace.integrations.laplace_torch", laplace_torch)
    return anew


def test_without_laplace_torch(anew, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(
        MissingPackage, match=r'not installed. Install it: pip install "kfac-laplace\[laplace\]"'
    ):
        anew()


def test_with_another_version_of_it(anew, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.2.2")
    with pytest.raises(MissingPackage, match="for laplace-torch 0.3. got 0.2.2. Install"):
        anew()


def test_where_it_cannot_be_imported(anew, monkeypatch):
    monkeypatch.setitem(sys.modules, "laplace.curvature", None)
    with pytest.raises(MissingPackage, match="cannot be imported. got .*laplace.curvature"):
        anew()
