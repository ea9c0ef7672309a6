"""The linearised posterior over outputs in the graph of the inputs: gradients of predictives in x.

J has to be differentiated once more, so it is made by autograd and kept: n t c rows of p numbers
with their graph; for all examples at once, or where that would be another model example by example.
Parameters of the posterior stand at its mode and are constants; parameters outside it are the
model's own, and get gradients.
"""

import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from kfac_laplace.curvature.gradients.example_copies import mixed_examples
from kfac_laplace.curvature.linalg.dtypes import accumulable, without_autocast
from kfac_laplace.curvature.model.batches import AnyBatch, Batch
from kfac_laplace.curvature.model.failures import ran_out_of_memory
from kfac_laplace.curvature.model.kept import without_trace
from kfac_laplace.curvature.model.unchanged import undisturbed
from kfac_laplace.curvature.recording.autograd_graph import all_nodes
from kfac_laplace.errors import InvalidValue, KfacLaplaceError, UnsupportedUse
from kfac_laplace.posterior.block import BlockNormal
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.predict.finite import COVARIANCE, INPUTS, finite
from kfac_laplace.posterior.predict.glm import (
    OutputGaussian,
    block_normal,
    entries_inside,
    used_last,
)
from kfac_laplace.posterior.predict.products import covariance
from kfac_laplace.process import own_warnings

WHERE = "enable_backprop"
#: Up to so many outputs in all, passes one by one cost less than a vectorised one with its check.
FEW = 4


def gaussian_in_graph(posterior: Posterior, batch: AnyBatch) -> OutputGaussian:
    """What `output_gaussian` gives, in the graph of the inputs.

    Args:
        posterior: the posterior; the model runs at its mode.
        batch: the inputs.

    Raises:
        InvalidValue: nothing that could receive a gradient, or gradients are off.
        UnsupportedUse: a model whose outputs, or whose gradients, have no derivative in it.
    """
    mean, shape = mean_in_graph(posterior, batch)
    with undisturbed(posterior.network.model):
        found = _jacobian(posterior, batch, mean.detach())
        last = _head(posterior, batch)
    width = mean.shape[-1]
    total = mean.new_zeros(*mean.shape, width)
    head = torch.zeros_like(total)
    with without_autocast(mean.device):
        for name, normal, rows in _matrices(posterior, found):
            if name is None:  # all parameters in one block
                own = entries_inside(posterior.ggn, last).to(rows)
                total = total + covariance(normal, rows, width)
                head = head + covariance(normal, rows * own, width)
                continue
            share = covariance(normal, rows, width)
            total = total + share
            head = head + share if name in last else head
    spread = finite(total, "covariance of the outputs", COVARIANCE)
    return OutputGaussian(mean, spread, shape, head)


def features_in_graph(posterior: Posterior, batch: AnyBatch) -> tuple[Tensor, list[Tensor]]:
    """f_θ*(x) (n k,) and what `output_features` gives, in the graph of the inputs.

    Arguments and errors as for `gaussian_in_graph`.
    """
    mean, _ = mean_in_graph(posterior, batch)
    with undisturbed(posterior.network.model):
        found = _jacobian(posterior, batch, mean.detach())
    parts = [
        normal.features(rows).movedim(1, 0).flatten(0, 1)
        for _, normal, rows in _matrices(posterior, found)
    ]
    return mean.flatten(), parts


def mean_in_graph(posterior: Posterior, batch: AnyBatch) -> tuple[Tensor, torch.Size]:
    """f_θ*(x) alone, shape (n, t, c), and the shape of the model's output, in the graph.

    Arguments and errors as for `gaussian_in_graph`.
    """
    check_differentiable(batch)
    with undisturbed(posterior.network.model):
        mean, shape = _rows(posterior, batch, posterior.mode_for_model)
    check_reaches(mean, posterior, batch)
    return finite(mean, "outputs of the model", INPUTS), shape


def check_differentiable(batch: AnyBatch) -> None:
    """Raise unless gradients are on, and the batch is one whose tensors stay in their graph."""
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        raise InvalidValue(
            "gradients are off",
            where=WHERE,
            got="torch.no_grad() or inference_mode around the call",
            remedy="Call it outside, or without enable_backprop",
        )
    if not isinstance(batch, Batch):
        raise UnsupportedUse(
            "predictions of graphs carry no gradients",
            where=WHERE,
            got=type(batch.x).__name__,
            remedy="Leave enable_backprop out",
        )


