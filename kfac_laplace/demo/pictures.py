"""The demo's pictures, drawn by `kfac_laplace.plots` from the results of the first seed."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402  # after the choice of a backend without display
from matplotlib.axes import Axes  # noqa: E402

from kfac_laplace import plots  # noqa: E402
from kfac_laplace.demo.classification import Result  # noqa: E402

if TYPE_CHECKING:
    from kfac_laplace.demo.findings import Findings

Panel = Callable[[Axes], None]

#: what the reliability diagram compares
COMPARED = (
    "MAP, default weight decay",
    "MAP + temperature scaling",
    "post-hoc, held-out data",
    "online",
)


def write(findings: "Findings", output: Path) -> None:
    """Write each picture, and all of the first network's in one overview."""
    panels = [panels_of(model, findings) for model in findings.settings.models]
    for model, own in zip(findings.settings.models, panels, strict=True):
        for name, panel in own.items():
            save([panel], output / f"{model}-{name}.png")
    band = band_panel(findings)
    save([band], output / "band.png")
    first = panels[0]
    save([*(first[name] for name in ("reliability", "evidence", "precisions")), band],
         output / "overview.png")  # fmt: skip


def panels_of(model: str, findings: "Findings") -> dict[str, Panel]:
    """The pictures of one network, by name."""
    results = {r.outcome.method: r for r in findings.shown if r.outcome.model == model}
    compared = {
        name: (results[name].probs, results[name].labels) for name in COMPARED if name in results
    }
    tuned = {name: r for name, r in results.items() if r.fit.tuner is not None}
    histories = {
        name: tuner.history
        for name, result in tuned.items()
        if (tuner := result.fit.tuner) is not None
    }
    last = tuned["online"]
    return {
        "reliability": lambda ax: plots.reliability(ax, compared),
        "evidence": lambda ax: plots.evidence(ax, histories),
        "precisions": lambda ax: over_epochs(ax, last),
        "layers": lambda ax: layers(ax, last),
    }


def over_epochs(ax: Axes, result: Result) -> None:
    """Precisions of a tuned network while it trained."""
    tuner = result.fit.tuner
    assert tuner is not None
    plots.precisions_over_epochs(ax, tuner.history, tuner.groups)


def layers(ax: Axes, result: Result) -> None:
    """Final precisions of a tuned network by layer."""
    tuner = result.fit.tuner
    assert tuner is not None
    plots.precisions_by_layer(ax, tuner.groups, tuner.hyperparameters()["prior_precision"])


def band_panel(findings: "Findings") -> Panel:
    """The predictive band of the regression half."""
    found = findings.band

    def draw(ax: Axes) -> None:
        plots.band(
            ax, found.x, found.mean, epistemic=found.epistemic, total=found.total,
            seen=(found.seen_x, found.seen_y),
        )  # fmt: skip
        ax.set(xlabel="body-mass index", ylabel="disease progression")

    return draw


def save(panels: list[Panel], path: Path) -> None:
    """Draw panels two in a row and write them as PNG."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 3.4 * rows), squeeze=False, layout="constrained"
    )
    for ax, panel in zip(axes.flat, panels, strict=False):
        panel(ax)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
