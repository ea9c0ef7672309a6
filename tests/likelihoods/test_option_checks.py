"""Which labels, weights and options are taken, and how the others are refused."""

from __future__ import annotations

import pytest
import torch

from kfac_laplace import Bernoulli, Categorical
from kfac_laplace.errors import InvalidType, InvalidValue

OUTPUTS = torch.randn(3, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([[0, 1, 3], [-100, -100, 1], [-100, -100, -100]])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.long])
def test_ignored_labels_pass_the_check_of_their_range(dtype):
    aligned = Categorical().align_target(LABELS.to(dtype), OUTPUTS)
    assert aligned.dtype == torch.long and torch.equal(aligned, LABELS)
    assert (Categorical(ignore_index=9).align_target(LABELS.clamp_min(9), OUTPUTS) == 9).all()


@pytest.mark.parametrize("label", [-100, -1, 4, 255])
@pytest.mark.parametrize("ignore_index", [-100, -1, 4, 255])
def test_other_labels_outside_the_classes_remain_errors(label, ignore_index):
    y = torch.tensor([[0, label, 3]])
    likelihood = Categorical(ignore_index=ignore_index)
    if label == ignore_index:
        assert torch.equal(likelihood.align_target(y, OUTPUTS[:1]), y)
        return
    with pytest.raises(InvalidValue, match=r"outside 0\.\.3"):
        likelihood.align_target(y, OUTPUTS[:1])


def test_unsigned_labels_are_not_wrapped_around_to_the_ignored_one():
    """-100 is 156 in eight bits."""
    y = torch.tensor([[0, 156, 3]], dtype=torch.uint8)
    with pytest.raises(InvalidValue, match="156"):
        Categorical().align_target(y, OUTPUTS[:1])


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Categorical(weight=[1.0, -1.0]), InvalidValue, "weight"),
        (lambda: Categorical(weight=[1.0, torch.nan]), InvalidValue, "weight"),
        (lambda: Categorical(weight=torch.ones(2, 2)), InvalidValue, "weight"),
        (lambda: Categorical(weight="balanced"), InvalidType, "weight"),
        (lambda: Categorical(label_smoothing=1.5), InvalidValue, "label_smoothing"),
        (lambda: Categorical(label_smoothing=torch.nan), InvalidValue, "label_smoothing"),
        (lambda: Categorical(label_smoothing="some"), InvalidType, "label_smoothing"),
        (lambda: Categorical(ignore_index=0.0), InvalidType, "ignore_index"),
        (lambda: Bernoulli(pos_weight=-1.0), InvalidValue, "pos_weight"),
        (lambda: Bernoulli(pos_weight=torch.inf), InvalidValue, "pos_weight"),
        (lambda: Bernoulli(pos_weight=torch.ones(2, 1, 1)), InvalidValue, "pos_weight"),
    ],
)
def test_options_out_of_range_are_refused_by_name(make, error, says):
    with pytest.raises(error, match=f"^{says}:"):
        make()


@pytest.mark.parametrize(
    "likelihood",
    [Categorical(weight=torch.ones(3)), Bernoulli(pos_weight=torch.ones(3))],
    ids=type,
)
def test_weights_must_fit_the_outputs(likelihood):
    y = OUTPUTS.sigmoid() if isinstance(likelihood, Bernoulli) else LABELS
    with pytest.raises(InvalidValue, match="weight: the model has 4 outputs. got 3"):
        likelihood.align_target(y, OUTPUTS)


def test_weights_are_the_likelihoods_own():
    """A tensor changed in place afterwards changes no fitted loss."""
    weight = torch.ones(4)
    likelihood = Categorical(weight=weight)
    weight.zero_()
    assert torch.equal(likelihood.weight, torch.ones(4).double())
