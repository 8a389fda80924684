"""A diagnosis for people: sentences, a table, a picture."""

from math import isfinite
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from debiased_laplace.calibration import ReportFigure, ReportTable
from debiased_laplace.diagnosis.findings import Findings, Pairs, Ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OWN, UNBIASED = "#D55E00", "#0072B2"
FIRST = slice(0, 1)
NOTHING = "\u2013"


def show(ratio: Ratio) -> str:
    """A ratio with two digits, however small."""
    if not isfinite(ratio.value):
        return NOTHING
    if ratio.value != 0 and abs(ratio.value) < 0.095:
        return f"{ratio.value:.2g}" + (f" ± {ratio.standard_error:.1g}" if isfinite(ratio.standard_error) else "")
    return str(ratio)


def real_share(pairs: Pairs, columns: slice = slice(None)) -> Ratio:
    """How much of the batch's own value all data have too."""
    return Pairs(pairs.unbiased, pairs.own).ratio(columns)


def mean_and_error(t: Float[Tensor, " d"]) -> str:
    """Mean over draws with its standard error."""
    error = f" ± {float(t.std() / len(t) ** 0.5):.2g}" if len(t) > 1 else ""
    return f"{float(t.mean()):.3g}{error}"


def summarize(diagnosis: Findings) -> str:
    """What the numbers say, in sentences."""
    smallest, largest = diagnosis.batches[0], diagnosis.batches[-1]
    several = largest is not smallest
    total = f"{diagnosis.n_data:,}".replace(",", "\u202f")
    sentences = [
        f"The first curvature of a batch of {smallest.batch_size} is {show(smallest.leading.ratio(FIRST))} times what "
        f"it is on all {total} samples"
        + (
            f", that of a batch of {largest.batch_size} {show(largest.leading.ratio(FIRST))} times." if several else "."
        ),
        f"Of the slope along the gradient of a batch of {smallest.batch_size}, a share of "
        f"{show(real_share(smallest.gradient))} is real"
        + (f", for {largest.batch_size} samples {show(real_share(largest.gradient))}." if several else "."),
    ]
    if not isfinite(largest.leading.ratio(FIRST).low):
        sentences.append("From which size on that is a tenth or less takes more than one draw to tell.")
    elif diagnosis.enough is None:
        sentences.append(
            f"Up to batches of {largest.batch_size}, the first curvature is detectably more than a tenth too large."
        )
    else:
        sentences.append(
            f"From batches of {diagnosis.enough} on, no excess of the first curvature above a tenth can be detected."
        )
    gains = [(batch.batch_size, batch.posterior) for batch in diagnosis.batches if batch.posterior is not None]
    if gains:
        (first, gain), (last, last_gain) = gains[0], gains[-1]
        sentences.append(
            f"Debiasing brings a posterior of prior precision {diagnosis.prior_precision:g} closer to the full batch "
            f"by {mean_and_error(gain)} nats for batches of {first}"
            + (f" and {mean_and_error(last_gain)} for {last}." if last > first else ".")
        )
    return " ".join(sentences)


def tabulate(diagnosis: Findings) -> ReportTable:
    """One row for each size of batch."""
    last = diagnosis.steps[-1]
    columns = [
        "batch",
        "first curvature, own / all data",
        "first ten, own / all data",
        "last tenth, own / all data",
        "real share of the gradient's slope",
        f"decrease promised by {last} CG steps",
        "decrease on all data",
    ]
    with_posterior = any(batch.posterior is not None for batch in diagnosis.batches)
    if with_posterior:
        columns.append("nats gained by debiasing")
    rows = []
    for batch in diagnosis.batches:
        row = [
            str(batch.batch_size),
            show(batch.leading.ratio(FIRST)),
            show(batch.leading.ratio()),
            show(batch.trailing.ratio()),
            show(real_share(batch.gradient)),
            mean_and_error(batch.decrease.own[:, -1]),
            mean_and_error(batch.decrease.unbiased[:, -1]),
        ]
        if with_posterior:
            row.append(NOTHING if batch.posterior is None else mean_and_error(batch.posterior))
        rows.append(row)
    note = (
        f"Mean over {diagnosis.n_draws} draws ± standard error; values for all data are estimated without bias from "
        f"{diagnosis.n_reference} samples of each draw that no batch has seen. Decreases of the quadratic model of the "
        f"mean loss, in nats a sample, with damping {diagnosis.damping:g}; a negative one is a rise."
    )
    if with_posterior:
        note += (
            f" Nats: held-out KL of the posterior with the batch's own curvatures minus that of the cross-fitted one, "
            f"prior precision {diagnosis.prior_precision:g}."
        )
    return ReportTable("How biased is a batch?", columns, rows, note)


