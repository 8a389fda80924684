"""The summary's short table: the main configurations, one column per task."""

from benchmarks.fidelity_results import Cell, Summary
from benchmarks.fidelity_tasks import RECIPES

IN_SHORT = {
    "lowrank/same_batch/none/free": '`"same_batch"`, no complement',
    "lowrank/held_out/none/free": '`"held_out"`, no complement (the paper\'s split)',
    "lowrank/cross_fitted/none/free": '`"cross_fitted"`, no complement',
    "lowrank/cross_fitted/kron/free": "the default",
    "auto": 'everything `"auto"`',
    "laplace-torch/diag": "laplace-torch's diagonal",
    "laplace-torch/kron": "laplace-torch's K-FAC",
}
"""What the table compares."""


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
