"""Lookups are linear layers of one-hot rows: A is diagonal, and no matrix of V rows is made."""

from __future__ import annotations

import oracles
import pytest
import torch
from cases import Case
from laws import (
    EXACT,
    REORDERED,
    Untouched,
    assert_complete,
    assert_dense_structures_are_exact,
    assert_exact_blocks,
    assert_kfac_block,
    assert_same_blocks,
    dense_blocks,
    fitted,
    relative_error,
)
from lookups import (
    LOOKUPS,
    PADDING,
    SIZE,
    WIDTH,
    Indexed,
    TiedWords,
    Translation,
    Words,
    lookup_case,
    twin,
    words,
)
from torch import Tensor, nn

from kfac_laplace import Curvature
from kfac_laplace.errors import UnsupportedUse

settings = pytest.mark.parametrize("setting", ["expand", "reduce"])
everywhere = pytest.mark.parametrize("name", LOOKUPS)


def formula(example: Case, setting: str, padding: int | None) -> tuple[Tensor, Tensor]:
    """A and B of the one-hot layer; padding rows do not count."""
    plain = twin(example, padding)
    torch.testing.assert_close(plain.model(plain.x), example.model(example.x))
    live = None if padding is None else example.x != padding
    factors = oracles.kfac_factors(plain.model, "lookup.table", plain.data, setting, live=live)
    return factors.input[0], factors.output[0]


def dense_lookup(a: Tensor, b: Tensor) -> Tensor:
    """diag(A) ⊗ B on the table (V, d): the vocabulary is the slow axis of its entries."""
    return torch.kron(a.diagonal().diag(), b.contiguous())


def assert_lookup_block(example: Case, curvature: Curvature, setting: str, padding: int | None):
    a, b = formula(example, setting, padding)
    block = curvature.blocks["lookup.weight"]
    assert curvature.coverage["lookup.weight"] == "kron"
    assert block.factors.input.shape == (1, SIZE)
    assert relative_error(block.factors.input, a.diagonal()[None]) < EXACT
    assert relative_error(block.dense(), dense_lookup(a, b)) < EXACT
    if setting == "expand":  # one-hot rows are orthogonal: nothing was left out
        assert torch.count_nonzero(a) == torch.count_nonzero(a.diagonal())
    else:
        assert torch.count_nonzero(a) > torch.count_nonzero(a.diagonal())


@everywhere
@settings
def test_block_of_a_lookup(name, setting):
    """Expand: exactly B ⊗ diag(counts)/R. Reduce: the diagonal of the mean rows' Gram matrix."""
    example, padding = lookup_case(name), LOOKUPS[name][1]
    curvature = fitted(example, kfac_approx=setting)
    assert_complete(curvature, example.model)
    assert_lookup_block(example, curvature, setting, padding)
    assert_kfac_block(twin(example, padding), curvature, "mix", setting)


def test_input_factor_under_expand_counts_words():
    example = lookup_case("padding")
    kept = example.x[example.x != PADDING]
    counts = torch.bincount(kept, minlength=SIZE).double()
    (got,) = fitted(example, kfac_approx="expand").blocks["lookup.weight"].factors.input
    assert got[PADDING] == got[SIZE - 1] == 0
    assert torch.equal(got, counts / len(kept))


@everywhere
def test_dense_structures_are_exact(name):
    assert_dense_structures_are_exact(lookup_case(name))


@settings
@pytest.mark.parametrize("name", ["embedding", "padding"])
def test_one_table_for_encoder_and_decoder(name, setting):
    """Both uses pool their words, as positions of one layer."""
    example, padding = lookup_case(name, Translation), LOOKUPS[name][1]
    curvature = fitted(example, kfac_approx=setting)
    assert_complete(curvature, example.model)
    assert_lookup_block(example, curvature, setting, padding)
    assert_dense_structures_are_exact(example)


class Both(nn.Module):
    """A module and a plain index with one table."""

    def __init__(self):
        super().__init__()
        self.module, self.weight = nn.Embedding(SIZE, WIDTH), None
        self.weight = self.module.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.module(x[:, :2]), self.weight[x[:, 2:]]], 1)


@settings
def test_a_table_looked_up_in_two_ways(setting):
    example = words(Words(Both()))
    curvature = fitted(example, kfac_approx=setting)
    (block,) = [b for b in curvature.blocks.values() if b.layout.shapes == ((SIZE, WIDTH),)]
    want = dense_lookup(*formula(example, setting, None))
    assert relative_error(block.dense(), want) < EXACT
    assert_dense_structures_are_exact(example)


