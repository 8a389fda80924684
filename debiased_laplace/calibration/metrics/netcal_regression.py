"""netcal's errors of regression, called so that it neither fails nor rounds."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from debiased_laplace.calibration.predictions.regression import RegressionPredictions

SPREAD_BINS = 10  # netcal's own default
QUANTILE_LEVELS = tuple(k / 20 for k in range(1, 20))  # of central intervals, for the quantile calibration errors


@dataclass(frozen=True, eq=False)
class NetcalErrors:
    """One value per output.

    Attributes:
        ence: expected normalised calibration error, NaN where the standard deviation is constant.
        uce: uncertainty calibration error in squared units of the targets, NaN there too.
        m_qce: marginal quantile calibration error, averaged over `QUANTILE_LEVELS`.
        c_qce: the same within bins of the standard deviation, NaN where that is constant.
    """

    ence: Float[Tensor, " d"]
    uce: Float[Tensor, " d"]
    m_qce: Float[Tensor, " d"]
    c_qce: Float[Tensor, " d"]

    def output(self, j: int) -> "NetcalErrors":
        """The values of one output."""
        return NetcalErrors(*(x[j : j + 1] for x in (self.ence, self.uce, self.m_qce, self.c_qce)))


def measure_with_netcal(predictions: RegressionPredictions, is_constant: Bool[Tensor, " d"]) -> NetcalErrors:
    r"""All four from float64 arrays, without reduction over levels, on outputs that have something to bin.

    netcal raises where all standard deviations are equal, so constant outputs are left out. Errors are given to it in
    units of the output's mean standard deviation, with mean 0: large means would cost digits. The quantile errors get
    $\Phi^{-1}$ of the probability transform for the error, which is the z-score of a Gaussian and makes netcal's
    Gaussian intervals those of any other predictive.

    References:
        Levi, Gispan, Giladi, Fetaya (2022), doi:10.3390/s22155540 (ENCE);
        Laves, Ihler, Fast, Kahrs, Ortmaier (2021), arXiv 2104.12376 (UCE);
        Küppers, Schneider, Haselhoff (2022), arXiv 2207.01242 (M-QCE, C-QCE).
    """
    from netcal.metrics.regression import ENCE, QCE, UCE  # two seconds that only a report costs

    scale = predictions.standard_deviation.mean(dim=0)
    std = (predictions.standard_deviation / scale).numpy()
    error = (predictions.errors / scale).numpy()
    transformed = predictions.normal_scores.numpy() * std
    levels, zero = np.array(QUANTILE_LEVELS), np.zeros_like(std)
    m_qce = QCE(bins=SPREAD_BINS, marginal=True).measure((zero, std), transformed, q=levels, reduction="none")
    binned = torch.full((3, std.shape[1]), float("nan"), dtype=torch.float64)
    for j in np.flatnonzero(~is_constant.numpy()):
        one = slice(j, j + 1)
        given = (zero[:, one], std[:, one])
        ence = ENCE(bins=SPREAD_BINS).measure(given, error[:, one])
        uce = UCE(bins=SPREAD_BINS).measure(given, error[:, one]) * scale[j].item() ** 2
        c_qce = QCE(bins=SPREAD_BINS, marginal=False).measure(given, transformed[:, one], q=levels, reduction="none")
        binned[:, j] = torch.tensor([float(ence), float(uce), float(np.mean(c_qce))], dtype=torch.float64)
    return NetcalErrors(binned[0], binned[1], torch.from_numpy(np.mean(m_qce, axis=0)), binned[2])
