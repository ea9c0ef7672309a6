"""Errors of the model arrive once, as they are; only another order in memory is worth a new run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kfac_laplace import Curvature, Laplace, MarglikTuner
from kfac_laplace.errors import InvalidType, UnsupportedUse

CPU = "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12 (Cannot allocate memory)"  # noqa: E501 # torch's own
MEMORY = {
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    "old name": lambda: torch.cuda.OutOfMemoryError("no room"),
    "CPU": lambda: RuntimeError(CPU),
    "CPU, another build": lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you ..."),
    "driver": lambda: RuntimeError("CUDA error: out of memory"),
    "library": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`"),
    "MPS": lambda: RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    "Python": lambda: MemoryError("no room"),
}
OTHERS = {
    "runtime": lambda: RuntimeError("no"),
    "value": lambda: ValueError("no"),
    "type": lambda: TypeError("no"),
    "own": lambda: Broken("no"),
    "not implemented": lambda: NotImplementedError("no"),
}
STOPS = {"interrupt": KeyboardInterrupt, "exit": SystemExit, "generator": GeneratorExit}


class Broken(Exception):
    """What a user's model may throw."""


class Failing(nn.Module):
    """Raises in its forward pass or in its backward pass, at images or at vectors."""

    def __init__(self, error: BaseException | None, images: bool, where: str = "forward"):
        super().__init__()
        first = nn.Conv2d(2, 4, 3) if images else nn.Linear(5, 4)
        self.layers = nn.Sequential(first, nn.Tanh(), nn.Flatten())
        self.head = nn.Linear(64 if images else 4, 2)
        self.error, self.where, self.calls, self.backwards = error, where, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.layers(x)
        if self.where == "forward":
            self.fail()
        elif self.where == "after":
            h.register_hook(self.on_the_way_back)
        else:
            h = Backwards.apply(h, self)
        return self.head(h)

    def on_the_way_back(self, grad: Tensor) -> None:
        self.backwards += 1
        self.fail()

    def fail(self) -> None:
        if self.error is not None:
            raise self.error


class Backwards(torch.autograd.Function):
    """The identity, with a derivative that may fail."""

    @staticmethod
    def forward(ctx, h, model):
        ctx.model = model
        return h.view_as(h)

    @staticmethod
    def backward(ctx, grad):
        ctx.model.on_the_way_back(grad)
        return grad, None


def batch(images: bool) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 2, 6, 6) if images else torch.randn(6, 5), torch.arange(6) % 2


def raised(model: nn.Module, images: bool) -> BaseException:
    """What a fit raises, checked to be what the model raised, once."""
    with pytest.raises(type(model.error)) as caught:
        Laplace(model).fit([batch(images)])
    assert caught.value is model.error
    assert caught.value.__context__ is None and caught.value.__cause__ is None
    assert caught.traceback[-1].name == "fail"
    return caught.value


@pytest.mark.parametrize("where", ["forward", "after", "backward"])
@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("kind", MEMORY)
def test_a_model_that_ran_out_of_memory_is_not_run_again(kind, images, where):
    model = Failing(MEMORY[kind](), images, where)
    raised(model, images)
    # Hooks and functions of the model's own forbid another order: it has run without it then.
    assert model.calls == (2 if images and where != "forward" else 1)
    assert model.backwards == (where != "forward")


@pytest.mark.parametrize("how", ["cause", "context"])
def test_memory_that_ran_out_below_another_error(how):
    def fail() -> None:
        try:
            raise RuntimeError(CPU)
        except RuntimeError as error:
            if how == "cause":
                raise Broken("layer 3 failed") from error
            raise Broken("layer 3 failed")  # noqa: B904 # as users write it

    model = Failing(None, True)
    model.fail = fail
    with pytest.raises(Broken, match="layer 3"):
        Laplace(model).fit([batch(True)])
    assert model.calls == 1


@pytest.mark.parametrize("where", ["forward", "after", "backward"])
@pytest.mark.parametrize("kind", OTHERS)
def test_errors_at_vectors_come_from_one_run(kind, where):
    """No convolution has changed the order of anything."""
    model = Failing(OTHERS[kind](), False, where)
    raised(model, False)
    assert (model.calls, model.backwards) == (1, int(where != "forward"))


@pytest.mark.parametrize("kind", OTHERS)
def test_errors_at_images_come_from_the_run_in_the_models_own_order(kind):
    model = Failing(OTHERS[kind](), True)
    raised(model, True)
    assert model.calls == 2


@pytest.mark.parametrize("where", ["forward", "after", "backward"])
@pytest.mark.parametrize("kind", STOPS)
def test_what_is_no_error_goes_through(kind, where):
    model = Failing(STOPS[kind](), True, where)
    raised(model, True)
    assert model.calls == (1 if where == "forward" else 2)


ORDERS = {
    "one channel": lambda: torch.randn(6, 1, 6, 6),
    "channels last": lambda: torch.randn(6, 2, 6, 6).to(memory_format=torch.channels_last),
    "one image": lambda: torch.randn(1, 2, 6, 6),
    "double": lambda: torch.randn(6, 2, 6, 6).double(),
}


@pytest.mark.parametrize("kind", ORDERS)
def test_images_that_keep_their_order_are_run_once(kind):
    x = ORDERS[kind]()
    model = Failing(RuntimeError("no"), True)
    model.layers[0] = nn.Conv2d(x.shape[1], 4, 3)
    model = model.to(x.dtype)
    with pytest.raises(RuntimeError, match="^no$"):
        Laplace(model).fit([(x, torch.arange(len(x)) % 2)])
    assert model.calls == 1


@pytest.mark.parametrize("images", [False, True])
def test_models_are_called_as_often_as_needed(images):
    """One pass a batch, and none more for the order of images that it does no harm to."""
    model = Failing(None, images)
    data = [batch(images)] * 3
    Curvature(model, "classification").fit(data)
    assert model.calls == 3
    Laplace(model).fit(data)
    assert model.calls == 6
    MarglikTuner(model, "classification", 18).step(data)
    assert model.calls == 9


def test_a_refusal_is_said_after_one_run():
    class Tuple(Failing):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), x

    model = Tuple(None, True)
    with pytest.raises(InvalidType, match="one tensor"):
        Laplace(model).fit([batch(True)])
    assert model.calls == 1


class Mixing(nn.Module):
    """A parameter that needs a pass for each example, in which the model may fail."""

    def __init__(self, error: Exception):
        super().__init__()
        self.w, self.head, self.error = nn.Parameter(torch.randn(5)), nn.Linear(5, 2), error

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1:
            raise self.error
        return self.head(torch.einsum("ni,i->ni", x, self.w.exp()).cumsum(1))


@pytest.mark.parametrize("kind", ["CUDA", "CPU", "Python"])
def test_memory_that_runs_out_at_one_example_is_no_fault_of_the_model(kind):
    model = Mixing(MEMORY[kind]())
    with pytest.raises(type(model.error)) as caught:
        Laplace(model).fit([batch(False)])
    assert caught.value is model.error
    with pytest.raises(UnsupportedUse, match="one example alone"):
        Laplace(Mixing(RuntimeError("no"))).fit([batch(False)])


def test_the_generator_of_labels_stands_where_it_stood():
    model = Failing(None, False)
    curvature = Curvature(model, "classification", fisher="mc").fit([batch(False)])
    before = curvature.generator.get_state()
    model.where, model.error = "after", RuntimeError(CPU)
    with pytest.raises(RuntimeError, match="allocate"):
        curvature.fit([batch(False)])
    assert torch.equal(curvature.generator.get_state(), before) and curvature.n_data == 6
