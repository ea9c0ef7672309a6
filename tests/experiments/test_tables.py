"""Tables from given lines, by hand."""

from __future__ import annotations

import math

import pytest

from benchmarks.experiments.lines import Line
from benchmarks.experiments.statistics import difference, estimate, together
from benchmarks.experiments.tables import differences, means, summary

# plain and tuned by seed; tuned has a seed of its own, which has no pair
VALUES = {
    ("a", "plain"): {0: 1.0, 1: 2.0, 2: 3.0},
    ("a", "tuned"): {0: 0.9, 1: 1.8, 2: 2.7, 3: 50.0},
    ("b", "plain"): {0: 1.0, 1: 1.0},
    ("b", "tuned"): {0: 1.1, 1: 1.3},
}
LINES = [
    Line({"data": data, "method": method, "seed": seed}, {"nll": value})
    for (data, method), values in VALUES.items()
    for seed, value in values.items()
]


def of(data):
    return [line for line in LINES if line.cell["data"] == data]


def test_standard_errors():
    found = estimate([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3)
    # sum of squares 14/3 over 2, over 3
    assert found.error == pytest.approx(math.sqrt(14 / 3 / 2 / 3))
    assert estimate([]) is None
    one = estimate([2.0])
    assert one.text() == "2.000" and math.isnan(one.error)


def test_differences_are_by_seed():
    found = difference(of("a"), "nll", "tuned", "plain")
    assert (found.count, found.mean) == (3, pytest.approx(-0.2))
    assert found.error == pytest.approx(0.1 / math.sqrt(3))
    assert not found.worse
    assert difference(of("b"), "nll", "tuned", "plain").worse  # 0.2 ± 0.1 is above 0.02
    assert difference(of("a"), "nll", "grid", "plain") is None


def test_together_weighs_groups_alike():
    found = together([estimate([0.0, 2.0]), estimate([5.0, 5.0, 5.0])])
    assert (found.mean, found.error) == (3.0, pytest.approx(0.5))
    assert math.isnan(together([estimate([0.0, 2.0]), estimate([5.0])]).error)
    assert together([]) is None


def test_the_table_of_differences():
    assert differences(LINES, ["data"], "nll", "plain").splitlines() == [
        "| data | tuned |",
        "| --- | --- |",
        "| a | -0.200 ± 0.058 |",
        "| b | **+0.200 ± 0.100** |",
    ]


def test_the_summary_counts_lost_groups():
    assert summary(LINES, ["data"], "nll", ["plain", "grid"]).splitlines() == [
        "| method | − plain | worse | − grid | worse |",
        "| --- | --- | --- | --- | --- |",
        "| plain | – | – | – | – |",
        "| tuned | +0.000 ± 0.058 | 1 of 2 | – | – |",
    ]


def test_the_table_of_means():
    table = means(LINES, ["data"], {"NLL:.2f": "nll", "twice": lambda line: 2 * line.found["nll"]})
    assert table.splitlines() == [
        "| data | method | n | NLL | twice |",
        "| --- | --- | --- | --- | --- |",
        "| a | plain | 3 | 2.00 ± 0.58 | 4.000 ± 1.155 |",
        "| a | tuned | 4 | 13.85 ± 12.06 | 27.700 ± 24.111 |",
        "| b | plain | 2 | 1.00 ± 0.00 | 2.000 ± 0.000 |",
        "| b | tuned | 2 | 1.20 ± 0.10 | 2.400 ± 0.200 |",
    ]
