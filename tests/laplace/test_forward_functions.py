"""Inputs, outputs and batches in any form: every call gives what it gives in the plain form.

The plain form, `model(x)` returns a tensor and batches are pairs (x, y), is compared with dense
algebra elsewhere. Here the same network with the same data is handed over in other forms.
"""

from __future__ import annotations

from collections import UserDict, namedtuple
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import Case, TokenMixer, case
from torch import Tensor, nn

from kfac_laplace import Curvature, Laplace, MarglikTuner, marglik_training
from kfac_laplace.errors import InvalidValue

Logits = namedtuple("Logits", ["logits", "hidden"])


@dataclass
class Record:
    """A batch that is no pair and no mapping."""

    image: Tensor
    label: Tensor


class Wrapped(nn.Module):
    """The network behind other inputs and outputs."""

    def __init__(self, network: nn.Module, inputs: Callable, output: Callable):
        super().__init__()
        self.network, self.inputs, self.output = network, inputs, output

    def forward(self, *args: Any, **named: Any) -> Any:
        return self.output(self.network(self.inputs(*args, **named)))


def same(value: Any) -> Any:
    return value


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The input as two tensors of half the width."""
    first, second = x.chunk(2, -1)
    return first.contiguous(), second.contiguous()


def joined(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second], -1)


def pair(batch: Record) -> tuple[dict, Tensor]:
    return {"nested": [batch.image, {"name": "not a tensor"}]}, batch.label


def run_record(model: nn.Module, x: dict) -> Tensor:
    return model(x["nested"][0])["scores"]


@dataclass(frozen=True)
class Form:
    """How a network is handed over.

    Args:
        x: makes the inputs of the plain tensor.
        inputs: undoes that inside the model.
        output: what the model returns instead of its output.
        batch: joins inputs and targets to what the loader yields.
        options: what `Laplace` has to know beside the model.
    """

    x: Callable = same
    inputs: Callable = same
    output: Callable = same
    batch: Callable = lambda x, y: (x, y)
    options: dict[str, Any] = field(default_factory=dict)


FORMS = {
    "plain": Form(),
    "logits of an object": Form(output=lambda f: Logits(f, f.exp())),
    "logits of a mapping": Form(output=lambda f: {"aux": f.sum(), "logits": f}),
    "out of a mapping": Form(output=lambda f: {"out": f, "aux": f.exp()}),
    "tuple inputs": Form(x=halves, inputs=joined),
    "list inputs": Form(x=lambda x: [*halves(x)], inputs=joined, batch=lambda x, y: [x, y]),
    "nested inputs": Form(
        x=lambda x: (x[..., :1], {"rest": [x[..., 1:]]}),
        inputs=lambda first, second: joined(first, second["rest"][0]),
    ),
    "mapping": Form(
        x=lambda x: dict(zip("ab", halves(x), strict=True)),
        inputs=lambda a, b: joined(a, b),
        batch=lambda x, y: {**x, "labels": y},
    ),
    "mapping class": Form(
        x=lambda x: UserDict(zip("ab", halves(x), strict=True)),
        inputs=lambda a, b: joined(a, b),
        batch=lambda x, y: UserDict({**x, "labels": y}),
    ),
    "mapping and target": Form(
        x=lambda x: {"whole": x, "flag": None, "scale": torch.tensor(1.0)},
        inputs=lambda whole, flag, scale: whole * scale,
    ),
    "target by another key": Form(
        x=lambda x: {"whole": x},
        inputs=lambda whole: whole,
        batch=lambda x, y: {**x, "answer": y},
        options={"dict_key_y": "answer"},
    ),
    "forward_fn": Form(
        x=lambda x: {"image": x},
        output=lambda f: (f.sum(), f),
        options={"forward_fn": lambda model, x: model(x["image"])[1]},
    ),
    "forward_fn and batch_fn": Form(
        x=lambda x: {"nested": [x, {"name": "not a tensor"}]},
        output=lambda f: {"scores": f},
        batch=lambda x, y: Record(x["nested"][0], y),
        options={"forward_fn": run_record, "batch_fn": pair},
    ),
}


def pixels() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 1))


def images() -> Case:
    """Pixel outputs (n, c, h, w) with labels (n, h, w)."""
    example = case(pixels(), (2, 3, 4), "regression")
    batches = [(x, torch.randint(0, 3, (len(x), 3, 4))) for x, _ in example.batches]
    return Case(example.model, "classification", batches)


KINDS: dict[str, Callable[[], Case]] = {
    "classes": lambda: case(mlp(3), (4,), "classification"),
    "binary": lambda: case(mlp(1), (4,), "binary"),
    "regression": lambda: case(mlp(2), (4,), "regression"),
    "token classes": lambda: case(TokenMixer(4, 2), (3, 4), "classification"),
    "token values": lambda: case(TokenMixer(4, 2), (3, 4), "regression"),
    "token logits": lambda: case(TokenMixer(4, 2), (3, 4), "binary"),
    "pixel classes": images,
    "pixel values": lambda: case(pixels(), (2, 3, 4), "regression"),
}


def mlp(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))


def handed_over(kind: str, form: Form) -> tuple[Case, nn.Module, list[Any]]:
    """The plain case, the model in its form, and the loader of that form."""
    torch.manual_seed(7)
    example = KINDS[kind]()
    model = Wrapped(example.model, form.inputs, form.output)
    return example, model, [form.batch(form.x(x), y) for x, y in example.batches]


def tensors(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


def outcomes(kind: str, form: Form) -> dict[str, list[Tensor]]:
    """What every verb gives, by its name."""
    example, model, batches = handed_over(kind, form)
    x, found = form.x(example.x), {}
    la = Laplace(model, example.likelihood, **form.options).fit(batches)
    found["evidence"] = tensors(la.log_marginal_likelihood())
    functions = {k: v for k, v in form.options.items() if k.endswith("_fn")}
    backend = Curvature(model, example.likelihood, **functions)
    backend.fit(batches, key_y=form.options.get("dict_key_y", "labels"))
    found["backend"] = [block.dense() for block in backend.blocks.values()]
    la.optimize_prior("gridsearch", val_loader=batches, grid=(0.3, 1.0, 3.0))
    found["grid search"] = tensors(la.prior_precision)
    la.optimize_prior(tolerance=1e-3)
    found["optimised prior"] = [la.prior_precision, la.sigma_noise]
    found["leave-one-out scale"] = tensors(la.calibrate().posterior_scale)
    found["validation scale"] = tensors(la.calibrate(batches, "validation").posterior_scale)
    la.posterior_scale = 1.0
    for pred_type in ("glm", "linear", "nn"):
        found[pred_type] = tensors(la(x, pred_type=pred_type, n_samples=3))
    predictive = la.predict(x, link_approx="mc", n_samples=3)
    found["predictive"] = [predictive.mean, predictive.covariance, predictive.epistemic]
    found["parameters"] = tensors(la.sample(2))
    found["functions"] = tensors(la.functional_samples(x, 2))
    found["targets"] = tensors(la.predictive_samples(x, 2))
    tuner = MarglikTuner(model, example.likelihood, la.n_data, **form.options)
    output, y = tuner.forward(batches[1])
    found["tuner's output"] = [output, y]
    found["loss"] = tensors(tuner.loss(output, y))
    found["round"] = [torch.tensor(tuner.step(batches).evidence)]
    found["tuner's posterior"] = tensors(tuner.laplace(batches)(x))
    return found


def assert_same_outcomes(got: dict[str, list[Tensor]], want: dict[str, list[Tensor]]) -> None:
    """Only the layout of inputs in memory differs: sums may be added in another order."""
    for verb, expected in want.items():
        for have, wish in zip(got[verb], expected, strict=True):
            torch.testing.assert_close(
                have, wish, rtol=1e-9, atol=1e-9, msg=lambda text, verb=verb: f"{verb}: {text}"
            )


@pytest.mark.slow
@pytest.mark.parametrize("form", [name for name in FORMS if name != "plain"])
def test_every_form_is_the_plain_one(form):
    assert_same_outcomes(outcomes("classes", FORMS[form]), outcomes("classes", FORMS["plain"]))


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "classes"])
def test_every_kind_of_output_goes_through_every_verb(kind):
    want = outcomes(kind, FORMS["plain"])
    assert_same_outcomes(outcomes(kind, FORMS["forward_fn and batch_fn"]), want)
    x = KINDS[kind]().x
    assert want["functions"][0].shape[1] == want["glm"][0].shape[0] == len(x)


@pytest.mark.parametrize("form", ["mapping", "target by another key", "forward_fn and batch_fn"])
def test_marglik_training(form):
    def trained(form: Form) -> Iterable[float]:
        _, model, batches = handed_over("classes", form)
        la, _, margliks, losses = marglik_training(
            model, batches, n_epochs=3, optimizer_kwargs={"lr": 0.01}, **form.options
        )
        return [*margliks, *losses, float(la.log_marginal_likelihood())]

    assert trained(FORMS[form]) == pytest.approx(trained(FORMS["plain"]), rel=1e-9)


@pytest.mark.parametrize("form", ["mapping", "forward_fn", "forward_fn and batch_fn"])
def test_round_trip_through_a_file(form, tmp_path):
    """Functions are no data: the file is read with `weights_only`, and they are passed again."""
    chosen = FORMS[form]
    example, model, batches = handed_over("classes", chosen)
    la = Laplace(model, "classification", **chosen.options).fit(batches).optimize_prior()
    la.save(tmp_path / "la.pt")
    functions = {k: v for k, v in chosen.options.items() if k.endswith("_fn")}
    loaded = Laplace.load(tmp_path / "la.pt", model, **functions)
    x = chosen.x(example.x)
    assert torch.equal(loaded(x), la(x))
    assert torch.equal(loaded.log_marginal_likelihood(), la.log_marginal_likelihood())
    assert torch.equal(loaded.fit(batches)(x), la(x))


def test_a_file_of_a_posterior_with_functions_asks_for_them(tmp_path):
    chosen = FORMS["forward_fn and batch_fn"]
    _, model, batches = handed_over("classes", chosen)
    Laplace(model, "classification", **chosen.options).fit(batches).save(tmp_path / "la.pt")
    with pytest.raises(InvalidValue, match=r"forward_fn=|batch_fn="):
        Laplace.load(tmp_path / "la.pt", model)
