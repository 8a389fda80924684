"""Selective regression: squared errors of what is kept where the smallest predicted spread is kept first."""

import torch

from debiased_laplace.calibration.estimates import Estimate, without_interval
from debiased_laplace.calibration.metrics.influence import estimate_positive
from debiased_laplace.calibration.metrics.risk_coverage import RankedLosses, rank_losses
from debiased_laplace.calibration.metrics.selective import RiskPoint, SelectionCurves, trace_selection
from debiased_laplace.calibration.predictions.regression import RegressionPredictions

LOSS = "mean squared error"


def measure_selective_regression(
    predictions: RegressionPredictions, *, confidence_level: float
) -> tuple[dict[str, Estimate], SelectionCurves]:
    """Areas and the curve of squared errors by predicted standard deviation.

    Every output is ordered for itself; areas, influences and curves are averaged over them.

    Args:
        predictions: predictive distributions and targets.
        confidence_level: of the intervals.
    """
    errors, deviations = predictions.errors.square(), predictions.standard_deviation
    ranked = [rank_losses(errors[:, j], -deviations[:, j]) for j in range(predictions.n_outputs)]
    metrics = {
        "aurc": _estimate(ranked, [], confidence_level),
        "e_aurc": _estimate(ranked, [r.oracle for r in ranked], confidence_level),
    }
    curves = [trace_selection(r, confidence_level=confidence_level, loss=LOSS, is_share=False) for r in ranked]
    return metrics, curves[0] if len(curves) == 1 else _average(curves)


def _estimate(ranked: list[RankedLosses], oracles: list[RankedLosses], confidence_level: float) -> Estimate:
    """The mean area of the outputs, less that of their oracles where there are any."""
    area = sum(r.area for r in ranked) / len(ranked)
    influence = torch.stack([r.area_influence for r in ranked]).mean(dim=0)
    value = area
    if oracles:
        value -= sum(o.area for o in oracles) / len(oracles)
        influence = influence - torch.stack([o.area_influence for o in oracles]).mean(dim=0)
    if value <= 1e-12 * area:
        why = "there is no error" if area == 0 else "the order is the best there is"
        return without_interval(0.0, ranked[0].n, estimator="statistic of ranks", reason=why)
    losses = torch.stack([r.losses for r in ranked]).mean(dim=0)
    return estimate_positive(value, influence, losses=losses, most=float("inf"), confidence_level=confidence_level)


def _average(curves: list[SelectionCurves]) -> SelectionCurves:
    """The mean of several outputs' curves, which depend on each other and so have no interval together."""
    points = tuple(
        RiskPoint(
            at[0].coverage,
            sum(p.risk for p in at) / len(at),
            None,
            None,
            sum(p.oracle for p in at) / len(at),
        )
        for at in zip(*(c.points for c in curves), strict=True)
    )
    return SelectionCurves(points, (), curves[0].loss)