def check_reaches(outputs: Tensor, posterior: Posterior, batch: AnyBatch) -> None:
    """Raise unless outputs depend on what asks for gradients, by operations that have them."""
    wanted = _wanted(posterior, batch)
    if not wanted:
        raise InvalidValue(
            "nothing asks for gradients",
            where=WHERE,
            got="inputs with requires_grad=False, and no trainable parameter outside the posterior",
            remedy="Set x.requires_grad_() on inputs of floating-point numbers; parameters of the "
            "posterior are constants",
        )
    found = _gradients(outputs, wanted) if outputs.requires_grad else (None,)
    if all(gradient is None for gradient in found):
        raise UnsupportedUse(
            "the outputs do not depend on x by operations with derivatives",
            where=WHERE,
            got="no path in the graph from the outputs to the inputs that ask for gradients",
            remedy="Take detach, no_grad, rounding and indices out of the model's way from x",
        )


def _wanted(posterior: Posterior, batch: AnyBatch) -> list[Tensor]:
    """Inputs that ask for gradients; without any, the parameters outside the posterior that do."""
    inputs = [tensor for tensor in batch.data if tensor.requires_grad]
    named = posterior.network.model.named_parameters()
    return inputs or [p for name, p in named if p.requires_grad and name not in posterior.mode]


