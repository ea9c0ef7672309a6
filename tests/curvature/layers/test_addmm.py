"""`addmm`, which the Conv1D layers of GPT-2 are made of, and calls by keyword."""

from __future__ import annotations

import pytest
import torch
from functional import Functional, assert_block_of_twin, linear_twin, parameter, places_of
from laws import assert_dense_structures_are_exact, assert_diagonal_blocks, fitted, seeded_case

T, IN, OUT = 5, 3, 4


def rows(x):
    """Tokens one under another."""
    return x.reshape(-1, IN)


#: b + x w in several spellings: inputs (n t, i) to (n t, o).
SPELLINGS = {
    "function": lambda b, w, x: torch.addmm(b, x, w),
    "method": lambda b, w, x: b.addmm(x, w),
    "keywords": lambda b, w, x: torch.addmm(input=b, mat1=x, mat2=w),
}
#: Others, which are no linear layer with a bias for each output.
SCALED = {
    "beta": lambda b, w, x: torch.addmm(b, x, w, beta=2),
    "alpha": lambda b, w, x: torch.addmm(b, x, w, alpha=0.5),
    "row of biases": lambda b, w, x: torch.addmm(b[None], x, w),
    "one bias": lambda b, w, x: torch.addmm(b[:1], x, w),
    "weight on the left": lambda b, w, x: torch.addmm(b[:, None], w.T, x.T).T,
}
#: Products by keyword.
KEYWORDS = {
    "matmul": lambda w, x: torch.matmul(input=x, other=w),
    "matmul half": lambda w, x: torch.matmul(x, other=w),
    "mm": lambda w, x: torch.mm(x, mat2=w),
    "Tensor.matmul": lambda w, x: x.matmul(other=w),
}


def case_of(use):
    """A case of a spelling over tokens."""
    members = {"b": parameter(OUT), "w": parameter(IN, OUT)}
    return seeded_case(
        lambda: Functional(
            lambda model, x: use(model.b, model.w, rows(x)).view(len(x), T, OUT), OUT, **members
        ),
        (T, IN),
    )


@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("how", SPELLINGS)
def test_weight_and_bias_share_a_block(how, setting):
    example = case_of(SPELLINGS[how])
    model = example.model
    twin = linear_twin(example, lambda layers, x: layers[0](x), [model.w.T], [model.b])
    curvature = fitted(example, kfac_approx=setting)
    assert curvature.blocks["w"].params == ("w", "b")
    weight = places_of(lambda w: [w.T], model.w.shape)[0]
    places = [torch.cat([weight, IN * OUT + torch.arange(OUT)])]
    assert_block_of_twin(twin, curvature, "w", setting, places)
    assert_dense_structures_are_exact(example)


@pytest.mark.parametrize("how", SCALED)
def test_other_forms_are_exact(how):
    example = case_of(SCALED[how])
    assert_diagonal_blocks(example, fitted(example), ["w", "b"])
    assert_dense_structures_are_exact(example)


@pytest.mark.parametrize("how", KEYWORDS)
def test_operands_by_keyword(how):
    use = KEYWORDS[how]
    example = case_of(lambda b, w, x: use(w, x) + b)
    curvature = fitted(example)
    assert curvature.coverage["w"] == "kron"
    twin = linear_twin(
        example, lambda layers, x: layers[0](x), [example.model.w.T], [example.model.b]
    )
    bias = fitted(twin, joint_bias=False)  # the same weight, its bias in a block of its own
    place = places_of(lambda w: [w.T], example.model.w.shape)[0]
    expected = torch.zeros(IN * OUT, IN * OUT, dtype=torch.float64)
    expected[place[:, None], place] = bias.blocks["layers.0.weight"].dense()
    torch.testing.assert_close(curvature.blocks["w"].dense(), expected)
