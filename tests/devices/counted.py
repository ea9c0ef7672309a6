"""What the simulated device counts: bytes, waits, random numbers. Importable, as `on_device.py`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from devices.on_device import STRUCTURES, data, network, quiet
from torch import Tensor

from kfac_laplace import Curvature, Laplace
from kfac_laplace.curvature.model.random_states import random_states_kept, seed_everywhere


def memory(offload: str | None) -> dict[str, int]:
    """Bytes of the device in the life of a posterior: at most in each step, over what was held."""
    from devices.accelerator import DEVICE
    from devices.watch import HELD

    quiet()
    model = network(*[256] * 9, 3).to(DEVICE)
    x, y = data(600, 256, 3)
    la = Laplace(model, "classification", fisher="mc", offload=offload)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    before = HELD.now
    with HELD.most() as fit:
        la.fit([(x[:300], y[:300]), (x[300:], y[300:])])
    with HELD.most() as evidence:
        la.log_marginal_likelihood()
    with HELD.most() as predictions:
        la.predict(x[:5], link_approx="probit")
    blocks = la.curvature.blocks.values()
    factors = sum(t.nbytes for block in blocks for t in block.tensors().values())
    return {
        "weights": weights,
        "factors": factors,
        "fit": fit[0],
        "evidence": evidence[0],
        "predictions": predictions[0],
        "kept": HELD.now - before,
    }


def refusals() -> dict[str, str]:
    """What the device says of tensors of the CPU, and what it counts."""
    from devices.accelerator import DEVICE
    from devices.watch import HELD, waits

    quiet()
    here, there = torch.ones(3, device="cpu"), torch.ones(3, device=DEVICE)
    told = {}
    for name, call in {
        "sum": lambda: there + here,
        "product": lambda: there[None] @ here[:, None],
        "cat": lambda: torch.cat([there, here]),
        "number": lambda: (there + here.sum()).cpu(),
    }.items():
        try:
            told[name] = repr(call().tolist())
        except RuntimeError as error:
            told[name] = str(error)
    with waits() as counted:
        there.sum() * 2
        told["without"] = str(sum(counted.values()))
        float(there.sum())
        there.cpu()
        there[there > 0]
        told["with"] = str(sum(counted.values()))
    with HELD.most() as peak:
        view = torch.ones(1000, dtype=torch.float64, device=DEVICE)[10:]
        del view
    told["bytes"] = str(peak[0])
    return told


def waited(depth: int, structure: str, fisher: str = "exact") -> int:
    """How often a third batch of a fit waits for the device, on which all of it lies."""
    from devices.accelerator import DEVICE
    from devices.watch import waits

    quiet()
    model = network(5, *[8] * depth, 3).to(DEVICE)
    x, y = (part.to(DEVICE) for part in data(60, 5, 3))
    counts = []

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        for start in (0, 20, 40):
            with waits() as found:
                yield x[start : start + 20], y[start : start + 20]
            counts.append(sum(found.values()))

    options = {"hessian_structure": STRUCTURES[structure], "fisher": fisher}
    Curvature(model, "classification", **options).fit(loader())
    return counts[-1]


def waited_often() -> dict[str, tuple[int, int]]:
    """The same of a shallow and a deep network, by what is computed."""
    cases = [(structure, "exact") for structure in ("kron", "diag", "full")]
    cases += [("kron", "mc"), ("kron", "hybrid")]
    return {" ".join(case): (waited(1, *case), waited(6, *case)) for case in cases}


def drawn() -> dict[str, bool]:
    """Whether the device's own random numbers are seeded, and stay where they were."""
    from devices.accelerator import DEVICE, GENERATOR

    quiet()
    before = GENERATOR.get_state()
    with random_states_kept(DEVICE):
        seed_everywhere(DEVICE, 3)
        first = torch.rand(9, device=DEVICE)
        second = torch.rand(9, device=DEVICE)
        seed_everywhere(DEVICE, 3)
        again = torch.rand(9, device=DEVICE)
    return {
        "seeded": torch.equal(again, first),
        "drawn": not torch.equal(second, first),
        "kept": torch.equal(GENERATOR.get_state(), before),
    }
