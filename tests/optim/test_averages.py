"""Averages of factors: shapes remembered for long, traces for as long as examples are needed."""

import pytest
import torch
from torch import nn

from kfac_laplace import Curvature
from kfac_laplace.curvature.linalg.gram import Gram
from kfac_laplace.optim.averages import EXAMPLES, SHORTER, Averages

DECAY = 0.9


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def block_of(x, scale=1.0):
    """The first layer's block of a batch under outputs that are `scale` as large."""
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(scale)
    fitted = Curvature(model, "regression").accumulate(x, torch.zeros(len(x), 3).double())
    return fitted.blocks["0.weight"]


def dense(block):
    a, b = block.factors
    return torch.kron(b[0], a[0])


def averages_of(batches, decay=DECAY):
    averages = Averages(decay)
    for block, n in batches:
        averages.add({"0.weight": (block, float(n))})
    return averages


@pytest.mark.parametrize("n", [EXAMPLES // 2, 3 * EXAMPLES, 20 * EXAMPLES])
def test_shapes_and_traces_have_decays_of_their_own_by_formula(n):
    torch.manual_seed(1)
    scales = (2.0, 1.0, 0.5)
    inputs = [torch.randn(n, 5).double() * (1 + k) for k in range(3)]
    blocks = [block_of(x, scale) for x, scale in zip(inputs, scales, strict=True)]
    got = averages_of([(block_of(x, s), n) for x, s in zip(inputs, scales, strict=True)])
    fast = DECAY ** {EXAMPLES // 2: 1, 3 * EXAMPLES: 3, 20 * EXAMPLES: SHORTER}[n]
    want = []
    for side in (0, 1):  # A, B
        matrices = [block.factors[side][0] for block in blocks]
        slow = sum(DECAY ** (2 - t) * m for t, m in enumerate(matrices))
        traces = [float(m.trace()) for m in matrices]
        weights = [fast ** (2 - t) for t in range(3)]
        trace = sum(w * v for w, v in zip(weights, traces, strict=True)) / sum(weights)
        want.append(slow / slow.trace() * trace / (1 if side == 0 else n))
    b, a = got.factors("0.weight")
    torch.testing.assert_close(a[0], want[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(b[0], want[1], rtol=1e-12, atol=1e-18)
    whole = dense(got.block("0.weight", 70.0))
    torch.testing.assert_close(whole, 70 * torch.kron(want[1], want[0]), rtol=1e-12, atol=1e-15)


def test_the_scale_of_a_falling_curvature_is_that_of_the_last_steps():
    """Outputs shrink by a tenth a step, B to 0.81: by geometric series for either decay."""
    torch.manual_seed(2)
    x = torch.randn(10 * EXAMPLES, 5).double()
    steps = [block_of(x, 0.9**k) for k in range(12)]
    n = len(x)
    plain = sum(DECAY ** (11 - t) * block.factors[1] for t, block in enumerate(steps))
    plain = plain / sum(DECAY**t for t in range(12))
    got = averages_of([(block_of(x, 0.9**k), n) for k in range(12)]).factors("0.weight")[0] * n
    last = steps[-1].factors[1].diagonal(dim1=1, dim2=2).sum()
    assert float(plain.diagonal(dim1=1, dim2=2).sum() / last) > 2.5
    assert float(got.diagonal(dim1=1, dim2=2).sum() / last) == pytest.approx(
        sum((DECAY**SHORTER / 0.81) ** k for k in range(12))
        / sum(DECAY ** (SHORTER * k) for k in range(12))
    )


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_the_last_step_and_the_plain_mean_have_no_second_decay(decay):
    torch.manual_seed(3)
    blocks = [block_of(torch.randn(200, 5).double(), 1.0 + k) for k in range(2)]
    (a, b), (a_last, b_last) = (block.factors for block in blocks)
    want = (
        torch.kron((b + b_last)[0], (a + a_last)[0]) / 4
        if decay
        else torch.kron(b_last[0], a_last[0])
    )
    got = averages_of([(block, 200) for block in blocks], decay).block("0.weight", 200.0)
    torch.testing.assert_close(dense(got), want, rtol=1e-12, atol=1e-12)


def test_a_layer_that_is_silent_for_a_while_has_no_curvature_and_no_nan():
    """Traces of zero: of the last steps, and of all."""
    torch.manual_seed(4)
    x = torch.randn(40 * EXAMPLES, 5).double()
    silent = block_of(x, 0.0)
    assert float(silent.factors[1].abs().sum()) == 0
    never = averages_of([(block_of(x, 0.0), len(x))] * 1)
    assert float(never.factors("0.weight")[0].abs().sum()) == 0
    ended = averages_of([(block_of(x), len(x)), (block_of(x, 0.0), len(x))]).factors("0.weight")[0]
    assert bool(ended.isfinite().all())


def test_a_stored_average_goes_on_bit_by_bit():
    torch.manual_seed(5)
    x = torch.randn(4, 5 * EXAMPLES, 5).double()
    whole = averages_of([(block_of(one, 1.0 + k), len(one)) for k, one in enumerate(x)])
    half = averages_of([(block_of(one, 1.0 + k), len(one)) for k, one in enumerate(x[:2])])
    again = Averages(DECAY)
    layouts = {"0.weight": block_of(x[0]).layout}
    again.load_state_dict(half.state_dict(), layouts, torch.device("cpu"))
    for k, one in enumerate(x[2:], 2):
        again.add({"0.weight": (block_of(one, 1.0 + k), float(len(one)))})
    for got, want in zip(again.factors("0.weight"), whole.factors("0.weight"), strict=True):
        assert torch.equal(got, want)


def test_traces_of_rows_in_half_precision_are_summed_in_that_of_the_sums():
    """A thousand squares in bfloat16 would stop growing at 256."""
    rows = torch.ones(1, 1000, 3).bfloat16()
    gram = Gram(torch.zeros(1, 0, 0), rows)
    assert gram.traces().tolist() == [3000.0]
