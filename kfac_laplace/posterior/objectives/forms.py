"""The log-determinant of the rows of some examples, in whichever of its forms is small."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from kfac_laplace.curvature.linalg.dtypes import in_double
from kfac_laplace.curvature.model.budget import at_once
from kfac_laplace.errors import InvalidValue
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.log_dets import Grams, LogDet, Primal, Wide
from kfac_laplace.posterior.objectives.points import Looked, Points, count_of
from kfac_laplace.posterior.objectives.rows import Part, Rows, inner_products, stacked
from kfac_laplace.posterior.tiles import pairs_of_tiles

#: Parameters of which a dense GGN is made in place of a Gram matrix of rows.
MAX_PARAMETERS = 2048
#: Entries of Gram matrices, or of rows that are kept as they are: 2 GiB, and 1.
MAX_GRAMS, MAX_KEPT = 2**28, 2**27


def log_det_of(looked: Looked, points: Sequence[Points], rows: int) -> LogDet:
    """The log-determinant over the rows of some points, in its smallest form.

    Args:
        looked: how they are looked at.
        points: the examples.
        rows: how many rows they have, at the most.

    Raises:
        InvalidValue: too many precisions for so many rows.
    """
    prior = looked.posterior.prior
    if prior.size <= min(rows, MAX_PARAMETERS):
        return _primal(looked, points)
    if not prior.constant_on_blocks:
        if rows * prior.size > MAX_KEPT:
            raise InvalidValue(
                f"{rows} rows of {prior.size} parameters are too many to keep",
                where="objective",
                got=f"a '{prior.sharing.title}' prior of {prior.length} precisions",
                remedy="Use a prior_structure of few precisions, such as 'layerwise', or fewer "
                "rows: objective='columns'",
            )
        return Wide(_kept(looked, points), _index(looked.posterior), prior.length)
    return _grams(looked, points, rows)


def _index(posterior: Posterior) -> Tensor:
    """The precision of each entry, group by group."""
    prior = posterior.prior
    groups = prior.layouts.groups.items()
    return torch.cat([prior.index[name].expand(la.matrix).flatten() for name, la in groups])


def _flat(looked: Looked, parts: Sequence[Part]) -> Tensor:
    """All parameters side by side, float64 (m, p)."""
    layouts, count = looked.posterior.prior.layouts, sum(m for m, _ in parts)
    own, like = stacked(parts), looked.posterior.mode
    zeros = next(iter(like.values())).new_zeros(count, 1)
    columns = [
        in_double(own[name].dense()) if name in own else zeros.expand(-1, layout.size)
        for name, layout in layouts.groups.items()
    ]
    return torch.cat(columns, 1)


def _kept(looked: Looked, points: Sequence[Points]) -> Tensor:
    """All rows, float64 (m, p)."""
    return torch.cat([_flat(looked, looked.rows(each)) for each in points])


def _primal(looked: Looked, points: Sequence[Points]) -> Primal:
    """The dense GGN, batch by batch."""
    prior = looked.posterior.prior
    total = next(iter(looked.posterior.mode.values())).new_zeros(prior.size, prior.size)
    for each in points:
        for part in looked.rows(each):
            rows = _flat(looked, [part])
            total.addmm_(rows.mT, rows)
    return Primal(total, _index(looked.posterior), prior.length)


def _grams(looked: Looked, points: Sequence[Points], rows: int) -> Grams:
    """Gram matrices by precision, a tile of points at a time where rows are many."""
    prior = looked.posterior.prior
    if prior.length * rows**2 > MAX_GRAMS:
        raise InvalidValue(
            f"{prior.length} Gram matrices of {rows} rows are too many",
            where="objective",
            got=f"{prior.length} precisions",
            remedy="Use objective='columns', or a prior_structure of fewer precisions",
        )
    place = {name: int(index) for name, index in prior.index.items()}
    found = pairs_of_tiles(
        _tiles(looked, points),
        lambda tile: stacked([part for each in tile for part in looked.rows(each)]),
        lambda one, other: _by_place(one, other, place),
    )
    return _assembled(found, looked.posterior)


def _tiles(looked: Looked, points: Sequence[Points]) -> list[list[Points]]:
    """Points in tiles, of which two fit in the budget; all of them in one where it fits."""
    posterior = looked.posterior
    examples = count_of(points)
    some = next(iter(posterior.mode_for_model.values()))
    limit = posterior.network.budget.bytes(some) // max(4, some.element_size())
    if examples * looked.each * posterior.prior.size <= limit:
        return [list(points)]
    few = next(points[0].pieces(4))
    held = sum(rows.entries for _, own in looked.rows(few) for rows in own.values())
    each_example = -(-held // few.batch.n)
    if examples * each_example <= limit:
        return [list(points)]
    step = at_once(each_example, limit // 2)
    tiles: list[list[Points]] = [[]]
    for piece in (piece for each in points for piece in each.pieces(step)):
        if tiles[-1] and count_of(tiles[-1]) + piece.batch.n > step:
            tiles.append([])
        tiles[-1].append(piece)
    return tiles


def _by_place(
    one: Mapping[str, Rows], other: Mapping[str, Rows], place: Mapping[str, int]
) -> dict[int, Tensor]:
    """Inner products (m, m') by precision."""
    found: dict[int, Tensor] = {}
    for name in one.keys() & other.keys():
        product = inner_products(one[name], other[name])
        found[place[name]] = found[place[name]].add_(product) if place[name] in found else product
    return found


def _assembled(
    found: Iterable[tuple[int, int, Mapping[int, Tensor]]], posterior: Posterior
) -> Grams:
    """Whole matrices of their tiles."""
    pieces = [*found]
    own = {a: next(iter(piece.values())) for a, b, piece in pieces if a == b and piece}
    ends = (
        torch.tensor([0, *(len(product) for product in own.values())], device="cpu")
        .cumsum(0)
        .tolist()
    )
    span = {a: slice(*ends[k : k + 2]) for k, a in enumerate(own)}
    places = sorted({place for _, _, piece in pieces for place in piece})
    like = next(iter(posterior.mode.values()))
    matrices = like.new_zeros(len(places), ends[-1], ends[-1])
    for a, b, piece in pieces:
        for place, product in piece.items():
            matrix = matrices[places.index(place)]
            matrix[span[a], span[b]] = product
            matrix[span[b], span[a]] = product.mT
    index = torch.tensor(places, dtype=torch.int64, device=like.device)
    return Grams(matrices, index, posterior.prior.length)
