"""How biased the quadratic of a mini-batch is for a given model, and what debiasing would change."""

from debiased_laplace.diagnosis.diagnose import diagnose
from debiased_laplace.diagnosis.diagnosis import Diagnosis
from debiased_laplace.diagnosis.findings import BatchFindings, Ratio

__all__ = ["BatchFindings", "Diagnosis", "Ratio", "diagnose"]