def _gradients(outputs: Tensor, wanted: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients of a sum; where there are none, an error that says so."""
    try:
        return torch.autograd.grad(outputs.sum(), wanted, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise _underivable(error) from error


def _underivable(error: RuntimeError) -> Exception:
    """The error where autograd has no derivative; others are left as they are."""
    if isinstance(error, KfacLaplaceError) or ran_out_of_memory(error):
        return error
    return UnsupportedUse(
        "a part of the model cannot be differentiated twice, which gradients of covariances take",
        where=WHERE,
        got=str(error).partition("\n")[0],
        remedy="Write its backward pass in differentiable operations; pred_type='nn' needs first "
        "derivatives alone",
    )


def _rows(
    posterior: Posterior, batch: AnyBatch, params: Mapping[str, Tensor]
) -> tuple[Tensor, torch.Size]:
    """Aligned outputs (n, t, c) at `params`, at least float32, and their shape as they are."""
    ggn = posterior.ggn
    output = posterior.network.output(batch.copied(), ggn.knowledge, params)
    return accumulable(ggn.likelihood.align(output, ggn.knowledge.class_axis)), output.shape


def _jacobian(posterior: Posterior, batch: AnyBatch, mean: Tensor) -> dict[str, Tensor]:
    """df/dθ by parameter, shape (t c, n, *shape), in the graph of the inputs.

    Args:
        posterior: the posterior.
        batch: the inputs.
        mean: outputs (n, t, c) of the batch, which examples have to give alone.

    Raises:
        UnsupportedUse: they do not, or the derivatives have none.
    """
    theta = {name: p.detach().requires_grad_() for name, p in posterior.mode_for_model.items()}
    at_once = _vectorised(posterior, batch, theta, mean) if mean.numel() > FEW else None
    return _one_by_one(posterior, batch, theta, mean) if at_once is None else at_once


def _one_by_one(
    posterior: Posterior, batch: AnyBatch, theta: Mapping[str, Tensor], mean: Tensor
) -> dict[str, Tensor]:
    """df/dθ by n t c backward passes; as `_jacobian`."""
    limit = _agreement(mean)
    examples = []
    alone: Iterator[AnyBatch] = batch.split(1)
    for k, one in enumerate(alone):
        f = _rows(posterior, one, theta)[0]
        apart = (f.detach()[0] - mean[k]).abs().max() if f.shape[1:] == mean.shape[1:] else None
        if apart is None or bool(apart > limit):
            raise mixed_examples(float("inf") if apart is None else float(apart))
        by_output = [_parameter_gradients(value, theta) for value in f.flatten()]
        examples.append([torch.stack(rows) for rows in zip(*by_output, strict=True)])
        if k == 0:
            _check_second(examples[0], _wanted(posterior, batch))
    stacked = (torch.stack(rows, 1) for rows in zip(*examples, strict=True))
    return dict(zip(theta, stacked, strict=True))


def _vectorised(
    posterior: Posterior, batch: AnyBatch, theta: Mapping[str, Tensor], mean: Tensor
) -> dict[str, Tensor] | None:
    """df/dθ of all examples by one vectorised pass; None where that is not the same model.

    Models may refuse it, and it passes over hooks on gradients, so that a weighted sum of its rows
    and the slope of that are held against those of a plain backward pass.
    """
    assert isinstance(batch, Batch)  # others are refused
    network, known = posterior.network, posterior.ggn.knowledge

    def alone(params: dict[str, Tensor], *data: Tensor) -> tuple[Tensor, Tensor]:
        x = batch.with_examples([tensor[None] for tensor in data])
        f = _rows(posterior, network.batch(x, 1, known.interface), params)[0].flatten()
        return f, f.detach()

    constants = {name: value.detach() for name, value in theta.items()}
    try:
        with without_trace(network.model), own_warnings():
            # A call without a rule of its own runs example by example, as we do then.
            warnings.filterwarnings("error", "There is a performance drop")
            every = vmap(jacrev(alone, has_aux=True), (None, *[0] * len(batch.data)))
            rows, f = every(constants, *batch.data)
    except Exception as error:  # models raise what they like; one by one an error of theirs comes
        if ran_out_of_memory(error):
            raise
        return None
    if f.shape != mean.flatten(1).shape or bool(
        (f - mean.flatten(1)).abs().max() > _agreement(mean)
    ):
        return None
    found = {name: accumulable(value.movedim(0, 1)) for name, value in rows.items()}
    return found if _as_by_autograd(posterior, batch, theta, found) else None


def _as_by_autograd(
    posterior: Posterior,
    batch: AnyBatch,
    theta: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
) -> bool:
    """Whether Σ w J and its slope in what asks for gradients are those of a plain backward pass."""
    f = _rows(posterior, batch, theta)[0]
    weights = _unequal(f)
    by_rows = weights.flatten(1).mT  # (t c, n)
    wanted = _wanted(posterior, batch)
    try:
        plain = torch.autograd.grad(
            (weights * f).sum(), list(theta.values()), create_graph=True, materialize_grads=True
        )
        sums = [torch.tensordot(by_rows, rows, 2) for rows in found.values()]
        slopes = [
            torch.autograd.grad(
                sum((_unequal(g) * g).sum() for g in gradients) + 0 * f.sum(),
                wanted,
                retain_graph=True,
                materialize_grads=True,
            )
            for gradients in (plain, sums)
        ]
    except RuntimeError as error:
        if ran_out_of_memory(error):
            raise
        return False
    pairs = [*zip(sums, plain, strict=True), *zip(*slopes, strict=True)]
    return all(bool((a - b).abs().max() <= _agreement(b)) for a, b in pairs)


def _agreement(values: Tensor) -> Tensor:
    """How far numbers computed in two ways may be apart: half the digits of their largest."""
    eps = torch.finfo(values.dtype).eps
    return eps**0.5 * values.detach().abs().max().clamp_min(1)


def _unequal(like: Tensor) -> Tensor:
    """Weights of a sum in which no two entries are exchangeable, from -1 to 1."""
    places = torch.arange(1, like.numel() + 1, dtype=torch.float64, device="cpu")
    return (places * 2.399963).sin().to(like).reshape(like.shape)


def _parameter_gradients(value: Tensor, theta: Mapping[str, Tensor]) -> list[Tensor]:
    """Gradients of one output, in the graph."""
    try:
        found = torch.autograd.grad(
            value, list(theta.values()), create_graph=True, materialize_grads=True
        )
    except RuntimeError as error:
        raise _underivable(error) from error
    return [accumulable(gradient) for gradient in found]


def _check_second(rows: list[Tensor], wanted: list[Tensor]) -> None:
    """Raise where gradients of one example have no derivative: later it would be torch's error."""
    some = [gradient.sum() for gradient in rows if gradient.requires_grad]
    if not some:
        return
    total = torch.stack(some)
    _gradients(total, wanted)
    # torch's own error sits at a leaf of its own, where a search for gradients in x never comes.
    if any(node.name().endswith("::Error") for node in all_nodes(total.grad_fn)):
        raise _underivable(RuntimeError("a backward pass marked once_differentiable"))


def _head(posterior: Posterior, batch: AnyBatch) -> set[str]:
    """Names of the groups of the layer that is used last, by a recorded pass of one example."""
    assert isinstance(batch, Batch)  # others are refused
    network, alone = posterior.network, next(batch.split(1))
    x = alone.with_examples([tensor.detach() for tensor in alone.data])
    one = network.batch(x, 1, posterior.ggn.knowledge.interface)
    passed = network.record(one, posterior.ggn.knowledge, posterior.mode_for_model)
    return used_last(passed, posterior.ggn.groups)


def _matrices(
    posterior: Posterior, found: Mapping[str, Tensor]
) -> Iterator[tuple[str | None, BlockNormal, Tensor]]:
    """Each group's name and posterior with gradients (v, n, b, o, i); no name for all in one."""
    ggn = posterior.ggn
    if (whole := ggn.options.one_block) is not None:
        entries = ggn.knowledge.entries.items()
        flat = torch.cat([each.take(found[name]) for name, each in entries], -1)
        yield None, block_normal(posterior, whole, flat), flat[:, :, None, None]
        return
    for group in ggn.groups:
        packed = group.block_layout.pack(found)
        yield group.name, block_normal(posterior, group.name, packed), packed
