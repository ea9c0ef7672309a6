"""What can be asked of a plan, what it leaves alone, and what it refuses."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kfac_laplace import Laplace, Plan
from kfac_laplace.errors import InvalidType, InvalidValue, UnsupportedUse

OPTIONS = [
    {"hessian_structure": structure} for structure in ("kron", "ekfac", "diag", "full", "lowrank")
]


def net() -> nn.Sequential:
    """A net of two layers with dropout and a norm."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Dropout(), nn.ReLU(), nn.Linear(9, 3)
    )


def data(n: int = 12) -> tuple[Tensor, Tensor]:
    """Inputs and labels."""
    torch.manual_seed(1)
    return torch.randn(n, 4), torch.randint(3, (n,))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: str(o["hessian_structure"]))
@pytest.mark.parametrize("fitted", [False, True])
def test_nothing_is_changed(options: dict[str, Any], fitted: bool) -> None:
    """Neither the model nor the posterior, its draws, nor any random state; a fit is the same."""
    model, batch = net(), data()
    la, other = (Laplace(model, "classification", fisher="mc", **options) for _ in range(2))
    if fitted:
        la.fit([batch])
        other.fit([batch])
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    global_state, own = torch.get_rng_state(), la.curvature.generator.get_state()
    before = dict(vars(la))
    plan = la.plan(*batch, n_data=100)
    assert isinstance(plan, Plan)
    assert torch.equal(torch.get_rng_state(), global_state)
    assert torch.equal(la.curvature.generator.get_state(), own)
    assert dict(vars(la)) == before
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    assert all(p.grad is None for p in model.parameters())
    la.fit([batch])
    other.fit([batch])
    for name, block in la.curvature.blocks.items():
        for key, tensor in block.tensors().items():
            assert torch.equal(tensor, other.curvature.blocks[name].tensors()[key])


def test_batches_in_every_form_give_the_same_counts() -> None:
    """A pair, a mapping, what batch_fn takes, lists of batches, and loaders, odd batches too."""
    x, y = data(13)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    def counts(la: Laplace[Any], *args: Any, **options: Any) -> tuple[int, int, float]:
        plan = la.plan(*args, **options)
        return plan.n_data, plan.examples, plan.parts[0].operations

    plain = Laplace(net(), "classification")
    expected = counts(plain, x, y, n_data=26)
    assert expected[:2] == (26, 13)
    assert counts(plain, (x, y), n_data=26) == expected
    assert counts(plain, [(x, y), (x, y)]) == expected
    assert counts(plain, DataLoader(TensorDataset(x, y), 13), n_data=26) == expected
    mapped = Laplace(Named(), "classification")
    assert counts(mapped, {"x": x, "labels": y}, n_data=26) == expected
    tripled = Laplace(net(), "classification", batch_fn=lambda batch: (batch[2], batch[0]))
    assert counts(tripled, (y, None, x), n_data=26) == expected


def test_a_loader_tells_its_examples_and_keeps_its_draws() -> None:
    """n_data is the length of its data set; a shuffled loader goes on as it would have."""
    generator = torch.Generator().manual_seed(3)
    x, y = data(20)
    loader = DataLoader(TensorDataset(x, y), 8, shuffle=True, generator=generator)
    state = generator.get_state()
    plan = Laplace(net(), "classification").plan(loader)
    assert (plan.n_data, plan.batches) == (20, 3)
    assert torch.equal(generator.get_state(), state)


def test_without_numbers_counts_are_those_with_numbers() -> None:
    """A model and a batch on the meta device, which has no memory."""
    counted = Laplace(net(), "classification", kfac_approx="expand").plan(*data(), n_data=60)
    with torch.device("meta"):
        model, x, y = net(), torch.empty(12, 4), torch.empty(12, dtype=torch.long)
    plan = Laplace(model, "classification", kfac_approx="expand").plan(x, y, n_data=60, rate=1e12)
    assert plan.memory == counted.memory
    assert plan.operations == pytest.approx(counted.operations, rel=0.1)
    assert [part.name for part in plan.parts][:3] == [part.name for part in counted.parts][:3]
    assert any("Without numbers" in note for note in plan.notes)


def test_a_model_that_asks_for_values_is_counted_on_the_batch() -> None:
    """Control flow by numbers cannot be run on shapes."""

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x if float(x.sum()) < 1e9 else 2 * x)

    plan = Laplace(Asks(), "classification").plan(*data(), n_data=24)
    assert any("counted on the batch" in note for note in plan.notes)
    layers = 2 * 2 * 12 * (4 * 9 + 9 * 3)  # beside the likelihood's own sums
    assert plan.parts[0].operations == pytest.approx(layers, rel=0.02)
    with torch.device("meta"):
        model = Asks()
    with pytest.raises(UnsupportedUse, match="without numbers"):
        Laplace(model, "classification").plan(torch.empty(12, 4, device="meta"), data()[1])


def test_seconds_are_operations_over_a_rate_that_is_given() -> None:
    """Twice the rate, half the time."""
    la = Laplace(net(), "classification")
    slow, fast = (la.plan(*data(), rate=rate) for rate in (1e9, 2e9))
    assert slow.seconds == pytest.approx(2 * fast.seconds)
    assert "as given" in slow.rate


def test_it_reads_as_a_table_and_is_frozen() -> None:
    """Passes, parts, bytes, and where the seconds come from."""
    plan = Laplace(net(), "classification").plan(*data(), n_data=24)
    text = str(plan)
    for words in ("24 examples in 2 batches of 12", "2 vectors back", "the fit", "factors", "Sec"):
        assert words in text
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.n_data = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("args", "options", "error", "words"),
    [
        ((torch.empty(0, 4), torch.empty(0, dtype=torch.long)), {}, InvalidValue, "0 examples"),
        (([],), {}, InvalidValue, "no batch"),
        ((iter([data()]),), {}, InvalidValue, "only once"),
        (data(), {"n_data": 0}, InvalidValue, "n_data"),
        (data(), {"rate": -1.0}, InvalidValue, "rate"),
        ((3,), {}, InvalidType, "batch"),
        ((data()[0].to("meta"), data()[1]), {}, InvalidValue, "meta"),
    ],
)
def test_bad_input_is_refused(
    args: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    """Each with what was wrong."""
    with pytest.raises(error, match=words):
        Laplace(net(), "classification").plan(*args, **options)


def test_parameters_without_a_rule_are_counted_in_copies_by_example() -> None:
    """Their gradients come from one copy of the parameters an example."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.head = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.einsum("ni,ij->nj", x, self.mix.matrix_exp()))

    plan = Laplace(Scaled(), "classification").plan(*data(), n_data=24)
    assert plan.vectors == 2
