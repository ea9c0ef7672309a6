"""What .safetensors files hold and say, rounded or not; damaged and foreign ones are refused."""

from __future__ import annotations

import io
import json

import pytest
import torch
from mutants import mutants
from posterior.small_fits import calibrated, drawn, fit, net, tuned, with_buffers
from torch import nn

from kfac_laplace import Laplace
from kfac_laplace.errors import InvalidValue, KfacLaplaceError, NotFitted
from kfac_laplace.states import files, safetensors_file
from kfac_laplace.states.plain import same, sealed

safetensors = pytest.importorskip("safetensors")
package = pytest.importorskip("safetensors.torch")


# --- what a file says of itself ------------------------------------------------------------------


def header(path):
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["kfac_laplace"])


def test_the_header_tells_people(tmp_path):
    la = calibrated()
    la.prior_precision = torch.tensor([2.0, 3.0])
    la.save(tmp_path / "la.safetensors")
    told = header(tmp_path / "la.safetensors")
    about = told["about"]
    assert about["likelihood"] == "Categorical" and about["hessian_structure"] == "kron"
    assert about["prior_precision"] == {"0.weight": 2.0, "2.weight": 3.0}
    assert (about["posterior_scale"], about["predictive_temperature"]) == (0.3, 1.7)
    assert about["coverage"] == la.coverage and about["n_data"] == 9
    assert told["tree"]["options"]["hessian_structure"] == "kron"
    shapes = {name: one["shape"] for name, one in told["tree"]["model"].items()}
    assert shapes == {name: [*p.shape] for name, p in la.model.named_parameters()}
    assert all(len(one["sha256"]) == 64 for one in told["tree"]["model"].values())


def size(la, path, **options):
    la.save(path, **options)
    return path.stat().st_size


def test_less_room(tmp_path):
    """The mean of a float32 model in float32, dense blocks as triangles: half of torch's file."""
    x, y = drawn(60, 30).float(), torch.arange(60) % 3
    model = nn.Sequential(nn.Linear(30, 10), nn.Tanh(), nn.Linear(10, 3))
    la = fit(model, x=x, y=y, hessian_structure="full")
    whole, half = size(la, tmp_path / "la.pt"), size(la, tmp_path / "la.safetensors")
    rounded = size(la, tmp_path / "la.safetensors", dtype=torch.float32)
    assert half < 0.52 * whole and rounded < 0.54 * half


# --- rounded to float32 --------------------------------------------------------------------------


def rounded(la, path):
    la.save(path, dtype=torch.float32)
    return Laplace.load(path, la.model)


def test_a_rounded_diagonal_moves_the_evidence_by_its_directions(tmp_path):
    """Values change by 2⁻²⁴ of themselves, so ½ log det (1 + v/δ) by less than ½ γ 2⁻²⁴."""
    la = fit(net(), hessian_structure="diag", prior_precision=1e-3)
    again = rounded(la, tmp_path / "la.safetensors")
    gamma = sum(float(b.effective_dimensions().sum()) for b in la.posterior.blocks.values())
    moved = abs(float(again.log_marginal_likelihood() - la.log_marginal_likelihood()))
    assert 0 < moved <= 0.5 * gamma * 2**-24 * (1 + 1e-6)


@pytest.mark.parametrize("delta", [1e-4, 1.0])
def test_rounded_factors_move_eigenvalues_by_their_norms(delta, tmp_path):
    """|Δλ| ≤ |ΔA| ≤ 2⁻²⁴ |A| in the Frobenius norm, by Weyl; d log(1 + v/δ) ≤ dv/δ."""
    x = drawn(40, 4)
    model = net()
    la = fit(model, x=x, y=torch.arange(40) % 2, kfac_approx="expand", prior_precision=delta)
    again, bound = rounded(la, tmp_path / "la.safetensors"), 0.0
    for name, block in la.curvature.blocks.items():
        (a, b), (c, d) = block.factors, again.curvature.blocks[name].factors
        norms = [float(torch.linalg.matrix_norm(one).sum()) for one in (a, b)]
        for one, other, norm in ((a, c, norms[0]), (b, d, norms[1])):
            assert 0 < float(torch.linalg.matrix_norm(one - other)) <= 2**-24 * norm
        traces = [float(one.diagonal(dim1=-2, dim2=-1).sum()) for one in (a, b)]
        i, o = a.shape[-1], b.shape[-1]
        bound += 2**-24 * (o * norms[1] * traces[0] + i * norms[0] * traces[1]) / delta
    moved = abs(float(again.log_marginal_likelihood() - la.log_marginal_likelihood()))
    assert 0 < moved <= 0.5 * bound * (1 + 1e-6)


