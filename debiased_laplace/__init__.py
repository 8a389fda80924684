"""Post-hoc Laplace uncertainty whose curvature is not biased by the mini-batch it was measured on."""

import warnings

with warnings.catch_warnings():
    # laplace-torch's own imports still use torch.jit.script, a dozen times
    warnings.filterwarnings("ignore", message="`torch.jit.script")
    from debiased_laplace.calibration import CalibrationReport, calibration_report
    from debiased_laplace.calibration.evaluate import evaluate
    from debiased_laplace.curvature.likelihood import Likelihood
    from debiased_laplace.diagnosis import diagnose
    from debiased_laplace.linalg.conjugate_gradients import conjugate_gradients
    from debiased_laplace.newton.optimizer import DebiasedNewton
    from debiased_laplace.newton.step import newton_step
    from debiased_laplace.posterior.factory import DebiasedLaplace
    from debiased_laplace.posterior.held_out_kl import held_out_kl
    from debiased_laplace.quadratics.directional_derivatives import directional_derivatives
    from debiased_laplace.quadratics.quadratic import quadratic_along
    from debiased_laplace.quadratics.regularizer import Regularizer

__all__ = [
    "CalibrationReport",
    "DebiasedLaplace",
    "DebiasedNewton",
    "Likelihood",
    "Regularizer",
    "calibration_report",
    "conjugate_gradients",
    "diagnose",
    "directional_derivatives",
    "evaluate",
    "held_out_kl",
    "newton_step",
    "quadratic_along",
]
