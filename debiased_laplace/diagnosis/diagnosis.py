"""Results of a diagnosis, with their summary in sentences, table and figure."""

from dataclasses import dataclass
from functools import cached_property
from math import isfinite, log10
from os import PathLike
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from debiased_laplace.calibration import ReportFigure, ReportTable
from debiased_laplace.diagnosis.findings import MISSING, BatchFindings, Ratio, Z, grouped
from debiased_laplace.diagnosis.row_shares import RowShares
from debiased_laplace.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RELEVANT_BIAS = 0.1
"""Relative bias of the leading curvature; a smaller one changes a standard deviation by less than a twentieth."""

FIRST = slice(0, 1)
OWN_COLOUR, UNBIASED_COLOUR = "#D55E00", "#0072B2"


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Bias of the quadratics of mini-batches for one model; `print` shows it.

    Attributes:
        batches: findings by increasing batch size.
        steps: iterations of conjugate gradients after which the decrease was measured.
        n_draws: draws of each batch size.
        n_reference: samples of each draw for the unbiased values.
        n_data: size N of the data set that the values stand for.
        n_parameters: P.
        curvature: "ggn" or "ef".
        damping: damping of conjugate gradients.
        prior_precision: of the posteriors; None if they were not compared.
        seconds: wall time.
        rows: share of the curvature in its leading rows; None if it is 0.
    """

    batches: tuple[BatchFindings, ...]
    steps: tuple[int, ...]
    n_draws: int
    n_reference: int
    n_data: int
    n_parameters: int
    curvature: str
    damping: float
    prior_precision: float | None
    seconds: float
    rows: RowShares | None = None

    @cached_property
    def enough(self) -> int | None:
        """Smallest batch size from which on the first curvature is not detectably more than a tenth too large.

        None if there is none, or if there is only one draw.
        """
        size = None
        for batch in reversed(self.batches):
            low = batch.leading.ratio(FIRST).low
            if not (isfinite(low) and low < 1 + RELEVANT_BIAS):
                break
            size = batch.batch_size
        return size

    def summary(self) -> str:
        """Summarize the findings in sentences."""
        smallest, largest = self.batches[0], self.batches[-1]
        several = largest is not smallest
        sentences = [
            f"The first curvature of a batch of {smallest.batch_size} is {smallest.leading.ratio(FIRST)} times its "
            f"value on all {grouped(self.n_data)} samples"
            + (f", that of a batch of {largest.batch_size} {largest.leading.ratio(FIRST)} times." if several else "."),
            f"Of the slope along the gradient of a batch of {smallest.batch_size}, a share of "
            f"{smallest.gradient.inverse_ratio()} is real"
            + (f", for {largest.batch_size} samples {largest.gradient.inverse_ratio()}." if several else "."),
        ]
        if not isfinite(largest.leading.ratio(FIRST).low):
            sentences.append("With one draw, the size from which on the excess is a tenth or less cannot be told.")
        elif self.enough is None:
            sentences.append(
                f"Up to batches of {largest.batch_size}, the first curvature is detectably more than a tenth too large."
            )
        else:
            sentences.append(
                f"From batches of {self.enough} on, no excess of the first curvature above a tenth can be detected."
            )
        gains = [(batch.batch_size, batch.posterior) for batch in self.batches if batch.posterior is not None]
        if gains:
            (first, gain), (last, last_gain) = gains[0], gains[-1]
            sentences.append(
                f"Debiasing brings a posterior of prior precision {self.prior_precision:g} closer to the full batch "
                f"by {_mean_and_error(gain)} nats for batches of {first}"
                + (f" and {_mean_and_error(last_gain)} for {last}." if last > first else ".")
                + (" Below zero it takes it further away." if any(float(g.mean()) < 0 for _, g in gains) else "")
            )
        rises = [b.batch_size for b in self.batches if float(b.decrease.unbiased[:, -1].mean()) < 0]
        if rises:
            sizes = ", ".join(map(str, rises))
            sentences.append(
                f"{self.steps[-1]} steps of conjugate gradients on batches of {sizes} raise the quadratic of all data."
            )
        if self.rows is not None:
            sentences.append(str(self.rows))
            if 2 * self.rows.n_for_99 <= self.rows.n_rows:
                sentences.append('A posterior with sampling="curvature" spends its backward passes on such rows.')
        return " ".join(sentences)

    def table(self) -> ReportTable:
        """Return the findings as a table with one row per batch size, for `calibration_report(tables=...)`."""
        last = self.steps[-1]
        columns = [
            "batch",
            "first curvature, own / all data",
            "first ten, own / all data",
            "last tenth, own / all data",
            "real share of the gradient's slope",
            f"decrease promised by {last} CG steps",
            "decrease on all data",
        ]
        with_posterior = any(batch.posterior is not None for batch in self.batches)
        if with_posterior:
            columns.append("nats gained by debiasing")
        rows = []
        for batch in self.batches:
            row = [
                str(batch.batch_size),
                str(batch.leading.ratio(FIRST)),
                str(batch.leading.ratio()),
                str(batch.trailing.ratio()),
                str(batch.gradient.inverse_ratio()),
                _mean_and_error(batch.decrease.own[:, -1]),
                _mean_and_error(batch.decrease.unbiased[:, -1]),
            ]
            if with_posterior:
                row.append(MISSING if batch.posterior is None else _mean_and_error(batch.posterior))
            rows.append(row)
        note = (
            f"Mean over {self.n_draws} draws ± standard error. Values for all data are unbiased estimates from "
            f"{self.n_reference} samples of each draw that are in no batch. Decreases are those of the quadratic model "
            f"of the mean loss, in nats per sample, with damping {self.damping:g}; a negative decrease is a rise."
        )
        if with_posterior:
            note += (
                f" Nats: held-out KL of the posterior with the batch's own curvatures minus that of the cross-fitted "
                f"one, prior precision {self.prior_precision:g}."
            )
        return ReportTable("How biased is a batch?", columns, rows, note)

    def figure(self) -> ReportFigure:
        """Return the findings as a figure, for `calibration_report(figures=...)`."""
        note = "Bars: 95 % intervals over draws. Without bias, ratios are at the black line and decreases coincide."
        if self.rows is not None:
            note += " Scores of rows are estimates of their shares of the curvature."
        return ReportFigure.from_matplotlib("How biased is a batch?", _plot(self), alt=self.summary(), note=note)

    def save_figure(self, path: str | PathLike[str]) -> None:
        """Write the figure to a file, in the format of its suffix."""
        figure = _plot(self)
        with replacing(path) as (part,):
            figure.savefig(part, dpi=130)

    def __str__(self) -> str:
        table = self.table()
        lines = [[str(c) for c in table.columns], *([str(c) for c in row] for row in table.rows)]
        # transposed: eight columns of words are too wide for a terminal
        turned = list(zip(*lines, strict=True))
        widths = [max(len(line[j]) for line in turned) for j in range(len(lines))]
        body = "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in turned
        )
        return f"{self.summary()}\n\n{body}\n\n{table.note}"

    def __repr__(self) -> str:
        sizes = ", ".join(str(b.batch_size) for b in self.batches)
        return f"Diagnosis({self.n_parameters} parameters, batches of {sizes}, {self.n_draws} draws)"


def _mean_and_error(t: Float[Tensor, " d"]) -> str:
    """Format the mean over draws with its standard error."""
    error = f" ± {float(t.std() / len(t) ** 0.5):.2g}" if len(t) > 1 else ""
    return f"{float(t.mean()):.3g}{error}"


def _plot(diagnosis: Diagnosis) -> "Figure":
    """Plot curvatures, slopes and the decrease over the batch size, and the share of the leading rows."""
    from matplotlib.figure import Figure

    height, width = (1, 3) if diagnosis.rows is None else (2, 2)
    figure = Figure(figsize=(3.2 * width, 3.1 * height), layout="constrained")
    curvature, slope, decrease, *of_rows = figure.subplots(height, width).flat
    batches = diagnosis.batches
    sizes = [b.batch_size for b in batches]
    _plot_ratios(curvature, sizes, [b.leading.ratio(FIRST) for b in batches], OWN_COLOUR, "o", "first")
    _plot_ratios(curvature, sizes, [b.leading.ratio() for b in batches], "#E69F00", "s", "first ten")
    trailing = {b.batch_size: b.trailing.ratio() for b in batches}
    trailing = {size: r for size, r in trailing.items() if isfinite(r.value) and r.value > 0}
    if trailing:
        _plot_ratios(curvature, list(trailing), list(trailing.values()), "#009E73", "^", "last tenth")
        curvature.set_yscale("log")
    curvature.set_ylabel("curvature on the batch / all data")
    curvature.set_title("curvature along eigenvectors", fontsize=9)
    _plot_ratios(slope, sizes, [b.gradient.inverse_ratio() for b in batches], UNBIASED_COLOUR, "o", "gradient")
    if all(b.conjugate.own.shape[1] > 2 for b in batches):
        later = [b.conjugate.inverse_ratio(slice(2, None)) for b in batches]
        _plot_ratios(slope, sizes, later, "#CC79A7", "s", "CG directions from the third on")
    slope.set_ylim(top=1.4)  # room for the legend
    slope.set_ylabel("slope on all data / on the batch")
    slope.set_title("slope along chosen directions", fontsize=9)
    _plot_decrease(decrease, diagnosis)
    for axes in (curvature, slope):
        axes.axhline(1.0, color="black", lw=1)
    for axes in (curvature, slope, decrease):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(s) for s in sizes])
        axes.set_xlabel("samples in the batch")
    if diagnosis.rows is not None:
        _plot_rows(of_rows[0], diagnosis.rows)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
    return figure


def _plot_ratios(axes: "Axes", sizes: list[int], ratios: list[Ratio], colour: str, marker: str, label: str) -> None:
    bars = [Z * r.standard_error if isfinite(r.standard_error) else 0.0 for r in ratios]
    axes.errorbar(sizes, [r.value for r in ratios], bars, color=colour, marker=marker, ms=4, lw=1.2, label=label)


def _plot_decrease(axes: "Axes", diagnosis: Diagnosis) -> None:
    def line(kind: Literal["own", "unbiased"]) -> tuple[list[float], list[float]]:
        decreases = [getattr(b.decrease, kind)[:, -1] for b in diagnosis.batches]
        bars = [float(Z * t.std() / len(t) ** 0.5) if len(t) > 1 else 0.0 for t in decreases]
        return [float(t.mean()) for t in decreases], bars

    sizes = [b.batch_size for b in diagnosis.batches]
    axes.errorbar(sizes, *line("own"), color=OWN_COLOUR, marker="o", ms=4, lw=1.2, label="promised by the batch")
    axes.errorbar(sizes, *line("unbiased"), color=UNBIASED_COLOUR, marker="s", ms=4, lw=1.2, label="on all data")
    axes.axhline(0.0, color="black", lw=1)
    axes.set_ylabel("decrease of the quadratic, nats")
    axes.set_title(f"{diagnosis.steps[-1]} steps of conjugate gradients", fontsize=9)


def _plot_rows(axes: "Axes", rows: RowShares) -> None:
    axes.plot(rows.numbers, 100 * rows.leading, color=UNBIASED_COLOUR, marker="o", ms=3, lw=1.2, label="leading rows")
    # on a logarithmic axis a straight line needs many points
    every = torch.logspace(0, log10(rows.n_rows), 200)
    axes.plot(every, 100 * every / rows.n_rows, color=OWN_COLOUR, lw=1.2, label="rows of random samples")
    n = rows.n_for_99
    axes.vlines(n, 100 * n / rows.n_rows, 99, color="black", lw=1, ls=":", label=f"{grouped(n)} rows: 99 %")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: grouped(round(x)))
    axes.set_ylim(top=140)  # room for the legend
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlabel(f"rows, of {grouped(rows.n_rows)}")
    axes.set_ylabel("share of the curvature, %")
    axes.set_title("curvature in leading rows, by score", fontsize=9)