@settings
def test_a_table_of_scalars(setting):
    """One number for each entry, as in a table of relative positions."""
    example = words(Words(Indexed(), 1))
    curvature = fitted(example, kfac_approx=setting)
    assert_complete(curvature, example.model)
    assert_lookup_block(example, curvature, setting, None)
    assert_dense_structures_are_exact(example)


@settings
def test_padding_does_not_count_where_an_example_looks_up_one_word(setting):
    """Only so is the trace of the block that of the exact one, as one-hot rows have length 1."""
    example = lookup_case("padding")
    batches = [(x[:, -1:], y) for x, y in example.batches]
    example = Case(example.model, "classification", batches)
    assert (example.x == PADDING).any()
    block = fitted(example, kfac_approx=setting).blocks["lookup.weight"]
    exact = oracles.ggn(example.model, *example.data, ["lookup.weight"])
    torch.testing.assert_close(block.dense().trace(), exact.trace(), rtol=EXACT, atol=0)
    assert relative_error(block.dense(), dense_lookup(*formula(example, setting, PADDING))) < EXACT


@settings
@pytest.mark.parametrize("name", ["embedding", "padding"])
def test_integers_of_32_bits(name, setting):
    example = lookup_case(name)
    short = Case(example.model, "classification", [(x.int(), y) for x, y in example.batches])
    blocks = [dense_blocks(fitted(c, kfac_approx=setting)) for c in (short, example)]
    assert_same_blocks(*blocks, REORDERED)


@settings
@pytest.mark.parametrize("option", ["scale_grad_by_freq", "sparse"])
def test_options_of_the_backward_pass_change_nothing(option, setting):
    """They change what an optimiser sees of the gradient, not the Jacobian."""
    plain = lookup_case("embedding")
    example = lookup_case("embedding")
    setattr(example.model.lookup, option, True)
    blocks = [dense_blocks(fitted(c, kfac_approx=setting)) for c in (example, plain)]
    assert_same_blocks(*blocks, REORDERED)


@settings
def test_a_frozen_table_beside_trained_layers(setting):
    example = lookup_case("embedding")
    example.model.lookup.requires_grad_(False)
    curvature = fitted(example, kfac_approx=setting)
    assert_complete(curvature, example.model)
    assert curvature.coverage["lookup.weight"] == "frozen"
    for layer in ("mix", "head"):
        assert_kfac_block(example, curvature, layer, setting)
    assert_dense_structures_are_exact(example)


@pytest.mark.parametrize("width", [WIDTH, 350])
def test_a_table_tied_to_the_head_has_an_exact_block(width):
    """The two uses turn the table the other way round; whole while it is small, else diagonal."""
    example = words(TiedWords(width))
    curvature = fitted(example, subset_of_weights=["lookup.weight"])
    assert curvature.coverage["lookup.weight"] == ("dense" if width == WIDTH else "diag")
    assert_exact_blocks(example, curvature, ["lookup.weight"])


def test_a_lookup_that_rewrites_its_table_is_refused():
    """`max_norm` renormalises the looked-up entries in place: the model must be left alone."""
    example = words(Words(nn.Embedding(SIZE, WIDTH, max_norm=0.5)))
    untouched = Untouched(example.model)
    with pytest.raises(UnsupportedUse, match="max_norm"):
        fitted(example)
    untouched.check()


@everywhere
@settings
def test_blocks_do_not_depend_on_the_batch_split(name, setting):
    example = lookup_case(name)
    whole = fitted(example, [(example.x, example.y)], kfac_approx=setting)
    split = fitted(example, kfac_approx=setting)
    assert_same_blocks(dense_blocks(split), dense_blocks(whole), EXACT)


@settings
def test_curvatures_of_parts_of_the_data_merge(setting):
    example = lookup_case("padding")
    whole, first = (fitted(example, b, kfac_approx=setting) for b in (None, example.batches[:1]))
    first.merge(fitted(example, example.batches[1:], kfac_approx=setting))
    assert first.n_data == whole.n_data
    assert_same_blocks(dense_blocks(first), dense_blocks(whole), EXACT)


@everywhere
@settings
def test_eigenvalues_are_those_of_the_dense_block(name, setting):
    block = fitted(lookup_case(name), kfac_approx=setting).blocks["lookup.weight"]
    want = torch.linalg.eigvalsh(block.dense())
    torch.testing.assert_close(block.eigenvalues(), want, rtol=0, atol=EXACT * float(want.max()))
