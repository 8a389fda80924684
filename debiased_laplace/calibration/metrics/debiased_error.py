r"""The squared calibration error without the share that noise adds, and how uncertain it is.

Everything follows from sums per bin, so that leaving one sample out, or one cluster of samples, costs nothing extra:
the standard error is the jackknife's. It needs no draws, and its expectation is never below the true variance.
"""

from math import sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor

from debiased_laplace.calibration.estimates import Estimate, count_units, student_quantile, without_interval
from debiased_laplace.calibration.metrics.binning import BinnedConfidences

CELLS_AT_ONCE = 4_000_000  # clusters times sums times bins held in memory: 32 MB a table


def debiased_squared_error(
    counts: Float[Tensor, "*resamples bins"],
    correct: Float[Tensor, "*resamples bins"],
    confidence: Float[Tensor, "*resamples bins"],
) -> Float[Tensor, "*resamples"]:
    r"""Squared calibration error without the share that sampling noise adds to every bin.

    $\sum_b \frac{n_b}{n} \bigl[(a_b - c_b)^2 - \frac{a_b (1 - a_b)}{n_b - 1}\bigr]$ over bins with
    two predictions or more, $a_b$ and $c_b$ being accuracy and mean confidence. It may be negative.

    Args:
        counts: predictions $n_b$ per bin.
        correct: sum of correct predictions per bin.
        confidence: sum of confidences per bin.

    References:
        Kumar, Liang, Ma (2019), arXiv 1909.10155, section 5.
    """
    return _terms(counts, correct, confidence).sum(dim=-1) / counts.sum(dim=-1)


def clustered_squared_error(sums: Float[Tensor, "*resamples 6 bins"]) -> Float[Tensor, "*resamples"]:
    r"""The same for samples that depend on each other within clusters: the noise taken off is that of cluster sums.

    $\sum_b \frac{n_b}{n} \bigl[\delta_b^2 - \frac{G_b}{G_b - 1} \sum_g (s_{gb} - \delta_b n_{gb})^2 / n_b^2\bigr]$
    over bins that two clusters reach, $s_{gb}$ being the surplus of correct predictions of cluster $g$ over its
    confidences and $\delta_b$ the mean surplus of the bin.

    Args:
        sums: over clusters, of the columns of `tabulate_clusters`.
    """
    n, s, ss, sn, nn, clusters = sums.unbind(dim=-2)
    usable = clusters >= 2
    size, reached = torch.where(usable, n, torch.ones_like(n)), torch.where(usable, clusters, torch.full_like(n, 2.0))
    delta = s / size
    noise = reached / (reached - 1) * (ss - 2 * delta * sn + delta.square() * nn) / size.square()
    terms = torch.where(usable, n * (delta.square() - noise), torch.zeros_like(n))
    return terms.sum(dim=-1) / n.sum(dim=-1)


def tabulate_clusters(bins: BinnedConfidences, clusters: Int[Tensor, " n"]) -> Float[Tensor, "clusters 6 bins"]:
    """Each cluster's samples, surplus, the squares and product of both, and presence, bin by bin."""
    n_clusters = count_units(bins.n, clusters)
    place = clusters * bins.n_bins + bins.bin
    n, s = (
        torch.bincount(place, weights=x, minlength=n_clusters * bins.n_bins).view(n_clusters, bins.n_bins)
        for x in (torch.ones_like(bins.confidence), bins.correct - bins.confidence)
    )
    return torch.stack([n, s, s.square(), s * n, n.square(), (n > 0).to(n.dtype)], dim=1)


