"""Test data as the mode, temperature scaling and the posterior predict them, side by side."""

from kfac_laplace.report.bootstrap import Bootstrap as Bootstrap
from kfac_laplace.report.compare import Question as Question
from kfac_laplace.report.compare import compare as compare
from kfac_laplace.report.document import Report as Report
from kfac_laplace.report.document import check_suffix as check_suffix
