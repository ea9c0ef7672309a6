"""Predictives over loaders: batches run one after another, links and scores are made at the end."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from kfac_laplace.errors import InvalidValue
from kfac_laplace.options import check_iterable
from kfac_laplace.posterior.predict.glm import OutputGaussian
from kfac_laplace.posterior.predict.inputs import inputs_alone
from kfac_laplace.posterior.predict.predictive import Predictive
from kfac_laplace.posterior.predict.predictor import Predictor

WHERE = "loader"


def predict_loader(
    predictor: Predictor,
    loader: Iterable[Any],
    pred_type: str,
    link: str,
    n_samples: int,
    generator: Generator | None,
    progress: bool,
) -> Predictive:
    """The predictive at all inputs of a loader, which is that of one tensor of them.

    Beside one batch, what is returned is held, and at the end once more while it is joined.

    Args:
        predictor: predicts.
        loader: batches of inputs alone, pairs, mappings, graphs, or what `batch_fn` takes.
        pred_type: "glm", "linear" or "nn".
        link: one of `LINKS`.
        n_samples: number of samples.
        generator: their source.
        progress: whether to show a bar.

    Raises:
        InvalidValue: no batch, or batches whose outputs differ in more than their number.
        InvalidType: no loader, or a batch of which nothing says what the model takes.
    """
    check_iterable(WHERE, loader)
    predictor.check(pred_type, link, n_samples)
    source = predictor.source(generator)
    batch_fn = predictor.posterior.ggn.options.batch_fn

    def each(predicted: Callable[[Any], Any]) -> list[Any]:
        bar = tqdm(loader, desc="predict", disable=not progress, leave=False)
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws from the global generator
            found = [predicted(inputs_alone(raw, batch_fn, WHERE)) for raw in bar]
        if not found:
            raise InvalidValue(
                "the loader yielded no batch",
                where=WHERE,
                got="0 batches",
                remedy="Check its length; a generator can be read only once",
            )
        return found

    if pred_type == "glm":
        outputs = each(predictor.outputs)
        return predictor.by_outputs(_joined(outputs), link, n_samples, generator)
    state = source.get_state()

    def functions(x: Any) -> Tensor:
        source.set_state(state)  # the same functions for every batch
        return predictor.functions(x, n_samples, pred_type, source)

    samples = each(functions)
    _check_alike([torch.Size(part.shape[2:]) for part in samples])
    return predictor.by_samples(torch.cat(samples, 1))


def _joined(parts: list[OutputGaussian]) -> OutputGaussian:
    """Outputs at the inputs of all batches, in order."""
    _check_alike([torch.Size(part.shape[1:]) for part in parts])
    mean, covariance, head = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("mean", "covariance", "head")
    )
    return OutputGaussian(mean, covariance, torch.Size((len(mean), *parts[0].shape[1:])), head)


def _check_alike(shapes: list[torch.Size]) -> None:
    """Raise where outputs of an example differ in shape between batches."""
    if len(set(shapes)) > 1:
        raise InvalidValue(
            "outputs of the batches differ in shape",
            where=WHERE,
            got=", ".join(sorted(str(tuple(shape)) for shape in set(shapes))),
            remedy="Pad sequences to one length in all batches, or call predict on each",
        )
