"""Posteriors as folders in the layout of the Hugging Face Hub."""

from __future__ import annotations

import json
import os

import pytest
import torch
from posterior.small_fits import calibrated, drawn, fit, net

from kfac_laplace import Laplace
from kfac_laplace.errors import InvalidValue, NotFitted
from kfac_laplace.states.plain import same

package = pytest.importorskip("safetensors.torch")
FILES = ["README.md", "config.json", "posterior.safetensors"]


@pytest.fixture
def folder(tmp_path):
    calibrated().save_pretrained(tmp_path / "hub" / "posterior")
    return tmp_path / "hub" / "posterior"


def test_a_folder_comes_back(folder):
    la = calibrated()
    again = Laplace.from_pretrained(folder, net(), seed=3)
    assert sorted(os.listdir(folder)) == FILES and again.seed == 3
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())
    assert torch.equal(again(drawn(3, 4)), la(drawn(3, 4)))
    assert same(Laplace.from_pretrained(str(folder), net()).state_dict(), la.state_dict())


def test_options_of_loading_are_passed_on(folder):
    model = net()
    torch.nn.init.zeros_(model[0].bias)
    with pytest.raises(InvalidValue, match=r"0\.bias: the model's weights differ"):
        Laplace.from_pretrained(folder, model)
    assert Laplace.from_pretrained(folder, model, weights="ignore").n_data == 9
    with pytest.raises(InvalidValue, match="hessian_structure"):
        Laplace.from_pretrained(folder, model, hessian_structure="diag")


def test_the_config_is_the_header(folder):
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["library_name"] == "kfac_laplace" and config["architecture"] == "Sequential"
    assert config["posterior_scale"] == 0.3 and config["n_parameters"] == 37
    la = Laplace.from_pretrained(folder, net())
    assert config["coverage"] == la.coverage


def test_the_hubs_own_reader_takes_the_card(folder):
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(folder / "README.md")
    assert card.data.library_name == "kfac_laplace"
    assert "laplace-approximation" in card.data.tags
    assert "| likelihood | `Categorical` |" in card.text
    assert "| treatment of the model's parameters | 4 kron |" in card.text


def test_precisions_that_differ_in_a_group_are_told_by_their_range(tmp_path):
    la = fit(net(), hessian_structure="diag", prior_structure="diag")
    la.prior_precision = torch.linspace(1, 2, 37, dtype=torch.float64)
    la.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert config["prior_precision"]["0.weight"][0] == 1.0
    assert config["prior_precision"]["2.weight"][1] == 2.0
    assert len((tmp_path / "config.json").read_text("utf-8")) < 2000


def test_saved_again(folder):
    """A card in which people wrote stays; the rest is new."""
    (folder / "README.md").write_text("Ours.", "utf-8")
    la = fit(net(), hessian_structure="diag")
    la.save_pretrained(folder, dtype=torch.float32)
    assert (folder / "README.md").read_text("utf-8") == "Ours."
    assert json.loads((folder / "config.json").read_text("utf-8"))["hessian_structure"] == "diag"
    assert Laplace.from_pretrained(folder, net()).options.hessian_structure == "diag"
    assert sorted(os.listdir(folder)) == FILES


@pytest.mark.parametrize("config", ['{"model_type": "bert"}', "[]", "no JSON", ""])
def test_a_config_of_another_library_is_not_lost(config, tmp_path):
    (tmp_path / "config.json").write_text(config, "utf-8")
    with pytest.raises(InvalidValue, match="config.json of another library.*folder of its own"):
        calibrated().save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == ["config.json"]
    assert (tmp_path / "config.json").read_text("utf-8") == config


def test_nothing_to_save(tmp_path):
    with pytest.raises(NotFitted):
        Laplace(net()).save_pretrained(tmp_path / "folder")
    assert os.listdir(tmp_path) == []


def test_what_is_no_such_folder(folder, tmp_path):
    with pytest.raises(InvalidValue, match="someone/posterior: no such folder.*snapshot_download"):
        Laplace.from_pretrained("someone/posterior", net())
    with pytest.raises(InvalidValue, match="a file, where a folder is wanted.*Laplace.load"):
        Laplace.from_pretrained(folder / "posterior.safetensors", net())
    with pytest.raises(InvalidValue, match=r"no posterior\.safetensors in the folder"):
        Laplace.from_pretrained(tmp_path, net())
    with pytest.raises(NotADirectoryError):
        calibrated().save_pretrained(folder / "config.json" / "inner")
