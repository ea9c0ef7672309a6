"""Products with a weight, however they are written, are the linear layers that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from functional import (
    Functional,
    assert_block_of_twin,
    in_batches,
    linear_twin,
    parameter,
    places_of,
)
from laws import (
    REORDERED,
    assert_dense_structures_are_exact,
    assert_diagonal_blocks,
    assert_same_blocks,
    dense_blocks,
    fitted,
    seeded_case,
)
from torch import Tensor

settings = pytest.mark.parametrize("setting", ["expand", "reduce"])


@dataclass(frozen=True)
class Product:
    """A product of inputs with a weight, and the linear layers that do the same.

    Args:
        shape: of the inputs, without examples.
        weight: shape of the weight.
        use: takes the weight and inputs to outputs (n, ..., o).
        matrices: takes the weight to the matrices (o, i) of the linear layers.
        layered: the same as `use` in terms of these layers.
    """

    shape: tuple[int, ...]
    weight: tuple[int, ...]
    use: Callable[[Tensor, Tensor], Tensor]
    matrices: Callable[[Tensor], list[Tensor]] = lambda w: [w.mT]
    layered: Callable = lambda layers, x: layers[0](x)


def stacked(axis: int) -> Callable:
    """Layer k on the inputs at place k of an axis."""
    return lambda layers, x: torch.stack(
        [layer(part) for layer, part in zip(layers, x.unbind(axis), strict=True)], axis
    )


def each(w: Tensor) -> list[Tensor]:
    """The matrices (o, i) of a batch of weights (h, i, o)."""
    return [part.mT for part in w]


def whole(w: Tensor) -> list[Tensor]:
    """The one matrix of a weight (o, i)."""
    return [w]


#: Inputs (n, t, i), one weight (i, o) or (o, i).
T, IN, OUT, H = 5, 3, 4, 2
TOKENS, HEADS = (T, IN), (H, T, IN)
RIGHT, LEFT, BATCH = (IN, OUT), (OUT, IN), (H, IN, OUT)

PRODUCTS = {
    "x @ w": Product(TOKENS, RIGHT, lambda w, x: x @ w),
    "rows of examples": Product((IN,), RIGHT, lambda w, x: x @ w),
    "one column": Product(TOKENS, (IN, 1), lambda w, x: x @ w),
    "one row": Product((T, 1), (1, OUT), lambda w, x: x @ w),
    "matmul": Product(TOKENS, RIGHT, lambda w, x: torch.matmul(x, w)),
    "Tensor.matmul": Product(TOKENS, RIGHT, lambda w, x: x.matmul(w)),
    "mm": Product((IN,), RIGHT, lambda w, x: torch.mm(x, w)),
    "Tensor.mm": Product((IN,), RIGHT, lambda w, x: x.mm(w)),
    "reflected": Product((IN,), (IN, IN), lambda w, x: w.__rmatmul__(x)),
    "w @ x": Product(TOKENS, LEFT, lambda w, x: (w @ x.mT).mT, whole),
    "w @ x over examples": Product((IN,), LEFT, lambda w, x: (w @ x.T).T, whole),
    "sequence first": Product(TOKENS, RIGHT, lambda w, x: (x.transpose(0, 1) @ w).transpose(0, 1)),
    "flattened": Product(TOKENS, RIGHT, lambda w, x: (x.reshape(-1, IN) @ w).view(len(x), T, OUT)),
    "batched": Product(HEADS, BATCH, lambda w, x: x @ w, each, stacked(1)),
    "batched w @ x": Product(
        HEADS, (H, OUT, IN), lambda w, x: (w @ x.mT).mT, lambda w: list(w), stacked(1)
    ),
    "broadcast weight": Product(HEADS, (1, IN, OUT), lambda w, x: x @ w, each),
    "einsum": Product(TOKENS, RIGHT, lambda w, x: torch.einsum("nti,io->nto", x, w)),
    "einsum list": Product(TOKENS, RIGHT, lambda w, x: torch.einsum("nti,io->nto", [x, w])),
    "einsum weight first": Product(
        TOKENS, LEFT, lambda w, x: torch.einsum("oi, nti -> nto", w, x), whole
    ),
    "einsum moved": Product(
        TOKENS,
        LEFT,
        lambda w, x: torch.einsum("nti,oi->otn", x, w).permute(2, 1, 0),
        whole,
    ),
    "einsum capitals": Product(TOKENS, RIGHT, lambda w, x: torch.einsum("Zab,bC->ZaC", x, w)),
    "einsum ellipsis": Product(HEADS, RIGHT, lambda w, x: torch.einsum("...i,io->...o", x, w)),
    "einsum ellipsis last": Product(
        TOKENS, LEFT, lambda w, x: torch.einsum("oi,...ti->...to", w, x), whole
    ),
    "einsum heads": Product(
        (T, H, IN),
        BATCH,
        lambda w, x: torch.einsum("nthi,hio->ntho", x, w),
        each,
        stacked(2),
    ),
    "einsum heads summed": Product(
        (T, H, IN),
        BATCH,
        lambda w, x: torch.einsum("nthi,hio->nto", x, w),
        lambda w: [w.flatten(0, 1).mT],
        lambda layers, x: layers[0](x.flatten(2)),
    ),
    "einsum two outputs": Product(
        TOKENS,
        BATCH,
        lambda w, x: torch.einsum("nti,hio->ntho", x, w).flatten(2),
        lambda w: [w.movedim(1, 2).flatten(0, 1)],
    ),
    "einsum weights of positions": Product(
        TOKENS, (T, IN, OUT), lambda w, x: torch.einsum("nti,tio->nto", x, w), each, stacked(1)
    ),
    "mixing of tokens": Product(
        TOKENS,
        (T, OUT),
        lambda w, x: torch.einsum("nti,to->nio", x, w),
        layered=lambda layers, x: layers[0](x.mT),
    ),
}


def case_of(product: Product):
    """A case of the product under a pooled head."""
    w = torch.zeros(product.weight)
    width = product.use(w, torch.zeros(1, *product.shape)).shape[-1]
    return seeded_case(
        lambda: Functional(
            lambda model, x: product.use(model.w, x), width, w=parameter(*product.weight)
        ),
        product.shape,
    )


@settings
@pytest.mark.parametrize("how", PRODUCTS)
def test_a_product_has_the_blocks_of_linear_layers(how, setting):
    product = PRODUCTS[how]
    example = case_of(product)
    twin = linear_twin(example, product.layered, product.matrices(example.model.w))
    curvature = fitted(example, kfac_approx=setting)
    assert curvature.coverage["w"] == "kron"
    places = places_of(product.matrices, torch.Size(product.weight))
    assert_block_of_twin(twin, curvature, "w", setting, places)


@pytest.mark.parametrize("how", PRODUCTS)
def test_a_product_is_exact_in_dense_structures(how):
    assert_dense_structures_are_exact(case_of(PRODUCTS[how]))


@pytest.mark.parametrize("how", PRODUCTS)
def test_a_product_does_not_depend_on_the_split_into_batches(how):
    """Also where batches of one example come first: their axis of length 1 is no broadcast one."""
    example = case_of(PRODUCTS[how])
    together = dense_blocks(fitted(in_batches(example, 7)))
    for sizes in ((1, 3, 3), (1,) * 7, (2, 5)):
        assert_same_blocks(dense_blocks(fitted(in_batches(example, *sizes))), together, REORDERED)


#: Products that are no linear layer of rows, or that no rule reads.
OTHERS = {
    "einsum implicit": Product(TOKENS, RIGHT, lambda w, x: torch.einsum("nti,io", x, w)),
    "einsum sums positions": Product(TOKENS, RIGHT, lambda w, x: torch.einsum("nti,io->no", x, w)),
    "einsum sums outputs": Product(TOKENS, RIGHT, lambda w, x: torch.einsum("nti,io->nt", x, w)),
    "einsum diagonal of inputs": Product(
        (IN, IN), RIGHT, lambda w, x: torch.einsum("nii,io->nio", x, w)
    ),
    "einsum diagonal of weights": Product(
        TOKENS, (IN, IN), lambda w, x: torch.einsum("nti,ii->nti", x, w)
    ),
    "einsum diagonal of weights summed": Product(
        TOKENS, (IN, IN), lambda w, x: torch.einsum("nti,ii->nt", x, w)
    ),
    "einsum trace of weights": Product(
        TOKENS, (IN, IN), lambda w, x: torch.einsum("nti,oo->nti", x, w)
    ),
    "einsum scale": Product(TOKENS, (IN,), lambda w, x: torch.einsum("nti,i->nti", x, w)),
    "einsum outer": Product(TOKENS, (OUT,), lambda w, x: torch.einsum("nti,o->nto", x, w)),
    "einsum three": Product(
        TOKENS, RIGHT, lambda w, x: torch.einsum("nti,io,nt->nto", x, w, x[..., 0])
    ),
    "einsum weight ellipsis": Product(
        TOKENS, RIGHT, lambda w, x: torch.einsum("nti,i...->nt...", x, w)
    ),
    "einsum broadcast input": Product(
        (1, IN), (T, IN, OUT), lambda w, x: torch.einsum("nti,tio->nto", x, w)
    ),
    "einsum broadcast and summed": Product(
        TOKENS, (1, IN, OUT), lambda w, x: torch.einsum("nti,tio->no", x, w)
    ),
    "quadratic form": Product(
        TOKENS, (IN, IN), lambda w, x: torch.einsum("nti,ij,ntj->nt", x, w, x)
    ),
    "vector": Product(TOKENS, (IN,), lambda w, x: (x @ w)[..., None]),
    "broadcast input": Product((1, T, IN), BATCH, lambda w, x: x @ w),
    "bilinear": Product(TOKENS, (OUT, IN, IN), lambda w, x: F.bilinear(x, x, w)),
    "tensordot": Product(TOKENS, RIGHT, lambda w, x: torch.tensordot(x, w, 1)),
}


@pytest.mark.parametrize("how", OTHERS)
def test_other_products_are_exact(how):
    """Kronecker factors or not: what is stored as exact is, and dense structures are."""
    example = case_of(OTHERS[how])
    assert_dense_structures_are_exact(example)
    curvature = fitted(example)
    assert curvature.coverage["w"] == "diag"
    assert_diagonal_blocks(example, curvature, ["w"])


@pytest.mark.parametrize("how", OTHERS)
def test_other_products_do_not_depend_on_the_split_into_batches(how):
    example = case_of(OTHERS[how])
    together = dense_blocks(fitted(in_batches(example, 7)))
    for sizes in ((1, 3, 3), (1,) * 7):
        assert_same_blocks(dense_blocks(fitted(in_batches(example, *sizes))), together, REORDERED)
