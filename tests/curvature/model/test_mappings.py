"""Mappings as laplace-torch's users have them: entries by name, or the whole of it."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest
import torch
from laws import assert_same_blocks, dense_blocks
from torch import Tensor, nn

from kfac_laplace import Curvature, Laplace, MarglikTuner, marglik_training
from kfac_laplace.errors import InvalidType


class Encoding(UserDict):
    """As tokenizers return it: entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            raise AttributeError(name)
        return self.data[name]


class Attributes(dict):
    """A dict whose attributes are its entries."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.__dict__ = self


class Own(MutableMapping):
    """A mapping that nothing can be said of but that it is one."""

    def __init__(self, first: Any, *, more: Any):
        self._held = dict(first, **more)

    def __getitem__(self, key: str) -> Any:
        return self._held[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._held[key] = value

    def __delitem__(self, key: str) -> None:
        del self._held[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


TYPES = {
    "dict": dict,
    "ordered": OrderedDict,
    "user": UserDict,
    "encoding": Encoding,
    "attributes": Attributes,
    "own": lambda entries: Own(entries, more={}),
}


class Two(nn.Module):
    """Takes two entries by name."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(4, 2)

    def both(self, p: Tensor, q: Tensor) -> Tensor:
        return self.a(p).tanh() + self.b(q)

    def forward(self, p: Tensor, q: Tensor) -> Tensor:
        return self.both(p, q)


class Whole(Two):
    def forward(self, data):
        return self.both(data["p"], data["q"])


class WholeAlone(Two):
    def forward(self, data, /):
        return self.both(data["p"], data["q"])


class WholeOrNot(Two):
    def forward(self, data=None):
        return self.both(data["p"], data["q"])


class WholeAndMore(Two):
    def forward(self, data, scale=1.0, *, flag=False):
        return scale * self.both(data["p"], data["q"])


class ByAttribute(Two):
    def forward(self, data):
        return self.both(data.p, data.q)


class Keywords(Two):
    def forward(self, **entries):
        return self.both(entries["p"], entries["q"])


class FirstAndKeywords(Two):
    def forward(self, p, **entries):
        return self.both(p, entries["q"])


class Optional(Two):
    def forward(self, p=None, q=None, mask=None):
        return self.both(p, q)


class KeywordOnly(Two):
    def forward(self, *, q, p):
        return self.both(p, q)


WHOLE = (Whole, WholeAlone, WholeOrNot, WholeAndMore)
BY_NAME = (Keywords, FirstAndKeywords, Optional, KeywordOnly)


def entries() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    p, q = torch.randn(7, 3).double(), torch.randn(7, 4).double()
    labels = torch.arange(7) % 2
    return [{"p": p[s], "q": q[s], "labels": labels[s]} for s in (slice(4), slice(4, 7))]


def made(kind: type[Two]) -> Two:
    torch.manual_seed(0)
    return kind().double()


def reference() -> dict[str, Tensor]:
    batches = [((e["p"], e["q"]), e["labels"]) for e in entries()]
    return dense_blocks(Curvature(made(Two), "classification").fit(batches))


@pytest.mark.parametrize("of", TYPES)
@pytest.mark.parametrize("kind", [*WHOLE, *BY_NAME])
def test_mappings_reach_the_model_in_the_form_it_takes(kind, of):
    model, loader = made(kind), [TYPES[of](e) for e in entries()]
    assert_same_blocks(dense_blocks(Curvature(model, "classification").fit(loader)), reference(), 0)
    assert sorted(loader[0]) == ["labels", "p", "q"]


@pytest.mark.parametrize("of", ["encoding", "attributes"])
def test_the_whole_keeps_its_attributes(of):
    loader = [TYPES[of](e) for e in entries()]
    la = Laplace(made(ByAttribute)).fit(loader)
    assert_same_blocks(dense_blocks(la.curvature), reference(), 0)
    la(loader[0])


@pytest.mark.parametrize("of", TYPES)
@pytest.mark.parametrize("kind", [Whole, Optional])
def test_everything_takes_mappings(kind, of):
    model, loader = made(kind), [TYPES[of](e) for e in entries()]
    la = Laplace(model).fit(loader)
    x = loader[0]
    pair = (x["p"], x["q"])
    plain = Laplace(made(Two)).fit([((e["p"], e["q"]), e["labels"]) for e in entries()])
    for pred_type in ("glm", "linear", "nn"):
        assert torch.equal(
            la(x, pred_type=pred_type, n_samples=3), plain(pair, pred_type=pred_type, n_samples=3)
        )
    bare = TYPES[of]({"p": x["p"], "q": x["q"]})
    assert torch.equal(la(bare), la(x))
    la.calibrate()
    la.calibrate(loader, method="validation")
    la.optimize_prior("gridsearch", val_loader=loader, grid=[1.0, 2.0])
    tuner = MarglikTuner(model, "classification", 7)
    tuner.loss(*tuner.forward(x)).backward()
    tuner.step(loader)
    marglik_training(model, loader, n_epochs=1)


@pytest.mark.parametrize("kind", [Whole, Optional])
def test_wrapped_models_are_asked_inside(kind):
    model, loader = nn.DataParallel(made(kind)), entries()
    tuner = MarglikTuner(model, "classification", 7)
    tuner.loss(*tuner.forward(loader[0]))
    assert_same_blocks(dense_blocks(Curvature(model, "classification").fit(loader)), reference(), 0)


