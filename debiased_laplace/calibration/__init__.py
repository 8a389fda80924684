"""Calibration reports: how well methods know what they do not know, with honest error bars."""

from debiased_laplace.calibration.build import calibration_report
from debiased_laplace.calibration.contents import Comparison, Estimate, PosteriorSummary, ReportFigure, ReportTable
from debiased_laplace.calibration.distributions import Gaussian, Samples
from debiased_laplace.calibration.report import CalibrationReport

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
