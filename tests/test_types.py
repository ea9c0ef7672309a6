"""Types of options say what the options' checks say. What checkers make of them: typed_use.py."""

import inspect
from typing import get_args, get_type_hints

import pytest

from kfac_laplace import Laplace, likelihoods
from kfac_laplace.curvature.estimate import fisher
from kfac_laplace.curvature.options import CurvatureKeywords
from kfac_laplace.keywords import LaplaceKeywords
from kfac_laplace.likelihoods.answers import ShowsMean, ShowsOutputs
from kfac_laplace.marglik.tuner import METHODS as TUNED
from kfac_laplace.migration.prior_search import METHODS as SEARCHED
from kfac_laplace.posterior import sharing
from kfac_laplace.posterior.predict.predictor import SAMPLERS, PredType


@pytest.mark.parametrize(
    ("names", "registry"),
    [
        (likelihoods.LikelihoodName, likelihoods.NAMED),
        (fisher.FisherName, fisher.NAMED),
        (sharing.SharingName, sharing.NAMED),
        (PredType, SAMPLERS),
    ],
    ids=["likelihood", "fisher", "prior_structure", "pred_type"],
)
def test_names_are_those_of_the_registry(names, registry):
    assert get_args(names) == tuple(registry)


def test_a_grid_search_is_what_a_tuner_does_not_do():
    assert SEARCHED == (*TUNED, "gridsearch")


@pytest.mark.parametrize("name", likelihoods.NAMED)
def test_answers_are_typed_as_they_are_given(name):
    likelihood = likelihoods.NAMED[name]()
    kind = ShowsOutputs if likelihood.shows_outputs else ShowsMean
    literal, *classes = get_args(kind)
    assert name in get_args(literal) and type(likelihood) in classes


def test_keywords_are_those_of_the_signature():
    hints = get_type_hints(Laplace.__init__)
    keywords = inspect.signature(Laplace).parameters.keys() - {"model", "likelihood"}
    assert get_type_hints(LaplaceKeywords) == {name: hints[name] for name in keywords}


def test_keywords_of_a_curvature_are_those_of_a_posterior():
    own = get_type_hints(LaplaceKeywords)
    shared = get_type_hints(CurvatureKeywords)
    assert shared.keys() <= own.keys()
    for name in shared.keys() - {"subset_of_weights"}:  # a tuner takes no part of a tensor
        assert shared[name] == own[name]
