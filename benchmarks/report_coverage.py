"""How honest a calibration report is: coverage of its intervals, size and power of its verdicts.

    python -m benchmarks.report_coverage                    # about ten minutes on one core
    python -m benchmarks.report_coverage --repetitions 50   # a quick look

Labels are drawn from the softmax of random logits, and the methods that are judged know these logits times a factor:
1 is calibrated, 1.1 slightly and 1.6 strongly over-confident. "Sure" logits are four times as wide, so that most
predictions are nearly certain and a few surprises make up the loss. What an interval should contain is known in closed
form, or from two million samples. docs/calibration_reports.md shows the tables.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from math import log, pi, sqrt

import torch
from torch import Tensor
from tqdm import tqdm

from debiased_laplace.calibration.comparisons import compare_methods
from debiased_laplace.calibration.contents import Estimate
from debiased_laplace.calibration.inputs import Settings
from debiased_laplace.calibration.intervals import (
    Units,
    estimate_mean,
    estimate_root_mean,
    estimate_share,
    estimate_skewed_mean,
)
from debiased_laplace.calibration.metrics.binned import BinnedConfidences, check_consistency, estimate_debiased_error
from debiased_laplace.calibration.metrics.classification import brier_score, negative_log_likelihood, scores_of
from debiased_laplace.calibration.probabilities import (
    ClassificationPredictions,
    Probabilities,
    reduce_classification,
)
from debiased_laplace.calibration.regression import read_regression
from debiased_laplace.calibration.scaling import ScalingRequest, scale_classification

LEVEL = 0.95
SIZES = (200, 1000, 5000)
FAMILIES = {"calibrated": (1.0, 1.5), "x 1.1": (1.1, 1.5), "x 1.6": (1.6, 1.5), "sure, x 1.6": (1.6, 6.0)}
NOISE = 0.7  # of the logits of the method that a family is compared with
N_CLASSES, N_BINS, HUGE, PORTION = 10, 15, 2_000_000, 100_000
SCALES = {"calibrated": 1.0, "x 1.1": 1.1, "x 1.6": 1.6}  # true errors in predicted standard deviations


def draw(n: int, width: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels drawn from them, and the same logits with noise."""
    z = width * torch.randn(n, N_CLASSES, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(z.softmax(dim=1), 1, generator=generator)[:, 0]
    return z, labels, z + NOISE * torch.randn(z.shape, generator=generator, dtype=z.dtype)


def read(logits: Tensor, labels: Tensor) -> ClassificationPredictions:
    return reduce_classification(Probabilities(logits.softmax(dim=1)), labels, n_bins=N_BINS)


def estimate(p: ClassificationPredictions, units: Units) -> dict[str, Estimate]:
    """The estimates of a report that have intervals, and one that it could have had."""
    loss = negative_log_likelihood(p)
    return {
        "nll": estimate_skewed_mean(loss, units),
        "nll, normal interval": estimate_mean(loss, units),
        "brier": estimate_skewed_mean(brier_score(p), units),
        "accuracy": estimate_share(p.correct, units),
        "confidence_gap": estimate_mean(p.confidence - p.correct, units),
        "rmsce2_debiased": estimate_debiased_error(BinnedConfidences(p.confidence, p.correct, N_BINS), units),
    }


def find_truth(factor: float, width: float) -> dict[str, float]:
    """What two million samples say, and the differences to the noisy method."""
    generator = torch.Generator().manual_seed(99)
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    for _ in range(HUGE // PORTION):
        z, labels, noisy = draw(PORTION, width, generator)
        for name, logits in (("a", factor * z), ("b", noisy)):
            p = logits.softmax(dim=1)
            confidence, predicted = p.max(dim=1)
            correct = (predicted == labels).double()
            true = p.gather(1, labels[:, None])[:, 0]
            cell = (confidence * N_BINS).long().clamp(max=N_BINS - 1)
            found = {
                "nll": -logits.log_softmax(dim=1).gather(1, labels[:, None]).sum(),
                "brier": (p.square().sum(dim=1) - 2 * true + 1).sum(),
                "accuracy": correct.sum(),
                "confidence_gap": (confidence - correct).sum(),
                "n": torch.bincount(cell, minlength=N_BINS).double(),
                "surplus": torch.bincount(cell, weights=correct - confidence, minlength=N_BINS),
            }
            for key, value in found.items():
                sums[name + key] = sums[name + key] + value
    whole = {k: (v / HUGE).item() for k, v in sums.items() if v.ndim == 0}
    for name in "ab":
        whole[f"{name}rmsce2_debiased"] = (
            (sums[f"{name}surplus"].square() / sums[f"{name}n"].clamp_min(1)).sum() / HUGE
        ).item()
        whole[f"{name}error"] = 1 - whole[f"{name}accuracy"]
    truth = {k[1:]: v for k, v in whole.items() if k[0] == "a"}
    truth["nll, normal interval"] = truth["nll"]
    for metric in ("nll", "brier", "error", "rmsce2_debiased"):
        truth[f"difference of {metric}"] = whole[f"a{metric}"] - whole[f"b{metric}"]
    return truth


def cover_classification(n: int, family: str, truth: dict[str, float], repetitions: int) -> dict[str, float]:
    """Share of intervals that contain the truth."""
    factor, width = FAMILIES[family]
    units = Units(n, LEVEL)
    hits: dict[str, list[bool]] = defaultdict(list)
    for repetition in range(repetitions):
        generator = torch.Generator().manual_seed(1000 * n + repetition)
        z, labels, noisy = draw(n, width, generator)
        one, other = read(factor * z, labels), read(noisy, labels)
        for name, e in estimate(one, units).items():
            if e.low is not None and e.high is not None:
                hits[name].append(e.low <= truth[name] <= e.high)
        scores = {name: scores_of(p, units, n_bins=N_BINS) for name, p in (("b", other), ("a", one))}
        for c in compare_methods(scores, ("b",), units):
            hits[f"difference of {c.metric}"].append(c.low <= truth[f"difference of {c.metric}"] <= c.high)
    return {name: sum(found) / len(found) for name, found in hits.items()}


def cover_regression(n: int, family: str, repetitions: int) -> dict[str, float]:
    """The same for Gaussian predictions, whose truth has closed forms."""
    s = SCALES[family]
    mean_log = 1.5 * log(1.5) - 0.5 * log(0.5) - 1  # of a deviation that is uniform between 0.5 and 1.5
    truth = {
        "z_scale": s,
        "crps": sqrt(2 / pi) * sqrt(1 + s**2) - 1 / sqrt(pi),
        "nll of regression": log(2 * pi) / 2 + mean_log + s**2 / 2,
    }
    units = Units(n, LEVEL)
    hits: dict[str, list[bool]] = defaultdict(list)
    for repetition in range(repetitions):
        generator = torch.Generator().manual_seed(2000 * n + repetition)
        sigma = 0.5 + torch.rand(n, generator=generator, dtype=torch.float64)
        y = s * sigma * torch.randn(n, generator=generator, dtype=torch.float64)
        p = read_regression("m", (torch.zeros_like(y), sigma), y)
        found = {
            "z_scale": estimate_root_mean(p.z_scores.square()[:, 0], units),
            "crps": estimate_skewed_mean(p.ranked_probability_score[:, 0], units),
            "nll of regression": estimate_skewed_mean(p.negative_log_density, units),
        }
        for name, e in found.items():
            hits[name].append(e.low <= truth[name] <= e.high)
    return {name: sum(found) / len(found) for name, found in hits.items()}


def judge(n: int, width: float, repetitions: int) -> dict[str, float]:
    """How often a verdict falls, after Holm, where none should, and where one should."""
    units = Units(n, LEVEL)
    found: dict[str, list[bool]] = defaultdict(list)
    for repetition in range(repetitions):
        generator = torch.Generator().manual_seed(3000 * n + repetition)
        z, labels, noisy = draw(n, width, generator)
        equal = z + NOISE * torch.randn(z.shape, generator=generator, dtype=z.dtype)
        right = read(z, labels)
        bins = BinnedConfidences(right.confidence, right.correct, N_BINS)
        p_value, _ = check_consistency(bins, Settings(N_BINS, LEVEL, n_resamples=200, seed=repetition))
        found["consistency test rejects right confidences"].append(p_value < 1 - LEVEL)
        verdicts = _verdicts({"a": read(noisy, labels), "b": read(equal, labels)}, units)
        found["any verdict between two equally good methods"].append(bool(set(verdicts.values())))
        over = read(1.6 * z, labels)
        request, settings = ScalingRequest("map", "cross_fitted"), Settings(seed=repetition)
        scaled = scale_classification({"map": over}, request, units, settings, task="multiclass")
        rows = {"map": over, "scaled": scaled.row, "best": right}
        scores = {name: {"nll": negative_log_likelihood(p)} for name, p in rows.items()}
        errors = {"scaled": scaled.fitting_error}
        compared = compare_methods(scores, ("map", "scaled"), units, fitting_errors=errors)
        judged = {(c.method, c.baseline): c.verdict for c in compared}
        found["the best temperature called better than the fitted one"].append(judged["best", "scaled"] == "better")
        for factor in (1.1, 1.3, 1.6):
            verdicts = _verdicts({"a": read(factor * z, labels), "b": right}, units)
            found[f"x {factor} called worse in NLL than x 1"].append(verdicts.get("nll") == "better")
    return {name: sum(hits) / len(hits) for name, hits in found.items()}


def _verdicts(methods: dict[str, ClassificationPredictions], units: Units) -> dict[str, str]:
    """Metric to verdict on the second method against the first, where there is one."""
    scores = {name: scores_of(p, units, n_bins=N_BINS) for name, p in methods.items()}
    found = compare_methods(scores, [next(iter(methods))], units)
    return {c.metric: c.verdict for c in found if c.verdict != "no detectable difference"}


def tabulate(columns: list[str], cells: dict[str, dict[str, float]]) -> Iterator[str]:
    yield f"| | {' | '.join(columns)} |"
    yield "|---|" + "---|" * len(columns)
    for name in dict.fromkeys(name for found in cells.values() for name in found):
        yield f"| {name} | " + " | ".join(f"{cells[c][name]:.1%}" if name in cells[c] else "–" for c in columns) + " |"


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> None:
    """Simulate and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    options = parser.parse_args(arguments)
    covered: dict[str, dict[str, dict[str, float]]] = {family: {} for family in FAMILIES}
    for family in tqdm(FAMILIES, desc="[Intervals]"):
        truth = find_truth(*FAMILIES[family])
        for n in options.sizes:
            covered[family][f"n = {n}"] = cover_classification(n, family, truth, options.repetitions)
            if family in SCALES:
                covered[family][f"n = {n}"] |= cover_regression(n, family, options.repetitions)
    for family, cells in covered.items():
        say(f"\n{family}: share of {LEVEL:.0%} intervals that contain the truth\n")
        say("\n".join(tabulate(list(cells), cells)))
    sizes = {f"n = {n}": judge(n, 1.5, options.repetitions) for n in tqdm(options.sizes, desc="[Verdicts]")}
    say("\nVerdicts and tests at the level of 5 %\n")
    say("\n".join(tabulate(list(sizes), sizes)))
    error = sqrt(LEVEL * (1 - LEVEL) / options.repetitions)
    say(f"\n{options.repetitions} repetitions: 95 % and 5 % are known to ±{2 * error:.1%}.")


if __name__ == "__main__":
    main()
