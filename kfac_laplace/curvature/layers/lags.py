"""Gram matrices of convolution patches without patches, for stride 1.

Entry ((c, k), (c', k')) of Σ a aᵀ is Σ x_c(q) x_c'(q + δ) over a window of places q that starts at
k, with δ = k' − k. Windows of one lag δ differ in thin strips alone. So each lag needs one large
product over the places that all its windows share, and small ones for the strips, which are added:
along each axis a window of m is m consecutive segments of 2m − 1.
"""

from collections.abc import Iterator
from itertools import product
from math import prod

from torch import Tensor

Shape = tuple[int, ...]


def lags_apply(positions: Shape, kernel: Shape, stride: Shape, dilation: Shape) -> bool:
    """Whether all windows of a lag share places: stride 1, and more positions than kernel."""
    return all(
        s == 1 and p > (k - 1) * d
        for p, k, s, d in zip(positions, kernel, stride, dilation, strict=True)
    )


def lag_gram(columns: Tensor, kernel: Shape, dilation: Shape, zeros: Shape) -> Tensor:
    """Σ over examples and places of patch patchᵀ, shape (b, i, i) with i = c·∏kernel.

    Args:
        columns: padded input, examples last: (b, c, *space, n).
        kernel: kernel size.
        dilation: dilation.
        zeros: width of the margin of zeros on each side of each spatial axis: no products there.
    """
    b, c = columns.shape[:2]
    space = columns.shape[2:-1]
    sizes = [s - d * (k - 1) for s, d, k in zip(space, dilation, kernel, strict=True)]
    entries = prod(kernel)
    out = columns.new_zeros(b, c, entries, c, entries)
    axes = [_Axis(*given) for given in zip(kernel, dilation, sizes, space, zeros, strict=True)]
    for lag in product(*(range(1 - k, k) for k in kernel)):
        if lag < (0,) * len(lag):  # the transposes of the others
            continue
        cells = _cells(columns, axes, lag)
        counts = [axis.windows(step) for axis, step in zip(axes, lag, strict=True)]
        for window in product(*(range(m) for m in counts)):
            spans = [range(a, a + m) for a, m in zip(window, counts, strict=True)]
            inside = [cells[cell] for cell in product(*spans) if cell in cells]
            if not inside:
                continue
            total = sum(inside[1:], inside[0])  # (b, c, c)
            first = [max(0, -step) + a for step, a in zip(lag, window, strict=True)]
            second = [k + step for k, step in zip(first, lag, strict=True)]
            one, other = _flat(first, kernel), _flat(second, kernel)
            out[:, :, one, :, other] = total
            out[:, :, other, :, one] = total.mT
    return out.reshape(b, c * entries, c * entries)


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
        size: number of output places.
        length: length of the padded input.
        zeros: width of its margins of zeros.
    """

    def __init__(self, kernel: int, dilation: int, size: int, length: int, zeros: int):
        self._kernel, self._dilation, self._size = kernel, dilation, size
        self._inside = (zeros, length - zeros)

    def windows(self, lag: int) -> int:
        """Number m of kernel entries k for which k + lag is one as well."""
        return self._kernel - abs(lag)

    def segments(self, lag: int) -> Iterator[tuple[int, slice, slice]]:
        """Index of each of the 2m − 1 segments, and its places at the first and second factor.

        Places where either factor lies in the margin are left out.
        """
        m, shift = self.windows(lag), lag * self._dilation
        start = max(0, -lag) * self._dilation
        bounds = [start + k * self._dilation for k in range(m)]
        bounds += [start + self._size + k * self._dilation for k in range(m)]
        low = max(self._inside[0], self._inside[0] - shift)
        high = min(self._inside[1], self._inside[1] - shift)
        for index, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            begin, end = max(begin, low), min(end, high)
            if begin < end:
                yield index, slice(begin, end), slice(begin + shift, end + shift)


def _cells(columns: Tensor, axes: list[_Axis], lag: Shape) -> dict[Shape, Tensor]:
    """Σ x(q) x(q + δ)ᵀ over each cell of segments, shape (b, c, c)."""
    segments = [list(axis.segments(step)) for axis, step in zip(axes, lag, strict=True)]
    found = {}
    for cell in product(*segments):
        here, there = columns, columns
        for axis, (_, places, shifted) in enumerate(cell):
            here = here.narrow(2 + axis, places.start, places.stop - places.start)
            there = there.narrow(2 + axis, shifted.start, shifted.stop - shifted.start)
        here, there = here.flatten(2), there.flatten(2)
        found[tuple(index for index, _, _ in cell)] = here @ there.mT
    return found
