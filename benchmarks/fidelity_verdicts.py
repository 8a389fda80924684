"""What the benchmark was set up to show, as one line each, true or not."""

from collections.abc import Iterator
from statistics import median

from benchmarks.fidelity_posteriors import AUTO, BASELINE, CORRECTED, SHRINKAGE, WHITENED
from benchmarks.fidelity_results import Cell, Summary

SAME, CROSS = "lowrank/same_batch/none/free", "lowrank/cross_fitted/none/free"
KFAC = f"{BASELINE}/kron"
CANDIDATES = (AUTO, "lowrank/cross_fitted/kron/100", "lowrank/cross_fitted/kron/free", CROSS)
NOT_MEASURED = "not measured"
DEFAULT = "lowrank/cross_fitted/kron/free"
PAIRS = (
    ("lowrank/held_out/none/free", SAME),
    (DEFAULT, CROSS),
    (f"lowrank/cross_fitted/{WHITENED}/free", DEFAULT),
    ("lowrank/cross_fitted/kron/400", DEFAULT),
    ("kron/cross_fitted", "kron/same_batch"),
    (f"{SHRINKAGE}/0.7", DEFAULT),
    (CORRECTED, CROSS),
)
"""Which choices rest on a comparison of two configurations."""
EXACT = 1e-2
"""Nats, and total variation, below which a posterior is the full batch but for single precision."""


def verdicts(summary: Summary) -> list[str]:
    """All of them, in the order of the goals."""
    return [
        *(_never_further(summary, criterion) for criterion in ("parameter_kl", "total_variation")),
        *(_at_all_data(summary, name) for name in (SAME, CROSS)),
        *(_twice_as_close(summary, criterion) for criterion in ("parameter_kl", "total_variation")),
        _least_possible(summary),
        *(_against(summary, *pair, criterion) for pair in PAIRS for criterion in ("parameter_kl", "total_variation")),
        _auto_against_fixed(summary),
        _auto_against_kfac(summary),
        *_tenth_of_the_data(summary),
        *_over_parametrized(summary),
        *_coverage(summary),
        _kendall(summary),
    ]


def ratios(summary: Summary, numerator: str, denominator: str, criterion: str) -> dict[Cell, float]:
    """Ratio of the means of two configurations in every cell with B from 64 to N/2 that has both."""
    found = {}
    for cell in summary.cells:
        pair = [summary.mean(cell, name, criterion) for name in (numerator, denominator)]
        if 64 <= cell.B <= summary.n_data[cell.task] / 2 and None not in pair and pair[1]:
            found[cell] = pair[0] / pair[1]
    return found


def _never_further(summary: Summary, criterion: str) -> str:
    head = f"cross_fitted further than same_batch in {_words(criterion)}, B from 64 to N/2"
    found = ratios(summary, CROSS, SAME, criterion)
    worse = {cell: ratio for cell, ratio in found.items() if ratio > 1}
    if not found:
        return f"{head}: {NOT_MEASURED}"
    cells = "".join(f"; {cell}: {ratio:.2f} times" for cell, ratio in worse.items())
    return f"{head}: in {len(worse)} of {len(found)} cells{cells}"


def _at_all_data(summary: Summary, name: str) -> str:
    head = f"{name} on all the data: largest distances to the full batch"
    cells = [c for c in summary.cells if summary.n_data[c.task] == c.B and summary.mean(c, name, "parameter_kl")]
    if not cells:
        return f"{head}: {NOT_MEASURED}"
    kl, tv = (max(summary.mean(c, name, k) or 0.0 for c in cells) for k in ("parameter_kl", "total_variation"))
    exact = "exact" if max(kl, tv) < EXACT else "not exact"
    return f"{head}: {kl:.2g} nats, total variation {tv:.2g}, over {len(cells)} cells: {exact}"


def _twice_as_close(summary: Summary, criterion: str) -> str:
    head = f"same_batch / cross_fitted in {_words(criterion)}, median over cells with B of 64 to 128 (goal: 2)"
    found = [ratio for cell, ratio in ratios(summary, SAME, CROSS, criterion).items() if cell.B <= 128]
    return f"{head}: {median(found):.2f} over {len(found)} cells" if found else f"{head}: {NOT_MEASURED}"


def _least_possible(summary: Summary) -> str:
    """Along the directions of all samples, without a complement: no estimator of the magnitudes can do better."""
    head = "same_batch over the least KL along the same directions, median over cells with B of 64 to 128"
    found = []
    for cell in ratios(summary, SAME, CROSS, "parameter_kl"):
        least, same = (summary.mean(cell, CROSS, "least_parameter_kl"), summary.mean(cell, SAME, "parameter_kl"))
        if least and same and cell.B <= 128:
            found.append(same / least)
    return f"{head}: {median(found):.2f} over {len(found)} cells" if found else f"{head}: {NOT_MEASURED}"


def _against(summary: Summary, one: str, other: str, criterion: str) -> str:
    head = f"{one} over {other} in {_words(criterion)}, B from 64 to N/2"
    found = ratios(summary, one, other, criterion)
    if not found:
        return f"{head}: {NOT_MEASURED}"
    low, high = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
    lower = sum(ratio < 1 for ratio in found.values())
    return (
        f"{head}: median {median(found.values()):.3f}, lower in {lower} of {len(found)} cells, "
        f"from {found[low]:.2f} ({low}) to {found[high]:.2f} ({high})"
    )


