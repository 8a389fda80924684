"""Diagnosis of the mini-batch bias of a model, and of what debiasing changes."""

from debiased_laplace.diagnosis.diagnose import diagnose
from debiased_laplace.diagnosis.diagnosis import Diagnosis
from debiased_laplace.diagnosis.findings import BatchFindings, Ratio
from debiased_laplace.diagnosis.row_shares import RowShares

__all__ = ["BatchFindings", "Diagnosis", "Ratio", "RowShares", "diagnose"]
