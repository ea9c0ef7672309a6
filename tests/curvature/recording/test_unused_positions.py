"""Positions that no output depends on leave A: padding, unread tokens, ignored labels."""

from __future__ import annotations

import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import Attention, Case, Pool
from laws import (
    EXACT,
    assert_complete,
    assert_dense_structures_are_exact,
    assert_kfac_block,
    assert_same_blocks,
    dense_blocks,
    fitted,
    negligible,
    relative_error,
    seeded_case,
)
from torch import Tensor, nn

from kfac_laplace import Curvature, Laplace

SETTINGS = ("expand", "reduce")
settings = pytest.mark.parametrize("setting", SETTINGS)
WIDTH, CLASSES, IGNORED = 4, 3, -100
LENGTHS = (3, 1, 4, 2, 4)


class Sentences(nn.Module):
    """Words, 0 for padding -> transformer that masks padding -> masked mean, or a row a word."""

    def __init__(self, pooled: bool = True):
        super().__init__()
        self.embedding = nn.Embedding(6, WIDTH, padding_idx=0)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 5, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        words = x != 0
        h = self.encoder(self.embedding(x), src_key_padding_mask=~words)
        if self.pooled:
            h = (h * words[..., None]).sum(1) / words.sum(1, keepdim=True)
        return self.head(h)


def sentences(padding: int = 0, pooled: bool = True) -> Case:
    """Sentences of several lengths, and so much padding behind the longest."""
    torch.manual_seed(4)
    model = Sentences(pooled).double()
    x = torch.randint(1, 6, (len(LENGTHS), max(LENGTHS)))
    for words, length in zip(x, LENGTHS, strict=True):
        words[length:] = 0
    y = torch.randint(0, CLASSES, x.shape)
    y = y[:, 0] if pooled else y.where(x != 0, IGNORED)
    x = F.pad(x, (0, padding))
    y = y if pooled else F.pad(y, (0, padding), value=IGNORED)
    setting = "reduce" if pooled else "expand"
    return Case(model, "classification", [(x[:3], y[:3]), (x[3:], y[3:])], setting)


def evidence(example: Case, setting: str) -> Tensor:
    la = Laplace(example.model, example.likelihood, kfac_approx=setting, prior_precision=0.7)
    return la.fit(example.batches).log_marginal_likelihood().detach()


@settings
@pytest.mark.parametrize("pooled", [True, False])
def test_more_padding_changes_nothing(pooled, setting):
    """In peers padding weighs on A as words do, and the evidence depends on the batch's width."""
    plain, padded = sentences(0, pooled), sentences(3, pooled)
    curvatures = [fitted(example, kfac_approx=setting) for example in (padded, plain)]
    assert_complete(curvatures[0], padded.model)
    assert_same_blocks(*[dense_blocks(curvature) for curvature in curvatures], EXACT)
    values = [evidence(example, setting) for example in (padded, plain)]
    torch.testing.assert_close(*values, rtol=EXACT, atol=0)


@settings
@pytest.mark.parametrize("layer", ["linear1", "linear2"])
def test_padding_does_not_count(layer, setting):
    """A is the formula's over words alone, in both layers of the encoder."""
    example = sentences()
    curvature = fitted(example, kfac_approx=setting)
    for depth in range(2):
        name = f"encoder.layers.{depth}.{layer}"
        assert_kfac_block(example, curvature, name, setting, live=example.x != 0)


class Tokens(nn.Module):
    """Two layers of attention and MLP over a class token and its inputs; the class token alone
    is read.
    """

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.attention = nn.ModuleList(Attention(WIDTH) for _ in range(2))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 5), nn.GELU(), nn.Linear(5, WIDTH)) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            x = x + attention(x)
            x = x + mlp(x)
        return self.head(x[:, 0])


#: Layers of the last block that only the class token's row leaves towards the output.
CLASS_TOKEN_ALONE = ("attention.1.q", "attention.1.o", "mlp.1.0", "mlp.1.2")
ALL_TOKENS = ("attention.0.q", "attention.0.o", "mlp.0.0", "mlp.0.2", "attention.1.v")


@settings
def test_the_last_block_sees_the_class_token_alone(setting):
    example = seeded_case(Tokens, (3, WIDTH))
    curvature = fitted(example, kfac_approx=setting)
    live = torch.zeros(len(example.x), 4, dtype=torch.bool)
    live[:, 0] = True
    for layer in CLASS_TOKEN_ALONE:
        assert_kfac_block(example, curvature, layer, setting, live=live)
    for layer in ALL_TOKENS:
        assert_kfac_block(example, curvature, layer, setting)
    assert_dense_structures_are_exact(example)


def test_expand_is_reduce_where_one_row_is_left():
    example = seeded_case(Tokens, (3, WIDTH))
    expand, reduce = (fitted(example, kfac_approx=setting) for setting in SETTINGS)
    for layer in (*CLASS_TOKEN_ALONE, "head"):
        name = f"{layer}.weight"
        error = relative_error(expand.blocks[name].dense(), reduce.blocks[name].dense())
        assert error < EXACT, name


class Counted(torch.autograd.Function):
    """The identity, which counts the backward passes through it."""

    passes = 0

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        Counted.passes += 1
        return grad


