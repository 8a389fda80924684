"""Calibration reports of several methods on one test set, with confidence intervals and verdicts."""

from debiased_laplace.calibration.build import calibration_report
from debiased_laplace.calibration.contents import Comparison, Estimate, PosteriorSummary, ReportFigure, ReportTable
from debiased_laplace.calibration.counts import Counts
from debiased_laplace.calibration.distributions import Gaussian, Samples
from debiased_laplace.calibration.report import CalibrationReport

__all__ = [
    "CalibrationReport",
    "Comparison",
    "Counts",
    "Estimate",
    "Gaussian",
    "PosteriorSummary",
    "ReportFigure",
    "ReportTable",
    "Samples",
    "calibration_report",
]
