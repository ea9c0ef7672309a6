"""What is measured: the cases of each suite, by size, and which contenders can take part."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any

from benchmarks.models import NETWORKS, WITH_NORMS, Size

SUITES = ("fit", "evidence", "predict", "online", "scaling")
SIZES = ("tiny", "small", "full")

#: contender → modules it needs. "ours" and the peers make K-FAC factors of the same parameters,
#: those of linear and convolution layers; "ours-all" takes norms, tokens and positions as well.
#: The "laplace" ones go through a posterior's `fit`: laplace-torch's by backend, and ours.
CONTENDERS: dict[str, tuple[str, ...]] = {
    "ours": (),
    "ours-all": (),
    "curvlinops": ("curvlinops",),
    "asdl": ("asdl",),
    "backpack": ("backpack",),
    "ours-laplace": (),
    "laplace-curvlinops": ("laplace", "curvlinops"),
    "laplace-asdl": ("laplace", "asdl"),
    "laplace-backpack": ("laplace", "backpack"),
}
FACTORS_ONLY = ("ours", "ours-all", "curvlinops", "asdl", "backpack")
POSTERIORS = ("ours-laplace", "laplace-curvlinops", "laplace-asdl", "laplace-backpack")
WITH_REDUCE = ("ours", "ours-all", "curvlinops", "ours-laplace", "laplace-curvlinops")
FISHERS_OF_PEERS = ("exact", "mc")


@dataclass(frozen=True)
class Case:
    """One thing to measure, on the same weights and data for every contender.

    Args:
        suite: one of `SUITES`.
        network: one of `NETWORKS`.
        batch: examples in a batch, or test points of the predict suite.
        classes: outputs C.
        approx: "expand" or "reduce".
        fisher: "exact", "mc", or what only ours has.
        size: sizes that differ from the network's own.
        axis: what the scaling suite varies here.
        batches: batches of an epoch, for the online suite.
    """

    suite: str
    network: str
    batch: int = 32
    classes: int = 10
    approx: str = "expand"
    fisher: str = "exact"
    size: Size = Size()
    axis: str = ""
    batches: int = 0

    def plain(self) -> dict[str, Any]:
        """The case as plain data."""
        return asdict(self)

    @classmethod
    def from_plain(cls, fields: dict[str, Any]) -> "Case":
        """The case that `plain` wrote."""
        return cls(**(fields | {"size": Size(**fields["size"])}))

    @property
    def title(self) -> str:
        """The case in words."""
        sizes = [f"{name} {value}" for name, value in self.size.given().items()]
        parts = [self.network, self.approx, self.fisher, f"C {self.classes}", *sizes]
        what = "points" if self.suite == "predict" else "batch"
        varied = f"by {self.axis}: " if self.axis else ""
        return varied + ", ".join([*parts, f"{what} {self.batch}"])


def installed(contender: str) -> bool:
    """Whether this Python has what a contender needs."""
    return all(find_spec(module) is not None for module in CONTENDERS[contender])


def takes_part(contender: str, case: Case) -> bool:
    """Whether a contender offers what a case asks for; whether it works is for the run to say."""
    ours = contender.startswith("ours")
    if not ours and case.fisher not in FISHERS_OF_PEERS:
        return False
    if case.approx == "reduce" and contender not in WITH_REDUCE:
        return False
    if contender == "ours-all" and (case.network not in WITH_NORMS or case.suite != "fit"):
        return False
    if contender == "backpack" and case.suite == "scaling":
        return False  # it treats chains of modules alone, which no transformer is
    if case.suite == "fit":
        return True
    return contender in (FACTORS_ONLY if case.suite == "scaling" else POSTERIORS)


def cases(suite: str, sizes: str, networks: tuple[str, ...] = ()) -> list[Case]:
    """The cases of a suite, of the named networks (all by default)."""
    found = {"fit": fit, "evidence": evidence, "predict": predict, "online": online}
    made = scaling(sizes) if suite == "scaling" else found[suite](sizes)
    return [case for case in made if not networks or case.network in networks]


SETTINGS = [(approx, fisher) for fisher in ("exact", "mc") for approx in ("expand", "reduce")]
TINY = Size(width=16)


def fit(sizes: str) -> Iterator[Case]:
    """Expand and reduce, exact and Monte-Carlo; more classes in full."""
    if sizes == "tiny":
        yield Case("fit", "mlp", 8, size=TINY)
        return
    for network in NETWORKS if sizes == "full" else ("mlp", "wrn", "vit"):
        for approx, fisher in SETTINGS:
            if network == "mlp" and approx == "reduce":
                continue  # nothing is shared: both settings are the same
            yield Case("fit", network, 32, 10, approx, fisher)
    if sizes == "full":
        for network in ("mlp", "wrn", "vit"):
            yield Case("fit", network, 32, 10, "expand", "hybrid")
        for classes in (100, 1000):
            for network in ("mlp", "vit"):
                yield Case("fit", network, 32, classes, "expand", "exact")


def evidence(sizes: str) -> Iterator[Case]:
    """Decompositions and 100 hyper-steps after a fit; how it was fitted does not matter."""
    if sizes == "tiny":
        yield Case("evidence", "mlp", 8, size=TINY)
        return
    for network in ("mlp", "wrn", "vit", "resnet18") if sizes == "full" else ("mlp", "vit"):
        yield Case("evidence", network, 8, fisher="mc")


def predict(sizes: str) -> Iterator[Case]:
    """GLM predictive with the probit link."""
    if sizes == "tiny":
        yield Case("predict", "mlp", 4, size=TINY)
        return
    networks = ("mlp", "wrn", "vit", "resnet18") if sizes == "full" else ("mlp", "vit")
    for network in networks:
        # laplace-torch runs out of memory on ResNet-18 at 8 points.
        several = (4, 128) if network == "resnet18" else (8, 64, 128)
        for points in several if sizes == "full" else (8,):
            yield Case("predict", network, points, fisher="mc")


def online(sizes: str) -> Iterator[Case]:
    """Five epochs and a round, against five plain epochs."""
    if sizes == "tiny":
        yield Case("online", "mlp", 8, approx="reduce", size=TINY, batches=2)
        return
    networks = ("mlp", "wrn", "vit", "gnn") if sizes == "full" else ("mlp", "gnn")
    for network in networks:
        for fisher in ("exact", "mc"):
            yield Case("online", network, 32, 10, "reduce", fisher, batches=24)


def scaling(sizes: str) -> Iterator[Case]:
    """Cost along one axis at a time, exact."""
    base = Case("scaling", "vit", 16, size=Size(width=64, depth=2, tokens=33))
    if sizes == "tiny":
        tiny = Case("scaling", "mlp", 8, size=TINY, axis="batch")
        yield from (tiny, replace(tiny, batch=16))
        return
    full = sizes == "full"
    for batch in (8, 16, 32, 64, 128) if full else (8, 32):
        yield replace(base, batch=batch, axis="batch")
    for classes in (10, 30, 100, 300, 1000) if full else (10, 100):
        yield replace(base, classes=classes, axis="classes")
    steps = {
        "tokens": (17, 33, 65, 129, 257) if full else (17, 65),
        "width": (64, 128, 256, 512) if full else (64, 128),
        "depth": (1, 2, 4, 8) if full else (1, 4),
    }
    for axis, values in steps.items():
        for value in values:
            yield replace(base, size=replace(base.size, **{axis: value}), axis=axis)
