"""Calibration reports: how well methods know what they do not know, with honest error bars."""

from debiased_laplace.calibration.comparisons import Comparison
from debiased_laplace.calibration.contents import ReportFigure, ReportTable
from debiased_laplace.calibration.estimates import Estimate
from debiased_laplace.calibration.posteriors.summaries import PosteriorSummary
from debiased_laplace.calibration.predictions.forms import Gaussian, Samples
from debiased_laplace.calibration.report import CalibrationReport, calibration_report

__all__ = [
    "CalibrationReport",
    "Comparison",
    "Estimate",
    "Gaussian",
    "PosteriorSummary",
    "ReportFigure",
    "ReportTable",
    "Samples",
    "calibration_report",
]
