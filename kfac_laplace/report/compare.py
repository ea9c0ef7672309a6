"""One pass over test data and over strange inputs, and the report of what they showed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.curvature.model.batches import split_batch
from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods import aligned_target
from kfac_laplace.options import check_iterable
from kfac_laplace.posterior.calibrate.choice import Choice
from kfac_laplace.posterior.passes import counted
from kfac_laplace.posterior.predict.glm import OutputGaussian, output_gaussian
from kfac_laplace.posterior.predict.inputs import inputs_alone, inputs_of
from kfac_laplace.process import draws_kept
from kfac_laplace.report.bootstrap import Bootstrap
from kfac_laplace.report.document import Report
from kfac_laplace.report.found import Found
from kfac_laplace.report.means import CHANCE, ClassRows, ValueRows, joined_classes, joined_values
from kfac_laplace.report.pictures import panels
from kfac_laplace.report.tables import Row
from kfac_laplace.report.ways import Way, joined_scores, rows, sigma_of, ways
from kfac_laplace.summary import Line

#: Figures of the data and of resamples, by number of the way, score, and name of the figure.
Replicates = dict[tuple[int, str, str], Tensor]


@dataclass(frozen=True)
class Question:
    """What a report is about.

    Args:
        loader: test data.
        val_loader: held-out data for temperature scaling; by default those that chose κ and τ.
        ood_loader: batches of strange inputs, or of pairs or mappings whose targets do not matter;
            with `batch_fn`, what that takes.
        bootstrap: resamples of the examples.
        head: the posterior in a line.
        layers: its groups.
    """

    loader: Iterable[Any]
    val_loader: Iterable[Any] | None = None
    ood_loader: Iterable[Any] | None = None
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    head: str = ""
    layers: tuple[Line, ...] = ()

    def __post_init__(self) -> None:
        """Check that loaders are some."""
        for name in ("loader", "val_loader", "ood_loader"):
            value = getattr(self, name)
            if name == "loader" or value is not None:
                check_iterable(name, value)


def compare(choice: Choice, asked: Question) -> Report:
    """Scores on a loader of the mode, temperature scaling, and the posterior.

    Args:
        choice: the posterior with its κ and τ.
        asked: data and options.

    Raises:
        InvalidValue: a loader without a batch, test data without a label that counts, or
            predictions that are not finite.
        InvalidType: a loader that is none, or strange inputs of which nothing says what they are.
    """
    compared = ways(choice, asked.val_loader)
    n, test = _tested(choice, asked.loader, compared, asked.ood_loader is not None)
    counts = [n]
    if asked.ood_loader is not None:
        strange = _strange(choice, asked.ood_loader, compared)
        counts.append(len(strange[0][compared[0].scores[0]]))
        for found, scores in zip(test, strange, strict=True):
            found.strange = scores
    replicates = _replicates(test, counts, asked.bootstrap)
    table, told = _tables(test, replicates, asked.bootstrap)
    if choice.posterior.ggn.likelihood.has_noise:
        for row in table:
            row.values["sigma"] = float(sigma_of(choice))
    n_strange = sum(counts[1:])
    drawn = panels(test, asked.layers)
    return Report(table, told, n, n_strange, asked.bootstrap, asked.head, asked.layers, drawn)


def _tested(
    choice: Choice, loader: Iterable[Any], compared: list[Way], with_scores: bool
) -> tuple[int, list[Found]]:
    """Number of examples, and what each way found of them; a batch at a time."""
    parts: list[list[Any]] = [[] for _ in compared]
    scores: list[list[dict[str, Tensor]]] = [[] for _ in compared]
    n = 0
    with draws_kept():
        for raw in loader:
            outputs, y = _predicted(choice, raw)
            example = torch.arange(n, n + len(outputs.mean), device="cpu")
            n += len(example)
            for turn, way in enumerate(compared):
                parts[turn].append(rows(way, choice, outputs, y, example))
                if with_scores:
                    scores[turn].append(way.strangeness(choice, outputs))
    _check_read(parts[0], "loader")
    if isinstance(parts[0][0], ClassRows):
        joined: list[ClassRows | ValueRows] = [joined_classes(part) for part in parts]
        _check_counted(joined[0])
    else:
        joined = [joined_values(part) for part in parts]
    own = [joined_scores(one) if one else None for one in scores]
    return n, [Found(*one) for one in zip(compared, joined, own, strict=True)]


def _strange(choice: Choice, loader: Iterable[Any], compared: list[Way]) -> list[dict[str, Tensor]]:
    """Scores of strange inputs by each way."""
    scores: list[list[dict[str, Tensor]]] = [[] for _ in compared]
    with draws_kept():
        for raw in loader:
            x = inputs_alone(raw, choice.posterior.ggn.options.batch_fn, "ood_loader")
            outputs = output_gaussian(
                choice.posterior, inputs_of(choice.posterior, x, choice.key_y)
            )
            for way, found in zip(compared, scores, strict=True):
                found.append(way.strangeness(choice, outputs.double()))
    _check_read(scores[0], "ood_loader")
    return [joined_scores(found) for found in scores]


def _predicted(choice: Choice, raw: Any) -> tuple[OutputGaussian, Tensor]:
    """Outputs of a batch at κ = τ = 1, and aligned targets."""
    posterior = choice.posterior
    x, y = split_batch(raw, choice.key_y, posterior.ggn.options.batch_fn)
    outputs = output_gaussian(posterior, counted(posterior, x, y)).double()
    y, axis = y.to(posterior.network.device), posterior.ggn.knowledge.class_axis
    likelihood = posterior.ggn.likelihood
    return outputs, aligned_target(likelihood, y, outputs.shape, outputs.mean, axis)


def _replicates(test: Sequence[Found], counts: list[int], bootstrap: Bootstrap) -> Replicates:
    """All figures and their resamples, by way and score ("" for those of test data)."""

    def figures(usual: Tensor, *strange: Tensor) -> Replicates:
        return {
            (turn, score, name): value
            for turn, found in enumerate(test)
            for score, of in found.figures(usual, *strange).items()
            for name, value in of.items()
        }

    width = max(sum(counts), *(len(found.rows.example) for found in test))
    return bootstrap.replicates(figures, counts, width)


def _tables(
    test: Sequence[Found], replicates: Replicates, bootstrap: Bootstrap
) -> tuple[list[Row], list[Row]]:
    """A row for each way, with AUROC and FPR95 by its first score; a row for each score."""
    table: list[Row] = []
    told: list[Row] = []
    first: dict[str, Tensor] = {}
    for turn, found in enumerate(test):
        by_score: dict[str, dict[str, Tensor]] = {}
        for (of, score, name), values in replicates.items():
            if of == turn:
                by_score.setdefault(score, {})[name] = values
        own = by_score.pop("") | by_score.get(found.way.scores[0], {})
        table.append(replace(_row(found.way.name, own, first, bootstrap), short=found.way.short))
        first = first or own
        told += [
            _row(f"{score}, {found.way.name}", by_score[score], {}, bootstrap) for score in by_score
        ]
    return table, told


def _row(name: str, own: dict[str, Tensor], first: dict[str, Tensor], bootstrap: Bootstrap) -> Row:
    """Values, intervals, and differences to the first way, where there is one."""
    row, by_chance = Row(name, {}), own.get(CHANCE)
    for figure, replicates in own.items():
        if figure == CHANCE:
            continue
        row.values[figure] = float(replicates[0])
        interval = bootstrap.interval(figure, replicates, by_chance)
        if interval is not None:
            row.intervals[figure] = interval
        gap = bootstrap.difference(figure, replicates, first[figure]) if first else None
        if gap is not None:
            row.differences[figure] = gap
    return row


def _check_read(parts: list[Any], name: str) -> None:
    """Raise `InvalidValue` where a loader yielded nothing."""
    if not parts:
        raise InvalidValue(
            "the loader yielded no batch",
            where=name,
            got="0 batches",
            remedy="A generator can be read only once: pass a loader",
        )


def _check_counted(found: ClassRows | ValueRows) -> None:
    """Raise `InvalidValue` where no label counts."""
    if not len(found.example):
        raise InvalidValue(
            "no target counts",
            where="target",
            got="labels that are ignored, all of them",
            remedy="Pass data with labels that count",
        )
