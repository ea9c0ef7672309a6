"""Gram matrices of convolution patches without patches, for stride 1.

Entry ((c, k), (c', k')) of Σ a aᵀ is Σ x_c(q) x_c'(q + δ) over a window of places q that starts at
k, with δ = k' − k. Windows of one lag δ differ in thin strips alone. So each lag needs one large
product over the places that all its windows share, and small ones for the strips, which are added:
along each axis a window of m is m consecutive segments of 2m − 1.
"""

from collections.abc import Iterator
from itertools import product

from torch import Tensor

Shape = tuple[int, ...]


def lags_apply(positions: Shape, kernel: Shape, stride: Shape, dilation: Shape) -> bool:
    """Whether all windows of a lag share places: stride 1, and more positions than kernel."""
    return all(
        s == 1 and p > (k - 1) * d
        for p, k, s, d in zip(positions, kernel, stride, dilation, strict=True)
    )


def lag_products(
    places: Tensor, kernel: Shape, dilation: Shape, margins: tuple[tuple[int, int], ...]
) -> Iterator[tuple[int, int, Tensor]]:
    """Σ over examples and windows of x_c(q) x_c'(q + δ), for all pairs of kernel entries.

    Args:
        places: the input, (b, *space, n, c), in this memory order.
        kernel: kernel size.
        dilation: dilation.
        margins: width of the margins of zeros before and after each spatial axis.

    Yields:
        Both kernel entries and their product (b, c, c); of a pair and its transpose only one.
    """
    lengths = places.shape[1:-2]
    axes = [_Axis(*given) for given in zip(kernel, dilation, lengths, margins, strict=True)]
    for lag in product(*(range(1 - k, k) for k in kernel)):
        if lag < (0,) * len(lag):  # the transposes of the others
            continue
        cells = _cells(places, axes, lag)
        counts = [axis.windows(step) for axis, step in zip(axes, lag, strict=True)]
        for window in product(*(range(m) for m in counts)):
            spans = [range(a, a + m) for a, m in zip(window, counts, strict=True)]
            inside = [cells[cell] for cell in product(*spans) if cell in cells]
            first = [max(0, -step) + a for step, a in zip(lag, window, strict=True)]
            second = [k + step for k, step in zip(first, lag, strict=True)]
            c = places.shape[-1]
            total = sum(inside[1:], inside[0]) if inside else places.new_zeros(len(places), c, c)
            yield _flat(first, kernel), _flat(second, kernel), total


def _flat(entry: list[int], kernel: Shape) -> int:
    """Place of a kernel entry among all of them, last axis fastest."""
    place = 0
    for k, size in zip(entry, kernel, strict=True):
        place = place * size + k
    return place


class _Axis:
    """One spatial axis: how the windows of a lag fall into segments.

    Args:
        kernel: number of kernel entries.
        dilation: their distance.
        length: length of the input.
        margins: width of the margins of zeros before and after it.
    """

    def __init__(self, kernel: int, dilation: int, length: int, margins: tuple[int, int]):
        self._kernel, self._dilation, self._length = kernel, dilation, length
        self._before = margins[0]
        self._size = length + sum(margins) - dilation * (kernel - 1)  # number of output places

    def windows(self, lag: int) -> int:
        """Number m of kernel entries k for which k + lag is one as well."""
        return self._kernel - abs(lag)

    def segments(self, lag: int) -> Iterator[tuple[int, int, int, int]]:
        """Index of each of the 2m − 1 segments, its start at both factors, and its length.

        Places where either factor lies in the margin are left out.
        """
        m, shift = self.windows(lag), lag * self._dilation
        start = max(0, -lag) * self._dilation - self._before
        bounds = [start + k * self._dilation for k in range(m)]
        bounds += [start + self._size + k * self._dilation for k in range(m)]
        low, high = max(0, -shift), min(self._length, self._length - shift)
        for index, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            begin, end = max(begin, low), min(end, high)
            if begin < end:
                yield index, begin, begin + shift, end - begin


def _cells(places: Tensor, axes: list[_Axis], lag: Shape) -> dict[Shape, Tensor]:
    """Σ x(q) x(q + δ)ᵀ over each cell of segments, shape (b, c, c)."""
    segments = [list(axis.segments(step)) for axis, step in zip(axes, lag, strict=True)]
    found = {}
    for cell in product(*segments):
        here, there = places, places
        for axis, (_, at, shifted, length) in enumerate(cell, start=1):
            here, there = here.narrow(axis, at, length), there.narrow(axis, shifted, length)
        found[tuple(index for index, *_ in cell)] = _product(here, there)
    return found


def _product(here: Tensor, there: Tensor) -> Tensor:
    """Σ x yᵀ over all but the first and last axes, shape (b, c, c)."""
    if len(here) > 1 or here.ndim < 5 or here.shape[-3] == 1:
        return here.flatten(1, -2).mT @ there.flatten(1, -2)
    # Along the last spatial axis places lie one after another: a product for each line, no copies.
    lines = [x[0].flatten(-3, -2).flatten(0, -3) for x in (here, there)]  # (lines, places n, c)
    out = here.new_empty(here.shape[-1], here.shape[-1])
    return out.addbmm_(lines[0].mT, lines[1], beta=0)[None]