class HandsOn(nn.Module):
    """As peft wraps a model whose task it is not told."""

    def __init__(self, inside: nn.Module):
        super().__init__()
        self.inside = inside

    def get_base_model(self) -> nn.Module:
        return self.inside

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inside(*args, **kwargs)


@pytest.mark.parametrize("kind", [*WHOLE, *BY_NAME])
def test_wrappers_that_hand_all_on_are_asked_inside(kind):
    for model in (HandsOn(made(kind)), nn.DataParallel(HandsOn(HandsOn(made(kind))))):
        found = dense_blocks(Curvature(model, "classification").fit(entries()))
        assert_same_blocks(
            {name.removeprefix("inside.").removeprefix("inside."): b for name, b in found.items()},
            reference(),
            0,
        )


class KnowsItsTask(HandsOn):
    """A wrapper with names of its own, whatever its inside takes."""

    def forward(self, p: Tensor, q: Tensor) -> Any:
        return self.inside({"p": p, "q": q})


def test_wrappers_with_names_of_their_own_are_asked_themselves():
    Laplace(KnowsItsTask(made(Whole))).fit(entries())


class Needs(Two):
    def forward(self, p, q, mask):
        return self.both(p, q)


class Lacks(Two):
    def forward(self, p, mask=None):
        return self.a(p)


class NoName(Two):
    def forward(self, *inputs):
        return self.both(*inputs)


class TwoInOrder(Two):
    def forward(self, a, b, /):
        return self.both(a, b)


MISFITS = {
    Needs: r"takes \['p', 'q', 'mask'\].*asks for \['mask'\]",
    Lacks: r"takes \['p', 'mask'\].*does not know \['q'\]",
    NoName: r"takes \['\*inputs'\].*does not know \['p', 'q'\]",
    TwoInOrder: r"does not know \['p', 'q'\] and asks for \['a', 'b'\]",
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_mapping_that_fits_no_form_says_who_asks_for_what(kind):
    with pytest.raises(InvalidType, match=r"^x: .*got \['p', 'q'\].*" + MISFITS[kind]) as caught:
        Laplace(made(kind)).fit(entries())
    assert "batch_fn" in str(caught.value) and "forward_fn" in str(caught.value)


class Tensors(Two):
    def forward(self, features):
        return self.a(features[:, :3])


@pytest.mark.parametrize(
    "model",
    [nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2), nn.Tanh()), nn.Sequential(nn.Flatten())],
)
def test_a_model_that_takes_a_tensor_says_that_it_takes_no_mapping(model):
    model = (
        nn.Sequential(model, nn.Linear(2, 2))
        if len([*model.parameters()])
        else nn.Sequential(model, nn.Linear(3, 2))
    )
    with pytest.raises(InvalidType, match=r"neither the entries.*\['x'\].*forward_fn"):
        Laplace(model.double()).fit(
            [{"x": torch.randn(4, 3).double(), "labels": torch.arange(4) % 2}]
        )


def test_errors_of_a_model_that_takes_the_whole_are_its_own():
    class Raises(Two):
        def forward(self, data):
            raise TypeError("no such thing")

    with pytest.raises(TypeError, match="^no such thing$"):
        Laplace(made(Raises)).fit(entries())


def test_a_function_of_ones_own_gets_the_mapping():
    la = Laplace(made(Lacks), forward_fn=lambda m, x: m.both(x["p"], x["q"])).fit(entries())
    assert_same_blocks(dense_blocks(la.curvature), reference(), 0)


class Indexes(Two):
    def forward(self, p):
        return self.a(p["p"])


class IndexesBeside(Two):
    def forward(self, p, **options):
        return self.a(p["p"])


class IndexesAnother(Two):
    def forward(self, x, **options):
        return self.a(x["p"])


def test_a_whole_beside_further_keywords():
    """The one argument that it asks for is no entry: it is the mapping."""
    loader = [{"p": batch["p"], "labels": batch["labels"]} for batch in entries()]
    la = Laplace(made(IndexesAnother)).fit(loader)
    assert la.n_data == sum(len(batch["p"]) for batch in loader)


@pytest.mark.parametrize("kind", [Indexes, IndexesBeside])
def test_a_whole_that_cannot_be_told_from_an_entry(kind):
    """By its signature the model takes an entry by name, and then it asks for more in it."""
    loader = [{"p": batch["p"], "labels": batch["labels"]} for batch in entries()]
    with pytest.raises(InvalidType, match=r"^x: .*as a whole.*forward_fn=lambda") as caught:
        Laplace(made(kind)).fit(loader)
    assert isinstance(caught.value.__cause__, TypeError)
    Laplace(made(kind), forward_fn=lambda model, x: model(x)).fit(loader)


def test_errors_of_a_model_that_takes_an_entry_are_its_own():
    class Raises(Two):
        def forward(self, p):
            raise KeyError("no such thing")

    with pytest.raises(KeyError, match="no such thing"):
        Laplace(made(Raises)).fit(
            [{"p": batch["p"], "labels": batch["labels"]} for batch in entries()]
        )
