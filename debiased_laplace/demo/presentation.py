"""Tables, figure and report of the demo."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from debiased_laplace.calibration import CalibrationReport, Estimate, ReportFigure, ReportTable
from debiased_laplace.calibration.evaluate import evaluate
from debiased_laplace.demo.comparison import (
    PRIOR_PRECISION,
    Distance,
    distances,
    fit_posteriors,
    inflation,
    predict,
    total_variations,
)
from debiased_laplace.demo.digits import EPOCHS, N_CURVATURE, N_HELD_OUT, N_TRAIN, WRONG_LABELS, Digits, load, train
from debiased_laplace.posterior.laplace import DebiasedParametricLaplace

SHOWN_DIRECTIONS = ((0, 1), (1, 3), (3, 10), (10, 30), (30, 100))

DESCRIPTION = f"""
A convolutional network of 3,254 parameters, trained on {N_TRAIN:,} images of scikit-learn's digits with
{WRONG_LABELS:.0%} of the labels replaced at random. The curvature of two posteriors is estimated on the same
{N_CURVATURE} training images: same_batch uses all of them for directions and magnitudes, debiased uses one half for
directions and the other for magnitudes. The full batch uses all training images.

All have prior precision {PRIOR_PRECISION:g}, a diagonal for the curvature outside the directions, and linearized
predictions with the mean-field link. The test labels are correct. The out-of-distribution images are the test images
with permuted pixels.
""".strip()


def run(
    out: Path,
    seed: int,
    device: torch.device,
    *,
    epochs: int = EPOCHS,
    print_line: Callable[[str], None] = print,
) -> CalibrationReport:
    """Run the demo: train a network, fit and compare posteriors, save the report.

    Args:
        out: folder of the report; created if missing.
        seed: seed of the data split, the wrong labels, the training and the posteriors.
        device: device of the computation.
        epochs: number of training epochs.
        print_line: called with each line of output.

    Returns:
        The report, saved as HTML, JSON and Markdown.
    """
    data = load(seed)
    model = train(data, seed, device, epochs)
    print_line(f"Trained a CNN on {N_TRAIN:,} digits with {WRONG_LABELS:.0%} wrong labels; fitting three posteriors …")
    posteriors = fit_posteriors(model, data, seed)
    variations = total_variations(predict(model, posteriors, data.test_inputs.to(device)))
    print_line("Predicting, and computing distances from the full batch …")
    report = report_on(model, posteriors, data, seed=seed, device=device)
    distance = distances(posteriors, report.posteriors)
    report = replace(report, tables=(table_of(report.metrics, distance, variations), *report.tables))
    for shown in report.tables:
        print_line(f"\n{shown.title}\n{text_of(shown)}\n{shown.note}")
    paths = report.save(out, formats=("html", "json", "md"))
    print_line("\nReport: " + ", ".join(str(path) for path in paths))
    return report


def report_on(
    model: nn.Module,
    posteriors: dict[str, DebiasedParametricLaplace],
    data: Digits,
    *,
    seed: int,
    device: torch.device,
) -> CalibrationReport:
    """Evaluate the network and its posteriors on the test images and on the out-of-distribution images."""
    batches = {name: DataLoader(d, batch_size=200) for name, d in (("test", data.test), ("held out", data.held_out))}
    fitted = {name: data.train if name == "full batch" else data.curvature for name in posteriors}
    full = posteriors["full batch"]
    ratios = {name: inflation(posteriors[name], full) for name in ("same_batch", "debiased")}
    return evaluate(
        {"MAP": model, **posteriors},
        batches["test"],
        task="multiclass",
        baseline="MAP",
        seed=seed,
        ood_loaders={"scrambled digits": data.scrambled.split(200)},
        held_out_loader=batches["held out"],
        fitted_loader={name: DataLoader(d, batch_size=200) for name, d in fitted.items()},
        progress_bar=sys.stderr.isatty(),
        title="Digits: MAP and three Laplace posteriors",
        description=DESCRIPTION,
        metadata={"device": str(device), "prior_precision": PRIOR_PRECISION},
        tables=(inflation_table(ratios),),
        figures=(inflation_figure(ratios),),
    )


def table_of(
    metrics_of: Mapping[str, Mapping[str, Estimate]],
    distance: dict[str, Distance],
    variations: dict[str, float],
) -> ReportTable:
    """Return the table of test metrics and of distances from the full batch."""
    rows = []
    for name, metrics in metrics_of.items():
        kl = distance.get(name)
        h = kl.estimated if kl else None
        estimated = f"{h.difference:.0f} ± {h.standard_error:.0f}" if h else "–"
        if name != "MAP" and kl is None:
            continue  # methods added by the report
        rows.append(
            (
                name,
                f"{metrics['accuracy'].value:.3f}",
                f"{metrics['nll'].value:.3f}",
                f"{metrics['brier'].value:.3f}",
                f"{metrics['ece'].value:.3f} ({metrics['ece_noise_floor'].value:.3f})",
                estimated,
                f"{max(kl.true, 0.0):.0f}" if kl else "–",
                f"{variations[name]:.3f}" if kl else "–",
            )
        )
    columns = ("", "accuracy", "NLL", "Brier", "ECE (floor)", "held-out KL", "KL to full batch", "TV to full batch")
    note = (
        f"KL in nats over the parameters. The held-out KL, with that of the full batch subtracted, estimates the next "
        f"column from {N_HELD_OUT} training samples outside the curvature batch. TV: mean total variation between the "
        "predicted probabilities."
    )
    return ReportTable("Four methods", columns, rows, note)


def inflation_table(ratios: Mapping[str, Tensor]) -> ReportTable:
    """Return the table of the ratios of curvature used to full-batch curvature, by position in the spectrum."""
    rows = []
    for start, stop in SHOWN_DIRECTIONS:
        position = f"{start + 1}" if stop == start + 1 else f"{start + 1}–{stop}"
        rows.append((position, *(f"{ratio[start:stop].mean():.2f}" for ratio in ratios.values())))
    note = (
        "1 is correct. Leading directions of a batch have a larger curvature on that batch than on all data (above 1); "
        "magnitudes from other samples are independent of the batch's noise."
    )
    return ReportTable("Curvature used / full-batch curvature", ("direction", *ratios), rows, note)


def inflation_figure(ratios: Mapping[str, Tensor]) -> ReportFigure:
    """Return the figure of these ratios by direction."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    shown = SHOWN_DIRECTIONS[-1][1]
    for name, colour, marker in (("same_batch", "#D55E00", "o"), ("debiased", "#0072B2", "s")):
        ratio = ratios[name][:shown].cpu()
        index = torch.arange(1, len(ratio) + 1)
        axes.plot(index, ratio, marker, color=colour, markersize=4, label=name)
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("direction, by decreasing curvature")
    axes.set_ylabel("curvature used / full batch")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    means = [float(ratios[name][:10].mean()) for name in ("same_batch", "debiased")]
    alt = (
        "Curvature used over full-batch curvature along the leading directions, on logarithmic axes. Over the first "
        f"ten directions the mean ratio is {means[0]:.2f} for same_batch and {means[1]:.2f} for debiased."
    )
    return ReportFigure.from_matplotlib(
        "Inflated curvatures", figure, alt=alt, note="One draw of the curvature batch; the line at 1 is the full batch."
    )


def text_of(table: ReportTable) -> str:
    """Format a table for a terminal."""
    lines = [[str(c) for c in table.columns], *([str(c) for c in row] for row in table.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
