"""Examples that are all padding: under reduce, A is the mean over the others alone."""

from __future__ import annotations

import pytest
import torch
from cases import Case
from laws import EXACT, fitted, relative_error
from torch import Tensor, nn

SIZE, WIDTH, CLASSES = 6, 3, 3
#: Words of each example before the padding, which is 0.
LENGTHS = (2, 0, 4, 1, 0, 3)
EMPTY = [n for n, length in enumerate(LENGTHS) if length == 0]


class Words(nn.Module):
    """lookup -> linear -> tanh -> mean over the words, zero where there are none -> head."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(SIZE, WIDTH), nn.Linear(WIDTH, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        words = (x != 0)[..., None]
        h = self.mix(self.table(x)).tanh() * words
        return self.head(h.sum(1) / words.sum(1).clamp_min(1))


def example_with_empty_ones() -> Case:
    """One batch of sentences, some of them without a word."""
    model = Words().double()
    x = torch.randint(1, SIZE, (len(LENGTHS), max(LENGTHS)))
    for words, length in zip(x, LENGTHS, strict=True):
        words[length:] = 0
    y = torch.randint(0, CLASSES, (len(LENGTHS),))
    return Case(model, "classification", [(x, y)])


def in_one_batch(example: Case) -> list[tuple[Tensor, Tensor]]:
    return example.batches


def alone(example: Case) -> list[tuple[Tensor, Tensor]]:
    """The examples with words first, then each empty one in a batch of its own."""
    kept = [n for n in range(len(LENGTHS)) if n not in EMPTY]
    return [(example.x[n], example.y[n]) for n in (kept, *([n] for n in EMPTY))]


splits = pytest.mark.parametrize("split", [in_one_batch, alone])


def mean_of_squares(rows: Tensor, x: Tensor) -> Tensor:
    """Σ ā āᵀ over the examples with words, ā the mean of their words' rows, over their number."""
    means = [rows[n][x[n] != 0].mean(0) for n in range(len(x)) if (x[n] != 0).any()]
    assert len(means) == len(LENGTHS) - len(EMPTY)
    return sum(torch.outer(mean, mean) for mean in means) / len(means)


def test_no_output_depends_on_the_rows_of_an_empty_example():
    """What the other tests rest on: its output is the head's bias."""
    example = example_with_empty_ones()
    out = example.model(example.x)
    assert torch.equal(out[EMPTY], example.model.head.bias.expand(len(EMPTY), -1))
    (gradient,) = torch.autograd.grad(out.square().sum(), [example.model.table.weight])
    assert not gradient[0].any()


@splits
def test_a_full_input_factor_is_the_mean_over_the_other_examples(split):
    """The constant input of the bias shows it most plainly: its mean is one."""
    example = example_with_empty_ones()
    curvature = fitted(example, split(example), kfac_approx="reduce")
    inputs = example.model.table.weight.detach()[example.x]  # (n, t, i)
    want = mean_of_squares(torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1), example.x)
    (got,) = curvature.blocks["mix.weight"].factors.input
    assert curvature.n_data == len(LENGTHS)
    assert relative_error(got, want) < EXACT
    torch.testing.assert_close(float(got[-1, -1]), 1.0, rtol=EXACT, atol=0)


@splits
def test_a_diagonal_input_factor_is_the_mean_over_the_other_examples(split):
    """Of a table: the squared share of each word in its sentence."""
    example = example_with_empty_ones()
    curvature = fitted(example, split(example), kfac_approx="reduce")
    one_hot = nn.functional.one_hot(example.x, SIZE).double()
    want = mean_of_squares(one_hot, example.x).diagonal()
    (got,) = curvature.blocks["table.weight"].factors.input
    assert got.shape == (SIZE,)
    assert relative_error(got, want) < EXACT
    assert got[0] == 0  # padding is no word


@splits
def test_an_empty_example_still_counts_where_it_is_read(split):
    """The head sees a row of zeros and a one: A of all examples."""
    example = example_with_empty_ones()
    curvature = fitted(example, split(example), kfac_approx="reduce")
    model, words = example.model, (example.x != 0)[..., None]
    h = (model.mix(model.table(example.x)).tanh() * words).sum(1)
    h = h.detach() / words.sum(1).clamp_min(1)
    rows = torch.cat([h, torch.ones_like(h[:, :1])], 1)
    (got,) = curvature.blocks["head.weight"].factors.input
    assert relative_error(got, rows.T @ rows / len(LENGTHS)) < EXACT
