"""How many examples a batch holds, where its inputs do not all say so."""

import pytest
import torch
from torch import Tensor, nn

from kfac_laplace import Curvature, Laplace
from kfac_laplace.curvature.model.batches import Batch

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("shapes", "known", "count"),
    [
        ([(5, 2)], None, 5),
        ([(1, 4), (5, 4)], None, 5),
        ([(4, 4), (5, 4), (5,)], None, 5),
        ([(4, 4), (5, 4)], None, 4),  # nothing tells them apart,
        ([(4, 4), (5, 4)], 5, 5),  # but the targets do
        ([(1, 4), (1, 4)], None, 1),
        ([(5, 2)], 3, 5),
    ],
)
def test_the_number_of_examples(shapes, known, count):
    batch = Batch([torch.zeros(shape) for shape in shapes], CPU, known)
    assert batch.n == count
    assert batch.select(torch.tensor([0])).n == 1


class WithPositions(nn.Module):
    """Inputs with positions shared by all examples, which come first."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(4, 3), nn.Linear(3, 2)

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        return self.head((x + self.table(positions)).tanh().mean(1))


def test_shared_positions_are_no_batch_of_one():
    model = WithPositions().double()
    positions, x = torch.arange(4)[None], torch.randn(5, 4, 3).double()
    y = torch.randint(0, 2, (5,))
    inputs = {"positions": positions, "x": x}
    la = Laplace(model).fit([(inputs, y)])
    assert la.n_data == 5
    assert la(inputs).shape == (5, 2)
    parts = Curvature(model, "classification")  # begins with several: one example tells nothing
    for some, labels in zip(x.split([2, 1, 1, 1]), y.split([2, 1, 1, 1]), strict=True):
        parts.accumulate({"positions": positions, "x": some}, labels)
    for name, block in la.curvature.blocks.items():
        torch.testing.assert_close(parts.blocks[name].dense(), block.dense())