def estimate_debiased_error(
    bins: BinnedConfidences, *, confidence_level: float, clusters: Int[Tensor, " n"] | None = None
) -> Estimate:
    """Debiased squared calibration error with a normal interval from its jackknife deviation.

    Near calibration the deviation is too large by up to a factor of root two, and the interval covers more than it
    promises; the percentiles of a bootstrap miss the truth there.

    Args:
        bins: confidences in bins.
        confidence_level: coverage of the interval.
        clusters: number of each sample's cluster, from 0 on; None where all samples are independent.

    References:
        Efron and Stein (1981), doi:10.1214/aos/1176345462 (the jackknife's deviation is never too small on average).
    """
    value, left_out = _leave_units_out(bins, clusters)
    if left_out is None:
        reason = "no bin holds two predictions" if clusters is None else "no bin holds predictions of two clusters"
        return without_interval(value, bins.n, estimator="debiased", reason=reason)
    units = left_out.numel()
    standard_error = sqrt((units - 1) / units * (left_out - left_out.mean()).square().sum().item())
    half_width = student_quantile(confidence_level, None if clusters is None else units - 1) * standard_error
    words = "debiased, normal interval, jackknife deviation"
    if clusters is not None:
        words = f"debiased by the noise of {units} clusters, jackknife deviation over them"
    return Estimate(value, value - half_width, value + half_width, standard_error, bins.n, words)


def influence_on_debiased_error(
    bins: BinnedConfidences, *, clusters: Int[Tensor, " n"] | None = None
) -> Float[Tensor, " n"] | None:
    """A score of every sample whose mean is the debiased error and whose standard error is the jackknife's.

    Differences of two methods' scores on the same samples make a paired comparison.

    Args:
        bins: confidences in bins.
        clusters: number of each sample's cluster, from 0 on; None where all samples are independent.

    Returns:
        None where no bin holds two independent predictions.
    """
    value, left_out = _leave_units_out(bins, clusters)
    if left_out is None:
        return None
    units = left_out.numel()
    per_unit = bins.n * (units - 1) / units * (left_out.mean() - left_out)
    return value + (per_unit if clusters is None else (per_unit / torch.bincount(clusters))[clusters])


def _leave_units_out(
    bins: BinnedConfidences, clusters: Int[Tensor, " n"] | None
) -> tuple[float, Float[Tensor, " units"] | None]:
    """The debiased error, and that of all but each unit; None for these where no bin holds two units."""
    if clusters is not None:
        total, left_out = _without_each_cluster(bins, clusters)
        return clustered_squared_error(total).item(), left_out if total[-1].max().item() >= 2 else None
    value = debiased_squared_error(bins.counts, bins.sum_per_bin(bins.correct), bins.sum_per_bin(bins.confidence))
    return value.item(), _without_each_sample(bins) if bins.counts.max().item() >= 2 else None


def _without_each_cluster(
    bins: BinnedConfidences, clusters: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "6 bins"], Float[Tensor, " clusters"]]:
    """Sums over all clusters, and the debiased error of all but each."""
    n_clusters = count_units(bins.n, clusters)
    n_bins, parts = bins.n_bins, 6
    total = torch.zeros(parts, n_bins, dtype=torch.float64)
    tables = []
    size = max(1, CELLS_AT_ONCE // (parts * n_bins))
    for first in range(0, n_clusters, size):
        rows = (clusters >= first) & (clusters < first + size)
        part = BinnedConfidences(bins.confidence[rows], bins.correct[rows], bins.bin[rows], n_bins)
        tables.append(tabulate_clusters(part, clusters[rows] - first))
        total += tables[-1].sum(dim=0)
    return total, torch.cat([clustered_squared_error(total - table) for table in tables])


def _terms(
    counts: Float[Tensor, "*cells"], correct: Float[Tensor, "*cells"], confidence: Float[Tensor, "*cells"]
) -> Float[Tensor, "*cells"]:
    """Each bin's part of the debiased error, times n."""
    usable = counts >= 2
    size = torch.where(usable, counts, torch.full_like(counts, 2.0))
    a, c = correct / size, confidence / size
    noise = a * (1 - a) / (size - 1)
    return torch.where(usable, counts * ((a - c).square() - noise), torch.zeros_like(counts))


def _without_each_sample(bins: BinnedConfidences) -> Float[Tensor, " n"]:
    """The debiased error of the other samples: only the bin of the one that is left out changes."""
    sums = bins.counts, bins.sum_per_bin(bins.correct), bins.sum_per_bin(bins.confidence)
    terms = _terms(*sums)
    counts, correct, confidence = (x[bins.bin] for x in sums)
    without = _terms(counts - 1, correct - bins.correct, confidence - bins.confidence)
    return (terms.sum() - terms[bins.bin] + without) / max(1, bins.n - 1)
