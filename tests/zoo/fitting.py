"""The zoo with its yardsticks and fits, shared by the tests that only look at them."""

from __future__ import annotations

from functools import cache

import pytest
import zoo.models_graphs
import zoo.models_language
import zoo.models_sequences
import zoo.models_vision  # noqa: F401 (each registers its builders)
from zoo.brute_force import Oracle
from zoo.case import BUILDERS, ZooCase, build

from kfac_laplace import Laplace

#: Networks whose like is among the others, or that take longest: their laws are slow tests.
SLOW = frozenset(
    {
        "bert-lora",
        "bert-sequence",
        "bert-token",
        "convnext",
        "gat-graph",
        "gat-node",
        "gin-node",
        "gpt2-language",
        "gpt2-sequence",
        "llama-language",
        "llama-sequence",
        "mobilenet-v3",
        "nfnet",
        "resnet18",
        "swin",
        "t5-language",
        "t5-sequence",
        "transformer-decoder",
        "unet",
    }
)

zoo_law = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in BUILDERS],
)


@cache
def oracle_of(name: str) -> Oracle:
    """A case with its yardsticks, shared by the tests: models are left as they were."""
    return Oracle(build(name))


@cache
def fit(name: str, **options: object) -> Laplace:
    """A posterior fitted batch by batch, shared by the tests that only look at it."""
    return fitted(oracle_of(name).case, **options)


def fitted(case: ZooCase, sizes: tuple[int, ...] | None = None, **options: object) -> Laplace:
    """A posterior of one's own."""
    la = Laplace(case.model, case.likelihood, **case.options, **options)
    return la.fit(case.batches() if sizes is None else case.batches(sizes))
