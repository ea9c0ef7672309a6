"""Blocks from the tensors of a state, whose shapes have to be those of their layouts."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kfac_laplace.curvature.estimate.blocks import Block, KroneckerBlock
from kfac_laplace.curvature.estimate.eigen_block import EigenBlock
from kfac_laplace.curvature.estimate.exact_blocks import DenseBlock, DiagonalBlock
from kfac_laplace.curvature.estimate.leading_block import LeadingBlock
from kfac_laplace.curvature.estimate.low_rank import LowRankBlock
from kfac_laplace.curvature.linalg.leading_gram import is_wide
from kfac_laplace.curvature.linalg.packed import packed_zeros
from kfac_laplace.curvature.rows.layout import Layout
from kfac_laplace.states.stored import Stored

KINDS: dict[str, type[Block]] = {
    block.kind: block
    for block in (KroneckerBlock, EigenBlock, DiagonalBlock, DenseBlock, LowRankBlock)
}


def block_from_state(
    stored: Stored,
    kind: str,
    layout: Layout,
    diagonal: bool,
    device: torch.device,
    rank: int | None = None,
    home: torch.device | None = None,
) -> Block:
    """A block whose sums have the shapes of its layout.

    Args:
        stored: what its `tensors()` were.
        kind: "kron", "ekfac", "diag" or "dense".
        layout: of its group.
        diagonal: whether of A only the diagonal is there.
        device: where it is to lie, or to be used.
        rank: how many directions wide factors keep; None: all.
        home: where its large tensors lie, if not on the device.

    Raises:
        InvalidValue: sums of other names or shapes.
    """
    b, o, i = layout.matrix
    shapes: dict[str, tuple[int, ...]] = {}
    if kind == "dense":
        shapes["matrix"] = (layout.size, layout.size)
    elif kind == "diag":
        shapes["values"] = (b, o, i)
    elif kind == "ekfac":
        width = 0 if diagonal else i
        shapes |= {"values": (b, o, i), "output_basis": (b, o, o)}
        shapes["input_basis"] = (b, width, width)
    else:
        parts = stored.items()
        shapes |= _gram_shapes(parts, "output", b, o) | {"input_count": (b,)}
        shapes |= _gram_shapes(parts, "input", b, i)
        if diagonal:
            shapes |= {"input_sum": (b, i), "input_rows": (b, 0, i)}
        if rank is not None:
            shapes |= _leading_shapes(parts, layout, rank, diagonal)
    sums = {name: one.tensor(shapes[name]) for name, one in stored.fields(shapes).items()}
    for name in {"input_count", "input_rest", "output_rest"}.intersection(sums):
        if bool((sums[name] < 0).any()):
            what = "counts" if name == "input_count" else "traces"
            raise Stored(sums[name], f"{stored.where}.{name}").fault(f"negative {what}")
    if home is None:
        sums = {name: one.to(device) for name, one in sums.items()}
    if kind == "kron" and rank is not None:
        block: Block = LeadingBlock.from_tensors(layout, sums, rank)
    else:
        block = KINDS[kind].from_tensors(layout, sums)
    return block if home is None else block.placed(device, home)


def _leading_shapes(
    parts: Mapping[str, Stored], layout: Layout, rank: int, diagonal: bool
) -> dict[str, tuple[int, ...]]:
    """Shapes where wide factors keep few directions: these, and the traces of the rest.

    Raises:
        InvalidValue: more rows than the rank.
    """
    b, o, i = layout.matrix
    shapes: dict[str, tuple[int, ...]] = {"input_rest": (b,), "output_rest": (b,)}
    for side, width in ({"output": o} | ({} if diagonal else {"input": i})).items():
        if is_wide(width, rank):
            rows = _shape_of(parts.get(f"{side}_rows"))
            k = rows[1] if len(rows) == 3 else 0
            if k > rank:
                raise parts[f"{side}_rows"].fault(f"more directions than rank {rank} has", k)
            shapes |= {f"{side}_sum": (b, 0, 0), f"{side}_rows": (b, k, width)}
    return shapes


def _gram_shapes(
    parts: Mapping[str, Stored], side: str, b: int, width: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of sums and rows of `Gram`: the sums may be none yet, of rows there are any number."""
    total, rows = (_shape_of(parts.get(f"{side}_{name}")) for name in ("sum", "rows"))
    packed = packed_zeros(width, torch.empty(0, device="meta")).shape[1:]
    return {
        f"{side}_sum": (b, 0, 0) if total == (b, 0, 0) else (b, *packed),
        f"{side}_rows": (b, rows[1] if len(rows) == 3 else 0, width),
    }


def _shape_of(stored: Stored | None) -> tuple[int, ...]:
    value = stored.value if stored is not None else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def low_rank_block(stored: Stored, layout: Layout, rank: int, device: torch.device) -> LowRankBlock:
    """A block of some leading directions, no more than its rank.

    Args:
        stored: its rows and the trace of what was dropped.
        layout: of all parameters.
        rank: how many rows there may be.
        device: where it is to lie.

    Raises:
        InvalidValue: more rows, others than the layout's, or a negative trace.
    """
    found = stored.fields(("rows", "dropped"))
    value = found["rows"].value
    shape = tuple(value.shape) if isinstance(value, Tensor) else ()
    if len(shape) == 2 and shape[0] > min(rank, layout.size):
        raise found["rows"].fault(f"more directions than rank {rank} has", shape[0])
    rows = found["rows"].tensor((shape[0] if len(shape) == 2 else 0, layout.size))
    dropped = found["dropped"].tensor(())
    if float(dropped) < 0:
        raise found["dropped"].fault("a trace is not negative", float(dropped))
    sums = {"rows": rows.to(device), "dropped": dropped.to(device)}
    return LowRankBlock.from_tensors(layout, sums, rank)