def as_text(diagnosis: Findings) -> str:
    """For a terminal."""
    table = tabulate(diagnosis)
    lines = [[str(c) for c in table.columns], *([str(c) for c in row] for row in table.rows)]
    # one line per quantity: eight columns of words fit no terminal
    turned = list(zip(*lines, strict=True))
    widths = [max(len(line[j]) for line in turned) for j in range(len(lines))]
    body = "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in turned)
    return f"{summarize(diagnosis)}\n\n{body}\n\n{table.note}"


def draw(diagnosis: Findings) -> ReportFigure:
    """The picture with its text alternative, for a report."""
    return ReportFigure.from_matplotlib(
        "How biased is a batch?",
        picture(diagnosis),
        alt=summarize(diagnosis),
        note="Bars: 95 % intervals over draws. No bias is at the black line; promises that hold lie on each other.",
    )


def picture(diagnosis: Findings) -> "Figure":
    """Curvatures, slopes and the decrease, over the size of the batch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.1), layout="constrained")
    curvature, slope, decrease = figure.subplots(1, 3)
    sizes = [b.batch_size for b in diagnosis.batches]
    _draw_ratios(curvature, sizes, [b.leading.ratio(FIRST) for b in diagnosis.batches], OWN, "o", "first")
    _draw_ratios(curvature, sizes, [b.leading.ratio() for b in diagnosis.batches], "#E69F00", "s", "first ten")
    trailing = {b.batch_size: b.trailing.ratio() for b in diagnosis.batches}
    trailing = {size: r for size, r in trailing.items() if isfinite(r.value) and r.value > 0}
    if trailing:
        _draw_ratios(curvature, list(trailing), list(trailing.values()), "#009E73", "^", "last tenth")
        curvature.set_yscale("log")
    curvature.set_ylabel("curvature on the batch / all data")
    curvature.set_title("curvature along eigenvectors", fontsize=9)
    _draw_ratios(slope, sizes, [real_share(b.gradient) for b in diagnosis.batches], UNBIASED, "o", "gradient")
    if all(b.conjugate.own.shape[1] > 2 for b in diagnosis.batches):
        later = [real_share(b.conjugate, slice(2, None)) for b in diagnosis.batches]
        _draw_ratios(slope, sizes, later, "#CC79A7", "s", "CG directions from the third on")
    slope.set_ylim(top=1.4)  # room for the legend
    slope.set_ylabel("slope on all data / on the batch")
    slope.set_title("slope along chosen directions", fontsize=9)
    _draw_decrease(decrease, diagnosis)
    for axes in (curvature, slope):
        axes.axhline(1.0, color="black", lw=1)
    for axes in (curvature, slope, decrease):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(s) for s in sizes])
        axes.set_xlabel("samples in the batch")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
    return figure


def _draw_ratios(axes: "Axes", sizes: list[int], ratios: list[Ratio], colour: str, marker: str, label: str) -> None:
    bars = [1.96 * r.standard_error if isfinite(r.standard_error) else 0.0 for r in ratios]
    axes.errorbar(sizes, [r.value for r in ratios], bars, color=colour, marker=marker, ms=4, lw=1.2, label=label)


def _draw_decrease(axes: "Axes", diagnosis: Findings) -> None:
    def ends(t: Float[Tensor, " d"]) -> tuple[float, float]:
        return float(t.mean()), float(1.96 * t.std() / len(t) ** 0.5) if len(t) > 1 else 0.0

    def line(of: str) -> tuple[list[float], list[float]]:
        found = [ends(getattr(b.decrease, of)[:, -1]) for b in diagnosis.batches]
        return [mean for mean, _ in found], [bar for _, bar in found]

    sizes = [b.batch_size for b in diagnosis.batches]
    axes.errorbar(sizes, *line("own"), color=OWN, marker="o", ms=4, lw=1.2, label="promised by the batch")
    axes.errorbar(sizes, *line("unbiased"), color=UNBIASED, marker="s", ms=4, lw=1.2, label="on all data")
    axes.axhline(0.0, color="black", lw=1)
    axes.set_ylabel("decrease of the quadratic, nats")
    axes.set_title(f"{diagnosis.steps[-1]} steps of conjugate gradients", fontsize=9)
