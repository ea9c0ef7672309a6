"""Predictives over loaders: batches run one after another, links and scores are made at the end."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from kfac_laplace.curvature.shards import indices, own_part, ranks_reading
from kfac_laplace.errors import InvalidValue, UnsupportedUse
from kfac_laplace.options import check_iterable
from kfac_laplace.posterior.predict.glm import OutputGaussian
from kfac_laplace.posterior.predict.inputs import inputs_alone
from kfac_laplace.posterior.predict.predictive import Predictive
from kfac_laplace.posterior.predict.predictor import Predictor
from kfac_laplace.process import draws_kept

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
    if pred_type == "glm":
        outputs = _joined(*_predicted(predictor, loader, predictor.outputs, progress))
        return predictor.by_outputs(outputs, link, n_samples, generator)
    state = source.get_state()

    def functions(x: Any) -> Tensor:
        source.set_state(state)  # the same functions for every batch
        return predictor.functions(x, n_samples, pred_type, source)

    samples, order = _predicted(predictor, loader, functions, progress)
    _check_alike([torch.Size(part.shape[2:]) for part in samples])
    whole = torch.cat(samples, 1)
    return predictor.by_samples(whole if order is None else whole[:, _checked(order, whole, 1)])


def _predicted(
    predictor: Predictor, loader: Iterable[Any], predicted: Callable[[Any], Any], progress: bool
) -> tuple[list[Any], Tensor | None]:
    """What is predicted of each batch, and how its rows come into the order of the data.

    None for the latter where they are in order. Of a loader of one part, it is of all ranks' parts.

    Args:
        predictor: whose predictions they are.
        loader: batches.
        predicted: takes inputs to what can be moved to a device.
        progress: whether to show a bar.
    """
    options, device = predictor.posterior.ggn.options, predictor.posterior.device
    ranks = ranks_reading(options.process_group, loader)
    part = loader if ranks is None else own_part(loader, ranks)

    def own() -> list[Any]:
        bar = tqdm(part, desc="predict", disable=not progress, leave=False)
        with draws_kept():
            return [predicted(inputs_alone(raw, options.batch_fn, WHERE)) for raw in bar]

    order: Tensor | None = None
    if ranks is None:
        found = own()
    else:
        told = ranks.gathered(lambda: (indices(part), [each.to("cpu") for each in own()]))
        found = [each.to(device) for _, made in told for each in made]
        order = torch.tensor([place for places, _ in told for place in places], device="cpu")
        order = order.argsort(stable=True).to(device)
    if not found:
        raise InvalidValue(
            "the loader yielded no batch",
            where=WHERE,
            got="0 batches",
            remedy="Check its length; a generator can be read only once",
        )
    return found, order


def _checked(order: Tensor, whole: Tensor, axis: int) -> Tensor:
    """The order of examples as that of rows along an axis.

    Raises:
        UnsupportedUse: they are not as many, as with nodes of graphs.
    """
    rows = whole.shape[axis]
    if len(order) != rows:
        raise UnsupportedUse(
            "parts can be put in the order of the data where each example has an output row",
            where=WHERE,
            got=f"{rows} rows for {len(order)} examples",
            remedy="Predict all of the data on each rank, by a loader without DistributedSampler",
        )
    return order


def _joined(parts: list[OutputGaussian], order: Tensor | None) -> OutputGaussian:
    """Outputs at the inputs of all batches, in order."""
    _check_alike([torch.Size(part.shape[1:]) for part in parts])
    mean, covariance, head = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("mean", "covariance", "head")
    )
    if order is not None:
        order = _checked(order, mean, 0)
        mean, covariance, head = mean[order], covariance[order], head[order]
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