def test_what_is_rounded_is_curvature_alone(tmp_path):
    la = tuned("kron")
    again = rounded(la, tmp_path / "la.safetensors")
    for name in ("mean", "prior_precision", "sigma_noise", "log_likelihood", "scatter"):
        assert torch.equal(getattr(again, name).detach(), getattr(la, name).detach())
    block, other = (one.curvature.blocks["0.weight"] for one in (la, again))
    assert other.input_sum.dtype == block.input_sum.dtype
    assert torch.equal(other.input_count, block.input_count)
    assert same(la.state_dict(), la.state_dict(dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32, "float32", 32])
def test_other_precisions(dtype, tmp_path):
    with pytest.raises(InvalidValue, match=r"dtype: .*as it is or rounded.*dtype=torch.float32"):
        fit(net()).save(tmp_path / "la.safetensors", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_rounding_is_for_such_files(tmp_path):
    for path in (tmp_path / "la.pt", io.BytesIO()):
        with pytest.raises(InvalidValue, match="dtype: .*in .safetensors files alone"):
            fit(net()).save(path, dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_curvature_beyond_float32(tmp_path):
    la = fit(net())
    la.curvature.ggn = la.curvature.ggn.scaled(1e60)
    la.save(tmp_path / "la.safetensors")
    with pytest.raises(InvalidValue, match=r"0\.weight, .*beyond the range of float32"):
        la.save(tmp_path / "other.safetensors", dtype=torch.float32)


# --- older, damaged and foreign ------------------------------------------------------------------


def test_files_from_before_there_were_fingerprints(tmp_path):
    """Their weights are still compared with the mean; buffers are not known."""
    la = with_buffers()
    state = {name: value for name, value in la.state_dict().items() if name != "model"}
    torch.save(sealed(state), tmp_path / "la.pt")
    assert same(Laplace.load(tmp_path / "la.pt", la.model).state_dict(), la.state_dict())
    la.model[1].running_var.mul_(2)
    Laplace.load(tmp_path / "la.pt", la.model)
    with torch.no_grad():
        la.model[0].bias[0] += 1
    with pytest.raises(InvalidValue, match=r"^0\.bias: the model's weights differ"):
        Laplace.load(tmp_path / "la.pt", la.model)


def test_nothing_to_save(tmp_path):
    with pytest.raises(NotFitted):
        Laplace(net()).save(tmp_path / "la.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_models_file(tmp_path):
    la = fit(net())
    package.save_file(la.model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(InvalidValue, match="a .safetensors file of another program"):
        Laplace.load(tmp_path / "model.safetensors", la.model)
    files.write(la.curvature.state_dict(), tmp_path / "curvature.safetensors")
    with pytest.raises(InvalidValue, match="not the state of a Laplace posterior.*curvature"):
        Laplace.load(tmp_path / "curvature.safetensors", la.model)


def test_bits_of_tensors_that_fell_over(tmp_path):
    """safetensors reads such a file without a word; the seal is ours."""
    la = fit(net())
    la.save(tmp_path / "la.safetensors")
    whole = (tmp_path / "la.safetensors").read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in range(start + 1, len(whole), (len(whole) - start) // 40):
        bad = bytearray(whole)
        bad[place] ^= 4
        with pytest.raises(InvalidValue):
            Laplace.load(io.BytesIO(bytes(bad)), la.model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value, tmp_path):
    """With every checksum right, as another program might have written it."""
    la = fit(net())
    state = la.state_dict()
    state["mode"]["0.bias"] = state["mode"]["0.bias"] * value
    files.write(sealed(state), tmp_path / "la.safetensors")
    with pytest.raises(InvalidValue, match=r"state\.mode\.0\.bias: not finite"):
        Laplace.load(tmp_path / "la.safetensors", la.model)


def test_headers_with_other_values(tmp_path):
    """One value of the tree changed, with the header's checksum right: refused, or the same."""
    la = fit(net(), "regression", y=drawn(9, 2))
    la.save(tmp_path / "la.safetensors")
    stored, told = (
        package.load_file(tmp_path / "la.safetensors"),
        header(tmp_path / "la.safetensors"),
    )
    expected, refused = la.state_dict(), 0
    plain = {name: value for name, value in told.items() if name != "sha256"}
    for place, value, tree in mutants(told["tree"], every=23):
        try:
            changed = {**plain, "tree": tree}
            changed["sha256"] = safetensors_file._digest(changed)
            data = package.save(stored, {"kfac_laplace": json.dumps(changed)})
        except (TypeError, ValueError):  # no JSON
            continue
        try:
            again = Laplace.load(io.BytesIO(data), la.model)
        except KfacLaplaceError:
            refused += 1
        else:
            assert same(again.state_dict(), expected), (place, value)
    assert refused > 50