def _auto_against_fixed(summary: Summary) -> str:
    head = "auto within 10 % of the best fixed choice in parameter KL (goal: 9 of 10 cells)"
    excess = {}
    for cell, configurations in summary.cells.items():
        fixed = [
            criteria["parameter_kl"].mean
            for name, criteria in configurations.items()
            if name != AUTO and not name.startswith(BASELINE) and "parameter_kl" in criteria
        ]
        auto = summary.mean(cell, AUTO, "parameter_kl")
        if auto is not None and fixed and 64 <= cell.B <= summary.n_data[cell.task] / 2:
            excess[cell] = auto / min(fixed) - 1
    if not excess:
        return f"{head}: {NOT_MEASURED}"
    far = {cell: e for cell, e in excess.items() if e > 0.1}
    cells = "".join(f"; {cell}: {e:+.0%}" for cell, e in far.items())
    return f"{head}: in {len(excess) - len(far)} of {len(excess)} cells{cells}"


def _auto_against_kfac(summary: Summary) -> str:
    head = "auto further than laplace-torch's K-FAC on the same samples in parameter KL (goal: never)"
    found = ratios(summary, AUTO, KFAC, "parameter_kl")
    if not found:
        return f"{head}: {NOT_MEASURED}"
    worse = [f"; {cell}: {ratio:.2f} times" for cell, ratio in found.items() if ratio > 1]
    return f"{head}: in {len(worse)} of {len(found)} cells{''.join(worse)}"


def _tenth_of_the_data(summary: Summary) -> Iterator[str]:
    for task, n_data in summary.n_data.items():
        sizes = [cell.B for cell in summary.cells if cell.task == task and n_data / 10 >= cell.B]
        head = f"{task}, at most a tenth of the data, over laplace-torch's K-FAC on all (goal: 0.33)"
        lines = []
        for prior in sorted({cell.prior for cell in summary.cells if cell.task == task}):
            for name in (AUTO, CROSS, "lowrank/cross_fitted/kron/100"):
                pairs = [
                    (
                        summary.mean(Cell(task, max(sizes, default=0), prior), name, criterion),
                        summary.mean(Cell(task, n_data, prior), KFAC, criterion),
                    )
                    for criterion in ("total_variation", "predictive_kl")
                ]
                if all(a is not None and b for a, b in pairs):
                    tv, kl = (a / b for a, b in pairs)
                    lines.append(f"; prior {prior:g}, {name}: total variation {tv:.2f}, predictive KL {kl:.2f}")
        yield f"{head}, B = {max(sizes)}{''.join(lines)}" if lines else f"{head}: {NOT_MEASURED}"


def _over_parametrized(summary: Summary) -> Iterator[str]:
    for rank, goal in (("free", 5), ("100", 20)):
        for B in (128, 256):
            cell = Cell("30_classes", B, 1.0)
            name = next((n for n in CANDIDATES if summary.mean(cell, n, "parameter_kl") is not None), None)
            same = f"lowrank/same_batch/none/{rank}"
            head = f"{cell}: same_batch at rank {rank} over {name} (goal: {goal})"
            parts = []
            for criterion in ("parameter_kl", "total_variation"):
                pair = [summary.mean(cell, n, criterion) if n else None for n in (same, name)]
                parts.append(f"{_words(criterion)} {pair[0] / pair[1]:.1f}" if None not in pair else NOT_MEASURED)
            yield f"{head}: {', '.join(parts)}"


def _coverage(summary: Summary) -> Iterator[str]:
    head = "nominal 95 % intervals that contain the full batch's curvature (goal: 90 % from 256 samples)"
    names = sorted({c["configuration"] for c in summary.coverage})
    if not names:
        yield f"{head}: {NOT_MEASURED}"
    for name in names:
        parts = []
        for n in sorted({c["n_magnitude_samples"] for c in summary.coverage if c["configuration"] == name}):
            found = [c for c in summary.coverage if (c["configuration"], c["n_magnitude_samples"]) == (name, n)]
            shares = {}
            for kind in ("interval", "plain", "log"):
                known = [(c[kind], c["intervals"]) for c in found if c[kind] is not None]
                total = sum(n_intervals for _, n_intervals in known)
                shares[kind] = f"{sum(hit * n_intervals for hit, n_intervals in known) / total:.0%}" if known else "?"
            parts.append(f"{n}: {shares['interval']} (plain {shares['plain']}, log {shares['log']})")
        yield f"{head}, {name}, by magnitude samples: {'; '.join(parts)}"


def _kendall(summary: Summary) -> str:
    head = "Kendall's tau of held-out and true KL over the posteriors of a cell (goal: 0.9)"
    if not summary.kendall:
        return f"{head}: {NOT_MEASURED}"
    taus = {cell: value.mean for cell, value in summary.kendall.items()}
    low = "".join(f"; {cell}: {tau:.2f}" for cell, tau in taus.items() if tau < 0.9)
    values = taus.values()
    found = f"median {median(values):.2f}, lowest {min(values):.2f} over {len(taus)} cells"
    return f"{head}: {found}; below 0.9{low or ': none'}"


def _words(criterion: str) -> str:
    return criterion.replace("_", " ").replace("kl", "KL")
