"""The summary as one Markdown page: a table per task and prior, one line per configuration, one column per B."""

from fidelity_posteriors import BASELINE
from fidelity_ranking import CRITERIA, ranking
from fidelity_results import Cell, Mean, Summary
from fidelity_tasks import RECIPES

IN_SHORT = {
    "lowrank/same_batch/none/free": '`"same_batch"`, no complement',
    "lowrank/held_out/none/free": '`"held_out"`, no complement (the paper\'s split)',
    "lowrank/cross_fitted/none/free": '`"cross_fitted"`, no complement',
    "lowrank/cross_fitted/kron/free": "the default",
    "auto": 'everything `"auto"`',
    "laplace-torch/diag": "laplace-torch's diagonal",
    "laplace-torch/kron": "laplace-torch's K-FAC",
}
"""What the summary at the top compares."""

SHOWN = {"parameter_kl": "{:.4g}", "total_variation": "{:.3f}", "predictive_kl": "{:.3g}"}


def markdown(summary: Summary, verdicts: list[str]) -> str:
    """The page."""
    parts = [
        "# Fidelity: distance to the full-batch posterior",
        "Written by `python examples/benchmarks/fidelity.py`. Each entry: KL to the full-batch posterior over the "
        "parameters in nats / total variation between predictive class probabilities (regression: between the "
        "predictive densities) / KL of the outputs at a test input (median), means over draws ± standard error of the "
        "first. B samples of N were used for curvature; all posteriors stand for N.",
        "Names: structure / magnitudes / complement / rank; `free` is every direction that the samples support.",
        "## In short",
        in_short(summary),
        "## Verdicts",
        "\n".join(f"- {verdict}" for verdict in verdicts),
        "## One configuration for all",
        _ranking(summary),
    ]
    for task, n_data in summary.n_data.items():
        parts.append(f"## {RECIPES[task].title}, N = {n_data:,}")
        for prior in sorted({cell.prior for cell in summary.cells if cell.task == task}):
            parts += [f"### Prior precision {prior:g}", _table(summary, task, prior)]
    parts += ["## Intervals for directional curvatures", _coverage(summary)]
    return "\n\n".join(parts) + "\n"


def in_short(summary: Summary, B: int = 128, prior: float = 10.0) -> str:
    """The main configurations at one number of samples and one prior, a column for each task."""
    cells = [Cell(task, B, prior) for task in RECIPES if Cell(task, B, prior) in summary.cells]
    lines = [
        f"Prior precision {prior:g}, curvature from {B} samples: parameter KL to the full batch in nats, ± standard "
        "error, and total variation of the predictions.\n",
        "| | " + " | ".join(f"{RECIPES[c.task].title}, N = {summary.n_data[c.task]:,}" for c in cells) + " |",
        "|---" * (len(cells) + 1) + "|",
    ]
    for name, shown in IN_SHORT.items():
        entries = []
        for cell in cells:
            found = summary.cells[cell].get(name, {})
            kl, tv = found.get("parameter_kl"), found.get("total_variation")
            error = f" ± {_three(kl.standard_error)}" if kl is not None and kl.n > 1 else ""
            entries.append("" if kl is None or tv is None else f"{_three(kl.mean)}{error} / {tv.mean:.2g}")
        lines.append(f"| {shown} | {' | '.join(entries)} |")
    return "\n".join(lines)


def _three(value: float) -> str:
    """Three digits without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ranking(summary: Summary) -> str:
    ranks = ranking(summary)
    cells = ranks[0].n_cells if ranks else 0
    lines = [
        "Over the best fixed configuration of each cell with B from 64 to N/2: geometric mean over the "
        f"{cells} cells (largest), best twenty by the mean of both criteria, and laplace-torch's.\n",
        "| configuration | parameter KL | total variation |",
        "|---|---|---|",
    ]
    for i, rank in enumerate(ranks):
        if i < 20 or rank.configuration.startswith(BASELINE) or rank.configuration.endswith("none/free"):
            shown = (f"{rank.excess[c]:.2f} ({rank.worst[c]:.3g})" for c in CRITERIA)
            lines.append(f"| {rank.configuration} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _table(summary: Summary, task: str, prior: float) -> str:
    sizes = sorted({cell.B for cell in summary.cells if cell.task == task and cell.prior == prior})
    names = sorted({name for B in sizes for name in summary.cells.get(Cell(task, B, prior), {})})
    lines = ["| | " + " | ".join(f"B = {B}" for B in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for name in names:
        entries = (_entry(summary.cells.get(Cell(task, B, prior), {}).get(name)) for B in sizes)
        lines.append(f"| {name} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def _entry(criteria: dict[str, Mean] | None) -> str:
    if not criteria:
        return ""
    shown = [form.format(criteria[name].mean) if name in criteria else "–" for name, form in SHOWN.items()]
    kl = criteria.get("parameter_kl")
    if kl is not None and kl.n > 1:
        shown[0] += f" ± {kl.standard_error:.2g}"
    return " / ".join(shown)


def _coverage(summary: Summary) -> str:
    lines = [
        "Share of nominal 95 % intervals that contain the full batch's curvature: `confidence_intervals()`, value "
        "± 1.96 standard errors, and the same on a log scale.\n",
        "| task | configuration | magnitude samples | intervals | `confidence_intervals()` | plain | log scale |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {c['task']} | {c['configuration']} | {c['n_magnitude_samples']} | {c['intervals']} | "
        f"{'–' if c['interval'] is None else format(c['interval'], '.1%')} | {c['plain']:.1%} | {c['log']:.1%} |"
        for c in summary.coverage
    ]
    return "\n".join(lines)
