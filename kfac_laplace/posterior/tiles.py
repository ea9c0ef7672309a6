"""Inner products of many rows, a tile of them at a time."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Tile = TypeVar("Tile")
Rows = TypeVar("Rows")
Found = TypeVar("Found")


def pairs_of_tiles(
    tiles: Sequence[Tile],
    made: Callable[[Tile], Rows],
    products: Callable[[Rows, Rows], Found],
) -> Iterator[tuple[int, int, Found]]:
    """Products of the rows of each tile a with those of tiles b ≤ a, as (a, b, products).

    Rows of two tiles exist at a time; they are made again for each other tile.

    Args:
        tiles: what rows are made of.
        made: makes them.
        products: of two sets of rows, the same object twice for those of a tile with itself.
    """
    for a, tile in enumerate(tiles):
        mine = made(tile)
        for b, other in enumerate(tiles[:a]):
            yield a, b, products(mine, made(other))
        yield a, a, products(mine, mine)
