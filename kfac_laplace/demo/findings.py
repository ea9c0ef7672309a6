"""What the demo finds."""

from dataclasses import dataclass

from kfac_laplace.demo.classification import Outcome, Result
from kfac_laplace.demo.regression import Band, RegressionOutcome
from kfac_laplace.demo.settings import Settings


@dataclass(frozen=True)
class Findings:
    """All that a run measured.

    Attributes:
        settings: what was run.
        outcomes: rows of the classification half.
        shown: results of the first seed, with their probabilities and fits, for the pictures.
        regression: rows of the regression half.
        band: the predictive band over body-mass index.
        seconds: wall-clock time of the run.
    """

    settings: Settings
    outcomes: list[Outcome]
    shown: list[Result]
    regression: list[RegressionOutcome]
    band: Band
    seconds: float