class CountedTokens(Tokens):
    """The same with its backward passes counted."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(Counted.apply(x + 0 * self.token[0]))


def in_turn(example: Case, batches: list[tuple[Tensor, Tensor]]) -> tuple[Curvature, list[int]]:
    """What batches add up to, and through how many backward passes each was."""
    curvature = Curvature(example.model, example.likelihood, fisher="mc", seed=3)
    counts = []
    for x, y in batches:
        Counted.passes = 0
        curvature.accumulate(x, y)
        counts.append(Counted.passes)
    return curvature, counts


def test_known_rows_that_nothing_reads_are_not_looked_for_again():
    """A vector's gradients show what is read, where what they leave out is known to be unread."""
    example = seeded_case(CountedTokens, (3, WIDTH))
    batches = [(example.x[k : k + 2], example.y[k : k + 2]) for k in (0, 2, 4, 0)]
    curvature, counts = in_turn(example, batches)
    assert counts[0] > 2 and counts[1:] == [1, 1, 1]
    plain = [in_turn(example, [batch])[0] for batch in batches]
    for name, block in curvature.blocks.items():
        alone = [part.blocks[name].factors for part in plain]
        if not hasattr(alone[0], "input"):
            continue
        want = torch.stack([factors.input for factors in alone]).mean(0)
        assert relative_error(block.factors.input, want) < EXACT, name


def test_other_padding_is_looked_for_again():
    """Sentences of lengths that no batch had before."""
    example = sentences()
    lengths, generator = [(3, 3), (3, 1), (2, 4), (1, 3)], torch.Generator().manual_seed(1)
    batches = []
    for pair in lengths:
        x = torch.randint(1, 6, (2, 4), generator=generator)
        for words, length in zip(x, pair, strict=True):
            words[length:] = 0
        batches.append((x, torch.tensor([0, 2])))
    whole = Curvature(example.model, "classification", fisher="mc").fit(batches)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    once = Curvature(example.model, "classification", fisher="mc").fit([(x, y)])
    for name, block in whole.blocks.items():
        if hasattr(block.factors, "input"):
            want = once.blocks[name].factors.input
            assert relative_error(block.factors.input, want) < EXACT, name


class TokenHeads(nn.Module):
    """(n, t, i) -> (n, t, c), row by row."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).tanh())


def ignored_tokens() -> tuple[Case, Tensor]:
    """Token labels of which some do not count, the second example's among them; and a mask."""
    example = seeded_case(TokenHeads, (4, 3))
    kept = torch.rand(example.y.shape, generator=torch.Generator().manual_seed(3)) < 0.6
    kept[1], kept[0, 0] = False, True
    sizes = [len(y) for _, y in example.batches]
    labels = example.y.where(kept, IGNORED).split(sizes)
    batches = [(x, y) for (x, _), y in zip(example.batches, labels, strict=True)]
    return Case(example.model, example.likelihood, batches, "expand"), kept


@settings
def test_ignored_tokens_leave(setting):
    example, kept = ignored_tokens()
    curvature = fitted(example, kfac_approx=setting)
    hessian = oracles.output_hessian(example.model(example.x), example.y, "classification")
    weights = kept.repeat_interleave(CLASSES, 1).double()  # (n, t c)
    hessian = hessian * weights[:, :, None] * weights[:, None]
    for layer in ("first", "head"):
        options = {"hessian": hessian, "live": kept}
        factors = oracles.kfac_factors(example.model, layer, example.data, setting, **options)
        want = oracles.kfac_block(factors, bias_column=True)
        got = curvature.blocks[f"{layer}.weight"].dense()
        assert relative_error(got, want, negligible(curvature)) < EXACT, layer


def without(example: Case, left_out: int) -> Case:
    """The data without one example."""
    chosen = torch.arange(len(example.x)) != left_out
    data = [(example.x[chosen], example.y[chosen])]
    return Case(example.model, example.likelihood, data, example.setting)


@settings
def test_an_example_of_which_nothing_counts(setting):
    """It adds to the number of examples and to nothing else, alone in a batch or beside others."""
    example, _ = ignored_tokens()
    assert (example.y[1] == IGNORED).all()
    rest = without(example, 1)
    want = dense_blocks(fitted(rest, kfac_approx=setting))
    alone = [(example.x[1:2], example.y[1:2])]
    for batches in (example.batches, [(example.x, example.y)], [*rest.batches, *alone]):
        curvature = fitted(example, batches, kfac_approx=setting)
        assert curvature.n_data == len(example.x)
        assert_same_blocks(dense_blocks(curvature), want, EXACT)
        whole = Case(example.model, example.likelihood, batches)
        values = [evidence(case, setting) for case in (whole, rest)]
        torch.testing.assert_close(*values, rtol=EXACT, atol=0)


@settings
def test_a_class_label_that_does_not_count(setting):
    """The same with one output row an example, behind convolution and pooling."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), Pool(2, 3), nn.Linear(2, CLASSES))

    example = seeded_case(make, (1, 4, 4))
    rest = without(example, 1)
    y = example.y.clone()
    y[1] = IGNORED
    blocks = [
        dense_blocks(fitted(case, batches, kfac_approx=setting))
        for case, batches in ((example, [(example.x, y)]), (rest, None))
    ]
    assert_same_blocks(*blocks, EXACT)


def test_data_of_which_nothing_counts():
    """No curvature: the posterior is the prior."""
    example, _ = ignored_tokens()
    nothing = [(x, torch.full_like(y, IGNORED)) for x, y in example.batches]
    curvature = Curvature(example.model, "classification").fit(nothing)
    assert all(not block.dense().any() for block in curvature.blocks.values())
    la = Laplace(example.model, "classification").fit(nothing)
    assert la.log_det_ratio == 0 and la.log_likelihood == 0
